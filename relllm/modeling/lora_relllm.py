"""LoRA that acts only at some positions of the sequence (RE-LLM and BLSP-Emo: at audio positions).

PEFT owns the layers, their parameters and their saving; here is a mask of where they act in one forward pass.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

try:  # what Transformers finds outside of a `try` it makes a requirement of every checkpoint
    from peft import LoraConfig, PeftConfig, inject_adapter_in_model
    from peft.tuners.lora.layer import Linear as PeftLinear
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.tuners_utils import cast_adapter_dtype
except ImportError:
    if not TYPE_CHECKING:
        PeftLinear = nn.Module  # of a class that is never used

ADAPTER_NAME = "relllm"  # not "default": a downstream `get_peft_model` takes that name and would overwrite ours


class LoraScope(threading.local):
    """Where the LoRA acts in the running forward pass; one object for each model, and a mask for each thread.

    `mask` is `None` (nowhere), `True` (everywhere) or a bool tensor of shape `(batch, sequence)`; `positions` are its
    True ones in `batch * sequence`, on a CPU only, as finding them waits elsewhere.
    """

    mask: Tensor | bool | None = None
    positions: Tensor | None = None

    @contextlib.contextmanager
    def use(self, mask: Tensor | bool | None) -> Iterator[None]:
        """Set the mask for the length of a `with` block."""
        before = self.mask, self.positions
        self.mask, self.positions = mask, _find_positions(mask)
        try:
            yield
        finally:
            self.mask, self.positions = before

    def wrap_checkpoint(self, checkpoint: Callable) -> Callable:
        """Make a gradient-checkpointing function that runs again, after `use`, under the mask of the first run."""

        def scoped_checkpoint(function: Callable, *args: object, **kwargs: object) -> object:
            mask = self.mask

            def run(*run_args: object, **run_kwargs: object) -> object:
                with self.use(mask):
                    return function(*run_args, **run_kwargs)

            return checkpoint(run, *args, **kwargs)

        return scoped_checkpoint

    def __reduce__(self) -> tuple:
        return type(self), ()


class ScopedLora:
    """Our forward pass on PEFT's layers, a `LoraVariant`; PEFT calls that private, hence the pinned range."""

    def __init__(self, scope_name: str, scope: LoraScope):
        self.scope_name = scope_name
        self.scope = scope

    def supports_lora_conversion(self) -> bool:
        return self.scope_name == "global"

    def forward(self, module: "LoraLayer", active_adapter: str, x: Tensor, result: Tensor, **kwargs: object) -> Tensor:
        """Return `result` of the base layer, plus the LoRA where the scope's mask says so."""
        mask = self.scope.mask
        if mask is None:  # a decode step of audio scope: the bare LLM
            return result
        if isinstance(mask, Tensor) and mask.shape != x.shape[:-1]:
            raise ValueError(
                f"A layer with a LoRA got an input of shape {tuple(x.shape)}, and the LoRA acts at some positions of "
                f"{tuple(mask.shape)}. Leave out of lora_config's target_modules what packs or routes positions."
            )
        if isinstance(mask, Tensor) and mask.device != x.device:  # a spread model goes on, on its next device
            mask = self.scope.mask = mask.to(x.device)
            self.scope.positions = None
        lora_a, lora_b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        dropout, scaling = module.lora_dropout[active_adapter], module.scaling[active_adapter]
        if (positions := self.scope.positions) is not None:  # the others are left alone, and cost nothing
            rows = x.flatten(0, -2).index_select(0, positions).to(lora_a.weight.dtype)
            delta = (lora_b(lora_a(dropout(rows))) * scaling).to(result.dtype)
            return result.flatten(0, -2).index_add(0, positions, delta).view_as(result)
        delta = lora_b(lora_a(dropout(x.to(lora_a.weight.dtype)))) * scaling
        if isinstance(mask, Tensor):
            delta = delta * mask.unsqueeze(-1).to(delta.dtype)
        return result + delta.to(result.dtype)

    def merge_safe(self, module: "LoraLayer", active_adapter: str, orig_weight: Tensor) -> Tensor:
        self._refuse_partial()
        return (orig_weight + module.get_delta_weight(active_adapter)).to(orig_weight.dtype)

    def merge_unsafe(self, module: "LoraLayer", active_adapter: str, orig_weight: Tensor) -> None:
        self._refuse_partial()
        orig_weight.data += module.get_delta_weight(active_adapter)

    def unmerge(self, module: "LoraLayer", active_adapter: str, orig_weight: Tensor) -> Tensor:
        return (orig_weight - module.get_delta_weight(active_adapter)).to(orig_weight.dtype)

    def _refuse_partial(self) -> None:
        if self.scope_name != "global":
            raise ValueError(
                f"A LoRA of scope {self.scope_name!r} cannot be merged: it acts at some positions of the sequence, "
                "and a merged weight acts at all. Keep it as it is (a decode step does not pay for it), or train with "
                "lora_scope='global'."
            )


