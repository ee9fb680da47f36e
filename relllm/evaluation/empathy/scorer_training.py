"""`relllm empathy train`: a scorer of one mechanism from EPITOME's pairs, in a folder with metrics and card.

What lives here: the recipe, resuming, the files. What does not: the pairs and their split (`empathy_data.py`), the
model (`empathy_model.py`), the card's words (`empathy_card.py`).

The recipe is that of the authors' public code: AdamW at 2e-5 falling linearly to 0, batch 32, 4 epochs, gradient norm
1, no weight decay, the seeker's encoder frozen. It differs in one thing: the kept checkpoint is the one with the best
macro-F1 on the validation split, where the code keeps the last. The test split is read once, after that choice.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.repocard import metadata_load
from transformers import AutoTokenizer, EvalPrediction, Trainer, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils.hub import cached_file

from relllm import __version__
from relllm.data.journal import Journal, write_json
from relllm.metrics import recognition_metrics
from relllm.plots import plot_confusion_matrix

from ..fingerprints import model_fingerprint
from ..summary import LEVELS, MECHANISMS
from .epitome import PairCollator, describe_split, encode_pairs, read_pairs, split_pairs
from .rationales import rationale_metrics
from .scorer import EmpathyScorer
from .scorer_card import make_scorer_card

FORMAT = "relllm-empathy-scorer-1"
METRICS, CONFUSION = "metrics.json", "confusion_matrix.png"
UNKNOWN = "unknown"  # a licence that is not stated


@dataclass(frozen=True)
class EmpathySettings:
    """Of one scorer.

    Args:
        data (`Path`): As [`~relllm.evaluation.empathy.epitome.read_pairs`] takes it.
        mechanism (`str`): `"ER"`, `"IP"` or `"EX"`: which one the file is about.
        encoder (`str`): An encoder of Transformers: a Hub id or a directory.
        out (`Path`): The scorer goes into `out/<mechanism>`.
        revision (`str`, *optional*, defaults to `"main"`): Of the encoder on the Hub.
        max_length (`int`, *optional*, defaults to 64): Tokens of a text.
        learning_rate (`float`, *optional*, defaults to 2e-5), batch_size (`int`, *optional*, defaults to 32), epochs
            (`int`, *optional*, defaults to 4): EPITOME's.
        level_weight (`float`, *optional*, defaults to 1.0), rationale_weight (`float`, *optional*, defaults to 0.5):
            Of the losses.
        validation_share (`float`, *optional*, defaults to 0.1), test_share (`float`, *optional*, defaults to 0.2): Of
            the seeker posts.
        seed (`int`, *optional*, defaults to 0): Of the split, the fresh weights, the order and the dropout.
        licence (`str`, *optional*): Of the scorer, an id of the Hub; by default the encoder's, from its card.
        device (`str`, *optional*, defaults to `"auto"`): `"auto"` or `"cpu"`.

    Raises:
        ValueError: On an unknown mechanism or device, or a number outside its range.
    """

    data: Path
    mechanism: str
    encoder: str
    out: Path
    revision: str = "main"
    max_length: int = 64
    learning_rate: float = 2e-5
    batch_size: int = 32
    epochs: int = 4
    level_weight: float = 1.0
    rationale_weight: float = 0.5
    validation_share: float = 0.1
    test_share: float = 0.2
    seed: int = 0
    licence: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.mechanism not in MECHANISMS:
            raise ValueError(f"mechanism must be one of {', '.join(MECHANISMS)}, got {self.mechanism!r}.")
        if self.device not in ("auto", "cpu"):
            raise ValueError(f"device must be 'auto' or 'cpu', got {self.device!r}.")
        for name, value in (("epochs", self.epochs), ("batch_size", self.batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}.")


def train_scorer(settings: EmpathySettings, *, progress: bool = True) -> dict:
    """Trains a scorer, measures it on the test split and writes model, tokenizer, metrics, confusion matrix and card.

    Killed, the same call goes on from the end of the last epoch and gives the same scorer; complete, it returns what
    is there. The folder `out/<mechanism>` is complete or not there.

    Args:
        settings ([`EmpathySettings`]): What to train on what.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        `dict`: The content of `metrics.json`.

    Raises:
        ImportError: If scikit-learn or matplotlib is missing.
        ValueError: If the data, the encoder or a setting is not usable, or an unfinished run there has other settings.
        FileExistsError: If `out/<mechanism>` holds a scorer of other settings.
        BlockingIOError: If another process is training there.
    """
    _check_extras()
    folder = settings.out / settings.mechanism
    identity = _identity(settings)
    if folder.exists():
        return _read_complete(folder, identity)
    pairs, report = read_pairs(settings.data)
    splits = split_pairs(
        pairs, seed=settings.seed, validation_share=settings.validation_share, test_share=settings.test_share
    )
    work = settings.out / f"{settings.mechanism}.unfinished"
    with Journal(work / "settings.jsonl", identity):
        tokenizer = AutoTokenizer.from_pretrained(settings.encoder, revision=settings.revision)
        features = {name: encode_pairs(of, tokenizer, settings.max_length) for name, of in splits.items()}
        trainer = _build_trainer(settings, tokenizer, features, work / "checkpoints", progress=progress)
        trainer.train(resume_from_checkpoint=_last_checkpoint(work / "checkpoints"))
        measured = {
            name: measure(*_predicted(trainer.predict(features[name], metric_key_prefix=name)))
            for name in ("validation", "test")
        }
        split_report = {name: describe_split(of) for name, of in splits.items()}
        metrics = {
            "format": FORMAT,
            "mechanism": settings.mechanism,
            "settings": identity,
            "data": {"file": settings.data.name, "fingerprint": identity["data_fingerprint"], **report},
            "splits": split_report,
            **measured,
            "test_baseline": _majority_baseline(split_report),
            "chosen_epoch": _chosen_epoch(trainer),
            "seed": settings.seed,
            "versions": _versions(),
            "hardware": _hardware(trainer),
        }
        _write_folder(trainer, tokenizer, metrics, settings, work / "scorer")
        (work / "scorer").rename(folder)
        shutil.rmtree(work)
    return metrics


def measure(
    level_logits: np.ndarray, rationale_logits: np.ndarray, levels: np.ndarray, rationales: np.ndarray
) -> dict:
    """Accuracy and macro-F1 of the level, token F1 and IOU-F1 of the rationale.

    Args:
        level_logits (`np.ndarray` of shape `(pairs, 3)`), rationale_logits (`np.ndarray` of shape `(pairs, T, 2)`):
            From [`EmpathyScorer`].
        levels (`np.ndarray` of shape `(pairs,)`), rationales (`np.ndarray` of shape `(pairs, T)`): The labels.
    """
    names = [str(level) for level in range(LEVELS)]
    found = recognition_metrics(levels.tolist(), level_logits.argmax(-1).tolist(), names)
    return {
        "level": {
            "accuracy": found["wa"],
            "macro_f1": found["macro_f1"],
            "recall": found["recall"],
            "confusion_matrix": found["confusion_matrix"],
            "num_pairs": found["num_clips"],
        },
        "rationale": {**rationale_metrics(rationales.tolist(), rationale_logits.argmax(-1).tolist())},
    }


def _build_trainer(
    settings: EmpathySettings, tokenizer: object, features: Mapping, checkpoints: Path, *, progress: bool
) -> Trainer:
    set_seed(settings.seed)  # what is drawn for the heads
    model = EmpathyScorer.from_encoder(
        settings.encoder,
        mechanism=settings.mechanism,
        max_length=settings.max_length,
        level_loss_weight=settings.level_weight,
        rationale_loss_weight=settings.rationale_weight,
        revision=settings.revision,
    )
    model.freeze_seeker_encoder()
    use_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    args = TrainingArguments(
        output_dir=str(checkpoints),
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        num_train_epochs=settings.epochs,
        seed=settings.seed,
        use_cpu=use_cpu,
        dataloader_pin_memory=not use_cpu,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        save_total_limit=1,  # and the best
        load_best_model_at_end=True,
        metric_for_best_model="macro_f1",
        greater_is_better=True,
        label_names=["level_labels", "rationale_labels"],
        report_to="none",
        disable_tqdm=not progress,
    )
    return Trainer(
        model=model,
        args=args,
        train_dataset=features["train"],
        eval_dataset=features["validation"],
        data_collator=PairCollator(tokenizer.pad_token_id),  # type: ignore[attr-defined]
        compute_metrics=_validation_metrics,
    )


def _validation_metrics(prediction: EvalPrediction) -> dict[str, float]:
    level = measure(*_predicted(prediction))["level"]
    return {name: level[name] for name in ("accuracy", "macro_f1")}


def _predicted(prediction: EvalPrediction) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Logits and labels; both are padded with -100 to the longest response."""
    (level_logits, rationale_logits), (levels, rationales) = prediction.predictions, prediction.label_ids
    if not np.isfinite(level_logits).all():
        raise ValueError("The scorer's logits are not finite: training diverged. Lower the learning rate.")
    return level_logits, rationale_logits, levels, rationales


