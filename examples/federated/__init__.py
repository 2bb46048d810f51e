"""Training between sites that keep their images: only adapters travel."""
