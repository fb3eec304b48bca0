"""Cost of a run: FLOPs of its stages, hours, memory by part, the loss layer with PyTorch and with fastloss, the traffic of
a vocabulary-parallel head. docs/plan.md derives each line."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from fastloss.bench import internals
from fastloss.plan.hardware import NODE, Device
from fastloss.plan.model import Model

BF16, F32 = 2, 4


class Passes(NamedTuple):
    """Forward passes' worth of work per token; a forward with its backward is 3."""

    backbone: int
    head: int
    generated: int = 0  # of them, those that write the answers token by token


# Policy, value and reference models of the same size; the generation of the answers counts as one pass.
STAGES = {
    "pretrain": Passes(3, 3),
    "sft": Passes(3, 3),
    "reward": Passes(3, 0),
    "dpo": Passes(4, 4),
    "grpo": Passes(6, 6, 1),
    "ppo": Passes(10, 6, 1),
}


def stage_flops(model: Model, stage: str, tokens: float, sequence: int) -> dict[str, float]:
    """Model FLOPs (nothing that is recomputed counts), the vocabulary head apart."""
    forward = model.forward_flops(sequence)
    passes, head_flops, scores = STAGES[stage], forward.pop("head"), forward.pop("scores")
    matrices = sum(forward.values())
    if stage == "pretrain":  # the other stages train without multi-token prediction
        further = model.mtp_flops(sequence)
        matrices, scores, head_flops = (
            own + further[part]
            for own, part in ((matrices, "matrices"), (scores, "scores"), (head_flops, "head"))
        )
    return {
        "matrices": tokens * passes.backbone * matrices,
        "scores": tokens * passes.backbone * scores,
        "head": tokens * passes.head * head_flops,
    }


def six_nd(model: Model, tokens: float) -> float:
    """The rule of thumb of the papers: 6 · active parameters · tokens."""
    return 6.0 * model.active * tokens


def generation_flops(model: Model, stage: str, tokens: float, sequence: int) -> float:
    """The part of a stage's FLOPs that writes the answers."""
    return tokens * STAGES[stage].generated * sum(model.forward_flops(sequence).values())


def device_hours(flops: float, device: Device, mfu: float) -> float:
    return flops / (device.flops * mfu) / 3600


def memory(
    model: Model, shards: int, micro_batch: int, recompute: bool, gradient_bytes: int = F32
) -> dict[str, float]:
    """Bytes per device: weights in bfloat16, gradients, AdamW's master weights and moments in float32, all sharded; and
    the activations of ``micro_batch`` tokens. Where weights are sharded, a layer's and their gradients are whole in
    bfloat16 while it runs; experts stay where they are (expert parallelism)."""
    share, parts = (model.total + model.mtp_parameters()) / shards, model.parameters()
    experts = parts["mlp"] - model.active_matrices()["mlp"] if model.experts else 0
    layer = (parts["attention"] + parts["mlp"] - experts) / model.layers
    return {
        "weights": BF16 * share,
        "gradients": gradient_bytes * share,
        "optimizer": 3 * F32 * share,
        "gathered_layer": 2 * BF16 * layer if shards > 1 else 0.0,
        "activations": activations(model, micro_batch, recompute),
    }


def layer_activations(model: Model) -> float:
    """Numbers kept per token for a layer's backward: the least that fused norms, rotations and attention need."""
    a, h = model.attention, model.hidden
    query, value = a.heads * (a.head_dim + a.rope_dim), a.heads * a.value_dim
    if a.kv_rank:  # latents are kept, and keys and values of every head made from them
        kept = query + query + value + a.q_rank + a.kv_rank + a.rope_dim
    else:
        kept = query + a.kv_heads * (a.head_dim + a.value_dim)
    e = model.experts
    dense = model.width * (model.layers - model.moe_layers)
    routed = model.moe_layers * (e.width * e.per_token + e.shared) if e else 0
    mlp = (3 if model.gated else 2) * (dense + routed) / model.layers
    return 4 * h + kept + value + mlp  # two norms: input and output of each


def activations(model: Model, tokens: int, recompute: bool) -> float:
    """Bytes. With ``recompute`` only the input of each layer is kept, and one layer is whole at a time."""
    layer = layer_activations(model)
    layers = model.layers + model.mtp
    numbers = layers * model.hidden + layer if recompute else layers * layer
    return BF16 * tokens * numbers


