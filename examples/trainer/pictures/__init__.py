"""Pictures of a run, and of where a network looked."""
