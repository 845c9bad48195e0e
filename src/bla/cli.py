"""The command: parse, call, print. Results go to stdout, all else to stderr."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bla.explanation import Explanation

DONE, FAULT, MISTAKE, DONE_BUT = 0, 1, 2, 3
"""Exit codes: done; a fault of ours; the user's mistake; done but for some inputs, each reported."""

app = App(
    name="bla",
    help="Make an image classifier show what it looked at: bounded logit attention.",
    help_format="plaintext",
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,
)
caches = App(name="cache", help="List, check and remove cached features.", help_format="plaintext")
app.command(caches)

Json = Annotated[bool, Parameter(negative=(), help="Print one JSON object on stdout, and nothing else there.")]
Device = Annotated[str, Parameter(help="auto (CUDA where there is one), cpu, cuda, cuda:1, ...")]
CacheFolder = Annotated[
    Path | None, Parameter(name="--cache", help="Where features are kept. By default $BLA_CACHE or the user's cache.")
]


@app.command
def train(
    data: str,
    /,
    *,
    out: Path,
    setup: Literal["bla", "bla-t", "bla-ph", "l2x-f"] = "bla",
    model: str = "tf_efficientnet_lite0",
    weights: str | None = None,
    head: Literal["new", "own"] = "new",
    targets: Literal["labels", "predictions"] = "labels",
    epochs: int = 5,
    head_epochs: int | None = None,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    dropout: float = 0.2,
    seed: int = 0,
    temperature: float = 0.1,
    threshold: str | None = None,
    hidden: Annotated[list[int] | None, Parameter(negative=())] = None,
    context: Annotated[bool, Parameter(negative=())] = False,
    gate: Annotated[bool, Parameter(negative=())] = False,
    size: int = 8,
    variant: Literal["official", "corrected"] = "official",
    validation: float = 0.0,
    patience: int | None = None,
    crop: Annotated[bool, Parameter(negative=())] = False,
    device: Device = "auto",
    cache: CacheFolder = None,
    json_: Annotated[Json, Parameter(name="--json")] = False,
) -> int:
    """Train an explainer on a folder of images and write a run folder. Interrupted, run it again: it goes on.

    Parameters
    ----------
    data
        A folder, CLASS/*.jpg or {train,test}/CLASS/*.jpg or images without classes; or "embedded".
    out
        The run folder to write.
    setup
        bla; bla-t, with a threshold; bla-ph, post hoc with a frozen head; l2x-f, the fixed-size rival.
    model
        A timm model, or package.module:callable for a classifier of yours.
    weights
        A file of its weights, or "random". By default ImageNet's.
    head
        new, for the data's classes, trained first; or own, the classifier's own, which stays as it is.
    targets
        What to predict: the data's labels, or the classifier's own predictions (with --head own).
    epochs
        Epochs of the module's stage.
    head_epochs
        Epochs of the head's stage; by default as many.
    batch_size
        Images in a batch.
    learning_rate
        Adam's.
    dropout
        Before a new head.
    seed
        Of everything random.
    temperature
        Multiplies the scores.
    threshold
        Taken off the weights: a number, or auto for 0.98 / cells. By default the setup's.
    hidden
        Channels of a further 1x1 convolution before the score; may be given several times.
    context
        Add a vector made from the pooled map to every cell before scoring.
    gate
        The sigmoid gate in place of the softmax.
    size
        Cells of l2x-f.
    variant
        Of l2x-f: the temperature multiplies (official) or divides (corrected).
    validation
        Share of the training images held out to watch.
    patience
        End a stage after so many epochs without a smaller validation loss, and keep the best.
    crop
        Show the model its own resize and centre crop, in place of the whole photo squashed.
    """
    from bla import run
    from bla.progress import shown_progress
    from bla.training import Settings

    settings = Settings(
        setup=setup,
        head=head,
        targets=targets,
        epochs=epochs,
        head_epochs=head_epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        dropout=dropout,
        seed=seed,
        temperature=temperature,
        threshold=_threshold(threshold),
        hidden=tuple(hidden or ()),
        context=context,
        gate=gate,
        size=size,
        variant=variant,
        validation=validation,
        patience=patience,
    )
    mode: Literal["squash", "crop"] = "crop" if crop else "squash"
    with shown_progress() as report:
        trained = run.train(
            data, out, settings, model=model, weights=weights, mode=mode, device=device, cache=cache, report=report
        )
    record = trained.record
    if json_:
        print(json.dumps(record))
    else:
        _print_metrics(record["metrics"], f"{record['setup']} on {record['model']}")
        if record["dead"]:
            print("The module died in training: all cells are selected. Train with a lower learning rate.")
        print(f"The run is in {out}. Next: bla explain PHOTO --run {out}")
    return _skipped([(entry["image"], entry["error"]) for entry in record["skipped"]])


