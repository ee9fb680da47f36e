"""The empathy scorer: a bi-encoder that gives a response to a seeker's post a level of one mechanism of empathy, and
marks the words that carry it (EPITOME, Sharma et al. 2020, arXiv 2009.08441).

Two encoders of one kind, of which the seeker's is not trained; one head of attention from the response over the
seeker's post, added to the response; on the first token a head for the levels; on every token one for "in a rationale"
or not. docs/evaluation.md says where this differs from the authors' code.
"""

import os
from collections import OrderedDict
from dataclasses import dataclass

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from ..evaluation_settings import LEVELS

IGNORED = -100  # label of a token that has none
# Their first position follows the padding id: two positions of the table are never used.
POSITIONS_AFTER_PADDING = ("camembert", "data2vec-text", "longformer", "mpnet", "roberta", "xlm-roberta")


@strict
class EmpathyScorerConfig(PreTrainedConfig):
    """Configuration of [`EmpathyScorer`]: what it scores, its encoders (RoBERTa by default), and how it is trained."""

    model_type = "relllm_empathy_scorer"
    sub_configs = {"encoder_config": AutoConfig}
    keys_to_ignore_at_inference = ["level_loss", "rationale_loss"]

    mechanism: str = "ER"  # ER emotional reactions, IP interpretations, EX explorations
    encoder_config: PreTrainedConfig | dict | None = None
    max_length: int = 64  # tokens of a post or response, special ones included; what is longer is cut
    dropout: float = 0.1  # in the attention and the heads
    level_loss_weight: float = 1.0
    rationale_loss_weight: float = 0.5
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: object) -> None:
        if self.encoder_config is None:
            self.encoder_config = CONFIG_MAPPING["roberta"]()
        elif isinstance(self.encoder_config, dict):
            self.encoder_config = CONFIG_MAPPING[self.encoder_config["model_type"]](**self.encoder_config)
        kwargs.setdefault("num_labels", LEVELS)
        super().__post_init__(**kwargs)
        _check_encoder(self.encoder_config, self.max_length)


@dataclass
class EmpathyScorerOutput(ModelOutput):
    """What [`EmpathyScorer`] returns; the losses where their labels were given."""

    loss: Tensor | None = None  # (): the weighted sum of the two
    level_loss: Tensor | None = None  # (): cross-entropy, mean over pairs
    rationale_loss: Tensor | None = None  # (): mean over labelled tokens; zero, with a gradient, if there are none
    level_logits: Tensor | None = None  # (pairs, 3)
    rationale_logits: Tensor | None = None  # (pairs, T, 2): each token outside a rationale, inside one; then padding


