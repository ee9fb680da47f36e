"""Short runs of reward training from a checkpoint on disk, whose towers are folders: what its tests share."""

from pathlib import Path

import pytest
import soundfile
import torch
from datasets import Dataset
from light_checkpoints import save_towers
from tiny_models import audio_part, clip, fill_lora, text_part, tiny_llm, tiny_processor

from relllm import EMOTIONS, ReLLMForConditionalGeneration, ReLLMProcessor
from relllm.preferences.grpo import ReLLMGRPOTrainer
from relllm.preferences.grpo_config import ReLLMGRPOConfig
from relllm.preferences.rewards import Reward
from relllm.training.alignment import FusedCausalLMOutput

NEEDS_TRL = pytest.mark.skipif(FusedCausalLMOutput is None, reason="Reward training needs TRL 1.16 (Python 3.11).")


class Vowels(Reward):
    """What these tests reward: the share of vowels, which differs from reply to reply."""

    name = "vowels"

    def __call__(self, rows, replies) -> list[float]:
        return [sum(letter in "aeiou" for letter in reply) / (len(reply) + 1) for reply in replies]


def save_start(folder: Path, llm: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    """A ReLLM with its processor, light, as `relllm train` leaves one."""
    towers = save_towers(folder / "towers", dtype=dtype)
    tiny_llm(llm).to(dtype).save_pretrained(towers / "llm")
    torch.manual_seed(0)
    model = ReLLMForConditionalGeneration.from_towers(
        **{name: towers / place for name, place in {"audio": "speech", "text": "llm", "emotion": "emotion"}.items()},
        lora={"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
        projector_inner_dim=16,
    )
    fill_lora(model)
    model.generation_config.update(do_sample=True, top_k=3, top_p=0.5, repetition_penalty=1.5)  # as a chat LLM's
    model.save_pretrained(folder / "start", light=True)
    tiny_processor(model.config).save_pretrained(folder / "start")
    return folder / "start"


def spoken_rows(folder: Path) -> list[dict]:
    """Clips of several lengths, one of two windows, and a conversation of two turns with three clips."""
    folder.mkdir(exist_ok=True)
    paths = [str(folder / f"{index}.wav") for index in range(6)]
    for index, duration_s in enumerate((0.5, 0.2, 2.5, 0.4, 0.3, 0.6)):
        soundfile.write(paths[index], clip(duration_s, seed=index), 16_000, subtype="PCM_16")
    labels = [{"emotion": [name], "arousal": [0.1 * index]} for index, name in enumerate(EMOTIONS)]
    rows: list[dict] = [
        {"id": f"{index}", "audio": paths[index], "messages": None, **labels[index]} for index in range(3)
    ]
    turns = [
        {"role": "user", "content": [audio_part(paths[3]), text_part("and then"), audio_part(paths[4])]},
        {"role": "assistant", "content": [text_part("You sound upset.")]},
        {"role": "user", "content": [audio_part(paths[5])]},
    ]
    rows.append({"id": "turns", "messages": turns, "emotion": ["sad", None, "happy"], "arousal": [0.1, None, 0.7]})
    return rows


def grpo_trainer(
    start: Path, out: Path, rows: list[dict], eval_rows=None, kind=ReLLMGRPOTrainer, rewards=None, **settings
) -> ReLLMGRPOTrainer:
    """A trainer of one step of plain SGD at rate 1, of two groups of four replies."""
    options = {
        **{"output_dir": str(out), "max_steps": 1, "learning_rate": 1.0, "optim": "sgd", "weight_decay": 0.0},
        **{"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "report_to": "none", "save_strategy": "no"},
        **{"logging_steps": 1, "use_cpu": True, "disable_tqdm": True, "gradient_checkpointing": False},
        **{"dataloader_pin_memory": False, "log_completions": 0, "max_completion_length": 6, "num_generations": 4},
        **{"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
    }
    model = ReLLMForConditionalGeneration.from_pretrained(start)
    model.config.trained_readings = settings.pop("readings", model.config.trained_readings)
    return kind(
        model=model,
        args=ReLLMGRPOConfig(**(options | settings)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
        processing_class=ReLLMProcessor.from_pretrained(start),
        rewards=rewards or [(Vowels(), 1.0)],
    )
