"""Tiny towers in folders, the models built of them, and what two checkpoints of such models are compared by."""

import functools
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from tiny_models import LORA, fill_lora, tiny_emotion_tower, tiny_llm, tiny_speech_tower, tiny_tokenizer
from torch import nn

from relllm import ReLLMForConditionalGeneration


def save_towers(folder: Path, **options) -> Path:
    shutil.copytree(_saved_towers(**options).name, folder, copy_function=shutil.copyfile, dirs_exist_ok=True)
    return folder


@functools.cache
def _saved_towers(
    *,
    speech: str = "whisper",
    dtype: torch.dtype = torch.float32,
    text_dtype: torch.dtype = torch.float32,
    audio_token: bool = True,
    **of_llm: int,
) -> tempfile.TemporaryDirectory:
    """What tests copy, which takes a tenth of the time."""
    made = tempfile.TemporaryDirectory(prefix="relllm-towers-")
    folder = Path(made.name)
    tiny_speech_tower(speech).to(dtype).save_pretrained(folder / "speech")
    tiny_emotion_tower().to(dtype).save_pretrained(folder / "emotion")
    tiny_llm(**of_llm).to(text_dtype).save_pretrained(folder / "llm")
    tiny_tokenizer(audio_token=audio_token).save_pretrained(folder / "llm")
    return made


def tower_settings(folder: Path) -> dict[str, str]:
    """Towers in a folder, the tokenizer as an LLM has it, by the names of the settings of a run."""
    save_towers(folder, audio_token=False)
    names = {"audio_tower": "speech", "emotion_tower": "emotion", "text_model": "llm"}
    return {setting: str(folder / name) for setting, name in names.items()}


def build(folder: Path, *, lora: dict | None = LORA, **options) -> ReLLMForConditionalGeneration:
    model = ReLLMForConditionalGeneration.from_towers(
        folder / "speech", folder / "llm", folder / "emotion", lora=lora, projector_inner_dim=16, **options
    )
    fill_lora(model)
    return model


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_same_model(found: nn.Module, expected: nn.Module) -> None:
    found_state, expected_state = found.state_dict(), expected.state_dict()
    assert found_state.keys() == expected_state.keys()
    assert [name for name in found_state if not torch.equal(found_state[name], expected_state[name])] == []
    assert {name: w.dtype for name, w in found_state.items()} == {name: w.dtype for name, w in expected_state.items()}
    assert trained_names(found) == trained_names(expected)
    settings = [{k: v for k, v in m.config.to_dict().items() if k != "_name_or_path"} for m in (found, expected)]
    assert settings[0] == settings[1]


def saved_names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def assert_same_weights(found: nn.Module, expected: nn.Module) -> None:
    expected_state = expected.state_dict()
    assert all(torch.equal(weight, expected_state[name]) for name, weight in found.state_dict().items())
