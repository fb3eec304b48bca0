"""TEMPORARY adapter until the csrc branch is merged."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from fastloss.engine.contract import WHOLE, PairResult, PolicyResult, UnpairedResult
from fastloss.engine.native_pairs import NativePairs
from fastloss.engine.native_policy import NativePolicy
from fastloss.engine.native_rows import NativeRows
from fastloss.engine.pair_call import PairCall
from fastloss.tables import DTYPE_CODES

OLD = {"logprobs": "logprob", "mean_logits": "mean_logit"}
NEW = {b: a for a, b in OLD.items()}


def old(want):
    return tuple(OLD.get(n, n) for n in want)


def new(out):
    return {NEW.get(n, n): v for n, v in out.items()}


class _O:
    def __init__(self, o):
        self.o = o

    def __getattr__(self, n):
        return getattr(self.o, {"log_low": "clip_low", "log_high": "clip_high"}.get(n, n))


class NativeBackend:
    differentiable = False

    def __init__(self, name, module, context, reason="", host_reads=True, ticket=lambda _: None):
        self.name, self.module, self.host_reads, self.reason = name, module, host_reads, reason
        self.rows, self.pairs, self.policies = (
            NativeRows(module, context),
            NativePairs(module, context),
            NativePolicy(module, context, ticket),
        )
        self.direct = module if name == "cpu" else None
        self.emulated = False

    def why_not(self):
        return self.reason

    def why_not_for(self, t):
        if t.device.type != "cpu":
            return f"it takes cpu tensors, got {t.device.type}"
        if t.dtype not in DTYPE_CODES or (self.name == "cuda" and t.dtype == torch.float64):
            return f"it has no kernel for {t.dtype}"
        return ""

    def row_stats(self, logits, target, o, *, want, bias=None):
        return new(
            self.rows.row_stats(
                logits,
                target,
                ignore_index=o.ignore_index,
                bias=bias,
                scale=o.scale,
                softcap=o.softcap,
                want=old(want),
            )
        )

    def row_grad(self, logits, target, o, *, logsumexp, coefficients, out, bias=None, w=None):
        self.rows.row_grad(
            logits,
            target,
            ignore_index=o.ignore_index,
            bias=bias,
            scale=o.scale,
            softcap=o.softcap,
            lse=logsumexp,
            **coefficients._asdict(),
            w=w,
            out=out,
        )

    def row_cross_entropy(self, logits, target, o, *, factor=WHOLE, grad=None, want=(), bias=None, w=None):
        return new(
            self.rows.row_cross_entropy(
                logits,
                target,
                ignore_index=o.ignore_index,
                bias=bias,
                scale=o.scale,
                softcap=o.softcap,
                w=w,
                label_smoothing=o.label_smoothing,
                z_loss=o.z_loss,
                grad_scale=factor.value,
                grad_scale_tensor=factor.tensor,
                grad=grad,
                want=old(want),
            )
        )

    def scale_in_place(self, x, scale):
        self.rows.scale_in_place(x, scale)

    def segment_sum(self, values, weights, l):
        if not values.numel() or not l.count:
            return values.new_zeros(l.count)
        return self.pairs.segment_sum(values.contiguous(), weights, l.offsets, l.length, l.count)

    def segment_expand(self, up, weights, l):
        if not l.n or not up.numel():
            return up.new_zeros(l.n)
        return self.pairs.segment_expand(up.contiguous(), weights, l.offsets, l.length, l.n)

    def pair_loss(self, c, r, nll, k, o):
        if not c.numel():
            z = torch.zeros_like(c)
            return PairResult(z, z, z, c.new_zeros(7), z, z, z)
        call = PairCall(
            list(o.terms),
            k.ref_chosen,
            k.ref_rejected,
            k.chosen_lengths,
            k.rejected_lengths,
            o.divergence,
            o.alpha,
            o.beta,
            o.smoothing,
            o.margin,
            k.weight,
            o.delta,
            o.tau,
            o.average_rewards,
        )
        d = self.pairs.pair_loss(
            c.contiguous(), r.contiguous(), None if nll is None else nll.contiguous(), call
        )
        return PairResult(
            d["loss"], d["chosen_reward"], d["rejected_reward"], d["sums"], d["d_c"], d["d_r"], d["d_nll"]
        )

    def unpaired_loss(self, x, k, o):
        if not x.numel():
            z = torch.zeros_like(x)
            return UnpairedResult(z, z, x.new_zeros(7), z)
        d = self.pairs.unpaired_loss(
            x.contiguous(),
            ref=k.ref,
            desirable=k.desirable,
            weight=k.weight,
            kl=k.kl,
            code=o.term,
            beta=o.beta,
            desirable_weight=o.desirable_weight,
            undesirable_weight=o.undesirable_weight,
        )
        return UnpairedResult(d["loss"], d["reward"], d["sums"], d["d"])

    def policy_loss(self, x, entropy, i, o):
        if not x.numel():
            out = torch.zeros(16, dtype=x.dtype, device=x.device)
            out[1] = out[10] = out[11] = 1
            return PolicyResult(
                out[0], out, torch.zeros_like(x), None if entropy is None else torch.zeros_like(x)
            )
        d = self.policies.policy_loss(
            x,
            old=i.old,
            advantages=i.advantages,
            mask=i.mask,
            ref=i.ref,
            entropy=entropy,
            sampler=i.sampler,
            token_weight=i.token_weight,
            select=i.select,
            agg=i.share,
            offsets=i.layout.offsets,
            length=i.layout.length,
            count=i.layout.count,
            options=_O(o),
            normalizer=i.normalizer,
        )
        return PolicyResult(d["out"][0], d["out"], d["grad"], d["grad_entropy"])

    def gae(self, r, v, m, l, gamma, lam):
        return self.policies.gae(r, v, m, l.offsets, l.length, l.count, gamma, lam)

    def discounted_returns(self, r, m, l, gamma):
        return self.policies.discounted_returns(r, m, l.offsets, l.length, l.count, gamma)

    def count_targets(self, t, vocab, ignore_index):
        return self.module.count_targets(t.data_ptr(), t.numel(), vocab, ignore_index)

    def sum_rows(self, v, factor):
        out = torch.empty((), dtype=v.dtype)
        self.module.sum_rows(v.data_ptr(), DTYPE_CODES[v.dtype], v.numel(), factor, out.data_ptr())
        return out

    def advise_huge_pages(self, t):
        self.module.advise_huge_pages(t.data_ptr(), t.nbytes)


try:
    _module: Any = importlib.import_module("fastloss._cpu")
    cpu = NativeBackend("cpu", _module, lambda _: torch.get_num_threads())
except ImportError:
    cpu = None


def cpu_backend():
    return cpu


def cuda_backend():
    return NativeBackend("cuda", None, lambda _: 0, "torch sees no CUDA device", False)


def emulated_cuda(module):
    return NativeBackend("cuda", module, lambda _: 0, "", False)


def supports_gemm_bf16():
    return cpu is not None and cpu.module.supports_gemm_bf16()


def multiply_bf16(out, a, b, accumulate):
    (inner, rows), columns = a.shape, b.shape[1]
    cpu.module.gemm_bf16(
        a.data_ptr(),
        a.stride(0),
        b.data_ptr(),
        b.stride(0),
        out.data_ptr(),
        out.stride(0),
        rows,
        columns,
        inner,
        accumulate,
        torch.get_num_threads(),
    )


def _empty_stats(self, like, rows, want):
    from fastloss.engine.native_rows import acc_dtype

    return {
        n: torch.empty(
            rows, dtype=torch.uint8 if n == "is_top1" else acc_dtype(like.dtype), device=like.device
        )
        for n in want
    }


def _convert(self, x, n, src):
    self.module.convert(x.data_ptr(), DTYPE_CODES[src], x.data_ptr(), DTYPE_CODES[x.dtype], n, 1)


NativeBackend.empty_stats = _empty_stats
NativeBackend.convert_in_place = _convert
NativeBackend.has_head = property(lambda s: s.name == "cpu")

DIRECT_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 3}


def advise_huge_pages(t):
    cpu.advise_huge_pages(t)


class _Direct:
    def reduced_cross_entropy(self, logits, target, ignore_index, mean, grad):
        dtype = logits.dtype
        loss = torch.empty((), dtype=torch.float64 if dtype is torch.float64 else torch.float32)
        bad = cpu.module.reduced_cross_entropy(
            logits.data_ptr(),
            DIRECT_CODES[dtype],
            logits.size(0),
            logits.size(1),
            logits.stride(0),
            target.data_ptr(),
            ignore_index,
            mean,
            0 if grad is None else grad.data_ptr(),
            loss.data_ptr(),
            torch.get_num_threads(),
        )
        return loss, bad


cpu.direct = _Direct()


class DirectPairs:
    def __init__(self, o):
        self.native = cpu.module.PlainPairs(
            list(o.terms), o.divergence, o.alpha, o.beta, o.smoothing, o.margin, o.delta, o.tau
        )

    def run(self, c, r, rc, rr, per_pair, loss, d_c, d_r, won, lost, metrics, extremes):
        self.native.run(
            DTYPE_CODES[c.dtype],
            c.numel(),
            c.data_ptr(),
            r.data_ptr(),
            0 if rc is None else rc.data_ptr(),
            0 if rr is None else rr.data_ptr(),
            per_pair,
            loss.data_ptr(),
            d_c.data_ptr(),
            d_r.data_ptr(),
            won.data_ptr(),
            lost.data_ptr(),
            metrics.data_ptr(),
            extremes,
        )


class DirectPolicy:
    def __init__(self, o):
        self.native = cpu.module.PolicyOptions(_O(o))

    def run(self, lp, old, adv, mask, ref, entropy, sampler, normalizer, grad, grad_entropy, loss, metrics):
        a = lambda t: 0 if t is None else t.data_ptr()
        count, length = lp.shape
        number, place = (None, normalizer) if isinstance(normalizer, Tensor) else (normalizer, None)
        cpu.module.plain_policy_loss(
            DTYPE_CODES[lp.dtype],
            lp.data_ptr(),
            a(old),
            adv.data_ptr(),
            adv.dim() == 1,
            mask.data_ptr(),
            a(ref),
            a(entropy),
            a(sampler),
            length,
            count,
            self.native,
            number,
            a(place),
            grad.data_ptr(),
            a(grad_entropy),
            loss.data_ptr(),
            metrics.data_ptr(),
            torch.get_num_threads(),
        )
