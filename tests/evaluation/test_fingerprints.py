"""One fingerprint for the same weights: full, in shards, light with its towers, and merged from that."""

import json
from pathlib import Path

import pytest
import torch
from light_checkpoints import build, save_towers
from tiny_models import tiny_llm, tiny_processor

from relllm.evaluation.fingerprints import model_fingerprint
from relllm.hub.sharing import MergeSettings
from relllm.hub.staging import merge_checkpoint


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"text_dtype": torch.bfloat16}),
        ("llama", {"tied": True}),
        ("mixtral", {}),  # whose experts lie one by one in files, and as one in memory
        ("llama", {"speech": "wavlm"}),
    ],
)
def test_the_same_weights_have_one_fingerprint_in_whichever_form(family: str, options: dict, tmp_path: Path) -> None:
    towers = save_towers(tmp_path / "towers", **options)
    if family != "llama":
        tiny_llm(family).save_pretrained(towers / "llm")
    model = build(towers)
    processor = tiny_processor(model.config)
    for form, how in {"full": {}, "shards": {"max_shard_size": "50KB"}, "light": {"light": True}}.items():
        model.save_pretrained(tmp_path / form, **how)
        processor.save_pretrained(tmp_path / form)
    merge_checkpoint(MergeSettings(str(tmp_path / "light"), tmp_path / "merged"))
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    found = {form: model_fingerprint(str(tmp_path / form)) for form in ("full", "shards", "light", "merged")}
    assert len(set(found.values())) == 1, found


def test_other_weights_or_another_place_of_the_lora_have_another(tmp_path: Path) -> None:
    model = build(save_towers(tmp_path / "towers"))
    model.save_pretrained(tmp_path / "light", light=True)
    before = model_fingerprint(str(tmp_path / "light"))
    model.model.emotion_head.weight.data[0, 0] += 1
    model.save_pretrained(tmp_path / "light", light=True)
    other = model_fingerprint(str(tmp_path / "light"))
    config = tmp_path / "light" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_scope": "global"}))
    assert len({before, other, model_fingerprint(str(tmp_path / "light"))}) == 3
