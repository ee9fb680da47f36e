"""`relllm score-replies`: draws of a clip's own, best and worst by hand, killed and resumed, what is left out."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from empathy_scorers import save_scorers
from tiny_models import RATE, clip, tiny_model, tiny_processor
from transformers import AutoModel, AutoProcessor
from typer.testing import CliRunner

from relllm.cli import app
from relllm.data.journal import Journal
from relllm.data.loading import load_corpus, pair_rewards
from relllm.plots import plot_scores
from relllm.preferences.pairs import choose_pair, describe_scores, score_columns
from relllm.preferences.preference_settings import ScoreRepliesSettings
from relllm.preferences.sampling import row_seed, sample_replies
from relllm.training.checkpoints import describe_seen

pytestmark = pytest.mark.usefixtures("no_drawing")
IDS = ("a", "b", "c", "no text", "no audio", "silent heads")
REWARDS = "ER=1,length=-0.05,emotion=0.5,repetition=0"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A checkpoint, scorers and rows, as their commands leave them."""
    folder = tmp_path_factory.mktemp("place")
    tiny_model(trained_readings=["arousal"]).to(torch.bfloat16).save_pretrained(folder / "model")
    tiny_processor().save_pretrained(folder / "model")
    save_scorers(folder / "scorers", ("ER",))
    rows = []
    for number, name in enumerate(IDS):
        soundfile.write(folder / f"{number}.wav", clip(0.3 + 0.25 * number, seed=number), RATE)
        emotion = None if name == "silent heads" else "sad"
        rows.append({"id": name, "audio": f"{number}.wav", "text": "i feel sad", "emotion": emotion, "session": "1"})
    rows[3]["text"] = " "
    (folder / "4.wav").write_bytes(b"no audio at all")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(place: Path, out: Path, *more: str) -> list[str]:
    words = ["score-replies", place / "rows.jsonl", "--model", place / "model", "--scorers", place / "scorers"]
    words += ["--rewards", REWARDS, "--samples", 4, "--max-new-tokens", 40, "--margin", 0.01, "--out", out]
    return [str(word) for word in (*words, "--dtype", "float32", "--device", "cpu", *more)]


