"""The kernel hub package: made, loaded by ``kernels.get_local_kernel`` beside an installed fastloss, its layers used."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import make_hub
import pytest
import torch

SCRIPT = """
import sys
from pathlib import Path
import torch, torch.nn.functional as F
import kernels
from kernels import LocalLayerRepository, Mode, get_local_kernel, kernelize, register_kernel_mapping, use_kernel_forward_from_hub

folder, native = Path(sys.argv[1]), sys.argv[2] == "True"
universal = get_local_kernel(folder / "build" / "torch-universal")
best = get_local_kernel(folder)
assert best.__name__ != universal.__name__ or not native
assert (best.backends()["cpu"] == "available") is native, best.backends()
assert universal.backends()["cpu"] != "available"
sys.path.insert(0, sys.argv[3])
import fastloss  # the installed one has the same operators under its own namespace
assert fastloss.__name__ == "fastloss" and fastloss is not best

torch.manual_seed(0)
target = torch.tensor([[1, 2, -100, 4], [3, 0, 7, 9]])
hidden, weight = torch.randn(2, 4, 16), torch.randn(50, 16)

def run(loss):
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    value = loss(*leaves)
    value.backward()
    return [value.detach(), *(t.grad for t in leaves)]

def close(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)

expected = run(lambda h, w: F.cross_entropy((h @ w.T).flatten(0, 1), target.flatten()))
for package in (universal, best):
    close(run(lambda h, w: package.linear_cross_entropy(h, w, target)), expected)
    torch._dynamo.reset()
    close(run(torch.compile(lambda h, w: package.linear_cross_entropy(h, w, target), backend="aot_eager")), expected)

@use_kernel_forward_from_hub("ForCausalLMLoss")
class Loss(torch.nn.Module):
    def forward(self, logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **kwargs):
        raise RuntimeError("not replaced")

@use_kernel_forward_from_hub("LinearHead")
class Head(torch.nn.Linear):
    pass

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.loss = Head(16, 50, bias=False), Loss()
    def forward(self, hidden, labels):
        logits = self.head(hidden)
        return self.loss(logits=logits, labels=labels, vocab_size=50, num_items_in_batch=torch.tensor(5)), logits

layer = lambda name: {"cpu": {Mode.TRAINING: LocalLayerRepository(repo_path=folder, layer_name=name)}}
register_kernel_mapping({"ForCausalLMLoss": layer("ForCausalLMLoss"), "LinearHead": layer("LinearHead")})
model = kernelize(Model().train(), mode=Mode.TRAINING, device="cpu")
loss, logits = model(hidden, target)
assert type(logits).__name__ == "LazyLogits" and logits.is_lazy
loss.backward()
shifted = F.pad(target, (0, 1), value=-100)[:, 1:]
reference = model.head.weight.detach().clone().requires_grad_()
expected = F.cross_entropy((hidden @ reference.T).flatten(0, 1), shifted.flatten(), reduction="sum") / 5
expected.backward()
close([loss.detach(), model.head.weight.grad], [expected.detach(), reference.grad])

half = (hidden @ weight.T).bfloat16()
ours = model.loss(logits=half, labels=target, vocab_size=50)
assert ours.dtype == torch.float32
torch.testing.assert_close(ours, F.cross_entropy(half.float().flatten(0, 1), shifted.flatten()))
print("loaded", best.__name__)
"""


def test_loaded_by_the_kernels_package(tmp_path):
    pytest.importorskip("kernels", reason="the kernels package is not installed")
    if importlib.util.find_spec("huggingface_hub") is None:
        pytest.skip("huggingface_hub is not installed")
    made = make_hub.make(tmp_path / "hub")
    assert made[0].name == "torch-universal"
    # kernels takes a CPU variant for PyTorch's CPU builds alone, whether or not there is a GPU
    native = len(made) == 2 and torch.version.cuda is None and torch.version.hip is None
    # Away from the repository, whose own folder of Triton kernels is called kernels too.
    root = Path(make_hub.ROOT)
    links = tmp_path / "installed"
    links.mkdir()
    (links / "fastloss").symlink_to(root / "fastloss")
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "hub"), str(native), str(links)], cwd=tmp_path, capture_output=True, text=True,
        env={**{k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}, "HF_HUB_OFFLINE": "1"}, timeout=300,
    )  # fmt: skip
    if "No module named 'kernels" in run.stderr:
        pytest.skip("the kernels package is not installed")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("loaded fastloss_")


def test_no_import_of_an_installed_fastloss_is_left(tmp_path):
    for folder in make_hub.make(tmp_path):
        for path in folder.rglob("*.py"):
            for line in path.read_text(encoding="utf-8").splitlines():
                code = line.split("#")[0].strip()
                assert not code.startswith(("import fastloss", "from fastloss")), f"{path}: {line}"
                assert '"fastloss::' not in code and "torch.ops.fastloss." not in code, f"{path}: {line}"
        assert not (folder / "harness").exists() and not (folder / "cli.py").exists()
