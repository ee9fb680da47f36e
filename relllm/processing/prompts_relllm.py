"""The frozen prompts.

Published systems are known to be sensitive to the prompt, so the wording is fixed here and saved with every result.
"""

from collections.abc import Sequence

# The original code's prompt for recognition by generation, the audio behind it.
RECOGNITION_PROMPT = (
    "Please identify the emotion tone of the speech provided below. Select from the following options: "
    "neutral, sad, angry, happy, or surprise.\n\nSpeech: "
)
TRANSCRIPTION_PROMPT = "Please transcribe the speech provided below.\n\nSpeech: "  # ours, in the same words
# BLSP-Emo's pair: the writer of the target reads transcript and emotion, the model hears the speech.
WRITER_PROMPT = "Continue the following sentence that reflects a '{emotion}' emotion tone in a coherent style: "
SPEECH_PROMPT = "Continue the following sentence based on the conveyed emotion tone in a coherent style: "
SYSTEM_PROMPT = (
    "You are an empathetic listener. React to what the speaker feels, and ask about it so as to understand it better."
)

AUDIO_TOKEN = "<|audio|>"
_OPTIONS = "neutral, sad, angry, happy, or surprise"  # as the frozen prompt has them, which sets their order
_ORDER = ("neutral", "sad", "angry", "happy", "surprise")


def recognition_prompt(labels: Sequence[str], *, in_order: bool = True) -> str:
    """Return the frozen prompt with the labels in use as its options; with the original's five it is unchanged.

    Unless `in_order`, the options stand as the labels do.
    """
    if len(labels) < 2:
        raise ValueError(f"Recognition needs at least two labels to choose from, got {list(labels)}.")
    first = [name for name in _ORDER if name in labels] if in_order else []
    options = [*first, *(name for name in labels if name not in first)]
    comma = "," if len(options) > 2 else ""
    return RECOGNITION_PROMPT.replace(_OPTIONS, f"{', '.join(options[:-1])}{comma} or {options[-1]}")


def ask_about(prompt: str, turn: dict) -> list[dict]:
    """Return the request that puts a question before a clip, or a transcript: a user's turn of the two.

    It has no system turn: ours asks for a reaction, and such a question for a name or for the words.
    """
    return [{"role": "user", "content": [{"type": "text", "text": prompt}, turn]}]
