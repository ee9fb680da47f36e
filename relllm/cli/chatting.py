"""A conversation in the terminal, line by line: what `relllm chat` does with each of them."""

from __future__ import annotations

import glob
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from relllm.data.journal import write_whole

from .options import console

if TYPE_CHECKING:
    from relllm.inference.conversation import Conversation
    from relllm.inference.inference_settings import TalkSettings
    from relllm.inference.text_conversation import TextConversation
    from relllm.processing.audio_relllm import AudioSource

    System: TypeAlias = Conversation | TextConversation

HELP = """\
Type a line and press Enter, or:
  /wav FILE [TEXT]   say what is in an audio file (a path or URL; in quotes if it has spaces), with text before it
  /record [TEXT]     record from the microphone until Enter
  /save FILE         write the conversation, as .json or .md
  /reset             begin a new conversation
  /help              this list
  /quit              end; Ctrl-D does so as well, Ctrl-C stops a reply
Tab completes commands and files."""
COMMANDS = ("/wav", "/record", "/save", "/reset", "/help", "/quit")
UNREADABLE = "\N{REPLACEMENT CHARACTER}"


class Chat:
    """The systems that answer each line, by name; RE-LLM first."""

    def __init__(self, systems: Mapping[str, System], settings: TalkSettings):
        self.systems = systems
        self.settings = settings
        self.turns: list[dict[str, object]] = []  # what was said, and the replies by system
        self._saved: set[Path] = set()

    def handle(self, line: str) -> bool:
        """Act on one line; return `False` if it ends the chat."""
        command, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if command == "/quit":
            return False
        if command == "/help":
            console.print(HELP)
        elif command == "/reset":
            for system in self.systems.values():
                system.reset()
            self.turns = []
            console.print("A new conversation.", style="dim")
        elif command == "/wav":
            self._say_file(rest)
        elif command == "/record":
            self._say_recording(rest)
        elif command == "/save":
            self._save(rest)
        elif command.startswith("/"):
            console.print(f"No such command: {command}. /help lists them.", style="red")
        elif command:
            self.say(None, line.strip())
        return True

    def _say_file(self, rest: str) -> None:
        path, text = _split_path(rest)
        if not path:
            console.print("/wav needs a file: /wav question.wav", style="red")
            return
        first: Any = next(iter(self.systems.values()))  # RE-LLM
        try:
            clip = first.processor.feature_extractor.read_clip(path, channel=self.settings.channel)
        except (ImportError, OSError, ValueError) as error:  # ImportError: what a container or a rate needs
            console.print(f"not read: {error}", style="red")
        except KeyboardInterrupt:
            console.print("\nStopped: this turn is forgotten.", style="yellow")
        else:
            self.say({"waveform": clip}, text or None, spoken=path)

    def _say_recording(self, text: str) -> None:
        from relllm.inference.microphone import record

        console.print("Recording. Enter ends it.", style="yellow")
        try:
            audio = record(input)
        except (ImportError, OSError) as error:
            console.print(f"not recorded: {error}", style="red")
            return
        except (EOFError, KeyboardInterrupt):
            console.print("\nStopped: this recording is forgotten.", style="yellow")
            return
        self.say(audio, text or None, spoken="a recording")

    def say(self, audio: AudioSource | None, text: str | None, *, spoken: str | None = None) -> None:
        """Say something to every system. A failure is named, and that conversation goes on without the turn."""
        from transformers import TextStreamer

        replies: dict[str, object] = {}
        for name, system in self.systems.items():
            if len(self.systems) > 1:
                console.print(name, style="bold")
            streamer = TextStreamer(system.tokenizer, skip_prompt=True, skip_special_tokens=True)
            try:
                how: dict[str, Any] = {"max_new_tokens": self.settings.max_new_tokens, "drop_oldest": True}
                reply = system.say(audio, text, streamer=streamer, **how)
            except (ImportError, OSError, ValueError) as error:
                if isinstance(error, BrokenPipeError):
                    raise
                console.print(f"not answered: {error}", style="red")
            except KeyboardInterrupt:
                console.print("\nStopped: this turn is forgotten.", style="yellow")
                break
            else:
                replies[name] = reply.describe()
                if reply.dropped:
                    console.print(f"{name}: older turns were dropped ({reply.dropped}).", style="yellow")
                if reply.heard is not None:
                    console.print(str(reply.heard), style="dim")
        if replies:
            self.turns.append({"audio": spoken, "text": text, "replies": replies})

    def _save(self, rest: str) -> None:
        path = Path(os.path.expanduser(_split_path(rest)[0]))
        if path.suffix not in (".json", ".md"):
            console.print("/save needs a file that ends in .json or .md: /save talk.md", style="red")
            return
        if os.path.exists(path) and path not in self._saved:
            console.print(f"not saved: {path} is there already. Name another file.", style="red")
            return
        talk = {"model": self.settings.model, "turns": self.turns}
        text = json.dumps(talk, indent=2, ensure_ascii=False) if path.suffix == ".json" else "\n\n".join(_mark(talk))
        try:
            with write_whole(path) as partial:
                partial.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            console.print(f"not saved: {error}", style="red")
            return
        self._saved.add(path)
        console.print(f"{len(self.turns)} turns in {path}", style="dim")


