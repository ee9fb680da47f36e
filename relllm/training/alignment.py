"""Alignment of hearing with reading: the LLM as its own teacher (BLSP-Emo's KL loss), and what the training forward
returns for this and the other losses.

The teacher, the LLM with its LoRA off, reads the conversation with the transcript in the place of the audio, without a
gradient and in eval mode, inside `forward`, where DDP, FSDP and DeepSpeed expect every use of a weight. Logits of both
exist for a tile of positions at a time, in the backward pass as well, which makes them again.

Since 1.16 TRL trains by a forward pass of its own, which runs the base model and returns fields of its own; before (on
Python 3.10) by the model's forward. On a GPU it runs the LLM's head at the reply's positions only; on a CPU it would
run it at all, so there the base model hands on the reply's alone.
"""

import contextlib
import dataclasses
import functools
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import ModelOutput

from relllm.modeling.modeling_relllm import ReLLMModel
from relllm.modeling.outputs_relllm import ReLLMCausalLMOutput
from relllm.modeling.releases_relllm import CACHE

from .losses import IGNORE_INDEX, response_kl

try:
    from trl.trainer.utils import FusedCausalLMOutput
except ImportError:
    FusedCausalLMOutput = None

TILE_WORDS = 2**23  # logits of a branch at once: positions times vocabulary
TEACHER_INPUTS = ("teacher_input_ids", "teacher_attention_mask", "teacher_labels")

if FusedCausalLMOutput is not None:

    @dataclass
    class ReLLMFusedOutput(FusedCausalLMOutput):
        """TRL's, and what the other losses need, as fields: DDP looks for the graph in what `forward` returns."""

        emotion_logits: Tensor | None = None  # (clips, classes)
        dimensions: Tensor | None = None  # (clips, 3): arousal, dominance, valence
        response_kl: Tensor | None = None  # (): sum over positions


@dataclass
class ReLLMAlignedOutput(ReLLMCausalLMOutput):
    """The output of a pass that is not fused; of one without the head, `loss` is a zero with a gradient."""

    response_kl: Tensor | None = None  # (): sum over positions


@dataclass
class Alignment:
    """How the KL over the reply is computed: what divides both logits, and where it compares."""

    temperature: float
    shifted: bool

    def positions(self, labels: Tensor) -> Tensor:
        """Return `(batch, sequence)`, True where a reply's token is predicted; without `shifted` where one stands."""
        is_reply = labels != IGNORE_INDEX
        return functional.pad(is_reply[:, 1:], (0, 1)) if self.shifted else is_reply


def return_heads(model: PreTrainedModel, alignment: Alignment | None = None) -> None:
    """Have the training forward, which TRL has patched, return the heads' outputs and, with `alignment`, that loss."""
    inner_forward = model.forward

    @functools.wraps(type(model).forward)  # `generate` checks its arguments against the signature
    def forward(self: PreTrainedModel, *args: Tensor, **kwargs: Tensor) -> ModelOutput:
        fused = bool(kwargs.get("fused_lm_head", False))
        headless = bool(kwargs.pop("without_lm_head", False))
        teacher_inputs = {name: kwargs.pop(name) for name in TEACHER_INPUTS if name in kwargs}
        reading = alignment if teacher_inputs and "labels" in kwargs else None
        if not fused and not headless and reading is None:  # not a training pass
            return inner_forward(*args, **kwargs)
        taught = teach(self.base_model, teacher_inputs, reading) if reading is not None else None
        heard: dict[str, Tensor] = {}
        labels = kwargs.pop("labels") if headless else kwargs.get("labels")
        scored = None
        if fused and labels is not None and labels.device.type == "cpu":
            scored = labels[:, 1:] != IGNORE_INDEX
            kwargs["shift_labels"] = kwargs.pop("labels")[:, 1:][scored][None]

        def hear(module: nn.Module, inputs: tuple, output: ModelOutput) -> ModelOutput:
            heard.update(output)
            if scored is None:
                return output
            reply = output.last_hidden_state[:, :-1][scored][None]
            return dataclasses.replace(output, last_hidden_state=reply)

        handle = self.base_model.register_forward_hook(hear)
        try:
            if headless:
                output = self.base_model(*args, **kwargs, hears_only=reading is None)  # the heads alone need no LLM
            else:
                output = inner_forward(*args, **kwargs)
        finally:
            handle.remove()
        if scored is not None:  # fields by position, `(batch, sequence - 1)`, as TRL's are on a GPU
            packed = {name: one for name, one in output.items() if isinstance(one, Tensor) and one.ndim == 2}
            fields = {name: one.new_zeros(scored.shape).masked_scatter(scored, one[0]) for name, one in packed.items()}
            output = dataclasses.replace(output, **fields)
        sums: dict[str, Any] = {}
        if reading is not None and taught is not None and labels is not None:
            llm = self.base_model.text_model
            if not fused and not headless:  # the states are logits already
                llm, taught = None, head_logits(llm, taught)
            sums["response_kl"] = divergence(
                llm, heard["last_hidden_state"], labels, teacher_inputs["teacher_labels"], taught, reading
            )
        heads: dict[str, Any] = {name: heard.get(name) for name in ("emotion_logits", "dimensions")}
        if headless:  # a sum over nothing: what trains has a gradient, of zero, which DDP waits for
            output = ReLLMAlignedOutput(loss=_nothing(self.base_model), **heads, **sums)
        else:
            output = ReLLMFusedOutput(**output, **heads, **sums) if fused else ReLLMAlignedOutput(**output, **sums)
        # A spread model makes each on a device of its own, and the losses add them up.
        return output if labels is None else send_to_device(output, labels.device, skip_keys=[CACHE])

    model.forward = types.MethodType(forward, model)


