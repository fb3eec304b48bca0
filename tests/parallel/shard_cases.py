"""Every loss from a head whose vocabulary is cut, beside the same loss of the whole: what a process of tests/parallel runs.

``python shard_cases.py FILE RANK WORLD OUT`` joins a group (gloo, a file store), computes each case with its own shard and alone,
and writes what differs. The right values are those of the whole vocabulary in float64.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import loss_parallel

import fastloss
from fastloss.engine import shards
from fastloss.parallel import SequenceShard, sequence_shard, sum_over_shards, vocab_parallel_cross_entropy
from fastloss.plan import config, formulas

ROWS, DIM, VOCAB = 24, 16, 97
PAIRS, LENGTH = 3, 4
SIZES = {
    "even": {2: (49, 48), 4: (25, 24, 24, 24)},
    "uneven": {2: (90, 7), 4: (1, 60, 30, 6)},
    "empty": {2: (97, 0), 4: (0, 50, 47, 0)},
}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def numbers() -> dict[str, Tensor]:
    """Float64, the same in each process."""
    g = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    target = torch.randint(0, VOCAB, (ROWS,), generator=g)
    # Low precision must not decide what is compared: numbers that bfloat16 has.
    given = {
        "hidden": randn(ROWS, DIM) * 0.5,
        "weight": randn(VOCAB, DIM) * 0.5,
        "bias": randn(VOCAB) * 0.5,
        "ref_hidden": randn(ROWS, DIM) * 0.5,
        "ref_weight": randn(VOCAB, DIM) * 0.5,
        "class_weight": torch.rand(VOCAB, generator=g, dtype=torch.float64) + 0.5,
        "token_weight": torch.rand(ROWS, generator=g, dtype=torch.float64),
        "temperature": torch.linspace(0.5, 2.0, ROWS, dtype=torch.float64),
        "old": -randn(2 * PAIRS, LENGTH).abs(),
        "advantages": randn(2 * PAIRS),
    }
    given = {name: x.to(torch.bfloat16).double() for name, x in given.items()}
    target[::5] = -100
    return {**given, "target": target}


Case = Callable[[dict[str, Tensor], dict[str, Any]], list[Tensor]]


def cross_entropy(**options: Any) -> Case:
    def run(x: dict[str, Tensor], how: dict[str, Any]) -> list[Tensor]:
        own = {
            name: x[value] if isinstance(value, str) and value in x else value
            for name, value in options.items()
        }
        target = x["target"].clamp(min=0) if options.get("ignore_index") == 5 else x["target"]
        out = fastloss.linear_cross_entropy(
            x["hidden"], x["weight"], target, linear_bias=x["bias"], **own, **how
        )
        loss, stats = out if isinstance(out, tuple) else (out, ())
        return [loss, *(s.double() for s in stats if s is not None)]

    return run


def statistics(*outputs: str, **options: Any) -> Case:
    def run(x: dict[str, Tensor], how: dict[str, Any]) -> list[Tensor]:
        out = fastloss.linear_token_stats(
            x["hidden"], x["weight"], x["target"], linear_bias=x["bias"], outputs=outputs, **options, **how
        )
        return [s if s.is_floating_point() else s.double() for s in out if s is not None]

    return run


def preference(**options: Any) -> Case:
    def run(x: dict[str, Tensor], how: dict[str, Any]) -> list[Tensor]:
        shape = 2 * PAIRS, LENGTH
        own = dict(options)
        if own.pop("with_ref", False):
            ref = x["ref_hidden"].view(*shape, DIM)
            own.update(ref_input=ref, ref_weight=x["ref_weight"])
        else:
            own["reference_free"] = True
        out = fastloss.linear_preference_loss(
            x["hidden"].view(*shape, DIM),
            x["weight"],
            x["target"].view(shape),
            linear_bias=x["bias"],
            **own,
            **how,
        )
        return [out.loss, out.chosen_logps, out.rejected_logps, *out.metrics.values()]

    return run


def kto(x: dict[str, Tensor], how: dict[str, Any]) -> list[Tensor]:
    shape = 2 * PAIRS, LENGTH
    good = torch.tensor([True, False] * PAIRS)
    out = fastloss.linear_kto_loss(
        x["hidden"].view(*shape, DIM),
        x["weight"],
        x["target"].view(shape),
        good,
        linear_bias=x["bias"],
        ref_input=x["ref_hidden"].view(*shape, DIM),
        ref_weight=x["ref_weight"],
        kl=0.0,
        **how,
    )
    return [out.loss, out.rewards, out.logps, *out.metrics.values()]


def own_loss(x: dict[str, Tensor], how: dict[str, Any]) -> list[Tensor]:
    shape = 2 * PAIRS, LENGTH
    loss, stats = fastloss.linear_sequence_loss(
        x["hidden"].view(*shape, DIM),
        x["weight"],
        x["target"].view(shape),
        lambda part: -torch.nn.functional.logsigmoid(0.1 * part.logps + part.indices).sum(),
        linear_bias=x["bias"],
        outputs=("entropy",),
        return_stats=True,
        **how,
    )
    return [loss, stats.logprobs, stats.entropy]


def policy(**options: Any) -> Case:
    def run(x: dict[str, Tensor], how: dict[str, Any]) -> list[Tensor]:
        shape = 2 * PAIRS, LENGTH
        mask = (x["target"] != -100).view(shape)
        out = fastloss.linear_policy_loss(
            x["hidden"].view(*shape, DIM), x["weight"], x["target"].view(shape), x["old"], x["advantages"], mask,
            linear_bias=x["bias"], **options, **how,
        )  # fmt: skip
        return [out.loss, *out.metrics.values()]

    return run


def supervised(**options: Any) -> Case:
    def run(x: dict[str, Tensor], how: dict[str, Any]) -> list[Tensor]:
        out = fastloss.linear_supervised_loss(
            x["hidden"], x["weight"], x["target"], linear_bias=x["bias"], token_weight=x["token_weight"], **options, **how
        )  # fmt: skip
        return [out.loss, *out.metrics.values()]

    return run


def logits_of(x: dict[str, Tensor]) -> Tensor:
    return torch.nn.functional.linear(x["hidden"], x["weight"], x["bias"])


def from_logits(**options: Any) -> Case:
    def run(x: dict[str, Tensor], how: dict[str, Any]) -> list[Tensor]:
        own = {
            name: x[value] if isinstance(value, str) and value in x else value
            for name, value in options.items()
        }
        how = {k: v for k, v in how.items() if k != "chunk_size"}
        group = how.pop("group", None)
        if group is None:
            return [fastloss.cross_entropy(logits_of(x), x["target"], **own, **how)]
        return [vocab_parallel_cross_entropy(logits_of(x), x["target"], group, **own, **how)]

    return run


def statistics_of_logits(x: dict[str, Tensor], how: dict[str, Any]) -> list[Tensor]:
    how = {k: v for k, v in how.items() if k != "chunk_size"}
    out = fastloss.token_stats(
        logits_of(x), x["target"], outputs=("logprobs", "entropy"), temperature=0.7, **how
    )
    return [s for s in out if s is not None]


ALL = ("logprobs", "entropy", "logsumexp", "log_sum_sq_probs", "mean_logits", "is_top1", "argmax")
CASES: dict[str, Case] = {
    "cross_entropy": cross_entropy(),
    "cross_entropy: smoothing": cross_entropy(label_smoothing=0.1),
    "cross_entropy: class weights": cross_entropy(weight="class_weight"),
    "cross_entropy: smoothing, class weights, z-loss, cap": cross_entropy(
        weight="class_weight", label_smoothing=0.2, z_loss=1e-2, softcap=4.0, logit_scale=1.5
    ),
    "cross_entropy: z-loss, statistics": cross_entropy(z_loss=1e-2, return_stats=True),
    "cross_entropy: none": cross_entropy(reduction="none"),
    "cross_entropy: none, smoothing, class weights": cross_entropy(
        reduction="none", label_smoothing=0.2, weight="class_weight"
    ),
    "cross_entropy: sum, token weights": cross_entropy(reduction="sum", token_weight="token_weight"),
    "cross_entropy: a temperature for each token": cross_entropy(
        temperature="temperature", softcap=4.0, label_smoothing=0.1
    ),
    "cross_entropy: normalizer": cross_entropy(normalizer=31),
    "cross_entropy: ignore_index is a class": cross_entropy(ignore_index=5),
    "statistics": statistics("logprobs"),
    "statistics: all": statistics(*ALL),
    "statistics: all, temperature, cap": statistics(*ALL, temperature=0.7, softcap=3.0),
    "EAFT": supervised(loss_type="eaft"),
    "DEFT: none": supervised(loss_type="deft", reduction="none"),
    "DPO": preference(loss_type="sigmoid", with_ref=True),
    "DPO: metrics of tokens": preference(loss_type="sigmoid", with_ref=True, token_metrics=True),
    "SimPO": preference(loss_type="simpo"),
    "ORPO": preference(loss_type="orpo"),
    "AOT, sorted pairs": preference(loss_type="aot"),
    "DPO: none": preference(loss_type="sigmoid", reduction="none"),
    "KTO": kto,
    "a loss of the caller, of sequences": own_loss,
    "GRPO": policy(loss_type="grpo"),
    "DAPO with entropy": policy(loss_type="dapo", entropy_coef=0.01),
    "GSPO, sequence ratios": policy(loss_type="gspo"),
    "CISPO": policy(loss_type="cispo"),
    "logits: cross-entropy": from_logits(),
    "logits: smoothing, class weights, z-loss, cap": from_logits(
        weight="class_weight", label_smoothing=0.1, z_loss=1e-2, softcap=4.0
    ),
    "logits: none": from_logits(reduction="none"),
    "logits: statistics": statistics_of_logits,
}
# (shards, dtype, whether the weight is frozen, chunk_size)
VARIANTS = [
    *itertools.product(SIZES, ("float64",), (False, True), (None,)),
    *itertools.product(("uneven",), ("float32",), (False, True), (None, 8)),
    ("uneven", "bfloat16", False, None),
]
VARIANTS_OF_FOUR = [(layout, "float64", False, None) for layout in SIZES] + [("uneven", "float32", True, 8)]
LEAVES = ("hidden", "weight", "bias")


def outcome(
    case: Case,
    dtype: torch.dtype,
    frozen: bool,
    how: dict[str, Any],
    columns: slice = slice(None),
    logits: bool = False,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """(results, gradients) in float64."""
    x = {name: t if t.dtype == torch.int64 else t.to(dtype) for name, t in numbers().items()}
    x["weight"], x["bias"], x["ref_weight"] = (
        x["weight"][columns],
        x["bias"][columns],
        x["ref_weight"][columns],
    )
    for name in LEAVES:
        x[name] = x[name].clone().requires_grad_(not frozen or name == "hidden")
    out = case(x, how)
    for_gradient = [(k, t) for k, t in enumerate(out) if t.requires_grad]
    total = sum(
        ((1 + 0.1 * k) * t.double() * torch.linspace(1, 2, max(1, t.numel())).view(t.shape)).sum()
        for k, t in for_gradient
    )
    assert isinstance(total, Tensor)
    total.backward()
    if "group" in how and logits:  # each process made its own columns from the hidden states
        dist.all_reduce(x["hidden"].grad)
    results = [t.detach().double() for t in out]
    return results, {name: x[name].grad.double() for name in LEAVES if x[name].grad is not None}


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest number of b (1 at least)."""
    if not b.numel():
        return 0.0 if not a.numel() else float("inf")
    same = (a == b) | (a.isnan() & b.isnan())
    return float(torch.where(same, 0.0, (a - b).abs()).max() / b[~b.isnan()].abs().amax().clamp(min=1))


