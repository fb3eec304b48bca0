"""Makes tests/peers/golden/data again: ``python make_golden.py [family …]`` (all of them without a name).

A family whose peer is not installed is left as it is, and said so. README.md has the versions and how to install them.
"""

from __future__ import annotations

import importlib
import sys

FAMILIES = (
    "trl_dpo",
    "trl_kto",
    "trl_cpo_orpo",
    "trl_reward",
    "trl_sft",
    "trl_tpo",
    "trl_grpo",
    "trl_rloo",
    "trl_advantages",
    "trl_linear",
    "trl_distillation",
    "liger_preference",
    "liger_grpo",
    "liger_distillation",
    "verl_losses",
    "verl_rollout",
    "verl_distillation",
    "openrlhf_losses",
    "published",
)


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in FAMILIES]
    if unknown:
        print(f"expected names among {', '.join(FAMILIES)}, got {', '.join(unknown)}")
        return 2
    missing = 0
    for name in names or FAMILIES:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            print(f"{name}: left as it is: {error}")
            missing += 1
            continue
        module.main()
    return 1 if missing and names else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
