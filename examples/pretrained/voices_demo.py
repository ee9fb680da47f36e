"""Does RE-LLM hear emotion in people? Acted shouts of a game, leave one voice pack out, against plain baselines.

    apt-get download hedgewars-data && dpkg -x hedgewars-data_*.deb hedgewars
    python examples/pretrained/voices_demo.py hedgewars --real-models models --out runs/voices

Debian's `hedgewars-data` has 15 voice packs of different actors with files of the same names. `relllm prepare
hedgewars` groups them by what a shout is for: happy, angry, alarm, pain; weak labels, fixed before anything was
trained. For each pack the others teach an emotion tower, by categories, and the projector and the head of RE-LLM; the
LLM only gives the width, for nothing is replied. Each training is a folder: killed, the same command goes on with the
first that is not complete. Beside this script: the baselines (`voice_baselines.py`), the verdict (`voice_results.py`).
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from datasets import Dataset
from joining import tokenizer_with_audio
from rich.console import Console
from transformers import AutoModel, AutoModelForCausalLM, TrainingArguments, set_seed
from voice_baselines import acoustic_machine, check_opensmile, linear_probe, majority, statistics
from voice_results import EMOTIONS, SYSTEMS, write_results

from relllm.data.corpora.folder import parse_pattern
from relllm.data.corpora.patterns import PATTERNS
from relllm.data.data_settings import LabelSettings
from relllm.data.loading import column_values, load_corpus
from relllm.data.membership import RECORD_NAME
from relllm.data.preparing import prepare_corpus
from relllm.demo import steps
from relllm.demo.demo_settings import SyntheticSettings
from relllm.demo.steps import claim_folder
from relllm.demo.synthetic import synthesize_corpus
from relllm.demo.tiny import small_tower, train_emotion_tower
from relllm.evaluation.evaluating import read_predictions
from relllm.evaluation.evaluation_settings import EvaluationSettings
from relllm.evaluation.folds import evaluate_folds
from relllm.hub.cards import write_model_card
from relllm.hub.sharing import CardSettings
from relllm.modeling.audio_tower_relllm import masked_mean
from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration
from relllm.modeling.outputs_relllm import TowerOutputs
from relllm.processing.feature_extraction_relllm import ReLLMFeatureExtractor
from relllm.tower_outputs import TowerCache, cache_settings, clip_key
from relllm.training.config import ReLLMSFTConfig
from relllm.training.emotion_training import EmotionScriptArguments, EmotionTrainingConfig, run_emotion_training
from relllm.training.run import ReLLMScriptArguments, run_training

AUDIO_MODEL, TEXT_MODEL = "openai/whisper-tiny.en", "HuggingFaceTB/SmolLM2-135M-Instruct"
VOICES = "usr/share/games/hedgewars/Data/Sounds/voices"  # within the Debian package
TOWERS = {"speech-only": None, "people": "people-{fold}", "synthetic": "synthetic", "random": "random"}
TOWER_SIZE = {"width": 96, "layers": 2}


@dataclass(frozen=True)
class VoicesSettings:
    """What a run takes; the defaults are some 80 minutes of one core.

    Args:
        sounds (`Path`): Where `hedgewars-data` is unpacked, or its folder of voices.
        out (`Path`): Folder of the run.
        audio_model, text_model (`str`, *optional*): Whisper and the LLM: directories or Hub ids.
        seed (`int`, *optional*, defaults to 0): Of every weight and order.
        tower_epochs, epochs (`float`, *optional*): Of the emotion towers, and of projector and head.
        synthetic_clips (`int`, *optional*, defaults to 100): Of each emotion, in synthetic prosody.
    """

    sounds: Path
    out: Path
    audio_model: str = AUDIO_MODEL
    text_model: str = TEXT_MODEL
    seed: int = 0
    tower_epochs: float = 8.0
    epochs: float = 4.0
    synthetic_clips: int = 100

    @property
    def corpus(self) -> str:
        """Return the folder of the prepared corpus."""
        return str(self.out / "corpus")

    def arguments(self, out: Path, **own: object) -> dict:
        """Return what all trainings share, and what one has of its own."""
        shared = {"output_dir": str(out), "seed": self.seed, "save_strategy": "no", "eval_strategy": "no"}
        shared |= {"weight_decay": 0.01, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
        shared |= {"lr_scheduler_type": "cosine", "warmup_steps": 0.1, "bf16": False, "report_to": "none"}
        shared |= {"gradient_checkpointing": False, "disable_tqdm": True, "logging_strategy": "epoch"}
        return {**shared, "dataloader_pin_memory": torch.cuda.is_available(), **own}


def run_voices(settings: VoicesSettings, console: Console, systems: tuple[str, ...] = tuple(TOWERS)) -> dict:
    """Run every step that is not done yet; return the numbers, which `results.json` and `results.md` hold as well.

    Raises:
        ImportError: If openSMILE is missing; before anything runs.
        ValueError: If the folder holds a run with other settings.
    """
    out = settings.out
    if unknown := sorted(set(systems) - set(TOWERS)):
        raise ValueError(f"systems must be some of {', '.join(TOWERS)}, got {', '.join(unknown)}.")
    check_opensmile()
    claim_folder(out, {**asdict(settings), "sounds": None, "out": None})
    prepare_voices(settings)
    packs = column_values(settings.corpus, "speaker")
    make_llm(settings, console)
    make_towers(settings, systems, console)
    for place, pack in enumerate(packs, 1):
        for system in systems:
            console.print(f"{system} without {pack} ({place} of {len(packs)})", highlight=False)
            train_fold(settings, system, pack)
    predictions = {system: evaluate_voices(settings, system) for system in systems}
    for system in ("speech-only", "people"):  # what was taught on these voices
        if system in systems:
            write_card(settings, system, packs[0])
    rows = load_corpus(settings.corpus, "all")
    predictions |= baseline_predictions(settings, rows, packs, systems)
    return write_results(rows.remove_columns("audio").to_list(), predictions, out, console)


def prepare_voices(settings: VoicesSettings) -> None:
    """Do as `relllm prepare hedgewars`."""
    sounds = settings.sounds / VOICES if (settings.sounds / VOICES).is_dir() else settings.sounds
    labels = LabelSettings(sounds, output_dir=Path(settings.corpus), unknown_emotions="keep")
    prepare_corpus(parse_pattern(PATTERNS["hedgewars"], labels), labels)


def make_llm(settings: VoicesSettings, console: Console) -> None:
    """Save the LLM and a tokenizer with a placeholder for audio: no checkpoint then holds embeddings of its own."""

    def make(place: Path) -> None:
        AutoModelForCausalLM.from_pretrained(settings.text_model).save_pretrained(place)
        tokenizer_with_audio(settings.text_model).save_pretrained(place)

    steps.once(settings.out / "llm", settings.text_model, make, console)


def make_towers(settings: VoicesSettings, systems: tuple[str, ...], console: Console) -> None:
    """Save a tower with random weights, and train one on the dimensions of synthetic prosody."""

    def draw(place: Path) -> None:
        set_seed(settings.seed)
        small_tower(**TOWER_SIZE, id2label=dict(enumerate(EMOTIONS))).save_pretrained(place)

    def train(place: Path) -> None:
        sizes = {"train_clips": settings.synthetic_clips, "validation_clips": 1, "test_clips": 1}
        corpus = synthesize_corpus(SyntheticSettings(output_dir=settings.out / "synthetic", **sizes))
        set_seed(settings.seed)
        arguments = settings.arguments(place, num_train_epochs=settings.tower_epochs, learning_rate=2e-3)
        train_emotion_tower(corpus["train"], TrainingArguments(**arguments), place, **TOWER_SIZE)

    towers = settings.out / "towers"
    if {"people", "random"} & set(systems):
        steps.once(towers / "random", "random weights", draw, console)
    if "synthetic" in systems:
        steps.once(towers / "synthetic", "taught on synthetic prosody", train, console)


def train_fold(settings: VoicesSettings, system: str, pack: str) -> None:
    """Train what a system needs to be measured on a pack, as `relllm train-emotion` and `relllm train` do."""
    held_out = f"speaker={pack}"
    tower = TOWERS[system] and str(settings.out / "towers" / TOWERS[system].replace("{fold}", pack))
    if system == "people":
        script = EmotionScriptArguments(
            model_name_or_path=str(settings.out / "towers" / "random"),
            **{"data": settings.corpus, "held_out": held_out, "eval_split": "", "targets": "emotions"},
            train_feature_encoder=True,
        )
        own = {"num_train_epochs": settings.tower_epochs, "learning_rate": 2e-3}
        own |= {"train_sampling_strategy": "group_by_length"}
        once(run_emotion_training, script, EmotionTrainingConfig(**settings.arguments(Path(tower), **own)))
    script = ReLLMScriptArguments(
        audio_tower=settings.audio_model,
        text_model=str(settings.out / "llm"),
        emotion_tower=tower,
        emotion_fusion="none" if tower is None else "concat",
        data=settings.corpus,
        held_out=held_out,
        dtype="float32",
        lora_r=0,
    )
    own = {"num_train_epochs": settings.epochs, "learning_rate": 1e-3, "log_completions": 0}
    own |= {"response_loss_weight": 0.0, "dimension_loss_weight": 0.0, "emotion_class_weights": ["balanced"]}
    own |= {"tower_cache_dir": str(settings.out / "tower-outputs")}
    out = settings.out / "models" / f"{system}-{pack}"
    once(run_training, script, ReLLMSFTConfig(**settings.arguments(out, **own)))


def once(run: Callable, script: object, arguments: TrainingArguments) -> None:
    """Run a training unless its folder says that it is complete."""
    record = Path(arguments.output_dir) / RECORD_NAME
    if not record.is_file() or "steps_done" not in json.loads(record.read_text(encoding="utf-8")):
        run(script, arguments)


def evaluate_voices(settings: VoicesSettings, system: str) -> dict[str, str]:
    """Do as `relllm evaluate MODELS --folds speaker --ways head`; return the emotion that each clip was heard as."""
    out = settings.out / "runs" / system
    place = {"model": str(settings.out / "models" / f"{system}-{{fold}}"), "data": settings.corpus, "output_dir": out}
    options = {"tasks": ("ser",), "ways": ("head",), "tower_cache_dir": str(settings.out / "tower-outputs")}
    evaluate_folds(EvaluationSettings(**place, **options, dtype="float32", name=SYSTEMS[system]), "speaker")
    heard = {line["id"]: line["recognition"]["head"] for line in read_predictions(out)[1]}
    return {row_id: max(shares, key=shares.__getitem__) for row_id, shares in heard.items()}


def write_card(settings: VoicesSettings, system: str, pack: str) -> Path:
    """Do as `relllm card` for one of a system's models: its terms, its record, and the numbers over all folds."""
    own = ["audio_tower=mit", "text_model=apache-2.0"] + ([] if TOWERS[system] is None else ["emotion_tower=gfdl"])
    model = settings.out / "models" / f"{system}-{pack}"
    return write_model_card(
        CardSettings(model, [settings.out / "runs" / system], "org/re-llm-voices", tower_license=own, overwrite=True)
    )


