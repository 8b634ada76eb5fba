"""Where wrapped DEKs live: the contract, SQLite, the states of a DEK, snapshots, erasure."""
