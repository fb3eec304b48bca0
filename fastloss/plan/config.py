"""A transformers config to a Model, and the models that have a name."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from fastloss.plan.model import Attention, Experts, Model

# What a family's configs leave unsaid. ``window``: which layers have one where the config has a sliding_window and no
# layer_types. ``defaults``: what Gemma 3's own configs leave to transformers.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"window": "all"},
    "mixtral": {"window": "all"},
    "phi3": {"window": "all"},
    "qwen2": {"qkv_bias": True, "window": "later"},
    "qwen2_moe": {"qkv_bias": True, "window": "every second of the first"},
    "qwen3": {"qk_norm": True, "window": "later"},
    "qwen3_moe": {"qk_norm": True, "window": "all"},
    "gemma": {"tied": True},
    "gemma2": {"tied": True, "norms": 4, "window": "every second"},
    "gemma3_text": {
        "tied": True,
        "norms": 4,
        "qk_norm": True,
        "window": "all but every sixth",
        "defaults": {
            "vocab_size": 262208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "sliding_window": 4096,
        },
    },
    "gpt_oss": {"window": "every second", "sinks": True},
    "gpt2": {"tied": True},
    "glm4_moe": {"out_bias": False},
    "deepseek_v2": {},
    "deepseek_v3": {},
    "kimi_k2": {},
}
LATENT = ("deepseek_v2", "deepseek_v3", "kimi_k2")
# The model within a model that also sees: its text part is what is planned for.
TEXT_PARTS = {"gemma3": "gemma3_text"}

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
_preset("mistral-7b", "mistral", 32000, 4096, 32, 14336, sliding_window=4096, **_heads(32, 8, 128))
_preset(
    "mixtral-8x7b",
    "mixtral",
    32000,
    4096,
    32,
    14336,
    num_local_experts=8,
    num_experts_per_tok=2,
    **_heads(32, 8, 128),
)
_preset("gemma-2-9b", "gemma2", 256000, 3584, 42, 14336, sliding_window=4096, **_heads(16, 8, 256))
for _name, _vocab, _hidden, _layers, _width, _n, _kv, _dim, _window in (
    ("1b", 262144, 1152, 26, 6912, 4, 1, 256, 512),
    ("4b", 262208, 2560, 34, 10240, 8, 4, 256, 1024),
    ("12b", 262208, 3840, 48, 15360, 16, 8, 256, 1024),
    ("27b", 262208, 5376, 62, 21504, 32, 16, 128, 1024),
):
    _preset(
        f"gemma-3-{_name}",
        "gemma3_text",
        _vocab,
        _hidden,
        _layers,
        _width,
        sliding_window=_window,
        **_heads(_n, _kv, _dim),
    )
for _name, _layers, _experts_ in (("20b", 24, 32), ("120b", 36, 128)):
    _preset(
        f"gpt-oss-{_name}",
        "gpt_oss",
        201088,
        2880,
        _layers,
        2880,
        num_local_experts=_experts_,
        num_experts_per_tok=4,
        sliding_window=128,
        attention_bias=True,
        **_heads(64, 8, 64),
    )
_preset(
    "qwen-2-57b-a14b",
    "qwen2_moe",
    151936,
    3584,
    28,
    18944,
    num_attention_heads=28,
    num_key_value_heads=4,
    num_experts=64,
    num_experts_per_tok=8,
    moe_intermediate_size=2560,
    shared_expert_intermediate_size=20480,
)
for _name, _hidden, _layers, _width, _narrow, _n, _first, _norm in (
    ("4.5", 5120, 92, 12288, 1536, 160, 3, True),
    ("4.5-air", 4096, 46, 10944, 1408, 128, 1, False),
):
    _preset(
        f"glm-{_name}",
        "glm4_moe",
        151552,
        _hidden,
        _layers,
        _width,
        attention_bias=True,
        use_qk_norm=_norm,
        n_routed_experts=_n,
        num_experts_per_tok=8,
        moe_intermediate_size=_narrow,
        n_shared_experts=1,
        first_k_dense_replace=_first,
        num_nextn_predict_layers=1,
        **_heads(96, 8, 128),
    )


def _latent_preset(
    name: str,
    family: str,
    vocab: int,
    hidden: int,
    layers: int,
    width: int,
    heads: int,
    q_rank: int | None,
    **more: Any,
) -> None:
    _preset(
        name,
        family,
        vocab,
        hidden,
        layers,
        width,
        num_attention_heads=heads,
        q_lora_rank=q_rank,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        **more,
    )


def _routed(count: int, per_token: int, width: int, shared: int, dense: int) -> dict[str, int]:
    return {
        "n_routed_experts": count,
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": width,
        "n_shared_experts": shared,
        "first_k_dense_replace": dense,
    }


_latent_preset(
    "deepseek-v2", "deepseek_v2", 102400, 5120, 60, 12288, 128, 1536, **_routed(160, 6, 1536, 2, 1)
)
_latent_preset(
    "deepseek-v2-lite", "deepseek_v2", 102400, 2048, 27, 10944, 16, None, **_routed(64, 6, 1408, 2, 1)
)
_latent_preset(
    "deepseek-v3",
    "deepseek_v3",
    129280,
    7168,
    61,
    18432,
    128,
    1536,
    num_nextn_predict_layers=1,
    **_routed(256, 8, 2048, 1, 3),
)
_latent_preset("kimi-k2", "kimi_k2", 163840, 7168, 61, 18432, 64, 1536, **_routed(384, 8, 2048, 1, 1))
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
    if family in TEXT_PARTS:
        family, config = TEXT_PARTS[family], config.get("text_config", {})
    if family not in FAMILIES:
        raise ValueError(f"model_type: expected one of {', '.join(FAMILIES)}, got {family!r}")
    own = FAMILIES[family]
    config = {**own.get("defaults", {}), **config}
    tied = bool(config.get("tie_word_embeddings", own.get("tied", False)))
    try:
        if family == "gpt2":
            return _gpt2(config, name, tied)
        hidden, layers = config["hidden_size"], config["num_hidden_layers"]
        window_layers = sum(_windowed(own.get("window", ""), config, layer) for layer in range(layers))
        return Model(
            name,
            config["vocab_size"],
            hidden,
            layers,
            config["intermediate_size"],
            _latent(config) if family in LATENT else _grouped(config, own),
            _experts(family, config),
            tied,
            mlp_bias=bool(config.get("mlp_bias")),
            norms=own.get("norms", 2),
            window=config["sliding_window"] if window_layers else 0,
            window_layers=window_layers,
            mtp=config.get("num_nextn_predict_layers") or 0,
        )
    except KeyError as error:
        raise ValueError(f"{error.args[0]}: expected in a {family} config, not found") from error


def _windowed(rule: str, config: dict[str, Any], layer: int) -> bool:
    """Whether queries of this layer see only the last ``sliding_window`` keys."""
    optional = rule in ("later", "every second of the first") or "use_sliding_window" in config
    if not rule or not config.get("sliding_window") or (optional and not config.get("use_sliding_window")):
        return False
    if rule == "all":
        return True
    if types := config.get("layer_types"):
        return types[layer] == "sliding_attention"
    if rule == "later":
        return layer >= config["max_window_layers"]
    if rule == "all but every sixth":
        return (layer + 1) % (config.get("sliding_window_pattern") or 6) != 0
    return layer % 2 == 0 and (rule == "every second" or layer < config["max_window_layers"])


def _grouped(config: dict[str, Any], own: dict[str, Any]) -> Attention:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    bias = bool(config.get("attention_bias"))
    return Attention(
        heads,
        config.get("num_key_value_heads") or heads,
        head_dim,
        head_dim,
        qkv_bias=config.get("qkv_bias", bias or own.get("qkv_bias", False)),
        out_bias=own.get("out_bias", bias),
        qk_norm=bool(config.get("use_qk_norm", own.get("qk_norm", False))),
        sinks=own.get("sinks", False),
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
    per_token = config.get("num_experts_per_tok") or 0
    if family in ("mixtral", "gpt_oss"):
        count = _either(config, "num_local_experts")
        return Experts(count, per_token, config["intermediate_size"], bias=family == "gpt_oss")
    if family in ("qwen2_moe", "qwen3_moe"):
        count = _either(config, "num_experts", "num_local_experts")
        shared = config["shared_expert_intermediate_size"] if family == "qwen2_moe" else 0
        return Experts(
            count, per_token, config["moe_intermediate_size"], shared, _dense(config), family == "qwen2_moe"
        )
    if family in ("glm4_moe", *LATENT):
        count, width = (
            _either(config, "n_routed_experts", "num_local_experts"),
            config["moe_intermediate_size"],
        )
        shared = width * (config["n_shared_experts"] or 0)
        return Experts(count, per_token, width, shared, config["first_k_dense_replace"])
    return None


def _dense(config: dict[str, Any]) -> int:
    """Layers without experts: those that the config lists, and those between every ``decoder_sparse_step``-th."""
    listed, step = config.get("mlp_only_layers") or (), config.get("decoder_sparse_step") or 1
    return sum(layer in listed or (layer + 1) % step != 0 for layer in range(config["num_hidden_layers"]))


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
