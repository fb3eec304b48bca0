"""What ``--data`` names: files, folders, globs, Parquet and Hugging Face data sets, as rows that know their place."""

from __future__ import annotations

import codecs
import csv
import glob
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Item = tuple[str, Row | ValueError]  # place, the row there or what is wrong with it

JSONL = (".jsonl", ".ndjson")
TABLES = (".parquet", ".arrow")  # read by `datasets`
# UTF-32 first: its mark begins with that of UTF-16; each codec takes its mark away
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
SEPARATORS = {".csv": ",", ".tsv": "\t"}
IN_A_FOLDER = {
    *JSONL,
    ".json",
    ".txt",
    *TABLES,
    *SEPARATORS,
}  # of other files there (README.md …) nobody said that they are data


def read(names: Iterable[str]) -> Iterator[Item]:
    """Every row of every name, in order. A file that is no table is one row: its text."""
    for name in names:
        if name.startswith("hf:"):
            yield from _hub(name)
            continue
        for path in _files(name):
            if path.is_dir():
                yield from _saved(path, name)
            elif path.suffix in JSONL:
                yield from _lines(path, read_text(path))
            elif path.suffix == ".json":
                yield from _json(path, read_text(path))
            elif path.suffix in SEPARATORS:
                yield from _csv(path, read_text(path))
            elif path.suffix in TABLES:
                yield from _table(path)
            else:
                yield str(path), {"text": read_text(path)}


def named(names: Sequence[str], most: int = 3) -> str:
    """For the report."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _files(name: str) -> list[Path]:
    path = Path(name)
    if path.is_dir() and not is_saved(path):
        inside = sorted(p for p in path.rglob("*") if p.suffix in IN_A_FOLDER and p.is_file())
        if not inside:
            raise ValueError(f"data: no {', '.join(sorted(IN_A_FOLDER))} in the folder {name}")
        return inside
    if not path.exists() and glob.has_magic(name):
        found = sorted(p for p in map(Path, glob.glob(name, recursive=True)) if p.is_file())
        if not found:
            raise ValueError(f"data: no file matches {name}")
        return found
    return [path]


def read_text(path: Path) -> str:
    """UTF-8, or what a byte-order mark says; the mark is not text. Line ends are \\n, whoever wrote the file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"data: cannot read {path}: {error.strerror}") from None
    encoding = next((name for mark, name in MARKS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        byte, where = error.object[error.start], error.start
        named = {"utf-8-sig": "UTF-8"}.get(encoding, encoding.upper())
        raise ValueError(f"{path}: expected {named} text, got byte {byte:#04x} at position {where}") from None


def _lines(path: Path, text: str) -> Iterator[Item]:
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand in a string
        if line.strip():
            try:
                yield f"{path}:{number}", _object(json.loads(line))
            except json.JSONDecodeError as error:
                yield f"{path}:{number}", ValueError(f"not JSON: {error}")


def _json(path: Path, text: str) -> Iterator[Item]:
    """A list of objects or one object; what is neither may be JSONL under another name."""
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("["):
            raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
        yield from _lines(path, text)
        return
    for number, row in enumerate(whole if isinstance(whole, list) else [whole], start=1):
        yield f"{path}: item {number}", _object(row)


def _csv(path: Path, text: str) -> Iterator[Item]:
    """Every value is a string, as it stands there: a guess at numbers would make 007 of it 7."""
    limit = csv.field_size_limit(2**31 - 1)  # Python's own is 131072 characters; documents are longer
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=SEPARATORS[path.suffix], strict=True)
    try:
        for row in reader:
            place, names = f"{path}:{reader.line_num}", reader.fieldnames or ()
            fits = None not in row and None not in row.values()
            got = len(row) - 1 + len(row[None]) if None in row else sum(v is not None for v in row.values())
            yield place, row if fits else ValueError(f"expected {len(names)} fields, got {got}")
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _object(row: Any) -> Row | ValueError:
    return row if isinstance(row, dict) else ValueError(f"expected an object, got {type(row).__name__}")


def _table(path: Path) -> Iterator[Item]:
    """Streamed: no copy in the cache of `datasets`, and no network."""
    datasets = _datasets(str(path))
    if not path.is_file():
        raise ValueError(f"data: cannot read {path}: No such file or directory")
    number = 0
    try:
        rows = datasets.load_dataset(path.suffix[1:], data_files=str(path), split="train", streaming=True)
        for number, row in enumerate(rows, start=1):
            yield f"{path}: row {number}", _without_none(row)
    except Exception as error:  # pyarrow and datasets each have their own
        raise ValueError(f"{path}: cannot read what follows row {number}: {_first_line(error)}") from None


def _hub(name: str) -> Iterator[Item]:
    """``hf:NAME[:config][:split]``, from the cache or the network; of a folder that `save_to_disk` made too."""
    known = re.fullmatch(r"hf:([^:]+)(?::([^:\[]+))?(?::([^:\[]+(?:\[.*\])?))?", name)
    if known is None:
        raise ValueError(f"data: expected hf:NAME[:config][:split], got {name!r}")
    datasets = _datasets(name)
    dataset, config, split = known.groups()
    if Path(dataset).is_dir() and is_saved(Path(dataset)):
        yield from _saved(Path(dataset), name, split or config or "")
        return
    try:
        if config and not split and config not in datasets.get_dataset_config_names(dataset):
            config, split = None, config
        rows = datasets.load_dataset(dataset, config, split=split or "train")
    except Exception as error:  # of the hub, the network, the builder
        raise ValueError(f"data: cannot load {name}: {_first_line(error)}") from None
    yield from ((f"{name}: row {number}", _without_none(row)) for number, row in enumerate(rows, start=1))


def is_saved(folder: Path) -> bool:
    """Made by ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk``."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _saved(folder: Path, name: str, split: str = "") -> Iterator[Item]:
    rows = _datasets(name).load_from_disk(str(folder))
    if isinstance(rows, dict):
        split = split or "train"
        if split not in rows:
            raise ValueError(f"data: expected one of the splits {', '.join(rows)} of {folder}, got {split!r}")
        rows = rows[split]
    yield from ((f"{name}: row {number}", _without_none(row)) for number, row in enumerate(rows, start=1))


def _datasets(what: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"data: {what} needs `datasets`: pip install 'fastloss[data]'") from None
    datasets.disable_progress_bars()
    return datasets


def _without_none(value: Any) -> Any:
    """A table has every column in every row; here, as in JSON, what a row lacks is not there."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
