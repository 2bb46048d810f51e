"""A labelled set of images: where it comes from, how it is split, and how it reaches the model."""
