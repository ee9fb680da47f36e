"""Where the time of a training step and of a reply goes: a flame chart (PNG) and a trace for chrome://tracing of each.

    python benchmarks/profiles.py                  results/profile_training.png, results/profile_reply.png
    python benchmarks/profiles.py --suffix _before --traces traces

A box is a module or an operation: as wide as it took, below what called it. Not a benchmark: it compares nothing, and
`make bench` leaves it out.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from harness import RESULTS
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from reference import build_model, build_processor, clips, conversations
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from relllm import ReLLMForConditionalGeneration

SPANS = {  # name in the chart: from the start of this module to the end of that one (a short clip is encoded by parts)
    "speech tower": ("model.audio_tower.conv1", "model.audio_tower.layer_norm"),
    "emotion tower": ("model.emotion_tower", "model.emotion_tower"),
    "projector": ("model.multi_modal_projector", "model.multi_modal_projector"),
    "LLM": ("model.text_model.model", "model.text_model.model"),
    "LLM's head": ("model.text_model.lm_head", "model.text_model.lm_head"),
}
COLOURS = {
    "speech tower": "#0072B2",
    "emotion tower": "#D55E00",
    "projector": "#CC79A7",
    "LLM": "#009E73",
    "LLM's head": "#56B4E9",
    "loss": "#999999",
    "backward": "#E69F00",
    "AdamW": "#F0E442",
}
NARROWEST = 0.0004  # of the whole: what is narrower is not drawn
DEPTH = 9


def training_step(model: ReLLMForConditionalGeneration, *, quick: bool) -> Callable[[], None]:
    """Batch 8, clips of 5 s: forward pass, losses, backward pass, AdamW."""
    model.train()
    inputs = conversations(build_processor(model, full_window=False), clips(2 if quick else 8, 5.0), reply=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-5)

    def step() -> None:
        output = model(**inputs, labels=inputs["input_ids"], use_cache=False)
        with record_function("loss"):
            loss = output.loss + output.emotion_logits.square().mean() + output.dimensions.square().mean()
        with record_function("backward"):
            loss.backward()
        with record_function("AdamW"):
            optimizer.step()
            optimizer.zero_grad()

    return step


def reply(model: ReLLMForConditionalGeneration, *, quick: bool) -> Callable[[], None]:
    """Batch 8, clips of 5 s, 12 tokens."""
    model.eval()
    inputs = conversations(build_processor(model, full_window=False), clips(2 if quick else 8, 5.0), reply=False)
    return lambda: model.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False)


def name_spans(model: nn.Module) -> None:
    """Ranges of the profiler over `SPANS`."""
    for name, (first, last) in SPANS.items():
        ranges: list[record_function] = []

        def enter(module: nn.Module, inputs: tuple, name: str = name, ranges: list = ranges) -> None:
            ranges.append(record_function(name))
            ranges[-1].__enter__()

        def leave(module: nn.Module, inputs: tuple, output: object, ranges: list = ranges) -> None:
            ranges.pop().__exit__(None, None, None)

        model.get_submodule(first).register_forward_pre_hook(enter)
        model.get_submodule(last).register_forward_hook(leave)


def draw(profiled: profile, path: Path, title: str) -> None:
    """The flame chart: time to the right, what was called downwards."""
    events = [event for event in profiled.events() if event.cpu_time_total > 0]
    start = min(event.time_range.start for event in events)
    whole = max(event.time_range.end for event in events) - start
    shares = dict.fromkeys(COLOURS, 0.0)
    drawing = Figure(figsize=(16, 4.6), dpi=110, layout="constrained")
    axes = drawing.subplots()
    for event in events:
        depth, colour, above = 0, COLOURS.get(event.name), event.cpu_parent
        while above is not None:
            depth, colour, above = depth + 1, colour or COLOURS.get(above.name), above.cpu_parent
        left, width = event.time_range.start - start, event.time_range.elapsed_us()
        if event.name in shares:
            shares[event.name] += width / whole
        if depth >= DEPTH or width < NARROWEST * whole:
            continue
        shade = 1.0 if event.name in COLOURS else 0.55
        box = {"facecolors": colour or "#BBBBBB", "edgecolors": "white", "linewidth": 0.3, "alpha": shade}
        axes.broken_barh([(left / 1e3, width / 1e3)], (-depth - 0.95, 0.9), **box)
        label = event.name.removeprefix("aten::").removeprefix("autograd::engine::evaluate_function: ")
        if width > 0.0065 * whole * len(label):
            axes.text((left + width / 2) / 1e3, -depth - 0.5, label, ha="center", va="center", fontsize=7)
    named = [(name, share) for name, share in shares.items() if share >= 0.001]
    handles = [Patch(color=COLOURS[name], label=f"{name} {share:.1%}") for name, share in named]
    handles.append(Patch(color="#BBBBBB", label=f"the rest {1 - sum(share for _, share in named):.1%}"))
    axes.legend(handles=handles, loc="lower center", ncol=len(handles), frameon=False, bbox_to_anchor=(0.5, -0.32))
    axes.set_xlim(0, whole / 1e3)
    axes.set_xlabel("ms")
    axes.set_yticks([])
    axes.set_title(title)
    axes.spines[["left", "right", "top"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path)


def main(*, suffix: str = "", traces: Path | None = None, quick: bool = False) -> None:
    model = build_model(quick=quick)
    name_spans(model)
    for name, make in (("training", training_step), ("reply", reply)):
        run = make(model, quick=quick)
        run()  # what happens once only is not of interest
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            run()
        title = f"{(make.__doc__ or '').strip()} {torch.get_num_threads()} thread(s), reference sizes, float32"
        draw(profiled, RESULTS / f"profile_{name}{suffix}.png", f"{name}: {title}")
        if traces is not None:
            traces.mkdir(parents=True, exist_ok=True)
            profiled.export_chrome_trace(str(traces / f"{name}{suffix}.json"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suffix", default="", help="after the names of the files")
    parser.add_argument("--traces", type=Path, help="folder for the traces (tens of MB)")
    arguments = parser.parse_args()
    main(suffix=arguments.suffix, traces=arguments.traces)
