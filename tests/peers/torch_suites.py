"""PyTorch's own generic test files, run from a checkout of its ``test`` folder, with the operator of its two entries of
cross-entropy replaced by fastloss's functions.

    python tests/peers/torch_suites.py CHECKOUT/test [--suite test_ops.py ...] [--lists FOLDER]

prints, for each file, how many tests pass for PyTorch itself and for fastloss, how many fastloss passes that the entry marks as
failing for PyTorch (its chunks under torch.func, say), and the tests that only PyTorch passes. The
checkout is best the tag of the installed torch; tests that its files cannot run with that torch fail for both.
The parts of these suites that need no checkout are test_opinfo_suites.py.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

SUITES = (
    "test_ops.py",
    "test_ops_gradients.py",
    "test_ops_fwd_gradients.py",
    "test_meta.py",
    "test_proxy_tensor.py",
    "test_decomp.py",
    "functorch/test_ops.py",
    "functorch/test_vmap.py",
    "functorch/test_aotdispatch.py",
)
NAMES = ("nn.functional.cross_entropy", "nn.functional.linear_cross_entropy")
SELECTION = "nn_functional_cross_entropy or nn_functional_linear_cross_entropy"
PROVIDER = "FASTLOSS_SUITES_PROVIDER"  # "torch" or "fastloss": this file is a pytest plugin then


def replace_operators() -> None:
    """Tests are made for the two entries alone, with fastloss's function as their operator if the provider is fastloss."""
    from torch.testing._internal import common_device_type, common_methods_invocations

    if os.environ[PROVIDER] == "fastloss":
        import fastloss

        for op in common_methods_invocations.op_db:
            if op.name in NAMES:
                op.op = getattr(fastloss, op.name.rsplit(".", 1)[1])
    original = common_device_type.ops

    def ops(op_list: Any, *args: Any, **kwargs: Any) -> Any:
        kept = [op for op in op_list if op.name in NAMES]
        return original(kept, *args, **kwargs) if kept else _not_ours

    common_device_type.ops = ops  # type: ignore[misc, assignment]
    _put_moved_names_back()


def _put_moved_names_back() -> None:
    """Where test files of an older release than the installed torch import them from."""
    from torch.testing._internal import common_device_type, common_methods_invocations, common_utils
    from torch.utils import _dtype_abbrs

    def skip_ops(*arguments: Any) -> Any:  # an older one was also told the names of the class and of the test
        return common_device_type.skipOps(arguments[-1])

    moved = {"skipOps": skip_ops} if hasattr(common_device_type, "skipOps") else {}
    moved |= {n: getattr(common_device_type, n) for n in ("skip", "xfail") if hasattr(common_device_type, n)}
    for name, value in moved.items():
        if not hasattr(common_methods_invocations, name):
            setattr(common_methods_invocations, name, value)
    if not hasattr(common_utils, "dtype_abbrs"):
        common_utils.dtype_abbrs = _dtype_abbrs.dtype_abbrs  # type: ignore[attr-defined]
    _give_samples_as_pairs()
    try:
        import common_utils as of_functorch  # in the checkout; it refuses operators that are no more
    except ImportError:
        return
    if "skipOps" in moved and hasattr(of_functorch, "skipOps"):
        of_functorch.skipOps = skip_ops
    if hasattr(of_functorch, "opsToleranceOverride"):
        of_functorch.opsToleranceOverride = lambda *_: lambda test: test  # of other operators than the two


def _give_samples_as_pairs() -> None:
    """Older files take a sample with one context, newer ones with two: that of its subtest, and that of its skips."""
    from torch.testing._internal.opinfo.core import OpInfo

    expected = Path("functorch/test_vmap.py")  # pytest runs in the checkout's test folder
    if not expected.exists() or "for sample_input, subtest_ctx in" not in expected.read_text():
        return
    original = OpInfo._sample_callback_fn

    def of(self: Any, use_subtests: bool, device: Any) -> Any:
        made = original(self, use_subtests, device)
        return made and (lambda *sample: made(*sample)[:2])

    OpInfo._sample_callback_fn = of  # type: ignore[method-assign]


def _not_ours(test: Any) -> Any:
    def skipped(self: Any, device: Any = None) -> None:
        self.skipTest("not of the two entries")

    skipped.__name__ = test.__name__
    return skipped


def run(folder: Path, suite: str, provider: str, lists: Path | None) -> dict[str, str]:
    """``passed``, ``failed``, ``skipped`` or ``beyond`` (expected to fail, and passes) of each test of a suite, by name."""
    here = Path(__file__).resolve()
    environment = dict(os.environ)
    environment[PROVIDER] = provider
    paths = [str(here.parent), str(here.parents[2]), str((folder / suite).parent), str(folder)]
    environment["PYTHONPATH"] = os.pathsep.join([*paths, environment.get("PYTHONPATH", "")])
    with TemporaryDirectory() as made:
        report = Path(made) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", here.stem, "-k", SELECTION]
        command += ["--noconftest", "-c", os.devnull, f"--rootdir={folder}", "-p", "no:cacheprovider"]
        command += [f"--junitxml={report}", "--tb=short", suite]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if lists is not None:
            (lists / f"{suite.replace('/', '_')}-{provider}.txt").write_text(done.stdout + done.stderr)
        if not report.exists():
            return {"(the file does not load)": "failed"}
        cases = ElementTree.parse(report).getroot().iter("testcase")
        return {f"{case.get('classname')}::{case.get('name')}": _outcome(case) for case in cases}


def _outcome(case: Any) -> str:
    kinds = {child.tag for child in case}
    if any("Unexpected success" in (x.get("message", "") + (x.text or "")) for x in case.iter("failure")):
        return "beyond"
    if kinds & {"failure", "error"}:
        return "failed"
    return "skipped" if "skipped" in kinds else "passed"


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the test folder of a checkout of PyTorch")
    parser.add_argument(
        "--suite", action="append", choices=SUITES, help="one file (again for more; default: all)"
    )
    parser.add_argument("--lists", type=Path, help="a folder for pytest's own reports")
    given = parser.parse_args()
    print(f"torch {torch.__version__}")
    print("| suite | torch | fastloss | beyond |\n| --- | --- | --- | --- |", flush=True)
    lost: list[str] = []
    for suite in given.suite or SUITES:
        theirs, ours = (run(given.folder, suite, name, given.lists) for name in ("torch", "fastloss"))
        passed = [[name for name, outcome in got.items() if outcome == "passed"] for got in (theirs, ours)]
        beyond = sum(outcome == "beyond" for outcome in ours.values())
        print(f"| {suite} | {len(passed[0])} | {len(passed[1])} | {beyond} |", flush=True)
        lost += [f"{suite}: {name}" for name in passed[0] if name not in passed[1]]
    print("\n".join(["", "PyTorch passes and fastloss does not:", *lost] if lost else []))


if __name__ == "__main__":
    main()
elif PROVIDER in os.environ:
    replace_operators()
