"""vocab_parallel_cross_entropy's loss in a dtype of its own: one process, whose columns are all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from backends_under_test import need

from fastloss.parallel import vocab_parallel_cross_entropy


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_float32_loss_of_bfloat16_logits(reduction: str, backend: str, group: None) -> None:
    need(backend)
    x = torch.randn(7, 40, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    target = torch.arange(7)
    loss = {
        dtype: vocab_parallel_cross_entropy(
            x, target, dist.group.WORLD, reduction=reduction, loss_dtype=dtype, backend=backend
        )
        for dtype in (None, torch.float32)
    }
    exact = torch.nn.functional.cross_entropy(x.detach().double(), target, reduction=reduction)
    assert loss[None].dtype == torch.bfloat16 and loss[torch.float32].dtype == torch.float32
    torch.testing.assert_close(loss[torch.float32].double(), exact, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss[torch.float32].sum(), x)
    y = x.detach().double().requires_grad_()
    torch.nn.functional.cross_entropy(y, target, reduction=reduction).sum().backward()
    assert y.grad is not None
    torch.testing.assert_close(gradient.double(), y.grad, rtol=2**-7, atol=1e-4)
    with pytest.raises(TypeError, match="loss_dtype"):
        vocab_parallel_cross_entropy(x, target, dist.group.WORLD, loss_dtype=torch.int64)
