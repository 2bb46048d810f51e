"""The tiny pipeline: its tokenizer knows the words, and it is the same each time."""

import pytest
import torch
from diffusion.pipelines import frozen
from diffusion.tiny import build_tiny, make_tokenizer
from small_diffusion import SIDE, TEXTS, images_of
from trainer.errors import TrainerError


def test_a_tokenizer_has_one_token_for_each_word_and_spells_others():
    tokenizer = make_tokenizer(["Breast ultrasound, benign", "normal"])
    assert tokenizer.tokenize("ultrasound, benign normal") == [
        "ultrasound</w>",
        ",</w>",
        "benign</w>",
        "normal</w>",
    ]
    assert tokenizer.unk_token not in tokenizer.tokenize("malignant (2.5-3%)")
    assert make_tokenizer(["normal", "breast ultrasound benign"]).get_vocab() == tokenizer.get_vocab()


def test_the_tiny_pipeline_is_the_same_each_time():
    one, two = (frozen(build_tiny(TEXTS.values(), SIDE, seed=3)) for _ in range(2))
    assert torch.equal(images_of(one), images_of(two))


def test_a_size_that_the_tiny_pipeline_cannot_take_is_refused():
    with pytest.raises(TrainerError, match="Use 16, 32, 64 or 128"):
        build_tiny([], 48, seed=0)
