"""The fuzzer by hand: ``python tests/fuzz/run.py --seconds 3600 --seed 0``; one case: ``--case 123``; ``--help`` has the rest."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))
    from fuzz_loop import main

    sys.exit(main())
