"""``fastloss info``."""

from __future__ import annotations

import platform

import torch

import fastloss


def info() -> None:
    """Which backends are here, and why one is not."""
    print(f"fastloss {fastloss.__version__}   torch {torch.__version__}   python {platform.python_version()}")
    print(
        f"threads {torch.get_num_threads()}   cpu capability (torch) {torch.backends.cpu.get_cpu_capability()}"
    )
    for name, state in fastloss.backends().items():
        print(f"  {name:<10} {state}")
    from fastloss.bench.internals import calibration_file, cpu_instruction_sets

    if (sets := cpu_instruction_sets()) is not None:
        print(f"  cpu kernels: {sets[0]} (compiled: {', '.join(sets[1])} run here)")
        found = calibration_file()
        if found.path is not None or found.reason:
            print(f"  calibration: {found.path or 'not used, ' + found.reason}")
    try:
        from fastloss import _build_info as build  # type: ignore[attr-defined]
    except ImportError:
        return
    for name in ("CPU", "CUDA"):
        part = getattr(build, name)
        print(
            f"  built {name}: {'yes' if part['built'] else 'no, ' + part['reason']}"
            + (f" (sm {part['archs']} + PTX)" if part.get("archs") else "")
        )
