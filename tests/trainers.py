"""Rows, trainers of one step of plain SGD, and the gradient that such a step took: what tests of training share."""

from pathlib import Path

import soundfile
import torch
from datasets import Dataset
from tiny_models import clip, tiny_config, tiny_model, tiny_processor

from relllm import EMOTIONS, ReLLMSFTConfig, ReLLMSFTTrainer

TRANSCRIPTS = ("I got the job", "my cat died.", "they lost my luggage, again")
REPLIES = ("That is wonderful news, tell me more!", "I am so sorry to hear that.", "You sound upset.")
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
KL = {"response_kl_weight": 0.7}


def make_rows(folder: Path, count: int = 8) -> list[dict]:
    """Rows of every kind of missing label: none, emotion, one dimension, all."""
    rows = []
    for index in range(count):
        path = folder / f"{index}.wav"
        soundfile.write(path, clip(0.2 + 0.1 * (index % 3), seed=index), 16_000, subtype="PCM_16")
        rows.append(
            {
                "id": f"row-{index}",
                "audio": str(path),
                "text": None if index in (3, 5) else TRANSCRIPTS[index % 3],
                "response": REPLIES[index % 3],
                "emotion": None if index in (1, 5) else EMOTIONS[index % 5],
                "arousal": None if index in (2, 5) else 0.1 * index,
                "dominance": None if index == 5 else 0.5,
                "valence": None if index in (3, 5) else 0.9 - 0.1 * index,
            }
        )
    return rows


def make_trainer(rows, out: Path, processor, model=None, eval_rows=None, **settings) -> ReLLMSFTTrainer:
    options = {
        "output_dir": str(out),
        "max_steps": 1,
        "learning_rate": 1.0,
        "optim": "sgd",
        "weight_decay": 0.0,
        "warmup_steps": 0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "log_completions": 0,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
    }
    model = model if model is not None else tiny_model(lora={"r": 4, "lora_alpha": 8, "lora_dropout": 0.0})
    return ReLLMSFTTrainer(
        model=model,
        args=ReLLMSFTConfig(**(options | settings)),
        train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
        processing_class=processor,
    )


def step_of(trainer: ReLLMSFTTrainer) -> dict[str, torch.Tensor]:
    """The gradient of one update: with plain SGD at rate 1, what the update took away."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    return {name: before[name] - p.detach() for name, p in trainer.model.named_parameters() if name in before}


def build():
    """A model, its processor and the settings that switch on the alignment loss."""
    config = tiny_config(lora=LORA)
    return tiny_model(config), tiny_processor(config), KL
