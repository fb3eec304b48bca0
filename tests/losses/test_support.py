"""``support=``: statistics and policy losses over the classes that a sampler kept."""

from __future__ import annotations

import math

import pytest
import torch
from backends_under_test import ALL, contract, need
from torch import Tensor, library

import fastloss
from fastloss.engine.coefficients import Coefficients
from fastloss.engine.support import Sets, gradient_of, lay_out, stats_of
from fastloss.losses.support import sampler_metrics
from fastloss.tables import RowOptions

ROWS, DIM, VOCAB = 21, 11, 67
EVERY = ("logprobs", "entropy", "logsumexp", "log_sum_sq_probs", "mean_logits", "is_top1")
OPTIONS = {"temperature": 0.7, "softcap": 5.0, "logit_scale": 1.5}


def drawn(largest: int = 30, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(target, token_ids, offsets): sets of different sizes, some with padding and doubles; row 4 is ignored, and has none."""
    g = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    offsets, target = [0], []
    for row in range(ROWS):
        own = torch.randperm(VOCAB, generator=g)[: 1 + int(torch.randint(largest, (), generator=g))].tolist()
        target.append(-100 if row == 4 else own[-1])
        own = [] if row == 4 else own
        if row % 3 == 0:
            own = [own[-1], -1, *own]
        ids += own
        offsets.append(len(ids))
    return torch.tensor(target), torch.tensor(ids), torch.tensor(offsets)


def head(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """hidden, weight, bias"""
    g = torch.Generator().manual_seed(1)
    shapes = ((ROWS, DIM), (VOCAB, DIM), (VOCAB,))
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def by_hand(logits: Tensor, target: Tensor, ids: Tensor, offsets: Tensor, z_of) -> dict[str, list[Tensor]]:
    """A row's log_softmax over its set."""
    out: dict[str, list[Tensor]] = {name: [] for name in EVERY}
    for row in range(ROWS):
        own = sorted({int(v) for v in ids[offsets[row] : offsets[row + 1]] if v >= 0})
        if int(target[row]) == -100:
            for name in EVERY:
                out[name].append(torch.zeros((), dtype=torch.float64))
            continue
        z = z_of(logits[row].double())[own]
        log_p = z.log_softmax(0)
        here = own.index(int(target[row]))
        out["logprobs"].append(log_p[here])
        out["entropy"].append(-(log_p.exp() * log_p).sum())
        out["logsumexp"].append(z.logsumexp(0))
        out["log_sum_sq_probs"].append((2 * log_p).logsumexp(0))
        out["mean_logits"].append(z.mean())
        out["is_top1"].append((z[here] >= z.max()).double())
    return out


def z_of(x: Tensor) -> Tensor:
    return (
        OPTIONS["logit_scale"] * OPTIONS["softcap"] * (x / OPTIONS["softcap"]).tanh() / OPTIONS["temperature"]
    )


def loss_of(out) -> Tensor:
    c = torch.linspace(-1, 1, ROWS, dtype=torch.float64)
    return (c * out.logprobs + 0.3 * c.flip(0) * out.entropy + 0.2 * out.logsumexp).sum()


TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-5, torch.bfloat16: 0.06, torch.float16: 0.01}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("linear", [False, True])
def test_parity(linear: bool, backend: str, dtype: torch.dtype) -> None:
    need(backend)
    if dtype == torch.float64 and backend in ("cuda", "triton"):
        pytest.skip("no float64 kernel")
    target, ids, offsets = drawn(5 if backend == "triton" else 30)
    hidden, weight, bias = head(dtype)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    truth = torch.nn.functional.linear(*exact)
    given = {"support": (ids, offsets), "outputs": EVERY, "backend": backend, **OPTIONS}
    if linear:
        out = fastloss.linear_token_stats(hidden, weight, target, linear_bias=bias, **given)
        leaves, exact_leaves = [hidden, weight, bias], exact
    else:
        logits = torch.nn.functional.linear(hidden, weight, bias).detach().requires_grad_()
        truth = logits.detach().double().requires_grad_()
        out, leaves, exact_leaves = fastloss.token_stats(logits, target, **given), [logits], [truth]
    expected = {name: torch.stack(x) for name, x in by_hand(truth, target, ids, offsets, z_of).items()}
    tolerance = TOLERANCE[dtype] if not linear else TOLERANCE[dtype] / (1 if dtype == torch.float64 else 3)
    stats_tolerance = tolerance if dtype == torch.float64 else 2e-5  # the kept logits are float32
    for name in EVERY:
        torch.testing.assert_close(
            getattr(out, name).double(), expected[name].detach(), rtol=stats_tolerance, atol=stats_tolerance
        )
    loss_of(out).backward()
    c = fastloss.TokenStats(**{name: expected[name] for name in ("logprobs", "entropy", "logsumexp")})
    loss_of(c).backward()
    for x, y in zip(leaves, exact_leaves, strict=True):
        size = y.grad.abs().max()
        torch.testing.assert_close(x.grad.double() / size, y.grad / size, rtol=tolerance, atol=tolerance)


