"""Who loads the batches: the trainer's own thread, other threads, or other processes.

Enters: an endless iterator of requests. Leaves: the answers, in the order of the requests, whoever was quicker. Why it
exists: the order of data is decided before work is dealt out, so the kind and number of workers cannot change it.

Processes come from a fork server, not from a fork of the trainer: that one has threads (MLflow, NCCL) whose locks a
fork copies in whatever state they are, and a CUDA context that a forked child must not touch.
"""

from __future__ import annotations

import multiprocessing
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data_pipes.errors import UserError
from data_pipes.loading.dataset import Loaded, Request, SampleDataset


class WorkerError(UserError, RuntimeError):
    """A worker process died."""


class Workers(ABC):
    """Loads requests ahead of the trainer."""

    @abstractmethod
    def run(self, requests: Iterator[Request]) -> Generator[Loaded]:
        """The answers, in the order of the requests, which may be endless. Closing the iterator stops the workers."""

    def num_ready(self) -> int:
        """Batches that wait for the trainer now; 0 where nobody knows."""
        return 0


class NoWorkers(Workers):
    """Loads in the calling thread, when asked."""

    def __init__(self, dataset: SampleDataset, pin_memory: bool) -> None:
        self._dataset, self._pin_memory = dataset, pin_memory

    def run(self, requests: Iterator[Request]) -> Generator[Loaded]:
        for request in requests:
            yield _load(self._dataset, request, self._pin_memory)


class ThreadWorkers(Workers):
    """Threads of this process. Decoding and resizing release the GIL; nothing is copied between processes."""

    def __init__(self, dataset: SampleDataset, workers: int, prefetch: int, pin_memory: bool) -> None:
        self._dataset, self._workers, self._pin_memory = dataset, workers, pin_memory
        self._ahead = workers * prefetch
        self._waiting: deque[Future[Loaded]] = deque()

    def num_ready(self) -> int:
        return sum(future.done() for future in self._waiting)

    def run(self, requests: Iterator[Request]) -> Generator[Loaded]:
        pool = single_threaded_pool(self._workers)
        try:
            self._waiting = waiting = deque(
                pool.submit(_load, self._dataset, request, self._pin_memory)
                for request in islice(requests, self._ahead)
            )
            while waiting:
                loaded = waiting.popleft().result()
                waiting.extend(
                    pool.submit(_load, self._dataset, request, self._pin_memory) for request in islice(requests, 1)
                )
                yield loaded
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class ProcessWorkers(Workers):
    """Processes, through torch's DataLoader: whole batches, in order, passed back in shared memory."""

    def __init__(self, dataset: SampleDataset, workers: int, prefetch: int, pin_memory: bool) -> None:
        self._dataset, self._workers, self._prefetch, self._pin_memory = dataset, workers, prefetch, pin_memory

    def run(self, requests: Iterator[Request]) -> Generator[Loaded]:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["data_pipes.loading.workers"])  # torch is imported once, not in every worker
        loader: DataLoader[Loaded] = DataLoader(
            _Requested(self._dataset),
            batch_size=None,
            sampler=_RequestSampler(requests),
            num_workers=self._workers,
            prefetch_factor=self._prefetch,
            collate_fn=_unchanged,
            pin_memory=self._pin_memory,
            multiprocessing_context=context,
            generator=torch.Generator(),  # else each start draws from the trainer's generator, and resume differs
        )
        answers = iter(loader)
        try:
            while True:
                try:
                    loaded = next(answers)
                except StopIteration:
                    return
                except (RuntimeError, ConnectionError, EOFError) as error:
                    # ConnectionError, EOFError: it died while its tensors were handed over
                    if isinstance(error, RuntimeError) and "exited unexpectedly" not in str(error):
                        raise
                    raise WorkerError(
                        f"a data worker process died ({error}); usually the machine's memory or /dev/shm ran out: "
                        "lower data.workers or data.prefetch, or set data.worker_kind=thread"
                    ) from error
                yield loaded
        finally:
            del answers  # the last reference: stops and joins the processes


class _Requested(Dataset[Loaded]):
    """The dataset as DataLoader wants it: one item is one request's answer."""

    def __init__(self, dataset: SampleDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, request: Request) -> Loaded:
        return self._dataset.load(request)


class _RequestSampler(Sampler[Request]):
    """Passes the requests on, in order."""

    def __init__(self, requests: Iterator[Request]) -> None:
        self._requests = requests

    def __iter__(self) -> Iterator[Request]:
        return self._requests


def make_workers(dataset: SampleDataset, workers: int, kind: str, prefetch: int, pin_memory: bool) -> Workers:
    """The workers that a configuration asks for.

    Args:
        dataset: what they load from.
        workers: their number; 0: the calling thread loads.
        kind: "thread" or "process".
        prefetch: micro-batches loaded ahead, per worker.
        pin_memory: whether batches are in page-locked memory.
    Raises:
        ValueError: there is no such kind, or a number is too small.
    """
    if workers < 0 or prefetch < 1:
        raise ValueError(f"data.workers is {workers} and data.prefetch {prefetch}; expected >= 0 and >= 1")
    if workers == 0:
        return NoWorkers(dataset, pin_memory)
    if kind == "thread":
        return ThreadWorkers(dataset, workers, prefetch, pin_memory)
    if kind == "process":
        return ProcessWorkers(dataset, workers, prefetch, pin_memory)
    raise ValueError(f"data.worker_kind is {kind!r}; expected 'thread' or 'process'")


def _load(dataset: SampleDataset, request: Request, pin_memory: bool) -> Loaded:
    loaded = dataset.load(request)
    return loaded.pin_memory() if pin_memory else loaded


def _unchanged(item: Any) -> Any:
    return item


def single_threaded_pool(workers: int) -> ThreadPoolExecutor:
    """Threads in which torch's operators use one core each: 16 workers on 16 cores would start 256 threads otherwise.

    The number is a property of the thread that sets it, and the default of later threads; the caller restores that.
    """
    default = torch.get_num_threads()
    started = threading.Barrier(workers + 1)

    def start() -> None:
        torch.get_num_threads()  # first: a thread's first look at the number would set it to the default again
        torch.set_num_threads(1)
        started.wait()  # keeps this thread busy until every thread had its turn

    pool = ThreadPoolExecutor(workers, thread_name_prefix="data")
    for _ in range(workers):
        pool.submit(start)
    started.wait()
    torch.set_num_threads(default)
    return pool
