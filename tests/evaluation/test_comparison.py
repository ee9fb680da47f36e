"""Runs side by side: hand-made run folders against naive formulas, what is refused, and the files."""

import io
import json
import re
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from rich.console import Console
from run_folders import CLASSES, simulated_clips, write_run
from scipy.stats import wilcoxon
from sklearn.metrics import balanced_accuracy_score, f1_score
from typer.testing import CliRunner

from relllm.cli import app
from relllm.data.corpora.patterns import PATTERNS
from relllm.evaluation.comparison import Comparison, Gain, _units, compare_runs, measure_part
from relllm.evaluation.comparison_tables import (
    PUBLISHED_GAINS,
    PUBLISHED_VALUES,
    comparison_tables,
    write_comparison,
)
from relllm.evaluation.runs import read_run
from relllm.evaluation.statistics import holm
from relllm.evaluation.tables import Table, show_table, to_latex, to_markdown
from relllm.plots import ForestLine, plot_forest

pytestmark = pytest.mark.usefixtures("no_drawing")
SYSTEMS = {"text-only": 0.45, "speech-only": 0.6, "re-llm": 0.75}


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three systems on two corpora."""
    paths = []
    for corpus, num_clips in (("iemocap", 120), ("esd", 80)):
        for seed, (system, skill) in enumerate(SYSTEMS.items(), start=1):
            parts = () if system == "text-only" else ("head", "dimensions")
            clips = simulated_clips(num_clips, skill, seed=seed, parts=parts)
            paths.append(write_run(tmp_path / f"{corpus}-{system}", system, clips, corpus=corpus))
    return paths


def compare(folders: list[Path], *baselines: str, resample: str = "auto") -> Comparison:
    return compare_runs([read_run(path) for path in folders], baselines, resample=resample, num_resamples=200)


def gain_of(comparison: Comparison, corpus: str, system: str, part: str, name: str) -> Gain:
    found = [
        gain
        for gain in comparison.gains
        if (gain.corpus, gain.system, gain.metric.part, gain.metric.name) == (corpus, system, part, name)
    ]
    assert len(found) == 1
    return found[0]


def clips_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()[1:]]


def rewrite(folder: Path, clips: list[dict]) -> None:
    lines = [{"settings": {}}, *clips]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_levels_are_compared_clip_by_clip(folders: list[Path]) -> None:
    gain = gain_of(compare(folders[:3], "speech-only"), "iemocap", "RE-LLM", "EX", "mean_level")
    theirs, ours = ([clip["empathy"]["EX"]["level"] for clip in clips_of(folders[index])] for index in (1, 2))
    assert gain.relative == pytest.approx(100 * (np.mean(ours) - np.mean(theirs)) / np.mean(theirs), abs=1e-10)
    assert gain.test is not None and gain.test.p_value == pytest.approx(wilcoxon(ours, theirs).pvalue, abs=1e-12)
    assert gain.num_clips == 120
    assert gain.relative_interval is not None
    assert gain.relative_interval[0] < gain.relative < gain.relative_interval[1]


def test_recognition_is_that_of_scikit_learn_and_ua_is_the_mean_of_what_is_paired(folders: list[Path]) -> None:
    comparison = compare(folders[:3], "speech-only")
    theirs, ours = clips_of(folders[1]), clips_of(folders[2])
    truth = [clip["emotion"] for clip in ours]
    answers = [[clip["recognition"]["generated"]["emotion"] for clip in clips] for clips in (ours, theirs)]
    ua = [balanced_accuracy_score(truth, one) for one in answers]
    f1 = [f1_score(truth, one, average="macro") for one in answers]
    assert gain_of(comparison, "iemocap", "RE-LLM", "generated", "ua").difference == pytest.approx(
        ua[0] - ua[1], abs=1e-12
    )
    macro = gain_of(comparison, "iemocap", "RE-LLM", "generated", "macro_f1")
    assert macro.difference == pytest.approx(f1[0] - f1[1], abs=1e-12)
    assert macro.test is None and macro.difference_interval is not None
    weights = np.array([120 / (4 * truth.count(name)) for name in truth])
    right = [np.array(one) == np.array(truth) for one in answers]
    assert np.mean(right[0] * weights) == pytest.approx(ua[0])
    test = gain_of(comparison, "iemocap", "RE-LLM", "generated", "ua").test
    differences = right[0] * weights - right[1] * weights
    assert test is not None and test.p_value == pytest.approx(
        wilcoxon(differences[differences != 0]).pvalue, abs=1e-12
    )


def test_a_bootstrap_statistic_on_the_clips_themselves_is_the_metric(folders: list[Path]) -> None:
    """Summed once each, the summands give the value that scikit-learn and audmetric gave."""
    clips = clips_of(folders[2])
    clips[0]["recognition"]["generated"]["emotion"] = None  # an answer without an emotion
    for table, part in (
        ("empathy", "ER"),
        ("recognition", "generated"),
        ("recognition", "head"),
        ("dimensions", "valence"),
    ):
        for metric, measured in measure_part(clips, table, part, CLASSES):
            summed = measured.statistic(measured.summands.sum(axis=0, keepdims=True))
            assert summed.tolist() == [pytest.approx(measured.value, abs=1e-12)], metric
            if measured.paired is not None:
                assert measured.paired.mean() == pytest.approx(measured.value, abs=1e-12)


def test_the_family_of_holm_is_every_test_of_a_table(folders: list[Path]) -> None:
    comparison = compare(folders, "text-only", "speech-only")
    family = [gain for gain in comparison.gains if gain.metric.table == "empathy"]
    assert len(family) == 2 * 3 * 3  # corpora, mechanisms, pairs of systems
    raw = [gain.test.p_value for gain in family if gain.test is not None]
    assert [gain.p_holm for gain in family] == pytest.approx(holm(raw))


def test_a_pair_of_systems_is_compared_once(folders: list[Path]) -> None:
    pairs = {(gain.system, gain.baseline) for gain in compare(folders, "text-only", "speech-only").gains}
    text, speech = "Text-only LLM on transcripts", "Speech-LLM without the emotion module"
    assert pairs == {(speech, text), ("RE-LLM", text), ("RE-LLM", speech)}


def test_a_missing_clip_is_left_out_of_all_and_named(folders: list[Path]) -> None:
    clips = clips_of(folders[2])
    rewrite(folders[2], [*clips[:-1], {**clips[-1], "error": "no audio"}])
    comparison = compare(folders[:3], "speech-only")
    of_iemocap = [cell for cell in comparison.cells if cell.corpus == "iemocap" and cell.metric.part == "ER"]
    assert [cell.num_clips for cell in of_iemocap] == [119, 119, 119]
    expected = np.mean([clip["empathy"]["ER"]["level"] for clip in clips_of(folders[1])[:-1]])
    assert of_iemocap[1].value == pytest.approx(expected)
    assert any("RE-LLM lacks 1 of 120 clips" in note and "clip0119" in note for note in comparison.notes)


def test_more_than_one_clip_in_a_hundred_missing_is_refused(folders: list[Path]) -> None:
    rewrite(folders[2], clips_of(folders[2])[2:])
    with pytest.raises(ValueError, match=r"lacks 2 of the 120 clips .*clip0000, clip0001"):
        compare(folders[:3], "speech-only")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"data": {"corpus": "iemocap", "split": "test", "held_out": None, "fingerprint": "xyz"}},
            "fingerprint differ",
        ),
        (
            {"data": {"corpus": "iemocap", "split": "validation", "held_out": None, "fingerprint": "abc"}},
            "split differ",
        ),
        ({"empathy": {"scorers": {"fingerprint": "other"}}}, "empathy scorers differ"),
        ({"recognition": {"head": {"class_names": CLASSES[::-1]}}}, r"classes \(head\) differ"),
        ({"folds": {"column": "session", "mean": {}}}, "folds differ"),
        ({"system": "whisper"}, "the system is 'whisper'"),
        ({"format": "relllm-run-0"}, "expected 'relllm-run-1'"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(folders: list[Path], change: dict, message: str) -> None:
    path = folders[2] / "metrics.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        compare(folders[:3], "speech-only")


def test_a_label_that_differs_is_refused(folders: list[Path]) -> None:
    clips = clips_of(folders[2])
    clips[3]["emotion"] = "surprise"
    rewrite(folders[2], clips)
    with pytest.raises(ValueError, match="'clip0003': emotion is"):
        compare(folders[:3], "speech-only")


def test_an_incomplete_run_and_a_broken_line_are_named(folders: list[Path]) -> None:
    with (folders[0] / "predictions.jsonl").open("a") as file:
        file.write('{"id": "x", "arousal\n')
    with pytest.raises(ValueError, match=r"predictions\.jsonl, line 122 is not JSON"):
        read_run(folders[0])
    (folders[0] / "predictions.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"text-only/predictions\.jsonl has no clips\. .*evaluate again"):
        read_run(folders[0])
    (folders[1] / "metrics.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no metrics\.json: it is no complete run"):
        read_run(folders[1])


def test_a_baseline_is_a_system_a_name_or_a_folder(folders: list[Path]) -> None:
    for name in ("speech-only", "iemocap-speech-only", str(folders[1])):
        assert {gain.baseline for gain in compare(folders[:3], name).gains} == {
            "Speech-LLM without the emotion module"
        }
    with pytest.raises(ValueError, match="--baseline blsp is none of the runs"):
        compare(folders, "blsp")


def test_two_runs_of_a_system_stand_under_their_names(folders: list[Path], tmp_path: Path) -> None:
    more = write_run(tmp_path / "token-fusion", "re-llm", simulated_clips(120, 0.7, seed=9))
    comparison = compare([folders[2], more], "token-fusion")
    assert comparison.systems == ["iemocap-re-llm", "token-fusion"]
    again = write_run(tmp_path / "again" / "token-fusion", "re-llm", simulated_clips(120, 0.7, seed=9))
    with pytest.raises(ValueError, match="are called 'token-fusion'"):
        compare([folders[2], more, again], "token-fusion")


def test_a_baseline_at_zero_has_no_relative_gain(folders: list[Path]) -> None:
    clips = clips_of(folders[1])
    for clip in clips:
        clip["empathy"]["EX"]["level"] = 0
    rewrite(folders[1], clips)
    comparison = compare(folders[:3], "speech-only")
    gain = gain_of(comparison, "iemocap", "RE-LLM", "EX", "mean_level")
    assert (gain.relative, gain.relative_interval) == (None, None)
    assert gain.difference is not None and gain.difference > 0
    by_name = {table.name: table for table in comparison_tables(comparison)}
    row = next(row for row in by_name["empathy-gains"].rows if row[:3] == ["iemocap", "EX", "RE-LLM"])
    assert row[4:6] == ["–", "–"]


def test_speakers_are_resampled_where_there_are_enough(folders: list[Path]) -> None:
    notes = compare(folders[:3], "speech-only").notes
    assert "iemocap: the intervals resample 12 speakers with all their clips." in notes
    assert "iemocap: the intervals resample clips." in compare(folders[:3], "speech-only", resample="clips").notes
    for path in folders[:3]:
        rewrite(path, [{**clip, "speaker": None} for clip in clips_of(path)])
    assert any("only 0 known speakers" in note for note in compare(folders[:3], "speech-only").notes)
    with pytest.raises(ValueError, match="has 0 known speakers"):
        compare(folders[:3], "speech-only", resample="speakers")
    numbered = [{"id": f"c{index}", "speaker": index % 12} for index in range(36)]
    assert len(set(_units("x", numbered, "auto", []))) == 12


def test_a_label_that_is_nan_is_none(folders: list[Path]) -> None:
    for path in folders[1:3]:
        first, second, *others = clips_of(path)
        rewrite(path, [{**first, "valence": float("nan")}, {**second, "emotion": float("nan")}, *others])
    counts = {cell.metric.part: cell.num_clips for cell in compare(folders[1:3], "speech-only").cells}
    assert (counts["valence"], counts["arousal"], counts["generated"], counts["ER"]) == (119, 120, 119, 120)


def test_folds_stand_pooled_and_as_their_mean(tmp_path: Path) -> None:
    folds = {"column": "session", "mean": {"recognition": {"generated": {"ua": 0.5, "wa": 0.25, "macro_f1": None}}}}
    paths = [
        write_run(tmp_path / system, system, simulated_clips(100, skill, seed=1), folds=folds)
        for system, skill in (("speech-only", 0.6), ("re-llm", 0.7))
    ]
    table = next(table for table in comparison_tables(compare(paths, "speech-only")) if table.name == "recognition")
    rows = {(row[0], row[1]): row[2:] for row in table.rows}
    assert rows["RE-LLM, mean over folds", "generated"] == ["50.0", "25.0", "–"]
    assert ("RE-LLM, folds pooled", "generated") in rows


def test_the_published_numbers_stand_beside_marked_as_published(folders: list[Path]) -> None:
    tables = {table.name: table for table in comparison_tables(compare(folders, "text-only"))}
    assert tables["empathy"].rows[-1] == ["RE-LLM, published", "1.856", "–", "–", "1.851", "–", "–"]
    assert [row[:4] for row in tables["recognition"].rows[-2:]] == [
        ["RE-LLM, published", "–", "76.6", "–"],
        ["BLSP-Emo, published", "–", "–", "76.0"],
    ]
    assert any("2406.03872" in note for note in tables["recognition"].notes)
    published = [row[:5] for row in tables["empathy-gains"].rows if row[2] == "RE-LLM, published"]
    assert ["esd", "EX", "RE-LLM, published", "Text-only LLM on transcripts", "+139.28"] in published
    assert all(row[0] != "msp-podcast" for row in published)
    assert all("2602.10716" in one.source for one in PUBLISHED_GAINS)
    others = {value.corpus: value.value for value in PUBLISHED_VALUES if value.system == "BLSP-Emo, published"}
    assert others == {"iemocap": 76.0, "meld": 57.3, "ravdess": 72.0} and set(others) <= {*PATTERNS, "iemocap"}


def test_the_files_are_written_with_n_in_every_cell(folders: list[Path], tmp_path: Path) -> None:
    comparison = compare(folders, "text-only")
    written = write_comparison(comparison, tmp_path / "out")
    names = {path.name for path in written}
    assert {"comparison.md", "comparison.tex", "comparison.json", "forest_empathy.png", "levels_esd.png"} <= names
    content = json.loads((tmp_path / "out" / "comparison.json").read_text(), parse_constant=lambda name: 1 / 0)
    assert {value["num_clips"] for value in content["values"]} == {80, 120}
    assert len(content["gains"]) == len(comparison.gains)
    assert content["gains"][0]["test"]["p_value"] == asdict(comparison.gains[0])["test"]["p_value"]
    assert all(path.stat().st_size > 0 for path in written)


def test_every_row_of_the_latex_has_the_columns_of_its_table(folders: list[Path]) -> None:
    for table in comparison_tables(compare(folders, "text-only")):
        latex = to_latex(table)
        columns = re.search(r"\\begin\{tabular\}\{(\w+)\}", latex)
        assert columns is not None and r"\small" in latex
        rules = [(int(one), int(last)) for one, last in re.findall(r"\\cmidrule\(lr\)\{(\d+)-(\d+)\}", latex)]
        grouped = [at for at, (group, _) in enumerate(table.header, start=1) if group]
        assert [at for one, last in rules for at in range(one, last + 1)] == grouped
        assert len(rules) == len({group for group, _ in table.header if group})
        for line in latex.splitlines():
            if line.endswith(r"\\"):
                spanned = sum(int(width) - 1 for width in re.findall(r"\\multicolumn\{(\d+)\}", line))
                assert len(re.findall(r"(?<!\\)&", line)) + 1 + spanned == len(columns[1]), line
        assert latex.count("{") == latex.count("}")
        assert latex.isascii() and not re.search(r"(?<!\\)[%#_]", latex)


def test_names_with_marks_of_the_format_are_escaped() -> None:
    table = Table("t", "100 % a_b", [("", "x|y"), ("g&h", "n")], 1, [["a|b", "1_2"]], [])
    assert r"a\|b" in to_markdown(table) and r"1\_2" in to_latex(table) and r"g\&h" in to_latex(table)


def test_the_command_prints_the_tables_and_writes_them(folders: list[Path], tmp_path: Path) -> None:
    command = ["compare", *map(str, folders[:3]), "--baseline", "text-only", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    assert "RE-LLM, published" in (tmp_path / "out" / "comparison.md").read_text()
    assert "Empathy" in result.output and "forest_empathy.png" in result.output


@pytest.mark.parametrize("width", [40, 80, 300])
def test_a_table_that_the_terminal_is_too_narrow_for_is_a_paragraph_a_row(folders: list[Path], width: int) -> None:
    for table in comparison_tables(compare(folders, "text-only")):
        console = Console(file=io.StringIO(), width=width, soft_wrap=True, markup=False)
        show_table(table, console)
        text = console.file.getvalue()
        assert max(map(len, text.splitlines())) <= width and "…" not in text
        words = " ".join(text.replace("│", " ").split())
        for cell in (cell for row in table.rows for cell in row if cell != "–" and width > len(cell)):
            assert cell in words


def test_values_come_before_gains_and_a_forest_has_no_empty_panel(folders: list[Path], tmp_path: Path) -> None:
    comparison = compare(folders, "text-only")
    names = [table.name for table in comparison_tables(comparison)]
    assert names == sorted(names, key=lambda name: name.endswith("-gains"))
    figures = []
    with mock.patch("relllm.plots._save", lambda figure, path: figures.append(figure) or path):
        line = ForestLine("RE-LLM", 0.1, (0.0, 0.2), None)
        plot_forest({("UA", "a"): [line], ("UA", "b"): [line], ("arousal", "b"): [line]}, tmp_path / "forest.png")
        write_comparison(comparison, tmp_path)
    assert [axes.get_title(loc="left") for axes in figures[0].axes] == ["UA, a", "UA, b", "arousal, b"]
    labels = {label.get_text() for figure in figures for axes in figure.axes for label in axes.get_yticklabels()}
    assert not any("over" in label for label in labels)  # the one baseline is in the title
    assert any("over Text-only" in figure.get_suptitle() for figure in figures)


def test_what_cannot_be_measured_is_refused_or_said(folders: list[Path]) -> None:
    with pytest.raises(ValueError, match="--resample sessions: expected one of auto, clips, speakers"):
        compare(folders[:3], "speech-only", resample="sessions")
    with pytest.raises(ValueError, match="--group seed: expected one of system, name"):
        compare_runs([], ["speech-only"], group="seed")
    assert (
        "esd: no run of the baseline Text-only LLM on transcripts."
        in compare([*folders[:3], folders[5]], "text-only").notes
    )
    for path in folders[1:3]:
        rewrite(path, [{**clip, "dimension_source": "org/tower@abc"} for clip in clips_of(path)])
    assert any("no labels" in note and "org/tower" in note for note in compare(folders[1:3], "speech-only").notes)
    clips = clips_of(folders[2])
    clips[5]["empathy"]["IP"]["level"] = 3
    rewrite(folders[2], clips)
    with pytest.raises(ValueError, match=r"Levels of IP are \[3\], expected 0 to 2\. Evaluate again\."):
        compare(folders[1:3], "speech-only")
