"""Set before anything imports triton or fastloss: the device of the suite, the interpreter, the threads, the seeds.

FASTLOSS_TEST_DEVICE=cpu (the default) runs the Triton kernels in Triton's interpreter; FASTLOSS_TEST_DEVICE=cuda runs
everything on the GPU. FASTLOSS_CPU_MODULE=<path of a .so> tests another build of the native CPU module (tools/sanitize.sh).
FASTLOSS_TEST_SLOW=1 also runs what is marked slow.
"""

import importlib.util
import os
import random
import subprocess
import sys
import warnings

# Read when torch brings OpenMP. The workers share the cores: a thread that waits for others by spinning takes theirs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

DEVICE = os.environ.get("FASTLOSS_TEST_DEVICE", "cpu")
SLOW = os.environ.get("FASTLOSS_TEST_SLOW", "") not in ("", "0")
OWN_PROCESS = "FASTLOSS_TEST_OWN_PROCESS"  # set in the process that a test marked own_process has
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))

if path := os.environ.get("FASTLOSS_CPU_MODULE"):
    spec = importlib.util.spec_from_file_location("fastloss._cpu", path)
    assert spec is not None and spec.loader is not None, path
    sys.modules["fastloss._cpu"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["fastloss._cpu"])
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.exit("FASTLOSS_TEST_DEVICE=cuda, but torch sees no CUDA device", returncode=2)
if DEVICE != "cuda":
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["FASTLOSS_CALIBRATION"] = ""  # what somebody measured on this machine chooses no path of a test
if WORKERS > 1:  # the workers share the cores; a test that is about threads sets its own number
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // WORKERS))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not SLOW:
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="FASTLOSS_TEST_SLOW=1 runs it"))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """A test marked own_process runs in a pytest of its own, and once more where that one hangs.

    It makes a process group of gloo: one of those held up a whole run of the suite, once in many. What hung is a warning with
    its stacks; twice is a failure.
    """
    if not pyfuncitem.get_closest_marker("own_process") or os.environ.get(OWN_PROCESS):
        return None
    limit = ["-o", "faulthandler_timeout=200", "-o", "faulthandler_exit_on_timeout=true"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *limit, pyfuncitem.nodeid]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {OWN_PROCESS: "1"}
    root = pyfuncitem.config.rootpath
    for is_last in (False, True):
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=900)
        said = done.stdout + done.stderr
        if "Timeout (" not in said or is_last:
            break
        warnings.warn(f"{pyfuncitem.nodeid} hung and runs again:\n{said[-6000:]}", stacklevel=1)
    if " skipped in " in said and done.returncode == 0:
        pytest.skip("skipped in its own process")
    assert done.returncode == 0 and "1 passed" in said, said[-6000:]
    return True


@pytest.fixture(scope="session")
def slow_too() -> bool:
    """Whether what is marked slow runs: for a fixture that makes in one launch what many tests look at."""
    return SLOW


@pytest.fixture
def device() -> torch.device:
    """Where a test puts its tensors."""
    return torch.device(DEVICE)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    random.seed(0)
