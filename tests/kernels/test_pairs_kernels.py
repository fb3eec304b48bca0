"""The kernels of docs/sequences.md for pairs and single responses, on every backend against the definition in float64 and its autograd."""

from __future__ import annotations

import importlib
import importlib.util
import math
from typing import Any

import pytest
import torch
from backends_under_test import DEVICE, KERNELS, contract, need
from torch import Tensor

from fastloss.engine.contract import Backend
from fastloss.engine.sequences import Sequences
from fastloss.tables import (
    DIVERGENCES,
    MAX_TERMS,
    PAIR_TERMS,
    UNPAIRED_TERMS,
    PairConstants,
    PairOptions,
    UnpairedConstants,
    UnpairedOptions,
)

CASES = [(backend, torch.float32) for backend in KERNELS] + [("cpu", torch.float64)] * ("cpu" in KERNELS)
IDS = [f"{backend}-{str(dtype).removeprefix('torch.')}" for backend, dtype in CASES]
TERMS = range(len(PAIR_TERMS))
NAMES = list(PAIR_TERMS)
SFT, HINGE, ORPO = NAMES.index("sft"), NAMES.index("hinge"), NAMES.index("orpo")
OF_SCORES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "robust",
    "discopop",
    "sigmoid_norm",
)  # the rest reads log-ratios
NAN = float("nan")
# The fields of the contract's records, as the inputs below name them.
CONSTANTS = {
    "rc": "ref_chosen",
    "rr": "ref_rejected",
    "lc": "chosen_lengths",
    "lr": "rejected_lengths",
    "weight": "weight",
}
GRADIENTS = {"d_chosen": "d_c", "d_rejected": "d_r", "d_nll": "d_nll", "d_logps": "d"}
backends = pytest.mark.parametrize(("backend", "dtype"), CASES, ids=IDS)


def logps(n: int, dtype: torch.dtype, scale: float = 8.0) -> Tensor:
    return -(scale * torch.rand(n, dtype=torch.float64) + 0.05).to(dtype).to(DEVICE)


def pair_inputs(n: int, dtype: torch.dtype, which: str) -> dict[str, Any]:
    """Numbers alone; with a reference and lengths; with everything, one per pair."""
    given: dict[str, Any] = {"c": logps(n, dtype), "r": logps(n, dtype)}
    numbers = {"beta": 0.3, "smoothing": 0.1, "margin": 0.2, "delta": 0.15, "tau": 0.4, "alpha": 0.4}
    if which == "plain":
        return given | numbers
    length = lambda: torch.randint(0, 6, (n,)).to(dtype).to(DEVICE)
    given |= {"rc": logps(n, dtype), "rr": logps(n, dtype), "lc": length(), "lr": length()}
    if which == "lengths":
        return given | numbers | {"average_rewards": True, "alpha": 1.7}
    uniform = lambda low, high: (low + (high - low) * torch.rand(n, dtype=torch.float64)).to(dtype).to(DEVICE)
    return given | numbers | {
        "nll": logps(n, dtype), "beta": uniform(0.05, 0.9), "smoothing": uniform(0.01, 0.45),
        "margin": uniform(-1, 1), "weight": uniform(0, 2), "delta": 0.25,
    }  # fmt: skip


def wide(value: Any, dtype: torch.dtype = torch.float64) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def pairs_by(kernels: Backend, given: dict[str, Any]) -> dict[str, Any]:
    """pair_loss of the contract, its options and constants taken from one dict."""
    given = dict(given)
    c, r, nll = given.pop("c"), given.pop("r"), given.pop("nll", None)
    constants = PairConstants(**{field: given.pop(name, None) for name, field in CONSTANTS.items()})
    options = PairOptions(terms=tuple(given.pop("terms")), **given)
    result = kernels.pair_loss(c, r, nll, constants, options)
    return {GRADIENTS.get(name, name): value for name, value in result._asdict().items()}


def unpaired_by(kernels: Backend, given: dict[str, Any]) -> dict[str, Any]:
    given = dict(given)
    x, fields = given.pop("logps"), ("desirable", "ref", "weight", "kl")
    constants = UnpairedConstants(**{name: given.pop(name) for name in fields if name in given})
    result = kernels.unpaired_loss(x, constants, UnpairedOptions(**given))
    return {GRADIENTS.get(name, name): value for name, value in result._asdict().items()}


