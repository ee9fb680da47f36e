"""`server.writing`: pieces of text against decoding all tokens at once."""

import random

import pytest
from tiny_models import tiny_tokenizer

from relllm.inference.server.writing import TextWriter

TEXT = "Żółć — 你好, I am so sorry 🙂🙂 to hear that! héé"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def write(tokenizer, tokens: list[int]) -> list[str]:
    writer = TextWriter(tokenizer)
    return [writer.write(token) for token in (*tokens, None)]


def test_the_pieces_together_are_the_text(tokenizer) -> None:
    pieces = write(tokenizer, tokenizer.encode(TEXT))
    assert "".join(pieces) == TEXT


def test_no_piece_holds_half_a_character(tokenizer) -> None:
    pieces = write(tokenizer, tokenizer.encode(TEXT))
    assert len([piece for piece in pieces if piece]) > 10
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@pytest.mark.parametrize("seed", range(20))
def test_the_pieces_of_any_tokens_are_those_of_all_at_once(tokenizer, seed: int) -> None:
    tokens = random.Random(seed).choices(range(len(tokenizer)), k=60)
    pieces = write(tokenizer, tokens)
    assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)
