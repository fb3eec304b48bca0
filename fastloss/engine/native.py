"""The contract of engine/contract.py by a native module: fastloss._cpu, fastloss._cuda, or CUDA's source built for the CPU.

A module takes addresses, sizes and the option records of fastloss/tables.py, all by name; it checks codes and that no address
it needs is 0. Shapes and dtypes are the callers' business (losses/), dense memory is the gate's (engine/gate.py).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastloss.engine import exponentials, gather
from fastloss.engine.coefficients import Coefficients
from fastloss.engine.contract import (
    ONE_BLOCK,
    WHOLE,
    ExponentialRows,
    Factor,
    PairResult,
    PolicyInputs,
    PolicyResult,
    UnpairedResult,
    ValueInputs,
    ValueResult,
    count_plainly,
)
from fastloss.engine.devices import of_the_moment
from fastloss.engine.gate import address, addresses, of_dense, of_made, to_write
from fastloss.engine.sequences import Sequences
from fastloss.tables import (
    ACC_DTYPES,
    DISTILLATION_SUMS,
    DTYPE_CODES,
    LSE_PARTS,
    NATIVE_TABLES,
    PAIR_SUMS,
    POLICY_OUT,
    POLICY_PLACE,
    STATS,
    UNPAIRED_SUMS,
    VALUE_OUT,
    CrossEntropyOptions,
    DistillationOptions,
    Number,
    PairConstants,
    PairOptions,
    PolicyOptions,
    RowOptions,
    UnpairedConstants,
    UnpairedOptions,
    is_token_level,
)

_ROW_OUTPUTS = frozenset((*STATS, LSE_PARTS, "loss"))
RUN = 4096  # tokens in a run, where sequences mean nothing


# --- the modules ------------------------------------------------------------------------------------------------------


def check_tables(module: ModuleType) -> None:
    """ImportError if ``module`` was built from other tables than fastloss/tables.py."""
    try:
        built: dict[str, list[str]] = module.tables()
    except AttributeError:
        raise ImportError(f"{module.__name__}: it was built from an older version; build it again") from None
    for table, names in NATIVE_TABLES.items():
        if (theirs := tuple(built.get(table, ()))) != names:
            place = next((i for i, (a, b) in enumerate(zip(names, theirs, strict=False)) if a != b), None)
            place = min(len(names), len(theirs)) if place is None else place
            ours, other = (repr(each[place]) if place < len(each) else "nothing" for each in (names, theirs))
            raise ImportError(
                f"{module.__name__}: expected {ours} as code {place} of {table!r}, got {other}: it was built from another"
                " version; build it again (python tools/build_native.py)"
            )


def _load(name: str) -> tuple[ModuleType, str]:
    """The module, and why it cannot be used (it is empty then); an empty reason if it can."""
    try:
        module = importlib.import_module(name)
        check_tables(module)
        return module, ""
    except ImportError as error:
        return ModuleType(name), f"the native module {name} cannot be used ({error})"


class Context(Protocol):
    """What a call needs beside its arguments: where it runs."""

    host_reads: bool

    def why_not(self) -> str:
        """Why this process cannot run the module's kernels at all; empty if it can."""
        ...

    def why_not_for(self, tensor: Tensor, module: ModuleType) -> str:
        """Why they cannot take ``tensor``; empty if they can."""
        ...

    def argument(self, tensor: Tensor) -> int:
        """The module's ``context``: threads, or the address of a stream."""
        ...

    def guard(self, tensor: Tensor) -> contextlib.AbstractContextManager[object]:
        """Makes the tensor's device the current one."""
        ...

    def ticket(self, tensor: Tensor) -> Tensor | None:
        """A new int32 on the device, 0, where a launch counts its blocks that finished."""
        ...


_NOTHING = contextlib.nullcontext()


class CpuContext:
    """As many threads as PyTorch has."""

    host_reads = True

    def why_not(self) -> str:
        return ""

    def why_not_for(self, tensor: Tensor, module: ModuleType) -> str:
        if tensor.device.type != "cpu":
            return f"it takes cpu tensors, got {tensor.device.type}"
        return "" if tensor.dtype in DTYPE_CODES else f"it has no kernel for {tensor.dtype}"

    def argument(self, tensor: Tensor) -> int:
        return torch.get_num_threads()

    def guard(self, tensor: Tensor) -> contextlib.AbstractContextManager[object]:
        return _NOTHING

    def ticket(self, tensor: Tensor) -> Tensor | None:
        return None


