"""Set before anything imports triton or fastloss: the device of the suite, the interpreter, the threads, the seeds.

FASTLOSS_TEST_DEVICE=cpu (the default) runs the Triton kernels in Triton's interpreter; FASTLOSS_TEST_DEVICE=cuda runs
everything on the GPU.
"""

import os
import random

import pytest
import torch

DEVICE = os.environ.get("FASTLOSS_TEST_DEVICE", "cpu")
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))

if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.exit("FASTLOSS_TEST_DEVICE=cuda, but torch sees no CUDA device", returncode=2)
if DEVICE != "cuda":
    os.environ.setdefault("TRITON_INTERPRET", "1")
if WORKERS > 1:  # the workers share the cores; a test that is about threads sets its own number
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // WORKERS))


@pytest.fixture
def device() -> torch.device:
    """Where a test puts its tensors."""
    return torch.device(DEVICE)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    random.seed(0)
