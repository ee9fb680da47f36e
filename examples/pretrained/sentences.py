"""The corpus of the demo with pretrained towers: many different sentences, each said in one of five emotions.

What lives here: the words and the plan. Prosody, voices, replies and the synthesiser are those of `relllm.demo`.

This is rule-made prosody, not human emotion. Words and emotion are drawn independently, so neither gives the other
away. Splits share no voice and no sentence; the words of the test sentences occur in training, in other company. In
validation and test five clips in a row share voice and sentence and differ in the emotion.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from relllm.data.preparing import prepare_corpus
from relllm.data.rows import Corpus, CorpusFacts, Row
from relllm.demo.demo_settings import SyntheticSettings
from relllm.demo.synthetic import FACTS, SPLITS, VOICES, Clip, make_clip, speak_clips
from relllm.demo.synthetic_text import Sentence
from relllm.labels import EMOTIONS

WHO = (
    *("My sister", "My brother", "My mother", "My father", "My uncle", "My cousin", "My friend", "My neighbour"),
    *("The doctor", "The teacher", "The driver", "The manager", "The farmer", "The student", "The girl", "The boy"),
    *("Our guest", "Our boss", "The woman", "The man"),
)
DID = (
    *("found", "lost", "bought", "sold", "painted", "broke", "cleaned", "moved", "forgot", "carried", "hid"),
    *("opened", "closed", "needed", "saw", "took", "left", "brought", "liked", "wanted"),
)
WHAT = (
    *("letter", "car", "house", "book", "phone", "table", "window", "garden", "picture", "money", "bread", "water"),
    *("paper", "ring", "watch", "door", "box", "boat", "horse", "dog", "cat", "bird", "fish", "cake"),
    *("chair", "coat", "hat", "shoe", "lamp", "clock", "map", "bag", "cup", "knife", "guitar", "camera"),
    *("ticket", "bicycle", "computer", "umbrella", "medicine", "present", "newspaper", "key"),
)
WHEN = (
    *("this morning", "last night", "yesterday", "on Sunday", "on Monday", "last week", "in the evening", "at noon"),
    *("after school", "before dinner", "in the summer", "an hour ago"),
)


def synthesize_sentences(directory: Path, clips_per_emotion: Mapping[str, int], *, seed: int) -> None:
    """Writes the corpus (16 kHz, mono), or leaves the one that is there already.

    Args:
        directory (`Path`): Where it goes. It appears when it is complete; interrupted, the same call goes on.
        clips_per_emotion (`Mapping[str, int]`): In each of the three splits.
        seed (`int`): Two runs with the same settings give the same bytes.

    Raises:
        FileExistsError: `directory` holds something else, or a corpus with other settings.
        ImportError: eSpeak NG is missing (`pip install relllm[demo]`).
    """
    rows = [clip.row for split in SPLITS for clip in plan_sentences(split, clips_per_emotion[split], seed=seed)]
    facts = CorpusFacts(**{**vars(FACTS), "name": "synthetic-sentences", "title": "Synthetic emotional sentences"})
    counts = {f"{split}_clips": clips_per_emotion[split] for split in SPLITS}
    prepare_corpus(
        Corpus(facts, rows, dropped=[], notes=[]),
        SyntheticSettings(output_dir=directory, seed=seed, **counts),
        make_audio=functools.partial(speak_sentences, seed=seed),
    )


def speak_sentences(rows: Sequence[Row], directory: Path, *, seed: int) -> None:
    """Makes the audio of planned rows, as files in `directory`."""
    places = [(str(row["split"]), int(row["id"].rpartition("-")[2])) for row in rows]
    speak_clips([plan_sentence(split, number, seed=seed) for split, number in places], directory)


def plan_sentences(split: str, clips_per_emotion: int, *, seed: int) -> Iterator[Clip]:
    """What a split will hold; the emotions take turns."""
    for number in range(clips_per_emotion * len(EMOTIONS)):
        yield plan_sentence(split, number, seed=seed)


def plan_sentence(split: str, number: int, *, seed: int) -> Clip:
    """One clip, by its place.

    Args:
        split (`str`): `"train"`, `"validation"` or `"test"`.
        number (`int`): Place in the split.
        seed (`int`): Of the plan.
    """
    turn, index = divmod(number, len(EMOTIONS))
    place = [seed, SPLITS.index(split)]
    of_words = np.random.default_rng([*place, number if split == "train" else turn, 0])
    of_prosody = np.random.default_rng([*place, number, 1])
    voice = VOICES[split][of_words.integers(len(VOICES[split]))]
    sentence = _draw_sentence(split, of_words)
    return make_clip(split, number, emotion=EMOTIONS[index], voice=voice, sentence=sentence, rng=of_prosody)


def _draw_sentence(split: str, rng: np.random.Generator) -> Sentence:
    """A sentence of the split, and its topic. Which split a combination of words belongs to follows from them."""
    while True:
        who, did, what, when = (int(rng.integers(len(words))) for words in (WHO, DID, WHAT, WHEN))
        if SPLITS[(0, 0, 0, 1, 2)[(who + did + what + when) % 5]] == split:
            return Sentence(f"{WHO[who]} {DID[did]} the {WHAT[what]} {WHEN[when]}.", f"the {WHAT[what]}")
