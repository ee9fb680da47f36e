"""`relllm prepare folder`: hours of audio a minute, and the peak memory of each process for N and 4N clips.

    python benchmarks/prepare.py

Clips are noise of 4 s at 44.1 kHz, embedded, so that each is read, resampled and encoded. Memory is the peak resident
set, read from the system every 50 ms; pages that the processes share count for each of them.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import soundfile
from harness import report

SECONDS, RATE = 4, 44_100
NUM_PROC = 2
CLIPS = (1024, 4096)
MIB = 1024**2


def write_clips(folder: Path, count: int) -> None:
    """Files of one noise at different places in it."""
    folder.mkdir()
    noise = (3000 * np.random.default_rng(0).standard_normal(SECONDS * RATE + count)).astype(np.int16)
    for index in range(count):
        soundfile.write(folder / f"clip{index:06d}.wav", noise[index : index + SECONDS * RATE], RATE)


def measure(folder: Path, out: Path) -> dict[str, float]:
    """Wall time of the command, and the peaks of the first process and of its largest worker."""
    command = [sys.executable, "-m", "relllm.cli", "prepare", "folder", str(folder), "--out", str(out)]
    started = time.monotonic()
    process = subprocess.Popen([*command, "--embed-audio", "--num-proc", str(NUM_PROC)], stdout=subprocess.DEVNULL)
    first, peaks = psutil.Process(process.pid), {"parent": 0, "worker": 0}
    while process.poll() is None:
        try:
            peaks["parent"] = max(peaks["parent"], first.memory_info().rss)
            for child in first.children(recursive=True):
                peaks["worker"] = max(peaks["worker"], child.memory_info().rss)
        except psutil.NoSuchProcess:  # ended between the listing and the reading
            continue
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}.")
    return {
        "wall_s": round(time.monotonic() - started, 2),
        "parent_mib": round(peaks["parent"] / MIB, 1),
        "worker_mib": round(peaks["worker"] / MIB, 1),
    }


def main() -> None:
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as directory:
        for count in CLIPS:
            folder = Path(directory) / f"clips{count}"
            write_clips(folder, count)
            found = measure(folder, Path(directory) / f"out{count}")
            hours = count * SECONDS / 3600
            speed = round(60 * hours / found["wall_s"], 2)
            rows.append({"clips": count, "audio_h": round(hours, 2), "audio_h_per_min": speed, **found})
    report("prepare", rows, about=f"prepare folder --embed-audio, {NUM_PROC} processes, {SECONDS} s at {RATE} Hz")


if __name__ == "__main__":
    main()
