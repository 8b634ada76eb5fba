"""Many hosts, one PostgreSQL: loaded only where `store: postgresql` is configured."""
