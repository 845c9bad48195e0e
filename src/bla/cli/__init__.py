"""The command: parse, call, print. Results go to stdout, all else to stderr. One file holds one group of commands."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Literal

from cyclopts import App, CycloptsError, Group, Parameter

import bla
from bla import BlaError
from bla.cli.batches import batch
from bla.cli.caches import caches
from bla.cli.calibrating import calibrate
from bla.cli.comparing import compare
from bla.cli.explaining import explain
from bla.cli.reporting import report
from bla.cli.sharing import DONE, FAULT, MISTAKE, Command, plausible, say
from bla.cli.shipping import export, serve
from bla.cli.training import evaluate, recommended, train

FOREIGN = {"pyarrow", "safetensors", "sqlalchemy", "sqlite3", "zipfile", "zlib"}
"""Libraries that read files, and raise errors of their own classes at a damaged one."""

app = Command(
    name="bla",
    help="Make an image classifier show what it looked at: bounded logit attention.\n\n"
    "Example: `bla explain photo.jpg`",
    help_format="plaintext",
    version=lambda: bla.__version__,
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,
    default_parameter=Parameter(validator=plausible),
)
_GROUPS = {
    "Explain photos": (explain, batch),
    "Train on your own images": (train, evaluate, calibrate),
    "Compare with other methods": (compare, report),
    "Put to use": (export, serve),
    "This computer": (caches,),
}
for title, commands in _GROUPS.items():
    group = Group.create_ordered(title)
    for number, command in enumerate(commands):
        if isinstance(command, App):
            command.group = group
            app.command(command)
        else:
            app.command(command, group=group, sort_key=number, config=recommended if command is train else None)


@app.command(group=group)
def completion(*, shell: Literal["bash", "zsh", "fish", "powershell"] | None = None) -> None:
    """Install shell completion: a script, and a line in the shell's startup file.

    Example: `bla completion --shell bash`

    :param shell: By default the current one.
    """
    from cyclopts.completion.detect import ShellDetectionError

    try:
        app["study"]
    except BlaError:  # its extra is missing
        del app["study"]
    try:
        path = app.install_completion(shell=shell)
    except ShellDetectionError as error:
        raise BlaError("expected a shell that can be recognised, got another: name one with --shell") from error
    say(f"New shells complete bla, by {path}.")


for flag in ("--help", "--version"):
    app[flag].group = group
about_study = "Ask people: a blind study of explanations.\n\nExample: `bla study init look --arms why-bla why-cam`"
# loaded when used: it needs an extra
app.command("bla.cli.studies:studies", name="study", help=about_study, group="Compare with other methods")


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point: run a command and exit with its code."""
    sys.exit(run_command(sys.argv[1:] if arguments is None else arguments))


def run_command(arguments: Sequence[str]) -> int:
    """Run a command. An error becomes an exit code, and one line on stderr if the user can mend it."""
    try:
        result = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
        return result if isinstance(result, int) else DONE
    except CycloptsError as error:
        command = " ".join(("bla", *(error.command_chain or ())))
        return _mistake(f"{str(error).strip()} (see {command} --help)")
    except KeyboardInterrupt:
        say("interrupted; rerun the command to resume", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter complains at exit
        return DONE
    except BlaError as error:
        return _mistake(str(error))
    except OSError as error:
        return _mistake(f"expected to read and write files, got {error}")
    except MemoryError as error:
        return _mistake(f"expected enough memory, got {error or 'none left'}: ask for less at once")
    except Exception as error:
        if type(error).__module__.partition(".")[0] in FOREIGN:
            return _mistake(f"expected files that can be read, got {type(error).__name__}: {error!s:.500}")
        traceback.print_exc()
        return FAULT


def _mistake(message: str) -> int:
    say("bla: " + " ".join(message.split())[:4000], file=sys.stderr)
    return MISTAKE