def test_a_temperature_for_each_token() -> None:
    target, ids, offsets = drawn()
    temperature = torch.linspace(0.5, 2.0, ROWS)
    hidden, weight, bias = head()
    given = {"linear_bias": bias, "softcap": 5.0, "outputs": (*EVERY[:3], "log_mass"), "logit_scale": 1.5}
    out = fastloss.linear_token_stats(
        hidden, weight, target, support=(ids, offsets), temperature=temperature, **given
    )
    loss_of(out).backward()
    grads = [x.grad.clone() for x in (hidden, weight, bias)]
    for x in (hidden, weight, bias):
        x.grad = None
    rows = []
    for row in range(ROWS):
        own = {"support": ids[offsets[row] : offsets[row + 1]][None], "temperature": float(temperature[row])}
        at = slice(row, row + 1)
        rows.append(fastloss.linear_token_stats(hidden[at], weight, target[at], **own, **given))
    one = fastloss.TokenStats(*(None if x[0] is None else torch.cat(x) for x in zip(*rows, strict=True)))
    loss_of(one).backward()
    for x, y in zip((*out, *grads), (*one, hidden.grad, weight.grad, bias.grad), strict=True):
        if x is not None:
            torch.testing.assert_close(x, y)


def test_an_ignored_row_touches_nothing() -> None:
    target, ids, offsets = drawn()
    hidden, weight, _ = head(torch.float32)
    with torch.no_grad():
        hidden[4] = math.nan
    out = fastloss.linear_token_stats(hidden, weight, target, support=(ids, offsets), outputs=EVERY)
    assert all(float(getattr(out, name).detach()[4]) == 0 for name in EVERY)
    loss_of(out).backward()
    assert weight.grad.isfinite().all() and (hidden.grad[4] == 0).all()


@pytest.mark.parametrize("frozen", [(), (1, 2), (0,)])
def test_only_what_asks_for_a_gradient_gets_one(frozen: tuple[int, ...]) -> None:
    target, ids, offsets = drawn()
    leaves, whole = head(), head()
    for i in frozen:
        leaves[i].requires_grad_(False)
    for hidden, weight, bias in (leaves, whole):
        out = fastloss.linear_token_stats(hidden, weight, target, linear_bias=bias, support=(ids, offsets))
        out.logprobs.sum().backward()
    for i, (x, y) in enumerate(zip(leaves, whole, strict=True)):
        assert x.grad is None if i in frozen else torch.equal(x.grad, y.grad)


