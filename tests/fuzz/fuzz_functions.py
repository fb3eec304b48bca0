"""One drawing of arguments for each public function of fastloss; FUNCTIONS names them all."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from fuzz_draw import Case, Draw
from torch import Tensor

import fastloss
from fastloss.losses.policy_options import VARIANTS
from fastloss.tables import AGGREGATIONS, KL_KINDS, LEVELS, STATS

Tensors = dict[str, Tensor]
Options = dict[str, Any]

PAIR_TYPES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm", "simpo", "orpo", "simper",
)  # fmt: skip
WITH_DIVERGENCE = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft", "sigmoid_norm")


def some(d: Draw, **options: Callable[[], Any]) -> Options:
    """Each option with a chance of 1 in 4."""
    return {name: draw() for name, draw in options.items() if d.chance(0.25)}


def given(tensors: dict[str, Tensor | None]) -> Tensors:
    return {name: x for name, x in tensors.items() if x is not None}


# --- routers -----------------------------------------------------------------------------------------------------------


def router_tensors(d: Draw) -> Tensors:
    shape = (d.pick(1, 3), *d.pick((0, 3), (2, 3), (1, 17)))
    tensors = {"router_logits": d.logits((*shape, d.pick(1, 2, 8, 33)), infinite=False)}
    if d.chance(0.4):
        tensors["mask"] = d.mask(shape[1:])
    return tensors


def moe_load_balancing_loss(d: Draw) -> Case:
    tensors = router_tensors(d)
    options = {"top_k": d.whole(1, min(3, tensors["router_logits"].shape[-1]))} | some(
        d,
        scope=lambda: d.pick("layer", "sequence"),
        scores=lambda: "sigmoid",
        per_choice=lambda: True,
    )
    return Case("moe_load_balancing_loss", tensors, options, ("router_logits",))


def router_z_loss(d: Draw) -> Case:
    return Case("router_z_loss", router_tensors(d), {}, ("router_logits",))


# --- cross-entropy and statistics --------------------------------------------------------------------------------------


def loss_options(d: Draw, tensors: Tensors, vocab: int, probabilities: bool) -> Options:
    options = some(
        d,
        reduction=lambda: d.pick("sum", "none", "mean"),
        label_smoothing=lambda: d.pick(0.1, 0.5, 1.0),
        z_loss=lambda: d.pick(1e-4, 0.1),
        logit_scale=lambda: d.pick(0.3, 2.0, -1.0),
        softcap=lambda: d.pick(0.5, 5.0, 30.0),
        return_stats=lambda: True,
    )
    if options.get("reduction") != "none" and d.chance(0.2):
        options["normalizer"] = d.pick(7, 3.5, 1000)
    if d.chance(0.25):
        tensors["weight"] = d.uniform((vocab,), 0.0, 2.0)
        if d.chance(0.2):
            tensors["weight"][d.whole(0, vocab - 1)] = 0.0
    return options


def class_target(d: Draw, shape: tuple[int, ...], vocab: int, options: Options) -> Tensor:
    ignored = d.pick(-100, -100, -100, 0, vocab - 1, -1)
    if ignored != -100:
        options["ignore_index"] = ignored
    target = d.targets(shape, vocab, ignored)
    return target.to(torch.uint8) if d.chance(0.05) and vocab < 200 and bool((target >= 0).all()) else target


def cross_entropy(d: Draw) -> Case:
    vocab = d.vocab()
    kind = d.pick("rows", "rows", "rows", "one", "places")
    lead: tuple[int, ...] = {"one": (), "rows": (d.rows(),), "places": (d.pick(0, 1, 2, 3), d.pick(1, 2, 5))}[
        kind
    ]
    x = d.logits((*lead, vocab)).movedim(-1, min(1, len(lead)))
    probabilities = d.chance(0.2)
    tensors = {"input": x}
    options = loss_options(d, tensors, vocab, probabilities)
    leaves: tuple[str, ...] = ("input",)
    if probabilities:
        p = d.normal((*lead, vocab), 1.0, torch.float64).softmax(-1)
        tensors["target"] = p.to(d.dtype).movedim(-1, min(1, len(lead)))
        leaves = (*leaves, "target")
    else:
        tensors["target"] = class_target(d, lead, vocab, options)
    if "weight" in tensors and d.chance(0.2):
        leaves = (*leaves, "weight")
    return Case("cross_entropy", tensors, options, leaves)


def process_reward_loss(d: Draw) -> Case:
    lead, vocab = d.lead(), d.pick(2, 2, 3)
    tensors = {"logits": d.logits((*lead, vocab)), "labels": d.targets(lead, vocab, -100)}
    options = some(d, reduction=lambda: d.pick("sum", "none"), label_smoothing=lambda: 0.1)
    return Case("process_reward_loss", tensors, options, ("logits",))


def list_options(d: Draw, tensors: Tensors, shape: tuple[int, int]) -> Options:
    if d.chance(0.4):
        tensors["mask"] = d.mask(shape)
    if d.chance(0.2):
        tensors["weights"] = d.uniform(shape[:1], 0.0, 2.0)
    loss_type = d.pick("plackett_luce", "softmax", "pair_logistic", "pair_hinge", "lambda")
    return {"loss_type": loss_type} | some(d, reduction=lambda: d.pick("sum", "none"))


def listwise_reward_loss(d: Draw) -> Case:
    shape = (d.pick(0, 1, 4), d.pick(1, 2, 5))
    tensors = {"scores": d.normal(shape, 2.0), "labels": d.integers(shape, 0, 4)}
    return Case("listwise_reward_loss", tensors, list_options(d, tensors, shape), ("scores",))


def listwise_preference_loss(d: Draw) -> Case:
    shape = (d.pick(0, 1, 4), d.pick(1, 2, 5))
    tensors = {
        "logps": d.normal(shape, 3.0),
        "labels": d.integers(shape, 0, 4),
        "ref_logps": d.normal(shape, 3.0),
    }
    return Case("listwise_preference_loss", tensors, list_options(d, tensors, shape), ("logps",))


def tied_reward_loss(d: Draw) -> Case:
    shape = (d.pick(0, 1, 6),)
    names = ("first_rewards", "second_rewards")
    tensors = {name: d.normal(shape, 2.0) for name in names} | {"outcome": d.integers(shape, -1, 2)}
    options = some(
        d, model=lambda: "davidson", tie_strength=lambda: 0.3, reduction=lambda: d.pick("sum", "none")
    )
    return Case("tied_reward_loss", tensors, options, names)


def reward_regression_loss(d: Draw) -> Case:
    shape = d.pick((0,), (5,), (4, 3))
    tensors = {"rewards": d.normal(shape, 2.0), "labels": d.uniform(shape, 0.0, 1.0)}
    if d.chance(0.4):
        tensors["mask"] = d.mask(shape)
    options = some(d, loss_type=lambda: d.pick("huber", "bce"), reduction=lambda: d.pick("sum", "none"))
    return Case("reward_regression_loss", tensors, options, ("rewards",))


def hidden_and_weight(d: Draw, lead: tuple[int, ...], vocab: int) -> Tensors:
    dim = d.dim()
    scale = d.pick(0.1, 1.0, 1.0, 4.0)
    tensors = {
        "input": d.normal((*lead, dim), scale),
        "linear_weight": d.normal((vocab, dim), max(dim, 1) ** -0.5),
    }
    if d.chance(0.4):
        tensors["linear_bias"] = d.normal((vocab,), d.pick(0.1, 1.0), shift=d.pick(0.0, 0.0, 0.0, 1e3, -1e3))
    return tensors


def head_options(d: Draw) -> Options:
    return some(
        d,
        chunk_size=lambda: d.pick(1, 2, 3, 5, 16, 1000),
        memory=lambda: d.pick("low", "fast"),
    )


HEAD = ("input", "linear_weight", "linear_bias")


def linear_cross_entropy(d: Draw) -> Case:
    if d.chance(0.1):
        return k_dimensional(d)
    vocab = d.vocab()
    lead = () if d.chance(0.05) else d.lead()
    tensors = hidden_and_weight(d, lead, vocab)
    probabilities = len(lead) == 1 and d.chance(0.15)
    options = head_options(d) | loss_options(d, tensors, vocab, probabilities)
    leaves = HEAD
    if probabilities:
        p = d.normal((*lead, vocab), 1.0, torch.float64).softmax(-1)
        tensors["target"] = p.to(d.dtype)
    else:
        tensors["target"] = class_target(d, lead, vocab, options)
    if d.chance(0.2):
        tensors["token_weight"] = d.uniform(lead, 0.0, 2.0, d.pick(d.dtype, torch.float32))
        leaves = (*leaves, "token_weight") if d.chance(0.2) else leaves
    if d.chance(0.1):
        options["loss_dtype"] = torch.float32
    if d.chance(0.2):
        options["skip"] = 1e-9  # far below the tolerances
    return Case("linear_cross_entropy", tensors, options, leaves, head=HEAD)


def row_options(d: Draw) -> Options:
    return some(
        d,
        temperature=lambda: d.pick(0.5, 0.7, 2.0),
        logit_scale=lambda: d.pick(0.3, 2.0),
        softcap=lambda: d.pick(0.5, 5.0, 30.0),
    )


def wanted(d: Draw) -> tuple[str, ...]:
    names = [name for name in STATS if d.chance(0.4)]
    return tuple(names or ("logprobs",))


def detached(d: Draw, options: Options) -> Options:
    names = [name for name in ("logprobs", "entropy", "logsumexp") if name in options["outputs"]]
    return {"detach": (d.pick(*names),)} if names and d.chance(0.2) else {}


def token_stats(d: Draw) -> Case:
    lead, vocab = d.lead(), d.vocab()
    options = row_options(d) | {"outputs": wanted(d)}
    options |= detached(d, options)
    tensors = {"logits": d.logits((*lead, vocab)), "target": class_target(d, lead, vocab, options).long()}
    kept = kept_classes(d, tensors["target"], vocab, options)
    if kept:  # classes of -inf alone have no distribution
        tensors["logits"] = tensors["logits"].clamp(min=-6e4)
    return Case("token_stats", tensors | kept, options, ("logits",))


def kept_classes(d: Draw, target: torch.Tensor, vocab: int, options: Options) -> Tensors:
    """Sometimes a sampler's sets, with padding and doubles; a target is in its own."""
    if not vocab or not d.chance(0.25):
        return {}
    more = d.targets((*target.shape, d.pick(1, 3, 20)), vocab, -1)
    own = target.masked_fill(target == options.get("ignore_index", -100), -1)
    return {"support": torch.cat([more, own[..., None]], -1)}


