"""Who writes the replies to learn: a causal LM in this process, or an OpenAI-compatible endpoint (vLLM and the like).

Both take the same requests and yield replies in batches, in any order.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging

from relllm.modeling.checkpoint_relllm import find_ends
from relllm.processing.turns_relllm import close_thought

from ..data_settings import Sampling
from ..processes import run_ahead

if TYPE_CHECKING:
    import httpx
    from openai import APIStatusError

logger = logging.get_logger(__name__)

FATAL_STATUSES = {
    401: "The key is missing or wrong: --api-key-env names the environment variable that holds it.",
    403: "The key may not use this model.",
    404: "Is the address right (it usually ends in /v1), and does the server have this model?",
}
MAX_REJECTED_IN_A_ROW = 10
PATIENCE_S, PAUSE_S = 3600.0, 15.0  # for an endpoint that has answered before
# HTTP 429 is said of too many requests, which pass, and of an account that has nothing left, which does not.
SPENT = re.compile(
    r"insufficient[_ ](quota|balance|credits?|funds)|credit balance|available credits|spending limit", re.I
)


@dataclass(frozen=True)
class Request:
    """One reply to write, for the row `id`: the system turn (may be empty) and the user's."""

    id: str
    system: str
    user: str

    def messages(self, *, system_role: bool = True) -> list[dict[str, str]]:
        """Return it as a chat; without a system role, its text goes before the user's."""
        if self.system and not system_role:
            return [{"role": "user", "content": f"{self.system}\n\n{self.user}"}]
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.user}]


@dataclass(frozen=True)
class Written:
    """A reply to the request `id`, as the LLM wrote it."""

    id: str
    text: str
    finished: bool  # by the LLM, rather than by the token limit
    rejected: str | None = None  # why the endpoint gave no reply to this row


class LocalWriter:
    """A causal LM with its own chat template, in padded batches of like length.

    Batches are planned over all requests, done or not: an interrupted run writes what an uninterrupted one would have
    written. A tokenizer without a chat template is a `ValueError`.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer, sampling: Sampling, batch_size: int = 16) -> None:
        self.model = model.eval()
        self.prepare(model.generation_config, tokenizer, sampling, batch_size)

    def prepare(self, settings: GenerationConfig, tokenizer: Tokenizer, sampling: Sampling, batch_size: int) -> None:
        """Check and set all that is not the model, whose generation settings these are."""
        if not tokenizer.chat_template:
            raise ValueError(f"{tokenizer.name_or_path} has no chat template: replies need a chat (instruct) model.")
        self.settings, self.tokenizer, self.sampling, self.batch_size = settings, tokenizer, sampling, batch_size
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"
        self._system_role = self._takes_system_role()
        ends = find_ends(settings, tokenizer)
        self._ends = ends if isinstance(ends, list) else [tokenizer.eos_token_id if ends is None else ends]

    @classmethod
    def from_pretrained(
        cls, name: str, sampling: Sampling, *, revision: str = "main", batch_size: int = 16, device: str = "cpu"
    ) -> LocalWriter:
        """Load a model (safetensors only) in its own dtype, and its tokenizer."""
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        model = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype="auto", use_safetensors=True)
        return cls(model.to(device), tokenizer, sampling, batch_size)

    def write(self, requests: Sequence[Request], done: Container[str]) -> Iterator[list[Written]]:
        """Yield batch by batch, the longest prompts first: what does not fit in memory shows at once."""
        prompts = [self._prompt(request) for request in requests]
        order = sorted(range(len(requests)), key=lambda index: (-len(prompts[index]), index))
        for number, start in enumerate(range(0, len(order), self.batch_size)):
            batch = order[start : start + self.batch_size]
            if all(requests[index].id in done for index in batch):
                continue
            replies = self._generate([prompts[index] for index in batch], number)
            written = [Written(requests[index].id, *reply) for index, reply in zip(batch, replies, strict=True)]
            yield [reply for reply in written if reply.id not in done]

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]], number: int) -> list[tuple[str, bool]]:
        batch = self.tokenizer.pad({"input_ids": prompts}, padding=True, return_tensors="pt").to(self.model.device)
        torch.manual_seed(self.sampling.seed + number)  # a batch is drawn the same whatever was done before
        options: dict[str, object] = {"do_sample": True, "temperature": self.sampling.temperature}
        if not self.sampling.temperature:
            options = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        options |= {"pad_token_id": self.tokenizer.pad_token_id, "eos_token_id": self._ends}
        output = self.model.generate(**batch, max_new_tokens=self.sampling.max_new_tokens, **options)
        replies = output[:, batch["input_ids"].shape[1] :].tolist()
        texts = self.tokenizer.batch_decode(replies, skip_special_tokens=True)
        return [(text, not set(self._ends).isdisjoint(reply)) for text, reply in zip(texts, replies, strict=True)]

    def _prompt(self, request: Request) -> list[int]:
        text = self.tokenizer.apply_chat_template(
            request.messages(system_role=self._system_role),
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,  # of Qwen3 and others; templates without such a switch ignore it
        )
        return self.tokenizer(close_thought(text), add_special_tokens=False)["input_ids"]

    def _takes_system_role(self) -> bool:
        """Gemma's template, for one, raises on a system turn."""
        try:
            self.tokenizer.apply_chat_template(Request("", "system", "user").messages(), tokenize=False)
        except TemplateError as error:
            logger.info("The chat template takes no system turn (%s): its text goes before the user's.", error)
            return False
        return True


