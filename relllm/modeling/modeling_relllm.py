"""RE-LLM: a speech tower and an emotion tower, fused and projected into a causal LLM with a scoped LoRA."""

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .audio_tower_relllm import is_trained
from .causal_lm_relllm import aux_loss_weight, build_causal_lm, check_family, per_layer_inputs, reads_token_ids
from .checkpoint_relllm import (
    TOWERS,
    check_complete,
    check_dtype,
    find_audio_token,
    find_ends,
    finish_light,
    gets_lora,
    light_state,
    load_light,
    load_llm_tokenizer,
    load_parts,
    load_tower,
    name_tower_weights,
    obey_dtype,
    other_dtypes,
    quantize_llm_alone,
    read_light_record,
    read_state,
    replaces_weights,
    tower_source,
)
from .configuration_relllm import ReLLMConfig, config_fields
from .devices_relllm import SpreadModel
from .emotion_tower_relllm import ReLLMEmotionModel
from .hearing_relllm import ReLLMHearing
from .lora_relllm import (
    AdaptersOnTop,
    LoraScope,
    ScopedLinear,
    adapters_apart,
    copy_lora,
    inject_scoped_lora,
    is_lora_parameter,
    plain_lora_config,
)
from .outputs_relllm import ReLLMAudioOutput, ReLLMCausalLMOutput, ReLLMModelOutput, TowerOutputs
from .projector_relllm import (
    check_counts,
    count_message,
    count_positions,
    place_positions,
)
from .releases_relllm import CACHE, cache_arguments

FEATURES = ("input_features", "input_features_mask", "input_values", "input_values_mask")
AUDIO_INPUTS = (*FEATURES, "audio_num_windows", "tower_outputs")
READINGS = ("emotion_logits", "dimensions", "emotion_embedding", "tower_dimensions")
AUTO_CLASSES = ("AutoModel", "AutoModelForMultimodalLM", "AutoModelForSpeechSeq2Seq")

# On one device: what Transformers adds up between a tower's layers does not follow them to another.
WHOLE_TOWERS = ("ReLLMEmotionModel", "WhisperEncoder", "Wav2Vec2Model", "HubertModel", "WavLMModel")


