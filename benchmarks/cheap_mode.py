"""What the cheap mode does to emotion: a linear probe on a real Whisper's frames, over 30 s windows and over clips.

    python benchmarks/cheap_mode.py FOLDER          a Whisper's folder; needs relllm[demo] for the synthesiser

The probe is a logistic regression on the mean and the deviation of a clip's own frames, trained and tested in each of
the two modes, on synthetic speech in five emotions whose test voices and sentences are heard nowhere else. Intervals
are a bootstrap over the test set's turns (one sentence of one voice in all five emotions). The emotions are rules of
pitch, rate and loudness: this says whether they survive the mode, not how well people's emotions are recognised.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from harness import figure, report
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import recall_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoModel, PreTrainedModel

from relllm import ReLLMFeatureExtractor
from relllm.demo.demo_settings import SyntheticSettings
from relllm.demo.synthetic import synthesize_corpus
from relllm.modeling.audio_tower_relllm import encode_audio

MODES = {"window": True, "clip": False}
RESAMPLES = 2000


@torch.no_grad()
def main(folder: str, *, train: int = 40, test: int = 40) -> None:
    """
    Args:
        folder (`str`): Of a Whisper in Transformers' format.
        train, test (`int`): Clips of each emotion.
    """
    tower = AutoModel.from_pretrained(folder, local_files_only=True).get_encoder().eval()
    extractors = {
        mode: ReLLMFeatureExtractor(feature_size=tower.config.num_mel_bins, emotion_values=False, full_window=full)
        for mode, full in MODES.items()
    }
    with tempfile.TemporaryDirectory() as directory:
        sizes = {"train_clips": train, "validation_clips": 1, "test_clips": test}
        settings = SyntheticSettings(output_dir=Path(directory) / "corpus", **sizes)
        corpus = synthesize_corpus(settings, progress=False)
        features = {
            (split, mode): np.stack([_features(tower, extractor, path) for path in corpus[split]["audio"]])
            for split in ("train", "test")
            for mode, extractor in extractors.items()
        }
    labels = {split: np.array(corpus[split]["emotion"]) for split in ("train", "test")}
    turns = _turns(corpus["test"])
    said = {}
    for trained in MODES:
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
        probe.fit(features["train", trained], labels["train"])
        for tested in MODES:
            said[trained, tested] = probe.predict(features["test", tested])
    resampled = np.random.default_rng(0).integers(len(turns), size=(RESAMPLES, len(turns)))
    samples = [np.concatenate([turns[turn] for turn in sample]) for sample in resampled]
    recalls = {name: [_recall(labels["test"][s], answer[s]) for s in samples] for name, answer in said.items()}
    rows = []
    for (trained, tested), answer in said.items():
        low, high = np.percentile(recalls[trained, tested], [2.5, 97.5])
        what = f"UA of a probe, trained on the {trained}, tested on the {tested}"
        rows.append(figure(what, _recall(labels["test"], answer), low=float(low), high=float(high)))
    gained = np.subtract(recalls["clip", "clip"], recalls["window", "window"])
    low, high = np.percentile(gained, [2.5, 97.5])
    rows.append(figure("UA, clip - window", rows[3]["reached"] - rows[0]["reached"], low=float(low), high=float(high)))
    change = np.linalg.norm(features["test", "clip"] - features["test", "window"])
    spread = np.linalg.norm(features["test", "window"] - features["test", "window"].mean(0))
    rows.append(figure("relative change of the features", float(change / spread), low=0.0, high=0.0))
    number = len(labels["train"]), len(labels["test"])
    report(
        "cheap_mode",
        rows,
        about=f"{Path(folder).name}, synthetic speech, {number[0]} clips to train, {number[1]} to test",
    )


def _features(tower: PreTrainedModel, extractor: ReLLMFeatureExtractor, path: str) -> np.ndarray:
    """`(2 x width,)`: mean and deviation over the clip's own frames."""
    inputs = extractor([path])
    output, lengths = encode_audio(tower, inputs["input_features"], inputs["input_features_mask"])
    frames = output.last_hidden_state[0, : lengths[0]]
    return torch.cat([frames.mean(0), frames.std(0)]).numpy()


def _turns(test: Dataset) -> list[np.ndarray]:
    """Places of the clips that share voice and sentence."""
    names = np.array([f"{speaker} {text}" for speaker, text in zip(test["speaker"], test["text"], strict=True)])
    return [np.flatnonzero(names == name) for name in np.unique(names)]


def _recall(labels: np.ndarray, answers: np.ndarray) -> float:
    return float(recall_score(labels, answers, average="macro", zero_division=0.0))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a Whisper's folder, in Transformers' format")
    main(parser.parse_args().folder)
