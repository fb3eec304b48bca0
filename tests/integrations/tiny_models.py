"""Tiny models of every causal-LM class of the installed transformers, from one set of small numbers."""

from __future__ import annotations

import inspect
import warnings

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 99
LARGEST = 20_000_000  # parameters

# Every name under which a configuration asks for one of these sizes; those that a class does not know are left out.
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "d_model": 32, "n_embd": 32, "embed_dim": 32, "dim": 32, "word_embed_proj_dim": 32,
    "intermediate_size": 48, "ffn_dim": 48, "ffn_hidden_size": 48, "d_ff": 48, "n_inner": 48, "dim_ff": 48, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "attention_head_dim": 8, "kv_channels": 8,
    "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_seq_len": 64, "embedding_size": 32,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "moe_k": 2, "moe_topk": 2, "n_shared_experts": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "qk_head_dim": 16, "first_k_dense_replace": 1, "sliding_window": 8, "attention_dropout": 0.0, "hidden_dropout": 0.0,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "dropout": 0.0, "activation_dropout": 0.0, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "attention_dropout_prob": 0.0, "layerdrop": 0.0, "decoder_layerdrop": 0.0, "residual_dropout": 0.0,
    "embedding_dropout": 0.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "state_size": 8, "time_step_rank": 4, "mamba_d_state": 8,
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_dt_rank": 4, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1,
    "lru_width": 32, "attention_window_size": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "num_linear_heads": 4, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 8, "chunk_size": 8, "is_decoder": True,
    "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "use_cache": False,
}  # fmt: skip
# What single classes need besides. A class is tried with each of ALSO until one builds and runs.
EXTRA: dict[str, dict[str, object]] = {
    "CodeGenForCausalLM": {"rotary_dim": 4},
    "GPTJForCausalLM": {"rotary_dim": 4},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Mamba2ForCausalLM": {"head_dim": 16},
    "ReformerModelWithLMHead": {"axial_pos_embds": False, "attn_layers": ["local", "local"], "local_attn_chunk_length": 4,
                                "local_attention_probs_dropout_prob": 0.0, "lsh_attention_probs_dropout_prob": 0.0},
    "RoCBertForCausalLM": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20},
    "XLMWithLMHeadModel": {"emb_dim": 32, "n_words": VOCAB},
    "XmodForCausalLM": {"languages": ["en_XX"], "default_language": "en_XX"},
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
    "FalconH1ForCausalLM": {"mamba_d_ssm": 64},
    "Gemma4AssistantForCausalLM": {"hidden_size_per_layer_input": 0},
    "DbrxForCausalLM": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0, "attn_pdrop": 0.0}},
    "LongcatFlashForCausalLM": {"ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "zero_expert_num": 2, "moe_topk": 2},
    "FuyuForCausalLM": {"text_config": {"model_type": "persimmon", "vocab_size": VOCAB, "hidden_size": 32,
                        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}},
}  # fmt: skip
ALSO: tuple[dict[str, object], ...] = ({}, {"num_key_value_heads": 4})
SUB_CONFIGS = ("text_config", "decoder", "llm_config", "language_config")


def class_names() -> list[str]:
    """Every class of the auto mapping, once, in its order."""
    return list(dict.fromkeys(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()))


def _config_name(class_name: str) -> str:
    for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if name == class_name:
            return CONFIG_MAPPING_NAMES[model_type]
    raise KeyError(class_name)


def _known(config_class: type) -> set[str]:
    names = set(inspect.signature(config_class.__init__).parameters)
    for cls in config_class.__mro__:
        names |= set(getattr(cls, "__annotations__", {}))
    mapped = set(getattr(config_class, "attribute_map", {}))
    return {n for n in names if n not in mapped}


def tiny_config(
    config_class: type, every_part: bool = False, **extra: object
) -> transformers.PreTrainedConfig:
    known = _known(config_class)
    values: dict[str, object] = {k: v for k, v in SMALL.items() if k in known}
    for name, sub in (getattr(config_class, "sub_configs", {}) or {}).items():
        if (every_part or name in SUB_CONFIGS) and sub is not transformers.AutoConfig:
            values[name] = tiny_config(sub, every_part).to_dict()
    values.update(extra)
    return config_class(**values)


def tiny_model(class_name: str) -> torch.nn.Module:
    """The class with small random weights, in training mode, once it has given a loss.

    Raises:
        Exception: whatever a class raises that these numbers do not fit.
    """
    error: Exception | None = None
    for also in ALSO:
        for every_part in (False, True):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    model = _build(class_name, every_part, {**also, **EXTRA.get(class_name, {})})
                    loss = model(**batch()).loss
                if not torch.isfinite(loss):
                    raise ValueError(f"{class_name}: a loss of {loss}")
                return model
            except Exception as new:
                error = error or new
    assert error is not None
    raise error


def _build(class_name: str, every_part: bool, extra: dict[str, object]) -> torch.nn.Module:
    config_class = getattr(transformers, _config_name(class_name))
    known = _known(config_class)
    cls = getattr(transformers, class_name)
    config = tiny_config(config_class, every_part, **{k: v for k, v in extra.items() if k in known})
    if cls.config_class is not type(config):
        parts = [getattr(config, name) for name in config.sub_configs]
        config = next((p for p in parts if type(p) is cls.config_class), config)
    make = lambda: cls._from_config(config, attn_implementation="eager")
    with torch.device("meta"):
        size = sum(p.numel() for p in make().parameters())
    if size > LARGEST:
        raise ValueError(f"{class_name}: {size} parameters in what should be a tiny model")
    torch.manual_seed(0)
    model = make()
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.is_floating_point():
            with torch.no_grad():
                parameter.normal_(0.0, 0.05)
    return model.train()


def batch(rows: int = 2, length: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    labels = ids.clone()
    labels[0, :4] = -100
    return {"input_ids": ids, "labels": labels}
