"""The training loop resumes to the same result, stops where it should, and warms its learning rate up."""

import pytest
import torch
import train
from small_training import draw_stripes, flags, messages, run
from trainer.loop import warmup_cosine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return draw_stripes(tmp_path_factory.mktemp("stripes"))


def history(record):
    return [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in record["history"]]


def test_a_killed_run_resumes_to_the_same_result(folder, tmp_path, monkeypatch):
    more = ["--epochs", "3", "--method", "full"]
    whole = run(*flags(folder, tmp_path / "whole", *more))

    def killed(training):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("trainer.loop.epoch_line", killed)
        assert train.main(flags(folder, tmp_path / "cut", *more)) == 130
    assert not (tmp_path / "cut" / "metrics.json").exists()
    resumed = run(*flags(folder, tmp_path / "cut", *more, "--resume"))
    assert history(resumed) == history(whole)
    assert resumed["test"] == whole["test"]


def test_resuming_a_finished_run_trains_no_further(folder, tmp_path, capsys):
    first = run(*flags(folder, tmp_path))
    capsys.readouterr()
    again = run(*flags(folder, tmp_path, "--resume"))
    assert "Resumed after epoch 2" in capsys.readouterr().out
    assert again["history"] == first["history"]
    assert again["test"] == first["test"]


def test_resuming_without_a_checkpoint_begins(folder, tmp_path, capsys):
    record = run(*flags(folder, tmp_path, "--resume", "--epochs", "1"))
    assert "has no last.ckpt: beginning with epoch 1" in capsys.readouterr().out
    assert len(record["history"]) == 1


def test_resuming_with_other_settings_is_refused(folder, tmp_path, capsys):
    given = flags(folder, tmp_path, "--epochs", "1", "--method", "bn")
    run(*given)
    for changed, text in (
        (["--lr", "0.5"], "--lr was 0.003 and is 0.5. Resume with the same ones"),
        (["--model", "test_resnet"], "--model was 'test_efficientnet' and is 'test_resnet'"),
        (["--data", str(tmp_path)], "no images"),
    ):
        assert text in messages(capsys, *given, *changed, "--resume")


def test_training_stops_early_and_keeps_the_best_epoch(folder, tmp_path, monkeypatch):
    scores = iter([0.5, 0.8, 0.7, 0.6, 0.9])
    monkeypatch.setattr("trainer.loop.macro_f1", lambda logits, labels: next(scores))
    record = run(*flags(folder, tmp_path, "--epochs", "5", "--patience", "2"))
    assert len(record["history"]) == 4
    assert record["best_epoch"] == 2


def test_a_loss_that_is_no_number_stops_with_advice(folder, tmp_path, capsys):
    error = messages(capsys, *flags(folder, tmp_path, "--method", "full", "--lr", "1e30"))
    assert "The training loss became nan in epoch" in error
    assert "Lower --lr" in error


def test_the_learning_rate_warms_up_and_falls_to_zero():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = warmup_cosine(optimizer, 40)
    rates = []
    for _ in range(40):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[0] == 0.5
    assert max(rates) == rates[3] == 2.0
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] < 0.01
