"""The processes, and the order in which they come and go."""
