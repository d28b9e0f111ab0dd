"""CSV files that are safe to open in a spreadsheet.

A spreadsheet evaluates a cell that begins like a formula, and names of files and classes are other people's text. As OWASP recommends, such
a cell gets a leading apostrophe, which spreadsheets take as the mark of text. All other text stays; parquet files hold it unchanged.
"""

from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

# Beginning of a formula, with the full-width forms that some spreadsheets accept.
_FORMULA = r"^[=+\-@\t\r\n\x{FF1D}\x{FF0B}\x{FF0D}\x{FF20}]"


def write_csv(table: pa.Table, file: Path | BinaryIO) -> None:
    """Write a table as CSV, without formulas in its texts.

    Args:
        table: columns of numbers and texts.
        file: path of a file, or an open one.
    """
    for place, field in enumerate(table.schema):
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
            texts = table.column(place)
            marked = pc.binary_join_element_wise("'", texts, "")
            table = table.set_column(place, field.name, pc.if_else(pc.match_substring_regex(texts, _FORMULA), marked, texts))
    pyarrow.csv.write_csv(table, file)
