"""PEFT's linear LoRA layer, passed by at the cost of nothing where the LoRA acts nowhere.

In a file of its own, because PEFT is imported at its top: it is loaded when a LoRA is built, not before. The rule of
where a LoRA acts is in `lora_scope_relllm.py`.
"""

import torch
from torch import Tensor, nn

from .lora_scope_relllm import ADAPTER_NAME, LoraScope

try:
    from peft.tuners.lora.layer import Linear
except ImportError as error:
    raise ImportError('This model carries a LoRA. Install PEFT with `pip install "peft>=0.21,<0.22"`.') from error


class ScopedLinear(Linear):
    """A LoRA layer of PEFT that is its base layer where the LoRA acts nowhere.

    PEFT's own `forward` asks, of every layer in every decode step, which adapters are active, merged or mixed, and
    then calls the base layer as a module. That is a tenth of a small LLM's step.
    """

    lora_scope: LoraScope

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """As PEFT's; the shortest way to the same result where only our adapter is there, and its scope is nowhere."""
        if self.lora_scope.mask is not None or torch.is_grad_enabled() or args or kwargs or not self._is_plain():
            return super().forward(x, *args, **kwargs)
        base = self._modules["base_layer"]
        return nn.functional.linear(x, base._parameters["weight"], base._parameters["bias"])

    def _is_plain(self) -> bool:
        """Whether nothing but a matrix product can happen: no other adapter, no hook, no other kind of layer."""
        base = self._modules["base_layer"]
        return (
            self._active_adapter in (ADAPTER_NAME, [ADAPTER_NAME])
            and not self.merged_adapters
            and type(base) is nn.Linear
            and "forward" not in base.__dict__  # Accelerate's hooks, where a model is spread over devices
            and not base._forward_hooks
            and not base._forward_pre_hooks
        )


__all__ = ["ScopedLinear"]
