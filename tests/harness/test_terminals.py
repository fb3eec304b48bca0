"""Where a run writes: one run to a folder, full disks, folders that cannot be written, terminals that are gone."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from fastloss import cli
from fastloss.cli.train import app
from fastloss.harness import chain, checkpoint, demo, export, logging, parallel, pretrain, run
from fastloss.harness.config import PretrainConfig, SftConfig
from fastloss.harness.report import Terminal


def one_line(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """What a command ends with that cannot be done: exit status 2, and a line that begins with "error:"."""
    capfd.readouterr()
    got = CliRunner().invoke(app, arguments)
    err = [line for line in (got.stderr + capfd.readouterr().err).splitlines() if line.startswith("error:")]
    assert got.exit_code == 2 and len(err) == 1, (got.exit_code, got.output, got.exception)
    return err[0]


def options(config: PretrainConfig, folder: Path) -> list[str]:
    path = folder / "options.yaml"
    from fastloss.harness import config as configs

    configs.save(config, path)
    return ["pretrain", "--config", str(path)]


def test_two_runs_into_one_folder(
    tiny: PretrainConfig, tmp_path: Path, quiet: Console, capfd: pytest.CaptureFixture[str]
) -> None:
    """The second ends before it writes anything, whatever it was asked to do; the first's files are as they were."""
    pretrain.run(replace(tiny, steps=1), console=quiet)
    out = Path(tiny.out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with run.only_one(out):
        for more in ([], ["--resume"], ["--overwrite"]):
            error = one_line([*options(tiny, tmp_path), *more], capfd)
            assert f"out: another run is writing into {out}" in error
        with pytest.raises(ValueError, match="another run is writing"), run.only_one(out):
            pass
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert pretrain.run(replace(tiny, steps=2), resume=True, console=quiet).done == 2  # free again
    for other in (lambda: chain.run_chain(str(out)), lambda: demo.run_demo(replace(tiny, out=str(out)))):
        with FileLock(out / ".lock"), pytest.raises(ValueError, match="another run is writing"):
            other()


def test_an_error_frees_the_folder(tiny: PretrainConfig, quiet: Console) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="loss: expected one of"):
            pretrain.run(replace(tiny, loss="other"), console=quiet)


