"""policy_loss of every backend against the definition in float64: values, statistics, gradients, edges."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from backends_under_test import DEVICE, KERNELS, contract
from instruction_sets import ISAS, forced
from torch import Tensor

from fastloss.engine.contract import PolicyInputs
from fastloss.engine.native import CudaContext, NativeBackend
from fastloss.engine.sequences import Sequences
from fastloss.tables import (
    AGGREGATIONS,
    CORRECTIONS,
    KL_KINDS,
    LEVELS,
    POLICY_PLACE,
    SURROGATES,
    PolicyOptions,
)

NAN, INF = float("nan"), float("inf")
COUNTS = [POLICY_PLACE[name] for name in ("tokens", "low_clipped", "high_clipped", "dual_clipped", "cut")]
EXTREMES = [POLICY_PLACE[name] for name in ("min_ratio", "max_ratio")]
PER_TOKEN = ("logprobs", "old", "advantages", "ref", "entropy", "sampler", "token_weight", "share")
EVERYTHING = ("old", "ref", "entropy", "sampler", "token_weight", "select")
LENGTHS = (5, 0, 1, 300, 37, 64)
FEW = (5, 0, 21)  # for kernels that are interpreted or emulated here


def make_batch(
    *,
    lengths: tuple[int, ...] = LENGTHS,
    packed: bool = True,
    per_token: bool = False,
    given: tuple[str, ...] = EVERYTHING,
    ratio: float = 0.3,
    seed: int = 0,
) -> dict[str, Any]:
    """Flat float64 inputs that float32 holds exactly; masked positions hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    count = len(lengths)
    length = 0 if packed else max(lengths, default=0)
    n = sum(lengths) if packed else count * length

    def normal(size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size, generator=generator)).double()

    mask = torch.rand(n, generator=generator) < 0.8
    if not packed:
        inside = torch.arange(length) < torch.tensor(lengths, dtype=torch.long)[:, None]
        mask &= inside.reshape(-1)
    logprobs = (-normal(n).abs() - 0.1).float().double()
    batch: dict[str, Any] = {
        "logprobs": logprobs,
        "old": (logprobs + normal(n, ratio)).float().double(),
        "advantages": normal(n if per_token else count),
        "mask": mask,
        "ref": (logprobs + normal(n, ratio)).float().double(),
        "entropy": normal(n).abs(),
        "sampler": (logprobs + normal(n, ratio)).float().double(),
        "token_weight": normal(n).abs(),
        "select": torch.rand(n, generator=generator) < 0.3,
        "share": normal(n).abs(),
    }
    for name in PER_TOKEN:
        if len(batch[name]) == n and (name != "advantages" or per_token):
            batch[name] = torch.where(mask, batch[name], NAN)
    batch["share"] = torch.where(mask, batch["share"], 0)
    for name in set(EVERYTHING) | {"share"}:
        if name not in given:
            batch[name] = None
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    return {**batch, "offsets": offsets if packed else None, "length": length, "count": count}


