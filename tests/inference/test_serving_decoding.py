"""`server.decoding`: pieces of text against decoding all tokens at once, stop strings against `str.split`."""

import random

import pytest
from tiny_models import tiny_tokenizer

from relllm.inference.server.decoding import TextWriter

TEXT = "Żółć — 你好, I am so sorry 🙂🙂 to hear that! héé"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def write(tokenizer, tokens: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], TextWriter]:
    writer = TextWriter(tokenizer, stop)
    pieces = []
    for token in tokens:
        pieces.append(writer.add(token))
        if writer.stopped:
            return pieces, writer
    return [*pieces, writer.finish()], writer


def test_the_pieces_together_are_the_text(tokenizer) -> None:
    pieces, _ = write(tokenizer, tokenizer.encode(TEXT))
    assert "".join(pieces) == TEXT


def test_no_piece_holds_half_a_character(tokenizer) -> None:
    pieces, _ = write(tokenizer, tokenizer.encode(TEXT))
    assert len([piece for piece in pieces if piece]) > 10
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@pytest.mark.parametrize("seed", range(20))
def test_the_pieces_of_any_tokens_are_those_of_all_at_once(tokenizer, seed: int) -> None:
    tokens = random.Random(seed).choices(range(len(tokenizer)), k=60)
    pieces, _ = write(tokenizer, tokens)
    assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("seed", range(20))
def test_a_reply_ends_before_the_stop_string_that_is_complete_first(tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choices("ab", k=80))
    stop = tuple("".join(rng.choices("ab", k=rng.randint(2, 7))) for _ in range(2))
    pieces, writer = write(tokenizer, tokenizer.encode(text), stop)
    read = next((text[:end] for end in range(len(text)) if text[:end].endswith(stop)), None)
    if read is None:
        assert "".join(pieces) == text and not writer.stopped
    else:
        found = max((string for string in stop if read.endswith(string)), key=len)
        assert "".join(pieces) == read.removesuffix(found) and writer.stopped


def test_only_what_may_begin_a_stop_string_is_held_back(tokenizer) -> None:
    writer = TextWriter(tokenizer, ("END",))
    written = [writer.add(token) for letter in "xENyEN" for token in tokenizer.encode(letter)]
    assert written == ["x", "", "", "ENy", "", ""]
    assert writer.finish() == "EN" and not writer.stopped
