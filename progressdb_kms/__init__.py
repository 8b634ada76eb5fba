"""progressdb-kms: a local key-management daemon for ProgressDB.

One 32-byte key-encryption key (KEK) in locked memory wraps many data-encryption keys (DEKs);
callers reach it by HTTP over a Unix domain socket and never see either.

For programs: `progressdb_kms.client.Client`. For operators: the command `progressdb-kms`.
"""

__version__ = "1.0.0"
