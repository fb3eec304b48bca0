"""``fastloss plan``."""

from __future__ import annotations

import json
import re
from typing import Annotated

import typer
from rich.console import Console

from fastloss.cli.tables import console as wide_console
from fastloss.cli.tables import show
from fastloss.plan import config, formulas, report
from fastloss.plan.hardware import DEVICES, NETWORK

UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def amount(text: str, name: str) -> float:
    """'15.6T', '200M', '1e9'."""
    found = re.fullmatch(r"([0-9.]+(?:e[+-]?[0-9]+)?)([KMBT]?)", text.strip(), re.I)
    try:
        value = float(found.group(1)) * UNITS[found.group(2).upper()] if found else 0.0
    except ValueError:
        value = 0.0
    if value <= 0:
        raise typer.BadParameter(
            f"expected a number such as 15.6T, 200M or 1e9, got {text!r}", param_hint=name
        )
    return value


def _stages(tokens: str, stage: list[str]) -> dict[str, float]:
    stages = {"pretrain": amount(tokens, "--tokens")} if tokens else {}
    for item in stage:
        name, _, value = item.partition("=")
        if name not in formulas.STAGES:
            known = ", ".join(formulas.STAGES)
            raise typer.BadParameter(f"expected one of {known}, got {name!r}", param_hint="--stage")
        if name in stages:
            also = " (--tokens is pretrain's)" if tokens and name == "pretrain" else ""
            raise typer.BadParameter(f"expected {name} once, got it twice{also}", param_hint="--stage")
        stages[name] = amount(value, "--stage")
    if not stages:
        raise typer.BadParameter("expected --tokens or --stage", param_hint="--tokens")
    return stages


def plan(
    model: Annotated[
        str, typer.Argument(help="A folder with a config.json, such a file, or a name: see --list.")
    ] = "",
    tokens: Annotated[str, typer.Option(help="Tokens of pretraining, e.g. 15.6T.")] = "",
    stage: Annotated[
        list[str] | None,
        typer.Option(help="STAGE=TOKENS, any number: pretrain, sft, reward, dpo, grpo, ppo."),
    ] = None,
    hardware: Annotated[str, typer.Option(help="One of " + ", ".join(DEVICES) + ".")] = "H100",
    devices: Annotated[int, typer.Option(min=1, help="How many.")] = 8,
    mfu: Annotated[float, typer.Option(help="Model FLOPs over peak, of training.")] = 0.4,
    generation_mfu: Annotated[
        float, typer.Option(help="The same while answers are written (grpo, ppo); 0: as --mfu.")
    ] = 0.0,
    price: Annotated[float, typer.Option(help="Of a device for an hour; 0: no cost shown.")] = 0.0,
    sequence: Annotated[
        int, typer.Option(min=0, help="Tokens of a sequence; 0: 8192, or what the positions allow.")
    ] = 0,
    micro_batch: Annotated[int, typer.Option(min=1, help="Tokens on a device at a time.")] = 8192,
    vocab: Annotated[int, typer.Option(min=0, help="Your vocabulary; 0: the config's.")] = 0,
    shards: Annotated[
        int, typer.Option(min=0, help="Devices that weights and optimizer are spread over; 0: all.")
    ] = 0,
    recompute: Annotated[
        bool, typer.Option("--recompute/--keep", help="Activation checkpointing per layer, or keep all.")
    ] = True,
    network: Annotated[float, typer.Option(help="GB/s per device and direction between nodes.")] = NETWORK
    / 1e9,
    latency: Annotated[float, typer.Option(help="Microseconds of a step of a collective.")] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Numbers in base units.")] = False,
    list_names: Annotated[bool, typer.Option("--list", help="The models that have a name.")] = False,
) -> None:
    """FLOPs, hours, memory and cost of a training run, and what the loss layer costs in it."""
    console = Console(soft_wrap=True) if as_json or list_names else wide_console(100)
    if list_names:
        console.print("\n".join(config.PRESETS), highlight=False)
        return
    if hardware not in DEVICES:
        raise typer.BadParameter(
            f"expected one of {', '.join(DEVICES)}, got {hardware!r}", param_hint="--hardware"
        )
    for name, value, least in (("--mfu", mfu, 0.0), ("--generation-mfu", generation_mfu, -1.0)):
        if not least < value <= 1:
            raise typer.BadParameter(f"expected a share of the peak, at most 1, got {value}", param_hint=name)
    try:
        chosen = config.load(model, vocab or None)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="MODEL") from error
    found = report.plan(
        report.Request(
            chosen,
            _stages(tokens, stage or []),
            hardware,
            devices,
            mfu,
            generation_mfu or None,
            price or None,
            sequence or chosen.positions or 8192,
            micro_batch,
            shards or None,
            recompute,
            network * 1e9,
            latency * 1e-6,
        )
    )
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for title, columns, rows in report.tables(found):
        show(console, title, columns, rows)