class LossLayer(NamedTuple):
    """Of ``rows`` tokens on one device."""

    torch_bytes: float  # beyond inputs and their gradients
    fastloss_bytes: float
    chunk_rows: int
    torch_traffic: float  # bytes of logits read and written
    fastloss_traffic: float


# Bytes per logit, bfloat16 logits and a loss in float32 as transformers computes it. At the peak, in the backward:
# logits 2, log-softmax 4, its gradient 4, the float32 logits' gradient 4.
TORCH_PEAK = 14
# Written by the GEMM 2; upcast 2 + 4; log-softmax 4 + 4; nll backward 4; log-softmax backward 4 + 4 + 4; down 4 + 2;
# read by two GEMMs 2 + 2.
TORCH_TRAFFIC = 42
# Written by the GEMM 2; the row kernel 2 + 2; read by two GEMMs 2 + 2.
FASTLOSS_TRAFFIC = 10


# Held for the backward by each loss that waits for it beside the one at the peak: its log-softmax.
TORCH_WAITING = 4


def loss_layer(model: Model, rows: int, losses: int = 1) -> LossLayer:
    """``losses`` over the same vocabulary in one step: multi-token prediction has one per token predicted."""
    chunk = internals.gpu_chunk(rows, model.vocab, model.hidden, torch.bfloat16)
    logits = rows * model.vocab
    # Over several chunks the weight's gradient is added up in float32 and leaves in bfloat16.
    accumulator = (F32 - BF16) * model.vocab * model.hidden if chunk < rows else 0
    return LossLayer(
        float((TORCH_PEAK + TORCH_WAITING * (losses - 1)) * logits),
        float(BF16 * chunk * model.vocab + accumulator),
        chunk,
        float(losses * TORCH_TRAFFIC * logits),
        float(losses * FASTLOSS_TRAFFIC * logits),
    )


class Link(NamedTuple):
    """What a collective over ``devices`` runs on."""

    node: float  # bytes per second within a node
    network: float  # between nodes, per device
    latency: float  # seconds per step


class VocabParallel(NamedTuple):
    """Per step of ``rows`` tokens, on each device."""

    devices: int
    statistics_bytes: float  # largest logit, log of the sum and log p of each token, to each other device
    statistics_seconds: float
    gradient_bytes: float  # d hidden, the sum of every shard's part
    gradient_seconds: float
    gather_bytes: float  # what gathering the logits would move instead
    gemm_seconds: float  # the three GEMMs of this device's shard
    seconds: float  # these and both messages, one after the other
    state_bytes: float  # the shard's weight, gradient and AdamW


def all_reduce(bytes_: float, devices: int, link: Link) -> tuple[float, float]:
    """Bytes that each device sends, and seconds, of a ring: 2 (p-1)/p of the message in 2 (p-1) steps. Past a node,
    rings within nodes and one between them (reduce-scatter, all-reduce, all-gather)."""
    inner = min(devices, NODE)
    outer = devices // inner
    sent = 2 * (inner - 1) / inner * bytes_
    seconds = sent / link.node + 2 * (inner - 1) * link.latency
    if outer > 1:
        between = 2 * (outer - 1) / outer * bytes_ / inner
        sent += between
        seconds += between / link.network + 2 * (outer - 1) * link.latency
    return sent, seconds


def all_gather(bytes_: float, devices: int, link: Link) -> tuple[float, float]:
    """Bytes that each device sends, and seconds, of a ring of all devices: its ``bytes_`` and those of the others but one, in
    p - 1 steps; past a node at the speed of the network."""
    sent = (devices - 1) * bytes_
    return sent, sent / (link.node if devices <= NODE else link.network) + (devices - 1) * link.latency


def vocabulary_parallel(
    model: Model, rows: int, devices: int, link: Link, speed: float = math.inf
) -> VocabParallel:
    """One all-gather of 12 bytes per token, one sum of d hidden (docs/parallel.md). ``speed``: FLOPs per second of a device's GEMMs."""
    gradient = all_reduce(BF16 * rows * model.hidden, devices, link)
    statistics = all_gather(3 * F32 * rows, devices, link)
    shard = -(-model.vocab // devices)
    gemms = 6.0 * rows * shard * model.hidden / speed
    return VocabParallel(
        devices,
        *statistics,
        *gradient,
        BF16 * rows * model.vocab * (devices - 1) / devices,
        gemms,
        gemms + statistics[1] + gradient[1],
        float((BF16 + F32 + 3 * F32) * shard * model.hidden),
    )
