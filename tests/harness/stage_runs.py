"""Small runs of every stage without their measurements, in this process or in each of those that torchrun starts.

``python stage_runs.py FOLDER``: FOLDER/cases.json holds the cases, FOLDER/NAME-RANK.pt gets what came of each.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from torch import nn

from fastloss.harness import (
    checkpoint,
    distill,
    dpo,
    grpo,
    measure,
    parallel,
    plots,
    ppo,
    pretrain,
    reward,
    run,
    sft,
)
from fastloss.harness.config import (
    DistillConfig,
    DpoConfig,
    GrpoConfig,
    PpoConfig,
    PretrainConfig,
    RewardConfig,
    SftConfig,
)
from fastloss.harness.cost import Cost

STAGES: dict[str, tuple[Any, Any]] = {
    "pretrain": (pretrain, PretrainConfig), "sft": (sft, SftConfig), "distill": (distill, DistillConfig), "reward": (reward, RewardConfig),
    "dpo": (dpo, DpoConfig), "grpo": (grpo, GrpoConfig), "ppo": (ppo, PpoConfig),
}  # fmt: skip


SHAPE: dict[str, Any] = {"hidden": 32, "layers": 2, "heads": 2, "intermediate": 64}
Outcome = dict[str, Any]


def low_ids(prompts: list[Any], completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward that a tiny model with random weights earns now and then: tokens of the first 100 of 400."""
    return [sum(i < 100 for i in ids) / len(ids) for ids in completion_ids]


@contextmanager
def light() -> Iterator[None]:
    none = Cost("not measured", 1, None, measure.Peak(0, "not measured"), 1.0, 1.0)
    with (
        mock.patch.object(run, "measure_costs", lambda stage, names: dict.fromkeys(names, none)),
        mock.patch.object(measure, "matmul_rate", lambda *args: 1.0),
        mock.patch.object(measure, "count_flops", lambda step: 1),
        mock.patch.object(plots, "curves", lambda *args: None),
    ):
        yield


def signal_at_second_step(config: Any) -> Any:
    """The last process alone gets a SIGTERM, in its second step."""
    steps = iter(range(99))

    def sum_gradients(parameters: Any) -> None:
        if next(steps) == 1 and parallel.rank() == parallel.world() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        summing(parameters)

    summing = parallel.sum_gradients
    return mock.patch.object(parallel, "sum_gradients", sum_gradients)


def nan_in_second_step(config: Any) -> Any:
    """In the gradient of the last process alone."""
    steps = iter(range(99))

    def sum_gradients(parameters: Any) -> None:
        if next(steps) == 1 and parallel.rank() == parallel.world() - 1:
            parameters[0].grad.mul_(float("nan"))
        summing(parameters)

    summing = parallel.sum_gradients
    return mock.patch.object(parallel, "sum_gradients", sum_gradients)


def second_save(instead: Callable[[], None]) -> Any:
    """``instead`` happens in the second save, when its tensors are on disk and its metadata is not."""
    saves = iter(range(99))

    class Writer(checkpoint.FileSystemWriter):
        def __init__(self, path: Any) -> None:
            super().__init__(path)
            self.number = next(saves)

        def write_data(self, plan: Any, planner: Any) -> Any:
            written = super().write_data(plan, planner)
            if self.number == 1:
                instead()
            return written

    return mock.patch.object(checkpoint, "FileSystemWriter", Writer)


def disk_full_in_second_save(config: Any) -> Any:
    """Of the last process alone."""

    def fail() -> None:
        if parallel.rank() == parallel.world() - 1:
            raise OSError(28, "No space left on device")

    return second_save(fail)


def slow_second_save(config: Any) -> Any:
    """Says who it is and waits to be killed."""

    def wait() -> None:
        (Path(config.out) / f"saving-{parallel.rank()}").write_text(str(os.getpid()))
        time.sleep(120)

    return second_save(wait)


def kill_in_third_step(config: Any) -> Any:
    """Of the second process: by a kill -9, after its backward and before the gradients' sum or the norm."""
    steps = iter(range(99))

    def sum_gradients(parameters: Any) -> None:
        if next(steps) == 2 and parallel.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        summing(parameters)

    summing = parallel.sum_gradients
    return mock.patch.object(parallel, "sum_gradients", sum_gradients)


def kill_in_second_save(config: Any) -> Any:
    """Of the second process: by a kill -9, when its tensors are on disk."""

    def kill() -> None:
        if parallel.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    return second_save(kill)


