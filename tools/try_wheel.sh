#!/usr/bin/env bash
# Each Python named gets an environment of its own with the wheel of dist/ that fits: fastloss info, the README's first example, and
# the quick tests, against what was installed. The environment is removed afterwards.
#   tools/try_wheel.sh python3.10 python3.11 …
# TORCH: which one (torch==2.13.0); TORCH_ARGS as for make setup. FASTLOSS_TRY_DIST: another folder of wheels (dist/cpu). FASTLOSS_TRY_TESTS: other tests.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
dist="${FASTLOSS_TRY_DIST:-$root/dist}"
read -ra torch <<<"${TORCH:-torch} ${TORCH_ARGS:-}"
read -ra tests <<<"${FASTLOSS_TRY_TESTS:-tests/test_docstrings.py tests/losses/test_bugs.py}"
failed=0
for python in "$@"; do
  work="$(mktemp -d)"
  tag="$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')"
  echo "== $tag: $("$python" --version)"
  (
    set -e
    "$python" -m venv --without-pip "$work/venv"
    python="$work/venv/bin/python"
    PIP_DISABLE_PIP_VERSION_CHECK=1 python3 -m pip --python "$python" install -q "${torch[@]}"
    PIP_DISABLE_PIP_VERSION_CHECK=1 python3 -m pip --python "$python" install -q "$dist"/fastloss-*-"$tag"-"$tag"-*.whl
    # Away from the checkout, so that the installed package is the one that is found.
    cp -r "$root/tests" "$root/README.md" "$root/pyproject.toml" "$root/tools" "$work/"
    cd "$work"
    "$python" -m fastloss info
    "$python" tools/first_example.py README.md
    PIP_DISABLE_PIP_VERSION_CHECK=1 python3 -m pip --python "$python" install -q pytest hypothesis numpy expecttest
    # Without the emulation of CUDA, which is compiled from the sources.
    "$python" -m pytest -q -p no:cacheprovider -k "not cuda" "${tests[@]}"
  ) || { echo "== $tag: FAILED"; failed=1; }
  rm -rf "$work"
done
exit "$failed"
