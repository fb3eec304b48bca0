"""The planner, against parameters and FLOPs that are counted, and against published runs."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("rich")
typer = pytest.importorskip("typer")
from typer.testing import CliRunner  # noqa: E402

from fastloss.bench import memory  # noqa: E402
from fastloss.cli.plan import amount, plan  # noqa: E402
from fastloss.plan import config, formulas, report  # noqa: E402
from fastloss.plan.hardware import DEVICES  # noqa: E402

APP = typer.Typer()
APP.command()(plan)

SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
ROUTED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 48,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
LATENT = {
    **{k: v for k, v in SMALL.items() if k != "head_dim"},
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    **ROUTED,
}
QWEN_MOE = {**SMALL, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
MODELS = {
    "llama": ("Llama", SMALL),
    "llama, tied": ("Llama", {**SMALL, "tie_word_embeddings": True}),
    "llama, biases": ("Llama", {**SMALL, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", SMALL),
    "mixtral": ("Mixtral", {**SMALL, "num_local_experts": 4}),
    "qwen2": ("Qwen2", SMALL),
    "qwen3": ("Qwen3", SMALL),
    "qwen3 moe": (
        "Qwen3Moe",
        {**SMALL, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    ),
    "gemma": ("Gemma", SMALL),
    "gemma2": ("Gemma2", SMALL),
    "mistral, windows": ("Mistral", {**SMALL, "sliding_window": 8}),
    "qwen2, windows in the later layers": (
        "Qwen2",
        {**SMALL, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen2 moe": ("Qwen2Moe", {**QWEN_MOE, "shared_expert_intermediate_size": 80}),
    "qwen2 moe, some layers dense": (
        "Qwen2Moe",
        {**QWEN_MOE, "shared_expert_intermediate_size": 80, "mlp_only_layers": [1], "qkv_bias": False},
    ),
    "qwen2 moe, windows": (
        "Qwen2Moe",
        {**QWEN_MOE, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ),
    "qwen3 moe, every second layer": ("Qwen3Moe", {**QWEN_MOE, "decoder_sparse_step": 2}),
    "gemma3": ("Gemma3Text", {**SMALL, "num_hidden_layers": 7, "sliding_window": 8}),
    "gpt oss": ("GptOss", {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}),
    "phi3": ("Phi3", {**{k: v for k, v in SMALL.items() if k != "head_dim"}, "pad_token_id": 0}),
    "glm4 moe": ("Glm4Moe", {**SMALL, **ROUTED, "use_qk_norm": True, "attention_bias": True}),
    "glm4 moe, two shared experts": ("Glm4Moe", {**SMALL, **ROUTED, "n_shared_experts": 2}),
    "deepseek v2": ("DeepseekV2", {**LATENT, "q_lora_rank": 24}),
    "deepseek v2, whole queries": ("DeepseekV2", {**LATENT, "q_lora_rank": None, "n_shared_experts": 2}),
    "gpt2": ("GPT2", {"vocab_size": 512, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    "deepseek": ("DeepseekV3", {**LATENT, "q_lora_rank": 24}),
    "deepseek, whole queries": ("DeepseekV3", {**LATENT, "q_lora_rank": None}),
}


def _config(family: str):  # type: ignore[no-untyped-def]
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, family + "Config"):
        pytest.skip(f"this transformers has no {family}")
    return getattr(transformers, family + "Config")


def _theirs(name: str, attention: str = "eager"):  # type: ignore[no-untyped-def]
    """The planner's model and the one that transformers builds from the same config."""
    transformers = pytest.importorskip("transformers")
    family, fields = MODELS[name]
    settings = _config(family)(**fields)
    model = config.from_config(settings.to_dict())
    settings._attn_implementation, settings._experts_implementation = attention, "eager"
    return model, transformers.AutoModelForCausalLM.from_config(settings)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_flops_are_those_of_transformers(name: str) -> None:
    model, theirs = _theirs(name)
    assert model.total == sum(p.numel() for p in theirs.parameters())
    ids = torch.randint(0, 512, (2, 32))
    with FlopCounterMode(display=False) as counted:
        theirs(ids, labels=ids).loss.backward()
    forward = model.forward_flops(32, causal=False)
    assert counted.get_total_flops() == 3 * ids.numel() * sum(forward.values())


