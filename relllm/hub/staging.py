"""Checkpoints in another form: `relllm merge`, and a folder with exactly what goes to the Hub.

That folder is made of links to a checkpoint's files, and of those that change on the way.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from transformers import AutoModel, AutoProcessor
from transformers.dynamic_module_utils import custom_object_save

from relllm.data.journal import write_json
from relllm.data.membership import RECORD_NAME, read_training_record
from relllm.modeling.modeling_relllm import AUTO_CLASSES, ReLLMForConditionalGeneration
from relllm.processing.processing_relllm import ReLLMProcessor

from .evidence import EVIDENCE_NAME
from .files import take_inventory
from .licences import is_local
from .sharing import Form, MergeSettings

CARD_FILES = ("README.md", "LICENSE", "NOTICE", EVIDENCE_NAME, RECORD_NAME, "plots/")


def merge_checkpoint(settings: MergeSettings) -> None:
    """Write the full checkpoint of a light one, or copy a full one, with processor and record of its training.

    A tower that is not the one that was trained with is a `ValueError`.
    """
    light, out = settings.light, settings.output_dir
    if os.path.abspath(light) == os.path.abspath(out):
        raise ValueError(f"The full checkpoint would overwrite the light one in {out}. Give it another directory.")
    parts = ("audio_tower", "emotion_tower", "text_model")
    moved = {part: place for part in parts if (place := getattr(settings, part)) is not None}
    processor = AutoProcessor.from_pretrained(light, revision=settings.revision)
    options = {"towers": moved} if moved else {}
    AutoModel.from_pretrained(light, revision=settings.revision, **options).save_pretrained(out)
    processor.save_pretrained(out)
    if record := read_training_record(light, revision=settings.revision):
        write_json(record, out / RECORD_NAME)


@contextlib.contextmanager
def stage(folder: Path, *, form: Form | None = None, with_code: bool = False) -> Iterator[Path]:
    """Lay out the files to upload, while a `with` block lasts; a light checkpoint of local towers must not go."""
    inventory = take_inventory(folder)
    with tempfile.TemporaryDirectory(prefix="relllm-push-") as place:
        staged = Path(place) / "checkpoint"
        staged.mkdir()
        light = bool(_read(folder / "config.json").get("light_checkpoint"))
        converts = form is not None and (form == "light") != light
        if converts and form == "full":
            merge_checkpoint(MergeSettings(str(folder), staged))
        elif converts:
            towers = _read(folder / "config.json").get("towers") or {"every tower": {"name": "."}}
            if own := sorted(part for part, source in towers.items() if is_local(source["name"])):
                why = f"it is not known where on the Hub {', '.join(own)} is"
                raise ValueError(f"--light: {folder} cannot be sent light, because {why}. Leave --light out.")
            AutoModel.from_pretrained(folder).save_pretrained(staged, light=True)
            AutoProcessor.from_pretrained(folder).save_pretrained(staged)
        for name in inventory.upload:
            if not converts or name.startswith(CARD_FILES):
                (staged / name).parent.mkdir(exist_ok=True)
                (staged / name).unlink(missing_ok=True)  # the record, which a conversion has written already
                (staged / name).symlink_to((folder / name).resolve())
        _name_public_towers(staged)
        if with_code:
            add_code(staged)
        yield staged


def add_code(folder: Path) -> None:
    """Put the code files beside a checkpoint and point its files at them, as `save_pretrained` does; load nothing."""
    for name in {path.name for path in folder.glob("*_relllm.py")}:
        (folder / name).unlink()  # of an earlier release; a link must not be written through
    for cls in (ReLLMForConditionalGeneration, ReLLMProcessor):
        custom_object_save(cls, folder)
    code = {"AutoProcessor": "processing_relllm.ReLLMProcessor"}
    modeling = dict.fromkeys(AUTO_CLASSES, "modeling_relllm.ReLLMForConditionalGeneration")
    auto_maps = {
        "config.json": {"AutoConfig": "configuration_relllm.ReLLMConfig", **modeling},
        "processor_config.json": code,
        "tokenizer_config.json": code,
    }
    for name, auto_map in auto_maps.items():
        content = {**_read(folder / name), "auto_map": auto_map}
        if "feature_extractor" in content:
            extractor = {"AutoFeatureExtractor": "feature_extraction_relllm.ReLLMFeatureExtractor", **code}
            content["feature_extractor"]["auto_map"] = extractor
        _rewrite(folder / name, content)


def leave_out_digests(folder: Path) -> None:
    """Take the digests of rows out of a training's record where it has read recordings that are no published corpus.

    Whoever knows an id can try the words that were said; of a published corpus they are known anyway.
    """
    record = read_training_record(str(folder))
    facts = record.get("corpus_facts", {})
    read = [facts.get(name, {}).get("homepage") for name in record.get("seen_corpora", ())]
    if "seen_rows" in record and not (read and all(read)):
        _rewrite(folder / RECORD_NAME, {name: value for name, value in record.items() if name != "seen_rows"})


def _name_public_towers(staged: Path) -> None:
    """Take folders of this machine out of `config.json`."""
    config = _read(staged / "config.json")
    towers: dict[str, dict] = config.get("towers") or {}
    own = {part: source for part, source in towers.items() if is_local(source["name"])}
    if config.get("light_checkpoint") and (needed := sorted(part for part in own if "fingerprint" in own[part])):
        raise ValueError(
            f"It is a light checkpoint, and its {', '.join(needed)} is a folder of this machine "
            f"({own[needed[0]]['name']}): nobody else could load it. Push it with --full, or make a full one with "
            "`relllm merge`, or train from towers that are on the Hub."
        )
    public = cast(dict, _without_places(config))
    if own:
        public["towers"] = {part: source for part, source in towers.items() if part not in own}
    if public != config:
        _rewrite(staged / "config.json", public)


def _without_places(value: object) -> object:
    """Leave out of a configuration the folders that its parts were loaded from."""
    if not isinstance(value, dict):
        return value
    places = {key for key in ("_name_or_path",) if isinstance(value.get(key), str) and is_local(value[key])}
    return {key: _without_places(inner) for key, inner in value.items() if key not in places}


def _read(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is missing: expected a whole checkpoint, with its processor's files.")
    return cast(dict, json.loads(path.read_text(encoding="utf-8")))


def _rewrite(path: Path, content: dict) -> None:
    """Write a file of its own: what a link points at stays as it is."""
    path.unlink()
    write_json(content, path)
