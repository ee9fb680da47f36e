"""RE-LLM from pretrained towers in half an hour on a CPU: Whisper tiny.en hears, SmolLM2 replies.

Two stages, as BLSP-Emo's and RE-LLM's: first the projector learns to pass on words (KL and cross-entropy on the
transcript), without an emotion tower; then the tower comes beside it, and the reply, the emotion and the dimensions
are learned. The baseline without the tower starts from the same first stage. The emotion tower is made here, because
no package registry carries one; the speech is synthetic. Both stages run as `relllm train` does: a step that is
interrupted goes on from its last checkpoint. Beside this script: the corpus (`sentences.py`), joining the parts
(`joining.py`), how much of the words is understood (`understanding.py`).

    python examples/pretrained/pretrained_demo.py --real-models models --out runs/demo-small
"""

import functools
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from datasets import Dataset
from joining import grow_stage1, join_towers
from rich.console import Console
from rich.table import Table
from sentences import synthesize_sentences
from transformers import AutoModel, TrainingArguments, set_seed
from understanding import REPEAT_PROMPT, Understanding, measure_understanding, whisper_word_errors

from relllm.data.journal import write_json
from relllm.data.loading import load_corpus
from relllm.demo.steps import (
    claim_folder,
    compare_systems,
    evaluate_system,
    has_learned,
    once,
    share,
    show_replies,
)
from relllm.demo.tiny import train_emotion_tower
from relllm.hub.licences import is_local
from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration
from relllm.processing.processing_relllm import ReLLMProcessor
from relllm.training.config import ReLLMSFTConfig
from relllm.training.run import ReLLMScriptArguments, run_training

AUDIO_MODEL, TEXT_MODEL = "openai/whisper-tiny.en", "HuggingFaceTB/SmolLM2-135M-Instruct"
REPO_ID = "org/re-llm-small"  # in the card; nothing is sent
BATCH_SIZE = 8
SYSTEMS = ("text-only", "speech-only", "re-llm")
UNDERSTANDING = "understanding.json"
TRAINING = {  # what the card says of it
    "data": "synthetic speech (eSpeak NG) in rule-made prosody, not human emotion: what it says of people's emotions "
    "means nothing until it is measured on them",
    "audio_tower": "Whisper tiny.en, frozen; it encodes the clip, not its window of 30 s (full_window: false)",
    "text_model": "SmolLM2-135M-Instruct, frozen but for the LoRA",
    "emotion_tower": "a small wav2vec2 trained for this demo, in minutes, on the same synthetic speech; it is in this "
    "checkpoint",
    "stages": "1: repeat the sentence (cross-entropy; KL against the LLM reading it); 2: reply, emotion, dimensions",
}


@dataclass(frozen=True)
class PretrainedSettings:
    """What a run takes; the defaults fit two CPU cores and 40 minutes.

    Args:
        out (`Path`): Folder of the run.
        audio_model, text_model (`str`, *optional*): Whisper and the LLM: directories or Hub ids.
        seed (`int`, *optional*, defaults to 0): Of the corpus and of every weight.
        clips_per_emotion (`tuple[int, int, int]`, *optional*): In train, validation and test.
        emotion_epochs, alignment_epochs, emotion_stage_epochs (`float`, *optional*): Over the training rows, of the
            emotion tower, stage 1 and stage 2.
        understanding_clips (`int`, *optional*, defaults to 16): Test clips that are asked to be repeated.
        save_steps (`int`, *optional*, defaults to 50): Updates between two checkpoints.
    """

    out: Path
    audio_model: str = AUDIO_MODEL
    text_model: str = TEXT_MODEL
    seed: int = 0
    clips_per_emotion: tuple[int, int, int] = (200, 3, 10)
    emotion_epochs: float = 3.0
    alignment_epochs: float = 1.0
    emotion_stage_epochs: float = 0.2
    understanding_clips: int = 16
    save_steps: int = 50


def find_models(folder: Path | None, audio: str | None = None, text: str | None = None) -> tuple[str, str]:
    """Where Whisper and the LLM are: as given, else beneath `folder` by the names of the Hub, else on the Hub.

    Raises:
        FileNotFoundError: If `folder` lacks one that is not given.
    """
    found = []
    for given, hub_id in ((audio, AUDIO_MODEL), (text, TEXT_MODEL)):
        place = folder / hub_id.rpartition("/")[2] if folder is not None else None
        if given is None and place is not None and not (place / "config.json").is_file():
            raise FileNotFoundError(
                f"{folder} has no {place.name}/config.json. Give the folder that holds the models."
            )
        found.append(given or (str(place.absolute()) if place is not None else hub_id))
    return found[0], found[1]