def linear_token_stats(d: Draw) -> Case:
    lead, vocab = d.lead(), d.vocab()
    options = row_options(d) | head_options(d) | {"outputs": wanted(d)}
    options |= detached(d, options)
    tensors = hidden_and_weight(d, lead, vocab)
    tensors["target"] = class_target(d, lead, vocab, options).long()
    tensors |= kept_classes(d, tensors["target"], vocab, options)
    return Case("linear_token_stats", tensors, options, HEAD, head=HEAD)


def supervised_options(d: Draw, tensors: Tensors, lead: tuple[int, ...]) -> Options:
    options = row_options(d) | some(
        d,
        focal_gamma=lambda: d.pick(0.0, 0.5, 3.0),
        power=lambda: d.pick(0.1, 1.0),
        eaft_alpha=lambda: d.pick(0.0, 2.0),
        trim_threshold=lambda: d.pick(1.0, 4.0),
        reduction=lambda: d.pick("sum", "none"),
    )
    options["loss_type"] = d.pick("nll", "dft", "eaft", "focal", "power", "deft", "soft_trim")
    if "reduction" not in options and len(lead) == 2 and d.chance(0.4):
        options["aggregation"] = d.pick("seq-mean-token-mean", "seq-mean-token-sum")
    if d.chance(0.2):
        tensors["token_weight"] = d.uniform(lead, 0.0, 2.0)
    return options


