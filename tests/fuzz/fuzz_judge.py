"""One case: drawn, run by a backend, and judged by the definition in float64.

An output or gradient is right where its error, as a maximum over the tensor, is at most

    16 · eps · size + floor + 2 · (error of the definition in the same dtype) + 8 · response

with eps the rounding step of the result's dtype, ``size`` the largest exact number, but at least 1 for values (a log-probability is
a logarithm of a sum of about 1) and in float64 (where the definition's own rounding is unknown), ``floor`` 64 of its subnormal steps (of float16: an upstream gradient of up to 2
times hidden states of up to 10 lands on them) and 64 roundings of float64 of the largest argument, and ``response`` how far the exact result moves when each operand of a GEMM is
changed by one rounding step, of its own dtype or of autocast's, and every other float by one of the accumulation dtype, logits
relative to their row's maximum (an offset must cost no digits). The last two are only computed where the first do not suffice.
NaN and infinities must stand in the same places. Under autocast the definition's error is the larger of its own under autocast and in
float32 on operands that autocast rounded; a bias that a kernel keeps in float32 there is as right as one that it rounds. Where tokens
are chosen by their rank or a threshold, the response is taken of more changes, which meet both sides of a near tie. ``is_top1`` may be either where the target's logit is the largest within rounding.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import zlib
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from fuzz_draw import Case, Draw
from fuzz_functions import FUNCTIONS
from fuzz_kinds import KINDS, drawn_kinds, expanded_rows
from instruction_sets import ISAS, forced, threads_of
from torch import Tensor

import fastloss

Numbers = dict[str, Tensor]
REFUSED = "cannot run this call"  # what a backend says that was asked for by name


@dataclass
class How:
    """In which circumstances a case runs."""

    backend: str = "auto"
    isa: str | None = None
    threads: int | None = None
    mode: str = "grad"  # "grad", "twice", "second", "func", "compile", "no_grad", "inference", "meta"
    autocast: torch.dtype | None = None
    inplace: bool = False
    asking: tuple[str, ...] = ()  # leaves that require a gradient
    kinds: dict[str, str] = field(default_factory=dict)
    expanded_upstream: bool = False

    def __str__(self) -> str:
        parts = [self.backend, self.mode]
        if self.isa:
            parts.append(self.isa)
        if self.threads:
            parts.append(f"{self.threads} threads")
        if self.autocast:
            parts.append(f"autocast {str(self.autocast)[6:]}")
        parts += ["inplace"] * self.inplace + ["expanded upstream"] * self.expanded_upstream
        kinds = {n: k for n, k in self.kinds.items() if k != "plain"}
        return ", ".join(parts) + f"; gradients of {list(self.asking)}; {kinds or 'plain tensors'}"


@dataclass
class Verdict:
    """What became of a case: "right", "wrong", "refused" (by name, with reason) or "error" (the definition's, and everybody's)."""

    state: str
    detail: str = ""


def draw_case(
    seed: int, number: int, backends: tuple[str, ...], functions: tuple[str, ...]
) -> tuple[Case, How]:
    d = Draw(seed, number)
    backend = d.pick(*backends)
    if backend in ("triton", "cuda") and d.dtype == torch.float64:
        d.dtype = torch.float32
    names = [name for name in FUNCTIONS if name in functions or not functions]
    name = d.random.choices(names, [FUNCTIONS[name][1] for name in names])[0]
    case = FUNCTIONS[name][0](d)
    case.dtype = d.dtype
    leaves = tuple(n for n in case.leaves if n in case.tensors)
    asking = leaves if d.chance(0.6) else tuple(n for n in leaves if d.chance(0.5))
    if not leaves or not asking:
        mode = d.pick("no_grad", "no_grad", "inference", "meta")
    else:
        mode = d.random.choices(
            ("grad", "twice", "second", "func", "compile", "no_grad", "inference", "meta"),
            (70, 6, 6, 4, 2, 4, 4, 2),
        )[0]
    if mode == "compile" and backend not in ("auto", "cpu", "reference"):
        mode = "grad"
    expanded = expanded_rows(d, case.tensors)
    how = How(
        backend=backend,
        isa=d.pick(*ISAS) if backend in ("auto", "cpu") and ISAS and d.chance(0.4) else None,
        threads=d.pick(1, 2, 3) if d.chance(0.2) else None,
        mode=mode,
        autocast=d.pick(torch.bfloat16, torch.float16) if d.chance(0.08) else None,
        inplace=name in ("cross_entropy", "token_stats") and mode == "grad" and d.chance(0.1),
        asking=asking if mode in ("grad", "twice", "second", "func", "compile") else (),
        kinds=drawn_kinds(d, case.tensors, asking, mode == "compile") | expanded,
        expanded_upstream=d.chance(0.2),
    )
    add_token_weight(d, case)
    add_lora(d, case, how)
    return case, how


def add_token_weight(d: Draw, case: Case) -> None:
    """Sometimes a factor of each token's log-prob, of a loss of whole sequences from a head."""
    pairs = ("dpo", "simpo", "cpo", "orpo", "preference", "kto")
    if case.function in [f"linear_{name}_loss" for name in pairs] and d.chance(0.15):
        case.tensors["token_weight"] = d.uniform(case.tensors["target"].shape, 0.0, 2.0, torch.float32)


