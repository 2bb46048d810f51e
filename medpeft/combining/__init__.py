"""SEVERAL ADAPTERS of one base made into one."""
