"""Stop signals set a flag, are seen by another thread at once, and leave the process as it was."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from pretrain import signals
from pretrain.signals import STOP_SIGNALS, StopRequest
from tests.processes import wait_until


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_sets_the_flag_and_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.received is None
        assert stop.arrived_s() is None
        before_s = time.monotonic()
        signal.raise_signal(number)
        assert stop.received == number
        arrived_s = stop.arrived_s()
        assert arrived_s is not None
        assert before_s <= arrived_s <= time.monotonic()
    assert signal.getsignal(number) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_the_first_signal_counts() -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == signal.SIGUSR1


def test_one_keypress_that_arrives_twice_is_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal and torchrun both pass Ctrl-C on; a second one later is impatience."""
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop.received == signal.SIGINT
        monkeypatch.setattr(signals, "_SAME_KEYPRESS_S", -1.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_thread_sees_a_signal_while_the_main_thread_is_in_native_code() -> None:
    """The handler runs only when the main thread is back in Python; `arrived_s` does not wait for that."""
    seen: list[float | None] = []

    def watch(stop: StopRequest) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_until(lambda: stop.arrived_s() is not None, "the arrival of the signal")
        seen.append(stop.arrived_s())

    with StopRequest() as stop:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # so that it does not wake this thread
        try:
            thread = threading.Thread(target=watch, args=(stop,), daemon=True)
            thread.start()
            thread.join()  # one wait for a lock, without the interpreter's
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    assert len(seen) == 1
    assert stop.received == signal.SIGUSR1


def test_requests_nest() -> None:
    with StopRequest() as outer:
        with StopRequest() as inner:
            signal.raise_signal(signal.SIGTERM)
        assert inner.received == signal.SIGTERM
        assert outer.received is None
        signal.raise_signal(signal.SIGTERM)
        assert outer.received == signal.SIGTERM


def test_other_threads_cannot_have_handlers() -> None:
    found: list[object] = []

    def use() -> None:
        with StopRequest() as stop:
            found.append((stop.received, stop.arrived_s()))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert found == [(None, None)]
