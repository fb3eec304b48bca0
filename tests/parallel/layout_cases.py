"""Every loss under the layouts of a training run, beside one process that has everything: ``python layout_cases.py STORE RANK WORLD OUT``.

A model of one layer and a head, in float64: tensor parallel (``group=``), with sequence parallelism (DTensors), FSDP2, both on a mesh of
two dimensions, and sequences that are cut (context parallel). Each case is (how far the loss, the metrics, the gradients are off).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from shard_cases import distance
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fastloss
from fastloss.parallel import sequence_shard, sum_over_shards

DIM, LENGTH, NAMED = 16, 8, 4
LAYOUTS = ("tp", "tp+sequence", "fsdp", "tp+fsdp", "cp")


class Data(NamedTuple):
    """Sequences: the first half is preferred to the second. Float64, or int64 ids."""

    x: Tensor  # [B, T, D]
    target: Tensor  # [B, T], -100 where nothing is learned
    old: Tensor  # [B, T]
    advantages: Tensor  # [B]
    good: Tensor  # bool [B]
    ref: Tensor  # [B]
    teacher: Tensor  # [B, T, D]
    ids: Tensor  # [B, T, K]
    logprobs: Tensor  # [B, T, K]
    probabilities: Tensor  # [B, T, V]

    def rows(self, which: Any) -> Data:
        return Data(*(t[which] for t in self))

    def positions(self, which: Tensor) -> Data:
        whole = ("advantages", "good", "ref")
        return Data(*(t if name in whole else t[:, which] for name, t in self._asdict().items()))


def data(pairs: int, vocab: int) -> Data:
    g = torch.Generator().manual_seed(pairs + vocab)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    batch = 2 * pairs
    target = torch.randint(0, vocab, (batch, LENGTH), generator=g)
    target[:, 0], target[1::2, 5] = -100, -100
    ids = torch.randint(0, vocab, (batch, LENGTH, NAMED), generator=g)
    ids[target == -100] = -1
    good = torch.arange(batch) % 3 != 0
    logprobs = randn(batch, LENGTH, 50).log_softmax(-1)[..., :NAMED]
    return Data(
        randn(batch, LENGTH, DIM), target, -randn(batch, LENGTH).abs() - 2, randn(batch), good, -randn(batch).abs() * 20,
        randn(batch, LENGTH, DIM), ids, logprobs, randn(batch, LENGTH, vocab).softmax(-1),
    )  # fmt: skip


class Head(NamedTuple):
    """What a layout gives a loss: its vocabulary matrices, and what the tokens and sequences of all processes count."""

    weight: Any  # [V, D], or own rows
    teacher: Any  # [V', D]
    columns: slice  # the own classes among all
    how: dict[str, Any]  # group=, where the weight is cut and no DTensor
    tokens: int
    sequences: int


Out = tuple[Tensor, list[Tensor]]
Loss = Callable[[Any, Data, Head], Out]


def cross_entropy(h: Any, d: Data, head: Head) -> Out:
    loss = fastloss.linear_cross_entropy(
        h, head.weight, d.target, reduction="sum", normalizer=head.tokens, label_smoothing=0.1, z_loss=1e-2, **head.how
    )  # fmt: skip
    return loss, []


def class_probabilities(h: Any, d: Data, head: Head) -> Out:
    soft = d.probabilities.flatten(0, 1)
    soft = soft if isinstance(soft, DTensor) else soft[:, head.columns]
    loss = fastloss.linear_cross_entropy(
        _flat(h), head.weight, soft, reduction="sum", normalizer=head.sequences * LENGTH, **head.how
    )
    return loss, []


def _flat(h: Any) -> Any:
    """A DTensor flattens no dimension that is cut unevenly: gathered before."""
    if isinstance(h, DTensor):
        h = h.redistribute(h.device_mesh, [Replicate()])
    return h.flatten(0, 1)


def statistics(h: Any, d: Data, head: Head) -> Out:
    out = fastloss.linear_token_stats(
        h, head.weight, d.target, outputs=("logprobs", "entropy", "logsumexp"), detach=(), **head.how
    )
    return sum(((k + 1) * x.sum() for k, x in enumerate(out[:3])), torch.zeros((), dtype=torch.float64)), []


def supervised(h: Any, d: Data, head: Head) -> Out:
    out = fastloss.linear_supervised_loss(
        h, head.weight, d.target, loss_type="eaft", normalizer=head.tokens, reduction="sum", **head.how
    )
    return out.loss, list(out.metrics.values())


def distillation(h: Any, d: Data, head: Head) -> Out:
    out = fastloss.linear_distillation_loss(
        h, head.weight, d.teacher, head.teacher, d.target, divergence="jsd", hard_loss_coef=0.5, normalizer=head.tokens,
        reduction="sum", **head.how,
    )  # fmt: skip
    return out.loss, list(out.metrics.values())


def topk_distillation(h: Any, d: Data, head: Head) -> Out:
    out = fastloss.linear_topk_distillation_loss(
        h, head.weight, d.ids, d.logprobs, d.target, hard_loss_coef=0.5, normalizer=head.tokens, reduction="sum", **head.how
    )  # fmt: skip
    return out.loss, list(out.metrics.values())


def selected(h: Any, d: Data, head: Head) -> Out:
    return fastloss.linear_selected_logprobs(h, head.weight, d.ids, **head.how).sum(), []


def dapo(h: Any, d: Data, head: Head) -> Out:
    target = d.target.clamp(min=0) if not isinstance(d.target, DTensor) else d.target
    mask = d.target != -100
    out = fastloss.linear_policy_loss(
        h, head.weight, target, d.old, d.advantages, mask, loss_type="dapo", entropy_coef=0.01, normalizer=float(head.tokens),
        **head.how,
    )  # fmt: skip
    return out.loss, list(out.metrics.values())


def gspo(h: Any, d: Data, head: Head) -> Out:
    out = fastloss.linear_policy_loss(
        h,
        head.weight,
        d.target.clamp(min=0),
        d.old,
        d.advantages,
        d.target != -100,
        loss_type="gspo",
        **head.how,
    )
    return out.loss * (d.x.shape[0] / head.sequences), list(out.metrics.values())


def dpo(h: Any, d: Data, head: Head) -> Out:
    half = d.ref.shape[0] // 2
    out = fastloss.linear_preference_loss(
        h, head.weight, d.target, ref_chosen_logps=d.ref[:half], ref_rejected_logps=d.ref[half:], reduction="none", **head.how
    )  # fmt: skip
    return out.loss.sum() / (head.sequences / 2), [
        out.chosen_logps,
        out.rejected_logps,
        *out.metrics.values(),
    ]


def kto(h: Any, d: Data, head: Head) -> Out:
    out = fastloss.linear_kto_loss(
        h, head.weight, d.target, d.good, ref_logps=d.ref, kl=0.1, reduction="none", **head.how
    )
    return out.loss.sum() / head.sequences, [out.rewards, out.logps, *out.metrics.values()]


LOSSES: dict[str, Loss] = {
    "cross-entropy": cross_entropy,
    "class probabilities": class_probabilities,
    "statistics": statistics,
    "EAFT": supervised,
    "distillation": distillation,
    "top-k distillation": topk_distillation,
    "log-probs of given classes": selected,
    "DAPO with entropy": dapo,
    "GSPO": gspo,
    "DPO": dpo,
    "KTO": kto,
}


# --- sequences that are cut: what needs a whole one takes the sum over the group of what each process has ----------------------


def _logps(h: Tensor, d: Data, head: Head) -> Tensor:
    logprobs = fastloss.linear_token_stats(h, head.weight, d.target).logprobs
    assert logprobs is not None
    return sum_over_shards(logprobs.sum(-1), dist.group.WORLD)


def gspo_of_pieces(h: Tensor, d: Data, head: Head) -> Out:
    """A sequence's ratio is that of its mean log-prob: one number a sequence, and one token of it to the loss."""
    mask = d.target != -100
    old = torch.stack([torch.where(mask, d.old, 0.0).sum(-1), mask.sum(-1).double()])
    dist.all_reduce(old)
    mean = _logps(h, d, head) / old[1]
    out = fastloss.policy_loss(
        mean[:, None], (old[0] / old[1])[:, None], d.advantages, torch.ones_like(mean, dtype=torch.bool)[:, None], loss_type="gspo"
    )  # fmt: skip
    return out.loss, []


