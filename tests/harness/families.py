"""Tiny models of every family of causal language models that transformers builds from a config alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

NAMES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
# the names that families give to their sizes, and sizes for which a model takes milliseconds
SIZES: dict[str, Any] = {
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "embedding_size": 32, "embed_dim": 32, "dim": 32, "n_inner": 64,
    "word_embed_proj_dim": 32, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 411,
    "num_hidden_layers": 2, "n_layer": 2, "num_layers": 2, "n_layers": 2, "decoder_layers": 2, "encoder_layers": 2,
    "num_attention_heads": 2, "n_head": 2, "n_heads": 2, "num_heads": 2, "decoder_attention_heads": 2,
    "encoder_attention_heads": 2, "num_key_value_heads": 2, "multi_query": False, "head_dim": 16,
    "intermediate_size": 64, "ffn_hidden_size": 64, "ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_ffn_dim": 64,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "shared_intermediate_size": 32,
    "intermediate_size_mlp": 64, "expert_ffn_hidden_size": 32,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "moe_topk": 2, "moe_k": 2, "moe_top_k": 2, "first_k_dense_replace": 1, "zero_expert_num": 0,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8,
    "max_position_embeddings": 128, "n_positions": 128, "n_ctx": 128, "max_sequence_length": 128, "max_seq_len": 128,
    "sliding_window": 16, "attention_window": 16, "lru_width": 32, "conv_kernel": 4, "state_size": 8, "ssm_state_size": 8,
    "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1,
    "time_step_rank": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "laurel_rank": 8, "altup_num_inputs": 2, "num_kv_shared_layers": 0, "activation_sparsity_pattern": 0.0,
}  # fmt: skip
# what a family's other sizes ask for
ROTARY = {"head_dim": 8}  # latent attention names its rotary part so
FOUR = {"num_hidden_layers": 4}  # every fourth layer attends, or every second
OTHERWISE: dict[str, dict[str, Any]] = {
    "axk1": ROTARY, "deepseek_v3": ROTARY, "longcat_flash": ROTARY, "youtu": ROTARY,
    "codegen": {"rotary_dim": 8}, "gptj": {"rotary_dim": 8}, "qwen3_next": FOUR, "qwen3_5_text": FOUR,
    "qwen3_5_moe_text": FOUR, "qwen4_exp_text": FOUR, "kimi_linear": FOUR, "lfm3": FOUR, "bailing_hybrid": FOUR,
    "jamba": {**FOUR, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "bamba": {**FOUR, "attn_layer_indices": [1]}, "recurrent_gemma": {"num_hidden_layers": 3},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]}, "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "dots1": {"n_shared_experts": 1}, "lfm2_moe": {"num_dense_layers": 1},
}  # fmt: skip
IDS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}


def tiny(name: str, vocab_size: int) -> PretrainedConfig:
    """The config of a family with its own defaults but for the sizes."""
    kind: Any = CONFIG_MAPPING[name]
    known = vars(kind())
    sizes = {
        key: value
        for key, value in SIZES.items()
        if key in known or key in getattr(kind, "attribute_map", {})
    }
    return kind(**sizes | OTHERWISE.get(name, {}) | IDS, vocab_size=vocab_size)


def saved(name: str, tokenizer: Any, folder: Path) -> Path:
    """A folder as the hub has them, with random weights; what transformers itself cannot build raises here."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny(name, len(tokenizer)))
    model(input_ids=torch.arange(8)[None] + 5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
