"""A conversation in the terminal, line by line: what `relllm chat` does with each of them."""

from __future__ import annotations

import glob
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relllm.data.journal import write_whole

from .options import console

if TYPE_CHECKING:
    from relllm.inference.conversation import TurnTaking
    from relllm.inference.inference_settings import TalkSettings
    from relllm.processing.audio_relllm import AudioSource

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
FAILED = {"/wav": "not read", "/record": "not recorded", "/save": "not saved"}
STOPPED = {"/wav": ": this turn is forgotten", "/record": ": this recording is forgotten"}  # before anything was said
UNREADABLE = "\N{REPLACEMENT CHARACTER}"


class Chat:
    """The systems that answer each line, by name; RE-LLM first."""

    def __init__(self, systems: Mapping[str, TurnTaking], settings: TalkSettings):
        self.systems = systems
        self.settings = settings
        self.turns: list[dict[str, Any]] = []  # what was said, and the replies by system
        self._saved: set[Path] = set()

    def handle(self, line: str) -> bool:
        """Act on one line; return `False` if it ends the chat. A failure is named, and the chat goes on without it."""
        command, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        try:
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
                self._say_file(*_split_path(rest))
            elif command == "/record":
                console.print("Recording. Enter ends it.", style="yellow")
                self.say(record(input), rest or None, spoken="a recording")
            elif command == "/save":
                self._save(Path(os.path.expanduser(_split_path(rest)[0])))
            elif command.startswith("/"):
                console.print(f"No such command: {command}. /help lists them.", style="red")
            elif command:
                self.say(None, line.strip())
        except (ImportError, OSError, ValueError) as error:  # ImportError: what a container or a rate needs
            if isinstance(error, BrokenPipeError) or command not in FAILED:
                raise
            console.print(f"{FAILED[command]}: {error}", style="red")
        except (EOFError, KeyboardInterrupt):
            console.print(f"\nStopped{STOPPED.get(command, '')}.", style="yellow")
        return True

    def _say_file(self, path: str, text: str) -> None:
        if not path:
            console.print("/wav needs a file: /wav question.wav", style="red")
            return
        first: Any = next(iter(self.systems.values()))  # RE-LLM
        clip = first.processor.feature_extractor.read_clip(path, channel=self.settings.channel)
        self.say({"waveform": clip}, text or None, spoken=path)

    def say(self, audio: AudioSource | None, text: str | None, *, spoken: str | None = None) -> None:
        """Say something to every system."""
        from transformers import TextStreamer

        turn: dict[str, Any] = {"audio": spoken, "text": text, "replies": {}}
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
                continue
            except KeyboardInterrupt:
                by = f" by {name}" if turn["replies"] else ""
                console.print(f"\nStopped: this turn is forgotten{by}.", style="yellow")
                return
            if not turn["replies"]:
                self.turns.append(turn)
            turn["replies"][name] = reply
            if reply.dropped:
                console.print(f"{name}: older turns were dropped ({reply.dropped}).", style="yellow")
            if reply.heard is not None:
                console.print(str(reply.heard), style="dim")

    def _save(self, path: Path) -> None:
        if path.suffix not in (".json", ".md"):
            console.print("/save needs a file that ends in .json or .md: /save talk.md", style="red")
            return
        if os.path.exists(path) and path not in self._saved:
            raise FileExistsError(f"{path} is there already. Name another file.")
        text = "\n\n".join(self._mark())
        if path.suffix == ".json":
            talk = {"model": self.settings.model, "turns": self.turns}
            text = json.dumps(talk, indent=2, ensure_ascii=False, default=lambda reply: reply.describe())
        with write_whole(path) as partial:
            partial.write_text(text + "\n", encoding="utf-8")
        self._saved.add(path)
        console.print(f"{len(self.turns)} turns in {path}", style="dim")

    def _mark(self) -> Iterator[str]:
        """Yield the paragraphs of the conversation as Markdown."""
        yield f"# A conversation with {self.settings.model}"
        for turn in self.turns:
            audio = turn["audio"] and f"*({turn['audio']})*"
            yield f"**you:** {' '.join(filter(None, (turn['text'], audio)))}"
            for name, reply in turn["replies"].items():
                yield f"**{name}:** {reply.text}"
                if reply.heard is not None:
                    yield f"*heard: {reply.heard}*"


def record(until: Callable[[], object]) -> dict[str, object]:
    """Record, mono, at the device's own rate, until `until()` returns; an `OSError` where no microphone opens."""
    import numpy as np

    try:
        import sounddevice
    except (ImportError, OSError) as error:  # OSError: the package is there, and the PortAudio library is not
        raise ImportError(
            f"Recording needs sounddevice and PortAudio ({error}). Install `pip install relllm[mic]`, and on Linux "
            "PortAudio: `apt install libportaudio2`."
        ) from error
    blocks: list[np.ndarray] = []
    try:
        rate = int(sounddevice.query_devices(kind="input")["default_samplerate"])
        options = {"samplerate": rate, "channels": 1, "dtype": "float32"}
        with sounddevice.InputStream(**options, callback=lambda block, *_: blocks.append(block[:, 0].copy())):
            until()
    except (sounddevice.PortAudioError, ValueError) as error:  # ValueError: no such device
        raise OSError(f"The microphone does not open: {error}. Is one there, and may this program use it?") from error
    return {"array": np.concatenate(blocks or [np.zeros(0, np.float32)]), "sampling_rate": rate}


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