def dpo_of_pieces(h: Tensor, d: Data, head: Head) -> Out:
    logps, half = _logps(h, d, head), d.ref.shape[0] // 2
    out = fastloss.dpo_loss(logps[:half], logps[half:], d.ref[:half], d.ref[half:])
    return out.loss, [logps[:half], logps[half:]]


def kto_of_pieces(h: Tensor, d: Data, head: Head) -> Out:
    logps = _logps(h, d, head)
    out = fastloss.kto_loss(logps, d.ref, d.good, kl=0.1)
    return out.loss, [out.rewards, logps]


WHOLE_SEQUENCES: dict[str, Loss] = {"GSPO": gspo_of_pieces, "DPO": dpo_of_pieces, "KTO": kto_of_pieces}


class Net(nn.Module):
    """A layer and a head's matrix, which the loss reads in the forward."""

    def __init__(self, vocab: int):
        super().__init__()
        g = torch.Generator().manual_seed(vocab)
        self.layer = nn.Parameter(torch.randn(DIM, DIM, generator=g, dtype=torch.float64) / 4)
        self.weight = nn.Parameter(torch.randn(vocab, DIM, generator=g, dtype=torch.float64) / 2)
        self.teacher = torch.randn(vocab, DIM, generator=g, dtype=torch.float64) / 2

    def forward(self, call: Callable[[Tensor, Tensor], Out]) -> Out:
        return call(self.layer, self.weight)


