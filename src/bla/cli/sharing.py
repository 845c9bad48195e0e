"""What the commands share: exit codes, options, and how a photo that was skipped is told."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

DONE, FAULT, MISTAKE, DONE_BUT = 0, 1, 2, 3
"""Exit codes: done; a fault of ours; the user's mistake; done but for some inputs, each reported."""

Json = Annotated[bool, Parameter(negative=(), help="Print one JSON object on stdout, and nothing else there.")]
Device = Annotated[str, Parameter(help="auto (CUDA where there is one), cpu, cuda, cuda:1, ...")]
CacheFolder = Annotated[
    Path | None, Parameter(name="--cache", help="Where features are kept. By default $BLA_CACHE or the user's cache.")
]
DataRoot = Annotated[
    Path | None,
    Parameter(name="--data-root", help="Where data sets by name are kept. By default $BLA_DATA or the user's data."),
]


def skipped(failures: Sequence[tuple[str, str]]) -> int:
    for image, error in failures:
        print(skip_line(image, error), file=sys.stderr)
    return DONE_BUT if failures else DONE


def skip_line(image: str, error: str) -> str:
    return f"skipped {error}" if image in error else f"skipped {image}: {error}"
