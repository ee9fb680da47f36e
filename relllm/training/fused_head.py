"""The heads' outputs through TRL's fused training forward.

Since 1.16 TRL trains by a forward pass of its own, which runs the base model and returns fields of its own. Before (on
Python 3.10) it trains by the model's forward, whose output has the heads' in it already.
"""

import functools
import types
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

try:
    from trl.trainer.utils import FusedCausalLMOutput
except ImportError:
    FusedCausalLMOutput = None

if FusedCausalLMOutput is not None:

    @dataclass
    class ReLLMFusedOutput(FusedCausalLMOutput):
        """TRL's fused output and what the auxiliary losses need.

        They are fields of the model's output, not a side channel: DDP looks for the graph in what `forward` returns.

        Args:
            emotion_logits (`torch.Tensor` of shape `(clips, classes)`, *optional*): See `ReLLMAudioOutput`.
            dimensions (`torch.Tensor` of shape `(clips, 3)`, *optional*): Arousal, dominance, valence.
        """

        emotion_logits: Tensor | None = None
        dimensions: Tensor | None = None


def return_heads(model: PreTrainedModel) -> None:
    """Have a fused forward return the heads' outputs as well. Without one, nothing is to do.

    Args:
        model (`PreTrainedModel`): After `SFTTrainer.__init__`, which patched its forward; changed in place.
    """
    if FusedCausalLMOutput is None:
        return
    fused_forward = model.forward

    @functools.wraps(type(model).forward)  # `generate` checks its arguments against the signature
    def forward(self: PreTrainedModel, *args: Tensor, fused_lm_head: bool = False, **kwargs: Tensor) -> ModelOutput:
        if not fused_lm_head:
            return fused_forward(*args, **kwargs)
        heard: dict[str, Tensor] = {}
        handle = self.base_model.register_forward_hook(lambda module, inputs, output: heard.update(output))
        try:
            output = fused_forward(*args, fused_lm_head=True, **kwargs)
        finally:
            handle.remove()
        return ReLLMFusedOutput(
            **output, emotion_logits=heard.get("emotion_logits"), dimensions=heard.get("dimensions")
        )

    model.forward = types.MethodType(forward, model)


__all__ = ["return_heads"]
