"""LoRA that acts only at some positions of the sequence (RE-LLM and BLSP-Emo: at audio positions).

PEFT owns the layers and their parameters; here is a mask of where they act in one forward pass. Our LoRA is a part of
the model: what PEFT does to adapters (activate, disable, delete, merge) it does to those that are put on top of it.
"""

import contextlib
import functools
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

try:  # what Transformers finds outside of a `try` it makes a requirement of every checkpoint
    from peft import LoraConfig, PeftConfig, get_peft_model_state_dict
    from peft.tuners.lora.layer import Linear as PeftLinear
    from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype, check_target_module_exists
    from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
except ImportError:
    if not TYPE_CHECKING:
        PeftLinear = nn.Module  # of a class that is never used

logger = logging.get_logger(__name__)

ADAPTER_NAME = "relllm"  # not "default": a downstream `get_peft_model` takes that name and would overwrite ours
PLAIN_OPTIONS = (
    *("r", "lora_alpha", "lora_dropout", "lora_bias", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
    *("task_type", "peft_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping"),
    "peft_version",
)
STAYS_FROZEN = "the LLM below the LoRA stays frozen (to train all of it: unfreeze=['text_model'] of a run)"
WHY_NOT = {
    "bias": STAYS_FROZEN,
    "modules_to_save": STAYS_FROZEN,
    "trainable_token_indices": STAYS_FROZEN,
    "init_lora_weights": "the LoRA is made before the LLM's weights are there. True and 'gaussian' do without them",
}
# Of a mixture of experts: they see positions packed, or some of them. kv_b_proj reads the cache again in each decode
# step (DeepSeek); Gemma 3n computes with the weights of its coefficients; an indexer chooses positions, without a
# gradient; of what is delayed (Zaya) a position sees the one before.
NOT_BY_POSITION = re.compile(r"(.*\.)?(\w*experts?(_\w+)?|\w*router|gate|kv_b_proj|\w*_coefs|indexer|\w*_delayed)")


# Linear layers, by the ends of their names, that read the same input: their A's are one product.
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
WITHOUT_COPIES = ("cpu",)  # devices where an operation costs nothing to launch, and a copy its time


class LoraScope(threading.local):
    """Where the LoRA acts in the running forward pass; one object for each model, and a mask for each thread.

    `mask` is `None` (nowhere), `True` (everywhere) or a bool tensor of shape `(batch, sequence)`; `positions` are its
    True ones in `batch * sequence`, where they are given, or on a CPU: finding them elsewhere waits for the device.
    `copies` are of [`copy_lora`].
    """

    mask: Tensor | bool | None = None
    positions: Tensor | None = None
    copies: "dict[ScopedLinear, tuple[Tensor, Tensor]] | None" = None
    low: "tuple[Tensor, dict[ScopedLinear, Tensor]] | None" = None  # the last input, and its products still to be used
    rooms: tuple[Tensor, dict[int, Tensor]] | None = None  # of [`~LoraScope.spread`]

    @contextlib.contextmanager
    def use(
        self,
        mask: Tensor | bool | None,
        copies: "dict[ScopedLinear, tuple[Tensor, Tensor]] | None" = None,
        positions: Tensor | None = None,
    ) -> Iterator[None]:
        """Set the mask, the parameters' copies, and the positions if they are known, for the length of a `with`."""
        before = self.mask, self.positions, self.copies, self.low, self.rooms
        positions = _find_positions(mask) if positions is None else positions
        self.mask, self.positions, self.copies, self.low, self.rooms = mask, positions, copies, None, None
        try:
            yield
        finally:
            self.mask, self.positions, self.copies, self.low, self.rooms = before

    def spread(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """Return which of the positions each place in `batch * sequence` is, and room for their products with A.

        A place that is none of them is the last one, behind the others, whose product is 0.
        """
        assert isinstance(self.mask, Tensor) and self.positions is not None
        count, width = len(self.positions), len(a)
        if self.rooms is None:
            order = torch.arange(count, device=a.device)
            self.rooms = order.new_full((self.mask.numel(),), count).index_copy_(0, self.positions, order), {}
        places, rooms = self.rooms
        if width not in rooms:
            rooms[width] = a.new_zeros(count + 1, width)
        return places, rooms[width]

    def wrap_checkpoint(self, checkpoint: Callable) -> Callable:
        """Make a gradient-checkpointing function that runs again, after `use`, under the mask of the first run."""

        def scoped_checkpoint(function: Callable, *args: object, **kwargs: object) -> object:
            if torch.compiler.is_compiling():  # the graph has the mask as an input, at recompute as well
                return checkpoint(function, *args, **kwargs)
            scope = self.mask, self.copies, self.positions

            def run(*run_args: object, **run_kwargs: object) -> object:
                with self.use(*scope):
                    return function(*run_args, **run_kwargs)

            return checkpoint(run, *args, **kwargs)

        return scoped_checkpoint

    def __reduce__(self) -> tuple:
        return type(self), ()


class ScopedLinear(PeftLinear):
    """A linear layer with our LoRA in it, and a LoRA layer of PEFT for whatever is put on top.

    Our adapter is never in PEFT's list of active ones, so PEFT runs, disables, deletes and merges only the others.
    """

    merged_adapters: list[str]

    def __init__(self, name: str, base_layer: nn.Module, scope: LoraScope, scope_name: str, config: "LoraConfig"):
        r, alpha = (
            patterns.get(get_pattern_key(patterns.keys(), name), default)
            for patterns, default in ((config.rank_pattern, config.r), (config.alpha_pattern, config.lora_alpha))
        )
        config.fan_in_fan_out = isinstance(base_layer, Conv1D)  # the linear layer of GPT-2
        super().__init__(base_layer, ADAPTER_NAME, config, r, alpha, is_target_conv_1d_layer=config.fan_in_fan_out)
        self.layer_name, self.lora_scope, self.scope_name = name, scope, scope_name
        self.start_from = config.init_lora_weights
        self.same_input: tuple[ScopedLinear, ...] = (self,)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Return what the base layer and PEFT's other adapters give, plus our LoRA where the scope's mask says so.

        In a decode step of audio scope this is a matrix product: PEFT's own `forward` asks which adapters are active
        or merged, a tenth of a small LLM's time.
        """
        if self.lora_scope.mask is not None and ADAPTER_NAME not in self.merged_adapters:
            return self._run_with_own(x, *args, **kwargs)
        if torch.is_grad_enabled() or args or kwargs or not self._is_plain():
            return super().forward(x, *args, **kwargs)
        base = self._modules["base_layer"]
        return nn.functional.linear(x, base._parameters["weight"], base._parameters["bias"])

    def _is_plain(self) -> bool:
        """Tell whether nothing but a matrix product can happen: no other adapter, no hook, no other layer."""
        base = self._modules["base_layer"]
        return (
            not self._active_adapter
            and not self.merged_adapters
            and type(base) is nn.Linear
            and "forward" not in base.__dict__  # Accelerate's hooks, where a model is spread over devices
            and not base._forward_hooks
            and not base._forward_pre_hooks
        )

    def _run_with_own(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        scope, shape = self.lora_scope, x.shape[:-1]
        mask = scope.mask
        if isinstance(mask, Tensor) and shape != mask.shape and shape != (mask.numel(),):  # OPT's MLP: all in one row
            raise ValueError(
                f"{self.layer_name} has a LoRA and got an input of shape {tuple(x.shape)}, and the LoRA acts at some "
                f"positions of {tuple(mask.shape)}. Leave it out of lora_config's target_modules."
            )
        if isinstance(mask, Tensor) and mask.device != x.device:  # a spread model goes on, on its next device
            scope.mask = mask.to(x.device)
            scope.positions = None if scope.positions is None else scope.positions.to(x.device)
        copied = None
        if not torch.compiler.is_compiling() and scope.copies is not None:
            copied = scope.copies.get(self)
        if copied is None or (copied[0].dtype, copied[0].device) != (_precision(x), x.device):
            return self._add_own(x, super().forward(x, *args, **kwargs))
        x, low = self._share_product(x, copied[0])
        result = super().forward(x, *args, **kwargs)
        flat = result.flatten(0, -2)
        add = flat.addmm if torch.is_grad_enabled() else flat.addmm_  # which copies nothing first
        return add(low.to(flat.dtype), copied[1].t().to(flat.dtype)).view_as(result)

    def _add_own(self, x: Tensor, result: Tensor) -> Tensor:
        lora_a, lora_b = self.lora_A[ADAPTER_NAME], self.lora_B[ADAPTER_NAME]
        dropout, scaling = self.lora_dropout[ADAPTER_NAME], self.scaling[ADAPTER_NAME]
        if (positions := self.lora_scope.positions) is not None:  # the others are left alone, and cost nothing
            rows = x.flatten(0, -2).index_select(0, positions).to(lora_a.weight.dtype)
            delta = (lora_b(lora_a(dropout(rows))) * scaling).to(result.dtype)
            return result.flatten(0, -2).index_add(0, positions, delta).view_as(result)
        delta = lora_b(lora_a(dropout(x.to(lora_a.weight.dtype)))) * scaling
        if isinstance(mask := self.lora_scope.mask, Tensor):
            delta = delta * mask.reshape(*x.shape[:-1], 1).to(delta.dtype)
        return result + delta.to(result.dtype)

    def _share_product(self, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """Return the input for the base layer, and its product with our A, `(batch * sequence, r)`, 0 elsewhere.

        What reads the same input shares its dropout and one product with all their A's.
        """
        scope = self.lora_scope
        if scope.low is None or scope.low[0] is not x or self not in scope.low[1]:
            read, chance = x, _dropped(self)
            if scope.positions is not None:
                x, low = _ProductAtPositions.apply(x, a, scope.positions, *scope.spread(a), chance)
            else:
                rows = x.flatten(0, -2).to(a.dtype)
                low = (torch.native_dropout(rows, chance, True)[0] if chance else rows) @ a.t()
                low = low * scope.mask.view(-1, 1) if isinstance(scope.mask, Tensor) else low
            ranks = [layer.r[ADAPTER_NAME] for layer in self.same_input]
            parts = [low] if len(ranks) == 1 else low.split(ranks, dim=1)
            scope.low = read, dict(zip(self.same_input, parts, strict=True))
        return x, scope.low[1].pop(self)

    def update_layer(self, adapter_name: str, *args: object, **kwargs: object) -> None:
        """Do as PEFT for another adapter; a `ValueError` for a second one of our name, which would replace ours."""
        if adapter_name == ADAPTER_NAME and ADAPTER_NAME in self.lora_A:
            raise ValueError(f"{ADAPTER_NAME!r} is the name of the model's own LoRA. Give your adapter another.")
        super().update_layer(adapter_name, *args, **kwargs)

    def reset_own(self) -> None:
        """Draw our LoRA's A and set its B to zero."""
        self.reset_lora_parameters(ADAPTER_NAME, self.start_from)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Do as PEFT: these train and the others do not. Ours acts whether it is named or not."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        super().set_adapter(names, inference_mode)
        self._active_adapter = [name for name in names if name != ADAPTER_NAME]

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the others on or off; ours acts and trains, or not, as before."""
        own = [(p, p.requires_grad) for name, p in self.named_parameters() if is_lora_parameter(f".{name}")]
        super().enable_adapters(enabled)
        for parameter, requires_grad in own:
            parameter.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete one of the others; a `ValueError` for ours."""
        if adapter_name == ADAPTER_NAME:
            raise ValueError(f"{ADAPTER_NAME!r} is the model's own LoRA: a part of it, which cannot be deleted.")
        super().delete_adapter(adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge the others that are active, or those named; ours only by its name, and only of global scope."""
        if adapter_names and ADAPTER_NAME in adapter_names and self.scope_name != "global":
            raise ValueError(
                f"A LoRA of scope {self.scope_name!r} cannot be merged: it acts at some positions of the sequence, "
                "and a merged weight acts at all. Keep it as it is (a decode step does not pay for it), or train with "
                "lora_scope='global'."
            )
        super().merge(safe_merge, adapter_names)

    def unmerge(self) -> None:
        """Undo `merge`, where there was one: PEFT asks each layer, also those that its adapter is not in."""
        if self.merged:
            super().unmerge()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> "ScopedLinear":
        """Take the others off, merged or not; PEFT's `merge_and_unload` and `unload` put what is returned here."""
        if merge:
            self.merge(safe_merge, adapter_names)
        self.merged_adapters = [name for name in self.merged_adapters if name == ADAPTER_NAME]
        self._active_adapter, self._disable_adapters = [], False
        for name in self._all_available_adapter_names():
            super().delete_adapter(name)
        return self

    def _all_available_adapter_names(self) -> list[str]:
        return [name for name in super()._all_available_adapter_names() if name != ADAPTER_NAME]


def inject_scoped_lora(
    text_model: PreTrainedModel, lora_config: dict, scope_name: str, scope: LoraScope
) -> dict[str, object]:
    """Put a plain LoRA into a causal LM, in place; return `lora_config` with the layers of "all-linear" spelled out.

    Args:
        lora_config (`dict`): Arguments of `peft.LoraConfig`; `target_modules`, by the LLM's own names, defaults to all
            linear layers but the output embeddings, which are the ones of the paper (attention and MLP, input and
            output projections), and but those that are not run position by position (experts, routers, gates).
        scope_name (`str`): `"audio"`, `"text"` or `"global"`.
    """
    if PeftLinear is nn.Module:
        raise ImportError('This model carries a LoRA. Install PEFT with `pip install "peft>=0.21,<0.22"`.')
    lora_config = plain_lora_config(lora_config) or {}
    left_out = _not_by_position(text_model)
    if lora_config.get("target_modules") in (None, "all-linear"):
        lora_config = {**lora_config, "target_modules": _all_linear(text_model, left_out)}
        if left_out:
            logger.warning_once(
                f"The LoRA leaves out {len(left_out)} modules that are not run on each position in its place, as "
                f"{left_out[0][:-1]} and {left_out[-1][:-1]}: there it could not tell which positions are its own."
            )
    config = _check_plain(lora_config)
    layers = {name: layer for name, layer in text_model.named_modules() if name and _is_target(config, name)}
    _check_targets(text_model, config, layers, left_out)
    for name, layer in layers.items():
        text_model.set_submodule(name, ScopedLinear(name, layer, scope, scope_name, config))
    cast_adapter_dtype(text_model, ADAPTER_NAME)  # what trains is float32, also over an LLM in half precision
    text_model.lora_layers = tuple(text_model.get_submodule(name) for name in layers)
    _find_same_input(text_model, list(layers))
    return lora_config


class _ProductAtPositions(torch.autograd.Function):
    """The product of some of an input's rows with A, after dropout, and 0 for the others.

    The input comes back with it, for the base layer: the two gradients then meet in a single operation.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, positions: Tensor, places: Tensor, room: Tensor, chance: float
    ) -> tuple[Tensor, Tensor]:
        """Return the input and its products `(batch * sequence, ranks)`; see [`~LoraScope.spread`]."""
        rows, kept = x.flatten(0, -2).index_select(0, positions).to(a.dtype), None
        if chance:
            rows, kept = torch.native_dropout(rows, chance, True)
        ctx.save_for_backward(rows, a, positions, kept)
        ctx.scale = 1 / (1 - chance)
        torch.mm(rows, a.t(), out=room[:-1])
        return x.view_as(x), room.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, grad_low: Tensor) -> tuple[Tensor | None, ...]:
        """Add the gradient of the rows to that of the input."""
        rows, a, positions, kept = ctx.saved_tensors
        grad_low = grad_low.index_select(0, positions)
        grad = grad_low @ a
        if kept is not None:
            grad = torch.ops.aten.native_dropout_backward(grad, kept, ctx.scale)
        grad_x = grad_x.flatten(0, -2).index_add(0, positions, grad.to(grad_x.dtype)).view_as(grad_x)
        return grad_x, grad_low.t() @ rows, None, None, None, None


class _CopyLora(torch.autograd.Function):
    """Copies of many parameters in one operation, and their gradients back in another."""

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, groups: list[int], scales: list[float], *weights: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the A's of each group as one `(ranks, width)`, then each B times its scale."""
        shapes, first_b = [weight.shape for weight in weights], sum(groups)
        ctx.groups, ctx.scales, ctx.shapes, ctx.precision = groups, scales, shapes, weights[0].dtype
        ctx.set_materialize_grads(False)
        copies = _one_storage(shapes, weights[0], dtype)
        torch._foreach_copy_(copies, [*weights[:first_b], *_times(weights[first_b:], scales)])
        return (*_joined(copies[:first_b], groups), *copies[first_b:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients in the parameters' precision."""
        parts: list[Tensor | None] = []
        for size, grad in zip(ctx.groups, grads, strict=False):
            ranks = [shape[0] for shape in ctx.shapes[len(parts) : len(parts) + size]]
            parts += [None] * size if grad is None else grad.split(ranks)
        first_b = len(parts)
        parts += grads[len(ctx.groups) :]
        known = [index for index, part in enumerate(parts) if part is not None]
        given = [part for part in parts if part is not None]
        if given and given[0].dtype != ctx.precision:
            exact = _one_storage([part.shape for part in given], given[0], ctx.precision)
            torch._foreach_copy_(exact, given)
            given = exact
        number = sum(index < first_b for index in known)
        scales = [ctx.scales[index - first_b] for index in known[number:]]
        for index, grad in zip(known, [*given[:number], *_times(given[number:], scales)], strict=True):
            parts[index] = grad
        return None, None, None, *parts


def copy_lora(text_model: PreTrainedModel, like: Tensor) -> dict[ScopedLinear, tuple[Tensor, Tensor]] | None:
    """Return, for each layer, its A with those that share its input and its B, scaled, in the LLM's precision.

    `None` on a CPU, where a layer's parameters are there in its own forward only (FSDP, ZeRO 3, weights that are
    spread or offloaded), where layers are compiled and while a graph is traced.
    """
    layers = text_model.__dict__.get("lora_layers", ())
    if not layers or (text_model.__dict__.get("has_compiled_layers") and torch.is_grad_enabled()):
        return None
    if like.device.type in WITHOUT_COPIES or torch.compiler.is_compiling():
        return None
    if any(layer.lora_bias[ADAPTER_NAME] for layer in layers):
        return None
    groups = list({id(layer.same_input): layer.same_input for layer in layers}.values())
    weights = [layer.lora_A[ADAPTER_NAME].weight for group in groups for layer in group]
    ordered = [layer for group in groups for layer in group]
    weights += [layer.lora_B[ADAPTER_NAME].weight for layer in ordered]
    kinds = {(type(weight), weight.device, weight.dtype) for weight in weights}
    if kinds != {(nn.Parameter, like.device, weights[0].dtype)} or any(weight.dim() != 2 for weight in weights):
        return None
    scales = [layer.scaling[ADAPTER_NAME] for layer in ordered]
    copies = _CopyLora.apply(_precision(like), [len(group) for group in groups], scales, *weights)
    joined = [copies[index] for index, group in enumerate(groups) for _ in group]
    return dict(zip(ordered, zip(joined, copies[len(groups) :], strict=True), strict=True))


def compile_layers(text_model: PreTrainedModel, **options: Any) -> None:
    """Compile each decoder layer's training pass, in place; like layers share a graph, so it takes seconds.

    A graph may not break, as a checkpoint outside of one would lose the LoRA's mask. Passes without a gradient or with
    a cache run as before. `options` are those of `torch.compile`; a `ValueError` where no layers are marked as such.
    """
    layers = [module for module in text_model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"{type(text_model).__name__} marks no decoder layers to compile. Leave torch_compile out.")
    for layer in layers:
        plain = layer._call_impl
        compiled = torch.compile(plain, fullgraph=True, **options)
        layer._compiled_call_impl = functools.partial(_run_layer, plain, compiled)
    text_model.has_compiled_layers = True


def _run_layer(plain: Callable, compiled: Callable, *args: object, **kwargs: object) -> object:
    trains = torch.is_grad_enabled() and kwargs.get("past_key_values") is None
    return (compiled if trains else plain)(*args, **kwargs)


def _dropped(layer: ScopedLinear) -> float:
    """Return the share of its input that dropout takes from our LoRA now."""
    dropout = layer.lora_dropout[ADAPTER_NAME]
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def _precision(x: Tensor) -> torch.dtype:
    """Return in what a linear layer multiplies now."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else x.dtype


def _times(tensors: Sequence[Tensor], scales: list[float]) -> Sequence[Tensor]:
    return tensors if all(scale == 1 for scale in scales) else torch._foreach_mul(list(tensors), scales)


def _one_storage(shapes: list[torch.Size], like: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return uninitialised tensors that lie one behind the other."""
    sizes = [shape.numel() for shape in shapes]
    pieces = like.new_empty(sum(sizes), dtype=dtype).split(sizes)
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def _joined(tensors: list[Tensor], groups: list[int]) -> Iterator[Tensor]:
    """Yield the tensors of each group as one: they lie behind one another in one storage."""
    start = 0
    for size in groups:
        group = tensors[start : start + size]
        yield group[0].as_strided((sum(map(len, group)), group[0].shape[1]), group[0].stride())
        start += size


def _find_same_input(text_model: PreTrainedModel, names: list[str]) -> None:
    """Tell layers which others read what they read."""
    for parent in {name.rpartition(".")[0] for name in names}:
        for ends in SAME_INPUT:
            found = [name for end in ends if (name := f"{parent}.{end}") in names]
            group = tuple(text_model.get_submodule(name) for name in found)
            for layer in group:
                layer.same_input = group


class AdaptersOnTop:
    """Has layers that PEFT wraps around ours come off again: PEFT itself puts the innermost layer in their place.

    Setting `peft_config` is the last thing that PEFT does when it puts an adapter on a model.
    """

    @property
    def peft_config(self) -> "dict[str, PeftConfig]":
        """Return the settings of the adapters on top; without any there is no such attribute, as in any model."""
        if "peft_config" not in self.__dict__:
            raise AttributeError("peft_config")
        return self.__dict__["peft_config"]

    @peft_config.setter
    def peft_config(self, config: "dict[str, PeftConfig]") -> None:
        self.__dict__["peft_config"] = config
        for layer in self.modules():  # type: ignore[attr-defined]
            if isinstance(layer, BaseTunerLayer) and isinstance(layer.base_layer, ScopedLinear):
                layer.unload_and_optionally_merge_module = functools.partial(_unload, layer)

    @peft_config.deleter
    def peft_config(self) -> None:
        del self.__dict__["peft_config"]


def _unload(layer: nn.Module, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
    """Return our layer from below another; PEFT asks this of each layer that it unloads, the first one first."""
    if merge:
        raise ValueError(
            "An adapter that is no LoRA (LoHa, IA3, …) cannot be merged: it lies around the model's own LoRA. "
            "Nothing was changed. Keep it as it is, or take it off with `unload()`."
        )
    return layer.base_layer  # type: ignore[return-value]


def has_adapters(model: PreTrainedModel) -> bool:
    """Tell whether PEFT has put an adapter on top of a ReLLM; a `ValueError` if it cannot be told from the model."""
    layers = [layer for layer in model.modules() if PeftLinear is not nn.Module and isinstance(layer, BaseTunerLayer)]
    if merged := sorted({name for layer in layers for name in layer.merged_adapters}):
        raise ValueError(
            f"The adapters {merged} are merged into the weights, and saved so they would count twice. Take them out "
            "with `unmerge_adapter()`, or make them a part of the weights with `merge_and_unload()`."
        )
    own = [layer for layer in layers if isinstance(layer, ScopedLinear)]
    if lost := len(model.base_model.text_model.__dict__.get("lora_layers", ())) - len(own):
        raise ValueError(
            f"The model has lost {lost} layers of its own LoRA: `unload()` of what is no LoRA, put on by "
            "`PeftModel.add_adapter`, takes them out. Load the model again."
        )
    return len(own) < len(layers) or any(layer._all_available_adapter_names() for layer in own)


@contextlib.contextmanager
def adapters_apart(model: PreTrainedModel, folder: str | os.PathLike, options: dict[str, Any]) -> Iterator[None]:
    """Save adapters on top of a ReLLM, each in a folder of its name; the `with` block saves the model below them.

    `options` are those of `save_pretrained`; their `state_dict` becomes that of the model below.
    """
    if not has_adapters(model):
        yield
        return
    if options.get("is_main_process", True):
        _save_adapters(model, folder)
    state = options.get("state_dict")
    options["state_dict"] = _state_without_adapters(model, model.state_dict() if state is None else state)
    marked, model._hf_peft_config_loaded = model._hf_peft_config_loaded, False  # else Transformers saves them alone
    try:
        yield
    finally:
        model._hf_peft_config_loaded = marked


def is_lora_parameter(name: str) -> bool:
    """Tell whether a parameter name belongs to the LoRA that [`inject_scoped_lora`] makes."""
    return f".{ADAPTER_NAME}." in name and "lora_" in name


def plain_lora_config(lora: "dict | PeftConfig | None") -> dict | None:
    """Return what a `peft.LoraConfig` changes from its defaults, as JSON can hold it; a `dict` likewise."""
    if lora is not None and not isinstance(lora, dict):
        if type(lora) is not LoraConfig:
            raise ValueError(
                f"lora must be a dict or a peft.LoraConfig, got a {type(lora).__name__}: only plain LoRA."
            )
        lora = _changed(lora.to_dict())
    return lora and {name: sorted(value) if isinstance(value, set) else value for name, value in lora.items()}


def _changed(lora: dict) -> dict:
    """Return the options that differ from PEFT's defaults, or that it does not know."""
    defaults = LoraConfig().to_dict()
    return {name: value for name, value in lora.items() if name not in defaults or value != defaults[name]}


def _check_plain(lora_config: dict) -> "LoraConfig":
    """Refuse each option that would have no effect, or another one than in PEFT."""
    for name, value in _changed(lora_config).items():
        if name in PLAIN_OPTIONS or (name, value) == ("init_lora_weights", "gaussian"):
            continue
        why = WHY_NOT.get(name, "only plain LoRA can be limited to some positions")
        raise ValueError(f"lora_config has {name}={value!r}, which cannot act here: {why}. Leave it out.")
    return LoraConfig(**lora_config)


def _all_linear(text_model: PreTrainedModel, left_out: tuple[str, ...]) -> list[str]:
    """Name the linear layers but the output embeddings and those in modules that are left out."""
    head = text_model.get_output_embeddings()
    return [
        name
        for name, layer in text_model.named_modules()
        if isinstance(layer, (nn.Linear, Conv1D)) and layer is not head and not f"{name}.".startswith(left_out)
    ]


def _not_by_position(text_model: PreTrainedModel) -> tuple[str, ...]:
    """Name, each with a dot behind it, modules that are not run on all positions in their order, or not at all."""
    found = []
    for name, module in text_model.named_modules():
        if NOT_BY_POSITION.fullmatch(name):
            found.append(f"{name}.")
        elif {"A_log", "D"} <= module._parameters.keys():  # a state space, whose kernels take weights, not layers
            found += [f"{name}.{child}." for child, _ in module.named_children() if child != "in_proj"]
    return tuple(found)


def _is_target(config: "LoraConfig", name: str) -> bool:
    try:
        return bool(check_target_module_exists(config, name))
    except re.error as error:
        raise ValueError(f"target_modules={config.target_modules!r} is no regular expression: {error}.") from error


def _check_targets(
    text_model: PreTrainedModel, config: "LoraConfig", layers: dict[str, nn.Module], left_out: tuple[str, ...]
) -> None:
    """Refuse layers where the LoRA could not obey its scope, and names that match none."""
    allowed = set(_all_linear(text_model, left_out))
    if refused := [f"{name} ({type(layer).__name__})" for name, layer in layers.items() if name not in allowed]:
        raise ValueError(
            f"lora_config's target_modules match {', '.join(refused[:2])}{', …' if len(refused) > 2 else ''}, and a "
            "LoRA that is limited to some positions acts in linear layers inside the LLM that are run on each of them "
            "in its place: not in embeddings, experts, their routers, what reads the cache again. Leave it out."
        )
    names = [name.split(".") for name, _ in text_model.named_modules()]
    endings = {".".join(parts[start:]) for parts in names for start in range(len(parts))}
    listed = [entries for entries in (config.target_modules, config.exclude_modules) if isinstance(entries, set)]
    unused = [entry for entries in listed for entry in entries if entry not in endings]
    patterns = [*config.rank_pattern, *config.alpha_pattern]
    unused += [entry for entry in patterns if not any(re.match(rf"(.*\.)?({entry})$", name) for name in layers)]
    if unused or not layers:
        raise ValueError(
            f"lora_config names {sorted(unused) if unused else config.target_modules!r}, and the LLM has no such "
            f"layer to put a LoRA in. Names are the LLM's own, as {sorted(allowed)[:2]}."
        )


def _find_positions(mask: Tensor | bool | None) -> Tensor | None:
    on_cpu = isinstance(mask, Tensor) and mask.device.type == "cpu"
    return mask.flatten().nonzero().squeeze(1) if on_cpu and not torch.compiler.is_compiling() else None


def _state_without_adapters(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's weights without those of PEFT's adapters on top of it, by the names they have without them."""
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds)}
    own: dict[str, Tensor] = {}
    for name, weight in state.items():
        parts = name.split(".")
        for end in range(len(parts) - 1, 0, -1):
            layer = layers.get(".".join(parts[:end]))
            if isinstance(layer, ScopedLinear):
                if parts[end].startswith("lora_") and parts[end + 1] != ADAPTER_NAME:
                    break
            elif layer is not None:
                if parts[end] != ("base_layer" if isinstance(layer, BaseTunerLayer) else "original_module"):
                    break
                del parts[end]
        else:
            own[".".join(parts)] = weight
    return own


def _save_adapters(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Save them as PEFT does: `PeftModel.from_pretrained` and `load_adapter` take such a folder."""
    for name, config in model.__dict__.get("peft_config", {}).items():
        place = os.path.join(folder, name)
        weights = get_peft_model_state_dict(model, adapter_name=name)
        config.save_pretrained(place)
        named = {f"base_model.model.{key}": weight.contiguous() for key, weight in weights.items()}
        save_file(named, os.path.join(place, "adapter_model.safetensors"), metadata={"format": "pt"})
        logger.warning(f"{folder} is the model without the adapter {name!r} on top of it, which is saved in {place}.")
