"""Transformers' own model and configuration tests, on ReLLM and on the emotion tower.

`scripts/transformers_suite.py` lays out the package `tests` that is imported here. The names of our classes are put
where the suite looks up what to expect of a class: a loss, labels, a base model.
"""

import json
import unittest
from unittest.mock import patch

import pytest
import tests.test_modeling_common as suite
import torch
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from tiny_models import LORA, tiny_config, tiny_emotion_config
from transformers.testing_utils import torch_device

from relllm import ReLLMConfig, ReLLMEmotionConfig, ReLLMEmotionModel, ReLLMForConditionalGeneration, ReLLMModel

pytestmark = pytest.mark.gpu

WINDOW_S = 0.64
MEL_FRAMES = 64
SAMPLES = 10_240
FRAMES = 32  # of the emotion tower: 10240 samples are 256, 64, 32 after each convolution
AUDIO_TOKENS = 4  # 64 mel frames are 32 of Whisper, and 16, 8, 4 after each convolution


def drawn_narrow(config):
    """The config with weights of 0.02, the usual width, for which the suite's tolerances are made."""
    for nested in suite._get_nested_configs(config):
        name = "init_std" if nested.model_type == "whisper" else "initializer_range"
        setattr(nested, name, 0.02)
    return config


class ReLLMModelTester:
    batch_size = 3
    seq_length = 12
    is_training = True
    lora = LORA

    def __init__(self):
        config = self.get_config()
        self.audio_token_id = config.audio_token_id
        self.vocab_size = config.text_config.vocab_size
        self.hidden_size = config.text_config.hidden_size
        self.num_hidden_layers = config.text_config.num_hidden_layers
        self.num_attention_heads = config.text_config.num_attention_heads

    def get_config(self):
        return drawn_narrow(tiny_config(layers=2, window_s=WINDOW_S, lora=self.lora))

    def audio_inputs(self, clips):
        mels = self.get_config().audio_config.num_mel_bins
        return {
            "input_features": floats_tensor([clips, mels, MEL_FRAMES]),
            "input_features_mask": torch.ones(clips, MEL_FRAMES, dtype=torch.long, device=torch_device),
            "input_values": floats_tensor([clips, SAMPLES]),
            "input_values_mask": torch.ones(clips, SAMPLES, dtype=torch.long, device=torch_device),
        }

    def text_ids(self, shape, vocab_size, **kwargs):
        """Random ids without the placeholder, which asks for audio."""
        return ids_tensor(shape, min(vocab_size, self.audio_token_id), **kwargs)

    def prepare_config_and_inputs_for_common(self):
        input_ids = self.text_ids([self.batch_size, self.seq_length], self.vocab_size)
        input_ids[:, 1 : 1 + AUDIO_TOKENS] = self.audio_token_id
        attention_mask = torch.ones_like(input_ids)
        attention_mask[:, 0] = 0
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **self.audio_inputs(self.batch_size)}
        return self.get_config(), inputs


class ReLLMModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (ReLLMModel, ReLLMForConditionalGeneration)
    test_can_init_all_missing_weights_before_2023 = True  # also where no year stands in the file
    skip_test_audio_features_output_shape = True  # `last_hidden_state` has the width of the LLM
    test_all_params_have_gradient = False  # the heads of emotion and dimensions have losses of their own
    _is_composite = True

    def setUp(self):
        self.model_tester = ReLLMModelTester()
        for patcher in (
            patch.dict(suite.MODEL_MAPPING_NAMES, relllm="ReLLMModel"),
            patch.dict(suite.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, relllm="ReLLMForConditionalGeneration"),
            patch.object(suite, "ids_tensor", self.model_tester.text_ids),
        ):
            patcher.start()
            self.addCleanup(patcher.stop)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        """Some tests make a batch of `input_ids` alone: it gets the audio that its placeholders stand for."""
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if "input_ids" in inputs and "input_features" not in inputs:
            placeholders = int((inputs["input_ids"] == self.model_tester.audio_token_id).sum())
            inputs |= self.model_tester.audio_inputs(placeholders // AUDIO_TOKENS)
        return inputs

    def check_training_gradient_checkpointing(self, gradient_checkpointing_kwargs=None):
        """With nothing frozen: a frozen tower stays in eval mode, where there is nothing to checkpoint."""
        with patch.object(ReLLMModel, "freeze"):
            super().check_training_gradient_checkpointing(gradient_checkpointing_kwargs)

    def test_config(self):
        emotion_config = json.loads(tiny_config().to_json_string())["emotion_config"]
        tester = ConfigTester(self, ReLLMConfig, has_text_modality=False, emotion_config=emotion_config)
        tester.run_common_tests(can_init_without_params=False)  # there is no emotion tower by default

    @unittest.skip("Transformers' source archive lacks its generation tests; ours are in tests/test_generation.py.")
    def test_generation_tester_mixin_inheritance(self):
        pass

    def test_enable_input_require_grads_with_gradient_checkpointing(self):
        """With nothing frozen, which a LoRA would do as well: the gradient is that of the LLM's embeddings."""
        with patch.object(ReLLMModel, "freeze"), patch.object(self.model_tester, "lora", None):
            super().test_enable_input_require_grads_with_gradient_checkpointing()

    def test_model_weights_reload_no_missing_tied_weights(self):
        """Without the refusal of a checkpoint that lacks weights: the names of what is missing are right."""
        with patch("relllm.modeling.modeling_relllm.check_complete"):
            super().test_model_weights_reload_no_missing_tied_weights()

    @unittest.skip("A composite model: test_sdpa_can_dispatch_composite_models looks at each of its parts.")
    def test_sdpa_can_dispatch_non_composite_models(self):
        pass


class ReLLMEmotionModelTester:
    batch_size = 3
    seq_length = FRAMES
    is_training = True

    def __init__(self):
        encoder_config = self.get_config().encoder_config
        self.hidden_size = encoder_config.hidden_size
        self.num_hidden_layers = encoder_config.num_hidden_layers
        self.num_attention_heads = encoder_config.num_attention_heads

    def get_config(self):
        return drawn_narrow(tiny_emotion_config(layers=2))

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {
            "input_values": floats_tensor([self.batch_size, SAMPLES]),
            "input_values_mask": torch.ones(self.batch_size, SAMPLES, dtype=torch.long, device=torch_device),
        }


class EmotionConfigTester(ConfigTester):
    def create_and_test_config_with_num_labels(self):
        """The tower has three outputs in a fixed order, and refuses another number."""
        with self.parent.assertRaisesRegex(ValueError, "arousal.*dominance.*valence"):
            self.config_class(num_labels=5)


class ReLLMEmotionModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (ReLLMEmotionModel,)
    _is_composite = True

    def setUp(self):
        self.model_tester = ReLLMEmotionModelTester()
        patcher = patch.dict(suite.MODEL_MAPPING_NAMES, relllm_emotion="ReLLMEmotionModel")
        patcher.start()
        self.addCleanup(patcher.stop)

    def test_config(self):
        EmotionConfigTester(self, ReLLMEmotionConfig, has_text_modality=False).run_common_tests()

    @unittest.skip("A composite model of one encoder: test_attn_implementation_composite_models looks at it.")
    def test_sdpa_can_dispatch_non_composite_models(self):
        pass

    @unittest.skip("A waveform encoder has no token embeddings.")
    def test_model_get_set_embeddings(self):
        pass

    test_enable_input_require_grads_with_gradient_checkpointing = test_model_get_set_embeddings
    test_resize_tokens_embeddings = test_model_get_set_embeddings
    test_resize_embeddings_untied = test_model_get_set_embeddings
    test_resize_embeddings_untied_no_reinit_on_post_init = test_model_get_set_embeddings

    @unittest.skip("An emotion tower with a weight missing does not load: random parts give numbers that look right.")
    def test_correct_missing_keys(self):
        pass

    test_can_init_all_missing_weights = test_correct_missing_keys
    test_model_weights_reload_no_missing_tied_weights = test_correct_missing_keys
