"""The first test to read: README's commands, from a corpus on disk to a compared model with a card.

Bash reads every `console` line under "The command line", loops and quotes included, and each command of it runs to
its end in this process, one after the other, as it is written there but for `STAND_INS`. The corpora are small trees
in the layouts of the real ones; the towers have the architectures and the precisions of the published ones.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import typer
from chat_templates import CHATML
from corpus_trees import Segment, Turn, write_esd, write_iemocap, write_msp_podcast, write_text, write_wav
from empathy_scorers import save_encoder, write_csv
from tiny_models import tiny_emotion_tower, tiny_model, tiny_processor
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from relllm.cli import app
from relllm.cli.training_help import show_training_help
from relllm.demo.tiny_towers import make_tiny_towers
from relllm.preferences.dpo import parse_dpo
from relllm.preferences.grpo import parse_grpo
from relllm.processing.prompts_relllm import SYSTEM_PROMPT, WRITER_PROMPT
from relllm.setting import find_method
from relllm.training.baselines.text_training import parse_text_arguments
from relllm.training.emotion_training import parse_emotion_arguments
from relllm.training.planning.plan import parse_plan
from relllm.training.run import parse_arguments

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")  # WavLM's
ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BASH = shutil.which("bash")
# Without a PATH no program is found, and each says how it was called: its words end in NUL, the command in RS.
SAY = "command_not_found_handle() { printf '%s\\0' \"$@\"; printf '\\036'; }\nPATH=/dev/null\n"
CLIP_S = 0.3
KINDS = ("neu", "hap", "ang", "sad")
METHODS = {"sft": parse_arguments, "dpo": parse_dpo, "grpo": parse_grpo}
PARSERS = {
    "train": lambda arguments: METHODS[find_method(arguments)](arguments),
    "train-emotion": parse_emotion_arguments,
    "train-text": parse_text_arguments,
    "plan": parse_plan,
}
STAND_INS = {  # of what is on the Hub, and of sizes; in README's lines and in the recipes
    "openai/whisper-large-v2": "towers/speech",
    "audeering/wav2vec2-large-robust-12-ft-emotion-msp-dim": "towers/emotion",
    "Qwen/Qwen2.5-7B-Instruct": "towers/llm",
    "microsoft/wavlm-large": "towers/wavlm",
    "--mechanism ER": "--mechanism ER --encoder towers/encoder --epochs 1",
    "--empathy-scorers runs/scorers": "--empathy-scorers runs/scorers --allow-weak-scorers",
    "prepare synthetic": "prepare synthetic --train-clips 4 --validation-clips 1 --test-clips 1",
    "bf16: true": "bf16: true\nuse_cpu: true\nmax_steps: 2",
    "dataloader_num_workers: 4": "dataloader_num_workers: 0",
    "max_steps: 12": "max_steps: 2",
}
OF_ALL = {"help", "version", "debug", "install-completion"}
OF_THE_ORIGINAL = {"loss-names", "unfreeze-adapter", "unfreeze-qwen"}  # flags of its scripts, quoted beside ours
OF_VLLM = {
    "limit-mm-per-prompt",
    "max-model-len",
    "hf-overrides",
    "allowed-media-domains",
    "pipeline-parallel-size",
    "enable-lora",
}
ENDLESS = ("web", "serve")  # tests/inference/ has them; tests/training/test_recipes.py has `accelerate launch`
REPLY = "That sounds hard. What happened next?"


def read_walks() -> dict[str, list[list[str]]]:
    """The commands of README by corpus, as bash understands the lines."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## The command line\n(.*?)^## ", readme, flags=re.DOTALL | re.MULTILINE)[1]
    _, *parts = re.split(r"^\*\*(.+?)\*\*", section, flags=re.MULTILINE)
    read = {title: read_commands(text) for title, text in zip(parts[::2], parts[1::2], strict=True)}
    return {title: ours for title, commands in read.items() if (ours := [words for words in commands if ends(*words)])}


def ends(program: str, name: str, *_: str) -> bool:
    return program == "relllm" and name not in ENDLESS


