"""Tensors recorded from the original RE-LLM code, and the same computation by our classes.

The folder is the one in the environment variable RELLM_GOLDEN_DIR, else a full set beside the repository, else the
part of it in `tests/golden_tensors`. Every size, token id, kernel and step count comes from its `description.json`. A
test that wants a tensor which the folder lacks is skipped, and says which.
"""

import copy
import functools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from relllm.conversion import convert_original_checkpoint
from relllm.labels import DIMENSIONS, EMOTIONS
from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration
from relllm.modeling.outputs_relllm import ReLLMAudioOutput
from relllm.processing.feature_extraction_relllm import ReLLMFeatureExtractor, extractor_settings

REPOSITORY = Path(__file__).parent.parent
ATOL = 2e-5  # of features and of trained weights
GRADIENT_RTOL = 1e-4
# Of `assert_parity`, in parts of the largest value. Float32 is off by 3e-7 to 6e-6 of it in these networks, and the
# recorded values by 4e-7 to 5e-6 (one Xeon).
ROUNDING, MOST_ROUNDING = 2e-6, 2e-5
TIMES_OURS = 4
DIMENSIONS_OF_ORIGINAL_TARGETS = ("arousal", "valence", "dominance")


def _find_folder() -> Path:
    if "RELLM_GOLDEN_DIR" in os.environ:
        return Path(os.environ["RELLM_GOLDEN_DIR"])
    full_set = REPOSITORY.parent / "shared" / "golden" / "dev"
    return full_set if full_set.exists() else REPOSITORY / "tests" / "golden_tensors"


FOLDER = _find_folder()
DESCRIPTION = json.loads((FOLDER / "description.json").read_text())
CONFIG = DESCRIPTION["config"]
SCALARS = DESCRIPTION["scalars"]


class Recorded(dict):
    """The tensors of one file; one that is not there skips the test."""

    def __init__(self, file_name: str):
        path = FOLDER / f"{file_name}.safetensors"
        super().__init__(load_file(path) if path.exists() else {})
        self.path = path

    def __missing__(self, name: str) -> Tensor:
        pytest.skip(f"{self.path.parent} has no tensor {name!r} of {self.path.name}.")


@functools.cache
def recorded(file_name: str) -> Recorded:
    return Recorded(file_name)


def assert_close(actual: Tensor, expected: Tensor, where: Tensor | None = None, atol: float = ATOL) -> None:
    """Absolute tolerance for activations, on the positions where `where` is not zero."""
    if where is not None:
        actual, expected = actual[where.bool()], expected[where.bool()]
    torch.testing.assert_close(actual.detach(), expected, atol=atol, rtol=0)


def assert_parity(
    compute: Callable[[ReLLMForConditionalGeneration], Tensor],
    model: ReLLMForConditionalGeneration,
    expected: Tensor,
    where: Tensor | None = None,
) -> None:
    """Hold a recorded float32 value against our computation in float64, whose rounding no processor can change.

    The recorded value may be off by a few times what our own float32 run is, and that by no more than rounding is.

    Args:
        compute: Of a model of any precision.
        model ([`ReLLMForConditionalGeneration`]): In float32.
        expected, where (`torch.Tensor`): As of [`assert_close`].
    """
    exact, ours = compute(in_float64(model)).detach().double(), compute(model).detach().double()
    expected = expected.double()
    if where is not None:
        exact, ours, expected = exact[where.bool()], ours[where.bool()], expected[where.bool()]
    scale = max(1.0, float(expected.abs().max()))
    own = float((ours - exact).abs().max())
    assert own <= MOST_ROUNDING * scale, f"Our float32 is off by {own:.3g} where values reach {scale:.3g}."
    torch.testing.assert_close(exact, expected, atol=TIMES_OURS * max(own, ROUNDING * scale), rtol=0)


@functools.cache
def in_float64(model: ReLLMForConditionalGeneration) -> ReLLMForConditionalGeneration:
    return copy.deepcopy(model).double()


# Models, converted from the original's weights


