"""`relllm push` against a Hub on this machine: what goes, what stops it, and broken connections."""

import hashlib
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import transformers.utils.hub as transformers_hub
from fake_hub import Failure, FakeHub, point_at, serve_hub
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from light_checkpoints import build, save_towers
from processes import ForkServer
from safetensors.torch import save_file
from tiny_models import tiny_model, tiny_processor
from transformers import AutoModel, AutoProcessor
from typer.testing import CliRunner

import relllm
from relllm.cli import app
from relllm.data.corpora import iemocap
from relllm.data.membership import read_training_record
from relllm.hub import push, staging
from relllm.hub.cards import write_model_card
from relllm.hub.files import take_inventory
from relllm.hub.push import send_files
from relllm.hub.sharing import CardSettings, PushSettings
from relllm.hub.staging import stage
from relllm.uploads import file_sizes

# huggingface_hub's uploads pass a file to httpx in a way that the newest release deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
TOKEN = "hf_" + "x" * 34
PART = 40_000  # bytes


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """With LFS and without Xet."""
    with serve_hub(tmp_path / "served", lfs=True) as server:
        point_at(server, tmp_path / "cache", monkeypatch)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        disable_progress_bars()
        yield server
        enable_progress_bars()


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    write_model_card(CardSettings(folder, repo_id="org/m"))
    return folder


