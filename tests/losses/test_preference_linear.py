"""Preference losses from the head: against the same losses from whole logits, and how many GEMMs they take."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from backends_under_test import ALL, DEVICE, KERNELS, need
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastloss

# The CPU's kernels take blocks of the vocabulary, in which no row's logits are held.
BLOCKS = DEVICE == "cpu" and fastloss.backends()["cpu"] == "available"

PAIRS, WIDTH, DIM, VOCAB = 4, 6, 8, 37
LENGTHS = [6, 3, 1, 4, 2, 5, 0, 6]  # tokens with a target, chosen and then rejected


def inputs(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    target = torch.randint(0, VOCAB, (2 * PAIRS, WIDTH), generator=generator)
    for row, length in enumerate(LENGTHS):
        target[row, : WIDTH - length] = -100  # the prompt
    out = {
        "input": random(2 * PAIRS, WIDTH, DIM),
        "linear_weight": random(VOCAB, DIM, scale=0.7),
        "linear_bias": random(VOCAB, scale=0.3),
        "ref_input": random(2 * PAIRS, WIDTH, DIM),
        "ref_weight": random(VOCAB, DIM, scale=0.7),
        "ref_bias": random(VOCAB, scale=0.3),
        "target": target,
        "weights": torch.rand(PAIRS, generator=generator).to(dtype) + 0.5,
        "margin": torch.rand(PAIRS, generator=generator).to(dtype),
        "beta": torch.rand(PAIRS, generator=generator).to(dtype) + 0.1,
    }
    return {name: value.to(DEVICE) for name, value in out.items()}


def logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, scale: float, cap: float | None
) -> Tensor:
    z = torch.nn.functional.linear(hidden, weight, bias).double()
    z = (cap * torch.tanh(z / cap) if cap else z) * scale
    picked = z.log_softmax(-1).gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return picked.masked_fill(target == -100, 0)


def from_logits(x: dict[str, Tensor], options: dict[str, Any], bias: bool, ref: bool) -> Any:
    """The same loss from whole logits, in PyTorch and float64."""
    options = dict(options)
    scale, cap = (
        1 / options.pop("temperature", 1.0) * options.pop("logit_scale", 1.0),
        options.pop("softcap", None),
    )
    options.pop("chunk_size", None)
    args = x["target"], scale, cap
    tokens = logprobs(x["input"], x["linear_weight"], x["linear_bias"] if bias else None, *args)
    given = dict(zip(("chosen_logps", "rejected_logps"), tokens.chunk(2), strict=True))
    if ref:
        fixed = logprobs(x["ref_input"], x["ref_weight"], x["ref_bias"] if bias else None, *args)
        given |= dict(zip(("ref_chosen_logps", "ref_rejected_logps"), fixed.chunk(2), strict=True))
    given |= dict(zip(("chosen_mask", "rejected_mask"), (x["target"] != -100).chunk(2), strict=True))
    if options.pop("use_weighting", False):
        z = torch.nn.functional.linear(
            x["input"], x["linear_weight"], x["linear_bias"] if bias else None
        ).double()
        aligned = tokens - (2 * z.log_softmax(-1)).logsumexp(-1)
        mask = x["target"] != -100
        mean = (aligned * mask).sum(1) / mask.sum(1).clamp(min=1)
        options["weights"] = mean.exp().chunk(2)[0].detach() * mean.exp().chunk(2)[1].detach()
    return fastloss.preference_loss(**given, backend="reference", **options)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"loss_type": "ipo", "temperature": 0.8, "logit_scale": 1.3},
    {"loss_type": ["sigmoid", "sft", "hinge"], "loss_weights": [0.7, 0.5, 1.0], "softcap": 4.0},
    {"ld_alpha": 0.3},
    {"ld_alpha": 0.3, "loss_type": ["sigmoid", "sft"]},
    {"use_weighting": True, "beta": 0.4},
    {"weights": "weights", "margin": "margin", "beta": "beta", "label_smoothing": 0.1},
    {"length_normalized": True, "loss_type": ["sigmoid", "sft"]},
    {"loss_type": "aot"},
    {"reduction": "none"},
    {"reduction": "sum", "loss_type": ["simpo", "sigmoid"]},
    {"loss_type": "apo_zero", "reference_free": True},
    {"loss_type": ["orpo", "sft"], "reference_free": True},
    {"f_divergence_type": "js_divergence"},
]
FEW = OPTIONS[:1] + OPTIONS[2:5] + OPTIONS[6:7]


def linear(
    x: dict[str, Tensor], options: dict[str, Any], backend: str, bias: bool = True, ref: bool = True
) -> Any:
    names = ["input", "linear_weight", "target", *(["linear_bias"] if bias else [])]
    names += ["ref_input", "ref_weight", *(["ref_bias"] if bias else [])] if ref else []
    return fastloss.linear_preference_loss(**{n: x[n] for n in names}, backend=backend, **options)


def pick(options: dict[str, Any], x: dict[str, Tensor]) -> dict[str, Any]:
    return {k: x[v] if isinstance(v, str) and v in x else v for k, v in options.items()}


def with_leaves(x: dict[str, Tensor], names: tuple[str, ...]) -> tuple[dict[str, Tensor], list[Tensor]]:
    leaves = [x[name].detach().clone().requires_grad_() for name in names]
    return {**x, **dict(zip(names, leaves, strict=True))}, leaves


ALL_LEAVES = ("input", "linear_weight", "linear_bias")


def compare(
    backend: str, options: dict[str, Any], chunk_size: int | None, dtype: torch.dtype, frozen: bool
) -> None:
    base = inputs(dtype)
    names = ("input",) if frozen else ALL_LEAVES
    x, leaves = with_leaves(base, names)
    ref = not options.get("reference_free", False)
    got = linear(x, pick(options, x) | {"chunk_size": chunk_size}, backend, ref=ref)
    exact, exact_leaves = with_leaves(
        {k: v.double() if v.is_floating_point() else v for k, v in base.items()}, names
    )
    want = from_logits(exact, pick(options, exact), True, ref)
    up = torch.linspace(0.5, 2, want.loss.numel(), dtype=torch.float64, device=DEVICE).reshape(
        want.loss.shape
    )
    grads = torch.autograd.grad((got.loss * up.to(got.loss.dtype)).sum(), leaves)
    expected = torch.autograd.grad((want.loss * up).sum(), exact_leaves)
    tight = {"rtol": 1e-9, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(got.loss.double(), want.loss.detach(), **tight)
    for name, a, b in zip(names, grads, expected, strict=True):
        torch.testing.assert_close(a.double(), b, **tight, msg=lambda m, n=name: f"{n}: {m}")
    for field in ("chosen_rewards", "rejected_rewards", "chosen_logps", "rejected_logps"):
        torch.testing.assert_close(getattr(got, field).double(), getattr(want, field).double(), **tight)
    for name, value in want.metrics.items():
        torch.testing.assert_close(got.metrics[name].double(), value.double(), **tight)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("backend", "chunk_size"),
    [("reference", None), *((("cpu", None), ("cpu", 12), ("cpu", 3)) if DEVICE == "cpu" else ())],
)
def test_linear_equals_logits(
    options: dict[str, Any], chunk_size: int | None, frozen: bool, backend: str
) -> None:
    """One chunk; whole pairs; a pair longer than the buffer."""
    compare(need(backend), options, chunk_size, torch.float64, frozen)


@pytest.mark.parametrize("options", FEW, ids=str)
@pytest.mark.parametrize("chunk_size", [12, 3])
@pytest.mark.parametrize("backend", KERNELS)
def test_linear_on_every_backend(options: dict[str, Any], chunk_size: int, backend: str) -> None:
    compare(need(backend), options, chunk_size, torch.float32, frozen=False)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_head(backend: str, dtype: torch.dtype) -> None:
    """The weight's gradient is accumulated in float32 (bug 11), float16's coefficients don't underflow (bug 20)."""
    need(backend)
    x, leaves = with_leaves(inputs(dtype), ("input", "linear_weight"))
    loss = linear(x, {"chunk_size": 12}, backend, bias=False).loss
    grads = torch.autograd.grad(loss, leaves)
    exact, exact_leaves = with_leaves(
        {k: v.double() if v.is_floating_point() else v for k, v in x.items()}, ("input", "linear_weight")
    )
    expected = torch.autograd.grad(from_logits(exact, {}, False, True).loss, exact_leaves)
    eps = torch.finfo(dtype).eps
    for a, b in zip(grads, expected, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() <= 8 * eps * b.abs().max()
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_packed_equals_padded(backend: str, chunk_size: int | None) -> None:
    need(backend)
    x = inputs(torch.float32)
    keep = (
        torch.arange(WIDTH, device=DEVICE)[None, :]
        >= torch.tensor([0, 1, 2, 0, 3, 1, 4, 0], device=DEVICE)[:, None]
    )
    assert (keep | (x["target"] == -100)).all()  # parts of the prompts alone are cut away
    offsets = torch.cat(
        [torch.zeros(1, dtype=torch.int32, device=DEVICE), keep.sum(1).cumsum(0).to(torch.int32)]
    )
    options = {"loss_type": ["sigmoid", "ipo"], "ld_alpha": 0.5, "chunk_size": chunk_size}
    padded, leaves = with_leaves(x, ("input", "linear_weight"))
    a = linear(padded, options, backend)
    grads = torch.autograd.grad(a.loss, leaves)
    packed = {n: v[keep] if n in ("input", "ref_input", "target") else v for n, v in x.items()}
    packed, leaves = with_leaves(packed, ("input", "linear_weight"))
    b = linear(packed, {**options, "cu_seqlens": offsets}, backend)
    other = torch.autograd.grad(b.loss, leaves)
    torch.testing.assert_close(a.loss, b.loss)
    torch.testing.assert_close(grads[0][keep], other[0])
    torch.testing.assert_close(grads[1], other[1])
    assert a.metrics.keys() == b.metrics.keys()
    for name in a.metrics:
        torch.testing.assert_close(a.metrics[name], b.metrics[name])


def gemm_flops(
    x: dict[str, Tensor], options: dict[str, Any], names: tuple[str, ...], rows: int, ref: bool = True
) -> float:
    """FLOPs of a step over those of one GEMM of the rows with a target."""
    x, leaves = with_leaves(x, names)
    with FlopCounterMode(display=False) as counter:
        loss = linear(x, options, "cpu", bias=False, ref=ref).loss
        if leaves:
            torch.autograd.grad(loss.sum(), leaves)
    return counter.get_total_flops() / (2 * rows * DIM * VOCAB)


@pytest.mark.skipif(DEVICE != "cpu", reason="the rows are counted on the CPU")
def test_gemms() -> None:
    x, rows, both = inputs(torch.float32), sum(LENGTHS), ("input", "linear_weight")
    free = {"reference_free": True}
    # Blocks of the vocabulary make the logits of those rows again that are past 2 D and a 25th of all.
    again = (rows - 2 * DIM - rows // 25) / rows if BLOCKS else 0
    assert gemm_flops(x, {}, both, rows) == pytest.approx(1 + 3 + again)  # prompts cost nothing
    assert gemm_flops(x, free, both, rows, ref=False) == pytest.approx(3 + again)
    assert gemm_flops(x, free, ("input",), rows, ref=False) == 2
    assert gemm_flops(x, free | {"chunk_size": 3}, ("input",), rows, ref=False) == 2
    # A pair longer than the buffer; in blocks of the vocabulary a pair of any length is one part.
    assert gemm_flops(x, free | {"chunk_size": 3}, both, rows, ref=False) == (3 if BLOCKS else 4)
    assert gemm_flops(x, free | {"chunk_size": 12}, both, rows, ref=False) == 3
    # All pairs in one part know their order before its gradients; otherwise these are made apart.
    aot = gemm_flops(x, free | {"loss_type": "aot"}, both, rows, ref=False)
    assert aot == (pytest.approx(3 + again) if BLOCKS else 4)
    assert gemm_flops(x, free | {"reduction": "none"}, both, rows, ref=False) == 4
    assert gemm_flops(x, free, (), rows, ref=False) == 1


@pytest.mark.parametrize(
    ("options", "frozen", "gemms"),
    [
        ({}, False, 3.37 if BLOCKS else 3),
        ({}, True, 2),
        ({"chunk_size": 3}, False, 3 if BLOCKS else 4),
        ({"loss_type": "aot"}, False, 3.37 if BLOCKS else 4),
        ({"reduction": "none"}, True, 2),
    ],
)
def test_explain(options: dict[str, Any], frozen: bool, gemms: int) -> None:
    x, _ = with_leaves(inputs(torch.float32), ("input",) if frozen else ("input", "linear_weight"))
    plan = fastloss.explain(linear, x, options, "cpu" if DEVICE == "cpu" else "auto")
    assert (plan["function"], plan["gemms"], plan["ref_gemms"]) == ("linear_preference_loss", gemms, 1)
    assert plan["chunk_rows"] <= plan["rows"]
    assert plan["schedule"] == ("blocks of the vocabulary" if BLOCKS else "chunks of rows")
    if not BLOCKS:
        assert plan["buffer_bytes"] == plan["chunk_rows"] * VOCAB * 4


@pytest.mark.parametrize(("chunk_size", "rows"), [(14, 14), (9, 9), (7, 5), (5, 5), (1, 5 if BLOCKS else 1)])
def test_chunks_are_whole_sequences(chunk_size: int, rows: int) -> None:
    """As many sequences as fit in a chunk, an empty one in none; where one is longer than ``chunk_size``, chunks are of that many rows, and
    blocks of the vocabulary, which hold no row's logits, of the longest sequence's."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator) for n in (14, VOCAB))
    leaves = [x.to(DEVICE).requires_grad_() for x in (hidden, weight)]
    target = torch.randint(0, VOCAB, (14,), generator=generator).to(DEVICE)
    desirable = torch.tensor([True, False, True, False], device=DEVICE)
    options = {"cu_seqlens": torch.tensor([0, 4, 9, 9, 14], device=DEVICE), "kl": 0.1}
    plan = fastloss.explain(
        fastloss.linear_kto_loss, *leaves, target, desirable, chunk_size=chunk_size, **options
    )
    assert plan["chunk_rows"] == rows
    whole = fastloss.linear_kto_loss(*leaves, target, desirable, **options)
    out = fastloss.linear_kto_loss(*leaves, target, desirable, chunk_size=chunk_size, **options)
    torch.testing.assert_close(out.logps, whole.logps)
    for a, b in zip(torch.autograd.grad(out.loss, leaves), torch.autograd.grad(whole.loss, leaves)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("chunk_size", [12, 3])
def test_upstream_retain_graph_and_double_backward(backend: str, chunk_size: int) -> None:
    """Bugs 1 to 3."""
    need(backend)
    x, leaves = with_leaves(inputs(torch.float32), ALL_LEAVES)
    loss = linear(x, {"chunk_size": chunk_size}, backend).loss
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, retain_graph=True)
    scaled = torch.autograd.grad(loss * 3, leaves, retain_graph=True)
    for a, b, c in zip(once, again, scaled, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(c, 3 * a)


def test_frozen_leaves_get_no_gradient() -> None:
    for names in (("linear_weight",), ("linear_bias",), ("input", "linear_bias")):
        x, leaves = with_leaves(inputs(torch.float32), names)
        exact, exact_leaves = with_leaves(inputs(torch.float64), names)
        got = torch.autograd.grad(linear(x, {}, "auto").loss, leaves)
        want = torch.autograd.grad(from_logits(exact, {}, True, True).loss, exact_leaves)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)
    with torch.no_grad():
        assert not linear(with_leaves(inputs(), ALL_LEAVES)[0], {}, "auto").loss.requires_grad


def test_autocast() -> None:
    """Bug 21: the GEMMs follow autocast, the gradient's dtype is the leaf's."""
    x, leaves = with_leaves(inputs(torch.float32), ("input", "linear_weight"))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss = linear(x, {}, "auto", bias=False).loss
    grads = torch.autograd.grad(loss, leaves)
    low = {
        k: v.bfloat16() if k in ("input", "linear_weight", "ref_input", "ref_weight") else v
        for k, v in inputs(torch.float32).items()
    }
    same = linear(low, {}, "auto", bias=False).loss
    assert loss.dtype == torch.float32 and all(g.dtype == torch.float32 for g in grads)
    torch.testing.assert_close(loss, same, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", ALL)
def test_edges(backend: str) -> None:
    """Bug 33: nothing has a target; no pair at all; one pair."""
    need(backend)
    x, leaves = with_leaves(inputs(torch.float32), ("input", "linear_weight"))
    nothing = linear(
        {**x, "target": torch.full_like(x["target"], -100)}, {"loss_type": ["sigmoid", "sft"]}, backend
    )
    grads = torch.autograd.grad(nothing.loss, leaves)
    assert nothing.loss.item() == pytest.approx(math.log(2), rel=1e-6) and all((g == 0).all() for g in grads)
    assert all(v.isfinite() for v in nothing.metrics.values())
    empty = {n: v[:0] if n in ("input", "ref_input", "target") else v for n, v in x.items()}
    out = linear(empty, {}, backend)
    assert out.loss.item() == 0.0 and all(v.item() == 0.0 for v in out.metrics.values())
    out.loss.backward()
    one = {n: v[[0, PAIRS]] if n in ("input", "ref_input", "target") else v for n, v in x.items()}
    assert linear(one, {}, backend).loss.isfinite()


def test_front_doors_and_token_metrics() -> None:
    x = inputs(torch.float64)
    head = x["input"], x["linear_weight"], x["target"]
    mask = x["target"] != -100
    tokens = logprobs(head[0], head[1], None, head[2], 1.0, None) * mask
    c, r = tokens.sum(1).chunk(2)
    n = dict(zip(("chosen_lengths", "rejected_lengths"), mask.sum(1).chunk(2), strict=True))
    for a, b in (
        (fastloss.linear_simpo_loss(*head, beta=2.0), fastloss.simpo_loss(c, r, beta=2.0, **n)),
        (fastloss.linear_cpo_loss(*head, cpo_alpha=0.5), fastloss.cpo_loss(c, r, cpo_alpha=0.5, **n)),
        (fastloss.linear_cpo_loss(*head, loss_type="ipo"), fastloss.cpo_loss(c, r, loss_type="ipo", **n)),
        (fastloss.linear_orpo_loss(*head, beta=0.3), fastloss.orpo_loss(c, r, beta=0.3, **n)),
        (fastloss.linear_dpo_loss(*head, reference_free=True), fastloss.dpo_loss(c, r, reference_free=True)),
    ):
        torch.testing.assert_close(a.loss, b.loss)
        for name, value in b.metrics.items():
            torch.testing.assert_close(a.metrics[name], value)
    m = a.metrics
    logits = x["input"] @ x["linear_weight"].T
    logp = logits.log_softmax(-1)
    torch.testing.assert_close(m["entropy"], -(logp.exp() * logp).sum(-1)[mask].mean())
    chosen = mask.clone()
    chosen[PAIRS:] = False
    torch.testing.assert_close(m["logits/chosen"], logits.mean(-1)[chosen].mean())
    torch.testing.assert_close(m["logits/rejected"], logits.mean(-1)[mask & ~chosen].mean())
    torch.testing.assert_close(
        m["mean_token_accuracy"], (logits.argmax(-1) == x["target"])[chosen].double().mean()
    )
    assert "entropy" not in fastloss.linear_dpo_loss(*head, reference_free=True, token_metrics=False).metrics


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("chunk_size", [12, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"kl": 0.2},
        {"kl": 0.1, "desirable_weight": 2.0, "reduction": "none"},
        {"loss_type": "apo_zero_unpaired"},
    ],
    ids=str,
)
def test_linear_kto(backend: str, chunk_size: int, options: dict[str, Any]) -> None:
    need(backend)
    dtype = torch.float64 if backend in ("cpu", "reference") else torch.float32
    x, leaves = with_leaves(inputs(dtype), ALL_LEAVES)
    good = torch.tensor([True, False, True, True, False, False, False, True], device=DEVICE)
    names = ("input", "linear_weight", "target", "linear_bias", "ref_input", "ref_weight", "ref_bias")
    out = fastloss.linear_kto_loss(
        **{n: x[n] for n in names}, desirable=good, chunk_size=chunk_size, backend=backend, **options
    )
    exact, exact_leaves = with_leaves(inputs(torch.float64), ALL_LEAVES)
    tokens = logprobs(
        exact["input"], exact["linear_weight"], exact["linear_bias"], exact["target"], 1.0, None
    )
    ref = logprobs(exact["ref_input"], exact["ref_weight"], exact["ref_bias"], exact["target"], 1.0, None)
    want = fastloss.kto_loss(tokens.sum(1), ref.sum(1), good, backend="reference", **options)
    tight = {"rtol": 1e-9, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(out.loss.double(), want.loss.detach(), **tight)
    grads, expected = (
        torch.autograd.grad(out.loss.sum(), leaves),
        torch.autograd.grad(want.loss.sum(), exact_leaves),
    )
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a.double(), b, **tight)
    for name, value in want.metrics.items():
        torch.testing.assert_close(out.metrics[name].double(), value.double(), **tight)
    assert "mean_token_accuracy" in out.metrics


ERRORS: list[tuple[str, dict[str, Any]]] = [
    ("input: expected shape", {"input": torch.zeros(4, 8)}),
    (
        "input: expected an even number",
        {"input": torch.zeros(3, 2, 8), "target": torch.zeros(3, 2, dtype=torch.long)},
    ),
    ("linear_weight: expected", {"linear_weight": torch.zeros(5, 7)}),
    ("target: expected int64", {"target": torch.zeros(4, 3, dtype=torch.long)}),
    ("ref_chosen_logps: expected", {"reference_free": False}),
    ("ref_weight: expected", {"ref_input": torch.zeros(4, 2, 8)}),
    ("ref_weight: expected None", {"ref_weight": torch.zeros(5, 8)}),
    ("ref_input: expected", {"ref_input": torch.zeros(4, 3, 8), "ref_weight": torch.zeros(5, 8)}),
    ("use_weighting", {"use_weighting": True, "loss_type": "aot"}),
    ("use_weighting", {"use_weighting": True, "weights": torch.ones(2)}),
    ("ld_alpha: expected", {"ld_alpha": 1.5}),
    ("chunk_size: expected", {"chunk_size": 0}),
    ("temperature: expected", {"temperature": 0.0}),
    (
        "cu_seqlens: expected",
        {
            "input": torch.zeros(8, 8),
            "target": torch.zeros(8, dtype=torch.long),
            "cu_seqlens": torch.tensor([0, 9]),
        },
    ),
    ("label_smoothing: .*exo_pair", {"loss_type": "exo_pair"}),
]


@pytest.mark.parametrize(
    ("message", "options"), ERRORS, ids=[m[:30] + str(i) for i, (m, _) in enumerate(ERRORS)]
)
def test_errors_name_the_option(message: str, options: dict[str, Any]) -> None:
    given = {
        "input": torch.zeros(4, 2, 8),
        "linear_weight": torch.zeros(5, 8),
        "target": torch.zeros(4, 2, dtype=torch.long),
    }
    with pytest.raises((ValueError, TypeError), match=message):
        fastloss.linear_preference_loss(**{**given, "reference_free": True, **options})


@pytest.mark.skipif(DEVICE != "cpu", reason="bad targets raise on the CPU")
def test_bad_target() -> None:
    with pytest.raises(IndexError, match=r"Target 5 is out of bounds"):
        fastloss.linear_preference_loss(
            torch.zeros(2, 1, 8), torch.zeros(5, 8), torch.tensor([[5], [0]]), reference_free=True
        )


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11),
    reason="the whole graph is traced by torch 2.11 and later: 2.8 breaks it, those between were not tried",
)
def test_compile_traces_the_definition() -> None:
    x = inputs(torch.float32)

    def loss(hidden: Tensor) -> Tensor:
        return linear({**x, "input": hidden}, {"loss_type": ["sigmoid", "sft"]}, "auto").loss

    a, b = x["input"].clone().requires_grad_(), x["input"].clone().requires_grad_()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(a).backward()
    loss(b).backward()
    torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("loss_type", ["sigmoid", "aot"])
@pytest.mark.parametrize("backend", ALL)
def test_statistics_of_the_same_pass(backend: str, loss_type: str) -> None:
    """``return_stats``: in the targets' places, whatever order the rows were read in, 0 where ignored."""
    need(backend)
    x = {
        k: v
        for k, v in inputs(torch.float32).items()
        if k in ("input", "linear_weight", "linear_bias", "target")
    }
    out, stats = fastloss.linear_preference_loss(
        **x, loss_type=loss_type, reference_free=True, return_stats=True, backend=backend,
        use_weighting=loss_type == "sigmoid",
    )  # fmt: skip
    logits = torch.nn.functional.linear(x["input"], x["linear_weight"], x["linear_bias"])
    names = ("logprobs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")[
        : 5 if loss_type == "sigmoid" else 4
    ]
    expected = fastloss.token_stats(logits, x["target"], outputs=names, backend="reference")
    for name in names:
        torch.testing.assert_close(getattr(stats, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats.logprobs[:PAIRS].sum(1), out.chosen_logps, rtol=1e-4, atol=1e-5)
    good = torch.arange(2 * PAIRS, device=DEVICE) < PAIRS
    kto, of_responses = fastloss.linear_kto_loss(
        **x, desirable=good, kl=0.0, return_stats=True, backend=backend
    )
    for name in ("logprobs", "entropy", "mean_logits", "is_top1"):
        torch.testing.assert_close(getattr(of_responses, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(of_responses.logprobs.sum(1), kto.logps, rtol=1e-4, atol=1e-5)
