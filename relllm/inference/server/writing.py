"""Replies that are written together, by `generate` in turns: between two of them, rows that have ended leave."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration
from relllm.modeling.outputs_relllm import ReLLMAudioOutput
from relllm.modeling.releases_relllm import CACHE

from ..replies import GREEDY
from .decoding import Job

MASKED = 0  # any token: nobody attends to it


class Group:
    """Replies with a cache. It begins with a pass over all that they have, so they may have been begun already."""

    def __init__(self, rows: list[Job]) -> None:
        self.rows = rows
        self._ids = self._mask = torch.empty(0)  # (rows, sequence), padded on the left
        self._cache: DynamicCache | None = None

    def write(self, model: ReLLMForConditionalGeneration, has_others: Callable[[int], bool]) -> None:
        """Write until a row ends or `has_others` (of the number of tokens) says so; rows that have ended leave."""
        options = self._begin(model) if self._cache is None else {}
        if written := min(row.num_tokens for row in self.rows):  # what a checkpoint asks of a reply's first tokens
            shortest = model.generation_config.min_new_tokens
            options |= {"begin_suppress_tokens": None, "min_new_tokens": shortest and max(0, shortest - written)}
        self._has_others, self._turn_tokens = has_others, 0
        self._ids = model.generate(
            input_ids=self._ids,
            attention_mask=self._mask,
            **{**GREEDY, **options, CACHE: self._cache, "use_cache": True, "cache_implementation": None},
            max_new_tokens=max(row.num_left for row in self.rows),
            pad_token_id=MASKED,
            logits_processor=[self._choose],
            stopping_criteria=[self._take],
        )
        self._drop_ended()

    def _begin(self, model: ReLLMForConditionalGeneration) -> dict[str, object]:
        """Pad the rows; return their clips, in order, as `generate` takes them."""
        tokens = [torch.tensor(row.tokens, device=model.device) for row in self.rows]
        self._ids = pad_sequence(tokens, batch_first=True, padding_value=MASKED, padding_side="left")
        self._mask = pad_sequence([torch.ones_like(ids) for ids in tokens], batch_first=True, padding_side="left")
        for row in self.rows:
            row.padding = self._ids.shape[1] - len(row.tokens)
        self._cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        clips = [row.positions for row in self.rows if row.positions is not None]
        return {"mm_encoder_outputs": {"audio": ReLLMAudioOutput(pooler_output=torch.cat(clips))}} if clips else {}

    def _drop_ended(self) -> None:
        self._mask = functional.pad(self._mask, (0, self._ids.shape[1] - self._mask.shape[1]), value=1)
        kept = [index for index, row in enumerate(self.rows) if not row.ended]
        if len(kept) < len(self.rows):
            self.rows = [self.rows[index] for index in kept]
            chosen = torch.tensor(kept, dtype=torch.long, device=self._ids.device)
            self._ids, self._mask = self._ids[chosen], self._mask[chosen]
            if kept and self._cache is not None:
                self._cache.reorder_cache(chosen)

    def _choose(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Have `generate`, which takes the most probable token, take what each row chooses."""
        own = zip(self.rows, input_ids.split(1), scores.split(1), strict=True)
        return torch.cat([row.choose(ids[:, row.padding :], row_scores) for row, ids, row_scores in own])

    def _take(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        """Hand every row its new token, and end `generate` once a row has ended or the group gives way."""
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            row.take(token)
        self._turn_tokens += 1
        pauses = any(row.ended for row in self.rows) or self._has_others(self._turn_tokens)
        return torch.full((len(self.rows),), pauses, device=input_ids.device)
