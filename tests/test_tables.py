"""brgsa_jax.data.tables: four kinds of table, one kind of row; what is wrong is named by place."""

import csv
import json
import sys

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from brgsa_jax.config import UserError
from brgsa_jax.data import tables

ROWS = [("a", "Clear; \"quoted\",\tand\nwrapped.", "Emphysema;Lung nodule"), ("b", "", ""),
        ("10", "Ünïcode.", "Atelectasis")]
COLUMNS = ("id", "report", "findings")


def write_csv(path, encoding="utf-8", delimiter=","):
    with path.open("w", newline="", encoding=encoding) as stream:
        csv.writer(stream, delimiter=delimiter).writerows([COLUMNS, *ROWS])


def write_json(path):
    lines = [json.dumps({"id": int(id_) if id_.isdigit() else id_, "report": report or None,
                         "findings": findings.split(";") if findings else []})
             for id_, report, findings in ROWS]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")


def write_parquet(path):
    columns = [list(column) for column in zip(*ROWS, strict=True)]
    columns[2] = [text.split(";") if text else None for text in columns[2]]
    parquet.write_table(pyarrow.table(dict(zip(COLUMNS, columns, strict=True))), path)


@pytest.mark.parametrize("name,write", [
    ("t.csv", write_csv), ("T.CSV", lambda p: write_csv(p, "utf-8-sig")), ("t.txt", write_csv),
    ("t.tsv", lambda p: write_csv(p, delimiter="\t")), ("t.jsonl", write_json),
    ("t.ndjson", write_json), ("t.parquet", write_parquet)])
def test_the_same_rows_from_every_kind(tmp_path, name, write):
    write(tmp_path / name)
    rows = tables.read_table(tmp_path / name, ["findings", "id"], ["report", None])
    assert rows == [dict(zip(COLUMNS, row, strict=True)) for row in ROWS]
    assert tables.read_table(tmp_path / name, ["id"]) == [{"id": row[0]} for row in ROWS]
    with pytest.raises(UserError, match="no column 'Id', 'x'; its columns are id, report, findin"):
        tables.read_table(tmp_path / name, ["Id", "id"], ["x"])


def test_numbers_and_missing_cells_become_text(tmp_path):
    table = pyarrow.table({"id": [1, 2], "share": [0.5, float("nan")], "flag": [True, None]})
    parquet.write_table(table, tmp_path / "t.pq")
    assert tables.read_table(tmp_path / "t.pq", ["id", "share", "flag"]) == [
        {"id": "1", "share": "0.5", "flag": "true"}, {"id": "2", "share": "", "flag": ""}]
    (tmp_path / "t.csv").write_text("id , report\n x ,  y \nz\n\n")
    assert tables.read_table(tmp_path / "t.csv", ["id", "report"]) == [
        {"id": "x", "report": "y"}, {"id": "z", "report": ""}]


@pytest.mark.parametrize("name,content,words", [
    ("t.csv", b"", "no column 'id'; its columns are none"), ("t.csv", b"id\n", "has no rows"),
    ("t.csv", b"\xff\xfe\x00id", "is not UTF-8"), ("t.csv", None, "cannot be read .No such file"),
    ("t.csv", b"id,x\na,b\nc,d,e\n", r"row 2 of .*t.csv \(line 3\) has 3 cells, its header has 2"),
    ("t.csv", b"id;x\na;b\n", "separated by semicolons; save it with commas"),
    ("t.csv", b"id,id\na,b\n", "several columns 'id'"),
    ("t.csv", b'id\n"' + b"x" * 2**25, "no readable CSV"),
    ("t.tsv", b"id,x\na,b\n", "no column 'id'; its columns are id,x"),
    ("t.jsonl", b'{"id": 1}\n{"id": \n', "line 2 of .*t.jsonl is no JSON"),
    ("t.jsonl", b'{"id": 1}\n[2]\n', "line 2 of .*t.jsonl is no JSON object"),
    ("t.jsonl", b'{"id": {"a": 1}}\n', "column 'id' in line 1 of .* is neither text nor"),
    ("t.jsonl", b'{"id": [1]}\n', "column 'id' in line 1 of"), ("t.jsonl", b"\n", "no column 'id'"),
    ("t.jsonl", b"\xff\n", "is not UTF-8"), ("t.jsonl", b"[" * 100_000, "is no JSON"),
    ("t.parquet", b"PAR1 broken", "no readable Parquet"), ("t.parquet", None, "cannot be read")])
def test_unusable_tables_are_one_sentence(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        tables.read_table(tmp_path / name, ["id"])
    assert "\n" not in str(caught.value)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    write_parquet(tmp_path / "t.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"install brgsa-jax\[parquet\]"):
        tables.read_table(tmp_path / "t.parquet", ["id"])


def test_wide_tables_are_read_row_by_row(tmp_path):
    """A table with thousands of columns never lies in memory as a whole."""
    width = 4000
    text = ",".join(f"c{n}" for n in range(width)) + "\n"
    (tmp_path / "t.csv").write_text(text + (",".join("0" * width) + "\n") * 50)
    with tables.open_rows(tmp_path / "t.csv") as (columns, rows):
        assert len(columns) == width and tables.find_columns(tmp_path, columns, ["c7"]) == {"c7": 7}
        assert np.array([[int(cell) for cell in row] for row in rows]).shape == (50, width)


def test_cells_that_were_quoted_for_spreadsheets_come_back_as_they_were(tmp_path):
    cells = ["=1+1", "+a", "-b", "@c", "'=d", "''=e", "plain", "'apostrophe", "a=b"]
    path = tmp_path / "t.csv"
    path.write_text("id\n" + "".join(f"{tables.quoted(cell)}\n" for cell in cells))
    assert not any(line[:1] in "=+-@" for line in path.read_text().splitlines()[1:])
    assert [row["id"] for row in tables.read_table(path, ["id"])] == cells


def test_a_table_without_a_header_is_not_repeated_in_the_message(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("p1,Jane Doe has a large nodule in the right upper lobe and no effusion.\n" * 2)
    with pytest.raises(UserError, match="its first row looks like data") as refusal:
        tables.read_table(path, ["id", "report"])
    assert "Jane" not in str(refusal.value)
