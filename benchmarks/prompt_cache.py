"""A turn of a conversation with the cache over turns, against the same turn read from the start.

A `Conversation` keeps each clip's positions and the LLM's key-value cache. The turn without it is what `generate`
does with the whole conversation: every clip is encoded again and every position read again. Both write the same
reply, whose tokens are given; timed are the first token and the whole turn.
"""

import statistics

import torch
from harness import figure, read_clock, report
from reference import REPLY, build_model, build_processor, clips
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from relllm import ReLLMForConditionalGeneration, ReLLMProcessor
from relllm.inference.conversation import Conversation


class Stopwatch(BaseStreamer):
    """Notes when the first token of a reply comes."""

    def __init__(self) -> None:
        self.start, self.put_calls, self.first_token = read_clock(), 0, 0.0

    def put(self, value: Tensor) -> None:
        self.put_calls += 1
        if self.put_calls == 2:  # the prompt comes first
            self.first_token = read_clock() - self.start

    def end(self) -> None:
        self.turn = read_clock() - self.start


def main(*, quick: bool = False) -> None:
    turns, rounds = (2, 1) if quick else (10, 3)
    model = build_model(quick=quick)
    processor = build_processor(model, full_window=False)
    waveforms = clips(turns, 5.0)
    converse(model, processor, waveforms[:2])  # warms up
    timed = [converse(model, processor, waveforms) for _ in range(rounds)]
    rows = []
    for number in range(turns):
        of_turn = [conversation[number] for conversation in timed]
        medians = {name: statistics.median(seconds[name] for seconds in of_turn) for name in of_turn[0]}
        for what, goal in (("first token", "<= 0.2"), ("turn", "<= 0.5")):
            kept, afresh = medians[f"{what}, kept"], medians[f"{what}, afresh"]
            rows.append(
                figure(
                    f"turn {number + 1}, {what}: with the cache / without",
                    kept / afresh,
                    goal if number == turns - 1 else "",
                    seconds=kept,
                    without_s=afresh,
                )
            )
    tokens = len(processor.tokenizer.encode(REPLY)) + 1
    about = f"{turns} turns of 5 s, replies of {tokens} tokens, reference sizes, float32, median of {rounds}"
    report("prompt_cache", rows, about=about)


@torch.no_grad()
def converse(
    model: ReLLMForConditionalGeneration, processor: ReLLMProcessor, waveforms: list
) -> list[dict[str, float]]:
    """Seconds of each turn of one conversation, to the first token and in all, kept and afresh."""
    conversation = Conversation(model, processor)
    seconds = []
    for waveform in waveforms:
        kept = Stopwatch()
        conversation.say(waveform, streamer=kept, **given_reply(processor))
        afresh = Stopwatch()
        inputs = processor.apply_chat_template(
            conversation.messages[:-1], tokenize=True, return_dict=True, add_generation_prompt=True
        )
        model.generate(**inputs.to(model.device), streamer=afresh, do_sample=False, **given_reply(processor))
        seconds.append(
            {
                "first token, kept": kept.first_token,
                "first token, afresh": afresh.first_token,
                "turn, kept": kept.turn,
                "turn, afresh": afresh.turn,
            }
        )
    return seconds


def given_reply(processor: ReLLMProcessor) -> dict[str, object]:
    """Options that have `generate` write `REPLY`, so that its text encodes to the tokens that were written."""
    tokens = [*processor.tokenizer.encode(REPLY), processor.tokenizer.eos_token_id]
    prompt: list[int] = []

    def allowed(_row: int, ids: Tensor) -> list[int]:
        prompt.append(len(ids))
        return [tokens[len(ids) - prompt[0]]]

    return {"prefix_allowed_tokens_fn": allowed, "max_new_tokens": len(tokens)}


if __name__ == "__main__":
    main()
