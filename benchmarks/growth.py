"""Time and memory of a prefill with both towers as clips, batches and conversations grow, with a plot.

The emotion tower is a quarter as wide as in the other benchmarks, so that ten minutes of audio take seconds. A slope
is that of log(time) over log(size) between the largest and a quarter of it: 1 is linear. "Hearing" is the part before
the LLM: towers, projector and heads.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import harness
import torch
from harness import figure, read_clock, report, reset_peak, resident_mib
from matplotlib.figure import Figure
from reference import SIZES, audio_only, build_model, build_processor, clips

from relllm import ReLLMForConditionalGeneration, ReLLMProcessor

SWEEPS = {
    "seconds of one clip": (1, 4, 16, 30, 60, 150, 300, 600),
    "clips of 5 s in a batch": (1, 2, 4, 8, 16, 32),
    "turns of 5 s in a conversation": (1, 2, 4, 6, 8, 10),
}
QUICK_SWEEPS = {name: sizes[:2] for name, sizes in SWEEPS.items()}


@dataclass
class Point:
    """A measured size: `size` as the sweep's name says, time in seconds, memory in MiB above that before the pass."""

    size: int
    seconds: float
    hearing: float
    mib: float

    @property
    def times(self) -> tuple[float, float]:
        return self.seconds, self.hearing


@torch.no_grad()
def main(*, quick: bool = False) -> None:
    SIZES["emotion"] = SIZES["emotion"] | {"conv_dim": 128}
    model = build_model(quick=quick)
    processor = build_processor(model, full_window=False)
    sweeps = QUICK_SWEEPS if quick else SWEEPS
    found = {name: [_measure(model, processor, name, size, quick) for size in sizes] for name, sizes in sweeps.items()}
    rows = []
    for name, points in found.items():
        last = points[-1]
        first = max((p for p in points if 4 * p.size <= last.size), key=lambda p: p.size, default=points[0])
        factor = math.log(last.size / first.size)
        what = f"slope of time, {name}, {first.size} to {last.size}"
        slope, hearing = (math.log(b / a) / factor for a, b in zip(first.times, last.times, strict=True))
        rows.append(figure(what, slope, "<= 1.1", seconds=last.seconds, mib=last.mib))
        rows.append(figure(f"{what}: hearing", hearing, seconds=last.hearing, mib=last.mib))
    harness.RESULTS.mkdir(parents=True, exist_ok=True)
    plot(found, harness.RESULTS / "growth.png")
    report("growth", rows, about="prefill with towers, cheap mode, emotion tower 128 wide; results/growth.png")


def _measure(
    model: ReLLMForConditionalGeneration, processor: ReLLMProcessor, sweep: str, size: int, quick: bool
) -> Point:
    if sweep == "seconds of one clip":
        conversations = [processor.build_conversation(clips(1, float(size))[0])]
    elif sweep == "clips of 5 s in a batch":
        conversations = [processor.build_conversation(clip) for clip in clips(size, 5.0)]
    else:
        turns = [processor.build_conversation(clip, system_prompt="", response="I see.") for clip in clips(size, 5.0)]
        conversations = [[message for turn in turns for message in turn]]
    inputs = processor.apply_chat_template(conversations, tokenize=True, return_dict=True)
    seconds: dict[str, list[float]] = {"all": [], "hearing": []}
    heard = audio_only(inputs)
    reset_peak()
    before = resident_mib()
    for _ in range(1 if quick or size > 100 else 3):
        for name in seconds:
            start = read_clock()
            model(**inputs, logits_to_keep=1) if name == "all" else model.get_audio_features(**heard)
            seconds[name].append(read_clock() - start)
    mib = max(resident_mib(peak=True) - before, 0.0)
    return Point(size, min(seconds["all"]), min(seconds["hearing"]), mib)


def plot(found: dict[str, list[Point]], path: Path) -> None:
    """Time and memory of each sweep, both axes logarithmic, beside a line of slope 1."""
    drawing = Figure(figsize=(12, 3.6), dpi=120, layout="constrained")
    for axes, (name, points) in zip(drawing.subplots(1, len(found)), found.items(), strict=True):
        sizes = [point.size for point in points]
        axes.loglog(sizes, [point.seconds for point in points], "o-", color="#0072B2", label="time, s")
        axes.loglog(
            sizes, [max(point.mib, 1.0) / 1024 for point in points], "s-", color="#D55E00", label="memory, GiB"
        )
        linear = [points[-1].seconds * size / sizes[-1] for size in sizes]
        axes.loglog(sizes, linear, "--", color="#666666", label="linear")
        axes.set_xlabel(name)
        axes.legend(frameon=False)
    drawing.savefig(path)


if __name__ == "__main__":
    main()
