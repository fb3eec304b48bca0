"""The command line: ``fastloss info | bench | check | plan | train | demo``, a file per command."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable


def main() -> None:
    try:
        import typer
    except ImportError:
        if sys.argv[1:] == ["info"]:  # what is here must be told where only torch is
            from fastloss.cli.info import info

            return info()
        raise SystemExit("the command line needs the 'cli' extra: pip install 'fastloss[cli]'") from None
    for stream in (sys.stdout, sys.stderr):  # cp1252 has no arrow: another character in its place
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    app = typer.Typer(help="Losses for language models, fast, small and exact.", no_args_is_help=True)
    _mount(app)
    app()


def _mount(app) -> None:  # type: ignore[no-untyped-def]
    """The commands whose extras are installed; each of the others says what is missing."""
    from fastloss.cli.check import check
    from fastloss.cli.info import info
    from fastloss.cli.plan import plan

    app.command()(check)
    app.command()(info)
    app.command()(plan)
    try:
        from fastloss.cli.train import app as train
        from fastloss.cli.train import demo, teach

        app.add_typer(train, name="train", help="Train a language model through fastloss's losses.")
        app.command()(demo)
        app.command()(teach)
    except ImportError as error:
        app.command(name="train", help=f"Not available: {error}")(_missing("train", str(error)))
    try:
        from fastloss.cli.bench import bench

        app.command()(bench)
    except ImportError as error:
        app.command(name="bench", help=f"Not available: {error}")(_missing("bench", str(error)))


def _missing(extra: str, why: str) -> Callable[[], None]:
    def command() -> None:
        raise SystemExit(f"{why}; pip install 'fastloss[{extra}]'")

    return command
