"""What a reviewer asks of a comparison: measured alike? How good are the scorers? Has a model seen the corpus?"""

from pathlib import Path

import pytest
from run_folders import simulated_clips, write_run

from relllm.evaluation.comparison import Comparison, compare_runs
from relllm.evaluation.comparison_tables import comparison_tables
from relllm.evaluation.runs import read_run

ASKED = {"prompts": {"reply": "User: <|audio|>"}, "generation": {"max_new_tokens": {"reply": 128}}}
QUALITY = {"accuracy": 0.76, "macro_f1": 0.488, "recall": {"0": 0.87, "1": 0.63, "2": 0.0}, "num_pairs": 600}
UNREAD = {"recorded": True, "trained_on": 0, "validated_on": 0, "chosen_by": True, "corpora": []}


def run_of(folder: Path, system: str, skill: float, **changes: object) -> Path:
    clips = simulated_clips(60, skill, seed=len(system))
    return write_run(folder / system, system, clips, **{**ASKED, **changes})


def compare(*folders: Path) -> Comparison:
    return compare_runs([read_run(folder) for folder in folders], ["speech-only"], num_resamples=50)


def notes_of(comparison: Comparison) -> str:
    return "\n".join(note for table in comparison_tables(comparison) for note in table.notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generation": {"max_new_tokens": {"reply": 64}}}, r"longest reply \(max_new_tokens\) differ: 128 and 64"),
        (
            {"data": {"corpus": "iemocap", "split": "test", "held_out": None, "fingerprint": "abc", "limit": 5}},
            "limit",
        ),
        ({"empathy": {"scorers": {"fingerprint": "def", "in_windows": True}}}, "empathy scorers differ"),
    ],
)
def test_runs_that_were_not_asked_alike_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    one, other = run_of(tmp_path, "speech-only", 0.3), run_of(tmp_path, "re-llm", 0.7, **change)
    with pytest.raises(ValueError, match=message):
        compare(one, other)


def test_other_prompts_precision_and_versions_are_noted(tmp_path: Path) -> None:
    one = run_of(tmp_path, "speech-only", 0.3, model={"dtype": "float32"}, versions={"torch": "2.12"})
    asked = {"prompts": {"reply": "Human: <|audio|>"}, "model": {"dtype": "bfloat16"}, "versions": {"torch": "2.13"}}
    found = notes_of(compare(one, run_of(tmp_path, "re-llm", 0.7, **asked)))
    assert "iemocap: the runs differ in prompts." in found
    assert "differ in precision: float32 (speech-only), bfloat16 (re-llm)" in found
    assert "differ in version of torch: 2.12 (speech-only), 2.13 (re-llm)" in found


def test_a_transcript_in_the_place_of_the_clip_is_no_other_prompt_and_older_runs_are_read(tmp_path: Path) -> None:
    reads = run_of(tmp_path, "text-only", 0.2, prompts={"reply": "User: {transcript}"})
    old = run_of(tmp_path, "speech-only", 0.3, prompts=None, generation=None)
    found = notes_of(compare(reads, old, run_of(tmp_path, "re-llm", 0.7)))
    assert "differ in prompts" not in found
    assert "longest reply of speech-only is not recorded: evaluate again" in found
    assert "are is not in its metrics.json: evaluate it again" in found


def test_the_scorers_quality_and_what_they_read_stand_below_the_levels(tmp_path: Path) -> None:
    quality = {"ER": {**QUALITY, "bag_of_words": 0.686}}
    scored = {"empathy": {"scorers": {"fingerprint": "def", "quality": quality}}}
    paths = []
    for system in ("speech-only", "re-llm"):
        clips = simulated_clips(60, 0.5, seed=len(system))
        for number, clip in enumerate(clips):
            clip["empathy"]["ER"] |= {"level": number % 2, "tokens": 100 if number % 2 else 40, "cut": number % 2 == 1}
        paths.append(write_run(tmp_path / system, system, clips, **ASKED, **scored))
    found = notes_of(compare(*paths))
    assert (
        "accuracy 0.760, macro-F1 0.488, a bag of words 0.686; recall of levels 0 / 1 / 2: 0.87 / 0.63 / 0.00."
        in found
    )
    assert "Too weak to report: ER finds none of the pairs of level 2" in found
    assert "re-llm, ER: 40 / 100 / – tokens a reply at level 0 / 1 / 2; 50.0% read in part only." in found


def test_a_model_from_the_corpus_is_marked(tmp_path: Path) -> None:
    known = {**UNREAD, "corpora": ["iemocap", "msp-podcast"]}
    one = run_of(tmp_path, "speech-only", 0.3, training={**known, "trained_on": 7})
    found = notes_of(compare(one, run_of(tmp_path, "re-llm", 0.7, training={**known, "recorded": False})))
    assert "Speech-LLM without the emotion module is NOT CLEAN: 7 of the clips trained it" in found
    assert "iemocap: RE-LLM, or a tower of it, was trained on it, and on which clips is not known." in found
    clean = run_of(tmp_path / "b", "re-llm", 0.7, training=UNREAD)
    assert "trained on" not in notes_of(compare(one, clean)).replace("Speech-LLM", "")
