"""A transformers config to a Model, and the models that have a name."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from fastloss.plan.model import Attention, Experts, Model

# What a family's configs leave unsaid.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "mixtral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "qwen3_moe": {"qk_norm": True},
    "gemma": {"tied": True},
    "gemma2": {"tied": True, "norms": 4},
    "gpt2": {"tied": True},
    "deepseek_v3": {},
}

PRESETS: dict[str, dict[str, Any]] = {}


def _preset(name: str, family: str, vocab: int, hidden: int, layers: int, width: int, **more: Any) -> None:
    PRESETS[name] = {
        "model_type": family,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": width,
        **more,
    }


def _heads(heads: int, kv_heads: int, head_dim: int) -> dict[str, int]:
    return {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}


_preset("llama-3-8b", "llama", 128256, 4096, 32, 14336, **_heads(32, 8, 128))
_preset("llama-3-70b", "llama", 128256, 8192, 80, 28672, **_heads(64, 8, 128))
_preset("llama-3.1-405b", "llama", 128256, 16384, 126, 53248, **_heads(128, 8, 128))
for _name, _hidden, _layers, _width, _n, _tied in (
    ("0.6b", 1024, 28, 3072, 16, True),
    ("1.7b", 2048, 28, 6144, 16, True),
    ("4b", 2560, 36, 9728, 32, True),
    ("8b", 4096, 36, 12288, 32, False),
    ("14b", 5120, 40, 17408, 40, False),
    ("32b", 5120, 64, 25600, 64, False),
):
    _preset(
        f"qwen-3-{_name}",
        "qwen3",
        151936,
        _hidden,
        _layers,
        _width,
        tie_word_embeddings=_tied,
        **_heads(_n, 8, 128),
    )
for _name, _hidden, _layers, _width, _n, _narrow in (
    ("30b-a3b", 2048, 48, 6144, 32, 768),
    ("235b-a22b", 4096, 94, 12288, 64, 1536),
):
    _preset(
        f"qwen-3-{_name}",
        "qwen3_moe",
        151936,
        _hidden,
        _layers,
        _width,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=_narrow,
        **_heads(_n, 4, 128),
    )
_preset(
    "deepseek-v3",
    "deepseek_v3",
    129280,
    7168,
    61,
    18432,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=256,
    num_experts_per_tok=8,
    moe_intermediate_size=2048,
    n_shared_experts=1,
    first_k_dense_replace=3,
)
PRESETS["gpt-2"] = {
    "model_type": "gpt2",
    "vocab_size": 50257,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
}


def load(source: str, vocab: int | None = None) -> Model:
    """A preset's name, a folder with a config.json, or such a file; ``vocab`` in place of its own.

    Raises:
        ValueError: no such preset or file, or a config that lacks a field or is of a family not known here.
    """
    changed = {} if vocab is None else {"vocab_size": vocab}
    if source in PRESETS:
        return from_config({**PRESETS[source], **changed}, source)
    path = Path(source) / "config.json" if Path(source).is_dir() else Path(source)
    if not path.is_file():
        near = difflib.get_close_matches(source.lower(), PRESETS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(
            f"model: expected a config.json, its folder or one of {', '.join(PRESETS)}, got {source!r}{hint}"
        )
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"model: expected JSON in {path}, got {error}") from error
    return from_config({**config, **changed}, path.resolve().parent.name)


def from_config(config: dict[str, Any], name: str = "model") -> Model:
    """The fields of ``config`` as transformers writes them."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type: expected one of {', '.join(FAMILIES)}, got {family!r}")
    own = FAMILIES[family]
    tied = bool(config.get("tie_word_embeddings", own.get("tied", False)))
    try:
        if family == "gpt2":
            return _gpt2(config, name, tied)
        return Model(
            name,
            config["vocab_size"],
            config["hidden_size"],
            config["num_hidden_layers"],
            config["intermediate_size"],
            _latent(config) if family == "deepseek_v3" else _grouped(config, own),
            _experts(family, config),
            tied,
            mlp_bias=bool(config.get("mlp_bias")),
            norms=own.get("norms", 2),
        )
    except KeyError as error:
        raise ValueError(f"{error.args[0]}: expected in a {family} config, not found") from error


def _grouped(config: dict[str, Any], own: dict[str, Any]) -> Attention:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    bias = bool(config.get("attention_bias"))
    return Attention(
        heads,
        config.get("num_key_value_heads") or heads,
        head_dim,
        head_dim,
        qkv_bias=bias or own.get("qkv_bias", False),
        out_bias=bias,
        qk_norm=own.get("qk_norm", False),
    )


def _latent(config: dict[str, Any]) -> Attention:
    return Attention(
        config["num_attention_heads"],
        config["num_attention_heads"],
        config["qk_nope_head_dim"],
        config["v_head_dim"],
        config["qk_rope_head_dim"],
        config.get("q_lora_rank") or 0,
        config["kv_lora_rank"],
    )


def _experts(family: str, config: dict[str, Any]) -> Experts | None:
    per_token = config.get("num_experts_per_tok", 0)
    if family == "mixtral":
        return Experts(_either(config, "num_local_experts"), per_token, config["intermediate_size"])
    if family == "qwen3_moe":
        count = _either(config, "num_experts", "num_local_experts")
        return Experts(count, per_token, config["moe_intermediate_size"])
    if family == "deepseek_v3":
        shared, first = config["n_shared_experts"], config["first_k_dense_replace"]
        count = _either(config, "n_routed_experts", "num_local_experts")
        return Experts(count, per_token, config["moe_intermediate_size"], shared, first)
    return None


def _either(config: dict[str, Any], *names: str) -> Any:
    """A field under the name it has on the hub, or the one that newer versions of transformers write."""
    for name in names:
        if name in config:
            return config[name]
    raise KeyError(names[0])


def _gpt2(config: dict[str, Any], name: str, tied: bool) -> Model:
    hidden, heads = config["n_embd"], config["n_head"]
    head_dim = hidden // heads
    return Model(
        name,
        config["vocab_size"],
        hidden,
        config["n_layer"],
        config.get("n_inner") or 4 * hidden,
        Attention(heads, heads, head_dim, head_dim, qkv_bias=True, out_bias=True),
        tied=tied,
        gated=False,
        mlp_bias=True,
        norm_bias=True,
        positions=config["n_positions"],
    )
