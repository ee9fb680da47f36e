"""A path is never taken for a Hub id, nor a Hub id for a path."""

from pathlib import Path

import pytest

from relllm import ReLLMForConditionalGeneration
from relllm.data.loading import load_corpus
from relllm.modeling.places_relllm import PlaceError, check_place


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "runs" / "demo" / "re-llm").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "re-llm" / "config.json").write_text("{}")
    (tmp_path / "openai" / "whisper-large-v2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


@pytest.mark.parametrize("name", ["runs/demo/re-lm", "run/demo/re-llm", "./runs/dmo/re-llm"])
def test_a_mistyped_part_finds_what_is_there(here: Path, name: str) -> None:
    with pytest.raises(PlaceError, match=rf"No folder {name}; there is runs/demo/re-llm\."):
        check_place(name, holds="config.json")


@pytest.mark.parametrize("name", ["org/model", "gpt2", "Qwen/Qwen2.5-7B-Instruct", "runs/demo/re-llm"])
def test_ids_and_what_is_there_pass(here: Path, name: str) -> None:
    check_place(name, holds="config.json")


def test_an_id_that_looks_like_a_path_is_known_by_the_cache(here: Path) -> None:
    with pytest.raises(PlaceError, match="`hf download openai/whisper-tiny --repo-type model` it first"):
        check_place("openai/whisper-tiny")
    (here / "hub" / "models--openai--whisper-tiny").mkdir(parents=True)
    check_place("openai/whisper-tiny")


def test_a_folder_above_a_checkpoint_names_it(here: Path) -> None:
    with pytest.raises(PlaceError, match="runs/demo is no folder with a config.json; there is runs/demo/re-llm"):
        check_place("runs/demo", holds="config.json")


def test_from_python_towers_checkpoints_and_data_are_looked_for_alike(here: Path) -> None:
    for load in (
        lambda: ReLLMForConditionalGeneration.from_towers(audio="a/b", text="runs/demo/re-lm", emotion=None),
        lambda: ReLLMForConditionalGeneration.from_pretrained("runs/demo/re-lm"),
        lambda: load_corpus("runs/demo/re-lm"),
    ):
        with pytest.raises(PlaceError, match="there is runs/demo/re-llm"):
            load()
