"""`relllm card`: the `README.md` of a checkpoint, with numbers only from runs that measured the same weights."""

import importlib.metadata
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from relllm.data.data_settings import read_words
from relllm.data.journal import write_json, write_whole
from relllm.data.membership import read_training_record
from relllm.evaluation.evaluation_settings import EMPATHY_PARTS
from relllm.evaluation.fingerprints import model_fingerprint
from relllm.labels import DIMENSIONS

from . import evidence
from .evidence import EVIDENCE_FORMAT, EVIDENCE_NAME
from .licences import MSP_TOWER, OTHER, UNKNOWN, Licence, choose_licence, read_towers
from .sharing import CardSettings

TEMPLATE = Path(__file__).parent / "template.md"
LORA_SCOPES = {"audio": "at audio positions only", "text": "at text positions only", "global": "everywhere"}
REQUIREMENT = re.compile(r"([\w-]+)([^;]*)")  # without extras
LOADS_WITH = ("accelerate", "peft", "safetensors", "soundfile", "torch", "torchaudio", "transformers")
IMAGE = re.compile(r"!\[[^]]*\]\((?!https?://)([^)]+)\)")


def write_model_card(settings: CardSettings) -> Path:
    """Write `README.md`, and where there are runs `evaluation.json` and `plots/`, into a checkpoint's folder."""
    model, runs, card_path = settings.model, settings.runs, settings.model / "README.md"
    if not (model / "config.json").is_file():
        raise FileNotFoundError(f"{model} has no config.json. --model takes the folder of a checkpoint.")
    if card_path.exists() and not settings.overwrite:
        raise FileExistsError(f"{card_path} is there already. Replace it with --overwrite, or edit it.")
    fingerprint = model_fingerprint(str(model)) if runs else ""
    public = [evidence.read_public_run(run, fingerprint) for run in runs]
    plots = _plots_by_name(runs)
    card = _make_card(settings, public, fingerprint, plots)
    shutil.rmtree(model / "plots", ignore_errors=True)
    for name, plot in plots.items():
        (model / "plots").mkdir(exist_ok=True)
        shutil.copyfile(plot, model / name)
    (model / EVIDENCE_NAME).unlink(missing_ok=True)
    if public:
        write_json({"format": EVIDENCE_FORMAT, "fingerprint": fingerprint, "runs": public}, model / EVIDENCE_NAME)
    with write_whole(card_path) as partial:
        partial.write_text(re.sub(r"\n{3,}", "\n\n", str(card)), encoding="utf-8")  # of conditions that were not met
    return card_path


def _make_card(settings: CardSettings, runs: Sequence[Mapping], digest: str, plots: Mapping[str, Path]) -> ModelCard:
    """Fill in the template from the checkpoint's files, `read_public_run`s, and figures by their name there."""
    config = json.loads((settings.model / "config.json").read_text(encoding="utf-8"))
    record = read_training_record(str(settings.model))
    outputs = list(((config.get("emotion_config") or {}).get("id2label") or dict(enumerate(DIMENSIONS))).values())
    repo_id = settings.repo_id or f"org/{settings.model.resolve().name}"
    told = read_words(settings.tower_license, "--tower-license", "text_model=apache-2.0")
    towers = read_towers(config, told, started_from=evidence.started_from(record))
    corpora = evidence.read_corpora(record)
    wish = (settings.license, settings.license_name, settings.license_link)
    chosen = Licence(wish[0] or OTHER, *wish[1:]) if any(wish) else None
    licence = choose_licence(towers, corpora, chosen, link=f"https://huggingface.co/{repo_id}#licence")
    results = evidence.eval_results(runs)
    languages = sorted({*settings.language, *(facts["language"] for facts in corpora if facts.get("language"))})
    data = ModelCardData(
        license=licence.id,
        license_name=licence.name,
        license_link=licence.link,
        library_name="transformers",
        pipeline_tag="audio-text-to-text",
        language=languages or None,
        datasets=evidence.hub_datasets(record) or None,
        base_model=[tower.hub_id for tower in towers if tower.hub_id] or None,
        tags=["relllm", "speech", "speech-emotion-recognition", "empathy", "arxiv:2602.10716"],
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        model_name=repo_id.rpartition("/")[2] if results else None,
        eval_results=results or None,
        tower_licenses={tower.part: tower.licence for tower in towers if tower.licence != UNKNOWN} or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        taught_emotions=[] if set(outputs) == set(DIMENSIONS) else outputs,
        lora_scope=config.get("lora_config") and LORA_SCOPES.get(config.get("lora_scope", "audio")),
        requirements=_requirements(),
        saved_with=config.get("transformers_version"),
        licence=licence,
        towers=towers,
        msp_tower=MSP_TOWER,
        corpora=corpora,
        training=record,
        runs=runs,
        describe_data=evidence.describe_data,
        readings=evidence.READINGS,
        mechanisms=EMPATHY_PARTS,
        rewarded=evidence.describe_rewards(record),
        cell=evidence.cell,
        fingerprint=digest,
        evidence_name=EVIDENCE_NAME,
        plots=[{"path": name, "title": Path(name).stem.replace("_", " ")} for name in plots],
    )


