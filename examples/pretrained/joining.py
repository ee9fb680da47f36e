"""Putting pretrained towers together for the two stages: the audio token, and a projector that grows.

Stage 1 knows no emotion tower (BLSP-Emo's own first stage). Stage 2 sets the tower's embedding beside every speech
frame, so the projector's first convolution gets further input channels; their weights start at zero, and the model
with the tower starts as the one without.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration
from relllm.processing.processing_relllm import ReLLMProcessor
from relllm.processing.prompts_relllm import AUDIO_TOKEN

RESERVED = "<jupyter_text>"  # a token of SmolLM2 for notebooks, which no chat uses


def join_towers(audio: str, text: str, path: Path) -> None:
    """Writes a light checkpoint of Whisper and an LLM with a fresh projector, fresh heads and a fresh LoRA.

    Args:
        audio (`str`), text (`str`): Directories or Hub ids.
        path (`Path`): Where it goes.
    """
    tokenizer = tokenizer_with_audio(text)
    model = ReLLMForConditionalGeneration.from_towers(
        audio=audio,
        text=text,
        tokenizer=tokenizer,
        dtype=torch.float32,
        emotion_fusion="none",
        lora={"r": 16, "lora_alpha": 16, "lora_dropout": 0.05},  # the paper's
    )
    model.base_model.freeze()  # what is frozen is left out of a light checkpoint
    model.save_pretrained(path, light=True)
    ReLLMProcessor.from_config(model.config, tokenizer, full_window=False).save_pretrained(path)


def tokenizer_with_audio(text: str) -> PreTrainedTokenizerBase:
    """The LLM's tokenizer, with `<|audio|>` in the place of a reserved token where it has the one we know.

    A token more would resize the embeddings, and a light checkpoint would hold all of them: 113 MB for SmolLM2.

    Args:
        text (`str`): Directory or Hub id.
    """
    tokenizer = AutoTokenizer.from_pretrained(text)
    if AUDIO_TOKEN in tokenizer.get_vocab() or RESERVED not in tokenizer.get_vocab():
        return tokenizer
    renamed = tokenizer.backend_tokenizer.to_str().replace(RESERVED, AUDIO_TOKEN)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(renamed),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token or tokenizer.eos_token,
        unk_token=tokenizer.unk_token,
        additional_special_tokens=[AUDIO_TOKEN],
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
    )


def add_emotion_tower(stage1: Path, tower: Path, path: Path) -> None:
    """Writes stage 1's model with an emotion tower beside the speech: it hears as before until it is trained.

    Args:
        stage1 (`Path`): A checkpoint with `emotion_fusion="none"`.
        tower (`Path`): The emotion tower.
        path (`Path`): Where the new checkpoint goes.
    """
    heard = ReLLMForConditionalGeneration.from_pretrained(stage1, dtype=torch.float32)
    processor = ReLLMProcessor.from_pretrained(stage1)
    towers: dict[str, dict] = heard.config.towers or {}
    model = ReLLMForConditionalGeneration.from_towers(
        audio=towers["audio_tower"]["name"],
        text=towers["text_model"]["name"],
        emotion=tower,
        tokenizer=processor.tokenizer,
        dtype=torch.float32,
        emotion_fusion="concat",
        lora=heard.config.lora_config,
        projector_inner_dim=heard.config.projector_inner_dim,
    )
    convolutions = "model.multi_modal_projector.conv_layers."
    learned = {name: weight for name, weight in heard.state_dict().items() if not name.startswith(convolutions)}
    if unexpected := model.load_state_dict(learned, strict=False).unexpected_keys:
        raise ValueError(f"{stage1} has weights that the model with an emotion tower lacks: {unexpected}.")
    layers = (heard.base_model.multi_modal_projector.conv_layers, model.base_model.multi_modal_projector.conv_layers)
    for narrow, wide in zip(*layers, strict=True):
        _widen(narrow, wide)
    model.base_model.freeze()
    model.save_pretrained(path, light=True)
    ReLLMProcessor.from_config(model.config, processor.tokenizer, full_window=False).save_pretrained(path)


@torch.no_grad()
def _widen(narrow: nn.Conv1d, wide: nn.Conv1d) -> None:
    """What the narrow convolution computes, in the first channels of the wide one, whatever the further inputs are.

    Behind it is a gated linear unit: the first half of the outputs is gated by the second. Further outputs keep their
    fresh weights, and no narrow channel of the next convolution reads them until it has learned to.
    """
    channels, half = narrow.in_channels, narrow.out_channels // 2
    for start, end in ((0, wide.out_channels // 2), (half, wide.out_channels)):
        to = slice(end - wide.out_channels // 2, end - wide.out_channels // 2 + half)
        wide.weight[to, :channels] = narrow.weight[start : start + half]
        wide.weight[to, channels:] = 0
        assert wide.bias is not None and narrow.bias is not None
        wide.bias[to] = narrow.bias[start : start + half]