def run_chat(chat: Chat) -> None:
    """Take lines from a terminal or a pipe until one ends the chat."""
    interactive = sys.stdin.isatty()
    if interactive:
        _edit_lines()
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    while True:
        try:
            line = input("you: ") if interactive else input()
        except EOFError:
            return
        except KeyboardInterrupt:
            console.print("\n/quit or Ctrl-D ends.", style="dim")
            continue
        if not interactive:
            console.print(f"you: {line}", style="bold")
        if UNREADABLE in line:
            console.print(f"{UNREADABLE} stands for what is not UTF-8 in this line.", style="yellow")
        if not chat.handle(line):
            return


def complete_line(line: str) -> list[str]:
    """Return what a line may become: commands, and files behind `/wav` and `/save`, in quotes if they have spaces."""
    command, space, rest = line.partition(" ")
    if not space:
        return [f"{name} " for name in COMMANDS if line and name.startswith(line)]
    if command not in ("/wav", "/save"):
        return []
    begun = rest.lstrip().strip('"')
    found = sorted(glob.glob(glob.escape(os.path.expanduser(begun)) + "*"))
    paths = [path + os.sep * os.path.isdir(path) for path in found]
    return [f'{command} "{path}"' if " " in path else f"{command} {path}" for path in paths]


def _edit_lines() -> None:
    """Give `input` history, line editing, and Tab."""
    import readline

    found: list[str] = []

    def complete(line: str, number: int) -> str | None:
        if number == 0:
            found[:] = complete_line(line)
        return found[number] if number < len(found) else None

    readline.set_completer_delims("")
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")


def _split_path(rest: str) -> tuple[str, str]:
    """Return a path, which may be in quotes or have spaces if it is there, and the text behind it."""
    if rest[:1] in ("'", '"') and (end := rest.find(rest[0], 1)) > 0:
        return rest[1:end], rest[end + 1 :].strip()
    if os.path.exists(os.path.expanduser(rest)):
        return rest, ""
    path, _, text = rest.partition(" ")
    return path, text.strip()


def _mark(talk: Mapping) -> Iterator[str]:
    """Yield the paragraphs of a conversation as Markdown."""
    yield f"# A conversation with {talk['model']}"
    for turn in talk["turns"]:
        audio = f"*({turn['audio']})*" if turn["audio"] else ""
        yield f"**you:** {' '.join(filter(None, (turn['text'], audio)))}"
        for name, answer in turn["replies"].items():
            yield f"**{name}:** {answer['reply']}"
            if answer.get("emotion") is not None:
                share = answer["probabilities"][answer["emotion"]]
                numbers = "  ".join(f"{dimension} {value:.2f}" for dimension, value in answer["dimensions"].items())
                yield f"*heard: {answer['emotion']} {share:.0%}  {numbers}*"
