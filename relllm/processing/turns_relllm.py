"""Turn formats: the chat template of a ReLLM, which prompts its LLM as that was tuned.

The LLM's own template places no audio, marks no reply for the training labels and may leave thinking on. So it is
rendered on marked turns, and ours is made of what stands between them. What our template then renders is compared with
the LLM's own, and a format that differs is an error, never another format. An LLM without a template gets ours.
"""

import re
from dataclasses import dataclass
from datetime import datetime

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .prompts_relllm import AUDIO_TOKEN

ROLES = {"S": "system", "U": "user", "A": "assistant"}
# Of an LLM without a template: a token of its tokenizer -> header of a turn, its end, what follows, role names.
_TOKENS: dict[str, tuple[str, str, str, dict[str, str]]] = {
    "<|im_start|>": ("<|im_start|>{role}\n", "<|im_end|>", "\n", {}),
    "<|start_header_id|>": ("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", "", {}),
    "<start_of_turn>": ("<start_of_turn>{role}\n", "<end_of_turn>", "\n", {"assistant": "model", "system": "user"}),
}
# A template that writes today's date would make the prompt another one every day: it is the one Llama 3 falls back to.
_DATE, _NOW = datetime(2024, 7, 26), re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")

_TEMPLATE = """\
{%- macro render(content) -%}
{%- if content is string -%}{{- content -}}{%- else -%}
{%- for part in content -%}
{%- if part['type'] == 'audio' -%}{{- AUDIO -}}{%- elif part['type'] == 'text' -%}{{- part['text'] -}}
{%- else -%}{{- raise_exception("Content of type '" ~ part['type'] ~ "': only 'text' and 'audio' are read.") -}}
{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- set between = BETWEEN -%}
{%- set ns = namespace(before='start', moved=none, last_user=-1) -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{%- set ns.last_user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- set role = message['role'] -%}
{%- if role not in ['system', 'user', 'assistant'] -%}
{{- raise_exception("Role '" ~ role ~ "': only system, user and assistant are read.") -}}
{%- endif -%}
{%- set text = render(message['content']) -%}
{%- if role in TRIMMED -%}{%- set text = text | trim -%}{%- endif -%}
{%- if SYSTEM_LAST and role == 'system' and loop.first -%}
{%- set ns.moved = text -%}
{%- else -%}
{%- set kind = 'reply' if role == 'assistant' and loop.last and not add_generation_prompt else role -%}
{%- set place = ns.before ~ ' ' ~ kind -%}
{%- if place not in between -%}
{{- raise_exception("The LLM's turn format has no place for '" ~ role ~ "' behind '" ~ ns.before ~ "'.") -}}
{%- endif -%}
{{- between[place] -}}
{%- if ns.moved is not none and loop.index0 == ns.last_user -%}{{- ns.moved + between['system user'] -}}{%- endif -%}
{%- if kind == 'reply' -%}
{%- generation -%}{{- LEAD + text + LAST_END -}}{%- endgeneration -%}{{- TAIL -}}
{%- elif kind == 'assistant' -%}
{%- generation -%}{{- LEAD + text + END -}}{%- endgeneration -%}
{%- else -%}{{- text -}}
{%- endif -%}
{%- set ns.before = role -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{%- if ns.before ~ ' reply' not in between -%}
{{- raise_exception("The LLM's turn format has no place for a reply behind '" ~ ns.before ~ "'.") -}}
{%- endif -%}
{{- between[ns.before ~ ' reply'] -}}
{%- endif -%}
"""


@dataclass(frozen=True)
class TurnFormat:
    """What a template writes around the contents of turns; "reply" is the assistant's turn at the end."""

    between: dict[str, str]  # "user assistant" -> what stands between these two; "start user" -> before the first
    end: str  # of the assistant's turns, which the model learns to say
    last_end: str  # of the reply
    tail: str = ""  # behind it
    lead: str = ""  # blanks before the assistant's words, which it learns to say as well
    trimmed: frozenset[str] = frozenset()  # roles whose contents lose the blanks at both ends
    system_last: bool = False  # the system prompt stands in the last user turn

    def to_jinja(self, bos_token: str, audio_token: str) -> str:
        """Return the chat template."""
        starts = [place for place in self.between if place.startswith("start ")]
        between = dict(self.between)
        begin = ""
        if bos_token and all(between[place].startswith(bos_token) for place in starts):
            between |= {place: between[place].removeprefix(bos_token) for place in starts}
            begin = "{{- bos_token -}}\n"
        fields = {
            "AUDIO": audio_token,
            "BETWEEN": between,
            "SYSTEM_LAST": self.system_last,
            "TRIMMED": sorted(self.trimmed),
            "LEAD": self.lead,
            "LAST_END": self.last_end,
            "END": self.end,
            "TAIL": self.tail,
        }
        return begin + re.sub(rf"\b({'|'.join(fields)})\b", lambda found: repr(fields[found[0]]), _TEMPLATE)


