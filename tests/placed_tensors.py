"""Tensors that say they are on one of several devices, on a machine without any: its CPU computes them.

Their devices are "meta:0", "meta:1", …: PyTorch runs on that type everywhere, and on "cuda" only where it was built
for it, fake tensors or not. An operation on two devices, or on one and the CPU, is an error as with real ones (numbers
of no dimension and indices may come from the CPU). Unlike fake tensors these have values: lengths can be asked for,
and what a spread model says can be compared.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import dispatch_model
from tiny_models import tiny_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from relllm import ReLLMConfig, ReLLMForConditionalGeneration

CARD = "meta:0"  # where inputs go
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class PlacedTensor(Tensor):
    """A tensor of the CPU (`values`) under another device's name (`place`)."""

    values: Tensor
    place: torch.device
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __new__(cls, values: Tensor, place: torch.device) -> "PlacedTensor":
        shell = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device="meta")
        tensor = cls._make_subclass(cls, shell, False, dispatch_device=True, device_for_backend_keys=place)
        tensor.values, tensor.place = values, place
        return tensor

    @property
    def device(self) -> torch.device:
        return self.place

    def tolist(self) -> Any:
        return self.values.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(function, args, kwargs or {})


class _Places(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(function, args, kwargs or {})


@contextmanager
def several_devices() -> Iterator[None]:
    """Make tensors, and move the CPU's, to "meta:0", "meta:1", … where they are asked to be in the `with` block."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=…) begins on the CPU
    try:
        with _Places():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def four_layers(**options) -> ReLLMConfig:
    """A configuration whose LLM has layers enough to be spread."""
    config = tiny_config(**options)
    config.text_config.num_hidden_layers = 4
    return config


def spread(model: ReLLMForConditionalGeneration, places: Mapping[str, str]) -> ReLLMForConditionalGeneration:
    return dispatch_model(copy.deepcopy(model), dict(places), main_device=CARD, force_hooks=True)


def _run(function: Any, args: tuple, kwargs: dict) -> Any:
    if function is torch.ops.prim.device.default:
        return args[0].device
    tensors: list[Tensor] = []
    real_args = _mapped(args, lambda leaf: _real(leaf, tensors))
    real_kwargs = _mapped(kwargs, lambda leaf: _real(leaf, tensors))
    placed = [tensor for tensor in tensors if isinstance(tensor, PlacedTensor)]
    asked = kwargs.get("device")
    place = torch.device(asked) if asked is not None else placed[0].place if placed else None
    if function not in MOVES:
        may_differ = tensors if function not in INDEXING else [args[0], *placed]
        devices = {str(tensor.device) for tensor in may_differ if tensor.dim() or tensor.device.type != "cpu"}
        if len(devices) > 1:
            raise RuntimeError(f"{function} of tensors on {sorted(devices)}.")
    output = function(*real_args, **real_kwargs)
    if function is aten.copy_.default:
        return args[0]
    if place is None or place.type != "meta" or place.index is None:
        return output

    def named(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        changed = [tensor for tensor in placed if tensor.values is leaf]  # in place
        return changed[0] if changed else PlacedTensor(leaf, place)

    return _mapped(output, named)


def _real(leaf: Any, tensors: list[Tensor]) -> Any:
    if isinstance(leaf, Tensor):
        tensors.append(leaf)
        return leaf.values if isinstance(leaf, PlacedTensor) else leaf
    return torch.device("cpu") if isinstance(leaf, torch.device) and leaf.index is not None else leaf


def _mapped(tree: Any, change: Callable[[Any], Any]) -> Any:
    if type(tree) in (tuple, list):
        return type(tree)(_mapped(one, change) for one in tree)
    return {name: _mapped(one, change) for name, one in tree.items()} if type(tree) is dict else change(tree)