class SeekerAttention(nn.Module):
    """One head of attention: each token of the response over the tokens of the seeker's post."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.dropout = dropout

    def forward(self, response: Tensor, seeker: Tensor, seeker_mask: Tensor) -> Tensor:
        """Attend from `response` (pairs, T, width) to `seeker` (pairs, S, width) where its mask (pairs, S) is True."""
        attended = F.scaled_dot_product_attention(
            self.query(response),
            self.key(seeker),
            self.value(seeker),
            attn_mask=seeker_mask[:, None, :],  # (pairs, 1, S)
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.output(attended)


class EmpathyScorer(PreTrainedModel):
    """Level and rationale of one mechanism of empathy in a response to a seeker's post."""

    config: EmpathyScorerConfig
    base_model_prefix = "scorer"
    main_input_name = "response_input_ids"
    input_modalities = ("text",)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: EmpathyScorerConfig):
        super().__init__(config)
        width = config.encoder_config.hidden_size  # type: ignore[union-attr]
        self.seeker_encoder = _without_pooler(AutoModel.from_config(config.encoder_config))
        self.response_encoder = _without_pooler(AutoModel.from_config(config.encoder_config))
        self.attention = SeekerAttention(width, config.dropout)
        self.dropout = nn.Dropout(config.dropout)
        self.level_head = nn.Sequential(
            OrderedDict(
                dropout=nn.Dropout(config.dropout),
                dense=nn.Linear(width, width),
                activation=nn.ReLU(),
                dropout_again=nn.Dropout(config.dropout),
                out_proj=nn.Linear(width, LEVELS),
            )
        )
        self.rationale_head = nn.Linear(width, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        seeker_input_ids: Tensor,
        response_input_ids: Tensor,
        seeker_attention_mask: Tensor | None = None,
        response_attention_mask: Tensor | None = None,
        level_labels: Tensor | None = None,
        rationale_labels: Tensor | None = None,
    ) -> EmpathyScorerOutput:
        """Give each pair a level, and each token of its response a place in a rationale or outside.

        Ids are `(pairs, S)` and `(pairs, T)`, padded on the right; masks are 1 on a text's own tokens, by default all.
        `level_labels` `(pairs,)` are 0, 1 or 2; `rationale_labels` `(pairs, T)` are 1 in a rationale, 0 outside, -100
        on special tokens, padding, and all over a response whose rationale is not known.
        """
        if seeker_attention_mask is None:
            seeker_attention_mask = torch.ones_like(seeker_input_ids)
        # No token types: a single text has type 0 in every encoder that knows them.
        seeker = self.seeker_encoder(seeker_input_ids, attention_mask=seeker_attention_mask).last_hidden_state
        response = self.response_encoder(response_input_ids, attention_mask=response_attention_mask).last_hidden_state
        response = response + self.dropout(self.attention(response, seeker, seeker_attention_mask.bool()))
        level_logits, rationale_logits = self.level_head(response[:, 0]), self.rationale_head(self.dropout(response))
        loss = level_loss = rationale_loss = None
        if level_labels is not None:
            level_loss = F.cross_entropy(level_logits.float(), level_labels)
            loss = self.config.level_loss_weight * level_loss
        if rationale_labels is not None:
            logits, labels = rationale_logits.float().flatten(0, 1), rationale_labels.flatten()  # (tokens, 2)
            summed = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
            rationale_loss = summed / (labels != IGNORED).sum().clamp(min=1)
            loss = (0 if loss is None else loss) + self.config.rationale_loss_weight * rationale_loss
        return EmpathyScorerOutput(loss, level_loss, rationale_loss, level_logits, rationale_logits)

    def freeze_seeker_encoder(self) -> None:
        """Stop the training of the seeker's encoder; also its dropout, from the next `train()` on."""
        self.seeker_encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> "EmpathyScorer":
        """Set the mode as in PyTorch; a frozen encoder stays in evaluation."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.seeker_encoder.parameters()):
            self.seeker_encoder.eval()
        return self

    @classmethod
    def from_encoder(cls, encoder: str, *, revision: str = "main", **settings: object) -> "EmpathyScorer":
        """Build a scorer to train: both encoders pretrained (from safetensors), attention and heads fresh.

        `settings` are those of [`EmpathyScorerConfig`], which is checked before weights are read.
        """
        config = EmpathyScorerConfig(encoder_config=AutoConfig.from_pretrained(encoder, revision=revision), **settings)
        if os.path.isdir(encoder):
            config.encoder_config.name_or_path = ""  # type: ignore[union-attr]  # a folder's place is nobody's business
        pretrained = AutoModel.from_pretrained(encoder, revision=revision, use_safetensors=True, dtype=torch.float32)
        weights = _without_pooler(pretrained).state_dict()
        model = cls(config)
        model.seeker_encoder.load_state_dict(weights)
        model.response_encoder.load_state_dict(weights)
        return model


def _without_pooler(encoder: PreTrainedModel) -> PreTrainedModel:
    """BERT's relatives have a pooler, which nothing here reads: some checkpoints lack it, and it would never train."""
    if "pooler" in dict(encoder.named_children()):
        encoder.pooler = None
    return encoder


def _check_encoder(config: PreTrainedConfig, max_length: int) -> None:
    kind = config.model_type
    reads_left_to_right = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if config.is_encoder_decoder or reads_left_to_right:
        raise ValueError(
            f"A {kind!r} model is no encoder, and its first token does not see the others. Use BERT, RoBERTa, "
            "DistilBERT, MiniLM or another encoder."
        )
    settings = config.to_dict()
    positions = settings.get("max_position_embeddings")  # absent where positions are relative
    if positions is not None and kind in POSITIONS_AFTER_PADDING:
        positions -= (settings.get("pad_token_id") or 0) + 1
    if max_length < 3 or (positions is not None and max_length > positions):
        raise ValueError(f"max_length must be between 3 and the encoder's {positions} positions, got {max_length}.")


AutoConfig.register(EmpathyScorerConfig.model_type, EmpathyScorerConfig, exist_ok=True)
AutoModel.register(EmpathyScorerConfig, EmpathyScorer, exist_ok=True)
