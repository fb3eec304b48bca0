"""Which schedule of the linear head is the faster on this kind of CPU: a table, read once, never a timing in a user's process.

Blocks of the vocabulary are multiplied by tiles of our own, chunks of rows by PyTorch's library. For kinds of processors on which
both were measured the package knows the faster; ``fastloss bench --calibrate`` measures this one and writes a file that goes
before what the package knows. ``FASTLOSS_CALIBRATION`` is its path, or empty for none.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastloss.engine.native import cpu_backend

BLOCKS, CHUNKS = "blocks of the vocabulary", "chunks of rows"
VARIABLE = "FASTLOSS_CALIBRATION"
DTYPES = (torch.float32, torch.bfloat16)

# Kinds on which the library's GEMMs were the faster, by dtype: without AVX2 our tiles are plain C++ (float32, [512 × 512] · [512 ×
# 16000] with all gradients, generic code on an AMD EPYC: 532 ms in blocks, 219 in chunks).
LIBRARY_IS_FASTER = {"generic": DTYPES}
# Kinds that nobody has measured (their tiles ran under an emulator only): the library's GEMMs, which are at least PyTorch's own speed.
NOT_MEASURED = ("neon", "neon_bf16+bf16")


class Table(NamedTuple):
    """What was read. ``faster``: schedule by dtype's name; ``reason``: why a file was not taken, or ""."""

    path: Path | None
    faster: dict[str, str]
    reason: str = ""


def _kind() -> str:
    cpu = cpu_backend()
    if not cpu.has_head:
        return ""
    module = cpu.module
    best: str = module.supported_isas()[0]
    return best + "+bf16" * bool(module.supports_gemm_bf16()) + "+amx" * bool(module.supports_tiles())


# The processor, by what it multiplies with: "generic", "avx2", "avx512", "neon" or "neon_bf16", and "+bf16", "+amx". Found before a test can force another.
KIND = _kind()


def default_path() -> Path:
    """Where ``fastloss bench --calibrate`` writes."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "fastloss" / "calibration.json"


@functools.cache
def table() -> Table:
    """The file of this processor; empty where there is none, or where it is of another kind."""
    chosen = os.environ.get(VARIABLE)
    if chosen == "":
        return Table(None, {})
    path = Path(chosen) if chosen else default_path()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return _checked(path, content)
    except FileNotFoundError:
        return Table(None, {}, f"{path} is not there" if chosen else "")
    except (OSError, ValueError) as error:
        return Table(None, {}, f"{path}: {error}")


def _checked(path: Path, content: Any) -> Table:
    if not isinstance(content, dict) or not isinstance(content.get("faster"), dict):
        return Table(None, {}, f"{path}: expected a table that fastloss bench --calibrate wrote")
    if content.get("kind") != KIND:
        return Table(
            None, {}, f"{path} is of a CPU of the kind {content.get('kind')!r}, and this one is {KIND!r}"
        )
    faster = {name: value for name, value in content["faster"].items() if value in (BLOCKS, CHUNKS)}
    return Table(path, faster)


def faster(dtype: torch.dtype) -> tuple[str, str]:
    """(the faster schedule of this CPU for operands of ``dtype``, who says so)."""
    if _only:
        return _only[-1], "chosen for a measurement"
    found = table()
    name = str(dtype).removeprefix("torch.")
    if name in found.faster:
        return found.faster[name], f"the calibration in {found.path}"
    if KIND in NOT_MEASURED:
        return CHUNKS, f"a CPU of the kind {KIND!r} has not been measured; fastloss bench --calibrate does"
    if dtype in LIBRARY_IS_FASTER.get(KIND, ()):
        return CHUNKS, f"the library's GEMMs are faster on a CPU of the kind {KIND!r}"
    return BLOCKS, "the package's table"


_only: list[str] = []


@contextlib.contextmanager
def only(schedule: str) -> Iterator[None]:
    """Heads take ``schedule`` where they can, whatever the table says: for the benchmark that makes it."""
    _only.append(schedule)
    try:
        yield
    finally:
        _only.pop()
