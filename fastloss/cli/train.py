"""``fastloss train …`` and ``fastloss demo``: the options are the fields of a stage's config."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from fastloss.harness import config as configs
from fastloss.harness.config import (
    DistillConfig,
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


def parameter(name: str, hint: Any, *flag: str, **option: Any) -> inspect.Parameter:
    default = typer.Option(option.pop("default"), *flag, **option) if option else inspect.Parameter.empty
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


FIRST = (
    parameter("ctx", typer.Context),
    parameter(
        "config", Path | None, default=None, exists=True, dir_okay=False,
        help="YAML file of options, such as the config.yaml that a run saves; options given beside it win",
    ),
    parameter(
        "resume", bool, "--resume", default=False, show_default=False,
        help="go on from the checkpoint in --out, with its config",
    ),
    parameter(
        "debug", bool, "--debug", default=False, show_default=False,
        help="an error with its traceback, not in one line alone",
    ),
    parameter(
        "overwrite", bool, "--overwrite", default=False, show_default=False,
        help="start again in a folder that holds a checkpoint",
    ),
)  # fmt: skip


def add_stage(name: str, kind: type[TrainConfig], help: str) -> None:
    """A command with one option per field of ``kind``; it calls ``run`` of the harness's file of its name.

    What is not given comes from --config, or with --resume from what the run saved, or is the default.
    """
    hints = get_type_hints(kind)
    parameters = [
        parameter(
            field.name, list[str] if hints[field.name] == tuple[str, ...] else hints[field.name],
            default=field.default, show_default=field.default not in ("", ()),
            help=field.metadata["help"], rich_help_panel=panel,
        )
        for panel, fields in configs.groups(kind).items()
        for field in fields
    ]  # fmt: skip

    def command(
        ctx: typer.Context, config: Path | None, resume: bool, overwrite: bool, debug: bool, **options: Any
    ) -> None:
        sources = {key: ctx.get_parameter_source(key) for key in options}
        typed = [key for key, source in sources.items() if source and source.name == "COMMANDLINE"]
        given = {key: options[key] for key in typed}
        with errors(debug):
            folder = Path(given.get("out", kind().out))
            saved = [path for path in (folder / "config.yaml", folder / "config.json") if path.is_file()]
            start = config or (saved[0] if resume and saved else None)
            base = configs.load(kind, start) if start else kind()
            stage = importlib.import_module(f"fastloss.harness.{name}")
            stage.run(dataclasses.replace(base, **given), resume=resume, overwrite=overwrite)

    command.__signature__ = inspect.Signature([*FIRST, *parameters])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in (*FIRST, *parameters)}
    app.command(name, help=help)(command)


class errors:
    """A wrong option, file or row, and what the system refuses, is one line on stderr and exit status 2, after its
    traceback with ``debug``; other exceptions pass."""

    def __init__(self, debug: bool = False) -> None:
        self.debug = debug

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self.debug and isinstance(error, Exception):
            traceback.print_exception(error)
        if isinstance(error, ValueError | FloatingPointError | OSError):
            text = str(error)
            if isinstance(error, OSError) and error.strerror:
                text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
            print("error: " + " ".join(text.splitlines()), file=sys.stderr)
            raise typer.Exit(2) from error
        if isinstance(error, ImportError) and error.name and not error.name.startswith("fastloss"):
            extra = "wandb" if error.name == "wandb" else "train"
            print(f"error: {error.name} is not installed: pip install 'fastloss[{extra}]'", file=sys.stderr)
            raise typer.Exit(2) from error


add_stage("pretrain", PretrainConfig, "Pretrain from random weights: tokenizer, model, report.")
add_stage("sft", SftConfig, "Instruction tuning: cross-entropy on the answers alone.")
add_stage(
    "distill",
    DistillConfig,
    "A student from a teacher: a model folder, or the tokens that it named in the data.",
)
add_stage("reward", RewardConfig, "A reward model from pairs of a better and a worse answer.")
add_stage("dpo", DpoConfig, "Direct preference optimisation on such pairs.")
add_stage("grpo", GrpoConfig, "Reinforcement with groups of samples and a reward function.")
add_stage("ppo", PpoConfig, "Reinforcement with a value head and a reward function.")


def teach(
    teacher: Annotated[str, typer.Option(help="transformers folder of the teacher")],
    data: Annotated[
        list[str], typer.Option(help="files, folders, globs, hf:NAME[:config][:split], as in sft")
    ],
    out: Annotated[
        Path, typer.Option(help="JSON lines to write: the rows, with teacher_ids and teacher_logprobs")
    ],
    top_k: int = typer.Option(64, min=1, max=512, help="the teacher's likeliest tokens of each position"),
    temperature: float = typer.Option(1.0, min=1e-3, help="of the teacher's distribution"),
    column: Annotated[
        list[str] | None,
        typer.Option(help="completion=answer: the data's column `answer` is our `completion`"),
    ] = None,
    seq_len: int = typer.Option(256, min=2, help="longer examples are left out"),
    skip_bad_rows: bool = typer.Option(False, "--skip-bad-rows", help="count and skip rows that do not fit"),
    device: str = typer.Option("auto", help="auto, cpu, cuda, cuda:1 …"),
    bf16: bool = typer.Option(False, "--bf16", help="autocast to bfloat16"),
    overwrite: bool = typer.Option(False, "--overwrite", help="write over a file that is there"),
    debug: bool = typer.Option(False, "--debug", help="an error with its traceback"),
) -> None:
    """Store what a teacher says of each token of the data's answers, for `fastloss train distill` without the teacher."""
    with errors(debug):
        from fastloss.harness import teacher as teachers
        from fastloss.harness.report import Terminal

        config = DistillConfig(
            teacher=teacher, data=tuple(data), top_k=top_k, temperature=temperature, column=tuple(column or ()), seq_len=seq_len,
            skip_bad_rows=skip_bad_rows, device=device, bf16=bf16,
        )  # fmt: skip
        teachers.write(config, out, overwrite=overwrite, console=Terminal())


def demo(
    out: str = typer.Option(
        "",
        help="folder of the runs and the report [default: runs/demo, runs/chain, runs/trl]",
        show_default=False,
    ),
    chain: bool = typer.Option(
        False, "--chain", help="all stages, each from the model of an earlier one: pretrain … distill"
    ),
    trainer: str = typer.Option(
        "", help="trl: SFT, DPO and GRPO by TRL's trainers, with and without fastloss", show_default=False
    ),
    steps: int = typer.Option(
        0, help="optimizer steps of each run, at most; 0 takes the demo's own", show_default=False
    ),
    seed: int = typer.Option(0, help="weights and order of the data"),
    threads: int = typer.Option(0, help="CPU threads; 0 leaves torch's choice", show_default=False),
) -> None:
    """Train one small model twice, with fastloss and with PyTorch's loss: curves, time and memory."""
    with errors():
        if trainer:
            if trainer != "trl" or chain:
                raise ValueError(f"trainer: expected trl, without --chain, got {trainer!r}")
            from fastloss.harness.trl_demo import run_trl_demo

            run_trl_demo(out or "runs/trl", seed=seed, threads=threads, steps=steps)
            return
        if chain:
            from fastloss.harness.chain import run_chain

            run_chain(out or "runs/chain", seed=seed, threads=threads, steps=steps)
            return
        from fastloss.harness.demo import DEMO, run_demo

        run_demo(
            dataclasses.replace(
                DEMO, out=out or DEMO.out, steps=steps or DEMO.steps, seed=seed, threads=threads
            )
        )
