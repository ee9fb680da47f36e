"""Replies in the log of an evaluation: those that the model gives, beside what the rows have."""

import json
import sys
import types
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset
from processes import ForkServer
from tiny_models import audio_part, text_part, tiny_model, tiny_processor
from trainers import LORA, make_rows, make_trainer
from transformers.integrations import TensorBoardCallback

from relllm import ReLLMSFTTrainer
from relllm.inference.conversation import Conversation
from relllm.processing.prompts_relllm import SPEECH_PROMPT


def read(folder: Path, name: str = "completions_00000") -> list[dict]:
    lines = (folder / "_completions" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def make(rows: list[dict], folder: Path, **settings) -> ReLLMSFTTrainer:
    settings = {"log_completions": 3, "per_device_eval_batch_size": 2} | settings
    model = tiny_model(lora=LORA)
    return make_trainer(rows, folder, tiny_processor(model.config), model=model, eval_rows=rows, **settings)


def test_they_are_the_models_own_beside_the_rows(tmp_path: Path) -> None:
    rows = make_rows(tmp_path, 7)
    rows[0]["arousal"] = float("nan")  # as a table may have it
    trainer = make(rows, tmp_path / "run")
    trainer.evaluate()
    found = read(tmp_path / "run")
    rows[0]["arousal"] = None
    assert [line["id"] for line in found] == ["row-0", "row-2", "row-4"]  # from all over the split
    for line, row in zip(found, rows[::2], strict=False):
        alone = Conversation(trainer.model, trainer.processing_class).say(row["audio"], max_new_tokens=64)
        assert line["reply"] == alone.text and line["reply_of_row"] == row["response"] and line["step"] == 0
        assert line["emotion"] == alone.heard.emotion and line["emotion_of_row"] == row["emotion"]
        for name, value in alone.heard.dimensions.items():
            assert line[name] == pytest.approx(value, abs=1e-3) and line[f"{name}_of_row"] == row[name]


def test_conversations_streams_named_sets_and_heads_alone(tmp_path: Path) -> None:
    clips = make_rows(tmp_path, 3)
    parts = [text_part(SPEECH_PROMPT), audio_part(clips[0]["audio"])]
    answer = {"role": "assistant", "content": [text_part(clips[0]["response"])]}
    messages = [{"role": "user", "content": parts}, answer]
    two = [{"role": "user", "content": [audio_part(one["audio"]) for one in clips[:2]]}, answer]
    trainer = make(clips, tmp_path / "run", emotion_loss_weight=0)
    conversations = [{"messages": messages, "valence": [0.5]}, {"messages": two, "valence": [0.1, 0.2]}]
    stream = IterableDataset.from_generator(lambda: iter(clips))
    trainer.eval_dataset = {"talk": Dataset.from_list(conversations), "stream": stream}
    trainer.evaluate()
    one, both = read(tmp_path / "run", "completions_talk_00000")
    streamed = read(tmp_path / "run", "completions_stream_00000")
    assert one["reply_of_row"] == clips[0]["response"] and "emotion" not in one  # that head does not train
    assert len(both["valence"]) == 2 and both["valence_of_row"] == [0.1, 0.2]
    assert [line["id"] for line in streamed] == ["row-0", "row-1", "row-2"]
    trainer.processing_class.system_prompt = ""
    heads = make(clips, tmp_path / "heads", response_loss_weight=0, log_completions=1)
    heads.evaluate()
    (line,) = read(tmp_path / "heads")
    assert "reply" not in line and line["emotion"] in heads.model.config.emotion_labels
    none = make(clips, tmp_path / "none", log_completions=0)
    none.evaluate()
    assert not (tmp_path / "none" / "_completions").exists()


def test_they_go_where_the_run_reports_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    logged: dict[str, object] = {}
    trainer = make(make_rows(tmp_path, 2), tmp_path / "run", log_completions=1, disable_tqdm=False)
    for name in ("wandb", "trackio"):
        module = types.ModuleType(name)
        module.Table = lambda dataframe: dataframe
        module.log = lambda values, name=name: logged.update({name: list(values.values())[0]})
        monkeypatch.setitem(sys.modules, name, module)
    writer = types.SimpleNamespace(add_text=lambda name, text, step: logged.update({"board": (name, text, step)}))
    board = object.__new__(TensorBoardCallback)
    board.tb_writer = writer
    trainer._log_completions([], "eval")  # of an empty split there are none
    trainer.args.report_to = ["wandb", "trackio"]
    trainer.callback_handler.callbacks.append(board)
    trainer._log_completions(list(trainer.eval_dataset.select([0])), "eval")
    (line,) = read(tmp_path / "run")
    assert logged["wandb"].to_dict("records") == logged["trackio"].to_dict("records")
    assert logged["wandb"]["reply"].tolist() == [line["reply"]] and logged["wandb"]["id"].tolist() == ["row-0"]
    name, text, step = logged["board"]
    assert (name, step) == ("completions", 0) and f"reply: {line['reply']}".splitlines()[0] in text
    assert "Replies at step 0" in capsys.readouterr().err
    lines = [{"step": 0, "id": 7, "reply": "and/or"}, {"step": 0, "id": None, "valence": float("nan")}]
    trainer._publish(lines, "eval_set")
    assert read(tmp_path / "run", "completions_set_00000") == [lines[0], {"step": 0, "id": None, "valence": None}]
    assert "and/or" in (tmp_path / "run/_completions/completions_set_00000.jsonl").read_text()
    assert " ".join(logged["board"][1].split()) == "step: 0 id: 7 reply: and/or step: 0 id: None valence: None"


def train_two(folder: Path) -> None:
    trainer = make(make_rows(folder / "clips"), folder / "run", eval_strategy="steps", eval_steps=1, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.slow
def test_two_processes_log_them_once(fork_server: ForkServer, tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    make_rows(tmp_path / "clips")
    ranks = fork_server.run_ranks(train_two, tmp_path)
    assert [rank.exitcode for rank in ranks] == [0, 0], ranks[0].stderr[-2000:]
    for step in (1, 2):
        lines = read(tmp_path / "run", f"completions_{step:05d}")
        assert [line["step"] for line in lines] == [step] * 3
