"""The README's Python, run from top to bottom on tiny models, and the files that the documents name."""

import re
from pathlib import Path

import pytest
import soundfile
import torch
from datasets import Dataset
from tiny_models import (
    clip,
    tiny_emotion_tower,
    tiny_llm,
    tiny_model,
    tiny_processor,
    tiny_speech_tower,
    tiny_tokenizer,
)

import relllm

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
README = (ROOT / "README.md").read_text(encoding="utf-8")
# What needs the Hub or a long run, and what stands in for it here.
STAND_INS = {
    "https://…/second.flac": "second.flac",
    "openai/whisper-large-v2": "towers/whisper",
    "audeering/wav2vec2-large-robust-12-ft-emotion-msp-dim": "towers/emotion",
    "Qwen/Qwen2.5-7B-Instruct": "towers/llm",
    'output_dir="runs/re-llm"': 'output_dir="runs/re-llm", max_steps=1, use_cpu=True, report_to="none"',
    'model.push_to_hub("org/re-llm")': 'model.save_pretrained("with-code")',
    'processor.push_to_hub("org/re-llm")': 'processor.save_pretrained("with-code")',
}


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_speech_tower("whisper").save_pretrained("towers/whisper")
    tiny_emotion_tower().save_pretrained("towers/emotion")
    tiny_llm().to(torch.bfloat16).save_pretrained("towers/llm")  # as LLMs are published, over float32 towers
    tiny_tokenizer(audio_token=False).save_pretrained("towers/llm")
    for name in ("question.wav", "first.wav", "second.flac"):
        soundfile.write(name, clip(0.5), 16_000)
    row = {"audio": "question.wav", "response": "Tell me more.", "emotion": "sad", "arousal": 0.3}
    rows = [{"id": f"{index}", **row} for index in range(16)]
    names = {"waveform": clip(0.5, rate=44_100), "dataset": Dataset.from_list(rows)}
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 6
    for written, stand_in in STAND_INS.items():
        blocks = [block.replace(written, stand_in) for block in blocks]
    tiny_processor().save_pretrained("runs/demo/re-llm")
    try:
        for dtype, run in ((torch.bfloat16, blocks[:3]), (torch.float32, blocks)):  # those that load a checkpoint
            tiny_model().to(dtype).save_pretrained("runs/demo/re-llm")
            for block in run:
                exec(compile(block, "README.md", "exec"), names)
            assert names["heard"].dimensions.dtype == torch.float32 and names["heard"].dimensions.isfinite().all()
    finally:
        relllm.register_for_auto_class(False)
    assert Path("with-code/modeling_relllm.py").exists() and not Path("re-llm/modeling_relllm.py").exists()
    assert Path("runs/re-llm/model.safetensors").exists()


DOCUMENTS = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
PLACES = "relllm|tests|docs|recipes|ablations|accelerate|benchmarks|scripts|examples|model_cards"
ELSEWHERE = {  # what benchmarks write, and files of the original code
    "benchmarks/results/NAME.json",
    "benchmarks/results/gpu.json",
    "scripts/train_pretrain.sh",
    "scripts/train_emotion.sh",
}
ROOMS = "modeling|processing|training|inference|evaluation|data|hub|demo|cli"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_the_documents_name_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    named = set(re.findall(rf"`((?:{PLACES})/[\w./*-]+)", text)) - ELSEWHERE
    named |= set(re.findall(rf"`((?:{ROOMS})/[a-z_/]+\.py)`", text))
    named |= {target for target in re.findall(r"\]\(((?!http)[^)#]+)\)", text)}
    places = (ROOT, ROOT / "relllm", RECIPES, (ROOT / document).parent)
    assert [name for name in sorted(named) if not any(any(place.glob(name)) for place in places)] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_sections_that_the_documents_name_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for page, section in re.findall(r"\]\(((?!http)[^)#]*)#([^)]+)\)", text):
        path = (ROOT / document).parent / page if page else ROOT / document
        headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert section in {re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in headings}


def test_the_file_tree_names_every_room_recipe_and_page():
    tree = re.search(r"## Files\n\n```\n(.*?)```", README, flags=re.DOTALL).group(1)
    package = ROOT / "relllm"
    names = {f"{path.parent.name}/" for path in package.rglob("*.py") if path.parent != package}
    names |= {path.name for path in package.glob("*.py") if path.name != "__init__.py"}
    names |= {f"{path.name}/" for path in RECIPES.iterdir() if path.is_dir()}
    names |= {path.stem for path in RECIPES.glob("*.yaml")} | {path.name for path in (ROOT / "docs").glob("*.md")}
    assert names - set(re.findall(r"[\w.]+/?", tree)) == set()


def test_the_table_of_recipes_names_each():
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w/*]+\.yaml)` \|", text, flags=re.MULTILINE)
    assert {path for row in rows for path in RECIPES.glob(row)} == set(RECIPES.rglob("*.yaml"))


def test_the_architecture_says_where_every_file_is():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = re.search(r"## Where things are\n(.*?)\n## ", text, flags=re.DOTALL)[1]
    package = ROOT / "relllm"
    files = {str(path.relative_to(package)) for path in package.rglob("*.py") if not path.name.startswith("__")}
    assert set(re.findall(r"`([a-z_/]+\.py)`", table)) == files | {"__init__.py"}
