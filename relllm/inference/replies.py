"""Using a trained model: replies to spoken turns, emotions of many clips, and how likely given answers are."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from relllm.labels import DIMENSIONS
from relllm.modeling.configuration_relllm import ReLLMConfig
from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration
from relllm.modeling.outputs_relllm import ReLLMAudioOutput
from relllm.modeling.releases_relllm import CACHE
from relllm.processing.audio_relllm import AudioSource
from relllm.processing.processing_relllm import ReLLMProcessor

EMOTION = "p_"  # before the name of an emotion: the column of its probability
TOWER = "tower_"  # before the name of a dimension: the column of the emotion tower's own reading
# Whatever sampling or penalty a checkpoint's generation settings have: a measured answer is the most probable one.
GREEDY = {
    **{"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0},
    **dict.fromkeys(("temperature", "top_p", "top_k")),
}
# Where Transformers compiles the decode step of a static cache by itself; elsewhere such a cache gains nothing.
COMPILES_ON = ("cuda", "xpu")
# An H200 compiles for 37 s, and is 18 ms a step faster afterwards: from so many steps on that has paid.
COMPILING_PAYS = 2000
CACHE_STEP = 512  # positions by which a static cache grows
OF_CACHES = (
    *("cache_implementation", "past_key_values", "cache", "use_cache"),
    *("assistant_model", "prompt_lookup_num_tokens"),  # which take tokens back
)


@dataclass
class Heard:
    """What the model makes of one clip, by its two heads; what these were never taught is left out."""

    probabilities: dict[str, float]  # by emotion
    dimensions: dict[str, float]  # arousal, dominance and valence, about 0 to 1
    tower_dimensions: dict[str, float] = field(default_factory=dict)  # the emotion tower's own, where there is one

    @property
    def emotion(self) -> str | None:
        """Return the most probable emotion; `None` from a head that was not trained."""
        return max(self.probabilities, key=self.probabilities.__getitem__, default=None)

    def flatten(self) -> dict[str, float]:
        """Return every number by its column in a table: `p_happy`, …, `arousal`, …, `tower_arousal`, …."""
        named = {f"{EMOTION}{name}": value for name, value in self.probabilities.items()}
        return named | self.dimensions | {f"{TOWER}{name}": value for name, value in self.tower_dimensions.items()}

    def fields(self) -> dict[str, object]:
        """Return what a server answers of the clip."""
        return {"emotion": self.emotion, "probabilities": self.probabilities, "dimensions": self.dimensions}

    def __str__(self) -> str:
        emotion = [f"{self.emotion} {self.probabilities[self.emotion]:.0%}"] if self.emotion is not None else []
        readings = [*emotion, *(f"{name} {value:.2f}" for name, value in self.dimensions.items())]
        return "  ".join(readings) or "no emotion: the heads were not trained"


@dataclass
class Reply:
    """An answer to one turn: its text, and what was heard in the turn's clip (`None` for a typed turn)."""

    text: str
    heard: Heard | None
    dropped: int = 0  # older turns that the LLM does not read any more

    def describe(self) -> dict[str, object]:
        """Return the reply and what was heard, as JSON has it."""
        if self.heard is None:
            return {"reply": self.text}
        return {"reply": self.text, "emotion": self.heard.emotion, **vars(self.heard)}


@torch.no_grad()
def hear(
    model: ReLLMForConditionalGeneration,
    processor: ReLLMProcessor,
    clips: Sequence[AudioSource],
    *,
    batch_size: int = 16,
) -> Iterator[Heard]:
    """Yield the emotion and the dimensions of many clips, in order, `batch_size` encoded at once. No LLM runs."""
    for start in range(0, len(clips), batch_size):
        inputs = processor.feature_extractor(list(clips[start : start + batch_size]))
        inputs.pop("num_audio_tokens", None)
        yield from read_heard(model.config, model.get_audio_features(**inputs.to(model.device), return_dict=True))


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    *,
    audio: ReLLMAudioOutput | None = None,
    max_new_tokens: int = 128,
    **options: object,
) -> Tensor:
    """Return the greedy answers `(batch, tokens)` of a ReLLM or any causal LM, without the checkpoint's penalties.

    `inputs` are `input_ids` and `attention_mask` `(batch, sequence)`, padded on the left; `audio`, encoded before,
    fills the placeholders.
    """
    encoded = {"mm_encoder_outputs": {"audio": audio}} if audio is not None else {}
    options = {**GREEDY, **options, "max_new_tokens": max_new_tokens}
    if length := static_length(model, inputs["input_ids"], options):
        known = {"max_cache_len": length} if "max_cache_len" in vars(model.generation_config) else {}
        options |= {"cache_implementation": "static", **known}
    output = model.generate(**inputs, **encoded, **options)
    written = output[:, inputs["input_ids"].shape[1] :]
    count_steps(model, written.shape[1])
    return written


