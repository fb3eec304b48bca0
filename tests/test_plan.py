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
LATENT = {
    **{k: v for k, v in SMALL.items() if k != "head_dim"},
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 48,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
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
    "gpt2": ("GPT2", {"vocab_size": 512, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    "deepseek": ("DeepseekV3", {**LATENT, "q_lora_rank": 24}),
    "deepseek, whole queries": ("DeepseekV3", {**LATENT, "q_lora_rank": None}),
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_flops_are_those_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    family, fields = MODELS[name]
    settings = getattr(transformers, family + "Config")(**fields)
    model = config.from_config(settings.to_dict())
    settings._attn_implementation = settings._experts_implementation = "eager"
    theirs = transformers.AutoModelForCausalLM.from_config(settings)
    assert model.total == sum(p.numel() for p in theirs.parameters())
    ids = torch.randint(0, 512, (2, 32))
    with FlopCounterMode(display=False) as counted:
        theirs(ids, labels=ids).loss.backward()
    forward = model.forward_flops(32, causal=False)
    assert counted.get_total_flops() == 3 * ids.numel() * sum(forward.values())


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
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(name: str) -> None:
    assert config.load(name).total == PUBLISHED[name]


def test_active_parameters_are_those_that_the_papers_name() -> None:
    assert config.load("deepseek-v3").active == pytest.approx(37e9, rel=0.02)
    assert config.load("qwen-3-30b-a3b").active == pytest.approx(3.3e9, rel=0.02)
    assert config.load("qwen-3-235b-a22b").active == pytest.approx(22e9, rel=0.02)


def test_llama_3_1_405b() -> None:
    """arXiv 2407.21783: 3.8e25 FLOPs for 15.6T tokens, 38-43% MFU; its model card: 30.84M H100 hours."""
    model, tokens = config.load("llama-3.1-405b"), 15.6e12
    assert formulas.six_nd(model, tokens) == pytest.approx(3.8e25, rel=0.005)
    counted = sum(formulas.stage_flops(model, "pretrain", tokens, 8192).values())
    assert counted == pytest.approx(3.8e25, rel=0.04)  # with the attention scores, without the embedding
    hours = [formulas.device_hours(counted, DEVICES["H100"], mfu) for mfu in (0.43, 0.38)]
    assert hours[0] / 30.84e6 > 0.8 and hours[1] / 30.84e6 < 1.0  # the rest of the hours: docs/plan.md


def test_deepseek_v3() -> None:
    """arXiv 2412.19437: 14.8T tokens, 2.664M H800 hours of pretraining at sequences of 4096."""
    model, tokens = config.load("deepseek-v3"), 14.8e12
    assert formulas.six_nd(model, tokens) == pytest.approx(6 * 37e9 * tokens, rel=0.02)
    counted = sum(formulas.stage_flops(model, "pretrain", tokens, 4096).values())
    mfu = counted / (2.664e6 * 3600 * DEVICES["H800"].flops)
    assert 0.38 < mfu < 0.40
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


def test_what_fastloss_holds_is_the_chunk_and_the_accumulator() -> None:
    model = config.load("llama-3-8b")
    layer = formulas.loss_layer(model, 8192)
    assert layer.chunk_rows < 8192
    chunk, accumulator = 2 * layer.chunk_rows * 128256, 2 * 128256 * 4096
    assert layer.fastloss_bytes == chunk + accumulator
    assert layer.torch_bytes == 14 * 8192 * 128256 > 4 * layer.fastloss_bytes


def test_activations_are_the_least_that_a_model_keeps() -> None:
    transformers = pytest.importorskip("transformers")
    settings = transformers.LlamaConfig(**{**SMALL, "hidden_size": 128, "intermediate_size": 384})
    settings._attn_implementation = "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(settings).to(torch.bfloat16)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.model(torch.randint(0, 512, (1, 256))).last_hidden_state
    measured = sum(storage.nbytes() for storage in kept.values())
    planned = formulas.activations(config.from_config(settings.to_dict()), 256, recompute=False)
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
    assert parallel.statistics_bytes == pytest.approx(2 * 7 / 8 * 12 * 100)
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
