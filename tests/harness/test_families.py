"""Every stage with every family of causal language models that transformers builds from a small config: it runs, or one line
says why not. The few that are here by default each have something of their own; FASTLOSS_TEST_SLOW=1 walks them all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import NAMES, saved, tiny
from stage_runs import run_case
from transformers import AutoModelForCausalLM, LlamaConfig, StableLmConfig
from transformers.utils import logging

from fastloss.harness import chat, export, lora, tokenizer
from fastloss.harness.config import RewardConfig, SftConfig
from fastloss.harness.start import scoring_model

# wrappers around vision or audio, whose sizes are not these
LARGE = {
    "blt", "dots3_note", "emu3", "fuyu", "gemma3", "gemma4", "gemma4_unified", "gemma4_unified_assistant", "git", "got_ocr2",
    "llama4", "mllama", "moss_transcribe_diarize", "phi4_multimodal", "qwen3_5", "qwen3_5_moe",
}  # fmt: skip
COMMON: dict[str, Any] = {
    "steps": 1, "warmup": 0, "save_every": 0, "batch_size": 2, "val_fraction": 0.25, "seq_len": 48,
}  # fmt: skip
SAMPLED: dict[str, Any] = {"reward": ["stage_runs:low_ids"], "max_new_tokens": 4, "evaluate": 2}
STAGES: dict[str, dict[str, Any]] = {
    "pretrain": {"stage": "pretrain", "keep_weights": True},
    "sft": {"stage": "sft", "exact": 2, "max_new_tokens": 4},
    "unpacked": {"stage": "sft", "exact": 0, "packing": False, "max_new_tokens": 4},
    "lora": {"stage": "sft", "exact": 0, "packing": False, "lora_rank": 2, "max_new_tokens": 4},
    "reward": {"stage": "reward"},
    "dpo": {"stage": "dpo"},
    "grpo": {"stage": "grpo", "group_size": 2, "beta": 0.1, **SAMPLED},
    "ppo": {"stage": "ppo", **SAMPLED},
}
# no classifier of transformers' own and a scaled head; experts in one tensor; packing refused
CHOSEN = [("cohere", "reward"), ("mixtral", "lora"), ("gpt_oss", "sft")]


@pytest.fixture(scope="module")
def tok() -> Any:
    return chat.wrap(
        tokenizer.train_bpe([f"hello world what is it? the answer is {i}" for i in range(200)], 400)
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file for all stages."""
    path = tmp_path_factory.mktemp("families") / "rows.jsonl"
    rows = []
    for i in range(8):
        said, other = ({"role": "assistant", "content": text} for text in (f"it is {i}", "no no"))
        rows.append(
            {"prompt": [{"role": "user", "content": f"what is {i}?"}], "completion": [said], "chosen": [said],
             "rejected": [other], "text": f"hello what is {i}? it is {i} hello " * 3}
        )  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def outcome(name: str, stage: str, tok: Any, data: Path, folder: Path) -> dict[str, Any]:
    logging.disable_progress_bar()
    try:
        model = saved(name, tok, folder / "model")
    except Exception as error:  # what transformers itself does not build or run from these sizes
        pytest.skip(f"{name}: {type(error).__name__}: {str(error)[:80]}")
    config = {"model": str(model), "data": [str(data)], "out": str(folder / "out"), **COMMON, **STAGES[stage]}
    return run_case(stage, config.pop("stage"), config)


def runs_or_says_why(got: dict[str, Any]) -> None:
    if "error" in got:  # run_case passes no other exceptions than ValueError and OSError
        kind, _, text = got["error"].partition(": ")
        assert kind == "ValueError" and text.split(":")[0] in ("model", "packing", "seq_len"), got["error"]
        assert "\n" not in text and len(text) < 300
    else:
        assert len(got["rows"]) == 1 and torch.isfinite(torch.tensor(got["rows"][0]["loss"]))


@pytest.mark.parametrize(("name", "stage"), CHOSEN)
def test_families_with_something_of_their_own(
    name: str, stage: str, tok: Any, data: Path, tmp_path: Path
) -> None:
    got = outcome(name, stage, tok, data, tmp_path)
    runs_or_says_why(got)
    assert ("error" in got) == (name == "gpt_oss")


@pytest.mark.slow  # an hour
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in LARGE])
def test_every_stage_with_every_family(name: str, stage: str, tok: Any, data: Path, tmp_path: Path) -> None:
    runs_or_says_why(outcome(name, stage, tok, data, tmp_path))


@pytest.mark.parametrize("name", ["cohere", "granite"])
def test_a_score_of_our_own_is_the_bodys(name: str, tok: Any, tmp_path: Path) -> None:
    """What transformers has no class for: the family's own body, the folder's weights, and a score that is saved."""
    logging.disable_progress_bar()
    folder = saved(name, tok, tmp_path / "model")
    model, score = scoring_model(RewardConfig(model=str(folder), seq_len=32), tok)
    body = AutoModelForCausalLM.from_pretrained(folder).base_model
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        expected = score(body(input_ids=ids).last_hidden_state)[:, -1]
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, expected)
        export.export(model, tok, tmp_path / "saved")
        again = type(model).from_pretrained(tmp_path / "saved")
        torch.testing.assert_close(again(input_ids=ids).logits, expected)
    assert type(model).__name__.endswith("ForSequenceClassification") and score.out_features == 1


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_adapters_of_experts_that_are_one_tensor(name: str, tok: Any, tmp_path: Path) -> None:
    """Merged, the weights give what the adapters give."""
    made: Any = AutoModelForCausalLM.from_config(tiny(name, len(tok))).eval()
    before = {n: p.detach().clone() for n, p in made.named_parameters()}
    ids = torch.arange(5, 15)[None]
    base = made(input_ids=ids).logits
    lora.add(made, SftConfig(lora_rank=2), made.get_output_embeddings())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for n, p in made.named_parameters():
            if "lora_B" in n:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
        adapted = made(input_ids=ids).logits
        assert float((adapted - base).abs().max()) > 1e-3
        export.export(made, tok, tmp_path)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(plain.eval()(input_ids=ids).logits, adapted, rtol=1e-4, atol=1e-5)
    changed = {n for n, p in plain.named_parameters() if not torch.equal(p, before[n])}
    assert {n for n in before if ".experts." in n} <= changed
    inner = lora.Base(made)
    with torch.no_grad():
        hidden = inner.base_model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(made.get_output_embeddings()(hidden), base, rtol=1e-4, atol=1e-5)


def test_sizes_that_transformers_cannot_run_are_one_line(tok: Any, data: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {
        "vocab_size": len(tok),
        "num_hidden_layers": 1,
        "intermediate_size": 16,
        "pad_token_id": 0,
    }
    # three of twelve are rotated: no pairs
    odd = StableLmConfig(hidden_size=24, num_attention_heads=2, num_key_value_heads=2, **common)
    heads = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=3, **common)
    for config in (odd, heads):
        folder = tmp_path / type(config).__name__
        config.save_pretrained(folder)
        tok.save_pretrained(folder)
        case = {**COMMON, "model": str(folder), "data": [str(data)], "out": str(tmp_path / "out")}
        got = run_case("pretrain", "pretrain", case)
        assert got["error"].startswith("ValueError: model: ") and "\n" not in got["error"], got
