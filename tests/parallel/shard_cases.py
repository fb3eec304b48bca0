"""Every loss from a head whose vocabulary is cut, beside the same loss of the whole: what a process of tests/parallel runs.

``python shard_cases.py FILE RANK WORLD OUT`` joins a group (gloo, a file store), computes each case with its own shard and alone,
and writes what differs. The right values are those of the whole vocabulary in float64.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import loss_parallel

import fastloss
from fastloss.engine import shards
from fastloss.parallel import (
    SequenceShard,
    sequence_shard,
    sum_over_shards,
    vocab_parallel_cross_entropy,
    vocab_shards,
)
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
        "teacher_hidden": randn(ROWS, DIM) * 0.5,
        "teacher_weight": randn(VOCAB, DIM) * 0.5,
        "teacher_bias": randn(VOCAB) * 0.5,
        "probabilities": randn(ROWS, VOCAB).softmax(-1),
    }
    own = torch.Generator().manual_seed(4)
    given["lora_a"] = torch.randn(3, DIM, generator=own, dtype=torch.float64) * 0.5
    given["lora_b"] = torch.randn(VOCAB, 3, generator=own, dtype=torch.float64) * 0.5
    given = {name: x.to(torch.bfloat16).double() for name, x in given.items()}
    target[::5] = -100
    ids = torch.randint(0, VOCAB, (ROWS, 5), generator=g)
    ids[1], ids[2, 3:], ids[3, 1] = -1, -1, ids[3, 0]  # no class, padding, a class twice
    kept = torch.rand(ROWS, VOCAB, generator=g) < 0.15
    kept[torch.arange(ROWS), target.clamp(min=0)] = True
    kept[4] = False
    kept[4, int(target[4])] = True
    teacher = randn(ROWS, VOCAB).log_softmax(-1).gather(1, ids.clamp(min=0))
    return {**given, "target": target, "ids": ids, "teacher_logprobs": teacher, "kept": kept.to(torch.int64)}


def support_of(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Ragged sets, of one class to a few dozen, over all shards."""
    return fastloss.support_from_mask(x["kept"])


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


def _named(options: dict[str, Any], x: dict[str, Tensor]) -> dict[str, Any]:
    """A temperature that is a name is one for each token."""
    return {k: x[v] if k == "temperature" and isinstance(v, str) else v for k, v in options.items()}


def distillation(**options: Any) -> Case:
    def run(x: dict[str, Tensor], how: dict[str, Any]) -> list[Tensor]:
        out = fastloss.linear_distillation_loss(
            x["hidden"], x["weight"], x["teacher_hidden"], x["teacher_weight"], x["target"], linear_bias=x["bias"],
            teacher_bias=x["teacher_bias"], token_weight=x["token_weight"], **_named(options, x), **how,
        )  # fmt: skip
        return [out.loss, *out.metrics.values()]

    return run


def topk_distillation(**options: Any) -> Case:
    def run(x: dict[str, Tensor], how: dict[str, Any]) -> list[Tensor]:
        out = fastloss.linear_topk_distillation_loss(
            x["hidden"], x["weight"], x["ids"], x["teacher_logprobs"], x["target"], linear_bias=x["bias"],
            token_weight=x["token_weight"], **_named(options, x), **how,
        )  # fmt: skip
        return [out.loss, *out.metrics.values()]

    return run


def selected(**options: Any) -> Case:
    def run(x: dict[str, Tensor], how: dict[str, Any]) -> list[Tensor]:
        return [
            fastloss.linear_selected_logprobs(
                x["hidden"], x["weight"], x["ids"], linear_bias=x["bias"], **_named(options, x), **how
            )
        ]

    return run


def over_support(*outputs: str, **options: Any) -> Case:
    def run(x: dict[str, Tensor], how: dict[str, Any]) -> list[Tensor]:
        return statistics(*outputs, support=support_of(x), **options)(x, how)

    return run


def policy_over_support(**options: Any) -> Case:
    def run(x: dict[str, Tensor], how: dict[str, Any]) -> list[Tensor]:
        return policy(support=support_of(x), with_mass=True, **options)(x, how)

    return run