def run_pretrained_demo(settings: PretrainedSettings, console: Console) -> bool:
    """Run every step that is not done yet, and report.

    Args:
        settings ([`PretrainedSettings`]): Sizes and places.
        console (`rich.console.Console`): Where the report goes.

    Returns:
        `bool`: Whether it learned to hear emotion: its UA on unseen voices and sentences is above chance by more than
        0.10. How much of the words it understands is reported, not judged.

    Raises:
        ValueError: If the folder holds a run with other settings.
    """
    started = time.monotonic()
    out = settings.out
    claim_folder(out, {**asdict(settings), "out": None, "backbone": "small"})
    train, validation, test = settings.clips_per_emotion
    clips = {"train": train, "validation": validation, "test": test}
    synthesize_sentences(out / "corpus", clips, seed=settings.seed)
    _write_repeat_rows(out)
    once(out / "emotion-tower", "it learns the dimensions", lambda to: _tower(settings, to), console, goes_on=True)
    once(out / "joined", "Whisper and the LLM, a fresh projector", lambda to: _join(settings, to), console)
    once(out / "stage1", "the LLM learns the words", lambda to: _align(settings, to), console, goes_on=True)
    once(
        out / "stage1-emotion",
        "the emotion tower comes beside it",
        lambda to: grow_stage1(out / "stage1", out / "emotion-tower", to),
        console,
    )
    for name, start in (("re-llm", "stage1-emotion"), ("speech-only", "stage1")):
        what = f"it learns to reply, from {start}"
        once(out / name, what, functools.partial(_reply_stage, settings, start), console, goes_on=True)
    rows = load_corpus(out / "corpus", "test")
    folders: dict[str, str | Path] = {
        "text-only": settings.text_model,
        "speech-only": out / "speech-only",
        "re-llm": out / "re-llm",
    }
    metrics = {
        system: evaluate_system(
            folders[system], out / "corpus", out / "runs" / system, system, console, dtype="float32"
        )
        for system in SYSTEMS
    }
    compare_systems(out, dict.fromkeys(SYSTEMS), console)
    _understanding(settings, rows, console)
    own = is_local(settings.audio_model) or is_local(settings.text_model)
    share(
        out / "re-llm",
        [out / "runs" / "re-llm"],
        TRAINING | json.loads((out / "re-llm" / "training_settings.json").read_text(encoding="utf-8")),
        console,
        repo_id=REPO_ID,
        full=own,  # nobody else has a folder of this machine
    )
    show_replies(rows, out, console)
    console.print(f"Everything lies in [bold]{out}[/bold]; {time.monotonic() - started:.0f} s in this run.")
    return has_learned(metrics["re-llm"], console)


