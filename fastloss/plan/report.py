"""A plan as numbers (JSON) and as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastloss.plan import formulas
from fastloss.plan.formulas import Link
from fastloss.plan.hardware import DEVICES, NETWORK
from fastloss.plan.model import Model

Rows = Sequence[tuple[str, ...]]
Table = tuple[str, tuple[str, ...], Rows]  # title, columns, rows

WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)  # devices of a vocabulary-parallel head


@dataclass(frozen=True)
class Request:
    model: Model
    stages: dict[str, float]  # stage to tokens
    hardware: str = "H100"
    devices: int = 8
    mfu: float = 0.4
    generation_mfu: float | None = None  # None: the same
    price: float | None = None  # per device and hour
    sequence: int = 8192
    micro_batch: int = 8192  # tokens on a device at a time
    shards: int | None = None  # devices that weights, gradients and optimizer are spread over; None: all
    recompute: bool = True
    network: float = NETWORK
    latency: float = 10e-6
    widths: tuple[int, ...] = field(default=WIDTHS)


def plan(request: Request) -> dict[str, Any]:
    """Everything in base units: FLOPs, bytes, seconds, hours."""
    model, device = request.model, DEVICES[request.hardware]
    link = Link(device.link, request.network, request.latency)
    return {
        "model": _model(request),
        "hardware": {"name": request.hardware, **device._asdict()},
        "devices": request.devices,
        "mfu": request.mfu,
        "stages": [_stage(request, name, tokens) for name, tokens in request.stages.items()],
        "memory": formulas.memory(
            model, request.shards or request.devices, request.micro_batch, request.recompute
        ),
        "loss_layer": _loss_layer(request),
        "vocabulary_parallel": [
            formulas.vocabulary_parallel(
                model, request.micro_batch, n, link, device.flops * request.mfu
            )._asdict()
            for n in request.widths
        ],
    }


def _model(request: Request) -> dict[str, Any]:
    model = request.model
    forward = model.forward_flops(request.sequence)
    return {
        "name": model.name,
        "vocab": model.vocab,
        "hidden": model.hidden,
        "layers": model.layers,
        "tied": model.tied,
        "window": {"keys": model.window, "layers": model.window_layers},
        "parameters": {**model.parameters(), "total": model.total, "active": model.active},
        "multi_token_prediction": {
            "tokens": model.mtp,
            "parameters": model.mtp_parameters(),
            "forward_flops_per_token": sum(model.mtp_flops(request.sequence).values()),
        },
        "sequence": request.sequence,
        "forward_flops_per_token": {**forward, "total": sum(forward.values())},
    }


def _stage(request: Request, name: str, tokens: float) -> dict[str, Any]:
    device = DEVICES[request.hardware]
    parts = formulas.stage_flops(request.model, name, tokens, request.sequence)
    total = sum(parts.values())
    generated = formulas.generation_flops(request.model, name, tokens, request.sequence)
    hours = formulas.device_hours(total - generated, device, request.mfu) + formulas.device_hours(
        generated, device, request.generation_mfu or request.mfu
    )
    return {
        "stage": name,
        "tokens": tokens,
        "flops": {**parts, "total": total},
        "six_nd": formulas.six_nd(request.model, tokens),
        "device_hours": hours,
        "days": hours / request.devices / 24,
        "cost": None if request.price is None else hours * request.price,
    }


def _loss_layer(request: Request) -> dict[str, Any]:
    """Of one micro-batch; seconds at the device's full bandwidth, and the step they are a part of at the MFU given."""
    model, device = request.model, DEVICES[request.hardware]
    losses = 1 + (model.mtp if "pretrain" in request.stages else 0)
    layer = formulas.loss_layer(model, request.micro_batch, losses)
    forward = sum(model.forward_flops(request.sequence).values())
    if losses > 1:
        forward += sum(model.mtp_flops(request.sequence).values())
    speed = device.flops * request.mfu
    return {
        "rows": request.micro_batch,
        "logits_bytes": formulas.BF16 * request.micro_batch * model.vocab,
        "losses": losses,
        "step_seconds": 3 * request.micro_batch * forward / speed,
        "head_gemm_seconds": 6 * losses * request.micro_batch * model.vocab * model.hidden / speed,
        "chunk_rows": layer.chunk_rows,
        "torch": {"bytes": layer.torch_bytes, "traffic_seconds": layer.torch_traffic / device.bandwidth},
        "fastloss": {
            "bytes": layer.fastloss_bytes,
            "traffic_seconds": layer.fastloss_traffic / device.bandwidth,
        },
    }


def tables(found: dict[str, Any]) -> list[Table]:
    return [
        _model_table(found),
        _stage_table(found),
        _memory_table(found),
        _loss_table(found),
        _parallel(found),
    ]


