"""A method's explanations of all photos, each cut to the size that the run chose there, and what they cost."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bla.comparison.catalogue import Setting
from bla.comparison.lines import JsonLines
from bla.comparison.methods import Cells, Method
from bla.comparison.photos import size_of
from bla.explanations.explanation import Explanation
from bla.metrics import Curve, top_cells
from bla.metrics.fitting import Rows

_BATCH = 16


@dataclasses.dataclass(slots=True, eq=False)
class Explained:
    """A method, its maps and selected cells (N, H, W) of all photos, its cost, and what is measured of it.

    ``values`` holds a value for every photo by metric, (N,) each, NaN where there is none.
    """

    method: Method
    ranking: Tensor
    selected: Tensor
    cost: dict[str, Any]
    values: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    curve: Curve | None = None

    @property
    def sizes(self) -> Tensor:
        """The number of selected cells, (N,)."""
        return self.selected.sum(dim=(1, 2))


def explain_photos(method: Method, setting: Setting, sizes: Tensor, folder: Path) -> Explained:
    """Explain all photos by ``sizes`` (N,) cells, unless the method selects by itself; resumes from ``folder``."""
    photos, classifier, device = setting.photos, setting.run.classifier, setting.device
    lines = JsonLines(folder / method.name, f"{setting.digest} {method.name} {method.note}")
    seconds, peak = lines.state.get("seconds", 0.0), lines.state.get("peak")
    with torch.inference_mode(not method.needs_pixels):
        for start in range(len(lines.found), len(photos), _BATCH):
            rows = np.arange(start, min(start + _BATCH, len(photos)))
            batch = photos.batch(rows, photos.pixels(rows) if method.needs_pixels else None)
            before, begun = _peak_memory(device, restart=True), time.perf_counter()
            if batch.pixels is not None:
                batch = dataclasses.replace(batch, features=classifier.trunk(batch.pixels))
            cells = method.select(batch) if method.select else cut(method.maps(batch).float(), sizes[rows])
            wait(device)
            seconds += time.perf_counter() - begun
            if before is not None:
                peak = max(peak or 0, (_peak_memory(device) or 0) - before)
            probabilities = photos.probabilities[rows]
            if cells.weights is not None:
                probabilities = classifier.classify(batch.features, cells.weights).float().softmax(-1).cpu()
            fresh = _explanations(method, setting, rows, cells, probabilities)
            lines.append([explanation.to_dict() for explanation in fresh], seconds=seconds, peak=peak)
            setting.report(f"explaining by {method.title}", len(lines.found), len(photos))
    ranking = torch.tensor([entry["unbounded"] for entry in lines.found])
    selected = torch.tensor([entry["selected"] for entry in lines.found]).bool()
    cost = {
        "ms_per_image": round(1000 * seconds / len(photos), 3),
        "peak_memory_mb": None if peak is None else round(peak / 1e6, 1),
    }
    return Explained(method, ranking, selected, cost)


def cut(maps: Tensor, sizes: Tensor) -> Cells:
    """The best cells of maps (B, H, W); scores are 0 on them and negative elsewhere, as bounded scores are."""
    selected = top_cells(maps, sizes.to(maps.device))
    least = maps.masked_fill(~selected, float("inf")).amin(dim=(1, 2), keepdim=True)
    return Cells(maps, (maps - least).clamp(max=0), None, selected)


def _explanations(
    method: Method, setting: Setting, rows: Rows, cells: Cells, probabilities: Tensor
) -> list[Explanation]:
    classifier, photos, found = setting.run.classifier, setting.photos, []
    parts = cells._replace(weights=None)._asdict()
    maps = {name: part.float().cpu().numpy() for name, part in parts.items() if part is not None}
    shared = {"model": classifier.name, "setup": method.title, "soft": None}
    shared["method"] = "BLA" if method.select else method.name
    for place, row in enumerate(rows.tolist()):
        path = photos.path(row)
        fields: dict[str, Any] = shared | {name: each[place] for name, each in maps.items()}
        fields["target"] = int(photos.predicted[row]) if method.class_specific else None
        fields["region"] = classifier.transform.region(size_of(path))
        fields["from_all"] = photos.probabilities[row].numpy()
        found.append(Explanation.from_arrays(str(path), probabilities[place].numpy(), classifier.classes, **fields))
    return found


def _peak_memory(device: torch.device, *, restart: bool = False) -> int | None:
    """The most bytes in use since the last restart: of the GPU, or of the process (on Linux); None if unknown."""
    if device.type == "cuda":
        if restart:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    try:
        if restart:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM:")), None)


def wait(device: torch.device) -> None:
    """Let the GPU finish, so that time can be taken."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
