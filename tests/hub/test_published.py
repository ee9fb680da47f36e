"""What is published is what was measured: from `relllm train` to a push, and back from the Hub by a fresh process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from corpus_trees import write_wav
from empathy_scorers import write_csv
from fake_hub import point_at, serve_hub
from huggingface_hub import ModelCard
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from relllm.cli import app
from relllm.demo.tiny_towers import make_tiny_towers

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # huggingface_hub's uploads
SEQUENCE = """
prepare folder recordings/labels.csv --out data/ours
train --audio_tower towers/speech --emotion_tower towers/emotion --text_model towers/llm --projector_inner_dim 16
  --lora_r 4 --data data/ours --held_out speaker=ben --dimension_loss_weight 0 --max_steps 2 --save_steps 2
  --per_device_train_batch_size 2 --learning_rate 1e-2 --use_cpu true --bf16 false --full_window false
  --report_to none --out runs/ours
evaluate runs/ours/checkpoint-2 data/ours --held-out speaker=ben --tasks ser --device cpu --out runs/eval/light
merge runs/ours/checkpoint-2 --out re-llm
card runs/eval/light --model re-llm --repo-id org/re-llm
push re-llm org/re-llm --no-load --tag v1
"""
BACK = (
    "evaluate org/re-llm data/ours --revision v1 --held-out speaker=ben --tasks ser --device cpu --out runs/eval/hub"
)


@pytest.mark.slow
@pytest.mark.usefixtures("no_drawing")
def test_what_comes_back_from_the_hub_predicts_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, from the light checkpoint of a run to the full one that was made of it and pushed."""
    monkeypatch.chdir(tmp_path)
    save_towers_as_published(tmp_path / "towers")
    heard = [(who, emotion) for who in ("anna", "ben") for emotion in ("neu", "sad")]
    rows = [(f"{who}-{emotion}.wav", "It rained.", "Again?", emotion, who) for who, emotion in heard]
    for name, *_ in rows:
        write_wav(tmp_path / "recordings" / name, duration_s=0.3)
    write_csv(tmp_path / "recordings" / "labels.csv", rows, "path,text,response,emotion,speaker")
    with serve_hub(tmp_path / "served", lfs=True) as hub:
        with monkeypatch.context() as patch:
            point_at(hub, tmp_path / "cache", patch)
            disable_progress_bars()
            for line in SEQUENCE.replace("\n  ", " ").strip().splitlines():
                done = CliRunner().invoke(app, line.split())
                assert done.exit_code == 0, f"{line}: {done.output} {done.exception!r}"
            enable_progress_bars()
        for tower in (tmp_path / "towers", tmp_path / "re-llm"):
            tower.rename(tower.with_name(f"{tower.name}-gone"))
        told = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}
        command = [sys.executable, "-m", "relllm.cli", *BACK.split()]
        back = subprocess.run(command, env={**os.environ, **told}, capture_output=True, text=True)
    assert back.returncode == 0, back.stderr
    measured, published = (json.loads(Path(f"runs/eval/{one}/metrics.json").read_text()) for one in ("light", "hub"))
    assert published["model"]["fingerprint"] == measured["model"]["fingerprint"]
    assert published["recognition"] == measured["recognition"] and measured["data"]["num_clips"] == 2
    light, hub_s = (Path(f"runs/eval/{one}/predictions.jsonl").read_text() for one in ("light", "hub"))
    assert light == hub_s and "likelihood" in light
    card = ModelCard.load(tmp_path / "served" / "re-llm" / "README.md")
    assert card.data.eval_results[0].dataset_type == "ours" and "| lora_r | 4 |" in card.text
    assert card.data.license == "other" and "terms-of-its-owner" in card.text  # own speech, and towers of no licence


def save_towers_as_published(folder: Path) -> None:
    """The LLM in bfloat16, the others in float32."""
    make_tiny_towers(folder)
    AutoModelForCausalLM.from_pretrained(folder / "llm").to(torch.bfloat16).save_pretrained(folder / "llm")
