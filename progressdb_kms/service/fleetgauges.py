"""What /metrics tells of a fleet beside what it tells of every service."""

from __future__ import annotations

FAMILIES = {
    "fleet_lease_seconds": "Until this host's lease ends; 0 without one: it refuses every key.",
    "fleet_placed": "1 while this host has its place in the fleet, and word of the database.",
    "fleet_hosts": "Hosts of the fleet that are not fenced.",
    "fleet_hosts_fenced": "Hosts that were silent for too long, and have not come back.",
    "fleet_behind": "Changes that the host which is furthest behind does not know of yet.",
    "fleet_changes_total": "Changes that this host made and waited for until they held everywhere.",
    "fleet_changes_unknown_total": "Of these, those answered 503 done_not_everywhere.",
    "fleet_changes_wait_seconds_total": "For how long all of them waited.",
    "fleet_engine_connections": "Connections to the engine, of all who use it.",
    "fleet_engine_connections_limit": "Connections that the engine allows.",
    "fleet_engine_synchronous": "1 where the engine waits for a standby before it acknowledges.",
    "fleet_engine_standbys": "Synchronous standbys that are connected, where the role may see them.",
}
"""Metrics of a fleet; by the keeper, which knows them without the first word."""
