"""The numbers that the RE-LLM paper published, to stand beside a comparison, marked as published.

What lives here: values and gains as printed, each with its source. What does not: anything measured with this package.
Protocols, splits and scorers of the paper are not those of a run here, so no test sets the two against each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SOURCE = "RE-LLM, arXiv 2602.10716"


@dataclass(frozen=True)
class PublishedValue:
    """A value of RE-LLM as printed.

    Attributes:
        corpus (`str`): As `CorpusFacts.name`. metric (`str`): `"ER"` (mean level, 0 to 2) or `"ua"` (per cent).
        value (`float`): In that unit. source (`str`): Where it was printed.
    """

    corpus: str
    metric: str
    value: float
    source: str = SOURCE


@dataclass(frozen=True)
class PublishedGain:
    """A gain of RE-LLM as printed.

    Attributes:
        corpus (`str`): As `CorpusFacts.name`. metric (`str`): `"ER"`, `"EX"` or `"ua"`.
        baseline (`str` or `None`): The system it is over; `None` where only "the baseline" is known.
        gain (`float`): In `unit`. unit (`str`): `"%"` of the baseline, or percentage `"points"`.
        source (`str`): Where it was printed.
    """

    corpus: str
    metric: str
    baseline: Literal["text-only", "speech-only"] | None
    gain: float
    unit: Literal["%", "points"]
    source: str = SOURCE


PUBLISHED_VALUES = (
    PublishedValue("iemocap", "ER", 1.856),
    PublishedValue("esd", "ER", 1.851),
    PublishedValue("msp-podcast", "ER", 1.889),
    PublishedValue("iemocap", "ua", 76.6),
    PublishedValue("esd", "ua", 98.9),
    PublishedValue("msp-podcast", "ua", 66.4),
)
PUBLISHED_GAINS = (
    PublishedGain("iemocap", "EX", "text-only", 35.42, "%"),
    PublishedGain("iemocap", "EX", "speech-only", 3.91, "%"),
    PublishedGain("esd", "EX", "text-only", 139.28, "%"),
    PublishedGain("esd", "EX", "speech-only", 9.83, "%"),
    PublishedGain("msp-podcast", "EX", "text-only", 60.95, "%"),
    PublishedGain("msp-podcast", "EX", "speech-only", 22.64, "%"),
    PublishedGain("esd", "ER", "text-only", 14.79, "%"),
    PublishedGain("esd", "ER", "speech-only", 6.76, "%"),
    PublishedGain("iemocap", "ua", None, 5.4, "points"),
    PublishedGain("esd", "ua", None, 2.3, "points"),
    PublishedGain("msp-podcast", "ua", None, 6.9, "points"),
)

__all__ = ["PUBLISHED_GAINS", "PUBLISHED_VALUES", "SOURCE", "PublishedGain", "PublishedValue"]
