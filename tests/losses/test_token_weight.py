"""linear_cross_entropy's token weights and its loss's dtype: against a sum of losses that autograd differentiates."""

from __future__ import annotations

import pytest
import torch
from backends_under_test import ALL, DEVICE, need
from torch.utils.flop_counter import FlopCounterMode

import fastloss

ROWS, DIM, VOCAB = 41, 16, 77


def operands(dtype=torch.float32, probabilities=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, DIM, generator=generator).to(dtype)
    weight = (torch.randn(VOCAB, DIM, generator=generator) / DIM**0.5).to(dtype)
    target = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    target[::5] = -100
    if probabilities:
        target = torch.randn(ROWS, VOCAB, generator=generator).softmax(-1).to(dtype)
    factors = torch.rand(ROWS, generator=generator) * 2
    factors[3] = 0
    return [x.to(DEVICE) for x in (hidden, weight, target, factors)]


def exact(hidden, weight, target, factors, reduction, class_weight=None, **options):
    """In float64 from torch's own loss per row."""
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    own = target if target.dtype == torch.int64 else target.double()
    cw = None if class_weight is None else class_weight.double()
    rows = torch.nn.functional.cross_entropy(h @ w.T, own, cw, reduction="none", **options)
    kept = rows.new_ones(ROWS) if own is not target or own.is_floating_point() else (target != -100).double()
    count = (kept if cw is None or own.is_floating_point() else kept * cw[target.clamp(0)]).sum()
    loss = rows * factors.double().nan_to_num()
    total = loss.sum() / count if reduction == "mean" else loss.sum()
    total.backward()
    return (loss if reduction == "none" else total).detach(), h.grad, w.grad


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["classes", "smooth", "class weights", "probabilities"])
def test_against_float64(backend, reduction, kind):
    hidden, weight, target, factors = operands(probabilities=kind == "probabilities")
    options = {"label_smoothing": 0.1} if kind == "smooth" else {}
    cw = torch.linspace(0.5, 2, VOCAB, device=DEVICE) if kind == "class weights" else None
    if kind != "probabilities":
        factors[::5] = float("nan")  # of ignored tokens: it reaches nothing
    want = exact(hidden, weight, target, factors, reduction, cw, **options)
    runs = (
        [(24, False), (None, True)]
        if backend in ("cuda", "triton")
        else [(None, False), (16, False), (None, True)]
    )
    for chunk, frozen in runs:
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        loss = fastloss.linear_cross_entropy(
            h, w, target, weight=cw, reduction=reduction, token_weight=factors, chunk_size=chunk,
            backend=need(backend), **options,
        )  # fmt: skip
        loss.sum().backward()
        got = loss.detach(), h.grad, want[2] if frozen else w.grad
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one.double(), other, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_the_dtype_of_the_loss(backend, dtype):
    hidden, weight, target, factors = operands(dtype)
    want = exact(hidden, weight, target, factors, "mean")
    for loss_dtype in (None, torch.float32):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = fastloss.linear_cross_entropy(
            h, w, target, token_weight=factors.to(dtype), loss_dtype=loss_dtype, backend=need(backend)
        )
        assert loss.dtype == (loss_dtype or dtype)
        loss.backward()
        for one, other in zip((loss.detach(), h.grad, w.grad), want, strict=True):
            torch.testing.assert_close(one.double(), other, atol=2e-2 * float(other.abs().max()), rtol=2e-2)


def test_places_of_a_k_dimensional_loss():
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(9, 6, generator=generator), torch.randn(11, 4, 6, generator=generator)
    target = torch.randint(0, 11, (9, 4), generator=generator)
    factors = torch.rand(9, 4, generator=generator)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    got = fastloss.linear_cross_entropy(*leaves, target, token_weight=factors, loss_dtype=torch.float64)
    own = [x.double().requires_grad_() for x in (hidden, weight)]
    logits = torch.einsum("nd,ckd->nck", *own)
    want = (torch.nn.functional.cross_entropy(logits, target, reduction="none") * factors).mean()
    got.backward()
    want.backward()
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    for one, other in zip(leaves, own, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, atol=1e-5, rtol=1e-5)