def defined(given: dict[str, Any], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The definition of pair_loss or unpaired_loss in ``dtype``, with the gradients of the sum of its losses."""
    given = {name: wide(value, dtype) for name, value in given.items()}
    function = unpaired_by if "logps" in given else pairs_by
    leaves = {}
    for name, gradient in (("c", "d_c"), ("r", "d_r"), ("nll", "d_nll"), ("logps", "d")):
        if given.get(name) is not None:
            given[name] = leaves[gradient] = given[name].detach().requires_grad_()
    out = function(contract("reference"), given)
    grads = torch.autograd.grad(
        out["loss"].sum() + 0 * sum(leaf.sum() for leaf in leaves.values()), list(leaves.values())
    )
    values = {name: value.detach() for name, value in out.items() if value is not None}
    return values | dict(zip(leaves, grads, strict=True))


def worst(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).abs().max()) if actual.numel() else 0.0


def check(backend: str, given: dict[str, Any], out: dict[str, Any]) -> None:
    """The CPU computes in double: half a unit of float32, and of float64 the definition's own rounding. On a GPU: eager's
    error, or a few units."""
    dtype = out["loss"].dtype
    expected, eager = defined(given), defined(given, torch.float32)
    for name, value in expected.items():
        assert out[name].dtype == dtype and out[name].shape == value.shape, name
        size = float(value.abs().max()) if value.numel() else 0.0
        unit = torch.finfo(dtype).eps
        if backend == "cpu":
            bound = (256 if dtype == torch.float64 else 0.51) * unit * max(size, 1.0)
        else:
            bound = max(2 * worst(eager[name], value), 4 * unit * max(size, 0.1))
        assert worst(out[name], value) <= bound, name
    assert out.get("d_nll") is None or "d_nll" in expected


def pair_loss(backend: str, given: dict[str, Any]) -> dict[str, Any]:
    return pairs_by(contract(backend), given)


@pytest.mark.parametrize("which", ["plain", "lengths", "all"])
@pytest.mark.parametrize("code", TERMS, ids=NAMES)
@backends
def test_term(backend: str, dtype: torch.dtype, code: int, which: str) -> None:
    for divergence in range(len(DIVERGENCES)) if NAMES[code] in OF_SCORES else [0]:
        given = pair_inputs(37, dtype, which) | {"terms": [(code, 1.0)], "divergence": divergence}
        check(backend, given, pair_loss(backend, given))


@backends
def test_eight_terms_at_once(backend: str, dtype: torch.dtype) -> None:
    for codes in (TERMS[k : k + MAX_TERMS] for k in range(0, len(TERMS), MAX_TERMS)):
        given = pair_inputs(300, dtype, "all") | {"terms": [(code, 0.3 + 0.1 * code) for code in codes]}
        check(backend, given, pair_loss(backend, given))


@pytest.mark.parametrize("n", [0, 1, 2, 129])
@backends
def test_sizes(backend: str, dtype: torch.dtype, n: int) -> None:
    for which in ("plain", "all"):
        given = pair_inputs(n, dtype, which) | {"terms": [(0, 1.0), (SFT, 0.5)]}
        out = pair_loss(backend, given)
        if n:
            check(backend, given, out)
        assert out["sums"].shape == (7,) and (n > 0 or bool((out["sums"] == 0).all()))


@backends
def test_sums_are_those_of_float64(backend: str, dtype: torch.dtype) -> None:
    given = pair_inputs(1000, dtype, "all") | {"terms": [(0, 1.0)]}
    out = pair_loss(backend, given)
    rtol = torch.finfo(dtype).eps * (8 if dtype == torch.float64 else 1)
    exact = torch.stack([out["loss"].double().sum(), given["c"].double().sum(), given["r"].double().sum()])
    torch.testing.assert_close(out["sums"][[0, 5, 6]].double(), exact, rtol=rtol, atol=0)
    assert out["sums"][3] == (out["chosen_reward"] > out["rejected_reward"]).sum()


@backends
def test_slope_at_the_kink_and_equal_pairs(backend: str, dtype: torch.dtype) -> None:
    c = torch.full((2,), -1.0, dtype=dtype, device=DEVICE)
    at_kink = {"c": c, "r": c - 2, "beta": 0.5, "terms": [(HINGE, 1.0)]}  # u = 1
    out = pair_loss(backend, at_kink)
    assert bool((out["loss"] == 0).all() and (out["d_c"] == 0).all() and (out["d_r"] == 0).all())
    out = pair_loss(backend, {"c": c, "r": c.clone(), "beta": 0.5, "terms": [(0, 1.0)]})
    torch.testing.assert_close(out["loss"], torch.full_like(c, math.log(2)))
    assert out["sums"][3] == 0  # a tie is not a win


@pytest.mark.parametrize("code", TERMS, ids=NAMES)
@backends
def test_extreme_log_ratios_are_finite(backend: str, dtype: torch.dtype, code: int) -> None:
    far = torch.tensor([-1e4, -1e4, -1e-9, -1e-9, 0.0, -2.0], dtype=dtype, device=DEVICE)
    near = torch.tensor([-1e-9, -1e4, -1e4, 0.0, 0.0, -2.0], dtype=dtype, device=DEVICE)
    for divergence in range(len(DIVERGENCES)):
        given = {"c": far, "r": near, "terms": [(code, 1.0)], "divergence": divergence, "beta": 0.1}
        given |= {"smoothing": 0.1, "alpha": 0.5, "delta": 0.3}
        out = pair_loss(backend, given)
        # The square of a clamped exponential is not finite in float32.
        square = NAMES[code] == "ipo" and divergence in (1, 3) and dtype == torch.float32
        for name in ("d_c", "d_r", "chosen_reward", "rejected_reward") + ("loss",) * (not square):
            assert bool(out[name].isfinite().all()), (name, divergence)
        # log1mexp's limit is the dtype's own.
        expected = defined(given, dtype if code == ORPO else torch.float64)
        for name in ("loss", "d_c", "d_r"):
            finite = expected[name].abs() < 1e30
            torch.testing.assert_close(
                out[name].double()[finite], expected[name].double()[finite], rtol=3e-6, atol=3e-6
            )


@backends
def test_lengths_of_zero(backend: str, dtype: torch.dtype) -> None:
    none = torch.zeros(3, dtype=dtype, device=DEVICE)
    given = {"c": none, "r": none - 1, "lc": none, "lr": none, "terms": [(SFT, 1.0)], "average_rewards": True}
    out = pair_loss(backend, given)
    assert bool((out["loss"] == 0).all() and (out["d_c"] == 0).all())
    ones = given | {"lc": none + 1, "lr": none + 1}
    for code in (*range(SFT), *range(SFT + 1, len(NAMES))):
        term = {"terms": [(code, 1.0)], "smoothing": 0.1}
        left, right = pair_loss(backend, given | term), pair_loss(backend, ones | term)
        for name in ("loss", "d_c", "d_r", "chosen_reward", "rejected_reward", "sums"):
            assert torch.equal(left[name], right[name]), (code, name)


@backends
def test_limit_of_the_alpha_divergence(backend: str, dtype: torch.dtype) -> None:
    given = pair_inputs(9, dtype, "lengths") | {"terms": [(0, 1.0)]}
    reverse = pair_loss(backend, given)
    limit = pair_loss(backend, given | {"divergence": 3, "alpha": 1.0})
    assert torch.equal(reverse["loss"], limit["loss"]) and torch.equal(reverse["d_c"], limit["d_c"])


@backends
def test_nan_stays_in_its_pair(backend: str, dtype: torch.dtype) -> None:
    given = pair_inputs(5, dtype, "plain")
    for code in TERMS:
        given["terms"] = [(code, 1.0)]
        clean = pair_loss(backend, given)
        for name in ("c", "r"):
            broken = given[name].clone()
            broken[2] = NAN
            out = pair_loss(backend, given | {name: broken})
            assert bool(out["loss"][2].isnan()) or (code == SFT and name == "r"), (code, name)
            others = [0, 1, 3, 4]
            assert torch.equal(out["loss"][others], clean["loss"][others])


@backends
def test_same_bits_every_time_and_in_every_batch(backend: str, dtype: torch.dtype) -> None:
    given = pair_inputs(200, dtype, "all") | {"terms": [(0, 1.0), (ORPO, 0.2)]}
    out, again = pair_loss(backend, given), pair_loss(backend, given)
    alone = pair_loss(
        backend,
        {k: v[7:8].clone() if isinstance(v, Tensor) and len(v) == 200 else v for k, v in given.items()},
    )
    for name, value in out.items():
        assert torch.equal(value, again[name]), name
        assert name == "sums" or torch.equal(value[7:8], alone[name]), name


@pytest.mark.parametrize("code", range(3), ids=UNPAIRED_TERMS)
@pytest.mark.parametrize("n", [0, 1, 37, 300])
@backends
def test_unpaired(backend: str, dtype: torch.dtype, n: int, code: int) -> None:
    kernels = contract(backend)
    given: dict[str, Any] = {"logps": logps(n, dtype), "term": code, "beta": 0.3}
    given["desirable"] = torch.randint(0, 2, (n,), dtype=torch.uint8).to(DEVICE)
    optional = {
        "ref": logps(n, dtype), "weight": torch.rand(n, dtype=dtype, device=DEVICE),
        "kl": torch.full((1,), 0.4, dtype=dtype, device=DEVICE), "desirable_weight": 1.3, "undesirable_weight": 0.7,
    }  # fmt: skip
    for arguments in (given, given | optional):
        out = unpaired_by(kernels, arguments)
        if n:
            check(backend, arguments, out)
        assert out["sums"].shape == (7,) and out["sums"][1] == given["desirable"].sum()


@backends
def test_unpaired_extremes(backend: str, dtype: torch.dtype) -> None:
    x = torch.tensor([-1e4, -1e4, 1e4, 1e4, 0.0], dtype=dtype, device=DEVICE)
    desirable = torch.tensor([0, 1, 0, 1, 1], dtype=torch.uint8, device=DEVICE)
    for code in range(3):
        given = {"logps": x, "desirable": desirable, "term": code, "beta": 0.5}
        out = unpaired_by(contract(backend), given)
        for name in ("loss", "d", "reward", "sums"):
            assert bool(out[name].isfinite().all()), (code, name)
        check(backend, given, out)


LENGTHS = (0, 1, 7, 8, 9, 0, 33, 1000, 3, 2500)


def packed(offsets: Tensor, n: int) -> Sequences:
    return Sequences(offsets, 0, offsets.numel() - 1, n, offsets.device)


def padded(count: int, length: int) -> Sequences:
    return Sequences(None, length, count, count * length, torch.device(DEVICE))


def tokens(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Packed values, weights with zeros (and NaN under them), offsets."""
    n = sum(LENGTHS)
    values, weights = logps(n, dtype), torch.rand(n, dtype=dtype, device=DEVICE)
    weights[torch.rand(n, device=DEVICE) < 0.3] = 0
    values[weights == 0] = NAN
    offsets = torch.tensor([0, *LENGTHS], device=DEVICE).cumsum(0)
    return values, weights, offsets


def summed(values: Tensor, weights: Tensor | None, layout: Sequences) -> Tensor:
    """By the definition, in float64."""
    return contract("reference").segment_sum(wide(values), wide(weights), layout)


@backends
def test_segment_sum(backend: str, dtype: torch.dtype) -> None:
    kernels = contract(backend)
    values, weights, offsets = tokens(dtype)
    clean = values.nan_to_num(-1.0)
    rtol = torch.finfo(dtype).eps * (8 if dtype == torch.float64 else 1)
    for v, w in ((values, weights), (clean, None)):
        out = kernels.segment_sum(v, w, packed(offsets, len(v)))
        expected = summed(v, w, packed(offsets, len(v)))
        torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=0)
        assert out[0] == 0 and out[5] == 0
        v, w = v[:3500], None if w is None else w[:3500]
        expected = summed(v, w, padded(5, 700))
        out = kernels.segment_sum(v, w, padded(5, 700))
        torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=0)
    assert kernels.segment_sum(clean[:0], None, packed(offsets[:1], 0)).shape == (0,)


