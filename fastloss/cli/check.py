"""``fastloss check``."""

from __future__ import annotations

from typing import Annotated

import typer

from fastloss import conformance
from fastloss.cli.tables import console, show
from fastloss.conformance import report
from fastloss.conformance.providers import Missing

WRONG = ("fail", "error")
HELP = ", ".join(conformance.provider_names()) + ", or module:function"


def check(
    provider: Annotated[list[str] | None, typer.Option(help=f"Any number of: {HELP}. Default: all.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only the checks whose names contain this; any number, also with commas between."),
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="table, markdown, json, or sources (what is checked).")
    ] = "table",
) -> None:
    """Does a loss have one of the ways of being silently wrong? Exit status 1 where a check fails or ends in an error."""
    forms = ("table", "markdown", "json", "sources")
    if form not in forms:
        raise typer.BadParameter(f"expected one of {', '.join(forms)}, got {form!r}", param_hint="--format")
    checks = _chosen(only or [""])
    if form == "sources":
        print(report.sources(checks), end="")
        return
    providers, missing = [], {}
    for name in provider or conformance.provider_names():
        try:
            providers.append(conformance.provider(name))
        except Missing as error:
            if provider:
                raise typer.BadParameter(str(error), param_hint="--provider") from None
            missing[name] = str(error)
    results = list(conformance.run_all(checks, providers))
    if form == "markdown":
        print(report.markdown(checks, providers, results, missing), end="")
    elif form == "json":
        print(report.as_json(providers, results, missing))
    else:
        out = console(80 + 18 * len(providers))
        show(
            out,
            report.machine(),
            ["check", *(p.name for p in providers)],
            report.cells(checks, providers, results),
        )
        for result in results:
            if result.state in WRONG:
                print(f"{report.MARK[result.state]} {result.provider}  {result.check}  {result.detail}")
        for name, why in missing.items():
            print(f"not run: {name}: {why}")
    if any(result.state in WRONG for result in results):
        raise SystemExit(1)


def _chosen(parts: list[str]) -> list[conformance.Check]:
    """The checks whose names contain one of the parts; each part must be in one. Names have commas of their own: a part is
    cut at its commas only where no name contains it whole."""
    wanted = []
    for part in parts:
        whole = any(part in check.name for check in conformance.CHECKS)
        wanted += [part] if whole else [piece.strip() for piece in part.split(",") if piece.strip()]
    for part in wanted:
        if not any(part in check.name for check in conformance.CHECKS):
            raise typer.BadParameter(f"no check's name contains {part!r}", param_hint="--only")
    return [check for check in conformance.CHECKS if any(part in check.name for part in wanted)]
