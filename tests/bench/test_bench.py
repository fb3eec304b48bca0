"""The benchmark itself, on small shapes."""

from __future__ import annotations

import json

import pytest
import torch

from fastloss.bench import measure, report
from fastloss.bench.cases import cases, data
from fastloss.bench.run import run_case


@pytest.mark.parametrize(
    "name", ["row-f32-16x2000-inplace-cold", "row-bf16-16x2000-new-warm", "linear-f32-32x16x500-frozen"]
)
def test_providers_agree_with_float64_and_the_limit_is_measured(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "FLUSH_BYTES", 1 << 20)
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    case = next(c for c in cases(quick=True) if c.name == name)
    result = run_case(case, repeats=2)
    measured = {p["name"]: p for p in result["providers"] if "reason" not in p}
    assert "fastloss[cpu]" in measured and "torch eager" in measured
    assert any(n.startswith("limit") and p["median"] > 0 for n, p in measured.items())
    for provider, p in measured.items():
        if "error" in p:
            assert p["error"] < (0.1 if case.dtype == torch.bfloat16 else 1e-4), provider


def test_a_known_allocation_is_found() -> None:
    kept = []
    peak = measure.peak_extra_bytes(lambda: kept.append(torch.empty(1 << 20) + torch.empty(1 << 20)), "cpu")
    assert 12 << 20 <= peak <= (12 << 20) + 4096


def test_the_head_holds_less_than_the_logits() -> None:
    case = next(c for c in cases(quick=True) if c.name == "linear-f32-32x16x500")._replace(rows=512)
    inputs = data(case, "cpu")
    import fastloss

    extra = measure.peak_extra_bytes(
        lambda: fastloss.linear_cross_entropy(
            inputs.hidden, inputs.weight, inputs.target, chunk_size=16
        ).backward(),
        "cpu",
    )
    assert extra - measure.gradient_bytes(case) < case.logits_bytes * 0.05 + 65536


def test_json_round_trip_and_compare(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    case = next(c for c in cases(quick=True) if c.name == "row-f32-16x2000-new-warm")
    results = {"machine": report.machine("cpu"), "quick": True, "cases": [run_case(case, repeats=2)]}
    report.save(results, tmp_path)
    loaded = json.loads((tmp_path / "results.json").read_text())
    assert all(ratio == 1.0 for *_, ratio in report.compare(loaded, results))
    assert len(report.compare(loaded, results)) == 3
    assert (tmp_path / "results.png").stat().st_size > 1000
    assert case.name in (tmp_path / "results.md").read_text()
