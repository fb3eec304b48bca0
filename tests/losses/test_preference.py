"""Preference losses: every loss type and option on every backend against the definition in float64, options, errors."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends_under_test import ALL, DEVICE, KERNELS, dtypes, need
from preference_inputs import (
    DIVERGENCES,
    SORTED,
    TYPES,
    WITH_DIVERGENCE,
    assert_close,
    call,
    double,
    evaluate,
    needed,
    numbers,
)
from torch import Tensor

import fastloss

PER_PAIR: dict[str, Any] = {
    "beta": "beta",
    "label_smoothing": "smoothing",
    "margin": "margin",
    "weights": "weights",
}


def cases() -> list[dict[str, Any]]:
    """Every loss type alone, and every option with each loss type that takes it."""
    out: list[dict[str, Any]] = []
    for name in TYPES:
        out += [
            {"loss_type": name} | needed(name),
            {"loss_type": name, "beta": 0.7, "reduction": "none"} | needed(name),
        ]
        out.append({"loss_type": name, "label_smoothing": 0.2, "margin": 0.3, "reduction": "sum"})
        out.append({"loss_type": name, **PER_PAIR})
        out.append({"loss_type": name, "length_normalized": True} | needed(name))
        if name in WITH_DIVERGENCE:
            out += [{"loss_type": name} | divergence | needed(name) for divergence in DIVERGENCES]
    out += [{"loss_type": name, "label_smoothing": 0.1, "beta": 0.5, "margin": 0.2} for name in SORTED]
    out += [{"loss_type": name, "reduction": "none", "reference_free": True} for name in SORTED]
    out += [
        {"loss_type": "bco_pair", "bco_delta": 0.3},
        {"loss_type": "discopop", "discopop_tau": 0.5},
        {"loss_type": "sigmoid", "reference_free": True},
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"loss_type": ["sigmoid", "aot", "aot_unpaired", "hinge"], "loss_weights": [0.5, 0.25, 0.25, 2.0]},
        {
            "loss_type": ["sigmoid", "simpo", "sft"],
            "loss_weights": [0.5, 2.0, 0.3],
            "margin": 0.1,
            "weights": "weights",
        },
        {
            "loss_type": ["simpo", "sft"],
            "simpo_alpha": 0.25,
            "reference_free": True,
            "loss_weights": [1.0, 0.4],
        },
        {"loss_type": ["sigmoid", "sft"], "length_normalized": True, "loss_weights": [1.0, 0.4]},
        {"loss_type": ["sigmoid", "sft"], "nll": True},
        {"loss_type": ["orpo", "sft"], "nll": True, "nll_lengths": True},
    ]
    return out


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("options", cases(), ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items())[:70])
def test_every_loss_type_and_option(backend: str, options: dict[str, Any]) -> None:
    need(backend)
    for dtype in dtypes(backend):
        if backend != "cpu" and dtype not in (torch.float32, torch.bfloat16):
            continue
        # With a smaller spread the exponentials of an f-divergence stay within float16.
        x = numbers(11, dtype, scale=1.0 if "f_divergence_type" in options else 3.0)
        exact = evaluate(double(x), options, "reference")
        eps = torch.finfo(dtype).eps if dtype == torch.float64 else torch.finfo(torch.float32).eps
        got, eager = evaluate(x, options, backend), evaluate(x, options, "reference")
        if dtype in (torch.bfloat16, torch.float16):  # gradients come back in the leaves' dtype
            exact = {k: v.to(dtype).double() if k[:2] == "d " else v for k, v in exact.items()}
            eps = torch.finfo(dtype).eps
        assert_close(got, exact, eager, eps)


@pytest.mark.parametrize("name", TYPES)
def test_gradcheck_of_the_definition(name: str) -> None:
    x = double({k: v.cpu() for k, v in numbers(5, torch.float32).items()})
    leaves = tuple(x[k].clone().requires_grad_() for k in ("c", "r", "nll"))
    options = {"loss_type": [name, "sft"], "beta": 0.6, "label_smoothing": 0.2, "margin": 0.3, "nll": True}

    def loss(c: Tensor, r: Tensor, nll: Tensor) -> Tensor:
        return call({**x, "c": c, "r": r, "nll": nll}, options, "reference").loss

    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


def test_definitions_are_the_papers_formulas() -> None:
    """Written out once more, by hand, from the papers."""
    c, r, rc, rr = (torch.tensor([v], dtype=torch.float64) for v in (-5.0, -7.0, -6.0, -6.5))
    lc, lr, beta = torch.tensor([4]), torch.tensor([8]), 0.3
    xc, xr = 1.0, -0.5
    u = beta * (xc - xr)

    def sigma(v: float) -> float:
        return 1 / (1 + math.exp(-v))

    odds = [math.exp(v) / (1 - math.exp(v)) for v in (-5.0 / 4, -7.0 / 8)]
    expected = {
        "sigmoid": -math.log(sigma(u)),
        "hinge": 1 - u,
        "ipo": (xc / 4 - xr / 8 - 1 / (2 * beta)) ** 2,
        "sppo_hard": (xc - 1 / (2 * beta)) ** 2 + (xr + 1 / (2 * beta)) ** 2,
        "nca_pair": -math.log(sigma(beta * xc))
        - 0.5 * math.log(sigma(-beta * xc))
        - 0.5 * math.log(sigma(-beta * xr)),
        "bco_pair": -math.log(sigma(beta * xc)) - math.log(sigma(-beta * xr)),
        "apo_zero": 1 - sigma(beta * xc) + sigma(beta * xr),
        "apo_down": sigma(beta * xc) + 1 - sigma(u),
        "discopop": -math.log(sigma(u)) * (1 - sigma(u / 0.05)) + math.exp(-u) * sigma(u / 0.05),
        "sft": 5.0 / 4,
        "sigmoid_norm": -math.log(sigma(beta * (xc / 4 - xr / 8))),
        "simpo": -math.log(sigma(beta * (-5.0 / 4 + 7.0 / 8) - 0.5)),
        "orpo": -beta * math.log(sigma(math.log(odds[0] / odds[1]))),
        "simper": math.exp(-7.0 / 8) - math.exp(-5.0 / 4),
        "aot": -math.log(sigma(u)),
        "aot_unpaired": -math.log(sigma(u)),
    }
    for name, value in expected.items():
        out = fastloss.preference_loss(
            c,
            r,
            rc,
            rr,
            loss_type=name,
            beta=beta,
            chosen_lengths=lc,
            rejected_lengths=lr,
            backend="reference",
        )
        assert out.loss.item() == pytest.approx(value, rel=1e-12), name


TOKENS: list[dict[str, Any]] = [
    {},
    {"loss_type": "ipo"},
    {"ld_alpha": 0.0},
    {"ld_alpha": 0.4, "loss_type": ["sigmoid", "sft"]},
    {"ld_alpha": 1.0},
    {"loss_type": "simpo", "reference_free": True},
    {"loss_type": "simper", "reference_free": True},
]


def token_inputs(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    out = {}
    for side, width in (("chosen", 7), ("rejected", 5)):
        lengths = torch.randint(1, width, (4,), generator=generator)
        mask = torch.arange(width)[None, :] < lengths[:, None]
        mask[:, 0] = mask[:, 0] & (lengths > 1)  # a prompt token in front
        for kind in ("", "ref_"):
            out[f"{kind}{side}"] = -torch.rand(4, width, generator=generator).to(dtype)
        out[f"{side}_mask"] = mask
    return {name: value.to(DEVICE) for name, value in out.items()}


def by_hand(x: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    """The sums in plain PyTorch, then the contrast of whole responses."""
    options = dict(options)
    alpha = options.pop("ld_alpha", 1.0)
    n = {side: x[f"{side}_mask"].sum(1) for side in ("chosen", "rejected")}
    shared = torch.minimum(n["chosen"], n["rejected"])[:, None]
    sums = {}
    for side in ("chosen", "rejected"):
        mask = x[f"{side}_mask"]
        w = torch.where(mask.cumsum(1) <= shared, 1.0, alpha).to(x["chosen"].dtype) * mask
        sums |= {f"{kind}{side}_logps": (x[f"{kind}{side}"] * w).sum(1) for kind in ("", "ref_")}
    if "sft" in options.get("loss_type", ()):
        options["chosen_nll_logps"] = (x["chosen"] * x["chosen_mask"]).sum(1)
    return fastloss.preference_loss(
        **sums, chosen_lengths=n["chosen"], rejected_lengths=n["rejected"], backend="reference", **options
    ).loss


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("options", TOKENS, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_token_logprobs(backend: str, options: dict[str, Any], packed: bool) -> None:
    """Bug 23: padding adds nothing, not even a NaN; chosen and rejected of different length; padded as packed."""
    need(backend)
    dtype = torch.float64 if backend in ("cpu", "reference") else torch.float32
    x = token_inputs(dtype)
    leaves = {side: x[side].clone().requires_grad_() for side in ("chosen", "rejected")}
    want = by_hand({**x, **leaves}, options)
    want_grads = torch.autograd.grad(want, list(leaves.values()))
    dirty = {
        name: v.masked_fill(~x[f"{name.removeprefix('ref_')}_mask"], math.nan) if v.is_floating_point() else v
        for name, v in x.items()
    }
    leaves = {side: dirty[side].clone().requires_grad_() for side in ("chosen", "rejected")}
    given: dict[str, Tensor] = {}
    for side, leaf in leaves.items():
        values = {
            f"{side}_logps": leaf,
            f"ref_{side}_logps": dirty[f"ref_{side}"],
            f"{side}_mask": x[f"{side}_mask"],
        }
        if packed:  # one sequence after the other, their padding among them
            values = {name: v.reshape(-1) for name, v in values.items()}
            width = leaf.shape[1]
            values[f"{side}_cu_seqlens"] = torch.arange(
                0, 4 * width + 1, width, dtype=torch.int32, device=DEVICE
            )
        given |= values
    got = fastloss.preference_loss(**given, backend=backend, **options)
    grads = torch.autograd.grad(got.loss, list(leaves.values()))
    torch.testing.assert_close(got.loss, want.detach(), check_dtype=False)
    for a, b in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(a, b)


def test_metrics_are_trls() -> None:
    c, r = torch.tensor([-4.0, -9.0]), torch.tensor([-8.0, -6.0])
    rc, rr = torch.tensor([-5.0, -8.0]), torch.tensor([-7.0, -7.0])
    m = fastloss.preference_loss(c, r, rc, rr, beta=0.5).metrics
    got = {name: value.item() for name, value in m.items()}
    assert got == {
        "rewards/chosen": 0.0,
        "rewards/rejected": 0.0,
        "rewards/accuracies": 0.5,
        "rewards/margins": 0.0,
        "logps/chosen": -6.5,
        "logps/rejected": -7.0,
    }
    n = torch.tensor([2, 3])
    out = fastloss.orpo_loss(c, r, chosen_lengths=n, rejected_lengths=n)
    assert out.metrics["logps/chosen"].item() == pytest.approx(-2.5)  # per token, as the loss is
    assert out.metrics["nll_loss"].item() == pytest.approx(13 / 5)
    odds = [[v - math.log(1 - math.exp(v)) for v in side] for side in ((-2.0, -3.0), (-4.0, -2.0))]
    log_odds = torch.tensor(odds[0]) - torch.tensor(odds[1])
    torch.testing.assert_close(out.metrics["log_odds_chosen"], log_odds.mean())
    torch.testing.assert_close(out.metrics["log_odds_ratio"], F.logsigmoid(log_odds).mean())
    torch.testing.assert_close(out.chosen_rewards, 0.1 * c / n)


def test_front_doors() -> None:
    x = numbers(5, torch.float32)
    c, r, rc, rr = (x[k] for k in ("c", "r", "rc", "rr"))
    n = {"chosen_lengths": x["lc"], "rejected_lengths": x["lr"]}
    same = torch.testing.assert_close
    same(
        fastloss.dpo_loss(c, r, rc, rr, beta=0.3).loss, fastloss.preference_loss(c, r, rc, rr, beta=0.3).loss
    )
    same(
        fastloss.ipo_loss(c, r, rc, rr, **n).loss,
        fastloss.preference_loss(c, r, rc, rr, loss_type="ipo", **n).loss,
    )
    u = 2.0 * (c / x["lc"] - r / x["lr"]) - 0.7
    same(fastloss.simpo_loss(c, r, beta=2.0, simpo_gamma=0.7, **n).loss, -F.logsigmoid(u).mean())
    nll = -c.sum() / x["lc"].sum()
    same(fastloss.cpo_loss(c, r, cpo_alpha=0.5, **n).loss, -F.logsigmoid(0.1 * (c - r)).mean() + 0.5 * nll)
    transformed = [(1 - torch.exp(-0.25 * v)) / 0.25 for v in (c / x["lc"], r / x["lr"])]
    u = 2.0 * (transformed[0] - transformed[1]) - 0.5
    alpha = fastloss.simpo_loss(c, r, beta=2.0, simpo_alpha=0.25, **n)
    same(alpha.loss, -F.logsigmoid(u).mean())
    same(alpha.chosen_rewards, 2.0 * transformed[0])
    ipo = fastloss.cpo_loss(c, r, loss_type="ipo", cpo_alpha=0.0, **n)
    same(ipo.loss, ((c / x["lc"] - r / x["lr"] - 5.0) ** 2).mean())
    module = fastloss.nn.PreferenceLoss(loss_type="hinge", beta=0.3)
    same(module(c, r, rc, rr).loss, fastloss.preference_loss(c, r, rc, rr, loss_type="hinge", beta=0.3).loss)
    assert "hinge" in repr(module)


TWO = torch.tensor([-1.0, -2.0])
ERRORS: list[tuple[str, dict[str, Any]]] = [
    ("loss_type: expected one of", {"loss_type": "dpo"}),
    ("loss_type: expected 1 to 8", {"loss_type": []}),
    ("loss_weights: expected 2", {"loss_type": ["sigmoid", "hinge"], "loss_weights": [1.0]}),
    ("reduction: expected", {"reduction": "avg"}),
    ("beta: expected", {"beta": 0.0}),
    ("beta: expected shape", {"beta": torch.ones(3)}),
    ("beta: expected a finite number", {"beta": torch.tensor([0.1, -0.1])}),
    ("label_smoothing: expected", {"label_smoothing": 1.5}),
    ("label_smoothing: .*exo_pair", {"loss_type": "exo_pair"}),
    ("label_smoothing: .*robust", {"loss_type": "robust", "label_smoothing": 0.5}),
    ("label_smoothing: .*robust", {"loss_type": "robust", "label_smoothing": torch.tensor([0.1, 0.6])}),
    ("f_divergence_type: expected one of", {"f_divergence_type": "kl"}),
    (
        "f_divergence_type: expected 'reverse_kl'",
        {"f_divergence_type": "js_divergence", "loss_type": "nca_pair"},
    ),
    (
        "f_divergence_type: .*'apo_zero'",
        {"f_divergence_type": "forward_kl", "loss_type": ["sigmoid", "apo_zero"]},
    ),
    ("weights: .*aot", {"loss_type": "aot", "weights": torch.ones(2)}),
    ("margin: .*aot", {"loss_type": "aot_unpaired", "margin": torch.ones(2)}),
    ("ref_chosen_logps: expected", {"ref_chosen_logps": None, "ref_rejected_logps": None}),
    ("ref_rejected_logps: expected", {"ref_rejected_logps": None}),
    ("chosen_lengths: expected the number of tokens", {"loss_type": "ipo"}),
    ("rejected_lengths: expected the number", {"loss_type": "simpo", "chosen_lengths": torch.ones(2)}),
    ("chosen_lengths: .*length_normalized", {"length_normalized": True}),
    ("ld_alpha: expected token log-probs", {"ld_alpha": 0.5}),
    ("chosen_mask: expected token log-probs", {"chosen_mask": torch.ones(2)}),
    ("discopop_tau: expected", {"discopop_tau": 0.0}),
    ("simpo_alpha: expected 0 unless", {"loss_type": "orpo", "simpo_alpha": 0.1}),
    ("simpo_alpha: expected 0 where", {"loss_type": "simpo", "simpo_alpha": 0.1}),
    ("chosen_nll_logps: .*'sft'", {"chosen_nll_logps": TWO}),
    ("rejected_logps: expected", {"rejected_logps": torch.zeros(3)}),
    ("rejected_logps: expected torch.float32", {"rejected_logps": TWO.double()}),
    ("chosen_logps: expected", {"chosen_logps": torch.tensor([1, 2])}),
    (
        "chosen_mask: expected a mask",
        {"chosen_logps": torch.zeros(2, 3), "rejected_logps": torch.zeros(2, 3)},
    ),
    ("backend: expected", {"backend": "gpu"}),
]


@pytest.mark.parametrize(
    ("message", "options"), ERRORS, ids=[m[:40] + str(i) for i, (m, _) in enumerate(ERRORS)]
)
def test_errors_name_the_option(message: str, options: dict[str, Any]) -> None:
    given = {"chosen_logps": TWO, "rejected_logps": TWO, "ref_chosen_logps": TWO, "ref_rejected_logps": TWO}
    with pytest.raises((ValueError, TypeError), match=message):
        fastloss.preference_loss(**{**given, **options})


def test_packed_offsets_are_checked() -> None:
    tokens = torch.zeros(5)
    good = torch.tensor([0, 2, 5])
    for bad, message in (
        (torch.tensor([0, 2, 6]), "chosen_cu_seqlens: expected offsets that rise from 0 to 5"),
        (torch.tensor([0, 4, 2, 5]), "chosen_cu_seqlens: expected offsets"),
        (torch.tensor([0.0, 5.0]), "chosen_cu_seqlens: expected int32 or int64"),
    ):
        with pytest.raises(ValueError, match=message):
            fastloss.preference_loss(
                tokens, tokens, reference_free=True, chosen_cu_seqlens=bad, rejected_cu_seqlens=good
            )


def test_compile_traces_the_definition() -> None:
    x = numbers(6, torch.float32)

    def loss(c: Tensor) -> Tensor:
        return call({**x, "c": c}, {"loss_type": ["sigmoid", "ipo"]}, "auto").loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    a, b = x["c"].clone().requires_grad_(), x["c"].clone().requires_grad_()
    compiled(a).backward()
    loss(b).backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_func_transforms_take_the_definition() -> None:
    x = numbers(6, torch.float32)
    grad = torch.func.grad(lambda c: call({**x, "c": c}, {}, "auto").loss)(x["c"])
    c = x["c"].clone().requires_grad_()
    call({**x, "c": c}, {}, "auto").loss.backward()
    torch.testing.assert_close(grad, c.grad)


def test_explain_says_which_backend() -> None:
    plan = fastloss.explain(fastloss.preference_loss, TWO, TWO, TWO, TWO, backend="reference")
    assert plan["function"] == "preference_loss" and plan["backend"] == "reference"


def test_linear_options_are_those_of_preference_loss() -> None:
    """An option of one is an option of the other, unless the head knows it itself."""
    from_logps = set(inspect.signature(fastloss.preference_loss).parameters)
    from_head = set(inspect.signature(fastloss.linear_preference_loss).parameters)
    assert from_logps - from_head == {
        "chosen_logps",
        "rejected_logps",
        "chosen_lengths",
        "rejected_lengths",
        "chosen_mask",
        "rejected_mask",
        "chosen_cu_seqlens",
        "rejected_cu_seqlens",
        "chosen_nll_logps",
        "chosen_nll_lengths",
        "chosen_token_weight",  # the head has pairs in one tensor, and one `token_weight`
        "rejected_token_weight",
    }
