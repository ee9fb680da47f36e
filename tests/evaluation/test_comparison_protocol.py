"""What a reviewer asks of a comparison: measured alike? How good are the scorers? Has a model seen the corpus?"""

from pathlib import Path

import numpy as np
import pytest
from run_folders import simulated_clips, write_run
from typer.testing import CliRunner

from relllm.cli import app
from relllm.evaluation.comparison import Comparison, Measured, combine_runs, compare_runs
from relllm.evaluation.comparison_tables import comparison_tables
from relllm.evaluation.runs import find_differences, read_run

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


def test_seeds_of_one_name_that_were_not_asked_alike_are_noted(tmp_path: Path) -> None:
    runs = [
        read_run(run_of(tmp_path / str(seed), "re-llm", 0.7, model={"dtype": dtype}, versions=versions))
        for seed, (dtype, versions) in enumerate([("float32", {}), ("bfloat16", {}), ("bfloat16", {"torch": "2.13"})])
    ]
    assert find_differences(runs) == [
        "the runs differ in precision: float32 (re-llm), bfloat16 (re-llm)",
        "version of torch of re-llm is not recorded: evaluate again to have it compared",
    ]


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


@pytest.mark.usefixtures("no_drawing")
def test_seeds_are_one_row_with_mean_and_deviation(tmp_path: Path) -> None:
    folders, levels = [], {}
    for system, skill in (("speech-only", 0.4), ("re-llm", 0.7)):
        for seed in range(3):
            clips = simulated_clips(60, skill, seed=seed + 10 * len(system))
            levels[system, seed] = np.mean([clip["empathy"]["ER"]["level"] for clip in clips])
            folders.append(write_run(tmp_path / f"seed{seed}" / system, system, clips, **ASKED))
    with pytest.raises(ValueError, match="--group name"):
        compare(*folders)  # three of a name
    runs = [read_run(folder) for folder in folders]
    found = compare_runs(runs, ["speech-only"], num_resamples=50, group="system")
    assert found.systems == ["Speech-LLM without the emotion module", "RE-LLM"]
    [cell] = [one for one in found.cells if one.system == "RE-LLM" and one.metric.part == "ER"]
    ours, theirs = ([levels[system, seed] for seed in range(3)] for system in ("re-llm", "speech-only"))
    assert cell.value == pytest.approx(np.mean(ours)) and cell.deviation == pytest.approx(np.std(ours, ddof=1))
    [gain] = [one for one in found.gains if one.metric.part == "ER"]
    assert gain.difference == pytest.approx(np.mean(ours) - np.mean(theirs)) and gain.num_clips == 60
    assert gain.test is not None and gain.test.num_different > 30  # of means over seeds, of which few tie
    given = [*map(str, folders), "--baseline", "speech-only", "--group", "system", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["compare", *given])
    assert result.exit_code == 0, result.output
    assert f"{np.mean(ours):.3f} ± {np.std(ours, ddof=1):.3f}" in (tmp_path / "out" / "comparison.md").read_text()
    assert "RE-LLM is the mean ± standard deviation of 3 runs" in " ".join(result.output.split())


def test_the_bootstrap_draws_seeds_as_well_as_clips() -> None:
    def run_of_levels(values: np.ndarray) -> Measured:
        summands = np.stack([values, np.ones(len(values))], axis=1)
        return Measured(float(values.mean()), summands, lambda sums: sums[:, 0] / sums[:, 1], values)

    constant = [run_of_levels(np.full(8, level)) for level in (0.0, 1.0, 2.0)]  # clips of a run do not differ
    group = combine_runs(constant, (0, 1))
    resampled = group.statistic(np.tile(group.summands.sum(axis=0), (20_000, 1)))
    assert group.value == 1 and np.mean(resampled) == pytest.approx(1, abs=0.02)
    assert np.std(resampled) == pytest.approx(np.std([0, 1, 2], ddof=1) / np.sqrt(3), rel=0.02)
    same = combine_runs([run_of_levels(np.arange(8.0))] * 3, (0, 1))  # seeds do not differ
    sums = np.random.default_rng(0).multinomial(8, np.full(8, 1 / 8), size=50) @ same.summands
    assert same.statistic(sums) == pytest.approx(run_of_levels(np.arange(8.0)).statistic(sums[:, :2]))
    assert combine_runs(constant[:1], (0, 1)) is constant[0]


