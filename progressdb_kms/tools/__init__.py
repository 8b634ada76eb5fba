"""The command line. Nothing that serves imports it."""