def read_commands(text: str) -> list[list[str]]:
    blocks = re.findall(r"```console\n(.*?)```", text, flags=re.DOTALL)
    lines = "".join(blocks).replace("\n$ ", "\n").removeprefix("$ ")
    for written, stand_in in STAND_INS.items():
        lines = lines.replace(written, stand_in)
    done = subprocess.run([BASH, "-euc", SAY + lines], capture_output=True, text=True)
    assert done.returncode == 0, f"bash cannot read this: {done.stderr}\n{lines}"
    return [command.split("\0")[:-1] for command in done.stdout.split("\036")[:-1]]


WALKS = read_walks()


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Towers as they are published, in folders: the LLM in bfloat16 with a chat template, the others in float32."""
    folder = tmp_path_factory.mktemp("published") / "towers"
    make_tiny_towers(folder)
    tiny_emotion_tower("wavlm").encoder.save_pretrained(folder / "wavlm")
    save_encoder(folder / "encoder", max_position_embeddings=80)
    tokenizer = AutoTokenizer.from_pretrained(folder / "llm")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder / "llm")
    teach_reply(AutoModelForCausalLM.from_pretrained(folder / "llm"), tokenizer).save_pretrained(folder / "llm")
    return folder


def teach_reply(llm: torch.nn.Module, tokenizer: AutoTokenizer) -> torch.nn.Module:
    """One reply to everything, which is enough of a writer."""
    prompts = [
        WRITER_PROMPT.format(emotion=emotion) + text for emotion in ("happy", "sad") for text in ("No.", "Yes!")
    ]
    turns = [[{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": text}] for text in prompts]
    texts = [tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True) for one in turns]
    reply = tokenizer(f"{REPLY}<|im_end|>")["input_ids"]
    optimizer = torch.optim.AdamW(llm.parameters(), lr=5e-3)
    for step in range(60):
        row = tokenizer(texts[step % len(texts)])["input_ids"]
        labels = torch.tensor([[-100] * len(row) + reply])
        llm(input_ids=torch.tensor([row + reply]), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return llm.to(torch.bfloat16)


@pytest.fixture
def place(towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands are typed: recipes, corpora, and what `make demo` leaves."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for module in ("preparing", "inspection"):  # so many rows are not worth a process each
        monkeypatch.setattr(f"relllm.data.{module}.available_cores", lambda: 1)
    (tmp_path / "towers").symlink_to(towers)
    for recipe in (ROOT / "recipes").rglob("*.yaml"):
        text = recipe.read_text(encoding="utf-8")
        for written, stand_in in STAND_INS.items():
            text = text.replace(written, stand_in)
        write_text(tmp_path / recipe.relative_to(ROOT), text)
    write_corpora(tmp_path / "corpora")
    own = [(f"{who}{i}.wav", "It rained again.", KINDS[i], who) for who in ("anna", "ben", "cleo") for i in range(4)]
    for name in ("recordings/" + name for name, *_ in own):
        write_wav(tmp_path / name, duration_s=CLIP_S)
    write_csv(tmp_path / "recordings" / "labels.csv", own, "path,text,emotion,speaker")
    said, answered = "so sorry", "so sorry , what happened ?"
    pairs = [(i, i, f"I feel lost {i}", answered, i % 3, said * (i % 3 > 0)) for i in range(30)]
    write_csv(tmp_path / "emotional-reactions-reddit.csv", pairs)
    tiny_model().save_pretrained(tmp_path / "runs" / "demo" / "re-llm")
    tiny_processor().save_pretrained(tmp_path / "runs" / "demo" / "re-llm")
    for name in ("question.wav", "more.wav"):
        write_wav(tmp_path / name, duration_s=CLIP_S)
    return tmp_path


def write_corpora(folder: Path) -> None:
    """Every session, speaker and split has each of four emotions."""
    rated = ((2.5, 3.0, 3.5), (4.5, 4.0, 3.0), (1.5, 4.5, 4.5), (2.0, 1.5, 2.0))
    turns = [
        Turn(f"Ses0{session}F_impro01_{who}00{i}", KINDS[i], *rated[i])
        for session in range(1, 6)
        for who in "FM"
        for i in range(4)
    ]
    write_iemocap(folder / "IEMOCAP_full_release", turns, duration_s=CLIP_S)
    numbers = [350 * emotion + number for emotion in range(5) for number in (1, 51)]  # of validation, of train
    write_esd(folder / "Emotion Speech Dataset", ("0011", "0019", "0020"), numbers, duration_s=CLIP_S)
    segments = [
        Segment(f"MSP-PODCAST_000{number}_000{i}", "NHAS"[i], f"{2 + i}", f"{6 - i}", "4.5", f"{number}", split)
        for number, split in enumerate(("Train", "Development", "Test1"))
        for i in range(4)
    ]
    write_msp_podcast(folder / "MSP-Podcast", segments, duration_s=CLIP_S)


@pytest.mark.parametrize("title", [pytest.param("IEMOCAP", marks=pytest.mark.slow), *list(WALKS)[1:]])
@pytest.mark.usefixtures("place", "no_drawing")
def test_the_commands_of_the_readme_run_to_their_end(title: str) -> None:
    for _, *arguments in WALKS[title]:
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, f"{arguments}: {done.output} {done.exception!r}"
        out = Path(arguments[arguments.index("--out") + 1]) if "--out" in arguments else None
        assert out is None or out.exists(), arguments
        if arguments[0] == "evaluate":
            assert json.loads((out / "metrics.json").read_text())["data"]["num_failed"] == 0
    if title == "IEMOCAP":
        assert json.loads(Path("runs/eval/five-folds/metrics.json").read_text())["data"]["num_clips"] == 40
        assert json.loads(Path("re-llm/training_settings.json").read_text())["lora_r"] == 16  # which the card has
        card = Path("re-llm/README.md").read_text()
        assert "lora_r" in card and "IEMOCAP: Interactive" in card and "for academic use" in card
        assert "5 folds by session of 5 models" in Path("runs/iemocap-Ses05/README.md").read_text()


def test_every_command_of_the_documents_is_one_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its flags and their values are read as they are typed, and nothing is run."""
    monkeypatch.chdir(ROOT)
    commands = [one for path in DOCUMENTS for one in read_commands(path.read_text(encoding="utf-8"))]
    assert len(commands) > 60
    for program, *arguments in commands:
        if program == "relllm":
            parse(arguments)


