"""Checkpoints by torch.distributed.checkpoint: a folder per step, whole or not there, that any number of processes reads.

``step-N/`` holds the weights and the optimizer's state by name (so that another number of processes finds its shards), and of
each process its random state and the tensors its stage carries from step to step; ``progress.json`` is the run's own, and
``checksums.json`` has the size and the CRC-32 of every other file: torch would load a flipped bit without a word.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from . import parallel

PROGRESS, SUMS = "progress.json", "checksums.json"


def save(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Mapping[str, Any],
    carry: Mapping[str, Tensor] | None = None, *, keep: int = 1,
) -> Path:  # fmt: skip
    """Written beside the others, flushed to disk, then renamed; only then do all but the ``keep`` youngest go.

    A save that fails, or is killed, leaves the old ones as they were.
    """
    target, temporary = folder / f"step-{step}", folder / f"step-{step}.tmp"
    state = _state(model, get_model_state_dict(model), get_optimizer_state_dict(model, optimizer))
    own = {f"carry/{name}": tensor for name, tensor in (carry or {}).items()} | _random_state()
    state |= {f"rank/{parallel.data_rank()}/{name}": tensor for name, tensor in own.items()}
    parallel.from_first(partial(clean, folder))
    try:
        _call(dcp.save, state, storage_writer=FileSystemWriter(temporary), place=temporary)
        text = json.dumps({**progress, "processes": parallel.data_world()})
        parallel.from_first(partial(_finish, temporary, target, text))
    finally:
        if parallel.is_first():
            shutil.rmtree(temporary, ignore_errors=True)
    parallel.from_first(partial(_prune, folder, keep))
    return target


def latest(folder: Path) -> Path | None:
    """The youngest checkpoint; what a killed save left has another name."""
    found = _complete(folder)
    return found[-1] if found else None


def check(path: Path) -> None:
    """Every file of a checkpoint is there and as it was written, or a ValueError that names the youngest older one that
    is whole."""
    if not (what := _damage(path)):
        return
    older = _complete(path.parent)
    older = older[: older.index(path)] if path in older else []
    whole = next((other for other in reversed(older) if not _damage(other)), None)
    way = (
        f"remove it to go on from {whole}, which is whole" if whole else "there is no older one that is whole"
    )
    raise ValueError(f"checkpoint: {path}: {what}; {way}")


def read_progress(path: Path) -> dict[str, Any]:
    progress = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
    del progress["processes"]
    return progress


def load(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, carry: dict[str, Tensor] | None = None
) -> dict[str, Any]:
    """Weights, optimizer state, random state and ``carry`` back in place; returns ``progress``.

    Another number of processes than the one that saved gets no carry; a process that had no counterpart keeps its random state.
    """
    reader = FileSystemReader(path)
    saved = reader.read_metadata().state_dict_metadata
    device = next(model.parameters()).device
    weights, optimized = get_model_state_dict(model), get_optimizer_state_dict(model, optimizer)
    state = _state(model, weights, optimized)
    _check_weights(path, state, saved)
    state = {key: tensor for key, tensor in state.items() if key in saved}
    start = f"rank/{parallel.data_rank()}/"
    own = {key: _like(saved[key]) for key in saved if key.startswith(start)}
    _call(dcp.load, state | own, storage_reader=reader, place=path)
    set_model_state_dict(model, weights)
    set_optimizer_state_dict(model, optimizer, optimized)
    own = {key.removeprefix(start): tensor for key, tensor in own.items()}
    processes = json.loads((path / PROGRESS).read_text(encoding="utf-8"))["processes"]
    if carry is not None and processes == parallel.data_world():
        names = [key for key in own if key.startswith("carry/")]
        carry.update({name.removeprefix("carry/"): own[name].to(device) for name in names})
    if "rng_cpu" in own:
        torch.set_rng_state(own["rng_cpu"])
    if "rng_cuda" in own and torch.cuda.is_available():
        torch.cuda.set_rng_state(own["rng_cuda"])
    return read_progress(path)


def clean(folder: Path) -> None:
    """Makes the folder, and removes what a killed save left in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("step-*.old"):  # killed between the two renames of a step saved again
        if old.with_suffix("").exists():
            shutil.rmtree(old)
        else:
            old.rename(old.with_suffix(""))
    for temporary in folder.glob("*.tmp"):
        shutil.rmtree(temporary)


