"""A search draws from what the trainer and the method declare, and begins with what would be done without it."""

import pytest
from study.cluster import Machines
from study.search import at_point, search, search_space, start_of
from test_study_trials import TINY
from trainer.errors import TrainerError
from trainer.settings import Settings

import medpeft


def settings(method, **more):
    return Settings(**TINY, method=method, **more).checked()


def test_the_space_is_the_trainers_and_the_methods_own():
    space = search_space(settings("lora+ssf"), {})
    assert set(space) == {"lr", "weight_decay", "augment", *medpeft.search_space("lora+ssf")}
    assert (space["lr"].lower, space["lr"].upper) == pytest.approx((1e-4, 1e-2))
    assert tuple(space["lora.rank"].categories) == medpeft.search_space("lora")["lora.rank"]
    assert "light" in space["augment"].categories


def test_what_is_given_is_not_searched():
    space = search_space(settings("lora", option={"rank": 3}, lr=0.01), {"lr": 0.01})
    assert set(space) == {"weight_decay", "augment", "lora.dora"}


def test_nothing_to_search_is_an_error():
    given = {"lr": 0.1, "weight_decay": 0.0, "augment": "none"}
    with pytest.raises(TrainerError, match="Nothing is left to search"):
        search_space(settings("bias", **given), given)


def test_the_first_point_is_what_the_trainer_would_do_without_a_search():
    own = settings("lora")
    assert start_of(own, search_space(own, {})) == {
        "lr": 0.001, "weight_decay": 0.01, "augment": "light", "lora.rank": 8, "lora.dora": False
    }  # fmt: skip


def test_a_method_that_does_not_fit_is_refused_before_anything_starts():
    own = settings("adaptformer")
    with pytest.raises(medpeft.MedpeftError, match="'adaptformer' found nothing to train"):
        start_of(own, search_space(own, {}))


def test_places_of_a_trial_hold_from_any_working_folder(tmp_path, monkeypatch):
    def make_tuner(settings, *others):
        assert settings.data == str(tmp_path / "images")
        raise KeyboardInterrupt

    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Machines, "start", lambda machines: None)
    monkeypatch.setattr("study.search.make_tuner", make_tuner)
    with pytest.raises(KeyboardInterrupt):
        search(settings("lora", data="images"), {}, {"samples": 1}, tmp_path, Machines())


def test_a_point_changes_what_it_names_and_nothing_else():
    own = settings("lora+ssf", option={"lora": {"rank": 2}})
    found = at_point(own, {"lr": 0.0123, "augment": "none", "lora.dora": True, "ssf.init": "official"})
    assert (found.lr, found.augment, found.weight_decay) == (0.0123, "none", own.weight_decay)
    assert found.option == {"lora": {"rank": 2, "dora": True}, "ssf": {"init": "official"}}
    assert own.option == {"lora": {"rank": 2}, "ssf": {}}
