"""How much memory a training step takes, from a configuration alone: parameters counted on the meta device, exactly,
and the activations by the formulas below.

Notation, per position of the LLM: d hidden width, q width of all query heads, f MLP width, r LoRA rank, S length of a
row; c bytes of an activation (2 under bfloat16, else 4). What autograd keeps of a layer of a frozen LLM with LoRA:

    norms      2 · 4d                             float32 input of both RMS norms
    attention  4cq + cS                           query, repeated key and value, output; the padding mask as numbers
    MLP        3cf                                gate, its activation, up; a layer without a gate keeps 2cf
    LoRA       inputs of A + c·r for each target  shared by the targets of one input, unless dropout or a cast
                                                  (bfloat16) gives each its own copy; dropout's mask is one byte more

A frozen linear layer keeps nothing of its input; an unfrozen one keeps it (2cd + cq + cf a layer, and cd for each
norm). With gradient checkpointing a layer keeps its input (cd), and one layer at a time is whole. Logits are tiled by
TRL's fused head and exist at reply positions only. Frozen towers run without a graph: of them only the widest moment
counts, which comes before the LLM's.
"""

from dataclasses import dataclass, field

import torch
from transformers import PreTrainedConfig

from relllm.modeling.audio_tower_relllm import count_frames
from relllm.modeling.configuration_relllm import ReLLMConfig
from relllm.modeling.lora_scope_relllm import is_lora_parameter
from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration

from .freezing import TrainableRow, prepare_trainable, trainable_table
from .settings import setting

NF4_BYTES = 0.516  # a weight in 4 bit with double quantisation: 4 + 0.127 bits (QLoRA)
HEAD_TILE_POSITIONS, HEAD_TILE_WORDS = 4096, 32768  # of the buffer of TRL's fused head
FRAMES_A_SECOND = 50  # of every supported tower
# Bytes of state a trained weight, by the name of the optimiser; others are taken for AdamW.
OPTIMIZER_BYTES = {"8bit": 2.0, "adafactor": 0.1, "sgd": 0.0, "adamw": 8.0}


@dataclass
class RowSize:
    """A typical row."""

    audio_seconds: float = setting(8.0, "Audio of a typical row.")
    prompt_tokens: int = setting(70, "System prompt, instruction and turn marks.")
    reply_tokens: int = setting(60, "Reply of a typical row.")

    def __post_init__(self) -> None:
        if self.audio_seconds <= 0 or self.prompt_tokens < 0 or self.reply_tokens < 1:
            raise ValueError(f"Expected audio and a reply of some length, got {self}.")


