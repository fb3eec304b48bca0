"""fastloss's backends pass every check or refuse with a word; a loss with a known bug fails the check of that bug."""

from __future__ import annotations

import json
import os

import pytest
import torch
import torch.nn.functional as F
from backends_under_test import ALL, DEVICE, need

typer = pytest.importorskip("typer")
pytest.importorskip("rich")
from typer.testing import CliRunner  # noqa: E402

from fastloss import conformance  # noqa: E402
from fastloss.cli import _mount  # noqa: E402
from fastloss.cli.check import check as check_command  # noqa: E402
from fastloss.conformance import report  # noqa: E402
from fastloss.conformance.providers import Missing  # noqa: E402

# What the kernels refuse, with a part of their word; "auto" hands torch.func's transforms to the definition.
REFUSED_BY_NAME = {
    "ce: per-sample gradients": "through the definition",
    "head: per-sample gradients": "through the definition",
}


SLOW = os.environ.get("FASTLOSS_TEST_SLOW", "") not in ("", "0")


def _checks(backend: str) -> tuple[conformance.Check, ...]:
    """Interpreted and emulated kernels take a minute for all: every sixth, without those of thousands of classes."""
    if SLOW or backend in ("auto", "reference", "cpu"):
        return conformance.CHECKS
    return tuple(c for c in conformance.CHECKS[::6] if "8192" not in c.name)


@pytest.mark.skipif(DEVICE != "cpu", reason="the checks are on the CPU")
@pytest.mark.parametrize("backend", ("auto", *ALL))
def test_backend(backend: str) -> None:
    if backend != "auto":
        need(backend)
    checks = _checks(backend)
    results = list(conformance.run_all(checks, [conformance.provider(f"fastloss:{backend}")]))
    assert len(results) == len(checks) > 15
    assert [r for r in results if r.state not in ("pass", "refused")] == []
    refused = {r.check: r.detail for r in results if r.state == "refused"}
    expected = {} if backend == "auto" else REFUSED_BY_NAME
    assert set(refused) <= set(expected), refused
    for name, detail in refused.items():
        assert expected[name] in detail


class _ForgetsUpstream(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, reduction):
        ctx.save_for_backward(logits, target)
        return F.cross_entropy(logits, target, reduction=reduction)

    @staticmethod
    def backward(ctx, upstream):
        logits, target = ctx.saved_tensors
        return (logits.softmax(1) - F.one_hot(target, logits.shape[1])) / len(target), None, None


def forgets_upstream(logits, target, *, reduction="mean"):
    return _ForgetsUpstream.apply(logits, target, reduction)


def counts_ignored(logits, target, *, ignore_index=-100):
    return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="sum") / len(target)


def absolute(logits, target):
    """Keeps a float32 logsumexp of logits with an offset."""
    return logits.gather(-1, target[:, None])[:, 0] - logits.logsumexp(-1)


@pytest.mark.parametrize(
    ("function", "interface", "check"),
    [
        (forgets_upstream, "cross_entropy", "ce: an upstream gradient of 1024"),
        (counts_ignored, "cross_entropy", "ce: mean over kept tokens"),
        (absolute, "logprobs", "tokens: log-prob, offset of 1e4"),
    ],
)
def test_a_bug_is_found(function, interface, check) -> None:
    provider = conformance.Provider("mine", "1", {interface: function})
    result = conformance.run(conformance.find(check), provider)
    assert result.state == "fail" and "right" in result.detail
    assert conformance.run(conformance.find("ce: value and gradient"), provider).state in (
        "pass",
        "not supported",
    )


