"""Does RE-LLM hear emotion in people? Acted shouts of a game, leave one voice pack out, against plain baselines.

    apt-get download hedgewars-data && dpkg -x hedgewars-data_*.deb hedgewars
    python examples/pretrained/voices_demo.py hedgewars --real-models models --out runs/voices

Debian's `hedgewars-data` has 15 voice packs of different actors with files of the same names. `relllm prepare
hedgewars` groups them by what a shout is for: happy, angry, alarm, pain; weak labels, fixed before anything was
trained. For each pack the others teach an emotion tower, by categories, and the projector and the head of RE-LLM; the
LLM only gives the width, for nothing is replied. Each training is a folder, and each core has one at a time: killed,
the same command goes on with those that are not complete. Beside this script: the baselines (`voice_baselines.py`),
the verdict (`voice_results.py`).
"""

import functools
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
from relllm.data.processes import available_cores, run_in_processes
from relllm.demo import steps
from relllm.demo.demo_settings import SyntheticSettings
from relllm.demo.steps import claim_folder
from relllm.demo.synthetic import synthesize_corpus
from relllm.demo.tiny_towers import wav2vec2_config
from relllm.evaluation.evaluation_settings import EvaluationSettings
from relllm.evaluation.folds import evaluate_folds
from relllm.evaluation.runs import read_predictions
from relllm.hub.cards import write_model_card
from relllm.hub.sharing import CardSettings
from relllm.modeling.audio_tower_relllm import masked_mean
from relllm.modeling.configuration_relllm import ReLLMEmotionConfig
from relllm.modeling.emotion_tower_relllm import ReLLMEmotionModel
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
Fold = tuple[str, str]  # a system, and the pack that it leaves out
RUNNING = "relllm.training.run"  # what the processes import once for all


@dataclass(frozen=True)
class VoicesSettings:
    """What a run takes; the defaults fit two cores and half an hour.

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


def run_voices(
    settings: VoicesSettings, console: Console, systems: tuple[str, ...] = tuple(TOWERS), num_proc: int | None = None
) -> dict:
    """Run every step that is not done yet; return the numbers, which `results.json` and `results.md` hold as well.

    As many trainings as `num_proc`, by default the cores, run at a time, in a process of one thread each.

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
    in_processes = functools.partial(run_in_processes, num_proc=num_proc or available_cores(), preload=RUNNING)
    folds = [(system, pack) for pack in packs for system in systems]
    for place, ((system, pack), _) in enumerate(in_processes(functools.partial(train_fold, settings), folds), 1):
        console.print(f"{system} without {pack}: {place} of {len(folds)}", highlight=False)
    predictions = dict(in_processes(functools.partial(evaluate_voices, settings), systems))
    for system in ("speech-only", "people"):  # what was taught on these voices
        if system in systems:
            write_card(settings, system, packs[0])
    rows = load_corpus(settings.corpus, "all")
    predictions |= baseline_predictions(settings, rows, load_fold(settings, (systems[0], packs[0])))
    folds = [fold for fold in folds if f"{fold[0]} projector" in SYSTEMS]
    for (system, _), answers in in_processes(functools.partial(probe_projector, settings), folds):
        predictions[f"{system} projector"] = predictions.get(f"{system} projector", {}) | answers
    return write_results(rows.remove_columns("audio").to_list(), predictions, out, console)


def prepare_voices(settings: VoicesSettings) -> None:
    """Do as `relllm prepare hedgewars --embed-audio`: else each epoch would decode and resample the files anew."""
    sounds = settings.sounds / VOICES if (settings.sounds / VOICES).is_dir() else settings.sounds
    labels = LabelSettings(sounds, output_dir=Path(settings.corpus), embed_audio=True, unknown_emotions="keep")
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
        layers = {"conv_dim": (32, 64, 96), "conv_kernel": (20, 16, 8), "conv_stride": (10, 8, 4)}
        layers |= {"mask_time_prob": 0.0, "layerdrop": 0.0, "hidden_dropout": 0.0, "attention_dropout": 0.0}
        encoder = wav2vec2_config(96, layers=2, heads=4, **layers)
        config = ReLLMEmotionConfig(encoder_config=encoder, final_dropout=0.0, id2label=dict(enumerate(EMOTIONS)))
        ReLLMEmotionModel(config).save_pretrained(place)

    towers = settings.out / "towers"
    if set(systems) - {"speech-only"}:
        steps.once(towers / "random", "random weights", draw, console)
    if "synthetic" in systems:
        sizes = {"train_clips": settings.synthetic_clips, "validation_clips": 1, "test_clips": 1}
        synthesize_corpus(SyntheticSettings(output_dir=settings.out / "synthetic", **sizes))
        train_tower(settings, towers / "synthetic", data=str(settings.out / "synthetic"), targets="dimensions")


