"""Samples from a model: left-padded prompts, a key-value cache, and random numbers handed in."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import parallel
from .model import Head, body, hidden_states


class Cut(NamedTuple):
    """How a sampler cuts its distribution."""

    top_k: int  # 0: nothing
    top_p: float


class Kept(NamedTuple):
    """The tokens that a sampler kept where it drew one, and that one's log-prob among them."""

    ids: list[int]
    logprob: float


@torch.no_grad()
def sample(
    model: Any,
    head: Head,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    end: int | Collection[int],
    temperature: float,
    noise: Tensor | None = None,
    cut: Cut | None = None,
    kept: list[list[Kept]] | None = None,
) -> list[list[int]]:
    """A completion of each prompt, up to and with a token of ``end``. Temperature 0 takes the likeliest token.

    noise: float64 [prompts, max_new_tokens], uniform in [0, 1): a row's own, so that its sample does not depend on
    which others share its batch.
    cut: what is kept of the distribution; None: all. kept: gets, for each prompt, what was kept where each token was drawn.
    """
    from transformers import DynamicCache

    if not all(prompts):
        raise ValueError("prompts: expected at least one token in each, got none in one")
    stop = {end} if isinstance(end, int) else set(end)
    stop_ids = torch.tensor(sorted(stop), dtype=torch.int64, device=head.weight.device)
    device, sharded = head.weight.device, parallel.is_over_data(head.weight)
    head = head.gathered()
    longest = max(map(len, prompts))
    inputs = torch.zeros(len(prompts), longest, dtype=torch.long, device="cpu")
    mask = torch.zeros_like(inputs)
    for row, ids in enumerate(prompts):
        inputs[row, longest - len(ids) :] = torch.tensor(ids, dtype=torch.long, device="cpu")
        mask[row, longest - len(ids) :] = 1
    inputs, mask = inputs.to(device), mask.to(device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    noise = None if noise is None else noise.to(device)

    training = model.training
    model.eval()
    # the name that transformers 5 gives the cache, or its old one
    names = inspect.signature(body(model).forward).parameters
    # of a kind for each layer, where transformers knows more than keys and values
    known = "config" in inspect.signature(DynamicCache.__init__).parameters
    states = DynamicCache(config=model.config.get_text_config(decoder=True)) if known else DynamicCache()
    cache = {"cache" if "cache" in names else "past_key_values": states}
    drawn: list[Tensor] = []
    sets: list[list[Kept]] = []  # of each step, of each prompt
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for _ in range(max_new_tokens):
        hidden = body(model)(
            input_ids=inputs, attention_mask=mask, position_ids=positions, use_cache=True, **cache,
        ).last_hidden_state[:, -1]  # fmt: skip
        logits = head.logits(hidden)  # [B, V]
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            assert noise is not None  # temperature above 0
            logits, support = kept_logits(logits, cut, temperature)
            upto = torch.softmax(logits / temperature, -1, dtype=torch.float64).cumsum(-1)  # [B, V]
            drawn_at = noise[:, len(drawn), None] * upto[:, -1:]
            token = torch.searchsorted(upto, drawn_at, right=True)[:, 0].clamp(max=upto.shape[1] - 1)
            if kept is not None and support is not None:
                sets.append(kept_of(logits / temperature, support, token))
        drawn.append(token)
        finished |= torch.isin(token, stop_ids)
        done = bool(finished.all())
        # in shards the others' forwards need this process's weights
        if not parallel.any_of(not done) if sharded else done:
            break
        inputs, positions = token[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], 1)
    model.train(training)
    rows = torch.stack(drawn, 1).tolist()
    rows = [ids[: next((i + 1 for i, id in enumerate(ids) if id in stop), None)] for ids in rows]
    if kept is not None:
        kept += [[step[row] for step in sets[: len(ids)]] for row, ids in enumerate(rows)]
    return rows


Support = tuple[Tensor, Tensor]  # token ids and offsets


def kept_logits(logits: Tensor, cut: Cut | None, temperature: float) -> tuple[Tensor, Support | None]:
    """The logits with -inf for what is not kept, and what is."""
    import fastloss

    if cut is None:
        return logits, None
    ids, offsets = fastloss.sampler_support(
        logits, top_k=cut.top_k or None, top_p=cut.top_p, temperature=temperature
    )
    row = torch.repeat_interleave(
        torch.arange(len(logits), dtype=torch.int64, device=ids.device), offsets.diff()
    )
    masked = torch.full_like(logits, -torch.inf)
    masked[row, ids] = logits[row, ids]
    return masked, (ids, offsets)


def kept_of(logits: Tensor, support: Support, token: Tensor) -> list[Kept]:
    ids, offsets = support
    logprobs = logits.log_softmax(-1).gather(1, token[:, None])[:, 0].tolist()
    sets = [x.tolist() for x in ids.cpu().tensor_split(offsets[1:-1].cpu())]
    return [Kept(*each) for each in zip(sets, logprobs, strict=True)]


@torch.no_grad()
def check_sampler(model: Any, head: Head, vocab_size: int, instead: str = "") -> None:
    """Left-padding and the cache leave each prompt's likeliest tokens as they are, or sampling is an error."""
    prompts = [[i % vocab_size for i in range(1, length + 1)] for length in (2, 9, 5)]
    name = (
        f"model: {type(model).__name__} cannot be sampled from with left-padded prompts and a cache{instead}"
    )
    try:
        answers = sample(model, head, prompts, max_new_tokens=4, end=-1, temperature=0)
    except torch.OutOfMemoryError:
        raise
    except (
        LookupError,
        AttributeError,
        TypeError,
        ValueError,
        RuntimeError,
    ) as error:  # without keys and values
        raise ValueError(f"{name}: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
    training, whole = model.training, head.gathered()
    model.eval()
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt + answer[:-1]], dtype=torch.long, device=head.weight.device)
        logits = whole.logits(hidden_states(model, ids)[0, len(prompt) - 1 :])  # [4, V]
        behind = logits.amax(1) - logits[range(len(answer)), answer]
        if float(behind.max()) > 1e-2 * float(logits.std()):
            raise ValueError(f"{name}: it answers otherwise than without them")
    model.train(training)
