"""The private example trains, and says what it spent."""

import pytest

import medpeft

pytest.importorskip("opacus")


@pytest.mark.filterwarnings(
    "ignore:Full backward hook", "ignore:Secure RNG turned off", "ignore:Optimal order is the largest alpha"
)
def test_it_trains_and_says_what_it_spent(tmp_path, monkeypatch, capsys):
    import finetune
    import private

    folder = finetune.tissue_patches(tmp_path / "images")
    monkeypatch.setattr(finetune, "SIZE", 32)
    adapter = tmp_path / "runs" / "a.safetensors"
    for name, value in {"EPOCHS": 1, "ADAPTER": adapter}.items():
        monkeypatch.setattr(private, name, value)
    private.main(folder)

    *_, tested, spent = capsys.readouterr().out.splitlines()
    assert 0.5 < float(tested.split()[4].rstrip(";")) <= 1
    assert 1.5 < float(spent.split()[2]) < 4
    assert "at δ = 0.001, for one of" in spent
    assert medpeft.inspect(adapter).methods.keys() == {"ssf"}
