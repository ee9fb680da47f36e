"""Models over several devices, and weights that wait elsewhere until they are needed: offloaded, by Accelerate."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel


class SpreadModel(PreTrainedModel):
    """A model whose parts may lie on several devices, or offloaded; `torch.nn.DataParallel` may not copy it."""

    @property
    def device(self) -> torch.device:
        """Return where inputs go; weights that wait elsewhere until their layer runs (offloaded) are on "meta"."""
        device = super().device
        if device.type == "meta":
            hooks = (module.__dict__.get("_hf_hook") for module in self.modules())
            places = (getattr(hook, "execution_device", None) for hook in hooks)
            device = next((torch.device(place) for place in places if place is not None), device)
        return device

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise ValueError(
            "torch.nn.DataParallel, which Transformers' Trainer uses where one process sees several GPUs, cuts a "
            f"batch's clips and windows apart, and {type(self).__name__} refuses it. Start one process for each GPU, "
            "with `accelerate launch --num_processes NUMBER train.py` (or `-m relllm.cli train …`), or show one GPU: "
            "`CUDA_VISIBLE_DEVICES=0 python train.py`."
        )


@contextmanager
def offloaded_weights(tower: nn.Module) -> Iterator[None]:
    """Have the weights that Accelerate offloads here for a `with` block, on the device where the tower runs.

    Accelerate brings those of a module for its own forward alone, and so again for each group of clips; WavLM's
    attention and our convolutions read them from outside.
    """
    hooks = {module: module.__dict__.get("_hf_hook") for module in tower.modules()}
    brought = {module: hook for module, hook in hooks.items() if getattr(hook, "offload", False)}
    for module, hook in brought.items():
        hook.pre_forward(module)
        hook.offload = False
    try:
        yield
    finally:
        for module, hook in brought.items():
            hook.offload = True
            hook.post_forward(module, None)