def supervised_loss(d: Draw) -> Case:
    lead, vocab = d.lead(), d.vocab()
    tensors = {"logits": d.logits((*lead, vocab), infinite=False), "target": d.targets(lead, vocab, -100)}
    return Case("supervised_loss", tensors, supervised_options(d, tensors, lead), ("logits",))


def linear_supervised_loss(d: Draw) -> Case:
    lead, vocab = d.lead(), d.vocab()
    tensors = hidden_and_weight(d, lead, vocab) | {"target": d.targets(lead, vocab, -100)}
    options = supervised_options(d, tensors, lead) | head_options(d)
    return Case("linear_supervised_loss", tensors, options, HEAD, head=HEAD)


def selective_log_softmax(d: Draw, function: str = "selective_log_softmax") -> Case:
    lead, vocab = d.lead(), d.vocab()
    several = (d.pick(1, 2, 5),) if function == "selective_log_softmax" and d.chance(0.3) else ()
    tensors = {"logits": d.logits((*lead, vocab)), "index": d.integers((*lead, *several), 0, vocab)}
    if d.chance(0.2):
        tensors["row_mask"] = d.mask(lead)
    return Case(function, tensors, some(d, temperature=lambda: d.pick(0.5, 2.0)), ("logits",))


def selective_log_softmax_and_entropy(d: Draw) -> Case:
    case = selective_log_softmax(d, "selective_log_softmax_and_entropy")
    case.options |= some(d, entropy_requires_grad=lambda: False)
    return case


def entropy_from_logits(d: Draw) -> Case:
    options = some(d, chunk_size=lambda: d.pick(1, 7))
    return Case("entropy_from_logits", {"logits": d.logits((*d.lead(), d.vocab()))}, options, ("logits",))


def k_dimensional(d: Draw) -> Case:
    """A class of several places: ``linear_weight [C, d1, …, D]``."""
    vocab, rows, dim, places = (
        d.pick(1, 2, 7, 33, 64),
        d.pick(0, 1, 4, 9),
        d.dim(),
        d.pick((1,), (3,), (2, 2)),
    )
    tensors = {
        "input": d.normal((rows, dim)),
        "linear_weight": d.normal((vocab, *places, dim), max(dim, 1) ** -0.5),
        "target": d.targets((rows, *places), vocab, -100),
    }
    if d.chance(0.4):
        tensors["linear_bias"] = d.normal((vocab, *places))
    options = head_options(d) | loss_options(d, tensors, vocab, False)
    if d.chance(0.3):  # one head after the other
        tensors["token_weight"] = d.uniform((rows, *places), 0.0, 2.0)
    return Case("linear_cross_entropy", tensors, options, HEAD, head=HEAD)


def own_temperature(d: Draw, tensors: Tensors, options: Options, lead: tuple[int, ...]) -> None:
    """A temperature for each token, in place of a number."""
    if d.chance(0.15):
        options.pop("temperature", None)
        tensors["temperature"] = d.uniform(lead, 0.4, 2.5)


def distillation_options(d: Draw, tensors: Tensors, lead: tuple[int, ...], vocab: int) -> Options:
    options = some(
        d,
        temperature=lambda: d.pick(0.5, 2.0),
        teacher_temperature=lambda: d.pick(0.7, 3.0),
        temperature_squared=lambda: True,
        interpolation=lambda: d.pick(0.1, 0.9),
        reduction=lambda: d.pick("sum", "none"),
    )
    options["divergence"] = d.pick("forward_kl", "reverse_kl", "jsd")
    if d.chance(0.5):
        tensors["target"] = d.targets(lead, vocab, -100)
        options |= some(d, hard_loss_coef=lambda: 0.3)
    if d.chance(0.2):
        tensors["token_weight"] = d.uniform(lead, 0.0, 2.0)
    own_temperature(d, tensors, options, lead)
    return options


def distillation_loss(d: Draw) -> Case:
    lead, vocab = d.lead(), d.vocab()
    tensors = {name: d.logits((*lead, vocab), infinite=False) for name in ("logits", "teacher_logits")}
    return Case("distillation_loss", tensors, distillation_options(d, tensors, lead, vocab), ("logits",))


def some_ids(d: Draw, lead: tuple[int, ...], vocab: int) -> torch.Tensor:
    return d.targets((*lead, d.pick(1, min(vocab, 3))), vocab, -1)


def selected_logprobs(d: Draw) -> Case:
    lead, vocab = d.lead(), d.vocab()
    tensors = {"logits": d.logits((*lead, vocab), infinite=False), "ids": some_ids(d, lead, vocab)}
    options = some(d, temperature=lambda: d.pick(0.5, 2.0), softcap=lambda: d.pick(5.0, 30.0))
    own_temperature(d, tensors, options, lead)
    return Case("selected_logprobs", tensors, options, ("logits",))


def linear_selected_logprobs(d: Draw) -> Case:
    lead, vocab = d.lead(), d.vocab()
    tensors = hidden_and_weight(d, lead, vocab) | {"ids": some_ids(d, lead, vocab)}
    options = some(d, temperature=lambda: d.pick(0.5, 2.0), softcap=lambda: d.pick(5.0, 30.0))
    own_temperature(d, tensors, options, lead)
    return Case("linear_selected_logprobs", tensors, options | head_options(d), HEAD, head=HEAD)


