"""What a run costs: FLOPs counted, the machine's matmul rate, peak memory of a piece of code."""

from __future__ import annotations

import ctypes
import gc
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from . import parallel


def _cpu_attention(query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _cpu_attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


# torch's table lacks the CPU's attention operator (2.13): without this, attention would count as nothing
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}


def count_flops(run: Callable[[], object]) -> int:
    """Multiply-adds, times two, of what ``run`` does in all processes; the random state is left as it was."""
    with torch.random.fork_rng(), _OwnFlops(display=False, custom_mapping=CPU_ATTENTION) as counter:
        run()
    return int(parallel.of_all(counter.get_total_flops())[0])


class _OwnFlops(FlopCounterMode):
    """Of a product of tensors in parts (DTensor), this process's part of it."""

    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        own = tree_map(lambda x: getattr(x, "_local_tensor", x), (out, args, kwargs))
        super()._count_flops(func_packet, *own)
        return out


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(device: torch.device, dtype: torch.dtype, *, seconds: float = 1.0) -> float:
    """FLOP/s of the best of several square products, ever larger while time is left."""
    largest = 8192 if device.type == "cuda" else 1536
    size, best, began = 256, 0.0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        a = torch.ones(size, size, device=device, dtype=dtype)
        for _ in range(4):
            synchronize(device)
            started = time.perf_counter()
            a @ a
            synchronize(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - started))
            if time.perf_counter() - began > seconds:
                break
        size = min(2 * size, largest)
    return best


class Peak(NamedTuple):
    bytes: int
    how: str


def peak_bytes(run: Callable[[], object], device: torch.device) -> Peak:
    """The most memory that ``run`` holds beyond what was held before it, at any moment of it.

    ``run`` is called once to warm up (thread pools and the BLAS's packing buffers, which then stay for good)
    and once measured. On CUDA: the caching allocator's peak. On Linux: the process's high-water mark of
    resident memory, VmHWM, reset through /proc/self/clear_refs after the C library gave free pages back, so
    memory outside torch counts. Elsewhere: the peak of torch's allocations, from the profiler.
    """
    run()
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronize(device)
        return Peak(torch.cuda.max_memory_allocated(device) - before, "CUDA allocator's peak")
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    except (OSError, AttributeError, TypeError):
        return Peak(_allocated_peak(run), "torch allocations seen by the profiler")
    run()
    return Peak(max(0, _status("VmHWM") - before), "high-water mark of resident memory (VmHWM)")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in /proc/self/status")


def _allocated_peak(run: Callable[[], object]) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    results: Any = profiler.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    model = platform.processor() or platform.machine()
    try:
        names = [
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0].split(":", 1)[1].strip() if names else model
    except OSError:
        pass
    return (
        f"{model}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, "
        f"torch {torch.__version__}"
    )
