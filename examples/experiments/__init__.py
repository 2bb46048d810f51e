"""The paper's experiments: many runs of the reference trainer, recorded once, then laid out in tables and pictures."""
