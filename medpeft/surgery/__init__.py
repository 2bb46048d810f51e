"""Changing a model and changing it back; no formula is known here."""
