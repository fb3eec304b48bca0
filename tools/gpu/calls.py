"""A small call of every public loss on each GPU backend, forward and backward; by itself, or under a tool that watches it.

python tools/gpu/calls.py [--backend cuda]                   the calls
python tools/gpu/calls.py --under compute-sanitizer          memcheck, then racecheck over the calls
python tools/gpu/calls.py --under ncu                        what row kernels at 1024 rows of 128256 wait for
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

TOOLS = {
    "compute-sanitizer": [
        ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--launch-timeout", "60"]
        for tool in ("memcheck", "racecheck")
    ],
    "ncu": [
        [
            "ncu",
            "--kernel-name",
            "regex:row_|cluster_rows",
            "--launch-count",
            "9",
            "--section",
            "SpeedOfLight",
            "--section",
            "WarpStateStats",
            "--section",
            "MemoryWorkloadAnalysis",
            "--section",
            "ComputeWorkloadAnalysis",
            "--section",
            "InstructionStats",
        ]
    ],
}


def under(tool: str, backends: Sequence[str], seconds: float) -> int:
    """Runs this file under the tool, once per way and backend; the first status that is not 0."""
    until, worst = time.monotonic() + seconds, 0
    for way in TOOLS[tool]:
        for backend in backends:
            left = until - time.monotonic()
            command = [*way, sys.executable, __file__, "--backend", backend]
            command += (
                ["--rows", "1024", "--vocab", "128256", "--only", "cross_entropy"] if tool == "ncu" else []
            )
            print("$", *command, flush=True)
            try:
                status = subprocess.run(command, timeout=max(1.0, left)).returncode
            except subprocess.TimeoutExpired:
                print(f"{backend}: time is up", flush=True)
                status = 124
            worst = worst or status
    return worst


def calls(backend: str, device: str, rows: int, vocab: int) -> Iterator[tuple[str, Callable[[], object]]]:
    import torch
    from torch import Tensor

    import fastloss

    def backward(value: Tensor) -> Tensor:
        value.sum().backward()
        return value

    batch, length, dim = 4, rows // 4, 16
    logits = torch.randn(rows, vocab, device=device, requires_grad=True)
    target = torch.randint(0, vocab, (rows,), device=device)
    target[0] = -100
    hidden = torch.randn(batch, length, dim, device=device, requires_grad=True)
    weight = torch.randn(vocab, dim, device=device, requires_grad=True)
    tokens = target.view(batch, length)
    a = torch.randn(batch, length, device=device).abs().neg().requires_grad_()
    b = -torch.rand(batch, length, device=device)
    mask = torch.ones(batch, length, dtype=torch.bool, device=device)
    mask[0, -1] = False
    scores = torch.randn(batch, device=device)
    good = torch.arange(batch, device=device) % 2 == 0
    o = {"backend": backend}
    labels = target.masked_fill(target >= vocab // 8 * 8, -100)

    def clusters(z: Tensor) -> Tensor:
        """Rows that begin at multiples of 16 bytes."""
        from fastloss.bench import internals

        with internals.cluster_rows(True):
            return backward(fastloss.cross_entropy(z, labels, **o))

    full = {"z_loss": 1e-3, "label_smoothing": 0.1, "softcap": 20.0}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        z = logits.detach().to(dtype).requires_grad_()
        yield f"cross_entropy {name}", lambda z=z: backward(fastloss.cross_entropy(z, target, **o))  # type: ignore[misc]
        if backend == "cuda":
            even = logits.detach()[:, : vocab // 8 * 8].to(dtype).contiguous().requires_grad_()
            yield f"cross_entropy {name}, clusters", lambda z=even: clusters(z)  # type: ignore[misc]
        yield (
            f"cross_entropy {name}, all options",
            lambda z=z: backward(fastloss.cross_entropy(z, target, **full, **o)),  # type: ignore[misc, arg-type]
        )
    outputs = ("logprobs", "entropy", "logsumexp", "log_sum_sq_probs", "mean_logits", "is_top1")
    yield (
        "token_stats",
        lambda: backward(_some(fastloss.token_stats(logits, target, outputs=outputs, **o).logprobs)),
    )
    yield (
        "linear_cross_entropy",
        lambda: backward(fastloss.linear_cross_entropy(hidden.view(-1, dim), weight, target, **o)),
    )
    if backend != "cpu":
        from fastloss.bench import internals

        low = [x.detach().to(torch.bfloat16).requires_grad_() for x in (hidden.view(-1, dim), weight)]

        def scaled() -> Tensor:
            with internals.scaled_exponentials():
                return backward(fastloss.linear_cross_entropy(*low, target, z_loss=1e-3, **o))

        yield "linear_cross_entropy, scaled exponentials", scaled
    yield (
        "linear_preference_loss",
        lambda: backward(
            fastloss.linear_preference_loss(hidden, weight, tokens, loss_type="simpo", **o).loss
        ),
    )
    yield (
        "linear_kto_loss",
        lambda: backward(fastloss.linear_kto_loss(hidden, weight, tokens, good, kl=0.0, **o).loss),
    )
    yield (
        "linear_policy_loss",
        lambda: backward(
            fastloss.linear_policy_loss(hidden, weight, tokens.clamp(min=0), b, scores, mask, **o).loss
        ),
    )
    for kind in ("ppo", "gspo", "cispo", "sapo", "gmpo"):
        yield (
            f"policy_loss {kind}",
            lambda kind=kind: backward(  # type: ignore[misc]
                fastloss.policy_loss(a, b, scores, mask, ref_logprobs=b, beta=0.1, loss_type=kind, **o).loss
            ),
        )
    yield (
        "preference_loss",
        lambda: backward(
            fastloss.preference_loss(
                a.sum(1),
                b.sum(1),
                b.sum(1),
                b.sum(1),
                loss_type=["sigmoid", "hinge"],
                loss_weights=[1.0, 0.5],
                **o,
            ).loss
        ),
    )
    yield "kto_loss", lambda: backward(fastloss.kto_loss(a.sum(1), b.sum(1), good, kl=0.0, **o).loss)
    yield "value_loss", lambda: backward(fastloss.value_loss(a, b, b, mask, clip_range=0.2, **o).loss)
    yield "gae", lambda: fastloss.gae(a.detach(), b, mask, **o)


def _some(value: object) -> object:
    assert value is not None
    return value


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", action="append", help="default: cuda and triton")
    parser.add_argument("--under", choices=[*TOOLS])
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=1003)
    parser.add_argument("--only", action="append", help="calls that begin so; again for more")
    given = parser.parse_args(arguments)
    backends = given.backend or ["cuda", "triton"]
    if given.under:
        return under(given.under, backends, given.seconds)
    import torch

    device = "cpu" if backends == ["cpu"] else "cuda"
    torch.manual_seed(0)
    bad = 0
    for backend in backends:
        for name, call in calls(backend, device, given.rows, given.vocab):
            if not name.startswith(tuple(given.only or [""])):
                continue
            try:
                call()
                if device == "cuda":
                    torch.cuda.synchronize()
                print(f"ok   {backend} {name}", flush=True)
            except Exception as error:
                bad += 1
                print(f"FAIL {backend} {name}: {error}".splitlines()[0], flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
