"""Replies that are written together, by `generate` in turns: between two of them, rows that have ended leave."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)

from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration
from relllm.modeling.outputs_relllm import ReLLMAudioOutput
from relllm.modeling.releases_relllm import CACHE

from ..replies import GREEDY
from .decoding import BatchRow


class Group:
    """Rows with a cache. It begins with a pass over all that they have, so they may have written already."""

    def __init__(self, rows: list[BatchRow]) -> None:
        self.rows = rows
        self._ids = self._mask = torch.empty(0)  # (rows, sequence), padded on the left
        self._cache: DynamicCache | None = None

    def write(self, model: ReLLMForConditionalGeneration, has_others: Callable[[int], bool]) -> None:
        """Write until a row ends or `has_others` (of the number of tokens) says so; rows that have ended leave."""
        pad_token = self.rows[0].pad_token
        options = self._begin(model, pad_token) if self._cache is None else {}
        if written := min(row.num_tokens for row in self.rows):  # what a checkpoint asks of a reply's first tokens
            shortest = model.generation_config.min_new_tokens
            options |= {"begin_suppress_tokens": None, "min_new_tokens": shortest and max(0, shortest - written)}
        turn = _Turn(self.rows, has_others)
        self._ids = model.generate(
            input_ids=self._ids,
            attention_mask=self._mask,
            **{**GREEDY, **options, CACHE: self._cache, "use_cache": True, "cache_implementation": None},
            max_new_tokens=max(row.num_left for row in self.rows),
            pad_token_id=pad_token,
            logits_processor=LogitsProcessorList([_RowChoices(self.rows, model)]),
            stopping_criteria=StoppingCriteriaList([turn]),
        )
        if not turn.paused:  # a limit of the checkpoint's own came first
            for row in self.rows:
                row.end("length")
        self._drop_ended()

    def _begin(self, model: ReLLMForConditionalGeneration, pad_token: int) -> dict[str, object]:
        """Pad the rows; return their clips, in order, as `generate` takes them."""
        tokens = [torch.tensor(row.tokens, device=model.device) for row in self.rows]
        ones = [torch.ones_like(ids) for ids in tokens]
        self._ids = pad_sequence(tokens, batch_first=True, padding_value=pad_token, padding_side="left")
        self._mask = pad_sequence(ones, batch_first=True, padding_side="left")
        for row, own in zip(self.rows, tokens, strict=True):
            row.padding = self._ids.shape[1] - len(own)
        self._cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        clips = [clip for row in self.rows for clip in row.clips]
        return {"mm_encoder_outputs": {"audio": ReLLMAudioOutput(pooler_output=torch.cat(clips))}} if clips else {}

    def _drop_ended(self) -> None:
        self._mask = functional.pad(self._mask, (0, self._ids.shape[1] - self._mask.shape[1]), value=1)
        kept = [index for index, row in enumerate(self.rows) if not row.done]
        if len(kept) < len(self.rows):
            self.rows = [self.rows[index] for index in kept]
            chosen = torch.tensor(kept, dtype=torch.long, device=self._ids.device)
            self._ids, self._mask = self._ids[chosen], self._mask[chosen]
            if kept and self._cache is not None:
                self._cache.reorder_cache(chosen)


class _RowChoices(LogitsProcessor):
    """Has `generate`, which takes the most probable token, take what each row chooses.

    A checkpoint's repetition penalty is applied here: `generate` itself would apply it to the padding as well.
    """

    def __init__(self, rows: Sequence[BatchRow], model: ReLLMForConditionalGeneration) -> None:
        penalty = model.generation_config.repetition_penalty or 1.0
        self._rows = rows
        self._penalty = RepetitionPenaltyLogitsProcessor(penalty) if penalty != 1.0 else None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = []
        for index, row in enumerate(self._rows):
            tokens, own = input_ids[index : index + 1, row.padding :], scores[index : index + 1]
            chosen.append(row.choose(tokens, own if self._penalty is None else self._penalty(tokens, own)))
        return torch.cat(chosen)


class _Turn(StoppingCriteria):
    """Hands every row its new token, and ends `generate` once a row has ended or the group gives way."""

    def __init__(self, rows: Sequence[BatchRow], has_others: Callable[[int], bool]) -> None:
        self._rows, self._has_others = rows, has_others
        self._num_tokens, self.paused = 0, False

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            row.take(token)
        self._num_tokens += 1
        self.paused = any([row.done for row in self._rows]) or self._has_others(self._num_tokens)
        return torch.full((len(self._rows),), self.paused, device=input_ids.device)