class ReLLMPreTrainedModel(AdaptersOnTop, SpreadModel):
    """Loading, initialisation, freezing and gradient checkpointing, shared by both models."""

    config: ReLLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("audio", "text")
    supports_gradient_checkpointing = True
    _no_split_modules: set[str] | list[str] = ["ConvProjector", *WHOLE_TOWERS]
    _skip_keys_device_placement = [CACHE]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def post_init(self) -> None:
        """Have only layers that are here placed whole: Whisper's encoder names its decoder's as well."""
        super().post_init()
        self._no_split_modules = {type(module).__name__ for module in self.modules()} & set(self._no_split_modules)
        if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
            # FSDP gathers what is named here for its own forward alone, and a tower's layers are run one by one.
            self._no_split_modules -= {*WHOLE_TOWERS}

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Start LoRA's B at zero, after Transformers has drawn each linear layer that no checkpoint filled."""
        super().initialize_weights()
        with init.guard_torch_init_functions():  # leaves loaded tensors alone
            for module in self.modules():
                if isinstance(module, ScopedLinear):
                    module.reset_own()

    @property
    def dtype(self) -> torch.dtype:
        """Return the LLM's precision: what trains, or has been trained, is float32 beside it."""
        return self.base_model.text_model.dtype

    @classmethod
    def is_custom_code(cls) -> bool:
        """Say no: of custom code, Transformers draws Whisper's positions at random, and wav2vec2's come out NaN."""
        return False

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **kwargs: object
    ) -> None:
        if enable:  # the recomputation must see the LoRA mask of the first run
            gradient_checkpointing_func = self.base_model.lora_scope.wrap_checkpoint(gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    def enable_input_require_grads(self) -> None:
        """Do as Transformers, once: each time that checkpointing is on again, it would add a hook that stays."""
        self.disable_input_require_grads()
        super().enable_input_require_grads()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args: object,
        towers: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> "ReLLMPreTrainedModel":
        """Load as in Transformers, from safetensors only, full or light, and freeze again what `__init__` froze.

        Whatever `dtype` says, what was trained in float32 stays so; a `quantization_config` takes the LLM alone.
        A `lora_config` for a checkpoint that has no LoRA gives it a fresh one. A checkpoint that lacks other weights
        than the heads of emotion and dimensions is a `ValueError`: they would be drawn at random.

        Args:
            towers (`dict` of `str` to `str`, *optional*): Hub ids or paths of a light checkpoint's `"audio_tower"`,
                `"emotion_tower"` or `"text_model"`, where they are no more where they were.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors=False would unpickle the checkpoint. Convert it to safetensors first.")
        kwargs["use_safetensors"] = True
        check_dtype(dtype := kwargs.get("dtype", kwargs.get("torch_dtype")))
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = quantize_llm_alone(kwargs["quantization_config"])
        path, wants_info = pretrained_model_name_or_path, kwargs.pop("output_loading_info", False)
        light, fresh_lora = read_light_record(path, towers, kwargs), gets_lora(path, kwargs)
        if path is None or (light is None and not fresh_lora):
            model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        else:
            parts = load_light(cls, path, light or {}, kwargs)
            model, info = super().from_pretrained(None, *args, output_loading_info=True, **parts)
            finish_light(model, path, kwargs)
        if path is not None:
            check_complete(path, info["missing_keys"], fresh_lora)
            obey_dtype(model.base_model, dtype)
        model.base_model.freeze()
        return (model, info) if wants_info else model  # type: ignore[return-value]  # as in Transformers

    @classmethod
    def full_state(
        cls, path: str | os.PathLike, *, towers: dict[str, str] | None = None, **options: Any
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the weight of all that a checkpoint stands for, a light one's towers as well.

        For engines that load weights themselves. A weight comes as it is on disk, to the CPU, one after the other.

        Args:
            path (`str` or `os.PathLike`): A folder or Hub id.
            towers (`dict` of `str` to `str`, *optional*): As in [`~ReLLMPreTrainedModel.from_pretrained`].
            options: A `config` in the place of the checkpoint's, and those of the Hub, such as `revision`.

        Raises:
            ValueError: If a tower is not the one that a light checkpoint was trained with.
        """
        record = read_light_record(path, towers, options) or {}
        config = options.pop("config", None) or cls.config_class.from_pretrained(path, **options)
        return read_state(cls, config, path, record, options)

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: object, light: bool = False, **kwargs: Any
    ) -> None:
        """Save as in Transformers; with the code files if [`relllm.register_for_auto_class`] has been called.

        Adapters that PEFT has put on top go into folders of their names: what is saved here is the model below them.

        Args:
            light (`bool`, *optional*, defaults to `False`): Leave out what the towers' sources have as well; an error
                if one is not known.
        """
        towers = {kind: getattr(self.base_model, kind) for kind in TOWERS}
        fields: dict[str, object] = {"tower_dtypes": other_dtypes(towers, self.dtype)}
        if self._auto_class is not None:
            module = type(self).__module__.rsplit(".", 1)[-1]
            names = {name: f"{module}.ReLLMForConditionalGeneration" for name in AUTO_CLASSES}
            fields["auto_map"] = {**(getattr(self.config, "auto_map", None) or {}), **names}
        writes = bool(kwargs.get("is_main_process", args[0] if args else True)) and kwargs.get("variant") is None
        with replaces_weights(save_directory, writes), adapters_apart(self, save_directory, kwargs):
            if light:
                kwargs["state_dict"], light_fields = light_state(self, kwargs.get("state_dict"))
                fields |= {"towers": light_fields, "light_checkpoint": True}
                kwargs["save_original_format"] = False  # the names of the model, into which it is loaded
            with config_fields(self.config, fields):  # a later save without the code files must not point at them
                super().save_pretrained(save_directory, *args, **kwargs)

    def delete_adapter(self, adapter_names: list[str] | str) -> None:
        """Do as Transformers, and once there is none have our LoRA train again, which adding one had frozen."""
        super().delete_adapter(adapter_names)
        for name, parameter in self.named_parameters():
            if is_lora_parameter(name) and not self._hf_peft_config_loaded:
                parameter.requires_grad_(True)