def static_length(model: PreTrainedModel, input_ids: Tensor, options: Mapping[str, object]) -> int | None:
    """Return how long the static cache is with which `generate` is to write by these options, if it is to.

    On an accelerator only, whose Transformers compiles it, and from when a model has written for as long as that
    takes ([`count_steps`]); a longer one waits for as many steps again. `None` for another number of rows than at
    first, as each is compiled for itself; where the LLM, or its quantization, cannot be compiled; outside the main
    thread, as the graphs that PyTorch captures are one thread's; and where the options or `model.generation_config`
    say something of caches (`cache_implementation` `"dynamic"` is what a CPU has) or of compiling.
    """
    own = model.generation_config
    llm = getattr(model.base_model, "text_model", model)
    asked = own.cache_implementation or own.prompt_lookup_num_tokens or own.use_cache is False
    asked = asked or options.get("disable_compile", own.disable_compile)
    if asked or not llm._can_compile_fullgraph or any(name in options for name in OF_CACHES):
        return None
    quantizers = (getattr(part, "hf_quantizer", None) for part in (model, llm))
    if not all(quantizer is None or quantizer.is_compileable for quantizer in quantizers):
        return None
    if model.device.type not in COMPILES_ON or len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return None
    if threading.current_thread() is not threading.main_thread():
        return None
    rows, longest = len(input_ids), input_ids.shape[1] + int(options["max_new_tokens"])  # type: ignore[call-overload]
    longest = -(-longest // CACHE_STEP) * CACHE_STEP
    state = model.__dict__.setdefault("static_cache", {"rows": rows, "steps": 0, "length": 0})
    if rows != state["rows"]:
        return None
    if longest > state["length"]:  # each is compiled anew
        if state["steps"] < COMPILING_PAYS:
            return None
        state |= {"steps": 0, "length": longest}
    return state["length"]


def count_steps(model: PreTrainedModel, steps: int) -> None:
    """Count the tokens that a reply of `model` took: after enough of them [`static_length`] gives a length."""
    if state := model.__dict__.get("static_cache"):
        state["steps"] += steps


@torch.no_grad()
def score_answers(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    answers: Sequence[Sequence[int]],
    *,
    audio: ReLLMAudioOutput | None = None,
) -> Tensor:
    """Return the log-probability of each answer to each prompt, `(batch, answers)`, in nats: the sum over its tokens.

    The prompt, as in [`generate_answers`], runs once; all answers go on from its cache in one batch, token by token as
    a reply does: several at once would begin the state of some hybrids (Jamba, Zamba) anew. End each answer with the
    end of the turn: a sum over "sad" alone would count "sadness" as well.
    """
    if not all(answers):
        raise ValueError(f"Expected at least one token in every answer, got {[list(answer) for answer in answers]}.")
    encoded = {"mm_encoder_outputs": {"audio": audio}} if audio is not None else {}
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    kept = {"use_cache": True, "logits_to_keep": 1, **encoded}
    prompt = model(input_ids=inputs["input_ids"], attention_mask=mask, position_ids=positions, **kept)
    batch, device = mask.shape[0], mask.device
    lengths = torch.tensor([len(answer) for answer in answers], device=device)
    longest = int(lengths.max())
    padded = torch.tensor([[*answer, *[answer[-1]] * (longest - len(answer))] for answer in answers], device=device)
    tokens = padded.repeat(batch, 1)  # (batch * answers, longest): all answers of the first prompt, then the next
    valid = (torch.arange(longest, device=device) < lengths[:, None]).repeat(batch, 1)
    logits = prompt.logits[:, -1:].repeat_interleave(len(answers), dim=0)
    if longest > 1:
        cache, seen = getattr(prompt, CACHE), mask.repeat_interleave(len(answers), dim=0)
        cache.reorder_cache(torch.arange(batch, device=device).repeat_interleave(len(answers)))  # states as well
        kept = {"use_cache": True, CACHE: cache}
        for token in tokens[:, :-1, None].unbind(1):
            seen = functional.pad(seen, (0, 1), value=1)
            step = model(input_ids=token, attention_mask=seen, position_ids=seen.sum(-1, keepdim=True) - 1, **kept)
            logits = torch.cat([logits, step.logits], dim=1)
    scores = logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]  # (batch * answers, longest)
    return (scores * valid).sum(-1).reshape(batch, len(answers))


def read_heard(config: ReLLMConfig, encoded: ReLLMAudioOutput) -> list[Heard]:
    """Return what was heard in each clip that `get_audio_features` of a model so configured encoded, in order."""
    assert encoded.emotion_logits is not None and encoded.dimensions is not None  # the heads always run
    probabilities = encoded.emotion_logits.float().softmax(-1).tolist()
    trained = ("emotion", *DIMENSIONS) if config.trained_readings is None else config.trained_readings
    of_tower = [()] * len(probabilities) if encoded.tower_dimensions is None else encoded.tower_dimensions.tolist()
    known = () if config.emotion_config is None else config.emotion_config.trained_dimensions  # type: ignore[union-attr]
    return [
        Heard(
            dict(zip(config.emotion_labels, row, strict=True)) if "emotion" in trained else {},
            {name: value for name, value in zip(DIMENSIONS, values, strict=True) if name in trained},
            {name: value for name, value in zip(DIMENSIONS, own, strict=False) if name in known},
        )
        for row, values, own in zip(probabilities, encoded.dimensions.float().tolist(), of_tower, strict=True)
    ]
