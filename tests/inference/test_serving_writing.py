"""`server.writing`: replies in turns, rows that leave and groups that begin again, against `generate` alone."""

import threading

import pytest
import torch
from llm_families import family_config
from tiny_models import tiny_config, tiny_model, tiny_processor, tiny_tokenizer

from relllm.inference.inference_settings import BatchSettings
from relllm.inference.server.engine import Engine
from relllm.inference.server.schema import ReplyOptions
from relllm.inference.server.writing import Ended, Group, Job, Prompt

PROMPTS = ([5, 9, 40, 41], list(range(30, 70)), list(range(7, 18)))
LENGTHS = (3, 9, 20)


@pytest.mark.parametrize("family", ["llama", "gemma2", "jamba", "qwen3_next"])  # plain, sliding windows, with states
@torch.no_grad()
def test_replies_in_turns_are_those_of_each_alone(family: str) -> None:
    config = tiny_config(fusion="none")
    config.text_config = family_config(family)
    model = tiny_model(config)
    model.generation_config.eos_token_id = None
    rows, expected = [], []
    for ids, length in zip(PROMPTS, LENGTHS, strict=True):
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        expected.append(model.generate(**inputs, do_sample=False, max_new_tokens=length)[0].tolist())
        rows.append(Job(Prompt(token_ids=list(ids), options=ReplyOptions(max_tokens=length)), lambda _: None))
        rows[-1].begin(model, tiny_tokenizer())
    group, turns = Group(list(rows)), 0
    while group.rows:
        group.write(model, lambda written: written >= 5)
        turns += 1
        if turns == 4:
            group = Group(group.rows)  # as after a failure, or together with others
    assert turns == 6 and [row.tokens for row in rows] == expected


def test_many_short_replies_behind_long_ones_are_begun_without_reading_prompts_again_and_again() -> None:
    model, read, ended = tiny_model(), [], []
    model.generation_config.eos_token_id = None
    step = model.model.text_model.register_forward_pre_hook(
        lambda _, args, options: read.append(options["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    engine, done = Engine(model, tiny_processor(), BatchSettings(max_queue=99)), threading.Event()
    prompts = [Prompt(token_ids=[9] * 30, options=ReplyOptions(max_tokens=n)) for n in (60, 60, *range(5, 12)) * 5]

    def emit(event: object) -> None:
        ended.extend([event] if isinstance(event, Ended) else [])
        if len(ended) == len(prompts):
            done.set()

    engine.start()
    for prompt in prompts:
        engine.submit(prompt, emit)
    assert done.wait(60)
    engine.stop()
    engine.join(10)
    step.remove()
    again = sum(rows * length for rows, length in read if length > 1) / (30 * len(prompts))
    assert 1 <= again < 1.5  # and 3 where each begins once there is a row


def test_short_replies_begin_beside_long_ones_though_few_rows_are_free() -> None:
    model, order, done = tiny_model(), [], threading.Event()
    model.generation_config.eos_token_id = None
    engine = Engine(model, tiny_processor(), BatchSettings(max_batch_size=16))

    def ask(length: int) -> None:
        def emit(event: object) -> None:
            order.extend([length] if isinstance(event, Ended) else [])
            if len(order) == 17:
                done.set()

        engine.submit(Prompt(token_ids=[9] * 30, options=ReplyOptions(max_tokens=length)), emit)

    writes = threading.Event()
    step = model.model.text_model.register_forward_pre_hook(lambda *_: writes.set())
    engine.start()
    for _ in range(13):
        ask(120)
    assert writes.wait(10)
    step.remove()
    for _ in range(4):  # a quarter of the rows, and one more than are free
        ask(3)
    assert done.wait(60)
    engine.stop()
    engine.join(10)
    assert order == [3] * 4 + [120] * 13
