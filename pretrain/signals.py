"""Signals that ask a run to save and leave: SIGTERM (torchrun, Kubernetes), SIGUSR1 (SLURM's warning), SIGINT.

The handler only sets a flag; the loop asks all ranks where they can stop together. What a signal leads to, by phase:

| phase when it arrives | what happens | checkpoint | exit status |
|---|---|---|---|
| the first seconds (imports, configuration) | the process ends as by default | as before | the signal's own |
| start: process group, model, resume, data | the start is completed, no step is made | as before | 0 |
| first step, compilation included | that step is completed, then saved | after that step | 0 |
| a step | that step is completed, then saved | after that step | 0 |
| while a checkpoint is written | it is completed; then as for a step | after the running step | 0 |
| validation, pictures | dropped at the next batch; the step is saved if it was not | of the last step | 0 |
| close | goes on as it would | of the last step | 0 |

How long this may take is bounded by the watchdog's `stop_timeout_s` (then exit code 75, and the last complete
checkpoint stands), and by whoever sent the signal: torchrun kills its workers TORCH_ELASTIC_SHUTDOWN_TIMEOUT (30)
seconds after it passed a signal on. torchrun itself exits 1 after SIGTERM though its workers exit 0, and a SIGUSR1 ends
it at once (its workers then save and leave, as the launcher is gone), unless --signals-to-handle names
SIGUSR1 too: whoever requeues jobs goes by the run's journal (status KILLED), not by torchrun's exit code.

A second SIGINT interrupts at once, but not within two seconds of the first: on Ctrl-C a worker gets one from the
terminal and one from torchrun.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.parallel.world import World

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_SAME_KEYPRESS_S = 2.0


class StopRequest:
    """A context manager that holds the first stop signal that arrived, or None. It may be entered inside another."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.launcher_pid = os.getppid()
        """The parent at the beginning; another one later means that torchrun died."""
        self._received_s = 0.0
        self._arrived_s: float | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._previous_fd = -1
        self._sockets: tuple[socket.socket, socket.socket] | None = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._sockets = socket.socketpair()
            for end in self._sockets:
                end.setblocking(False)
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
            self._previous_fd = signal.set_wakeup_fd(self._sockets[1].fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._sockets is not None:
            signal.set_wakeup_fd(self._previous_fd)
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            for end in self._sockets:
                end.close()
            self._sockets = None

    @property
    def name(self) -> str:
        """Of the signal, for people."""
        return self.received.name if self.received is not None else "a signal to another rank"

    def on_any_rank(self, world: World) -> bool:
        """Whether any rank was asked to stop. A collective."""
        return world.any(self.received is not None)

    def arrived_s(self) -> float | None:
        """When (time.monotonic) a caller of this method first saw a stop signal, or None. For one other thread.

        `received` is set by the main thread between two lines of Python, so not while it waits in a collective; the
        interpreter writes to the wake-up socket at once.
        """
        sockets = self._sockets
        if self._arrived_s is None and sockets is not None:
            with contextlib.suppress(OSError):  # nothing to read, or closed meanwhile
                if any(number in STOP_SIGNALS for number in sockets[0].recv(4096)):
                    self._arrived_s = time.monotonic()
        return self._arrived_s

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if self.received is None:
            self.received, self._received_s = signal.Signals(number), now_s
        elif number == signal.SIGINT and now_s - self._received_s > _SAME_KEYPRESS_S:
            raise KeyboardInterrupt
