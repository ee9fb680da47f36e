"""RE-LLM in vLLM: our hearing half, vLLM's own LLM, and the scoped LoRA on its layers.

vLLM finds `register` and the routes by this distribution's entry points; nothing else imports these files at load.
`vllm_model.py` is the model (`vllm_lora.py` its LoRA), `vllm_processing.py` a request's way to it, `vllm_readings.py`
and `vllm_routes.py` the emotion beside the replies, `vllm_engine.py` many requests without a server.
"""

import logging

logger = logging.getLogger(__name__)

ARCHITECTURE = "ReLLMForConditionalGeneration"  # in a checkpoint's config.json
SUPPORTED = "0.32"  # the minor version: a plugin's hooks are no stable interface of vLLM
NOWHERE = "none (--allowed-media-domains names some)"


def why_unsupported() -> str | None:
    """Tell why vLLM cannot serve a ReLLM here, with the remedy; `None` where it can."""
    try:
        from vllm import __version__
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        return 'vLLM is not installed here: `pip install "relllm[vllm]"`, in an environment of its own.'
    if __version__.startswith(f"{SUPPORTED}."):
        return None
    return f"vLLM {__version__} is installed, and this relllm serves ReLLM checkpoints through vLLM {SUPPORTED} only."


def check_vllm() -> None:
    """Raise an `ImportError` with the reason where vLLM cannot be used."""
    if reason := why_unsupported():
        raise ImportError(reason)


def register() -> None:
    """Register the model, and what its configuration is checked by; harmless where other models are served."""
    if reason := why_unsupported():
        logger.warning("%s Install one of these, or another relllm; other models are not concerned.", reason)
        return
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    class ReLLMServing(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_model_config(model_config) -> None:  # type: ignore[no-untyped-def]
            # vLLM would open any address that a client sends.
            model_config.allowed_media_domains = model_config.allowed_media_domains or [NOWHERE]

    MODELS_CONFIG_MAP[ARCHITECTURE] = ReLLMServing
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "relllm.inference.vllm.vllm_model:ReLLMInVllm")
