"""Targets of several heads against a loop over tokens; one call on stacked heads against a call per head; the page's examples."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss

PAGE = Path(__file__).resolve().parents[2] / "docs" / "multi_token.md"
DOCUMENTS = [3, 1, 4, 2]
SEGMENTS = torch.repeat_interleave(torch.tensor([7, 2, 7, 0]), torch.tensor(DOCUMENTS))
POSITIONS = torch.cat([torch.arange(n) for n in DOCUMENTS])
OFFSETS = torch.tensor([0, 3, 4, 8, 10], dtype=torch.int32)
LABELS = torch.tensor([5, 6, 7, 8, 9, -100, 11, 12, 13, 14])


def by_loop(heads: int, first: int, ends: list[int]) -> list[list[int]]:
    """``ends``: of each position, where its document ends."""
    return [
        [int(LABELS[t + first + k]) if t + first + k < ends[t] else -100 for t in range(len(LABELS))]
        for k in range(heads)
    ]


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize(
    "documents",
    [{"cu_seqlens": OFFSETS}, {"position_ids": POSITIONS}, {"segment_ids": SEGMENTS}, {}],
    ids=lambda given: next(iter(given), "one"),
)
def test_by_loop(documents: dict[str, Tensor], first: int) -> None:
    """Two documents with the same segment id that are not neighbours are two."""
    ends = [e for e, n in zip((3, 4, 8, 10), DOCUMENTS) for _ in range(n)] if documents else [10] * 10
    expected = by_loop(4, first, ends)
    given = {name: x if name == "cu_seqlens" else x[None] for name, x in documents.items()}
    for labels, given_here in ((LABELS, documents), (LABELS[None], given)):
        made = fastloss.multi_token_targets(labels, 4, first=first, **given_here)
        assert made.target.reshape(4, -1).tolist() == expected
        counts = [max(1, sum(x != -100 for x in row)) for row in expected]
        right = [[(x != -100) / n for x in row] for row, n in zip(expected, counts)]
        torch.testing.assert_close(made.token_weight.reshape(4, -1), torch.tensor(right))


def test_more_heads_than_tokens() -> None:
    made = fastloss.multi_token_targets(torch.tensor([[1, 2]]), 4, weights=[1, 2, 3, 4], average="none")
    assert made.target.tolist() == [[[2, -100]]] + [[[-100, -100]]] * 3
    assert made.token_weight.tolist() == [[[1.0, 0.0]]] + [[[0.0, 0.0]]] * 3
    assert fastloss.multi_token_targets(torch.zeros(2, 0, dtype=torch.long), 3).target.shape == (3, 2, 0)


def test_one_call_is_a_call_per_head() -> None:
    g = torch.Generator().manual_seed(0)
    hidden, head = (
        torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_() for s in ((3, 10, 8), (20, 8))
    )
    weights = torch.tensor([1.0, 0.3, 0.1], dtype=torch.float64)
    t = fastloss.multi_token_targets(LABELS, 3, weights=weights, cu_seqlens=OFFSETS)
    each = [F.cross_entropy(hidden[k] @ head.t(), t.target[k]) for k in range(3)]
    expected = (weights * torch.stack(each)).sum()
    given: dict[str, Any] = {"token_weight": t.token_weight.double(), "reduction": "sum"}
    given["token_weight"] = weights.view(3, 1) * (t.target != -100) / (t.target != -100).sum(1, keepdim=True)
    loss = fastloss.linear_cross_entropy(hidden, head, t.target, **given)
    torch.testing.assert_close(t.token_weight.double(), given["token_weight"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, (hidden, head)), torch.autograd.grad(expected, (hidden, head))
    )


def test_what_it_costs() -> None:
    """The GEMMs of as many rows of one head, and no row without a target among them."""
    hidden, head = torch.zeros(3, 10, 16, requires_grad=True), torch.zeros(20, 16, requires_grad=True)
    t = fastloss.multi_token_targets(LABELS, 3, cu_seqlens=OFFSETS)
    plan = fastloss.explain(
        fastloss.linear_cross_entropy, hidden, head, t.target, token_weight=t.token_weight, reduction="sum"
    )
    plain = fastloss.explain(fastloss.linear_cross_entropy, hidden, head, t.target)
    assert plan["gemms"] == plain["gemms"] == 3
    assert plan["rows"] == int((t.target != -100).sum()) == 9
    assert {k: plan[k] for k in ("chunk_rows", "buffer_bytes")} == {
        k: plain[k] for k in ("chunk_rows", "buffer_bytes")
    }


def test_compiled() -> None:
    def run(labels: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(fastloss.multi_token_targets(labels, 3, weights=[1.0, 0.5, 0.2], cu_seqlens=offsets))  # type: ignore[return-value]

    torch._dynamo.reset()
    got = torch.compile(run, fullgraph=True, backend="eager")(LABELS, OFFSETS)
    torch.testing.assert_close(got, run(LABELS, OFFSETS))


def test_errors() -> None:
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "labels: expected int64", {"labels": LABELS.int()}),
        (ValueError, "heads: expected an int of at least 1", {"heads": 0}),
        (ValueError, "first: expected an int of at least 0", {"first": -1}),
        (ValueError, "weights: expected 2 numbers", {"weights": [1.0]}),
        (TypeError, "weights: expected a number", {"weights": [1.0, "2"]}),
        (ValueError, "weights: expected shape", {"weights": torch.ones(3)}),
        (ValueError, "average: expected one of", {"average": "mean"}),
        (ValueError, "cu_seqlens: expected offsets that rise", {"cu_seqlens": OFFSETS[:-1]}),
        (ValueError, "labels: expected shape", {"labels": LABELS.view(2, 5), "cu_seqlens": OFFSETS}),
        (ValueError, "position_ids: expected shape", {"position_ids": POSITIONS[1:]}),
        (ValueError, "at most one of", {"position_ids": POSITIONS, "segment_ids": SEGMENTS}),
    ]
    for error, message, options in wrong:
        with pytest.raises(error, match=message):
            fastloss.multi_token_targets(**{"labels": LABELS, "heads": 2, **options})


@pytest.fixture(scope="module")
def examples() -> dict[str, Any]:
    """The names that the page's examples make, one after the other."""
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    with torch.random.fork_rng():
        for block in blocks:
            exec(compile(block, PAGE.name, "exec"), names)
    assert len(blocks) == 5
    return names