def run(*words: str, status: int = 0) -> str:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == status, result.output
    return result.output


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    run(*command(place, out, "--batch-size", "3"))
    return out / "metadata.jsonl"


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_clips_replies_are_those_that_generate_draws_for_it_alone_and_its_towers_run_once(place: Path) -> None:
    model = AutoModel.from_pretrained(place / "model", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(place / "model")
    clips = [clip(0.3, seed=1), clip(2.9, seed=2), clip(1.1, seed=3)]
    seen = []
    model.model.audio_tower.layers[0].register_forward_pre_hook(lambda layer, args: seen.append(len(args[0])))
    how = {"max_new_tokens": 24, "temperature": 0.8, "top_p": 0.9}
    found = sample_replies(model, processor, clips, [5, 6, 7], samples=3, **how)
    assert sum(seen) == 4  # windows: the second clip has two
    for one, seed, (_, replies) in zip(clips, (5, 6, 7), found, strict=True):
        inputs = processor.apply_request(one)
        torch.manual_seed(seed)
        alone = model.generate(**inputs, do_sample=True, top_k=0, num_return_sequences=3, **how)
        texts = processor.tokenizer.batch_decode(alone[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert [reply.text for reply in replies] == [text.strip() for text in texts]
    assert len({reply.text for _, replies in found for reply in replies}) > 6


def test_the_pairs_are_best_and_worst_of_the_samples_counted_by_hand(place: Path, whole: Path) -> None:
    pairs = {row["id"]: row for row in read(whole)}
    samples = {row["id"]: row["replies"] for row in read(whole.with_name("metadata.samples.jsonl"))}
    report = json.loads(whole.with_name("metadata.report.json").read_text())
    assert [len(replies) for replies in samples.values()] == [4, 4, 4, 0, 0, 0]
    for row_id in "abc":
        for reply in samples[row_id]:
            scores, words = reply["scores"], len(re.findall(r"[^\W_]+", reply["text"]))
            assert scores["length"] == max(5 - words, words - 60, 0)
            assert scores["total"] == pytest.approx(scores["ER"] - 0.05 * scores["length"] + 0.5 * scores["emotion"])
        ended = [reply for reply in samples[row_id] if reply["finished"]]
        if row_id in pairs:
            best = max(ended, key=lambda reply: reply["scores"]["total"])
            worst = min(samples[row_id], key=lambda reply: reply["scores"]["total"])
            row = pairs[row_id]
            assert (row["chosen"], row["rejected"]) == (best["text"], worst["text"])
            assert (row["chosen_scores"], row["rejected_scores"]) == (best["scores"], worst["scores"])
            assert row["text"] == "i feel sad" and row["session"] == "1"
    assert pairs and report["pairs"] == len(pairs) and report["rows"] == 6
    reasons = {row_id: reason for reason, one in report["dropped"].items() for row_id in one["ids"]}
    assert reasons["no text"] == "no text" and reasons["no audio"] == "not read"
    assert reasons["silent heads"] == "no emotion or heard"
    totals = [reply["scores"]["total"] for replies in samples.values() for reply in replies]
    assert report["scores"]["total"]["mean"] == pytest.approx(np.mean(totals))
    assert report["scores"]["total"]["chosen"] == pytest.approx(
        np.mean([row["chosen_scores"]["total"] for row in pairs.values()])
    )
    (again,) = (row for row in load_corpus(whole.parent) if row["id"] == next(iter(pairs)))
    assert Path(again["audio"]).is_file() and again["chosen"] == pairs[again["id"]]["chosen"]


def test_what_is_trained_on_the_pairs_or_goes_on_from_it_says_what_was_rewarded(whole: Path, tmp_path: Path) -> None:
    weights = {"ER": 1.0, "length": -0.05, "emotion": 0.5, "repetition": 0.0}
    assert pair_rewards(whole.parent) == pair_rewards(whole) == weights
    rows = load_corpus(whole)

    def recorded(method: str, **places: str) -> dict:
        script = SimpleNamespace(method=method, sources=[SimpleNamespace(name=str(whole))])
        return describe_seen(script, rows, {}, places, "main")

    assert "rewarded" not in recorded("sft") and recorded("dpo")["rewarded"] == weights
    (tmp_path / "training_settings.json").write_text(json.dumps({"rewards": {"EX": 2.0}}))
    assert recorded("sft", model_name_or_path=str(tmp_path))["rewarded"] == {"EX": 2.0}
    assert recorded("dpo", model_name_or_path=str(tmp_path))["rewarded"] == {"EX": 2.0, **weights}


def test_killed_and_resumed_in_other_batches_the_files_are_those_of_one_run(
    place: Path, whole: Path, tmp_path: Path, monkeypatch
) -> None:
    append, out = Journal.append, tmp_path / "pairs.jsonl"

    def killed(journal: Journal, entries) -> None:
        append(journal, entries)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "append", killed)
        assert "the same command goes on" in run(*command(place, out, "--batch-size", "2"), status=130)
    assert not out.exists()
    run(*command(place, out, "--batch-size", "1"))
    assert out.with_name("pairs.samples.jsonl").read_text() == whole.with_name("metadata.samples.jsonl").read_text()
    absolute = [{**row, "audio": Path(row["audio"]).name} for row in read(whole)]
    assert [{**row, "audio": Path(row["audio"]).name} for row in read(out)] == absolute
    assert "other settings (margin" in run(*command(place, out, "--margin", "0.5"), status=1)


def test_rewards_that_tell_nothing_apart_or_cannot_be_given_end_it(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl"
    wide = ("--rewards", "length=-1", "--min-words", "0", "--max-words", "1000")
    said = run(*command(place, out, *wide), status=1)
    assert "No row makes a pair" in said and "all replies score the same" in said and not out.exists()
    assert "Unknown reward 'empathy'" in run(*command(place, out, "--rewards", "empathy=1"), status=2)
    assert "expected names with weights" in run(*command(place, out, "--rewards", "ER"), status=2)
    assert "has no scorer of EX" in run(*command(place, tmp_path / "x.jsonl", "--rewards", "EX=1"), status=1)


def scored(total: float, text: str, *, finished: bool = True) -> dict:
    return {"text": text, "finished": finished, "scores": {"ER": total, "total": total}}


def test_a_cut_or_unjudged_reply_is_never_the_better_one() -> None:
    cut, good, bad = scored(3, "and then", finished=False), scored(2, "Oh."), scored(1, "No.")
    assert choose_pair([bad, cut, good], 0.5) == (good, bad)
    assert choose_pair([bad, good, scored(0, "and", finished=False)], 0.5)[1]["text"] == "and"
    assert choose_pair([scored(float("nan"), "?"), good, bad], 0.5) == (good, bad)
    assert choose_pair([good, bad, scored(0, ""), scored(9, "")], 0.5) == (good, bad)
    assert choose_pair([good, bad], 1.5) == "below the margin"
    assert choose_pair([cut], 0) == "no reply was finished"
    assert choose_pair([scored(float("nan"), "?")], 0) == "not scored"
    assert choose_pair([cut, bad], 0) == "no finished reply is better than the others"


def test_the_report_says_whether_the_reward_pays_for_length() -> None:
    replies = [scored(float(count), "word " * count) for count in (2, 4, 9)]
    found = describe_scores([replies], [(replies[2], replies[0])])
    assert found["replies"]["total_with_words"] == pytest.approx(1)
    assert found["replies"]["words"] == {"all": 5, "chosen": 9, "rejected": 2}
    assert found["scores"]["ER"] == {"mean": 5, "range": 7, "chosen": 9, "rejected": 2}


def test_a_reward_that_gave_no_number_leaves_its_panel_empty(tmp_path: Path) -> None:
    replies = [{**scored(total, "word " * 6)} for total in (1.0, 2.0)]
    for one in replies:
        one["scores"]["judge"] = float("nan")
    pairs = [(replies[1], replies[0])]
    assert describe_scores([replies], pairs)["scores"]["judge"] == dict.fromkeys(
        ("mean", "range", "chosen", "rejected")
    )
    assert plot_scores(score_columns([replies], pairs), tmp_path / "scores.png").is_file()


def test_a_rows_seed_is_its_own() -> None:
    assert len({row_seed(row_id, seed) for row_id in ("a", "b") for seed in (0, 1)}) == 4
    assert row_seed("a", 0) == row_seed("a", 0) < 2**63


def test_the_settings_name_what_is_wrong() -> None:
    given = {"data": "d", "out": Path("o"), "model": "m"}
    assert ScoreRepliesSettings(**given).weights == {"ER": 1, "EX": 1, "length": -0.1, "repetition": -1}
    with pytest.raises(ValueError, match="No reward has a weight"):
        ScoreRepliesSettings(**given, rewards="ER=0")
