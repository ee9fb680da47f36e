"""wav2vec2's feature encoder as matrix products: the same numbers as Transformers' modules, in less time on a CPU."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

# Frames convolved together (2 s in wav2vec2): their activations stay in the processor's caches.
FRAMES_AT_ONCE = 100


class ConvLayer(Protocol):
    """A layer of wav2vec2, HuBERT or WavLM in Transformers: convolution, layer norm, activation."""

    conv: nn.Conv1d
    layer_norm: nn.LayerNorm
    activation: Callable[[Tensor], Tensor]


def can_convolve(layers: Sequence[ConvLayer], waveforms: Tensor) -> bool:
    """Tell whether [`convolve`] gives what the layers give: float32 on a CPU, no graph, plain layers, layer norm."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    if waveforms.device.type != "cpu" or waveforms.dtype != torch.float32:
        return False
    return all(_is_plain(layer.conv) and isinstance(layer.layer_norm, nn.LayerNorm) for layer in layers)


def convolve(layers: Sequence[ConvLayer], clips: Sequence[Tensor]) -> list[Tensor]:
    """Run layers for which [`can_convolve`] holds on waveforms `(samples,)`; return `(frames, channels)` of each.

    A convolution without padding is a matrix product over the signal with its channels last. oneDNN's, over channels
    first, takes half as long again, and the layer norm then needs a transposed copy of its output and one back.
    """
    weights = [layer.conv.weight.transpose(1, 2).flatten(1) for layer in layers]  # (out, kernel * in)
    hop, field = 1, 1  # samples from one frame to the next; samples that a frame sees
    for layer in layers:
        field += (layer.conv.kernel_size[0] - 1) * hop
        hop *= layer.conv.stride[0]
    outputs = []
    for clip in clips:
        num_frames = (len(clip) - field) // hop + 1
        pieces = []
        for start in range(0, num_frames, FRAMES_AT_ONCE):
            end = min(start + FRAMES_AT_ONCE, num_frames)
            hidden = clip[start * hop : (end - 1) * hop + field].contiguous()[:, None]  # (samples, 1 channel)
            for layer, weight in zip(layers, weights, strict=True):
                hidden = layer.activation(layer.layer_norm(_product(hidden, weight, layer.conv)))
            pieces.append(hidden)
        outputs.append(torch.cat(pieces))
    return outputs


def _product(hidden: Tensor, weight: Tensor, conv: nn.Conv1d) -> Tensor:
    """Convolve `(steps, channels)` to `(steps out, channels out)`.

    The inputs of neighbouring steps overlap, which no BLAS takes: the kernel is cut into pieces of one stride, whose
    steps do not overlap, and their products are added up.
    """
    kernel, stride, channels = conv.kernel_size[0], conv.stride[0], hidden.shape[1]
    steps = (len(hidden) - kernel) // stride + 1
    signal, output = hidden.flatten(), hidden.new_empty(0)
    for start in range(0, kernel, stride):
        width = min(stride, kernel - start) * channels
        inputs = signal[start * channels :].unfold(0, width, stride * channels)[:steps]
        matrix = weight[:, start * channels : start * channels + width]
        if start == 0:
            output = nn.functional.linear(inputs, matrix, conv.bias)
        else:
            output.addmm_(inputs, matrix.T)
    return output


def _is_plain(conv: nn.Module) -> bool:
    """Tell whether no adapter is around it, no weight elsewhere (offloaded, sharded), and a product says all."""
    if type(conv) is not nn.Conv1d or conv.weight.device.type != "cpu" or conv.weight.ndim != 3:
        return False
    return conv.padding == (0,) and conv.dilation == (1,) and conv.groups == 1
