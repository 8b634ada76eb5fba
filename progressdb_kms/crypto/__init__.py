"""The cipher, the bytes of a wrapped DEK, the keyring, locked memory: the only importer of `cryptography`."""