def raises(error: Exception):
    def loss(logits, target):
        raise error

    return loss


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (NotImplementedError("later"), "refused"),
        (ValueError("logits: expected float32, got float16"), "refused"),
        (TypeError("loss() got an unexpected keyword argument 'bias'"), "refused"),
        (RuntimeError("double backward is not supported"), "refused"),
        (RuntimeError("max(): Expected reduction dim to be specified for input.numel() == 0."), "error"),
        (ValueError("not enough values to unpack"), "error"),
        (TypeError("'NoneType' object is not callable"), "error"),
        (IndexError("index 0 is out of bounds"), "error"),
        (AssertionError(), "error"),
        (ZeroDivisionError("float division by zero"), "error"),
    ],
)
def test_a_crash_is_no_refusal(error: Exception, state: str) -> None:
    provider = conformance.Provider("mine", "1", {"cross_entropy": raises(error)})
    check = conformance.find("ce: value and gradient")
    result = conformance.run(check, provider)
    assert (
        result.state == state and type(error).__name__ in result.detail and str(error)[:20] in result.detail
    )
    page = report.markdown([check], [provider], [result], {})
    assert f"| {report.MARK[state]} |" in page and result.detail.replace("|", "") in page


def test_what_a_function_lacks_is_not_supported() -> None:
    provider = conformance.provider("torch.nn.functional:cross_entropy")
    result = conformance.run(conformance.find("ce: z-loss"), provider)
    assert (result.state, result.detail) == ("not supported", "no option z_loss")
    assert conformance.run(conformance.find("ce: class weights"), provider).state == "pass"
    with pytest.raises(Missing, match="no_such"):
        conformance.provider("torch.nn.functional:no_such")


def test_reports_say_the_number_and_the_right_one() -> None:
    mine = conformance.Provider("mine", "1", {"cross_entropy": counts_ignored})
    checks = [conformance.find("ce: mean over kept tokens"), conformance.find("kl: k3")]
    results = list(conformance.run_all(checks, [mine]))
    page = report.markdown(checks, [mine], results, {"quack": "needs a GPU"})
    assert "| ce: mean over kept tokens | FAIL |" in page and "| kl: k3 | – |" in page
    assert "quack (needs a GPU)" in page and results[0].detail in page
    data = json.loads(report.as_json([mine], results, {}))
    assert [r["state"] for r in data["results"]] == ["fail", "not supported"]


def test_every_check_names_its_source_and_its_tolerance() -> None:
    names = [check.name for check in conformance.CHECKS]
    assert len(set(names)) == len(names)
    for check in conformance.CHECKS:
        assert check.source and check.tolerance.reason and check.bug, check.name


def _listed(*arguments: str) -> list[str]:
    """Names of the checks that the command line chooses."""
    app = typer.Typer()
    app.command()(check_command)
    run = CliRunner().invoke(app, [*arguments, "--format", "sources"])
    assert run.exit_code == 0, run.output
    return [line.split("|")[1].strip() for line in run.output.splitlines()[2:]]


def test_only_takes_several_names() -> None:
    names = [check.name for check in conformance.CHECKS]
    assert _listed() == names
    both = [name for name in names if "kto:" in name or "dpo:" in name]
    assert len(both) > 4
    assert _listed("--only", "kto:", "--only", "dpo:") == both
    assert _listed("--only", "kto:,dpo:") == _listed("--only", "kto:, dpo:,") == both
    assert _listed("--only", "ce: all ignored, sum") == [n for n in names if "ce: all ignored, sum" in n]
    for arguments in (["--only", "kto:", "--only", "nothing"], ["--only", "kto:,nothing"]):
        app = typer.Typer()
        app.command()(check_command)
        run = CliRunner().invoke(app, arguments)
        assert run.exit_code == 2 and "'nothing'" in run.output


def test_an_option_that_selects_takes_several() -> None:
    """Of the whole command line: one that keeps the last of several leaves out what was asked for."""
    app = typer.Typer()
    _mount(app)
    found = []
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        for option in command.params:
            text = (getattr(option, "help", "") or "").lower()
            if text.startswith(("only ", "leave out ")) or "any number" in text:
                found.append(f"{name} {option.name}")
                assert option.multiple, found[-1]
    assert {"check only", "check provider", "bench cases", "bench providers", "bench skip"} <= set(found)
