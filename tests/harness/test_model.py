"""The body and the head together are the model's own forward, for every kind of head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    PhiConfig,
    RwkvConfig,
)

from fastloss.harness.config import PretrainConfig
from fastloss.harness.losses import LOSSES, loss_named
from fastloss.harness.model import (
    build_model,
    check_head,
    check_packing,
    folder_of,
    head_of,
    hidden_states,
    load_model,
    model_config,
)
from fastloss.harness.sampler import check_sampler

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

GPT: dict[str, Any] = {
    "vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

MODELS = {
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "gemma2-softcap": Gemma2Config(
        **SMALL, head_dim=8, final_logit_softcapping=0.2, tie_word_embeddings=False
    ),
    "gemma2-softcap-tied": Gemma2Config(
        **SMALL, head_dim=8, final_logit_softcapping=0.2, tie_word_embeddings=True
    ),
    "cohere-scale": CohereConfig(**SMALL, logit_scale=0.25, tie_word_embeddings=False),
    "cohere-scale-tied": CohereConfig(**SMALL, logit_scale=0.25, tie_word_embeddings=True),
    "granite-divisor": GraniteConfig(**SMALL, logits_scaling=4.0, tie_word_embeddings=False),
    "granite-divisor-tied": GraniteConfig(**SMALL, logits_scaling=4.0, tie_word_embeddings=True),
    "phi-bias": PhiConfig(**SMALL),
    "gptj-bias": GPTJConfig(**GPT, rotary_dim=4),
    "gpt2": GPT2Config(**GPT),
}


@pytest.mark.parametrize("name", MODELS)
def test_head_gives_the_models_own_loss_and_gradients(name: str) -> None:
    model: Any = build_model(MODELS[name], seed=0, device="cpu").eval()
    with torch.no_grad():  # a bias of zeros would hide a forgotten one
        if model.get_output_embeddings().bias is not None:
            model.get_output_embeddings().bias.normal_()
    inputs = torch.randint(1, 64, (2, 9))
    check_head(model, inputs)
    head = model.get_output_embeddings()
    assert (head.weight is model.get_input_embeddings().weight) == (name.endswith("-tied") or name == "gpt2")

    model(
        input_ids=inputs, labels=inputs
    ).loss.backward()  # transformers shifts, masks and averages by itself
    theirs = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    for loss_name, loss in LOSSES.items():
        head = head_of(model)
        if loss_name == "torch-linear" and head.softcap:
            with pytest.raises(ValueError, match="no softcap"):
                loss(torch.zeros(1, 16), head, torch.zeros(1, dtype=torch.long), 1)
            continue
        model.zero_grad(set_to_none=True)
        hidden = hidden_states(model, inputs[:, :-1]).flatten(0, 1)
        loss(hidden, head, inputs[:, 1:].flatten(), hidden.shape[0]).backward()
        for key, p in model.named_parameters():
            if key in theirs:
                torch.testing.assert_close(
                    p.grad, theirs[key], rtol=1e-3, atol=1e-5, msg=f"{loss_name} {key}"
                )


def test_a_head_we_do_not_know_is_an_error() -> None:
    model: Any = build_model(MODELS["llama"], seed=0, device="cpu")
    model.lm_head.register_forward_hook(lambda module, args, out: out * 3)  # stands for any odd head
    with pytest.raises(ValueError, match="does not know this head"):
        check_head(model, torch.ones(1, 4, dtype=torch.long))


def test_a_head_of_more_than_one_matrix_is_an_error() -> None:
    bert = BertConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, is_decoder=True
    )  # fmt: skip
    with pytest.raises(ValueError, match="the logits of BertLMHeadModel are not scale · softcap"):
        check_head(build_model(bert, seed=0, device="cpu"), torch.ones(1, 4, dtype=torch.long))


def test_models_that_cannot_be_packed_or_sampled_are_refused() -> None:
    opt = OPTConfig(
        vocab_size=64, hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=16,
        max_position_embeddings=32,
    )  # fmt: skip
    bloom = BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2)
    mamba = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    for config in (opt, bloom, mamba):
        model: Any = build_model(config, seed=0, device="cpu")
        with pytest.raises(ValueError, match=rf"packing: {type(model).__name__} looks .*use --no-packing"):
            check_packing(model, 64)
        check_sampler(model, head_of(model), 64)  # a recurrent layer has a cache of its own kind
    with pytest.raises(ValueError, match="it answers otherwise than without them"):
        rwkv = RwkvConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2)
        model = build_model(rwkv, seed=0, device="cpu")
        check_sampler(model, head_of(model), 64)


def test_model_names_of_the_hub_are_looked_up_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    repository = tmp_path / "models--maker--small"
    snapshot = repository / "snapshots" / "abc"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    build_model(MODELS["llama"], seed=0, device="cpu").save_pretrained(snapshot)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert folder_of("maker/small") == snapshot
    assert load_model("maker/small", "cpu").config.hidden_size == 16
    assert folder_of(str(snapshot / "config.json")) == folder_of(str(snapshot)) == snapshot
    for name in ("maker/large", "nowhere at all", "../maker/small"):
        with pytest.raises(ValueError, match="a name that the hub's cache holds, got"):
            folder_of(name)


def test_weights_depend_on_the_seed_alone() -> None:
    a, b, c = (build_model(MODELS["llama"], seed, "cpu") for seed in (3, 3, 4))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters(), strict=True))


def test_model_folder(tmp_path: Path) -> None:
    MODELS["granite-divisor"].save_pretrained(tmp_path)
    assert model_config(PretrainConfig(model=str(tmp_path))).model_type == "granite"
    with pytest.raises(ValueError, match=r"folder with config\.json"):
        model_config(PretrainConfig(model=str(tmp_path / "nowhere")))


def test_a_loss_that_this_torch_lacks_is_told_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(LOSSES, "torch-linear", raising=False)  # as before torch 2.13
    with pytest.raises(ValueError, match=r"torch-linear needs torch 2\.13 or later, this is"):
        loss_named("torch-linear")


def test_unknown_loss_and_uneven_heads() -> None:
    with pytest.raises(ValueError, match="expected one of 'fastloss', 'torch'"):
        loss_named("flash")
    with pytest.raises(ValueError, match="even multiple of heads=5"):
        model_config(PretrainConfig(hidden=64, heads=5))
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        PretrainConfig(steps=0)