class CudaContext:
    """PyTorch's current stream of the tensor's own device, which need not be the current one."""

    host_reads = False

    def why_not(self) -> str:
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
        return "" if torch.version.cuda else "this torch is not built for CUDA"

    def why_not_for(self, tensor: Tensor, module: ModuleType) -> str:
        if not tensor.is_cuda:
            return f"it takes cuda tensors, got {tensor.device.type}"
        return _without_float64(tensor) or _why_not_on(module, tensor.device)

    def argument(self, tensor: Tensor) -> int:
        stream: int = torch.cuda.current_stream(tensor.device).cuda_stream
        return stream

    def guard(self, tensor: Tensor) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.device_of(tensor)

    def ticket(self, tensor: Tensor) -> Tensor | None:
        """A new one for each launch. One that is kept would lie in a CUDA graph's pool where torch.compile warms up there, and the next
        graph has that memory for its own tensors: as with cuBLAS's workspace, which PyTorch takes back for this."""
        return _zero(tensor.device)


class EmulatedContext:
    """CUDA's source compiled for the CPU (tests/helpers/cuda_emulation): the kernels of a GPU on tensors of the CPU."""

    host_reads = False

    def why_not(self) -> str:
        return ""

    def why_not_for(self, tensor: Tensor, module: ModuleType) -> str:
        if tensor.device.type != "cpu":
            return f"it takes cpu tensors, got {tensor.device.type}"
        return _without_float64(tensor)

    def argument(self, tensor: Tensor) -> int:
        return 0

    def guard(self, tensor: Tensor) -> contextlib.AbstractContextManager[object]:
        return _NOTHING

    def ticket(self, tensor: Tensor) -> Tensor | None:
        return _zero(tensor.device)


def _without_float64(tensor: Tensor) -> str:
    if tensor.dtype not in DTYPE_CODES or tensor.dtype == torch.float64:
        return f"it has no kernel for {tensor.dtype}"
    return ""


def _zero(device: torch.device) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


@functools.cache
def _why_not_on(module: ModuleType, device: torch.device) -> str:
    """CUDA's own answer: an architecture that was not compiled, a driver older than the runtime in the module.

    Raises:
        RuntimeError: it had none this time (the kernels are loaded when they are first asked for, and memory may be full).
    """
    with torch.cuda.device(device):
        reason = module.why_not()
    if of_the_moment(reason):
        raise RuntimeError(f"fastloss CUDA kernel: {reason}")
    return f"its kernels cannot run on {device} ({reason})" if reason else ""


# --- the backend ------------------------------------------------------------------------------------------------------


