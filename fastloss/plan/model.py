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
        return bias + norms

    def pair_flops(self) -> int:
        """Of one query with one key: score and weighted value, all heads."""
        return 2 * self.heads * (self.head_dim + self.rope_dim + self.value_dim)


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the dense MLP, from layer ``first`` on."""

    count: int
    per_token: int
    width: int
    shared: int = 0  # in units of ``width``
    first: int = 0


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

    def _mlp(self, width: int) -> int:
        return (3 if self.gated else 2) * self.hidden * width

    @property
    def moe_layers(self) -> int:
        return self.layers - self.experts.first if self.experts else 0

    def parameters(self) -> dict[str, int]:
        """By part; ``head`` is 0 where it is the embedding's own matrix."""
        e, dense = self.experts, self.layers - self.moe_layers
        bias = ((2 if self.gated else 1) * self.width + self.hidden) * dense if self.mlp_bias else 0
        experts = self.moe_layers * self._mlp(e.width) * (e.count + e.shared) if e else 0
        norm = self.hidden * (1 + self.norm_bias)
        return {
            "embedding": (self.vocab + self.positions) * self.hidden,
            "attention": self.layers * self.attention.matrices(self.hidden),
            "mlp": dense * self._mlp(self.width) + experts,
            "router": self.moe_layers * self.hidden * e.count if e else 0,
            "norms and biases": (self.norms * self.layers + 1) * norm
            + self.layers * self.attention.vectors(self.hidden)
            + bias,
            "head": 0 if self.tied else self.vocab * self.hidden,
        }

    @property
    def total(self) -> int:
        return sum(self.parameters().values())

    def active_matrices(self) -> dict[str, int]:
        """Entries of the matrices that a token is multiplied with. The embedding is a look-up: not among them."""
        e, dense = self.experts, self.layers - self.moe_layers
        routed = self.moe_layers * self._mlp(e.width) * (e.per_token + e.shared) if e else 0
        parts = self.parameters()
        return {
            "attention": parts["attention"],
            "mlp": dense * self._mlp(self.width) + routed,
            "router": parts["router"],
            "head": self.vocab * self.hidden,
        }

    @property
    def active(self) -> int:
        """Parameters that a token meets, in the papers' way of counting: all but the experts not chosen."""
        return self.total - sum(self.parameters()[k] - self.active_matrices()[k] for k in ("mlp",))

    def forward_flops(self, sequence: int, causal: bool = True) -> dict[str, float]:
        """Per token of a forward pass over sequences of this length: 2 per entry, and every query with every key
        (``causal``: with those before it, half of them)."""
        flops: dict[str, float] = {part: 2.0 * n for part, n in self.active_matrices().items()}
        keys = (sequence + 1) / 2 if causal else sequence
        flops["scores"] = self.layers * self.attention.pair_flops() * keys
        return flops