def test_folders_that_cannot_be_written(
    tiny: PretrainConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    error = one_line(options(replace(tiny, out=str(tmp_path / "file" / "run")), tmp_path), capfd)
    assert "out: cannot write into" in error and "Not a directory" in error

    def read_only(self: Path, *args: Any, **kwargs: Any) -> None:  # root may write everywhere
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert "Read-only file system" in one_line(options(tiny, tmp_path), capfd)


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("where", ["log", "checkpoint", "model"])
def test_a_full_disk_is_one_line_and_loses_nothing(
    where: str, tiny: PretrainConfig, tmp_path: Path, quiet: Console, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    whole = pretrain.run(replace(tiny, out=str(tmp_path / "whole"), steps=3), console=quiet)
    pretrain.run(replace(tiny, steps=3, stop_after=2), console=quiet)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")
    with monkeypatch.context() as patched:
        if where == "log":
            patched.setattr(logging.RunLog, "row", lambda self, row: (_ for _ in ()).throw(full))
        elif where == "checkpoint":
            patched.setattr(checkpoint, "_sync", lambda path: (_ for _ in ()).throw(full))
        else:
            raised = export.SafetensorError("I/O error: No space left on device (os error 28)")
            patched.setattr(
                type(whole.model), "save_pretrained", lambda *args, **kwargs: (_ for _ in ()).throw(raised)
            )
        error = one_line([*options(replace(tiny, steps=3), tmp_path), "--resume"], capfd)
        assert "No space left on device" in error
    again = pretrain.run(replace(tiny, steps=3), resume=True, console=quiet)
    assert [row["loss"] for row in again.rows] == [row["loss"] for row in whole.rows]
    assert (Path(tiny.out) / "model" / "config.json").is_file()


def test_output_that_cannot_encode_a_character(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding in ("cp1252", "latin-1", "ascii"):
        stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(sys, "argv", ["fastloss", "plan", "llama-3-8b", "--tokens", "1B"])
        with pytest.raises(SystemExit) as left:
            cli.main()
        stdout.flush()
        assert not left.value.code
        Console(file=stdout).print("first → last █▆")
        stdout.flush()
        assert b"first ? last ??" in stdout.buffer.getvalue() and b"FLOP" in stdout.buffer.getvalue()


def test_a_run_goes_on_where_nobody_reads(tiny: PretrainConfig) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as file:
        terminal = Terminal(file=file)
        terminal.print("x\n" * 50_000, highlight=False)
        assert terminal.quiet
        assert pretrain.run(replace(tiny, steps=2), console=Terminal(file=file)).done == 2


@pytest.mark.parametrize("name", ["foo", "cuda:99", "meta", "", "cpu:x"])
def test_devices_that_are_not_here(
    name: str, tiny: PretrainConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    error = one_line([*options(tiny, tmp_path), "--device", name], capfd)
    assert f"device: expected auto, cpu, cuda, cuda:1 …, one that is here, got {name!r}" in error
    assert not Path(tiny.out).exists()
    assert parallel.device_of("cpu") == torch.device("cpu")


@pytest.mark.usefixtures("light")
def test_seeds_to_the_last_bit(
    tiny: PretrainConfig, tmp_path: Path, quiet: Console, capfd: pytest.CaptureFixture[str]
) -> None:
    most = 2**63 - 1
    assert pretrain.run(replace(tiny, steps=1, seed=most), console=quiet).done == 1
    for seed in (most + 1, 2**70):
        error = one_line([*options(tiny, tmp_path), "--seed", str(seed)], capfd)
        assert f"seed: expected at most {most}, got {seed}" in error
    with pytest.raises(ValueError, match="seed: expected at least 0"):
        SftConfig(seed=-1)


def checkpoints(folder: Path) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    for step in (1, 2, 3):
        checkpoint.save(folder, step, model, optimizer, {"step": step, "data": "x"}, keep=3)
    return model, optimizer


def test_a_flipped_bit_or_a_missing_file_is_seen_and_the_good_one_named(tmp_path: Path) -> None:
    checkpoints(tmp_path)
    last, draw = tmp_path / "step-3", random.Random(0)
    checkpoint.check(last)
    for path in sorted(last.iterdir()):
        data = path.read_bytes()
        places = [(draw.randrange(len(data)), 1 << draw.randrange(8)) for _ in range(6)]
        for place, bit in [*places, (None, 0), (len(data), 0)]:
            if place is None:
                path.unlink()
            elif place == len(data):
                path.write_bytes(data[: len(data) // 2])
            else:
                path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
            if place is None and path.name == checkpoint.SUMS:  # one of an older version has none
                checkpoint.check(last)
            else:
                with pytest.raises(ValueError) as caught:
                    checkpoint.check(last)
                assert str(caught.value).startswith(f"checkpoint: {last}: ")
                assert str(caught.value).endswith(f"to go on from {tmp_path / 'step-2'}, which is whole")
            path.write_bytes(data)
    checkpoint.check(last)
    for step in (1, 2, 3):
        (tmp_path / f"step-{step}" / "progress.json").unlink()
    with pytest.raises(ValueError, match=r"progress\.json is missing; there is no older one that is whole"):
        checkpoint.check(last)


@pytest.mark.usefixtures("light")
def test_resume_from_a_damaged_checkpoint_is_one_line(
    tiny: PretrainConfig, tmp_path: Path, quiet: Console, capfd: pytest.CaptureFixture[str]
) -> None:
    pretrain.run(replace(tiny, steps=3, save_every=1, keep=2), console=quiet)
    folder = Path(tiny.out) / "checkpoint"
    (shard,) = (folder / "step-3").glob("*.distcp")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    error = one_line([*options(replace(tiny, steps=4), tmp_path), "--resume"], capfd)
    assert "is damaged" in error and f"remove it to go on from {folder / 'step-2'}" in error
    for path in (folder / "step-3").iterdir():
        path.unlink()
    (folder / "step-3").rmdir()
    result = pretrain.run(replace(tiny, steps=4), resume=True, console=quiet)
    assert result.done == 4 and json.loads((folder / "step-4" / "progress.json").read_text())["step"] == 4
