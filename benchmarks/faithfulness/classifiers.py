"""One table over several classifiers: do the figures of own_prediction hold beyond one trunk?

    python -m benchmarks.faithfulness.classifiers OUT [OUT ...] [--names lite0 lite1 ...] [--csv FOLDER]

Every OUT is a folder of `own_prediction`, of another classifier or other photos; sizes are the same shares of each
grid. For every method: what is kept and removed, the mean over the classifiers and the explainer's mean difference, for
the smallest size kept by classifier, too; milliseconds with the first classifier; the mean rank over classifiers and
measures. The interval of a mean difference is that over photos: half widths of the classifiers' own intervals added in
quadrature and divided by their number. Where all were measured with --protocols or --road, a second table has means and
differences of the figures of other papers. The best of each column is bold. --csv writes both as classifiers.csv and
protocols.csv.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.faithfulness.own_prediction import RESULTS, row
from benchmarks.results import parser_of
from bla.comparison.methods import RUN
from bla.metrics.pixels import SHARES

Found = list[dict[str, Any]]
Table = list[list[str]]
"""Rows, the header first."""

SHORT = {"average_drop": "AD", "increase": "IC", "average_gain": "AG", "idsds": "single deletion",
         "road_most": "ROAD, most first", "road_least": "ROAD, least first"}  # fmt: skip
LOW = ("removed", "average_drop", "deletion", "road_most")
"""Measures that are better where they are low."""


def key_of(found: dict[str, Any], name: str, share: float) -> str:
    """The key of a measure at a share of the grid: "kept 12"."""
    return f"{name} {found['sizes'][SHARES.index(share)]}"


def mean_difference(results: Found, method: str, keys: list[str]) -> tuple[float, float]:
    """The explainer's difference from a method, by a key of each; its mean over them, and half of its 95% interval."""
    rows = [found["differences"][key][method] for found, key in zip(results, keys, strict=True)]
    halves = [(each["high"] - each["low"]) / 2 for each in rows]
    return float(np.mean([each["mean"] for each in rows])), float(np.linalg.norm(halves)) / len(rows)


def methods_of(results: Found) -> list[str]:
    """Those that all results have, in their order."""
    return [name for name in results[0]["methods"] if all(name in found["methods"] for found in results)]


def column(title: str, values: list[float], *, low: bool = False, digits: int = 3) -> list[str]:
    """A column of a table, its best values bold."""
    shown = [f"{value:.{digits}f}" for value in values]
    best = f"{(min if low else max)(values):.{digits}f}"
    return [title, *(f"**{value}**" if value == best else value for value in shown)]


def means(results: Found, title: str, keys: list[str]) -> list[list[str]]:
    """Columns: the mean over the classifiers of a measure, by a key of each, and the explainer's difference."""
    methods = methods_of(results)
    values = [
        float(np.mean([found["methods"][method][key] for found, key in zip(results, keys, strict=True)]))
        for method in methods
    ]
    apart = [mean_difference(results, method, keys) for method in methods if method != RUN]
    shown = [*("{:+.3f} ± {:.3f}".format(*each) for each in apart), ""]
    return [column(title, values, low=keys[0].startswith(LOW)), [f"{title}, ours minus it", *shown]]


def ranks(results: Found) -> dict[str, float]:
    """The mean rank of each method, 1 for the best, over classifiers, sizes, and kept and removed."""
    methods = methods_of(results)
    places = [
        stats.rankdata([sign * found["methods"][method][key_of(found, name, share)] for method in methods])
        for found in results
        for share in SHARES
        for name, sign in (("kept", -1), ("removed", 1))
    ]
    return dict(zip(methods, np.mean(places, axis=0).tolist(), strict=True))


def titled(results: Found, *columns: list[str]) -> Table:
    """A table of columns, with the methods' titles in front."""
    titles = results[0]["titles"] | {RUN: "ours"}
    return [list(each) for each in zip(["ranked by", *map(titles.get, methods_of(results))], *columns, strict=True)]


def classifiers(results: Found, names: list[str]) -> Table:
    """Kept and removed, cost, and the mean rank."""
    methods, (small, *_), columns = methods_of(results), SHARES, []
    for found, name in zip(results, names, strict=True):
        values = [found["methods"][method][key_of(found, "kept", small)] for method in methods]
        columns.append(column(f"kept {small:.0%}, {name}", values))
    for share in SHARES:
        for name in ("kept", "removed"):
            keys = [key_of(found, name, share) for found in results]
            columns += means(results, f"{name} {share:.0%}, mean", keys)
    columns.append([f"milliseconds, {names[0]}", *(f"{results[0]['cost'][method]:.1f}" for method in methods)])
    columns.append(column("mean rank", list(ranks(results).values()), low=True, digits=2))
    return titled(results, *columns)


def protocols(results: Found) -> Table:
    """The figures of other papers that were measured on all classifiers; nothing if there are none."""
    own = [key for key in results[0]["methods"][RUN] if not key.startswith(("kept", "removed", "on ", "agree "))]
    columns = []
    for key in own:
        if all(key in found["methods"][RUN] for found in results):
            name, _, share = key.rpartition("_")
            title = f"{SHORT[name]} {share}%" if name in SHORT else SHORT.get(key, key)
            columns += means(results, title, [key] * len(results))
    return titled(results, *columns) if columns else []


def agreement(results: Found, names: list[str]) -> Table:
    """How often the head names the classifier's class, from how many cells."""
    table = [["the head's agreement with the classifier", *names]]
    for title, kind in (("default", "default"), ("bare bound", "bound")):
        sizes = [
            f"{found['own'][kind]:.3f} by {found['own'][f'size {kind}']:.1f} of {found['cells']}" for found in results
        ]
        table.append([title, *sizes])
    return table


def main() -> None:
    """Read the results, print the tables, write them."""
    parser = parser_of(__doc__)
    parser.add_argument("out", nargs="+", type=Path)
    parser.add_argument("--names", nargs="+", help="of the classifiers, in order")
    parser.add_argument("--csv", type=Path, metavar="FOLDER", help="write the tables here, too")
    arguments = parser.parse_args()
    results = [json.loads((folder / RESULTS).read_text(encoding="utf-8")) for folder in arguments.out]
    names = arguments.names or [f"{found['classifier']}, {found['photos']} photos" for found in results]
    made = {"classifiers": classifiers(results, names), "protocols": protocols(results)}
    for table in (*made.values(), agreement(results, names)):
        print("\n".join(line for at, each in enumerate(table) for line in row(*each, ruled=not at)), end="\n\n")
    for name, table in made.items() if arguments.csv else ():
        with (arguments.csv / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(table)


if __name__ == "__main__":
    main()
