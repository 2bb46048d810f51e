"""The parts of the reference trainer; `train.py` beside this folder puts them together."""
