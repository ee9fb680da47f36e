"""What both demos do alike: one folder a step, three systems measured and compared, the card, the dry run, replies."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import AutoModel

from relllm.data.journal import write_json
from relllm.data.membership import RECORD_NAME
from relllm.evaluation.comparison_tables import report_comparison
from relllm.evaluation.evaluating import evaluate
from relllm.evaluation.evaluation_settings import ComparisonSettings, EvaluationSettings
from relllm.evaluation.summary import report_run
from relllm.hub.cards import write_model_card
from relllm.hub.push import push_checkpoint
from relllm.hub.sharing import CardSettings, PushSettings
from relllm.inference.conversation import Conversation
from relllm.labels import EMOTIONS
from relllm.modeling.checkpoint_relllm import TOWERS
from relllm.processing.processing_relllm import ReLLMProcessor

NEAR_CHANCE = 0.10  # above 1 / classes: what a run that learned nothing stays below


def claim_folder(out: Path, settings: Mapping[str, object]) -> None:
    """Bind a folder to one set of settings, because a step done under others must not be reused."""
    path = out / "settings.json"
    wanted = json.loads(json.dumps(settings))
    if path.exists() and (found := json.loads(path.read_text(encoding="utf-8"))) != wanted:
        raise ValueError(f"{out} holds a run with {found}, not {wanted}. Choose another --out, or delete it.")
    write_json(wanted, path)


def once(path: Path, what: str, make: Callable[[Path], None], console: Console, *, goes_on: bool = False) -> None:
    """Have `make` fill a folder under another name, and rename it when it is complete; leave one that is there.

    With `goes_on`, `make` goes on with what an interrupted one left.
    """
    if path.exists():
        console.print(f"{path.name}: there already", style="green")
        return
    console.rule(f"{path.name}: {what}")
    partial = path.with_name(path.name + ".partial")
    if not goes_on:
        shutil.rmtree(partial, ignore_errors=True)
    make(partial)
    partial.rename(path)


def evaluate_system(model: str | Path, data: Path, run: Path, system: str, console: Console, **options: Any) -> dict:
    """Run `relllm evaluate` on unseen voices and sentences, shown as the command; an LLM alone is `text-only`."""
    told = {name: ",".join(value) if isinstance(value, tuple) else value for name, value in options.items()}
    flags = "".join(f" --{name} {value}" for name, value in told.items())
    console.rule(f"$ relllm evaluate {model} {data} --system {system}{flags} --out {run}")
    settings = EvaluationSettings(str(model), str(data), run, system=system, **options)  # type: ignore[arg-type]
    metrics = evaluate(settings)
    report_run(metrics, run, console)
    return metrics


def compare_systems(out: Path, systems: Iterable[str], console: Console) -> None:
    """Run `relllm compare` over the runs in `out`, by the systems' names."""
    runs = [out / "runs" / system for system in systems]
    console.rule(f"$ relllm compare {' '.join(map(str, runs))} --baseline speech-only --out {out / 'comparison'}")
    report_comparison(ComparisonSettings(runs, ["speech-only"], out / "comparison"), console)
    console.print(f"Chance UA {1 / len(EMOTIONS):.2f}. Rule-made prosody, not human emotion.")


def share(
    model: Path, runs: list[Path], training: dict, console: Console, *, repo_id: str, full: bool = False
) -> None:
    """Write the card, and do everything that a push checks, without the push; `full`: with the towers."""
    own = [f"{part}=apache-2.0" for part in TOWERS]  # made here, or known to be
    flags = " ".join(f"--tower-license {one}" for one in own)
    measured = " ".join(map(str, runs))
    console.rule(f"$ relllm card {measured} --model {model} --repo-id {repo_id} --license apache-2.0 {flags}")
    write_json(training, model / RECORD_NAME)
    terms = {"license": "apache-2.0", "tower_license": own}
    card = write_model_card(CardSettings(model, runs, repo_id, overwrite=True, **terms))  # type: ignore[arg-type]
    console.print(f"Card: {card}")
    console.rule(f"$ relllm push {model} {repo_id} --dry-run{' --full' if full else ''}")
    checked = push_checkpoint(PushSettings(model, repo_id, full=full, dry_run=True))
    console.print(f"{len(checked.files)} files of {sum(checked.files.values()):,} bytes would go.", highlight=False)


def show_replies(rows: Dataset, out: Path, console: Console) -> None:
    """Reply to a clip of each emotion, and by a fresh process to a file; then say where the plots are."""
    console.rule("What it replies")
    model = AutoModel.from_pretrained(out / "re-llm").eval()
    processor = ReLLMProcessor.from_pretrained(out / "re-llm")
    replies = Table("said", "in emotion", "RE-LLM replies")
    for row in rows.select(range(len(EMOTIONS))):
        reply = Conversation(model, processor).say(row["audio"], max_new_tokens=40)
        replies.add_row(row["text"], row["emotion"], reply.text)
    console.print(replies)
    console.rule("A fresh process loads the checkpoint and answers a file")
    console.print(f"$ relllm reply {out / 're-llm'} {rows[0]['audio']}")
    command = [sys.executable, "-m", "relllm.cli", "reply", str(out / "re-llm"), rows[0]["audio"], "--device", "cpu"]
    subprocess.run([*command, "--max-new-tokens", "40"], check=True)
    for plot in sorted(plot for name in ("runs", "comparison", "heads") for plot in (out / name).rglob("*.png")):
        console.print(f"plot: {plot}")


def has_learned(metrics: Mapping, console: Console) -> bool:
    """Tell whether the emotion head's UA on unseen voices is above chance by more than 0.10; say so if not."""
    accuracy: float = metrics["recognition"]["head"]["ua"]
    learned = accuracy > 1 / len(EMOTIONS) + NEAR_CHANCE
    if not learned:
        near = f"UA {accuracy:.2f} on unseen voices is near chance ({1 / len(EMOTIONS):.2f})"
        console.print(f"This run has learned nothing: {near}.", style="red")
    return learned
