"""`relllm empathy train`: a scorer of one mechanism from EPITOME's pairs, in a folder with its metrics.

The test split is read once, after the checkpoint was chosen on the validation split; a bag of words is trained beside.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoTokenizer,
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME

from relllm.data.journal import Journal, write_json
from relllm.data.report import find_versions
from relllm.plots import plot_confusion_matrix

from ..evaluation_settings import METRICS, EmpathySettings
from ..fingerprints import check_extras, describe_hardware, model_fingerprint
from .epitome import PairCollator, describe_split, encode_pairs, read_pairs, split_pairs
from .quality import LEVEL_NAMES, level_scores, measure_bag_of_words
from .scorer import IGNORED, EmpathyScorer

SCORER_FORMAT = "relllm-empathy-scorer-1"
BASE_SIZE, BASE_RATE = 85_000_000, 2e-5  # RoBERTa-base without its embeddings; the authors' learning rate for it
RATES = (1e-5, 1e-3)  # the least and the most


def train_scorer(settings: EmpathySettings, *, progress: bool = True) -> dict:
    """Train a scorer, measure it on the test split and write model, tokenizer, metrics and confusion matrix.

    Killed, the same call goes on from the end of the last epoch and gives the same scorer; complete, it returns what
    is there, the content of `metrics.json`. Another's folder `output_dir/<mechanism>` is a `FileExistsError`.
    """
    check_extras("Training a scorer", "matplotlib", "scikit-learn")
    folder = settings.output_dir / settings.mechanism
    identity = _training_identity(settings)
    if folder.exists():
        return _read_complete(folder, identity)
    pairs, report = read_pairs(settings.data)
    shares = {"validation_share": settings.validation_share, "test_share": settings.test_share}
    splits = split_pairs(pairs, seed=settings.seed, **shares)
    bag_of_words = measure_bag_of_words(splits["train"], splits["test"])
    work = settings.output_dir / f"{settings.mechanism}.unfinished"
    with Journal(work / "settings.jsonl", identity) as journal:
        journal.append(())  # the settings alone
        tokenizer = AutoTokenizer.from_pretrained(settings.encoder, revision=settings.revision)
        features = {name: encode_pairs(of, tokenizer, settings.max_length) for name, of in splits.items()}
        trainer = _build_trainer(settings, tokenizer, features, work / "checkpoints", progress=progress)
        trainer.train(resume_from_checkpoint=_last_checkpoint(work / "checkpoints"))
        predicted = {name: trainer.predict(features[name], metric_key_prefix=name) for name in ("validation", "test")}
        measured = {name: measure(*_predicted(prediction)) for name, prediction in predicted.items()}
        split_report = {name: describe_split(of) for name, of in splits.items()}
        metrics = {
            "format": SCORER_FORMAT,
            "mechanism": settings.mechanism,
            "settings": identity,
            "data": {"file": settings.data.name, "fingerprint": identity["data_fingerprint"], **report},
            "splits": split_report,
            **measured,
            "test_baseline": _majority_baseline(split_report),
            "bag_of_words": bag_of_words,
            "learning_rate": trainer.args.learning_rate,
            "chosen_epoch": _chosen_epoch(trainer),
            "seed": settings.seed,
            "versions": find_versions("torch", "transformers", "tokenizers", "numpy", "scikit-learn"),
            "hardware": describe_hardware(trainer.args.device),
        }
        _write_folder(trainer, tokenizer, metrics, work / "scorer")
        (work / "scorer").rename(folder)
        shutil.rmtree(work)
    return metrics


def measure(
    level_logits: np.ndarray, rationale_logits: np.ndarray, levels: np.ndarray, rationales: np.ndarray
) -> dict:
    """Return accuracy and macro-F1 of the level, and the token F1 of the rationale, from logits and labels of pairs.

    The token F1 is a mean over pairs without those that have neither a rationale nor a prediction, `None` where none
    is left; tokens with the label -100 do not count.
    """
    from sklearn.metrics import f1_score

    pairs = [
        (true[true != IGNORED], guess[true != IGNORED])
        for true, guess in zip(rationales, rationale_logits.argmax(-1), strict=True)
        if (true != IGNORED).any()
    ]
    scores = [f1_score(true, guess) for true, guess in pairs if true.any() or guess.any()]
    return {
        "level": level_scores(levels.tolist(), level_logits.argmax(-1).tolist()),
        "rationale": {"token_f1": float(np.mean(scores)) if scores else None, "num_pairs": len(pairs)},
    }


def choose_learning_rate(encoder: PreTrainedModel) -> float:
    """Return the authors' learning rate for an encoder of RoBERTa-base's size, in inverse proportion for others.

    It counts parameters outside the embeddings: with 2e-5 a small encoder stays at the most frequent level.
    """
    embedded = {id(weight) for weight in encoder.get_input_embeddings().parameters()}
    size = sum(weight.numel() for weight in encoder.parameters() if id(weight) not in embedded)
    return min(max(BASE_RATE * BASE_SIZE / size, RATES[0]), RATES[1])


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
        learning_rate=settings.learning_rate or choose_learning_rate(model.response_encoder),
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
        restore_callback_states_from_checkpoint=True,  # a resumed run has the patience that was left
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
        callbacks=[EarlyStoppingCallback(early_stopping_patience=settings.patience)],
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
    """Measure the answer that is always the most frequent level of the training split."""
    guess = int(np.argmax(splits["train"]["levels"]))
    levels = [level for level, count in enumerate(splits["test"]["levels"]) for _ in range(count)]
    found = level_scores(levels, [guess] * len(levels))
    return {"level": guess, "accuracy": found["accuracy"], "macro_f1": found["macro_f1"]}


def _chosen_epoch(trainer: Trainer) -> float | None:
    """Return the epoch of the kept checkpoint."""
    steps = [entry for entry in trainer.state.log_history if entry.get("step") == trainer.state.best_global_step]
    return next((float(entry["epoch"]) for entry in steps), None)


def _write_folder(trainer: Trainer, tokenizer: object, metrics: Mapping, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed here
    trainer.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
    matrix, names = metrics["test"]["level"]["confusion_matrix"], [f"level {name}" for name in LEVEL_NAMES]
    title = f"{metrics['mechanism']}, test split"
    plot_confusion_matrix(matrix, names, folder / "confusion_matrix.png", title=title)
    write_json(metrics, folder / METRICS)


def _training_identity(settings: EmpathySettings) -> dict:
    """Return what must not change when a run goes on. Where it runs may."""
    free = ("data", "output_dir", "device", "encoder")
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
        raise FileExistsError(f"{folder} is there, from other data or settings. Choose another --out, or delete it.")
    return found


def _last_checkpoint(folder: Path) -> str | None:
    """Find the last complete one: its state is written last."""
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{TRAINER_STATE_NAME}")]
    return str(max(complete, key=lambda path: int(path.name.split("-")[1]))) if complete else None
