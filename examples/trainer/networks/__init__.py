"""The network of a run: by its name, with its weights, and as large as the memory allows."""
