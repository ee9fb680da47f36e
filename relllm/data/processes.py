"""Work in processes of one thread each: results do not depend on their number, and none outlives the first one."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def run_in_processes(
    work: Callable[[Item], Result], items: Iterable[Item], num_proc: int, *, preload: str
) -> Iterator[tuple[Item, Result]]:
    """Yield items with their results as they come; of the items only a few are held at once.

    With one process the work is done here; with more it must be picklable, and a script needs
    `if __name__ == "__main__":`. The module `preload` is imported once for all. A killed process is a `RuntimeError`.
    """
    import torch

    if num_proc == 1:
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # sums over several threads may round differently, and the bytes must not
        try:
            yield from ((item, work(item)) for item in items)
        finally:
            torch.set_num_threads(num_threads)
        return
    context = multiprocessing.get_context("forkserver")  # a fork of a process with torch's threads may hang
    context.set_forkserver_preload([preload])
    pool = ProcessPoolExecutor(num_proc, mp_context=context, initializer=_begin_process)
    try:
        for item, future in run_ahead(pool, work, items, 2 * num_proc):
            yield item, future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "A process ended in the middle of its work, perhaps killed for memory. What is finished is kept: start "
            "the same command again, with a smaller --num-proc if memory is short."
        ) from error


def run_ahead(
    pool: Executor, work: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[tuple[Item, Future[Result]]]:
    """Yield items with their finished futures, failures after what came with them; `ahead` items are held at most."""
    items = iter(items)
    waiting: dict[Future[Result], Item] = {}
    try:
        while True:
            waiting |= {pool.submit(work, item): item for item in itertools.islice(items, ahead - len(waiting))}
            if not waiting:
                return
            finished = wait(waiting, return_when=FIRST_COMPLETED).done
            for future in sorted(finished, key=lambda future: future.exception() is not None):
                yield waiting.pop(future), future
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_process() -> None:
    """Take one thread; end with Ctrl-C, of which the first process speaks, and with that process."""
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # the parent was killed: nobody takes the result, and another run may be making it