def compare(
    name: str, dtype: torch.dtype, frozen: bool, sizes: tuple[int, ...], **how: Any
) -> dict[str, Any]:
    """How far this process's results are from the right ones, and their bits."""
    case, logits = CASES[name], name.startswith("logits")
    rank = dist.get_rank()
    first = sum(sizes[:rank])
    columns = slice(first, first + sizes[rank])
    right, gradients = outcome(case, torch.float64, frozen, {"backend": "reference"})
    got, own = outcome(case, dtype, frozen, {**how, "group": dist.group.WORLD}, columns, logits)
    bits = hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in got)).hexdigest()
    out: dict[str, Any] = {
        "bits": bits,
        "values": max(distance(a, b) for a, b in zip(got, right, strict=True)),
    }
    if not set(own) <= set(gradients):
        raise AssertionError(f"gradients of {set(own)}, expected {set(gradients)}")
    for name, expected in gradients.items():
        expected = expected if name == "hidden" else expected[columns]
        largest = gradients[name].abs().max().clamp(min=1e-9)
        out[name] = (
            distance(own[name] / largest, expected / largest) if own.get(name) is not None else float("inf")
        )
    return out


def sequences() -> dict[str, Any]:
    """Shards of sequences against the whole ones: targets, the mean loss and its gradient, the log-probs of whole responses."""
    rank, world = dist.get_rank(), dist.get_world_size()
    g = torch.Generator().manual_seed(5)
    batch, length = 2, 8 * world
    labels = torch.randint(0, VOCAB, (batch, length), generator=g)
    labels[:, 3:5] = -100
    documents = torch.arange(length).div(3, rounding_mode="floor").expand(batch, length)
    mask = torch.rand(batch, length, generator=g) > 0.2
    hidden = torch.randn(batch, length, DIM, generator=g, dtype=torch.float64)
    weight = torch.randn(VOCAB, DIM, generator=g, dtype=torch.float64)
    found: dict[str, Any] = {}
    for layout in ("contiguous", "zigzag"):
        pieces = torch.arange(length).chunk(2 * world)
        own = (
            torch.arange(length).chunk(world)[rank]
            if layout == "contiguous"
            else torch.cat([pieces[rank], pieces[2 * world - 1 - rank]])
        )
        for with_mask, with_documents in ((False, False), (True, False), (True, True)):
            learned = labels.masked_fill(~mask, -100) if with_mask else labels
            target = torch.full_like(labels, -100)
            target[:, :-1] = learned[:, 1:]
            if with_documents:
                target[:, :-1] = target[:, :-1].masked_fill(documents[:, 1:] != documents[:, :-1], -100)
            shard = sequence_shard(
                labels[:, own],
                dist.group.WORLD,
                mask=mask[:, own] if with_mask else None,
                documents=documents[:, own] if with_documents else None,
                layout=layout,
            )
            name = f"{layout}{', mask' if with_mask else ''}{', documents' if with_documents else ''}"
            found[name] = {
                "same targets": bool(torch.equal(shard.target, target[:, own])),
                "tokens": [int(shard.tokens), int((target != -100).sum())],
                **mean_loss(hidden, weight, target, own, shard),
                **response_loss(hidden, weight, target, own, shard),
            }
    return found


