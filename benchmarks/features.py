"""Reading 16 kHz FLAC files and making both towers' inputs: how many times faster than real time, on one thread.

The clips are the noise of the other benchmarks under a slow envelope, which FLAC compresses less than speech: reading
it takes a little longer.
"""

import tempfile
from pathlib import Path

import numpy as np
import soundfile
import torch
from harness import figure, interleave, report
from reference import RATE, build_model, build_processor, clips, conversations

BATCH, SECONDS = 8, 5.0


def main(*, quick: bool = False) -> None:
    torch.set_num_threads(1)
    model = build_model(quick=quick)
    cheap, full = (build_processor(model, full_window=window) for window in (False, True))
    with tempfile.TemporaryDirectory() as folder:
        paths = _write_clips(Path(folder))
        seconds = interleave(
            {
                "features": lambda: cheap.feature_extractor(paths),
                "full": lambda: full.feature_extractor(paths),
                "decoding": lambda: [cheap.feature_extractor.read_clip(path) for path in paths],
                "batch": lambda: conversations(cheap, paths, reply=True),
            },
            rounds=1 if quick else 25,
        )
    duration = BATCH * SECONDS
    rows = [
        figure("FLAC to features: x real time", duration / seconds["features"], ">= 100", seconds=seconds["features"]),
        figure("the same, 30 s window", duration / seconds["full"], ">= 100", seconds=seconds["full"]),
        figure(
            "FLAC to a training batch, with the text", duration / seconds["batch"], ">= 100", seconds=seconds["batch"]
        ),
        figure("reading the file alone", duration / seconds["decoding"], seconds=seconds["decoding"]),
    ]
    report("features", rows, about=f"{BATCH} files of {SECONDS:g} s at {RATE} Hz, one thread, processor time")


def _write_clips(folder: Path) -> list[str]:
    envelope = np.sin(np.linspace(0, 6 * np.pi, round(SECONDS * RATE))) ** 2
    paths = []
    for index, clip in enumerate(clips(BATCH, SECONDS)):
        paths.append(str(folder / f"clip{index}.flac"))
        soundfile.write(paths[-1], clip * envelope, RATE, subtype="PCM_16")
    return paths


if __name__ == "__main__":
    main()
