"""The README's Python, run from top to bottom on tiny models, and its file tree held against the package."""

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


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_the_documents_name_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:modeling|processing|training|evaluation|data|hub|cli)/[a-z_]+\.py)`", text))
    named |= {target for target in re.findall(r"\]\(((?!http)[^)#]+)\)", text)}
    places = (ROOT, ROOT / "relllm", (ROOT / document).parent)
    missing = [name for name in named if not any((place / name).exists() for place in places)]
    assert not missing


def test_the_file_tree_names_every_room():
    tree = re.search(r"## Files\n\n```\n(.*?)```", README, flags=re.DOTALL).group(1)
    package = ROOT / "relllm"
    rooms = {f"{path.name}/" for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"}
    rooms |= {path.name for path in package.glob("*.py") if path.name != "__init__.py"}
    assert {room for room in rooms if room not in tree} == set()