@backends
def test_segment_sum_depends_on_its_own_sequence_alone(backend: str, dtype: torch.dtype) -> None:
    kernels = contract(backend)
    values, weights, offsets = tokens(dtype)
    together = kernels.segment_sum(values, weights, packed(offsets, len(values)))
    assert torch.equal(together, kernels.segment_sum(values, weights, packed(offsets, len(values))))
    for s in (3, 6, 9):
        own = slice(int(offsets[s]), int(offsets[s + 1]))
        alone = kernels.segment_sum(values[own].clone(), weights[own].clone(), padded(1, LENGTHS[s]))
        assert torch.equal(alone[0], together[s])


@pytest.mark.skipif("cpu" not in KERNELS, reason="threads of the CPU backend")
def test_segment_sum_on_many_threads() -> None:
    kernels = contract("cpu")
    values, layout = logps(200_000, torch.float32), packed(torch.arange(0, 200_001, 1000), 200_000)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 4):
            torch.set_num_threads(threads)
            results.append(kernels.segment_sum(values, None, layout))
            results.append(kernels.segment_expand(results[0], None, layout))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


@backends
def test_segment_expand(backend: str, dtype: torch.dtype) -> None:
    kernels = contract(backend)
    _, weights, offsets = tokens(dtype)
    n, lengths = sum(LENGTHS), torch.tensor(LENGTHS, device=DEVICE)
    upstream = torch.randn(len(LENGTHS), dtype=dtype, device=DEVICE)
    spread = upstream.repeat_interleave(lengths)
    assert torch.equal(kernels.segment_expand(upstream, None, packed(offsets, n)), spread)
    assert torch.equal(kernels.segment_expand(upstream, weights, packed(offsets, n)), weights * spread)
    rows = kernels.segment_expand(upstream[:5], weights[:3500], padded(5, 700))
    assert torch.equal(rows, weights[:3500] * upstream[:5].repeat_interleave(700))
    # What lies outside all sequences, and what has no weight, gets no gradient, whatever the upstream gradient is.
    outside = kernels.segment_expand(upstream, None, packed(offsets + 3, n + 10))
    assert torch.equal(outside, torch.nn.functional.pad(spread, (3, 7)))
    upstream[3] = NAN
    out = kernels.segment_expand(upstream, weights, packed(offsets, n))
    assert bool((out[weights == 0] == 0).all())
    assert kernels.segment_expand(upstream[:0], None, packed(offsets[:1], 0)).shape == (0,)


