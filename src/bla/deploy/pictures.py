"""Explanations as pictures, and photos on disk to panels and explanations on disk; an interrupted call resumes."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from bla.data.masking import FILLS
from bla.data.photo import PhotoSource, open_photo
from bla.deploy.engine import Engine, kept_graph
from bla.explanations.explanation import SCHEMA_VERSION, Explanation, ExplanationError, Panel, Unexplained
from bla.explanations.picture import columns_of, tiled
from bla.explanations.render import encoded
from bla.files import real, write_atomically
from bla.progress import Progress, silent
from bla.runs.record import read_record, run_folder

SIGNED = "bla"
"""The text field of a panel's PNG that holds its signature; we do not overwrite a picture without one."""

SHEET = "contact-sheet"
_SHEETS = re.compile(rf"{SHEET}(-\d+)?", re.IGNORECASE)
_ON_A_SHEET = 60
_TILE = 320  # pixels across
_FEW = 64
"""So many photos are explained on the CPU in less time than torch takes to load."""


def picture(
    source: PhotoSource,
    explanation: Explanation,
    signature: str | None = None,
    *,
    panel: Panel = "plain",
    width: int | None = None,
) -> bytes:
    """The picture of a photo as a PNG file; for several present labels one each, one below another."""
    explanation = dataclasses.replace(explanation, photo=open_photo(source))
    parts = [explanation]
    if explanation.present and explanation.votes is None:
        likely = {guess.index: guess for guess in explanation.top}
        alone = dataclasses.replace(explanation, present=None, classifier=None)
        parts = [dataclasses.replace(alone, prediction=likely[own.target], votes=own) for own in explanation.present]
    return _png(tiled([part.picture(panel=panel, width=width) for part in parts], columns=1, gap=0), signature)


def _png(picture: Image.Image, signature: str | None) -> bytes:
    text = PngInfo()
    if signature is not None:
        text.add_text(SIGNED, signature)
    return encoded(picture, "PNG", compress_level=3, pnginfo=text)


def explain_files(
    photos: Sequence[Path],
    *,
    run: str | Path,
    size: int | None = None,
    target: int | str | None = None,
    against: int | str | None = None,
    check: bool = False,
    fill: str = FILLS[0],
    out: Path | None = None,
    model: str | None = None,
    panel: Panel = "plain",
    device: str = "auto",
    report: Progress = silent,
) -> Iterator[Explanation | Unexplained]:
    """Explain photos in order; with ``out``, write ``NAME.png`` (the picture) and ``NAME.json`` for each.

    ``run`` and ``model`` are as :func:`bla.load` takes them. A graph that is kept of the run is used unless there is a
    ``model``, whose code may have changed since.

    Of several photos there are also contact sheets, of up to 60 each: ``contact-sheet.png``, ``contact-sheet-2.png``.
    Where a photo may have several labels, its picture has a part for each present label, one below another.

    An explanation in ``out`` is read back if the same explainer made it with the same options, and the photo has
    not changed since. A photo that cannot be read yields an :class:`Unexplained`, and the others are explained.

    An ExplanationError, before anything is written, if a file in ``out`` would be overwritten that is none of ours.
    """
    graph = Path(run) if Path(run).is_file() else None
    votes = target is not None or against is not None  # which a graph does not have
    if graph is None and not votes and model is None and _on_cpu(device, len(photos)):
        graph = _graph(run, report)
    explainer, *made = _of_run(run, model, device) if graph is None else _of_graph(graph, device)
    computed = "" if graph is None else f"; computed on the {explainer.device}"
    report(f"{explainer.transform.in_words()}{computed}", 0, 0)
    kept: dict[Path, Explanation] = {}
    names: dict[Path, str] = {}
    signature, sheets = "", 0
    if out is not None:
        if out.exists() and not out.is_dir():
            raise ExplanationError(f"expected a folder for the pictures, got the file {out}: choose another name")
        parts = [SCHEMA_VERSION, *made, size, target, against, fill * check, panel]
        signature = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        names = output_names(photos, out)
        kept = _kept(names, out, signature)
    others, tiles = [photo for photo in photos if photo not in kept], list[Image.Image]()
    fresh = explainer.explain_each(others, size=size, target=target, against=against, check=check, fill=fill)
    for number, photo in enumerate(photos, start=1):
        result = kept.get(photo) or next(fresh)
        if out is not None and isinstance(result, Explanation) and photo not in kept:
            record = out / f"{names[photo]}.json"
            record.unlink(missing_ok=True)  # written last: where it is, the picture belongs to it
            write_atomically(out / f"{names[photo]}.png", picture(photo, result, signature, panel=panel))
            result.save(record)
        if out is not None and isinstance(result, Explanation) and len(names) > 1:
            tiles.append(result.picture(width=_TILE))
        if out is not None and tiles and (len(tiles) == _ON_A_SHEET or number == len(photos)):
            sheets += 1
            name = SHEET if sheets == 1 else f"{SHEET}-{sheets}"
            write_atomically(out / f"{name}.png", _png(tiled(tiles, columns_of(len(tiles))), signature))
            tiles.clear()
        yield result


