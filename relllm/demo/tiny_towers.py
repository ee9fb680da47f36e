"""Three random towers of a few thousand weights, for smoke runs: real architectures, nothing learnt.

A run on them shows that data, model, losses, checkpoints and resume work on a machine; its metrics mean nothing.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Wav2Vec2FeatureExtractor,
    set_seed,
)

from relllm.modeling.configuration_relllm import ReLLMEmotionConfig
from relllm.modeling.emotion_tower_relllm import ReLLMEmotionModel
from relllm.processing.prompts_relllm import RECOGNITION_PROMPT, SPEECH_PROMPT, SYSTEM_PROMPT, WRITER_PROMPT

CORPUS = (
    SYSTEM_PROMPT,
    SPEECH_PROMPT,
    WRITER_PROMPT,
    RECOGNITION_PROMPT,
    "system user assistant neutral happy angry sad surprise\n",
    "I am so sorry to hear that. What happened? That sounds wonderful, tell me more about it! You sound upset.",
)


def make_tiny_towers(out: str | Path, *, seed: int = 0) -> None:
    """Write `speech` (Whisper with a window of 10 s), `emotion` (wav2vec2 with a head) and `llm` (Llama with a
    byte-level tokenizer), which `relllm train` takes as `audio_tower`, `emotion_tower` and `text_model`.
    """
    out = Path(out)
    set_seed(seed)
    speech = whisper_config(32, heads=2, max_source_positions=500)
    AutoModel.from_config(speech).save_pretrained(out / "speech")
    convolutions = {"conv_dim": (16, 16, 32), "conv_kernel": (10, 8, 8), "conv_stride": (10, 8, 4)}
    encoder = wav2vec2_config(32, layers=2, heads=2, **convolutions)
    ReLLMEmotionModel(ReLLMEmotionConfig(encoder_config=encoder)).save_pretrained(out / "emotion")
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(out / "emotion")
    tokenizer = train_byte_tokenizer(CORPUS, vocab_size=500, min_frequency=1)
    llm = llama_config(tokenizer, 64, layers=2, kv_heads=2)
    AutoModelForCausalLM.from_config(llm).save_pretrained(out / "llm")
    tokenizer.save_pretrained(out / "llm")


def whisper_config(width: int, *, heads: int, **options: object) -> PreTrainedConfig:
    """Return the configuration of a Whisper of two layers; its decoder, which nobody reads, is next to none."""
    return AutoConfig.for_model(
        "whisper",
        d_model=width,
        encoder_layers=2,
        encoder_attention_heads=heads,
        encoder_ffn_dim=2 * width,
        decoder_layers=1,
        decoder_attention_heads=1,
        decoder_ffn_dim=8,
        num_mel_bins=40,
        vocab_size=8,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
        **options,
    )


def wav2vec2_config(
    width: int, *, layers: int, heads: int, conv_stride: tuple[int, ...], **options: object
) -> PreTrainedConfig:
    """Return the configuration of a wav2vec2 of the strides given: 320 samples a frame, as in the real ones."""
    return AutoConfig.for_model(
        "wav2vec2",
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * width,
        conv_stride=conv_stride,
        num_feat_extract_layers=len(conv_stride),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=heads,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        conv_bias=True,
        **options,
    )


def llama_config(tokenizer: PreTrainedTokenizerFast, width: int, *, layers: int, kv_heads: int) -> PreTrainedConfig:
    """Return the configuration of a Llama of four heads for the tokens of a tokenizer."""
    return AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )


def train_byte_tokenizer(texts: Iterable[str], *, vocab_size: int, min_frequency: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer of bytes and a few merges, which any text survives, with the tokens of a chat and of audio."""
    bpe = ByteLevelBPETokenizer()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|audio|>"]
    size = {"vocab_size": vocab_size, "min_frequency": min_frequency}
    bpe.train_from_iterator(texts, **size, special_tokens=special, show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<|audio|>"],
        clean_up_tokenization_spaces=False,
    )
