"""Work in processes of one thread each: results do not depend on their number, and none outlives the first one."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
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

    Args:
        work (`Callable`): What is done with an item; with more than one process they must be able to pickle it.
        items (`Iterable`): Read as processes become free.
        num_proc (`int`): With 1 the work is done here. With more a script needs `if __name__ == "__main__":`.
        preload (`str`): Module that is imported once for all processes.

    Raises:
        RuntimeError: A process was killed.
    """
    if num_proc == 1:
        yield from _run_here(work, items)
        return
    context = multiprocessing.get_context("forkserver")  # a fork of a process with torch's threads may hang
    context.set_forkserver_preload([preload])
    pool = ProcessPoolExecutor(num_proc, mp_context=context, initializer=_begin_process)
    items = iter(items)
    waiting: dict[Future[Result], Item] = {}
    try:
        while True:
            waiting |= {pool.submit(work, item): item for item in itertools.islice(items, 2 * num_proc - len(waiting))}
            if not waiting:
                return
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                yield waiting.pop(future), future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "A process ended in the middle of its work, perhaps killed for memory. What is finished is kept: start "
            "the same command again, with a smaller --num-proc if memory is short."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _run_here(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums over several threads may round differently, and the bytes must not
    try:
        for item in items:
            yield item, work(item)
    finally:
        torch.set_num_threads(num_threads)


def _begin_process() -> None:
    """One thread; Ctrl-C is for the first process; and no life without it."""
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # the parent was killed: nobody takes the result, and another run may be making it
