"""What a gain must not be bought with: levels by scorers that rewarded no training, and the wording of replies."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from empathy_scorers import save_scorers
from run_folders import simulated_clips, write_run
from scipy.stats import wilcoxon
from tiny_models import RATE, clip, tiny_model, tiny_processor
from typer.testing import CliRunner

from relllm.cli import app
from relllm.cli.options import console
from relllm.evaluation.comparison import compare_runs
from relllm.evaluation.comparison_tables import comparison_tables
from relllm.evaluation.empathy.scoring import load_scorers, score_pairs
from relllm.evaluation.evaluating import read_predictions
from relllm.evaluation.evaluation_settings import EvaluationSettings
from relllm.evaluation.fingerprints import folder_fingerprint
from relllm.evaluation.runs import read_run
from relllm.evaluation.tables import to_markdown
from relllm.evaluation.wording import describe_wording

pytestmark = pytest.mark.usefixtures("no_drawing")
REPLIES = ["I am so sorry. I am so sorry!", "What happened?", "", "So sorry, what happened?"]


def bigrams(text: str) -> list[tuple[str, str]]:
    words = re.findall(r"\w+", text.lower())
    return [(words[at], words[at + 1]) for at in range(len(words) - 1)]


def test_the_wording_of_replies_counted_by_hand() -> None:
    found = describe_wording(REPLIES)
    both = [pair for text in REPLIES for pair in bigrams(text)]
    assert found["words"] == (8 + 2 + 0 + 4) / 4
    assert found["repetition"] == pytest.approx((2 / 6) / 4)  # "i am so" and "am so sorry" again, of six runs
    assert found["distinct_2"] == pytest.approx(len(set(both)) / len(both))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny_model().save_pretrained(folder / "model")
    tiny_processor().save_pretrained(folder / "model")
    save_scorers(folder / "scorers")
    save_scorers(folder / "others", ("ER",), "roberta", macro_f1=0.61)
    rows = [{"id": f"c{i}", "audio": f"c{i}.wav", "text": f"i feel sad {i}", "split": "test"} for i in range(3)]
    for number, row in enumerate(rows):
        soundfile.write(folder / row["audio"], clip(0.4, seed=number), RATE)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def evaluate_command(place: Path, *more: str) -> str:
    words = ["evaluate", place / "model", place / "rows.jsonl", "--tasks", "empathy", "--max-new-tokens", "12"]
    words += ["--device", "cpu", "--empathy-scorers", place / "scorers", *more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "_width", 200)  # whatever the first test of this process had for a terminal
        result = CliRunner().invoke(app, [str(word) for word in words])
    return result.output + ("" if result.exit_code else "done")


def test_levels_by_a_held_out_scorer_stand_beside_the_first_in_lines_metrics_and_on_the_card(place: Path) -> None:
    said = evaluate_command(place, "--held-out-scorers", str(place / "others"), "--out", str(place / "run"))
    assert said.endswith("done") and "ER, held out" in said and "distinct_2" in said
    metrics, (_, lines) = json.loads((place / "run/metrics.json").read_text()), read_predictions(place / "run")
    pairs = [(f"i feel sad {number}", line["reply"]) for number, line in enumerate(lines)]
    expected = [one["ER"] for one in score_pairs(load_scorers(place / "others"), pairs)]
    assert [line["empathy"].keys() for line in lines] == [{"ER", "EX", "ER, held out"}] * 3
    assert [line["empathy"]["ER, held out"] for line in lines] == expected
    assert metrics["empathy"]["ER, held out"]["mean_level"] == np.mean([one["level"] for one in expected])
    assert metrics["empathy"]["held_out_scorers"]["quality"]["ER"]["macro_f1"] == 0.61
    assert metrics["replies"]["words"] == {"value": describe_wording([p[1] for p in pairs])["words"], "num_replies": 3}
    record = {"method": "grpo", "rewards": {"ER": 1.0, "length": -0.1}}
    (place / "model/training_settings.json").write_text(json.dumps(record))
    done = CliRunner().invoke(app, ["card", str(place / "run"), "--model", str(place / "model")])
    card = (place / "model/README.md").read_text()
    assert done.exit_code == 0 and "**Rewarded:** ER × 1, length × −0.1." in card and "| ER, held out | " in card
    assert "A reply has" in card and str(place) not in card


def test_scorers_that_are_not_held_out_are_refused(place: Path, tmp_path: Path) -> None:
    same = ("--held-out-scorers", str(place / "scorers"), "--out", str(tmp_path / "run"))
    assert "are the weights of --empathy-scorers" in evaluate_command(place, *same)
    record = place / "model/training_settings.json"
    record.write_text(json.dumps({"scorers_fingerprint": folder_fingerprint(place / "others")}))
    rewarding = ("--held-out-scorers", str(place / "others"), "--out", str(tmp_path / "run"))
    assert "others rewarded" in evaluate_command(place, *rewarding)
    record.unlink()
    with pytest.raises(ValueError, match="beside --empathy-scorers"):
        EvaluationSettings("m", "d", tmp_path, held_out_scorers="x")


def simulated_run(path: Path, skill: float, words: int, held_out: str = "ghi") -> Path:
    clips = simulated_clips(60, skill, seed=words)
    rng = np.random.default_rng(words)
    for number, line in enumerate(clips):
        line["reply"] = " ".join(f"w{number % 7}{rng.integers(9)}" for _ in range(words + number % 5))
        line["empathy"]["ER, held out"] = {"level": int(rng.integers(3)), "probabilities": [0.2, 0.3, 0.5]}
    scorers = {"scorers": {"fingerprint": "def"}, "held_out_scorers": {"fingerprint": held_out}}
    return write_run(path, "re-llm", clips, empathy=scorers)


def test_sft_and_its_rewarded_runs_stand_side_by_side_by_name(tmp_path: Path) -> None:
    folders = [simulated_run(tmp_path / name, 0.6, words) for name, words in (("sft", 6), ("dpo", 9), ("grpo", 14))]
    comparison = compare_runs([read_run(folder) for folder in folders], ["sft"], num_resamples=100)
    gains = {(gain.system, gain.metric.part): gain for gain in comparison.gains}
    replies = {folder.name: [line["reply"] for line in read_predictions(folder)[1]] for folder in folders}
    lengths = {name: [len(reply.split()) for reply in of] for name, of in replies.items()}
    longer = gains["grpo", "words"]
    assert longer.difference == pytest.approx(np.mean(lengths["grpo"]) - np.mean(lengths["sft"]))
    assert longer.test.p_value == pytest.approx(wilcoxon(lengths["grpo"], lengths["sft"]).pvalue)
    assert longer.difference_interval[0] <= longer.difference <= longer.difference_interval[1]
    various = gains["dpo", "distinct_2"]
    one, other = ([pair for text in replies[name] for pair in bigrams(text)] for name in ("dpo", "sft"))
    assert various.difference == pytest.approx(len(set(one)) / len(one) - len(set(other)) / len(other))
    assert various.difference_interval is None and various.test is None
    assert gains["dpo", "ER, held out"].test is not None
    text = "".join(map(to_markdown, comparison_tables(comparison)))
    assert "ER, held out" in text and "distinct-2" in text and "| grpo" in text
    further = simulated_run(tmp_path / "other", 0.6, 5, held_out="another")
    with pytest.raises(ValueError, match="held-out empathy scorers differ"):
        compare_runs([read_run(folders[0]), read_run(further)], ["sft"])
