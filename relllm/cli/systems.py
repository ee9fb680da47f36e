"""What the commands that talk with models load: a ReLLM, and the systems that answer beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from relllm.inference.conversation import Conversation
    from relllm.inference.text_conversation import TextConversation
    from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration
    from relllm.processing.processing_relllm import ReLLMProcessor

    Start: TypeAlias = Callable[..., Conversation | TextConversation]

OWN = "own"


def pick_device(device: str) -> str:
    """`auto` is the first GPU if there is one."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def load_relllm(
    model: str, *, device: str, revision: str = "main"
) -> tuple[ReLLMForConditionalGeneration, ReLLMProcessor]:
    """A ReLLM and its processor, ready to reply.

    Raises:
        typer.BadParameter: If the checkpoint holds something else.
    """
    from transformers import AutoModel, AutoProcessor

    from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration

    processor = AutoProcessor.from_pretrained(model, revision=revision)
    loaded = AutoModel.from_pretrained(model, revision=revision).to(device).eval()
    if not isinstance(loaded, ReLLMForConditionalGeneration):
        raise typer.BadParameter(f"{model} holds a {type(loaded).__name__}, not a ReLLM.", param_hint="MODEL")
    return loaded, processor


def load_systems(
    model: str,
    *,
    text_only: str | None,
    speech_only: str | None,
    transcriber: str | None,
    device: str,
    revision: str,
) -> tuple[dict[str, Start], dict[str, PreTrainedTokenizerBase]]:
    """What begins a conversation with each system, by name, RE-LLM first; and their tokenizers.

    Raises:
        typer.BadParameter: If a checkpoint is of the wrong kind, or there is a transcriber and nobody to read.
    """
    from functools import partial

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from relllm.inference.conversation import Conversation
    from relllm.inference.text_conversation import TextConversation, Transcriber

    if transcriber is not None and text_only is None:
        raise typer.BadParameter(
            "It writes spoken turns down for --text-only, which is missing.", param_hint="--transcriber"
        )
    device = pick_device(device)
    loaded, processor = load_relllm(model, device=device, revision=revision)
    systems: dict[str, Start] = {"RE-LLM": partial(Conversation, loaded, processor)}
    tokenizers: dict[str, PreTrainedTokenizerBase] = {"RE-LLM": processor.tokenizer}
    if speech_only is not None:
        second, its_processor = load_relllm(speech_only, device=device)
        name = "speech only" if second.config.emotion_fusion == "none" else "second RE-LLM"
        systems[name] = partial(Conversation, second, its_processor)
        tokenizers[name] = its_processor.tokenizer
    if text_only is not None:
        writer = Transcriber(transcriber, device=device) if transcriber is not None else None
        if text_only == OWN:
            start, tokenizer = partial(TextConversation.inside, loaded, processor), processor.tokenizer
        else:
            llm = AutoModelForCausalLM.from_pretrained(text_only, use_safetensors=True).to(device).eval()
            tokenizer = AutoTokenizer.from_pretrained(text_only)
            start = partial(TextConversation, llm, tokenizer)
        systems["text only"] = partial(start, transcriber=writer)
        tokenizers["text only"] = tokenizer
    return systems, tokenizers
