"""The comparison on people's voices: its numbers against scikit-learn's; its steps on a tiny tree of such names."""

import functools
import io
import json
import os
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import voice_baselines
import voices_demo
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tiny_models import clip, tiny_llm, tiny_speech_tower, tiny_tokenizer
from voice_baselines import linear_probe, majority, vector_machine
from voice_results import EMOTIONS, compare, measure, results_table
from voices_demo import VoicesSettings, evaluate_voices, probe_projector, run_voices, train_fold

from relllm.data.loading import load_corpus

PACKS = {"British": "en", "Pirate": "en", "Default_ru": "ru"}
SHOUTS = (
    "Victory",
    "Laugh",
    "Traitor",
    "Coward",
    "Nooo",
    "Incoming",
    "Ow1",
    "Ouch",
    "Boring",
)  # the last is no emotion


def random_answers(share: float, seed: int, packs: int = 12) -> tuple[list[dict], list[str]]:
    """Rows of packs, and answers of which so many are right."""
    rng = np.random.default_rng(seed)
    rows = [
        {"id": f"{pack}-{at}", "speaker": f"p{pack}", "language": "en" if pack % 3 else "pl", "emotion": emotion}
        for pack in range(packs)
        for at, emotion in enumerate([*EMOTIONS, *EMOTIONS, "pain", "pain"])
    ]
    wrong = {name: [other for other in EMOTIONS if other != name] for name in EMOTIONS}
    answers = [row["emotion"] if rng.random() < share else str(rng.choice(wrong[row["emotion"]])) for row in rows]
    return rows, answers


def test_ua_is_scikit_learns_balanced_accuracy_of_all_of_each_language_and_of_each_pack() -> None:
    rows, answers = random_answers(0.6, 0)
    found = measure(rows, answers)

    def expected(chosen: list[int]) -> float:
        return balanced_accuracy_score([rows[at]["emotion"] for at in chosen], [answers[at] for at in chosen])

    assert found["ua"] == pytest.approx(expected(list(range(len(rows)))))
    english = [at for at, row in enumerate(rows) if row["language"] == "en"]
    assert found["ua_english"] == pytest.approx(expected(english))
    assert found["ua_others"] == pytest.approx(expected(sorted(set(range(len(rows))) - set(english))))
    for pack, value in found["ua_of_pack"].items():
        assert value == pytest.approx(expected([at for at, row in enumerate(rows) if row["speaker"] == pack]))
    low, high = found["interval"]
    assert low < found["ua"] < high and 0.05 < high - low < 0.4


def test_a_pair_that_differs_is_told_from_one_that_does_not() -> None:
    rows, good = random_answers(0.8, 1)
    answers = {"people": good, "probe": random_answers(0.5, 2)[1], "speech-only": good}
    pairs = [("people", "probe"), ("people", "speech-only")]
    better, same = compare(rows, answers, pairs)
    assert better["gain"] == pytest.approx(measure(rows, good)["ua"] - measure(rows, answers["probe"])["ua"])
    assert better["interval"][0] > 0 and better["p"] < 0.01 and better["p_holm"] == pytest.approx(2 * better["p"])
    assert same["gain"] == 0 and same["p"] == 1 and same["packs_better"] == same["packs_worse"] == 0
    systems = {name: measure(rows, one) for name, one in answers.items()}
    table = results_table({"systems": systems, "tests": [better, same], "clips": len(rows)})
    assert f"| {systems['people']['ua']:.3f} |" in table and "people over probe" in table


def test_the_baselines_are_scikit_learns_over_left_out_groups() -> None:
    rng = np.random.default_rng(0)
    speakers = np.repeat([f"s{at}" for at in range(6)], 12)
    emotions = np.array(EMOTIONS * 18)
    values = rng.normal(size=(72, 10)) + 2 * np.eye(10)[[EMOTIONS.index(name) for name in emotions]]
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, class_weight="balanced", max_iter=2000))
    expected = cross_val_predict(probe, values, emotions, groups=speakers, cv=LeaveOneGroupOut())
    assert (linear_probe(values, emotions, speakers) == expected).all()
    one = linear_probe(values, emotions, speakers, ["s2"])
    assert (one[speakers == "s2"] == expected[speakers == "s2"]).all() and set(one[speakers != "s2"]) == {""}
    assert (vector_machine(values, emotions, speakers) == emotions).mean() > 0.5
    emotions[:36] = "pain"
    assert set(majority(emotions, speakers)) == {"pain"}


