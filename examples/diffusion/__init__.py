"""The parts of the text-to-image example; `text_to_image.py` and `generate.py` beside this folder put them together."""
