"""The settings of the commands that use a model, each declared once. Nothing heavy is imported here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from relllm.setting import REQUIRED, setting

LEAST_TEMPERATURE = 0.01


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Which model, and where it runs."""

    model: str = setting(REQUIRED, "A ReLLM checkpoint: a directory or a Hub id.", argument=True, place="checkpoint")
    device: str = setting("auto", "cpu, cuda, cuda:1, … or auto.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting("auto", "Auto is the checkpoint's own.")
    revision: str = setting("main", "Branch, tag or commit of the model on the Hub.")


@dataclass(frozen=True, kw_only=True)
class ReplySettings(CheckpointSettings):
    """What a model that replies is told."""

    instruction: str | None = setting(None, "Text before a clip; empty for none.")
    system_prompt: str | None = setting(None, "System turn; empty for none.")
    max_new_tokens: int = setting(128, "Longest reply, in tokens.", min=1)
    temperature: float = setting(0.0, "0 takes the most probable token; above, tokens are drawn.", min=0, max=2)
    seed: int | None = setting(None, "Of the draws; by default another one each time.", min=0)

    def __post_init__(self) -> None:
        if 0 < self.temperature < LEAST_TEMPERATURE:
            least = f"0 for the most probable token, or at least {LEAST_TEMPERATURE}"
            raise ValueError(f"temperature is {self.temperature}, expected {least}.")
        if self.seed is not None and not self.temperature:
            raise ValueError(f"seed is {self.seed}, and nothing is drawn: give a --temperature above 0, such as 0.7.")

    @property
    def sampling(self) -> dict[str, object]:
        """How tokens are taken, as options of `generate`."""
        return {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}

    @property
    def prompts(self) -> dict[str, str]:
        """Those that are given."""
        both = {"instruction": self.instruction, "system_prompt": self.system_prompt}
        return {name: value for name, value in both.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class ClipSettings(ReplySettings):
    """What of a file is answered."""

    channel: Literal["mix", "left", "right", "each"] = setting("mix", "Of a file with several; `each` answers each.")
    json: bool = setting(False, "Print one JSON object a clip, with every reading, and nothing else.")


@dataclass(frozen=True, kw_only=True)
class HearSettings(CheckpointSettings):
    """What is heard, and where the table goes."""

    out: Path | None = setting(None, "The table: .csv, .jsonl or .parquet; by default CSV, printed.")
    every: float | None = setting(None, "A row for each window of so many seconds; files of up to 4 h.", min=0.1)
    overlap: float = setting(0.0, "Seconds by which a window goes on into the next one.", min=0)
    channel: Literal["mix", "left", "right", "each"] = setting("mix", "Of a file with several; `each`: rows for each.")
    split: str | None = setting(None, "Split of a data set; by default every one.")
    batch_size: int = setting(16, "Windows of the speech tower (30 s for Whisper) heard at once.", min=1)
    plots: Path | None = setting(None, "Folder for a picture of each clip over time; needs --every.")

    def __post_init__(self) -> None:
        if self.every is None and (self.overlap or self.plots):
            raise ValueError("--overlap and --plots are of windows: give --every, for example --every 2.")


@dataclass(frozen=True, kw_only=True)
class TalkSettings(ReplySettings):
    """Who talks beside the model."""

    baseline: str | None = setting(
        None, "Also ask a second ReLLM, for example a speech-only.", flags=["--speech-only"], place="checkpoint"
    )
    text_only: str | None = setting(None, "Also ask a bare LLM: a directory, a Hub id, or `own`: that of the model.")
    transcriber: str | None = setting(None, "A speech recogniser of the turns for --text-only.", place="checkpoint")
    channel: Literal["mix", "left", "right"] = setting("mix", "Of a file with several.")


@dataclass(frozen=True, kw_only=True)
class PageSettings(TalkSettings):
    """Where the page is."""

    host: str = setting("127.0.0.1", "Address to serve on; 127.0.0.1 is seen from this machine only.")
    port: int = setting(7860, "Port to serve on; 0 takes a free one and prints it.", min=0, max=65535)
    auth: str | None = setting(None, "USER:PASSWORD of visitors; a flag is seen in `ps`.", envvar="RELLLM_AUTH")
    root_path: str = setting("", "Path under which a proxy serves the page, such as /talk.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.auth is not None and not all(self.auth.partition(":")):
            raise ValueError("--auth: expected USER:PASSWORD, neither of them empty.")

    @property
    def visitor(self) -> tuple[str, str] | None:
        """Return the user and the password to ask for."""
        return self.auth and tuple(self.auth.split(":", 1))  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class ServerSettings(CheckpointSettings):
    """Where the server is, and for whom."""

    host: str = setting("127.0.0.1", "Address to listen on; 0.0.0.0 lets other machines in.")
    port: int = setting(8000, "0 takes a free one and prints it.", min=0, max=65535)
    name: str | None = setting(None, "What clients call the model; by default the id, or the folder's name.")
    api_key: str | None = setting(None, "What clients must send; a flag is seen in `ps`.", envvar="RELLLM_API_KEY")
    grace_period: float = setting(30.0, "After SIGTERM, seconds to finish in.", min=0)


@dataclass(frozen=True)
class BatchSettings:
    """How requests are batched."""

    max_batch_size: int = setting(16, "Requests worked on together.", min=1)
    batch_wait_ms: float = setting(10.0, "The first request waits so long.", min=0)
    max_queue: int = setting(64, "Requests that may wait; more get 429.", min=1)


@dataclass(frozen=True)
class RequestLimits:
    """What a request may hold. Everything beyond is refused with a reason."""

    max_tokens: int = setting(512, "Longest reply a request may ask for.", min=1)
    max_context: int | None = setting(None, "Tokens of a conversation with its reply; by default the LLM's.", min=2)
    max_body_mib: float = setting(32.0, "Largest body, in MiB; more gets 413.", min=0.001)
    max_audio_seconds: float = setting(120.0, "Of all clips of a request together.", min=0.025)
    max_clips: int = setting(16, "Clips in a request.", min=1)
