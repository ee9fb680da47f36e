"""Memory and operations of a training step, from a configuration alone: parameters on the meta device, and activations
by the formulas below.

Notation, per position of the LLM: d hidden width, q width of all query heads, f MLP width, r LoRA rank, S length of a
row; c bytes of an activation (2 under bfloat16, else 4). What autograd keeps of a layer of a frozen LLM with LoRA:

    norms      2 · 4d                             float32 input of both RMS norms
    attention  4cq + cS                           query, repeated key and value, output; the padding mask as numbers
    MLP        3cf                                gate, its activation, up; a layer without a gate keeps 2cf
    LoRA       inputs of A + c·r for each target  c·r at all positions; inputs only where it acts, one for all targets
                                                  of it: a copy after dropout, whose mask is one byte more, or a cast

A frozen linear layer keeps nothing of its input; an unfrozen one keeps it (2cd + cq + cf a layer, and cd for each
norm). With gradient checkpointing a layer keeps its input (cd), and one layer at a time is whole. Logits are tiled by
TRL's fused head and exist at reply positions only; a KL makes both branches' in tiles of its own. Of frozen towers
only the widest moment counts, which comes before the LLM's.
"""

import bisect
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from relllm.modeling.audio_tower_relllm import count_frames
from relllm.modeling.configuration_relllm import ReLLMConfig
from relllm.modeling.lora_relllm import is_lora_parameter
from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration
from relllm.setting import check_limits, setting

from .. import alignment
from ..freezing import prepare_trainable

NF4_BYTES = 0.516  # a weight in 4 bit with double quantisation: 4 + 0.127 bits (QLoRA)
HEAD_TILE_POSITIONS, HEAD_TILE_WORDS = 4096, 32768  # of the buffer of TRL's fused head
FRAMES_A_SECOND = 50  # of every supported tower
TOWERS = ("audio_tower", "emotion_tower")
SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "gate_proj": "up_proj"}
# Bytes of state a trained weight, by the name of the optimiser; others are taken for AdamW.
OPTIMIZER_BYTES = {"8bit": 2.0, "adafactor": 0.1, "sgd": 0.0, "adamw": 8.0}


@dataclass
class RowSize:
    """A typical row."""

    audio_seconds: float = setting(8.0, "Audio of a typical row.")
    prompt_tokens: int = setting(70, "System prompt, instruction and turn marks.")
    reply_tokens: int = setting(60, "Reply of a typical row.")

    def __post_init__(self) -> None:
        limits = {"audio_seconds": "(0, inf)", "prompt_tokens": "[0, inf)", "reply_tokens": "[1, inf)"}
        check_limits(self, limits)


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

    @property
    def total(self) -> float:
        """Return the peak: what is always there, and the larger of towers and LLM."""
        static = self.weights + self.gradients + self.optimizer + self.autocast
        return static + max(self.towers, self.activations + self.workspace)