def topk_teacher(d: Draw, lead: tuple[int, ...], vocab: int) -> Tensors:
    ids = some_ids(d, lead, vocab)
    return {"teacher_ids": ids, "teacher_logprobs": d.normal(tuple(ids.shape)).log_softmax(-1) - 0.3}


def topk_options(d: Draw, tensors: Tensors, lead: tuple[int, ...], vocab: int) -> Options:
    options = distillation_options(d, tensors, lead, vocab)
    options.pop("teacher_temperature", None)
    return options | {"tail": d.pick("bin", "renormalize", "none")}


def topk_distillation_loss(d: Draw) -> Case:
    lead, vocab = d.lead(), d.vocab()
    tensors = {"logits": d.logits((*lead, vocab), infinite=False), **topk_teacher(d, lead, vocab)}
    return Case("topk_distillation_loss", tensors, topk_options(d, tensors, lead, vocab), ("logits",))


def linear_topk_distillation_loss(d: Draw) -> Case:
    lead, vocab = d.lead(), d.vocab()
    tensors = hidden_and_weight(d, lead, vocab) | topk_teacher(d, lead, vocab)
    options = topk_options(d, tensors, lead, vocab) | head_options(d)
    return Case("linear_topk_distillation_loss", tensors, options, HEAD, head=HEAD)


def linear_distillation_loss(d: Draw) -> Case:
    lead, vocab, dim = d.lead(), d.vocab(), d.dim()
    tensors = hidden_and_weight(d, lead, vocab)
    tensors |= {
        "teacher_input": d.normal((*lead, dim)),
        "teacher_weight": d.normal((vocab, dim), max(dim, 1) ** -0.5),
    }
    options = distillation_options(d, tensors, lead, vocab) | head_options(d)
    operands = (*HEAD, "teacher_input", "teacher_weight")
    return Case("linear_distillation_loss", tensors, options, HEAD, head=operands)


# --- preference ------------------------------------------------------------------------------------------------------


def logprobs(d: Draw, shape: tuple[int, ...], scale: float = 3.0) -> Tensor:
    return -(d.normal(shape, scale * d.pick(0.1, 1.0, 1.0, 20.0), torch.float64).abs() + 0.01).to(d.dtype)


def pair_options(d: Draw, tensors: Tensors, count: int) -> Options:
    return some(
        d, beta=lambda: d.pick(0.01, 0.5, 2.0), reduction=lambda: d.pick("sum", "none"), margin=lambda: 0.3
    ) | each_pair(d, tensors, count)


def each_pair(d: Draw, tensors: Tensors, count: int) -> Options:
    if d.chance(0.15):
        tensors["weights"] = d.uniform((count,), 0.0, 2.0, torch.float32)
    if d.chance(0.1):
        tensors["beta"] = d.uniform((count,), 0.05, 1.0, torch.float32)
    if d.chance(0.1):
        tensors["label_smoothing"] = d.uniform((count,), 0.0, 0.4, torch.float32)
    return {}


def pairs(d: Draw, *, reference: bool = True, lengths: bool = True) -> tuple[Tensors, Options, int]:
    """Whole responses, or their tokens padded or packed."""
    tensors: Tensors = {}
    count = d.pick(0, 1, 2, 5, 17, 70)
    how = d.pick("whole", "whole", "padded", "packed")
    if how == "whole":
        shapes = [(count,), (count,)]
        if lengths:
            for side in ("chosen", "rejected"):
                tensors[f"{side}_lengths"] = d.integers((count,), 0 if d.chance(0.1) else 1, 9)
    elif how == "padded":
        count = min(count, 5)
        shapes = [(count, d.pick(1, 3, 8)) for _ in range(2)]
        for side, shape in zip(("chosen", "rejected"), shapes):
            tensors[f"{side}_mask"] = d.mask(shape)
    else:
        count = max(1, min(count, 5))
        shapes = [(d.pick(1, 6, 15),) for _ in range(2)]
        for side, shape in zip(("chosen", "rejected"), shapes):
            tensors[f"{side}_cu_seqlens"] = d.borders(count, shape[0])
    weighted = how != "whole" and d.chance(0.15)
    for side, shape in zip(("chosen", "rejected"), shapes):
        if weighted:
            tensors[f"{side}_token_weight"] = d.uniform(shape, 0.0, 2.0)
        tensors[f"{side}_logps"] = d.hide(logprobs(d, shape), tensors.get(f"{side}_mask"))
        if reference:
            of = (count,) if d.chance(0.5) else shape
            tensors[f"ref_{side}_logps"] = d.hide(logprobs(d, of), tensors.get(f"{side}_mask"))
    return tensors, pair_options(d, tensors, count), count


PAIR_LEAVES = ("chosen_logps", "rejected_logps")


def loss_types(d: Draw, options: Options) -> Options:
    names = [d.pick(*PAIR_TYPES)]
    if d.chance(0.2):
        names = list(dict.fromkeys((*names, d.pick(*PAIR_TYPES), "sft")))
        options["loss_weights"] = [d.pick(0.5, 1.0, 2.0) for _ in names]
    options["loss_type"] = names if len(names) > 1 else names[0]
    if "exo_pair" in names:
        options["label_smoothing"] = 0.1
    if set(names) <= set(WITH_DIVERGENCE) and d.chance(0.2):
        options["f_divergence_type"] = d.pick("forward_kl", "js_divergence", "alpha_divergence")
    return options


def preference_loss(d: Draw) -> Case:
    tensors, options, _ = pairs(d)
    options |= some(d, length_normalized=lambda: True, reference_free=lambda: True)
    loss_types(d, options)
    if "exo_pair" in str(options["loss_type"]):
        tensors.pop("label_smoothing", None)
    if "chosen_mask" in tensors and d.chance(0.15):
        options["ld_alpha"] = d.pick(0.0, 0.5)
    return Case("preference_loss", tensors, without_twins(tensors, options), PAIR_LEAVES)