def test_the_pages_llama_and_deepseek(examples: dict[str, Any]) -> None:
    labels, head, states = examples["labels"], examples["head"], examples["states"]
    ends = torch.tensor([[12] * 12, [7] * 7 + [12] * 5])

    def mean(hidden: Tensor, ahead: int) -> Tensor:
        pairs = [
            (hidden[b, t], labels[b, t + ahead])
            for b in range(2)
            for t in range(12)
            if t + ahead < ends[b, t] and labels[b, t + ahead] != -100
        ]
        return F.cross_entropy(
            torch.stack([x for x, _ in pairs]) @ head.weight.t(), torch.stack([y for _, y in pairs])
        )

    expected = mean(states[0], 1) + 0.15 * (mean(states[1], 2) + mean(states[2], 3))
    torch.testing.assert_close(examples["deepseek"], expected)
    trunk, heads = examples["trunk"], examples["heads"]
    each = [mean(f(trunk), k) for k, f in enumerate(heads, 1)]
    torch.testing.assert_close(examples["llama"], torch.stack(each).sum())


def test_the_pages_drafts(examples: dict[str, Any]) -> None:
    """EAGLE-3's expression: the teacher's distribution over the draft's vocabulary, here over the tokens that it named."""
    hidden, ids, logprobs = examples["hidden"], examples["ids"], examples["logprobs"]
    log_q = (hidden @ examples["draft_head"].weight.t()).log_softmax(-1)
    mine = ids >= 0
    p = logprobs.masked_fill(~mine, -torch.inf).softmax(-1).nan_to_num()
    own = log_q.gather(-1, ids.clamp(min=0)).masked_fill(~mine, -torch.inf)
    own = own - own.logsumexp(-1, keepdim=True)  # over the tokens that the teacher named
    kl = torch.where(mine, p * (p.log() - own), 0.0).sum(-1)
    scale = 0.8 ** torch.arange(3).view(3, 1, 1) * examples["learned"]
    expected = torch.where(scale > 0, kl * scale, 0.0).sum() / 24
    torch.testing.assert_close(examples["eagle"], expected)
    (grad,) = torch.autograd.grad(examples["eagle"], hidden, retain_graph=True)
    (right,) = torch.autograd.grad(expected, hidden, retain_graph=True)
    torch.testing.assert_close(grad, right, rtol=1e-4, atol=1e-7)

    # min(p, q) over the named tokens and the rest.
    named_p = logprobs.exp() * mine
    named_q = log_q.exp().gather(-1, ids.clamp(min=0)) * mine
    rest = torch.minimum(1 - named_p.sum(-1), 1 - named_q.sum(-1))
    alpha = torch.minimum(named_p, named_q).sum(-1) + rest
    learned = scale > 0
    torch.testing.assert_close(1 - examples["distance"][learned], alpha[learned])
    lk = -(scale * alpha.log()).sum() / scale.sum()
    torch.testing.assert_close(examples["lk_alpha"], lk)
    torch.testing.assert_close(
        torch.autograd.grad(examples["lk_alpha"], hidden, retain_graph=True),
        torch.autograd.grad(lk, hidden),
        rtol=1e-4,
        atol=1e-6,
    )
    assert examples["accepted"] < examples["lk_alpha"] and examples["lk_lambda"].isfinite()
