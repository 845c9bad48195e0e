"""The command: parse, call, print. Results go to stdout, all else to stderr. One file holds one group of commands."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from cyclopts import App, CycloptsError

from bla import BlaError
from bla.cli.batches import batch
from bla.cli.caches import caches
from bla.cli.calibrating import calibrate
from bla.cli.comparing import compare
from bla.cli.explaining import explain
from bla.cli.reporting import report
from bla.cli.sharing import DONE, FAULT, MISTAKE
from bla.cli.shipping import export, serve
from bla.cli.training import evaluate, recommended, train

app = App(
    name="bla",
    help="Make an image classifier show what it looked at: bounded logit attention.",
    help_format="plaintext",
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,
)
app.command(train, config=recommended)
for command in (evaluate, calibrate, explain, compare, report, export, batch, serve, caches):
    app.command(command)
about_study = "Ask people: a blind study of explanations.\n\nExample: `bla study init look --arms why-bla why-cam`"
app.command("bla.cli.studies:studies", name="study", help=about_study)  # loaded when used: it needs an extra


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point: run a command and exit with its code."""
    sys.exit(run_command(sys.argv[1:] if arguments is None else arguments))


def run_command(arguments: Sequence[str]) -> int:
    """Run a command. An error becomes an exit code, and one line on stderr if the user can mend it."""
    try:
        result = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
        return result if isinstance(result, int) else DONE
    except CycloptsError as error:
        return _mistake(f"{str(error).strip()} (bla --help shows the commands)")
    except KeyboardInterrupt:
        print("interrupted; rerun the command to resume", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter complains at exit
        return DONE
    except BlaError as error:
        return _mistake(str(error))
    except OSError as error:
        return _mistake(f"expected to read and write files, got {error}")
    except Exception:
        traceback.print_exc()
        return FAULT


def _mistake(message: str) -> int:
    print("bla: " + " ".join(message.split()), file=sys.stderr)
    return MISTAKE
