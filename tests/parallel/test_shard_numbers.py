"""What a GPU needs of a cut vocabulary beside its own tensors: nothing from the host, which would wait, and stop a CUDA graph's capture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastloss.engine import shards as cut
from fastloss.engine.definition import REFERENCE
from fastloss.engine.shards import Shards
from fastloss.tables import LSE_PARTS, RowOptions

SIZES = [(5, 5, 5), (6, 6, 3), (7, 5, 5), (4, 0, 6), (5, 5, 0), (3, 9), (8,)]


class FromHost(TorchDispatchMode):
    """Notices ``torch.tensor`` of a list: on a GPU a copy from pageable memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in ("lift_fresh", "_local_scalar_dense"), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_owner(sizes: tuple[int, ...]) -> None:
    shards = Shards(sizes)
    classes = torch.arange(shards.vocab)
    bad = torch.tensor([-(2**63), -1, shards.vocab, 1 << 40])
    with FromHost():
        owner, of_bad = shards.owner(classes), shards.owner(bad)
    assert owner.tolist() == [rank for rank, size in enumerate(sizes) for _ in range(size)]
    assert int(of_bad.min()) >= 0 and int(of_bad.max()) < len(sizes)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_statistics_of_whole_rows(sizes: tuple[int, ...]) -> None:
    """Of each shard's own, against the definition; and the distance Σ w (logsumexp - z)."""
    shards = Shards(sizes)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(6, shards.vocab, generator=generator).double()
    w = torch.rand(shards.vocab, generator=generator).double()
    target = torch.randint(0, shards.vocab, (6,), generator=generator)
    names = ("logprobs", "entropy", "log_sum_sq_probs", "mean_logits", LSE_PARTS)
    own: dict[str, list[Tensor]] = {name: [] for name in (*names, "distance")}
    for rank, size in enumerate(sizes):
        mine = Shards(sizes, rank)
        columns = z[:, mine.first : mine.first + size]
        local, _ = mine.local(target, -100)
        if size:
            found = REFERENCE.row_stats(columns, local, RowOptions(cut.NO_TARGET), want=names)
            weighted = (mine.columns(w) * (columns.logsumexp(1)[:, None] - columns)).sum(1)  # type: ignore[operator]
        else:
            with FromHost():
                found = cut.neutral(6, names, z.dtype, z.device)
            weighted = torch.zeros(6).double()
        for name in names:
            own[name].append(found[name].detach())
        own["distance"].append(weighted)
    stacked = {name: torch.stack(each) for name, each in own.items()}
    bounds = list(zip(shards.starts[:-1], shards.starts[1:], strict=True))
    with FromHost():
        got = cut.combine(stacked, sizes, shards.owner(target), None, [w[a:b].sum() for a, b in bounds])
    right = REFERENCE.row_stats(z, target, RowOptions(-100), want=names[:-1])
    for name in names[:-1]:
        torch.testing.assert_close(got[name], right[name], rtol=1e-12, atol=1e-12)
    exact = (w * (z.logsumexp(1)[:, None] - z)).sum(1)
    torch.testing.assert_close(got["distance"], exact, rtol=1e-12, atol=1e-12)


def test_a_masked_shard_has_no_share() -> None:
    nan = float("nan")
    parts = torch.tensor([[0.5, 1.0], [nan, nan], [nan, nan]])
    masked = torch.tensor([False, True, False])
    found = cut.without_share(parts, lambda: masked)
    assert found[:2].tolist() == [[0.5, 1.0], [-torch.inf, 0.0]] and found[2].isnan().all()
