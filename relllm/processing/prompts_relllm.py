"""The frozen prompts, and chat templates that carry audio and mark the reply.

Published systems are known to be sensitive to the prompt, so the wording is fixed here and saved with every result.
"""

from typing import TypeAlias

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

Turn: TypeAlias = tuple[str, str, str, dict[str, str]]
# A token of the tokenizer -> header of a turn, its end (which the model learns to say), what follows, role names.
_TURNS: dict[str, Turn] = {
    "<|im_start|>": ("<|im_start|>{role}\n", "<|im_end|>", "\n", {}),
    "<|start_header_id|>": ("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", "", {}),
    "<start_of_turn>": ("<start_of_turn>{role}\n", "<end_of_turn>", "\n", {"assistant": "model", "system": "user"}),
}

_TEMPLATE = """\
{%- macro render(content) -%}
{%- if content is string -%}{{- content -}}{%- else -%}
{%- for part in content -%}
{%- if part['type'] == 'audio' -%}{{- AUDIO -}}{%- elif part['type'] == 'text' -%}{{- part['text'] -}}
{%- else -%}{{- raise_exception("Content of type '" ~ part['type'] ~ "': only 'text' and 'audio' are read.") -}}
{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- set roles = ROLES -%}
{%- for message in messages -%}
{%- set role = message['role'] -%}
{{- HEADER -}}
{%- if role == 'assistant' -%}
{%- generation -%}{{- render(message['content']) + END -}}{%- endgeneration -%}
{%- else -%}{{- render(message['content']) + END -}}{%- endif -%}
{{- AFTER -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{%- set role = 'assistant' -%}{{- HEADER -}}{%- endif -%}
"""


def build_chat_template(vocabulary: dict[str, int], eos_token: str, audio_token: str = AUDIO_TOKEN) -> str:
    """Make a Jinja chat template in the turn format that the tokens of a vocabulary show: ChatML, Llama 3 or Gemma.

    Without such tokens a turn is "role: content" and `eos_token`. It is ours and not the LLM's own, because it has to
    place audio, mark the reply with `{% generation %}` for the training labels, inject no system prompt, and be the
    same in training and generation.
    """
    plain: Turn = ("{role}: ", eos_token, "\n", {})
    header, end, after, roles = next((turn for token, turn in _TURNS.items() if token in vocabulary), plain)
    before, behind = header.split("{role}")
    fields = {
        "AUDIO": repr(audio_token),
        "ROLES": repr({role: roles.get(role, role) for role in ("system", "user", "assistant")}),
        "HEADER": f"{before!r} + roles[role] + {behind!r}",
        "END": repr(end),
        "AFTER": repr(after),
    }
    template = _TEMPLATE
    for name, value in fields.items():
        template = template.replace(name, value)
    return template
