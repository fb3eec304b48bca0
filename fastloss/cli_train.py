"""``fastloss train …`` and ``fastloss demo``: the options are the fields of a stage's config."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from pathlib import Path
from typing import Any, get_type_hints

import typer

from .harness import config as configs
from .harness.config import (
    DpoConfig,
    GrpoConfig,
    PpoConfig,
    PretrainConfig,
    RewardConfig,
    SftConfig,
    TrainConfig,
)

app = typer.Typer(help="Train a language model.", no_args_is_help=True)


@app.callback()
def stages() -> None:
    """Train a language model, one stage at a time."""


def add_stage(name: str, kind: type[TrainConfig], help: str) -> None:
    """A command with one option per field of ``kind``; it calls ``run`` of the harness's file of its name.

    What is not given comes from --config, or with --resume from the run's config.json, or is the default.
    """
    hints = get_type_hints(kind)
    parameters = []
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        hint = list[str] if hint == tuple[str, ...] else hint
        flag = "--" + field.name.replace("_", "-")
        shown = field.default if field.default not in ("", ()) else None
        text = field.metadata["help"] + (f" [default: {shown}]" if shown is not None else "")
        option = typer.Option(
            None, f"{flag}/--no-{flag[2:]}" if hint is bool else flag, help=text, show_default=False
        )
        parameters.append(
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=hint | None
            )
        )
    for flag, hint, default, text in (
        ("config", Path | None, None, "a config.json to start from; options given beside it win"),
        ("resume", bool, False, "go on from the checkpoint in --out, with its config"),
        ("overwrite", bool, False, "start again in a folder that holds a checkpoint"),
    ):
        option = typer.Option(default, f"--{flag}", help=text, show_default=False)
        parameters.append(
            inspect.Parameter(flag, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=hint)
        )

    def command(config: Path | None, resume: bool, overwrite: bool, **options: Any) -> None:
        given = {key: value for key, value in options.items() if value is not None and value != []}
        with errors():
            start = config
            own = Path(given.get("out", kind().out)) / "config.json"
            if resume and start is None and own.is_file():
                start = own
            base = configs.load(kind, start) if start else kind()
            stage = importlib.import_module(f"fastloss.harness.{name}")
            stage.run(dataclasses.replace(base, **given), resume=resume, overwrite=overwrite)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    app.command(name, help=help)(command)


class errors:
    """A wrong option, file or row is one line on stderr and exit status 2; other exceptions pass."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError | FloatingPointError):
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from error
        if isinstance(error, ImportError) and error.name and not error.name.startswith("fastloss"):
            print(f"error: {error.name} is not installed: pip install 'fastloss[train]'", file=sys.stderr)
            raise typer.Exit(2) from error


add_stage("pretrain", PretrainConfig, "Pretrain from random weights: tokenizer, model, report.")
add_stage("sft", SftConfig, "Instruction tuning: cross-entropy on the answers alone.")
add_stage("reward", RewardConfig, "A reward model from pairs of a better and a worse answer.")
add_stage("dpo", DpoConfig, "Direct preference optimisation on such pairs.")
add_stage("grpo", GrpoConfig, "Reinforcement with groups of samples and a reward function.")
add_stage("ppo", PpoConfig, "Reinforcement with a value head and a reward function.")


def demo(
    out: str = typer.Option(
        "", help="folder of the runs and the report [default: runs/demo, runs/chain]", show_default=False
    ),
    chain: bool = typer.Option(
        False, "--chain", help="all stages, each from the model of the one before: pretrain … ppo"
    ),
    steps: int = typer.Option(
        0, help="optimizer steps of each run, at most; 0 takes the demo's own", show_default=False
    ),
    seed: int = typer.Option(0, help="weights and order of the data"),
    threads: int = typer.Option(0, help="CPU threads; 0 leaves torch's choice", show_default=False),
) -> None:
    """Train one small model twice, with fastloss and with PyTorch's loss: curves, time and memory."""
    with errors():
        if chain:
            from .harness.chain import run_chain

            run_chain(out or "runs/chain", seed=seed, threads=threads, steps=steps)
            return
        from .harness.demo import DEMO, run_demo

        run_demo(
            dataclasses.replace(
                DEMO, out=out or DEMO.out, steps=steps or DEMO.steps, seed=seed, threads=threads
            )
        )