def _visible_keys_alone(module, query, key, value, attention_mask, scaling, **_):  # type: ignore[no-untyped-def]
    """Attention that multiplies a query with the keys that its mask shows, and with no other."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    rows = []
    for t in range(query.shape[2]):
        seen = attention_mask[0, 0, t] == 0
        weights = (query[:, :, t : t + 1] @ key[:, :, seen].transpose(2, 3) * scaling).softmax(-1)
        rows.append(weights @ value[:, :, seen])
    return torch.cat(rows, 2).transpose(1, 2), None


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_of_the_keys_that_the_mask_shows(name: str) -> None:
    pytest.importorskip("transformers")
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    AttentionInterface.register("visible", _visible_keys_alone)
    AttentionMaskInterface.register("visible", eager_mask)
    model, theirs = _theirs(name, "visible")
    ids = torch.randint(0, 512, (1, 32))
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        theirs(ids)
    assert counted.get_total_flops() == 32 * sum(model.forward_flops(32).values())
    assert (model.window == 8 and model.window_layers > 0) == (MODELS[name][1].get("sliding_window") == 8)


@pytest.mark.parametrize("name", ["deepseek", "glm4 moe"])
def test_multi_token_prediction_is_a_layer_a_projection_and_the_head_again(name: str) -> None:
    """As arXiv 2412.19437, section 2.2, built from transformers' own layer; transformers leaves these layers out."""
    transformers = pytest.importorskip("transformers")
    family, fields = MODELS[name]
    settings = _config(family)(**fields, num_nextn_predict_layers=1)
    model = config.from_config(settings.to_dict())
    assert model.mtp == 1
    settings._attn_implementation = settings._experts_implementation = "eager"
    main = transformers.AutoModelForCausalLM.from_config(settings)
    layer = type(main.model.layers[-1])(settings, settings.num_hidden_layers - 1)
    norms = [torch.nn.RMSNorm(64) for _ in range(3)]
    project = torch.nn.Linear(128, 64, bias=False)
    hidden, following = torch.randn(2, 1, 32, 64)
    places = main.model.rotary_emb(hidden, torch.arange(32)[None])
    mask = torch.full((32, 32), float("-inf")).triu(1)[None, None]
    with FlopCounterMode(display=False) as counted:
        joined = project(torch.cat((norms[0](hidden), norms[1](following)), -1))
        out = layer(joined, attention_mask=mask, position_embeddings=places)
        main.lm_head(norms[2](out))
    parts = torch.nn.ModuleList([layer, *norms, project])
    assert model.mtp_parameters() == sum(p.numel() for p in parts.parameters())
    assert counted.get_total_flops() == 32 * sum(model.mtp_flops(32, causal=False).values())


def test_multi_token_prediction_is_paid_for_in_pretraining_alone() -> None:
    fields = {"model_type": "deepseek_v3", **LATENT, "q_lora_rank": 24}
    plain, more = (config.from_config({**fields, "num_nextn_predict_layers": n}) for n in (0, 2))
    assert plain.total == more.total and plain.active == more.active
    costs = [sum(formulas.stage_flops(m, "pretrain", 1.0, 64).values()) for m in (plain, more)]
    assert costs[1] - costs[0] == pytest.approx(3 * sum(more.mtp_flops(64).values()))
    assert more.mtp_flops(64)["head"] == 2 * plain.forward_flops(64)["head"]
    assert formulas.stage_flops(plain, "sft", 1.0, 64) == formulas.stage_flops(more, "sft", 1.0, 64)
    held = [formulas.memory(m, 1, 64, True) for m in (plain, more)]
    assert held[1]["weights"] - held[0]["weights"] == 2 * more.mtp_parameters()
    losses = [
        report.plan(report.Request(more, {s: 1e9}))["loss_layer"]["losses"] for s in ("pretrain", "sft")
    ]
    assert losses == [3, 1]


def test_keys_of_a_window() -> None:
    """Mistral 7B at 32768 tokens: 3840 keys a query, not 16384 (NVIDIA/Megatron-LM#831, AI-Hypercomputer/maxtext#1972)."""
    forward = config.load("mistral-7b").forward_flops(32768)
    assert forward["scores"] == pytest.approx(32 * 2 * 32 * 256 * 3840, rel=1e-3)
    short = config.load("mistral-7b").forward_flops(2048)
    assert short["scores"] == 32 * 2 * 32 * 256 * 2049 / 2  # no sequence is longer than the window
    gemma = config.load("gemma-3-27b")
    assert (gemma.window, gemma.window_layers, gemma.layers) == (1024, 52, 62)
    oss = config.load("gpt-oss-120b").forward_flops(131072)["scores"]
    assert oss / (36 * 2 * 64 * 128 * 65536.5) == pytest.approx(
        0.501, abs=1e-3
    )  # half of the layers see 128 keys