class NativeBackend:
    """:class:`fastloss.engine.contract.Backend` by ``module``, on what ``context`` says.

    Args:
        name: "cpu" or "cuda".
        module: with :func:`tables` equal to fastloss/tables.py (see :func:`check_tables`).
        reason: why the module cannot be used; empty if it can.
    """

    differentiable = False

    def __init__(self, name: str, module: ModuleType, context: Context, reason: str = "") -> None:
        if not reason:
            check_tables(module)
        self.name, self.module, self.context, self._reason = name, module, context, reason
        self.host_reads = context.host_reads
        # Calls for tensors so small that the Python around the kernel is the cost; the linear head in one call. The CPU's.
        self.has_head = name == "cpu" and not reason
        self.direct = DirectCalls(module) if self.has_head else None

    def why_not(self) -> str:
        return self._reason or self.context.why_not()

    def why_not_for(self, tensor: Tensor) -> str:
        return self.context.why_not_for(tensor, self.module)

    # Rows of logits.

    def empty_stats(self, like: Tensor, rows: int, want: Iterable[str]) -> dict[str, Tensor]:
        """The outputs of the statistics of ``rows`` rows of ``like``'s dtype and device."""
        acc, device = ACC_DTYPES[like.dtype], like.device
        out = {
            name: torch.empty(
                (rows, 2) if name == LSE_PARTS else (rows,),
                dtype=torch.uint8 if name == "is_top1" else acc,
                device=device,
            )
            for name in want
        }
        if not _ROW_OUTPUTS.issuperset(out):  # nobody would write it
            raise ValueError(f"want: expected names of {', '.join(STATS)}, got {', '.join(map(repr, out))}")
        return out

    def row_stats(
        self,
        logits: Tensor,
        target: Tensor | None,
        options: RowOptions,
        *,
        want: Sequence[str],
        bias: Tensor | None = None,
    ) -> dict[str, Tensor]:
        out = self.empty_stats(logits, logits.shape[0], want)
        if logits.shape[0]:
            with self.context.guard(logits):
                self.module.row_stats(
                    **_size(logits), options=options, context=self.context.argument(logits),
                    **addresses({"logits": logits, "target": target, "bias": bias, "row_scale": options.row_scale}, {**_NO_STATS, **out}),
                )  # fmt: skip
        return out

    def row_grad(
        self,
        logits: Tensor,
        target: Tensor | None,
        options: RowOptions,
        *,
        lse_parts: Tensor,
        coefficients: Coefficients,
        out: Tensor,
        bias: Tensor | None = None,
        w: Tensor | None = None,
    ) -> None:
        if not logits.shape[0]:
            return
        given = {
            "logits": logits, "target": target, "bias": bias, "lse_parts": lse_parts, "w": w,
            "row_scale": options.row_scale, "a": coefficients.a, "b": coefficients.b, "c": coefficients.c, "d": coefficients.d,
        }  # fmt: skip
        with self.context.guard(logits):
            self.module.row_grad(
                **_size(logits), options=options, w_row_stride=0 if w is None or w.dim() == 1 else w.stride(0),
                out_row_stride=out.stride(0), context=self.context.argument(logits), **addresses(given, {}, out=out),
            )  # fmt: skip

    def row_cross_entropy(
        self,
        logits: Tensor,
        target: Tensor | None,
        options: CrossEntropyOptions,
        *,
        factor: Factor = WHOLE,
        grad: Tensor | None = None,
        want: Sequence[str] = (),
        bias: Tensor | None = None,
        w: Tensor | None = None,
    ) -> dict[str, Tensor]:
        out = self.empty_stats(logits, logits.shape[0], dict.fromkeys((*want, LSE_PARTS, "loss")))
        if logits.shape[0]:
            given = {
                "logits": logits, "target": target, "bias": bias, "w": w, "factor_tensor": factor.tensor,
                "row_scale": options.row_scale,
            }  # fmt: skip
            with self.context.guard(logits):
                self.module.row_cross_entropy(
                    **_size(logits), options=options, w_row_stride=0 if w is None or w.dim() == 1 else w.stride(0),
                    factor=factor.value, grad_row_stride=0 if grad is None else grad.stride(0),
                    context=self.context.argument(logits), **addresses(given, {**_NO_STATS, **out}, grad=grad),
                )  # fmt: skip
        return out

    def row_kernel(
        self, like: Tensor, options: CrossEntropyOptions, *, vocab: int, row_stride: int, start: int = 0, grad: tuple[int, int] | None,
        labels: bool, bias: bool, want: Sequence[str],
    ) -> dict[str, str]:  # fmt: skip
        """What ``explain`` tells of :meth:`row_cross_entropy` where the module has two kernels for it: the launcher's own decision.

        Args:
            like: a tensor of the logits' dtype and device.
            start: the address of the logits; 0 for those of a new tensor.
            grad: address (0: a new tensor) and row stride of the gradient; None where none is made.
        """
        if self.name == "cpu" or not vocab:
            return {}
        to, grad_row_stride = grad or (0, 0)
        with self.context.guard(like):
            reason: str = self.module.why_no_clusters(
                logits=start or 16, dtype=DTYPE_CODES[like.dtype], vocab=vocab, row_stride=row_stride, options=options,
                has_target=labels, has_bias=bias, has_grad=grad is not None, grad=to, grad_row_stride=grad_row_stride,
                more=any(name in want for name in ("entropy", "log_sum_sq_probs", "mean_logits")),
            )  # fmt: skip
        return {
            "row_kernel": f"a block a row (not a cluster: {reason})"
            if reason
            else "a cluster of blocks a row, one read"
        }

    def row_exponentials(
        self,
        logits: Tensor,
        target: Tensor,
        options: CrossEntropyOptions,
        *,
        factor: Factor = WHOLE,
        bias: Tensor | None = None,
        w: Tensor | None = None,
    ) -> ExponentialRows:
        if self.has_head:  # the CPU's head has blocks of the vocabulary, and no use for it
            return exponentials.plainly(logits, target, options, factor, bias, w)
        rows, device = logits.shape[0], logits.device
        loss, multiplier, residue = torch.empty((3, rows), dtype=torch.float32, device=device).unbind()
        parts = torch.empty((rows, 2), dtype=torch.float32, device=device)
        rough = torch.empty(rows, dtype=torch.uint8, device=device)
        out = ExponentialRows(loss, parts, multiplier, residue, rough)
        if rows:
            given = {
                "logits": logits, "target": target, "bias": bias, "w": w, "factor_tensor": factor.tensor,
                "row_scale": options.row_scale,
            }  # fmt: skip
            with self.context.guard(logits):
                self.module.row_exponentials(
                    **_size(logits), options=options, factor=factor.value, context=self.context.argument(logits),
                    **addresses(given, out._asdict()),
                )  # fmt: skip
        return out

    def row_divergence(
        self,
        logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor | None,
        options: DistillationOptions,
        *,
        lse_parts: Tensor,
        teacher_lse_parts: Tensor,
        hard_lse_parts: Tensor | None = None,
        factors: Tensor | None = None,
        grad: Tensor | None = None,
        bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor:
        shape = (logits.shape[0], len(DISTILLATION_SUMS))
        sums = torch.empty(shape, dtype=ACC_DTYPES[logits.dtype], device=logits.device)
        given = {
            "logits": logits, "teacher_logits": teacher_logits, "target": target, "bias": bias, "teacher_bias": teacher_bias,
            "lse_parts": lse_parts, "teacher_lse_parts": teacher_lse_parts, "hard_lse_parts": hard_lse_parts,
            "factors": factors, "slopes": None,
        }  # fmt: skip
        self._row_divergence(logits, teacher_logits, options, grad, given, sums)
        return sums

    def row_divergence_grad(
        self,
        logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor | None,
        options: DistillationOptions,
        *,
        lse_parts: Tensor,
        teacher_lse_parts: Tensor,
        slopes: Tensor,
        factors: Tensor,
        out: Tensor,
        hard_lse_parts: Tensor | None = None,
        bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> None:
        given = {
            "logits": logits, "teacher_logits": teacher_logits, "target": target, "bias": bias, "teacher_bias": teacher_bias,
            "lse_parts": lse_parts, "teacher_lse_parts": teacher_lse_parts, "hard_lse_parts": hard_lse_parts,
            "factors": factors, "slopes": slopes,
        }  # fmt: skip
        self._row_divergence(logits, teacher_logits, options, out, given, None)

    def _row_divergence(
        self,
        logits: Tensor,
        teacher_logits: Tensor,
        options: DistillationOptions,
        grad: Tensor | None,
        given: dict[str, Tensor | None],
        sums: Tensor | None,
    ) -> None:
        if not logits.shape[0]:
            return
        own = {name: getattr(options, name) for name in ("row_scale", "teacher_row_scale", "row_factor")}
        with self.context.guard(logits):
            self.module.row_divergence(
                **_size(logits), teacher_row_stride=teacher_logits.stride(0), options=options,
                grad_row_stride=0 if grad is None else grad.stride(0), context=self.context.argument(logits),
                **addresses({**given, **own}, {"sums": sums}, grad=grad),
            )  # fmt: skip

    def scale_in_place(self, x: Tensor, scale: Tensor) -> None:
        if not x.numel():
            return
        if self.host_reads:  # PyTorch's is as good where the host may look at the scale
            if float(scale) != 1.0:
                x.mul_(scale)
            return
        rows, width = x.shape
        with self.context.guard(x):
            self.module.scale_in_place(
                x=of_made(x), dtype=DTYPE_CODES[x.dtype], rows=rows, width=width, row_stride=x.stride(0),
                factor=address(scale), context=self.context.argument(x),
            )  # fmt: skip

    # Rows that an index names.

    def gathered_dots(self, x: Tensor, m: Tensor, index: Tensor, offsets: Tensor) -> Tensor:
        if not self.has_head:
            return gather.dots(x, m, index, offsets)
        out = torch.empty(index.shape, dtype=ACC_DTYPES[m.dtype], device=m.device)
        self.module.gathered_dots(
            dtype=DTYPE_CODES[m.dtype], x_row_stride=x.stride(0), m_row_stride=m.stride(0), dim=m.shape[1],
            entries=index.shape[0], segments=x.shape[0], context=self.context.argument(m),
            **addresses({"x": x, "m": m, "index": index, "offsets": offsets}, {"out": out}),
        )  # fmt: skip
        return out

    def gathered_sums(self, m: Tensor, index: Tensor, weights: Tensor, offsets: Tensor, out: Tensor) -> None:
        if not self.has_head:
            gather.sums(m, index, weights, offsets, out)
            return
        given: dict[str, Tensor | None] = {"m": m, "index": index, "weights": weights, "offsets": offsets}
        self.module.gathered_sums(
            dtype=DTYPE_CODES[m.dtype], m_row_stride=m.stride(0), dim=m.shape[1], entries=index.shape[0],
            segments=out.shape[0], out_row_stride=out.stride(0), context=self.context.argument(m),
            **addresses(given, {}, out=out),
        )  # fmt: skip

    # Reductions.

    def sum_rows(self, values: Tensor, factor: Factor) -> Tensor:
        of_cpu = self.has_head and factor.tensor is None
        if not of_cpu and (self.host_reads or values.numel() > ONE_BLOCK):
            return factor.times(values.sum())
        # Added in one order in double: the same bits for any number of threads.
        out = torch.empty((), dtype=values.dtype, device=values.device)
        n, number = values.numel(), factor.value
        if of_cpu:
            given = addresses({"values": values}, {"out": out})
            self.module.sum_rows(dtype=DTYPE_CODES[values.dtype], n=n, factor=number, **given)
            return out
        if not n:
            return factor.times(out.zero_())
        given = addresses({"values": values, "factor_tensor": factor.tensor}, {"out": out})
        with self.context.guard(values):
            self.module.sum_rows(n=n, factor=number, context=self.context.argument(values), **given)
        return out

    def reciprocal_count(self, target: Tensor, ignore_index: int) -> Tensor:
        n = target.numel()
        if self.host_reads or not 0 < n <= ONE_BLOCK:
            return count_plainly(target, ignore_index, torch.float32)
        out = torch.empty((), dtype=torch.float32, device=target.device)
        with self.context.guard(target):
            self.module.reciprocal_count(
                n=n, ignore_index=ignore_index, context=self.context.argument(target),
                **addresses({"target": target}, {"out": out}),
            )  # fmt: skip
        return out

    # Sequences, pairs and single responses.

    def segment_sum(self, values: Tensor, weights: Tensor | None, layout: Sequences) -> Tensor:
        if not values.numel() or not layout.count:
            return torch.zeros(layout.count, dtype=values.dtype, device=values.device)
        values = values.contiguous()
        out = torch.empty(layout.count, dtype=values.dtype, device=values.device)
        given = {"values": values, "weights": weights, "offsets": layout.offsets}
        with self.context.guard(values):
            self.module.segment_sum(
                dtype=DTYPE_CODES[values.dtype], length=layout.length, count=layout.count,
                context=self.context.argument(values), **addresses(given, {"out": out}),
            )  # fmt: skip
        return out

    def segment_expand(self, upstream: Tensor, weights: Tensor | None, layout: Sequences) -> Tensor:
        if not layout.n or not upstream.numel():
            return torch.zeros(layout.n, dtype=upstream.dtype, device=upstream.device)
        upstream = upstream.contiguous()
        out = torch.empty(layout.n, dtype=upstream.dtype, device=upstream.device)
        given = {"upstream": upstream, "weights": weights, "offsets": layout.offsets}
        with self.context.guard(upstream):
            self.module.segment_expand(
                dtype=DTYPE_CODES[upstream.dtype], length=layout.length, count=upstream.numel(), n=layout.n,
                context=self.context.argument(upstream), **addresses(given, {"out": out}),
            )  # fmt: skip
        return out

    def pair_loss(
        self,
        chosen: Tensor,
        rejected: Tensor,
        nll: Tensor | None,
        constants: PairConstants,
        options: PairOptions,
    ) -> PairResult:
        chosen, rejected = chosen.contiguous(), rejected.contiguous()
        nll = None if nll is None else nll.contiguous()
        loss, d_chosen, d_rejected, won, lost = (_like(chosen) for _ in range(5))
        d_nll = None if nll is None else _like(chosen)
        sums = torch.zeros(len(PAIR_SUMS), dtype=chosen.dtype, device=chosen.device)
        result = PairResult(loss, won, lost, sums, d_chosen, d_rejected, d_nll)
        if not chosen.numel():
            return result
        given = {
            "chosen": chosen, "rejected": rejected, "nll": nll, "ref_chosen": constants.ref_chosen,
            "ref_rejected": constants.ref_rejected, "chosen_lengths": constants.chosen_lengths,
            "rejected_lengths": constants.rejected_lengths, "weight": constants.weight,
            "beta_each": _each(options.beta), "smoothing_each": _each(options.smoothing),
            "margin_each": _each(options.margin),
        }  # fmt: skip
        made = {
            "loss": loss, "d_chosen": d_chosen, "d_rejected": d_rejected, "d_nll": d_nll, "chosen_reward": won,
            "rejected_reward": lost, "sums": sums,
        }  # fmt: skip
        with self.context.guard(chosen):
            self.module.pair_loss(
                dtype=DTYPE_CODES[chosen.dtype], pairs=chosen.numel(), options=options,
                context=self.context.argument(chosen), **addresses(given, made),
            )  # fmt: skip
        return result

    def unpaired_loss(
        self, logps: Tensor, constants: UnpairedConstants, options: UnpairedOptions
    ) -> UnpairedResult:
        logps = logps.contiguous()
        loss, reward, d_logps = _like(logps), _like(logps), _like(logps)
        sums = torch.zeros(len(UNPAIRED_SUMS), dtype=logps.dtype, device=logps.device)
        if logps.numel():
            given = {
                "logps": logps, "desirable": constants.desirable, "ref": constants.ref, "weight": constants.weight,
                "kl": constants.kl,
            }  # fmt: skip
            made: dict[str, Tensor | None] = {
                "loss": loss,
                "d_logps": d_logps,
                "reward": reward,
                "sums": sums,
            }
            with self.context.guard(logps):
                self.module.unpaired_loss(
                    dtype=DTYPE_CODES[logps.dtype], sequences=logps.numel(), options=options,
                    context=self.context.argument(logps), **addresses(given, made),
                )  # fmt: skip
        return UnpairedResult(loss, reward, sums, d_logps)

    # Policy-gradient losses and advantages.

    def policy_loss(
        self, logprobs: Tensor, entropy: Tensor | None, inputs: PolicyInputs, options: PolicyOptions
    ) -> PolicyResult:
        n, runs = logprobs.numel(), _runs_of(inputs, options)
        d_logprobs = _gradient_like(logprobs, runs.offsets)
        with_entropy = entropy is not None and options.entropy_coef != 0
        d_entropy = _gradient_like(logprobs, runs.offsets) if with_entropy else None
        out = torch.empty(len(POLICY_OUT), dtype=logprobs.dtype, device=logprobs.device)
        if not n:
            out.zero_()
            out[[POLICY_PLACE[name] for name in ("scale", "min_ratio", "max_ratio")]] = 1
            return PolicyResult(out[0], out, d_logprobs, d_entropy)
        sums = torch.empty(runs.number * len(POLICY_OUT), dtype=torch.float64, device=logprobs.device)
        normalizer = inputs.normalizer
        number, tensor = (None, normalizer) if isinstance(normalizer, Tensor) else (normalizer, None)
        given = {
            "logprobs": logprobs, "entropy": entropy, "advantages": inputs.advantages, "mask": _bytes(inputs.mask),
            "old": inputs.old, "ref": inputs.ref, "sampler": inputs.sampler, "token_weight": inputs.token_weight,
            "select": _bytes(inputs.select), "share": inputs.share, "offsets": runs.offsets,
            "normalizer_tensor": tensor,
        }  # fmt: skip
        made = {
            "d_logprobs": d_logprobs, "d_entropy": d_entropy, "out": out, "sums": sums,
            "ticket": self.context.ticket(logprobs),
        }  # fmt: skip
        with self.context.guard(logprobs):
            self.module.policy_loss(
                dtype=DTYPE_CODES[logprobs.dtype], advantage_of_sequence=runs.advantage_of_sequence, n=n,
                length=runs.length, count=runs.number, options=options, normalizer=number,
                context=self.context.argument(logprobs), **addresses(given, made),
            )  # fmt: skip
        return PolicyResult(out[0], out, d_logprobs, d_entropy)

    def gae(
        self, rewards: Tensor, values: Tensor, mask: Tensor, layout: Sequences, gamma: float, lam: float
    ) -> tuple[Tensor, Tensor]:
        advantages = _gradient_like(rewards, layout.offsets)
        return advantages, self._scan(rewards, values, mask, layout, gamma, lam, advantages)

    def discounted_returns(self, rewards: Tensor, mask: Tensor, layout: Sequences, gamma: float) -> Tensor:
        return self._scan(rewards, None, mask, layout, gamma, 0.0, None)

    def _scan(
        self,
        rewards: Tensor,
        values: Tensor | None,
        mask: Tensor,
        layout: Sequences,
        gamma: float,
        lam: float,
        advantages: Tensor | None,
    ) -> Tensor:
        """Returns ``[N]``; with ``values`` writes ``advantages`` too."""
        returns = _gradient_like(rewards, layout.offsets)
        if rewards.numel():
            with self.context.guard(rewards):
                self.module.scan(
                    rewards=address(rewards), dtype=DTYPE_CODES[rewards.dtype], values=address(values),
                    mask=address(_bytes(mask)), offsets=address(layout.offsets), n=rewards.numel(), length=layout.length,
                    count=layout.count, gamma=gamma, lam=lam, advantages=to_write(advantages),
                    returns=to_write(returns), context=self.context.argument(rewards),
                )  # fmt: skip
        return returns

    def value_loss(self, values: Tensor, inputs: ValueInputs) -> ValueResult:
        x, n = inputs, values.numel()
        grad = _like(values)
        out = torch.empty(len(VALUE_OUT), dtype=values.dtype, device=values.device)
        # Written as doubles: a part is some of them.
        parts = math.ceil(n / self.module.VALUE_PART_TOKENS) * self.module.VALUE_PART_BYTES // 8
        sums = torch.empty(parts, dtype=torch.float64, device=values.device)
        given = {
            "values": values, "returns": x.returns, "old": x.old, "share": x.share, "mask": _bytes(x.mask), "scale": x.scale,
        }  # fmt: skip
        made = {"grad": grad, "out": out, "parts": sums, "ticket": self.context.ticket(values)}
        with self.context.guard(values):
            self.module.value_loss(
                dtype=DTYPE_CODES[values.dtype], n=n, clip_range=x.clip_range, context=self.context.argument(values),
                **addresses(given, made),
            )  # fmt: skip
        return ValueResult(out[0], out, grad)

    def kl_estimate(self, logprobs: Tensor, ref: Tensor, kind: int, upstream: Tensor | None) -> Tensor:
        out = _like(logprobs)
        if out.numel():
            given = {"logprobs": logprobs, "ref": ref, "upstream": upstream}
            with self.context.guard(logprobs):
                self.module.kl_estimate(
                    dtype=DTYPE_CODES[logprobs.dtype], n=out.numel(), kind=kind, context=self.context.argument(logprobs),
                    **addresses(given, {"out": out}),
                )  # fmt: skip
        return out

    # The CPU's alone.

    def count_targets(self, target: Tensor, vocab: int, ignore_index: int) -> tuple[int, int]:
        """(targets that are not ignored, flat position of the first bad one or -1)."""
        valid, first_bad = self.module.count_targets(
            target=address(target), n=target.numel(), vocab=vocab, ignore_index=ignore_index
        )
        return valid, first_bad

    def convert_in_place(self, x: Tensor, n: int, source: torch.dtype) -> None:
        """The first ``n`` numbers of ``x``'s memory, front to back: from ``source`` to ``x``'s dtype."""
        place = of_made(x)
        self.module.convert(
            src=place,
            src_dtype=DTYPE_CODES[source],
            dst=place,
            dst_dtype=DTYPE_CODES[x.dtype],
            n=n,
            threads=1,
        )


_NO_STATS: dict[str, Tensor | None] = dict.fromkeys((*STATS, LSE_PARTS))


def _size(logits: Tensor) -> dict[str, int]:
    rows, vocab = logits.shape
    return {
        "dtype": DTYPE_CODES[logits.dtype],
        "rows": rows,
        "vocab": vocab,
        "row_stride": logits.stride(0),
    }


def _each(number: Number) -> Tensor | None:
    """One per pair; None where a number is for all."""
    return number if isinstance(number, Tensor) else None


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _gradient_like(x: Tensor, offsets: Tensor | None) -> Tensor:
    """What no packed sequence covers is 0; padded sequences cover everything."""
    out = _like(x)
    return out if offsets is None else out.zero_()


def _bytes(mask: Tensor | None) -> Tensor | None:
    return mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask


class _Runs(NamedTuple):
    """What the policy kernels take for sequences."""

    offsets: Tensor | None
    length: int
    number: int
    advantage_of_sequence: bool


def _runs_of(inputs: PolicyInputs, options: PolicyOptions) -> _Runs:
    """The sequences; or, where a token's share is given and nothing else asks for its sequence, runs of equal size."""
    layout = inputs.layout
    of_sequence = inputs.advantages.numel() != layout.n
    if inputs.share is not None and not of_sequence and is_token_level(options):
        return _Runs(None, RUN, math.ceil(layout.n / RUN), False)
    return _Runs(layout.offsets, layout.length, layout.count, of_sequence)


# --- direct calls: small plain tensors on the CPU, one native call that makes loss, metrics and gradient ---------------
# The callers have checked the tensors. Arguments go by position here: naming a dozen of them costs more than the kernel.

DIRECT_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 3}
_threads = torch.get_num_threads
_FLOAT32, _FLOAT64, _CPU = torch.float32, torch.float64, torch.device("cpu")


class DirectCalls:
    """The direct calls of a CPU module."""

    def __init__(self, module: ModuleType) -> None:
        self._reduced_cross_entropy = module.reduced_cross_entropy

    def reduced_cross_entropy(
        self, logits: Tensor, target: Tensor, ignore_index: int, mean: bool, grad: Tensor | None
    ) -> tuple[Tensor, int]:
        """(loss 0-d in acc, position of the first bad target or -1: nothing was written) of ``logits [rows, V]``."""
        dtype = logits.dtype
        rows, vocab = logits.shape
        loss = torch.empty((), dtype=_FLOAT64 if dtype is _FLOAT64 else _FLOAT32, device=_CPU)
        bad: int = self._reduced_cross_entropy(
            of_dense(logits), DIRECT_CODES[dtype], rows, vocab, vocab, of_dense(target), ignore_index, mean,
            0 if grad is None else of_made(grad), of_made(loss), _threads(),
        )  # fmt: skip
        return loss, bad


# --- the instances ----------------------------------------------------------------------------------------------------


@functools.cache
def cpu_backend() -> NativeBackend:
    """Of fastloss._cpu; ``why_not`` says so where that is not there."""
    module, reason = _load("fastloss._cpu")
    return NativeBackend("cpu", module, CpuContext(), reason)


@functools.cache
def cuda_backend() -> NativeBackend:
    """Of fastloss._cuda; ``why_not`` says so where that, or a device, is not there."""
    module, reason = _load("fastloss._cuda")
    return NativeBackend("cuda", module, CudaContext(), reason)


def emulated_cuda(module: ModuleType) -> NativeBackend:
    """The backend "cuda" by CUDA's source compiled for the CPU."""
    return NativeBackend("cuda", module, EmulatedContext())


def supports_gemm_bf16() -> bool:
    """Whether this processor has AVX512_BF16; elsewhere float32 GEMMs over converted operands are as fast."""
    cpu = cpu_backend()
    return cpu.has_head and bool(cpu.module.supports_gemm_bf16())


def multiply_bf16(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """``out = a.t() @ b``, or ``out += a.t() @ b``, float32 from bfloat16."""
    (inner, rows), columns = a.shape, b.shape[1]
    cpu_backend().module.gemm_bf16(
        address(a), a.stride(0), address(b), b.stride(0), of_made(out), out.stride(0), rows, columns, inner, accumulate,
        torch.get_num_threads(),
    )  # fmt: skip


def advise_huge_pages(tensor: Tensor) -> None:
    """Asks for large pages behind memory that is about to be written for the first time (Linux)."""
    cpu = cpu_backend()
    if cpu.has_head:
        cpu.module.advise_huge_pages(of_made(tensor), tensor.nbytes)
