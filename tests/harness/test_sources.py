"""What --data names: folders, globs, JSON, CSV, Parquet, Hugging Face data sets; TRL's formats as TRL takes them."""

from __future__ import annotations

import codecs
import csv
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from fastloss.harness import corpus, rows, sources

USER, ANSWER = {"role": "user", "content": "2+3="}, {"role": "assistant", "content": "5"}


def read(*names: object) -> list[tuple[str, Any]]:
    return list(sources.read([str(name) for name in names]))


def test_folders_and_globs_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.txt").write_text("second")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n')
    (tmp_path / "README.md").write_text("about the data")
    assert corpus.read_files([str(tmp_path)]) == (["first", "second"], [])
    assert corpus.read_files([f"{tmp_path}/**/*.txt", f"{tmp_path}/*.md"]) == (
        ["second", "about the data"],
        [],
    )
    with pytest.raises(ValueError, match=r"no file matches .*\*\.parquet"):
        read(f"{tmp_path}/*.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no .*\.jsonl.* in the folder .*empty"):
        read(tmp_path / "empty")


def test_json_is_a_list_an_object_or_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    for text in ('[{"a": 1}, {"a": 2}]', '{"a": 1}\n{"a": 2}\n'):
        path.write_text(text)
        assert [row for _, row in read(path)] == [{"a": 1}, {"a": 2}]
    path.write_text('[{"a": 1},\n {"a": ]')
    with pytest.raises(ValueError, match=r"rows\.json:2: not JSON"):
        read(path)
    path.write_text('[{"text": "x"}, 3]')
    with pytest.raises(ValueError, match=r"rows\.json: item 2: expected an object, got int"):
        corpus.read_files([str(path)])


def test_csv_values_are_strings_and_errors_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt,answer\n"two\nlines",007\nNA,\nc\n')
    good, bad = read(path)[:2], read(path)[2]
    assert [row for _, row in good] == [
        {"prompt": "two\nlines", "answer": "007"},
        {"prompt": "NA", "answer": ""},
    ]
    assert bad[0].endswith("rows.csv:5") and "expected 2 fields, got 1" in str(bad[1])
    tabs = tmp_path / "rows.tsv"
    tabs.write_text("text\tn\na, b\t1\n")
    assert read(tabs) == [(f"{tabs}:2", {"text": "a, b", "n": "1"})]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **_: object) -> None:
        raise AssertionError(f"network: {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.usefixtures("no_network")
def test_parquet_and_saved_datasets(tmp_path: Path) -> None:
    """The same rows from each; a column that a row lacks is not there; errors name the row; no network."""
    datasets = pytest.importorskip("datasets")
    written = [{"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER], "source": "b"}]
    table = datasets.Dataset.from_list([{**row, "source": row.get("source")} for row in written])
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "both")
    for name in ("rows.parquet", "saved", "both"):
        assert [row for _, row in read(tmp_path / name)] == written, name
        assert rows.read([str(tmp_path / name)], rows.supervised_row)[0] == written
    assert [row for _, row in read(f"hf:{tmp_path}/both:test")] == written[:1]
    with pytest.raises(ValueError, match="expected one of the splits train, test of"):
        read(f"hf:{tmp_path}/both:dev")

    datasets.Dataset.from_list([{"text": "a"}, {"text": None}]).to_parquet(tmp_path / "gap.parquet")
    with pytest.raises(ValueError, match=r"gap\.parquet: row 2: expected an object with a string in `text`"):
        corpus.read_files([str(tmp_path / "gap.parquet")])
    kept, skipped = corpus.read_files([str(tmp_path / "gap.parquet")], skip=True)
    assert kept == ["a"] and "gap.parquet: row 2" in skipped[0]

    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"broken\.parquet: cannot read what follows row 0: "):
        read(tmp_path / "broken.parquet")


def test_hub_names(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[tuple[object, ...]] = []

    def load(name: str, config: str | None, split: str) -> list[dict[str, str]]:
        asked.append((name, config, split))
        return [{"text": "a"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["main", "other"])
    for name in ("hf:o/d", "hf:o/d:test", "hf:o/d:main", "hf:o/d:main:test[:5%]"):
        assert read(name) == [(f"{name}: row 1", {"text": "a"})]
    assert asked == [
        ("o/d", None, "train"), ("o/d", None, "test"), ("o/d", "main", "train"), ("o/d", "main", "test[:5%]")
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"expected hf:NAME\[:config\]\[:split\], got 'hf:'"):
        read("hf:")


def test_columns_under_other_names(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "q", "answer": "a", "prompt": "old"}\n')
    columns = ("prompt=question", "completion=answer")
    assert rows.read([str(path)], rows.supervised_row, columns=columns)[0] == [
        {"prompt": "q", "completion": "a"}
    ]
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: column: expected `query`, got \['answer', "):
        rows.read([str(path)], rows.supervised_row, columns=["prompt=query"])
    for twice, columns in (
        ("prompt", ["prompt=question", "prompt=answer"]),
        ("query", ["prompt=query", "completion=query"]),
    ):
        with pytest.raises(ValueError, match=f"each name once, got {twice} twice"):
            rows.read([str(path)], rows.supervised_row, columns=columns)
    with pytest.raises(ValueError, match="expected a pair like completion=answer, got 'prompt'"):
        rows.read([str(path)], rows.supervised_row, columns=["prompt"])


def test_when_no_row_fits_the_error_says_what_was_expected(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "q"}\n' * 3)
    expected = r"first of 3 skipped: .*rows\.jsonl:1: expected `prompt` and `completion`, .*got \['question'\]; .*--column prompt="
    with pytest.raises(ValueError, match=expected):
        rows.read([str(path)], rows.supervised_row, skip=True)


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("to be", "to go"),
        ("The sky is blue.", "The sky is green."),
        ("red", "blue"),
        ([USER, ANSWER], [USER, ANSWER | {"content": "6"}]),
        ([USER, ANSWER, USER, ANSWER], [USER, ANSWER, USER, ANSWER | {"content": "6"}]),
    ],
)
def test_implicit_prompt_is_trls(chosen: Any, rejected: Any) -> None:
    trl = pytest.importorskip("trl")
    pair = {"chosen": chosen, "rejected": rejected}
    assert rows.preference_row(pair) == trl.extract_prompt(pair)


def test_conversations_are_taken_as_trl_takes_them(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    turns = [{"from": "user", "value": "2+3="}, {"from": "assistant", "value": "5"}]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"conversations": turns}) + "\n")
    assert rows.read([str(path)], rows.supervised_row)[0] == [
        trl.maybe_convert_to_chatml({"conversations": turns})
    ]