def test_tokens_of_any_shape_and_weights_of_one():
    """A weight of 1 changes no bit of the losses of blocks, nor does the shape."""
    hidden, weight, target, _ = operands()
    hidden, target = hidden[:40], target[:40]
    plain = fastloss.linear_cross_entropy(hidden, weight, target)
    shaped = fastloss.linear_cross_entropy(
        hidden.view(5, 8, DIM), weight, target.view(5, 8), token_weight=torch.ones(5, 8, device=DEVICE)
    )
    assert torch.equal(plain, shaped)


def test_three_gemms():
    hidden, weight, target, factors = operands()
    target.clamp_(0)

    def gemms(rows, **options):
        leaves = [hidden[:rows].requires_grad_(), weight.requires_grad_()]
        with FlopCounterMode(display=False) as counter:
            fastloss.linear_cross_entropy(*leaves, target[:rows], memory="fast", **options).backward()
        return counter.get_total_flops() / (2 * rows * DIM * VOCAB)

    def weighted(rows, **options):
        return gemms(rows, token_weight=factors[:rows], **options)

    assert weighted(2 * DIM) == weighted(ROWS, chunk_size=8) == 3  # "fast" keeps the logits of 2 D rows
    assert weighted(ROWS) == gemms(ROWS) < 3.25  # of those past them, and a 25th of all, it makes them again


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [False, True])
def test_compiled(reduction, frozen):
    hidden, weight, target, factors = operands()

    def step(h, w, target, factors):
        return fastloss.linear_cross_entropy(
            h, w, target, token_weight=factors, reduction=reduction, loss_dtype=torch.float64
        )

    results = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        loss = call(h, w, target, factors)
        loss.sum().backward()
        results.append([loss.detach(), h.grad, *([] if frozen else [w.grad])])
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_second_derivatives_and_the_weights_own_gradient():
    hidden, weight, target, factors = operands()
    grads = []
    for f in (factors, factors.clone().requires_grad_()):
        h = hidden.clone().requires_grad_()
        loss = fastloss.linear_cross_entropy(h, weight, target, token_weight=f)
        (first,) = torch.autograd.grad(loss, h, create_graph=True)
        grads.append(torch.autograd.grad(first.square().sum(), h)[0])
    torch.testing.assert_close(grads[0], grads[1], atol=1e-7, rtol=1e-4)
    f = factors.clone().requires_grad_()
    per_row = fastloss.linear_cross_entropy(hidden, weight, target, reduction="none")
    fastloss.linear_cross_entropy(hidden, weight, target, reduction="sum", token_weight=f).backward()
    torch.testing.assert_close(f.grad, per_row)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"token_weight": torch.ones(ROWS, dtype=torch.int64)}, "token_weight: expected float32"),
        ({"token_weight": torch.ones(ROWS + 1)}, "token_weight: expected shape"),
        ({"token_weight": torch.ones(ROWS, 1)}, "token_weight: expected shape"),
        ({"token_weight": 2.0}, "token_weight: expected a torch.Tensor"),
        ({"loss_dtype": torch.int32}, "loss_dtype: expected"),
        ({"loss_dtype": "float32"}, "loss_dtype: expected"),
    ],
)
def test_bad_input(change, message):
    hidden, weight, target, _ = (x.cpu() for x in operands())
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        fastloss.linear_cross_entropy(hidden, weight, target, **change)


@pytest.mark.parametrize("rows", [0, 5])
def test_a_mean_over_no_token_of_several_places(rows):
    """Heads of several places, no rows or every label ignored: NaN, and gradients of 0 as PyTorch's."""
    hidden = torch.randn(rows, 4, device=DEVICE, requires_grad=True)
    weight = torch.randn(7, 2, 3, 4, device=DEVICE, requires_grad=True)
    target = torch.full((rows, 2, 3), -100, device=DEVICE)
    for factors in (None, torch.ones(rows, 2, 3, device=DEVICE)):
        loss = fastloss.linear_cross_entropy(
            hidden, weight, target, token_weight=factors, loss_dtype=torch.float32
        )
        grads = torch.autograd.grad(loss, (hidden, weight))
        assert loss.isnan() and not any(g.count_nonzero() for g in grads)


