"""The frozen prompts.

Published systems are known to be sensitive to the prompt, so the wording is fixed here and saved with every result.
"""

# The original code's prompt for recognition by generation, the audio behind it.
RECOGNITION_PROMPT = (
    "Please identify the emotion tone of the speech provided below. Select from the following options: "
    "neutral, sad, angry, happy, or surprise.\n\nSpeech: "
)
# BLSP-Emo's pair: the writer of the target reads transcript and emotion, the model hears the speech.
WRITER_PROMPT = "Continue the following sentence that reflects a '{emotion}' emotion tone in a coherent style: "
SPEECH_PROMPT = "Continue the following sentence based on the conveyed emotion tone in a coherent style: "
SYSTEM_PROMPT = (
    "You are an empathetic listener. React to what the speaker feels, and ask about it so as to understand it better."
)

AUDIO_TOKEN = "<|audio|>"
