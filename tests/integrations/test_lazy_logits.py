"""Lazy logits against real ones: what stays lazy gives the same loss and gradients, what does not gives the same numbers."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F

import fastloss
from fastloss.integrations.trl import selective_log_softmax_and_entropy

V, D = 50, 8


def operands(dtype=torch.float64, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, 5, D, generator=g, dtype=torch.float64)
    weight = torch.randn(V, D, generator=g, dtype=torch.float64)
    b = torch.randn(V, generator=g, dtype=torch.float64)
    target = torch.randint(0, V, (2, 5), generator=g)
    target[0, 1] = -100
    leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight, *((b,) if bias else ()))]
    return leaves, target


def both(function, dtype=torch.float64, bias=True):
    """``function(logits, target)`` of lazy and of real logits, with the gradients of hidden, weight and bias."""
    results = []
    for lazy in (True, False):
        leaves, target = operands(dtype, bias)
        logits = fastloss.LazyLogits(*leaves) if lazy else F.linear(*leaves)
        loss = function(logits, target)
        (loss.float() * 3).sum().backward()
        results.append((logits, [loss.detach(), *(t.grad for t in leaves)]))
    return results


def stayed_lazy(z):
    return z.is_lazy


def flat(z, target):
    return z.reshape(-1, V), target.reshape(-1)


STEPS = {
    "view": lambda z, t: flat(z, t),
    "float": lambda z, t: (z.float().view(-1, V) if z.dtype != torch.float64 else z.view(-1, V), t.view(-1)),
    "shifted": lambda z, t: flat(z[..., :-1, :], t[:, 1:]),
    "contiguous": lambda z, t: flat(z[:, :-1].contiguous(), t[:, 1:]),
    "scaled": lambda z, t: flat(z * 0.3 / 2, t),
    "scaled in place": lambda z, t: flat(z.div_(3.0), t),
    "scale tensor": lambda z, t: flat(z * torch.tensor(0.3, dtype=z.dtype), t),
    "scale first": lambda z, t: flat(torch.tensor(0.3, dtype=z.dtype) * z, t),
    "scale per class": lambda z, t: flat(z * torch.linspace(0.1, 2, V, dtype=z.dtype), t),
    "softcap": lambda z, t: flat(torch.tanh(z / 5.0) * 5.0, t),
    "softcap of scaled": lambda z, t: flat((z * 2 / 5.0).tanh() * 5.0 * 0.7, t),
    "added bias": lambda z, t: flat(z + torch.linspace(-1, 1, V, dtype=z.dtype).view(1, V), t),
    "added after a scale": lambda z, t: flat(2 * z + torch.linspace(-1, 1, V, dtype=z.dtype), t),
    "vocabulary cut": lambda z, t: (z[..., :40].reshape(-1, 40), t.clamp(max=39).view(-1)),
    "rows by mask": lambda z, t: (z[t != -100], t[t != -100]),
    "rows by index": lambda z, t: (z[0, torch.tensor([0, 2, 4])], t[0, torch.tensor([0, 2, 4])]),
    "one row": lambda z, t: (z[1, 2], t[1, 2]),
    "flatten": lambda z, t: (z.flatten(0, 1), t.flatten()),
    "squeeze": lambda z, t: (z[:1].squeeze(0), t[0]),
    "unsqueeze": lambda z, t: (z[1].unsqueeze(0).squeeze(0), t[1]),
    "classes second": lambda z, t: (z.transpose(1, 2), t),
    "permuted": lambda z, t: (z.permute(0, 2, 1), t),
    "pieces": lambda z, t: (z.unbind(0)[1], t[1]),
    "split": lambda z, t: (z.split(1)[1][0], t[1]),
    "negative": lambda z, t: flat(-z, t),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("bias", [True, False])
def test_cross_entropy_after_a_step(step, bias):
    (z, lazy), (_, real) = both(lambda z, t: F.cross_entropy(*STEPS[step](z, t)), bias=bias)
    assert stayed_lazy(z)
    for a, b in zip(lazy, real, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


LOSSES = {
    "sum": lambda z, t: F.cross_entropy(*flat(z, t), reduction="sum"),
    "none": lambda z, t: F.cross_entropy(*flat(z, t), reduction="none"),
    "old names": lambda z, t: F.cross_entropy(*flat(z, t), size_average=False),
    "smoothing": lambda z, t: F.cross_entropy(*flat(z, t), label_smoothing=0.2),
    "class weights": lambda z, t: F.cross_entropy(*flat(z, t), weight=torch.linspace(0.1, 2, V, dtype=z.dtype)),
    "ignore zero": lambda z, t: F.cross_entropy(*flat(z, t.clamp(min=0)), ignore_index=0),
    "probabilities": lambda z, t: F.cross_entropy(z.view(-1, V), torch.full((10, V), 1 / V, dtype=z.dtype)),
    "module": lambda z, t: torch.nn.CrossEntropyLoss()(*flat(z, t)),
    "by name": lambda z, t: F.cross_entropy(input=z.view(-1, V), target=t.view(-1)),
    "nll_loss": lambda z, t: F.nll_loss(F.log_softmax(z, -1).view(-1, V), t.view(-1)),
    "gathered": lambda z, t: z.log_softmax(-1).gather(-1, t.clamp(min=0).unsqueeze(-1)).squeeze(-1),
    "three gathered": lambda z, t: z.log_softmax(-1).gather(-1, torch.arange(30).view(2, 5, 3)),
    "gather and logsumexp": lambda z, t: z.gather(-1, t.clamp(min=0).unsqueeze(-1)).squeeze(-1) - z.logsumexp(-1),
}  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss):
    (z, lazy), (_, real) = both(LOSSES[loss])
    assert stayed_lazy(z)
    for a, b in zip(lazy, real, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


ANYTHING = {
    "softmax": lambda z, t: z.softmax(-1).square().sum(),
    "topk": lambda z, t: z.topk(3).values.sum(),
    "clamp": lambda z, t: F.cross_entropy(z.clamp(-1, 1).view(-1, V), t.view(-1)),
    "mask out": lambda z, t: F.cross_entropy(masked(z).view(-1, V), t.clamp(max=30).view(-1)),
    "masked_fill": lambda z, t: z.masked_fill(torch.arange(V) > 30, 0.0).logsumexp(-1),
    "transposed": lambda z, t: z.transpose(1, 2).exp().mean(),
    "cat": lambda z, t: torch.cat([z[:, :2], z[:, 3:]], 1).square().mean(),
    "matmul": lambda z, t: (z @ torch.ones(V, dtype=z.dtype)).square().mean(),
    "tanh twice": lambda z, t: z.tanh().tanh().sum(),
    "added to real": lambda z, t: (torch.ones(V, dtype=z.dtype) + z).exp().mean(),
    "two of them": lambda z, t: (z * z).mean(),
    "entropy by hand": lambda z, t: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1),
    "column": lambda z, t: z[..., 3].square(),
    "own function": lambda z, t: Square.apply(z),
}


def masked(z):
    z[..., 40:] = -torch.inf
    return z


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x * x).sum()

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


@pytest.mark.parametrize("what", ANYTHING)
def test_anything_else_is_asked_of_real_logits(what):
    (_, lazy), (_, real) = both(ANYTHING[what])
    for a, b in zip(lazy, real, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_real_logits_have_the_bits_of_the_head():
    leaves, _ = operands(torch.float32)
    z = fastloss.LazyLogits(*leaves)
    with torch.no_grad():
        expected = torch.tanh(F.linear(*leaves)[:, 1:].float() / 30.0) * 30.0
    assert torch.equal((torch.tanh(z[:, 1:].float() / 30.0) * 30.0).dense(), expected)


def test_it_is_a_tensor_without_memory():
    hidden, weight = torch.zeros(4, D), torch.zeros(V, D, requires_grad=True)
    z = fastloss.LazyLogits(hidden, weight)
    assert isinstance(z, torch.Tensor) and z.requires_grad and z.grad_fn is not None
    assert z.shape == (4, V) and z.size(-1) == V and z.dim() == 2 and len(z) == 4 and z.numel() == 4 * V
    assert z.dtype == torch.float32 and z.device == hidden.device and z.is_floating_point()
    assert z.bfloat16().dtype == torch.bfloat16
    assert "not multiplied out" in repr(z) and stayed_lazy(z)
    assert "tensor(" in str(z.dense())


def test_argmax_keeps_no_logits():
    leaves, _ = operands(torch.float32)
    z = fastloss.LazyLogits(*leaves)
    assert torch.equal(z.argmax(-1), F.linear(*leaves).argmax(-1))
    assert torch.equal(z.argmax(dim=-1, keepdim=True), F.linear(*leaves).argmax(-1, keepdim=True))
    assert stayed_lazy(z)


def test_statistics_of_fastloss():
    leaves, target = operands(torch.float32)
    z, real = fastloss.LazyLogits(*leaves), F.linear(*leaves)
    index = target.clamp(min=0)
    lazy = z.token_stats(index, temperature=0.7, outputs=("logprobs", "entropy"))
    full = fastloss.token_stats(real, index, temperature=0.7, outputs=("logprobs", "entropy"))
    torch.testing.assert_close(lazy.logprobs, full.logprobs)
    torch.testing.assert_close(lazy.entropy, full.entropy)
    logprobs, entropy = selective_log_softmax_and_entropy(z / 0.7, index)
    torch.testing.assert_close(logprobs, full.logprobs)
    torch.testing.assert_close(entropy, full.entropy)
    loss = z.view(-1, V).cross_entropy(target.view(-1), z_loss=0.01, normalizer=7)
    torch.testing.assert_close(
        loss, fastloss.cross_entropy(real.view(-1, V), target.view(-1), z_loss=0.01, normalizer=7)
    )
    assert stayed_lazy(z)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_loss_is_float32_after_float(dtype):
    leaves, target = operands(dtype)
    z = fastloss.LazyLogits(*leaves)
    loss = F.cross_entropy(z.float().view(-1, V), target.view(-1))
    exact = F.cross_entropy(F.linear(*(t.double() for t in leaves)).view(-1, V), target.view(-1))
    assert loss.dtype == torch.float32
    assert abs(loss.item() - exact.item()) < 2e-3 * exact.item()
    assert F.cross_entropy(z.view(-1, V), target.view(-1)).dtype == dtype
    loss.backward()
    assert all(t.grad.dtype == dtype and torch.isfinite(t.grad).all() for t in leaves)


def test_float16_sum_does_not_overflow():
    hidden, weight = torch.zeros(20000, D, dtype=torch.float16), torch.zeros(V, D, dtype=torch.float16)
    loss = F.cross_entropy(
        fastloss.LazyLogits(hidden, weight).float(), torch.zeros(20000, dtype=torch.long), reduction="sum"
    )
    assert abs(loss.item() - 20000 * 3.912023) < 1


def test_autocast_of_the_head_is_remembered():
    leaves, target = operands(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        z, real = fastloss.LazyLogits(*leaves), F.linear(*leaves)
    assert z.dtype == real.dtype == torch.bfloat16
    assert torch.equal(z.dense(), real)
    z = z * 1
    loss = F.cross_entropy(z.float().view(-1, V), target.view(-1))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss, F.cross_entropy(real.float().view(-1, V), target.view(-1)), rtol=2e-2, atol=0
    )
    loss.backward()
    assert all(t.grad.dtype == torch.float32 for t in leaves)


def test_a_view_changed_in_place_is_refused_elsewhere():
    leaves, _ = operands()
    z = fastloss.LazyLogits(*leaves)
    part = z[:, 1:]
    part.mul_(2.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        z.logsumexp(-1)
    assert torch.allclose(part.exp(), (2 * F.linear(*leaves)[:, 1:]).exp())


def test_a_copy_changed_in_place_leaves_the_rest_alone():
    leaves, _ = operands(torch.bfloat16)
    z = fastloss.LazyLogits(*leaves)
    z.float().mul_(2.0)
    z.clone().zero_()
    z[:, 1:].contiguous().zero_()
    torch.testing.assert_close(z.dense(), F.linear(*leaves))


def test_what_was_made_before_a_change_in_place_stays():
    leaves, _ = operands()
    z = fastloss.LazyLogits(*leaves)
    doubled, scaled = z * 2, z / 3
    z.clamp_(-1, 1)
    expected = F.linear(*leaves)
    torch.testing.assert_close(doubled.dense(), 2 * expected)
    torch.testing.assert_close(z.dense(), expected.clamp(-1, 1))
    torch.testing.assert_close(scaled.logsumexp(-1), (expected / 3).logsumexp(-1))


def test_a_change_without_graph_keeps_the_gradient():
    leaves, target = operands()
    grads = []
    for z in (fastloss.LazyLogits(*leaves), F.linear(*leaves)):
        with torch.no_grad():
            z[..., 3] = -5.0
        grads.append(torch.autograd.grad(F.cross_entropy(z.view(-1, V), target.view(-1)), leaves))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_weights_that_changed_are_refused():
    hidden, weight = torch.randn(3, D), torch.randn(V, D)
    z = fastloss.LazyLogits(hidden, weight)
    kept = fastloss.LazyLogits(hidden, weight)
    before = kept.dense().clone()
    weight.mul_(2)
    with pytest.raises(RuntimeError, match="optimizer step"):
        z.softmax(-1)
    with pytest.raises(RuntimeError, match="optimizer step"):
        F.cross_entropy(z, torch.zeros(3, dtype=torch.long))
    assert torch.equal(kept.softmax(-1), before.softmax(-1))


def test_memory_that_was_given_back_is_refused():
    hidden, weight = torch.randn(3, D), torch.randn(V, D)
    z = fastloss.LazyLogits(hidden, weight)
    weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="is gone"):
        z.dense()


def test_without_gradient():
    leaves, target = operands()
    with torch.no_grad():
        z = fastloss.LazyLogits(*leaves)
    assert not z.requires_grad
    assert not F.cross_entropy(z.view(-1, V), target.view(-1)).requires_grad and not z.dense().requires_grad
    z = fastloss.LazyLogits(*leaves)
    assert not z.detach().dense().requires_grad
    with torch.no_grad():
        z.sum()
    assert z.sum().requires_grad  # the numbers asked for without a graph are not the ones kept for it


def test_copies_are_real():
    leaves, _ = operands(torch.float32)
    z = fastloss.LazyLogits(*leaves).detach()
    assert torch.equal(pickle.loads(pickle.dumps(z)), z.dense())
    assert torch.equal(copy.deepcopy(z), z.dense())
    file = io.BytesIO()
    torch.save(z, file)
    file.seek(0)
    assert type(torch.load(file)) is torch.Tensor
    assert (z.numpy() == z.dense().numpy()).all() and z.tolist() == z.dense().tolist()


def test_hooks_see_the_gradient():
    leaves, target = operands()
    z, seen = fastloss.LazyLogits(*leaves), []
    z.register_hook(seen.append)
    F.cross_entropy(z.view(-1, V), target.view(-1)).backward()
    real = F.linear(*leaves).detach().requires_grad_()
    F.cross_entropy(real.view(-1, V), target.view(-1)).backward()
    torch.testing.assert_close(seen[0], real.grad)


@pytest.mark.parametrize(
    "hidden, weight, bias, message",
    [
        ((2, 3), (4, 5), None, "weight: expected shape"),
        ((2, 3), (4, 3), (5,), "bias: expected shape"),
        ((), (4, 3), None, "weight: expected shape"),
    ],
)
def test_shapes_that_do_not_fit(hidden, weight, bias, message):
    with pytest.raises(ValueError, match=message):
        fastloss.LazyLogits(
            torch.zeros(hidden), torch.zeros(weight), None if bias is None else torch.zeros(bias)
        )


def test_dtypes_that_do_not_fit():
    with pytest.raises(ValueError, match="weight: expected dtype"):
        fastloss.LazyLogits(torch.zeros(2, 3), torch.zeros(4, 3, dtype=torch.float64))


def test_bad_targets_are_named():
    z = fastloss.LazyLogits(torch.zeros(2, D), torch.zeros(V, D))
    with pytest.raises(IndexError):
        F.cross_entropy(z, torch.tensor([0, V]))
    with pytest.raises(ValueError):
        F.cross_entropy(z, torch.tensor([0, 1, 2]))


def test_large_bias():
    """A fused head with a bias has been far too low: this one is F.cross_entropy(F.linear(h, W, b)), gradients too."""
    g = torch.Generator().manual_seed(0)
    for n, d, v, scale in ((70, 64, 1000, 8.0), (33, 16, 257, 30.0)):
        h, w, b = (
            torch.randn(n, d, generator=g),
            torch.randn(v, d, generator=g) * 0.1,
            torch.randn(v, generator=g) * scale,
        )
        t = torch.randint(0, v, (n,), generator=g)
        exact = [x.double().requires_grad_() for x in (h, w, b)]
        F.cross_entropy(F.linear(*exact), t).backward()
        ours = [x.clone().requires_grad_() for x in (h, w, b)]
        F.cross_entropy(fastloss.LazyLogits(*ours), t).backward()
        for a, e in zip(ours, exact, strict=True):
            assert (a.grad - e.grad).abs().max() <= 2e-5 * e.grad.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_low_rank_adapter_beside_the_head(dtype):
    """The sum of a head and its adapter, in any order, is a loss with ``lora=``: a frozen weight gets no gradient, and no copy."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 16, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(50, 16, generator=generator) / 4).to(dtype)
    # PEFT keeps an adapter in float32 beside a model in bfloat16.
    a, b = (torch.randn(*shape, generator=generator).requires_grad_() for shape in ((3, 16), (50, 3)))
    target = torch.randint(50, (9,), generator=generator)
    leaves = (hidden, a, b)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    z = exact[0] @ (weight.double() + 0.5 * exact[2] @ exact[1]).T
    right = F.cross_entropy(z, target)
    grads = torch.autograd.grad(right, exact)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    some = target.clamp(max=39)[:, None]
    for turned in (False, True):
        base = fastloss.LazyLogits(hidden, weight)
        thin = fastloss.LazyLogits(F.linear(hidden.float(), a), b) * 0.5
        logits = (thin + base if turned else base + thin).to(dtype)
        assert logits.formula.weight is weight and logits.formula.low_rank.shape == b.shape
        loss = F.cross_entropy(logits.float(), target)
        torch.testing.assert_close(loss.double(), right, atol=tolerance, rtol=tolerance)
        for got, want in zip(torch.autograd.grad(loss, leaves, retain_graph=True), grads, strict=True):
            limit = tolerance * float(want.abs().max())
            torch.testing.assert_close(got.double(), want, atol=limit, rtol=tolerance)
        part = logits[:, :40].gather(-1, some)
        torch.testing.assert_close(
            part.double(), z[:, :40].gather(-1, some), atol=4 * tolerance, rtol=tolerance
        )
        found = z.gather(-1, logits.argmax(-1)[:, None])
        torch.testing.assert_close(found, z.amax(-1, keepdim=True), atol=4 * tolerance, rtol=tolerance)
        assert logits.is_lazy
