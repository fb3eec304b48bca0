"""All cases, and their tensors."""

from __future__ import annotations

import torch

from fastloss.bench import gpu
from fastloss.bench.case import Case, Data
from fastloss.bench.exact import Exact, cached
from fastloss.bench.kinds import KINDS


def cases(quick: bool = False, device: str = "cpu") -> list[Case]:
    """Of the device; ``quick`` keeps the kinds and shrinks the shapes."""
    if device == "cuda":
        return gpu.cases(quick)
    return [case for kind in KINDS.values() for case in kind.cases(quick)]


def data(case: Case, device: str) -> Data:
    """Seeded, and made on the device. What is as wide as the vocabulary or the model is in the case's dtype."""
    kind = KINDS[case.kind]
    with torch.device(device):
        tensors = kind.tensors(case, torch.Generator(device).manual_seed(0))
    leaves = () if case.nograd else kind.leaves(case)
    for name, tensor in tensors.items():
        wide = name in ("logits", "hidden", "weight", "ref_hidden", "ref_weight", "ref_logits")
        tensors[name] = tensor.to(case.dtype if wide else tensor.dtype)
    pristine = tensors["logits"].clone() if case.inplace else None
    if "logits" not in tensors or case.calls > 1:
        for name in leaves:
            tensors[name].requires_grad_()
    return Data(tensors, leaves, kind.kept(tensors), pristine)


def exact(case: Case, inputs: Data) -> Exact:
    """Loss and gradients in float64."""
    return cached(case, inputs, KINDS[case.kind].truth)