def added(x: Tensor) -> Tensor:
    total = x.detach().clone()
    dist.all_reduce(total)
    return total


def mean_loss(
    hidden: Tensor, weight: Tensor, target: Tensor, own: Tensor, shard: SequenceShard
) -> dict[str, float]:
    whole, part = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    right = fastloss.linear_cross_entropy(hidden, whole, target)
    right.backward()
    loss = fastloss.linear_cross_entropy(
        hidden[:, own], part, shard.target, reduction="sum", normalizer=shard.normalizer
    )
    loss.backward()
    assert part.grad is not None and whole.grad is not None
    return {"loss": distance(added(loss), right.detach()), "gradient": distance(added(part.grad), whole.grad)}


def response_loss(
    hidden: Tensor, weight: Tensor, target: Tensor, own: Tensor, shard: SequenceShard
) -> dict[str, float]:
    """DPO of two responses whose tokens lie on all processes."""
    whole, part = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    right = fastloss.linear_token_stats(hidden, whole, target).logprobs.sum(-1)
    expected = fastloss.dpo_loss(right[:1], right[1:], reference_free=True).loss
    expected.backward()
    logps = fastloss.linear_token_stats(hidden[:, own], part, shard.target).logprobs.sum(-1)
    logps = sum_over_shards(logps, dist.group.WORLD)
    loss = fastloss.dpo_loss(logps[:1], logps[1:], reference_free=True).loss
    loss.backward()
    assert part.grad is not None and whole.grad is not None
    return {
        "DPO": distance(loss.detach(), expected.detach()),
        "DPO gradient": distance(added(part.grad), whole.grad),
    }


