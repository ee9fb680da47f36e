"""HTML and SVG of what was heard: probabilities as bars, dimensions, the way through valence and arousal.

What does not live here: where it stands on the page (`page.py`). Colours are those of the page's theme, light or dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ..replies import Heard
from .session import Status

SIDE, MARGIN = 240, 30  # of the trail's square and the room around it, in SVG units

CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
.status { margin: 0; padding: 6px 10px; border-radius: 6px; border-left: 4px solid var(--border-color-primary); }
.status.busy { border-color: var(--color-accent); }
.status.error { border-color: #c0362c; background: #c0362c22; font-weight: 600; }
.heard { list-style: none; margin: 0; padding: 0; }
.heard li { display: grid; grid-template-columns: 5.5em 1fr 3em; gap: 8px; align-items: center; margin: 4px 0; }
.heard .track { height: 12px; border-radius: 6px; background: var(--border-color-primary); overflow: hidden; }
.heard .bar { height: 100%; background: var(--color-accent); }
.dark .heard .bar { background: var(--primary-400); }
.heard .value { text-align: right; font-variant-numeric: tabular-nums; }
.heard .first { font-weight: 700; }
.heard-title { margin: 10px 0 2px; font-weight: 600; }
.trail { width: 100%; max-width: 300px; height: auto; display: block; margin: 0 auto; color: var(--body-text-color); }
.trail text { fill: currentColor; font-size: 11px; }
.chat { min-height: 220px; }
@media (max-width: 640px) { .chat { height: 250px !important; } }
.quiet { opacity: .75; margin: 4px 0; }
:is(button, textarea, input):focus-visible { outline: 3px solid var(--color-accent) !important; }
"""


def draw_status(status: Status) -> str:
    """One line; an error is announced at once by a screen reader."""
    role = "alert" if status.kind == "error" else "status"
    return f'<p class="status {status.kind}" role="{role}">{escape(status.text)}</p>'


def draw_hearing(heard: Sequence[Heard]) -> str:
    """The last spoken turn: the probability of each emotion and the three dimensions.

    Args:
        heard (`Sequence` of [`Heard`]): Of the spoken turns so far.
    """
    if not heard:
        return '<p class="quiet">The emotion in your voice shows here after a spoken turn.</p>'
    last = heard[-1]
    rows = [_bar(name, value, f"{value:.0%}", name == last.emotion) for name, value in last.probabilities.items()]
    dimensions = [_bar(name, value, f"{value:.2f}", False) for name, value in last.dimensions.items()]
    return (
        f'<p class="heard-title">Turn {len(heard)}: {escape(last.emotion)}</p><ul class="heard">{"".join(rows)}</ul>'
        f'<p class="heard-title">Dimensions, 0 to 1</p><ul class="heard">{"".join(dimensions)}</ul>'
    )


def draw_trail(heard: Sequence[Heard]) -> str:
    """The spoken turns as numbered points on the plane of valence (to the right) and arousal (up), joined in order.

    Args:
        heard (`Sequence` of [`Heard`]): Of the spoken turns so far; nothing is drawn before the first. What lies
            outside 0 to 1 is drawn at the edge.
    """
    if not heard:
        return ""
    points = [_place(hearing) for hearing in heard]
    words = "; ".join(
        f"turn {number}: valence {hearing.dimensions['valence']:.2f}, arousal {hearing.dimensions['arousal']:.2f}"
        for number, hearing in enumerate(heard, start=1)
    )
    middle, end = MARGIN + SIDE / 2, MARGIN + SIDE
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    marks = "".join(_mark(number, len(points), *point) for number, point in enumerate(points, start=1))
    return (
        f'<svg class="trail" viewBox="0 0 {SIDE + 2 * MARGIN} {SIDE + 2 * MARGIN}" role="img" '
        f'aria-label="Valence and arousal over the spoken turns. {escape(words)}">'
        f'<rect x="{MARGIN}" y="{MARGIN}" width="{SIDE}" height="{SIDE}" rx="4" fill="none" stroke="currentColor" '
        'opacity=".5"/>'
        f'<path d="M{middle} {MARGIN}V{end}M{MARGIN} {middle}H{end}" stroke="currentColor" stroke-dasharray="3 4" '
        'opacity=".4"/>'
        f'<text x="{middle}" y="{end + 16}" text-anchor="middle">valence →</text>'
        f'<text x="{MARGIN - 10}" y="{middle}" text-anchor="middle" '
        f'transform="rotate(-90 {MARGIN - 10} {middle})">arousal →</text>'
        f'<polyline points="{line}" fill="none" stroke="var(--color-accent)" stroke-width="2" opacity=".6"/>'
        f"{marks}</svg>"
    )


def _bar(name: str, value: float, number: str, first: bool) -> str:
    width = 100 * min(max(value, 0.0), 1.0)
    strong = ' class="first"' if first else ""
    return (
        f'<li{strong}><span>{escape(name)}</span><span class="track"><span class="bar" '
        f'style="display:block;width:{width:.1f}%"></span></span><span class="value">{number}</span></li>'
    )


def _place(hearing: Heard) -> tuple[float, float]:
    valence, arousal = (min(max(hearing.dimensions[name], 0.0), 1.0) for name in ("valence", "arousal"))
    return MARGIN + SIDE * valence, MARGIN + SIDE * (1 - arousal)


def _mark(number: int, count: int, x: float, y: float) -> str:
    last = number == count
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{10 if last else 8}" fill="var(--color-accent)" '
        f'opacity="{1 if last else 0.55}"/>'
        f'<text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle" style="fill:#fff;font-weight:700">{number}</text>'
    )


__all__ = ["CSS", "draw_hearing", "draw_status", "draw_trail"]