def original_config(**changes) -> dict:
    """What the original's `config.json` holds."""
    return {
        "whisper_config": CONFIG["whisper"],
        "qwen_config": CONFIG["qwen_v1"],
        **CONFIG["adapter"],
        "lora_config": CONFIG["lora"],
        "lora_scope": CONFIG["lora_scope"],
        "num_emotions": CONFIG["num_emotions"],
        **changes,
    }


def original_weights() -> dict[str, Tensor]:
    weights = recorded("weights")
    if not weights:
        pytest.skip(f"{FOLDER} has no weights.safetensors.")
    return {name: weight.clone() for name, weight in weights.items()}  # a model takes them over, and may train


def convert(weights: dict[str, Tensor], emotion_tower: bool = True, masking: bool = False, **config_changes):
    labels = EMOTIONS if CONFIG["num_emotions"] == len(EMOTIONS) else range(CONFIG["num_emotions"])
    model = convert_original_checkpoint(
        weights,
        original_config(**config_changes),
        audio_token_id=unused_token_id(),
        emotion_config=CONFIG["wav2vec2"] if emotion_tower else None,
        emotion_labels=[str(label) for label in labels],
        projector_masking=masking,
    )
    model.generation_config.suppress_tokens = None  # the original knows no placeholder: any token may be an answer
    return model.eval()


def unused_token_id() -> int:
    """A token that no recorded input holds."""
    inputs = [recorded(f"inputs_{batch}").items() for batch in ("b1", "b3")]
    used = {token for items in inputs for name, ids in items if "_ids" in name for token in ids.flatten().tolist()}
    return next(token for token in range(CONFIG["qwen_v1"]["vocab_size"]) if token not in used)


def without_lora(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.replace("qwen_model.model.", "qwen_model."): w for k, w in weights.items() if "lora_" not in k}


@functools.cache
def relllm_model(*, lora: bool = True, scope: str = "audio", masking: bool = False) -> ReLLMForConditionalGeneration:
    """RE-LLM as recorded; one object for all tests, so none may change it."""
    weights = original_weights()
    if not lora:
        return convert(without_lora(weights), masking=masking, lora_config={})
    return convert(weights, masking=masking, lora_scope=scope)


@functools.cache
def blsp_emo_model() -> ReLLMForConditionalGeneration:
    """BLSP-Emo: RE-LLM's weights without the emotion tower."""
    weights = {k: w for k, w in original_weights().items() if not k.startswith("w2v2")}
    if "adapter.fc1.weight" not in weights:
        pytest.skip(f"weights.safetensors in {FOLDER} lacks BLSP-Emo's adapter.")
    return convert(weights, emotion_tower=False, adapter_type="subsampler")


# Inputs and forward passes


@functools.cache
def audio_inputs(batch: str) -> dict[str, Tensor]:
    """Both towers' inputs of the recorded waveforms, by our feature extractor."""
    settings = extractor_settings(relllm_model().config)
    chosen = {name: CONFIG["feature_extractor"][name] for name in ("hop_length", "n_fft")}
    extractor = ReLLMFeatureExtractor(**settings, **chosen)
    inputs = extractor(waveforms(batch), sampling_rate=extractor.sampling_rate)
    return {name: inputs[name] for name in extractor.model_input_names}


def waveforms(batch: str) -> list:
    inputs = recorded(f"inputs_{batch}")
    return [inputs[f"raw_speech.{i}"].numpy() for i in range(batch_size(batch))]


def batch_size(batch: str) -> int:
    return len(recorded(f"inputs_{batch}")["start_ids"])


def hear(model: ReLLMForConditionalGeneration, batch: str) -> tuple[ReLLMAudioOutput, Tensor]:
    """The audio output, and `(clips, L)`: which of its positions are the clip's own."""
    inputs = dict(audio_inputs(batch))
    if model.config.emotion_config is None:
        del inputs["input_values"], inputs["input_values_mask"]
    audio = model.get_audio_features(**inputs, return_dict=True)
    return audio, torch.arange(audio.last_hidden_state.shape[1])[None] < audio.lengths[:, None]


@dataclass
class Branch:
    """A sequence for the LLM, its segments padded one by one as the original does, so that holes lie inside it."""

    inputs_embeds: Tensor
    attention_mask: Tensor
    labels: Tensor
    audio_mask: Tensor

    @property
    def position_ids(self) -> Tensor:
        """The original counts slots, holes included."""
        return torch.arange(self.inputs_embeds.shape[1]).expand(self.inputs_embeds.shape[:2])


