"""``fastloss``: info, bench, train, demo."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable


def main() -> None:
    try:
        import typer
    except ImportError:
        raise SystemExit("the command line needs the 'cli' extra: pip install 'fastloss[cli]'") from None
    for stream in (sys.stdout, sys.stderr):  # cp1252 has no arrow: another character in its place
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    app = typer.Typer(help="Losses for language models, fast, small and exact.", no_args_is_help=True)
    app.command()(info)
    _mount(app)
    app()


def _mount(app) -> None:  # type: ignore[no-untyped-def]
    """The parts whose extras are installed."""
    from fastloss.cli_plan import plan

    app.command()(plan)
    try:
        from fastloss.cli_train import app as train
        from fastloss.cli_train import demo

        app.add_typer(train, name="train", help="Train a language model through fastloss's losses.")
        app.command()(demo)
    except ImportError as error:
        app.command(name="train", help=f"Not available: {error}")(_missing("train", str(error)))
    try:
        from fastloss.cli_bench import bench

        app.command()(bench)
    except ImportError as error:
        app.command(name="bench", help=f"Not available: {error}")(_missing("bench", str(error)))


def _missing(extra: str, why: str) -> Callable[[], None]:
    def command() -> None:
        raise SystemExit(f"{why}; pip install 'fastloss[{extra}]'")

    return command


def info() -> None:
    """Which backends are here, and why one is not."""
    import platform

    import torch

    import fastloss

    try:
        from fastloss import _build_info as build  # type: ignore[attr-defined]
    except ImportError:
        build = None  # type: ignore[assignment]
    print(f"fastloss {fastloss.__version__}   torch {torch.__version__}   python {platform.python_version()}")
    print(
        f"threads {torch.get_num_threads()}   cpu capability (torch) {torch.backends.cpu.get_cpu_capability()}"
    )
    for name, state in fastloss.backends().items():
        print(f"  {name:<10} {state}")
    from fastloss.ops import cpu_rows

    if cpu_rows.native is not None:
        print(
            f"  cpu kernels: {cpu_rows.native.isa()} (compiled: {', '.join(cpu_rows.native.supported_isas())} run here)"
        )
    if build is not None:
        for name in ("CPU", "CUDA"):
            part = getattr(build, name)
            print(
                f"  built {name}: {'yes' if part['built'] else 'no, ' + part['reason']}"
                + (f" (sm {part['archs']} + PTX)" if part.get("archs") else "")
            )