TABLES = {
    "rows.csv": "prompt,completion\nhi,there\nhé,→\n", "rows.tsv": "prompt\tcompletion\nhi\tthere\nhé\t→\n",
    "rows.jsonl": '{"prompt": "hi", "completion": "there"}\n{"prompt": "hé", "completion": "→"}\n',
    "rows.json": '[{"prompt": "hi", "completion": "there"},\n {"prompt": "hé", "completion": "→"}]',
}  # fmt: skip
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be")
MARKED = {
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_byte_order_marks_and_line_ends_are_not_data(encoding: str, end: str, tmp_path: Path) -> None:
    for name, text in TABLES.items():
        data = MARKED.get(encoding, b"") + text.replace("\n", end).encode(encoding)
        (tmp_path / name).write_bytes(data)
        found = rows.read([str(tmp_path / name)], rows.supervised_row)[0]
        assert found == [{"prompt": "hi", "completion": "there"}, {"prompt": "hé", "completion": "→"}], name
    (tmp_path / "a.txt").write_bytes(MARKED.get(encoding, b"") + f"one{end}two→".encode(encoding))
    assert [row for _, row in sources.read([str(tmp_path / "a.txt")])] == [{"text": "one\ntwo→"}]


def test_other_encodings_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt: expected UTF-8 text, got byte 0xef at position 2"):
        list(sources.read([str(tmp_path / "a.txt")]))
    (tmp_path / "b.txt").write_bytes(codecs.BOM_UTF16_LE + b"a\x00b")  # cut in the middle
    with pytest.raises(ValueError, match=r"b\.txt: expected UTF-16 text, got byte 0x62"):
        list(sources.read([str(tmp_path / "b.txt")]))


def test_fields_of_megabytes(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    for separator, name in ((",", "a.csv"), ("\t", "a.tsv")):
        (tmp_path / name).write_text(f'text{separator}n\n"{"word " * 500_000}"{separator}1\n')
        (row,) = rows.read([str(tmp_path / name)], rows.text_row)[0]
        assert len(row["text"]) == 2_500_000
    assert csv.field_size_limit() == limit  # bug 22: nobody else's is changed
