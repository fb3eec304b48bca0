"""The linear head: rows without a target cost nothing and reach nothing, wherever they are."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastloss
from fastloss.engine import head, head_blocks
from fastloss.engine.backend import get_backend
from fastloss.engine.head_types import Head, Needs
from fastloss.tables import STATS, RowOptions

IGNORE = -100


def operands(rows=37, dim=24, vocab=301, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, dim, generator=generator).to(dtype)
    weight = (torch.randn(vocab, dim, generator=generator) / dim**0.5).to(dtype)
    bias = torch.randn(vocab, generator=generator).to(dtype)
    target = torch.randint(0, vocab, (rows,), generator=generator)
    return hidden, weight, bias, target


def step(hidden, weight, bias, target, **options):
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    loss, stats = fastloss.linear_cross_entropy(
        leaves[0], leaves[1], target, linear_bias=leaves[2], return_stats=True, **options
    )
    loss.backward()
    return loss.detach(), stats, [x.grad for x in leaves]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("chunk_size", [None, 8])
def test_kept_rows_have_the_bits_of_a_call_with_these_rows_alone(dtype, chunk_size):
    hidden, weight, bias, target = operands(dtype=dtype)
    keep = torch.tensor([0, 3, 4, 5, 11, 12, 20, 30, 31, 36])
    ignored = torch.ones(37, dtype=torch.bool).index_fill(0, keep, False)
    hidden[ignored] = torch.tensor([float("nan"), float("inf")]).to(dtype).repeat(12)
    masked = target.masked_fill(ignored, IGNORE)
    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0, "chunk_size": chunk_size}
    loss, stats, grads = step(hidden, weight, bias, masked, **options)
    loss_alone, stats_alone, alone = step(hidden[keep], weight, bias, target[keep], **options)
    assert torch.equal(loss, loss_alone)
    assert torch.equal(grads[0][keep], alone[0])
    assert torch.equal(grads[1], alone[1])
    assert torch.equal(grads[2], alone[2])
    assert not grads[0][ignored].any()
    for name in STATS:
        value = getattr(stats, name)
        assert torch.equal(value[keep], getattr(stats_alone, name)), name
        assert not value[ignored].any(), name


@pytest.mark.parametrize("frozen", [False, True])
def test_ignored_rows_reach_nothing_with_a_loss_per_row(frozen):
    hidden, weight, _, target = operands()
    target[::3] = IGNORE
    hidden[::3] = float("nan")
    leaves = [hidden.requires_grad_(), weight.requires_grad_(not frozen)]
    loss = fastloss.linear_cross_entropy(*leaves, target, reduction="none")
    loss.backward(torch.linspace(1, 2, 37))
    exact = fastloss.linear_cross_entropy(
        leaves[0].detach().nan_to_num().double(),
        weight.detach().double(),
        target,
        reduction="none",
        backend="reference",
    )
    torch.testing.assert_close(loss.detach().double(), exact, atol=1e-5, rtol=1e-5)
    for leaf in leaves:
        assert leaf.grad is None or leaf.grad.isfinite().all()
    assert not leaves[0].grad[::3].any()


@pytest.mark.parametrize("outputs", [("logprobs",), ("logprobs", "entropy")])
@pytest.mark.parametrize("frozen", [False, True])
def test_token_stats_compute_the_kept_rows_alone(outputs, frozen):
    hidden, weight, _, target = operands()
    keep = torch.arange(0, 37, 4)
    ignored = torch.ones(37, dtype=torch.bool).index_fill(0, keep, False)
    hidden[ignored] = float("nan")

    def run(rows, classes):
        h, w = rows.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        stats = fastloss.linear_token_stats(h, w, classes, outputs=outputs)
        sum(getattr(stats, name).square().sum() for name in outputs).backward()
        return stats, h.grad, w.grad

    stats, d_hidden, d_weight = run(hidden, target.masked_fill(ignored, IGNORE))
    alone, d_hidden_alone, d_weight_alone = run(hidden[keep], target[keep])
    for name in outputs:
        assert torch.equal(getattr(stats, name)[keep], getattr(alone, name))
        assert not getattr(stats, name)[ignored].any()
    assert torch.equal(d_hidden[keep], d_hidden_alone)
    assert not d_hidden[ignored].any()
    assert frozen or torch.equal(d_weight, d_weight_alone)


def test_all_rows_ignored():
    hidden, weight, _, target = operands()
    leaves = [hidden.fill_(float("nan")).requires_grad_(), weight.requires_grad_()]
    loss = fastloss.linear_cross_entropy(*leaves, torch.full_like(target, IGNORE), reduction="sum")
    loss.backward()
    assert loss == 0
    assert not leaves[0].grad.any() and not leaves[1].grad.any()


def test_explain_tells_the_rows_that_are_computed():
    hidden, weight, _, target = operands()
    target[:30] = IGNORE
    assert fastloss.explain(fastloss.linear_cross_entropy, hidden, weight, target)["rows"] == 7
    assert fastloss.explain(fastloss.linear_token_stats, hidden, weight, target)["rows"] == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flops_of_blocks_are_counted(dtype):
    hidden, weight, _, target = operands(30, 40, 1000, dtype)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    with FlopCounterMode(display=False) as counter:
        fastloss.linear_cross_entropy(*leaves, target).backward()
    assert counter.get_total_flops() == 3 * 2 * 30 * 40 * 1000


def test_chunks_of_given_bounds():
    hidden, weight, _, _ = operands()
    operand = head.make_head(get_backend("reference"), hidden, weight, None, torch.float32)
    nothing, bounds = head.Needs(False, False, False), [(0, 5), (5, 25), (25, 37)]
    seen, outs, row = [], [], torch.arange(37)
    with head.begin(operand, nothing, None, head.Schedule(20), bounds) as run:
        for part in run.parts():
            own = part.of(row)
            seen.append((int(own[0]), int(own[-1]) + 1))
            outs.append(part.stats(None, RowOptions(), ("mean_logits",)))
        out = run.collect(outs)
    assert seen == bounds
    torch.testing.assert_close(
        out["mean_logits"], (hidden @ weight.t()).mean(1), atol=1e-5, rtol=1e-5, check_dtype=False
    )


needs_blocks = pytest.mark.skipif(
    fastloss.backends()["cpu"] != "available", reason="the native CPU module is not built"
)
OPTIONS = [
    {},
    {"label_smoothing": 0.2, "z_loss": 1e-2},
    {"softcap": 5.0, "logit_scale": 0.7},
    {"label_smoothing": 0.1, "weight": "classes", "reduction": "sum"},
    {"target": "probabilities", "label_smoothing": 0.1},
    {"normalizer": 7.0, "ignored": 9},
    {"softcap": 8.0, "weight": "classes", "ignored": 3, "label_smoothing": 0.3, "z_loss": 1e-3},
]


@needs_blocks
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, dim, vocab", [(37, 64, 1001), (37, 24, 1001), (1, 8, 3), (16, 40, 384)])
def test_blocks_of_the_vocabulary_against_float64(rows, dim, vocab, dtype, options):
    options = dict(options)
    hidden, weight, bias, target = operands(rows, dim, vocab, dtype, seed=rows + dim)
    target[: options.pop("ignored", 0) * (rows > 9)] = IGNORE
    if options.pop("target", None):
        target = torch.randn(rows, vocab).softmax(-1).to(dtype)
    if options.get("weight"):
        options["weight"] = (torch.rand(vocab) + 0.5).to(dtype)

    def run(cast, backend):
        leaves = [cast(x).detach().clone().requires_grad_() for x in (hidden, weight, bias)]
        more = {k: cast(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        classes = target if target.dtype == torch.int64 else cast(target)
        call = {"linear_bias": leaves[2], "return_stats": True, "backend": backend, **more}
        loss, stats = fastloss.linear_cross_entropy(*leaves[:2], classes, **call)
        loss.backward()
        return [loss.detach(), *(s for s in stats if s is not None), *(x.grad for x in leaves)]

    plan = fastloss.explain(fastloss.linear_cross_entropy, hidden, weight.clone().requires_grad_(), target)
    if dtype == torch.float32:
        assert ("chunk_columns" in plan) == (rows <= 2 * dim)
    eps = 1e-5 if dtype == torch.float32 else 2**-7
    for ours, exact in zip(run(lambda x: x, "auto"), run(lambda x: x.double(), "reference"), strict=True):
        if ours.dtype == torch.bool:
            assert (ours == exact).float().mean() > 0.8  # ties of bfloat16
            continue
        scale = float(exact.abs().max())
        assert float((ours.double() - exact).abs().max()) <= eps * max(scale, 1e-30) * 3


@needs_blocks
def test_blocks_of_the_vocabulary_give_the_numbers_of_chunks_of_rows():
    hidden, weight, bias, target = operands(40, 32, 1500)
    hidden[3] = float("nan")
    hidden[5] *= 1e4  # one logit dominates
    blocks = step(hidden, weight, bias, target)
    chunks = step(hidden, weight, bias, target, chunk_size=8)
    assert torch.isnan(blocks[0]) and torch.isnan(chunks[0])
    for name, ours in blocks[1]._asdict().items():
        torch.testing.assert_close(
            ours, getattr(chunks[1], name), equal_nan=True, msg=name, rtol=1e-5, atol=1e-6
        )
    rows = torch.arange(40) != 3
    torch.testing.assert_close(blocks[2][0][rows], chunks[2][0][rows], rtol=1e-4, atol=1e-8)
    assert blocks[2][0][3].isnan().all() and blocks[2][1].isnan().all()


@needs_blocks
@pytest.mark.parametrize("dim", [512, 1024, 4096])
def test_float32_errors_are_not_above_those_of_eager(dim):
    generator = torch.Generator().manual_seed(dim)
    hidden = torch.randn(256, dim, generator=generator)
    weight = torch.randn(3000, dim, generator=generator) / dim**0.5
    target = torch.randint(0, 3000, (256,), generator=generator)

    def grads(cast, function):
        leaves = [cast(x).requires_grad_() for x in (hidden.clone(), weight.clone())]
        loss = function(*leaves)
        loss.mean().backward()
        return [loss.detach(), *(x.grad for x in leaves)]

    def eager(h, w):
        return torch.nn.functional.cross_entropy(h @ w.t(), target, reduction="none")

    exact = grads(torch.Tensor.double, eager)
    theirs = grads(lambda x: x, eager)
    ours = grads(lambda x: x, lambda h, w: fastloss.linear_cross_entropy(h, w, target))
    ours[0] = -fastloss.linear_token_stats(hidden, weight, target).logprobs
    for name, x, y, z in zip(("logprob", "hidden", "weight"), ours, theirs, exact, strict=True):
        error, bound = (float((v - z).square().mean().sqrt()) for v in (x, y))
        assert error <= bound, f"{name}: {error} against {bound}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [40, 300])
def test_a_log_probability_has_the_same_bits_in_every_function(rows, dtype):
    hidden, weight, _, target = operands(rows, 40, 700, dtype)
    old = fastloss.linear_token_stats(hidden, weight, target).logprobs
    for trained in ((True, False), (False, True), (True, True)):
        leaves = [x.clone().requires_grad_(on) for x, on in zip((hidden, weight), trained, strict=True)]
        for outputs in (("logprobs",), ("logprobs", "entropy")):
            assert torch.equal(fastloss.linear_token_stats(*leaves, target, outputs=outputs).logprobs, old)
        mask = torch.ones(1, rows)
        out = fastloss.linear_policy_loss(
            leaves[0][None], leaves[1], target[None], old[None], torch.ones(1), mask
        )
        assert float(out.metrics["approx_kl_k3"]) == 0


@needs_blocks
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_autocast_takes_hidden_states_of_any_dtype(dtype):
    hidden, weight, _, target = operands(80, 40, 300)
    leaves = [hidden.to(dtype).requires_grad_(), weight.requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        loss = fastloss.linear_cross_entropy(*leaves, target)
    loss.backward()
    assert [x.grad.dtype for x in leaves] == [dtype, torch.float32]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    torch.nn.functional.cross_entropy(exact[0] @ exact[1].t(), target, ignore_index=IGNORE).backward()
    for ours, theirs in zip(leaves, exact, strict=True):
        error = float((ours.grad.double() - theirs.grad).abs().max())
        assert error <= 2**-6 * float(theirs.grad.abs().max())


@needs_blocks
def test_a_masked_vocabulary_in_blocks():
    hidden, weight, bias, target = operands(20, 32, 900)
    bias[400:] = float("-inf")
    target %= 400
    loss, stats, grads = step(hidden, weight, bias, target)
    exact = torch.nn.functional.cross_entropy(hidden.double() @ weight.double().t() + bias.double(), target)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)
    assert stats.entropy.isfinite().all()
    assert not grads[1][400:].any() and not grads[2][400:].any()


@needs_blocks
@pytest.mark.parametrize(
    "options", [o for o in OPTIONS if "label_smoothing" not in o] + [{"reduction": "none"}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_weight_takes_two_gemms_and_no_buffer_of_logits(dtype, options):
    options = dict(options)
    hidden, weight, bias, target = operands(150, 20, 1001, dtype)
    target[: options.pop("ignored", 0)] = IGNORE
    if "weight" in options:
        options["weight"] = (torch.rand(1001) + 0.5).to(dtype)
    leaf = hidden.clone().requires_grad_()
    plan = fastloss.explain(fastloss.linear_cross_entropy, leaf, weight, target, linear_bias=bias, **options)
    assert plan["gemms"] == 2
    if "chunk_columns" in plan:
        assert plan["buffer_bytes"] < 0.7 * hidden.shape[0] * weight.shape[0] * weight.element_size()
    grads = []
    for cast, x in ((lambda t: t, leaf), (lambda t: t.double(), hidden.double().requires_grad_())):
        more = {k: cast(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        backend = "auto" if x is leaf else "reference"
        loss = fastloss.linear_cross_entropy(
            x, cast(weight), target, linear_bias=cast(bias), backend=backend, **more
        )
        (loss * torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)).sum().backward()
        grads.append(x.grad.double())
    eps = 1e-5 if dtype == torch.float32 else 2**-7
    assert float((grads[0] - grads[1]).abs().max()) <= 3 * eps * float(grads[1].abs().max())


@needs_blocks
@pytest.mark.parametrize("rows", [1, 2, 7, 40])
@pytest.mark.parametrize("ignored", [0, 1, 5, 20, 38])
def test_d_hidden_in_low_precision_is_summed_in_its_own_memory(rows, ignored):
    hidden, weight, _, target = operands(rows, 40, 300, torch.bfloat16)
    if ignored >= rows:
        ignored = rows - 1
    target[:ignored] = IGNORE
    leaf = hidden.requires_grad_()
    fastloss.linear_cross_entropy(leaf, weight.requires_grad_(), target).backward()
    exact = hidden.detach().double().requires_grad_()
    torch.nn.functional.cross_entropy(
        exact @ weight.detach().double().t(), target, ignore_index=IGNORE
    ).backward()
    assert not leaf.grad[:ignored].any()
    assert float((leaf.grad - exact.grad).abs().max()) <= 2**-6 * float(exact.grad.abs().max())
    # Every row is rounded once: rows do not depend on where their sums lay.
    alone = hidden.detach()[-1:].requires_grad_()
    fastloss.linear_cross_entropy(alone, weight, target[-1:], normalizer=float(rows - ignored)).backward()
    torch.testing.assert_close(
        alone.grad[0], leaf.grad[-1], rtol=2**-6, atol=1e-3 * float(exact.grad.abs().max())
    )


@needs_blocks
def test_second_backward_computes_again():
    hidden, weight, _, target = operands(20, 32, 900)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    loss = fastloss.linear_cross_entropy(*leaves, target)
    loss.backward(retain_graph=True)
    once = [x.grad.clone() for x in leaves]
    (2 * loss).backward()
    for x, grad in zip(leaves, once, strict=True):
        torch.testing.assert_close(x.grad, 3 * grad)


@needs_blocks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_alone_gives_the_numbers_of_the_call_with_gradient(dtype):
    hidden, weight, bias, target = operands(70, 40, 1000, dtype)
    loss, stats, _ = step(hidden, weight, bias, target, chunk_size=70)
    alone, stats_alone = fastloss.linear_cross_entropy(
        hidden, weight, target, linear_bias=bias, return_stats=True
    )
    plan = fastloss.explain(fastloss.linear_cross_entropy, hidden, weight, target)
    assert plan["gemms"] == 1 and "chunk_columns" in plan
    torch.testing.assert_close(alone, loss)
    torch.testing.assert_close(
        stats_alone.logprobs, stats.logprobs, rtol=1e-2, atol=2e-2 * (dtype == torch.bfloat16) + 1e-5
    )
    per_row = fastloss.linear_cross_entropy(hidden, weight, target, linear_bias=bias, reduction="none")
    torch.testing.assert_close(per_row.float().mean(), alone.float(), rtol=1e-2, atol=1e-3)


@needs_blocks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [64, 200, 1000, 3000, 20_000, 80_000])
def test_fast_keeps_no_more_than_a_float32_gradient_and_a_share_of_the_logits(rows, dtype):
    dim, vocab = 64, 512
    head = Head(
        get_backend("cpu"),
        torch.empty(0, dim, dtype=dtype),
        torch.zeros(vocab, dim, dtype=dtype),
        None,
        dtype,
    )
    parts = head_blocks.parts_of(head, rows, Needs(True, True, False), "fast", False)
    size = vocab * dtype.itemsize
    gradient, kept = vocab * dim * 4, max(0, parts.more) * size
    is_summed = parts.rows < rows
    assert kept + gradient * is_summed <= gradient + 0.04 * rows * size
    assert 0 <= parts.more <= max(0, parts.rows - dim)
    again = max(0, parts.rows - dim - parts.more)
    sums = -(-rows // parts.rows) - 1
    # What is chosen costs no more than the other way: parts that keep all of their rows, or one that makes the rest again.
    most = dim + head_blocks.further_rows(head.weight) + rows // head_blocks.KEPT_SHARE
    other = -(-rows // (dim + rows // head_blocks.KEPT_SHARE)) - 1
    cost = again + sums * head_blocks.ROWS_OF_A_SUM
    assert cost <= max(0, rows - most) and cost <= other * head_blocks.ROWS_OF_A_SUM


def test_parts_of_rows_are_rounded_once():
    """d weight in bfloat16 of several parts of rows: each part's was rounded before they were added."""
    hidden = torch.randn(16, 32, 32).bfloat16()
    weight = (torch.randn(320, 32) * 0.05).bfloat16()
    target = torch.randint(0, 320, (16, 32))
    desirable = torch.arange(16) % 2 == 0

    def d_weight(memory, dtype=torch.bfloat16):
        w = weight.to(dtype).clone().requires_grad_()
        loss = fastloss.linear_kto_loss(
            hidden.to(dtype), w, target, desirable, ref_logps=torch.full((16,), -185.0), kl=0.0, memory=memory
        )[0]
        loss.backward()
        return w.grad.double()

    exact = d_weight("auto", torch.float64)
    parts, one = ((d_weight(memory) - exact).norm() for memory in ("fast", "low"))
    assert parts < 1.05 * one
