"""Does a reward teach empathy, or its scorer? The demo's model on unseen voices, by the rewarded and another scorer.

    relllm demo --out runs/demo
    python examples/rewarded_replies.py runs/demo --out runs/rewarded     # minutes on two cores

Two scorers of ER learn a rule that is known: the level of a reply is that of its reaction, in `LEVELS`. They differ in
encoder, seed and sentences, and a tenth of the levels that each learns from are drawn anew. The first rewards DPO (on
pairs of sampled replies) and GRPO; the second reads the replies alone. The corpus's replies are known, and so is the
truth: the rule's own level, and whether the reaction suits the clip's emotion, which no scorer of text can tell.
"""

import argparse
import csv
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, BertConfig, BertModel, RobertaConfig, RobertaModel, set_seed

from relllm.data.journal import write_rows
from relllm.data.loading import load_corpus
from relllm.demo.synthetic_text import REPLIES, SENTENCES
from relllm.evaluation.statistics import percentile_interval

LEVELS = {  # of a reply's reaction, in the order of `REPLIES`
    "neutral": (0, 0, 0),
    "happy": (2, 2, 1),
    "angry": (2, 1, 2),
    "sad": (2, 2, 2),
    "surprise": (1, 1, 1),
}
NOISE = 0.1
STEPS, CLIPS = 30, 240
REWARDS = "ER=1,length=-0.1,repetition=-1"
WEAK = ["--allow-weak-scorers"]  # words decide here, so that a bag of them is as good as a scorer can be
SHORT = ["--max-new-tokens", "48", "--device", "cpu"]


def split_reply(reply: str) -> tuple[str, str]:
    """Reaction and question of one of the corpus's replies."""
    reaction, mark, question = reply.rpartition(". " if ". " in reply else "! ")
    return reaction + mark.strip(), question


REACTIONS = {
    split_reply(reply)[0]: (emotion, level)
    for emotion, replies in REPLIES.items()
    for reply, level in zip(replies, LEVELS[emotion], strict=True)
}


def write_pairs(path: Path, split: str, seed: int, count: int = 3000) -> None:
    """Replies to the sentences of a split, in EPITOME's columns: any reaction, or none, and any question, or none."""
    rng = random.Random(seed)
    questions = [split_reply(reply)[1] for replies in REPLIES.values() for reply in replies]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["seeker_post", "response_post", "level", "rationales"])
        for number in range(count):
            sentence = rng.choice(SENTENCES[split])
            reaction = rng.choice([*REACTIONS, *REACTIONS, ""])
            question = rng.choice([*questions, ""]) if reaction else rng.choice(questions)
            level = REACTIONS[reaction][1] if reaction else 0
            level = rng.randrange(3) if rng.random() < NOISE else level
            writer.writerow(
                [
                    f"{sentence.text} {number}",
                    f"{reaction} {question}".strip().format(topic=sentence.topic),
                    level,
                    reaction if level and reaction else "",
                ]
            )


def train_scorers(demo: Path, out: Path) -> None:
    """Two scorers on encoders without pretraining, as small as the demo's LLM."""
    tokenizer = AutoTokenizer.from_pretrained(demo / "llm")
    size = {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "pad_token_id": tokenizer.pad_token_id}
    encoders = {
        "rewarded": lambda: BertModel(
            BertConfig(hidden_size=64, intermediate_size=128, num_attention_heads=4, **size)
        ),
        "held-out": lambda: RobertaModel(
            RobertaConfig(hidden_size=96, intermediate_size=192, num_attention_heads=4, **size)
        ),
    }
    for seed, (name, make) in enumerate(encoders.items()):
        folder, pairs = out / "encoders" / name, out / f"{name}.csv"
        set_seed(seed)
        make().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_pairs(pairs, ("train", "validation")[seed], seed)
        words = ["--mechanism", "ER", "--encoder", folder, "--seed", seed, "--epochs", 6, "--device", "cpu"]
        run("empathy", "train", "--data", pairs, *words, "--out", out / "scorers" / name)


def run(*words: object) -> None:
    """Run a command of relllm, shown as it would be typed."""
    print("$ relllm", *words, flush=True)
    subprocess.run([sys.executable, "-m", "relllm", *map(str, words)], check=True)


