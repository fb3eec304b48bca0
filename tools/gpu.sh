#!/usr/bin/env bash
# One offline command for a machine with an NVIDIA GPU: builds into the current Python, runs the whole suite on the
# GPU, then the GPU benchmarks against the peers that are installed. Writes under benchmarks/results/.
#   tools/gpu.sh [arguments for fastloss bench]        PYTHON=... chooses the Python, OUT=... the results' folder
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}

"$python" - <<'PY' || exit 1
import importlib.util, sys
missing = [name for name in ("torch", "setuptools", "pybind11", "pytest") if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"gpu: {sys.executable} has no {', '.join(missing)}")
import torch
if not torch.cuda.is_available():
    sys.exit(f"gpu: torch {torch.__version__} sees no CUDA device: nothing was built, tested or measured")
print(f"gpu: {torch.cuda.get_device_name()}, torch {torch.__version__} (CUDA {torch.version.cuda})")
PY

FASTLOSS_REQUIRE_NATIVE=1 "$python" -m pip install --no-deps --no-build-isolation --no-index -e . || exit 1

fastloss() { "$python" -c 'from fastloss.cli import main; main()' "$@"; }
card=$("$python" -c 'import re, torch; print(re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower())')
out=${OUT:-benchmarks/results/$card}
mkdir -p "$out"
status=0

workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n "${WORKERS:-4}")
FASTLOSS_TEST_DEVICE=cuda "$python" -m pytest "${workers[@]}" tests 2>&1 | tee "$out/tests.txt" || status=1
fastloss info 2>&1 | tee "$out/info.txt" || status=1
fastloss bench --device cuda --out "$out" "$@" 2>&1 | tee "$out/bench.txt" || status=1

if [ $status = 0 ]; then echo "gpu: everything passed; results in $out"; else echo "gpu: something failed; see $out" >&2; fi
exit $status