def test_gradcheck_and_second_derivatives() -> None:
    target, ids, offsets = drawn(4)
    rows = slice(5, 8)
    start = int(offsets[5])
    support = ids[start : int(offsets[8])], offsets[5:9] - start
    hidden, weight, bias = (x.detach() for x in head())
    hidden = hidden[rows].clone().requires_grad_()
    weight.requires_grad_(), bias.requires_grad_()

    def of_head(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        out = fastloss.linear_token_stats(
            hidden, weight, target[rows], linear_bias=bias, support=support, outputs=EVERY[:3], **OPTIONS
        )
        return out.logprobs, out.entropy, out.logsumexp

    def of_logits(logits: Tensor) -> tuple[Tensor, ...]:
        out = fastloss.token_stats(logits, target[rows], support=support, outputs=EVERY[:3], **OPTIONS)
        return out.logprobs, out.entropy, out.logsumexp

    logits = torch.nn.functional.linear(hidden, weight, bias).detach().requires_grad_()
    assert torch.autograd.gradcheck(of_head, (hidden, weight, bias), fast_mode=True)
    assert torch.autograd.gradcheck(of_logits, (logits,), fast_mode=True)
    assert torch.autograd.gradgradcheck(of_head, (hidden, weight, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(of_logits, (logits,), fast_mode=True)


def test_transforms_go_through_the_definition() -> None:
    target, ids, offsets = drawn()
    hidden, weight, _ = (x.detach() for x in head())

    def f(h: Tensor) -> Tensor:
        return fastloss.linear_token_stats(h, weight, target, support=(ids, offsets)).logprobs

    along = torch.ones_like(hidden)
    _, tangent = torch.func.jvp(f, (hidden,), (along,))
    step = 1e-6
    torch.testing.assert_close(
        tangent, (f(hidden + step * along) - f(hidden - step * along)) / (2 * step), rtol=1e-6, atol=1e-7
    )
    both = torch.func.vmap(f)(torch.stack([hidden, 2 * hidden]))
    torch.testing.assert_close(both, torch.stack([f(hidden), f(2 * hidden)]))


def test_padded_sets_are_ragged_sets() -> None:
    target, ids, offsets = drawn()
    sizes = offsets.diff()
    padded = torch.full((ROWS, int(sizes.max())), -1, dtype=torch.int32)
    for row in range(ROWS):
        padded[row, : sizes[row]] = ids[offsets[row] : offsets[row + 1]]
    hidden, weight, _ = head(torch.float32)
    ragged = fastloss.linear_token_stats(hidden, weight, target, support=(ids, offsets), outputs=EVERY)
    loss_of(ragged).backward()
    grads, hidden.grad, weight.grad = (hidden.grad, weight.grad), None, None
    out = fastloss.linear_token_stats(hidden, weight, target, support=padded, outputs=EVERY)
    loss_of(out).backward()
    for x, y in zip((*ragged[:6], *grads), (*out[:6], hidden.grad, weight.grad), strict=True):
        assert torch.equal(x, y)


def test_rising_ids_are_not_sorted_and_give_the_same() -> None:
    target, ids, offsets = drawn()
    rising = [x[x >= 0].unique() for x in ids.tensor_split(offsets[1:-1])]
    sizes = torch.tensor([0, *map(len, rising)])
    layout = lay_out(Sets(torch.cat(rising), sizes.cumsum(0), ROWS), target, VOCAB, -100)
    assert layout.order is None
    hidden, weight, _ = head()
    made = []
    for support in ((ids, offsets), (torch.cat(rising), sizes.cumsum(0))):
        out = fastloss.linear_token_stats(hidden, weight, target, support=support, outputs=EVERY[:3])
        made.append([out.logprobs, *torch.autograd.grad(loss_of(out), [hidden, weight])])
    for x, y in zip(*made, strict=True):
        torch.testing.assert_close(x, y)


def test_a_token_has_the_same_bits_in_any_batch() -> None:
    target, ids, offsets = drawn()
    hidden, weight, _ = (x.detach() for x in head(torch.float32))
    every = fastloss.linear_token_stats(hidden, weight, target, support=(ids, offsets)).logprobs
    for row in (0, 7, 20):
        own = ids[offsets[row] : offsets[row + 1]]
        one = fastloss.linear_token_stats(
            hidden[row : row + 1], weight, target[row : row + 1], support=own[None]
        )
        assert torch.equal(one.logprobs, every[row : row + 1])


def test_the_whole_vocabulary_is_the_ordinary_function() -> None:
    target, *_ = drawn()
    hidden, weight, bias = head()
    support = torch.arange(VOCAB).expand(ROWS, VOCAB)
    grads = []
    for given in ({"support": support}, {}):
        for x in (hidden, weight, bias):
            x.grad = None
        out = fastloss.linear_token_stats(hidden, weight, target, linear_bias=bias, outputs=EVERY, **given)
        loss_of(out).backward()
        grads.append([*out[:6], hidden.grad, weight.grad, bias.grad])
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y)


def test_log_mass_is_what_was_kept() -> None:
    target, ids, offsets = drawn()
    hidden, weight, bias = head()
    logits = torch.nn.functional.linear(hidden, weight, bias)
    p = (logits / 0.7).softmax(-1)
    expected = [
        p[r, ids[offsets[r] : offsets[r + 1]].clamp(min=0).unique()].sum() if r != 4 else p.new_ones(())
        for r in range(ROWS)
    ]
    for row in range(0, ROWS, 3):  # their padding is no class
        own = ids[offsets[row] : offsets[row + 1]]
        expected[row] = p[row, own[own >= 0].unique()].sum()
    for out in (
        fastloss.linear_token_stats(
            hidden,
            weight,
            target,
            linear_bias=bias,
            support=(ids, offsets),
            temperature=0.7,
            outputs=("logprobs", "log_mass"),
        ),
        fastloss.token_stats(
            logits, target, support=(ids, offsets), temperature=0.7, outputs=("logprobs", "log_mass")
        ),
    ):
        assert out.logsumexp is None and not out.log_mass.requires_grad
        torch.testing.assert_close(out.log_mass.exp(), torch.stack(expected).detach())


def test_errors_name_what_is_wrong() -> None:
    target, ids, offsets = drawn()
    hidden, weight, _ = head(torch.float32)

    def call(target: Tensor = target, support=(ids, offsets), **given):
        return fastloss.linear_token_stats(hidden, weight, target, support=support, **given)

    missing = target.clone()
    missing[7] = next(v for v in range(VOCAB) if v not in ids[offsets[7] : offsets[8]])
    with pytest.raises(IndexError, match=rf"target {int(missing[7])} at position \[7\] among"):
        call(missing)
    with pytest.raises(IndexError, match="among"):
        fastloss.token_stats(hidden @ weight.T, missing, support=(ids, offsets), backend="reference")
    missing[7] = VOCAB
    with pytest.raises(IndexError, match=rf"Target {VOCAB} is out of bounds at position \[7\]"):
        call(missing)
    wrong = ids.clone()
    wrong[int(offsets[8])] = VOCAB
    with pytest.raises(IndexError, match=r"position \[8\]"):
        call(
            support=(torch.cat([wrong, target[8:9]]), torch.cat([offsets[:-1], offsets[-1:] + 1])),
            target=target,
        )
    with pytest.raises(ValueError, match="support: expected 22 offsets for 21 positions, got 21"):
        call(support=(ids, offsets[:-1]))
    with pytest.raises(ValueError, match="support: expected offsets that rise"):
        call(support=(ids, offsets.flip(0)))
    with pytest.raises(TypeError, match="support: expected"):
        call(support=3)
    with pytest.raises(ValueError, match="support: expected int64 or int32"):
        call(support=torch.zeros(ROWS, 2))
    with pytest.raises(TypeError, match="group: expected a ProcessGroup"):
        call(group=object())
    with pytest.raises(ValueError, match="support: expected the kept classes for outputs='log_mass'"):
        call(support=None, outputs=("log_mass",))
    with pytest.raises(ValueError, match="support: expected None for outputs='argmax'"):
        call(outputs=("argmax",))


def test_a_target_outside_its_set_is_nan_where_nobody_looks() -> None:
    """As on a GPU, whose values the host does not read."""
    target, ids, offsets = drawn()
    target = target.clone()
    target[7] = next(v for v in range(VOCAB) if v not in ids[offsets[7] : offsets[8]])
    layout = lay_out(Sets(ids, offsets, ROWS), target, VOCAB, -100)
    z = torch.randn(ids.shape[0]).masked_fill(layout.classes < 0, -math.inf)
    backend = contract("cpu")
    out = stats_of(backend, z, layout, ("logprobs", "entropy", "lse_parts"))
    assert out["logprobs"][7].isnan() and out["logprobs"].isnan().sum() == 1
    one = torch.ones(ROWS)
    d_z = gradient_of(backend, z, layout, RowOptions(), out["lse_parts"], Coefficients(a=one, b=-one))
    counts = (layout.classes >= 0) & (layout.row == 7)
    assert d_z[counts].isnan().all() and not d_z[~counts].isnan().any()


def test_no_rows_and_no_entries() -> None:
    weight = torch.randn(VOCAB, DIM, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    out = fastloss.linear_token_stats(
        torch.zeros(0, DIM), weight, none, support=(none, torch.zeros(1, dtype=torch.long)), outputs=EVERY
    )
    out.logprobs.sum().backward()
    assert out.logprobs.shape == (0,) and (weight.grad == 0).all()
    ignored = torch.full((2,), -100)
    hidden = torch.randn(2, DIM, requires_grad=True)
    out = fastloss.linear_token_stats(
        hidden, weight, ignored, support=(none, torch.zeros(3, dtype=torch.long))
    )
    out.logprobs.sum().backward()
    assert (out.logprobs == 0).all() and (hidden.grad == 0).all()


def test_inplace_writes_over_the_logits() -> None:
    target, ids, offsets = drawn()
    leaf = torch.randn(ROWS, VOCAB, requires_grad=True)
    grads = []
    for inplace in (False, True):
        leaf.grad = None
        logits = leaf * 1.0
        out = fastloss.token_stats(logits, target, support=(ids, offsets), inplace=inplace)
        out.logprobs.sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_a_kept_class_of_minus_infinity() -> None:
    logits = torch.tensor([[0.0, -math.inf, 1.0], [0.0, 1.0, 2.0]], requires_grad=True)
    out = fastloss.token_stats(
        logits, torch.tensor([0, 1]), support=torch.tensor([[0, 1], [0, 1]]), outputs=EVERY
    )
    assert out.logprobs[0] == 0 and out.entropy[0] == 0 and out.mean_logits.tolist() == [-math.inf, 0.5]
    (out.logprobs + out.entropy).sum().backward()
    assert logits.grad[0].tolist() == [0, 0, 0] and logits.grad[1, 2] == 0


def test_explain_tells_the_path() -> None:
    target, ids, offsets = drawn()
    hidden, weight, _ = head(torch.bfloat16)
    plan = fastloss.explain(fastloss.linear_token_stats, hidden, weight, target, support=(ids, offsets))
    assert (
        plan["schedule"] == "kept rows of the weight" and plan["gemms"] == 0 and plan["kept"] == ids.shape[0]
    )
    assert plan["logits_dtype"] == "torch.float32"
    plan = fastloss.explain(
        fastloss.linear_policy_loss,
        hidden[None],
        weight,
        target[None],
        None,
        torch.ones(1),
        None,
        support=(ids, offsets),
    )
    assert plan["function"] == "linear_policy_loss" and plan["schedule"] == "kept rows of the weight"


def test_autocast_multiplies_in_its_dtype() -> None:
    target, ids, offsets = drawn()
    hidden, weight, _ = head(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = fastloss.linear_token_stats(hidden, weight, target, support=(ids, offsets))
    expected = fastloss.linear_token_stats(
        hidden.bfloat16(), weight.bfloat16(), target, support=(ids, offsets)
    )
    assert torch.equal(out.logprobs, expected.logprobs)
    out.logprobs.sum().backward()
    assert weight.grad.dtype == torch.float32 and weight.grad.abs().sum() > 0


@pytest.mark.parametrize("loss_type", ["dapo", "gspo", "clip_cov"])
def test_policy_loss_is_that_of_the_kept_distribution(loss_type: str) -> None:
    target, ids, offsets = drawn()
    hidden, weight, bias = head()
    mask = (target != -100)[None]
    logits = torch.nn.functional.linear(hidden, weight, bias)
    expected = [
        torch.stack(x)[None] for x in by_hand(logits, target, ids, offsets, lambda z: z / 0.7).values()
    ]
    g = torch.Generator().manual_seed(3)
    old = expected[0].detach() + 0.1 * torch.randn(1, ROWS, generator=g, dtype=torch.float64)
    given = {
        "loss_type": loss_type, "beta": 0.1, "entropy_coef": 0.01, "ref_logprobs": old - 0.1, "sampler_logprobs": old + 0.05,
        "importance_cap": 2.0,
    }  # fmt: skip
    advantages = torch.tensor([0.7], dtype=torch.float64)
    truth = fastloss.policy_loss(expected[0], old, advantages, mask, entropy=expected[1], **given)
    want = torch.autograd.grad(truth.loss, [hidden, weight, bias])
    with torch.no_grad():
        hidden[4] = math.nan  # masked, and its set is empty
    out, stats = fastloss.linear_policy_loss(
        hidden[None], weight, target[None].masked_fill(~mask, 0), old, advantages, mask, linear_bias=bias, temperature=0.7,
        support=(ids, offsets), with_mass=True, return_stats=True, **given,
    )  # fmt: skip
    torch.testing.assert_close(out.loss, truth.loss)
    torch.testing.assert_close(stats.logprobs[mask], expected[0].detach()[mask])
    for x, y in zip(torch.autograd.grad(out.loss, [hidden, weight, bias]), want, strict=True):
        torch.testing.assert_close(x, y)
    assert 0 < float(out.metrics["support/mass_min"]) < float(out.metrics["support/mass"]) < 1
    torch.testing.assert_close(out.metrics["kl"], truth.metrics["kl"])


def test_the_ratio_is_one_with_the_samplers_set_and_the_kept_mass_without() -> None:
    """What the option is for: the same weights in the sampler and in the trainer."""
    hidden, weight, _ = (x.detach() for x in head())
    logits = hidden @ weight.T
    support = fastloss.sampler_support(logits, top_k=20, top_p=0.8)
    ids, offsets = support
    kept = torch.zeros(ROWS, VOCAB, dtype=torch.bool)
    kept[torch.repeat_interleave(torch.arange(ROWS), offsets.diff()), ids] = True
    sampler = logits.masked_fill(~kept, -math.inf).log_softmax(-1)
    target = torch.multinomial(sampler.exp(), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    sampled = sampler.gather(1, target[:, None])[:, 0]
    with_support = fastloss.linear_token_stats(
        hidden, weight, target, support=support, outputs=("logprobs", "log_mass")
    )
    metrics = sampler_metrics(with_support.logprobs, sampled, log_mass=with_support.log_mass)
    for name in ("ratio/min", "ratio/max", "ess"):
        torch.testing.assert_close(metrics[name], torch.ones((), dtype=torch.float64))
    without = fastloss.linear_token_stats(hidden, weight, target)
    biased = sampler_metrics(without.logprobs, sampled)
    torch.testing.assert_close(biased["ratio/mean"], metrics["mass"])
    torch.testing.assert_close(biased["ratio/min"], metrics["mass/min"])
    assert float(metrics["mass"]) < 0.97


def test_sampler_support_keeps_what_samplers_keep() -> None:
    logits = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.06, 0.04], [0.96, 0.01, 0.01, 0.01, 0.01]]))

    def kept(**given: float) -> list[list[int]]:
        ids, offsets = fastloss.sampler_support(logits, **given)
        return [x.tolist() for x in ids.tensor_split(offsets[1:-1])]

    assert kept(top_k=2) == [[0, 1], [0, 1, 2, 3, 4]]  # what is as likely as the last of them is kept too
    assert kept(top_p=0.75) == [[0, 1, 2], [0]]
    assert kept(min_p=0.4) == [[0, 1, 2], [0]]
    assert kept(top_k=3, top_p=0.7) == [[0, 1], [0]]  # 0.4 / 0.9 + 0.3 / 0.9 reach 0.7
    assert kept(top_p=1e-9) == [[0], [0]]
    assert kept() == [[0, 1, 2, 3, 4]] * 2
    for bad in ({"top_k": 0}, {"top_p": 0.0}, {"min_p": 1.5}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            fastloss.sampler_support(logits, **bad)


def test_sampler_metrics_of_masked_tokens() -> None:
    a, b = torch.tensor([-1.0, math.nan, -2.0]), torch.tensor([-1.5, 0.0, -2.0])
    out = sampler_metrics(a, b, torch.tensor([1, 0, 1]), log_mass=torch.tensor([0.0, -9.0, math.log(0.5)]))
    assert float(out["ratio/max"]) == pytest.approx(math.exp(0.5)) and float(out["ratio/min"]) == 1
    assert float(out["kl"]) == pytest.approx(-0.25) and float(out["mass"]) == pytest.approx(0.75)
    nothing = sampler_metrics(a, b, torch.zeros(3), log_mass=b)
    assert {name: float(x) for name, x in nothing.items()} == {
        "ratio/mean": 1, "ratio/min": 1, "ratio/max": 1, "ess": 1, "kl": 0, "mass": 1, "mass/min": 1,
    }  # fmt: skip


def test_compiled_with_changing_numbers_of_entries() -> None:
    hidden, weight, bias = head(torch.float32)
    seen = []

    def f(
        hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, ids: Tensor, offsets: Tensor
    ) -> Tensor:
        out = fastloss.linear_token_stats(
            hidden, weight, target, linear_bias=bias, support=(ids, offsets), outputs=("logprobs", "entropy")
        )
        return (out.logprobs * 2 + out.entropy).sum()

    def count(graph: torch.fx.GraphModule, _: list[Tensor]):
        seen.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend=count)
    for seed in range(4):
        target, ids, offsets = drawn(seed=seed)
        made = []
        for function in (f, compiled):
            loss = function(hidden, weight, bias, target, ids, offsets)
            made.append([loss, *torch.autograd.grad(loss, [hidden, weight, bias])])
        for x, y in zip(*made, strict=True):
            torch.testing.assert_close(x, y)
    assert len(seen) <= 2  # the second for any number of entries


def test_operators() -> None:
    target, ids, offsets = drawn(6)
    hidden, weight, bias = head(torch.float32)
    row = {"ignore_index": -100, "scale": 1.0, "softcap": 0.0}
    given = {**row, "want": "logprobs,entropy", "backend": "cpu"}
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    ops = torch.ops.fastloss
    library.opcheck(
        ops.linear_support_stats,
        (hidden, weight, bias, target, ids, offsets, None),
        {**given, "dtype": torch.float32},
        test_utils=checks,
    )
    logits = (hidden @ weight.T).detach().requires_grad_()
    library.opcheck(ops.support_stats, (logits, target, ids, offsets, None), given, test_utils=checks)


def test_fake_and_meta_tensors() -> None:
    target, ids, offsets = drawn()
    hidden, weight, _ = (x.detach() for x in head(torch.float32))
    meta = [x.to("meta") for x in (hidden, weight, target, ids, offsets)]
    out = fastloss.linear_token_stats(*meta[:3], support=tuple(meta[3:]))
    assert out.logprobs.is_meta and out.logprobs.shape == (ROWS,)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in (hidden, weight, target, ids, offsets)]
        out = fastloss.linear_token_stats(*fake[:3], support=tuple(fake[3:]))
    assert out.logprobs.shape == (ROWS,) and out.logprobs.dtype == torch.float32