def without_twins(tensors: Tensors, options: Options) -> Options:
    return {name: value for name, value in options.items() if name not in tensors}


def named_pairs(function: str, *, reference: bool, extra: Callable[[Draw], Options] = lambda d: {}) -> Any:
    def draw(d: Draw) -> Case:
        tensors, options, _ = pairs(d, reference=reference)
        if function == "ipo_loss":
            tensors.pop("label_smoothing", None)
        return Case(function, tensors, without_twins(tensors, options | extra(d)), PAIR_LEAVES)

    return draw


def cpo_extra(d: Draw) -> Options:
    return some(
        d,
        cpo_alpha=lambda: d.pick(0.0, 0.5),
        loss_type=lambda: d.pick("hinge", "ipo", "simpo"),
        simpo_gamma=lambda: 1.0,
    )


def simpo_extra(d: Draw) -> Options:
    return some(
        d,
        cpo_alpha=lambda: 0.5,
        simpo_gamma=lambda: d.pick(0.0, 1.0),
        simpo_alpha=lambda: d.pick(0.5, 1.0),
    )


def reward_model_loss(d: Draw) -> Case:
    count = d.pick(0, 1, 2, 5, 17, 70)
    shape = (count, 1) if d.chance(0.3) else (count,)
    tensors = {"chosen_rewards": d.normal(shape, 3.0), "rejected_rewards": d.normal(shape, 3.0)}
    if d.chance(0.2):
        tensors["margin"] = d.uniform((count,), 0.0, 2.0, torch.float32)
    if d.chance(0.2):
        tensors["weights"] = d.uniform((count,), 0.0, 2.0, torch.float32)
    options = some(
        d,
        center_coefficient=lambda: 0.01,
        label_smoothing=lambda: 0.1,
        reduction=lambda: d.pick("sum", "none"),
    )
    return Case("reward_model_loss", tensors, options, ("chosen_rewards", "rejected_rewards"))


def linear_pairs(
    function: str, *, reference: bool, extra: Callable[[Draw], Options] = lambda d: {}, unpaired: bool = False
) -> Any:
    def draw(d: Draw) -> Case:
        vocab, count = d.vocab(), d.pick(0, 1, 2, 3)
        sequences = count if unpaired else 2 * count
        packed = d.chance(0.4) and count > 0
        total = d.pick(1, 5, 14)
        lead = (total,) if packed else (sequences, d.pick(1, 3, 6))
        tensors = hidden_and_weight(d, lead, vocab)
        tensors["target"] = d.targets(lead, vocab, -100)
        if packed:
            tensors["cu_seqlens"] = d.borders(sequences, total)
        options = head_options(d) | row_options(d)
        if reference and d.chance(0.4):
            tensors["ref_input"] = d.normal(tuple(tensors["input"].shape))
            tensors["ref_weight"] = d.normal(tuple(tensors["linear_weight"].shape), 0.3)
            if "linear_bias" in tensors:
                tensors["ref_bias"] = d.normal((vocab,))
        elif reference and not unpaired:
            for side in ("chosen", "rejected"):
                tensors[f"ref_{side}_logps"] = logprobs(d, (count,), 10.0).float()
        elif reference:
            tensors["ref_logps"] = logprobs(d, (count,), 10.0).float()
        if unpaired:
            tensors["desirable"] = d.mask((count,)).bool()
            options |= kto_options(d, tensors, count)
        else:
            options |= some(d, beta=lambda: d.pick(0.01, 0.5), reduction=lambda: d.pick("sum", "none"))
            each_pair(d, tensors, count)
        options |= extra(d)
        options |= some(d, token_metrics=lambda: False)
        operands = (*HEAD, "ref_input", "ref_weight", "ref_bias")
        return Case(function, tensors, without_twins(tensors, options), HEAD, head=operands)

    return draw


def _own_contrast(part: Any) -> Any:
    return -torch.nn.functional.logsigmoid(0.1 * (part.logps + 10.0)).sum()


def _own_mean(part: Any) -> Any:
    return -(part.logps / part.lengths.clamp(min=1)).sum() + (part.mask * part.logprobs.exp()).sum()


def linear_sequence_loss(d: Draw) -> Case:
    drawn = linear_pairs("linear_sequence_loss", reference=False, unpaired=True)(d)
    tensors = {name: x for name, x in drawn.tensors.items() if name in (*HEAD, "target", "cu_seqlens")}
    options = {
        n: x
        for n, x in drawn.options.items()
        if n in inspect.signature(fastloss.linear_sequence_loss).parameters
    }
    own = {"loss_fn": d.pick(_own_contrast, _own_mean), **some(d, coupled=lambda: True)}
    return replace(drawn, tensors=tensors, options={**options, **own})


def linear_preference_extra(d: Draw) -> Options:
    options = some(d, length_normalized=lambda: True, use_weighting=lambda: True)
    return loss_types(d, options)


def kto_options(d: Draw, tensors: Tensors, count: int) -> Options:
    options = some(
        d,
        beta=lambda: d.pick(0.01, 0.5),
        desirable_weight=lambda: 1.3,
        undesirable_weight=lambda: 0.0,
        reduction=lambda: d.pick("sum", "none"),
        loss_type=lambda: "apo_zero_unpaired",
    )
    if d.chance(0.15):
        tensors["weights"] = d.uniform((count,), 0.0, 2.0, torch.float32)
    if options.get("loss_type") is None:
        if d.chance(0.5):
            options["kl"] = d.pick(0.0, 0.7)
        else:
            length = d.pick(1, 3)
            tensors["kl_logps"], tensors["ref_kl_logps"] = logprobs(d, (length,)), logprobs(d, (length,))
    return options


