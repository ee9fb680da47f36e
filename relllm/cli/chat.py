"""`relllm chat`: a conversation in the terminal, spoken and typed. The conversations themselves are in the library."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer
from rich.console import Console
from rich.markup import escape

from .systems import load_systems

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from relllm.inference.conversation import Conversation
    from relllm.inference.replies import Hearing
    from relllm.inference.text_conversation import TextConversation
    from relllm.processing.audio_relllm import AudioSource

    System: TypeAlias = Conversation | TextConversation

app = typer.Typer()
console = Console(highlight=False)

HELP = """\
Type a line and press Enter, or:
  /wav FILE [TEXT]   say what is in an audio file (a path or URL), with text before it if you like
  /record [TEXT]     record from the microphone until Enter
  /reset             begin a new conversation
  /help              this list
  /quit              end; Ctrl-D does so as well, Ctrl-C stops a reply"""


@dataclass
class Chat:
    """The systems that answer each turn, by name; RE-LLM first."""

    systems: dict[str, System]
    tokenizers: dict[str, PreTrainedTokenizerBase]
    max_new_tokens: int

    def handle(self, line: str) -> bool:
        """Act on one line; `False` ends the chat."""
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
        """One turn to every system. A failure is named, and that system's conversation goes on without the turn."""
        from transformers import TextStreamer

        for name, system in self.systems.items():
            if len(self.systems) > 1:
                console.print(f"[bold]{escape(name)}[/bold]")
            streamer = TextStreamer(self.tokenizers[name], skip_prompt=True, skip_special_tokens=True)
            try:
                turn = system.say(audio, text, streamer=streamer, max_new_tokens=self.max_new_tokens)
            except (ImportError, OSError, ValueError) as error:  # ImportError: what a container or a rate needs
                console.print(f"[red]not answered:[/red] {escape(str(error))}")
            except KeyboardInterrupt:
                console.print("\n[yellow]Stopped: this turn is forgotten.[/yellow]")
                return
            else:
                if turn.hearing is not None:
                    console.print(f"[dim]{describe(turn.hearing)}[/dim]")


def describe(hearing: Hearing) -> str:
    """The emotion with its probability and the three dimensions, on one line."""
    dimensions = "  ".join(f"{name} {value:.2f}" for name, value in hearing.dimensions.items())
    return f"{hearing.emotion} {hearing.probabilities[hearing.emotion]:.0%}  {dimensions}"


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="A ReLLM checkpoint: a directory or a Hub id.")],
    text_only: Annotated[
        str | None, typer.Option(help="Also ask a bare LLM: a directory, a Hub id, or `own` for the one inside MODEL.")
    ] = None,
    speech_only: Annotated[
        str | None, typer.Option(help="Also ask a second ReLLM, for example a speech-only.")
    ] = None,
    transcriber: Annotated[
        str | None,
        typer.Option(help="Speech recognition that writes spoken turns down for --text-only: Whisper, CTC."),
    ] = None,
    instruction: Annotated[str | None, typer.Option(help="Text before a clip; empty for none.")] = None,
    system_prompt: Annotated[str | None, typer.Option(help="System turn; empty for none.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reply, in tokens.")] = 128,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, … or auto.")] = "auto",
    revision: Annotated[str, typer.Option(help="Branch, tag or commit of MODEL on the Hub.")] = "main",
) -> None:
    """Talk with a model over several turns, typed or spoken; each spoken turn shows the emotion that was heard.

    Inside, /help lists the commands: /wav FILE, /record, /reset, /quit.
    Earlier turns are not computed again. Lines from a pipe work as well:
    then each line is shown before its reply.

    Example: relllm chat runs/demo/re-llm --text-only own --transcriber openai/whisper-tiny.en
    """
    given = {"instruction": instruction, "system_prompt": system_prompt}
    request = {name: value for name, value in given.items() if value is not None}
    systems, tokenizers = load_systems(
        model,
        text_only=text_only,
        speech_only=speech_only,
        transcriber=transcriber,
        device=device,
        revision=revision,
    )
    chat = Chat({name: start(**request) for name, start in systems.items()}, tokenizers, max_new_tokens)
    console.print(f"[dim]{escape(model)}. /help lists the commands.[/dim]")
    run(chat)


def run(chat: Chat) -> None:
    """Read lines until /quit or the end of the input."""
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