class EndpointWriter:
    """An OpenAI-compatible endpoint, asked for several chat completions at once.

    Rate limits, server errors (any HTTP 5xx), dropped connections and time-outs are tried again, later each time and
    as Retry-After says, `max_retries` times; once the endpoint has answered, for `patience_s`, which outlives its
    restart. A rejected request (HTTP 400, 413, 422) and an answer without a reply concern their row, unless nothing
    else comes back. Without `api_key_env`, which names an environment variable (an empty one is a `ValueError`), no
    key is sent; `extra_body` holds further fields of the request, and `None` takes one out; `timeout_s` is of one try.
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
        timeout_s: float = 120.0,
        patience_s: float = PATIENCE_S,
        extra_body: Mapping[str, object] | None = None,
    ) -> None:
        try:
            from openai import DefaultHttpxClient, Omit, OpenAI
        except ImportError as error:
            raise ImportError("Replies from an endpoint need its client: `pip install relllm[data]`.") from error
        if not endpoint.startswith(("http://", "https://")):
            raise ValueError(f"endpoint must start with http:// or https://, got {endpoint!r}.")
        if api_key_env is not None and not os.environ.get(api_key_env):
            raise ValueError(f"The environment variable {api_key_env} is empty. Put the endpoint's key there.")
        self.client = OpenAI(
            base_url=endpoint,
            api_key=os.environ[api_key_env] if api_key_env else "none",
            max_retries=max_retries,
            timeout=timeout_s,
            http_client=DefaultHttpxClient(event_hooks={"response": [_stop_where_spent]}),
        )
        self.headers = {} if api_key_env else {"Authorization": Omit()}
        self.url = endpoint.rstrip("/") + "/chat/completions"
        self.model = model
        body = {"max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature}
        body |= {"seed": sampling.seed} if sampling.temperature else {}
        self.body = {name: value for name, value in {**body, **(extra_body or {})}.items() if value is not None}
        self.concurrency, self.patience_s = concurrency, patience_s
        self._has_answered = False

    def write(self, requests: Sequence[Request], done: Container[str]) -> Iterator[list[Written]]:
        """Yield replies as they come.

        HTTP 401 and 403, and an account without credit, are a `PermissionError`; HTTP 404, and ten rows in a row
        without a reply, a `ValueError`; a request that fails to the last is a `ConnectionError`.
        """
        waiting = (request for request in requests if request.id not in done)
        rejected = 0
        pool = ThreadPoolExecutor(self.concurrency)
        for _, future in run_ahead(pool, self._ask_patiently, waiting, 2 * self.concurrency):
            reply = future.result()
            yield [reply]
            rejected = rejected + 1 if reply.rejected else 0
            if rejected >= MAX_REJECTED_IN_A_ROW:
                raise ValueError(f"{self.url} gave no reply to {rejected} rows in a row, the last: {reply.rejected}.")

    def _ask_patiently(self, request: Request) -> Written:
        """Ask again while the endpoint is away; one that has never answered may not be there at all."""
        until = time.monotonic() + self.patience_s
        while True:
            try:
                reply = self._ask(request)
                self._has_answered = True
                return reply
            except ConnectionError as error:
                if not self._has_answered or time.monotonic() > until:
                    raise
                logger.warning("%s Asking again in %.0f s.", error, PAUSE_S)
                time.sleep(PAUSE_S)

    def _ask(self, request: Request) -> Written:
        from openai import APIConnectionError, APIStatusError

        try:
            answer = self.client.chat.completions.create(
                model=self.model,
                messages=request.messages(),  # type: ignore[arg-type]
                extra_headers=self.headers,
                extra_body=self.body,
            )
        except APIStatusError as error:
            return self._refused(request, error)
        except APIConnectionError as error:
            raise self._failed(request, f"{error} {error.__cause__}") from error
        try:
            choice = answer.choices[0]
            text, reason = choice.message.content or "", choice.finish_reason
        except (AttributeError, IndexError, TypeError):
            return Written(request.id, "", True, rejected=f"no chat completion: {answer!r:.300}")
        text = text.encode(errors="replace").decode()  # JSON may hold half a character, UTF-8 may not
        rejected = "content_filter" if reason == "content_filter" else None
        if not text.strip():  # of a reasoning model: all its tokens went into the reasoning
            rejected = f"an empty answer, finish_reason {reason!r}"
        return Written(request.id, text, reason != "length", rejected)

    def _refused(self, request: Request, error: APIStatusError) -> Written:
        status, said = error.status_code, error.response.text
        message = f"HTTP {status} {error.response.reason_phrase}: {said.strip():.300}"
        if status in (400, 413, 422):
            return Written(request.id, "", False, rejected=message)
        if status == 429 and SPENT.search(said):
            raise PermissionError(f"{self.url}: {message} What is written is kept: go on when the account has credit.")
        if status in (408, 409, 429) or status >= 500:  # which the client has tried again
            raise self._failed(request, message) from error
        kind = PermissionError if status in (401, 403) else ValueError
        raise kind(f"{self.url}: {message} {FATAL_STATUSES.get(status, '')}".rstrip()) from error

    def _failed(self, request: Request, message: str) -> ConnectionError:
        return ConnectionError(
            f"{self.url} keeps failing, at row {request.id!r} with: {message}. What is written is kept: run the same "
            "command again when the endpoint is back."
        )


Writer: TypeAlias = LocalWriter | EndpointWriter


def _stop_where_spent(response: httpx.Response) -> None:
    """Tell OpenAI's client, by the header that its own service sends, not to ask again where credit is spent."""
    if response.status_code == 429:
        response.read()
        if SPENT.search(response.text):
            response.headers["x-should-retry"] = "false"