HOOKS = {
    f.__name__: f
    for f in (
        signal_at_second_step, nan_in_second_step, disk_full_in_second_save, slow_second_save, kill_in_third_step, kill_in_second_save,
    )
}  # fmt: skip


def case(name: str, options: dict[str, Any], out: Path, **more: Any) -> dict[str, Any]:
    """What :func:`run_case` takes, as JSON has it."""
    keys = {key: more.pop(key) for key in ("resume", "hook") if key in more}
    config = {key: value for key, value in options.items() if key != "stage"} | {"out": str(out), **more}
    return {"name": name, "stage": options["stage"], "config": config, **keys}


def run_case(name: str, stage: str, config: dict[str, Any], resume: bool = False, hook: str = "") -> Outcome:
    """What a run logged, its held-back metrics, and the whole weights; or the error it ended with."""
    module, kind = STAGES[stage]
    options = kind(**config)
    with light(), HOOKS[hook](options) if hook else mock.MagicMock():
        try:
            result = module.run(options, resume=resume, console=Console(quiet=True))
        except (OSError, ValueError) as error:
            return {"error": f"{type(error).__name__}: {error}"}
    weights = {name: parallel.whole(p.detach()) for name, p in result.model.named_parameters()}
    return {
        "rows": [{k: v for k, v in row.items() if not k.endswith(("_s", "mfu"))} for row in result.rows],
        "before": result.before, "after": result.after, "done": result.done, "weights": weights,
        "sharded": sum(map(parallel.is_over_data, result.model.parameters())),
        "held": sum(getattr(p, "_local_tensor", p).numel() for p in result.model.parameters()),
    }  # fmt: skip


def written(folder: Path, cases: list[dict[str, Any]]) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    return str(folder)


def environment() -> dict[str, str]:
    """Of a process that runs this file."""
    here = Path(__file__).parent
    paths = (str(here.parents[1]), str(here), os.environ.get("PYTHONPATH", ""))
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


def killed_while_saving(command: list[str], out: Path, processes: int) -> None:
    """Starts a run with :func:`slow_second_save`; its first process gets a kill -9 when all are in that save."""
    launched = subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    saving = [out / f"saving-{rank}" for rank in range(processes)]
    until = time.monotonic() + 120
    while not all(path.exists() and path.read_text() for path in saving):
        assert launched.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    os.kill(int(saving[0].read_text()), signal.SIGKILL)
    assert launched.wait(timeout=600) != 0
    assert sorted(os.listdir(out / "checkpoint")) == ["step-1", "step-2.tmp"]
    assert list((out / "checkpoint" / "step-2.tmp").glob("*.distcp"))


def apart(got: Outcome, expected: Outcome) -> float:
    """The largest difference of any weight."""
    assert set(got["weights"]) == set(expected["weights"])
    return max(float((got["weights"][k] - w).abs().max()) for k, w in expected["weights"].items())


def collectives(folder: Path) -> Outcome:
    """What harness/parallel.py gives a process."""
    rank, parameters = parallel.rank(), [nn.Parameter(torch.zeros(2, 3)) for _ in range(5)]
    for p in parameters[: 2 + rank]:  # the third has a gradient in the second process alone
        p.grad = torch.full((2, 3), 1.0 + rank)
    with mock.patch.object(parallel, "BUCKET", 30):  # a gradient is 24 bytes
        parallel.sum_gradients(parameters)

    def fail() -> None:
        raise ValueError(f"of {parallel.rank()}")

    try:
        parallel.from_first(fail)
        failure = ""
    except ValueError as error:
        failure = str(error)
    log = folder / "turns"
    with parallel.first_alone(), log.open("a") as file:
        time.sleep(0.2 * (1 - rank))
        file.write(str(rank))
    done: list[int] = []
    spread = parallel.spread(lambda item: done.append(item) or item * 10, [0, 1, 2])
    return {
        "grads": [None if p.grad is None else p.grad.unique().tolist() for p in parameters], "failure": failure,
        "everyones": parallel.everyones(torch.arange(2 + rank) + 10 * rank), "any": parallel.any_of(rank == 1),
        "spread": spread, "done": done, "summed": parallel.summed(1, torch.tensor(0.5) * rank),
        "turns": log.read_text() if rank else "",
    }  # fmt: skip


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    parallel.start("auto")
    for case in json.loads((folder / "cases.json").read_text()):
        outcome = run_case(**case) if "stage" in case else collectives(folder)
        torch.save(outcome, folder / f"{case['name']}-{parallel.rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
