"""Names of emotions and of emotion dimensions, in the one order that this package uses, and what corpora call them."""

EMOTIONS = ("neutral", "happy", "angry", "sad", "surprise")  # the original's order: index 0-4
DIMENSIONS = ("arousal", "dominance", "valence")  # files and models in the wild use four orders: always go by name

FURTHER_EMOTIONS = ("fear", "disgust", "contempt", "frustrated", "excited")  # kept where a corpus has them

_SYNONYMS = {
    "neutral": ("neu", "neutral state"),
    "happy": ("happiness", "joy", "hap"),
    "angry": ("anger", "ang"),
    "sad": ("sadness",),
    "surprise": ("surprised", "sur"),
    "fear": ("fearful", "fea"),
    "disgust": ("disgusted", "dis"),
    "contempt": (),
    "frustrated": ("frustration", "fru"),
    "excited": ("excitement", "exc"),
}
_NO_LABEL = ("other", "oth", "no agreement", "xxx")
_CANONICAL: dict[str, str | None] = dict.fromkeys(_NO_LABEL)
_CANONICAL |= {word: name for name, synonyms in _SYNONYMS.items() for word in (name, *synonyms)}


def canonical_emotion(name: str) -> str | None:
    """Return the canonical name of an emotion as a corpus writes it: `"ang"`, `"anger"` and `"Angry"` are `"angry"`.

    It is `None` for "other" and where raters did not agree; a name that is in no list is a `ValueError`. A single
    letter is no name: `A` is angry in MSP-Podcast and afraid in EmoDB, so it is its corpus that reads it.
    """
    key = name.strip().lower()
    if key not in _CANONICAL:
        raise ValueError(
            f"Unknown emotion {name!r}; known names: {', '.join(sorted(_CANONICAL))}. Map it to one of them before."
        )
    return _CANONICAL[key]


def find_emotion(name: str, unknown: str | None) -> str | None:
    """Return what [`canonical_emotion`] does, and `unknown` for a name that is in no list."""
    return _CANONICAL.get(name.strip().lower(), unknown)
