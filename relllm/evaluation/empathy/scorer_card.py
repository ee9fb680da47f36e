"""The `README.md` of an empathy scorer.

What lives here: its words. What does not: the numbers (`empathy_training.py`).
"""

from __future__ import annotations

from collections.abc import Mapping

from huggingface_hub import EvalResult, ModelCard, ModelCardData

NAMES = {"ER": "emotional reactions", "IP": "interpretations", "EX": "explorations"}
TEXT = """\
---
{front_matter}
---

# Empathy scorer: {name} ({mechanism})

Gives a response to a seeker's post a level of {name}, 0 (none), 1 (weak) or 2 (strong), and marks the
words that carry it. The bi-encoder of EPITOME (Sharma et al. 2020,
[arXiv 2009.08441](https://arxiv.org/abs/2009.08441)), trained with
`relllm empathy train`.

```python
from .scoring import load_scorers, score_pairs

scorers = load_scorers("path/to/this/folder")
score_pairs(scorers, [("I lost my job today.", "I am so sorry. What happened?")])
```

## Numbers

On the test split, {test_pairs} pairs whose seeker posts were in no other split. The checkpoint was chosen on the
validation split (epoch {epoch}).

| | accuracy | macro-F1 |
|---|---|---|
| this scorer | {accuracy} | {macro_f1} |
| always level {majority} | {majority_accuracy} | {majority_f1} |

| level | train | validation | test | recall (test) |
|---|---|---|---|---|
{levels}

Rationale, on {rationale_pairs} pairs of which {rationale_with} have one: token F1 {token_f1}, IOU-F1 {iou_f1} (as in
ERASER; pairs with neither a rationale nor a prediction are left out).

![Confusion matrix]({confusion})

## Training

Encoder: {encoder}, twice; the one for the seeker's post is frozen. Texts are cut to {max_length} tokens. AdamW at
{learning_rate}, batch {batch_size}, {epochs} epochs, loss weights {level_weight} (level) and {rationale_weight}
(rationale), seed {seed}. {duplicates} duplicates were removed before the split, {dropped} rows were left out.
Versions, fingerprints and line numbers are in `metrics.json`.

## Data, licence

`{file}`: {rows} rows of seeker posts and responses with levels and rationales. **The posts are not in this
repository.** In EPITOME's public files they are Reddit posts of people in distress, who did not write them for this
use; whoever trains or publishes a scorer is bound by the terms they got the data under. Licence of the weights:
`{licence}`{licence_note}.

## What it is for, and what not

For comparing the replies of systems over many pairs: the mean level with its histogram, for all three mechanisms. It
reads text only, not a voice, and knows only the language and the kind of posts it was trained on. A high level is no
proof of an empathic or helpful reply, and one pair's level says little. It is no measure of a person, it
does not diagnose, and it must not decide how somebody in need is treated.
"""


def make_scorer_card(metrics: Mapping, *, encoder: str | None, licence: str, confusion: str) -> ModelCard:
    """The card of a scorer.

    Args:
        metrics (`Mapping`): Content of `metrics.json`.
        encoder (`str`, *optional*): Its Hub id; `None` for a folder, whose path goes into no card.
        licence (`str`): An id of the Hub.
        confusion (`str`): The figure's name.
    """
    settings, test, data = metrics["settings"], metrics["test"], metrics["data"]
    levels = [
        f"| {level} | {' | '.join(str(metrics['splits'][name]['levels'][level]) for name in metrics['splits'])} "
        f"| {_show(test['level']['recall'][str(level)])} |"
        for level in range(len(test["level"]["confusion_matrix"]))
    ]
    text = TEXT.format(
        front_matter=_front_matter(metrics, encoder, licence),
        name=NAMES[metrics["mechanism"]],
        mechanism=metrics["mechanism"],
        test_pairs=f"{test['level']['num_pairs']:,}",
        epoch=_show(metrics["chosen_epoch"], "g"),
        accuracy=_show(test["level"]["accuracy"]),
        macro_f1=_show(test["level"]["macro_f1"]),
        majority=metrics["test_baseline"]["level"],
        majority_accuracy=_show(metrics["test_baseline"]["accuracy"]),
        majority_f1=_show(metrics["test_baseline"]["macro_f1"]),
        levels="\n".join(levels),
        rationale_pairs=f"{test['rationale']['num_pairs']:,}",
        rationale_with=f"{test['rationale']['num_with_rationale']:,}",
        token_f1=_show(test["rationale"]["token_f1"]),
        iou_f1=_show(test["rationale"]["iou_f1"]),
        confusion=confusion,
        encoder=f"[{encoder}](https://huggingface.co/{encoder})" if encoder else f"{settings['encoder']} (a folder)",
        **{name: settings[name] for name in ("max_length", "learning_rate", "batch_size", "epochs", "seed")},
        **{name: settings[name] for name in ("level_weight", "rationale_weight")},
        duplicates=f"{data['duplicates_removed']['count']:,}",
        dropped=f"{sum(of['count'] for of in data['dropped'].values()):,}",
        file=data["file"],
        rows=f"{data['num_rows']:,}",
        licence=licence,
        licence_note=" (the encoder's card states none)" if licence == "unknown" else "",
    )
    return ModelCard(text)


def _front_matter(metrics: Mapping, encoder: str | None, licence: str) -> str:
    names = {"accuracy": "accuracy", "macro_f1": "f1"}
    results = [
        EvalResult(
            task_type="text-classification",
            dataset_type="csv",
            dataset_name=f"{metrics['data']['file']}, test split by seeker post",
            metric_type=kind,
            metric_name=name,
            metric_value=round(metrics["test"]["level"][name], 4),
        )
        for name, kind in names.items()
    ]
    data = ModelCardData(
        license=licence,
        library_name="transformers",
        pipeline_tag="text-classification",
        base_model=encoder,
        tags=["relllm", "empathy", "epitome", "arxiv:2009.08441"],
        model_name=f"empathy-{metrics['mechanism']}",
        eval_results=results,
    )
    return data.to_yaml()


def _show(value: float | None, form: str = ".3f") -> str:
    return "—" if value is None else format(value, form)


__all__ = ["make_scorer_card"]
