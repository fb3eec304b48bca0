"""One safetensors file holds all that a run needs to go on bit for bit; replaced whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


def save(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any],
    carry: dict[str, Tensor] | None = None,
) -> None:  # fmt: skip
    """Written beside ``path``, flushed to disk, then renamed: a failure leaves the old checkpoint as it was.

    ``progress`` is the run's own JSON: step, data position, seconds so far …; ``carry`` are tensors that a stage
    hands from step to step.
    """
    tensors = {f"model/{name}": t for name, t in _weights(model).items()}
    state = optimizer.state_dict()["state"]
    plain: dict[str, Any] = {}  # optimizer state that is no tensor
    for index, name in enumerate(_optimized(model, optimizer)):
        for key, value in state.get(index, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{name}/{key}"] = value
            else:
                plain[f"{name}/{key}"] = value
    tensors |= {f"carry/{name}": t for name, t in (carry or {}).items()}
    tensors["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    meta = {"progress": json.dumps(progress), "optimizer": json.dumps(plain), "format": "fastloss-1"}
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, temporary, metadata=meta)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_progress(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {})["progress"])


def load(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, carry: dict[str, Tensor] | None = None
) -> dict[str, Any]:
    """Weights, optimizer state, random state and ``carry`` back in place; returns ``progress``."""
    with safe_open(path, framework="pt") as file:
        meta = file.metadata() or {}
        saved = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    weights = _weights(model)
    _check_weights(path, weights, saved)
    with torch.no_grad():
        for name, tensor in weights.items():
            tensor.copy_(saved[f"model/{name}"])
    plain = json.loads(meta["optimizer"])
    state: dict[int, dict[str, Any]] = {}
    for index, name in enumerate(_optimized(model, optimizer)):
        start = f"optimizer/{name}/"
        values = {key.removeprefix(start): t for key, t in saved.items() if key.startswith(start)}
        values |= {key.removeprefix(f"{name}/"): v for key, v in plain.items() if key.startswith(f"{name}/")}
        if values:
            state[index] = values
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    if carry is not None:
        device = next(model.parameters()).device
        names = [key for key in saved if key.startswith("carry/")]
        carry.update({key.removeprefix("carry/"): saved[key].to(device) for key in names})
    torch.set_rng_state(saved["rng/cpu"])
    if "rng/cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["rng/cuda"])
    return json.loads(meta["progress"])


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Each parameter once (a tied head is its embedding) and the buffers that belong to the state."""
    weights: dict[str, Tensor] = dict(model.named_parameters())
    persistent = model.state_dict().keys()
    return weights | {name: b for name, b in model.named_buffers() if name in persistent}


def _optimized(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _check_weights(path: Path, weights: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    names = {key.removeprefix("model/") for key in saved if key.startswith("model/")}
    if names != set(weights):
        raise ValueError(f"{path}: another model's checkpoint: {sorted(names ^ set(weights))[:4]} differ")
    for name, tensor in weights.items():
        if saved[f"model/{name}"].shape != tensor.shape:
            got = list(saved[f"model/{name}"].shape)
            raise ValueError(f"{path}: {name}: expected shape {list(tensor.shape)}, got {got}")
