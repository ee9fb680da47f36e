"""Training on several cards: a model that `device_map` has spread learns as on one, and DataParallel is refused."""

from pathlib import Path

import pytest
import torch
from placed_tensors import CARD, four_layers, several_devices, spread
from tiny_models import tiny_model, tiny_processor
from trainers import KL, LORA, make_rows, make_trainer


@pytest.mark.parametrize("settings", [KL, {**KL, "response_loss_weight": 0.0}, {"tower_cache_dir": "towers"}], ids=str)
def test_the_losses_of_a_spread_model_are_those_on_one_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict
) -> None:
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # "meta" is no type that TRL may ask it of
    config = four_layers(lora=LORA)
    model = tiny_model(config)
    halves = {f"model.{part}": "meta:0" for part in ("audio_tower", "multi_modal_projector", "emotion_head")}
    halves |= {f"model.{part}": "meta:1" for part in ("emotion_tower", "dimension_head")}
    halves |= {f"model.text_model.model.{part}": "meta:1" for part in ("embed_tokens", "rotary_emb", "layers.0")}
    halves |= {f"model.text_model.model.layers.{layer}": "meta:2" for layer in (1, 2, 3)}
    halves |= {"model.text_model.model.norm": "meta:2", "model.text_model.lm_head": "meta:3"}
    rows = make_rows(tmp_path, 4)
    found: list[dict[str, torch.Tensor]] = []
    with several_devices():
        for name, places in (("one", {"": CARD}), ("several", halves)):
            (tmp_path / name).mkdir()
            monkeypatch.chdir(tmp_path / name)  # where the cache of the towers' outputs is
            placed = spread(model, places)
            trainer = make_trainer(rows, tmp_path / "out", tiny_processor(config), placed, **settings)
            placed.train()
            for count in (2, 4):  # half of the clips are then in the cache
                batch = trainer.data_collator([trainer.train_dataset[index] for index in range(count)])
                batch = {name: value.to(CARD) for name, value in batch.items()}
                if count == 2 and "tower_known" in batch:
                    trainer.put_towers(batch)
            trainer._num_items = trainer.objective.count(batch)
            loss = trainer.compute_loss(placed, batch, num_items_in_batch=torch.tensor(20, device=CARD))
            loss.backward()
            gradients = {name: p.grad.to("cpu") for name, p in placed.named_parameters() if p.grad is not None}
            found.append({"loss": loss.detach().to("cpu"), **gradients})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    assert [name for name in found[0] if not torch.equal(found[0][name], found[1][name])] == []


def test_several_cards_in_one_process_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", 2)
    with pytest.raises(ValueError, match="`accelerate launch"):
        make_trainer(make_rows(tmp_path, 2), tmp_path / "out", tiny_processor())
