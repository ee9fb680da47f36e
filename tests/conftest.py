"""What every test shares: one thread, fixed seeds, no network beyond this machine."""

import functools
import gc
import os
import random
import socket
import sys
import types
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

# Read by the libraries when they are imported, so set first; inherited by the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")
if os.environ.setdefault("RELLM_TEST_DEVICE", "cpu") == "cpu":  # `make test-gpu` says cuda
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is expected here is float32's on a CPU, also beside a card
os.environ["TRANSFORMERS_TEST_DEVICE"] = os.environ["RELLM_TEST_DEVICE"]
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # threads for each load of a few kilobytes
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # more are processes, each of which imports PyTorch

import numpy as np
import pytest
from pictures import blank_pictures
from processes import ForkServer

if TYPE_CHECKING:
    from torch import Tensor

    from relllm import ReLLMForConditionalGeneration, ReLLMProcessor

gc.disable()  # while the tests' modules are imported: nearly all of that stays
FORK_SERVER = pytest.StashKey[ForkServer]()
TRANSFORMERS_SUITE = Path(__file__).parent.parent / ".cache" / "transformers-tests"
collect_ignore: list[str] = [] if find_spec("vllm") else ["inference/in_vllm"]  # `make test-vllm` runs it
if (TRANSFORMERS_SUITE / ".ready").exists():
    sys.path.insert(0, str(TRANSFORMERS_SUITE))
else:
    collect_ignore.append("transformers")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if "transformers" in collect_ignore:
        terminalreporter.write_line(
            "tests/transformers: not collected, `make test-transformers` first lays out Transformers' own tests"
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, then those that train: two processes then end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, item.path.parent.name != "training"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fork the parent of the tests' children now: later this process has threads, and what tests have set.

    What is imported by now stays: a collection of garbage (each training run does one) need not look at it again.
    """
    if "torch" in sys.modules:  # not in the process that hands out tests to others, nor for tests of texts
        import torch

        torch.set_num_threads(1)
        for accelerator in (torch.cuda, torch.mtia, torch.xpu):
            if not accelerator.is_available():  # each seeding would keep a stack trace for it: milliseconds a test
                accelerator._lazy_call = lambda *_, **__: None
        for name in ("uniform_", "normal_", "kaiming_uniform_"):  # a sixth of the time that a checkpoint takes to load
            setattr(torch.nn.init, name, unless_on_meta(getattr(torch.nn.init, name)))
    quicken_libraries()
    gc.enable()
    gc.freeze()
    if any("fork_server" in getattr(item, "fixturenames", ()) for item in session.items):
        session.config.stash[FORK_SERVER] = ForkServer()


def quicken_libraries() -> None:
    """Leave out what libraries do again and again for the sake of large models and data."""
    if imports := sys.modules.get("accelerate.utils.imports"):  # it reads a package's metadata at each question
        imports._is_package_available = functools.cache(imports._is_package_available)
    if memory := sys.modules.get("accelerate.utils.memory"):  # each training run looks through all that is imported
        memory.gc = types.SimpleNamespace(collect=lambda: None)
    if soundfile := sys.modules.get("soundfile"):  # closing a file writes it; this waits for the disk
        soundfile.SoundFile.flush = lambda self: None
    if datasets := sys.modules.get("datasets"):  # hashes all rows, for files that tests do not have
        random_fingerprint = datasets.fingerprint.generate_random_fingerprint
        datasets.arrow_dataset.generate_fingerprint = lambda _: random_fingerprint()
    if configurations := sys.modules.get("transformers.configuration_utils"):  # three functions for each attribute
        configuration = configurations.PreTrainedConfig
        configuration.__getattribute__ = read_at_once(configuration.__getattribute__)


def read_at_once(read: Callable) -> Callable:
    """Read an attribute that has no other name and is the same for all layers, with nothing between."""
    plain = object.__getattribute__

    def quick(self: object, name: str) -> object:
        if plain(self, "__dict__").get("_heterogeneity_spec") is None and name not in plain(self, "attribute_map"):
            return plain(self, name)
        return read(self, name)

    return quick


def unless_on_meta(draw: Callable[..., "Tensor"]) -> Callable[..., "Tensor"]:
    """Draw no values for a weight that has none, in which PyTorch takes long: a model is laid out so to be loaded."""
    return lambda tensor, *args, **options: tensor if tensor.is_meta else draw(tensor, *args, **options)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if FORK_SERVER in session.config.stash:
        session.config.stash[FORK_SERVER].close()


@pytest.fixture(scope="session")
def fork_server(request: pytest.FixtureRequest) -> ForkServer:
    """Starts processes that have done the imports already."""
    return request.config.stash[FORK_SERVER]


@pytest.fixture(scope="module")
def model() -> "ReLLMForConditionalGeneration":
    """A tiny ReLLM that the tests of a file share, and leave as it is."""
    from tiny_models import tiny_model

    return tiny_model(layers=2)


@pytest.fixture(scope="module")
def processor() -> "ReLLMProcessor":
    """Its processor, on the same terms."""
    from tiny_models import tiny_processor

    return tiny_processor()


@pytest.fixture
def no_drawing() -> Iterator[None]:
    """Pictures are written, and not drawn."""
    with blank_pictures():
        yield


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def only_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections leave this machine for no test: an attempt fails at once and names the address."""
    connect = socket.socket.connect

    def connect_locally(self: socket.socket, address: tuple | str | bytes) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"Tests run offline, got a connection to {address}. Serve it from 127.0.0.1 instead.")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_locally)
