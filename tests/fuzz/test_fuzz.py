"""The fuzzer with a fixed list of cases: the long run is by hand (``python tests/fuzz/run.py --seconds 3600 --seed 0``)."""

from __future__ import annotations

import inspect
import os
from dataclasses import replace

import pytest
import torch
from fuzz_draw import Case, Draw
from fuzz_functions import FUNCTIONS, NOT_DRAWN
from fuzz_judge import How, Verdict, call, compare, describe, draw_case, flat, judge
from fuzz_loop import USUAL, command

import fastloss

SEED = 0
SLOW = os.environ.get("FASTLOSS_TEST_SLOW", "") not in ("", "0")
CASES, IN_A_TEST = 600, 100


def test_every_public_function_is_drawn() -> None:
    public = {name for name in fastloss.__all__ if inspect.isfunction(getattr(fastloss, name))}
    assert public == set(FUNCTIONS) | set(NOT_DRAWN)
    assert not set(FUNCTIONS) & set(NOT_DRAWN)


def _drawn(number: int, backends: tuple[str, ...], functions: tuple[str, ...]) -> tuple[Case, How]:
    """What torch.compile takes a second for runs as written, but for FASTLOSS_TEST_SLOW."""
    case, how = draw_case(SEED, number, backends, functions)
    return case, replace(how, mode="grad") if how.mode == "compile" and not SLOW else how


@pytest.mark.parametrize("first", range(0, CASES, IN_A_TEST))
def test_cases(first: int) -> None:
    wrong, computed = [], 0
    for number in range(first, first + IN_A_TEST):
        case, how = _drawn(number, USUAL, ())
        verdict = judge(case, how)
        computed += verdict.state == "right"
        if verdict.state == "wrong":
            wrong.append(f"{describe(case, how)}\n  {verdict.detail}\n  {command(SEED, number, USUAL, ())}")
    assert not wrong, "\n".join(wrong)
    assert computed >= 0.8 * IN_A_TEST  # the rest was refused, by name and with reason


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_function_is_computed(name: str) -> None:
    """Few of a function's drawings are errors, or its fuzzing would be empty."""
    states = [judge(*_drawn(number, ("auto",), (name,))) for number in range(5)]
    assert not [v.detail for v in states if v.state == "wrong"]
    assert sum(v.state == "right" for v in states) >= 2


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name.startswith("linear_")])
def test_hidden_states_of_no_width(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are their bias, or 0."""
    monkeypatch.setattr(Draw, "dim", lambda self: 0)
    states = [judge(*_drawn(number, ("auto", "auto", "reference"), (name,))) for number in range(8)]
    assert not [v.detail for v in states if v.state == "wrong"]
    assert sum(v.state == "right" for v in states) >= 4


def test_a_compiled_call_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that torch.compile alone makes wrong."""
    case = Case(
        "kl_estimate", {n: torch.arange(6.0) / (3 + k) for k, n in enumerate(("logprobs", "ref_logprobs"))}
    )
    case.leaves = ("logprobs",)
    how = How(mode="compile", asking=case.leaves)
    assert judge(case, how).state == "right"
    right = fastloss.kl_estimate

    def wrong(logprobs, ref_logprobs, **options):
        return right(logprobs, ref_logprobs, **options) * (2 if torch.compiler.is_compiling() else 1)

    monkeypatch.setattr(fastloss, "kl_estimate", wrong)
    assert judge(case, how).state == "wrong"
    assert judge(case, How(asking=case.leaves)).state == "right"


def test_a_case_is_the_same_each_time() -> None:
    for number in range(30):
        (one, how), (other, again) = (draw_case(SEED, number, USUAL, ()) for _ in range(2))
        assert describe(one, how) == describe(other, again)
        for name, x in one.tensors.items():
            assert torch.equal(x.nan_to_num(9.0), other.tensors[name].nan_to_num(9.0))


@pytest.mark.parametrize("factor", [1.0, 1 + 2.0**-12, -1.0, float("nan")])
def test_the_judge_sees_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """A gradient that is wrong by a factor, of a function that is otherwise right; the definition keeps its own."""

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, upstream):
            return upstream * factor

    def wrong(input, target, *args, backend="auto", **options):
        value = input if backend == "reference" else Scaled.apply(input)
        return right(value, target, *args, backend=backend, **options)

    right = fastloss.cross_entropy
    number = next(n for n in range(1000) if _has_a_gradient(n))
    case, how = draw_case(SEED, number, ("auto",), ("cross_entropy",))
    monkeypatch.setattr(fastloss, "cross_entropy", wrong)
    assert judge(case, how).state == ("right" if factor == 1 else "wrong")