def _state(model: nn.Module, weights: Mapping[str, Any], optimized: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by name, a tied one once; not copied: what is read into them is in ``weights`` and ``optimized``."""
    every, once = ({n for n, _ in model.named_parameters(remove_duplicate=d)} for d in (False, True))
    state: dict[str, Any] = {f"model/{name}": t for name, t in weights.items() if name not in every - once}
    for name, values in optimized["state"].items():
        state |= {f"optimizer/{name}/{key}": t for key, t in values.items() if isinstance(t, Tensor)}
    return state


def _random_state() -> dict[str, Tensor]:
    states = {"rng_cpu": torch.get_rng_state()}
    return states | ({"rng_cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _like(metadata: Any) -> Tensor:
    return torch.empty(metadata.size, dtype=metadata.properties.dtype, device="cpu")


def _call(function: Any, state: dict[str, Tensor], *, place: Path, **options: Any) -> None:
    """Any process's failure is raised in all; a CheckpointException would pass ``except Exception``."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it should be
            function(state, no_dist=parallel.world() == 1, **options)
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise OSError(f"checkpoint: {place}: process {rank}: {cause}") from error


def _finish(temporary: Path, target: Path, progress: str) -> None:
    (temporary / PROGRESS).write_text(progress, encoding="utf-8")
    _sync(temporary / PROGRESS)
    (temporary / SUMS).write_text(json.dumps(_sums(temporary)), encoding="utf-8")
    _sync(temporary / SUMS)
    _sync(temporary)
    old = target.with_name(target.name + ".old")
    if target.exists():  # the same step again
        target.rename(old)
    temporary.rename(target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sums(folder: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of each file."""
    found = {}
    for path in sorted(p for p in folder.iterdir() if p.name != SUMS):
        crc, size = 0, 0
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                crc, size = zlib.crc32(block, crc), size + len(block)
        found[path.name] = [size, crc]
    return found


def _damage(folder: Path) -> str:
    """What is wrong with a checkpoint's files, or nothing; nothing is known of one of an older version."""
    if not (folder / SUMS).is_file():
        return "" if (folder / PROGRESS).is_file() else f"{PROGRESS} is missing"
    try:
        written = json.loads((folder / SUMS).read_text(encoding="utf-8"))
        there = _sums(folder)
    except (OSError, ValueError):
        return f"{SUMS} is damaged"
    for name, sums in written.items():
        if name not in there:
            return f"{name} is missing"
        if there[name] != sums:
            return f"{name} is damaged: not what was written"
    return ""


def _prune(folder: Path, keep: int) -> None:
    for path in _complete(folder)[:-keep]:
        # renamed first: killed in between, it is no checkpoint that lacks files
        shutil.rmtree(path.rename(path.with_name(path.name + ".tmp")))


def _complete(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_weights(path: Path, state: Mapping[str, Tensor], saved: Mapping[str, Any]) -> None:
    ours, theirs = ({key for key in keys if key.startswith("model/")} for keys in (state, saved))
    if ours != theirs:
        names = sorted(key.removeprefix("model/") for key in ours ^ theirs)
        raise ValueError(f"{path}: another model's checkpoint: {names[:4]} differ")
    for key in sorted(ours):
        if saved[key].size != state[key].shape:
            name, want, got = key.removeprefix("model/"), list(state[key].shape), list(saved[key].size)
            raise ValueError(f"{path}: {name}: expected shape {want}, got {got}")