def cuts(total: int, world: int, even: bool) -> list[int]:
    """Parts of ``total``; not even: the first has what it can beside one of each other."""
    if even:
        return [total // world + (r < total % world) for r in range(world)]
    return [total - (world - 1), *[1] * (world - 1)]


def part(sizes: list[int], rank: int) -> slice:
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def added(x: Tensor) -> Tensor:
    total = x.detach().clone()
    dist.all_reduce(total)
    return total


class Found(NamedTuple):
    loss: Tensor
    metrics: list[Tensor] | None  # None: they are those of a part of the batch
    layer: Tensor
    weight: Tensor  # the gradients of all, whole
    columns: slice = slice(None)


def run_layout(layout: str, name: str, even: bool) -> Found:
    world, rank = dist.get_world_size(), dist.get_rank()
    vocab = 96 if even else 97
    d, net = data(4 if even else 5, vocab), Net(vocab)
    tokens, sequences = int((d.target != -100).sum()), d.x.shape[0]
    loss = LOSSES[name]
    if layout == "tp":
        own = part(cuts(vocab, world, even), rank)
        weight = net.weight.detach()[own].clone().requires_grad_()
        head = Head(weight, net.teacher[own], own, {"group": dist.group.WORLD}, tokens, sequences)
        value, metrics = loss((d.x @ net.layer).tanh(), d, head)
        value.backward()
        return Found(value, metrics, net.layer.grad, weight.grad, own)
    if layout == "tp+sequence":
        mesh = init_device_mesh("cpu", (world,))
        weight = distribute_tensor(net.weight.detach(), mesh, [Shard(0)]).requires_grad_()
        teacher = distribute_tensor(net.teacher, mesh, [Shard(0)])
        mine = distribute_tensor(d.x, mesh, [Shard(0)]).to_local()
        h = DTensor.from_local(
            (mine @ net.layer).tanh(), mesh, [Shard(0)], shape=d.x.shape, stride=d.x.stride()
        )
        d = d._replace(probabilities=distribute_tensor(d.probabilities, mesh, [Replicate()]))
        value, metrics = loss(h, d, Head(weight, teacher, slice(None), {}, tokens, sequences))
        value.backward()
        return Found(
            _plain(value), [_plain(m) for m in metrics], added(net.layer.grad), weight.grad.full_tensor()
        )
    if layout == "cp":
        own = part(cuts(LENGTH, world, even), rank)
        pieces = d.positions(torch.arange(LENGTH)[own])
        shard = sequence_shard(pieces.target, dist.group.WORLD, shift=False)
        assert int(shard.tokens) == tokens
        head = Head(net.weight, net.teacher, slice(None), {}, tokens, sequences)
        h = (pieces.x @ net.layer).tanh()
        whole = WHOLE_SEQUENCES.get(name)
        value, metrics = (whole or loss)(h, pieces, head)
        value.backward()
        total = value if whole else added(value)
        return Found(total, metrics if whole else None, added(net.layer.grad), added(net.weight.grad))
    shape = (world,) if layout == "fsdp" else (world // 2, 2)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp")[: len(shape)])
    return _fsdp(loss, d, net, mesh, even, tokens, sequences)


def _fsdp(loss: Loss, d: Data, net: Net, mesh: DeviceMesh, even: bool, tokens: int, sequences: int) -> Found:
    dp = mesh["dp"]
    ways, cut = dp.size(), mesh.ndim == 2
    teacher: Any = net.teacher
    if cut:
        tp = mesh["tp"]
        net.weight = nn.Parameter(distribute_tensor(net.weight.detach(), tp, [Shard(0)]))
        net.layer = nn.Parameter(distribute_tensor(net.layer.detach(), tp, [Replicate()]))
        teacher = distribute_tensor(teacher, tp, [Shard(0)])
    fully_shard(net, mesh=dp, reshard_after_forward=False)
    pairs = part(cuts(sequences // 2, ways, even), dp.get_local_rank())
    numbers = torch.arange(sequences).view(2, -1)[:, pairs].reshape(-1)
    own = d.rows(numbers)
    if cut:
        own = own._replace(probabilities=distribute_tensor(own.probabilities, mesh["tp"], [Replicate()]))

    def call(layer: Any, weight: Any) -> Out:
        layer = layer.to_local() if cut else layer
        return loss((own.x @ layer).tanh(), own, Head(weight, teacher, slice(None), {}, tokens, sequences))

    value, _ = net(call)
    value = _plain(value)
    (value * ways).backward()  # FSDP takes the mean of the gradients
    total = value.detach().clone()
    dist.all_reduce(total, group=dp.get_group())
    return Found(total, None, net.layer.grad.full_tensor(), net.weight.grad.full_tensor())


def _plain(x: Any) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def compare(layout: str, name: str, even: bool) -> dict[str, float]:
    vocab = 96 if even else 97
    d, net = data(4 if even else 5, vocab), Net(vocab)
    head = Head(
        net.weight,
        net.teacher,
        slice(None),
        {"backend": "reference"},
        int((d.target != -100).sum()),
        d.x.shape[0],
    )
    value, metrics = LOSSES[name]((d.x @ net.layer).tanh(), d, head)
    value.backward()
    assert bool(value.isfinite()) and all(
        bool(x.grad.isfinite().all()) for x in net.parameters() if x.grad is not None
    )
    got = run_layout(layout, name, even)
    off = {"loss": distance(got.loss.detach(), value.detach())}
    if got.metrics is not None:
        off["metrics"] = max(
            (distance(a.detach().double(), b.detach().double()) for a, b in zip(got.metrics, metrics, strict=False)), default=0.0
        )  # fmt: skip
    for which, a, b in (
        ("layer", got.layer, net.layer.grad),
        ("weight", got.weight, net.weight.grad[got.columns]),
    ):
        assert b is not None
        largest = (net.layer if which == "layer" else net.weight).grad.abs().max()
        off[which] = distance(a / largest, b / largest)
    return off


def main(store: str, rank: int, world: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    found = {
        f"{layout}, {'even' if even else 'uneven'}, {name}": compare(layout, name, even)
        for layout in LAYOUTS
        if layout != "tp+fsdp" or world > 2
        for even in (True, False)
        for name in LOSSES
    }
    with open(out, "w", encoding="utf-8") as file:
        json.dump(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
