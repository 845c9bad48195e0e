"""What the commands share: exit codes, options, needed packages, a port, and how they report a skipped photo."""

from __future__ import annotations

import importlib.util
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

from cyclopts import App, ArgumentCollection, Group, Parameter
from cyclopts.validators import Number

from bla import BlaError
from bla.progress import printable

DONE, FAULT, MISTAKE, DONE_BUT = 0, 1, 2, 3
"""Exit codes: done; a fault of ours; the user's mistake; done except for some inputs, each reported."""

_COMMON = {
    "train": {"out", "setup", "model", "head", "epochs", "mean-size", "image-size", "validation", "device", "json"},
    "init": {"arms", "task", "title", "question", "trials", "people", "truth", "texts", "seed", "json"},
}
"""The ten options that most users of a command with many want."""
_FIRST = Group.create_ordered("Common options")


class Command(App):
    """A command that shows its common options in a group before the others, and each option's help as one paragraph."""

    def assemble_argument_collection(self, **options: Any) -> ArgumentCollection:
        """The arguments, as cyclopts finds them, the common ones in a group of their own."""
        found = super().assemble_argument_collection(**options)
        for argument in found:
            one_line = Parameter(help=" ".join((argument.parameter.help or "").split()))
            argument.parameter = Parameter.combine(argument.parameter, one_line)
            if argument.name.removeprefix("--") in _COMMON.get(self.name[0], ()):
                argument.parameter = Parameter.combine(argument.parameter, Parameter(group=_FIRST))
        return found


def flat(title: str | None = None, **others: Any) -> Parameter:
    """A dataclass's fields as options, in a group if it has a title."""
    if title is not None:
        others["group"] = Group.create_ordered(title)
    return Parameter(name="*", negative_iterable=(), **others)


def plausible(_: object, value: object) -> None:
    """What every number on a command line must be."""
    for each in value if isinstance(value, list | tuple) else (value,):
        if isinstance(each, int | float) and not abs(each) < 1e15:
            raise ValueError("Must be a number below 1e15.")


def within(low: float, high: float) -> Parameter:
    """A number from ``low`` to ``high``."""
    return Parameter(validator=Number(gte=low, lte=high))


Host = Annotated[str, Parameter(help="The address to listen at; 0.0.0.0 for all.")]
Port = Annotated[int, within(0, 65_535), Parameter(help="The port to listen at; 0 takes a free one.")]
RunName = Annotated[str, Parameter(help="A run folder, or a shipped explainer's name.")]
RunOrGraph = Annotated[
    str, Parameter(help="A run folder, a shipped explainer's name, or an exported graph, FILE.onnx.")
]
Seed = Annotated[int, Parameter(help="Seed of all randomness.")]
Stream = Annotated[
    bool, Parameter(negative=(), help="Recompute features instead of caching them, for sets that fit no disk.")
]
Flag = Annotated[bool, Parameter(negative=())]
Check = Annotated[
    bool,
    Parameter(
        negative=(),
        help="Ask the whole classifier about the selected pixels alone and about the others: two more passes.",
    ),
]
FillName = Literal["coarse", "blur", "mean", "grey"]
Fill = Annotated[
    FillName,
    Parameter(help="What replaces missing pixels: the photo at 12 x 12 points (coarse), a blur, its mean, grey."),
]
Json = Annotated[bool, Parameter(negative=(), help="Print one JSON object on stdout, and nothing else there.")]
Device = Annotated[str, Parameter(help="auto (CUDA if available), cpu, cuda, cuda:1, ...")]
TrustCode = Annotated[
    str | None,
    Parameter(
        name="--trust-code", env_var="BLA_TRUST_CODE", show_env_var=False,
        help="Run this code, package.module:callable, which the run names as its classifier.",
    ),
]  # fmt: skip
CacheFolder = Annotated[
    Path | None,
    Parameter(name="--cache", help="Folder of cached features: by default $BLA_CACHE, else the user's cache."),
]
DataRoot = Annotated[
    Path | None,
    Parameter(name="--data-root", help="Folder of named data sets: by default $BLA_DATA, else the user's data."),
]

EXTRAS = {
    "batch": "pyarrow",
    "compare": "captum jinja2 pytorch_grad_cam",
    "export": "onnx onnx_ir onnxruntime onnxscript",
    "ray": "pyarrow ray",
    "serve": "fastapi onnxruntime prometheus_client pydantic python_multipart uvicorn",
    "study": "alembic fastapi jinja2 pydantic python_multipart scipy sqlalchemy uvicorn",
}
"""The modules that commands need of each extra in pyproject.toml."""


def require(*extras: str) -> None:
    """Raise an error with the command to run, before any work, if packages of these extras are missing; import none."""
    missing = {
        extra: absent
        for extra in extras
        if (absent := [name for name in EXTRAS[extra].split() if importlib.util.find_spec(name) is None])
    }
    if missing:
        names = dict.fromkeys(name for absent in missing.values() for name in absent)
        packages, wanted = f"package{'s' * (len(names) > 1)} {', '.join(names)}", ",".join(missing)
        raise BlaError(f"expected the {packages}, got none: pip install 'bounded-logit-attention[{wanted}]'")


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
        raise BlaError(f"expected a free port at {host}:{port}, got: {reason}; choose another --port") from error


def say(text: object, *, file: TextIO | None = None, flush: bool = False) -> None:
    """Print text for people."""
    print(printable(str(text)), file=file, flush=flush)


def skipped(failures: Sequence[tuple[str, str]]) -> int:
    """Report the skipped photos, and return the exit code."""
    for image, error in failures:
        say(skip_line(image, error), file=sys.stderr)
    return DONE_BUT if failures else DONE


def skip_line(image: str, error: str) -> str:
    """One line on a skipped photo; most errors name the photo already."""
    return f"skipped {error}" if image in error else f"skipped {image}: {error}"