def train_tower(settings: VoicesSettings, place: Path, **taught: str) -> None:
    """Train an emotion tower from the one with random weights, as `relllm train-emotion` does."""
    script = EmotionScriptArguments(
        model_name_or_path=str(settings.out / "towers" / "random"),
        **{"eval_split": "", "train_feature_encoder": True, "final_dropout": 0.0, **taught},
    )
    own = {"num_train_epochs": settings.tower_epochs, "learning_rate": 2e-3}
    own |= {"train_sampling_strategy": "group_by_length"}
    once(run_emotion_training, script, EmotionTrainingConfig(**settings.arguments(place, **own)))


def train_fold(settings: VoicesSettings, fold: Fold) -> None:
    """Train what a system needs to be measured on a pack, as `relllm train-emotion` and `relllm train` do."""
    system, pack = fold
    held_out = f"speaker={pack}"
    tower = TOWERS[system] and str(settings.out / "towers" / TOWERS[system].replace("{fold}", pack))
    if system == "people":
        train_tower(settings, Path(tower), data=settings.corpus, held_out=held_out, targets="emotions")
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


def baseline_predictions(
    settings: VoicesSettings, rows: Dataset, model: ReLLMForConditionalGeneration
) -> dict[str, dict[str, str]]:
    """Answer with the baselines; of the model its speech tower counts alone."""
    emotions, speakers = np.array(rows["emotion"]), np.array(rows["speaker"])
    extractor, clips = read_clips(model, rows)
    frames = statistics([one.frames[0].numpy() for one in kept_outputs(settings, model, extractor, clips)])
    found = {
        "majority": majority(emotions, speakers),
        "probe": linear_probe(frames, emotions, speakers),
        "egemaps": acoustic_machine(clips, extractor.sampling_rate, emotions, speakers),
    }
    return {name: dict(zip(rows["id"], answers.tolist(), strict=True)) for name, answers in found.items()}


@torch.no_grad()
def probe_projector(settings: VoicesSettings, fold: Fold) -> dict[str, str]:
    """Answer for a pack with a probe on what the projector of its model gives the LLM."""
    rows, model = load_corpus(settings.corpus, "all"), load_fold(settings, fold)
    heard = [
        model.get_audio_features(tower_outputs=one) for one in kept_outputs(settings, model, *read_clips(model, rows))
    ]
    pooled = torch.cat([masked_mean(one.last_hidden_state, one.lengths) for one in heard]).numpy()
    answers = linear_probe(pooled, np.array(rows["emotion"]), np.array(rows["speaker"]), [fold[1]])
    return {row_id: answer for row_id, answer in zip(rows["id"], answers.tolist(), strict=True) if answer}


def read_clips(model: ReLLMForConditionalGeneration, rows: Dataset) -> tuple[ReLLMFeatureExtractor, list[np.ndarray]]:
    """Return a model's feature extractor, and the clips as it reads them."""
    extractor = ReLLMFeatureExtractor.from_pretrained(model.name_or_path)
    return extractor, [extractor.read_clip(audio) for audio in rows["audio"]]


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


def load_fold(settings: VoicesSettings, fold: Fold) -> ReLLMForConditionalGeneration:
    """Load the model of a system that has not heard a pack."""
    return AutoModel.from_pretrained(settings.out / "models" / "-".join(fold), dtype=torch.float32).eval()


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
    num_proc: Annotated[int | None, typer.Option(help="Trainings at a time; by default one for each core.")] = None,
) -> None:
    """Measure RE-LLM and plain baselines on people's voices, leaving out one voice pack after the other.

    Interrupted, it goes on with the training it was in. Needs `pip install relllm[demo]` and, for eGeMAPS, opensmile.
    """
    torch.set_num_threads(1)  # as in the processes
    place = (lambda name: str((real_models / name.rpartition("/")[2]).absolute())) if real_models else str
    models = {"audio_model": place(AUDIO_MODEL), "text_model": place(TEXT_MODEL)}
    run_voices(VoicesSettings(sounds, out, seed=seed, **models), Console(), tuple(systems.split(",")), num_proc)


if __name__ == "__main__":
    app()
