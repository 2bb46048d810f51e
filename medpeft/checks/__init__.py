"""The proof that every trained tensor has an effect."""