SEGMENTS = {
    "gen.prefix": ("gen.input_ids", "gen.attention_mask"),
    "gen.suffix": ("gen.suffix_input_ids", "gen.suffix_attention_mask"),
}


def branch(model, batch: str, segments: Sequence[str], heard: tuple[ReLLMAudioOutput, Tensor] | None = None) -> Branch:
    """Concatenate segments of the recorded inputs; the one named "speech" is what `hear` gave."""
    inputs, parts = recorded(f"inputs_{batch}"), []
    for name in segments:
        if name == "speech":
            embeds, mask = heard[0].last_hidden_state, heard[1].long()
        else:
            ids_name, mask_name = SEGMENTS.get(name, (f"{name}_ids", f"{name}_mask"))
            embeds, mask = model.get_input_embeddings()(inputs[ids_name]), inputs[mask_name]
        labels = inputs["suffix_labels"] if name == "suffix" else torch.full_like(mask, -100)
        is_audio = torch.full_like(mask, name == "speech").bool()  # padding included, as in the original
        parts.append((embeds, mask, labels, is_audio))
    return Branch(*(torch.cat(column, dim=1) for column in zip(*parts, strict=True)))


def speech_branch(model, batch: str, heard: tuple[ReLLMAudioOutput, Tensor]) -> Branch:
    return branch(model, batch, ("start", "audio_instruction", "speech", "suffix"), heard)


def text_branch(model, batch: str) -> Branch:
    return branch(model, batch, ("start", "instruction", "input", "suffix"))


def generation_prompt(model, batch: str, heard: tuple[ReLLMAudioOutput, Tensor]) -> Branch:
    return branch(model, batch, ("gen.prefix", "speech", "gen.suffix"), heard)


def run_llm(model: ReLLMForConditionalGeneration, sequence: Branch, **kwargs):
    return model(
        inputs_embeds=sequence.inputs_embeds.to(model.dtype),
        attention_mask=sequence.attention_mask,
        position_ids=sequence.position_ids,
        audio_mask=sequence.audio_mask,
        **kwargs,
    )


def emotion_targets(batch: str) -> tuple[Tensor, Tensor]:
    """Class indices `(clips,)`, and the dimensions `(clips, 3)` in our order."""
    inputs = recorded(f"inputs_{batch}")
    return inputs["emotion_labels"], torch.stack([inputs[f"{name}_ans"] for name in DIMENSIONS], dim=1)


# Back to the original's names, by a table of its own

_LLM_MODULES = {
    "self_attn.q_proj": "attn.c_attn",
    "self_attn.k_proj": "attn.c_attn",
    "self_attn.v_proj": "attn.c_attn",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.w1",
    "mlp.gate_proj": "mlp.w2",
    "mlp.down_proj": "mlp.c_proj",
}
_PREFIXES = {
    "model.multi_modal_projector.conv_layers.": "w2v2cat_adapter.subsampler.conv_layers.",
    "model.multi_modal_projector.layer_norm.": "w2v2cat_adapter.speech_ln.",
    "model.multi_modal_projector.": "w2v2cat_adapter.",
    "model.emotion_head.": "hidden2emotion.",
    "model.text_model.model.layers.": "qwen_model.model.transformer.h.",
}


def in_original_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients or values of trainable parameters as the original has them.

    The original's fused projection has one LoRA A where ours has three: its gradient is the sum of the three.
    """
    original: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == "model.dimension_head.weight":
            rows = [DIMENSIONS.index(dimension) for dimension in DIMENSIONS_OF_ORIGINAL_TARGETS]
            original["hidden2w2v2.weight"] = tensor[rows]
            continue
        prefix = next(prefix for prefix in _PREFIXES if name.startswith(prefix))
        name = (_PREFIXES[prefix] + name.removeprefix(prefix)).replace(".relllm.", ".default.")
        for ours, theirs in _LLM_MODULES.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
        if name not in original:
            original[name] = tensor
        elif "lora_A" in name:
            original[name] = original[name] + tensor
        else:
            original[name] = torch.cat([original[name], tensor])
    return original