@pytest.fixture
def checkpoint(full: Path, tmp_path: Path) -> Path:
    """A copy of its own, of links."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in full.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two files for LFS and two others; no checkpoint, which the transfer does not ask for."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in (1, 2):
        save_file(
            {"weight": torch.full((25_000,), float(number))}, folder / f"model-0000{number}-of-00002.safetensors"
        )
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


def send(folder: Path, **settings: object) -> tuple[str, list[str]]:
    return send_files(folder, PushSettings(folder, "org/m", **settings))


def served(hub: FakeHub, name: str = "org/m") -> dict[str, bytes]:
    """The files of the newest commit."""
    repository = hub.repositories[name]
    return repository.commits[repository.resolve("main")]


def on_disk(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in file_sizes(folder) if not name.startswith(".cache/")}


# --- the whole way ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_push_with_code_sends_a_checkpoint_that_loads_at_its_revision(
    hub: FakeHub, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = CliRunner().invoke(app, ["push", str(checkpoint), "org/m", "--with-code"])
    assert done.exit_code == 0 and f"{hub.url}/org/m" in done.output, done.output
    assert {"README.md", "modeling_relllm.py", "model.safetensors"} <= served(hub).keys()
    HfApi().create_tag("org/m", tag="v1")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    send(tmp_path / "broken")  # main is of no use now, and the tag is
    monkeypatch.setattr(transformers_hub, "_hf_api", HfApi(endpoint=hub.url))
    options = {"revision": "v1", "cache_dir": tmp_path / "cache"}
    model = AutoModel.from_pretrained("org/m", **options)
    expected = tiny_model().state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
    assert AutoProcessor.from_pretrained("org/m", **options).audio_token == "<|audio|>"


def test_a_dry_run_checks_and_lists_and_sends_nothing(
    hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks: list[bool] = []
    monkeypatch.setattr(push, "check_loads", lambda folder, *, without_package: checks.append(without_package))
    (checkpoint / "optimizer.pt").write_bytes(b"pickle")
    done = CliRunner().invoke(app, ["push", str(checkpoint), "org/m", "--with-code", "--dry-run"])
    assert done.exit_code == 0, done.output
    assert checks == [False, True] and not hub.repositories
    assert "Nothing was sent" in done.output and "Stays here: optimizer.pt" in done.output
    assert "What goes from org/m is not known: it is not there yet" in done.output
    listed = dict(reversed(line.split()) for line in done.output.splitlines() if len(line.split()) == 2)
    with stage(checkpoint, with_code=True) as staged:
        assert {name: int(size.replace(",", "")) for name, size in listed.items()} == file_sizes(staged)
    HfApi().create_repo("org/m")
    old = [CommitOperationAdd(name, b"x") for name in ("model-00001-of-00001.safetensors", "LICENSE")]
    HfApi().create_commit("org/m", old, commit_message="v1")
    done = CliRunner().invoke(app, ["push", str(checkpoint), "org/m", "--dry-run", "--no-load"])
    assert done.exit_code == 0 and len(checks) == 2 and len(hub.commits) == 1, done.output
    assert "Goes from org/m: model-00001-of-00001.safetensors\n" in done.output
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    done = CliRunner().invoke(app, ["push", str(checkpoint), "org/m", "--dry-run", "--no-load"])
    assert done.exit_code == 0 and "is not known: Cannot reach" in done.output


def test_the_code_that_is_added_is_what_save_pretrained_writes(full: Path, tmp_path: Path) -> None:
    relllm.register_for_auto_class()
    try:
        tiny_model().save_pretrained(tmp_path)
        tiny_processor().save_pretrained(tmp_path)
    finally:
        relllm.register_for_auto_class(False)
    expected = on_disk(tmp_path)
    with stage(full, with_code=True) as staged:
        found = on_disk(staged)
    del found["README.md"]
    assert found.keys() == expected.keys()
    for name in found:
        if name.endswith(".json"):
            assert json.loads(found[name]) == json.loads(expected[name]), name
        else:
            assert found[name] == expected[name], name


def execute(code: str, arguments: list[str]) -> None:
    """What `python -c` does, for a child."""
    sys.argv = ["-c", *arguments]
    exec(code, {})


def test_a_checkpoint_that_does_not_load_is_not_sent(
    hub: FakeHub, checkpoint: Path, fork_server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_forked(command: list[str], *, cwd: str, env: dict[str, str], **_: object) -> subprocess.CompletedProcess:
        assert command[:2] == [sys.executable, "-c"]
        child = fork_server.start(execute, command[2], command[3:], folder=Path(cwd), **env)
        return subprocess.CompletedProcess(command, child.wait(), child.stdout, child.stderr)

    monkeypatch.setattr(subprocess, "run", run_forked)
    (checkpoint / "model.safetensors").unlink()
    save_file({"model.lost": torch.zeros(1)}, checkpoint / "model.safetensors")
    done = CliRunner().invoke(app, ["push", str(checkpoint), "org/m"])
    assert done.exit_code == 1 and not hub.requests
    assert "does not load in a fresh process" in done.output.replace("\n", " ")


# --- what goes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (".env", "A=1", "a file of secrets"),
        ("deep/id_ed25519", "key", "a file of secrets"),
        ("server.pem", "key", "a file of secrets"),
        ("notes.md", f"my token is {TOKEN}", "holds a token or a private key"),
        ("run.log", "OPENAI_API_KEY=sk-proj-" + "a1" * 20, "holds a token or a private key"),
        ("push.sh", "git clone https://ghp_" + "a1" * 18 + "@github.com", "holds a token or a private key"),
        ("aws.json", '{"id": "AKIA' + "A1" * 8 + '"}', "holds a token or a private key"),
        ("notes.txt", "xoxb-1234567890-abc", "holds a token or a private key"),
        ("key.txt", "-----BEGIN OPENSSH PRIVATE KEY-----", "holds a token or a private key"),
        ("clips/a.WAV", "RIFF", "recordings or rows of a corpus"),
        ("predictions.jsonl", "{}", "recordings or rows of a corpus"),
        ("rows/train.parquet", "PAR1", "recordings or rows of a corpus"),
    ],
)
def test_secrets_and_corpora_stop_a_push(name: str, content: str, reason: str, checkpoint: Path) -> None:
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).write_text(content)
    with pytest.raises(ValueError, match=f"- {name}: {reason}"):
        take_inventory(checkpoint)


def test_what_is_not_of_a_checkpoint_stays_and_is_named(checkpoint: Path) -> None:
    before = take_inventory(checkpoint)
    assert "model.safetensors" in before.upload and before.left_out == []
    stray = [
        "checkpoint-7/optimizer.pt",
        "notes.txt",
        "optimizer.pt",
        "plots/a.png",
        "trainer_state.json",
        "training_args.bin",
    ]
    for name in stray:
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_bytes(b"x")
    after = take_inventory(checkpoint)
    assert set(after.upload) - set(before.upload) == {"plots/a.png"}
    assert after.left_out == ["checkpoint-7/", "notes.txt", "optimizer.pt", "trainer_state.json", "training_args.bin"]


def test_a_light_checkpoint_of_local_towers_goes_in_full_only_and_names_no_folder(tmp_path: Path) -> None:
    towers = save_towers(tmp_path / "towers")
    model = build(towers)
    model.save_pretrained(tmp_path / "light", light=True)
    tiny_processor(model.config).save_pretrained(tmp_path / "light")
    words = "audio_tower, emotion_tower, text_model is a folder .*relllm merge"
    with pytest.raises(ValueError, match=words), stage(tmp_path / "light"):
        pass
    (tmp_path / "light" / "training_settings.json").write_text('{"learning_rate": 1e-5}')
    with stage(tmp_path / "light", form="full") as staged:
        config = json.loads((staged / "config.json").read_text())
        assert config["light_checkpoint"] is False and config["towers"] == {}
        assert str(tmp_path) not in "".join(path.read_text() for path in staged.glob("*.json"))
        from_light = relllm.ReLLMForConditionalGeneration.from_pretrained(staged)
    expected = model.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in from_light.state_dict().items())
    model.save_pretrained(tmp_path / "full")
    tiny_processor(model.config).save_pretrained(tmp_path / "full")
    with pytest.raises(ValueError, match="--light: .*audio_tower"), stage(tmp_path / "full", form="light"):
        pass


def test_a_light_checkpoint_whose_towers_are_on_the_hub_goes_as_it_is(tmp_path: Path) -> None:
    model = build(save_towers(tmp_path / "towers"))
    model.save_pretrained(tmp_path / "light", light=True)
    tiny_processor(model.config).save_pretrained(tmp_path / "light")
    config = json.loads((tmp_path / "light" / "config.json").read_text())
    for source in config["towers"].values():
        source["name"] = "org/tower"
    (tmp_path / "light" / "config.json").write_text(json.dumps(config))
    with stage(tmp_path / "light") as staged:
        assert file_sizes(staged).keys() == file_sizes(tmp_path / "light").keys()
        assert json.loads((staged / "config.json").read_text())["towers"] == config["towers"]
        assert str(tmp_path) not in (staged / "config.json").read_text()
    assert staging.is_local(str(tmp_path)) and not staging.is_local("openai/whisper-tiny")


def test_digests_of_rows_go_where_all_are_of_public_corpora_or_it_is_asked_for(checkpoint: Path) -> None:
    record = {"seen_corpora": ["iemocap"], "corpus_facts": {"iemocap": asdict(iemocap.FACTS)}, "seen_rows": {}}
    own = {**record, "seen_corpora": ["iemocap", "clinic"]}
    for given, flags, kept in ((record, {}, True), (own, {}, False), (own, {"row_digests": True}, True)):
        (checkpoint / "training_settings.json").write_text(json.dumps(given))
        sent = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(push, "check_measured", lambda at, sent=sent: sent.append(read_training_record(str(at))))
            push.push_checkpoint(PushSettings(checkpoint, "org/m", dry_run=True, no_load=True, **flags))
        assert ("seen_rows" in sent[0]) == kept and sent[0]["seen_corpora"] == given["seen_corpora"]
    assert "seen_rows" in json.loads((checkpoint / "training_settings.json").read_text())


# --- the transfer ----------------------------------------------------------------------------------------------------


def test_a_push_is_one_commit_and_what_is_there_already_is_not_sent_again(hub: FakeHub, shards: Path) -> None:
    url, _ = send(shards, private=True)
    assert url == f"{hub.url}/org/m" and hub.repositories["org/m"].private
    assert len(hub.commits) == 1 and served(hub) == on_disk(shards)
    (shards / "config.json").write_text('{"changed": true}')
    send(shards)
    assert list(hub.commits[1]) == ["config.json"] and served(hub) == on_disk(shards)


def test_large_files_go_in_parts(hub: FakeHub, shards: Path) -> None:
    hub.part_bytes = PART
    send(shards)
    assert served(hub) == on_disk(shards)
    assert len(hub.parts) == 2 * 3  # 100 kB each


def test_an_upload_whose_connection_breaks_goes_on_by_itself(hub: FakeHub, shards: Path) -> None:
    hub.part_bytes = PART
    hub.failures = [Failure(r"PUT /lfs/\w+/2", after_bytes=10_000)]
    send(shards)
    assert served(hub) == on_disk(shards)
    size = sum(len(content) for name, content in on_disk(shards).items() if name.endswith(".safetensors"))
    assert sum(hub.received.values()) == size + 10_000  # the broken part again, and nothing else


def test_a_push_that_failed_halfway_sends_only_the_rest(hub: FakeHub, shards: Path) -> None:
    second = (shards / "model-00002-of-00002.safetensors").read_bytes()
    hub.failures = [Failure(f"PUT /lfs/{hashlib.sha256(second).hexdigest()}", status=400)]
    with pytest.raises(RuntimeError, match="Error while uploading 'model-00002"):
        send(shards)
    assert len(hub.objects) == 1 and not hub.commits
    before = hub.received.total()
    send(shards)
    assert hub.received.total() - before == len(second)
    assert served(hub) == on_disk(shards)


def test_a_refused_push_says_why(hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push, "check_loads", lambda folder, *, without_package: None)
    for roles, words in (({}, "401 Unauthorized"), ({TOKEN: "read"}, "403 Forbidden")):
        hub.roles = roles
        done = CliRunner().invoke(app, ["push", str(checkpoint), "org/m"])
        assert done.exit_code == 1 and done.output.startswith("stopped:") and words in done.output
    hub.roles, hub.failures = None, [Failure("PUT /lfs/", status=400, times=9)]
    done = CliRunner().invoke(app, ["push", str(checkpoint), "org/m"])
    assert done.exit_code == 1 and "model.safetensors" in done.output and "Bad request" in done.output
    assert not hub.commits


@pytest.mark.parametrize("flags", [["--light", "--full"], ["--tag", "v1", "--create-pr"]])
def test_flags_that_contradict_each_other_are_refused(flags: list[str], checkpoint: Path) -> None:
    done = CliRunner().invoke(app, ["push", str(checkpoint), "org/m", *flags])
    assert done.exit_code == 2 and "exclude each other" in done.output


def test_private_demands_a_private_repository(hub: FakeHub, shards: Path) -> None:
    send(shards)
    with pytest.raises(ValueError, match="it is public"):
        send(shards, private=True)
    assert len(hub.commits) == 1


@pytest.mark.parametrize("lfs", [True, False])
def test_a_push_removes_what_it_replaces_and_nothing_of_a_person_s_own(lfs: bool, hub: FakeHub, shards: Path) -> None:
    hub.lfs = lfs
    own = [".gitattributes", "LICENSE.md", "demo.gif", "adapters/mine/adapter_config.json", "docs/plots/a.png"]
    old = ["adapter_config.json", "chat_template.jinja", "evaluation.json", "model.safetensors", "plots/confusion.png"]
    old += ["modeling_relllm.py", "of_an_old_release_relllm.py", "pytorch_model.bin", "training_args.bin"]
    HfApi().create_repo("org/m")
    HfApi().create_commit("org/m", [CommitOperationAdd(name, b"x") for name in (*own, *old)], commit_message="v1")
    _, removed = send(shards, message="v2", tag="v2")
    assert removed == sorted(old) and len(hub.commits) == 2
    expected = {**on_disk(shards), **dict.fromkeys(own, b"x")}
    assert served(hub) == expected
    assert hub.repositories["org/m"].tags == {"v2": next(reversed(hub.repositories["org/m"].commits))}
    with pytest.raises(ValueError, match="has that tag already"):
        send(shards, tag="v2")


def test_a_push_goes_to_a_branch_or_a_pull_request_and_main_stays(hub: FakeHub, shards: Path) -> None:
    send(shards)
    before = served(hub)
    (shards / "config.json").write_text('{"v": 2}')
    send(shards, revision="next")
    (shards / "config.json").write_text('{"v": 3}')
    url, _ = send(shards, create_pr=True)
    assert url == f"{hub.url}/org/m/discussions/2" and served(hub) == before
    repository = hub.repositories["org/m"]
    found = [repository.commits[repository.branches[name]]["config.json"] for name in ("next", "refs/pr/2")]
    assert found == [b'{"v": 2}', b'{"v": 3}']


def test_a_hub_that_holds_something_else_afterwards_is_noticed(
    hub: FakeHub, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = HfApi.create_commit

    def corrupt(self: HfApi, *args: object, **options: object) -> CommitInfo:
        done = commit(self, *args, **options)
        hub.repositories["org/m"].commits[done.oid]["model-00002-of-00002.safetensors"] = b"other"
        return done

    monkeypatch.setattr(HfApi, "create_commit", corrupt)
    with pytest.raises(RuntimeError, match="does not hold at .* what was sent: model-00002"):
        send(shards)


def test_somebody_else_s_push_meanwhile_is_not_overwritten(
    hub: FakeHub, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(shards)
    commit = HfApi.create_commit

    def after_another(self: HfApi, *args: object, **options: object) -> CommitInfo:
        commit(self, "org/m", [CommitOperationAdd("LICENSE", b"mine")], commit_message="meanwhile")
        return commit(self, *args, **options)

    monkeypatch.setattr(HfApi, "create_commit", after_another)
    (shards / "config.json").write_text('{"v": 2}')
    with pytest.raises(HTTPError, match="A commit has happened since"):
        send(shards)
    assert served(hub)["config.json"] == b"{}"


# --- one push after another ------------------------------------------------------------------------------------------

FORMS = ("single", "shards", "light", "code")


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, torch.Tensor]]]:
    """One checkpoint in each form, each with weights of its own; the light one's towers are where they were."""
    folder, made = tmp_path_factory.mktemp("forms"), {}
    towers = save_towers(folder / "towers")
    for number, form in enumerate(FORMS):
        model = build(towers)
        torch.nn.init.constant_(model.model.emotion_head.weight, number)
        sizes = {"max_shard_size": "50KB"} if form == "shards" else {}
        model.save_pretrained(folder / form, light=form == "light", **sizes)
        tiny_processor(model.config).save_pretrained(folder / form)
        write_model_card(CardSettings(folder / form, repo_id="org/m"))
        made[form] = folder / form, model.state_dict()
    assert (folder / "shards" / "model.safetensors.index.json").exists()
    return made


