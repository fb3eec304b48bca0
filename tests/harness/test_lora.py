"""Adapters: what is trained, what the head costs, the reference below them, the exported folder, resume."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")

import torch
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    RecurrentGemmaConfig,
)

from fastloss.harness import chat, dpo, grpo, lora, pairs, ppo, pretrain, reward, sft
from fastloss.harness.config import (
    DpoConfig,
    GrpoConfig,
    PpoConfig,
    PretrainConfig,
    RewardConfig,
    SftConfig,
    TrainConfig,
)
from fastloss.harness.model import build_model, hidden_states, load_model
from fastloss.harness.run import Result
from fastloss.harness.start import language_model, reference

FIXED = ("step", "loss", "grad_norm", "lr", "tokens")
RUNS: dict[str, Callable[..., Result]] = {
    "pretrain": pretrain.run, "sft": sft.run, "reward": reward.run, "dpo": dpo.run, "grpo": grpo.run, "ppo": ppo.run
}  # fmt: skip


@pytest.fixture
def configs(base: Path, pairs_file: Path, text_file: Path, tmp_path: Path) -> dict[str, TrainConfig]:
    common: dict[str, Any] = {
        "model": str(base), "steps": 4, "warmup": 1, "save_every": 0, "batch_size": 4, "lora_rank": 4, "lr": 1e-2,
        "out": str(tmp_path / "run"),
    }  # fmt: skip
    samples: dict[str, Any] = {"numbers": 6, "max_new_tokens": 3, "evaluate": 4, "updates": 2}
    return {
        "pretrain": PretrainConfig(**common, data=(str(text_file),), seq_len=32, keep_weights=True),
        "sft": SftConfig(**common, seq_len=64, task="arithmetic", numbers=9, exact=4, max_new_tokens=3),
        "reward": RewardConfig(**common, data=(str(pairs_file),)),
        "dpo": DpoConfig(**common, data=(str(pairs_file),)),
        "grpo": GrpoConfig(**common, **samples, group_size=4, beta=0.05, reward=(f"{__name__}:low_ids",)),
        "ppo": PpoConfig(**common, **samples, reward=(f"{__name__}:low_ids",)),
    }  # fmt: skip


def low_ids(prompts: list[Any], completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [sum(i < 100 for i in ids) / len(ids) for ids in completion_ids]


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("name", RUNS)
def test_every_stage_trains_adapters_alone_and_resumes(
    name: str, configs: dict[str, TrainConfig], base: Path, quiet: Console, tmp_path: Path
) -> None:
    """Resume to the bit; frozen weights as they were, without a gradient buffer; the folder loads as any other."""
    run, config = RUNS[name], configs[name]
    whole = run(replace(config, out=str(tmp_path / "whole")), console=quiet)
    half = replace(config, out=str(tmp_path / "half"))
    assert run(replace(half, stop_after=3), console=quiet).done == 3
    rest = run(half, resume=True, console=quiet)
    assert [[r[key] for key in FIXED] for r in whole.rows] == [[r[key] for key in FIXED] for r in rest.rows]
    for (key, p), q in zip(whole.model.named_parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(p, q), key

    causal = getattr(whole.model, "policy", whole.model)
    own = {"reward": {"score.weight"}, "ppo": {"value.weight", "value.bias"}}.get(name, set())
    names = trained(whole.model)
    assert own <= names and all(".lora_" in key for key in names - own)
    assert len(lora.layers(causal)) == 14  # seven linear layers in each of two blocks
    start = load_model(str(base), "cpu", type(causal))
    for key, p in start.named_parameters():
        if key not in own:
            layer = key.removesuffix(".weight")
            frozen = causal.get_parameter(
                key if key in dict(causal.named_parameters()) else f"{layer}.base_layer.weight"
            )
            assert torch.equal(p, frozen), key

    auto = AutoModelForSequenceClassification if name == "reward" else AutoModelForCausalLM
    loaded = auto.from_pretrained(tmp_path / "whole" / "model").eval()
    assert not lora.layers(loaded)
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        now, then, before = (hidden_states(m.eval(), ids) for m in (causal, loaded, start))
    torch.testing.assert_close(now, then, rtol=1e-4, atol=1e-5)
    assert float((now - before).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "name", ["sft", "grpo", *(pytest.param(n, marks=pytest.mark.slow) for n in ("pretrain", "dpo", "ppo"))]
)
def test_frozen_head_has_no_gradient(
    name: str, configs: dict[str, TrainConfig], quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two products of the head instead of three: fastloss says so, the FLOP counter sees it, no buffer is made."""
    buffers: list[torch.Tensor | None] = []
    backward = torch.Tensor.backward

    def watched(self: torch.Tensor, *args: Any, **options: Any) -> None:
        backward(self, *args, **options)
        buffers.append(head.grad)

    config = replace(configs[name], steps=1)
    result = RUNS[name](config, console=quiet)
    head = getattr(result.model, "policy", result.model).lm_head.weight
    assert "2 GEMMs" in result.cost.loss_by, result.cost.loss_by
    monkeypatch.setattr(torch.Tensor, "backward", watched)
    result.stage.step("fastloss", {})(0)
    assert not head.requires_grad and buffers and all(buffer is None for buffer in buffers)
    assert "of them trained" in (Path(config.out) / "report.md").read_text()
    full = replace(config, lora_rank=0, out=config.out + "-full")
    ours, theirs = result.cost.counted_flops, RUNS[name](full, console=quiet).cost
    assert "2 GEMMs" not in theirs.loss_by and ours < theirs.counted_flops