def _nothing(model: ReLLMModel) -> Tensor:
    """Return zero, `()`, from which each weight that trains has a gradient, but those that FSDP or ZeRO 3 spread."""
    device = model.emotion_head.weight.device
    own = (one for one in model.parameters() if one.requires_grad and not isinstance(one, DTensor))
    parts = [one.flatten()[:0].sum().to(device, torch.float32) for one in own if not hasattr(one, "ds_id")]
    return torch.stack([torch.zeros((), device=device), *parts]).sum()


def teach(model: ReLLMModel, inputs: dict[str, Tensor], alignment: Alignment) -> Tensor:
    """Return the teacher's hidden states where the branches are compared, `(positions, d)`, row after row."""
    llm = model.text_model
    # no LoRA anywhere, whatever its scope; outside a forward pass of ours that holds already
    with torch.no_grad(), model.lora_scope.use(None), in_eval(llm):
        read = {"input_ids": inputs["teacher_input_ids"], "attention_mask": inputs["teacher_attention_mask"]}
        hidden = llm.base_model(**read, use_cache=False, return_dict=True).last_hidden_state
        return hidden[alignment.positions(inputs["teacher_labels"]).to(hidden.device)]


def divergence(
    llm: PreTrainedModel | None, states: Tensor, labels: Tensor, teacher_labels: Tensor, taught: Tensor, how: Alignment
) -> Tensor:
    """Return KL(text ‖ speech) over the reply, `()`, in nats, summed over the positions of the batch.

    `states` are `(batch, sequence, d)`, of the branch that hears, and `taught` `(positions, d)`, of [`teach`]; without
    an `llm`, whose head makes logits of them, both are logits. The labels are `(batch, sequence)` and `(batch, T)`,
    -100 outside the reply; the teacher's all over a row without a transcript.
    """
    has_transcript = (teacher_labels != IGNORE_INDEX).any(1, keepdim=True)
    states = states[how.positions(labels.masked_fill(~has_transcript, IGNORE_INDEX)).to(states.device)]
    if len(states) != len(taught):
        counts = f"speech {len(states)}, text {len(taught)}"
        raise ValueError(f"The branches mark different numbers of positions: {counts}. Both must hold the same reply.")

    def of_tile(heard: Tensor, read: Tensor) -> Tensor:
        if llm is None:
            return response_kl(heard, read, how.temperature)
        with torch.no_grad():
            text = head_logits(llm, read)
        return response_kl(head_logits(llm, heard), text, how.temperature)

    vocabulary = states.shape[-1] if llm is None else llm.config.get_text_config().vocab_size
    tiles = zip(states.split(rows := max(TILE_WORDS // vocabulary, 1)), taught.split(rows), strict=True)
    parts = [checkpoint(of_tile, *tile, use_reentrant=False, preserve_rng_state=False) for tile in tiles]
    return torch.stack(parts).sum()


def head_logits(llm: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Return logits `(positions, vocabulary)` of hidden states: head, scaling and soft cap as in TRL."""
    config, logits = llm.config, llm.get_output_embeddings()(hidden)
    scales = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # Cohere, Muse Glimmer, Falcon-H1
    scale: float | None = next((one for name in scales if (one := getattr(config, name, None)) is not None), None)
    scaling: float | None = getattr(config, "logits_scaling", None)
    if scale is None and scaling is not None:  # HyperCLOVA X multiplies by it, Granite and MiniCPM3 divide
        scale = scaling if config.model_type == "hyperclovax" else 1 / scaling
    logits = logits if scale is None else logits * scale
    cap: float | None = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


@torch.no_grad()
def check_head(llm: PreTrainedModel) -> None:
    """Refuse an LLM whose own logits differ from [`head_logits`] on four tokens: its losses would be wrong."""
    if is_deepspeed_zero3_enabled():  # the weights are spread over the processes, and there is no pass before the run
        return
    tokens = torch.arange(4, device=llm.device)[None]
    with in_eval(llm):
        own = llm(input_ids=tokens, use_cache=False, return_dict=True).logits.float()
        hidden = llm.base_model(input_ids=tokens, use_cache=False, return_dict=True).last_hidden_state
        ours = head_logits(llm, hidden).float()
    difference = (own - ours).abs().max().item()
    if not difference <= 1e-2 * max(own.abs().max().item(), 1.0):
        raise ValueError(
            f"{type(llm).__name__} changes its logits after the head in a way that is not known here (they differ by "
            f"{difference:.3g}), so the losses on its replies would be wrong. Use another LLM."
        )


@contextlib.contextmanager
def in_eval(module: nn.Module) -> Iterator[None]:
    """Switch off dropout, and gradient checkpointing, which needs a gradient; as before afterwards."""
    training = [child for child in module.modules() if child.training]
    for child in training:
        child.training = False
    try:
        yield
    finally:
        for child in training:
            child.training = True