@pytest.mark.parametrize("backend", KERNELS)
def test_more_terms_than_a_kernel_takes(backend: str) -> None:
    x = torch.zeros(2, device=DEVICE)
    with pytest.raises(ValueError, match="expected"):
        pairs_by(contract(backend), {"c": x, "r": x, "terms": [(0, 1.0)] * (MAX_TERMS + 1)})


def test_exact_functions_of_triton() -> None:
    """exp, expm1, log, log1p within 2 units in the last place of float64's."""
    pytest.importorskip("triton")
    need("triton")
    functions = importlib.import_module("exact_functions")
    spread = torch.cat(
        [torch.linspace(-86.9, 87.9, 20001), torch.linspace(-1.5, 1.5, 20001), torch.tensor([0.0])]
    )
    small = torch.cat([torch.linspace(-0.5, 1.0, 20001), 10 ** torch.linspace(-30, 0, 2001)])
    positive = torch.cat([torch.linspace(0.5, 2, 20001), 10 ** torch.linspace(-37, 38, 5001)])
    for name, x in (("exp", spread), ("expm1", spread), ("log1p", small), ("log", positive)):
        exact = getattr(torch, name)(x.double())
        unit = torch.from_numpy(importlib.import_module("numpy").spacing(exact.float().abs().numpy()))
        error = (functions.run(name, x.to(DEVICE)).cpu().double() - exact).abs() / unit.double()
        assert float(error.max()) <= 2.0, name
    edges = torch.tensor([-1e4, -88.0, 1e4, NAN], device=DEVICE)
    out = functions.run("exp", edges)
    assert out[:2].tolist() == [0, 0] and bool(out[2] > 1e38) and bool(out[3].isnan())
    assert functions.run("expm1", edges)[:2].tolist() == [-1, -1]
    assert functions.run("log", torch.tensor([0.0], device=DEVICE)).tolist() == [-float("inf")]
