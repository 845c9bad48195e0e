"""`bla train` and `bla evaluate`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, ArgumentCollection, Parameter
from cyclopts.config import Dict

from bla.cli.sharing import DONE, CacheFolder, DataRoot, Device, Json, RunName, Stream, TrustCode, flat, say, skipped
from bla.progress import printable
from bla.training.settings import (
    OF_MASKED,
    RECOMMENDED,
    Bounded,
    FixedSize,
    Head,
    HeldOut,
    Score,
    Settings,
    Stages,
    TrainingError,
    Trunk,
)

SETUP = Literal["bla", "bla-t", "bla-ph", "l2x-f", "bla-px", "recommended", "recommended-ph"]


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """The classifier to train on, and what it sees of a photo."""

    model: str = "tf_efficientnet_lite0"
    """A timm model, or package.module:callable for your classifier."""
    weights: str | None = None
    """A weights file, or "random". By default ImageNet's."""
    crop: bool = False
    """Use the model's own resizing and centre crop."""
    squash: bool = False
    """Squash the whole photo: the default for a new head; an own head keeps its preprocessing."""
    image_size: int | None = None
    """Pixels per side of the input, 448 say: more, finer cells. By default the model's own."""


@dataclass(frozen=True, kw_only=True)
class MaskedPhotos:
    """What bla-px learns from."""

    masks: int | None = None
    """Masked copies of each photo to learn from. By default 64."""
    fill: Literal["coarse", "blur", "mean", "grey"] | None = None
    """What replaces masked pixels. By default coarse: the photo at 12 x 12 points."""


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where to compute, and where data and features are kept."""

    device: Device = "auto"
    data_root: DataRoot = None
    cache: CacheFolder = None


def train(
    data: str,
    /,
    *,
    out: Path,
    setup: SETUP = "bla",
    classifier: Annotated[Classifier | None, flat("The classifier", negative_bool=())] = None,
    head: Annotated[Head | None, flat("The head")] = None,
    stages: Annotated[Stages | None, flat("How long")] = None,
    score: Annotated[Score | None, flat("The score", negative_bool=())] = None,
    bounded: Annotated[Bounded | None, flat("The selection")] = None,
    fixed_size: Annotated[FixedSize | None, flat("With l2x-f")] = None,
    masked: Annotated[MaskedPhotos | None, flat("With bla-px")] = None,
    trunk: Annotated[Trunk | None, flat("Fine-tuning the trunk", negative_bool=())] = None,
    held_out: Annotated[HeldOut | None, flat("Early stopping")] = None,
    stream: Annotated[Stream, Parameter(group="Where")] = False,
    places: Annotated[Places | None, flat("Where")] = None,
    json_: Annotated[Json, Parameter(name="--json")] = False,
) -> int:
    """Train an explainer on images and write a run folder. If interrupted, rerun: it resumes.

    Example: `bla train photos --out run --setup recommended`

    :param data: A folder (CLASS/*.jpg, {train,test}/CLASS/*.jpg, images without classes, or a published data set); a
        table, .csv or .tsv, of images with any number of labels; or a name: embedded, cats_vs_dogs, stanford_dogs,
        caltech_birds2011, hf:SOURCE (Hugging Face datasets).
    :param out: The run folder to write.
    :param setup: bla; bla-t, with a threshold; bla-ph, post hoc with a frozen head; l2x-f, the fixed-size rival;
        bla-px, which explains the classifier's own prediction, trained on masked photos; recommended: with --head own
        bla-px, else a class-conditional score, mean size 8, hidden 64, straight-through 0.5, more epochs;
        recommended-ph, the same with a frozen head.
    """
    from bla.progress import shown_progress
    from bla.runs import run
    from bla.training import distributed

    parts = (head, stages, score, bounded, fixed_size, masked, trunk, held_out)
    options: dict[str, Any] = {name: value for part in parts if part for name, value in asdict(part).items()}
    if setup == "recommended":
        settings = Settings.recommended(**options)
    elif setup == "recommended-ph":
        settings = Settings.recommended(setup="bla-ph", **options)
    else:
        settings = Settings(setup, **options)
    others = asdict(classifier or Classifier()) | asdict(places or Places()) | {"stream": stream}
    modes = [mode for mode in ("crop", "squash") if others.pop(mode)]
    if len(modes) == 2:
        raise TrainingError("expected one of --crop and --squash, got both")
    others["mode"] = modes[0] if modes else None
    with distributed.joined(), shown_progress() as report:
        trained = run.train(data, out, settings, **others, report=report)
        if distributed.rank():
            return DONE  # the first process prints
    record = trained.record
    if json_:
        print(json.dumps(record))
    else:
        _print_metrics(record["metrics"], f"{record['setup']} on {record['model']}")
        say(f"The run is in {out}. Next: bla explain PHOTO --run {out}")
    return skipped([(entry["image"], entry["error"]) for entry in record["skipped"]])


def recommended(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fill in the options that a command line with a recommended setup or bla-px leaves out."""
    setup, head = (given[-1].value if (given := arguments[name].tokens) else "" for name in ("--setup", "--head"))
    if setup == "bla-px" or (setup == "recommended" and head == "own"):
        options = OF_MASKED
    elif setup.startswith("recommended") and head != "own":
        options = RECOMMENDED
    else:
        return
    named = {name.replace("_", "-"): value for name, value in options.items()}
    Dict(named, source=f"--setup {setup}", use_commands_as_keys=False)(app, commands, arguments)


def evaluate(
    run: RunName,
    /,
    *,
    data: str | None = None,
    stream: Stream = False,
    trust_code: TrustCode = None,
    places: Annotated[Places | None, flat()] = None,
    json_: Annotated[Json, Parameter(name="--json")] = False,
) -> int:
    """Measure a run on test images: baseline, soft and hard predictions, agreement, size of the explanations.

    Example: `bla evaluate run --data photos`

    :param data: Images of the run's classes. By default the run's own.
    """
    from bla.progress import shown_progress
    from bla.runs.certificates import read_certificate
    from bla.runs.run import evaluate as measured
    from bla.training import distributed

    with distributed.joined(), shown_progress() as report:
        where = asdict(places or Places())
        metrics, failures = measured(run, data, model=trust_code, **where, stream=stream, report=report)
        if distributed.rank():
            return DONE
        certificate = read_certificate(run, report=report)
    if json_:
        print(json.dumps(metrics))
    else:
        _print_metrics(metrics, run)
        if certificate is not None:
            say(certificate)
    return skipped(failures)


def _print_metrics(metrics: dict[str, Any], title: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    columns = {"loss": "loss", "top1": "top-1", "top5": "top-5"}
    if several := "label_agreement" in metrics:
        columns = {"loss": "loss", "average_precision": "mean AP", "auc": "mean AUC", "exact": "all labels right"}
    elif all(values.get("top5") in (1, None) for values in metrics.values() if isinstance(values, dict)):
        del columns["top5"]  # at most five classes
    table = Table("predictions from", *columns.values(), title=escape(printable(title)), title_justify="left")
    rows = {
        "mean pooling (baseline)": "baseline",
        "mean pooling, both stages' epochs": "baseline_continued",  # with an own head there is no such training
        "soft selection": "soft",
        "soft, renormalised": "soft_renormalised",
        "hard selection": "hard",
    }
    for name, key in rows.items():
        values = metrics[key]
        if key != "baseline_continued" or values != metrics["baseline"]:
            table.add_row(name, *("-" if values[column] is None else f"{values[column]:.3f}" for column in columns))
    Console().print(table)
    size = metrics["size"]
    if several:
        say(f"Labels on which hard and baseline agree: {metrics['label_agreement']:.3f}.")
    say(
        f"Size: {size['mean']:.1f} of {size['cells']} cells on average (std {size['std']:.1f}, {size['min']} to "
        f"{size['max']}). Agreement of hard with baseline: {metrics['agreement']:.3f}. Images: {metrics['images']}."
    )