def _has_a_gradient(number: int) -> bool:
    case, how = draw_case(SEED, number, ("auto",), ("cross_entropy",))
    usual = how.mode == "grad" and how.asking == ("input",) and not how.autocast and not how.inplace
    if not usual or case.dtype != torch.float32 or set(how.kinds.values()) != {"plain"} or case.options:
        return False
    x = case.tensors["input"].clone().requires_grad_()
    loss = call(case, case.tensors | {"input": x}, "reference")
    (grad,) = torch.autograd.grad(loss.sum(), x)
    return bool(grad.isfinite().all()) and grad.abs().max().item() > 0.01


def test_the_judge_sees_what_else_goes_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fastloss.kl_estimate
    case, _ = draw_case(SEED, 3, ("auto",), ("kl_estimate",))
    how = How(kinds=dict.fromkeys(case.tensors, "plain"), mode="no_grad")

    def verdict(function) -> Verdict:
        monkeypatch.setattr(fastloss, "kl_estimate", function)
        return judge(case, how)

    def changes(logprobs, ref_logprobs, *, backend="auto", **options):
        out = right(logprobs, ref_logprobs, backend=backend, **options)
        if backend != "reference":
            logprobs.add_(1)
        return out

    def crashes(*args, backend="auto", **options):
        if backend != "reference":
            raise RuntimeError("boom")
        return right(*args, backend=backend, **options)

    def other_dtype(*args, backend="auto", **options):
        out = right(*args, backend=backend, **options)
        return out if backend == "reference" else out.double().half()

    assert verdict(right).state == "right"
    assert "was changed" in verdict(changes).detail
    assert "boom" in verdict(crashes).detail
    assert "dtype" in verdict(other_dtype).detail


@pytest.mark.parametrize("name", FUNCTIONS)
def test_tangents_have_the_dtype_of_their_values(name: str) -> None:
    """PyTorch's tangent of a 0-d float32 tensor times a Python number is float64."""
    calls = 0
    for number in range(12):
        case = FUNCTIONS[name][0](Draw(77, number, [torch.float32]))
        leaves = [leaf for leaf in case.leaves if leaf in case.tensors]
        if not leaves:
            return

        def of(
            *values: torch.Tensor, case: Case = case, leaves: list[str] = leaves
        ) -> dict[str, torch.Tensor]:
            given = {**case.tensors, **dict(zip(leaves, values, strict=True))}
            out = flat(getattr(fastloss, case.function)(**given, **case.options))
            return {key: x for key, x in out.items() if x.is_floating_point()}

        values = tuple(case.tensors[leaf] for leaf in leaves)
        try:
            out, tangents = torch.func.jvp(of, values, tuple(torch.ones_like(x) for x in values))
        except (ValueError, RuntimeError):  # arguments that do not fit, and what has no tangent
            continue
        calls += 1
        assert {key: x.dtype for key, x in tangents.items()} == {key: x.dtype for key, x in out.items()}
    assert calls


