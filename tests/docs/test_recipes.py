"""The Python of the how-to guides runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

GUIDES = Path(__file__).parents[2] / "docs" / "how-to"


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::UserWarning:torch", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("guide", "count"), [("own-loop", 7), ("pictures", 5), ("few-lines", 7), ("inputs", 3), ("subsets", 1)]
)
def test_a_guide_runs_block_after_block(
    guide: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = GUIDES / f"{guide}.md"
    monkeypatch.chdir(tmp_path)
    colours = np.random.default_rng(0).integers(0, 255, (120, 160, 3), dtype=np.uint8)
    Image.fromarray(colours).save("photo.jpg")
    text = page.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)```", text, re.S | re.M))
    assert len(blocks) == count
    names: dict[str, object] = {"__name__": guide}
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block.group(1), str(page), "exec"), names)


def test_any_selector_is_judged_in_ten_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bla.metrics.leakage.STEPS", 60)  # fewer steps, the same code
    block = re.findall(r"^```python\n(.*?)```", (GUIDES / "compare.md").read_text(encoding="utf-8"), re.S | re.M)[-1]
    exec(compile(block, "compare.md", "exec"), {})
    accuracy, nats = map(float, re.findall(r"-?\d\.\d+", capsys.readouterr().out))
    assert accuracy > 0.8
    assert abs(nats) < 0.3


def test_a_few_lines_are_few() -> None:
    page = (GUIDES / "few-lines.md").read_text(encoding="utf-8")
    model, *ours, theirs = re.findall(r"^```python\n(.*?)```", page, re.S | re.M)
    assert len(ours) == 5
    assert all(len(block.splitlines()) <= 4 for block in ours)
    assert "GradCAM" in theirs
    assert "bla" in model
