"""Photos on disk to panels and explanations on disk, going on where an earlier call stopped."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from bla.classifier import ExplainableClassifier
from bla.explanation import Explanation, ExplanationError, Unexplained, write_atomically
from bla.photo import open_photo
from bla.render import panel
from bla.run import load

SIGNATURE = "explain.json"


def explain_files(
    photos: Sequence[Path],
    *,
    run: str | Path,
    size: int | None = None,
    out: Path | None = None,
    device: str = "auto",
) -> Iterator[Explanation | Unexplained]:
    """Explain photos in order; with ``out``, write ``NAME.png`` (the panel) and ``NAME.json`` for each.

    A photo that ``out`` already explains, by the same explainer at the same size and since the photo last changed,
    is read from there. A photo that cannot be read yields an :class:`Unexplained`, and the others are done.
    """
    classifier = load(run, device=device)
    kept: dict[Path, Explanation] = {}
    names: dict[Path, str] = {}
    if out is not None:
        names = output_names(photos)
        kept = _kept(photos, names, out, _signature(classifier, size))
    fresh = classifier.explain_each([photo for photo in photos if photo not in kept], size=size)
    for photo in photos:
        result = kept.get(photo) or next(fresh)
        if out is not None and isinstance(result, Explanation) and photo not in kept:
            _write(result, photo, out / names[photo])
        yield result


def output_names(photos: Sequence[Path]) -> dict[Path, str]:
    """A file name without suffix for every photo, no two alike: its stem, with its folders where stems are shared.

    >>> sorted(output_names([Path("a/x.jpg"), Path("b/x.jpg"), Path("b/y.png")]).values())
    ['a_x.jpg', 'b_x.jpg', 'y']
    """
    unique = list(dict.fromkeys(photos))
    # Case is folded, as some file systems do: Cat.jpg and cat.jpg must not overwrite one another.
    stems = [photo.stem.casefold() for photo in unique]
    uses = Counter([*stems, Path(SIGNATURE).stem])
    taken: set[str] = set()
    names = {}
    for photo, stem in zip(unique, stems, strict=True):
        name = (
            "_".join(part for part in photo.parts if part not in (photo.anchor, "..")) if uses[stem] > 1 else photo.stem
        )
        name = name.strip(".") or "photo"
        candidate, number = name, 2
        while candidate.casefold() in taken:
            candidate, number = f"{name}-{number}", number + 1
        taken.add(candidate.casefold())
        names[photo] = candidate
    return names


def _signature(classifier: ExplainableClassifier, size: int | None) -> dict[str, Any]:
    digest = hashlib.sha256()
    for name, value in classifier.state_dict().items():
        if name.startswith("attention."):
            digest.update(name.encode() + value.cpu().numpy().tobytes())
    return {
        "model": classifier.name,
        "setup": classifier.setup,
        "attention": digest.hexdigest(),
        "size": size,
        "transform": classifier.transform.to_dict(),
    }


def _kept(
    photos: Sequence[Path], names: dict[Path, str], out: Path, signature: dict[str, Any]
) -> dict[Path, Explanation]:
    path = out / SIGNATURE
    signature = json.loads(json.dumps(signature))
    if not path.exists() or json.loads(path.read_text(encoding="utf-8")) != signature:
        write_atomically(path, json.dumps(signature, indent=1).encode())
        for name in names.values():
            (out / f"{name}.json").unlink(missing_ok=True)
        return {}
    kept = {}
    for photo in photos:
        record, picture = out / f"{names[photo]}.json", out / f"{names[photo]}.png"
        try:
            if picture.exists() and record.stat().st_mtime >= photo.stat().st_mtime:
                explanation = Explanation.load(record)
                if explanation.image == os.fspath(photo):
                    kept[photo] = explanation
        except (OSError, ExplanationError):
            continue
    return kept


def _write(explanation: Explanation, photo: Path, base: Path) -> None:
    picture = io.BytesIO()
    image: Image.Image = panel(open_photo(photo), explanation)
    image.save(picture, "PNG", compress_level=3)
    write_atomically(base.with_name(base.name + ".png"), picture.getvalue())
    # The record comes last: where it is, the picture is too.
    explanation.save(base.with_name(base.name + ".json"))