class TrainingStep:
    """One step of a run on rows of one size, without weights and data."""

    def __init__(self, config: ReLLMConfig, settings: StepSettings, row: RowSize) -> None:
        self.config, self.settings, self.row = config, settings, row
        with torch.device("meta"):
            self.model = ReLLMForConditionalGeneration(config)
        self.model.to(settings.dtype)
        prepare_trainable(self.model, settings.unfreeze, settings.unused)
        # A part's configuration is declared as a `dict` as well, which it is before `__post_init__` only.
        self.text: PreTrainedConfig = getattr(config, "text_config")  # noqa: B009
        heads, width = self.text.num_attention_heads, self.text.hidden_size
        self.heads_width = heads * (getattr(self.text, "head_dim", None) or width // heads)
        self.frames = FRAMES_A_SECOND * row.audio_seconds
        self.audio_positions = count_audio_positions(config, row.audio_seconds)
        self.sequence = self.audio_positions + row.prompt_tokens + row.reply_tokens
        heard = self.audio_positions / self.sequence
        self.lora_share = {"audio": heard, "text": 1 - heard, "global": 1.0}[config.lora_scope]
        self.activation_bytes = 2 if settings.bf16 or settings.dtype != torch.float32 else 4

    def memory(self, batch_size: int) -> MemoryPlan:
        """Return the memory of a step with so many rows."""
        settings = self.settings
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        gradients = float(sum(parameter.nbytes for parameter in trained))
        state = next((size for name, size in OPTIMIZER_BYTES.items() if name in settings.optimizer), 8.0)
        replies = batch_size * self.row.reply_tokens
        weights = float(sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers())))
        if settings.load_in_4bit:
            weights -= sum(parameter.nbytes - NF4_BYTES * parameter.numel() for parameter in self._llm_linears())
        kept, workspace = self._llm_bytes(batch_size * self.sequence)
        kept += batch_size * self._projector_bytes()
        kept += sum(self._tower_bytes(name, batch_size, kept=True) for name in TOWERS if name in settings.unfreeze)
        there = [name for name in TOWERS if getattr(self.model.base_model, name) is not None]
        return MemoryPlan(
            weights=weights,
            gradients=gradients * (2 if settings.num_processes > 1 else 1),
            optimizer=state * sum(parameter.numel() for parameter in trained),
            autocast=self._autocast_bytes(),
            activations=kept,
            workspace=max(workspace, self._head_bytes(replies)),
            towers=max(self._tower_bytes(name, batch_size) for name in there),
        )

    def largest_batch(self, memory: float) -> int:
        """Return the most rows at once whose peak stays within `memory` bytes; 0 if none does."""
        beyond = 1
        while beyond <= 4096 and self.memory(beyond).total <= memory:
            beyond *= 2
        return bisect.bisect_right(range(1, beyond), memory, key=lambda rows: self.memory(rows).total)

    def flops(self) -> float:
        """Return the floating-point operations of a step on one row.

        A weight costs 2 operations a position in the forward pass, 2 in the backward pass through it, and 2 more where
        it trains; gradient checkpointing runs the forward pass of the LLM once more. Attention adds 4·q·S a layer and
        position. The LoRA's A's run where it acts, its B's at every position. Frozen towers cost a forward pass.
        """
        settings, text, length, model = self.settings, self.text, self.sequence, self.model.base_model
        passes = 3.0 if settings.gradient_checkpointing else 2.0
        flops = 4.0 * self.heads_width * length * length * text.num_hidden_layers * (passes + 1)
        for name, parameter in model.text_model.base_model.named_parameters():
            if parameter.ndim == 2 and ("embed" not in name or is_lora_parameter(name)):
                share = self.lora_share if is_lora_parameter(name) and ".lora_A." in name else 1.0
                flops += 2.0 * parameter.numel() * length * share * (passes + parameter.requires_grad)
        head = 2.0 * text.hidden_size * text.vocab_size * self.row.reply_tokens
        flops += 3 * head  # once forward, twice backward
        if settings.teacher:
            flops += 5 * head  # of both branches, twice, and once backward
            flops += 2.0 * sum(weight.numel() for weight in self._llm_linears()) * (length - self.audio_positions)
        for name in TOWERS:
            if (tower := getattr(model, name)) is not None:
                full = settings.full_window and tower.config.model_type == "whisper"
                run = tower.config.max_source_positions if full else self.frames
                flops += 2.0 * tower.num_parameters() * run * (3 if name in settings.unfreeze else 1)
        for index, convolution in enumerate(model.multi_modal_projector.conv_layers):
            flops += 6.0 * convolution.weight.numel() * self.frames / 2 ** (index + 1)
        return flops

    def _llm_linears(self) -> list[torch.nn.Parameter]:
        """Return the weights of the LLM's own linear layers, without its embeddings and its LoRA."""
        return [
            parameter
            for name, parameter in self.model.base_model.text_model.base_model.named_parameters()
            if parameter.ndim == 2 and not is_lora_parameter(name) and "embed" not in name
        ]

    def _autocast_bytes(self) -> float:
        """Autocast keeps a bfloat16 copy of what trains, and of a frozen float32 weight until its backward pass."""
        if not self.settings.bf16:
            return 0.0
        weights = [p for p in self.model.parameters() if p.requires_grad and p.ndim > 1 and p.dtype == torch.float32]
        if self.settings.dtype == torch.float32 and not self.settings.gradient_checkpointing:
            weights += [p for p in self._llm_linears() if not p.requires_grad]
        return 2.0 * sum(weight.numel() for weight in weights)

    def _llm_bytes(self, positions: int) -> tuple[float, float]:
        """Return what the LLM keeps, and the workspace of a layer's backward pass."""
        settings, text, size = self.settings, self.text, self.activation_bytes
        stream = settings.dtype.itemsize  # of the residual: that of the embeddings
        width = text.hidden_size
        mlp = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * width
        gated = getattr(text, "hidden_act", None) is not None  # GPT-2 and its like name theirs otherwise, without gate
        layer = 2 * 4 * width + size * (4 * self.heads_width + self.sequence + (3 if gated else 2) * mlp)
        if "text_model" in settings.unfreeze:
            layer += size * (4 * width + self.heads_width + mlp)
        elif self.config.lora_config is not None:
            layer += self._lora_bytes(float(self.config.lora_config.get("lora_dropout", 0.0)) > 0)
        layers = text.num_hidden_layers
        ends = 4 * width + (stream + 1) * width  # the last norm; the embeddings with the audio in them
        workspace = positions * (size * 3 * mlp + 2 * stream * width)
        if settings.load_in_4bit:
            workspace += size * width * mlp  # a layer's weight, unpacked
        if settings.gradient_checkpointing:
            return positions * (layers * stream * width + ends), workspace + positions * layer
        return positions * (layers * layer + ends), workspace

    def _lora_bytes(self, dropout: bool) -> float:
        """Return what the LoRA of a layer keeps a position: the inputs of its A, of its B, and dropout's masks."""
        rank, read = 0, {}  # one input for all that read the same
        for name, weight in self.model.base_model.text_model.named_parameters():
            if is_lora_parameter(name) and ".lora_A." in name:
                part, _, layer = name.partition(".lora_A.")[0].rpartition(".")
                read[f"{part}.{SAME_INPUT.get(layer, layer)}"] = weight.shape[1]
                rank += weight.shape[0]
        copied = dropout or self.settings.bf16 or self.lora_share < 1  # else the attention's output is kept anyway
        copies = sum(
            width for name, width in read.items() if copied or not name.endswith(("attn.o_proj", "attn.c_proj"))
        )
        masks = sum(read.values()) if dropout else 0
        own = self.lora_share * (self.activation_bytes * copies + masks)
        return (self.activation_bytes * rank + own) / self.text.num_hidden_layers

    def _head_bytes(self, replies: int) -> float:
        """Return the tile of logits, float32 in the backward pass, and the gradient of the hidden states.

        Of a KL it is the logits of both branches, five float32 copies, and the hidden states.
        """
        head = 4.0 * (min(replies, HEAD_TILE_POSITIONS) * HEAD_TILE_WORDS + replies * self.text.hidden_size)
        if not self.settings.teacher:
            return head
        size, vocabulary = self.activation_bytes, self.text.vocab_size
        words = min(replies, max(alignment.TILE_WORDS // vocabulary, 1)) * vocabulary
        return max(head, (20 + 2 * size) * words + 3.0 * size * replies * self.text.hidden_size)

    def _projector_bytes(self) -> float:
        config, size = self.config, 2 if self.settings.bf16 else 4
        width, out = config.projector_input_size, self.text.hidden_size
        frames, total = round(self.frames), 0.0
        for index in range(len(config.projector_kernel_sizes)):
            total += size * frames * width
            frames = (frames - 1) // 2 + 1
            total += size * frames * 2 * (out if index == len(config.projector_kernel_sizes) - 1 else width)
        inner = config.projector_inner_dim
        layers = config.projector_layers * size * (8 * inner + 2 * config.projector_ffn_dim)
        return total + frames * (size * (out + 2 * inner) + 4 * 2 * out + layers)

    def _tower_bytes(self, name: str, batch_size: int, kept: bool = False) -> float:
        """Return the widest moment of a tower, or (`kept`) all that its layers keep when it trains."""
        tower = getattr(self.model.base_model, name).config
        tower = tower.encoder_config if name == "emotion_tower" else tower
        width = tower.hidden_size
        if tower.model_type == "whisper":
            frames = self.frames
            if self.settings.full_window:
                frames = tower.max_source_positions * -(-frames // tower.max_source_positions)
            mlp, layers = tower.encoder_ffn_dim, tower.encoder_layers
            front = 2 * 2 * frames * width  # the first convolution's output, before and after its activation
        else:
            samples = round(16_000 * self.row.audio_seconds)
            frames = int(count_frames(tower, torch.tensor(samples)))
            mlp, layers = tower.intermediate_size, tower.num_hidden_layers
            front = 3 * tower.conv_dim[0] * samples / tower.conv_stride[0]
        layer = frames * (8 * width + 2 * mlp)
        return batch_size * self.activation_bytes * (front + layers * layer if kept else max(front, layer))


def count_audio_positions(config: ReLLMConfig, audio_s: float) -> int:
    """Return the positions that a clip takes in the LLM's sequence."""
    positions = round(FRAMES_A_SECOND * audio_s)
    for _ in config.projector_kernel_sizes:
        positions = (positions - 1) // 2 + 1
    return positions + (config.emotion_fusion == "token")
