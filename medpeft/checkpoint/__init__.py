"""The file: written whole or not at all, read as if it were hostile."""