@app.command
def evaluate(
    run: str,
    /,
    *,
    data: str | None = None,
    device: Device = "auto",
    cache: CacheFolder = None,
    json_: Annotated[Json, Parameter(name="--json")] = False,
) -> int:
    """Measure a run on test images: baseline, soft and hard predictions, agreement, size of the explanations.

    Parameters
    ----------
    run
        A run folder, or a shipped explainer's name.
    data
        Images to measure on, with the run's classes. By default those it was trained with.
    """
    from bla.progress import shown_progress
    from bla.run import evaluate as measured

    with shown_progress() as report:
        metrics, failures = measured(run, data, device=device, cache=cache, report=report)
    if json_:
        print(json.dumps(metrics))
    else:
        _print_metrics(metrics, run)
    return _skipped(failures)


@app.command
def explain(
    photos: Annotated[list[Path], Parameter(consume_multiple=True)],
    /,
    *,
    run: str = "tf_efficientnet_lite0",
    size: int | None = None,
    out: Path | None = None,
    device: Device = "auto",
    json_: Annotated[Json, Parameter(name="--json", help="Print a JSON object a line, one an image.")] = False,
) -> int:
    """Explain photos: what the classifier sees in each, and the cells that alone made the prediction.

    For each photo a panel (PNG) and its explanation (JSON) are written. Interrupted, run it again: it goes on.

    Parameters
    ----------
    photos
        Photos, and folders of them.
    run
        A run folder, or a shipped explainer's name.
    size
        Select exactly so many cells. By default the explainer chooses, photo by photo.
    out
        Where to write. By default "why"; with --json nothing is written unless this is given.
    """
    from bla.data import list_images
    from bla.explaining import explain_files
    from bla.explanation import Unexplained
    from bla.progress import shown_progress

    paths = list_images(photos)
    folder = out if out is not None or json_ else Path("why")
    failed = 0
    with shown_progress() as report:
        for index, result in enumerate(explain_files(paths, run=run, size=size, out=folder, device=device), start=1):
            if json_:
                print(json.dumps(result.to_dict()), flush=True)
            if isinstance(result, Unexplained):
                failed += 1
                report(_skip(result.image, result.error), 0, 0)
            elif not json_:
                print(_one_line(result), flush=True)
            report("explaining", index, len(paths))
    if folder is not None and not json_ and failed < len(paths):
        print(f"The pictures are in {folder}.")
    return DONE_BUT if failed else DONE


@caches.command(name="list")
def list_caches(*, cache: CacheFolder = None, json_: Annotated[Json, Parameter(name="--json")] = False) -> int:
    """List what is cached."""
    from bla.cache import default_root, listed

    entries = listed(cache)
    if json_:
        print(json.dumps({"root": str(cache or default_root()), "caches": entries}))
        return DONE
    for entry in entries:
        state = "" if entry["complete"] else f"  incomplete, {entry['done']} done"
        print(
            f"{entry['key'][:12]}  {entry['bytes'] / 1e6:9.1f} MB  {entry['images']:7} images  "
            f"{entry['classifier']}  {entry['data']}  {entry['created']}{state}"
        )
    print(f"{len(entries)} in {cache or default_root()}, {sum(entry['bytes'] for entry in entries) / 1e6:.1f} MB")
    return DONE