def _write_repeat_rows(out: Path) -> None:
    """Stage 1's rows: the training clips, and as the reply their own words."""
    rows = load_corpus(out / "corpus", "train")
    lines = [
        json.dumps({"id": row["id"], "audio": row["audio"], "text": row["text"], "response": row["text"]})
        for row in rows
    ]
    (out / "repeat.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _tower(settings: PretrainedSettings, path: Path) -> None:
    set_seed(settings.seed)
    arguments = TrainingArguments(
        **_arguments(settings, path, epochs=settings.emotion_epochs, learning_rate=2e-3, batch_size=16)
    )
    train_emotion_tower(load_corpus(settings.out / "corpus", "train"), arguments, path, width=128, layers=3)
    _drop_checkpoints(path)


def _join(settings: PretrainedSettings, path: Path) -> None:
    set_seed(settings.seed)
    join_towers(settings.audio_model, settings.text_model, path)


def _align(settings: PretrainedSettings, path: Path) -> None:
    """Stage 1 (recipes/stage1_semantic.yaml), with the transcript itself as the continuation."""
    script = ReLLMScriptArguments(
        model_name_or_path=str(settings.out / "joined"),
        emotion_fusion="none",
        data=str(settings.out / "repeat.jsonl"),
        train_split="",
        dtype="float32",
    )
    arguments = _arguments(settings, path, epochs=settings.alignment_epochs, learning_rate=1e-3)
    run_training(
        script,
        ReLLMSFTConfig(
            **arguments,
            tower_cache_dir=str(settings.out / "tower-outputs"),
            instruction=REPEAT_PROMPT,
            system_prompt="",
            response_loss_weight=1.0,
            response_kl_weight=1.0,
            emotion_loss_weight=0.0,
            dimension_loss_weight=0.0,
        ),
    )
    _drop_checkpoints(path)


def _reply_stage(settings: PretrainedSettings, start: str, path: Path) -> None:
    """Stage 2 (recipes/stage2_emotion.yaml)."""
    fusion: Literal["concat", "none"] = "concat" if start == "stage1-emotion" else "none"
    script = ReLLMScriptArguments(
        model_name_or_path=str(settings.out / start),
        emotion_fusion=fusion,
        data=str(settings.out / "corpus"),
        dtype="float32",
    )
    arguments = _arguments(settings, path, epochs=settings.emotion_stage_epochs, learning_rate=1e-3)
    trainer = run_training(script, ReLLMSFTConfig(**arguments, tower_cache_dir=str(settings.out / "tower-outputs")))
    _drop_checkpoints(path)
    if fusion == "concat":
        # Nobody else has this tower: it goes into the light checkpoint, as whatever was trained does.
        model = trainer.accelerator.unwrap_model(trainer.model)
        model.base_model.emotion_tower.requires_grad_(True)
        model.save_pretrained(path, light=True)


def _arguments(
    settings: PretrainedSettings, path: Path, *, epochs: float, learning_rate: float, batch_size: int = BATCH_SIZE
) -> dict:
    """What all trainings share."""
    return {
        "output_dir": str(path),
        "num_train_epochs": epochs,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "weight_decay": 0.01,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "bf16": False,
        "seed": settings.seed,
        "logging_steps": 20,
        "save_strategy": "steps",
        "save_steps": settings.save_steps,
        "save_total_limit": 1,
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def _drop_checkpoints(path: Path) -> None:
    """What a finished step goes on from no more."""
    for checkpoint in path.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def _understanding(settings: PretrainedSettings, rows: Dataset, console: Console) -> None:
    """After each stage: a table, and `understanding.json`."""
    console.rule("How much of the words it understands")
    path = settings.out / UNDERSTANDING
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
    else:
        step = max(1, len(rows) // settings.understanding_clips)
        chosen = rows.select(range(0, len(rows), step))
        found = {"clips": len(chosen), "whisper_word_error_rate": whisper_word_errors(settings.audio_model, chosen)}
        for name in ("stage1", "re-llm"):
            model = AutoModel.from_pretrained(settings.out / name, dtype=torch.float32)
            found[name] = asdict(_measured(model, settings.out / name, chosen))
        write_json(found, path)
    table = Table("after", "given", "word error rate, asked to repeat", "nats a token, the LLM's own answer")
    for name in ("stage1", "re-llm"):
        errors, likelihood = found[name]["word_error_rate"], found[name]["log_likelihood"]
        for given in likelihood:
            error = f"{errors[given]:.2f}" if given in errors else "–"
            table.add_row(name, given, error, f"{likelihood[given]:.2f}")
    console.print(table)
    console.print(
        f"{found['clips']} clips of unseen voices and sentences. Whisper itself, with its decoder: word error rate "
        f"{found['whisper_word_error_rate']:.2f}. What is repeated, held against another clip's words: "
        f"{found['stage1']['word_error_rate']['other words']:.2f} after stage 1."
    )
    for said, repeated in found["stage1"]["repeated"][:5]:
        console.print(f"  said: {said}  repeated: {repeated}", markup=False)


def _measured(model: ReLLMForConditionalGeneration, folder: Path, rows: Dataset) -> Understanding:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return measure_understanding(model.to(device).eval(), ReLLMProcessor.from_pretrained(folder), rows)


app = typer.Typer(add_completion=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/demo-small"),
    seed: Annotated[int, typer.Option(help="Of the corpus and of every weight.")] = 0,
    real_models: Annotated[
        Path | None, typer.Option(help="Folder with whisper-tiny.en and SmolLM2-135M-Instruct.")
    ] = None,
    audio_model: Annotated[str | None, typer.Option(help="A Whisper, as a directory or Hub id.")] = None,
    text_model: Annotated[str | None, typer.Option(help="A causal LM, as a directory or Hub id.")] = None,
) -> None:
    """Train, evaluate and talk to a RE-LLM of Whisper tiny.en and SmolLM2-135M-Instruct, in 40 minutes on two cores.

    The models come from the Hub or from folders that you give. Interrupted, it goes on with the step it was in. The
    speech is rule-made prosody (eSpeak NG), not human emotion. Needs `pip install relllm[demo]`.
    """
    try:
        audio, text = find_models(real_models, audio_model, text_model)
    except FileNotFoundError as error:
        raise typer.BadParameter(str(error), param_hint="--real-models") from error
    settings = PretrainedSettings(out=out, audio_model=audio, text_model=text, seed=seed)
    if not run_pretrained_demo(settings, Console()):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