@pytest.mark.parametrize("autocast", [None, torch.float16])
def test_limit_of_a_probability_is_that_of_float32(autocast: torch.dtype | None) -> None:
    """An empty response has p = 1, and log(1 - p) a limit that depends on the dtype: float64's definition is no judge of it, and
    one that autocast rounds to float16 gives 0."""
    d = Draw(5, 0, [torch.float32])
    tensors = {"input": d.normal((1, 3)), "linear_weight": d.normal((8, 3)), "target": d.integers((1,), 0, 8)}
    tensors["cu_seqlens"] = torch.tensor([0, 0, 1], dtype=torch.int64)
    head = ("input", "linear_weight")
    case = Case("linear_orpo_loss", tensors, {"token_metrics": False}, head, head=head)
    assert judge(case, How(autocast=autocast, asking=head)) == Verdict("right")


@pytest.mark.parametrize(("gap", "state"), [(2.0**-22, "right"), (0.25, "wrong")])
def test_either_token_of_a_near_tie_is_right(monkeypatch: pytest.MonkeyPatch, gap: float, state: str) -> None:
    """A kernel that takes the other one of two tokens at the quantile of their entropies."""
    tensors = {
        "logprobs": torch.tensor([[-1.0, -2.0]]),
        "old_logprobs": torch.tensor([[-1.5, -2.5]]),
        "advantages": torch.tensor([[1.0, -3.0]]),
        "entropy": torch.tensor([[1.0, 1.0 + gap]]),
    }
    case = Case("policy_loss", tensors, {"mask": None, "top_entropy_quantile": 0.5}, ("logprobs",))
    right = fastloss.policy_loss

    def other(*args, entropy, backend="auto", **options):
        entropy = entropy if backend == "reference" else entropy.flip(-1)
        return right(*args, entropy=entropy, backend=backend, **options)

    assert judge(case, How(asking=case.leaves)).state == "right"
    monkeypatch.setattr(fastloss, "policy_loss", other)
    assert judge(case, How(asking=case.leaves)).state == state


@pytest.mark.parametrize(("shift", "state"), [(0.0, "right"), (0.01, "wrong")])
def test_a_bias_that_autocast_does_not_round_is_right(
    monkeypatch: pytest.MonkeyPatch, shift: float, state: str
) -> None:
    """bfloat16 has steps of 4 at 1000: of two classes that are 0.2 apart it makes 4, and of the ratio a tenth."""
    d = Draw(5, 0, [torch.float32])
    head = ("input", "linear_weight", "linear_bias")
    tensors = {"input": d.normal((1, 1, 3), 0.01), "linear_weight": d.normal((22, 3), 0.01)}
    tensors["linear_bias"] = torch.full((22,), 1002.1).index_fill(0, torch.tensor(0), 1001.9)
    tensors |= {"target": torch.zeros(1, 1, dtype=torch.int64), "old_logprobs": torch.full((1, 1), -0.25)}
    tensors["advantages"] = torch.ones(1)
    case = Case("linear_policy_loss", tensors, {"mask": None}, head, head=head)
    right = fastloss.linear_policy_loss

    def shifted(*args, old_logprobs, backend="auto", **options):
        old_logprobs = old_logprobs if backend == "reference" else old_logprobs - shift
        return right(*args, old_logprobs=old_logprobs, backend=backend, **options)

    monkeypatch.setattr(fastloss, "linear_policy_loss", shifted)
    assert judge(case, How(autocast=torch.bfloat16, asking=head)).state == state


@pytest.mark.parametrize(("second", "state"), [(4.34375, "right"), (1.0, "wrong")])
def test_tie_within_rounding_is_no_fault(second: float, state: str) -> None:
    """tanh makes 1 of 47.75 / 0.5 and, within rounding, of 4.34375 / 0.5; not of 1 / 0.5."""
    logits = torch.tensor([[47.75, second, -53.5]], dtype=torch.float32)
    options = {"softcap": 0.5, "outputs": ("is_top1",)}
    case = Case("token_stats", {"logits": logits, "target": torch.tensor([1])}, options, ("logits",))
    exact = {"out.is_top1": torch.zeros(1, dtype=torch.bool)}
    got = {"out.is_top1": torch.ones(1, dtype=torch.bool)}
    assert compare(case, How(), exact, got).state == state
