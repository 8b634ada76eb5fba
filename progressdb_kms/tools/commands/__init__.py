"""All commands, in the order in which help and manual list them: a file a group, a row above a function."""

from __future__ import annotations

from ..command import Command
from . import audit, daemon, deks, fleet, keys, others, store

COMMANDS = tuple(
    found
    for group in (daemon, deks, keys, audit, store, fleet, others)
    for found in vars(group).values()
    if isinstance(found, Command)
)
