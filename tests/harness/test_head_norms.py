"""Tensor parallelism of families that normalise each head's queries and keys: two processes (gloo) are one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from stage_runs import apart, case
from test_distributed import lr_of, of_one, outcomes, same_run
from transformers import AutoModelForCausalLM, AutoTokenizer

FAMILIES = ("qwen3", "gemma3_text")


@pytest.mark.slow
def test_norms_of_heads_are_one_in_two_processes(
    stages: dict[str, dict[str, Any]], base: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    options, cases = {}, []
    for name in FAMILIES:
        folder = families.saved(name, tokenizer, tmp_path / name)
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():  # norms of ones would hide a gradient that is a part of the sum, for a step
            for parameter, x in model.named_parameters():
                if "q_norm" in parameter or "k_norm" in parameter:
                    x += torch.linspace(-0.5, 0.5, x.numel(), dtype=x.dtype)
        model.save_pretrained(folder)
        options[name] = stages["sft"] | {"model": str(folder)}
        cases.append(case(name, options[name], tmp_path / f"{name}-run", parallel="tp=2"))
        cases.append(
            case(
                f"{name}-again",
                options[name],
                tmp_path / f"{name}-again",
                parallel="tp=2",
                checkpoint_activations=True,
            )
        )
    got = outcomes(tmp_path, cases)
    for name in FAMILIES:
        one = of_one(
            options[name] | {"batch_size": options[name]["batch_size"] // 2}, tmp_path / f"{name}-one"
        )
        for runs in (got[name], got[f"{name}-again"]):
            same_run(runs[0], one)
            assert apart(runs[0], one) < 0.02 * lr_of(options[name])
            assert apart(runs[1], runs[0]) == 0