def unpaired(function: str) -> Any:
    def draw(d: Draw) -> Case:
        tensors: Tensors = {}
        how = d.pick("whole", "padded", "packed")
        count = d.pick(0, 1, 2, 5, 33)
        shape: tuple[int, ...] = (count,)
        if how == "padded":
            count = min(count, 5)
            shape = (count, d.pick(1, 3, 8))
            tensors["mask"] = d.mask(shape)
        elif how == "packed":
            count = max(1, min(count, 5))
            shape = (d.pick(1, 6, 15),)
            tensors["cu_seqlens"] = d.borders(count, shape[0])
        tensors["logps"] = d.hide(logprobs(d, shape), tensors.get("mask"))
        options: Options = {}
        if d.chance(0.7):
            of = (count,) if d.chance(0.5) else shape
            tensors["ref_logps"] = d.hide(logprobs(d, of), tensors.get("mask"))
        else:
            options["ref_logps"] = None
        if how != "whole" and d.chance(0.15):
            tensors["token_weight"] = d.uniform(shape, 0.0, 2.0)
        tensors["desirable"] = d.mask((count,)).bool()
        if function == "kto_loss":
            options |= kto_options(d, tensors, count)
        else:
            options |= some(d, delta=lambda: d.pick(0.0, 0.4), reduction=lambda: d.pick("sum", "none"))
        return Case(function, tensors, options, ("logps",))

    return draw


# --- policy gradients --------------------------------------------------------------------------------------------------


def policy_options(d: Draw, *, with_ref: bool, with_sampler: bool, packed: bool) -> Options:
    name = d.pick(*VARIANTS)
    options: Options = {"loss_type": name}
    options |= some(
        d,
        clip_low=lambda: d.pick(None, 0.0, 0.1, 0.5),
        clip_high=lambda: d.pick(None, 0.0, 0.3),
        importance_level=lambda: d.pick(*LEVELS),
        aggregation=lambda: d.pick(*AGGREGATIONS),
        off_policy_threshold=lambda: d.pick(0.0, 0.3),
        normalizer=lambda: d.pick(3, 17.5),
        kl_estimator=lambda: d.pick(*KL_KINDS),
    )
    options["max_length"] = d.pick(4.0, 16.0) if packed else d.pick(None, 8.0)
    if with_ref:
        options |= some(d, beta=lambda: d.pick(0.04, 1.0), kl_unbiased=lambda: True)
    if with_sampler:
        options |= some(
            d,
            importance_mode=lambda: d.pick(
                None, "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
            ),
        )
        if options.get("importance_mode", "") is not None:
            options |= some(d, importance_cap=lambda: d.pick(1.5, 3.0), importance_floor=lambda: 0.3)
    if VARIANTS[name].surrogate == "clip":
        options |= some(d, dual_clip=lambda: 3.0, delta=lambda: d.pick(1.1, 4.0))
    return options


def policy_inputs(
    d: Draw, shape: tuple[int, ...], count: int, cu_seqlens: Tensor | None
) -> tuple[Tensors, Options]:
    old = -d.uniform(shape, 0.0, 3.0, torch.float64)
    mask = d.mask(shape)

    def near(scale: float) -> Tensor:
        return d.hide((old + scale * d.normal(shape, 1.0, torch.float64)).to(d.dtype), mask)

    tensors: dict[str, Tensor | None] = {
        "mask": mask,
        "advantages": d.normal((count,) if d.chance(0.6) else shape),
        "cu_seqlens": cu_seqlens,
        "ref_logprobs": near(0.4) if d.chance(0.4) else None,
        "sampler_logprobs": near(0.1) if d.chance(0.3) else None,
        "weights": d.uniform((count,) if d.chance(0.5) else shape, 0.0, 2.0) if d.chance(0.2) else None,
    }
    options: Options = {}
    if d.chance(0.8):
        tensors["old_logprobs"] = d.hide(old.to(d.dtype), mask)
    else:
        options["old_logprobs"] = None
        tensors["sampler_logprobs"] = None
    if d.chance(0.2):
        tensors["mask"] = None
        options["mask"] = None
        for name in ("old_logprobs", "ref_logprobs", "sampler_logprobs"):
            if tensors.get(name) is not None:
                tensors[name] = torch.nan_to_num(tensors[name], nan=-1.0, posinf=-1.0, neginf=-1.0)  # type: ignore[arg-type]
    tensors["near"] = (old + d.pick(0.0, 0.4, 0.4, 5.0) * d.normal(shape, 1.0, torch.float64)).to(d.dtype)
    out = given(tensors)
    options |= policy_options(
        d,
        with_ref="ref_logprobs" in out,
        with_sampler="sampler_logprobs" in out,
        packed=cu_seqlens is not None,
    )
    return out, options


def policy_loss(d: Draw) -> Case:
    shape, cu_seqlens, count = d.tokens()
    tensors, options = policy_inputs(d, shape, count, cu_seqlens)
    tensors["logprobs"] = d.hide(tensors.pop("near"), tensors.get("mask"))
    leaves: tuple[str, ...] = ("logprobs",)
    needs_entropy = options["loss_type"] in ("clip_cov", "kl_cov")
    if d.chance(0.3) or needs_entropy:
        tensors["entropy"] = d.hide(d.uniform(shape, 0.0, 3.0), tensors.get("mask"))
        leaves = (*leaves, "entropy")
        options |= some(
            d, entropy_coef=lambda: 0.1, top_entropy_quantile=lambda: d.pick(0.2, 0.5), entropy_aggregation=lambda: d.pick(*AGGREGATIONS)
        )  # fmt: skip
    return Case("policy_loss", tensors, options, leaves)


