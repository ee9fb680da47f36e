"""Folders as `relllm evaluate` writes them, made by hand from simulated systems."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

CLASSES = ["neutral", "happy", "angry", "sad"]


def simulated_clips(
    num_clips: int, skill: float, *, seed: int, num_speakers: int = 12, parts: Sequence[str] = ("head", "dimensions")
) -> list[dict]:
    """Clips of a system whose answers are the better, the higher its skill in [0, 1]; labels depend on no skill."""
    label_rng, rng = np.random.default_rng(0), np.random.default_rng(seed)
    clips = []
    for number in range(num_clips):
        emotion = CLASSES[label_rng.choice(4, p=[0.4, 0.3, 0.2, 0.1])]
        labels = label_rng.random(3)
        answer = emotion if rng.random() < skill else CLASSES[rng.integers(4)]
        probabilities = rng.dirichlet(np.ones(4)) * 0.4
        probabilities[CLASSES.index(answer)] += 0.6
        by_class = dict(zip(CLASSES, probabilities.tolist(), strict=True))
        levels = {name: int(rng.binomial(2, chance * skill)) for name, chance in (("ER", 1), ("IP", 0.5), ("EX", 0.3))}
        clip = {
            "id": f"clip{number:04d}",
            "speaker": f"s{number % num_speakers}",
            "session": f"Ses{number % 5 + 1:02d}",
            "duration_s": 2.0,
            "emotion": emotion,
            **dict(zip(("arousal", "dominance", "valence"), labels.tolist(), strict=True)),
            "dimension_source": "label",
            "recognition": {"generated": {"text": answer, "emotion": answer}, "likelihood": by_class},
            "reply": "I see.",
            "empathy": {name: {"level": level, "probabilities": [0.2, 0.3, 0.5]} for name, level in levels.items()},
        }
        if "head" in parts:
            clip["recognition"]["head"] = by_class
        if "dimensions" in parts:
            noisy = skill * labels + (1 - skill) * rng.random(3)
            clip["dimensions"] = dict(zip(("arousal", "dominance", "valence"), noisy.tolist(), strict=True))
        clips.append(clip)
    return clips


def write_run(
    path: Path, system: str, clips: Sequence[Mapping], *, corpus: str = "iemocap", **changes: object
) -> Path:
    """Writes predictions.jsonl and the parts of metrics.json that a comparison reads."""
    path.mkdir(parents=True)
    ways = {way for clip in clips for way in clip.get("recognition", {})}
    metrics = {
        "format": "relllm-run-1",
        "system": system,
        "name": path.name,
        "data": {"corpus": corpus, "split": "test", "held_out": None, "fingerprint": "abc", "num_clips": len(clips)},
        "recognition": {way: {"class_names": CLASSES} for way in sorted(ways)},
        "empathy": {"scorers": {"id": "scorers", "fingerprint": "def"}},
        "folds": None,
        **changes,
    }
    lines = [{"settings": {}}, *clips]
    (path / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "metrics.json").write_text(json.dumps(metrics))
    return path
