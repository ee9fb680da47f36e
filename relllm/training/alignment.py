"""Alignment of hearing with reading: the LLM as its own teacher (BLSP-Emo's KL loss).

The teacher is the same LLM with its LoRA off, so there is no second copy in memory. It reads the conversation with the
transcript in the place of the audio, without a gradient and in eval mode. What does not live here: the divergence
itself (`losses.py`), the teacher's input (`collator.py`), where the pass happens (`fused_head.py`).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from relllm.modeling.modeling_relllm import ReLLMModel

from .losses import IGNORE_INDEX, kl_sum, reply_positions

TEACHER_INPUTS = ("teacher_input_ids", "teacher_attention_mask", "teacher_labels")


@dataclass
class Alignment:
    """How the KL over the reply is computed.

    Args:
        temperature (`float`): Divides both logits.
        shifted (`bool`): See [`~relllm.training.losses.reply_positions`].
    """

    temperature: float
    shifted: bool


def teach(model: ReLLMModel, inputs: dict[str, Tensor], alignment: Alignment) -> Tensor:
    """The teacher's logits where they are compared.

    Args:
        model ([`ReLLMModel`]): Its LLM reads.
        inputs (`dict`): The teacher inputs of [`~relllm.training.collator.ReLLMCollator`].

    Returns:
        `torch.Tensor` of shape `(positions, vocabulary)`: Row after row.
    """
    llm = model.text_model
    # no LoRA anywhere, whatever its scope; outside a forward pass of ours that holds already
    with torch.no_grad(), model.lora_scope.use(None), _in_eval(llm):
        hidden = llm.base_model(
            input_ids=inputs["teacher_input_ids"],
            attention_mask=inputs["teacher_attention_mask"],
            use_cache=False,
            return_dict=True,
        ).last_hidden_state
        return head_logits(llm, hidden[reply_positions(inputs["teacher_labels"], alignment.shifted)])


def compare(
    model: ReLLMModel,
    states: Tensor,
    labels: Tensor,
    inputs: dict[str, Tensor],
    taught: Tensor,
    alignment: Alignment,
    *,
    are_logits: bool = False,
) -> Tensor:
    """KL(text ‖ speech) over the reply, summed over the positions of the batch.

    Args:
        model ([`ReLLMModel`]): Its LLM heard.
        states (`torch.Tensor` of shape `(batch, sequence, d or vocabulary)`): Last hidden states of the branch that
            hears, or with `are_logits` its logits.
        labels (`torch.LongTensor` of shape `(batch, sequence)`): -100 outside the reply.
        inputs (`dict`): The teacher inputs; a row without a transcript marks no position in them.
        taught (`torch.Tensor` of shape `(positions, vocabulary)`): Of [`teach`].

    Returns:
        `torch.Tensor` of shape `()`: In nats; a zero with a gradient where nothing is marked.
    """
    has_transcript = (inputs["teacher_labels"] != IGNORE_INDEX).any(1, keepdim=True)
    labels = labels.masked_fill(~has_transcript, IGNORE_INDEX)
    states = states[reply_positions(labels, alignment.shifted)]
    heard = states if are_logits else head_logits(model.text_model, states)
    return kl_sum(heard, taught, alignment.temperature)


def head_logits(llm: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits `(positions, vocabulary)` of hidden states `(positions, d)`: the head, its scaling and its soft cap."""
    config = llm.config
    logits = llm.get_output_embeddings()(hidden) * _logit_scale(config)
    cap: float | None = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


@torch.no_grad()
def check_head(llm: PreTrainedModel) -> None:
    """Holds [`head_logits`] against the LLM's own forward pass, on four tokens.

    Raises:
        ValueError: If they differ: the LLM does to its logits what is not known here, and a KL would be wrong.
    """
    if is_deepspeed_zero3_enabled():  # the weights are spread over the processes, and there is no pass before the run
        return
    tokens = torch.arange(4, device=llm.device)[None]
    with _in_eval(llm):
        own = llm(input_ids=tokens, use_cache=False, return_dict=True).logits.float()
        hidden = llm.base_model(input_ids=tokens, use_cache=False, return_dict=True).last_hidden_state
        ours = head_logits(llm, hidden).float()
    difference = (own - ours).abs().max().item()
    if not difference <= 1e-2 * max(own.abs().max().item(), 1.0):
        raise ValueError(
            f"{type(llm).__name__} changes its logits after the head in a way that is not known here (they differ by "
            f"{difference:.3g}), so the KL loss would be wrong. Set response_kl_weight=0, or use another LLM."
        )


def _logit_scale(config: PreTrainedConfig) -> float:
    """Cohere multiplies its logits, Granite divides them."""
    scale: float | None = getattr(config, "logit_scale", None)
    divisor: float | None = getattr(config, "logits_scaling", None)
    return (1.0 if scale is None else scale) / (1.0 if divisor is None else divisor)


@contextlib.contextmanager
def _in_eval(module: nn.Module) -> Iterator[None]:
    """No dropout, and no gradient checkpointing either, which needs a gradient; as before afterwards."""
    training = [child for child in module.modules() if child.training]
    for child in training:
        child.training = False
    try:
        yield
    finally:
        for child in training:
            child.training = True


__all__ = ["TEACHER_INPUTS", "Alignment", "check_head", "compare", "head_logits", "teach"]