def _majority_baseline(splits: Mapping[str, Mapping]) -> dict[str, float]:
    """Of the answer that is always the most frequent level of the training split."""
    guess = int(np.argmax(splits["train"]["levels"]))
    levels = [level for level, count in enumerate(splits["test"]["levels"]) for _ in range(count)]
    found = recognition_metrics(levels, [guess] * len(levels), [str(level) for level in range(LEVELS)])
    return {"level": guess, "accuracy": found["wa"], "macro_f1": found["macro_f1"]}


def _chosen_epoch(trainer: Trainer) -> float | None:
    """The epoch of the kept checkpoint."""
    steps = [entry for entry in trainer.state.log_history if entry.get("step") == trainer.state.best_global_step]
    return next((float(entry["epoch"]) for entry in steps), None)


def _write_folder(
    trainer: Trainer, tokenizer: object, metrics: Mapping, settings: EmpathySettings, folder: Path
) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed here
    trainer.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
    names = [f"level {level}" for level in range(LEVELS)]
    title = f"{settings.mechanism}, test split"
    plot_confusion_matrix(metrics["test"]["level"]["confusion_matrix"], names, folder / CONFUSION, title=title)
    licence = settings.licence or _encoder_licence(settings)
    encoder = None if Path(settings.encoder).is_dir() else settings.encoder
    card = make_scorer_card(metrics, encoder=encoder, licence=licence, confusion=CONFUSION)
    (folder / "README.md").write_text(str(card), encoding="utf-8")
    write_json(metrics, folder / METRICS)


