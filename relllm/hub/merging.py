"""`relllm merge`: a light checkpoint becomes a full one, which needs its towers no more."""

import os
from collections.abc import Mapping

from transformers import AutoModel, AutoProcessor


def merge_checkpoint(
    light: str | os.PathLike,
    out: str | os.PathLike,
    *,
    towers: Mapping[str, str | os.PathLike] | None = None,
    revision: str = "main",
) -> None:
    """Write the full checkpoint of a light one, with the processor's files.

    Args:
        light (`str` or `os.PathLike`): A directory or a Hub id. A full checkpoint is copied.
        out (`str` or `os.PathLike`): A directory, made if it is not there.
        towers (`dict` of `str` to `str`, *optional*): Where `"audio_tower"`, `"emotion_tower"` or `"text_model"` is,
            if it moved.
        revision (`str`, *optional*, defaults to `"main"`): Branch, tag or commit of `light` on the Hub.

    Raises:
        OSError: If a tower or a file of the checkpoint cannot be loaded.
        ValueError: If a tower is not the one that was trained with, or `out` is `light`.
    """
    if os.path.abspath(light) == os.path.abspath(out):
        raise ValueError(f"The full checkpoint would overwrite the light one in {out}. Give it another directory.")
    options = {"towers": dict(towers)} if towers else {}
    processor = AutoProcessor.from_pretrained(light, revision=revision)
    AutoModel.from_pretrained(light, revision=revision, **options).save_pretrained(out)
    processor.save_pretrained(out)


__all__ = ["merge_checkpoint"]