@torch.no_grad()
def baseline_predictions(
    settings: VoicesSettings, rows: Dataset, packs: list[str], systems: tuple[str, ...]
) -> dict[str, dict[str, str]]:
    """Answer with the baselines, and with a probe on what a projector (of `SYSTEMS`) gives the LLM."""
    emotions, speakers = np.array(rows["emotion"]), np.array(rows["speaker"])
    first = load_fold(settings, systems[0], packs[0])
    extractor = ReLLMFeatureExtractor.from_pretrained(settings.out / "models" / f"{systems[0]}-{packs[0]}")
    clips = [extractor.read_clip(audio) for audio in rows["audio"]]
    frames = statistics([one.frames[0].numpy() for one in kept_outputs(settings, first, extractor, clips)])
    found = {
        "majority": majority(emotions, speakers),
        "probe": linear_probe(frames, emotions, speakers),
        "egemaps": acoustic_machine(clips, extractor.sampling_rate, emotions, speakers),
    }
    for system in (one for one in systems if f"{one} projector" in SYSTEMS):
        answers = np.empty_like(emotions)
        for pack in packs:
            model, test = load_fold(settings, system, pack), speakers == pack
            heard = [
                model.get_audio_features(tower_outputs=one) for one in kept_outputs(settings, model, extractor, clips)
            ]
            pooled = torch.cat([masked_mean(one.last_hidden_state, one.lengths) for one in heard]).numpy()
            answers[test] = linear_probe(pooled, emotions, speakers, [pack])[test]
        found[f"{system} projector"] = answers
    return {name: dict(zip(rows["id"], answers.tolist(), strict=True)) for name, answers in found.items()}


