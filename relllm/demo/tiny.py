"""The whole of RE-LLM in minutes on a CPU: corpus, towers, training, evaluation, model card, a reply.

Everything is small and made here, so every step is real and nothing is pretrained: the tokenizer and the LLM learn
the corpus's own replies as text, the emotion tower learns the dimensions, then RE-LLM and its speech-only baseline
learn to hear. One folder for each step; a step that is done is not done again.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict
from rich.console import Console
from transformers import AutoModel, AutoModelForCausalLM, TrainingArguments, set_seed
from trl import SFTConfig, SFTTrainer

from relllm.data.processes import available_cores, run_in_processes
from relllm.labels import EMOTIONS
from relllm.modeling.configuration_relllm import ReLLMEmotionConfig
from relllm.modeling.emotion_tower_relllm import ReLLMEmotionModel
from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration
from relllm.processing.processing_relllm import ReLLMProcessor
from relllm.processing.prompts_relllm import RECOGNITION_PROMPT, SYSTEM_PROMPT, WRITER_PROMPT, recognition_prompt
from relllm.processing.turns_relllm import build_chat_template
from relllm.training.checkpoints import checkpoint_to_resume
from relllm.training.config import ReLLMSFTConfig
from relllm.training.emotion_training import EmotionTowerTrainer
from relllm.training.trainer import ReLLMSFTTrainer

from .demo_settings import CorpusSize, DemoSettings, SyntheticSettings
from .steps import claim_folder, compare_systems, evaluate_system, has_learned, once, share, show_replies
from .synthetic import synthesize_corpus
from .tiny_towers import llama_config, train_byte_tokenizer, wav2vec2_config, whisper_config

LORA = {"r": 16, "lora_alpha": 16, "lora_dropout": 0.05}  # the paper's
REPO_ID = "org/re-llm-demo"  # in the card; nothing is sent
LEARNING_RATE, BATCH_SIZE = 2e-3, 16  # of all three trainings
TASKS = {"reply": 1.0, "recognition": 2.0}  # of RE-LLM and its baseline; an answer is one word, a reply many
SPEECH_TRAINING = {  # what the card says of it
    "data": "synthetic speech (eSpeak NG): rule-made prosody, not human emotion",
    "towers": "trained for the demo, in minutes, on the same synthetic corpus; nothing is pretrained",
    "learning_rate": LEARNING_RATE,
    "per_device_train_batch_size": BATCH_SIZE,
    **LORA,
}
SYSTEMS = {"text-only": "llm", "speech-only": "speech-only", "re-llm": "re-llm"}  # and their folders
TOGETHER = (("llm", "emotion-tower"), ("re-llm", "speech-only"))  # trained at a time, each on one thread
HEARING = ("speech-only", "re-llm")  # those with heads, which read all test clips
ASKED = 200  # the test clips that are asked about in words: one of each voice, sentence and emotion


def run_demo(settings: DemoSettings, console: Console) -> bool:
    """Run every step that is not done yet; return whether UA on unseen voices is above chance by 0.10."""
    started = time.monotonic()
    out = settings.output_dir
    claim_folder(out, {**asdict(settings), "output_dir": None})
    corpus = _make_corpus(settings)
    for names in TOGETHER:
        missing = [name for name in names if not (out / name).exists()]
        for name in names:
            if name in missing:
                console.rule(f"{name}: {STEPS[name][0]}")
            else:
                console.print(f"{name}: there already", style="green")
        num_proc = max(1, min(len(missing), available_cores()))
        for name, _ in run_in_processes(partial(_train, settings), missing, num_proc, preload=__name__):
            console.print(f"{name}: done", style="green")
    words: dict = {"tasks": ("ser",), "ways": ("generated", "likelihood"), "limit": ASKED}
    metrics: dict = {}  # of the heads, where there are any
    for where, systems, options in ((out, tuple(SYSTEMS), words), (out / "heads", HEARING, {"ways": ("head",)})):
        for system in systems:
            place = (out / SYSTEMS[system], out / "corpus", where / "runs" / system)
            metrics[system] = evaluate_system(*place, system, console, device="cpu", **options)
        compare_systems(where, systems, console)
    share(out / "re-llm", [out / "runs/re-llm", out / "heads/runs/re-llm"], SPEECH_TRAINING, console, repo_id=REPO_ID)
    show_replies(corpus["test"], out, console)
    console.print(f"Everything lies in {out}; {time.monotonic() - started:.0f} s in this run.")
    return has_learned(metrics["re-llm"], console)


def _make_corpus(settings: DemoSettings) -> DatasetDict:
    sizes = {entry.name: getattr(settings, entry.name) for entry in fields(CorpusSize)}
    return synthesize_corpus(SyntheticSettings(output_dir=settings.output_dir / "corpus", **sizes))


def _train(settings: DemoSettings, name: str) -> None:
    """Make one of `STEPS`, in whichever process."""
    corpus, (what, train) = _make_corpus(settings), STEPS[name]
    # oneDNN prepares a kernel for each new shape, and clips of a new length come to the end: 40 % of the time.
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        once(settings.output_dir / name, what, partial(train, corpus, settings), Console(quiet=True))


def _train_llm(corpus: DatasetDict, settings: DemoSettings, path: Path) -> None:
    """Train a tokenizer and a small Llama on the corpus's own text: writer's prompt and transcript in, reply out.

    It learns the question about the emotion too, as an LLM knows it: with the emotion told behind the transcript.
    """
    set_seed(settings.seed)
    prompts = [SYSTEM_PROMPT, WRITER_PROMPT, RECOGNITION_PROMPT, "system\nuser\nassistant\n"]
    texts = [*prompts, *corpus["train"]["text"], *corpus["train"]["response"], *EMOTIONS]
    tokenizer = train_byte_tokenizer(texts, vocab_size=1000, min_frequency=2)
    tokenizer.chat_template = build_chat_template(tokenizer)
    config = llama_config(tokenizer, 128, layers=4, kv_heads=4)
    system, rows = [{"role": "system", "content": SYSTEM_PROMPT}], []
    question = recognition_prompt(EMOTIONS)
    for row in corpus["train"]:
        request = WRITER_PROMPT.format(emotion=row["emotion"]) + row["text"]
        rows.append(_turns(system, request, row["response"]))
    for row in corpus["train"]:
        rows.append(_turns([], f"{question}{row['text']} ({row['emotion']})", row["emotion"]))
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_config(config),
        args=SFTConfig(**_arguments(settings, path, epochs=settings.text_epochs)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(path))


def _turns(before: list[dict], request: str, answer: str) -> dict[str, list[dict]]:
    prompt = [*before, {"role": "user", "content": request}]
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": answer}]}


def _train_tower(corpus: DatasetDict, settings: DemoSettings, path: Path) -> None:
    set_seed(settings.seed)
    arguments = TrainingArguments(**_arguments(settings, path, epochs=settings.emotion_epochs))
    train_emotion_tower(corpus["train"], arguments, path, width=96, layers=2)


def train_emotion_tower(rows: Dataset, arguments: TrainingArguments, path: Path, *, width: int, layers: int) -> None:
    """Train and save a small wav2vec2 with a head, on 1 - CCC of arousal, dominance and valence.

    The seed is set already, and a checkpoint that is in `path` is gone on from. `width`, a multiple of 4, is that of
    its frames, and of the embedding that RE-LLM sets beside the speech.
    """
    parts: dict = {"conv_dim": (32, 64, 64, 96), "conv_kernel": (10, 8, 8, 4), "conv_stride": (5, 4, 4, 4)}
    parts |= dict.fromkeys(("mask_time_prob", "layerdrop", "hidden_dropout", "attention_dropout"), 0.0)
    encoder = wav2vec2_config(width, layers=layers, heads=4, **parts)
    tower = ReLLMEmotionModel(ReLLMEmotionConfig(encoder_config=encoder, final_dropout=0.0))
    trainer = EmotionTowerTrainer(tower, arguments, rows)
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(path, "auto"))
    trainer.save_model(str(path))


def _train_speech(corpus: DatasetDict, settings: DemoSettings, path: Path, *, fusion: str) -> None:
    """RE-LLM on the trained parts. The speech tower is fresh (nothing pretrained is at hand), so it trains as well."""
    set_seed(settings.seed)
    llm, tower = settings.output_dir / "llm", settings.output_dir / "emotion-tower"
    model = ReLLMForConditionalGeneration.from_towers(
        audio=AutoModel.from_config(whisper_config(96, heads=4)),
        text=llm,
        emotion=None if fusion == "none" else tower,
        lora=LORA,
        emotion_fusion=fusion,
        projector_inner_dim=128,
    )
    processor = ReLLMProcessor.from_config(model.config, llm, full_window=False)
    trainer = ReLLMSFTTrainer(
        model=model,
        args=ReLLMSFTConfig(
            **_arguments(settings, path, epochs=settings.speech_epochs),
            unfreeze=["audio_tower"],
            tasks=TASKS,
            light_checkpoints=False,  # this folder is to be moved and shared
        ),
        train_dataset=corpus["train"],
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model(str(path))


STEPS: dict[str, tuple[str, Callable[[DatasetDict, DemoSettings, Path], None]]] = {
    "llm": ("a small LLM learns the replies as text", _train_llm),
    "emotion-tower": ("it learns the dimensions", _train_tower),
    "re-llm": ("RE-LLM learns to hear", partial(_train_speech, fusion="concat")),
    "speech-only": ("its baseline without the tower", partial(_train_speech, fusion="none")),
}


def _arguments(settings: DemoSettings, path: Path, *, epochs: float) -> dict:
    """Return what all three trainings share."""
    return {
        "output_dir": str(path),
        "disable_tqdm": path.stem in [beside for _, beside in TOGETHER],  # one bar for two trainings
        "num_train_epochs": epochs,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "weight_decay": 0.01,
        "per_device_train_batch_size": BATCH_SIZE,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "bf16": False,
        "seed": settings.seed,
        "logging_strategy": "epoch",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
