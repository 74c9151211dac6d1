"""Who trains a run: one start at a time, whatever the folder lies on.

Enters: a run's folder and the one that it saves checkpoints to. Leaves: an owner, until the block ends or the process
dies. Why it exists: two starts of one run would both train, write one journal, and take each other's checkpoints for
torn ones. A file system that locks says at once whether an owner lives, however it ended. Where there are no locks
(some network file systems, object stores) the owner writes a new number every few seconds, and whoever wants the run
watches whether it still changes; clocks are not compared.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shlex
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil

from data_pipes.store.urls import is_remote
from pretrain.checkpoint.folder import Folder
from pretrain.checkpoint.open_folder import open_folder
from pretrain.checkpoint.read import folder_of_run
from pretrain.config import RunConfig
from pretrain.parallel.world import World
from pretrain.tracking.environment import redact_argument

OWNER_FILE = "owner.json"
"""In a folder that somebody owns: host, process, time and command; what it says counts only while the owner lives."""
BEAT_S = 10.0
"""Seconds between the numbers that an owner writes where there are no locks."""
STALE_S = 45.0
"""Seconds after which an owner whose number stays the same counts as dead."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What file systems without locks say."""
_owned_here: set[str] = set()
"""Folders that this process owns: the kernel's locks are of processes, and would let it in twice."""

logger = logging.getLogger(__name__)


class RunInUseError(ValueError):
    """Somebody else trains the run; the message names who."""


@contextmanager
def own_run(config: RunConfig, world: World) -> Iterator[None]:
    """Within, no other start trains the run. A collective; rank 0 owns.

    Args:
        config: of the run.
        world: the processes.

    Raises:
        RunInUseError: another start does, on every rank.
        OSError: the folder cannot be written, on every rank.
    """
    with ExitStack() as owned:
        refusal: Exception | None = None
        if world.is_main:
            try:
                owned.enter_context(own_folder(open_folder(config.run_dir)))
                if config.checkpoint.folder is not None and is_remote(config.checkpoint.folder):
                    owned.enter_context(own_folder(folder_of_run(config.run_dir, config.checkpoint.folder)))
            except (RunInUseError, OSError) as error:  # the others would wait for ever
                refusal = error
        refusal = world.broadcast(refusal)
        if refusal is not None:
            raise refusal
        yield


@contextmanager
def own_folder(folder: Folder) -> Iterator[None]:
    """Within, no other process owns the folder.

    Args:
        folder: is made as needed.

    Raises:
        RunInUseError: another process does.
        OSError: the folder cannot be written.
    """
    path = folder.local_path
    name = str(folder) if path is None else str(path.resolve())
    if name in _owned_here:
        raise RunInUseError(_refusal(folder, _owner_now()))
    folder.make()
    with ExitStack() as owned:
        if path is None or not owned.enter_context(_locked(path / OWNER_FILE, folder)):
            owned.enter_context(_beating(folder))
        _owned_here.add(name)
        owned.callback(_owned_here.discard, name)
        yield


@contextmanager
def _locked(path: Path, folder: Folder) -> Iterator[bool]:
    """Holds the kernel's lock of the file; gives False where the file system has none.

    The lock is one of POSIX: unlike one of `flock` it does not live on in a forked worker when its process was killed.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                yield False
                return
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise RunInUseError(_refusal(folder, _parse(os.pread(descriptor, 1 << 16, 0)))) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, _encode(_owner_now()), 0)
        os.fsync(descriptor)
        yield True
    finally:
        os.close(descriptor)


@contextmanager
def _beating(folder: Folder) -> Iterator[None]:
    """Owns a folder without locks: a thread writes a new number every `BEAT_S`.

    A process that was stopped for longer than `STALE_S` may wake up and find another owner: it ends at once, without
    touching anything, because the run is no longer its own.
    """
    _wait_until_free(folder)
    mine = _owner_now() | {"token": uuid.uuid4().hex, "beat": 0}
    folder.write(OWNER_FILE, _encode(mine))
    time.sleep(min(1.0, BEAT_S / 2))  # two that came at the same moment: the one that wrote last stays
    if (found := _read(folder)).get("token") != mine["token"]:
        raise RunInUseError(_refusal(folder, found))
    ending = threading.Event()

    def beat() -> None:
        while not ending.wait(BEAT_S):
            try:
                found = _read(folder)
                if found.get("token") not in (None, mine["token"]):
                    print(_refusal(folder, found) + ". This process ends", file=sys.stderr, flush=True)
                    os._exit(1)
                mine["beat"] += 1
                folder.write(OWNER_FILE, _encode(mine))
            except OSError as error:
                logger.warning("%s/%s could not be written: %s", folder, OWNER_FILE, error)

    thread = threading.Thread(target=beat, name="owner", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()
        try:
            folder.write(OWNER_FILE, _encode(mine | {"released": True}))
        except OSError as error:
            logger.warning("%s/%s could not be written: %s; the next start has to wait", folder, OWNER_FILE, error)


def _wait_until_free(folder: Folder) -> None:
    """Returns at once where the owner left or is known to be dead, else when its number has not changed for `STALE_S`.

    Raises:
        RunInUseError: the number has changed.
    """
    found = _read(folder)
    if not found or found.get("released") or _has_died_here(found):
        return
    logger.warning("%s; waiting %.0f s to see whether it still lives", _refusal(folder, found), STALE_S)
    deadline_s = time.monotonic() + STALE_S
    while time.monotonic() < deadline_s:
        time.sleep(min(1.0, BEAT_S / 2))
        now = _read(folder)
        if now.get("released"):
            return
        if (now.get("token"), now.get("beat")) != (found.get("token"), found.get("beat")):
            raise RunInUseError(_refusal(folder, now))


def _has_died_here(owner: dict[str, Any]) -> bool:
    """Whether the owner was a process of this machine that is no more."""
    if (owner.get("host"), owner.get("boot_s")) != (socket.gethostname(), int(psutil.boot_time())):
        return False
    try:
        return bool(psutil.Process(owner["pid"]).create_time() != owner["created_s"])
    except (psutil.NoSuchProcess, KeyError, TypeError, ValueError):
        return True


def _owner_now() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot_s": int(psutil.boot_time()),
        "pid": os.getpid(),
        "created_s": psutil.Process().create_time(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "command": shlex.join(redact_argument(argument) for argument in sys.argv),
    }


def _encode(owner: dict[str, Any]) -> bytes:
    return (json.dumps(owner, indent=1) + "\n").encode()


def _read(folder: Folder) -> dict[str, Any]:
    try:
        return _parse(folder.read(OWNER_FILE))
    except FileNotFoundError:
        return {}


def _parse(content: bytes) -> dict[str, Any]:
    try:
        owner = json.loads(content)
    except ValueError:  # it is being written
        owner = None
    return owner if isinstance(owner, dict) else {}


def _refusal(folder: Folder, owner: dict[str, Any]) -> str:
    who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')} since {owner.get('since', '?')}"
    return (
        f"{folder} is in use: {who} trains this run ({owner.get('command', 'unknown command')}). End that process, "
        "wait for it, or choose another name"
    )
