"""Transformers' own processor tests, on ReLLM's.

`scripts/transformers_suite.py` lays out the package `tests` that is imported here.
"""

import unittest
from pathlib import Path
from unittest.mock import patch

import pytest
import soundfile
from tiny_models import RATE, clip, tiny_processor

from relllm import ReLLMProcessor

# What the suite would skip for want of librosa: our processor decodes with soundfile and resamples with torchaudio.
with patch("transformers.testing_utils.is_librosa_available", return_value=True):
    import tests.test_processing_common as suite


class ReLLMProcessorTest(suite.ProcessorTesterMixin, unittest.TestCase):
    processor_class = ReLLMProcessor

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        paths = [Path(cls.tmpdirname) / f"{index}.wav" for index in range(2)]
        for index, path in enumerate(paths):
            soundfile.write(path, clip(seed=index), RATE)
        hub_addresses = patch.dict(suite.MODALITY_INPUT_DATA, audio=[str(path) for path in paths])
        hub_addresses.start()
        cls.addClassCleanup(hub_addresses.stop)

    @classmethod
    def _setup_from_components(cls):
        return tiny_processor()

    # Transformers leaves a template's file open when it loads several.
    @pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
    @pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
    def test_chat_template_save_loading(self):
        super().test_chat_template_save_loading()
