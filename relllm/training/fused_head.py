"""What the losses need, through TRL's fused training forward: the heads' outputs and the alignment loss.

Since 1.16 TRL trains by a forward pass of its own, which runs the base model and returns fields of its own. Before (on
Python 3.10) it trains by the model's forward, whose output has the heads' in it already. Either way the teacher runs
inside `forward`, where DDP, FSDP and DeepSpeed expect every use of a weight. Where the reply's cross-entropy has no
weight, a training pass ends before the LLM's head. On a GPU TRL runs that head at the reply's positions only; on a CPU
it would run it at all, so there the base model hands on the reply's alone.
"""

import dataclasses
import functools
import types
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from relllm.modeling.modeling_relllm import ReLLMCausalLMOutput

from .alignment import TEACHER_INPUTS, Alignment, compare, teach
from .losses import IGNORE_INDEX

try:
    from trl.trainer.utils import FusedCausalLMOutput
except ImportError:
    FusedCausalLMOutput = None

if FusedCausalLMOutput is not None:

    @dataclass
    class ReLLMFusedOutput(FusedCausalLMOutput):
        """TRL's fused output and what the other losses need.

        They are fields of the model's output, not a side channel: DDP looks for the graph in what `forward` returns.

        Args:
            emotion_logits (`torch.Tensor` of shape `(clips, classes)`, *optional*): See `ReLLMAudioOutput`.
            dimensions (`torch.Tensor` of shape `(clips, 3)`, *optional*): Arousal, dominance, valence.
            response_kl (`torch.Tensor` of shape `()`, *optional*): Sum over positions.
        """

        emotion_logits: Tensor | None = None
        dimensions: Tensor | None = None
        response_kl: Tensor | None = None


@dataclass
class ReLLMAlignedOutput(ReLLMCausalLMOutput):
    """The model's output and the alignment loss; for passes that are not fused.

    Of a pass without the head, `loss` is a zero with a gradient, and there are no logits.

    Args:
        response_kl (`torch.Tensor` of shape `()`, *optional*): Sum over positions.
    """

    response_kl: Tensor | None = None


def return_heads(model: PreTrainedModel, alignment: Alignment | None = None) -> None:
    """Have the training forward return the heads' outputs and, where asked for, the alignment loss.

    Args:
        model (`PreTrainedModel`): After `SFTTrainer.__init__`, which patched its forward; changed in place.
        alignment ([`Alignment`], *optional*): Without one, no teacher reads.
    """
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
            output = (self.base_model if headless else inner_forward)(*args, **kwargs)
        finally:
            handle.remove()
        sums: dict[str, Tensor] = {}
        states = heard["last_hidden_state"]
        if reading is not None and taught is not None and labels is not None:
            are_logits = not fused and not headless
            sums["response_kl"] = compare(
                self.base_model, states, labels, teacher_inputs, taught, reading, are_logits=are_logits
            )
        heads = {name: heard.get(name) for name in ("emotion_logits", "dimensions")}
        if headless:  # a sum over nothing: what trains has a gradient, of zero, which DDP waits for
            return ReLLMAlignedOutput(loss=states[:0].sum(), **heads, **sums)
        return ReLLMFusedOutput(**output, **heads, **sums) if fused else ReLLMAlignedOutput(**output, **sums)

    model.forward = types.MethodType(forward, model)


__all__ = ["return_heads"]
