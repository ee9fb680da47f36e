"""The demos' emotion tower: a small wav2vec2 with a head, trained on 1 - CCC of arousal, dominance and valence."""

from pathlib import Path

from datasets import Dataset
from transformers import AutoConfig, TrainingArguments

from relllm.modeling.configuration_relllm import ReLLMEmotionConfig
from relllm.modeling.emotion_tower_relllm import ReLLMEmotionModel
from relllm.training.checkpoints import checkpoint_to_resume
from relllm.training.emotion_training import EmotionTowerTrainer


def train_emotion_tower(rows: Dataset, arguments: TrainingArguments, path: Path, *, width: int, layers: int) -> None:
    """Trains it and saves it; goes on from the last checkpoint in the folder, if there is one.

    Args:
        rows (`datasets.Dataset`): With `audio` and the three dimensions.
        arguments (`TrainingArguments`): Of Transformers; the seed is set already.
        path (`Path`): Where it goes.
        width (`int`): Of its frames, and of the embedding that RE-LLM sets beside the speech; a multiple of 4.
        layers (`int`): Transformer layers.
    """
    encoder = AutoConfig.for_model(
        "wav2vec2",
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * width,
        conv_dim=(32, 64, 64, 96),
        conv_kernel=(10, 8, 8, 4),
        conv_stride=(5, 4, 4, 4),  # 320 samples a frame, as in the real ones
        num_feat_extract_layers=4,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        conv_bias=True,
        mask_time_prob=0.0,
        layerdrop=0.0,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    trainer = EmotionTowerTrainer(
        model=ReLLMEmotionModel(ReLLMEmotionConfig(encoder_config=encoder, final_dropout=0.0)),
        args=arguments,
        train_dataset=rows,
    )
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(path, "auto"))
    trainer.save_model(str(path))


__all__ = ["train_emotion_tower"]
