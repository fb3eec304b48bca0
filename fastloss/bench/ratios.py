"""What follows from the times of one case: each provider's over the limit, over eager PyTorch, over fastloss."""

from __future__ import annotations

from typing import Any

LIMIT = "limit: "
# The same GEMMs over the rows with a loss alone: what a head that leaves out the others is to be seen against.
KEPT = "kept rows: "
# Not a limit, but what a fresh tensor costs whoever writes one: its page faults.
CLONE = "copy into a new tensor"
EAGER = "torch eager"
OURS = "fastloss"


def is_default(name: str) -> bool:
    """Whether a provider is fastloss as it comes: "fastloss[cpu]", not "fastloss[cpu], memory=fast"."""
    return name.startswith(OURS) and "," not in name


def add_ratios(case: dict[str, Any]) -> dict[str, Any]:
    """``case`` with the name of its limit, and with ratios in the entry of every provider that was measured."""
    measured = {p["name"]: p for p in case["providers"] if "reason" not in p}
    median = {name: p["median"] for name, p in measured.items()}
    floors = {name: time for name, time in median.items() if name.startswith(LIMIT)}
    if not floors and EAGER in median:
        floors = {EAGER: median[EAGER]}
    floor = min(floors, key=floors.__getitem__, default=None)
    kept = min((time for name, time in median.items() if name.startswith(KEPT)), default=None)
    ours = min((time for name, time in median.items() if is_default(name)), default=None)
    for name, entry in measured.items():
        if floor is not None:
            entry["over_limit"] = median[name] / floors[floor]
        if kept is not None:
            entry["over_kept"] = median[name] / kept
        if name.startswith((LIMIT, KEPT, CLONE)):
            continue
        if EAGER in median:
            entry["speedup_over_eager"] = median[EAGER] / median[name]
        if ours is not None and not name.startswith(OURS):
            entry["fastloss_speedup"] = median[name] / ours
    case["limit"] = floor
    return case
