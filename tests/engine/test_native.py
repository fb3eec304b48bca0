"""A native module is taken only if its tables are those of fastloss/tables.py; it checks what it is given."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from fastloss.engine.native import CpuContext, NativeBackend, check_tables, cpu_backend
from fastloss.tables import LSE_PARTS, NATIVE_TABLES, PairOptions, RowOptions


def module_with(**changed: tuple[str, ...]) -> ModuleType:
    module = ModuleType("built")
    module.tables = lambda: {name: list(changed.get(name, names)) for name, names in NATIVE_TABLES.items()}
    return module


def test_tables_that_differ_are_an_import_error() -> None:
    terms = NATIVE_TABLES["pair_terms"]
    check_tables(module_with())
    for changed, message in [
        (("sigmoid", "ipo", *terms[2:]), "expected 'hinge' as code 1 of 'pair_terms', got 'ipo'"),
        (terms[:-1], f"expected {terms[-1]!r} as code {len(terms) - 1} of 'pair_terms', got nothing"),
        ((*terms, "new"), f"expected nothing as code {len(terms)} of 'pair_terms', got 'new'"),
    ]:
        with pytest.raises(ImportError, match=message):
            NativeBackend("cpu", module_with(pair_terms=changed), CpuContext())
    with pytest.raises(ImportError, match="build it again"):
        check_tables(ModuleType("old"))


def test_module_that_is_not_there_says_so() -> None:
    backend = NativeBackend("cpu", ModuleType("nothing"), CpuContext(), "the native module is not there")
    assert backend.why_not() == "the native module is not there"
    assert backend.direct is None and not backend.has_head


needs_module = pytest.mark.skipif(bool(cpu_backend().why_not()), reason="the native CPU module is not built")


@needs_module
def test_memory_that_a_call_needs_cannot_be_0() -> None:
    module, x = cpu_backend().module, torch.zeros(3)
    place = x.data_ptr()
    rows = {
        "logits": place,
        "dtype": 0,
        "rows": 1,
        "vocab": 3,
        "row_stride": 3,
        "target": 0,
        "bias": 0,
        "row_scale": 0,
    }
    stats = dict.fromkeys((*NATIVE_TABLES["stats"], LSE_PARTS), 0)
    with pytest.raises(ValueError, match="logits: expected an address, got 0"):
        module.row_stats(**{**rows, "logits": 0}, options=RowOptions(), **stats, context=1)
    with pytest.raises(ValueError, match="target: logprobs and is_top1 need one"):
        module.row_stats(**rows, options=RowOptions(), **{**stats, "logprobs": place}, context=1)
    tensors = ("nll", "ref_chosen", "ref_rejected", "chosen_lengths", "rejected_lengths", "weight")
    each = ("beta_each", "smoothing_each", "margin_each")
    out = ("loss", "d_chosen", "d_rejected", "chosen_reward", "rejected_reward", "sums")
    given = {"chosen": place, "rejected": place, "dtype": 0, "pairs": 1, "context": 1, "d_nll": 0}
    given |= {"options": PairOptions(terms=((0, 1.0),))} | dict.fromkeys((*tensors, *each), 0)
    room = torch.zeros(8)
    given |= dict.fromkeys(out, room.data_ptr())
    for name in ("chosen", "rejected", *out):
        with pytest.raises(ValueError, match=f"{name}: expected an address, got 0"):
            module.pair_loss(**{**given, name: 0})
    given["options"] = PairOptions(terms=((0, 1.0),), beta=torch.ones(1))
    with pytest.raises(ValueError, match="beta: expected a number, or the address of one per pair"):
        module.pair_loss(**given)


@needs_module
def test_arguments_have_names() -> None:
    with pytest.raises(TypeError):
        cpu_backend().module.count_targets(0, 0, 5, -100)
    with pytest.raises(TypeError):
        cpu_backend().module.count_targets(target=0, n=0, vocab=5, ignored=-100)
