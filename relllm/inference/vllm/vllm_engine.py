"""vLLM without a server, for many requests at once: what `relllm evaluate` and `relllm write-targets` ask."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from vllm import LLM, SamplingParams

from relllm.data.data_settings import Sampling
from relllm.data.replies.writers import LocalWriter
from relllm.modeling.outputs_relllm import ReLLMAudioOutput

from . import check_vllm
from .vllm_readings import AT_ONCE, gather_readings, waveform_key

Clips = Sequence[Sequence[np.ndarray]]  # of each prompt


class OfflineEngine:
    """A ReLLM or any causal LM in vLLM; `arguments` is JSON: further arguments of `vllm.LLM`."""

    def __init__(
        self, model: str, *, revision: str = "main", dtype: str = "auto", arguments: str | None = None
    ) -> None:
        check_vllm()
        self.config: Any = AutoConfig.from_pretrained(model, revision=revision)
        if dtype == "auto":  # of vLLM's own, float32 becomes half precision
            dtype = str(self.config.dtype or torch.float32).removeprefix("torch.")
        options = {"dtype": dtype, "revision": revision, **json.loads(arguments or "{}")}
        self.llm = LLM(model=model, **options)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        clips: Clips | None = None,
        *,
        seeds: Sequence[int] | None = None,
        **sampling: Any,
    ) -> list[list[int]]:
        """Return the tokens that follow each prompt, greedily unless `sampling`, of `SamplingParams`, says otherwise.

        `prompts` are token ids with one placeholder a clip; the token of an end is a part of an answer.
        """
        options = {"temperature": 0.0, **sampling}
        each = [SamplingParams(**options, seed=seeds and seeds[index]) for index in range(len(prompts))]
        found = self._run(prompts, clips, each)
        return [list(one.outputs[0].token_ids) for one in found]

    def score(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], clips: Clips | None = None
    ) -> Tensor:
        """Return the log-probability of each answer to each prompt, `(prompts, answers)`, as `score_answers` does."""
        asked = [[*prompt, *answer] for prompt in prompts for answer in answers]
        heard = None if clips is None else [own for own in clips for _ in answers]
        once = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        try:  # the placeholder is as likely as the LLM finds it: our own scores do not take it away either
            self._suppress(False)
            found = self._run(asked, heard, [once] * len(asked))
        finally:
            self._suppress(True)
        sums = []
        for index, one in enumerate(found):
            answer = answers[index % len(answers)]
            steps = one.prompt_logprobs[-len(answer) :]
            sums.append(sum(step[token].logprob for step, token in zip(steps, answer, strict=True)))
        return torch.tensor(sums).reshape(len(prompts), len(answers))

    def hear(self, clips: Sequence[np.ndarray]) -> ReLLMAudioOutput:
        """Return what the heads read in each clip; the towers run for those that no prompt has brought before."""
        keys = [waveform_key(clip) for clip in clips]
        known = self.llm.collective_rpc("relllm_readings", args=(keys,))[0]
        unknown = [index for index, reading in enumerate(known) if reading is None]
        for start in range(0, len(unknown), AT_ONCE):
            some = unknown[start : start + AT_ONCE]
            waveforms = [np.ascontiguousarray(clips[index], np.float32).tobytes() for index in some]
            heard = self.llm.collective_rpc("relllm_hear", args=(waveforms,))[0]
            for index, reading in zip(some, heard, strict=True):
                known[index] = reading
        return gather_readings(known)

    def _suppress(self, suppresses: bool) -> None:
        if self.config.model_type == "relllm":
            self.llm.collective_rpc("relllm_suppress", args=(suppresses,))

    def _run(self, prompts: Sequence[Sequence[int]], clips: Clips | None, sampling: list[Any]) -> list[Any]:
        heard = [{}] * len(prompts) if clips is None else [{"multi_modal_data": {"audio": list(own)}} for own in clips]
        asked = [{"prompt_token_ids": list(ids), **audio} for ids, audio in zip(prompts, heard, strict=True)]
        return self.llm.generate(asked, sampling, use_tqdm=False)


def read_generation_settings(model: str, revision: str) -> GenerationConfig:
    """Return a checkpoint's settings of generation, as Transformers reads them."""
    try:
        return GenerationConfig.from_pretrained(model, revision=revision)
    except OSError:  # it has no such file
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(model, revision=revision))


class VllmWriter(LocalWriter):
    """A chat LLM in vLLM that writes the replies to learn; what is written does not depend on the batch."""

    engine: OfflineEngine

    @classmethod
    def from_pretrained(cls, name: str, sampling: Sampling, **options: Any) -> "VllmWriter":
        """Load a model, of `revision`, into an [`OfflineEngine`] with its `arguments`, and its tokenizer."""
        batch_size, revision = options.pop("batch_size"), options["revision"]
        writer = cls.__new__(cls)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        writer.prepare(read_generation_settings(name, revision), tokenizer, sampling, batch_size)
        writer.engine = OfflineEngine(name, **options)
        return writer

    def _generate(self, prompts: list[list[int]], number: int) -> list[tuple[str, bool]]:
        asked: dict[str, Any] = {"max_tokens": self.sampling.max_new_tokens, "stop_token_ids": self._ends}
        asked["repetition_penalty"] = self.settings.repetition_penalty or 1.0
        if self.sampling.temperature:
            first = self.sampling.seed + number * self.batch_size
            # What the settings leave out is as in `generate`, which draws from the 50 most probable tokens.
            drawn: dict[str, Any] = {"temperature": self.sampling.temperature, "min_p": self.settings.min_p or 0.0}
            drawn["top_k"] = 50 if self.settings.top_k is None else self.settings.top_k
            drawn["top_p"] = 1.0 if self.settings.top_p is None else self.settings.top_p
            replies = self.engine.generate(prompts, seeds=range(first, first + len(prompts)), **asked, **drawn)
        else:
            replies = self.engine.generate(prompts, **asked)
        texts = self.tokenizer.batch_decode(replies, skip_special_tokens=True)
        return [(text, not set(self._ends).isdisjoint(reply)) for text, reply in zip(texts, replies, strict=True)]