def _on_cpu(device: str, photos: int) -> bool:
    """Whether to compute on the CPU: a few photos are explained before torch could look for a GPU."""
    if device == "auto" and photos > _FEW:
        import torch

        return not torch.cuda.is_available()
    return device in ("auto", "cpu")


def _graph(run: str | Path, report: Progress) -> Path | None:
    """The kept graph of a run, if it says all that the run does."""
    several = read_record(run_folder(run))["settings"].get("several_labels")  # each with votes
    if several or importlib.util.find_spec("onnxruntime") is None:
        return None
    graph = kept_graph(run)
    report(
        f"`bla export {run}` once makes this faster" if graph is None else f"using the exported graph of {run}", 0, 0
    )
    return graph


# What explains, a run's classifier or an exported file's engine, and all that its explanations depend on.


def _of_graph(graph: Path, device: str) -> tuple[Any, ...]:
    return Engine(graph, gpu=device != "cpu"), hashlib.sha256(graph.read_bytes()).hexdigest()


def _of_run(run: str | Path, model: str | None, device: str) -> tuple[Any, ...]:
    from bla.model.backbones import weights_digest
    from bla.runs.run import load

    classifier = load(run, model=model, device=device)
    made = (weights_digest(classifier), classifier.name, classifier.setup, classifier.classes)
    labels = ["several labels"] if classifier.several_labels else []
    return classifier, *made, classifier.transform.to_dict(), *labels


def output_names(photos: Sequence[Path], out: Path | None = None) -> dict[Path, str]:
    """A distinct file name, without suffix, for every photo: its stem, with its folders where photos share a stem.

    A name under which ``out`` holds the explanation of another image is skipped.

    >>> sorted(output_names([Path("a/x.jpg"), Path("b/x.jpg"), Path("b/y.png")]).values())
    ['a_x.jpg', 'b_x.jpg', 'y']
    """
    unique = list(dict.fromkeys(photos))
    # Case is folded, as some file systems do: Cat.jpg and cat.jpg must not overwrite one another.
    stems = [photo.stem.casefold() for photo in unique]
    uses = Counter(stems)
    taken: set[str] = set()
    names = {}
    for photo, stem in zip(unique, stems, strict=True):
        long = "_".join(part for part in photo.parts if part not in (photo.anchor, "..")).strip(".") or "photo"
        candidates = itertools.chain(
            [photo.stem.strip(".") or "photo"] if uses[stem] == 1 else [],
            [long],
            (f"{long}-{number}" for number in itertools.count(2)),
        )
        for name in candidates:
            saved = _saved(out / f"{name}.json") if out is not None else None
            free = name.casefold() not in taken and not _SHEETS.fullmatch(name)
            if free and (saved is None or saved.image == os.fspath(photo)):
                names[photo] = name
                break
        taken.add(names[photo].casefold())
    return names


def _kept(names: dict[Path, str], out: Path, signature: str) -> dict[Path, Explanation]:
    """The explanations in ``out`` that need not be made again."""
    kept = {}
    inputs = {real(photo) for photo in names}
    for sheet in out.glob("*.png"):
        if _SHEETS.fullmatch(sheet.stem) and _signed(sheet) is None:
            raise ExplanationError(f"expected to write {sheet}, got a file there that is yours: choose another folder")
    for photo, name in names.items():
        record, drawn = out / f"{name}.json", out / f"{name}.png"
        found, signed = _saved(record), _signed(drawn)
        foreign = (record.exists() and found is None) or (drawn.exists() and signed is None)
        if foreign or not inputs.isdisjoint((real(record), real(drawn))):
            raise ExplanationError(
                f"expected to write {drawn} and {record.name}, got a file there that is yours: choose another folder"
            )
        if found and signed == signature and photo.exists() and record.stat().st_mtime >= photo.stat().st_mtime:
            kept[photo] = found
    return kept


def _saved(record: Path) -> Explanation | None:
    try:
        return Explanation.load(record)
    except (OSError, ExplanationError):
        return None


def _signed(drawn: Path) -> str | None:
    try:
        with Image.open(drawn) as image:
            return image.info.get(SIGNED)
    except OSError:
        return None