def responses(packed):
    """Four responses: of hidden states, and per token what a loss of them takes; padded, or without their prompts."""
    generator = torch.Generator().manual_seed(11)
    hidden, ref = (torch.randn(4, 7, DIM, generator=generator, dtype=torch.float64) for _ in range(2))
    weight, ref_weight = (
        torch.randn(VOCAB, DIM, generator=generator, dtype=torch.float64) / 4 for _ in range(2)
    )
    target = torch.randint(0, VOCAB, (4, 7), generator=generator)
    target[:, :2], target[1, 5:] = -100, -100
    factors = torch.rand(4, 7, generator=generator, dtype=torch.float64) * 2
    x = {
        "hidden": hidden,
        "ref": ref,
        "target": target,
        "factors": factors.masked_fill(target < 0, float("nan")),
    }
    if packed:
        x = {name: value.flatten(0, 1) for name, value in x.items()}
        x["cu_seqlens"] = torch.arange(5) * 7
    x = {**x, "weight": weight, "ref_weight": ref_weight}
    return {name: value.to(DEVICE) for name, value in x.items()}


def weighted_sums(hidden, weight, x):
    logp = (hidden @ weight.T).log_softmax(-1).gather(-1, x["target"].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(x["target"] < 0, 0.0, logp * x["factors"].nan_to_num()).reshape(4, 7).sum(1)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["dpo", "dpo, chunks", "dpo, none", "kto"])
def test_of_log_probs_in_sequences(kind, packed, backend):
    """A factor of each token's log-prob in both models' sums: the losses of sums that are made by hand."""
    x = responses(packed)
    exact = [x[name].clone().requires_grad_() for name in ("hidden", "weight")]
    sums, ref = weighted_sums(*exact, x), weighted_sums(x["ref"], x["ref_weight"], x)
    reduction = "none" if kind == "dpo, none" else "mean"
    good = torch.tensor([True, False, True, True], device=DEVICE)
    if kind == "kto":
        right = fastloss.kto_loss(sums, ref, good, kl=0.1).loss
    else:
        right = fastloss.dpo_loss(sums[:2], sums[2:], ref[:2], ref[2:], reduction=reduction).loss
    right.sum().backward()
    leaves = [x[name].float().requires_grad_() for name in ("hidden", "weight")]
    options = {
        "ref_input": x["ref"].float(),
        "ref_weight": x["ref_weight"].float(),
        "token_weight": x["factors"],
    }
    options |= {"backend": need(backend), "cu_seqlens": x.get("cu_seqlens")}
    if kind == "kto":
        out = fastloss.linear_kto_loss(*leaves, x["target"], good, kl=0.1, **options)
        torch.testing.assert_close(out.logps.double(), sums.detach(), atol=1e-5, rtol=1e-5)
    else:
        options |= {"reduction": reduction, "chunk_size": 16 if kind == "dpo, chunks" else None}
        out = fastloss.linear_dpo_loss(*leaves, x["target"], **options)
        torch.testing.assert_close(out.chosen_logps.double(), sums[:2].detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.loss.double(), right.detach(), atol=1e-5, rtol=1e-5)
    out.loss.sum().backward()
    for one, other in zip(leaves, exact, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, atol=1e-6, rtol=3e-5)


def test_of_log_probs_what_it_leaves_alone_and_refuses():
    """The likelihood term and the lengths are as without; a weight that does not fit is named."""
    x = responses(False)
    given = x["hidden"], x["weight"], x["target"]
    factors = torch.where(x["target"] < 0, 0.0, 0.5)
    options = {"loss_type": ["sft"], "reference_free": True, "backend": need("cpu")}
    plain = fastloss.linear_preference_loss(*given, **options)
    half = fastloss.linear_preference_loss(*given, token_weight=factors, **options)
    torch.testing.assert_close(half.loss, plain.loss)
    torch.testing.assert_close(half.chosen_logps, plain.chosen_logps * 0.5)
    tails = {"loss_type": "sigmoid", "reference_free": True, "ld_alpha": 0.3}
    both = fastloss.linear_preference_loss(*given, token_weight=factors, **tails)
    torch.testing.assert_close(
        both.chosen_logps, fastloss.linear_preference_loss(*given, **tails).chosen_logps * 0.5
    )
    for wrong, error, says in (
        (factors[:3], ValueError, r"token_weight: expected shape \[4, 7\]"),
        (factors.long(), TypeError, "token_weight: expected float32"),
        (
            factors.clone().requires_grad_(),
            ValueError,
            "token_weight: expected a tensor that requires no gradient",
        ),
    ):
        with pytest.raises(error, match=says):
            fastloss.linear_preference_loss(*given, token_weight=wrong, reference_free=True)


