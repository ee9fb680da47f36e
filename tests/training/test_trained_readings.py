"""What the heads were never taught is no reading: recorded by a training, NaN in the outputs, shown nowhere."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import clip, tiny_model, tiny_processor
from trainers import make_rows, make_trainer
from transformers import AutoModel
from typer.testing import CliRunner

from relllm import DIMENSIONS, ReLLMConfig
from relllm.cli import app
from relllm.evaluation.summary import summarize_clips
from relllm.inference.conversation import Conversation


def train(tmp_path: Path, model=None, **settings):
    """A step on rows that are rated for arousal alone."""
    rows = make_rows(tmp_path)
    rows = [{name: value for name, value in row.items() if name not in DIMENSIONS[1:]} for row in rows]
    processor = tiny_processor()
    trainer = make_trainer(rows, tmp_path / "run", processor, model, **settings)
    trainer.train()
    trainer.save_model()
    return trainer


def readings(model) -> tuple[torch.Tensor, torch.Tensor]:
    heard = model.get_audio_features(**features())
    return heard.emotion_logits.isnan().any(1), heard.dimensions.isnan()


def features() -> dict[str, torch.Tensor]:
    inputs = tiny_processor().feature_extractor([clip(0.5)])
    inputs.pop("num_audio_tokens")
    return dict(inputs)


def test_a_training_records_what_its_rows_taught_and_the_rest_is_nan(tmp_path: Path) -> None:
    train(tmp_path, emotion_loss_weight=0.0)
    loaded = AutoModel.from_pretrained(tmp_path / "run").eval()
    assert loaded.config.trained_readings == ["arousal"]
    emotion, dimensions = readings(loaded)
    assert emotion.tolist() == [True] and dimensions.tolist() == [[False, True, True]]
    expected = loaded.train().get_audio_features(**features())  # as a loss sees it
    assert expected.dimensions.isfinite().all() and expected.emotion_logits.isfinite().all()
    heard = Conversation(loaded.eval(), tiny_processor()).say(clip(0.5), max_new_tokens=2).heard
    assert heard is not None and heard.probabilities == {} and heard.emotion is None
    assert list(heard.dimensions) == ["arousal"] and str(heard).startswith("arousal")
    json.dumps(heard.dimensions, allow_nan=False)


def test_a_second_training_adds_to_the_first(tmp_path: Path) -> None:
    train(tmp_path, emotion_loss_weight=0.0, dimension_loss_weight=0.0)
    first = AutoModel.from_pretrained(tmp_path / "run")
    assert first.config.trained_readings == []
    assert str(Conversation(first.eval(), tiny_processor()).say(clip(0.5), max_new_tokens=1).heard).startswith(
        "no emotion"
    )
    trainer = train(tmp_path, first, dimension_loss_weight=0.0, eval_rows=make_rows(tmp_path))
    assert AutoModel.from_pretrained(tmp_path / "run").config.trained_readings == ["emotion"]
    metrics = trainer.evaluate()
    assert torch.tensor(list(metrics.values())).isfinite().all()


def test_a_checkpoint_that_does_not_say_is_shown_as_before_also_after_a_training(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "old")
    model = AutoModel.from_pretrained(tmp_path / "old").eval()
    assert not any(part.any() for part in readings(model))
    train(tmp_path, model, emotion_loss_weight=0.0)
    assert AutoModel.from_pretrained(tmp_path / "run").config.trained_readings is None
    with pytest.raises(ValueError, match=r"trained_readings may name 'emotion' and .*, got \['anger'\]"):
        ReLLMConfig(trained_readings=["anger"])


def test_evaluation_measures_what_was_taught_and_refuses_the_rest_by_name(tmp_path: Path) -> None:
    line = {"emotion": "sad", "arousal": 0.4, "dominance": 0.1, "valence": 0.2, "dimensions": {"arousal": 0.3}}
    found = summarize_clips([line, {**line, "arousal": 0.6}], ["sad"])
    assert set(found["dimensions"]) == {"arousal", "scale"}
    train(tmp_path, dimension_loss_weight=0.0)
    rows = [{"id": str(place), "split": "test", **row} for place, row in enumerate(make_rows(tmp_path))]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    command = ["evaluate", str(tmp_path / "run"), str(data), "--out", str(tmp_path / "out"), "--allow-seen"]
    refused = CliRunner().invoke(app, [*command, "--tasks", "dimensions", "--split", "test"])
    assert refused.exit_code and "no training has taught them to the model" in refused.output.replace("\n", " ")
