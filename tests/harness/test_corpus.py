"""Text in, rows out: the corpus, the user's files, the tokenizer, the order of the data."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
import torch

from fastloss.harness import corpus, tokenizer
from fastloss.harness.data import IGNORE, Rows


def test_python_corpus_is_there_and_always_the_same() -> None:
    texts = corpus.python_corpus()
    part = Path(sysconfig.get_paths()["stdlib"]) / "email"
    again = list(corpus._docstrings(part))
    assert again == list(corpus._docstrings(part)) and set(again) < set(texts) and len(again) > 5
    assert len(texts) > 100 and sum(map(len, texts)) > 500_000
    assert all(text.strip() for text in texts)


def test_split_holds_back_every_document_once() -> None:
    texts = [f"document {i}" for i in range(100)]
    train, val = corpus.split(texts, 0.05)
    assert len(val) == 5 and sorted(train + val) == sorted(texts)
    train, val = corpus.split(["x" * 1000], 0.05)  # one document: its end
    assert len(train[0]) == 950 and len(val[0]) == 50
    assert corpus.split(texts, 0) == (texts, [])


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ('{"text": "cut', "not JSON"),
        ('{"txt": "a"}', r"with \['txt'\]"),
        ('{"text": 3}', "text of type int"),
        ("[1]", "got list"),
    ],
)
def test_bad_row_names_file_and_line(tmp_path: Path, row: str, complaint: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "fine"}}\n\n{row}\n')
    with pytest.raises(ValueError, match=rf"rows\.jsonl:3: .*{complaint}"):
        corpus.read_files([str(path)])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*nowhere\.txt"):
        corpus.read_files([str(tmp_path / "nowhere.txt")])
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match=r"binary\.txt: expected UTF-8 text, got byte 0xff at position 2"):
        corpus.read_files([str(binary)])
    empty = tmp_path / "empty.txt"
    empty.write_text("  \n")
    with pytest.raises(ValueError, match=r"no text in .*empty\.txt"):
        corpus.read_files([str(empty)])


def test_a_line_separator_inside_a_row_does_not_end_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a\u2028b"}\n{"text": "c"}\n', encoding="utf-8")
    assert corpus.read_files([str(path)]) == (["a\u2028b", "c"], [])


def test_bpe_round_trip_and_determinism() -> None:
    texts = [
        "the cat sat on the mat",
        "def f(x):\n\treturn x  # café ☕ 日本",
        tokenizer.END,
        *tokenizer.ROLES,
    ] * 5
    bpe = tokenizer.train_bpe(texts, 300)
    assert bpe.to_str() == tokenizer.train_bpe(texts, 300).to_str()
    ids = tokenizer.encode(bpe, texts)
    pieces = [[]]  # type: list[list[int]]
    for i in ids.tolist():
        if i == tokenizer.end_id(bpe):
            pieces.append([])
        else:
            pieces[-1].append(i)
    assert [bpe.decode(piece, skip_special_tokens=False) for piece in pieces[:-1]] == texts


def test_rows_cover_the_stream_and_pad_its_end() -> None:
    rows = Rows(torch.arange(1, 12, dtype=torch.int32), seq_len=4)
    assert len(rows) == 3
    targets = torch.cat([rows.row(i)[1] for i in range(3)])
    assert targets.tolist() == [*range(2, 12), IGNORE, IGNORE]
    assert rows.row(0)[0].tolist() == [1, 2, 3, 4]


def test_order_is_a_function_of_seed_and_position() -> None:
    tokens = torch.arange(400, dtype=torch.int32)
    a, b, c = Rows(tokens, 8, seed=1), Rows(tokens, 8, seed=1), Rows(tokens, 8, seed=2)
    there = [a.order.at(i) for i in range(120)]
    assert [b.order.at(i) for i in reversed(range(120))] == there[::-1]
    assert [c.order.at(i) for i in range(120)] != there
    assert sorted(there[:50]) == list(range(50)) == sorted(there[50:100])  # each epoch sees each row once
    assert there[:50] != there[50:100]


def test_too_little_text() -> None:
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        Rows(torch.ones(1, dtype=torch.int32), 8)
