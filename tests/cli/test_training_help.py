"""The help pages of the training commands, which are read from source, against the parsers that the commands use."""

import pytest
from trl import TrlParser

from relllm.cli.training_help import PAGES, show_training_help
from relllm.preferences.dpo import ReLLMDPOConfig
from relllm.preferences.grpo_config import ReLLMGRPOConfig
from relllm.training.baselines.text_training import TextScriptArguments, TextTrainingConfig
from relllm.training.config import ReLLMScriptArguments, ReLLMSFTConfig
from relllm.training.emotion_training import EmotionScriptArguments, EmotionTrainingConfig
from relllm.training.planning.plan import PlanArguments

KINDS = {
    "train": (ReLLMScriptArguments, ReLLMSFTConfig),
    "train --method dpo": (ReLLMScriptArguments, ReLLMDPOConfig),
    "train --method grpo": (ReLLMScriptArguments, ReLLMGRPOConfig),
    "train-emotion": (EmotionScriptArguments, EmotionTrainingConfig),
    "train-text": (TextScriptArguments, TextTrainingConfig),
    "plan": (PlanArguments, ReLLMScriptArguments, ReLLMSFTConfig),
}
COMPUTED = {"log_level", "log_level_replica"}  # whose words Transformers makes when it is imported


@pytest.mark.parametrize("command", PAGES)
def test_a_page_has_each_setting_of_its_parser_once_with_its_help_default_and_words(command: str) -> None:
    entries = _entries(show_training_help(command, ""))
    parser = TrlParser(KINDS[command], add_help=False)
    actions = {one.dest: one for one in reversed(parser._actions)}  # a switch that is on has a second one, `--no_…`
    assert entries.keys() == actions.keys()
    for name, action in actions.items():
        shown = "" if action.default in (None, "", []) else f"(default: {_plain(action.default)})"
        words = "|".join(map(str, action.choices or ()))
        value, said = entries[name]
        assert "".join(said.split()) == "".join(f"{(action.help or '') % {}} {shown}".split()), name
        assert value == (words if words and len(words) < 59 else "NAME" if words else "VALUE") or name in COMPUTED


def _plain(value: object) -> str:
    return str(getattr(value, "value", value))


def _entries(page: str) -> dict[str, tuple[str, str]]:
    """Return by name what a page shows for a value, and what it says."""
    entries: dict[str, tuple[str, str]] = {}
    name = ""
    for line in page.splitlines():
        if line.startswith("  --"):
            flag, value, *said = line.split(maxsplit=2)
            name = flag.removeprefix("--")
            assert name not in entries
            entries[name] = (value, " ".join(said))
        elif line.startswith(" " * 34) and name:
            value, text = entries[name]
            entries[name] = (value, f"{text} {line.strip()}".strip())
    return entries
