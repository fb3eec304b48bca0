"""Is it right at all? Rows and heads against float64 at real vocabularies, then the ways in which a GPU is used: a line each.

    python tools/gpu/smoke.py [--device cpu --small] [--only rows] [--seconds 90]

Exits with status 1 if a line fails or its time is up before all lines are there.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastloss
from fastloss.bench import internals

Check = Callable[[], str]  # raises, or says what was measured
# Of the largest entry of a gradient: what its dtype rounds away, and float32's sums over a vocabulary.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


def rows(device: str, vocab: int, dtype: torch.dtype, odd: bool, count: int) -> Check:
    def check() -> str:
        wide = torch.randn(count, vocab + 3 * odd, device=device, dtype=dtype)
        logits = wide[:, odd : vocab + odd]  # odd: no row is aligned
        target = torch.randint(0, vocab, (count,), device=device)
        target[:: max(2, count // 4)] = -100
        return _compare(
            [logits],
            lambda z: fastloss.cross_entropy(z, target),
            lambda z: F.cross_entropy(z, target),
            TOLERANCE[dtype],
        )

    return check


def clusters(device: str, vocab: int, dtype: torch.dtype, count: int) -> Check:
    """Rows with FASTLOSS_CLUSTER_ROWS=1 (sm_90 and newer; elsewhere the other kernel runs), apart from each other by a multiple of 16
    bytes, twice: the bits are the same."""

    def check() -> str:
        wide = torch.randn(count, (vocab + 63) // 64 * 64, device=device, dtype=dtype)
        target = torch.randint(0, vocab, (count,), device=device)
        target[:: max(2, count // 4)] = -100
        with internals.cluster_rows(True):
            grads = []
            for _ in range(2):
                logits = wide.clone()[:, :vocab].requires_grad_()
                fastloss.cross_entropy(logits, target).backward()
                grads.append(logits.grad)
            assert torch.equal(*grads), "the bits of two runs differ"
            return _compare(
                [wide[:, :vocab]],
                lambda z: fastloss.cross_entropy(z, target),
                lambda z: F.cross_entropy(z, target),
                TOLERANCE[dtype],
            )

    return check


def head(device: str, vocab: int, dtype: torch.dtype, count: int, dim: int) -> Check:
    def check() -> str:
        hidden = torch.randn(count, dim, device=device, dtype=dtype)
        weight = (torch.randn(vocab, dim, device=device) / dim**0.5).to(dtype)
        target = torch.randint(0, vocab, (count,), device=device)
        target[:: max(2, count // 4)] = -100
        return _compare(
            [hidden, weight],
            lambda h, w: fastloss.linear_cross_entropy(h, w, target),
            lambda h, w: F.cross_entropy(h @ w.t(), target),
            4 * TOLERANCE[dtype],  # logits are rounded too
        )

    return check


def scaled(device: str, vocab: int, count: int, dim: int) -> Check:
    """The head with FASTLOSS_SCALED_EXPONENTIALS=1, one row of which must be redone."""

    def check() -> str:
        hidden = torch.randn(count, dim, device=device).to(torch.bfloat16)
        weight = (torch.randn(vocab, dim, device=device) / dim**0.5).to(torch.bfloat16)
        target = torch.randint(0, vocab, (count,), device=device)
        target[:: max(2, count // 4)] = -100
        # A loss near 100, of logits that bfloat16 rounds by little but for one: beyond what the exponentials hold.
        hidden[1] = 100.0 * weight[0]
        target[1] = (hidden[1] @ weight.t()).argmin()
        with internals.scaled_exponentials():
            told = fastloss.explain(
                fastloss.linear_cross_entropy, hidden.requires_grad_(), weight.requires_grad_(), target
            )
            assert ("row_pass" in told) == (device != "cpu"), told
            return _compare(
                [hidden.detach(), weight.detach()],
                lambda h, w: fastloss.linear_cross_entropy(h, w, target),
                lambda h, w: F.cross_entropy(h @ w.t(), target),
                4 * TOLERANCE[torch.bfloat16],
            )

    return check


def _compare(
    tensors: Sequence[Tensor], ours: Callable[..., Tensor], right: Callable[..., Tensor], tolerance: float
) -> str:
    leaves = [t.detach().requires_grad_() for t in tensors]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    loss, truth = ours(*leaves), right(*exact)
    grads, expected = torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, exact)
    loss, truth = loss.detach(), truth.detach()
    error = abs(float(loss) - float(truth))
    assert error <= tolerance * max(1.0, abs(float(truth))), (
        f"loss: expected {float(truth)}, got {float(loss)}"
    )
    worst = 0.0
    for grad, want in zip(grads, expected):
        off = float((grad.double() - want).abs().max() / want.abs().max())
        assert off <= tolerance, f"gradient {tuple(grad.shape)}: off by {off:.1e} of its largest entry"
        worst = max(worst, off)
    return f"loss {error:.1e}, gradient {worst:.1e} of the largest"


def _row_case(device: str, vocab: int) -> tuple[Tensor, Tensor]:
    return torch.randn(64, vocab, device=device), torch.randint(0, vocab, (64,), device=device)


def graph(device: str, vocab: int) -> Check:
    """Captured once, replayed twice over other numbers."""

    def check() -> str:
        logits, target = _row_case(device, vocab)
        logits.requires_grad_()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                fastloss.cross_entropy(logits, target).backward()
                logits.grad = None
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            loss = fastloss.cross_entropy(logits, target)
            loss.backward()
        for _ in range(2):
            new = torch.randn_like(logits)
            with torch.no_grad():
                logits.copy_(new)
            captured.replay()
            torch.cuda.synchronize()
            assert torch.allclose(loss, F.cross_entropy(new, target), atol=1e-4), (
                "a replay gives another loss"
            )
            assert logits.grad is not None
        return "captured, replayed twice"

    return check


def stream(device: str, vocab: int) -> Check:
    def check() -> str:
        logits, target = _row_case(device, vocab)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            loss = fastloss.cross_entropy(logits, target)
        side.synchronize()
        assert torch.allclose(loss, F.cross_entropy(logits, target), atol=1e-4)
        return "the same on a side stream"

    return check


def flops(device: str, vocab: int) -> Check:
    def check() -> str:
        count, dim = 64, 32
        hidden = torch.randn(count, dim, device=device, requires_grad=True)
        weight = torch.randn(vocab, dim, device=device, requires_grad=True)
        target = torch.randint(0, vocab, (count,), device=device)
        with FlopCounterMode(display=False) as counter:
            fastloss.linear_cross_entropy(hidden, weight, target).backward()
        gemms = counter.get_total_flops() / (2 * count * dim * vocab)
        assert 2.9 < gemms < 4.1, f"expected 3 to 4 GEMMs, counted {gemms}"
        return f"{gemms:.2f} GEMMs counted"

    return check


def autocast(device: str, vocab: int) -> Check:
    def check() -> str:
        hidden, weight = torch.randn(32, 64, device=device), torch.randn(vocab, 64, device=device) / 8
        target = torch.randint(0, vocab, (32,), device=device)
        with torch.autocast(device, torch.bfloat16):
            loss = fastloss.cross_entropy(F.linear(hidden, weight), target)
            linear = fastloss.linear_cross_entropy(hidden, weight, target)
        right = F.cross_entropy(hidden @ weight.t(), target)
        assert abs(float(loss - right)) < 0.05 and abs(float(linear - right)) < 0.05
        return f"off by {abs(float(loss - right)):.1e} and {abs(float(linear - right)):.1e}"

    return check


def compiled(device: str, vocab: int) -> Check:
    def check() -> str:
        logits, target = _row_case(device, vocab)
        function = torch.compile(lambda z: fastloss.cross_entropy(z * 2.0, target), fullgraph=True)
        leaf = logits.requires_grad_()
        loss = function(leaf)
        loss.backward()
        assert torch.allclose(loss, F.cross_entropy(logits.detach() * 2.0, target), atol=1e-4)
        assert leaf.grad is not None
        return "one graph, with its backward"

    return check


def losses(device: str, name: str) -> Check:
    """Every backend that is here against the definition."""

    def check() -> str:
        rows_, length = 8, 32
        a, b, c = torch.randn(3, rows_, length, device=device, dtype=torch.float32).abs().neg()
        mask = torch.ones(rows_, length, device=device, dtype=torch.bool)
        calls: dict[str, Callable[[str], Tensor]] = {
            "preference": lambda o: (
                fastloss.preference_loss(a.sum(1), b.sum(1), c.sum(1), c.sum(1), backend=o).loss
            ),
            "policy": lambda o: (
                fastloss.policy_loss(a, a + 0.1 * b, c[:, 0], mask, loss_type="ppo", backend=o).loss
            ),
            "gae": lambda o: fastloss.gae(a, b, mask, backend=o)[0],
        }
        right, found = calls[name]("reference"), []
        for backend, state in fastloss.backends().items():
            if state == "available" and backend != "reference" and (backend == "cpu") == (device == "cpu"):
                off = float((calls[name](backend) - right).abs().max())
                assert off < 1e-4, f"{backend}: off by {off}"
                found.append(backend)
        assert found, "no backend of this device is here"
        return " and ".join(found)

    return check


def checks(device: str, small: bool) -> Iterator[tuple[str, Check]]:
    vocabularies = (1000, 503, 2000) if small else (128256, 50257, 256000)
    count, dim = (16, 32) if small else (512, 1024)
    for vocab in vocabularies:
        for dtype in TOLERANCE:
            kind = str(dtype).removeprefix("torch.")
            for odd in (False, True):
                layout = "odd strides" if odd else "aligned"
                yield f"rows {vocab} {kind} {layout}", rows(device, vocab, dtype, odd, count)
            yield f"rows {vocab} {kind} in clusters", clusters(device, vocab, dtype, count)
            yield f"head {vocab} {kind}", head(device, vocab, dtype, count, dim)
        yield f"scaled exponentials {vocab}", scaled(device, vocab, count, dim)
    vocab = vocabularies[0]
    for name in ("preference", "policy", "gae"):
        yield f"losses {name}", losses(device, name)
    yield "flop counter", flops(device, vocab)
    yield "autocast", autocast(device, vocab)
    if device == "cuda":
        yield "graph", graph(device, vocab)
        yield "side stream", stream(device, vocab)
    yield "compile", compiled(device, vocab)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small shapes")
    parser.add_argument("--only", action="append", help="lines that begin so; again for more")
    parser.add_argument("--seconds", type=float, default=90.0)
    given = parser.parse_args(arguments)
    until, bad = time.monotonic() + given.seconds, 0
    torch.manual_seed(0)
    for name, check in checks(given.device, given.small):
        if not name.startswith(tuple(given.only or [""])):
            continue
        began = time.monotonic()
        if began > until:
            print(f"FAIL {name}: time is up")
            bad += 1
            continue
        try:
            said, mark = check(), "ok  "
        except Exception as error:
            said, mark = f"{type(error).__name__}: {error}".splitlines()[0], "FAIL"
            bad += 1
        print(f"{mark} {name}: {said} ({time.monotonic() - began:.1f} s)", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
