#!/usr/bin/env bash
# The CPU kernels' tests on a build with AddressSanitizer and UndefinedBehaviorSanitizer.
# Reads csrc/cpu, writes only a temporary folder; also builds the 16-lane source for AVX2 (isa "wide16"), so that the
# AVX-512 path's logic runs on machines without AVX-512.
# Usage: tools/sanitize.sh [pytest arguments]        PLAIN=1: the wide16 build without sanitizers
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=python3

sanitize=(-O2 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer)
[ -n "${PLAIN:-}" ] && sanitize=(-O3)
flags=(-std=c++17 -fno-math-errno -ffp-contract=fast -fvisibility=hidden -fopenmp -fPIC -Wall -Wextra -Wno-psabi -I.. "${sanitize[@]}")
avx2=(-mavx2 -mfma -mf16c)
avx512=(-mavx512f -mavx512bw -mavx512dq -mavx512vl "${avx2[@]}")
cd "$root/csrc/cpu"
per_isa=" $("$python" -c 'import sys; sys.path.insert(0, "../../tools"); import build_native; print(*build_native.PER_ISA)') "
compile() { echo "g++ ${flags[*]} $*"; }
for source in *.cpp; do
  if [[ $per_isa == *" $source "* ]]; then
    compile -DFASTLOSS_ISA=avx512 "${avx512[@]}" -c "$source" -o "$build/$source.avx512.o"
    compile -DFASTLOSS_ISA=avx2 "${avx2[@]}" -c "$source" -o "$build/$source.avx2.o"
    compile -DFASTLOSS_ISA=generic -c "$source" -o "$build/$source.generic.o"
    compile -DFASTLOSS_ISA=wide16 -DFASTLOSS_VECTOR_BYTES=64 "${avx2[@]}" -c "$source" -o "$build/$source.wide16.o"
  else
    compile -DFASTLOSS_W16_TEST $("$python" -m pybind11 --includes) -c "$source" -o "$build/$source.o"
  fi
done | xargs -P "$(nproc)" -I{} sh -c '{}'
g++ -shared "${flags[@]}" "$build"/*.o -o "$build/_cpu.so"

export FASTLOSS_CPU_MODULE=$build/_cpu.so
if [ -z "${PLAIN:-}" ]; then
  export ASAN_OPTIONS=detect_leaks=0:${ASAN_OPTIONS:-} UBSAN_OPTIONS=print_stacktrace=1
  export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
fi
cd "$root"
# Everything that calls the native module: its kernels on every instruction set, then what calls it with tensors.
"$python" -m pytest -q -p no:cacheprovider tests/kernels/test_cpu_kernels.py tests/kernels/test_cpu_math.py tests/kernels/test_cpu_head.py \
  tests/engine/test_head.py tests/engine/test_direct_pairs.py tests/engine/test_direct_policy.py "$@"
"$python" -m pytest -q -p no:cacheprovider tests/kernels/test_pairs_kernels.py tests/kernels/test_policy_kernels.py \
  tests/kernels/test_scan_kernels.py -k cpu "$@"