def _encoder_licence(settings: EmpathySettings) -> str:
    """As the encoder's own card has it."""
    card = cached_file(
        settings.encoder,
        "README.md",
        revision=settings.revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    licence = (metadata_load(card) or {}).get("license") if card is not None else None
    return licence if isinstance(licence, str) else UNKNOWN


def _identity(settings: EmpathySettings) -> dict:
    """What must not change when a run goes on. Where it runs, and what the card says, may."""
    free = ("data", "out", "device", "licence", "encoder")
    return {
        "task": "empathy train",
        **{field.name: getattr(settings, field.name) for field in fields(settings) if field.name not in free},
        "encoder": Path(settings.encoder).name if Path(settings.encoder).is_dir() else settings.encoder,
        "encoder_fingerprint": model_fingerprint(settings.encoder, revision=settings.revision),
        "data_fingerprint": f"sha256:{hashlib.sha256(settings.data.read_bytes()).hexdigest()}",
    }


def _read_complete(folder: Path, identity: Mapping) -> dict:
    found = json.loads((folder / METRICS).read_text(encoding="utf-8")) if (folder / METRICS).is_file() else {}
    if found.get("settings") != identity:
        raise FileExistsError(
            f"{folder} is there already, from other data or settings. Choose another --out, or delete it."
        )
    return found


def _check_extras() -> None:
    """Says at the beginning what would be missing at the end."""
    for name in ("matplotlib", "scikit-learn"):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError as error:
            raise ImportError(f"Training a scorer needs {name}: `pip install relllm[eval]`.") from error


def _last_checkpoint(folder: Path) -> str | None:
    """The last complete one: its state is written last."""
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{TRAINER_STATE_NAME}")]
    return str(max(complete, key=lambda path: int(path.name.split("-")[1]))) if complete else None


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "tokenizers", "numpy", "scikit-learn")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"relllm": __version__, "python": platform.python_version(), **found}


def _hardware(trainer: Trainer) -> str:
    if trainer.args.device.type == "cuda":
        return torch.cuda.get_device_name(trainer.args.device)
    return f"CPU ({platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads)"


__all__ = ["EmpathySettings", "measure", "train_scorer"]
