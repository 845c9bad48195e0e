"""Turn the Markdown tables that a benchmark prints into one CSV file, with a column for each NAME=VALUE given.

python -m benchmarks.faithfulness.evidence birds100 --out OUT | python docs/background/tables/to_csv.py data=birds100

The tables' columns are joined: a cell is empty where a table lacks the column.
"""

from __future__ import annotations

import csv
import sys


def rows(text: str) -> list[dict[str, str]]:
    """The rows of all tables in a text, each a mapping from the column to the cell; bold marks are dropped."""
    found: list[dict[str, str]] = []
    header: list[str] = []
    for line in text.splitlines():
        if not line.startswith("|"):
            header = []
            continue
        cells = [cell.strip().replace("**", "") for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]
        if not header:
            header = cells
        elif set("".join(cells)) != {"-"}:
            found.append(dict(zip(header, cells, strict=True)))
    return found


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    table = [given | row for row in rows(sys.stdin.read())]
    columns = dict.fromkeys(name for row in table for name in row)
    writer = csv.DictWriter(sys.stdout, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)


if __name__ == "__main__":
    main()
