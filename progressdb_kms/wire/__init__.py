"""HTTP and JSON: bytes in, answers out."""