def train_all(demo: Path, out: Path) -> dict[str, Path]:
    """From the demo's RE-LLM: GRPO, and DPO on pairs of its own replies, by the scorer alone and with the emotion."""
    rows = load_corpus(demo / "corpus", "train")
    write_rows(rows.select(range(min(CLIPS, len(rows)))), out / "rows.jsonl")
    scorers, model, models = out / "scorers" / "rewarded", demo / "re-llm", {"sft": demo / "re-llm"}
    shared = {"eval_split": "", "bf16": "false", "use_cpu": "true", "gradient_checkpointing": "false", "seed": 0}
    shared |= {"save_strategy": "no", "report_to": "none", "logging_steps": 5, "learning_rate": 2e-4}
    shared |= {"emotion_loss_weight": 0.1, "dimension_loss_weight": 0.1, "gradient_accumulation_steps": 1}
    grpo = {"method": "grpo", "data": out / "rows.jsonl", "per_device_train_batch_size": 32, "max_steps": STEPS}
    grpo |= {"rewards": REWARDS, "scorers": scorers, "allow_weak_scorers": "true", "max_completion_length": 48}
    trainings = {"grpo": grpo}
    for name, rewards in (("dpo", REWARDS), ("dpo-emotion", f"{REWARDS},emotion=1")):
        pairs = out / f"{name}-pairs.jsonl"
        words = ["--rewards", rewards, "--scorers", scorers, *WEAK, "--samples", 8, *SHORT]
        run("score-replies", out / "rows.jsonl", "--model", model, *words, "--out", pairs)
        trainings[name] = {"method": "dpo", "data": pairs, "per_device_train_batch_size": 8, "num_train_epochs": 1}
    for name, own in trainings.items():
        models[name] = out / name
        flags = {"model_name_or_path": model, **shared, **own, "output_dir": models[name]}
        run("train", *(word for key, value in flags.items() for word in (f"--{key}", value)))
    return models


def read_truth(path: Path) -> tuple[list[int], np.ndarray]:
    """The rule's level of each reply whose reaction is known, and of every reply whether it suits the emotion."""
    lines = [json.loads(line) for line in (path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()[1:]]
    begins = {reaction.partition("{")[0]: known for reaction, known in REACTIONS.items()}
    said = [next((begins[one] for one in begins if line["reply"].startswith(one)), None) for line in lines]
    suits = [one is not None and one[0] == line["emotion"] for one, line in zip(said, lines, strict=True)]
    return [one[1] for one in said if one is not None], np.array(suits, float)


def describe_truth(path: Path, start: Path) -> str:
    """What the scorers cannot tell of a run's replies, and how far it is from the run at the start, paired by clip."""
    (levels, suits), (_, before) = read_truth(path), read_truth(start)
    drawn = np.random.default_rng(0).integers(len(suits), size=(2000, len(suits)))
    low, high = percentile_interval((suits - before)[drawn].mean(1), len(suits)) or (np.nan, np.nan)
    return (
        f"level {np.mean(levels):.3f} ({len(levels)} of {len(suits)} reactions are known); the reaction suits the "
        f"emotion in {suits.mean():.3f}, {(suits - before).mean():+.3f} [{low:+.3f}, {high:+.3f}]"
    )


def main() -> None:
    """Train, measure on unseen voices and sentences, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    demo, out = given.demo, given.out
    out.mkdir(parents=True, exist_ok=True)
    train_scorers(demo, out)
    models = train_all(demo, out)
    first, other = (out / "scorers" / name for name in ("rewarded", "held-out"))
    runs = {name: out / "runs" / name for name in models}
    for name, model in models.items():
        words = ["--tasks", "empathy", "--empathy-scorers", first, "--held-out-scorers", other, *WEAK, *SHORT]
        run("evaluate", model, demo / "corpus", *words, "--name", name, "--out", runs[name])
    run("compare", *runs.values(), "--baseline", "sft", "--out", out / "comparison")
    for name, path in runs.items():
        print(f"{name}: by the rule itself {describe_truth(path, runs['sft'])}")


if __name__ == "__main__":
    main()