def probabilities(**options: Any) -> Case:
    """Class probabilities as targets: of the columns that the weight has."""

    def run(x: dict[str, Tensor], how: dict[str, Any]) -> list[Tensor]:
        return cross_entropy(**options)({**x, "target": x["own_probabilities"]}, how)

    return run


def masked(function: Case) -> Case:
    """The classes from 90 on are padding, by a bias of -inf: in an uneven cut they are all that the last process has."""

    def run(x: dict[str, Tensor], how: dict[str, Any]) -> list[Tensor]:
        target = torch.where(x["target"] >= 90, 7, x["target"])
        ids = torch.where(x["ids"] >= 90, 8, x["ids"])
        own = {name: x[name].masked_fill(x["classes"] >= 90, -torch.inf) for name in ("bias", "teacher_bias")}
        return function({**x, **own, "target": target, "ids": ids}, how)

    return run


def with_lora(function: Case) -> Case:
    """A LoRA on the head, B cut as the weight."""

    def run(x: dict[str, Tensor], how: dict[str, Any]) -> list[Tensor]:
        return function(x, {**how, "lora": (x["lora_a"], x["lora_b"], 0.5)})

    return run


def of_cut_logits(function: Case) -> Case:
    def run(x: dict[str, Tensor], how: dict[str, Any]) -> list[Tensor]:
        return function(x, {k: v for k, v in how.items() if k != "chunk_size"})

    return run


def distillation_of_logits(**options: Any) -> Case:
    def run(x: dict[str, Tensor], how: dict[str, Any]) -> list[Tensor]:
        teacher = torch.nn.functional.linear(x["teacher_hidden"], x["teacher_weight"], x["teacher_bias"])
        out = fastloss.distillation_loss(logits_of(x), teacher, x["target"], **_named(options, x), **how)
        return [out.loss, *out.metrics.values()]

    return of_cut_logits(run)


def topk_of_logits(**options: Any) -> Case:
    def run(x: dict[str, Tensor], how: dict[str, Any]) -> list[Tensor]:
        out = fastloss.topk_distillation_loss(
            logits_of(x), x["ids"], x["teacher_logprobs"], x["target"], **_named(options, x), **how
        )
        return [out.loss, *out.metrics.values()]

    return of_cut_logits(run)


def selected_of_logits(x: dict[str, Tensor], how: dict[str, Any]) -> list[Tensor]:
    return [fastloss.selected_logprobs(logits_of(x), x["ids"], temperature=0.7, softcap=4.0, **how)]


def support_of_logits(x: dict[str, Tensor], how: dict[str, Any]) -> list[Tensor]:
    out = fastloss.token_stats(logits_of(x), x["target"], outputs=KEPT, support=support_of(x), **how)
    return [s.double() for s in out if s is not None]


def logits_of(x: dict[str, Tensor]) -> Tensor:
    return torch.nn.functional.linear(x["hidden"], x["weight"], x["bias"])


def from_logits(**options: Any) -> Case:
    def run(x: dict[str, Tensor], how: dict[str, Any]) -> list[Tensor]:
        own = {
            name: x[value] if isinstance(value, str) and value in x else value
            for name, value in options.items()
        }
        how = {k: v for k, v in how.items() if k != "chunk_size"}
        target = x["own_probabilities"] if own.pop("soft", False) else x["target"]
        group = how.pop("group", None)
        if group is None:
            return [fastloss.cross_entropy(logits_of(x), target, **own, **how)]
        return [vocab_parallel_cross_entropy(logits_of(x), target, group, **own, **how)]

    return run


def statistics_of_logits(x: dict[str, Tensor], how: dict[str, Any]) -> list[Tensor]:
    how = {k: v for k, v in how.items() if k != "chunk_size"}
    out = fastloss.token_stats(
        logits_of(x), x["target"], outputs=("logprobs", "entropy"), temperature=0.7, **how
    )
    return [s for s in out if s is not None]