def add_lora(d: Draw, case: Case, how: How) -> None:
    """Sometimes an adapter on the head of a drawn case; drawn last, so that cases without one are what they were."""
    x = case.tensors
    if (
        not case.function.startswith("linear_")
        or "support" in x
        or x["linear_weight"].dim() != 2
        or not d.chance(0.15)
    ):
        return
    rank, (vocab, dim) = d.pick(1, 2, 4, 9), x["linear_weight"].shape
    x["lora_a"] = d.normal((rank, dim), max(dim, 1) ** -0.5)
    x["lora_b"] = d.normal((vocab, rank), d.pick(0.1, 1.0))
    case.options["lora_scale"] = d.pick(1.0, 0.5, -2.0)
    if x["lora_a"].dtype.itemsize == 2 and d.chance(0.5):  # PEFT leaves its matrices in float32
        x["lora_a"], x["lora_b"] = x["lora_a"].float(), x["lora_b"].float()
    case.head = (*case.head, "lora_a", "lora_b")
    if how.asking:
        how.asking = (*how.asking, *(name for name in ("lora_a", "lora_b") if d.chance(0.7)))


def joined(given: Numbers, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call: an adapter is one of them."""
    arguments = {**given, **options}
    if "lora_scale" in arguments:
        names = ("lora_a", "lora_b", "lora_scale")
        arguments["lora"] = tuple(arguments.pop(name) for name in names)
    return arguments


# --- running -----------------------------------------------------------------------------------------------------------


def flat(out: Any, name: str = "out") -> Numbers:
    """Every tensor of a result by a name of its own."""
    if isinstance(out, Tensor):
        return {name: out}
    if isinstance(out, dict):
        parts = out.items()
    elif hasattr(out, "_fields"):
        parts = zip(out._fields, out)
    elif isinstance(out, tuple):
        parts = enumerate(out)
    else:
        return {}
    return {key: value for part, x in parts for key, value in flat(x, f"{name}.{part}").items()}


def upstream(name: str, like: Tensor, expanded: bool) -> Tensor:
    """Multiples of 1/8, which every dtype holds."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    shape = () if expanded else like.shape
    steps = torch.randint(-16, 17, shape, generator=generator, dtype=torch.int64)
    return (steps.double() / 8).to(like.dtype).expand(like.shape)


def call(case: Case, tensors: Numbers, backend: str, compiled: bool = False) -> Any:
    function = getattr(fastloss, case.function)
    parameters = inspect.signature(function).parameters
    accepts = "backend" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    options = case.options | ({"backend": backend} if accepts else {})

    def of(given: Numbers) -> Any:
        return function(**joined(given, options))

    if compiled:
        torch.compiler.reset()  # every case is another graph of the same code
        of = torch.compile(of, fullgraph=True, backend="aot_eager")
    with contextlib.nullcontext() if accepts else fastloss.use_backend(backend):
        return of(tensors)


def run(case: Case, tensors: Numbers, how: How, backend: str) -> Numbers:
    """Outputs, and gradients "d name" ("d2 name" of the gradients' own)."""
    tensors = dict(tensors)
    leaves = {}
    for name in how.asking:
        leaves[name] = tensors[name] = tensors[name].detach().requires_grad_()
    if how.mode == "func":
        return through_func(case, tensors, leaves, how, backend)
    if how.inplace:
        first = next(iter(case.leaves))
        tensors[first] = tensors[first] * 1
    grad = {"no_grad": torch.no_grad(), "inference": torch.inference_mode()}.get(
        how.mode, contextlib.nullcontext()
    )
    with grad:
        out = flat(call(case, tensors, backend, how.mode == "compile"))
    found = {name: x.detach() for name, x in out.items()}
    carrying = {name: x for name, x in out.items() if x.requires_grad}
    if not leaves:
        return found
    if not carrying:
        return found | {f"d {name}": torch.zeros_like(x) for name, x in leaves.items()}
    ups = [upstream(name, x, how.expanded_upstream) for name, x in carrying.items()]
    more = how.mode in ("twice", "second")
    grads = torch.autograd.grad(
        list(carrying.values()), list(leaves.values()), ups,
        allow_unused=True, retain_graph=more, create_graph=how.mode == "second",
    )  # fmt: skip
    found |= named("d", leaves, grads)
    if how.mode == "twice":
        again = torch.autograd.grad(list(carrying.values()), list(leaves.values()), ups, allow_unused=True)
        found |= named("again d", leaves, again)
    if how.mode == "second":
        carried = [g for g in grads if g is not None and g.requires_grad]
        second: Any = [None] * len(leaves)
        if carried:
            ups = [upstream("second", g, False) for g in carried]
            second = torch.autograd.grad(carried, list(leaves.values()), ups, allow_unused=True)
        found |= named("d2", leaves, second)
    return found


def named(prefix: str, leaves: Numbers, grads: Any) -> Numbers:
    return {
        f"{prefix} {name}": torch.zeros_like(x) if g is None else g.detach()
        for (name, x), g in zip(leaves.items(), grads)
    }


def through_func(case: Case, tensors: Numbers, leaves: Numbers, how: How, backend: str) -> Numbers:
    """torch.func.grad of the outputs weighted by the upstream gradient."""
    with torch.no_grad():
        found = {name: x.detach() for name, x in flat(call(case, tensors, backend)).items()}
    carrying = {name for name, x in flat(call(case, tensors, "reference")).items() if x.requires_grad}

    def objective(given: Numbers) -> Tensor:
        out = flat(call(case, {**tensors, **given}, backend))
        total = sum((out[n] * upstream(n, out[n], how.expanded_upstream)).sum() for n in out if n in carrying)
        return total if isinstance(total, Tensor) else sum(x.sum() for x in given.values()) * 0

    grads = torch.func.grad(objective)({name: x.detach() for name, x in leaves.items()})
    return found | {f"d {name}": g.detach() for name, g in grads.items()}


# --- judging -----------------------------------------------------------------------------------------------------------


def exact_tensors(case: Case, how: How) -> Numbers:
    """Float64 copies; operands of a GEMM as autocast rounds them."""
    out = {}
    for name, x in case.tensors.items():
        if how.autocast and name in case.head and x.dtype != torch.float64:
            x = x.to(how.autocast)
        out[name] = x.double() if x.is_floating_point() else x
    return out


def exact_case(case: Case) -> Case:
    """loss_dtype is a rounding, which the exact result has none of."""
    options = {name: value for name, value in case.options.items() if name != "loss_dtype"}
    return Case(case.function, case.tensors, options, case.leaves, torch.float64, case.head)


def moved(case: Case, how: How, tensors: Numbers, sample: int) -> Numbers:
    """Every float changed by one rounding step, up or down."""
    generator = torch.Generator().manual_seed(sample)
    out = {}
    for name, x in tensors.items():
        if not x.is_floating_point() or "mask" in name:
            out[name] = x
            continue
        sign = torch.randint(0, 2, x.shape, generator=generator, dtype=torch.int64) * 2.0 - 1.0
        dtype = case.tensors[name].dtype
        if name in case.head:
            dtype = how.autocast if how.autocast and dtype != torch.float64 else dtype
        elif dtype != torch.float64:
            dtype = torch.float32
        size = x
        if name in ("logits",) or (name == "input" and name not in case.head):
            vocab = 1 if name == "input" and x.dim() > 1 else -1
            top = x.amax(vocab, keepdim=True) if x.shape[vocab] else x.new_zeros(())
            size = torch.where(x.isfinite(), x - top.nan_to_num(0.0, 0.0, 0.0), x.new_zeros(()))
        out[name] = x + size.nan_to_num(0.0, 0.0, 0.0) * sign * torch.finfo(dtype).eps
    return out


def error_of(got: Tensor, want: Tensor) -> float:
    """The largest difference; infinite where NaN or infinities stand elsewhere."""
    if not want.numel():
        return 0.0
    got, want = got.double(), want.double()
    same = (got == want) | (got.isnan() & want.isnan())
    return torch.where(same, 0.0, (got - want).abs()).nan_to_num(math.inf, math.inf).max().item()


def rounded(exact: Tensor, like: Tensor) -> Tensor:
    """The exact numbers in the result's dtype: what is too large for it is infinite."""
    return exact.to(like.dtype).double() if like.is_floating_point() else exact.double()


def largest(x: Tensor) -> float:
    x = x.double()
    finite = x[x.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def error_text(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"


def plain(tensors: Numbers) -> Numbers:
    return {name: x.clone() for name, x in tensors.items()}


def judge(case: Case, how: How) -> Verdict:
    if how.mode == "meta":
        return judge_meta(case, how)
    exact_how = How(
        mode=how.mode if how.mode in ("second", "twice") else "grad",
        asking=how.asking,
        expanded_upstream=how.expanded_upstream,
    )
    precise = exact_tensors(case, how)
    expected: BaseException | None = None
    exact: Numbers = {}
    try:
        exact = run(exact_case(case), precise, exact_how, "reference")
    except Exception as error:
        expected = error
    given = {name: KINDS[how.kinds.get(name, "plain")](x) for name, x in case.tensors.items()}
    try:
        got = in_circumstances(case, given, how, how.backend)
    except Exception as error:
        if expected is not None and type(error) is type(expected) and ": " in str(error):  # words of ours
            return Verdict("error", error_text(error))
        if expected is not None and how.mode == "compile" and str(expected) in str(error):  # dynamo wraps it
            return Verdict("error", error_text(expected))
        if REFUSED in str(error) and how.backend not in ("auto", "reference"):
            return Verdict("refused", error_text(error))
        if (
            "Inference tensors cannot be saved for backward" in str(error)
            and "inference" in how.kinds.values()
        ):
            return Verdict("refused", error_text(error))
        return Verdict(
            "wrong",
            f"{error_text(error)}; the definition in float64: {'a number' if expected is None else error_text(expected)}",
        )
    if expected is not None:
        return Verdict("wrong", f"a number, where the definition says {error_text(expected)}")
    for name, x in case.tensors.items():
        if error_of(given[name].detach().as_subclass(Tensor).resolve_neg(), x):
            return Verdict("wrong", f"argument {name} was changed")
    verdict = compare(case, how, exact, got)
    if verdict.state == "wrong" and how.autocast and "linear_bias" in case.head:
        kept = replace(case, head=tuple(name for name in case.head if name != "linear_bias"))
        exact = run(exact_case(kept), exact_tensors(kept, how), exact_how, "reference")
        if compare(kept, how, exact, got, rounds=False).state == "right":
            return Verdict("right")
    return verdict


def in_circumstances(case: Case, tensors: Numbers, how: How, backend: str) -> Numbers:
    with contextlib.ExitStack() as stack:
        if how.isa:
            stack.enter_context(forced(how.isa))
        if how.threads:
            stack.enter_context(threads_of(how.threads))
        if how.autocast:
            stack.enter_context(torch.autocast("cpu", how.autocast))
        found = run(case, tensors, how, backend)
    return {name: x.as_subclass(Tensor) if type(x) is not Tensor else x for name, x in found.items()}


def compare(case: Case, how: How, exact: Numbers, got: Numbers, rounds: bool = True) -> Verdict:
    """``rounds``: the definition under autocast rounds what ``case.head`` names, and no more, so that its error is one to allow."""
    as_written = replace(how, mode="grad") if how.mode in ("compile", "func") else how
    eager = in_circumstances(case, plain(case.tensors), as_written, "reference")
    definitions = [eager] if rounds else []
    if how.autocast:  # whose rounding to float16 hides what its accumulation dtype makes of a limit (1 - p of at least 1e-7)
        single = {n: x.float() if x.is_floating_point() else x for n, x in exact_tensors(case, how).items()}
        definitions.append(run(case, single, as_written, "reference"))
    if got.keys() != exact.keys():
        return Verdict("wrong", f"results {sorted(got.keys() ^ exact.keys())} on one side only")
    responses: list[Numbers] = []
    numbers = max([1.0, *(largest(x) for x in case.tensors.values() if x.is_floating_point())])
    numbers = min(numbers, 6e4)
    for name, want in exact.items():
        x = got[name]
        if x.shape != want.shape:
            return Verdict("wrong", f"{name}: shape {list(x.shape)}, expected {list(want.shape)}")
        if name in eager and x.dtype != eager[name].dtype:
            return Verdict("wrong", f"{name}: dtype {x.dtype}, the definition's {eager[name].dtype}")
        target = rounded(want, x)
        error = error_of(x, target)
        if not error:
            continue
        info = torch.finfo(x.dtype if x.is_floating_point() else torch.float32)
        absolute = x.dtype == torch.float64 or not name.startswith(("d ", "d2", "again"))
        allowed = 16 * info.eps * max(largest(want), float(absolute)) + 64 * info.smallest_normal * info.eps
        allowed += 64 * 2.0**-52 * numbers
        if error <= allowed:
            continue
        owns = [error_of(d[name], target) for d in definitions if name in d]
        own = max([0.0, *(e for e in owns if math.isfinite(e))])
        allowed += 2 * own
        if error <= allowed:
            continue
        if not responses:
            precise = exact_tensors(case, how)
            exact_how = How(
                mode=how.mode if how.mode in ("second", "twice") else "grad",
                asking=how.asking,
                expanded_upstream=how.expanded_upstream,
            )
            responses = [
                run(exact_case(case), moved(case, how, precise, k), exact_how, "reference")
                for k in range(32 if chooses_tokens(case) else 3)
            ]
        if name.endswith("is_top1") and tied(case, exact_tensors(case, how), x != target):
            continue
        response = max(error_of(r[name], want) for r in responses)
        allowed += 8 * response if math.isfinite(response) else 0.0
        if error <= allowed:
            continue
        at = int(
            torch.where(
                (x.double() == target) | (x.double().isnan() & target.isnan()),
                0.0,
                (x.double() - target).abs(),
            )
            .nan_to_num(math.inf, math.inf)
            .argmax()
        )
        return Verdict(
            "wrong",
            f"{name}: {x.flatten()[at].item():.9g}, exact {want.flatten()[at].item():.9g} at {at} of {list(x.shape)}; error "
            f"{error:.3g}, allowed {allowed:.3g}, the definition's own {own:.3g}",
        )
    return Verdict("right")


def chooses_tokens(case: Case) -> bool:
    """By their rank or by a threshold: a jump, which few changes by one rounding step may miss."""
    by_type = case.options.get("loss_type") in ("clip_cov", "kl_cov", "dppo_tv", "dppo_kl")
    return by_type or "top_entropy_quantile" in case.options


def tied(case: Case, precise: Numbers, at: Tensor) -> bool:
    """Whether the targets ``at`` these places are as likely as the likeliest class within the rounding of float32: tanh makes
    equal numbers of far larger logits and of the largest."""
    keys = {
        key: value for key, value in case.options.items() if key not in ("outputs", "detach", "return_stats")
    }
    if case.function not in ("token_stats", "linear_token_stats") or "support" in precise:
        return False
    function = getattr(fastloss, case.function)
    logprobs = function(**joined(precise, keys), outputs=("logprobs",), backend="reference").logprobs
    best = function(
        **joined({**precise, "target": precise["target"].clamp(min=0)}, keys),
        outputs=("argmax",),
        backend="reference",
    ).argmax
    highest = function(
        **joined({**precise, "target": best}, keys), outputs=("logprobs",), backend="reference"
    ).logprobs
    scale = abs(keys.get("logit_scale", 1.0) / keys.get("temperature", 1.0)) * keys.get("softcap", math.inf)
    size = min(scale, 6e4)  # of the largest logit
    return bool(((highest - logprobs)[at] <= 4 * torch.finfo(torch.float32).eps * size).all())


def judge_meta(case: Case, how: How) -> Verdict:
    """Shapes without numbers, or a word; never a crash."""
    meta = {name: x.to("meta") for name, x in case.tensors.items()}
    try:
        out = flat(call(case, meta, "auto"))
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        state = "refused" if "meta" in str(error) or ": expected" in str(error) else "wrong"
        return Verdict(state, error_text(error))
    exact = flat(call(case, plain(case.tensors), "reference"))
    for name, x in exact.items():
        if name in out and (out[name].shape != x.shape or out[name].dtype != x.dtype):
            return Verdict(
                "wrong",
                f"meta {name}: {out[name].dtype} {list(out[name].shape)}, expected {x.dtype} {list(x.shape)}",
            )
    return Verdict("right")


def describe(case: Case, how: How) -> str:
    tensors = ", ".join(f"{n} {str(x.dtype)[6:]}{list(x.shape)}" for n, x in case.tensors.items())
    return f"{case.function}({tensors}; {case.options}) on {how}"
