"""Further inputs of a mixed batch, and outputs that are no tensor: each image gets its own, or an error comes."""

from dataclasses import dataclass

import pytest
import torch
from banks import file_of
from checkpoints import trained
from torch import nn

import medpeft

METHODS = {"a": "ssf", "b": "ssf", "other": "bias"}


class Asked(nn.Module):
    """A model that takes a text that all images share, and something of each image in a dict."""

    def __init__(self, made=lambda y: y):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.text, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)
        self.made = made

    def forward(self, x, text=None, of_images=None):
        y = torch.relu(self.body(x))
        if text is not None:
            y = y + self.text(text).mean(0)
        if of_images is not None:
            y = y * of_images["gains"][0]
        return self.made(self.head(y))


def bank_and_models(**made):
    models, bank = {None: Asked(**made).eval()}, medpeft.Bank(Asked(**made).eval())
    for seed, (name, method) in enumerate(METHODS.items()):
        models[name] = trained(Asked(**made), method, seed=seed, head="head")
        bank.add(name, file_of(models[name]))
    return bank, models


@pytest.mark.parametrize("tokens", [1, 2, 3])
@pytest.mark.parametrize("names", [["a", "b", "a", "other", None], ["a", "b", "b", "a", "a"]])
def test_a_text_of_as_many_tokens_as_some_images_is_shared_by_all(names, tokens):
    bank, models = bank_and_models()
    x, text = torch.randn(5, 4), torch.randn(tokens, 4)
    for i, row in enumerate(bank(x, names, text=text)):
        torch.testing.assert_close(row, models[names[i]](x[i : i + 1], text=text)[0].detach())


@pytest.mark.parametrize("names", [["a", "b", "a", "other", None], ["a", "b", "b", "a", "a"]])
def test_tensors_within_a_dict_are_divided_like_the_images(names):
    bank, models = bank_and_models()
    x, gains = torch.randn(5, 4), torch.arange(1.0, 6.0)[:, None]
    for i, row in enumerate(bank(x, names, of_images={"gains": [gains]})):
        alone = models[names[i]](x[i : i + 1], of_images={"gains": [gains[i : i + 1]]})[0].detach()
        torch.testing.assert_close(row, alone)


@dataclass
class Answer:
    logits: torch.Tensor


def an_answer(y):
    return Answer(y)


def an_array(y):
    return y.detach().numpy()


def a_loss(y):
    return y, float(y.detach().sum())


@pytest.mark.parametrize("made", [an_answer, an_array, a_loss])
@pytest.mark.parametrize("names", [["a", "other"], ["a", "b"]])
def test_an_output_in_which_no_images_are_found_is_not_divided(names, made):
    bank, models = bank_and_models(made=made)
    x = torch.randn(2, 4)
    with pytest.raises(medpeft.MedpeftError, match="finds no row for each image: have it return tensors"):
        bank(x, names)
    assert type(bank(x, "a")) is type(models["a"](x))


def test_flags_and_names_in_an_output_stay_as_they_are():
    bank, models = bank_and_models(made=lambda y: {"logits": y, "kind": "logits", "aux": None})
    x, names = torch.randn(3, 4), ["a", "b", "other"]
    found = bank(x, names)
    assert (found["kind"], found["aux"]) == ("logits", None)
    for i, name in enumerate(names):
        torch.testing.assert_close(found["logits"][i], models[name](x[i : i + 1])["logits"][0].detach())
