"""Names of emotions: what corpora write, and what is refused."""

import pytest

from relllm.labels import DIMENSIONS, EMOTIONS, FURTHER_EMOTIONS, canonical_emotion


def test_the_orders_are_fixed() -> None:
    assert EMOTIONS == ("neutral", "happy", "angry", "sad", "surprise")
    assert DIMENSIONS == ("arousal", "dominance", "valence")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("angry anger ang Angry", "angry"),
        ("happy happiness joy hap", "happy"),
        ("excited exc", "excited"),
        ("sad sadness", "sad"),
        ("neutral neu Neutral", "neutral"),
        ("surprise surprised sur", "surprise"),
        ("fear fea", "fear"),
        ("disgust dis", "disgust"),
        ("contempt", "contempt"),
        ("frustrated fru", "frustrated"),
        ("other oth xxx", None),
    ],
)
def test_names_seen_in_the_wild_have_one_canonical_name(names: str, expected: str | None) -> None:
    assert {canonical_emotion(name) for name in names.split()} == {expected}


def test_canonical_names_map_to_themselves() -> None:
    for name in (*EMOTIONS, *FURTHER_EMOTIONS):
        assert canonical_emotion(name) == name


@pytest.mark.parametrize("name", ["", "bored", "angri", *"AFHNOSUX"])
def test_an_unknown_name_and_a_letter_of_one_corpus_are_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=f"Unknown emotion {name!r}"):
        canonical_emotion(name)
