"""The command: parse, call, print. Results go to stdout, all else to stderr. A file a group of commands."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from cyclopts import App, CycloptsError

from bla import BlaError
from bla.cli.sharing import DONE, FAULT, MISTAKE

app = App(
    name="bla",
    help="Make an image classifier show what it looked at: bounded logit attention.",
    help_format="plaintext",
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,
)
app.command("bla.cli.training:train")
app.command("bla.cli.training:evaluate")
app.command("bla.cli.explaining:explain")
app.command("bla.cli.comparing:compare")
app.command("bla.cli.reporting:report")
app.command("bla.cli.shipping:export")
app.command("bla.cli.batches:batch")
app.command("bla.cli.shipping:serve")
app.command("bla.cli.caches:caches", name="cache")
app.command("bla.cli.studies:studies", name="study")


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point: run a command and exit with its code."""
    sys.exit(run_command(sys.argv[1:] if arguments is None else arguments))


def run_command(arguments: Sequence[str]) -> int:
    """Run a command; errors become an exit code and, where the user can mend them, one line on stderr."""
    try:
        result = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
        return result if isinstance(result, int) else DONE
    except CycloptsError as error:
        return _mistake(f"{str(error).strip()} (bla --help shows the commands)")
    except KeyboardInterrupt:
        print("interrupted; the same command again goes on where it stopped", file=sys.stderr)
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