def dtensors() -> dict[str, Any]:
    """The same functions of DTensors: results, placements, and the words for placements that mean nothing."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x = numbers()
    hidden, weight, target = x["hidden"], x["weight"], x["target"]
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    right = fastloss.linear_cross_entropy(h, w, target, label_smoothing=0.1)
    right.backward()
    assert h.grad is not None and w.grad is not None

    def spread(t: Tensor, place: Any) -> Any:
        return distribute_tensor(t.clone(), mesh, [place])

    found: dict[str, Any] = {}
    places = {
        "replicated": (Replicate(), Shard(0)),
        "tokens": (Shard(0), Shard(0)),
        "whole": (Replicate(), Replicate()),
    }
    for name, (place, cut) in places.items():
        a, b = spread(hidden, place).requires_grad_(), spread(weight, cut).requires_grad_()
        loss = fastloss.linear_cross_entropy(a, b, spread(target, Replicate()), label_smoothing=0.1)
        loss.backward()
        found[name] = {
            "kinds": [
                isinstance(loss, DTensor),
                a.grad.placements == a.placements,
                b.grad.placements == b.placements,
            ],
            "loss": distance(loss.full_tensor().detach(), right.detach()),
            "hidden": distance(a.grad.full_tensor(), h.grad),
            "weight": distance(b.grad.full_tensor(), w.grad),
        }
    logits = hidden @ weight.t()
    stats = fastloss.token_stats(spread(logits, Shard(1)), spread(target, Replicate()))
    found["statistics"] = distance(
        stats.logprobs.full_tensor(), fastloss.token_stats(logits, target).logprobs
    )
    with loss_parallel():
        peer = torch.nn.functional.cross_entropy(spread(logits, Shard(1)), spread(target, Replicate()))
    own_columns = spread(logits, Shard(1)).to_local()
    found["torch's loss_parallel"] = distance(
        vocab_parallel_cross_entropy(own_columns, target, dist.group.WORLD), peer.full_tensor()
    )
    group = dist.group.WORLD
    ce = fastloss.linear_cross_entropy
    wrong: dict[str, Callable[[], Any]] = {
        "weight by columns": lambda: ce(hidden, spread(weight, Shard(1)), target),
        "group beside it": lambda: ce(hidden, spread(weight, Shard(0)), target, group=group),
        "tokens without a cut": lambda: ce(spread(hidden, Shard(0)), spread(weight, Replicate()), target),
        "no group": lambda: ce(hidden, weight, target, group="tp"),
        "probabilities": lambda: ce(
            hidden, weight, torch.full((ROWS, VOCAB), 1 / VOCAB, dtype=torch.float64), group=group
        ),
        "again": lambda: torch.autograd.grad(ce(h, w, target, group=group), h, create_graph=True),
        "target of no shard": lambda: ce(h, w, torch.full((ROWS,), 10**6), group=group),
        "target of one process": lambda: ce(
            h, w, target if dist.get_rank() else target.clamp(min=-1), group=group
        ),
        "tokens of one process": lambda: ce(h[dist.get_rank() :], w, target[dist.get_rank() :], group=group),
        "dtype of one process": lambda: ce(
            *((h, w) if dist.get_rank() else (h.float(), w.float())), target, group=group
        ),
    }
    for name, call in wrong.items():
        try:
            call()
            found[name] = "nothing was raised"
        except (ValueError, TypeError, IndexError, NotImplementedError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def megatron() -> dict[str, float]:
    """Megatron's function as the integration replaces it, over a group: a module of its name and signature stands for the package."""
    from fastloss.integrations import megatron as integration

    def fused_vocab_parallel_cross_entropy(
        vocab_parallel_logits: Tensor, target: Tensor, tp_group: Any
    ) -> Any:
        raise AssertionError("it was replaced")

    module: Any = types.ModuleType("megatron.core.fusions.fused_cross_entropy")
    module.fused_vocab_parallel_cross_entropy = fused_vocab_parallel_cross_entropy
    for name in ("megatron", "megatron.core", "megatron.core.fusions"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules[module.__name__] = module
    world, rank = dist.get_world_size(), dist.get_rank()
    g = torch.Generator().manual_seed(2)
    whole = torch.randn(3, 4, 12 * world, generator=g, dtype=torch.float64).requires_grad_()
    target = torch.randint(0, 12 * world, (3, 4), generator=g)
    right = torch.nn.functional.cross_entropy(whole.flatten(0, 1), target.flatten(), reduction="none").view(
        3, 4
    )
    right.square().sum().backward()
    own = whole.detach()[..., 12 * rank : 12 * (rank + 1)].clone().requires_grad_()
    with integration.apply():
        loss = module.fused_vocab_parallel_cross_entropy(own, target, dist.group.WORLD)
    loss.square().sum().backward()
    assert own.grad is not None and whole.grad is not None
    return {
        "loss": distance(loss.detach(), right.detach()),
        "gradient": distance(own.grad, whole.grad[..., 12 * rank : 12 * (rank + 1)]),
    }


def class_weight_gradient() -> float:
    """Class weights that want a gradient get it, by the definition, from cut logits too."""
    x = numbers()
    logits, target = logits_of(x), x["target"]
    world, rank = dist.get_world_size(), dist.get_rank()
    sizes = SIZES["uneven"][world]
    columns = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    right, own = (x["class_weight"].clone().requires_grad_() for _ in range(2))
    how = {"label_smoothing": 0.1, "z_loss": 1e-2}
    fastloss.cross_entropy(logits, target, right, **how).backward()
    vocab_parallel_cross_entropy(logits[:, columns], target, dist.group.WORLD, own, **how).backward()
    assert right.grad is not None and own.grad is not None
    return distance(own.grad, right.grad)


def communicated() -> dict[str, Any]:
    """Bytes that a call hands to the collectives, and what explain says of them."""
    x = {name: t if t.dtype == torch.int64 else t.float() for name, t in numbers().items()}
    world, rank = dist.get_world_size(), dist.get_rank()
    sizes = SIZES["uneven"][world]
    columns = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    hidden, weight = x["hidden"].requires_grad_(), x["weight"][columns].requires_grad_()
    counted = {"gathered": 0, "reduced": 0}
    gather, reduce = shards._all_gather, dist.all_reduce

    def counted_gather(out: Tensor, own: Tensor, **how: Any) -> Any:
        counted["gathered"] += (world - 1) * own.nbytes
        return gather(out, own, **how)

    def counted_reduce(tensor: Tensor, **how: Any) -> Any:
        counted["reduced"] += 2 * (world - 1) * tensor.nbytes // world
        return reduce(tensor, **how)

    how = {"label_smoothing": 0.1, "group": dist.group.WORLD}
    told = fastloss.explain(fastloss.linear_cross_entropy, hidden, weight, x["target"], **how)
    shards._all_gather, dist.all_reduce = counted_gather, counted_reduce
    try:
        fastloss.linear_cross_entropy(hidden, weight, x["target"], **how).backward()
    finally:
        shards._all_gather, dist.all_reduce = gather, reduce
    counted["gathered"] -= (world - 1) * 6 * torch.int64.itemsize  # the agreement before it
    return {
        "plan": plan_bytes(x["target"]),
        "counted": counted,
        "told": {k: told[k] for k in ("vocabulary_shards", "gathered_bytes", "reduced_bytes")},
    }


def plan_bytes(target: Tensor) -> dict[str, list[float]]:
    """What fastloss plan says that a bfloat16 head sends, and what explain says of one: (statistics, d hidden)."""
    world, rank = dist.get_world_size(), dist.get_rank()
    model = config.from_config(
        {"model_type": "llama", "vocab_size": VOCAB, "hidden_size": DIM, "num_hidden_layers": 1, "num_attention_heads": 1,
         "intermediate_size": DIM}
    )  # fmt: skip
    rows = int((target != -100).sum())
    planned = formulas.vocabulary_parallel(model, rows, world, formulas.Link(1.0, 1.0, 0.0))
    weight = torch.zeros(SIZES["uneven"][world][rank], DIM, dtype=torch.bfloat16, requires_grad=True)
    hidden = torch.zeros(rows, DIM, dtype=torch.bfloat16, requires_grad=True)
    learned = target[target != -100]
    told = fastloss.explain(fastloss.linear_cross_entropy, hidden, weight, learned, group=dist.group.WORLD)
    return {
        "planned": [planned.statistics_bytes, planned.gradient_bytes],
        "told": [told["gathered_bytes"], told["reduced_bytes"]],
    }


def main(store: str, rank: int, world: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    found = {}
    for layout, dtype, frozen, chunk in VARIANTS if world == 2 else VARIANTS_OF_FOUR:
        for name in CASES:
            if not (chunk and name.startswith("logits")):
                key = f"{layout}, {dtype}, {name}{', frozen' if frozen else ''}{', chunks of 8' if chunk else ''}"
                found[key] = compare(name, DTYPES[dtype], frozen, SIZES[layout][world], chunk_size=chunk)
    for backend in ("reference", "triton"):
        for name in (
            "cross_entropy",
            "statistics: all, temperature, cap",
            "logits: smoothing, class weights, z-loss, cap",
        ):
            key = f"uneven, float32, {name}, {backend}"
            found[key] = compare(name, torch.float32, False, SIZES["uneven"][world], backend=backend)
    more = {
        "sequences": sequences(),
        "dtensors": dtensors(),
        "bytes": communicated(),
        "megatron": megatron(),
        "class weights": class_weight_gradient(),
    }
    with open(out, "w", encoding="utf-8") as file:
        json.dump({"cases": found, **more}, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
