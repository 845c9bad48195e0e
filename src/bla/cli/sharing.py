"""What the commands share: exit codes, options, and how they report a skipped photo."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

DONE, FAULT, MISTAKE, DONE_BUT = 0, 1, 2, 3
"""Exit codes: done; a fault of ours; the user's mistake; done except for some inputs, each reported."""

Flag = Annotated[bool, Parameter(negative=())]
Check = Annotated[
    bool,
    Parameter(
        negative=(),
        help="Ask the whole classifier, in two more passes, about the selected pixels alone and the other ones.",
    ),
]
FillName = Literal["coarse", "blur", "mean", "grey"]
Fill = Annotated[
    FillName,
    Parameter(help="With --check, what replaces the other pixels: the photo made coarse, a blur, its mean, or grey."),
]
Json = Annotated[bool, Parameter(negative=(), help="Print one JSON object on stdout, and nothing else there.")]
Device = Annotated[str, Parameter(help="auto (CUDA if available), cpu, cuda, cuda:1, ...")]
TrustCode = Annotated[
    str | None,
    Parameter(
        name="--trust-code", env_var="BLA_TRUST_CODE", show_env_var=False,
        help="package.module:callable, the code that the run names as its classifier: run it.",
    ),
]  # fmt: skip
CacheFolder = Annotated[
    Path | None, Parameter(name="--cache", help="Where features are kept. By default $BLA_CACHE or the user's cache.")
]
DataRoot = Annotated[
    Path | None,
    Parameter(name="--data-root", help="Where named data sets are kept. By default $BLA_DATA or the user's data."),
]


def skipped(failures: Sequence[tuple[str, str]]) -> int:
    """Report the skipped photos, and return the exit code."""
    for image, error in failures:
        print(skip_line(image, error), file=sys.stderr)
    return DONE_BUT if failures else DONE


def skip_line(image: str, error: str) -> str:
    """One line on a skipped photo; most errors name the photo already."""
    return f"skipped {error}" if image in error else f"skipped {image}: {error}"