ALL = ("logprobs", "entropy", "logsumexp", "log_sum_sq_probs", "mean_logits", "is_top1", "argmax")
KEPT = ("logprobs", "entropy", "logsumexp", "log_sum_sq_probs", "mean_logits", "is_top1", "log_mass")
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
    "class probabilities: smoothing, class weights, z-loss, cap": probabilities(
        weight="class_weight", label_smoothing=0.2, z_loss=1e-2, softcap=4.0
    ),
    "class probabilities: none, statistics": probabilities(reduction="none", return_stats=True),
    "distillation": distillation(),
    "distillation: jsd, hard loss, temperature": distillation(
        divergence="jsd", interpolation=0.3, temperature=2.0, hard_loss_coef=0.5
    ),
    "distillation: reverse KL, hard loss, none": distillation(
        divergence="reverse_kl", hard_loss_coef=0.5, reduction="none"
    ),
    "top-k distillation": topk_distillation(),
    "top-k distillation: none of the tail, cap, hard loss, temperature": topk_distillation(
        tail="none", softcap=4.0, hard_loss_coef=0.5, temperature=2.0
    ),
    "top-k distillation: renormalised, reverse KL, hard loss, none": topk_distillation(
        tail="renormalize", divergence="reverse_kl", hard_loss_coef=0.5, reduction="none"
    ),
    "log-probs of given classes": selected(temperature=0.7, softcap=4.0),
    "distillation: a temperature for each token, hard loss": distillation(
        divergence="jsd", temperature="temperature", temperature_squared=True, hard_loss_coef=0.5
    ),
    "top-k distillation: a temperature for each token, hard loss": topk_distillation(
        temperature="temperature", temperature_squared=True, softcap=4.0, hard_loss_coef=0.5
    ),
    "log-probs of given classes: a temperature for each token": selected(
        temperature="temperature", softcap=4.0
    ),
    "logits: distillation: a temperature for each token": distillation_of_logits(temperature="temperature"),
    "logits: top-k distillation: a temperature for each token": topk_of_logits(temperature="temperature"),
    "kept classes: statistics": over_support(*KEPT, temperature=0.7, softcap=4.0),
    "kept classes: GRPO with entropy": policy_over_support(loss_type="grpo", entropy_coef=0.01),
    "kept classes: GSPO, sequence ratios": policy_over_support(loss_type="gspo"),
    "logits: class probabilities, smoothing, class weights, z-loss": from_logits(
        soft=True, weight="class_weight", label_smoothing=0.2, z_loss=1e-2
    ),
    "logits: distillation, hard loss, temperature, none": distillation_of_logits(
        hard_loss_coef=0.5, temperature=2.0, reduction="none"
    ),
    "logits: top-k distillation, hard loss, temperature": topk_of_logits(hard_loss_coef=0.5, temperature=2.0),
    "logits: top-k distillation, hard loss": topk_of_logits(hard_loss_coef=0.5),
    "logits: log-probs of given classes": of_cut_logits(selected_of_logits),
    "logits: kept classes": of_cut_logits(support_of_logits),
    "LoRA: cross-entropy, smoothing, z-loss": with_lora(cross_entropy(label_smoothing=0.1, z_loss=1e-2)),
    "LoRA: statistics": with_lora(statistics("logprobs", "entropy", "argmax")),
    "LoRA: DPO": with_lora(preference(loss_type="sigmoid", with_ref=True)),
    "LoRA: GSPO, sequence ratios": with_lora(policy(loss_type="gspo")),
    "LoRA: distillation, hard loss": with_lora(distillation(hard_loss_coef=0.5)),
    "LoRA: top-k distillation, hard loss, temperature": with_lora(
        topk_distillation(hard_loss_coef=0.5, temperature=2.0)
    ),
    "padding: statistics": masked(statistics("logprobs", "entropy", "is_top1", "argmax", "log_sum_sq_probs")),
    "padding: cross-entropy, z-loss": masked(cross_entropy(z_loss=1e-2)),
    "padding: distillation, hard loss": masked(distillation(hard_loss_coef=0.5)),
    "padding: log-probs of given classes": masked(selected()),
    "padding: kept classes": masked(over_support("logprobs", "entropy")),
    "logits, padding: statistics": masked(statistics_of_logits),
    "logits, padding: top-k distillation": masked(topk_of_logits()),
}
# (shards, dtype, whether the weight is frozen, chunk_size)
VARIANTS = [
    *itertools.product(SIZES, ("float64",), (False, True), (None,)),
    *itertools.product(("uneven",), ("float32",), (False, True), (None, 8)),
    ("uneven", "bfloat16", False, None),
]
VARIANTS_OF_FOUR = [(layout, "float64", False, None) for layout in SIZES] + [("uneven", "float32", True, 8)]
LEAVES = ("hidden", "weight", "bias", "lora_a", "lora_b")
CUT = ("weight", "bias", "ref_weight", "teacher_weight", "teacher_bias", "lora_b")


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
    for name in CUT:
        x[name] = x[name][columns]
    x["own_probabilities"] = x["probabilities"][:, columns]
    x["classes"] = torch.arange(VOCAB)[columns]
    for name in LEAVES:
        x[name] = x[name].clone().requires_grad_(not frozen or name not in ("weight", "bias"))
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
    largest = torch.where(b.isfinite(), b.abs(), 0.0).amax().clamp(min=1)
    return float(torch.where(same, 0.0, (a - b).abs()).max() / largest)


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
        expected = expected[columns] if name in CUT else expected
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
    lora = x["lora_a"].clone().requires_grad_(), x["lora_b"].clone().requires_grad_()
    fastloss.linear_cross_entropy(h, w, target, lora=(*lora, 0.5)).backward()
    a, b = spread(x["lora_a"], Replicate()).requires_grad_(), spread(x["lora_b"], Shard(0)).requires_grad_()
    cut = spread(weight, Shard(0))
    fastloss.linear_cross_entropy(spread(hidden, Replicate()), cut, target, lora=(a, b, 0.5)).backward()
    found["LoRA"] = max(distance(p.grad.full_tensor(), q.grad) for p, q in zip((a, b), lora, strict=True))
    found["functions"] = further_dtensors(spread)
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
        "LoRA over tokens": lambda: ce(
            spread(hidden, Shard(0)), cut, spread(target, Replicate()), lora=(a, b, 0.5)
        ),
        "LoRA cut otherwise": lambda: ce(
            hidden, cut, target, lora=(a, spread(x["lora_b"], Replicate()), 0.5)
        ),
        "tokens without a cut": lambda: ce(spread(hidden, Shard(0)), spread(weight, Replicate()), target),
        "no group": lambda: ce(hidden, weight, target, group="tp"),
        "places": lambda: ce(hidden, weight.view(VOCAB, 1, DIM), target.view(ROWS, 1), group=group),
        "a teacher cut elsewhere": lambda: fastloss.linear_distillation_loss(
            hidden, weight[: 40 + dist.get_rank()], hidden, weight[: 41 - dist.get_rank()], group=group
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


def further_dtensors(spread: Callable[[Tensor, Any], Any]) -> dict[str, float]:
    """The largest difference of values and gradients, of every function that takes a vocabulary that is cut."""
    x = numbers()
    columns, whole = Shard(0), Replicate()
    names = {"weight": columns, "bias": columns, "teacher_weight": columns, "teacher_bias": columns}

    def losses(x: dict[str, Any], rows: Any) -> dict[str, list[Any]]:
        head = {"linear_bias": x["bias"]}
        logits, theirs = x["logits"], x["teacher_logits"]
        soft = fastloss.linear_cross_entropy(rows, x["weight"], x["probabilities"], **head)
        taught = fastloss.linear_distillation_loss(
            rows, x["weight"], x["teacher_hidden"], x["teacher_weight"], x["target"], teacher_bias=x["teacher_bias"],
            hard_loss_coef=0.5, **head,
        )  # fmt: skip
        named = fastloss.linear_topk_distillation_loss(
            rows, x["weight"], x["ids"], x["teacher_logprobs"], x["target"], hard_loss_coef=0.5, **head
        )
        some = fastloss.linear_selected_logprobs(rows, x["weight"], x["ids"], **head)
        kept = fastloss.linear_token_stats(
            rows, x["weight"], x["target"], support=support_of(numbers()), **head
        )
        supervised = fastloss.linear_supervised_loss(rows, x["weight"], x["target"], loss_type="eaft", **head)
        out = {
            "class probabilities": [soft],
            "distillation": [taught.loss, *taught.metrics.values()],
            "top-k distillation": [named.loss, *named.metrics.values()],
            "log-probs of given classes": [some],
            "kept classes": [kept.logprobs],
            "EAFT": [supervised.loss],
        }
        if True:
            taught = fastloss.distillation_loss(logits, theirs, x["target"], hard_loss_coef=0.5)
            named = fastloss.topk_distillation_loss(logits, x["ids"], x["teacher_logprobs"], x["target"])
            some = fastloss.selected_logprobs(logits, x["ids"])
            out["logits: distillation"] = [taught.loss]
            out["logits: top-k distillation"] = [named.loss]
            out["logits: log-probs of given classes"] = [some]
        return out

    x["logits"] = logits_of(x)
    x["teacher_logits"] = torch.nn.functional.linear(
        x["teacher_hidden"], x["teacher_weight"], x["teacher_bias"]
    )
    leaves = ("hidden", "weight", "bias", "logits")
    found: dict[str, float] = {}
    for tokens in ("replicated", "tokens"):
        right = {k: v.clone().requires_grad_() if k in leaves else v for k, v in x.items()}
        cut = {k: spread(v, names.get(k, whole)) for k, v in x.items()}
        for k in ("logits", "teacher_logits", "probabilities"):
            cut[k] = spread(x[k], Shard(1))
        if tokens == "tokens":
            cut["hidden"] = spread(x["hidden"], Shard(0))
        cut = {k: v.requires_grad_() if k in leaves else v for k, v in cut.items()}
        expected, got = losses(right, right["hidden"]), losses(cut, cut["hidden"])
        for name, values in expected.items():
            worst = max(
                distance(a.full_tensor().detach(), b.detach()) for a, b in zip(got[name], values, strict=True)
            )
            mine = ("logits",) if name.startswith("logits") else ("hidden", "weight", "bias")
            a = torch.autograd.grad(got[name][0].sum(), [cut[k] for k in mine])
            b = torch.autograd.grad(values[0].sum(), [right[k] for k in mine])
            for p, q, k in zip(a, b, mine, strict=True):
                if p.placements != cut[k].placements:
                    worst = float("inf")
                worst = max(worst, distance(p.full_tensor(), q))
            found[f"{tokens}: {name}"] = worst
    return found


def messages() -> dict[str, dict[str, list[int]]]:
    """[gathered, reduced] bytes of a call and its backward: handed to the collectives, and told by explain."""
    x = {name: t if t.dtype == torch.int64 else t.float() for name, t in numbers().items()}
    world, rank = dist.get_world_size(), dist.get_rank()
    sizes = SIZES["uneven"][world]
    columns = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    for name in ("weight", "teacher_weight"):
        x[name] = x[name][columns].contiguous()
    x["logits"] = (x["hidden"] @ x["weight"].t()).requires_grad_()
    x["hidden"], x["weight"] = x["hidden"].requires_grad_(), x["weight"].requires_grad_()
    group = vocab_shards(x["weight"], dist.group.WORLD)
    h, w, t, ids, logits = x["hidden"], x["weight"], x["target"], x["ids"], x["logits"]
    f, how, hard = fastloss, {"group": group}, {"group": group, "hard_loss_coef": 0.5}
    theirs = x["teacher_hidden"], x["teacher_weight"]
    soft = x["probabilities"][:, columns].contiguous()
    calls: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
        "cross-entropy": (f.linear_cross_entropy, (h, w, t), how),
        "cross-entropy: none": (f.linear_cross_entropy, (h, w, t), {**how, "reduction": "none"}),
        "class probabilities": (f.linear_cross_entropy, (h, w, soft), how),
        "statistics": (f.linear_token_stats, (h, w, t), {**how, "outputs": ("logprobs", "entropy", "argmax")}),
        "distillation": (f.linear_distillation_loss, (h, w, *theirs, t), hard),
        "distillation: none": (f.linear_distillation_loss, (h, w, *theirs), {**how, "reduction": "none"}),
        "top-k distillation": (f.linear_topk_distillation_loss, (h, w, ids, x["teacher_logprobs"], t), hard),
        "log-probs of given classes": (f.linear_selected_logprobs, (h, w, ids), how),
        "kept classes": (
            f.linear_token_stats, (h, w, t), {**how, "support": support_of(x), "outputs": ("logprobs", "log_mass")},
        ),
        "EAFT": (f.linear_supervised_loss, (h, w, t), {**how, "loss_type": "eaft"}),
        "logits: distillation": (f.distillation_loss, (logits, logits.detach(), t), hard),
        "logits: top-k distillation": (f.topk_distillation_loss, (logits, ids, x["teacher_logprobs"], t), hard),
        "logits: log-probs of given classes": (f.selected_logprobs, (logits, ids), how),
        "logits: kept classes": (f.token_stats, (logits, t), {**how, "support": support_of(x)}),
    }  # fmt: skip
    found = {}
    for name, (function, arguments, options) in calls.items():
        told = fastloss.explain(function, *arguments, **options)
        with counting() as counted:
            out = function(*arguments, **options)
            out = out if isinstance(out, Tensor) else next(v for v in out if v is not None)
            out.sum().backward()
        found[name] = {
            "counted": [counted["gathered"], counted["reduced"]],
            "told": [told["gathered_bytes"], told["reduced_bytes"]],
        }
    return found


