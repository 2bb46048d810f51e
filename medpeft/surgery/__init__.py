"""Changing a model and changing it back, without knowing any formula."""
