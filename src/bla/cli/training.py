"""`bla train` and `bla evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from bla.cli.sharing import DONE, CacheFolder, DataRoot, Device, Json, skipped


def train(
    data: str,
    /,
    *,
    out: Path,
    setup: Literal["bla", "bla-t", "bla-ph", "l2x-f", "recommended", "recommended-ph"] = "bla",
    model: str = "tf_efficientnet_lite0",
    weights: str | None = None,
    head: Literal["new", "own"] = "new",
    targets: Literal["labels", "predictions"] = "labels",
    epochs: int | None = None,
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
    class_aware: bool | None = None,
    straight_through: float | None = None,
    final_temperature: float | None = None,
    mean_size: float | None = None,
    dial: float = 0.0,
    size: int = 8,
    variant: Literal["official", "corrected"] = "official",
    trunk_rate: float | None = None,
    augment: Annotated[bool, Parameter(negative=())] = False,
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    validation: float = 0.0,
    patience: int | None = None,
    crop: Annotated[bool, Parameter(negative=())] = False,
    image_size: int | None = None,
    device: Device = "auto",
    data_root: DataRoot = None,
    cache: CacheFolder = None,
    stream: Annotated[bool, Parameter(negative=())] = False,
    json_: Annotated[Json, Parameter(name="--json")] = False,
) -> int:
    """Train an explainer on images and write a run folder. Interrupted, run it again: it goes on.

    By several processes as one: torchrun --nproc-per-node 2 -m bla train ...

    Parameters
    ----------
    data
        A folder, CLASS/*.jpg or {train,test}/CLASS/*.jpg or images without classes, or a published data set's own
        layout; a table, .csv or .tsv, of images and labels, of which each may have several; or a name: embedded,
        cats_vs_dogs, stanford_dogs, caltech_birds2011, or hf:SOURCE for a folder or a name of Hugging Face datasets.
    out
        The run folder to write.
    setup
        bla; bla-t, with a threshold; bla-ph, post hoc with a frozen head; l2x-f, the fixed-size rival; or what we
        recommend: a class-aware score, a mean size of 8, hidden 64, straight-through 0.5, more epochs;
        recommended-ph has a frozen head.
    model
        A timm model, or package.module:callable for a classifier of yours.
    weights
        A file of its weights, or "random". By default ImageNet's.
    head
        new, for the data's classes, trained first; or own, the classifier's own, which stays as it is.
    targets
        What to predict: the data's labels, or the classifier's own predictions (with --head own).
    epochs
        Epochs of the module's stage: by default 5, with recommended 10.
    head_epochs
        Epochs of the head's stage: by default as many, with recommended 15.
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
    class_aware
        Score each cell by what the head says there about the class to be explained.
    straight_through
        Share of the loss that is taken from the hard selection, with the soft one's gradient.
    final_temperature
        Go from the temperature to this one while training.
    mean_size
        Select so many cells on average; below 1, such a share of the cells.
    dial
        Share of the batches to train at sizes drawn anew, so that explain --size is trained for.
    size
        Cells of l2x-f.
    variant
        Of l2x-f: the temperature multiplies (official) or divides (corrected).
    trunk_rate
        Train the trunk too, end to end, with this learning rate (1e-4, say); by default it stays as it is.
    augment
        Change the photos at random that a trunk is trained on: part, mirror, brightness, contrast, saturation.
    precision
        Of a trunk that is trained: float32, or mixed with bfloat16 or float16.
    validation
        Share of the training images held out to watch.
    patience
        End a stage after so many epochs without a smaller validation loss, and keep the best.
    crop
        Show the model its own resize and centre crop, in place of the whole photo squashed.
    image_size
        Pixels a side of the model's input, 448 say: more and finer cells. By default the model's own.
    stream
        Keep no features but compute them anew for every batch: for sets whose features fit no disk.
    """
    from bla.progress import shown_progress
    from bla.runs import run
    from bla.training import processes
    from bla.training.settings import Settings

    given: dict[str, Any] = {
        "head": head,
        "targets": targets,
        "epochs": epochs,
        "head_epochs": head_epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "dropout": dropout,
        "seed": seed,
        "temperature": temperature,
        "threshold": _threshold(threshold),
        "hidden": None if hidden is None else tuple(hidden),
        "context": context,
        "gate": gate,
        "class_aware": class_aware,
        "straight_through": straight_through,
        "final_temperature": final_temperature,
        "mean_size": mean_size,
        "dial": dial,
        "size": size,
        "variant": variant,
        "validation": validation,
        "patience": patience,
        "trunk_rate": trunk_rate,
        "augment": augment,
        "precision": precision,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if setup == "recommended":
        settings = Settings.recommended(**given)
    elif setup == "recommended-ph":
        settings = Settings.recommended(setup="bla-ph", **given)
    else:
        settings = Settings(setup=setup, **given)
    mode: Literal["squash", "crop"] = "crop" if crop else "squash"
    with processes.joined(), shown_progress() as report:
        trained = run.train(
            data,
            out,
            settings,
            model=model,
            weights=weights,
            mode=mode,
            image_size=image_size,
            device=device,
            data_root=data_root,
            cache=cache,
            stream=stream,
            report=report,
        )
        if processes.rank():
            return DONE  # the first one tells
    record = trained.record
    if json_:
        print(json.dumps(record))
    else:
        _print_metrics(record["metrics"], f"{record['setup']} on {record['model']}")
        if record["dead"]:
            print("The module died in training: all cells are selected. Train with a lower learning rate.")
        print(f"The run is in {out}. Next: bla explain PHOTO --run {out}")
    return skipped([(entry["image"], entry["error"]) for entry in record["skipped"]])


def evaluate(
    run: str,
    /,
    *,
    data: str | None = None,
    device: Device = "auto",
    data_root: DataRoot = None,
    cache: CacheFolder = None,
    stream: Annotated[bool, Parameter(negative=())] = False,
    json_: Annotated[Json, Parameter(name="--json")] = False,
) -> int:
    """Measure a run on test images: baseline, soft and hard predictions, agreement, size of the explanations.

    Parameters
    ----------
    run
        A run folder, or a shipped explainer's name.
    data
        Images to measure on, with the run's classes. By default those it was trained with.
    stream
        Keep no features: for sets whose features fit no disk.
    """
    from bla.progress import shown_progress
    from bla.runs.run import evaluate as measured
    from bla.training import processes

    with processes.joined(), shown_progress() as report:
        metrics, failures = measured(
            run, data, device=device, data_root=data_root, cache=cache, stream=stream, report=report
        )
        if processes.rank():
            return DONE
    if json_:
        print(json.dumps(metrics))
    else:
        _print_metrics(metrics, run)
    return skipped(failures)


def _threshold(text: str | None) -> float | Literal["auto"] | None:
    from bla.training.settings import TrainingError

    if text == "auto":
        return "auto"
    try:
        return None if text is None else float(text)
    except ValueError:
        raise TrainingError(f"expected threshold auto or a number, got {text!r}") from None


def _print_metrics(metrics: dict[str, Any], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    several = "label_agreement" in metrics
    columns = (
        {"loss": "loss", "average_precision": "mean AP", "auc": "mean AUC", "exact": "all labels right"}
        if several
        else {"loss": "loss", "top1": "top-1", "top5": "top-5"}
    )
    table = Table("predictions from", *columns.values(), title=title, title_justify="left")
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
        table.add_row(name, *("-" if values[column] is None else f"{values[column]:.3f}" for column in columns))
    Console().print(table)
    size = metrics["size"]
    if several:
        print(f"Labels on which hard and baseline agree: {metrics['label_agreement']:.3f}.")
    print(
        f"Size: {size['mean']:.1f} of {size['cells']} cells on average (std {size['std']:.1f}, {size['min']} to "
        f"{size['max']}). Agreement of hard with baseline: {metrics['agreement']:.3f}. Images: {metrics['images']}."
    )
