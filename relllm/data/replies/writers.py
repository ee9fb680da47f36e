"""Who writes the replies to learn: a causal LM in this process, or an OpenAI-compatible endpoint (vLLM and the like).

Both take the same requests and yield replies in batches, in any order. What does not live here: which rows are
written, cleaning, files (`targets.py`).
"""

import http.client
import itertools
import json
import os
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol

import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..data_settings import Sampling

logger = logging.get_logger(__name__)

RETRIED_STATUSES = (408, 409, 425, 429, 500, 502, 503, 504)
FATAL_STATUSES = {
    401: "The key is missing or wrong: --api-key-env names the environment variable that holds it.",
    403: "The key may not use this model.",
    404: "Is the address right (it usually ends in /v1), and does the server have this model?",
}
MAX_REJECTED_IN_A_ROW = 10
LONGEST_WAIT_S = 60.0


@dataclass(frozen=True)
class Request:
    """One reply to write, for the row `id`: the system turn (may be empty) and the user's."""

    id: str
    system: str
    user: str

    def messages(self, *, system_role: bool = True) -> list[dict[str, str]]:
        """As a chat; without a system role, its text goes before the user's."""
        if not self.system:
            return [{"role": "user", "content": self.user}]
        if not system_role:
            return [{"role": "user", "content": f"{self.system}\n\n{self.user}"}]
        return [{"role": "system", "content": self.system}, {"role": "user", "content": self.user}]


@dataclass(frozen=True)
class Written:
    """A reply.

    Args:
        id (`str`): Of the row.
        text (`str`): As the LLM wrote it.
        finished (`bool`): Whether the LLM ended it, rather than the token limit.
        rejected (`str`, *optional*): Why the endpoint refused this row; there is no text then.
    """

    id: str
    text: str
    finished: bool
    rejected: str | None = None


class Writer(Protocol):
    """What [`write_targets`] needs of a writer."""

    def write(self, requests: Sequence[Request], done: Container[str]) -> Iterator[list[Written]]:
        """Yields replies to the requests whose id is not in `done`."""
        ...


