"""The towers' outputs of a run's clips, from [`~relllm.tower_outputs.TowerCache`], in the trainer.

The loader's workers read; the process that trains computes and writes what is missing.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from torch import Tensor
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled

from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration
from relllm.modeling.outputs_relllm import TowerOutputs
from relllm.processing.feature_extraction_relllm import ReLLMFeatureExtractor
from relllm.setting import setting
from relllm.tower_outputs import TowerCache, cache_settings


@dataclass
class TowerCacheSettings:
    """The setting that the trainer's configuration inherits; the cache is off by default."""

    tower_cache_dir: str | None = setting(None, "Folder for the frozen towers' outputs.", aliases=["--cache-dir"])


def check_cache_dir(place: str) -> None:
    """Make the folder of a cache; `ValueError` where that cannot be, or nothing can be written into it."""
    folder = Path(place).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"tower_cache_dir must be a folder, or be made one, and {folder} cannot: {error}.") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"tower_cache_dir is {folder}, which this user may not write into. Name another folder.")


class TowerCacheMixin(Trainer):
    """For a trainer of a ReLLM whose collator has looked the clips up; its `args` are [`TowerCacheSettings`] too."""

    _tower_cache: TowerCache | None = None

    def open_tower_cache(self, model: ReLLMForConditionalGeneration, extractor: ReLLMFeatureExtractor) -> TowerCache:
        """Return the cache of this model's towers, which [`put_towers`] writes to; `ValueError` if none can be."""
        if self.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            raise ValueError(
                "tower_cache_dir is set, and FSDP and ZeRO 3 spread the towers' weights: all processes must run the "
                "towers together, whatever is cached. Use DDP, or leave tower_cache_dir out."
            )
        precision = {"mixed_precision": self.accelerator.mixed_precision, "tf32": self.args.tf32}
        settings = cache_settings(model.base_model, extractor, deepspeed=self.is_deepspeed_enabled, **precision)
        self._tower_cache = TowerCache(Path(self.args.tower_cache_dir).expanduser(), settings)
        if self.is_world_process_zero() and not self.args.disable_tqdm:
            folder = self._tower_cache.folder
            where = f"{folder}: {shutil.disk_usage(folder).free / 1e9:.3g} GB are free there"
            Console(stderr=True, markup=False).print(f"Tower outputs are kept in {where}.")
        return self._tower_cache

    def put_towers(self, inputs: dict) -> None:
        """Do as [`TowerCache.fill`] in the run's precision."""
        assert self._tower_cache is not None

        def run_towers(**features: Tensor) -> TowerOutputs:
            with self.accelerator.autocast():
                return self.model.base_model.run_towers(**features)

        self._tower_cache.fill(inputs, run_towers)
