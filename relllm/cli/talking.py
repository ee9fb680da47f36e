"""Talking with a model: `relllm reply`, `chat` and `web`, and `relllm demo`, which makes one to try."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer
from rich.console import Console
from rich.markup import escape

from relllm.demo.demo_settings import DemoSettings
from relllm.inference.inference_settings import (
    CheckpointSettings,
    ClipSettings,
    HearSettings,
    PageSettings,
    TalkSettings,
)
from relllm.modeling.places_relllm import check_place

from .options import from_settings, pick_device

if TYPE_CHECKING:
    from relllm.inference.conversation import Conversation
    from relllm.inference.text_conversation import TextConversation
    from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration
    from relllm.processing.audio_relllm import AudioSource
    from relllm.processing.processing_relllm import ReLLMProcessor

    System: TypeAlias = Conversation | TextConversation

app = typer.Typer()
console = Console(highlight=False)
messages = Console(stderr=True, highlight=False, soft_wrap=True)
SHOWN = 10  # reasons why a clip was not read; the table has all

HELP = """\
Type a line and press Enter, or:
  /wav FILE [TEXT]   say what is in an audio file (a path or URL), with text before it if you like
  /record [TEXT]     record from the microphone until Enter
  /reset             begin a new conversation
  /help              this list
  /quit              end; Ctrl-D does so as well, Ctrl-C stops a reply"""


@app.command("reply")
@from_settings
def reply_to_clips(
    settings: ClipSettings, audio: Annotated[list[str], typer.Argument(help="WAV, FLAC, OGG or MP3 files, or URLs.")]
) -> None:
    """Answer spoken turns: the reply as it is written, the emotion heard, arousal, dominance and valence.

    A file that cannot be read is named, the others are answered, and the exit status is 1.

    Example: relllm reply runs/demo/re-llm question.wav

    A call with a speaker on each side: relllm reply runs/demo/re-llm call.wav --channel each
    """
    from transformers import TextStreamer

    from relllm.inference.replies import reply

    model, processor = load_relllm(settings)
    failed = 0
    for source in audio:
        console.print(f"[bold]{escape(source)}[/bold]")
        streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        length = settings.max_new_tokens
        try:
            for clip in processor.feature_extractor.read_clips([source], channel=settings.channel):
                read = {"waveform": clip}
                answer = reply(model, processor, read, streamer=streamer, max_new_tokens=length, **settings.prompts)
                console.print(f"[dim]{answer.heard}[/dim]")
        except (OSError, ValueError) as error:
            failed += 1
            console.print(f"[red]not answered:[/red] {escape(str(error))}")
    if failed:
        raise typer.Exit(1)


@app.command("hear")
@from_settings
def hear_many(
    settings: HearSettings,
    audio: Annotated[list[str], typer.Argument(help="Audio files, URLs, folders of them, data sets, or - for stdin.")],
) -> None:
    """Write the emotions of many clips as a table: probabilities, arousal, dominance, valence; no LLM runs.

    A row a clip, or a window with --every; `tower_…` is what the emotion tower itself reads. A clip that cannot be
    read has its reason in the column `error`, and the exit status is 1. With --out, the same command goes on where it
    was when it is killed.

    Example: relllm hear runs/demo/re-llm recordings --out heard.csv

    Over time: relllm hear runs/demo/re-llm session.wav --every 2 --channel each --out heard.csv --plots plots
    """
    from relllm.inference.hearing import find_clips, write_heard

    report = write_heard(find_clips(audio, settings.split), lambda: load_relllm(settings), settings)
    for reason in list(report["not_read"].values())[:SHOWN]:
        messages.print(f"[red]not heard:[/red] {escape(reason)}")
    if settings.out is not None:
        more = f", {len(report['not_read']):,} of them not read" if report["not_read"] else ""
        console.print(f"{report['clips']:,} clips{more}, {report['rows']:,} rows in [bold]{settings.out}[/bold]")
    if report["not_read"]:
        raise typer.Exit(1)


@app.command()
@from_settings
def chat(settings: TalkSettings) -> None:
    """Talk with a model over several turns, typed or spoken; each spoken turn shows the emotion that was heard.

    Inside, /help lists the commands: /wav FILE, /record, /reset, /quit.
    Earlier turns are not computed again. Lines from a pipe work as well:
    then each line is shown before its reply.

    Example: relllm chat runs/demo/re-llm --text-only own --transcriber openai/whisper-tiny.en
    """
    chat = Chat({name: start() for name, start in load_systems(settings).items()}, settings.max_new_tokens)
    console.print(f"[dim]{escape(settings.model)}. /help lists the commands.[/dim]")
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  # line editing and history for input()
    while True:
        try:
            line = input("you: ") if interactive else input()
        except EOFError:
            return
        except KeyboardInterrupt:
            console.print("\n[dim]/quit or Ctrl-D ends.[/dim]")
            continue
        if not interactive:
            console.print(f"[bold]you:[/bold] {escape(line)}")
        if not chat.handle(line):
            return


@app.command()
@from_settings
def web(settings: PageSettings) -> None:
    """Talk with a model in the browser: microphone, upload or text; what was heard, now and over the turns.

    Every browser tab is a conversation of its own; they take turns at the
    model. Nothing is sent elsewhere, and recordings are deleted. Browsers
    give the microphone to https pages and to localhost only: from another
    machine use `ssh -L 7860:localhost:7860 HOST`. There is no password: do
    not serve it to a network that you do not trust.

    Example: relllm web runs/demo/re-llm --baseline runs/demo/speech-only
    """
    from relllm.inference.web import Page

    page = Page(load_systems(settings), max_new_tokens=settings.max_new_tokens)
    console.print(f"{escape(settings.model)}: http://{settings.host}:{settings.port}  (Ctrl-C ends)")
    page.launch(host=settings.host, port=settings.port)


@app.command()
@from_settings
def demo(settings: DemoSettings) -> None:
    """Train, evaluate and talk to a RE-LLM on synthetic speech: minutes on two cores, and nothing is downloaded.

    Interrupted, it goes on with the step it was in. The speech is rule-made prosody (eSpeak NG), not human emotion.

    Example: relllm demo --out runs/demo
    """
    from relllm.demo.tiny import run_demo

    if not run_demo(settings, console):
        raise typer.Exit(1)


class Chat:
    """The systems that answer each line, by name; RE-LLM first."""

    def __init__(self, systems: dict[str, System], max_new_tokens: int):
        self.systems = systems
        self.max_new_tokens = max_new_tokens

    def handle(self, line: str) -> bool:
        """Act on one line; return `False` if it ends the chat."""
        command, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if command == "/quit":
            return False
        if command == "/help":
            console.print(HELP, markup=False)
        elif command == "/reset":
            for system in self.systems.values():
                system.reset()
            console.print("[dim]A new conversation.[/dim]")
        elif command == "/wav":
            self._say_file(rest)
        elif command == "/record":
            self._say_recording(rest)
        elif command.startswith("/"):
            console.print(f"[red]No such command:[/red] {escape(command)}. /help lists them.")
        elif command:
            self.say(None, line.strip())
        return True

    def _say_file(self, rest: str) -> None:
        if not rest:
            console.print("[red]/wav needs a file:[/red] /wav question.wav")
            return
        path, _, text = rest.partition(" ")
        if Path(rest).exists():  # a name with spaces
            path, text = rest, ""
        self.say(path, text.strip() or None)

    def _say_recording(self, text: str) -> None:
        from relllm.inference.microphone import record

        console.print("[yellow]Recording.[/yellow] Enter ends it.")
        try:
            audio = record(input)
        except (ImportError, OSError) as error:
            console.print(f"[red]not recorded:[/red] {escape(str(error))}")
            return
        self.say(audio, text or None)

    def say(self, audio: AudioSource | None, text: str | None) -> None:
        """Say something to every system. A failure is named, and that conversation goes on without the turn."""
        from transformers import TextStreamer

        for name, system in self.systems.items():
            if len(self.systems) > 1:
                console.print(f"[bold]{escape(name)}[/bold]")
            streamer = TextStreamer(system.tokenizer, skip_prompt=True, skip_special_tokens=True)
            try:
                reply = system.say(audio, text, streamer=streamer, max_new_tokens=self.max_new_tokens)
            except (ImportError, OSError, ValueError) as error:  # ImportError: what a container or a rate needs
                console.print(f"[red]not answered:[/red] {escape(str(error))}")
            except KeyboardInterrupt:
                console.print("\n[yellow]Stopped: this turn is forgotten.[/yellow]")
                return
            else:
                if reply.heard is not None:
                    console.print(f"[dim]{reply.heard}[/dim]")


def load_relllm(settings: CheckpointSettings) -> tuple[ReLLMForConditionalGeneration, ReLLMProcessor]:
    """Return a ReLLM and its processor, ready to reply; another kind of checkpoint is a `typer.BadParameter`."""
    from transformers import AutoModel, AutoProcessor

    from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration

    place, revision = settings.model, settings.revision
    processor = AutoProcessor.from_pretrained(place, revision=revision)
    model = AutoModel.from_pretrained(place, revision=revision, dtype=settings.dtype)
    if not isinstance(model, ReLLMForConditionalGeneration):
        raise typer.BadParameter(f"{place} holds a {type(model).__name__}, not a ReLLM.", param_hint="MODEL")
    return model.to(pick_device(settings.device)).eval(), processor


def load_systems(settings: TalkSettings) -> dict[str, Callable[[], System]]:
    """Return what begins a conversation with each system, by name, RE-LLM first; wrong flags: `typer.BadParameter`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from relllm.inference.conversation import Conversation
    from relllm.inference.text_conversation import TextConversation, Transcriber

    if settings.transcriber is not None and settings.text_only is None:
        message = "It writes spoken turns down for --text-only, which is missing."
        raise typer.BadParameter(message, param_hint="--transcriber")
    if settings.text_only not in (None, "own"):
        check_place(settings.text_only, holds="config.json")
    model, processor = load_relllm(settings)
    device, prompts = pick_device(settings.device), settings.prompts
    systems: dict[str, Callable[[], System]] = {"RE-LLM": partial(Conversation, model, processor, **prompts)}
    if settings.baseline is not None:
        where = CheckpointSettings(model=settings.baseline, device=settings.device, dtype=settings.dtype)
        second, its_processor = load_relllm(where)
        name = "speech only" if second.config.emotion_fusion == "none" else "second RE-LLM"
        systems[name] = partial(Conversation, second, its_processor, **prompts)
    if settings.text_only is not None:
        writer = None if settings.transcriber is None else Transcriber(settings.transcriber, device=device)
        start: Callable[..., System] = partial(TextConversation.inside, model, processor)
        if settings.text_only != "own":
            options = {"dtype": settings.dtype, "use_safetensors": True}
            llm = AutoModelForCausalLM.from_pretrained(settings.text_only, **options).to(device).eval()
            tokenizer = AutoTokenizer.from_pretrained(settings.text_only)
            asked = {"instruction": processor.instruction, "system_prompt": processor.system_prompt}
            prompts = asked | prompts
            start = partial(TextConversation, llm, tokenizer)
        systems["text only"] = partial(start, transcriber=writer, **prompts)
    return systems