@dataclass(frozen=True)
class StepSettings:
    """What of a run's settings decides its memory."""

    dtype: torch.dtype = torch.bfloat16  # of the frozen weights
    bf16: bool = True  # whether the step runs under bfloat16 autocast
    gradient_checkpointing: bool = True  # of the LLM
    optimizer: str = "adamw_torch_fused"  # a name of Transformers
    load_in_4bit: bool = False  # QLoRA
    full_window: bool = True  # Whisper over its whole window
    unfreeze: tuple[str, ...] = ()  # towers that train
    unused: tuple[str, ...] = ()  # heads that no loss reaches
    num_processes: int = 1  # with more than one, DDP's buckets hold the gradients a second time
    teacher: bool = False  # whether a KL loss runs the LLM over the transcript as well


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one training step on one device."""

    weights: float  # these three are there all the time
    gradients: float
    optimizer: float
    autocast: float  # bfloat16 copies of float32 weights
    activations: float  # kept for the backward pass
    workspace: float  # what a layer needs while it runs; at most one at a time
    towers: float  # the widest moment of a frozen tower, before the LLM's activations
    sequence: int  # positions of a row in the LLM
    audio_positions: int  # those of them that are audio
    parts: list[TrainableRow] = field(default_factory=list)

    @property
    def total(self) -> float:
        """The peak: what is always there, and the larger of towers and LLM."""
        static = self.weights + self.gradients + self.optimizer + self.autocast
        return static + max(self.towers, self.activations + self.workspace)


def meta_model(config: ReLLMConfig, settings: StepSettings) -> ReLLMForConditionalGeneration:
    """Return the model without memory: shapes, data types and what trains, as the trainer would have it."""
    with torch.device("meta"):
        model = ReLLMForConditionalGeneration(config)
    model.to(settings.dtype)
    prepare_trainable(model, settings.unfreeze, settings.unused)
    return model


def plan_memory(
    config: ReLLMConfig,
    settings: StepSettings,
    batch_size: int,
    row: RowSize,
    model: ReLLMForConditionalGeneration | None = None,
) -> MemoryPlan:
    """Return the memory of a training step with so many rows; `model` is that of [`meta_model`], if it is there."""
    model = model if model is not None else meta_model(config, settings)
    audio_positions = count_audio_positions(config, row.audio_seconds)
    sequence = audio_positions + row.prompt_tokens + row.reply_tokens
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = float(sum(parameter.nbytes for parameter in trained))
    state = next((size for name, size in OPTIMIZER_BYTES.items() if name in settings.optimizer), 8.0)
    kept, workspace = _llm_bytes(config, settings, batch_size, sequence)
    workspace = max(workspace, _head_bytes(config, batch_size * row.reply_tokens))
    kept += batch_size * _projector_bytes(config, settings, row.audio_seconds)
    for name in ("audio_tower", "emotion_tower"):
        if name in settings.unfreeze:
            kept += _tower_bytes(config, settings, name, batch_size, row.audio_seconds, kept=True)
    tower_names = ["audio_tower"] + (["emotion_tower"] if config.emotion_config is not None else [])
    return MemoryPlan(
        weights=_weight_bytes(model, settings),
        gradients=gradients * (2 if settings.num_processes > 1 else 1),
        optimizer=state * sum(parameter.numel() for parameter in trained),
        autocast=_autocast_bytes(model, settings),
        activations=kept,
        workspace=workspace,
        towers=max(_tower_bytes(config, settings, name, batch_size, row.audio_seconds) for name in tower_names),
        sequence=sequence,
        audio_positions=audio_positions,
        parts=trainable_table(model),
    )


def largest_batch(
    config: ReLLMConfig, settings: StepSettings, row: RowSize, memory: float, model: ReLLMForConditionalGeneration
) -> int:
    """Return the most rows at once whose peak stays within `memory` bytes; 0 if none does."""
    fits, beyond = 0, 1
    while beyond <= 4096 and plan_memory(config, settings, beyond, row, model).total <= memory:
        fits, beyond = beyond, 2 * beyond
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        if plan_memory(config, settings, middle, row, model).total <= memory:
            fits = middle
        else:
            beyond = middle
    return fits


def part_config(config: ReLLMConfig, name: str) -> PreTrainedConfig:
    """Return a part's configuration; its field is declared as a `dict` too, as it is before `__post_init__`."""
    return getattr(config, name)


def count_audio_positions(config: ReLLMConfig, audio_s: float) -> int:
    """Positions that a clip takes in the LLM's sequence."""
    positions = round(FRAMES_A_SECOND * audio_s)
    for _ in config.projector_kernel_sizes:
        positions = (positions - 1) // 2 + 1
    return positions + (config.emotion_fusion == "token")


def _weight_bytes(model: ReLLMForConditionalGeneration, settings: StepSettings) -> float:
    total = float(sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())))
    if settings.load_in_4bit:
        total -= sum(parameter.nbytes - NF4_BYTES * parameter.numel() for parameter in _llm_linears(model))
    return total


def _llm_linears(model: ReLLMForConditionalGeneration) -> list[torch.nn.Parameter]:
    """Return the weights of the LLM's own linear layers, without its embeddings and its LoRA."""
    return [
        parameter
        for name, parameter in model.base_model.text_model.base_model.named_parameters()
        if parameter.ndim == 2 and not is_lora_parameter(name) and "embed" not in name
    ]


def _autocast_bytes(model: ReLLMForConditionalGeneration, settings: StepSettings) -> float:
    """Autocast keeps a bfloat16 copy of what trains; of a frozen float32 weight a copy lives until its backward."""
    if not settings.bf16:
        return 0.0
    copies = [p.numel() for p in model.parameters() if p.requires_grad and p.ndim > 1 and p.dtype == torch.float32]
    if settings.dtype == torch.float32 and not settings.gradient_checkpointing:
        copies += [p.numel() for p in _llm_linears(model) if not p.requires_grad]
    return 2.0 * sum(copies)


