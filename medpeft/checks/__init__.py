"""The proof that what trains acts."""
