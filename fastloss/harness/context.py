"""Rows whose tokens lie on several processes (cp): each has a piece of every row, and all keys and values in its attention.

torch's own ring attention (``context_parallel``) has no kernels for CPUs and no packed documents; here a layer's keys and values are gathered
(as in Llama 3's training, arXiv:2407.21783), and the backward adds up and scatters their gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import parallel
from .data import IGNORE, Batch
from .model import hidden_states, one_line

NAME = "fastloss_pieces"


def own_piece(batch: Batch) -> Batch:
    """This process's piece of each row, in the order of the processes. Targets were shifted in the whole row, so none is lost at a border."""
    pieces = parallel.layout.cp
    if pieces == 1:
        return batch
    rows, length = batch.inputs.shape
    size = -(-length // pieces)
    more = pieces * size - length  # padding at the end, a document of its own
    device = batch.inputs.device
    place = torch.arange(pieces * size, dtype=torch.int64, device=device)
    positions = place[:length].expand(rows, -1) if batch.positions is None else batch.positions
    positions = torch.cat([positions, place[:more].expand(rows, -1)], 1)
    inputs = nn.functional.pad(batch.inputs, (0, more))
    targets = nn.functional.pad(batch.targets, (0, more), value=IGNORE)
    first = parallel.rank() // parallel.layout.tp % pieces * size
    own = slice(first, first + size)
    document = (positions == 0).cumsum(1)
    mask = (document[:, own, None] == document[:, None, :]) & (place[own, None] >= place)  # [B, size, T]
    return Batch(inputs[:, own], targets[:, own], positions[:, own], mask[:, None])


def cut_rows(model: Any, seq_len: int, vocab_size: int) -> Any:
    """``model`` with an attention that gathers keys and values where it has a piece of the rows alone; itself without cp.

    A piece gives the hidden states that it has in the whole row, or cp is an error: some models look no further than a window, or mix
    tokens elsewhere.
    """
    if parallel.layout.cp == 1:
        return model
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    with one_line(f"{type(model).__name__} does not take another attention, which cp needs"):
        model.set_attn_implementation(NAME)
    device, pieces = next(model.parameters()).device, parallel.layout.cp
    ids = torch.arange(1, seq_len // pieces * pieces + 1, dtype=torch.int64, device=device)[None] % vocab_size
    piece = own_piece(Batch(ids, ids))
    training = model.training
    model.eval()
    with torch.no_grad(), one_line(f"{type(model).__name__} cannot read a piece of a row"):
        whole = hidden_states(model, ids)
        apart = hidden_states(model, piece.inputs, piece.positions, piece.mask)
    model.train(training)
    assert piece.positions is not None
    whole = whole[:, piece.positions[0]]
    near = torch.allclose(apart, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))
    if parallel.any_of(not near):
        raise ValueError(
            f"parallel: {type(model).__name__} mixes tokens otherwise than by causal attention; cp is not for it"
        )
    return model


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> Any:
    """Of a piece's queries [B, H, T, D]; a mask that is wider than the keys says that they are a piece."""
    from torch.distributed._functional_collectives import all_gather_tensor_autograd
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is not None and attention_mask.shape[-1] != key.shape[2]:
        pieces = torch.stack([key, value])  # one message
        key, value = all_gather_tensor_autograd(pieces, 3, parallel.axis("cp")).unbind()
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
