"""Chat templates of published LLMs, cut down to what they write around system, user and assistant turns."""

from dataclasses import dataclass
from pathlib import Path

from tiny_models import add_bos, tiny_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate.') }}{% endif %}"
)
SYSTEM_FIRST = (
    "{% set system = messages[0].content if messages[0].role == 'system' else none %}"
    "{% set turns = messages[1:] if system is not none else messages %}"
)


@dataclass(frozen=True)
class Published:
    template: str
    end: str  # of a reply: what training labels cover behind the words
    bos: str | None = None
    eos: str = "</s>"
    added: str = ""  # what stands in our prompt behind the LLM's own, so that it does not think
    past_end: str | None = None  # of an earlier reply, where it is another


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_2_5 = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{% endif %}" + CHATML
)
QWEN_3 = """\
{%- set ns = namespace(last=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\n' -}}
{%- if m.role == 'assistant' and loop.index0 > ns.last -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}
{{- m.content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}
{%- endif -%}"""
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA_3_2 = (
    SYSTEM_FIRST + "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' }}"
    "{{ strftime_now('%d %b %Y') + '\n\n' + (system or '') | trim + '<|eot_id|>' }}"
    "{% for m in turns %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA_2 = (
    SYSTEM_FIRST + "{% for m in turns %}" + ALTERNATE + "{% if m.role == 'user' %}{{ bos_token + '[INST] ' }}"
    "{% if loop.first and system is not none %}{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' }}{% endif %}"
    "{{ m.content | trim + ' [/INST]' }}{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
MISTRAL_V1 = (
    SYSTEM_FIRST + "{{ bos_token }}{% for m in turns %}" + ALTERNATE + "{% if m.role == 'user' %}{{ ' [INST] ' }}"
    "{% if loop.first and system is not none %}{{ system + '\n\n' }}{% endif %}{{ m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_V3 = (
    SYSTEM_FIRST + "{{ bos_token }}{% for m in turns %}" + ALTERNATE + "{% if m.role == 'user' %}{{ '[INST] ' }}"
    "{% if loop.last and system is not none %}{{ system + '\n\n' }}{% endif %}{{ m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_V7 = (
    SYSTEM_FIRST + "{{ bos_token + '[SYSTEM_PROMPT]' }}"
    "{{ (system if system is not none else 'Today is ' + strftime_now('%Y-%m-%d') + '.') + '[/SYSTEM_PROMPT]' }}"
    "{% for m in turns %}" + ALTERNATE + "{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
PHI_3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI_4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
GRANITE_3 = (
    SYSTEM_FIRST + "{{ '<|start_of_role|>system<|end_of_role|>' }}"
    '{{ system if system is not none else "Today\'s Date: " + strftime_now("%B %d, %Y") + ".\nYou are Granite." }}'
    "{{ '<|end_of_text|>\n' }}{% for m in turns %}"
    "{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
GLM_4 = (
    "[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
COMMAND_R = (
    SYSTEM_FIRST + "{{ bos_token }}"
    "{% if system is not none %}{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + system + '<|END_OF_TURN_TOKEN|>' }}"
    "{% endif %}{% for m in turns %}" + ALTERNATE + "{{ '<|START_OF_TURN_TOKEN|>' }}"
    "{{ ('<|USER_TOKEN|>' if m.role == 'user' else '<|CHATBOT_TOKEN|>') + m.content.strip() }}"
    "{{ '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)
DEEPSEEK_R1 = (
    SYSTEM_FIRST + "{{ bos_token + (system or '') }}"
    "{% for m in turns %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% else %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
DEEPSEEK_V3 = DEEPSEEK_R1.replace("<think>\n", "")
DEEPSEEK_V3_1 = DEEPSEEK_V3.replace("<｜Assistant｜>", "<｜Assistant｜></think>")
GPT_OSS = (
    SYSTEM_FIRST + "{{ '<|start|>system<|message|>You are ChatGPT.\nCurrent date: ' + strftime_now('%Y-%m-%d') }}"
    "{{ '\n\nReasoning: medium<|end|>' }}{% if system is not none %}"
    "{{ '<|start|>developer<|message|># Instructions\n\n' + system + '\n\n<|end|>' }}{% endif %}"
    "{% for m in turns %}{% if m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}"
    "{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
GEMMA_2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('No system role.') }}{% endif %}"
    "{% for m in messages %}" + ALTERNATE + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) }}"
    "{{ '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA_3 = (
    SYSTEM_FIRST + "{{ bos_token }}{% for m in turns %}" + ALTERNATE + "{{ '<start_of_turn>' }}"
    "{{ ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{% if loop.first and system is not none %}{{ system + '\n\n' }}{% endif %}"
    "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA_4 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ m.content | trim + '<turn|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>model\n' }}"
    "{% if not enable_thinking | default(false) %}{{ '<|channel>thought\n<channel|>' }}{% endif %}{% endif %}"
)

DEEPSEEK = {"bos": "<｜begin▁of▁sentence｜>", "eos": "<｜end▁of▁sentence｜>"}
PUBLISHED = {
    "ChatML": Published(CHATML, "<|im_end|>", eos="<|endoftext|>"),
    "Qwen2.5": Published(QWEN_2_5, "<|im_end|>", eos="<|im_end|>"),
    "Qwen3": Published(QWEN_3, "<|im_end|>", eos="<|im_end|>"),
    "Llama 3": Published(LLAMA_3, "<|eot_id|>", bos="<|begin_of_text|>", eos="<|end_of_text|>"),
    "Llama 3.2": Published(LLAMA_3_2, "<|eot_id|>", bos="<|begin_of_text|>", eos="<|end_of_text|>"),
    "Llama 2": Published(LLAMA_2, " </s>", bos="<s>"),
    "Mistral v1": Published(MISTRAL_V1, "</s>", bos="<s>"),
    "Mistral v3": Published(MISTRAL_V3, "</s>", bos="<s>"),
    "Mistral v7": Published(MISTRAL_V7, "</s>", bos="<s>"),
    "Phi-3": Published(PHI_3, "<|end|>", bos="<s>", eos="<|endoftext|>"),
    "Phi-4": Published(PHI_4, "<|im_end|>", eos="<|im_end|>"),
    "Granite 3": Published(GRANITE_3, "<|end_of_text|>", eos="<|end_of_text|>"),
    "GLM-4": Published(GLM_4, "<|endoftext|>", eos="<|endoftext|>", past_end=""),
    "Command R": Published(COMMAND_R, "<|END_OF_TURN_TOKEN|>", bos="<BOS_TOKEN>", eos="<|END_OF_TURN_TOKEN|>"),
    "DeepSeek-V3": Published(DEEPSEEK_V3, DEEPSEEK["eos"], **DEEPSEEK),
    "DeepSeek-V3.1": Published(DEEPSEEK_V3_1, DEEPSEEK["eos"], **DEEPSEEK),
    "DeepSeek-R1": Published(
        DEEPSEEK_R1,
        DEEPSEEK["eos"],
        **DEEPSEEK,
        added="\n</think>\n\n",
    ),
    "GPT-OSS": Published(
        GPT_OSS, "<|return|>", eos="<|return|>", added="<|channel|>final<|message|>", past_end="<|end|>"
    ),
    "Gemma 2": Published(GEMMA_2, "<end_of_turn>", bos="<bos>", eos="<eos>"),
    "Gemma 3": Published(GEMMA_3, "<end_of_turn>", bos="<bos>", eos="<eos>"),
    "Gemma 4": Published(GEMMA_4, "<turn|>", bos="<bos>", eos="<eos>"),
}


def save_tokenizer(name: str, folder: Path) -> PreTrainedTokenizerBase:
    """A tokenizer with the special tokens and the chat template of a published LLM, from disk."""
    published, tokenizer = PUBLISHED[name], tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": published.eos})
    tokenizer.add_tokens([published.end.strip(), published.past_end or published.eos], special_tokens=True)
    if published.bos is not None:
        add_bos(tokenizer, published.bos)
    tokenizer.chat_template = published.template
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)
