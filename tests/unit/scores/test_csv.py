"""CSV files hold no formulas, and ordinary text unchanged."""

import csv
import io

import pyarrow as pa
import pyarrow.csv
import pytest

from memtail.scores.csv import write_csv


def written(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    write_csv(table, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("first", ["=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20"])
def test_a_text_that_begins_like_a_formula_is_marked_as_text(first):
    text = f'{first}HYPERLINK("https://evil.example","open")'
    [_, row] = csv.reader(io.StringIO(written(pa.table({"index": [-1], "filename": [text]})).decode(), newline=""))
    assert row == ["-1", f"'{text}"]


def test_ordinary_text_and_numbers_are_written_as_before():
    names = ["cats/1-2.png", "a,b", 'say "x"', "", "é=1", "'quoted", None, " =1"]
    table = pa.table({"mem": [-0.5] * len(names), "filename": names, "none": pa.nulls(len(names), pa.string())})
    plain = io.BytesIO()
    pyarrow.csv.write_csv(table, plain)
    assert written(table) == plain.getvalue()
