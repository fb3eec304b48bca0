"""Cases run by every provider that is here, on small shapes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastloss.bench import clock, contention
from fastloss.bench.case import Case
from fastloss.bench.cases import cases, data, exact
from fastloss.bench.exact import errors
from fastloss.bench.peers import TRL_CHUNK, missing
from fastloss.bench.providers import chosen
from fastloss.bench.run import run_case
from fastloss.bench.steps import step

QUICK = {case.name: case for case in cases(quick=True)}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "FLUSH_BYTES", 1 << 20)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(contention.Spins, "free", lambda self: True)


# The cold and warm twins run the same code.
@pytest.mark.parametrize("name", [name for name in QUICK if not name.endswith("-cold")])
def test_every_provider_agrees_with_float64(name: str) -> None:
    case = QUICK[name]
    result = run_case(case, repeats=1)
    measured = {p["name"]: p for p in result["providers"] if "reason" not in p}
    assert "torch eager" in measured
    tolerance = 0.05 if case.dtype == torch.bfloat16 else 1e-5
    for p in measured.values():
        assert p["median"] > 0 and p["over_limit"] > 0
        if "errors" not in p:
            continue
        assert p["errors"]["loss"] < tolerance, p["name"]
        gradients = {k: v for k, v in p["errors"].items() if k != "loss"}
        assert set(gradients) == set(data(case, "cpu").leaves)
        if "skip=" in p["name"]:  # whose bound tests/losses/test_skip.py checks
            continue
        for key, error in gradients.items():
            assert error < tolerance * result["gradient_scale"][key], (p["name"], key)
    assert not [p for p in result["providers"] if "rror:" in p.get("reason", "")], "a provider failed"


def test_the_limit_is_the_least_of_those_measured() -> None:
    result = run_case(QUICK["linear-bf16-32x16x500-frozen"], repeats=3, patterns=("torch eager",))
    limits = {p["name"]: p["median"] for p in result["providers"] if p["name"].startswith("limit")}
    assert set(limits) == {"limit: 2 GEMMs bf16", "limit: 2 GEMMs f32"}
    assert limits[result["limit"]] == min(limits.values()) > 0
    eager = next(p for p in result["providers"] if p["name"] == "torch eager")
    assert eager["over_limit"] == pytest.approx(eager["median"] / min(limits.values()))


def test_an_in_place_loss_gets_its_logits_back() -> None:
    case = QUICK["row-f32-16x2000-inplace-warm"]
    inputs = data(case, "cpu")
    assert inputs.pristine is not None
    before = inputs.pristine.clone()
    inputs["logits"].zero_()
    inputs.restore()
    assert torch.equal(inputs["logits"], before)
    truth = exact(case, inputs)
    inputs["logits"].zero_()
    assert exact(dataclasses.replace(case, name="again"), inputs).loss == truth.loss


def test_a_row_step_neither_copies_logits_nor_gradient() -> None:
    case = QUICK["row-f32-16x2000-new-warm"]
    inputs = data(case, "cpu")
    seen: list[torch.Tensor] = []

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits):
            seen.append(logits)
            ctx.grad = torch.ones_like(logits)
            return logits.new_zeros(())

        @staticmethod
        def backward(ctx, grad):
            seen.append(ctx.grad)
            return ctx.grad

    candidate = step(lambda logits, target: Loss.apply(logits), case, inputs)
    candidate()
    assert seen[0].data_ptr() == inputs["logits"].data_ptr()
    assert candidate.gradients()["logits"].data_ptr() == seen[1].data_ptr()


def test_a_wrong_gradient_is_seen() -> None:
    case = QUICK["linear-f32-32x16x500"]
    inputs = data(case, "cpu")
    truth = exact(case, inputs)
    wrong = {name: grad.float() for name, grad in truth.gradients.items()}
    wrong["weight"][-1, -1] += 0.5
    found = errors(truth, truth.loss + 0.25, wrong)
    assert found["loss"] == pytest.approx(0.25, abs=1e-5) and found["weight"] == pytest.approx(0.5, abs=1e-5)
    assert found["hidden"] < 1e-6


def test_a_peer_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastloss.bench import providers

    def explode(case: Case):
        raise RuntimeError("no such kernel")

    broken = providers.Provider("broken", lambda case, device: None, explode)
    monkeypatch.setattr(providers, "registry", lambda: [broken])
    result = run_case(QUICK["row-f32-16x2000-new-warm"], repeats=1)
    assert {"name": "broken", "reason": "RuntimeError: no such kernel"} in result["providers"]


def test_ignored_and_frozen_are_what_they_say() -> None:
    case = dataclasses.replace(QUICK["linear-f32-32x16x500-frozen"], ignored=0.25)
    inputs = data(case, "cpu")
    assert int((inputs["target"] == -100).sum()) == 8 and inputs.kept == 24
    assert not inputs["weight"].requires_grad and case.gemms == 2
    assert QUICK["linear-f32-32x16x500-nograd"].gemms == 1


def test_the_rows_with_a_loss_have_a_line_of_their_own() -> None:
    result = run_case(QUICK["linear-f32-32x16x500-half-ignored"], repeats=3, patterns=("torch eager",))
    found = {p["name"]: p for p in result["providers"]}
    kept, eager = found["kept rows: 3 GEMMs f32"], found["torch eager"]
    assert result["limit"] == "limit: 3 GEMMs f32" and "fastloss_speedup" not in kept
    assert eager["over_kept"] == pytest.approx(eager["median"] / kept["median"])
    assert eager["over_limit"] == pytest.approx(eager["median"] / found[result["limit"]]["median"])


def test_where_low_precision_is_emulated_nobody_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastloss.bench import case as module
    from fastloss.bench import internals

    monkeypatch.setattr(internals, "upcasts", lambda device, dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(module, "EMULATED_WORK", 1)
    result = run_case(QUICK["policy-linear-bf16-32x16x500"], repeats=1, patterns=("torch*",))
    measured = {p["name"]: "reason" not in p for p in result["providers"]}
    assert (
        measured["torch eager, f32 GEMMs"] and not measured["torch eager"] and not measured["torch.compile"]
    )
    assert "limit: 3 GEMMs f32" in measured and "limit: 3 GEMMs bf16" not in measured


@pytest.mark.parametrize(
    "name", ["preference-sigmoid-64", "policy-ppo-4x64", "gae-4x64", "stats-f32-16x2000"]
)
def test_truth_has_every_gradient_and_no_rounding(name: str) -> None:
    case = QUICK[name]
    inputs = data(case, "cpu")
    truth = exact(case, inputs)
    assert set(truth.gradients) == set(inputs.leaves) and truth.loss.dtype == torch.float64
    assert all(grad.dtype == torch.float64 and bool(grad.any()) for grad in truth.gradients.values())


def test_gpu_peers_give_their_reason_and_trl_its_own_tile() -> None:
    _, reasons = chosen(QUICK["linear-f32-32x16x500"], "cpu")
    assert {"liger linear", "cut-cross-entropy", "quack linear"} <= set(reasons)
    if missing("trl.trainer.utils", "_CHUNKED_LOGPROB_CHUNK_SIZE") is None:
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

        assert TRL_CHUNK == _CHUNKED_LOGPROB_CHUNK_SIZE


def test_a_peer_that_is_not_there_is_said_to_be() -> None:
    from fastloss.bench import peers

    assert peers.missing("no_such_peer.kernels", "f") == "no_such_peer is not installed"
    assert peers.missing("json", "no_such_function").startswith("AttributeError")