def _requirements() -> str:
    """Say which releases load the code files of a checkpoint; `""` where the package is not installed."""
    try:
        wanted = importlib.metadata.requires("relllm") or []
    except importlib.metadata.PackageNotFoundError:
        return ""
    named = [found for one in sorted(wanted) if (found := REQUIREMENT.fullmatch(one)) and found[1] in LOADS_WITH]
    return ", ".join(f"`{one[1]}{','.join(sorted(one[2].split(','), reverse=True))}`" for one in named)


def told_terms(card: Path) -> tuple[str, list[str]]:
    """Say under which licence a card is, and the terms of each corpus, for the person who has to agree with them."""
    data = ModelCard.load(card).data
    licence = f"{data.license} ({data.license_name}: {data.license_link})" if data.license == OTHER else data.license
    corpora = evidence.read_corpora(read_training_record(str(card.parent)))
    return licence, [f"{one['title']}: {one.get('terms') or 'its terms are not recorded.'}" for one in corpora]


def check_card(folder: Path) -> None:
    """Hold the card in a checkpoint's folder against the checkpoint, before it goes to the Hub."""
    path = folder / "README.md"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no README.md. Write one with `relllm card RUN --model {folder}`.")
    try:
        card = ModelCard.load(path)
    except ValueError as error:
        raise ValueError(f"{path}: its front matter is invalid ({error}). Mend it, or write the card anew.") from error
    licence = card.data.license
    if not isinstance(licence, str):
        raise ValueError(f"{path} names no licence. Set `license:` in its front matter, or write the card anew.")
    if licence == OTHER and not (card.data.license_name and card.data.license_link):
        raise ValueError(f"{path}: `license: other` needs `license_name:` and `license_link:` beside it.")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    started = evidence.started_from(read_training_record(str(folder)))
    choose_licence(read_towers(config, card.data.get("tower_licenses"), started_from=started), chosen=Licence(licence))
    kept = evidence.read_evidence(folder)
    measured = {_identity(result) for result in evidence.eval_results(kept["runs"] if kept else ())}
    for result in card.data.get("eval_results") or ():
        if _identity(result) not in measured:
            claim = f"{result.metric_name or result.metric_type} = {result.metric_value} on {result.dataset_name}"
            raise ValueError(
                f"{path} has {claim}, and no run in {EVIDENCE_NAME} measured that. Take it out, or write the card "
                "from the run: `relllm card RUN --model …`."
            )
    for image in IMAGE.findall(card.text):
        if not (folder / image).is_file():
            raise FileNotFoundError(f"{path} shows {image}, which is not there. Write the card anew.")


def check_measured(folder: Path) -> None:
    """Hold the weights in a folder, in whichever form, against those that were measured (`evaluation.json`)."""
    kept = evidence.read_evidence(folder)
    if kept and (found := model_fingerprint(str(folder))) != kept["fingerprint"]:
        raise ValueError(
            f"{folder / EVIDENCE_NAME} is of another model: of {kept['fingerprint'][:23]}…, and this one is "
            f"{found[:23]}…. Evaluate this one and write its card anew."
        )


def _identity(result: EvalResult) -> tuple[object, ...]:
    return (result.task_type, result.dataset_type, result.dataset_split, result.metric_name, result.metric_value)


def _plots_by_name(runs: Sequence[Path]) -> dict[str, Path]:
    """Find the figures of runs, by the names that they get in the repository."""
    several = len(runs) > 1
    return {
        f"plots/{f'run{number}_' if several else ''}{plot.name}": plot
        for number, run in enumerate(runs, start=1)
        for plot in sorted((run / "plots").glob("*.png"))
    }
