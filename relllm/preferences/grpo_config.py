"""Settings of reward training: what is rewarded, TRL's own with defaults of ours, and what of TRL's cannot be here."""

import math
from dataclasses import dataclass, fields

import trl
from trl import GRPOConfig

from relllm.setting import setting
from relllm.training.alignment import FusedCausalLMOutput
from relllm.training.config import OF_ANY_METHOD, ReLLMSettings

from .preference_settings import RewardSettings, check_weights, parse_rewards
from .refusals import refuse_settings

CANNOT = {  # of TRL's settings and ours, and why
    "use_vllm": "it would need the new weights, and every clip, at each update",
    "use_transformers_continuous_batching": "it generates without audio",
    "use_transformers_paged": "it generates without audio",
    "sync_ref_model": "the reference is what the run started from, and there is no second model to follow it",
    "cast_lm_head_to_fp32": "the head is that of the LLM inside the model",
    "model_init_kwargs": "the model is given loaded",
    "reward_weights": "rewards has the weights, as in ER=1,length=-0.1",
    "chat_template_kwargs": "the processor's template has no such variables",
    "log_completions_hub_repo": "replies are logged beside the run alone",
    "label_smoothing_factor": "there is no cross-entropy of replies",
    "tower_cache_dir": "the towers hear a clip once for its group as it is",
    "augments": "a reply answers the clip as it is",
    "torch_compile": "each length of a reply would be compiled anew",
}
NOT_TAKEN = (  # by the trainer, of what TRL's takes
    *("tools", "rollout_func", "environment_factory", "reward_funcs", "reward_processing_classes"),
    *("quantization_config", "data_collator"),
)


@dataclass
class ReLLMGRPOConfig(ReLLMSettings, GRPOConfig):
    """`trl.GRPOConfig` with rewards by name and with RE-LLM's losses of the emotion.

    The weights and learning rates of what hears are those of [`ReLLMSFTConfig`]; `beta` weighs the KL to the weights
    that the run started from.
    """

    rewards: dict[str, float] | str | None = setting(None, "What is rewarded, by name and weight: ER=1,length=-0.1.")
    scorers: str | None = setting(None, "Folder of trained scorers, for ER, IP and EX (`relllm empathy train`).")
    allow_weak_scorers: bool = setting(False, "Take scorers that never give a level, or are below a bag of words.")
    min_words: int = setting(5, "Of a reply; the reward length counts the words below.")
    max_words: int = setting(60, "Of a reply; the reward length counts the words above.")
    judge_endpoint: str | None = setting(None, "OpenAI-compatible, such as http://host:8000/v1, for the reward judge.")
    judge_model: str | None = setting(None, "The judge's name at the endpoint.")
    judge_key_env: str | None = setting(None, "Environment variable with the endpoint's key.")
    learning_rate: float = setting(1e-5, "Peak learning rate.")
    per_device_train_batch_size: int = setting(8, "Replies a device and step; a group is num_generations of them.")
    gradient_accumulation_steps: int = setting(2, "Steps an update.")
    max_completion_length: int | None = setting(128, "Longest reply, in tokens.")
    beta: float = setting(0.04, "Weight of the KL to the weights that the run started from; 0: none is computed.")
    disable_dropout: bool = setting(True, "Score replies as they were drawn, without dropout.")
    log_completions: int = setting(4, "Replies of the last draw, printed and logged with the metrics; 0 for none.")

    def __post_init__(self) -> None:
        if FusedCausalLMOutput is None:
            raise ImportError(
                f"Reward training needs TRL 1.16, and so Python 3.11; this is TRL {trl.__version__}. Update both."
            )
        refuse_settings(self, CANNOT, "reward training")
        super().__post_init__()
        if towers := sorted({"audio_tower", "emotion_tower"}.intersection(self.unfreeze)):
            raise ValueError(f"unfreeze has {towers}; in reward training they stay frozen: they hear a clip once.")
        if self.train_sampling_strategy != "random":
            raise ValueError(f"train_sampling_strategy={self.train_sampling_strategy!r} would part groups of replies.")
        self.scorers = self.scorers or None  # an empty one takes a recipe's back
        if isinstance(self.rewards, str):
            self.rewards = parse_rewards(self.rewards)
        if self.rewards is not None:
            check_weights(self.rewards)
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters: bool | None = False  # every row has audio: all that trains has a gradient
        self._check_saves()

    @property
    def weights(self) -> dict[str, float]:
        """Return the weight of each reward."""
        assert not isinstance(self.rewards, str)  # it has been parsed
        return dict(self.rewards or {})

    @property
    def reward_settings(self) -> RewardSettings:
        """Return what the rewards need beside their weights."""
        return RewardSettings(**{field.name: getattr(self, field.name) for field in fields(RewardSettings)})

    @property
    def own_loss_weights(self) -> dict[str, float]:
        """Return the weight of each loss that rows have to feed: replies are drawn."""
        return {**super().own_loss_weights, "response_loss_weight": 0.0}

    @property
    def reply_metrics(self) -> tuple[str, ...]:
        """Name what an evaluation measures on replies, first their loss."""
        of_each = [f"rewards/{name}/{what}" for name in self.weights for what in ("mean", "std")]
        lengths = [f"completions/{what}_length" for what in ("mean", "min", "max")]
        kl = ["kl"] if self.beta else []
        return ("grpo_loss", "reward", "reward_std", "frac_reward_zero_std", "entropy", *kl, *of_each, *lengths)

    def _check_saves(self) -> None:
        """Refuse checkpoints among the steps that share drawn replies, which a run could not go on from."""
        drawn, update = self.steps_per_generation * self.num_iterations, self.gradient_accumulation_steps
        apart = math.lcm(drawn, update) // update
        is_best = self.save_strategy == "best"  # at evaluations alone
        name, when = ("eval_steps", self.eval_strategy) if is_best else ("save_steps", self.save_strategy)
        every = getattr(self, name)
        if when != "steps" or apart == 1:
            return
        if every < 1:
            raise ValueError(f"{name} is {every:g}, a share of the steps; saves must fall between draws. Give steps.")
        if every % apart:
            raise ValueError(
                f"{name} is {every:g}, and replies last for {drawn} steps, of which an update takes {update}: a "
                f"checkpoint would lose those in use. Take a multiple of {apart}."
            )


OF_TRL = (  # how replies are drawn, the loss, updates, and further ones
    *("num_generations", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs"),
    *("loss_type", "epsilon", "epsilon_high", "delta", "scale_rewards", "importance_sampling_level"),
    *("num_iterations", "steps_per_generation", "shuffle_dataset", "weight_decay", "warmup_steps"),
    *("multi_objective_aggregation", "mask_truncated_completions", "use_bias_correction_kl", "top_entropy_quantile"),
    *("entropy_coef", "use_adaptive_entropy", "off_policy_mask_threshold", "num_train_epochs"),
)
OF_THIS_MACHINE = {"judge_endpoint", "judge_key_env"}
GRPO_SETTINGS = [  # that decide a run's result
    *(name for name in ReLLMGRPOConfig.__annotations__ if name not in OF_THIS_MACHINE),
    *(*OF_ANY_METHOD, *OF_TRL),
]
