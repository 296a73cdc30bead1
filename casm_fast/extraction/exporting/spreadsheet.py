"""The table as comma-separated values: every column, every row, errors included.

Columns of lists (top5, the true boxes) hold JSON. A cell of an image that could not be read is
empty.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

from casm_fast.extraction.exporting.job import Job
from casm_fast.extraction.exporting.writing import new_file


def write(job: Job, output: Path) -> tuple[Path, ...]:
    """Write the table.

    Args:
        job: What.
        output: The CSV file.

    Returns:
        The file.
    """
    with new_file(output) as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(job.table.column_names)
        for row in job.rows():
            writer.writerow(
                json.dumps(value) if isinstance(value, list) else value for value in row.values()
            )
    return (output,)
