"""Golden vectors: what peers' own code computed (tests/peers/golden/README.md), against every backend.

Every ``*.json`` of tests/peers/golden/data is read, or of the folder (and its subfolders) that FASTLOSS_GOLDEN names.
"""

from __future__ import annotations

import inspect
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from backends_under_test import ALL, DEVICE, dtypes, need
from torch import Tensor

import fastloss

FOLDER = Path(os.environ.get("FASTLOSS_GOLDEN") or Path(__file__).parent / "golden" / "data")
FILES = sorted(FOLDER.rglob("*.json"))
REQUIRED = ("function", "peer", "inputs", "options", "outputs", "gradients", "tolerance")
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
}
PART = 12  # of the cases of a file, interpreted
SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Malformed(Exception):
    """A file that does not follow the format."""


def cases(path: Path) -> Iterator[dict[str, Any]]:
    """The cases of a file; what stands beside ``cases`` is every case's, ``inputs`` and ``options`` entry by entry."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Malformed(f"{path.name}: not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != 1:
        raise Malformed(f'{path.name}: expected an object with "format": 1')
    listed = content.pop("cases", [{}])
    if not isinstance(listed, list) or not listed or not all(isinstance(case, dict) for case in listed):
        raise Malformed(f'{path.name}: "cases": expected a list of objects')
    for i, own in enumerate(listed):
        case = {"name": str(i), "inputs": {}, "options": {}, "gradients": {}} | content | own
        for key in ("inputs", "options"):
            case[key] = content.get(key, {}) | own.get(key, {})
        case["inputs"] = {name: value for name, value in case["inputs"].items() if value is not None}
        missing = [key for key in REQUIRED if key not in case]
        if missing:
            raise Malformed(f"{path.name}: {case['name']}: expected {', '.join(missing)}")
        yield case


def read(name: str, value: Any, dtype: str | None) -> Tensor:
    """A tensor of a file; floating ones in the case's dtype where it names one."""
    try:
        own = DTYPES[value["dtype"]]
        numbers = [SPECIAL[x] if isinstance(x, str) else x for x in value["data"]]
        made = torch.tensor(numbers, dtype=own).reshape(value["shape"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise Malformed(f"{name}: expected dtype, shape and data of a tensor: {error!r}") from error
    return made.to(DTYPES[dtype]) if dtype and made.is_floating_point() else made


def precision(case: dict[str, Any]) -> torch.dtype:
    """That of the computation: the case's, else of its first floating input."""
    name = case.get("dtype") or next(
        (x["dtype"] for x in case["inputs"].values() if "float" in x["dtype"]), "float32"
    )
    return DTYPES[name]


def pick(result: Any, name: str) -> Any:
    """An output by its name: "result" of a bare tensor, a field, or an index into a tuple."""
    if isinstance(result, Tensor):
        assert name == "result", f"expected the output 'result' of a bare tensor, got {name!r}"
        return result
    return result[int(name)] if name.isdigit() else getattr(result, name)


def compare(name: str, actual: Any, expected: dict[str, Any], tolerance: dict[str, float]) -> list[str]:
    if "data" not in expected:  # a dict of outputs: metrics
        lines = [f"{name}[{key!r}]: there is none" for key in expected if key not in actual]
        for key in (key for key in expected if key in actual):
            lines += compare(f"{name}[{key!r}]", actual[key], expected[key], tolerance)
        return lines
    wanted = read(name, expected, None).double()
    got = torch.as_tensor(actual).detach().cpu().double()
    try:
        torch.testing.assert_close(got, wanted, equal_nan=True, **tolerance)
    except AssertionError as error:
        first = " ".join(str(error).split())
        return [
            f"{name}: {first} (got {got.flatten()[:6].tolist()}, expected {wanted.flatten()[:6].tolist()})"
        ]
    return []


def run(case: dict[str, Any], backend: str) -> list[str]:
    """What differs between fastloss and the case."""
    function = getattr(fastloss, case["function"], None)
    if not callable(function):
        return [f"fastloss has no function {case['function']!r}"]
    inputs = {name: read(name, value, case.get("dtype")).to(DEVICE) for name, value in case["inputs"].items()}
    for name in case["gradients"]:
        if name not in inputs:
            raise Malformed(f"gradients: {name!r} is not among the inputs")
        inputs[name].requires_grad_()
    given = {"backend": backend} if "backend" in inspect.signature(function).parameters else {}
    result = function(**inputs, **case["options"], **given)
    lines = []
    for name, expected in case["outputs"].items():
        tolerance = (
            case.get("metric_tolerance", case["tolerance"]) if name == "metrics" else case["tolerance"]
        )
        lines += compare(name, pick(result, name), expected, tolerance)
    if case["gradients"]:
        loss = result if isinstance(result, Tensor) else result.loss
        upstream = (
            read("upstream", case["upstream"], None).to(loss) if "upstream" in case else torch.ones_like(loss)
        )
        loss.backward(upstream)
        for name, expected in case["gradients"].items():
            grad = inputs[name].grad
            grad = torch.zeros_like(inputs[name]) if grad is None else grad
            lines += compare(f"gradient of {name}", grad, expected, case["tolerance"])
    return lines


def thinned(listed: list[dict[str, Any]], backend: str) -> list[dict[str, Any]]:
    """Triton's interpreter takes half a second a case: it gets a part of a long file, spread over it."""
    if backend != "triton" or DEVICE != "cpu" or os.environ.get("FASTLOSS_GOLDEN_ALL") or len(listed) <= PART:
        return listed
    return [listed[i * len(listed) // PART] for i in range(PART)]


def check(path: Path, backend: str) -> tuple[list[str], list[str]]:
    """(what is wrong, why cases could not run) of a file."""
    listed = list(cases(path))
    able = [case for case in listed if precision(case) in dtypes(backend)]
    wrong: list[str] = []
    unsupported = [] if able else [f"{backend} does not compute in {precision(listed[0])}"]
    for case in thinned(able, backend):
        try:
            lines = run(case, backend)
        except Malformed as error:
            raise Malformed(f"{path.name}: {case['name']}: {error}") from error
        except Exception as error:  # a peer's case that fails here is one line among the others
            if isinstance(error, RuntimeError) and "cannot run this call" in str(error):
                unsupported.append(f"{case['name']}: {error}")
                continue
            lines = [f"{type(error).__name__}: {error}"]
        wrong += [f"{path.name}: {case['name']}: {line}" for line in lines]
    return wrong, unsupported


def test_there_are_files() -> None:
    assert FILES, f"no golden files under {FOLDER}"


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FOLDER).with_suffix("")))
def test_golden(path: Path, backend: str) -> None:
    wrong, unsupported = check(path, need(backend))
    assert not wrong, f"{len(wrong)} differences\n" + "\n".join(wrong)
    if unsupported:
        pytest.skip(f"{len(unsupported)} of the cases, as {unsupported[0]}")


# --- the reader itself -------------------------------------------------------------------------------------------

GOOD = {
    "format": 1,
    "function": "cross_entropy",
    "peer": {"name": "torch", "version": "2", "where": "torch.nn.functional.cross_entropy"},
    "inputs": {
        "input": {"dtype": "float64", "shape": [1, 2], "data": [0.0, 0.0]},
        "target": {"dtype": "int64", "shape": [1], "data": [1]},
    },
    "options": {},
    "outputs": {"result": {"dtype": "float64", "shape": [], "data": [math.log(2)]}},
    "gradients": {"input": {"dtype": "float64", "shape": [1, 2], "data": [0.5, -0.5]}},
    "tolerance": {"rtol": 1e-12, "atol": 0.0},
}


def written(folder: Path, content: Any) -> Path:
    path = folder / "some.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_the_example_of_the_readme(tmp_path: Path) -> None:
    text = (Path(__file__).parent / "golden" / "README.md").read_text(encoding="utf-8")
    example = text.split("```json\n")[1].split("```")[0]
    assert check(written(tmp_path, example), "reference") == ([], [])


def test_a_file_is_read(tmp_path: Path) -> None:
    assert check(written(tmp_path, GOOD), "reference") == ([], [])


@pytest.mark.parametrize("key", ["outputs", "gradients"])
def test_a_wrong_number_is_found(tmp_path: Path, key: str) -> None:
    content = json.loads(json.dumps(GOOD))
    tensor = next(iter(content[key].values()))
    tensor["data"][0] += 1e-6
    wrong, _ = check(written(tmp_path, content), "reference")
    assert len(wrong) == 1 and wrong[0].startswith("some.json: 0: ")


def test_an_unknown_function_is_found(tmp_path: Path) -> None:
    wrong, _ = check(written(tmp_path, GOOD | {"function": "no_such_loss"}), "reference")
    assert wrong == ["some.json: 0: fastloss has no function 'no_such_loss'"]


@pytest.mark.parametrize(
    "content",
    ["{", "[]", {**GOOD, "format": 2}, {**GOOD, "cases": []}, {k: v for k, v in GOOD.items() if k != "tolerance"},
     {**GOOD, "inputs": {"input": {"dtype": "float64", "shape": [3], "data": [0.0]}}}],
    ids=["json", "object", "format", "cases", "missing", "tensor"],
)  # fmt: skip
def test_a_malformed_file_is_named(tmp_path: Path, content: Any) -> None:
    with pytest.raises(Malformed, match=r"some\.json"):
        check(written(tmp_path, content), "reference")


def test_cases_share_what_stands_beside_them(tmp_path: Path) -> None:
    content = GOOD | {
        "cases": [
            {"name": "sum", "options": {"reduction": "sum"}},
            {"name": "ignored", "inputs": {"target": {"dtype": "int64", "shape": [1], "data": [-100]}},
             "outputs": {"result": {"dtype": "float64", "shape": [], "data": ["nan"]}}, "gradients": {}},
        ]
    }  # fmt: skip
    assert check(written(tmp_path, content), "reference") == ([], [])