def linear_policy_loss(d: Draw) -> Case:
    shape, cu_seqlens, count = d.tokens()
    vocab = d.vocab()
    tensors, options = policy_inputs(d, shape, count, cu_seqlens)
    tensors.pop("near")
    tensors |= hidden_and_weight(d, shape, vocab)
    tensors["target"] = d.integers(shape, 0, vocab)
    options |= head_options(d) | row_options(d)
    options |= some(d, entropy_coef=lambda: 0.1, with_entropy=lambda: True, top_entropy_quantile=lambda: 0.5)
    return Case("linear_policy_loss", tensors, options, HEAD, head=HEAD)


def value_loss(d: Draw) -> Case:
    shape, cu_seqlens, _ = d.tokens()
    mask = d.mask(shape)
    tensors = given(
        {
            "values": d.hide(d.normal(shape), mask),
            "old_values": d.hide(d.normal(shape), mask),
            "returns": d.hide(d.normal(shape), mask),
            "mask": mask,
            "cu_seqlens": cu_seqlens,
        }
    )
    options = some(
        d,
        clip_range=lambda: d.pick(0.1, 1.0),
        aggregation=lambda: d.pick(*AGGREGATIONS),
        normalizer=lambda: d.pick(3, 7.5),
    )
    options["max_length"] = 8.0 if cu_seqlens is not None else d.pick(None, 8.0)
    return Case("value_loss", tensors, options, ("values",))


def kl_estimate(d: Draw) -> Case:
    shape = d.lead()
    tensors = {"logprobs": logprobs(d, shape), "ref_logprobs": logprobs(d, shape)}
    return Case("kl_estimate", tensors, {"kind": d.pick(*KL_KINDS)}, ("logprobs",))


def trust_region_mask(d: Draw) -> Case:
    shape, cu_seqlens, _ = d.tokens()
    mask = d.mask(shape)
    old = d.uniform(shape, -3.0, 0.0)
    tensors = given(
        {
            "old_logprobs": d.hide(old, mask),
            "sampler_logprobs": (old.double() + 0.3 * d.normal(shape, 1.0, torch.float64)).to(d.dtype),
            "mask": mask,
            "cu_seqlens": cu_seqlens,
        }
    )
    options = {
        "statistic": d.pick("ratio", "k2", "k3", "tv", "binary_kl"),
        "level": d.pick("token", "seq_mean", "seq_sum", "seq_max"),
        "low": d.pick(None, 0.5),
        "high": d.pick(0.6, 1.5),
    }
    return Case("trust_region_mask", tensors, options)


# --- advantages --------------------------------------------------------------------------------------------------------


def gae(d: Draw) -> Case:
    shape, cu_seqlens, _ = d.tokens()
    mask = d.mask(shape)
    tensors = given(
        {
            "rewards": d.hide(d.normal(shape), mask),
            "values": d.hide(d.normal(shape), mask),
            "mask": mask,
            "cu_seqlens": cu_seqlens,
        }
    )
    return Case("gae", tensors, some(d, gamma=lambda: d.pick(0.0, 0.9), lam=lambda: d.pick(0.0, 1.0)))


def discounted_returns(d: Draw) -> Case:
    case = gae(d)
    case.tensors.pop("values")
    case.options.pop("lam", None)
    return Case("discounted_returns", case.tensors, case.options)


def token_rewards(d: Draw) -> Case:
    shape, cu_seqlens, count = d.tokens()
    tensors = given({"rewards": d.normal((count,)), "mask": d.mask(shape), "cu_seqlens": cu_seqlens})
    return Case("token_rewards", tensors)


def reinforce_plus_plus_advantages(d: Draw) -> Case:
    shape, cu_seqlens, count = d.tokens()
    mask = d.mask(shape)
    tensors = given(
        {
            "rewards": d.hide(d.normal(shape), mask),
            "mask": mask,
            "cu_seqlens": cu_seqlens,
            "kl": d.uniform(shape, 0.0, 1.0) if d.chance(0.3) else None,
        }
    )
    options = some(d, gamma=lambda: 0.9, kl_coef=lambda: 0.1)
    if count and d.chance(0.3):
        options["group_size"] = d.pick(1, count)
    return Case("reinforce_plus_plus_advantages", tensors, options)


def remax_advantages(d: Draw) -> Case:
    shape, cu_seqlens, count = d.tokens()
    if d.chance(0.4):
        return Case("remax_advantages", {"rewards": d.normal((count,)), "greedy_rewards": d.normal((count,))})
    mask = d.mask(shape)
    tensors = given(
        {
            "rewards": d.hide(d.normal(shape), mask),
            "greedy_rewards": d.normal((count,)),
            "mask": mask,
            "cu_seqlens": cu_seqlens,
        }
    )
    return Case("remax_advantages", tensors)


def optimal_token_advantages(d: Draw) -> Case:
    shape, cu_seqlens, count = d.tokens()
    mask = d.mask(shape)
    tensors = given(
        {
            "rewards": d.hide(d.normal(shape), mask),
            "logprobs": d.hide(d.uniform(shape, -3.0, -0.01), mask),
            "log_sum_sq_probs": d.hide(d.uniform(shape, -3.0, -0.01), mask),
            "mask": mask,
            "cu_seqlens": cu_seqlens,
            "token_weights": d.uniform(shape, 0.5, 2.0) if d.chance(0.3) else None,
        }
    )
    return Case("optimal_token_advantages", tensors, {"group_size": d.pick(1, count or 1)})


def grouped(function: str, **options: Callable[[Draw], Any]) -> Any:
    def draw(d: Draw) -> Case:
        size, groups = d.pick(1, 2, 3, 8), d.pick(0, 1, 2, 5)
        if function == "pass_at_k_advantages":
            size = max(size, 2)
        count = size * groups
        rewards = d.normal((count,)) if d.chance(0.6) else d.integers((count,), 0, 3).to(d.dtype)
        if d.chance(0.2) and count and function not in ("opo_advantages", "gpg_advantages"):
            rewards[d.whole(0, count - 1)] = float("nan")
        tensors = {"rewards": rewards}
        if function == "opo_advantages":
            tensors["lengths"] = d.integers((count,), 1, 30)
        drawn = {name: draw(d) for name, draw in options.items() if d.chance(0.4)}
        if function == "gdpo_advantages":
            kinds = d.pick(1, 2, 3)
            tensors["rewards"] = torch.stack([rewards, *(d.normal((count,)) for _ in range(kinds - 1))], -1)
            if d.chance(0.3):
                tensors["weights"] = d.uniform((kinds,), 0.1, 2.0)
        return Case(function, tensors, {"group_size": size, **drawn})

    return draw


