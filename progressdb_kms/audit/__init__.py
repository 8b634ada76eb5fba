"""The signed log: writing it, its chains, checking it."""
