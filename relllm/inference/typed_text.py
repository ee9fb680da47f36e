"""Conversations as token ids in which what people typed is text: no placeholder, no end of turn, whatever they type.

Transformers has this as `sanitize_control_tokens`, in processors from 5.23 on. Earlier releases take that for a
variable of the template, and so it is done here for all of them.
"""

import re
from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

_START, _END = "\U000f0002", "\U000f0003"  # of private use: around a token that somebody typed


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict],
    chat_template: str,
    placeholder: str = "",
    counts: Iterable[int] = (),
) -> list[int]:
    """Return the token ids of a conversation, with the assistant's header at the end; no clip is read.

    The tokenizer's special tokens, and its added ones that stand in the Jinja `chat_template`, are tokens only where
    the template writes them. It writes a `placeholder` for a clip, which becomes so many of `counts`.
    """
    tokens = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or (token.content in chat_template and not token.content.isspace())
    ]
    typed = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")
    marked = [{**message, "content": _mark(message.get("content"), typed)} for message in messages]
    form = {"chat_template": chat_template, "tokenize": False, "add_generation_prompt": True}
    rendered = str(tokenizer.apply_chat_template(marked, **form))
    # text, token that was typed, text, …; None for one half of a mark, which a template may cut off
    pieces = re.split(f"{_START}({typed.pattern}){_END}|[{_START}{_END}]", rendered)
    left = iter(counts)
    ids: list[int] = []
    for index, piece in enumerate(pieces):
        if index % 2 == 0:
            parts = piece.split(placeholder) if placeholder else [piece]
            expanded = parts[0] + "".join(placeholder * next(left) + part for part in parts[1:])
            ids += _encode_behind(tokenizer, expanded, plain=False) if ids else _encode(tokenizer, expanded)
        elif piece:
            found = _encode_behind(tokenizer, piece, plain=True)
            if tokenizer.convert_tokens_to_ids(piece) in found:
                raise ValueError(f"This tokenizer makes the token {piece!r} of plain text too. Leave it out.")
            ids += found
    return ids


def _mark(content: object, typed: re.Pattern) -> object:
    """Put marks around the tokens in a message's content; marks that are there already are nobody's and go."""
    if isinstance(content, str):
        return typed.sub(f"{_START}\\g<0>{_END}", content.replace(_START, "").replace(_END, ""))
    if isinstance(content, list):
        return [{**part, "text": _mark(part["text"], typed)} if "text" in part else part for part in content]
    return content


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, plain: bool = False) -> list[int]:
    """Return the ids of a text; of a plain one without any added token."""
    if not plain:
        return tokenizer.encode(text, add_special_tokens=False)
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    splits = [(text, None)] if backend.pre_tokenizer is None else backend.pre_tokenizer.pre_tokenize_str(text)
    return [token.id for split, _ in splits for token in backend.model.tokenize(split)]


def _encode_behind(tokenizer: PreTrainedTokenizerBase, text: str, *, plain: bool) -> list[int]:
    """Return the ids of a text that follows another: some tokenizers put a space before the first word."""
    line = _encode(tokenizer, "\n", plain)
    ids = _encode(tokenizer, "\n" + text, plain)
    return ids[len(line) :] if ids[: len(line)] == line else _encode(tokenizer, text, plain)