@pytest.mark.usefixtures("light")
def test_losses_agree_under_adapters(configs: dict[str, TrainConfig], quiet: Console, tmp_path: Path) -> None:
    for name in ("sft", "dpo", "grpo"):
        curves = []
        for loss in ("fastloss", "torch"):
            config = replace(configs[name], loss=loss, out=str(tmp_path / name / loss))
            rows = RUNS[name](config, console=quiet).rows
            curves.append(torch.tensor([[row["loss"], row["grad_norm"]] for row in rows]))
        torch.testing.assert_close(*curves, rtol=1e-4, atol=1e-5)


def test_reference_is_the_base_and_no_second_copy(
    configs: dict[str, Any], base: Path, quiet: Console
) -> None:
    tok, config = chat.load(base), configs["dpo"]
    model = language_model(config, tok).eval()
    ref = reference(config, model)
    assert isinstance(ref, lora.Base) and ref.model is model
    with torch.no_grad():
        for key, p in model.named_parameters():
            if ".lora_B" in key:
                p.normal_()
    names = trained(model)
    ids, plain = torch.arange(5, 17)[None], load_model(str(base), "cpu").eval()
    assert torch.equal(hidden_states(ref, ids), hidden_states(plain, ids))
    assert not torch.allclose(hidden_states(model, ids), hidden_states(plain, ids), atol=1e-2)
    assert trained(model) == names

    data = pairs.prepare(config, tok, quiet)
    step = dpo.make_step(model, ref, dpo.LOSSES["fastloss"], data, config)
    apart = dpo.make_step(model, plain.requires_grad_(False), dpo.LOSSES["fastloss"], data, config)
    results = []
    for one in (step, apart):
        model.zero_grad()
        metrics = one(0)
        results.append([metrics["loss"], *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    assert len(results[0]) == 1 + len(names)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "targets"),
    [
        (LlamaConfig(**SMALL, tie_word_embeddings=True), ()),
        (LlamaConfig(**SMALL, tie_word_embeddings=False), ("embed_tokens", "q_proj")),
        (Gemma2Config(**SMALL, head_dim=8), ("q_proj", "v_proj")),
        (GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0), ()),
    ],
)
def test_merged_is_the_adapted_model(shape: Any, targets: tuple[str, ...], tmp_path: Path) -> None:
    """Tied heads, embeddings, GPT-2's transposed matrices; the model in training stays as it is."""
    config = SftConfig(lora_rank=2, lora_targets=targets)
    model: Any = build_model(shape, 0, "cpu").eval()
    lora.add(model, config, model.get_output_embeddings())
    with torch.no_grad():
        for key, p in model.named_parameters():
            if ".lora_" in key:
                p.normal_()
    ids = torch.arange(1, 9)[None]
    before = {key: p.clone() for key, p in model.named_parameters()}
    lora.merged(model).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-3, atol=1e-4
        )
    assert all(torch.equal(before[key], p) for key, p in model.named_parameters())


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd", "ignore:Model has `tie_word_embeddings")
def test_wrong_options_are_named() -> None:
    def add(tie: bool, **options: Any) -> None:
        model: Any = build_model(LlamaConfig(**SMALL, tie_word_embeddings=tie), 0, "cpu")
        lora.add(model, SftConfig(lora_rank=2, **options), model.get_output_embeddings())

    with pytest.raises(ValueError, match="lora_targets: expected modules of the body, got the head"):
        add(False, lora_targets=("lm_head", "q_proj"))
    with pytest.raises(ValueError, match="lora_targets: the embedding is tied to the head"):
        add(True, lora_targets=("embed_tokens",))
    with pytest.raises(ValueError, match=r"lora_targets: .*nothing_of_that_name"):
        add(False, lora_targets=("nothing_of_that_name",))
    griffin: Any = build_model(RecurrentGemmaConfig(**SMALL), 0, "cpu")
    config = SftConfig(lora_rank=16, lora_targets=("conv_1d",))
    with pytest.raises(ValueError, match=r"expected linear layers and embeddings, got \S*conv_1d"):
        lora.add(griffin, config, griffin.get_output_embeddings())
    with pytest.raises(ValueError, match="lora_rank: expected --keep-weights"):
        PretrainConfig(lora_rank=2)
    with pytest.raises(ValueError, match="keep_weights: expected --model"):
        PretrainConfig(keep_weights=True)
