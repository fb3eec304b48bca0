"""fastloss.patch(): F.cross_entropy is fastloss's inside, torch's outside."""

import pytest
import torch
import torch.nn.functional as F

import fastloss

STOCK = F.cross_entropy


def inputs(dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(6, 11, generator=g).to(dtype).requires_grad_(), torch.tensor([0, 3, -100, 10, 7, 1])


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"label_smoothing": 0.1}, {"ignore_index": 3}])
def test_same_loss_and_gradient(options):
    x, t = inputs()
    t = t.clamp(min=0) if "ignore_index" in options else t
    expected = STOCK(x, t, **options)
    (expected_grad,) = torch.autograd.grad(expected, x)
    with fastloss.patch():
        assert F.cross_entropy is not STOCK
        calls = []
        with pytest.MonkeyPatch.context() as m:
            inner = fastloss.cross_entropy
            m.setattr(fastloss, "cross_entropy", lambda *a, **k: calls.append(1) or inner(*a, **k))
            loss = F.cross_entropy(x, t, **options)
            module = torch.nn.CrossEntropyLoss(**options)(x, t)
        assert len(calls) == 2
        (grad,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(module, expected)
    torch.testing.assert_close(grad, expected_grad)
    assert F.cross_entropy is STOCK


def test_for_the_process_and_twice():
    first = fastloss.patch()
    second = fastloss.patch()
    second.undo()
    assert F.cross_entropy is not STOCK
    first.undo()
    first.undo()
    assert F.cross_entropy is STOCK


def test_undone_after_an_error():
    with pytest.raises(KeyError):
        with fastloss.patch():
            raise KeyError
    assert F.cross_entropy is STOCK


def test_somebody_elses_patch_is_left_alone():
    handle = fastloss.patch()
    other = lambda *a, **k: None
    F.cross_entropy = other
    try:
        handle.undo()
        assert F.cross_entropy is other
    finally:
        F.cross_entropy = STOCK


def test_autocast_gives_float32():
    x, t = inputs(torch.bfloat16)
    with fastloss.patch(), torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.cross_entropy(x, t)
    assert loss.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


def test_lazy_logits_stay_lazy():
    weight = torch.randn(50, 8, requires_grad=True)
    z = fastloss.LazyLogits(torch.randn(3, 8), weight)
    with fastloss.patch():
        loss = torch.nn.CrossEntropyLoss()(z, torch.tensor([0, 1, 2]))
    assert z.is_lazy and loss.requires_grad


def test_other_tensors_keep_torchs_function():
    x, t = inputs()
    with fastloss.patch():
        assert F.cross_entropy(x.to("meta"), t.to("meta")).device.type == "meta"
        with pytest.raises(RuntimeError):
            F.cross_entropy(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 1]))


def test_under_compile():
    x, t = inputs()
    head = torch.nn.Linear(11, 13)

    def step(x, t):
        return torch.nn.functional.cross_entropy(head(x), t)

    expected = step(x, t)
    with fastloss.patch():
        seen = []

        def backend(graph, inputs):
            seen.extend(str(node.target) for node in graph.graph.nodes)
            return graph.forward

        torch._dynamo.reset()
        compiled = torch.compile(step, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(x, t), expected)
    assert any("fastloss" in name for name in seen), seen
    torch._dynamo.reset()


def test_integrations_are_found_by_name():
    import subprocess
    import sys

    script = (
        "import fastloss\n"
        "fastloss.integrations.transformers.apply\n"
        "assert not hasattr(fastloss.integrations, 'nothing')\n"
        "import sys; assert 'transformers' not in sys.modules and 'trl' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
