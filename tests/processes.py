"""Processes that tests start, forked from one that has done the imports: in milliseconds instead of seconds.

`ForkServer` forks this process once, after the tests are collected and before the first runs: nothing that a test sets
up is in its children. A child calls a function of a test module, with its own environment, folder and output. What a
test must see of a fresh interpreter (what an import loads, a package that is absent) is not for these.
"""

import contextlib
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, Pipe
from pathlib import Path


class Child:
    """A running child.

    Args:
        server (`ForkServer`): Its parent.
        pid (`int`): Its process.
        output (`Path`): A folder with the files `stdout` and `stderr`, or one file for both.
    """

    def __init__(self, server: "ForkServer", pid: int, output: Path) -> None:
        self.server, self.pid, self.output = server, pid, output
        self.exitcode: int | None = None

    @property
    def stdout(self) -> str:
        return (self.output / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.output / "stderr").read_text()

    def poll(self) -> int | None:
        """Its exit code, as `subprocess` counts (`-9` of one that was killed), or `None` while it runs."""
        if self.exitcode is None:
            self.exitcode = self.server.ask(self.pid)
        return self.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, seconds: float = 200.0) -> int:
        """Its exit code; one that is not done in time is killed."""
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"The child was not done after {seconds} s: {self.stderr[-3000:]}")
            time.sleep(0.02)
        return self.exitcode


class ForkServer:
    """The process that forks children; it ends when this one does."""

    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        self._folder = tempfile.TemporaryDirectory(prefix="relllm-children-")
        self._pid = fork()
        if not self._pid:
            self._connection.close()
            serve(theirs)
        theirs.close()

    def ask(self, request: object) -> int | None:
        self._connection.send_bytes(pickle.dumps(request))
        return self._connection.recv()

    def start(
        self,
        function: Callable,
        *arguments: object,
        folder: Path | None = None,
        output: Path | None = None,
        **environment: str,
    ) -> Child:
        """A child that calls a function.

        Args:
            function (`Callable`): Of a module's top level.
            arguments: Its arguments, which are pickled.
            folder (`Path`, *optional*, defaults to the current one): Where the child is.
            output (`Path`, *optional*): A file for what it writes to both streams; by default each has its own.
            environment (`str`): Variables besides those of this process. What libraries read at import has been read.
        """
        if output is None:
            output = Path(tempfile.mkdtemp(dir=self._folder.name))
            for name in ("stdout", "stderr"):
                (output / name).touch()  # to be read before the child has come so far
        call = pickle.dumps((function, arguments))
        pid = self.ask((call, str(folder or Path.cwd()), dict(os.environ) | environment, str(output)))
        return Child(self, pid, output)

    def run(self, function: Callable, *arguments: object, **options: object) -> Child:
        """The same, waited for; it must not fail."""
        child = self.start(function, *arguments, **options)
        assert child.wait() == 0, child.stderr[-3000:]
        return child

    def run_ranks(self, function: Callable, *arguments: object, **environment: str) -> list[Child]:
        """Two processes of one group (Gloo), as `torchrun` starts them: where one fails, the other is ended."""
        from torch.distributed import TCPStore

        # The store outlives the ranks, as torchrun's does: a rank that is done must not take it from the other.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        group |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        group |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
        ranks = [
            self.start(function, *arguments, **group, RANK=rank, LOCAL_RANK=rank, **environment) for rank in ("0", "1")
        ]
        end = time.monotonic() + 200
        while any(child.poll() is None for child in ranks):
            if time.monotonic() > end or any(child.exitcode for child in ranks):
                for child in ranks:
                    child.kill()
            time.sleep(0.02)
        return ranks

    def close(self) -> None:
        self._connection.close()
        os.waitpid(self._pid, 0)
        self._folder.cleanup()


def run_command(*arguments: str) -> None:
    """The command `relllm`, for a child."""
    from relllm.cli import main

    sys.argv = ["relllm", *arguments]
    main()


def fork() -> int:
    with warnings.catch_warnings():  # other threads (of pytest-xdist) wait for input, and hold nothing
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def serve(connection: Connection) -> None:
    """Fork a child for each call, and tell the exit code of each process that is asked for; returns never."""
    with open(os.devnull, "r+") as nothing:
        for stream in range(3):
            os.dup2(nothing.fileno(), stream)
    running: set[int] = set()
    while True:
        try:
            request = pickle.loads(connection.recv_bytes())
        except EOFError:
            for pid in running:  # of tests that failed
                os.kill(pid, signal.SIGKILL)
            os._exit(0)
        if isinstance(request, int):
            pid, status = os.waitpid(request, os.WNOHANG)
            running.discard(pid)
            connection.send(os.waitstatus_to_exitcode(status) if pid else None)
        elif pid := fork():
            running.add(pid)
            connection.send(pid)
        else:
            connection.close()
            call(*request)


def call(pickled: bytes, folder: str, environment: Mapping[str, str], output: str) -> None:
    """What a child does; returns never."""
    code = 1
    for number, name in ((1, "stdout"), (2, "stderr")):
        path = Path(output)
        stream = open(path / name if path.is_dir() else path, "a", buffering=1)  # noqa: SIM115  # open until the end
        os.dup2(stream.fileno(), number)
        setattr(sys, name, stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    warnings.resetwarnings()  # pytest's make errors of them
    warnings.simplefilter("ignore")
    try:
        function, arguments = pickle.loads(pickled)
        function(*arguments)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # Python's own end may abort on the threads that Gloo leaves behind


def launch(*arguments: str) -> None:
    """`accelerate launch`, for a child: its two ranks are fresh interpreters, it need not be."""
    from accelerate.commands.launch import main

    sys.argv = ["accelerate-launch", *arguments]
    main()
