"""One table over several classifiers: do the figures of own_prediction hold beyond one trunk?

    python -m benchmarks.faithfulness.classifiers OUT [OUT ...]

Every OUT is a folder of `own_prediction`, of another classifier or other photos; sizes are the same shares of each
grid. For every method: what is kept and removed by classifier, the mean over them, the explainer's mean difference
from it, and its mean rank over classifiers and measures. The interval of a mean difference is that over photos: half
widths of the classifiers' own intervals added in quadrature and divided by their number. Where all were measured with
--protocols, the figures of other papers follow: means over the classifiers, and the explainer's differences.
"""

from __future__ import annotations

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


def key_of(found: dict[str, Any], name: str, share: float) -> str:
    """The key of a measure at a share of the grid: "kept 12"."""
    return f"{name} {found['sizes'][SHARES.index(share)]}"


def mean_difference(results: Found, method: str, keys: list[str]) -> tuple[float, float]:
    """The explainer's difference from a method, by a key of each; its mean over them, and half of its 95% interval."""
    rows = [found["differences"][key][method] for found, key in zip(results, keys, strict=True)]
    halves = [(each["high"] - each["low"]) / 2 for each in rows]
    return float(np.mean([each["mean"] for each in rows])), float(np.linalg.norm(halves)) / len(rows)


def apart_from(results: Found, method: str, keys: list[str]) -> str:
    """The explainer's mean difference from a method in words, nothing from itself."""
    return "" if method == RUN else "{:+.3f} ± {:.3f}".format(*mean_difference(results, method, keys))


def protocols(results: Found, methods: list[str], titles: dict[str, str]) -> list[str]:
    """Markdown: the figures of other papers that were measured on all classifiers."""
    own = [key for key in results[0]["methods"][RUN] if not key.startswith(("kept", "removed", "on ", "agree "))]
    keys = [key for key in own if all(key in found["methods"][RUN] for found in results)]
    lines = row("ranked by", *(name for key in keys for name in (key, "ours less it")), ruled=True) if keys else []
    for method in methods if keys else ():
        means = [f"{np.mean([found['methods'][method][key] for found in results]):.3f}" for key in keys]
        apart = [apart_from(results, method, [key] * len(results)) for key in keys]
        lines += row(titles[method], *(each for pair in zip(means, apart, strict=True) for each in pair))
    return [*lines, ""] if lines else []


def ranks(results: Found, methods: list[str]) -> dict[str, float]:
    """The mean rank of each method, 1 for the best, over classifiers, sizes, and kept and removed."""
    places = [
        stats.rankdata([sign * found["methods"][method][key_of(found, name, share)] for method in methods])
        for found in results
        for share in SHARES
        for name, sign in (("kept", -1), ("removed", 1))
    ]
    return dict(zip(methods, np.mean(places, axis=0).tolist(), strict=True))


def table(results: Found) -> str:
    """Markdown, a part for every measure and size, and the ranks."""
    methods = [name for name in results[0]["methods"] if all(name in found["methods"] for found in results)]
    titles = results[0]["titles"] | {RUN: "ours"}
    names = [f"{found['classifier']}, {found['photos']}" for found in results]
    lines = [f"Classifiers and photos: {'; '.join(names)}.", ""]
    for name in ("kept", "removed"):
        for share in SHARES:
            lines += row(f"{name}, {share:.0%} of the cells", *names, "mean", "ours less it", ruled=True)
            keys = [key_of(found, name, share) for found in results]
            for method in methods:
                means = [found["methods"][method][key] for found, key in zip(results, keys, strict=True)]
                apart = apart_from(results, method, keys)
                lines += row(titles[method], *(f"{each:.3f}" for each in means), f"{np.mean(means):.3f}", apart)
            lines.append("")
    lines += protocols(results, methods, titles)
    lines += row("the head's agreement with the classifier", *names, ruled=True)
    for title, kind in (("default", "default"), ("bare bound", "bound")):
        sizes = [
            f"{found['own'][kind]:.3f} by {found['own'][f'size {kind}']:.1f} of {found['cells']}" for found in results
        ]
        lines += row(title, *sizes)
    lines += ["", *row("method", "mean rank", ruled=True)]
    for method, rank in sorted(ranks(results, methods).items(), key=lambda item: item[1]):
        lines += row(titles[method], f"{rank:.2f}")
    return "\n".join(lines)


def main() -> None:
    """Read the results, print the table."""
    parser = parser_of(__doc__)
    parser.add_argument("out", nargs="+", type=Path)
    paths = [folder / RESULTS for folder in parser.parse_args().out]
    print(table([json.loads(path.read_text(encoding="utf-8")) for path in paths]))


if __name__ == "__main__":
    main()