def _llm_bytes(config: ReLLMConfig, settings: StepSettings, batch_size: int, length: int) -> tuple[float, float]:
    """What the LLM keeps, and the workspace of a layer's backward pass."""
    text, lora = part_config(config, "text_config"), config.lora_config
    size = 2 if settings.bf16 or settings.dtype != torch.float32 else 4
    stream = settings.dtype.itemsize  # of the residual: that of the embeddings
    width, mlp = text.hidden_size, _mlp_width(text)
    heads = text.num_attention_heads
    queries = heads * (getattr(text, "head_dim", None) or width // heads)
    gated = getattr(text, "hidden_act", None) is not None  # GPT-2 and its like name theirs otherwise, and have no gate
    layer = 2 * 4 * width + size * (4 * queries + length + (3 if gated else 2) * mlp)
    if "text_model" in settings.unfreeze:
        layer += size * (4 * width + queries + mlp)
    elif lora is not None:
        layer += _lora_bytes(lora, settings, size, width=width, queries=queries, mlp=mlp, gated=gated)
    layers = text.num_hidden_layers
    positions = batch_size * length
    ends = 4 * width + (stream + 1) * width  # the last norm; the embeddings with the audio in them
    workspace = positions * (size * 3 * mlp + 2 * stream * width)
    if settings.load_in_4bit:
        workspace += size * width * mlp  # a layer's weight, unpacked
    if settings.gradient_checkpointing:
        return positions * (layers * stream * width + ends), workspace + positions * layer
    return positions * (layers * layer + ends), workspace


def _lora_bytes(
    lora: dict, settings: StepSettings, size: int, *, width: int, queries: int, mlp: int, gated: bool
) -> float:
    """What the LoRA of a layer keeps a position: the inputs of its A, of its B, and dropout's masks."""
    inputs = {"q_proj": width, "k_proj": width, "v_proj": width, "o_proj": queries, "up_proj": width, "down_proj": mlp}
    if gated:
        inputs["gate_proj"] = width
    if not gated:  # GPT-2: one layer for query, key and value
        inputs = {"c_attn": width, "c_proj": queries, "c_fc": width, "mlp.c_proj": mlp}
    named = lora.get("target_modules")
    if isinstance(named, (list, set, tuple)):
        chosen = {name: entry for name, entry in inputs.items() if name in named}
        inputs = chosen or inputs
    dropout = float(lora.get("lora_dropout", 0.0)) > 0
    rank = size * int(lora.get("r", 8)) * len(inputs)
    shared = 2 * width + mlp  # the norms' outputs and the MLP's product; the attention's output is kept anyway
    copies = sum(inputs.values()) if dropout or settings.bf16 else shared
    return rank + size * copies + (sum(inputs.values()) if dropout else 0)


def _head_bytes(config: ReLLMConfig, replies: int) -> float:
    """The tile of logits, float32 in the backward pass, and the gradient of the hidden states."""
    return 4.0 * (
        min(replies, HEAD_TILE_POSITIONS) * HEAD_TILE_WORDS + replies * part_config(config, "text_config").hidden_size
    )


def _projector_bytes(config: ReLLMConfig, settings: StepSettings, audio_s: float) -> float:
    size = 2 if settings.bf16 else 4
    width, out = config.projector_input_size, part_config(config, "text_config").hidden_size
    frames = round(FRAMES_A_SECOND * audio_s)
    total = 0.0
    for index in range(len(config.projector_kernel_sizes)):
        total += size * frames * width
        frames = (frames - 1) // 2 + 1
        total += size * frames * 2 * (out if index == len(config.projector_kernel_sizes) - 1 else width)
    inner = config.projector_inner_dim
    layers = config.projector_layers * size * (8 * inner + 2 * config.projector_ffn_dim)
    return total + frames * (size * (out + 2 * inner) + 4 * 2 * out + layers)


def _tower_bytes(
    config: ReLLMConfig, settings: StepSettings, name: str, batch_size: int, audio_s: float, kept: bool = False
) -> float:
    """The widest moment of a tower, or (`kept`) all that its layers keep when it trains."""
    tower = part_config(config, "audio_config" if name == "audio_tower" else "emotion_config")
    tower = tower.encoder_config if name == "emotion_tower" else tower
    size = 2 if settings.bf16 or settings.dtype != torch.float32 else 4
    width = tower.hidden_size
    if tower.model_type == "whisper":
        frames = FRAMES_A_SECOND * audio_s
        if settings.full_window:
            frames = tower.max_source_positions * -(-frames // tower.max_source_positions)
        mlp, layers = tower.encoder_ffn_dim, tower.encoder_layers
        front = 2 * 2 * frames * width  # the first convolution's output, before and after its activation
    else:
        samples = torch.tensor(round(16_000 * audio_s))
        frames = int(count_frames(tower, samples))
        mlp, layers = tower.intermediate_size, tower.num_hidden_layers
        front = 3 * tower.conv_dim[0] * int(samples) / tower.conv_stride[0]
    layer = frames * (8 * width + 2 * mlp)
    return batch_size * size * (front + layers * layer if kept else max(front, layer))


def _mlp_width(text: PreTrainedConfig) -> int:
    return getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size
