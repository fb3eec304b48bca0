"""Which process of a group is gone, said by those that waited for it: what gloo and NCCL raise names a port at best."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

PATIENCE = 3.0  # seconds in which a process that ends is seen to be gone; not tuned
_SAID = re.compile(r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|timed out|failed to recv|failed to send", re.I)  # fmt: skip
_known: dict[int, str] = {}  # process -> where it runs
_known_of: Any = None  # the store they were read from


class ProcessFailed(RuntimeError):
    """A process that others waited for is gone, or did not take part."""


def register(group: Any = None) -> None:
    """Tells the others of the group where this process runs, and learns where they do; once in a process's life."""
    global _known_of
    store = _store()
    if store is None:
        return
    if store is not _known_of:
        _known.clear()
        _known_of = store
        store.set(_key("process", dist.get_rank()), f"{_machine()} {os.getpid()}")
    for rank in _ranks(group):
        if rank not in _known:
            _known[rank] = store.get(_key("process", rank)).decode()


@contextlib.contextmanager
def named(group: Any = None) -> Iterator[None]:
    """A collective of the group: where it fails since a process is gone, the error says which one."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, ProcessFailed) or not _SAID.search(str(error)) or not _known:
            raise
        raise ProcessFailed(f"group: {_culprits(_ranks(group))}; {str(error).splitlines()[0]}") from error


def _culprits(ranks: list[int]) -> str:
    """Processes that are gone without a word; else those that say nothing although they are there."""
    own, until = dist.get_rank(), time.monotonic() + PATIENCE
    _say("failed", own)
    while True:
        silent = [rank for rank in ranks if rank != own and not _said("failed", rank)]
        gone = [rank for rank in silent if _is_gone(rank)]
        if gone:
            return f"{_listed(gone)} of {len(ranks)} ended (killed, or by an error of its own)"
        if not silent:
            return f"the connection between the {len(ranks)} processes broke, all of them are there"
        if time.monotonic() > until:
            return f"{_listed(silent)} of {len(ranks)} did not take part in time"
        time.sleep(0.05)


def _listed(ranks: list[int]) -> str:
    return ("process " if len(ranks) == 1 else "processes ") + ", ".join(map(str, ranks))


def _is_gone(rank: int) -> bool:
    """Seen on its own machine, by whoever else is there, who tells those on others."""
    machine, _, pid = _known.get(rank, "").rpartition(" ")
    if machine != _machine():
        return _said("gone", rank)
    if not _runs(int(pid)):
        _say("gone", rank)
        return True
    return False


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    with contextlib.suppress(
        OSError, IndexError
    ):  # without /proc a process that nobody waited for counts as there
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return True


def _machine() -> str:
    """Where a process number means the same process."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()}/{os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _ranks(group: Any) -> list[int]:
    return list(dist.get_process_group_ranks(group if group is not None else dist.group.WORLD))


def _key(word: str, rank: int) -> str:
    return f"fastloss/{word}/{rank}"


def _say(word: str, rank: int) -> None:
    with contextlib.suppress(RuntimeError):  # the process that keeps the store is gone
        _known_of.set(_key(word, rank), "yes")


def _said(word: str, rank: int) -> bool:
    try:
        return bool(_known_of.check([_key(word, rank)]))
    except RuntimeError:
        return False


def _store() -> Any:
    get = getattr(dist.distributed_c10d, "_get_default_store", None)
    return get() if get is not None and dist.is_initialized() else None
