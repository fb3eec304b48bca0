"""A model as the numbers that its cost follows from: parameters by part, FLOPs per token."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention; with ``kv_rank`` multi-head latent attention (DeepSeek), where keys and values are made
    from a low-rank latent and queries too if ``q_rank``."""

    heads: int
    kv_heads: int
    head_dim: int  # of queries and keys; latent: without the rotary part
    value_dim: int
    rope_dim: int = 0  # latent: the rotary part, shared by all heads on the keys' side
    q_rank: int = 0
    kv_rank: int = 0
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    sinks: bool = False  # a learned logit per head that no key has

    def matrices(self, hidden: int) -> int:
        """Entries of the projections."""
        query = self.heads * (self.head_dim + self.rope_dim)
        out = self.heads * self.value_dim * hidden
        if not self.kv_rank:
            return hidden * (query + self.kv_heads * (self.head_dim + self.value_dim)) + out
        up = self.kv_rank * self.heads * (self.head_dim + self.value_dim)
        down = hidden * (self.kv_rank + self.rope_dim)
        q = hidden * self.q_rank + self.q_rank * query if self.q_rank else hidden * query
        return q + down + up + out

    def vectors(self, hidden: int) -> int:
        """Biases and norms."""
        qkv = self.heads * self.head_dim + self.kv_heads * (self.head_dim + self.value_dim)
        bias = qkv * self.qkv_bias + hidden * self.out_bias
        norms = 2 * self.head_dim * self.qk_norm + self.q_rank + self.kv_rank
        return bias + norms + self.heads * self.sinks

    def pair_flops(self) -> int:
        """Of one query with one key: score and weighted value, all heads."""
        return 2 * self.heads * (self.head_dim + self.rope_dim + self.value_dim)


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the dense MLP, in all layers but ``dense``."""

    count: int
    per_token: int
    width: int
    shared: int = 0  # width of the experts that every token meets, together
    dense: int = 0  # layers
    shared_gate: bool = False  # the shared experts' output is weighted by a number per token
    bias: bool = False  # of the experts and of the router


@dataclass(frozen=True)
class Model:
    name: str
    vocab: int
    hidden: int
    layers: int
    width: int  # of the dense MLP
    attention: Attention
    experts: Experts | None = None
    tied: bool = False
    gated: bool = True  # three matrices (SwiGLU) or two
    mlp_bias: bool = False
    norms: int = 2  # per layer
    norm_bias: bool = False
    positions: int = 0  # learned position embeddings
    window: int = 0  # keys that a query of a windowed layer sees, itself among them
    window_layers: int = 0
    mtp: int = 0  # multi-token prediction: further tokens predicted, each by a layer of its own and the head (DeepSeek-V3)

    def _mlp(self, width: int) -> int:
        return (3 if self.gated else 2) * self.hidden * width

    @property
    def moe_layers(self) -> int:
        return self.layers - self.experts.dense if self.experts else 0

    def _experts(self, routed: int) -> int:
        """Entries of ``routed`` experts and the shared ones of a layer."""
        e = self.experts
        return routed * self._mlp(e.width) + self._mlp(e.shared) if e else 0

    def _router(self) -> int:
        return self.hidden * (self.experts.count + self.experts.shared_gate) if self.experts else 0

    def _expert_biases(self) -> int:
        e = self.experts
        if e is None or not e.bias:
            return 0
        return e.count * ((2 if self.gated else 1) * e.width + self.hidden + 1)

    def parameters(self) -> dict[str, int]:
        """By part; ``head`` is 0 where it is the embedding's own matrix."""
        dense, count = self.layers - self.moe_layers, self.experts.count if self.experts else 0
        bias = ((2 if self.gated else 1) * self.width + self.hidden) * dense if self.mlp_bias else 0
        norm = self.hidden * (1 + self.norm_bias)
        return {
            "embedding": (self.vocab + self.positions) * self.hidden,
            "attention": self.layers * self.attention.matrices(self.hidden),
            "mlp": dense * self._mlp(self.width) + self.moe_layers * self._experts(count),
            "router": self.moe_layers * self._router(),
            "norms and biases": (self.norms * self.layers + 1) * norm
            + self.layers * self.attention.vectors(self.hidden)
            + self.moe_layers * self._expert_biases()
            + bias,
            "head": 0 if self.tied else self.vocab * self.hidden,
        }

    @property
    def total(self) -> int:
        """Of the model that is used afterwards: without the layers of multi-token prediction."""
        return sum(self.parameters().values())

    def active_matrices(self) -> dict[str, int]:
        """Entries of the matrices that a token is multiplied with. The embedding is a look-up: not among them."""
        dense, per_token = self.layers - self.moe_layers, self.experts.per_token if self.experts else 0
        parts = self.parameters()
        return {
            "attention": parts["attention"],
            "mlp": dense * self._mlp(self.width) + self.moe_layers * self._experts(per_token),
            "router": parts["router"],
            "head": self.vocab * self.hidden,
        }

    @property
    def active(self) -> int:
        """Parameters that a token meets, in the papers' way of counting: all but the experts not chosen."""
        e = self.experts
        chosen = e.per_token / e.count if e else 1.0
        biases = round(self.moe_layers * self._expert_biases() * (1 - chosen))
        return self.total - (self.parameters()["mlp"] - self.active_matrices()["mlp"]) - biases

    def forward_flops(self, sequence: int, causal: bool = True) -> dict[str, float]:
        """Per token of a forward pass over sequences of this length: 2 per entry, and every query with the keys that it
        sees (not ``causal``: with all of them, whatever a mask hides)."""
        flops: dict[str, float] = {part: 2.0 * n for part, n in self.active_matrices().items()}
        whole, windowed = (
            visible_keys(sequence, window) if causal else float(sequence)
            for window in (sequence, self.window)
        )
        keys = (self.layers - self.window_layers) * whole + self.window_layers * windowed
        flops["scores"] = self.attention.pair_flops() * keys
        return flops

    def _mtp_layer(self, routed: int) -> int:
        """Matrices of a layer of multi-token prediction: hidden state and embedding to one vector, attention, MLP."""
        mlp = self._experts(routed) + self._router() if self.experts else self._mlp(self.width)
        return 2 * self.hidden**2 + self.attention.matrices(self.hidden) + mlp

    def mtp_parameters(self) -> int:
        """Embedding and head are the model's own. Norms: of both inputs, of the layer, before the head."""
        vectors = (3 + self.norms) * self.hidden * (1 + self.norm_bias) + self.attention.vectors(self.hidden)
        count = self.experts.count if self.experts else 0
        return self.mtp * (self._mtp_layer(count) + vectors + self._expert_biases())

    def mtp_flops(self, sequence: int, causal: bool = True) -> dict[str, float]:
        """Per token of a forward pass: what multi-token prediction adds to it."""
        keys = visible_keys(sequence, sequence) if causal else sequence
        per_token = self.experts.per_token if self.experts else 0
        return {
            "matrices": 2.0 * self.mtp * self._mtp_layer(per_token),
            "scores": float(self.mtp * self.attention.pair_flops() * keys),
            "head": 2.0 * self.mtp * self.vocab * self.hidden,
        }


def visible_keys(sequence: int, window: int) -> float:
    """Mean over the queries of a causal sequence of the keys that each sees: itself and those before it, ``window`` at
    most."""
    seen = min(window, sequence)
    return (seen * (seen + 1) / 2 + (sequence - seen) * seen) / sequence
