"""Talking with a model: `relllm reply`, `chat` and `web`, and `relllm demo`, which makes one to try."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from relllm.demo.demo_settings import DemoSettings
from relllm.inference.inference_settings import (
    CheckpointSettings,
    ClipSettings,
    HearSettings,
    PageSettings,
    ReplySettings,
    TalkSettings,
)
from relllm.modeling.places_relllm import check_place
from relllm.setting import pick_device

from .chatting import Chat, run_chat
from .options import console, from_settings, messages

if TYPE_CHECKING:
    from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration
    from relllm.processing.processing_relllm import ReLLMProcessor

    from .chatting import System

app = typer.Typer()
SHOWN = 10  # reasons why a clip was not read; the table has all


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

    from relllm.inference.hearing import name_channels
    from relllm.inference.replies import reply

    model, processor = load_relllm(settings)
    how: Any = {"max_new_tokens": settings.max_new_tokens, "sampling": settings.sampling, **settings.prompts}
    failed = 0
    for source in audio:
        if not settings.json:
            console.print(source, style="bold")
        try:
            clips = processor.feature_extractor.read_clips([source], channel=settings.channel)
            for channel, clip in zip(name_channels(settings.channel, len(clips)), clips, strict=True):
                draw_from(settings)
                shown = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
                how["streamer"] = None if settings.json else shown
                answer = reply(model, processor, {"waveform": clip}, **how)
                if settings.json:
                    print(json.dumps({"clip": source, "channel": channel, **answer.describe()}), flush=True)
                else:
                    console.print(str(answer.heard), style="dim")
        except (ImportError, OSError, ValueError) as error:  # ImportError: what a container or a rate needs
            if isinstance(error, BrokenPipeError):
                raise
            failed += 1
            if settings.json:
                print(json.dumps({"clip": source, "error": f"{error}"}), flush=True)
            messages.print(f"not answered: {error}", style="red")
    if failed:
        raise typer.Exit(1)


def draw_from(settings: ReplySettings) -> None:
    """Begin the draws of tokens at the seed that is given."""
    import torch

    if settings.seed is not None:
        torch.manual_seed(settings.seed)


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
        messages.print(f"not heard: {reason}", style="red")
    if settings.out is not None:
        more = f", of which not read {len(report['not_read']):,}" if report["not_read"] else ""
        console.print(f"Heard in {settings.out}: clips {report['clips']:,}{more}; rows {report['rows']:,}")
    if report["not_read"]:
        raise typer.Exit(1)


@app.command()
@from_settings
def chat(settings: TalkSettings) -> None:
    """Talk with a model over several turns, typed or spoken; each spoken turn shows the emotion that was heard.

    Inside, /help lists the commands: /wav FILE, /record, /save FILE, /reset, /quit. Earlier turns are not computed
    again. Lines from a pipe work as well: then each line is shown before its reply.

    Example: relllm chat runs/demo/re-llm --text-only own --transcriber openai/whisper-tiny.en
    """
    systems = {name: start() for name, start in load_systems(settings).items()}
    draw_from(settings)
    console.print(f"{settings.model}. /help lists the commands.", style="dim")
    run_chat(Chat(systems, settings))


@app.command()
@from_settings
def web(settings: PageSettings) -> None:
    """Talk with a model in the browser: microphone, upload or text; what was heard, now and over the turns.

    Every browser tab is a conversation of its own; they take turns at the model. Nothing is sent elsewhere, and
    recordings are deleted. Browsers give the microphone to https pages and to localhost only: from another machine use
    `ssh -L 7860:localhost:7860 HOST`. Without --auth there is no password: keep it from networks you do not trust.

    Example: relllm web runs/demo/re-llm --baseline runs/demo/speech-only
    """
    from relllm.inference.web import Page, recordings_folder

    with recordings_folder(), ended_by_signals():
        draw_from(settings)
        systems = load_systems(settings)
        page = Page(systems, max_new_tokens=settings.max_new_tokens, channel=settings.channel)
        try:
            where: dict[str, Any] = {"host": settings.host, "port": settings.port, "root_path": settings.root_path}
            url = page.launch(auth=settings.visitor, **where)
            console.print(f"{settings.model}: {url}  (Ctrl-C or SIGTERM ends)")
            page.wait()
        finally:
            page.close()


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """End by SIGTERM and SIGHUP as by Ctrl-C, with what is to be cleaned up, and exit status 0."""

    def end(*_: object) -> None:
        raise SystemExit(0)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    device = pick_device(settings.device)
    how: dict[str, Any] = {**settings.prompts, **settings.sampling}
    systems: dict[str, Callable[[], System]] = {"RE-LLM": partial(Conversation, model, processor, **how)}
    if settings.baseline is not None:
        where = CheckpointSettings(model=settings.baseline, device=settings.device, dtype=settings.dtype)
        second, its_processor = load_relllm(where)
        name = "speech only" if second.config.emotion_fusion == "none" else "second RE-LLM"
        systems[name] = partial(Conversation, second, its_processor, **how)
    if settings.text_only is not None:
        writer = None if settings.transcriber is None else Transcriber(settings.transcriber, device=device)
        start: Callable[..., System] = partial(TextConversation.inside, model, processor)
        if settings.text_only != "own":
            options = {"dtype": settings.dtype, "use_safetensors": True}
            llm = AutoModelForCausalLM.from_pretrained(settings.text_only, **options).to(device).eval()
            tokenizer = AutoTokenizer.from_pretrained(settings.text_only)
            asked = {"instruction": processor.instruction, "system_prompt": processor.system_prompt}
            how = asked | how
            start = partial(TextConversation, llm, tokenizer)
        systems["text only"] = partial(start, transcriber=writer, **how)
    return systems
