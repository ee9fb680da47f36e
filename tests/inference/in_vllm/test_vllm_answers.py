"""vLLM's greedy tokens and their log-probabilities are those of `model.generate`, from checkpoints on disk."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import vllm
from transformers import CONFIG_MAPPING
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm_checkpoints import NEW_TOKENS, Answer, answer, conversations, hear_alone, load, save_checkpoint, score

from relllm import ReLLMConfig
from relllm.inference.vllm import register
from relllm.inference.vllm.vllm_engine import OfflineEngine
from relllm.inference.vllm.vllm_lora import StepScope, add_scoped_lora
from relllm.inference.vllm.vllm_model import check_llm
from relllm.inference.vllm.vllm_readings import waveform_key

TOLERANCE = 1e-4  # of a log-probability, in nats
SMALL = {"max_model_len": 1024, "max_num_seqs": 8, "kv_cache_memory_bytes": 64 * 2**20, "gpu_memory_utilization": 0.1}
CHUNKED = {"max_num_batched_tokens": 32, "max_num_seqs": 4, "enable_chunked_prefill": True}
CONFIGURATIONS = {
    "full windows": ({"full_window": True}, {}),
    "light, chunked prefill": ({"light": True}, CHUNKED),
    "qwen2, biases and an untied head": ({"family": "qwen2"}, {}),
    "phi3, fused on disk": ({"family": "phi3"}, {}),
    "helium, which vLLM has not": ({"family": "helium"}, {}),
    "two processes": ({}, {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}),
    "text scope": ({"lora_scope": "text"}, {}),
    "global scope, chunked prefill": ({"lora_scope": "global"}, CHUNKED),
    "fusion token, rsLoRA on some layers, with ranks of their own": (
        {
            "emotion_fusion": "token",
            "lora_std": 0.5,
            "lora": {
                **{"r": 4, "lora_alpha": 8, "use_rslora": True, "rank_pattern": {"v_proj": 2}},
                **{"target_modules": ["q_proj", "v_proj", "o_proj", "up_proj"], "layers_to_transform": [1]},
            },
        },
        {},
    ),
    "no fusion, wav2vec2 as the speech tower": ({"emotion_fusion": "none", "speech": "wav2vec2"}, {}),
}


@contextmanager
def engine(place: Path, **options: object) -> Iterator[LLM]:
    llm = LLM(model=str(place), **{"dtype": "float32", "enforce_eager": True, **SMALL, **options})
    try:
        yield llm
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def ask(llm: LLM, answers: list[Answer]) -> list[tuple[list[int], list[float]]]:
    """Tokens and their log-probabilities, all requests at once."""
    prompts = [
        {"prompt_token_ids": one.prompt, **({"multi_modal_data": {"audio": one.clips}} if one.clips else {})}
        for one in answers
    ]
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=0)
    outputs = [found.outputs[0] for found in llm.generate(prompts, sampling, use_tqdm=False)]
    return [
        (list(one.token_ids), [step[token].logprob for step, token in zip(one.logprobs, one.token_ids, strict=True)])
        for one in outputs
    ]


def compare(found: list[tuple[list[int], list[float]]], expected: list[Answer]) -> None:
    assert [tokens for tokens, _ in found] == [one.tokens for one in expected]
    for (_, logprobs), one in zip(found, expected, strict=True):
        assert logprobs == pytest.approx(one.logprobs, abs=TOLERANCE, rel=0)


@pytest.mark.parametrize(("checkpoint", "options"), CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_tokens_and_log_probabilities_are_generates(checkpoint: dict, options: dict, tmp_path: Path) -> None:
    place = save_checkpoint(tmp_path, **checkpoint)
    expected = [answer(place, messages) for messages in conversations()]
    acts_on_text = checkpoint.get("lora_scope", "audio") != "audio"
    assert all(one.tokens != one.bare for one in expected if one.clips or acts_on_text)  # else it would show nothing
    with engine(place, **options) as llm:
        compare(ask(llm, expected), expected)
        compare(ask(llm, expected[::-1]), expected[::-1])  # from the caches, in another order


def test_a_light_checkpoint_finds_a_tower_that_has_moved(tmp_path: Path) -> None:
    place = save_checkpoint(tmp_path, light=True)
    expected = [answer(place, messages) for messages in conversations()[:2]]
    (tmp_path / "llm").rename(tmp_path / "moved")
    with engine(place, hf_overrides={"towers": {"text_model": str(tmp_path / "moved")}}) as llm:
        compare(ask(llm, expected), expected)


def test_bfloat16_is_as_close_to_float32_as_our_own_is(tmp_path: Path) -> None:
    """Where two tokens are nearly as probable, rounding chooses: the log-probabilities of one answer are compared."""
    place = save_checkpoint(tmp_path, dtype=torch.bfloat16)
    expected = [answer(place, messages) for messages in conversations() if len(messages) > 1]
    asked = [messages for messages in conversations() if len(messages) > 1]
    ours, exact = (
        [score(place, messages, one.tokens, dtype) for messages, one in zip(asked, expected, strict=True)]
        for dtype in ("auto", "float32")
    )
    with engine(place, dtype="bfloat16") as llm:
        model = llm.llm_engine.model_executor.driver_worker.get_model()
        floats = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
        parts = ("multi_modal_projector", "emotion_head", "dimension_head", "scoped_a", "scoped_b")  # what trains
        assert floats == {name for name, _ in model.named_parameters() if any(part in name for part in parts)}
        model.suppresses = False  # our one pass does not either
        prompts = [{"prompt_token_ids": [*one.prompt, *one.tokens]} for one in expected]
        for prompt, one in zip(prompts, expected, strict=True):
            prompt |= {"multi_modal_data": {"audio": one.clips}} if one.clips else {}
        once = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        steps = [found.prompt_logprobs for found in llm.generate(prompts, once, use_tqdm=False)]
    found = [
        [step[token].logprob for step, token in zip(of_one[-len(one.tokens) :], one.tokens, strict=True)]
        for of_one, one in zip(steps, expected, strict=True)
    ]

    def apart(a: list[list[float]], b: list[list[float]]) -> float:
        return (torch.tensor(sum(a, [])) - torch.tensor(sum(b, []))).abs().mean().item()

    assert apart(found, ours) < 1.5 * apart(ours, exact) and apart(found, exact) < 1.5 * apart(ours, exact)


def test_readings_are_the_models_whatever_comes_when_after_they_were_forgotten_and_no_text_takes_a_clips_place(
    tmp_path: Path,
) -> None:
    place = save_checkpoint(tmp_path)
    expected = [answer(place, messages) for messages in conversations()]
    spoken = [one for one in expected if one.clips]
    clips = [clip for one in spoken for clip in one.clips]
    with engine(place) as llm:
        compare(ask(llm, expected), expected)
        compare(ask(llm, expected[::-1]), expected[::-1])  # from the caches, in another order
        keys = [waveform_key(clip) for clip in clips]
        (kept,) = llm.collective_rpc("relllm_readings", args=(keys,))
        llm.llm_engine.model_executor.driver_worker.get_model().readings._kept.clear()
        (forgotten,) = llm.collective_rpc("relllm_readings", args=(keys,))
        assert forgotten == [None] * len(keys)
        (again,) = llm.collective_rpc("relllm_hear", args=([clip.tobytes() for clip in clips],))
        typed = [*spoken[0].prompt, load(place)[0].config.audio_token_id]
        with pytest.raises(ValueError, match="2 audio placeholders, and 1 clips"):
            llm.generate({"prompt_token_ids": typed, "multi_modal_data": {"audio": spoken[0].clips}})
    for clip, *both in zip(clips, kept, again, strict=True):
        probabilities, dimensions = hear_alone(place, clip)
        for reading in both:
            emotion = torch.tensor(reading["emotion_logits"]).softmax(-1).tolist()
            assert emotion == pytest.approx(probabilities, abs=1e-5)
            assert reading["dimensions"] == pytest.approx(dimensions, abs=1e-5)


def test_a_lora_that_vllm_cannot_run_is_named(tmp_path: Path) -> None:
    place = save_checkpoint(tmp_path, lora={"r": 4, "lora_alpha": 8, "lora_bias": True, "target_modules": ["up_proj"]})
    with pytest.raises(ValueError, match="lora_bias"), engine(place):
        pass


@pytest.mark.parametrize(
    ("family", "own", "reason"),
    [
        ("falcon_h1", {}, "keeps a state"),
        ("gemma4_text", {"hidden_size_per_layer_input": 8}, "token ids in every layer"),
    ],
)
def test_an_llm_that_needs_more_than_embeddings_is_named(family: str, own: dict[str, int], reason: str) -> None:
    config = ReLLMConfig(text_config=CONFIG_MAPPING[family](**own))
    with pytest.raises(ValueError, match=f"{reason}.*relllm serve"):
        check_llm(config)


def test_a_layer_that_vllm_has_not_is_named(tmp_path: Path) -> None:
    model, _ = load(save_checkpoint(tmp_path))
    layers = model.model.text_model.lora_layers
    with pytest.raises(ValueError, match=r"14 layers with a LoRA, such as 'model\.layers\.0\.mlp\.down_proj'"):
        add_scoped_lora(torch.nn.Linear(2, 2), layers, StepScope(8, torch.float32), {})


def test_compiled_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = save_checkpoint(tmp_path)
    expected = [answer(place, messages) for messages in conversations()]
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    with engine(place, enforce_eager=False) as llm:
        compare(ask(llm, expected), expected)


def test_another_minor_version_is_a_sentence_and_other_models_go_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.33.1")
    register()
    assert "vLLM 0.33.1 is installed" in caplog.text and "0.32" in caplog.text
    with pytest.raises(ImportError, match=r"vLLM 0\.33\.1 is installed"):
        OfflineEngine("anything")