class ScopedLinear(PeftLinear):
    """A LoRA layer of PEFT that is its base layer where the LoRA acts nowhere.

    PEFT's own `forward` asks in every decode step which adapters are active or merged: a tenth of a small LLM's time.
    """

    lora_scope: LoraScope

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Return what PEFT's does, by the shortest way where only our adapter is there, and its scope is nowhere."""
        if self.lora_scope.mask is not None or torch.is_grad_enabled() or args or kwargs or not self._is_plain():
            return super().forward(x, *args, **kwargs)
        base = self._modules["base_layer"]
        return nn.functional.linear(x, base._parameters["weight"], base._parameters["bias"])

    def _is_plain(self) -> bool:
        """Tell whether nothing but a matrix product can happen: no other adapter, no hook, no other layer."""
        base = self._modules["base_layer"]
        return (
            self._active_adapter in (ADAPTER_NAME, [ADAPTER_NAME])
            and not self.merged_adapters
            and type(base) is nn.Linear
            and "forward" not in base.__dict__  # Accelerate's hooks, where a model is spread over devices
            and not base._forward_hooks
            and not base._forward_pre_hooks
        )


def inject_scoped_lora(text_model: nn.Module, lora_config: dict, scope_name: str, scope: LoraScope) -> dict:
    """Put a plain LoRA into a causal LM, in place; return `lora_config` with `target_modules` spelled out.

    Args:
        lora_config (`dict`): Arguments of `peft.LoraConfig`; `target_modules` defaults to all linear layers but the
            output embeddings, which are the ones of the paper (attention and MLP, input and output projections).
        scope_name (`str`): `"audio"`, `"text"` or `"global"`.
    """
    if PeftLinear is nn.Module:
        raise ImportError('This model carries a LoRA. Install PEFT with `pip install "peft>=0.21,<0.22"`.')
    transposed = any(isinstance(module, Conv1D) for module in text_model.modules())  # the linear layer of GPT-2
    peft_config = LoraConfig(**{"target_modules": "all-linear", "fan_in_fan_out": transposed, **lora_config})
    inject_adapter_in_model(peft_config, text_model, ADAPTER_NAME)
    cast_adapter_dtype(text_model, ADAPTER_NAME)  # what trains is float32, also over an LLM in half precision
    variant = ScopedLora(scope_name, scope)
    layers = {name: module for name, module in text_model.named_modules() if isinstance(module, LoraLayer)}
    for name, module in layers.items():
        if ADAPTER_NAME in module.lora_variant:
            raise ValueError(f"lora_config asks for {module.lora_variant[ADAPTER_NAME]} at {name}; only plain LoRA.")
        module.lora_variant[ADAPTER_NAME] = variant
        if type(module) is PeftLinear:
            module.__class__ = ScopedLinear
            module.lora_scope = scope
    return {**lora_config, "target_modules": sorted({name.rsplit(".", 1)[-1] for name in layers})}


def is_lora_parameter(name: str) -> bool:
    """Tell whether a parameter name belongs to the LoRA that [`inject_scoped_lora`] makes."""
    return f".{ADAPTER_NAME}." in name and "lora_" in name


def plain_lora_config(lora: "dict | PeftConfig | None") -> dict | None:
    """Return what a `peft.LoraConfig` changes from its defaults, as JSON can hold it; a `dict` as it is."""
    if lora is None or isinstance(lora, dict):
        return lora
    defaults = type(lora)().to_dict()
    changed = {name: value for name, value in lora.to_dict().items() if value != defaults[name]}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in changed.items()}


def _find_positions(mask: Tensor | bool | None) -> Tensor | None:
    on_cpu = isinstance(mask, Tensor) and mask.device.type == "cpu"
    return mask.flatten().nonzero().squeeze(1) if on_cpu and not torch.compiler.is_compiling() else None
