"""The statistics of `examples/human_voices.py`, against SciPy's and what is known; its clips on a tiny model."""

import json
import sys

import human_voices
import numpy as np
import pytest
import soundfile
from human_voices import NAMES, agreement, friedman, read_packs
from scipy.stats import friedmanchisquare
from tiny_models import clip, tiny_model, tiny_processor


def test_the_permutation_p_is_near_scipys_for_many_packs():
    values = np.random.default_rng(0).normal(size=(40, 5)) + 0.25 * np.arange(5)
    statistic, p = friedman(values)
    expected = friedmanchisquare(*values.T)
    assert statistic == pytest.approx(expected.statistic)
    assert p == pytest.approx(expected.pvalue, abs=0.02)


def test_names_ordered_alike_in_every_pack_are_found_and_noise_is_not():
    rng = np.random.default_rng(1)
    ordered = np.arange(5) + 0.1 * rng.normal(size=(12, 5))
    assert friedman(ordered)[1] < 0.001
    assert agreement(ordered, [1, 2, 3, 4, 5]) == pytest.approx((1.0, 0.0001), abs=0.001)
    assert agreement(-ordered, [1, 2, 3, 4, 5])[0] == pytest.approx(-1.0)
    rates = [friedman(rng.normal(size=(12, 5)), seed=seed)[1] < 0.05 for seed in range(20)]
    assert sum(rates) <= 4


def test_packs_without_all_the_names_are_left_out_and_the_others_are_heard(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(human_voices, "PERMUTATIONS", 100)
    for index, pack in enumerate(("A", "B", "C", "half")):
        (tmp_path / "voices" / pack).mkdir(parents=True)
        for place, name in enumerate(NAMES[: 2 if pack == "half" else None]):
            soundfile.write(tmp_path / "voices" / pack / f"{name}.ogg", clip(0.4, seed=10 * index + place), 16_000)
    packs, clips = read_packs(tmp_path / "voices")
    assert packs == ["A", "B", "C"] and [len(of_pack) for of_pack in clips] == [5, 5, 5]
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    arguments = ["human_voices.py", str(tmp_path / "model"), str(tmp_path / "voices")]
    monkeypatch.setattr(
        sys, "argv", [*arguments, "--plot", str(tmp_path / "a.png"), "--json", str(tmp_path / "a.json")]
    )
    human_voices.main()
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["packs"] == packs and np.shape(found["arousal"]["values"]) == (3, 5)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG") and "Friedman" in capsys.readouterr().out


def test_a_folder_without_packs_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="Unpack hedgewars-data"):
        read_packs(tmp_path)