def build_chat_template(tokenizer: PreTrainedTokenizerBase, audio_token: str = AUDIO_TOKEN) -> str:
    """Make the Jinja chat template of a ReLLM: the turn format of its LLM, with audio, and with the replies marked.

    An LLM without a template of its own gets the format that its tokens show (ChatML, Llama 3, Gemma), or
    "role: content" and its `eos_token`. A model that thinks is told that it has thought already.

    Raises:
        ValueError: If no format of ours renders what the LLM's own template does; the text says how and what to do.
    """
    turns = _derive(tokenizer) if tokenizer.chat_template else _by_tokens(tokenizer)
    return turns.to_jinja(tokenizer.bos_token or "", audio_token)


def close_thought(prompt: str) -> str:
    """Close a thought that a template opens at the end of a prompt, whatever it was told of thinking."""
    if prompt.rfind("<think>") <= prompt.rfind("</think>"):
        return prompt
    return prompt + ("\n</think>\n\n" if prompt.endswith("\n") else "</think>")


def _by_tokens(tokenizer: PreTrainedTokenizerBase) -> TurnFormat:
    vocabulary, eos = tokenizer.get_vocab(), tokenizer.eos_token or ""
    plain: tuple[str, str, str, dict[str, str]] = ("{role}: ", eos, "\n", {})
    header, end, after, names = next((turn for token, turn in _TOKENS.items() if token in vocabulary), plain)
    bos = tokenizer.bos_token if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else None
    before = {"start": bos or "", "assistant": after} | dict.fromkeys(("system", "user"), end + after)
    headers = {role: header.format(role=names.get(role, role)) for role in ROLES.values()}
    headers["reply"] = headers["assistant"]
    between = {f"{one} {two}": text + headers[two] for one, text in before.items() for two in headers}
    return TurnFormat(between, end, end, tail=after)


