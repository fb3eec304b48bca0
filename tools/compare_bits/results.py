"""A file of results, and what differs between two of them."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from arguments import matches
from torch import Tensor


def save(calls: dict[str, dict[str, Any]], isas: list[str], out: Path) -> None:
    """One file: the bytes of all arrays behind each other, each that is there twice once, and where each lies."""
    places: dict[tuple[str, tuple[int, ...], bytes], int] = {}
    data = bytearray()

    def place(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        raw, dtype, shape = bits(value), str(value.dtype).removeprefix("torch."), tuple(value.shape)
        key = (dtype, shape, hashlib.sha256(raw).digest())
        if key not in places:
            data.extend(b"\0" * (-len(data) % 8))
            places[key] = len(data)
            data.extend(raw)
        return {"dtype": dtype, "shape": shape, "start": places[key], "sha256": key[2].hex()}

    index = {key: {name: place(value) for name, value in values.items()} for key, values in calls.items()}
    whole = torch.frombuffer(data, dtype=torch.uint8)
    torch.save(
        {
            "torch": str(torch.__version__),
            "isas": isas,
            "calls": index,
            "bytes": whole,
            "hash": digest(calls),
        },
        out,
    )


def load(path: Path) -> dict[str, Any]:
    found = torch.load(path, weights_only=True)
    whole = found.pop("bytes")

    def tensor(value: Any) -> Any:
        if not (isinstance(value, dict) and "start" in value):
            return value
        dtype, shape = getattr(torch, value["dtype"]), value["shape"]
        size = dtype.itemsize * math.prod(shape)
        return whole[value["start"] : value["start"] + size].view(dtype).reshape(shape)

    found["calls"] = {
        key: {name: tensor(value) for name, value in values.items()} for key, values in found["calls"].items()
    }
    return found


def bits(x: Tensor) -> bytes:
    return x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b""


def digest(calls: dict[str, dict[str, Any]]) -> str:
    """One hash of all bits."""
    whole = hashlib.sha256()
    for key in sorted(calls):
        for name in sorted(calls[key]):
            value = calls[key][name]
            whole.update(f"{key} {name} ".encode())
            whole.update(bits(value) if isinstance(value, Tensor) else repr(value).encode())
    return whole.hexdigest()


def difference(a: Any, b: Any) -> str:
    """What differs between two values, empty where nothing does."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return "" if type(a) is type(b) and a == b else f"{a!r} became {b!r}"
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return f"{a.dtype} {list(a.shape)} became {b.dtype} {list(b.shape)}"
    if bits(a) == bits(b):
        return ""
    x, y = a.double(), b.double()
    same_number = (x == y) | (x.isnan() & y.isnan())
    if bool(same_number.all()):
        return "signs of zeros or NaNs alone"
    finite = x.isfinite() & y.isfinite()
    if bool((~finite & ~same_number).any()):
        k = int((~finite & ~same_number).reshape(-1).int().argmax())
        return f"{x.reshape(-1)[k].item()} became {y.reshape(-1)[k].item()} at {k}"
    error = (x - y).abs()[finite].max().item()
    size = x.abs()[finite].max().item()
    roundings = error / (torch.finfo(a.dtype).eps * size) if a.is_floating_point() and size else float("inf")
    return f"{int((~same_number).sum())} of {x.numel()} differ, by {error:.3g} at most ({roundings:.2g} eps of the largest, {size:.3g})"


def compare(before: Path, after: Path, show: int, only: list[str]) -> int:
    old, new = (load(path) for path in (before, after))
    for field in ("torch", "isas"):
        if old[field] != new[field]:
            print(f"{field}: {old[field]} became {new[field]}")
    a, b = ({k: v for k, v in x["calls"].items() if matches(k, only)} for x in (old, new))
    for label, keys in (("only before", a.keys() - b.keys()), ("only after", b.keys() - a.keys())):
        if keys:
            print(f"{label}: {len(keys)} calls, such as {sorted(keys)[0]}")
    differing: dict[str, list[str]] = {}
    worded = 0
    for key in sorted(a.keys() & b.keys()):
        lines = []
        for name in dict.fromkeys((*a[key], *b[key])):
            if name.startswith("error") and name in a[key] and name in b[key]:
                kinds = [x[key][name].split(":")[0] for x in (a, b)]
                if kinds[0] == kinds[1]:  # the words of a message may change
                    worded += a[key][name] != b[key][name]
                    continue
            if name not in a[key] or name not in b[key]:
                there = a[key].get(name, b[key].get(name))
                what = there if isinstance(there, str) else "a value"
                lines.append(f"{name}: {what} {'is gone' if name in a[key] else 'is new'}")
            elif text := difference(a[key][name], b[key][name]):
                lines.append(f"{name}: {text}")
        if lines:
            differing[key] = lines
    for key, lines in itertools.islice(differing.items(), show or None):
        print(key)
        for line in lines:
            print(f"    {line}")
    print(
        f"{len(a.keys() & b.keys())} calls compared, {len(differing)} differ; {worded} errors have another message"
    )
    table = Counter((key.split("|")[0], key.split("|")[1]) for key in differing)
    for (setting, function), count in sorted(table.items()):
        print(f"    {count:5d}  {setting:24s} {function}")
    return 1 if differing or a.keys() != b.keys() else 0
