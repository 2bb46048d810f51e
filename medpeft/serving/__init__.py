"""Many adapters on one base: each image by its own, switched and withdrawn exactly."""
