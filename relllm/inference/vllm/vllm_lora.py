"""The LoRA of RE-LLM on vLLM's own linear layers: it acts at the positions of a mask, and nowhere else.

It takes the place of a layer's `quant_method`, so the layer keeps its parallelism, its quantisation and its kernels:
a column-parallel layer has A whole and its rows of B, a row-parallel layer its columns of A and B whole, and the sum
over ranks that follows adds up the LoRA with the rest.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, RowParallelLinear
from vllm.model_executor.utils import set_weight_attrs

from relllm.modeling.lora_relllm import ADAPTER_NAME, ScopedLinear

# A checkpoint's names -> those of the parameters here, which the LLM's own loader takes to the fused layer and shard.
NAMES = {
    ".base_layer.": ".",
    f".lora_A.{ADAPTER_NAME}.weight": ".scoped_a",
    f".lora_B.{ADAPTER_NAME}.weight": ".scoped_b",
}
SHARDS = {"q": 0, "k": 1, "v": 2}  # vLLM's names of the parts of a fused layer; others are numbers


class StepScope(nn.Module):
    """At which tokens of the running step the LoRA acts: 1 there, 0 elsewhere; one buffer at one address."""

    mask: Tensor

    def __init__(self, max_tokens: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("mask", torch.zeros(max_tokens, 1, dtype=dtype), persistent=False)
        self.acts, self.tokens = True, 0  # read where nothing is compiled or captured

    def set(self, acts_at: Tensor) -> None:
        """Begin a step; `acts_at` `(tokens,)` is bool."""
        self.tokens = len(acts_at)
        self.mask[: self.tokens, 0].copy_(acts_at)
        if acts_at.device.type == "cpu" and not torch.compiler.is_compiling():  # on an accelerator it would wait
            self.acts = bool(acts_at.any())


class ScopedLoraMethod(LinearMethodBase):
    """A layer's method with the LoRA added."""

    def __init__(self, base: Any, scope: StepScope) -> None:
        super().__init__()
        self.base, self.scope = base, scope
        self.supports_pre_processed_weights = base.supports_pre_processed_weights
        self.requires_device_loading = base.requires_device_loading

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("The layer was made with its own method.")

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.base.process_weights_after_loading(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return what the layer's own method gives, plus the LoRA at its positions."""
        result = self.base.apply(layer, x, bias)
        if not torch.compiler.is_compiling():  # a compiled graph cannot ask
            if not self.scope.acts:  # a decode step on a CPU: the bare LLM
                return result
            if x.shape[:-1].numel() != self.scope.tokens:
                raise ValueError(f"A layer with a LoRA got {tuple(x.shape)} in a step of {self.scope.tokens} tokens.")
        mask = self.scope.mask[: x.shape[-2]]  # x is (tokens, width), of Transformers' layers (1, tokens, width)
        low = nn.functional.linear(x.to(layer.scoped_a.dtype), layer.scoped_a) * mask
        return result + nn.functional.linear(low, layer.scoped_b).to(result.dtype)


def add_scoped_lora(
    llm: nn.Module, layers: Iterable[ScopedLinear], scope: StepScope, packed: Mapping[str, Sequence[str]]
) -> None:
    """Give the linear layers of vLLM's LLM, with empty weights, their part of the LoRA, for its own loader to fill.

    `layers` are those with a LoRA in Transformers' implementation, `packed` vLLM's fused ones with their parts.
    """
    wanted = {layer.layer_name: layer for layer in layers}
    for name, layer in list(llm.named_modules()):
        before, _, short = name.rpartition(".")
        parts = [f"{before}.{part}".removeprefix(".") for part in packed.get(short, [short])]
        if isinstance(layer, LinearBase) and not wanted.keys().isdisjoint(parts):
            _extend(layer, [wanted.pop(part, None) for part in parts], scope)
    if wanted:
        raise ValueError(
            f"{len(wanted)} layers with a LoRA, such as {sorted(wanted)[0]!r}, are no linear layers of "
            f"{type(llm).__name__} in vLLM. Serve this checkpoint with `relllm serve`."
        )


def _extend(layer: LinearBase, parts: Sequence[ScopedLinear | None], scope: StepScope) -> None:
    """Add A and B of each part that has a LoRA: the A's below one another, each B in columns of its own."""
    if any(part is not None and part.lora_bias[ADAPTER_NAME] for part in parts):
        raise ValueError("lora_config has lora_bias=True, which vLLM cannot run. Serve this with `relllm serve`.")
    ranks = [0 if part is None else part.r[ADAPTER_NAME] for part in parts]
    scales = [0.0 if part is None else part.scaling[ADAPTER_NAME] for part in parts]
    # As in our own model: float32 on a CPU, copies in the LLM's precision on an accelerator.
    on_cpu = scope.mask.device.type == "cpu"
    dtype = torch.float32 if on_cpu else scope.mask.dtype
    inputs = getattr(layer, "input_size_per_partition", layer.input_size)
    outputs = getattr(layer, "output_size_per_partition", layer.output_size)
    layer.scoped_a = nn.Parameter(torch.zeros(sum(ranks), inputs, dtype=dtype), requires_grad=False)
    layer.scoped_b = nn.Parameter(torch.zeros(outputs, sum(ranks), dtype=dtype), requires_grad=False)

    def place(shard: Any) -> tuple[slice, float]:
        part = 0 if shard is None else SHARDS.get(shard, shard)
        return slice(sum(ranks[:part]), sum(ranks[: part + 1])), scales[part]

    def load_a(param: nn.Parameter, weight: Tensor, shard: Any = None) -> None:
        if isinstance(layer, RowParallelLinear):
            weight = weight.chunk(layer.tp_size, dim=1)[layer.tp_rank]
        param.data[place(shard)[0]] = weight.to(param.device, param.dtype)

    def load_b(param: nn.Parameter, weight: Tensor, shard: Any = None) -> None:
        own, scale = place(shard)
        columns = param.data.new_zeros(len(weight), param.shape[1])
        columns[:, own] = (weight * scale).to(param.device, param.dtype)
        # Shards and places the rows; of what is there already, the other parts' rows stay.
        layer.weight_loader(param, columns, *([] if shard is None else [shard]))

    set_weight_attrs(layer.scoped_a, {"weight_loader": load_a})
    set_weight_attrs(layer.scoped_b, {"weight_loader": load_b})
    if not isinstance(layer, RowParallelLinear):
        set_weight_attrs(layer.scoped_b, {"output_dim": 0})
    layer.quant_method = ScopedLoraMethod(layer.quant_method, scope)


def rename_lora(weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
    """Yield a checkpoint's weights by the names that its LoRA has here."""
    for name, weight in weights:
        for old, new in NAMES.items():
            name = name.replace(old, new)
        yield name, weight