class LocalWriter:
    """A causal LM with its own chat template, in padded batches of like length.

    Batches are planned over all requests, done or not, so that an interrupted run writes what an uninterrupted one
    would have written.

    Args:
        model (`PreTrainedModel`), tokenizer (`PreTrainedTokenizerBase`): A chat model and its tokenizer.
        sampling ([`Sampling`]): How replies are drawn.
        batch_size (`int`, *optional*, defaults to 16): Replies written at once.

    Raises:
        ValueError: If the tokenizer has no chat template.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        batch_size: int = 16,
    ) -> None:
        if not tokenizer.chat_template:
            raise ValueError(f"{tokenizer.name_or_path} has no chat template: replies need a chat (instruct) model.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.batch_size = batch_size
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"
        self._system_role = self._takes_system_role()

    @classmethod
    def from_pretrained(
        cls, name: str, sampling: Sampling, *, revision: str = "main", batch_size: int = 16, device: str = "cpu"
    ) -> "LocalWriter":
        """Loads a model (safetensors only) in its own dtype, and its tokenizer."""
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        model = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype="auto", use_safetensors=True)
        return cls(model.to(device), tokenizer, sampling, batch_size)

    def write(self, requests: Sequence[Request], done: Container[str]) -> Iterator[list[Written]]:
        """Yields batch by batch, the longest prompts first: what does not fit in memory shows at once."""
        prompts = [self._prompt(request) for request in requests]
        order = sorted(range(len(requests)), key=lambda index: (-len(prompts[index]), index))
        for number, start in enumerate(range(0, len(order), self.batch_size)):
            batch = order[start : start + self.batch_size]
            if all(requests[index].id in done for index in batch):
                continue
            written = self._generate([prompts[index] for index in batch], number)
            replies = [(requests[index].id, *reply) for index, reply in zip(batch, written, strict=True)]
            yield [Written(*reply) for reply in replies if reply[0] not in done]

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]], number: int) -> list[tuple[str, bool]]:
        """Text of each prompt's reply, and whether the LLM ended it."""
        batch = self.tokenizer.pad({"input_ids": prompts}, padding=True, return_tensors="pt").to(self.model.device)
        torch.manual_seed(self.sampling.seed + number)  # a batch is drawn the same whatever was done before
        draw = {"do_sample": True, "temperature": self.sampling.temperature}
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        output = self.model.generate(
            **batch,
            max_new_tokens=self.sampling.max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            **(draw if self.sampling.temperature else greedy),
        )
        replies = output[:, batch["input_ids"].shape[1] :].tolist()
        ends = self._end_tokens()
        texts = self.tokenizer.batch_decode(replies, skip_special_tokens=True)
        return [(text, not ends.isdisjoint(reply)) for text, reply in zip(texts, replies, strict=True)]

    def _prompt(self, request: Request) -> list[int]:
        text = self.tokenizer.apply_chat_template(
            request.messages(system_role=self._system_role),
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,  # of Qwen3 and others; templates without such a switch ignore it
        )
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _takes_system_role(self) -> bool:
        """Gemma's template, for one, raises on a system turn."""
        try:
            self.tokenizer.apply_chat_template(Request("", "system", "user").messages(), tokenize=False)
        except TemplateError as error:
            logger.info("The chat template takes no system turn (%s): its text goes before the user's.", error)
            return False
        return True

    def _end_tokens(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        return set(ends if isinstance(ends, list) else [ends if ends is not None else self.tokenizer.eos_token_id])


class EndpointWriter:
    """An OpenAI-compatible endpoint: POST {endpoint}/chat/completions, several requests at once.

    Rate limits, server errors, dropped connections and time-outs are tried again, later each time; a server that says
    how long to wait (Retry-After) is heard. A rejected request (HTTP 400, 413, 422) concerns its row, unless nothing
    else comes back.

    Args:
        endpoint (`str`): Such as `http://host:8000/v1`.
        model (`str`): The model's name at the endpoint.
        sampling ([`Sampling`]): How replies are drawn.
        api_key_env (`str`, *optional*): Environment variable that holds the key; without it, none is sent.
        concurrency (`int`, *optional*, defaults to 16): Requests at once.
        max_retries (`int`, *optional*, defaults to 8): After the first try, a request.
        first_wait_s (`float`, *optional*, defaults to 1.0): Before the second try; it doubles, up to a minute.
        timeout_s (`float`, *optional*, defaults to 120.0): Of one try.
        extra_body (`Mapping`, *optional*): Further fields of the request; `None` takes one out.

    Raises:
        ValueError: If the address is no `http(s)://`, or the environment variable is empty.
    """

    def __init__(
        self,
        endpoint: str,
        model: str,
        sampling: Sampling,
        *,
        api_key_env: str | None = None,
        concurrency: int = 16,
        max_retries: int = 8,
        first_wait_s: float = 1.0,
        timeout_s: float = 120.0,
        extra_body: Mapping[str, object] | None = None,
    ) -> None:
        if not endpoint.startswith(("http://", "https://")):
            raise ValueError(f"endpoint must start with http:// or https://, got {endpoint!r}.")
        self.url = endpoint.rstrip("/") + "/chat/completions"
        self.headers = {"Content-Type": "application/json"}
        if api_key_env is not None:
            if not os.environ.get(api_key_env):
                raise ValueError(f"The environment variable {api_key_env} is empty. Put the endpoint's key there.")
            self.headers["Authorization"] = f"Bearer {os.environ[api_key_env]}"
        self.body = {"model": model, "max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature}
        if sampling.temperature:
            self.body["seed"] = sampling.seed
        self.body |= extra_body or {}
        self.concurrency = concurrency
        self.max_retries = max_retries
        self.first_wait_s = first_wait_s
        self.timeout_s = timeout_s
        self._stopped = threading.Event()

    def write(self, requests: Sequence[Request], done: Container[str]) -> Iterator[list[Written]]:
        """Yields replies as they come.

        Raises:
            PermissionError: On HTTP 401 or 403.
            ValueError: On HTTP 404, or if the endpoint rejects ten rows in a row.
            ConnectionError: If a request failed `max_retries` times more.
        """
        waiting = (request for request in requests if request.id not in done)
        self._stopped.clear()
        rejected = 0
        with ThreadPoolExecutor(self.concurrency) as pool:
            running: set[Future[Written]] = set()
            try:
                while True:
                    free = 2 * self.concurrency - len(running)
                    running |= {pool.submit(self._ask, request) for request in itertools.islice(waiting, free)}
                    if not running:
                        return
                    finished, running = wait(running, return_when=FIRST_COMPLETED)
                    written = [future.result() for future in finished if future.exception() is None]
                    for reply in written:
                        rejected = rejected + 1 if reply.rejected else 0
                    yield written
                    for future in finished:  # what came back beside a failure is kept first
                        future.result()
                    if rejected >= MAX_REJECTED_IN_A_ROW:
                        raise ValueError(f"{self.url} rejected {rejected} rows in a row: {written[-1].rejected}")
            finally:
                self._stopped.set()  # a request that waits to be tried again gives up
                for future in running:
                    future.cancel()

    def _ask(self, request: Request) -> Written:
        wait_s = self.first_wait_s
        for attempt in itertools.count():
            try:
                return self._post(request)
            except _Transient as error:
                if attempt >= self.max_retries or self._stopped.is_set():
                    raise ConnectionError(
                        f"{self.url} failed {attempt + 1} times for row {request.id!r}, last with: {error}. What is "
                        "written is kept: run the same command again when the endpoint is back."
                    ) from error
                self._stopped.wait(max(error.retry_after_s, wait_s * random.uniform(0.5, 1.0)))
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        raise AssertionError("unreachable: the loop returns or raises")

    def _post(self, request: Request) -> Written:
        body = {**self.body, "messages": request.messages()}
        data = json.dumps({name: value for name, value in body.items() if value is not None}).encode()
        post = urllib.request.Request(self.url, data=data, headers=self.headers, method="POST")
        try:
            with urllib.request.urlopen(post, timeout=self.timeout_s) as response:
                answer = json.loads(response.read())
        except urllib.error.HTTPError as error:
            with error:
                return self._refused(request, error)
        except (OSError, http.client.HTTPException, ValueError) as error:  # no connection, cut off, no JSON
            raise _Transient(f"{type(error).__name__}: {error}") from error
        try:
            choice = answer["choices"][0]
            text, reason = choice["message"]["content"], choice.get("finish_reason")
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{self.url} answered with no chat completion: {answer!r:.300}") from error
        text = (text or "").encode(errors="replace").decode()  # JSON may hold half a character, UTF-8 may not
        if reason == "content_filter":
            return Written(request.id, text, True, rejected="content_filter")
        return Written(request.id, text, reason != "length")

    def _refused(self, request: Request, error: urllib.error.HTTPError) -> Written:
        said = error.read(2000).decode(errors="replace").strip()
        message = f"HTTP {error.code} {error.reason}: {said:.300}"
        if error.code in RETRIED_STATUSES:
            seconds = error.headers.get("Retry-After", "")
            raise _Transient(message, min(float(seconds), LONGEST_WAIT_S) if seconds.isdigit() else 0.0)
        if error.code in (401, 403):
            raise PermissionError(f"{self.url}: {message} {FATAL_STATUSES[error.code]}")
        if error.code in (400, 413, 422):
            return Written(request.id, "", False, rejected=message)
        raise ValueError(f"{self.url}: {message} {FATAL_STATUSES.get(error.code, '')}".rstrip())


class _Transient(Exception):
    """A failure that may pass; `retry_after_s` is what the server asks for."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