def test_without_opensmile_nothing_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(voice_baselines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install opensmile"):
        run_voices(VoicesSettings(tmp_path, tmp_path / "out"), Console(file=io.StringIO()))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_leaves_each_pack_out_goes_on_and_says_what_came_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, pack in enumerate(PACKS):
        (tmp_path / "sounds" / pack).mkdir(parents=True)
        for at, name in enumerate(SHOUTS):
            wave = clip(0.4 + 0.05 * at, seed=10 * place + at)
            soundfile.write(tmp_path / "sounds" / pack / f"{name}.ogg", wave, 16_000)
    tiny_speech_tower("whisper").save_pretrained(tmp_path / "speech")
    tiny_llm(tied=True).save_pretrained(tmp_path / "llm")
    tiny_tokenizer(audio_token=False).save_pretrained(tmp_path / "llm")
    monkeypatch.setattr(voices_demo, "check_opensmile", lambda: None)
    monkeypatch.setattr(voices_demo, "acoustic_machine", lambda clips, rate, *labels: majority(*labels))
    places = {"audio_model": str(tmp_path / "speech"), "text_model": str(tmp_path / "llm")}
    settings = VoicesSettings(tmp_path / "sounds", tmp_path / "out", **places, epochs=1, tower_epochs=1)
    console, systems = Console(file=io.StringIO()), ("people", "speech-only")

    def killed(script: object, arguments: object) -> None:
        if "speech-only-Pirate" in str(arguments.output_dir):  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        trained(script, arguments)

    trained = voices_demo.run_training
    monkeypatch.setattr(voices_demo, "run_training", killed)
    with pytest.raises(KeyboardInterrupt):
        run_voices(settings, console, systems, num_proc=1)
    ran: list[str] = []
    monkeypatch.setattr(
        voices_demo, "run_training", lambda *both: (ran.append(Path(both[1].output_dir).name), trained(*both))
    )
    results = run_voices(settings, console, systems, num_proc=1)
    assert ran == ["speech-only-Pirate"]  # what was complete is not trained again
    assert all(audio["bytes"] for audio in load_corpus(settings.corpus, "all")["audio"])  # decoded once
    pickle.dumps([functools.partial(work, settings) for work in (train_fold, evaluate_voices, probe_projector)])
    assert results["clips"] == 24 and results["systems"].keys() == {
        *("people", "speech-only", "probe", "egemaps", "majority", "people projector", "speech-only projector")
    }
    assert results["systems"]["people"]["ua_of_pack"].keys() == PACKS.keys()
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert "eGeMAPS and a linear SVM" in (tmp_path / "out" / "results.md").read_text()
    card = (tmp_path / "out" / "models" / "people-British" / "README.md").read_text()
    assert "was taught by categories (happy, angry, alarm, pain)" in card and "weak labels of emotion" in card
    assert "3 folds by speaker" in card and "gfdl" in card
    assert len(list((tmp_path / "out" / "plots").glob("*.png"))) == 7
    for pack in PACKS:
        tower = tmp_path / "out" / "towers" / f"people-{pack}" / "training_settings.json"
        assert json.loads(tower.read_text())["held_out"] == f"speaker={pack}"
    metrics = json.loads((tmp_path / "out" / "runs" / "people" / "metrics.json").read_text())
    assert metrics["recognition"].keys() == {"head"} and metrics["training"]["trained_on"] == 0
    assert metrics["recognition"]["head"]["ua"] == pytest.approx(results["systems"]["people"]["ua"], abs=1e-5)
    with pytest.raises(ValueError, match="holds a run with"):
        run_voices(VoicesSettings(tmp_path / "sounds", tmp_path / "out", **places, seed=1), console, systems)


real_voices = pytest.mark.skipif(
    not {"RELLM_REAL_VOICES", "RELLM_REAL_MODELS"} <= set(os.environ),
    reason="RELLM_REAL_VOICES is where hedgewars-data is unpacked, RELLM_REAL_MODELS where the two models are",
)


@pytest.mark.real
@real_voices
def test_the_voices_are_those_that_were_grouped(tmp_path: Path) -> None:
    settings = VoicesSettings(Path(os.environ["RELLM_REAL_VOICES"]), tmp_path)
    voices_demo.prepare_voices(settings)
    rows = load_corpus(settings.corpus, "all")
    assert Counter(rows["emotion"]) == {"happy": 75, "angry": 128, "alarm": 90, "pain": 115}
    assert len(set(rows["speaker"])) == 15
    assert len({pack for pack, spoken in zip(rows["speaker"], rows["language"], strict=True) if spoken != "en"}) == 5


@pytest.mark.real
@real_voices
@pytest.mark.timeout(0)
def test_rellm_hears_people_far_above_chance(tmp_path: Path) -> None:
    """Some twenty minutes. The probe's UA is that of other code on the same clips, 0.71."""
    models = Path(os.environ["RELLM_REAL_MODELS"])
    places = {"audio_model": str(models / "whisper-tiny.en"), "text_model": str(models / "SmolLM2-135M-Instruct")}
    settings = VoicesSettings(Path(os.environ["RELLM_REAL_VOICES"]), tmp_path, **places)
    found = run_voices(settings, Console(file=io.StringIO()), ("speech-only",))["systems"]
    assert found["probe"]["ua"] == pytest.approx(0.71, abs=0.015)
    assert found["speech-only"]["interval"][0] > 0.5