def test_flags_in_the_text_of_a_document_are_flags_of_the_commands_that_it_names() -> None:
    flags = {name: read_flags(name) for name in typer.main.get_command(app).commands}
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        of_page = {flag for name in re.findall(r"relllm ([a-z-]+)", text) for flag in flags.get(name, ())}
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for span in re.findall(r"`([^`]*--[^`]*)`", prose):
            name = span.removeprefix("relllm ").split()[0]
            if name in flags or name.startswith("--"):
                named = {one.replace("_", "-") for one in re.findall(r"(?<!\S)--([a-z][\w-]*)", span)}
                unknown = named - flags.get(name, of_page) - OF_ALL - OF_THE_ORIGINAL - OF_VLLM
                assert not unknown, f"{path.name}: {span}"


def read_flags(name: str) -> set[str]:
    """The flags of a command, and of the commands below it."""
    if name in PARSERS:
        methods = ("", *(f" --method {method}" for method in METHODS if method != "sft")) if name == "train" else ("",)
        pages = "".join(show_training_help(f"{name}{method}", "") for method in methods)
        return {flag.replace("_", "-") for flag in re.findall(r"--([\w-]+)", pages)} | {"out", "cache-dir"}
    command = typer.main.get_command(app).commands[name]
    parts = [command, *getattr(command, "commands", {}).values()]
    return {
        opt.removeprefix("--").replace("_", "-")
        for part in parts
        for param in part.params
        for opt in [*param.opts, *param.secondary_opts]
    }


def parse(arguments: list[str]) -> None:
    name, *rest = arguments
    if name in PARSERS and "--help" not in rest:
        needed = [] if {"--output_dir", "--out"} & set(rest) else ["--out", "runs/x"]
        PARSERS[name]([*rest, *needed, *([] if name == "plan" else ["--use_cpu", "true"])])
        return
    command = typer.main.get_command(app)
    while isinstance(command, typer.core.TyperGroup):
        name, *arguments = arguments
        command = command.commands[name]
    if arguments != ["--help"]:
        command.make_context(name, arguments)