class _OwnTemplate:
    """The LLM's own chat template, rendered on turns that are given by the initials of their roles."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        own = tokenizer.get_chat_template()
        self.template = _NOW.sub(lambda found: repr(_DATE.strftime(found[2])), own)

    def render(
        self, roles: str, *, asks: bool = True, template: str | None = None, content: str = "«{}»"
    ) -> str | None:
        """Return the text, `None` if the template refuses such turns; `asks` for the reply that comes next."""
        turns = [{"role": ROLES[role], "content": content.format(index)} for index, role in enumerate(roles)]
        form = {"tokenize": False, "add_generation_prompt": asks, "enable_thinking": False}
        try:
            return self.tokenizer.apply_chat_template(turns, chat_template=template or self.template, **form)
        except (TemplateError, TypeError):
            return None

    def between(self, roles: str, *, asks: bool = True) -> list[str] | None:
        """Return what stands before, between and behind the turns; `None` if one of them is missing."""
        rest, texts = self.render(roles, asks=asks), []
        if rest is None:
            return None
        for index in range(len(roles)):
            text, found, rest = rest.partition(f"«{index}»")
            if not found:
                return None
            texts.append(text)
        return [*texts, rest]

    def trimmed_roles(self) -> frozenset[str]:
        """Return the roles whose contents lose the blanks around them."""
        rendered = [(roles, self.render(roles, content=" «{}» ")) for roles in ("SU", "UAU")]
        places = [(ROLES[role], index, text) for roles, text in rendered if text for index, role in enumerate(roles)]
        return frozenset(role for role, index, text in places if f" «{index}» " not in text)

    def error(self, what: str) -> ValueError:
        """Return the error that no format of ours does what this template does."""
        return ValueError(
            f"The turn format of {self.tokenizer.name_or_path or 'the LLM'} cannot be derived from its chat template: "
            f"{what}. Pass chat_template=…: Jinja that writes {AUDIO_TOKEN} for a part of type 'audio' and has each "
            "reply and its end between {% generation %} and {% endgeneration %}."
        )


def _derive(tokenizer: PreTrainedTokenizerBase) -> TurnFormat:
    own = _OwnTemplate(tokenizer)
    asked, answered = own.between("UAU"), own.between("UA", asks=False)
    if asked is None or answered is None:
        raise own.error("it does not render a user's turn, an answer and another user's turn")
    reply, lead = _reply_header(own, asked[-1], answered[1])
    end, last_end, tail = _turn_ends(answered[2], asked[2], tokenizer)
    between = _places_between(own, dict(zip(_places("UAU"), asked, strict=True)))
    between["user reply"] = reply
    for place in [place for place in between if place.startswith("assistant ")]:
        text = between.pop(place)
        if text.startswith(end):
            between[place] = text.removeprefix(end)
    if lead:  # before all of the assistant's words
        between |= {place: between[place].removesuffix(lead) for place in between if place.endswith(" assistant")}
    moved = own.render("SUAU")
    turns = TurnFormat(
        between,
        end,
        last_end,
        tail=tail,
        lead=lead,
        trimmed=own.trimmed_roles() | ({"assistant"} if lead else frozenset()),
        system_last=moved is not None and -1 < moved.find("«2»") < moved.find("«0»"),
    )
    _check(own, turns, asked[-1], answered)
    return turns


def _places(roles: str) -> list[str]:
    names = ["start", *(ROLES[role] for role in roles), "reply"]
    return [f"{one} {two}" for one, two in zip(names, names[1:], strict=False)]


def _places_between(own: "_OwnTemplate", between: dict[str, str]) -> dict[str, str]:
    """Add to what stands between turns in the usual order what stands in others, where the template takes them."""
    for roles in ("SU", "UUAU", "UAAU", "UASU", "AUAU"):
        texts = own.between(roles)
        found = dict(zip(_places(roles), texts, strict=True)) if texts is not None else {}
        if all(between[place] == text for place, text in found.items() if place in between):
            between = between | found
    if "start system" not in between:  # refused, or left out: it goes where Gemma 3 has it, before the user's words
        between |= {"start system": between["start user"], "system user": "\n\n"}
    return between


def _reply_header(own: "_OwnTemplate", asked: str, header: str) -> tuple[str, str]:
    """Return what stands before the reply in the prompt, and the blanks that the model has to say itself.

    `asked` is what the template writes to ask for a reply, `header` what it writes before one that is there.
    """
    if (closed := close_thought(asked)) != asked:
        return closed, ""
    said = header.removeprefix(asked)
    if header.startswith(asked):  # what is more is a channel, as in GPT-OSS, or a blank
        return (header, "") if said.strip() else (asked, said)
    if asked.startswith(header):  # an empty thought
        return asked, ""
    raise own.error(f"it asks for a reply with {asked!r} and writes {header!r} before one that is there")


def _turn_ends(last: str, later: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """Return the end of an assistant's turn, that of the reply and what follows it.

    `last` is what stands behind a reply, `later` what stands between an assistant's turn and the user's.
    """
    eos = tokenizer.eos_token or ""
    for end in (last.rstrip(), last.removesuffix(eos).rstrip()):
        if end and later.startswith(end):
            return end, end, last.removeprefix(end)
    if end := last.rstrip():  # GPT-OSS ends the last turn with a token of its own
        tokens = [token for token in tokenizer.get_added_vocab() if later.startswith(token)]
        return max(tokens, key=len, default=""), end, last.removeprefix(end)
    return "", eos, ""  # GLM: the next turn ends it


def _check(own: "_OwnTemplate", turns: TurnFormat, asked: str, answered: list[str]) -> None:
    """Raise a `ValueError` unless ours renders prompts, and whole conversations, as the LLM's own template does.

    Where a thought had to be closed or an end added, whole conversations differ by that.
    """
    ours = turns.to_jinja(own.tokenizer.bos_token or "", AUDIO_TOKEN)
    header = turns.between["user reply"]
    whole = ("UA", "UAUA") if answered[1:] == [header + turns.lead, turns.last_end + turns.tail] else ()
    probes = [(roles, True) for roles in ("U", "UAU", "UAUAU", "SU", "SUAU", "SUAUAU")]
    content = "Wörter {}, said?\nAnd more"
    for roles, asks in [*probes, *((roles, False) for roles in whole)]:
        theirs = own.render(roles, asks=asks, content=content) or ""
        found = own.render(roles, asks=asks, content=content, template=ours)
        if "S" in roles and content.format(0) not in theirs:  # refuses the system turn, or leaves it out
            continue
        if found != theirs + (header.removeprefix(asked) if asks else ""):
            raise own.error(f"ours would render {found!r} where it renders {theirs!r}")