@pytest.mark.parametrize("name", MODELS)
def test_windows_are_read_from_configs_that_do_not_list_their_layers(name: str) -> None:
    """As on the hub, where few configs have layer_types; transformers fills them in by the same rules."""
    family, fields = MODELS[name]
    full = _config(family)(**fields).to_dict()
    short = {key: value for key, value in full.items() if key != "layer_types"}
    assert config.from_config(short) == config.from_config(full)


def test_windows_that_are_switched_off() -> None:
    switched_off = {"model_type": "qwen2", **SMALL, "sliding_window": 8, "max_window_layers": 0}
    assert config.from_config({**switched_off, "use_sliding_window": False}).window_layers == 0
    assert config.from_config({"model_type": "mistral", **SMALL, "sliding_window": None}).window == 0


def test_the_text_part_of_a_model_that_sees() -> None:
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
    }
    whole = {"model_type": "gemma3", "text_config": {**text, "sliding_window": 1024}, "vision_config": {}}
    assert config.from_config(whole, "x") == config.from_config(
        {"model_type": "gemma3_text", **config.PRESETS["gemma-3-4b"]}, "x"
    )


PUBLISHED = {
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "qwen-3-0.6b": 596_049_920,
    "qwen-3-8b": 8_190_735_360,
    "qwen-3-30b-a3b": 30_532_122_624,
    "deepseek-v3": 671_026_419_200
    - 58 * 256,  # the files also count the routers' bias, which no gradient trains
    "gpt-2": 124_439_808,
    "mistral-7b": 7_241_732_096,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-1b": 999_885_952,
    "deepseek-v2": 235_741_434_880,
    "deepseek-v2-lite": 15_706_484_224,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(name: str) -> None:
    assert config.load(name).total == PUBLISHED[name]


def test_active_parameters_are_those_that_the_papers_name() -> None:
    assert config.load("deepseek-v3").active == pytest.approx(37e9, rel=0.02)
    assert config.load("qwen-3-30b-a3b").active == pytest.approx(3.3e9, rel=0.02)
    assert config.load("qwen-3-235b-a22b").active == pytest.approx(22e9, rel=0.02)

    assert config.load("deepseek-v2").active == pytest.approx(21e9, rel=0.02)
    assert config.load("qwen-2-57b-a14b").active == pytest.approx(14e9, rel=0.02)
    assert config.load("qwen-2-57b-a14b").total == pytest.approx(57.4e9, rel=0.001)
    assert config.load("mixtral-8x7b").active == pytest.approx(12.9e9, rel=0.002)
    assert config.load("mixtral-8x7b").total == pytest.approx(46.7e9, rel=0.001)
    assert config.load("kimi-k2").active == pytest.approx(32.6e9, rel=0.01)


def test_parts_that_the_papers_name() -> None:
    """gpt-oss (arXiv 2508.10925, table 1; active without the embedding), Gemma 3 (arXiv 2503.19786, table 1: all but the
    embedding), DeepSeek-V3 (its README_WEIGHTS: the MTP module's own parameters), GLM-4.5 (arXiv 2508.06471, table 1: with
    the MTP layer, without embedding and head)."""
    for name, total, active, mlp in (("120b", 116.83, 5.13, 114.71), ("20b", 20.91, 3.61, 19.12)):
        model = config.load(f"gpt-oss-{name}")
        parts = model.parameters()
        assert model.total == pytest.approx(total * 1e9, abs=0.006e9)
        assert model.active - parts["embedding"] == pytest.approx(active * 1e9, abs=0.006e9)
        assert parts["mlp"] + parts["router"] == pytest.approx(mlp * 1e9, rel=0.001)
    for name, rest in (("1b", 698e6), ("4b", 3209e6), ("12b", 10759e6), ("27b", 25600e6)):
        model = config.load(f"gemma-3-{name}")
        assert model.total - model.parameters()["embedding"] == pytest.approx(rest, rel=1e-3)
    deepseek = config.load("deepseek-v3")
    projection, further = 2 * 7168**2, deepseek.mtp_flops(1)  # which its figures leave out: 0.10B
    assert deepseek.mtp_parameters() - projection == pytest.approx(11.5e9, rel=0.001)
    met = (further["matrices"] + further["head"]) / 2 - projection
    assert met == pytest.approx(1.5e9, rel=0.01)
    assert deepseek.active - deepseek.parameters()["embedding"] == pytest.approx(36.6e9, rel=0.001)
    glm = config.load("glm-4.5")
    ends = glm.parameters()["embedding"] + glm.parameters()["head"]
    assert glm.total + glm.mtp_parameters() - ends == pytest.approx(355e9, rel=0.002)
    assert glm.active + glm.mtp_flops(1)["matrices"] / 2 - ends == pytest.approx(32e9, rel=0.02)


def test_llama_3_1_405b() -> None:
    """arXiv 2407.21783: 3.8e25 FLOPs for 15.6T tokens, 38-43% MFU; its model card: 30.84M H100 hours."""
    model, tokens = config.load("llama-3.1-405b"), 15.6e12
    assert formulas.six_nd(model, tokens) == pytest.approx(3.8e25, rel=0.005)
    counted = sum(formulas.stage_flops(model, "pretrain", tokens, 8192).values())
    assert counted == pytest.approx(3.8e25, rel=0.04)  # with the attention scores, without the embedding
    hours = [formulas.device_hours(counted, DEVICES["H100"], mfu) for mfu in (0.43, 0.38)]
    assert hours[0] / 30.84e6 > 0.8 and hours[1] / 30.84e6 < 1.0  # the rest of the hours: docs/plan.md


def test_deepseek_v3() -> None:
    """arXiv 2412.19437: 14.8T tokens, 2.664M H800 hours of pretraining at sequences of 4096, one further token predicted."""
    model, tokens = config.load("deepseek-v3"), 14.8e12
    assert formulas.six_nd(model, tokens) == pytest.approx(6 * 37e9 * tokens, rel=0.02)
    counted = sum(formulas.stage_flops(model, "pretrain", tokens, 4096).values())
    mfu = counted / (2.664e6 * 3600 * DEVICES["H800"].flops)
    assert 0.40 < mfu < 0.42
    assert formulas.device_hours(counted, DEVICES["H800"], mfu) == pytest.approx(2.664e6)


def test_stages_count_their_models_and_passes() -> None:
    model = config.load("llama-3-8b")
    forward = model.forward_flops(1024)
    sft, dpo, reward, grpo = (
        formulas.stage_flops(model, stage, 10.0, 1024) for stage in ("sft", "dpo", "reward", "grpo")
    )
    assert sum(sft.values()) == pytest.approx(30 * sum(forward.values()))
    assert sum(dpo.values()) == pytest.approx(40 * sum(forward.values()))
    assert reward["head"] == 0 and reward["scores"] == sft["scores"]
    assert sum(grpo.values()) == pytest.approx(60 * sum(forward.values()))
    assert formulas.generation_flops(model, "grpo", 10.0, 1024) == pytest.approx(10 * sum(forward.values()))
    assert formulas.generation_flops(model, "sft", 10.0, 1024) == 0


def test_what_pytorchs_loss_holds_at_its_peak_is_measured() -> None:
    rows, vocab = 512, 2048
    hidden, weight = (torch.randn(n, 8, dtype=torch.bfloat16, requires_grad=True) for n in (rows, vocab))
    target = torch.randint(0, vocab, (rows,))

    def step() -> object:
        logits = F.linear(hidden, weight)

        def loss(logits: torch.Tensor) -> torch.Tensor:  # transformers.loss.loss_utils.ForCausalLMLoss
            logits = logits.float()
            return F.cross_entropy(logits, target)

        value = loss(logits)
        value.backward()
        return value, logits  # the model's output keeps its logits

    found = memory.peak(step, "cpu").allocated
    assert found == pytest.approx(formulas.TORCH_PEAK * rows * vocab, rel=0.01)


def test_a_second_loss_waits_for_the_backward_with_its_log_softmax() -> None:
    rows, vocab = 512, 4096
    hidden, further = (torch.randn(rows, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    weight = torch.randn(vocab, 8, dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(0, vocab, (rows,))

    def loss(hidden: torch.Tensor, kept: list[torch.Tensor]) -> torch.Tensor:
        logits = F.linear(hidden, weight)
        kept.extend([logits] * (hidden is not further))  # the model's output keeps its logits, not the others
        return F.cross_entropy(logits.float(), target)

    def step() -> object:
        kept: list[torch.Tensor] = []
        (loss(hidden, kept) + loss(further, kept)).backward()
        return kept

    found = memory.peak(step, "cpu").allocated
    bytes_per_logit = formulas.TORCH_PEAK + formulas.TORCH_WAITING
    assert found == pytest.approx(bytes_per_logit * rows * vocab, rel=0.02)


@pytest.mark.parametrize(("rows", "chunk_rows", "times"), [(8192, 8192, 6), (32768, 8192, 18)])
def test_what_fastloss_holds_is_the_chunk_and_the_accumulator(rows: int, chunk_rows: int, times: int) -> None:
    model = config.load("llama-3-8b")
    layer = formulas.loss_layer(model, rows)
    assert layer.chunk_rows == chunk_rows
    chunk, accumulator = 2 * layer.chunk_rows * 128256, 2 * 128256 * 4096 * (rows > chunk_rows)
    assert layer.fastloss_bytes == chunk + accumulator
    assert layer.torch_bytes == 14 * rows * 128256 > times * layer.fastloss_bytes


def test_activations_are_the_least_that_a_model_keeps() -> None:
    transformers = pytest.importorskip("transformers")
    settings = transformers.LlamaConfig(**{**SMALL, "hidden_size": 128, "intermediate_size": 384})
    settings._attn_implementation = "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(settings).to(torch.bfloat16)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}
    matrices: set[tuple[int, ...]] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        matrices.add(tuple(tensor.shape[-2:]))
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.model(torch.randint(0, 512, (1, 256))).last_hidden_state
    measured = sum(storage.nbytes() for storage in kept.values())
    planned = formulas.activations(config.from_config(settings.to_dict()), 256, recompute=False)
    if (256, 256) in matrices:
        pytest.skip(
            "this torch's attention keeps the probabilities of all pairs of tokens, as 2.8's in bfloat16 on a CPU"
        )
    assert output.requires_grad and 1.0 < measured / planned < 1.8  # transformers' norms keep float32 copies
    assert formulas.activations(config.from_config(settings.to_dict()), 256, recompute=True) < planned / 2


def _ring(devices: int) -> int:
    """Parts that each device of a ring sends until all have the sum of all, counted."""
    have = [[{d} for _ in range(devices)] for d in range(devices)]
    sent = 0
    for step in range(2 * (devices - 1)):
        moved = [(d, (d - step) % devices) for d in range(devices)]
        parts = [set(have[d][part]) for d, part in moved]
        for (d, part), what in zip(moved, parts):
            have[(d + 1) % devices][part] |= what
        sent += 1
    assert all(part == set(range(devices)) for device in have for part in device)
    return sent


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_a_ring_sends_what_the_formula_says(devices: int) -> None:
    link = formulas.Link(node=1e9, network=1e8, latency=1e-6)
    sent, seconds = formulas.all_reduce(800.0, devices, link)
    steps = _ring(devices)
    assert sent == pytest.approx(steps * 800.0 / devices)
    assert seconds == pytest.approx(sent / 1e9 + steps * 1e-6)


def test_past_a_node_the_network_is_paid_for_an_eighth_of_the_message() -> None:
    link = formulas.Link(node=1e9, network=1e8, latency=0.0)
    inside, t_inside = formulas.all_reduce(800.0, 8, link)
    sent, seconds = formulas.all_reduce(800.0, 32, link)
    assert sent - inside == pytest.approx(2 * 3 / 4 * 100.0)
    assert seconds - t_inside == pytest.approx((sent - inside) / 1e8)
    model = config.load("llama-3-8b")
    parallel = formulas.vocabulary_parallel(model, 100, 8, link)
    assert parallel.statistics_bytes == pytest.approx(7 * 12 * 100)
    assert parallel.state_bytes == pytest.approx(18 * 128256 / 8 * 4096)
    timed = [formulas.vocabulary_parallel(model, 8192, n, link, speed=4e14) for n in (1, 8)]
    assert timed[0].seconds == timed[0].gemm_seconds == pytest.approx(6 * 8192 * 128256 * 4096 / 4e14)
    assert timed[1].gemm_seconds == pytest.approx(timed[0].gemm_seconds / 8)
    assert timed[1].seconds == pytest.approx(
        timed[1].gemm_seconds + timed[1].statistics_seconds + timed[1].gradient_seconds
    )
    assert parallel.gradient_bytes == pytest.approx(2 * 7 / 8 * 2 * 4096 * 100)
    assert parallel.gather_bytes == pytest.approx(7 / 8 * 2 * 128256 * 100)
    assert formulas.all_reduce(800.0, 1, link) == (0.0, 0.0)


def test_memory_adds_up() -> None:
    model = config.load("llama-3-8b")
    whole, spread = (formulas.memory(model, shards, 4096, True) for shards in (1, 8))
    assert whole["weights"] + whole["gradients"] + whole["optimizer"] == 18 * model.total
    assert spread["optimizer"] == pytest.approx(whole["optimizer"] / 8)
    assert whole["gathered_layer"] == 0 and spread["gathered_layer"] > 0
    assert spread["activations"] == whole["activations"]


def test_the_command_prints_and_gives_json(tmp_path) -> None:
    arguments = ["llama-3-8b", "--tokens", "15T", "--stage", "dpo=50M", "--price", "2.5", "--devices", "1024"]
    shown = CliRunner().invoke(APP, arguments)
    assert shown.exit_code == 0, shown.output
    for word in ("pretrain", "dpo", "8.03B", "loss layer", "vocabulary-parallel", "1024"):
        assert word in shown.output
    assert "…" not in shown.output
    found = json.loads(CliRunner().invoke(APP, [*arguments, "--json"]).output)
    stage = found["stages"][0]
    assert stage["cost"] == pytest.approx(2.5 * stage["device_hours"])
    assert stage["days"] == pytest.approx(stage["device_hours"] / 1024 / 24)
    assert [p["devices"] for p in found["vocabulary_parallel"]] == list(report.WIDTHS)


def test_a_folder_and_another_vocabulary(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SMALL}))
    run = CliRunner().invoke(APP, [str(tmp_path), "--tokens", "1M", "--vocab", "1024", "--json"])
    assert run.exit_code == 0, run.output
    assert json.loads(run.output)["model"]["parameters"]["head"] == 1024 * 64


def test_generation_at_its_own_speed_takes_longer() -> None:
    base = {"model": config.load("gpt-2"), "stages": {"grpo": 1e9}}
    same = report.plan(report.Request(**base, mfu=0.4))["stages"][0]["device_hours"]
    slow = report.plan(report.Request(**base, mfu=0.4, generation_mfu=0.04))["stages"][0]["device_hours"]
    assert slow == pytest.approx(same * (5 / 6 + 10 / 6))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["llama-3-9b", "--tokens", "1T"], "llama-3-8b"),
        (["gpt-2"], "--stage"),
        (["gpt-2", "--tokens", "many"], "15.6T"),
        (["gpt-2", "--tokens", "1e"], "15.6T"),
        (["gpt-2", "--stage", "rlhf=1M"], "grpo"),
        (["gpt-2", "--stage", "dpo=1M", "--stage", "dpo=2M"], "got it twice"),
        (["gpt-2", "--tokens", "1M", "--stage", "pretrain=2M"], "--tokens is pretrain's"),
        (["gpt-2", "--tokens", "1M", "--hardware", "TPU"], "MI300X"),
        (["gpt-2", "--tokens", "1M", "--mfu", "1.5"], "share of the peak"),
    ],
)
def test_wrong_options_are_named(arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    run = CliRunner().invoke(APP, arguments)
    assert run.exit_code == 2 and said in run.output


def test_configs_that_do_not_fit_are_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="model_type"):
        config.from_config({"model_type": "bert"})
    with pytest.raises(ValueError, match="hidden_size"):
        config.from_config({"model_type": "llama", "vocab_size": 5})
    broken = tmp_path / "config.json"
    broken.write_text("{")
    with pytest.raises(ValueError, match="JSON"):
        config.load(str(broken))


def test_amounts() -> None:
    assert amount("15.6T", "x") == 15.6e12 and amount("2e3", "x") == 2000 and amount("7m", "x") == 7e6
