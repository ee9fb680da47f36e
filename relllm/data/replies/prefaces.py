"""What a writer puts around a reply and nobody would say: "Sure! Here is …:", a label, a stage direction, quotes.

It is taken off, because a label or a direction (`(in an angry tone)`) would teach the emotion's name. Only the
beginning is looked at, and the quotes around the whole; where words could be the speaker's own, they stay.
"""

import re

MEANT = r"(?:response|reply|continuation|continued|completion|sentence|rewrite|version|回复|回答|回应|续写|句子)"
FEELING = (
    r"(?:neutral|happy|angry|sad|surprised?|fear(?:ful)?|disgust(?:ed)?|contempt(?:uous)?|frustrated|excited"
    r"|joyful|中性|高兴|开心|快乐|生气|愤怒|悲伤|难过|惊讶)"
)
TONE = r"(?:tone|emotion|mood|feeling|voice|manner|语气|情绪|情感)"
QUOTED = r"(?:\"[^\"\n]*\"|“[^”\n]*”|'[^'\n]*'|[^.!?:：。\n])"
PREAMBLE = re.compile(
    rf"""
    (?:(?:sure(?:\sthing)?|certainly|of\scourse|absolutely|okay|ok|alright|got\sit|great|好的|当然(?:可以)?|没问题)
       [!.,，！。]+\s*)?
    (?:
      (?:[^.!?:\n]{{0,60}},\s*)?(?:here(?:['’]s|\sis|\sare)|below\sis|the\sfollowing\sis|(?:以下|下面|这)[是为])
      {QUOTED}{{0,120}}?{MEANT}{QUOTED}{{0,160}}
      | I(?:['’](?:d|ll)|\s(?:would|will|can))\s{QUOTED}{{0,60}}(?:continue|respond|reply|rewrite|write)
        {QUOTED}{{0,100}}(?:{MEANT}|{TONE}){QUOTED}{{0,80}}
    )
    (?:[:：]|[.!。]?\s*\n)
    """,
    re.IGNORECASE | re.VERBOSE,
)
LABEL = re.compile(
    rf"""
    \#{{1,6}}\s[^\n]{{0,80}}(?:\n|$) | [-*_]{{3,}}\s*\n
    | (?:[*_]{{1,3}}|[\[【])[^\n*_\]】]{{0,40}}(?:(?<![^\W_])|(?<=[^\x00-\x7f]))
      (?:{MEANT}|{TONE}|{FEELING}|answer|output|assistant|listener)(?:(?![^\W_])|(?=[^\x00-\x7f]))[^\n*_\]】]{{0,40}}
      (?:[:：]\s*(?:[*_]{{1,3}}|[\]】]) | (?:[*_]{{1,3}}|[\]】])\s*(?:[:：]|\n))
    | (?:(?:my|the|a|possible|suggested|sample|example|empathetic|emotional|supportive|{FEELING})\s+){{0,3}}
      (?:response|reply|continuation|completion|output|回复|回答|回应|续写)\s*(?:[(（][^)）\n]{{0,40}}[)）]\s*)?[:：]
    | (?:{FEELING}\s*)?{TONE}\s*[:：]\s*{FEELING}?\s*(?:\n|$)
    | (?:(?:in|with)\s(?:an?|the)\s)?{FEELING}\s{TONE}\s*[:：] | (?!surprise:){FEELING}\s*[:：]
    """,
    re.IGNORECASE | re.VERBOSE,
)
DIRECTION = re.compile(
    r"(?:[(\[（【](?P<in_brackets>[^()\[\]（）【】\n]{1,80})[)\]）】]|(?P<mark>[*_])(?![*_\s])(?P<acted>[^*_\n]{1,80})(?P=mark))"
    r"\s*[:：—–-]?\s*(?P<next>\S)"
)
MANNER = re.compile(
    rf"(?:in|with)\s(?:an?|the)\s[^()\[\]*\n]{{0,40}}\b{TONE}|\S{{0,12}}地$|{TONE}\s*[:：]|{FEELING}(?:\s{TONE})?$",
    re.I,
)
ACTING = re.compile(
    r"""(?:\w+ly\s+)?(?:(?:sigh|smil|laugh|chuckl|giggl|paus|whisper|sob|gasp|nod|hug|frown|grin|winc|shout|yell|mutter
    |murmur|growl|speak)(?:s|es|ing|ed|e)?\b|(?:soft|gent|warm|quiet|calm|tearful|angri|sad|happi|excited|cheerful)ly$)
    """,
    re.IGNORECASE | re.VERBOSE,
)
PERSON = re.compile(r"\b(?:I|you|we|he|she|they|it|this|that|my|your|me|us)\b|[我你您他她]", re.IGNORECASE)
QUOTES = {'"': '"', "“": "”", "„": "“", "«": "»", "「": "」", "『": "』", "‘": "’", "'": "'"}
LEFT_DIRECTION = re.compile(
    rf"[(\[*（【][^)\]*）】\n]{{0,30}}\b(?:in|with)\san?\s[^)\]*\n]{{0,40}}{TONE}[^)\]*\n]{{0,20}}[)\]*]", re.I
)
COMMENTARY = re.compile(
    rf"\b(?:this|the|my)\s{MEANT}\s(?:reflects|conveys|captures|expresses|maintains|continues|uses|has\sa)\b", re.I
)


def strip_prefaces(reply: str) -> tuple[str, tuple[str, ...]]:
    """Return a reply without what stands around it, and the names of the mends."""
    mended: list[str] = []
    while True:
        before = reply
        for name, pattern in (("preamble_removed", PREAMBLE), ("label_removed", LABEL)):
            if found := pattern.match(reply):
                reply = reply[found.end() :].strip()
                mended.append(name)
        if (found := DIRECTION.match(reply)) and _is_direction(found):
            reply = reply[found.start("next") :]
            mended.append("direction_removed")
        if (bare := _without_quotes(reply)) != reply:
            reply = bare
            mended.append("quotes_removed")
        if reply == before:
            return reply, tuple(dict.fromkeys(mended))


def _is_direction(found: re.Match[str]) -> bool:
    """Tell a stage direction from an aside in brackets or a word in italics."""
    said = (found["in_brackets"] or found["acted"]).strip("()[] ").rstrip(".…")
    if MANNER.match(said):
        return found["in_brackets"] is not None or len(said.split()) > 1
    if not said or PERSON.search(said) or said[-1] in "?!？！":
        return False
    following = found["next"]
    begins = following.isupper() or following in "\"'([*_" or not following.isascii()  # a new sentence
    if ACTING.match(said):
        return begins or said[0].islower()
    words = len(said.split())
    if found["acted"] is not None:
        return begins and said[0].islower() and 1 < words <= 6
    return begins and words <= 6


def _without_quotes(reply: str) -> str:
    """Take off quotes around the whole, and an opening one that is never closed."""
    closing = QUOTES.get(reply[:1])
    if closing is None or len(reply) < 3:
        return reply
    inside = reply[1:-1]
    if reply[0] == "'":
        return inside.strip() if reply[-1] == "'" and reply[-2] in ".!?…" else reply
    if reply[-1] in closing + "”" * (reply[0] == "„") and reply[0] not in inside and closing not in inside:
        return inside.strip()
    return reply[1:].strip() if closing not in reply[1:] and reply[0] != "‘" else reply
