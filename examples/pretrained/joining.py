"""Putting pretrained towers together for the two stages: the audio token, and an emotion tower for the second."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration
from relllm.processing.processing_relllm import ReLLMProcessor
from relllm.processing.prompts_relllm import AUDIO_TOKEN
from relllm.training.building import add_emotion_tower

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


def grow_stage1(stage1: Path, tower: Path, path: Path) -> None:
    """Writes stage 1's model with an emotion tower beside the speech: it hears as before until it is trained.

    Args:
        stage1 (`Path`): A checkpoint with `emotion_fusion="none"`.
        tower (`Path`): The emotion tower.
        path (`Path`): Where the new checkpoint goes.
    """
    model = add_emotion_tower(ReLLMForConditionalGeneration.from_pretrained(stage1, dtype=torch.float32), tower)
    model.save_pretrained(path, light=True)
    tokenizer = ReLLMProcessor.from_pretrained(stage1).tokenizer
    ReLLMProcessor.from_config(model.config, tokenizer, full_window=False).save_pretrained(path)