@caches.command(name="remove")
def remove_caches(
    keys: Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())] = None,
    /,
    *,
    all_: Annotated[bool, Parameter(name="--all", negative=())] = False,
    cache: CacheFolder = None,
) -> int:
    """Remove caches by key, or by the beginning of one.

    Parameters
    ----------
    keys
        As `bla cache list` shows them.
    all_
        Every one.
    """
    from bla.cache import CacheError, listed, remove

    chosen = [entry["key"] for entry in listed(cache)] if all_ else list(keys or [])
    if not chosen and not all_:
        raise CacheError("expected keys of caches to remove, or --all, got neither: `bla cache list` shows them")
    for key in remove(chosen, cache):
        print(f"removed {key[:12]}")
    return DONE


@caches.command(name="check")
def check_caches(*, cache: CacheFolder = None) -> int:
    """Read every complete cache in full against its checksums."""
    from bla.cache import damaged, default_root, listed

    root = cache or default_root()
    bad = 0
    for entry in listed(cache):
        if entry["complete"]:
            files = damaged(root / entry["key"])
            bad += bool(files)
            print(f"{entry['key'][:12]}  {'damaged: ' + ', '.join(files) if files else 'whole'}")
    return DONE_BUT if bad else DONE


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
    except OSError as error:
        return _mistake(f"expected to read and write files, got {error}")
    except Exception as error:
        # Each room of ours has an error for what the user can mend; any other is our fault.
        if isinstance(error, ValueError) and type(error).__module__.startswith("bla."):
            return _mistake(str(error))
        traceback.print_exc()
        return FAULT


def _mistake(message: str) -> int:
    print("bla: " + " ".join(message.split()), file=sys.stderr)
    return MISTAKE


def _threshold(text: str | None) -> float | Literal["auto"] | None:
    from bla.training import TrainingError

    if text == "auto":
        return "auto"
    try:
        return None if text is None else float(text)
    except ValueError:
        raise TrainingError(f"expected threshold auto or a number, got {text!r}") from None


def _skipped(failures: Sequence[tuple[str, str]]) -> int:
    for image, error in failures:
        print(_skip(image, error), file=sys.stderr)
    return DONE_BUT if failures else DONE


def _skip(image: str, error: str) -> str:
    return f"skipped {error}" if image in error else f"skipped {image}: {error}"


def _one_line(explanation: Explanation) -> str:
    best = explanation.prediction
    cells = explanation.selected.size
    return f"{explanation.image}: {best.label} {best.probability:.1%}, {explanation.size} of {cells} cells"


def _print_metrics(metrics: dict[str, Any], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("predictions from", "loss", "top-1", "top-5", title=title, title_justify="left")
    rows = {
        "mean pooling (baseline)": "baseline",
        "mean pooling, both stages' epochs": "baseline_continued",  # with an own head there is no such training
        "soft selection": "soft",
        "soft, renormalised": "soft_renormalised",
        "hard selection": "hard",
    }
    for name, key in rows.items():
        values = metrics[key]
        if key == "baseline_continued" and values == metrics["baseline"]:
            continue
        table.add_row(name, f"{values['loss']:.3f}", f"{values['top1']:.3f}", f"{values['top5']:.3f}")
    Console().print(table)
    size = metrics["size"]
    print(
        f"Size: {size['mean']:.1f} of {size['cells']} cells on average (std {size['std']:.1f}, {size['min']} to "
        f"{size['max']}). Agreement of hard with baseline: {metrics['agreement']:.3f}. Images: {metrics['images']}."
    )


if __name__ == "__main__":
    main()