def called(backend: str, batch: dict[str, Any], options: PolicyOptions, dtype: torch.dtype) -> Any:
    """policy_loss of the contract on leaves in ``dtype``: (logprobs, entropy, the result)."""

    def moved(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        kind = dtype if x.is_floating_point() else torch.uint8 if x.dtype == torch.bool else x.dtype
        return x.to(DEVICE, kind).contiguous()

    given = {name: moved(x) for name, x in batch.items()}
    logprobs, entropy = given.pop("logprobs"), given.pop("entropy")
    layout = Sequences(
        given.pop("offsets"), given.pop("length"), given.pop("count"), logprobs.numel(), logprobs.device
    )
    kernels = contract(backend)
    if kernels.differentiable:
        logprobs = logprobs.clone().requires_grad_()
        entropy = None if entropy is None else entropy.clone().requires_grad_()
    return logprobs, entropy, kernels.policy_loss(logprobs, entropy, PolicyInputs(layout, **given), options)


def run(backend: str, batch: dict[str, Any], options: PolicyOptions, dtype: torch.dtype, **more: Any) -> Any:
    _, _, result = called(backend, {**batch, **more}, options, dtype)
    assert torch.equal(result.loss.nan_to_num(7.5), result.out[POLICY_PLACE["loss"]].nan_to_num(7.5))
    found = {"out": result.out, "grad": result.d_logprobs, "grad_entropy": result.d_entropy}
    return {k: v if v is None else v.cpu().double() for k, v in found.items()}


def expected(batch: dict[str, Any], options: PolicyOptions, **more: Any) -> dict[str, Tensor | None]:
    """The definition in float64, and its gradients by autograd: of the unscaled loss, as the kernels'."""
    logprobs, entropy, result = called("reference", {**batch, **more}, options, torch.float64)
    loss, out = result.loss, result.out
    wants_entropy = entropy is not None and options.entropy_coef != 0
    leaves = [logprobs, entropy] if wants_entropy else [logprobs]
    grads = (
        torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else [None] * len(leaves)
    )
    grads = [torch.zeros_like(x) if g is None else g / out[1] for x, g in zip(leaves, grads)]
    found = {"out": out, "grad": grads[0], "grad_entropy": grads[1] if wants_entropy else None}
    return {k: v if v is None else v.detach().cpu() for k, v in found.items()}


def assert_agrees(got: dict[str, Any], want: dict[str, Any], dtype: torch.dtype, note: Any = "") -> None:
    eps = 3e-5 if dtype == torch.float32 else 1e-12
    assert got["out"][COUNTS].tolist() == want["out"][COUNTS].tolist(), note
    for name in ("out", "grad", "grad_entropy"):
        if want[name] is None:
            assert got[name] is None, (name, note)
            continue
        size = float(want[name].abs().max()) if want[name].numel() else 0.0
        atol = eps * (1.0 if name == "out" else 0.1 * size)
        torch.testing.assert_close(
            got[name], want[name].detach(), rtol=eps, atol=atol, msg=lambda m: f"{name} {note}: {m}"
        )


def check(
    backend: str, batch: dict[str, Any], options: PolicyOptions, dtype: torch.dtype, **more: Any
) -> None:
    got = run(backend, batch, options, dtype, **more)
    assert_agrees(got, expected(batch, options, **more), dtype, options)
    assert not bool(got["grad"][~batch["mask"]].any())


# The options that turn beside the surrogate and the level: periods without a common divisor, so that they mix.
KLS = list(itertools.product(range(len(KL_KINDS)), (False, True), (0.7,))) + [(2, False, 0.0)]
CORRECTED = [
    {"correction": c, "cap": cap, "floor": floor}
    for c, (cap, floor) in itertools.product(range(len(CORRECTIONS)), [(1.2, 0.8), (1.1, 0.0)])
]
CLIPS = [
    {"clip_high": 0.25},
    {"dual_clip": 1.5},
    {"delta": 1.3, "clip_high": 0.28},
    {"delta": 1.1, "dual_clip": 1.2},
]
BOUNDS = [{"off_policy_threshold": INF}, {"off_policy_threshold": 0.01}, {"off_policy_threshold": -0.05}]
MIXED = [EVERYTHING, ("old", "ref"), (), ("old", "sampler", "entropy"), (*EVERYTHING, "share")]


def options_of(surrogate: int, level: int, aggregation: int, turn: int) -> PolicyOptions:
    kl_kind, kl_unbiased, beta = KLS[turn % len(KLS)]
    return PolicyOptions(
        surrogate=surrogate, level=level, aggregation=aggregation, kl_kind=kl_kind, kl_unbiased=kl_unbiased, beta=beta,
        kl_cov_coef=(0.0, 0.5)[turn % 2], entropy_coef=(0.0, 0.1)[turn % 3 > 0], max_length=50.0, cispo_low=0.7,
        cispo_high=1.3, sapo_neg=1.25,
        **{**CORRECTED[turn % len(CORRECTED)], **CLIPS[turn % len(CLIPS)], **BOUNDS[turn % len(BOUNDS)]},
    )  # fmt: skip


def turns(surrogate: int, level: int, steps: int) -> list[tuple[Any, ...]]:
    """(aggregation, packed, advantages per token, what is given, options), all of the first three in each pass."""
    product = itertools.cycle(itertools.product((True, False), range(len(AGGREGATIONS)), (True, False)))
    start = 37 * (level + 4 * surrogate)
    return [
        (packed, per_token, MIXED[turn % len(MIXED)], options_of(surrogate, level, aggregation, turn))
        for turn, (packed, aggregation, per_token) in zip(range(start, start + steps), product)
    ]


@pytest.mark.parametrize("level", range(len(LEVELS)), ids=LEVELS)
@pytest.mark.parametrize("surrogate", range(len(SURROGATES)), ids=SURROGATES)
@pytest.mark.parametrize("backend", KERNELS)
def test_agrees_with_float64(backend: str, surrogate: int, level: int) -> None:
    fast = backend == "cpu" or DEVICE == "cuda"
    lengths, steps = (LENGTHS, 48) if fast else (FEW, 8)
    for packed, per_token, given, options in turns(surrogate, level, steps):
        batch = make_batch(lengths=lengths, packed=packed, per_token=per_token, given=given)
        for dtype in (torch.float32, torch.float64) if backend == "cpu" else (torch.float32,):
            check(backend, batch, options, dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_isa(isa: str, dtype: torch.dtype) -> None:
    with forced(isa):
        for surrogate, level in itertools.product(range(len(SURROGATES)), range(len(LEVELS))):
            for packed, per_token, given, options in turns(surrogate, level, 8):
                check("cpu", make_batch(packed=packed, per_token=per_token, given=given), options, dtype)


@pytest.mark.parametrize("correction", range(len(CORRECTIONS)), ids=CORRECTIONS)
@pytest.mark.parametrize("backend", KERNELS)
def test_kl_and_corrections_on_every_surrogate(backend: str, correction: int) -> None:
    batch = make_batch(lengths=FEW, ratio=1.0, seed=1)
    both = itertools.product(range(len(SURROGATES)), range(len(KL_KINDS)))
    fast = backend == "cpu" or DEVICE == "cuda"
    for surrogate, kl_kind in both if fast else zip(range(len(SURROGATES)), (0, 1, 2, 3, 4, correction)):
        options = PolicyOptions(
            surrogate=surrogate, kl_kind=kl_kind, beta=0.3, correction=correction, cap=1.5, floor=0.5,
            kl_unbiased=surrogate % 2 == 0, aggregation=2,
        )  # fmt: skip
        check(backend, batch, options, torch.float32)


@pytest.mark.parametrize("backend", KERNELS)
def test_shares_given_for_a_long_run(backend: str) -> None:
    """Beyond one run of 4096 tokens, whatever the sequences are."""
    batch = make_batch(lengths=(4500, 3000), per_token=True, given=(*EVERYTHING, "share"))
    options = PolicyOptions(beta=0.1, correction=1, cap=1.2, aggregation=2)
    check(backend, batch, options, torch.float32)
    nowhere = {**batch, "offsets": None, "length": 0, "count": 0}
    got, want = (run(backend, b, options, torch.float32) for b in (nowhere, batch))
    assert torch.equal(got["grad"], want["grad"]) and torch.equal(got["out"], want["out"])


@pytest.mark.parametrize("aggregation", range(len(AGGREGATIONS)), ids=AGGREGATIONS)
@pytest.mark.parametrize("backend", KERNELS)
def test_normalizer(backend: str, aggregation: int) -> None:
    for given in (("old",), ("old", "share")):
        batch = make_batch(lengths=FEW, given=given)
        options = PolicyOptions(aggregation=aggregation, max_length=50.0)
        for normalizer in (77.0, 0.5, torch.tensor([1234.5], dtype=torch.float64)):
            check(backend, batch, options, torch.float32, normalizer=normalizer)


@pytest.mark.parametrize("backend", KERNELS)
def test_extreme_log_ratios_are_finite(backend: str) -> None:
    batch = make_batch(lengths=(3, 2, 40), per_token=True, seed=3)
    sign = torch.arange(len(batch["mask"])) % 3 - 1.0
    for name in ("old", "ref", "sampler"):
        batch[name] = (batch[name] + 1e4 * sign).float().double()
        sign = sign.roll(1)
    for surrogate, level in itertools.product(range(len(SURROGATES)), range(len(LEVELS))):
        if backend != "cpu" and (surrogate + level) % 3:
            continue
        options = PolicyOptions(
            surrogate=surrogate, level=level, beta=0.1, kl_kind=2 + 2 * (level % 2), correction=1 + level,
            kl_unbiased=level == 0, aggregation=2, delta=4.0, dual_clip=3.0, kl_cov_coef=1.0,
        )  # fmt: skip
        got = run(backend, batch, options, torch.float32)
        assert all(got[k].isfinite().all() for k in ("out", "grad")), options
        want = expected(batch, options)
        # A sum of ±1e4 and small numbers keeps three decimals of them in float32.
        torch.testing.assert_close(got["out"], want["out"], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(got["grad"], want["grad"], rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("level", range(len(LEVELS)), ids=LEVELS)
@pytest.mark.parametrize("backend", KERNELS)
def test_nothing_unmasked(backend: str, level: int) -> None:
    for lengths, packed in (((), True), ((0, 0), True), ((0, 0), False), ((4, 9), True), ((1,), False)):
        batch = make_batch(lengths=lengths, packed=packed)
        batch["mask"] = torch.zeros_like(batch["mask"])
        for name in PER_TOKEN:
            if batch[name] is not None and name != "advantages":
                batch[name] = torch.full_like(batch[name], NAN)
        for aggregation in range(len(AGGREGATIONS)):
            options = PolicyOptions(
                level=level, aggregation=aggregation, beta=0.1, entropy_coef=0.1, max_length=50.0
            )
            got = run(backend, batch, options, torch.float32)
            assert not got["grad"].any() and not got["grad_entropy"].any()
            divisor = (1, 1, 1, 50)[aggregation] if aggregation in (0, 3) else 1
            if aggregation:
                divisor *= max(len(lengths), 1)
            if batch["mask"].numel():  # of no position at all the scale multiplies nothing
                assert float(got["out"][1]) == pytest.approx(1 / divisor)
            assert got["out"][EXTREMES].tolist() == [1, 1]
            assert not got["out"][[0, *range(2, 10), *range(12, 16)]].any()


@pytest.mark.parametrize("backend", KERNELS)
def test_on_policy_ratio_is_exactly_one(backend: str) -> None:
    """bugs: old log-probs that are the log-probs give a ratio of exactly 1, given or left out."""
    batch = make_batch(lengths=FEW, given=("old",))
    batch["old"] = batch["logprobs"].clone()
    for level in range(len(LEVELS)):
        for old in (batch["old"], None):
            got = run(backend, {**batch, "old": old}, PolicyOptions(level=level), torch.float32)
            assert got["out"][EXTREMES].tolist() == [1, 1]
            assert got["out"][12] == got["out"][2] and not got["out"][[3, 4, 6, 7]].any()


@pytest.mark.parametrize("backend", KERNELS)
def test_a_nan_in_an_unmasked_token_shows_in_the_loss(backend: str) -> None:
    batch = make_batch(lengths=(3, 20), packed=True, given=("old",))
    token = int(batch["mask"].nonzero()[-1])
    for surrogate in (0, 1, 2, 3, 5):
        bad = {**batch, "logprobs": batch["logprobs"].clone()}
        bad["logprobs"][token] = NAN
        got = run(backend, bad, PolicyOptions(surrogate=surrogate), torch.float32)
        clean = run(backend, batch, PolicyOptions(surrogate=surrogate), torch.float32)
        assert got["out"][0].isnan()
        want = expected(bad, PolicyOptions(surrogate=surrogate))["grad"]  # a NaN is beyond the clamp: slope 0
        torch.testing.assert_close(got["grad"], want, rtol=3e-5, atol=1e-6, equal_nan=True)
        others = torch.arange(len(batch["mask"])) != token
        assert torch.equal(got["grad"][others], clean["grad"][others])


@pytest.mark.parametrize("backend", KERNELS)
def test_same_bits_again(backend: str) -> None:
    batch = make_batch(per_token=True, lengths=FEW)
    options = PolicyOptions(level=1, beta=0.1, correction=3, cap=1.2)
    first, second = (run(backend, batch, options, torch.float32) for _ in range(2))
    assert torch.equal(first["grad"], second["grad"]) and torch.equal(first["out"], second["out"])


def test_no_ticket_outlives_its_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile warms up in the memory pool of a CUDA graph: what a call keeps there is the next graph's memory too."""
    backend = contract("cuda")
    assert isinstance(backend, NativeBackend)
    batch, options = make_batch(per_token=True, lengths=FEW), PolicyOptions(beta=0.1)
    want = run("cuda", batch, options, torch.float32)
    tickets: list[Tensor] = []
    make = backend.context.ticket

    def ticket(tensor: Tensor) -> Tensor | None:
        for earlier in tickets:
            earlier.fill_(77)  # the next graph's numbers
        made = make(tensor)
        assert made is not None
        tickets.append(made)
        return made

    monkeypatch.setattr(backend.context, "ticket", ticket)
    for _ in range(2):
        got = run("cuda", batch, options, torch.float32)
        assert torch.equal(got["out"], want["out"])
    x = torch.zeros(1, device=DEVICE)
    mine, other = CudaContext().ticket(x), CudaContext().ticket(x)
    assert mine is not None and other is not None
    assert mine.data_ptr() != other.data_ptr() and not (mine.any() or other.any())
    context = CudaContext()
    context.ticket(x)
    assert not any(isinstance(kept, (Tensor, dict, list)) for kept in vars(context).values())


def test_threads_change_no_bit() -> None:
    """bugs: a result that depends on the number of threads."""
    before = torch.get_num_threads()
    options = PolicyOptions(beta=0.1, correction=1, cap=1.2)
    for per_token, given in ((False, EVERYTHING), (True, (*EVERYTHING, "share"))):
        batch = make_batch(lengths=(4000, 1, 9000, 37, 30000), per_token=per_token, given=given)
        results = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(run("cpu", batch, options, torch.float32))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert torch.equal(results[0]["grad"], other["grad"])
            assert torch.equal(results[0]["out"], other["out"])


@pytest.mark.parametrize("backend", KERNELS)
def test_k3_keeps_its_digits_near_zero(backend: str) -> None:
    delta = torch.logspace(-5, 0, 16).double() * (1 - 2 * (torch.arange(16) % 2))
    batch = make_batch(lengths=(1,) * 16, per_token=True, given=("ref", "old"))
    mask = torch.ones(16, dtype=torch.bool)
    batch |= {"logprobs": 0 * delta, "ref": delta, "old": -delta, "advantages": 0 * delta, "mask": mask}
    for i in range(16):
        one = batch | {"mask": torch.arange(16) == i}
        out = run(backend, one, PolicyOptions(beta=1.0), torch.float32)["out"]
        want = math.expm1(delta[i]) - float(delta[i])
        if abs(delta[i]) < 1e-3:  # the float64 expression itself has lost some
            want = float(delta[i] ** 2 / 2 + delta[i] ** 3 / 6)
        assert float(out[7]) == pytest.approx(want, rel=1e-6)
        assert float(out[8]) == pytest.approx(want, rel=1e-6)
        if backend != "cpu" and i >= 8:
            break