@contextlib.contextmanager
def counting() -> Iterator[dict[str, int]]:
    """Bytes that this process hands to the collectives of engine/shards.py."""
    world = dist.get_world_size()
    counted = {"gathered": 0, "reduced": 0}
    gather, reduce = shards._all_gather, dist.all_reduce
    summed = 0

    def counted_gather(out: Tensor, own: Tensor, **how: Any) -> Any:
        counted["gathered"] += (world - 1) * own.nbytes
        return gather(out, own, **how)

    def counted_reduce(tensor: Tensor, **how: Any) -> Any:
        nonlocal summed
        summed += tensor.nbytes
        counted["reduced"] = 2 * (world - 1) * summed // world
        return reduce(tensor, **how)

    shards._all_gather, dist.all_reduce = counted_gather, counted_reduce
    try:
        yield counted
    finally:
        shards._all_gather, dist.all_reduce = gather, reduce


def communicated() -> dict[str, Any]:
    """Bytes that a call hands to the collectives, and what explain says of them."""
    x = {name: t if t.dtype == torch.int64 else t.float() for name, t in numbers().items()}
    world, rank = dist.get_world_size(), dist.get_rank()
    sizes = SIZES["uneven"][world]
    columns = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    hidden, weight = x["hidden"].requires_grad_(), x["weight"][columns].requires_grad_()
    how = {"label_smoothing": 0.1, "group": dist.group.WORLD}
    told = fastloss.explain(fastloss.linear_cross_entropy, hidden, weight, x["target"], **how)
    with counting() as counted:
        fastloss.linear_cross_entropy(hidden, weight, x["target"], **how).backward()
    counted["gathered"] -= (world - 1) * 6 * torch.int64.itemsize  # the agreement before it
    return {
        "plan": plan_bytes(x["target"]),
        "counted": counted,
        "told": {k: told[k] for k in ("vocabulary_shards", "gathered_bytes", "reduced_bytes")},
    }


def plan_bytes(target: Tensor) -> dict[str, list[float]]:
    """What fastloss plan says that a bfloat16 head sends, what explain says of one, and what it hands to the collectives: (statistics, d
    hidden)."""
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
    group = vocab_shards(weight, dist.group.WORLD)
    with counting() as counted:
        fastloss.linear_cross_entropy(hidden, weight, learned, group=group).backward()
    return {
        "planned": [planned.statistics_bytes, planned.gradient_bytes],
        "told": [told["gathered_bytes"], told["reduced_bytes"]],
        "counted": [counted["gathered"], counted["reduced"]],
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
        "messages": messages(),
        "megatron": megatron(),
        "class weights": class_weight_gradient(),
    }
    with open(out, "w", encoding="utf-8") as file:
        json.dump({"cases": found, **more}, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