class ReLLMModel(ReLLMHearing, ReLLMPreTrainedModel):
    """RE-LLM without the language-modelling head: hears the audio, places it, runs the LLM's body."""

    def __init__(self, config: ReLLMConfig):
        super().__init__(config)
        check_family(config.text_config)
        self.make_hearing(config)
        # Not "language_model": a rename for old checkpoints in Transformers would lose the LLM's weights.
        self.text_model = build_causal_lm(config.text_config)
        self.reads_token_ids = reads_token_ids(self.text_model)
        self.lora_scope = LoraScope()
        if config.lora_config is not None:
            config.lora_config = inject_scoped_lora(
                self.text_model, config.lora_config, config.lora_scope, self.lora_scope
            )
        self.post_init()
        self.freeze()

    def freeze(self) -> None:
        """Freeze what the paper freezes: both towers, and the LLM except its LoRA. Projector and heads train."""
        for tower in (self.audio_tower, self.emotion_tower):
            if tower is not None:
                tower.requires_grad_(False)
        for name, parameter in self.text_model.named_parameters():
            parameter.requires_grad_(is_lora_parameter(name))

    def train(self, mode: bool = True) -> "ReLLMModel":
        """Set the mode as in PyTorch, but leave a frozen tower in eval, without dropout and SpecAugment."""
        super().train(mode)
        for tower in (self.audio_tower, self.emotion_tower):
            if tower is not None and not is_trained(tower):
                tower.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    def get_decoder(self) -> PreTrainedModel:
        return self.text_model.base_model

    def find_embedded(self, inputs_embeds: Tensor) -> Tensor:
        """Return `(batch, sequence)`, True where `inputs_embeds` are the placeholder's, as in Transformers."""
        token = torch.tensor(self.config.audio_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token).to(inputs_embeds.device)).all(-1)

    def place_audio(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        audio_mask: Tensor | None,
        audio: ReLLMAudioOutput | None,
        cache: Cache | None,
        audio_positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | bool | None]:
        """Put projected frames where the placeholders are; return `(batch, sequence, d)` and the mask of the LoRA."""
        if input_ids is not None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            decoding = input_ids.shape[1] == 1 and cache is not None and audio is None
            if audio_mask is None and not decoding:
                audio_mask = input_ids == self.config.audio_token_id
        assert inputs_embeds is not None
        if audio_mask is None and input_ids is None and audio is not None:
            audio_mask = self.find_embedded(inputs_embeds)
        scope = self.config.lora_scope
        if audio_mask is None:  # no audio position: of audio scope, a decode step is the bare LLM's
            return inputs_embeds, None if scope == "audio" else True
        if audio is not None:
            packed = audio.pooler_output is not None
            positions, lengths = (audio.pooler_output, None) if packed else (audio.last_hidden_state, audio.lengths)
            inputs_embeds = place_positions(inputs_embeds, audio_mask, positions, lengths, audio_positions)
        elif input_ids is not None:
            none = torch.zeros((), dtype=torch.long, device=audio_mask.device)
            check_counts(audio_mask, none, waits=not torch.is_grad_enabled())
            if scope == "audio" and not torch.is_grad_enabled():  # in training the LoRA stays in the graph
                return inputs_embeds, None
        if scope == "global":
            return inputs_embeds, True
        return inputs_embeds, ~audio_mask if scope == "text" else audio_mask

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        input_values: Tensor | None = None,
        input_values_mask: Tensor | None = None,
        audio_num_windows: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        audio_mask: Tensor | None = None,
        audio_positions: Tensor | None = None,
        tower_outputs: TowerOutputs | None = None,
        mm_encoder_outputs: dict[str, ReLLMAudioOutput] | None = None,
        language_modeling: bool = False,
        hears_only: bool = False,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ReLLMModelOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, sequence)`, *optional*):
                With `config.audio_token_id` at each position that a projected frame takes.
            input_features, input_features_mask, input_values, input_values_mask, audio_num_windows,
            tower_outputs: The audio; see [`~ReLLMModel.get_audio_features`].
            audio_mask (`torch.BoolTensor` of shape `(batch, sequence)`, *optional*): Where the audio is; by default
                where the placeholders are, or their embedding in `inputs_embeds` that come with audio.
            audio_positions (`torch.LongTensor` of shape `(n,)`, *optional*): The same as places in `batch * sequence`,
                in order: who makes a batch knows them, and an accelerator is not asked where the LoRA acts.
            mm_encoder_outputs (`dict`, *optional*): `{"audio": ReLLMAudioOutput}`, encoded before.
            language_modeling (`bool`, *optional*, defaults to `False`):
                Run the whole causal LM, with its own scaling and soft-capping; `last_hidden_state` is then its logits.
            hears_only (`bool`, *optional*, defaults to `False`): Run no LLM: the output is what was heard.
            cache (`Cache`, *optional*): The same as `past_key_values`, as it is called from Transformers 5.24 on.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        audio = (mm_encoder_outputs or {}).get("audio")
        if audio is None and (input_features is not None or tower_outputs is not None):
            features = (input_features, input_features_mask, input_values, input_values_mask)
            places = audio_mask
            if places is None and input_ids is not None:
                places = torch.eq(input_ids, self.config.audio_token_id)
            if places is not None and audio_positions is None and not torch.is_grad_enabled():  # before a tower runs
                frames = tower_outputs.lengths if tower_outputs is not None else None
                check_counts(places, count_positions(self.config, *features[:2], frames), waits=True)
            audio = self._hear(features, audio_num_windows, tower_outputs)
        heard: dict[str, Any] = {}
        if audio is not None:
            heard = {"audio_hidden_states": audio.last_hidden_state, "audio_lengths": audio.lengths}
            heard |= {name: getattr(audio, name) for name in READINGS}
        if hears_only:
            return ReLLMModelOutput(**heard)
        caches = cache_arguments(past_key_values, cache)
        inputs_embeds, lora_mask = self.place_audio(
            input_ids, inputs_embeds, audio_mask, audio, caches[CACHE], audio_positions
        )
        if self.reads_token_ids and "per_layer_inputs" not in kwargs:
            kwargs |= per_layer_inputs(self.text_model, input_ids, self.config.audio_token_id)
        copies = None if lora_mask is None else copy_lora(self.text_model, inputs_embeds)
        places = None
        if audio_positions is not None and isinstance(lora_mask, Tensor):
            places = audio_positions.to(lora_mask.device)
            if self.config.lora_scope == "text":
                in_order = lora_mask.flatten().argsort(descending=True, stable=True)
                places = in_order[: len(in_order) - len(places)]
        with self.lora_scope.use(lora_mask, copies, places):
            outputs = (self.text_model if language_modeling else self.text_model.base_model)(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                return_dict=True,
                **caches,
                **kwargs,
            )
        heard[CACHE] = getattr(outputs, CACHE)
        return ReLLMModelOutput(
            last_hidden_state=outputs.logits if language_modeling else outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.get("router_logits"),
            aux_loss=outputs.get("aux_loss"),
            **heard,
        )


class ReLLMForConditionalGeneration(ReLLMPreTrainedModel, GenerationMixin):
    """RE-LLM that replies: text and audio in, text out, with the emotion and the three dimensions beside it."""

    def __init__(self, config: ReLLMConfig):
        super().__init__(config)
        self.model = ReLLMModel(config)
        self.post_init()
        self._is_stateful = self.model.text_model._is_stateful  # a state cannot go back, as assisted decoding must
        self.model.freeze()
        self.generation_config.suppress_tokens = [config.audio_token_id]  # a placeholder is never an answer

    @classmethod
    def from_towers(
        cls,
        audio: str | os.PathLike | PreTrainedModel,
        text: str | os.PathLike | PreTrainedModel,
        emotion: str | os.PathLike | ReLLMEmotionModel | None = None,
        *,
        lora: "dict | LoraConfig | None" = None,  # type: ignore[name-defined]  # noqa: F821
        tokenizer: str | os.PathLike | PreTrainedTokenizerBase | None = None,
        dtype: torch.dtype | str | None = None,
        **config_kwargs: object,
    ) -> "ReLLMForConditionalGeneration":
        """Build a model from pretrained towers; the projector, the heads and the LoRA start fresh.

        A loaded model is not copied: it shares its weights with the new one.

        Args:
            audio (`str`, `os.PathLike` or `PreTrainedModel`): Whisper, wav2vec2, HuBERT or WavLM.
            text (`str`, `os.PathLike` or `PreTrainedModel`): A causal LM, or a model that also sees with one in it.
            emotion (`str`, `os.PathLike` or `ReLLMEmotionModel`, *optional*): A tower of the audEERING layout.
            lora (`dict` or `peft.LoraConfig`, *optional*): The paper's is r 16, lora_alpha 16, lora_dropout 0.05.
            tokenizer (`str`, `os.PathLike` or `PreTrainedTokenizerBase`, *optional*): The LLM's, by default the one
                beside `text`; needed with a loaded model. Its `<|audio|>`, or its first free id, is the placeholder.
            dtype (`torch.dtype` or `str`, *optional*): Of the towers and the LLM, by default the LLM's; `"auto"` is
                each one's own. What trains is float32.
            config_kwargs: Further fields of [`ReLLMConfig`].
        """
        check_dtype(dtype)
        tokenizer = load_llm_tokenizer(tokenizer if tokenizer is not None else text)
        audio_token_id = find_audio_token(tokenizer)
        given = {"audio_tower": audio, "emotion_tower": emotion, "text_model": text}
        towers = {kind: load_tower(kind, given[kind], dtype=dtype) for kind in given if given[kind] is not None}
        sources = {kind: tower_source(given[kind]) for kind in towers}
        text = towers["text_model"]
        config = ReLLMConfig(
            audio_config=copy.deepcopy(towers["audio_tower"].config),
            text_config=copy.deepcopy(text.config),
            emotion_config=copy.deepcopy(towers["emotion_tower"].config) if emotion is not None else None,
            audio_token_id=audio_token_id,
            lora_config=plain_lora_config(lora),
            towers={kind: source for kind, source in sources.items() if source is not None} or None,
            tower_dtypes=other_dtypes(towers, text.dtype) if dtype == "auto" else None,
            **config_kwargs,
        )
        with torch.device("meta"):  # only to learn the names
            names = cls(config).model.state_dict()
        state = {f"model.{name}": weight for name, weight in name_tower_weights(names, towers).items()}
        model = load_parts(cls, config, state, text.dtype if dtype in (None, "auto") else dtype)
        model.generation_config = copy.deepcopy(text.generation_config)
        model.generation_config.suppress_tokens = [audio_token_id]
        model.generation_config.eos_token_id = find_ends(model.generation_config, tokenizer)
        if audio_token_id >= config.text_config.vocab_size:
            model.resize_token_embeddings(audio_token_id + 1, mean_resizing=False)
        return model

    def get_output_embeddings(self) -> nn.Module:
        return self.model.text_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.model.text_model.set_output_embeddings(value)

    def get_audio_features(self, *args: Tensor, **kwargs: Tensor | bool | None) -> ReLLMAudioOutput:
        """See [`ReLLMModel.get_audio_features`]."""
        return self.model.get_audio_features(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        input_values: Tensor | None = None,
        input_values_mask: Tensor | None = None,
        audio_num_windows: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        audio_mask: Tensor | None = None,
        audio_positions: Tensor | None = None,
        tower_outputs: TowerOutputs | None = None,
        mm_encoder_outputs: dict[str, ReLLMAudioOutput] | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ReLLMCausalLMOutput:
        """
        Args:
            labels (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): Target token ids, -100 where none;
                shifted inside. The loss is next-token cross-entropy; auxiliary losses belong to the trainer.
            logits_to_keep (`int` or `torch.Tensor`, *optional*): Logits of the last so many positions, or of these.
            The other arguments are those of [`ReLLMModel.forward`].
        """
        loss_kwargs = {name: kwargs.pop(name) for name in ("num_items_in_batch", "shift_labels") if name in kwargs}
        outputs = self.model(
            input_ids=input_ids,
            input_features=input_features,
            input_features_mask=input_features_mask,
            input_values=input_values,
            input_values_mask=input_values_mask,
            audio_num_windows=audio_num_windows,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            audio_mask=audio_mask,
            audio_positions=audio_positions,
            tower_outputs=tower_outputs,
            mm_encoder_outputs=mm_encoder_outputs,
            language_modeling=True,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        fields = dict(outputs)
        logits = fields.pop("last_hidden_state")
        loss = None
        if labels is not None:
            vocab_size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **loss_kwargs)
            if outputs.aux_loss is not None:  # as every mixture of experts of Transformers
                loss = loss + aux_loss_weight(self.model.text_model) * outputs.aux_loss
        return ReLLMCausalLMOutput(loss=loss, logits=logits, **fields)

    @torch.no_grad()
    def generate(self, *args: Any, audio_items: Any = None, **kwargs: Any) -> Any:
        """Generate as in Transformers.

        `audio_items` is what a pipeline has of its prompts' audio: each is encoded by itself, unpadded.
        """
        items = [item for part in audio_items or [] for item in (part if isinstance(part, list) else [part])]
        features = [{name: value.to(self.device) for name, value in item.items()} for item in items if item]
        kwargs.pop("audio_positions", None)  # of the batch as it is given, not of beams or of what is left of a prompt
        if heard := [self.get_audio_features(**inputs, return_dict=True).pooler_output for inputs in features]:
            kwargs["mm_encoder_outputs"] = {"audio": ReLLMAudioOutput(pooler_output=torch.cat(heard))}
        return super().generate(*args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: object,
    ) -> dict:
        """Drop our audio after the first step, which is also that of an assistant before which nothing was read."""
        cache = kwargs.get(CACHE)
        read = cache.get_seq_length() if isinstance(cache, Cache) else None
        # Of a static cache that has read something it is a tensor, whose value a decode step would wait for.
        is_first_iteration = is_first_iteration or (isinstance(read, int) and read == 0)
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in ("audio_num_windows", "audio_mask", "tower_outputs"):
                inputs.pop(name, None)
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict]:
        """Repeat rows for beams; encode audio, whose rows are windows, once and repeat it with its row's tokens."""
        audio = (kwargs.pop("mm_encoder_outputs", None) or {}).get("audio")
        given = any(kwargs.get(name) is not None for name in ("input_features", "tower_outputs"))
        if expand_size > 1 and (audio is not None or given):
            inputs = {name: kwargs.pop(name, None) for name in AUDIO_INPUTS}
            if audio is None:
                audio = self.get_audio_features(**inputs, return_dict=True)
            places, embeds = kwargs.get("audio_mask"), kwargs.get("inputs_embeds")
            if places is None and embeds is not None:
                places = self.model.find_embedded(embeds)
            counts = (input_ids == self.config.audio_token_id if places is None else places).sum(-1).tolist()
            if sum(counts) != len(audio.pooler_output):
                raise ValueError(count_message(sum(counts), len(audio.pooler_output)))
            rows = audio.pooler_output.split(counts)
            audio = ReLLMAudioOutput(pooler_output=torch.cat([row for row in rows for _ in range(expand_size)]))
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        if audio is not None:
            kwargs["mm_encoder_outputs"] = {"audio": audio}
        return input_ids, kwargs

    def _get_candidate_generator(self, *, model_kwargs: dict, assistant_model: Any = None, **kwargs: Any) -> Any:
        """Give an assistant that only reads no audio: it sees the placeholders alone."""
        if assistant_model is not None and assistant_model.config.model_type != self.config.model_type:
            unread = {*AUDIO_INPUTS, "audio_mask", "mm_encoder_outputs"}
            model_kwargs = {name: value for name, value in model_kwargs.items() if name not in unread}
        return super()._get_candidate_generator(model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs)
