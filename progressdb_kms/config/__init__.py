"""From flags, a file and the environment to checked settings and loaded keys: the only importer of `yaml`."""