def _model_table(found: dict[str, Any]) -> Table:
    model = found["model"]
    flops = model["forward_flops_per_token"]
    rows = [
        (part, count(n), count(flops[part]) if part in flops else "–")
        for part, n in model["parameters"].items()
        if part not in ("total", "active") and (n or part == "head")
    ]
    rows.append(("scores and values", "–", count(flops["scores"])))
    rows.append(("total", count(model["parameters"]["total"]), count(flops["total"])))
    rows.append(("active", count(model["parameters"]["active"]), ""))
    if (further := model["multi_token_prediction"])["tokens"]:
        name = f"prediction of {further['tokens']} further token{'s' * (further['tokens'] > 1)} (pretrain)"
        rows.append((name, count(further["parameters"]), count(further["forward_flops_per_token"])))
    window = model["window"]
    title = (
        f"{model['name']}: vocabulary {model['vocab']}, sequences of {model['sequence']}"
        + (
            f", windows of {window['keys']} in {window['layers']} of {model['layers']} layers"
            * bool(window["layers"])
        )
        + ", tied head" * model["tied"]
    )
    return title, ("part", "parameters", "FLOPs per token, forward"), rows


def _stage_table(found: dict[str, Any]) -> Table:
    hardware = found["hardware"]["name"]
    columns = ("stage", "tokens", "FLOPs", "head", "6·N·D", f"{hardware} hours", "days", "cost")
    rows = [
        (
            s["stage"],
            count(s["tokens"]),
            f"{s['flops']['total']:.3g}",
            f"{100 * s['flops']['head'] / s['flops']['total']:.1f}%",
            f"{s['six_nd']:.3g}",
            count(s["device_hours"]),
            f"{s['days']:.3g}",
            "–" if s["cost"] is None else count(s["cost"]),
        )
        for s in found["stages"]
    ]
    return f"{found['devices']} × {hardware} at {100 * found['mfu']:.0f}% MFU", columns, rows


def _memory_table(found: dict[str, Any]) -> Table:
    parts, loss, has = found["memory"], found["loss_layer"], found["hardware"]["memory"]
    rows = [(name.replace("_", " "), gigabytes(n)) for name, n in parts.items()]
    total = sum(parts.values())
    for name in ("torch", "fastloss"):
        rows.append((f"loss layer, {name}", gigabytes(loss[name]["bytes"])))
        rows.append((f"together, {name}", f"{gigabytes(total + loss[name]['bytes'])} of {gigabytes(has)}"))
    return f"memory per device, {loss['rows']} tokens at a time", ("part", "GB"), rows


def _loss_table(found: dict[str, Any]) -> Table:
    loss = found["loss_layer"]
    step = loss["step_seconds"]
    rows = [
        (
            name,
            gigabytes(loss[name]["bytes"]),
            f"{loss[name]['bytes'] / loss['logits_bytes']:.2f}×",
            milliseconds(loss[name]["traffic_seconds"]),
            f"{100 * loss[name]['traffic_seconds'] / step:.2f}%",
        )
        for name in ("torch", "fastloss")
    ]
    many = f", {loss['losses']} losses a step" if loss["losses"] > 1 else ""
    title = (
        f"loss layer{many}: bfloat16 logits would be {gigabytes(loss['logits_bytes'])} GB, chunks of {loss['chunk_rows']} rows; "
        f"the head's GEMMs {milliseconds(loss['head_gemm_seconds'])} of a step's {milliseconds(step)} ms"
    )
    return title, ("loss", "extra GB", "of the logits", "memory traffic, ms", "of the step"), rows


def _parallel(found: dict[str, Any]) -> Table:
    best = min(found["vocabulary_parallel"], key=lambda p: p["seconds"])["devices"]
    rows = [
        (
            f"{p['devices']}{' (fastest)' if p['devices'] == best else ''}",
            gigabytes(p["state_bytes"]),
            milliseconds(p["gemm_seconds"]),
            f"{p['statistics_bytes'] / 1e6:.2f}",
            milliseconds(p["statistics_seconds"]),
            f"{p['gradient_bytes'] / 1e6:.1f}",
            milliseconds(p["gradient_seconds"]),
            milliseconds(p["seconds"]),
            f"{p['gather_bytes'] / 1e6:.0f}",
        )
        for p in found["vocabulary_parallel"]
    ]
    columns = (
        "devices", "GB of state", "GEMMs ms", "statistics MB", "ms", "d hidden MB", "ms", "in all ms", "logits instead MB",
    )  # fmt: skip
    title = f"vocabulary-parallel head, {found['loss_layer']['rows']} tokens per step, sent by each device"
    return title, columns, rows


def count(x: float) -> str:
    """1.23T, 456B, 7.89M, 1234."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(x) >= size:
            return f"{x / size:.4g}{unit}" if x < 1e15 else f"{x:.3g}"
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def gigabytes(x: float) -> str:
    return f"{x / 1e9:.2f}"


def milliseconds(x: float) -> str:
    return f"{x * 1e3:.3g}"
