"""Transformers' own pipeline on a checkpoint of ours: a batch replies as its conversations do one by one."""

from pathlib import Path

import pytest
import torch
from tiny_models import clip, conversation_inputs, tiny_config, tiny_model, tiny_processor, user_turn
from transformers import Pipeline, pipeline

SETTINGS = {"generate_kwargs": {"max_new_tokens": 8, "min_new_tokens": 8}, "return_full_text": False}
SHORT = [[user_turn(clip(1.0), "Hi.")], [user_turn("How do I sound? ", clip(1.7))], [user_turn(clip(0.4), "And now?")]]
BATCHES = {
    "clips": SHORT,
    "a clip of three windows, a turn without audio, two clips": [
        *SHORT[:1],
        [user_turn(clip(5.0), "Hi.")],
        [user_turn("No audio here.")],
        [user_turn(clip(0.5), clip(2.5))],
    ],
}


@pytest.fixture(scope="module", params=[True, False], ids=["full window", "cheap"])
def pipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("checkpoint")
    config = tiny_config()
    tiny_model(config).save_pretrained(folder)
    processor = tiny_processor(config, full_window=request.param)
    processor.tokenizer(["a", "a longer text"], padding=True, padding_side="right")  # as training leaves it
    processor.save_pretrained(folder)
    try:
        return pipeline("any-to-any", model=str(folder), device="cpu")
    except ImportError as error:
        if "librosa" not in str(error):  # which 5.18 and 5.19 want
            raise
        pytest.skip(f"this release of Transformers wants more packages for it: {error}")


def by_hand(pipe: Pipeline, conversation: list) -> str:
    inputs = conversation_inputs(pipe.processor, conversation)
    output = pipe.model.generate(**inputs, **SETTINGS["generate_kwargs"])
    return pipe.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("beams", [1, 2])
def test_a_batch_replies_as_its_conversations_alone(pipe: Pipeline, kind: str, beams: int) -> None:
    conversations = BATCHES[kind]
    settings = {**SETTINGS, "generate_kwargs": {**SETTINGS["generate_kwargs"], "num_beams": beams}}
    alone = [pipe(text=conversation, **settings)[0]["generated_text"] for conversation in conversations]
    batch = pipe(text=conversations, batch_size=len(conversations), **settings)
    assert [row[0]["generated_text"] for row in batch] == alone and len(set(alone)) > 1
    if beams == 1:
        assert alone == [by_hand(pipe, conversation) for conversation in conversations]


def test_prompts_with_their_clips_are_batched_as_well_and_read_by_the_one_reader(pipe: Pipeline, tmp_path: Path):
    prompts = [
        {"text": "<|audio|> Hi.", "audio": (clip(1.0, rate=8_000), 8_000)},
        {"text": "<|audio|> How do I sound to you?", "audio": {"array": clip(3.0), "sampling_rate": 16_000}},
    ]
    batch = pipe(prompts, batch_size=2, **SETTINGS)
    for prompt, row in zip(prompts, batch, strict=True):
        inputs = pipe.processor(**prompt)
        output = pipe.model.generate(**inputs, **SETTINGS["generate_kwargs"])
        expected = pipe.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert row[0]["generated_text"] == expected


def test_inputs_that_no_pipeline_has_marked_keep_their_tensors(pipe: Pipeline) -> None:
    inputs = conversation_inputs(pipe.processor, SHORT[0])
    assert isinstance(inputs["input_features"], torch.Tensor) and "audio_items" not in inputs
