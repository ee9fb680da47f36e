"""Talking with a model: `relllm reply`, `hear`, `chat`, `web` and `serve`, and `relllm demo`, which makes one."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from relllm.demo.demo_settings import DemoSettings
from relllm.inference.inference_settings import (
    BatchSettings,
    CheckpointSettings,
    ClipSettings,
    HearSettings,
    PageSettings,
    ReplySettings,
    RequestLimits,
    ServerSettings,
    TalkSettings,
)
from relllm.modeling.places_relllm import check_place
from relllm.setting import pick_device

from .chatting import Chat, run_chat
from .options import console, from_settings, messages

if TYPE_CHECKING:
    from relllm.inference.conversation import TurnTaking
    from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration
    from relllm.preferences.preference_settings import ScoreRepliesSettings
    from relllm.processing.processing_relllm import ReLLMProcessor

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

    from relllm.inference.conversation import Conversation
    from relllm.inference.hearing import name_channels

    model, processor = load_relllm(settings)
    how: dict[str, Any] = {**settings.prompts, **settings.sampling}
    failed = 0
    for source in audio:
        if not settings.json:
            console.print(source, style="bold")
        try:
            clips = processor.feature_extractor.read_clips([source], channel=settings.channel)
            for channel, clip in zip(name_channels(settings.channel, len(clips)), clips, strict=True):
                draw_from(settings)
                shown = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
                told: Any = {"streamer": None if settings.json else shown, "max_new_tokens": settings.max_new_tokens}
                answer = Conversation(model, processor, **how).say({"waveform": clip}, **told)
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

    for number in (signal.SIGTERM, signal.SIGHUP):  # as by Ctrl-C, with what is to be cleaned up
        signal.signal(number, lambda *_: sys.exit(0))
    with recordings_folder():
        draw_from(settings)
        systems = load_systems(settings)
        page = Page(systems, max_new_tokens=settings.max_new_tokens, channel=settings.channel)
        try:
            where: dict[str, Any] = {"host": settings.host, "port": settings.port, "root_path": settings.root_path}
            console.print(f"{settings.model}: {page.launch(auth=settings.visitor, **where)}  (Ctrl-C or SIGTERM ends)")
            page.blocks.block_thread()
        finally:
            page.close()


@app.command()
@from_settings
def serve(settings: ServerSettings, batching: BatchSettings, limits: RequestLimits) -> None:
    """Serve a model to clients of OpenAI's API: chat with speech in it, and the emotion in every clip.

    /v1/chat/completions, /v1/models, /v1/emotion, /health. Requests that wait are answered together. Clips
    come as base64; addresses and paths from a client are never read. SIGTERM finishes what is accepted, exit status 0.

    Example: relllm serve runs/demo/re-llm --port 8000
    """
    try:
        from relllm.inference.server.app import Service
        from relllm.inference.server.server import Server, serve_until_stopped
    except ImportError as error:
        raise ImportError(f"Serving needs further packages ({error}): `pip install relllm[serve]`.") from error

    host = settings.host
    key = settings.api_key if settings.api_key is not None else os.environ.get("RELLLM_API_KEY")  # also an empty one
    if key is not None and not re.fullmatch("[!-~]+", key):
        found = "has a space, a line break or a character beyond ASCII" if key else "is empty"
        raise typer.BadParameter(f"The key (--api-key, RELLLM_API_KEY) {found}. Leave both out to serve without one.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()  # IPv4 as well
    try:
        sock = socket.create_server((host, settings.port), family=family, dualstack_ipv6=both)
    except OSError as error:
        message = f"Cannot listen on {host}, port {settings.port}: {error.strerror or error}."
        raise typer.BadParameter(message) from error
    with sock:
        folder = Path(settings.model)
        name = settings.name or (folder.resolve().name if folder.is_dir() else settings.model)
        service = Service(*load_relllm(settings), name=name, api_key=key, settings=batching, limits=limits)
        place = f"[{host}]" if ":" in host else host
        address = f"http://{place}:{sock.getsockname()[1]}"
        if key is None and host not in ("localhost", "::1") and not host.startswith("127."):
            console.print("No --api-key: whoever reaches this address can use the model.", style="yellow")
        announce = partial(console.print, f"Serving {name} at {address}/v1 (Ctrl-C or SIGTERM stops it)")
        serve_until_stopped(Server(service, grace_s=settings.grace_period, announce=announce), sock)
        console.print("Stopped.")


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


def load_relllm(
    settings: CheckpointSettings | ScoreRepliesSettings,
) -> tuple[ReLLMForConditionalGeneration, ReLLMProcessor]:
    """Return a ReLLM and its processor, ready to reply; another kind of checkpoint is a `typer.BadParameter`."""
    from transformers import AutoModel, AutoProcessor

    from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration

    place, revision = settings.model, settings.revision
    processor = AutoProcessor.from_pretrained(place, revision=revision)
    model = AutoModel.from_pretrained(place, revision=revision, dtype=settings.dtype)
    if not isinstance(model, ReLLMForConditionalGeneration):
        raise typer.BadParameter(f"{place} holds a {type(model).__name__}, not a ReLLM.", param_hint="MODEL")
    return model.to(pick_device(settings.device)).eval(), processor


def load_systems(settings: TalkSettings) -> dict[str, Callable[[], TurnTaking]]:
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
    how: dict[str, Any] = {**settings.prompts, **settings.sampling}
    systems: dict[str, Callable[[], TurnTaking]] = {"RE-LLM": partial(Conversation, model, processor, **how)}
    if settings.baseline is not None:
        second = load_relllm(replace(settings, model=settings.baseline, revision="main"))
        name = "speech only" if second[0].config.emotion_fusion == "none" else "second RE-LLM"
        systems[name] = partial(Conversation, *second, **how)
    if settings.text_only is not None:
        device = pick_device(settings.device)
        how["transcriber"] = None if settings.transcriber is None else Transcriber(settings.transcriber, device=device)
        if settings.text_only == "own":
            systems["text only"] = partial(TextConversation.inside, model, processor, **how)
        else:
            options = {"dtype": settings.dtype, "use_safetensors": True}
            llm = AutoModelForCausalLM.from_pretrained(settings.text_only, **options).to(device).eval()
            tokenizer = AutoTokenizer.from_pretrained(settings.text_only)
            asked = {"instruction": processor.instruction, "system_prompt": processor.system_prompt}
            systems["text only"] = partial(TextConversation, llm, tokenizer, **asked | how)
    return systems