def whiten(d: Draw) -> Case:
    shape = d.lead()
    mask = d.mask(shape)
    tensors = {
        "x": d.hide(d.normal(shape, d.pick(1.0, 100.0), shift=d.pick(0.0, 0.0, 300.0)), mask),
        "mask": mask,
    }
    return Case("whiten", tensors, some(d, shift_mean=lambda: False))


# name -> (how its arguments are drawn, how often)
FUNCTIONS: dict[str, tuple[Callable[[Draw], Case], int]] = {
    "cross_entropy": (cross_entropy, 12),
    "process_reward_loss": (process_reward_loss, 2),
    "linear_cross_entropy": (linear_cross_entropy, 14),
    "token_stats": (token_stats, 8),
    "linear_token_stats": (linear_token_stats, 8),
    "selective_log_softmax": (selective_log_softmax, 4),
    "selective_log_softmax_and_entropy": (selective_log_softmax_and_entropy, 3),
    "entropy_from_logits": (entropy_from_logits, 3),
    "preference_loss": (preference_loss, 8),
    "dpo_loss": (named_pairs("dpo_loss", reference=True), 3),
    "ipo_loss": (named_pairs("ipo_loss", reference=True), 2),
    "cpo_loss": (named_pairs("cpo_loss", reference=False, extra=cpo_extra), 2),
    "simpo_loss": (named_pairs("simpo_loss", reference=False, extra=simpo_extra), 2),
    "orpo_loss": (named_pairs("orpo_loss", reference=False), 2),
    "reward_model_loss": (reward_model_loss, 3),
    "linear_preference_loss": (
        linear_pairs("linear_preference_loss", reference=True, extra=linear_preference_extra), 6
    ),
    "linear_dpo_loss": (linear_pairs("linear_dpo_loss", reference=True), 2),
    "linear_cpo_loss": (linear_pairs("linear_cpo_loss", reference=False), 2),
    "linear_simpo_loss": (linear_pairs("linear_simpo_loss", reference=False), 2),
    "linear_orpo_loss": (linear_pairs("linear_orpo_loss", reference=False), 2),
    "linear_kto_loss": (linear_pairs("linear_kto_loss", reference=True, unpaired=True), 4),
    "kto_loss": (unpaired("kto_loss"), 3),
    "bco_loss": (unpaired("bco_loss"), 3),
    "policy_loss": (policy_loss, 12),
    "linear_policy_loss": (linear_policy_loss, 8),
    "value_loss": (value_loss, 3),
    "kl_estimate": (kl_estimate, 2),
    "trust_region_mask": (trust_region_mask, 2),
    "gae": (gae, 3),
    "discounted_returns": (discounted_returns, 2),
    "token_rewards": (token_rewards, 1),
    "reinforce_plus_plus_advantages": (reinforce_plus_plus_advantages, 2),
    "remax_advantages": (remax_advantages, 2),
    "optimal_token_advantages": (optimal_token_advantages, 2),
    "group_advantages": (grouped("group_advantages", scale=lambda d: d.pick("group", "batch", "none")), 2),
    "rloo_advantages": (grouped("rloo_advantages", normalize=lambda d: True), 2),
    "pass_at_k_advantages": (grouped("pass_at_k_advantages", scale=lambda d: d.pick("group", "none")), 2),
    "gdpo_advantages": (grouped("gdpo_advantages"), 2),
    "gpg_advantages": (grouped("gpg_advantages"), 1),
    "opo_advantages": (grouped("opo_advantages"), 1),
    "whiten": (whiten, 2),
}  # fmt: skip

ADDED_LATER = {
    "selected_logprobs": (selected_logprobs, 3),
    "linear_selected_logprobs": (linear_selected_logprobs, 3),
    "topk_distillation_loss": (topk_distillation_loss, 4),
    "linear_topk_distillation_loss": (linear_topk_distillation_loss, 4),
    "listwise_reward_loss": (listwise_reward_loss, 1),
    "listwise_preference_loss": (listwise_preference_loss, 1),
    "tied_reward_loss": (tied_reward_loss, 1),
    "reward_regression_loss": (reward_regression_loss, 1),
    "moe_load_balancing_loss": (moe_load_balancing_loss, 2),
    "router_z_loss": (router_z_loss, 2),
    "supervised_loss": (supervised_loss, 3),
    "linear_supervised_loss": (linear_supervised_loss, 3),
    "distillation_loss": (distillation_loss, 5),
    "linear_distillation_loss": (linear_distillation_loss, 5),
    "linear_sequence_loss": (linear_sequence_loss, 2),
}
FUNCTIONS |= {name: draw for name, draw in ADDED_LATER.items() if name in fastloss.__all__}

# Public functions without a number of their own.
NOT_DRAWN = {
    "backends": "says what is there",
    "explain": "says what a call would do",
    "skipped_share": "says what calls did",
    "sampler_metrics": "metrics of numbers that are drawn elsewhere",
    "sampler_support": "returns classes",
    "support_from_mask": "returns classes",
    "multi_token_targets": "moves labels, and computes nothing",
    "patch": "replaces torch's functions by those that are drawn",
    "use_backend": "every case is run under some backend by it or by backend=",
    "validate_targets": "a switch for GPUs",
    "batch_invariant": "a switch: tests/engine/test_batch_invariant.py",
}
