"""What RE-LLM is measured against on voices: a linear probe on Whisper's frames, eGeMAPS with a linear SVM, majority.

Each leaves out one speaker (a voice pack) after the other, and sees nothing of that one's clips.
"""

import importlib.util
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)  # of the SVM; one is chosen on the training speakers alone


def check_opensmile() -> None:
    """Raise `ImportError` before the work rather than after it, if openSMILE is missing."""
    if importlib.util.find_spec("opensmile") is None:
        raise ImportError("eGeMAPS needs openSMILE: `pip install opensmile`.")


def statistics(frames: Sequence[np.ndarray]) -> np.ndarray:
    """Return mean and deviation of each clip's frames: `(clips, 2 * width)` of arrays `(frames, width)`."""
    return np.array([np.concatenate([one.mean(0), one.std(0)]) for one in frames])


def linear_probe(
    values: np.ndarray, emotions: np.ndarray, speakers: np.ndarray, held_out: Sequence[str] | None = None
) -> np.ndarray:
    """Answer by a logistic regression (C 0.01, classes balanced) on values `(clips, width)`, scaled to one deviation.

    `held_out` are the speakers to answer for, by default all; other clips have an empty answer.
    """

    def fit(train: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, class_weight="balanced", max_iter=2000))
        return probe.fit(values[train], emotions[train]).predict

    return _answers(values, emotions, speakers, fit, held_out)


def acoustic_machine(
    clips: Sequence[np.ndarray], sampling_rate: int, emotions: np.ndarray, speakers: np.ndarray
) -> np.ndarray:
    """Answer by a linear SVM on the 88 functionals of eGeMAPS (v02)."""
    import opensmile

    smile = opensmile.Smile(opensmile.FeatureSet.eGeMAPSv02, opensmile.FeatureLevel.Functionals)
    values = np.concatenate([smile.process_signal(clip, sampling_rate).to_numpy() for clip in clips])
    return vector_machine(np.nan_to_num(values), emotions, speakers)


def vector_machine(values: np.ndarray, emotions: np.ndarray, speakers: np.ndarray) -> np.ndarray:
    """Answer by a linear SVM, classes balanced, whose penalty five folds over the training speakers choose."""

    def fit(train: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        machine = make_pipeline(StandardScaler(), LinearSVC(class_weight="balanced", max_iter=20_000))
        folds = GroupKFold(min(5, len(set(speakers[train]))))
        search = GridSearchCV(machine, {"linearsvc__C": PENALTIES}, scoring="balanced_accuracy", cv=folds)
        return search.fit(values[train], emotions[train], groups=speakers[train]).predict

    return _answers(values, emotions, speakers, fit)


def majority(emotions: np.ndarray, speakers: np.ndarray) -> np.ndarray:
    """Answer with the most frequent emotion of the training speakers."""

    def fit(train: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        (most, _), *_ = Counter(emotions[train].tolist()).most_common(1)
        return lambda values: np.full(len(values), most)

    return _answers(emotions, emotions, speakers, fit)


def _answers(
    values: np.ndarray,
    emotions: np.ndarray,
    speakers: np.ndarray,
    fit: Callable[[np.ndarray], Callable[[np.ndarray], np.ndarray]],
    held_out: Sequence[str] | None = None,
) -> np.ndarray:
    answers = np.full(len(emotions), "", dtype=object)
    for speaker in sorted(set(speakers)) if held_out is None else held_out:
        train = speakers != speaker
        answers[~train] = fit(train)(values[~train])
    return answers