def _responses(packed, dtype):
    """(chosen or rejected log-probs, mask or borders, reference, weight) of 3 responses; a masked token's weight is NaN."""
    generator = torch.Generator().manual_seed(7)
    out = []
    for length in (6, 4):
        logps, ref = (-torch.rand(3, length, generator=generator) * 3 for _ in range(2))
        weight = torch.rand(3, length, generator=generator) * 2
        mask = torch.ones(3, length, dtype=torch.bool)
        mask[0, 2:], weight[1, 0] = False, 0.0
        where = mask
        if packed:
            logps, ref, weight = (x[mask] for x in (logps, ref, weight))
            where = torch.cat([torch.zeros(1, dtype=torch.int32), mask.sum(1).cumsum(0).int()])
        else:
            logps[~mask] = ref[~mask] = weight[~mask] = float("nan")
        out.append(
            [
                x.to(DEVICE, dtype) if x.is_floating_point() else x.to(DEVICE)
                for x in (logps, where, ref, weight)
            ]
        )
    return out


def _gradients_of(out, leaves):
    out.loss.sum().backward()
    return [out.loss.detach(), *(x.grad.nan_to_num() for x in leaves)]


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", ["sigmoid", "sft"]])
def test_pairs_of_log_probs(loss_type, packed, backend):
    """As weights times log-probs would have it, whose likelihood term stays without them."""
    need(backend)
    dtype = torch.float32
    where = "cu_seqlens" if packed else "mask"
    (c, c_where, rc, c_weight), (r, r_where, rr, r_weight) = _responses(packed, dtype)
    places = {f"chosen_{where}": c_where, f"rejected_{where}": r_where}
    leaves = [x.clone().requires_grad_() for x in (c, r)]
    weights = {"chosen_token_weight": c_weight, "rejected_token_weight": r_weight}
    got = _gradients_of(
        fastloss.preference_loss(*leaves, rc, rr, loss_type=loss_type, backend=backend, **places, **weights),
        leaves,
    )
    own = [x.double().requires_grad_() for x in (c, r)]
    zero = [torch.nan_to_num(x.double()) for x in (c_weight, r_weight)]
    nll = {}
    if isinstance(loss_type, list):
        kept = own[0].nan_to_num() if not packed else own[0]
        sizes = c_where.diff() if packed else c_where.sum(1)
        sums = torch.stack([x.sum() for x in kept.split(sizes.tolist())]) if packed else kept.sum(1)
        nll = {"chosen_nll_logps": sums, "chosen_nll_lengths": sizes}
    weighted = [
        x.nan_to_num() * w for x, w in zip((*own, rc.double(), rr.double()), (*zero, *zero), strict=True)
    ]
    want = _gradients_of(
        fastloss.preference_loss(*weighted, loss_type=loss_type, backend="reference", **places, **nll), own
    )
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)
    # Sums of the reference that have the weights already.
    sums = [
        x.sum(1) if not packed else torch.stack([y.sum() for y in x.split(p.diff().tolist())])
        for x, p in zip(weighted[2:], (c_where, r_where), strict=True)
    ]
    given = fastloss.preference_loss(
        c, r, *(x.to(dtype) for x in sums), loss_type=loss_type, backend=backend, **places, **weights
    )
    torch.testing.assert_close(given.loss, got[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("function", [fastloss.kto_loss, fastloss.bco_loss])
def test_single_responses_of_log_probs(function, packed, backend):
    need(backend)
    logps, where, ref, weight = _responses(packed, torch.float32)[0]
    options = {"cu_seqlens" if packed else "mask": where} | (
        {"kl": 0.1} if function is fastloss.kto_loss else {}
    )
    good = torch.tensor([True, False, True], device=DEVICE)
    x, y = logps.clone().requires_grad_(), logps.double().requires_grad_()
    got = _gradients_of(function(x, ref, good, token_weight=weight, backend=backend, **options), [x])
    zero = weight.double().nan_to_num()
    want = function(
        y.nan_to_num() * zero, ref.double().nan_to_num() * zero, good, backend="reference", **options
    )
    for one, other in zip(got, _gradients_of(want, [y]), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


def test_weights_of_log_probs_that_do_not_fit():
    (c, mask, *_, weight), (r, other, *_) = _responses(False, torch.float32)
    places = {"chosen_mask": mask, "rejected_mask": other, "reference_free": True}
    good = torch.tensor([True, False, True], device=DEVICE)
    for wrong, kind, text in (
        (weight[:, :3], ValueError, r"token_weight: expected shape \[3, 6\]"),
        (mask, TypeError, "token_weight: expected float32"),
        (
            weight.clone().requires_grad_(),
            ValueError,
            "token_weight: expected a tensor that requires no gradient",
        ),
    ):
        with pytest.raises(kind, match="chosen_" + text):
            fastloss.preference_loss(c, r, chosen_token_weight=wrong, **places)
        with pytest.raises(kind, match=text):
            fastloss.kto_loss(c, None, good, kl=0.0, mask=mask, token_weight=wrong)
    sums = torch.zeros(3, device=DEVICE)
    with pytest.raises(ValueError, match=r"rejected_token_weight: expected token log-probs \[B, T\]"):
        fastloss.dpo_loss(sums, sums, sums, sums, rejected_token_weight=sums)
    for function, options in ((fastloss.kto_loss, {"kl": 0.0}), (fastloss.bco_loss, {})):
        with pytest.raises(ValueError, match=r"token_weight: expected token log-probs \[B, T\]"):
            function(sums, sums, good, token_weight=sums, **options)


STRIDES = {
    "every other": lambda w: torch.stack([w, torch.full_like(w, 7.0)], -1)[..., 0],
    "imaginary part": lambda w: torch.complex(torch.full_like(w, 7.0), w).imag,
    "transposed": lambda w: w.reshape(w.shape[0], -1).t().contiguous().t().reshape(w.shape),
    "expanded": lambda w: w.new_full((1,), 0.5).expand(w.shape),
}


def _kto(logps, ref, token_weight, cu_seqlens, backend):
    desirable = torch.tensor([True, False, True], device=DEVICE)
    options = {"cu_seqlens": cu_seqlens, "token_weight": token_weight, "reduction": "sum", "backend": backend}
    if cu_seqlens is None:
        options["mask"] = torch.ones(logps.shape, dtype=torch.bool, device=DEVICE)
    return fastloss.kto_loss(logps, ref, desirable, loss_type="apo_zero_unpaired", **options).loss


def _preference(logps, ref, token_weight, cu_seqlens, backend):
    sides = ("chosen", "rejected")
    options = {f"{side}_token_weight": token_weight for side in sides} | {"backend": backend, "beta": 0.5}
    kind = "cu_seqlens" if cu_seqlens is not None else "mask"
    value = torch.ones(logps.shape, dtype=torch.bool, device=DEVICE) if cu_seqlens is None else cu_seqlens
    options |= {f"{side}_{kind}": value for side in sides}
    return fastloss.preference_loss(logps, 0.5 * logps.detach(), ref, 0.9 * ref, **options).loss


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("loss", [_kto, _preference])
def test_weights_that_are_not_dense_are_those_that_are(loss, packed, strides, backend):
    """The kernels read them one after the other from the first's address."""
    need(backend)
    generator = torch.Generator().manual_seed(0)
    shape = (15,) if packed else (3, 5)
    logps, ref, weight = (torch.randn(shape, generator=generator).to(DEVICE) for _ in range(3))
    cu_seqlens = torch.tensor([0, 4, 4 + 5, 15], dtype=torch.int32, device=DEVICE) if packed else None
    found = []
    for given in (STRIDES[strides](weight), STRIDES[strides](weight).contiguous()):
        x = logps.clone().requires_grad_()
        value = loss(x, ref, given, cu_seqlens, backend)
        value.backward()
        found.append((value.detach(), x.grad))
    (value, grad), (right, right_grad) = found
    assert torch.equal(value, right) and torch.equal(grad, right_grad)