DATA = {"corpus": "msp-podcast", "split": "Test1", "held_out": None, "fingerprint": "abc"}


def test_two_splits_and_two_label_sets_of_a_corpus_are_two_tables(tmp_path: Path) -> None:
    folders = []
    for split in ("Test1", "Test2"):
        for system, skill in (("speech-only", 0.3), ("re-llm", 0.7)):
            data = {**DATA, "split": split, "fingerprint": split}
            folders.append(run_of(tmp_path / split, system, skill, data=data))
    found = compare(*folders)
    assert list(found.runs) == ["msp-podcast, Test1", "msp-podcast, Test2"]
    assert {gain.corpus for gain in found.gains} == set(found.runs) and len(found.systems) == 2
    silent = []
    for split in ("Test1", "Test2"):
        clips = [clip | {"recognition": {}} for clip in simulated_clips(60, 0.2, seed=3)]
        data = {**DATA, "split": split, "fingerprint": split}
        silent.append(write_run(tmp_path / "no-ser" / split, "text-only", clips, **ASKED, data=data))
    joined = compare(*folders, *silent).runs
    assert list(joined) == list(found.runs) and [len(of) for of in joined.values()] == [3, 3]
    assert [len(of) for of in compare(*folders, silent[0]).runs.values()] == [3, 2]
    dev = {**DATA, "split": "dev", "fingerprint": "dev"}
    clips = [clip | {"recognition": {}} for clip in simulated_clips(60, 0.2, seed=3)]
    mute = [write_run(tmp_path / "dev" / name, "text-only", clips, **ASKED, data=dev) for name in ("a", "b")]
    assert list(compare(*folders[:2], *mute).runs) == ["msp-podcast, Test1, 4 classes", "msp-podcast, dev"]
    other = [run_of(tmp_path / "own" / str(n), system, 0.5, data={**DATA, "fingerprint": f"own{n}"})
             for n in (1, 2) for system in ("speech-only", "re-llm")]  # fmt: skip
    assert list(compare(*other).runs) == ["msp-podcast, own1", "msp-podcast, own2"]
    with pytest.raises(ValueError, match="split differ: 'Test1' and 'Test2'"):
        compare(*folders[:3])  # one of them has no partner: nothing says that it was meant


def test_clips_without_a_transcript_are_left_out_of_all_and_counted(tmp_path: Path) -> None:
    lacking = [f"clip{number:04d}" for number in range(12)]
    data = {**DATA, "failed": dict.fromkeys(lacking, "no transcript"), "text_column": "asr"}
    heard = run_of(tmp_path, "speech-only", 0.5, data=DATA)
    clips = [{"id": clip["id"], "error": "no transcript"} if clip["id"] in lacking else clip
             for clip in simulated_clips(60, 0.3, seed=3)]  # fmt: skip
    found = compare(heard, write_run(tmp_path / "text-only", "text-only", clips, **{**ASKED, "data": data}))
    assert {cell.num_clips for cell in found.cells if cell.metric.table == "empathy"} == {48}
    assert "lacks 12 of 60 clips (12 without a transcript), left out of all" in notes_of(found)
    assert "Text-only LLM on transcripts reads the column 'asr'" in notes_of(found)
    other = {**DATA, "failed": dict.fromkeys(lacking, "No such audio file")}
    with pytest.raises(ValueError, match="lacks 12 of the 60 clips"):
        compare(heard, write_run(tmp_path / "b", "text-only", clips, **{**ASKED, "data": other}))


def test_clips_that_were_watched_while_it_trained_are_named(tmp_path: Path) -> None:
    watched = {**UNREAD, "validated_on": 60, "chosen_by": False}
    one = run_of(tmp_path, "speech-only", 0.3, training=watched)
    found = notes_of(compare(one, run_of(tmp_path, "re-llm", 0.7, training=UNREAD)))
    assert "was evaluated on 60 of the clips while it trained" in found and "NOT CLEAN" not in found
