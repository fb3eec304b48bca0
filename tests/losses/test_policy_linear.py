"""linear_policy_loss against the same loss of whole logits: values, gradients, GEMMs, bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends_under_test import ALL, DEVICE, KERNELS, need
from torch import Tensor

import fastloss
from fastloss.losses.policy_options import VARIANTS
from fastloss.tables import AGGREGATIONS, KL_KINDS

B, T, D, V = 4, 6, 8, 37
LEAVES = ("input", "linear_weight", "linear_bias")


def batch(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    mask = torch.arange(T)[None, :] < torch.tensor([4, 6, 0, 2])[:, None]
    mask[:, 0] = False  # a prompt
    data = {
        "input": torch.randn(B, T, D, generator=g),
        "linear_weight": torch.randn(V, D, generator=g),
        "linear_bias": torch.randn(V, generator=g),
    }
    data = {k: v.to(dtype) for k, v in data.items()}
    data["target"] = torch.randint(0, V, (B, T), generator=g)
    logits = data["input"].double() @ data["linear_weight"].double().t()
    logp = logits.log_softmax(-1).gather(-1, data["target"][..., None])[..., 0].float()
    for name, spread in (("old_logprobs", 0.3), ("ref_logprobs", 0.3), ("sampler_logprobs", 0.35)):
        data[name] = logp + spread * torch.randn(B, T, generator=g)
    data["advantages"] = torch.tensor([1.0, -0.7, 0.4, -1.2])
    return {k: v.to(DEVICE) for k, v in data.items()} | {"mask": mask.to(DEVICE)}


def run(data: dict[str, Tensor], backend: str, *, whole: bool = False, **options: Any) -> dict[str, Tensor]:
    """Loss, gradients, metrics. ``whole``: from logits, through token_stats and policy_loss."""
    data = {k: v for k, v in data.items() if k != "ref_logprobs" or options.get("beta")}
    if "importance_mode" not in options:
        data.pop("sampler_logprobs")
    if not options.pop("bias", True):
        data.pop("linear_bias")
    leaves = {n: data[n].clone().requires_grad_() for n in LEAVES if n in data}
    data |= leaves
    if whole:
        head = {k: options.pop(k) for k in ("temperature", "softcap", "logit_scale") if k in options}
        options.pop("chunk_size", None)
        logits = torch.nn.functional.linear(*[data.pop(n, None) for n in LEAVES])
        target = data.pop("target").masked_fill(~data["mask"], -100)
        stats = fastloss.token_stats(
            logits, target, outputs=("logprobs", "entropy"), backend="reference", **head
        )
        out = fastloss.policy_loss(
            stats.logprobs, entropy=stats.entropy, backend="reference", **data, **options
        )
    else:
        out = fastloss.linear_policy_loss(**data, backend=backend, with_entropy=True, **options)
    (out.loss * 1.5).backward()
    grads = {n: leaf.grad for n, leaf in leaves.items()}
    assert all(g.dtype == leaves[n].dtype for n, g in grads.items())
    return {k: v.detach().double().cpu() for k, v in {"loss": out.loss, **grads, **out.metrics}.items()}


def close(got: dict[str, Tensor], want: dict[str, Tensor], eps: float) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        size = max(value.abs().max().item(), 1e-2)
        assert (got[key] - value).abs().max() <= eps * size, (key, got[key], value)


CASES: list[dict[str, Any]] = [
    *({"loss_type": v} for v in VARIANTS),
    *({"aggregation": a, "loss_type": "cispo"} for a in AGGREGATIONS),
    *({"beta": 0.1, "kl_estimator": k, "kl_unbiased": True} for k in KL_KINDS),
    *(
        {"importance_mode": m, "importance_cap": 1.1, "importance_floor": 0.8}
        for m in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    ),
    {"entropy_coef": 0.1},
    {"entropy_coef": 0.1, "entropy_aggregation": "seq-mean-token-mean"},
    {"entropy_coef": 0.1, "loss_type": "gspo", "temperature": 0.7},
    {
        "temperature": 0.7,
        "softcap": 5.0,
        "logit_scale": 1.3,
        "chunk_size": 3,
        "entropy_coef": 0.1,
        "beta": 0.1,
    },
    {"normalizer": 17, "chunk_size": 2, "loss_type": "grpo", "dual_clip": 1.3, "delta": 1.2},
    {"normalizer": torch.tensor(9.0), "bias": False},
    {"off_policy_threshold": 0.0},
    {"top_entropy_quantile": 0.5, "chunk_size": 4},
    {"loss_type": "vespo", "importance_mode": "sequence_truncate", "importance_cap": 1.1},
    {"weights": torch.tensor([0.5, 2.0, 1.0, 0.0]), "beta": 0.1, "chunk_size": 3},
    {
        "weights": torch.rand(B, T, generator=torch.Generator().manual_seed(1)) > 0.3,
        "importance_mode": "sequence_truncate",
    },
    {"weights": torch.tensor([0.5, 2.0, 1.0, 0.0]), "loss_type": "gspo", "top_entropy_quantile": 0.8},
    # Parts of whole sequences: of the 3, 5, 0 and 1 computed rows, two.
    *(
        {"loss_type": v, "chunk_size": 5, "entropy_coef": 0.1}
        for v in ("gspo", "gmpo", "luspo", "rloo", "vespo")
    ),
    {
        "loss_type": "gspo",
        "chunk_size": 5,
        "importance_mode": "sequence_mask",
        "importance_cap": 1.1,
        "beta": 0.1,
    },
    {"loss_type": "luspo", "chunk_size": 5, "normalizer": 17, "off_policy_threshold": 0.0},
    # Tokens that are chosen over the batch, and an entropy bonus with a share of its own.
    *(
        {"top_entropy_quantile": 0.5, "entropy_coef": 0.1, "loss_type": v}
        for v in ("grpo", "clip_cov", "gspo")
    ),
    {
        "top_entropy_quantile": 0.5,
        "entropy_coef": 0.1,
        "entropy_aggregation": "seq-mean-token-mean",
        "normalizer": 9,
    },
]


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_linear_is_logits(backend: str, case: int) -> None:
    need(backend)
    options = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in CASES[case].items()}
    data = batch()
    exact = {k: v.double() if v.is_floating_point() else v for k, v in data.items()}
    want = run(exact, "reference", whole=True, **options)
    close(run(data, backend, **options), want, 3e-5)
    if backend in ("reference", "cpu"):
        close(run(exact, backend, **options), want, 1e-12)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "gspo"])
def test_low_precision(backend: str, dtype: torch.dtype, loss_type: str) -> None:
    need(backend)
    data = batch(dtype)
    exact = {k: v.double() if v.is_floating_point() else v for k, v in data.items()}
    options = {"loss_type": loss_type, "entropy_coef": 0.1, "chunk_size": 4}
    want = run(exact, "reference", whole=True, **options)
    close(run(data, backend, **options), want, 64 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", ALL)
def test_masked_rows_touch_nothing(backend: str) -> None:
    """NaN hidden states, and targets that are no class, on prompts and padding."""
    need(backend)
    data = batch()
    wild = {**data, "input": data["input"].masked_fill(~data["mask"][..., None], float("nan"))}
    wild["target"] = data["target"].masked_fill(~data["mask"], 10**6)
    for loss_type in ("dapo", "gspo"):
        a, b = run(data, backend, loss_type=loss_type), run(wild, backend, loss_type=loss_type)
        assert not b["input"][~data["mask"].cpu()].any()
        if backend != "reference" and DEVICE == "cpu":  # rows taken out: the same bits
            assert all(torch.equal(a[k], b[k]) for k in a)
        close(b, a, 1e-6)


@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
@pytest.mark.parametrize("backend", ALL)
def test_statistics_of_the_same_pass(backend: str, loss_type: str) -> None:
    """``return_stats``: per token, 0 where masked, detached; loss and gradient are those of the call without."""
    need(backend)
    data = batch() | {"sampler_logprobs": None}
    weight = data["linear_weight"].clone().requires_grad_()
    call = {**data, "linear_weight": weight, "loss_type": loss_type, "backend": backend, "with_entropy": True}
    plain = torch.autograd.grad(fastloss.linear_policy_loss(**call).loss, weight)[0]
    for chunk in (None, 3):
        out, stats = fastloss.linear_policy_loss(**call, chunk_size=chunk, return_stats=True)
        torch.testing.assert_close(torch.autograd.grad(out.loss, weight)[0], plain)
        logits = torch.nn.functional.linear(*[data[name] for name in LEAVES])
        expected = fastloss.token_stats(
            logits,
            data["target"].masked_fill(~data["mask"], -100),
            outputs=("logprobs", "entropy"),
            backend="reference",
        )
        for name in ("logprobs", "entropy"):
            value = getattr(stats, name)
            assert not value.requires_grad
            torch.testing.assert_close(value, getattr(expected, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", KERNELS)
def test_logprob_bits(backend: str) -> None:
    """Bug 27: old log-probs from linear_token_stats make a ratio of exactly 1 in linear_policy_loss."""
    need(backend)
    data = batch()
    for chunk in (None, 3):
        old = fastloss.linear_token_stats(
            data["input"],
            data["linear_weight"],
            data["target"].masked_fill(~data["mask"], -100),
            temperature=0.7,
            chunk_size=chunk,
            backend=backend,
        ).logprobs
        arguments = {k: data[k] for k in ("input", "linear_weight", "target", "advantages", "mask")}
        for options in ({}, {"loss_type": "gspo"}):
            out = fastloss.linear_policy_loss(
                **arguments, old_logprobs=old, temperature=0.7, chunk_size=chunk, backend=backend, **options
            )
            assert out.metrics["ratio/min"] == out.metrics["ratio/max"] == 1
            assert out.metrics["approx_kl"] == 0
        fresh = fastloss.linear_policy_loss(
            **arguments, old_logprobs=None, temperature=0.7, chunk_size=chunk, backend=backend
        )
        assert fresh.metrics["ratio/min"] == fresh.metrics["ratio/max"] == 1


@pytest.mark.parametrize("backend", KERNELS)
def test_gemms(backend: str) -> None:
    need(backend)
    data = batch()
    arguments = {k: v for k, v in data.items() if k not in (*LEAVES, "ref_logprobs", "sampler_logprobs")}

    def plan(frozen: bool, on: bool = True, **options: Any) -> dict[str, Any]:
        hidden = data["input"].clone().requires_grad_(on)
        weight = data["linear_weight"].clone().requires_grad_(on and not frozen)
        options = {"chunk_size": 5, **options}
        return fastloss.explain(
            fastloss.linear_policy_loss, hidden, weight, **arguments, backend=backend, **options
        )

    assert plan(False)["gemms"] == 3 and plan(True)["gemms"] == 2 and plan(False, on=False)["gemms"] == 1
    assert plan(False, entropy_coef=0.1)["gemms"] == 3
    for loss_type in ("gspo", "vespo"):
        assert (
            plan(False, loss_type=loss_type)["gemms"] == 3 and plan(True, loss_type=loss_type)["gemms"] == 2
        )
        assert plan(False, on=False, loss_type=loss_type)["gemms"] == 1
    assert plan(True, loss_type="gspo", entropy_coef=0.1)["gemms"] in (2, 3)
    # A sequence that does not fit into a chunk, and tokens that are chosen over more rows than go together.
    by_rows = plan(False)["schedule"] == "chunks of rows"
    assert plan(False, loss_type="gspo", chunk_size=4)["gemms"] == (4 if by_rows else 3)
    for options in ({"loss_type": "kl_cov"}, {"top_entropy_quantile": 0.5}):
        assert plan(False, **options)["gemms"] == 4
        assert plan(False, **options, chunk_size=32)["gemms"] < 3.2  # the rows past D are made again
    assert plan(False)["chunk_rows"] == 5
    if plan(False)["schedule"] == "chunks of rows":
        assert plan(False)["buffer_bytes"] == 5 * V * 4
    if DEVICE == "cpu":
        assert plan(False)["rows"] == int(data["mask"].sum())


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("loss_type", ["dapo", "gspo", "kl_cov"])
def test_upstream_retained_frozen_and_twice(backend: str, dtype: torch.dtype, loss_type: str) -> None:
    """Bugs 1, 2, 3 and 12."""
    need(backend)
    data = batch(dtype)
    hidden, weight = data["input"].requires_grad_(), data["linear_weight"].requires_grad_()
    kept: dict[str, Any] = {k: data[k] for k in ("target", "old_logprobs", "advantages", "mask")}
    kept |= {"loss_type": loss_type}
    loss = fastloss.linear_policy_loss(hidden, weight, **kept, backend=backend).loss
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight), torch.tensor(4.0, device=DEVICE), retain_graph=True)
    # Both are rounded to the dtype, by eps relative to their size, or to a multiple of the smallest subnormal.
    info = torch.finfo(dtype)
    bounds = {"rtol": 4 * info.eps, "atol": 4 * info.smallest_normal * info.eps}
    assert all(torch.allclose(4 * a.float(), b.float(), **bounds) for a, b in zip(first, second, strict=True))
    frozen = fastloss.linear_policy_loss(hidden, weight.detach(), **kept, backend=backend).loss
    frozen.backward()
    # A frozen weight's d hidden may be made with the statistics, and multiplied with the coefficients after them.
    size = first[0].float().abs().max().item()
    torch.testing.assert_close(hidden.grad, first[0], rtol=4 * info.eps, atol=4 * info.eps * size)
    assert weight.grad is None


@pytest.mark.parametrize("backend", ALL)
def test_packed_and_micro_batches(backend: str) -> None:
    need(backend)
    data = batch()
    lengths = torch.tensor([4, 6, 0, 2])
    inside = (torch.arange(T)[None, :] < lengths[:, None]).to(DEVICE)
    per_sequence = ("advantages", "linear_weight", "linear_bias")
    packed = {k: v if k in per_sequence else v[inside] for k, v in data.items()}
    packed["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(DEVICE)
    for loss_type in ("grpo", "gspo"):
        a, b = run(data, backend, loss_type=loss_type), run(packed, backend, loss_type=loss_type)
        b["input"] = torch.zeros(B, T, D, dtype=torch.float64).masked_scatter(
            inside.cpu()[..., None], b["input"]
        )
        close(b, a, 2e-6)
        shared = ("linear_weight", "linear_bias")
        parts = [
            run(
                {k: v if k in shared else v[i : i + 2] for k, v in data.items()},
                backend,
                loss_type=loss_type,
                normalizer=float(B),
            )
            for i in (0, 2)
        ]
        for key in ("loss", *shared):
            assert torch.allclose(parts[0][key] + parts[1][key], a[key], atol=1e-6)


@pytest.mark.parametrize("backend", ALL)
def test_nothing_to_train_on(backend: str) -> None:
    """Bug 33."""
    need(backend)
    data = batch()
    for case in (
        {**data, "mask": torch.zeros_like(data["mask"])},
        {k: v if k in LEAVES[1:] else v[:0] for k, v in data.items()},
        {k: v[:, :0] if v.dim() >= 2 and k not in LEAVES[1:] else v for k, v in data.items()},
    ):
        for loss_type in ("dapo", "grpo", "gspo", "gmpo"):
            got = run(case, backend, loss_type=loss_type)
            assert got["loss"] == 0 and not any(got[n].any() for n in LEAVES)
            assert got["ratio/min"] == got["ratio/max"] == 1


def test_errors() -> None:
    data = {k: v.cpu() for k, v in batch().items() if k not in ("ref_logprobs", "sampler_logprobs")}
    with pytest.raises(TypeError, match="clip_hihg"):
        fastloss.linear_policy_loss(**data, clip_hihg=0.2)
    for change, error, message in (
        ({"linear_weight": torch.zeros(V, D + 1)}, ValueError, "linear_weight: expected shape"),
        ({"target": data["target"].int()}, ValueError, "target: expected int64"),
        ({"target": data["target"].masked_fill(data["mask"], V)}, IndexError, "out of bounds"),
        ({"target": data["target"].masked_fill(data["mask"], -100)}, IndexError, "out of bounds"),
        ({"beta": 0.1}, ValueError, "ref_logprobs: expected a tensor"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"chunk_size": 0}, ValueError, "chunk_size"),
        ({"advantages": torch.zeros(B + 1)}, ValueError, "advantages: expected shape"),
    ):
        with pytest.raises(error, match=message):
            fastloss.linear_policy_loss(**{**data, **change})


def test_autocast() -> None:
    """Bug 21: bfloat16 GEMMs under autocast (float32 ones where the processor has no others), the leaf's dtype for
    its gradient."""
    data = {
        k: v.cpu()
        for k, v in batch().items()
        if k in ("input", "linear_weight", "target", "advantages", "mask")
    }
    hidden, weight = data.pop("input").requires_grad_(), data.pop("linear_weight").requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fastloss.linear_policy_loss(hidden, weight, old_logprobs=None, loss_type="gpg", **data).loss
    loss.backward()
    assert loss.dtype == torch.float32 and hidden.grad.dtype == weight.grad.dtype == torch.float32
    # bfloat16 operands, or float32 ones on a processor that would emulate their multiplication. Where the weight is no
    # bfloat16 yet, their logits are made in chunks of rows, and rounded; in the CPU's blocks of the vocabulary they are not.
    same = [
        fastloss.linear_policy_loss(
            hidden.detach().to(dtype), weight.detach().to(dtype), old_logprobs=None, loss_type="gpg", **data
        ).loss
        for dtype in (torch.bfloat16, torch.float32)
    ]
    assert any(torch.allclose(loss.detach(), x, rtol=2**-8, atol=0) for x in same)


def test_compiled_is_eager() -> None:
    data = {
        k: v.cpu() for k, v in batch().items() if k not in ("ref_logprobs", "sampler_logprobs", "linear_bias")
    }
    hidden, weight = data.pop("input").requires_grad_(), data.pop("linear_weight").requires_grad_()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return fastloss.linear_policy_loss(hidden, weight, **data, loss_type="grpo").loss

    a = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    b = torch.autograd.grad(compiled(hidden, weight), (hidden, weight))
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(a, b, strict=True))
