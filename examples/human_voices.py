"""What a trained RE-LLM says of human voices: the acted shouts of Debian's `hedgewars-data`, 15 voice packs.

    apt-get download hedgewars-data && dpkg -x hedgewars-data_*.deb hedgewars
    python examples/human_voices.py runs/demo-small/re-llm hedgewars --plot voices.png

Each pack has files of the same names (`Traitor.ogg`, `Laugh.ogg`, …), so a name says roughly how it is shouted. The
packs differ in voice, language and recording. If the model hears emotion in people, it orders the names alike in
every pack: Friedman's test, packs as blocks, by permuting the names within each pack. Beforehand, from the names alone
and from no output of any model, the expected order was written down: see `EXPECTED`. Nothing is tuned to these files.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.stats import friedmanchisquare, rankdata, spearmanr
from transformers import AutoModel, AutoProcessor

from relllm.inference.replies import hear
from relllm.processing.audio_relllm import load_audio

NAMES = ("Traitor", "Nooo", "Laugh", "Victory", "Boring")
VOICES = "usr/share/games/hedgewars/Data/Sounds/voices"
# Ranks of the names, 1 for the lowest; equal ranks where the name leaves it open.
EXPECTED = {
    "arousal": {"Boring": 1, "Traitor": 3.5, "Nooo": 3.5, "Laugh": 3.5, "Victory": 3.5},
    "valence": {"Traitor": 2, "Nooo": 2, "Boring": 2, "Laugh": 4.5, "Victory": 4.5},
}
PERMUTATIONS = 10_000


def read_packs(root: Path) -> tuple[list[str], list[list[np.ndarray]]]:
    """Packs that have all the names, and their clips in the order of `NAMES`.

    Raises:
        FileNotFoundError: If there are no voice packs.
    """
    folder = root / VOICES if (root / VOICES).is_dir() else root
    packs = sorted(path for path in folder.iterdir() if all((path / f"{name}.ogg").is_file() for name in NAMES))
    if not packs:
        raise FileNotFoundError(f"No voice pack with {', '.join(NAMES)} in {folder}. Unpack hedgewars-data there.")
    return [pack.name for pack in packs], [[load_audio(str(pack / f"{name}.ogg")) for name in NAMES] for pack in packs]


def friedman(values: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """Friedman's statistic of `(packs, names)`, and its p by permutation within packs."""
    ranks = np.apply_along_axis(rankdata, 1, values)
    spread = ((ranks.mean(0) - ranks.mean()) ** 2).sum()
    shuffled = np.random.default_rng(seed).permuted(np.broadcast_to(ranks, (PERMUTATIONS, *ranks.shape)), axis=2)
    by_chance = ((shuffled.mean(1) - ranks.mean()) ** 2).sum(1)
    p = (1 + (by_chance >= spread - 1e-12).sum()) / (1 + PERMUTATIONS)
    return float(friedmanchisquare(*values.T).statistic), float(p)


def agreement(values: np.ndarray, expected: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """Mean over packs of Spearman's correlation with the expected order, and its one-sided p by permutation."""
    target = np.asarray(expected)
    ranks = np.apply_along_axis(rankdata, 1, values)
    found = float(np.mean([spearmanr(row, target).statistic for row in ranks]))
    shuffled = np.random.default_rng(seed).permuted(np.broadcast_to(ranks, (PERMUTATIONS, *ranks.shape)), axis=2)
    centred = (shuffled - ranks.mean()) @ (target - target.mean())
    scale = np.sqrt(((ranks - ranks.mean(1, keepdims=True)) ** 2).sum(1) * ((target - target.mean()) ** 2).sum())
    by_chance = (centred / scale).mean(1)
    return found, float((1 + (by_chance >= found - 1e-12).sum()) / (1 + PERMUTATIONS))


def plot(values: dict[str, np.ndarray], verdicts: dict[str, str], path: Path) -> None:
    """Every pack's values by name, joined by a line, and the mean of each name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, (dimension, found) in zip(figure.subplots(1, len(values)), values.items(), strict=True):
        axes.plot(range(len(NAMES)), found.T, color="#8899aa", linewidth=0.7, alpha=0.6)
        axes.plot(range(len(NAMES)), found.mean(0), "o-", color="#aa3311", linewidth=2, label=f"mean of {len(found)}")
        axes.set_xticks(range(len(NAMES)), NAMES)
        axes.set_title(f"{dimension}\n{verdicts[dimension]}", fontsize=9)
        axes.set_ylabel(f"{dimension} by the dimension head")
        axes.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="A trained RE-LLM: a directory or a Hub id.")
    parser.add_argument("voices", type=Path, help="Where hedgewars-data is unpacked, or its folder of voices.")
    parser.add_argument("--plot", type=Path, help="PNG to write.")
    parser.add_argument("--json", type=Path, help="Numbers to write.")
    given = parser.parse_args()
    packs, clips = read_packs(given.voices)
    model, processor = AutoModel.from_pretrained(given.model).eval(), AutoProcessor.from_pretrained(given.model)
    heard = list(hear(model, processor, [clip for pack in clips for clip in pack]))
    values, verdicts, found = {}, {}, {"packs": packs, "names": NAMES}
    for dimension, expected in EXPECTED.items():
        table = np.array([one.dimensions[dimension] for one in heard]).reshape(len(packs), len(NAMES))
        statistic, p = friedman(table)
        rho, p_order = agreement(table, [expected[name] for name in NAMES])
        values[dimension] = table
        verdicts[dimension] = f"names differ: p = {p:.4f}\nas expected: rho = {rho:+.2f}, p = {p_order:.2f}"
        means = ", ".join(f"{name} {mean:.2f}" for name, mean in zip(NAMES, table.mean(0), strict=True))
        print(f"{dimension}: {means}\n  Friedman {statistic:.2f}; {' '.join(verdicts[dimension].split(chr(10)))}")
        found[dimension] = {"values": table.tolist(), "friedman": statistic, "p": p, "rho": rho, "p_order": p_order}
    emotions = [one.emotion for one in heard]
    found["emotions"] = {name: emotions[place :: len(NAMES)] for place, name in enumerate(NAMES)}
    for name, said in found["emotions"].items():
        print(f"{name}: { ({emotion: said.count(emotion) for emotion in sorted(set(said))}) }")
    if given.plot:
        plot(values, verdicts, given.plot)
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
