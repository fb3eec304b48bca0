"""The one layout of token sequences: padded and packed give the same sums, and what cu_seqlens may be."""

from __future__ import annotations

import pytest
import torch

from fastloss import reference
from fastloss.engine.sequences import Sequences, TimeSteps, layout_of, packed_layout

CPU = torch.device("cpu")
PADDED = Sequences(None, 3, 2, 6, CPU)
PACKED = Sequences(torch.tensor([0, 3, 3, 6]), 0, 3, 6, CPU)


def test_sums_and_their_expansion() -> None:
    x = torch.arange(6.0)
    assert PADDED.sum(x).tolist() == [3, 12] and PACKED.sum(x).tolist() == [3, 0, 12]
    assert PADDED.expand(torch.tensor([1.0, 2.0])).tolist() == [1, 1, 1, 2, 2, 2]
    assert PACKED.expand(torch.tensor([1.0, 9.0, 2.0])).tolist() == [1, 1, 1, 2, 2, 2]


def test_the_definition_has_a_layout_of_its_own_that_agrees() -> None:
    x, mask = torch.arange(6.0), torch.tensor([0, 1, 1, 0, 0, 1], dtype=torch.bool)
    for layout in (PADDED, PACKED):
        own = reference.Sequences(layout.offsets, layout.length, layout.count, 6, CPU)
        assert torch.equal(own.sum(x), layout.sum(x))
        per_sequence = torch.arange(float(layout.count))
        assert torch.equal(own.expand(per_sequence), layout.expand(per_sequence))
    assert reference.Sequences(None, 3, 2, 6, CPU).first(x, mask).tolist() == [1, 5]
    assert reference.Sequences(PACKED.offsets, 0, 3, 6, CPU).first(x, mask).tolist() == [1, 0, 5]


def test_weighted_sums_of_the_definition() -> None:
    values, weights = torch.arange(6.0), torch.tensor([1.0, 2.0, 0.0, 1.0, 1.0, 0.5])
    offsets = torch.tensor([0, 2, 2, 6])
    assert reference.segment_sum(values, None, offsets, 0, 3).tolist() == [1.0, 0.0, 14.0]
    assert reference.segment_sum(values, None, None, 3, 2).tolist() == [3.0, 12.0]
    values[2] = float("nan")  # a position of weight 0 adds nothing
    assert reference.segment_sum(values, weights, None, 3, 2).tolist() == [2.0, 9.5]


def test_time_steps_count_unmasked_tokens() -> None:
    keep = torch.tensor([0, 1, 1, 1, 0, 1], dtype=torch.bool)
    x = torch.arange(6.0)
    for layout, rows in ((PADDED, [[1, 2, 0], [3, 5, 0]]), (PACKED, [[1, 2, 0], [0, 0, 0], [3, 5, 0]])):
        steps = TimeSteps(layout, keep)
        assert steps.by_step(x).tolist() == rows
        assert steps.by_token(steps.by_step(x)).tolist() == [0, 1, 2, 3, 0, 5]


@pytest.mark.parametrize(
    ("cu_seqlens", "error"),
    [
        (torch.tensor([0, 3, 2, 6]), ValueError),
        (torch.tensor([1, 6]), ValueError),
        (torch.tensor([0, 5]), ValueError),
        (torch.tensor([0.0, 6.0]), ValueError),
        (torch.tensor([[0, 6]]), ValueError),
        (torch.tensor([], dtype=torch.long), ValueError),
        ([0, 6], TypeError),
    ],
)
def test_cu_seqlens_that_do_not_fit(cu_seqlens: torch.Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match="cu_seqlens: expected"):
        packed_layout("cu_seqlens", cu_seqlens, 6, CPU)


def test_layout_of_an_argument() -> None:
    assert layout_of("x", torch.zeros(2, 3), None).length == 3
    assert layout_of("x", torch.zeros(6), torch.tensor([0, 2, 6], dtype=torch.int32)).count == 2
    with pytest.raises(ValueError, match=r"x: expected shape \[B, T\]"):
        layout_of("x", torch.zeros(6), None)
    with pytest.raises(ValueError, match=r"x: expected shape \[N\] with cu_seqlens"):
        layout_of("x", torch.zeros(2, 3), torch.tensor([0, 6]))