def kept_outputs(
    settings: VoicesSettings,
    model: ReLLMForConditionalGeneration,
    extractor: ReLLMFeatureExtractor,
    clips: Sequence[np.ndarray],
) -> Iterator[TowerOutputs]:
    """Yield what the towers have made of each clip, which the trainings and evaluations kept."""
    cache = TowerCache(settings.out / "tower-outputs", cache_settings(model.base_model, extractor))
    for clip in clips:
        outputs = cache.get(clip_key(clip))
        assert outputs is not None  # every clip was in a training or an evaluation
        yield outputs


def load_fold(settings: VoicesSettings, system: str, pack: str) -> ReLLMForConditionalGeneration:
    """Load the model that has not heard a pack."""
    return AutoModel.from_pretrained(settings.out / "models" / f"{system}-{pack}", dtype=torch.float32).eval()


app = typer.Typer(add_completion=False)


@app.command()
def main(
    sounds: Annotated[Path, typer.Argument(help="Where hedgewars-data is unpacked.")],
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/voices"),
    seed: Annotated[int, typer.Option(help="Of every weight and order.")] = 0,
    real_models: Annotated[
        Path | None, typer.Option(help="Folder with whisper-tiny.en and SmolLM2-135M-Instruct; else from the Hub.")
    ] = None,
    systems: Annotated[str, typer.Option(help="Of speech-only, people, synthetic, random, with commas.")] = ",".join(
        TOWERS
    ),
) -> None:
    """Measure RE-LLM and plain baselines on people's voices, leaving out one voice pack after the other.

    Interrupted, it goes on with the training it was in. Needs `pip install relllm[demo]` and, for eGeMAPS, opensmile.
    """
    place = (lambda name: str((real_models / name.rpartition("/")[2]).absolute())) if real_models else str
    models = {"audio_model": place(AUDIO_MODEL), "text_model": place(TEXT_MODEL)}
    run_voices(VoicesSettings(sounds, out, seed=seed, **models), Console(), tuple(systems.split(",")))


if __name__ == "__main__":
    app()
