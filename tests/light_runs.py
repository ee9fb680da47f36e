"""Short training runs of a model whose towers are folders: their checkpoints are light."""

from pathlib import Path

import soundfile
import torch
from datasets import Dataset
from light_checkpoints import build
from tiny_models import clip, tiny_processor

from relllm import EMOTIONS, ReLLMForConditionalGeneration, ReLLMSFTConfig, ReLLMSFTTrainer

STEPS, SAVE_STEPS = 6, 2  # three steps an epoch: checkpoints lie within epochs
REPLIES = ("That is wonderful news, tell me more!", "I am so sorry to hear that.", "You sound upset.")


def make_rows(folder: Path, count: int = 12) -> list[dict]:
    folder.mkdir(exist_ok=True)
    rows = []
    for index in range(count):
        path = folder / f"{index}.wav"
        soundfile.write(path, clip(0.2, seed=index), 16_000, subtype="PCM_16")
        labels = {"arousal": 0.05 * index, "dominance": 0.5, "valence": 0.9 - 0.05 * index}
        row = {
            "id": f"row-{index}",
            "audio": str(path),
            "text": REPLIES[index % 2],
            "response": REPLIES[index % 3],
            "emotion": EMOTIONS[index % 5],
        }
        rows.append(row | labels)
    return rows


def make_trainer(folder: Path, model: ReLLMForConditionalGeneration, **settings) -> ReLLMSFTTrainer:
    rows = Dataset.from_list(make_rows(folder / "clips"))
    options = {
        "output_dir": str(folder / "run"),
        "max_steps": STEPS,
        "save_steps": SAVE_STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "log_completions": 0,
        "gradient_checkpointing": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
    }
    return ReLLMSFTTrainer(
        model=model,
        args=ReLLMSFTConfig(**(options | settings)),
        train_dataset=rows,
        eval_dataset=rows.select(range(2)),
        processing_class=tiny_processor(model.config),
    )


def new_model(towers: Path, seed: int = 0) -> ReLLMForConditionalGeneration:
    torch.manual_seed(seed)
    lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.2}
    return build(towers, lora=lora)


def checkpoint(folder: Path, step: int = SAVE_STEPS) -> Path:
    return folder / "run" / f"checkpoint-{step}"
