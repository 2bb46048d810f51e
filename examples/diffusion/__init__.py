"""The parts of the text-to-image example, which `text_to_image.py` and `generate.py` put together."""

import sys

import datasets
import diffusers.utils.logging
import transformers.utils.logging

# A log would be full of carriage returns.
if not sys.stderr.isatty():
    datasets.disable_progress_bars()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
