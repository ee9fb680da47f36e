"""What writers put around a reply goes, and no honest reply is harmed."""

import pytest

from relllm.data.replies.cleaning import CleaningRules, clean_reply

REPLY, CHINESE = "That sounds hard. What happened next?", "那一定很难过。你想聊聊吗？"
AROUND = (
    "Sure! Here is a continuation of the sentence that reflects a 'sad' tone:\n\n{}",
    "Sure! Here is a response:\n{}",
    "Certainly! Here's a possible continuation in an angry tone: {}",
    'Here is the sentence continued in a coherent style:\n\n"{}"',
    "Of course. Here’s my reply:\n\n“{}”",
    'Sure, here\'s a sad continuation of "I failed the exam.":\n{}',
    "Here's a version with a happy tone.\n\n{}",
    "Sure! I'd be happy to continue the sentence in a sad tone:\n\n{}",
    "Okay, I will respond in a coherent style with a sad tone.\n{}",
    "Based on the emotion, here is an empathetic response: {}",
    *("**Response:** {}", "**Response**: {}", "**Response**\n{}", "Response: {}", "Reply: {}", "### Response\n\n{}"),
    *("**Empathetic response (sad):** {}", "*Reply:* {}", "__Reply:__ {}", "[Response]: {}", "## Continuation\n{}"),
    *("**Sad tone:** {}", "Sad tone: {}", "Sad: {}", "Tone: sad\n{}", "**Emotion: sad**\n{}", "In an angry tone: {}"),
    *("[Emotion: angry] {}", "My response: {}", "Empathetic Reply: {}", 'Continuation: "{}"', "---\n{}"),
    *("(in an angry tone) {}", "(In a sad voice): {}", "[in a happy tone] {}", "*in an angry tone* {}", "_sighs_ {}"),
    *("*sighs* {}", "*Sighs softly* {}", "(sighs) {}", "(Angrily) {}", "[angry] {}", "(angry) {}", "(softly) {}"),
    *(
        "*takes a deep breath* {}",
        "(pauses.) {}",
        "(with a warm smile) {}",
        "[laughs] {}",
        "*gently* {}",
        "(a beat) {}",
    ),
    *("*(sighs)* {}", "(sad tone) - {}", '"{}"', "“{}”", "«{}»", "'{}'", '"{}'),
    'Sure! Here\'s a response:\n\n**Response:** (in an angry tone) "{}"',
)
AROUND_CHINESE = (
    "好的，以下是续写：\n{}",
    "（生气地）{}",
    "（叹气）{}",
    "**回复：**{}",
    "回复：{}",
    "「{}」",
    "【悲伤】{}",
)
HONEST = (
    "Sure! I'd love to hear more.",
    "Of course you are sad. Who would not be?",
    "Here's the thing: you did your best.",
    "Here is what I would do: call her tonight.",
    "Sure! Here is a thought: your reply was kind, so rest now. Did it help?",
    "Certainly not! Here is why: you deserve better.",
    "(I know, easier said than done.) But you will get there.",
    "(if you want, of course) you can tell me.",
    "(And congratulations!) How do you feel?",
    "*Really* sorry to hear that. What happened?",
    "*You* did that? How brave!",
    "*Congratulations!* That is wonderful.",
    '"Never again" is what I said too. What did you say?',
    '"No" can be hard to say, and harder to hear is "never"',
    "'Tis hard. I know the feeling, and it's awful.",
    "Sad? I would be too. Tell me more.",
    "Happy birthday! How was it?",
    "Angry people do that: they shout. Are you safe?",
    "The answer is simple: rest. You need it.",
    "Surprise: they do care about you! How does it feel?",
    "I will write to you tomorrow. Is that all right?",
    "I can reply to that: yes, you may. Tell me more.",
    "This is a hard sentence to hear: it is over. How are you?",
    "[Name], that is hard. What happened?",
    "Feeling: it is a strange thing, isn't it? Tell me.",
    "I hear a sad tone: are you all right?",
)


@pytest.mark.parametrize("around", AROUND)
def test_what_stands_around_a_reply_goes(around: str) -> None:
    cleaned = clean_reply(around.format(REPLY), "I failed the exam.", finished=True, rules=CleaningRules())
    assert (cleaned.text, cleaned.dropped) == (REPLY, None) and cleaned.mended


@pytest.mark.parametrize("around", AROUND_CHINESE)
def test_so_does_it_in_chinese(around: str) -> None:
    cleaned = clean_reply(around.format(CHINESE), "我今天很难过", finished=True, rules=CleaningRules())
    assert (cleaned.text, cleaned.dropped) == (CHINESE, None)


@pytest.mark.parametrize("reply", HONEST)
def test_an_honest_reply_stays_as_it_is(reply: str) -> None:
    cleaned = clean_reply(reply, "I failed the exam.", finished=True, rules=CleaningRules())
    assert (cleaned.text, cleaned.dropped, cleaned.mended) == (reply, None, ())


@pytest.mark.parametrize(
    ("reply", "rule"),
    [
        ("That is awful. (in an angry tone) How dare they!", "stage_direction"),
        ("That is awful. This response reflects the sad tone of the speaker.", "commentary"),
        ("Sure! Here is a continuation in a sad tone:\n", "empty"),
    ],
)
def test_what_cannot_be_taken_off_drops_the_reply(reply: str, rule: str) -> None:
    assert clean_reply(reply, "I failed.", finished=True, rules=CleaningRules()).dropped == rule