@pytest.mark.slow
def test_what_loads_is_what_was_pushed_last(
    hub: FakeHub, forms: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Single file, shards, light and with code, each after each of the others."""
    monkeypatch.setattr(staging, "_name_public_towers", lambda staged: None)  # they stand for towers on the Hub
    monkeypatch.setattr(transformers_hub, "_hf_api", HfApi(endpoint=hub.url))
    order = [FORMS[number] for number in (0, 1, 0, 2, 0, 3, 1, 2, 1, 3, 2, 3, 0)]
    assert len(set(itertools.pairwise(order))) == 12
    for form in order:
        with stage(forms[form][0], with_code=form == "code") as staged:
            send(staged)
            assert served(hub) == on_disk(staged)
        model = AutoModel.from_pretrained("org/m", cache_dir=tmp_path / "cache")
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, forms[form][1][name]), (form, name)


def test_two_forms_at_one_place_are_refused_by_a_load_and_a_push(forms: dict, tmp_path: Path) -> None:
    """As `model.push_to_hub` or a copy leaves them: what loads would be the older one."""
    shutil.copytree(forms["shards"][0], tmp_path / "both")
    shutil.copy(forms["single"][0] / "model.safetensors", tmp_path / "both")
    for attempt in (AutoModel.from_pretrained, take_inventory):
        with pytest.raises(ValueError, match=r"holds model.safetensors and model.safetensors.index.json"):
            attempt(tmp_path / "both")


@pytest.mark.parametrize("sizes", [("5GB", "50KB"), ("50KB", "5GB"), ("50KB", "100KB")])
def test_a_save_leaves_nothing_of_the_save_before(sizes: tuple[str, str], tmp_path: Path) -> None:
    model = tiny_model()
    for number, size in enumerate(sizes):
        torch.nn.init.constant_(model.model.emotion_head.weight, number)
        model.save_pretrained(tmp_path, max_shard_size=size)
    assert torch.all(AutoModel.from_pretrained(tmp_path).model.emotion_head.weight == 1)


def test_a_save_that_is_refused_leaves_the_save_before(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    before = on_disk(tmp_path)
    with pytest.raises(ValueError, match="not known where this model's"):
        model.save_pretrained(tmp_path, light=True)
    assert on_disk(tmp_path) == before
