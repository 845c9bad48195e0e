"""The report: what it says in words, what it draws, and what a browser shows of it."""

from __future__ import annotations

import copy
import html.parser
import json
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.faults.records import damaged
from bla.cli import run_command
from bla.comparison.report import ReportError, write_report
from bla.comparison.report.gallery import choose
from bla.comparison.report.saved import Comparison, Difference, read_comparison
from bla.comparison.report.verdict import decision, findings, headline, not_shown, summary, to_settle
from bla.explanations.explanation import Explanation, Prediction

if TYPE_CHECKING:
    from playwright.sync_api import Browser


def metric(name: str, better: str | None) -> dict[str, Any]:
    return {"name": name, "title": name.replace("_", " "), "formula": "m < 3 & x", "source": "ours", "better": better,
            "version": 1}  # fmt: skip


BETTER = {"accuracy": "higher", "area": "higher", "evaluator": "higher", "evaluator_left": "lower",
          "on_object": "higher", "mask_only": "lower", "loss": "lower"}  # fmt: skip


def record_of(folder: Path, *, photos: int = 8, grid: tuple[int, int] = (2, 3)) -> dict[str, Any]:
    """A comparison written by hand: photos of 60 x 40, the run selects 1 to 4 cells."""
    (folder / "explanations").mkdir(parents=True)
    cells, methods = grid[0] * grid[1], {"bla": "BLA", "cam": "CAM", "grad-cam": "Grad-CAM", "random": "random cells"}
    images, lines = [], {name: [] for name in methods}
    for index in range(photos):
        path = folder / f"photo {index} <b>.png"
        Image.new("RGB", (60, 40), (20 * index, 90, 160)).save(path)
        size = index % 4 + 1
        images.append({"image": str(path), "label": "owl", "predicted": "owl" if index % 2 else "cat & dog",
                       "size": size, "object_share": 0.3})  # fmt: skip
        for name in methods:
            order = np.arange(cells) if name == "bla" else np.arange(cells)[::-1] if name != "random" else (
                np.random.RandomState(index).permutation(cells))  # fmt: skip
            ranking = np.empty(cells)
            ranking[order] = -np.arange(cells)
            guess, own = Prediction(0, "owl", 0.8), Prediction(index % 2 - 1, images[-1]["predicted"], 0.7)
            lines[name].append(Explanation(
                image=str(path), prediction=guess, top=(guess,), method=name, grid=grid,
                unbounded=ranking.reshape(grid), scores=np.minimum(ranking + size - 1, 0).reshape(grid), soft=None,
                selected=(ranking > -size).reshape(grid), region=(0, 0, 60, 40), classifier=own, agrees=bool(index % 2),
            ))  # fmt: skip
    for name, found in lines.items():
        text = "".join(json.dumps(entry.to_dict()) + "\n" for entry in found)
        (folder / "explanations" / f"{name}.jsonl").write_text(text)

    def method(title: str, shift: float) -> dict[str, Any]:
        values = {
            key: {"mean": 0.8 - shift, "low": 0.77 - shift, "high": 0.83 - shift, "images": photos} for key in BETTER
        }
        each = {key: [round(0.1 * index, 3) for index in range(photos)] for key in BETTER}
        curve = {"sizes": [1, 2, 3], "kept": [0.5, 0.6, 0.7 - shift], "left": [0.8, 0.7, 0.6], "on_object": None}
        return {"title": title, "explains": "own", "class_specific": False, "needs_pixels": False, "note": "",
                "curve": curve, "cost": {"ms_per_image": 0.5, "peak_memory_mb": None}, "values": values,
                "each": each}  # fmt: skip

    shifts = {"bla": 0.0, "cam": 0.05, "grad-cam": 0.05, "random": 0.2}
    rows = [
        {"metric": key, "method": "bla", "against": name, "difference": shift, "low": shift - 0.02,
         "high": shift + 0.02, "p": 0.001, "p_holm": 0.004, "images": photos}
        for key in BETTER for name, shift in shifts.items() if name != "bla"
    ]  # fmt: skip
    sizes = [image["size"] for image in images]
    return {
        "schema_version": 1, "kind": "comparison",
        "run": {"folder": "run", "setup": "BLA", "model": "net <script>", "classes": ["owl"]},
        "data": {"root": "/photos/owls", "images": photos, "digest": "ab" * 32, "labels": "the data's", "objects": 0,
                 "limit": None, "seed": 0},
        "grid": list(grid), "equal_area": "", "explains": {"own": "the method's own head", "baseline": "the baseline"},
        "judge": "evaluator", "metrics": {key: metric(key, better) for key, better in BETTER.items()},
        "baseline": {"accuracy": 0.79, "forward_ms": 12.0},
        "methods": {name: method(title, shifts[name]) for name, title in methods.items()},
        "comparisons": rows,
        "size": {"mean": float(np.mean(sizes)), "std": 1.0, "min": min(sizes), "median": 2.0, "max": max(sizes),
                 "cells": cells, "object_correlation": None},
        "leakage": {"chance": 0.1, "evaluator": {"architecture": "a", "law": "l", "steps": "s",
                                                 "accuracy_from_all_cells": 0.9}},
        "images": images, "skipped": [], "versions": {"bla": "1"}, "created": "2026-01-02T03:04:05+00:00",
        "seconds": 1.0,
    }  # fmt: skip


def saved(folder: Path, record: dict[str, Any]) -> Comparison:
    (folder / "compare.json").write_text(json.dumps(record))
    return read_comparison(folder)


class Balance(html.parser.HTMLParser):
    """Open elements, and every reference to something outside of the page."""

    VOID = frozenset({"meta", "link", "br", "image", "use", "path", "rect", "line", "polyline", "circle", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.outside: list[str] = []
        self.unnamed = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        link = given.get("href") or given.get("src") or ""
        if link and not link.startswith(("data:", "#")):
            self.outside.append(link)
        self.unnamed += given.get("role") == "img" and not given.get("aria-label")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID and (not self.open or self.open.pop() != tag):
            self.wrong.append(tag)


def test_the_page_stands_alone_and_escapes_what_it_is_given(tmp_path: Path) -> None:
    saved(tmp_path, record_of(tmp_path))
    written = write_report(tmp_path)
    page = written.path.read_text()
    assert written.path == tmp_path / "report.html"
    seen = Balance()
    seen.feed(page)
    assert not seen.wrong
    assert not seen.open
    assert not seen.outside
    assert not seen.unnamed
    assert "<script" not in page
    assert "net &lt;script&gt;" in page
    assert "photo 1 &lt;b&gt;.png" in page
    assert page.count("<h3>owl 70.0% ") == page.count("<h3>cat &amp; dog 70.0% ") == 4  # the classifier's answers
    assert page.count("Disagrees with the classifier.") == 4
    assert page.count("data:image/jpeg") == 8, "every photo is in the page once"
    for finding in written.findings:
        assert str(finding.question).replace("'", "&#39;") in page


@pytest.mark.parametrize(
    ("difference", "sign"),
    [(Difference(0.1, 0.05, 0.2, 0.01), 1), (Difference(-0.1, -0.2, -0.05, 0.01), -1),
     (Difference(0.1, 0.05, 0.2, 0.06), 0), (Difference(0.1, -0.01, 0.2, 0.01), 0)],
)  # fmt: skip
def test_a_sign_counts_only_where_it_is_established(difference: Difference, sign: int) -> None:
    assert difference.sign == sign


def answers(comparison: Comparison) -> dict[str, str]:
    return {finding.question: finding.answer for finding in findings(comparison)}


def test_the_verdict_follows_the_figures(tmp_path: Path) -> None:
    record = record_of(tmp_path)
    found = answers(saved(tmp_path, record))
    assert found == {
        "Are the selected cells enough to predict the class?": "open",  # .77 to .83, against .79 from all cells
        "Do the selected cells tell more about the class than as many random cells?": "for",
        "Do the best 1 to 12 cells tell more about the class than CAM's?": "for",
        "Do the cells left out tell less about the class than those that CAM leaves out?": "against",  # lower is better
        "Do the selected cells lie on the object more often than CAM's?": "for",
        "Does the shape of the selection reveal less about the class than CAM's?": "against",
    }
    assert decision(read_comparison(tmp_path), findings(read_comparison(tmp_path))) == (
        "Use these explanations: they did better than random cells and CAM, as far as a head on the cells can tell."
    )
    verdict = summary(findings(read_comparison(tmp_path)))
    assert verdict.startswith("Of 6 tests that these explanations could fail, they passed 3, failed 2, ")

    record["baseline"]["accuracy"] = 0.84
    assert answers(saved(tmp_path, record))["Are the selected cells enough to predict the class?"] == "against"
    record["baseline"]["accuracy"] = 0.775
    assert answers(saved(tmp_path, record))["Are the selected cells enough to predict the class?"] == "for"
    for row in record["comparisons"]:
        row["p_holm"] = 0.2
    found = answers(saved(tmp_path, record))
    assert set(found.values()) == {"for", "open"}
    assert found["Does the shape of the selection reveal less about the class than CAM's?"] == "open"
    record["baseline"]["accuracy"] = None
    record["comparisons"], record["leakage"] = [], None
    for method in record["methods"].values():
        del method["values"]["mask_only"]
    assert answers(saved(tmp_path, record)) == {}
    assert "no test that the explanations could fail" in write_report(tmp_path).summary


def with_pixels(record: dict[str, Any], kept: float, difference: float, p: float) -> dict[str, Any]:
    """With pixels measured: of seven photos with both values two are kept by the run alone, one by CAM alone."""
    own, cam = record["methods"]["bla"], record["methods"]["cam"]
    own["values"]["kept"] = {"mean": kept, "low": kept - 0.04, "high": kept + 0.04, "images": 650}
    cam["values"]["kept"] = {**own["values"]["kept"], "mean": kept - difference}
    own["each"]["kept"], cam["each"]["kept"] = [1, 1, 1, 1, 0, 0, 0, None], [1, 1, 0, 0, 1, 0, 0, 1]
    record["metrics"]["kept"] = metric("kept", "higher")
    row = {"metric": "kept", "method": "bla", "against": "cam", "difference": difference, "p": p, "p_holm": p}
    record["comparisons"].append({**row, "low": difference - 0.02, "high": difference + 0.02, "images": 650})
    return record


def test_a_manager_reads_one_sentence_and_what_is_not_shown(tmp_path: Path) -> None:
    record = record_of(tmp_path)
    comparison = saved(tmp_path, record)
    assert (
        headline(comparison) == "What the whole classifier says of the selected cells' pixels alone was not measured."
    )
    assert not_shown(comparison) == ["what the whole classifier says of the selected pixels (compare with --pixels)"]
    assert to_settle(findings(comparison)) == "To settle what is open: 1 needs more photos than these."
    assert "Not shown, since it was not measured: what the whole" in write_report(comparison.folder).path.read_text()
    comparison = saved(tmp_path, with_pixels(copy.deepcopy(record), 0.72, 0.03, 0.001))
    sentence = "On 650 photos these cells keep the prediction {} often than CAM's: 72% against {}."
    assert headline(comparison) == sentence.format("more", "69%")
    comparison = saved(tmp_path, with_pixels(copy.deepcopy(record), 0.72, -0.03, 0.001))
    assert headline(comparison) == sentence.format("less", "75%")
    comparison = saved(tmp_path, with_pixels(copy.deepcopy(record), 0.72, 0.01, 0.2))
    assert headline(comparison) == (
        "On 650 photos it is undecided whether these cells keep the prediction more often than CAM's: 72% against 71%."
    )
    (found,) = (each for each in findings(comparison) if "pixels alone" in each.question)
    assert found.answer == "open"
    # 7.849 (3/7 - 1/49) 49
    assert found.words.endswith("A difference of this size would need about 157 photos.")
    told = "Do not decide yet: no difference from CAM is established, by what the classifier says of the pixels alone."
    assert decision(comparison, findings(comparison)) == told
    assert to_settle([found]) == "To settle what is open: about 157 photos decide 1 question."
    page = write_report(tmp_path).path.read_text()
    assert f"<strong>{told}</strong>" in page
    assert "it is undecided whether these cells keep the prediction" in page
    assert "Not shown, since it was not measured" not in page


def test_lying_on_the_object_is_asked_against_the_controls_too(tmp_path: Path) -> None:
    record = record_of(tmp_path)
    record["methods"] |= {"centre": {**record["methods"]["random"], "title": "centre disc"}}
    for sign, answer in ((1, "for"), (-1, "against")):
        row = {"metric": "on_object", "method": "bla", "against": "centre", "difference": 0.1 * sign, "p_holm": 0.001}
        record["comparisons"] = [{**row, "low": 0.1 * sign - 0.05, "high": 0.1 * sign + 0.05}]
        found = answers(saved(tmp_path, record))
        asked = "Do the selected cells lie on the object more often than as many cells "
        assert found[asked + "nearest to the centre?"] == answer
        assert asked + "with the longest feature vectors?" not in found


def test_half_are_drawn_and_the_extremes_are_shown(tmp_path: Path) -> None:
    comparison = saved(tmp_path, record_of(tmp_path, photos=20))
    chosen = choose(comparison, 8, seed=0)
    assert len({index for index, _ in chosen}) == 8
    whys = [why.split(":")[0] for _, why in chosen]
    assert whys == ["drawn at random"] * 4 + ["among the best"] * 2 + ["among the worst"] * 2
    assert [index for index, _ in chosen[4:]] == [0, 1, 19, 18], "by the loss, which grows with the index here"
    assert choose(comparison, 8, seed=0) == chosen
    assert choose(comparison, 8, seed=1) != chosen
    assert len(choose(comparison, 50, seed=0)) == 20


def test_the_worst_are_failures_while_there_are_any(tmp_path: Path) -> None:
    record = record_of(tmp_path, photos=8)
    record["methods"]["bla"]["each"] |= {"kept": [None, 0, 1, None, 0, 1, 1, 1], "agreement": [1, 1, 0, 1, 0, 1, 1, 1]}
    chosen = choose(saved(tmp_path, record), 8, seed=0)
    kept = "among the worst: these cells' pixels alone do not keep the prediction"
    assert chosen[-2:] == [(4, kept), (1, kept)]
    record["methods"]["bla"]["each"]["kept"] = [None] * 8
    chosen = choose(saved(tmp_path, record), 8, seed=0)
    assert chosen[-2:] == [(index, "among the worst: these cells give another class") for index in (4, 2)]


def test_without_an_evaluator_the_judge_is_named(tmp_path: Path) -> None:
    record = record_of(tmp_path)
    record["judge"], record["leakage"] = "baseline", None
    for one in record["methods"].values():
        for name in ("evaluator", "evaluator_left", "mask_only"):
            del one["values"][name], one["each"][name]
    record["comparisons"] = [row for row in record["comparisons"] if row["metric"] in ("area", "accuracy")]
    comparison = saved(tmp_path, record)
    assert (
        "By the classifier's own head, do the selected cells tell more about the class than as many random cells?"
        in {finding.question for finding in findings(comparison)}
    )
    assert "what a head that was trained on few cells reads in them (--leakage)" in not_shown(comparison)
    assert "which was not trained on few cells" in write_report(tmp_path).path.read_text()


def test_cells_are_drawn_where_they_are_and_told_in_words(tmp_path: Path) -> None:
    saved(tmp_path, record_of(tmp_path, photos=2))
    page = write_report(tmp_path, photos=2).path.read_text()
    shown = page[page.index('id="gallery"') :].partition("</article>")[2]  # the second photo
    captions = re.findall("<figcaption>(.*?)</figcaption>", shown.partition("</article>")[0])
    assert captions == ["the photo", "BLA", "CAM, Grad-CAM", "random cells"]
    # cells of 20 x 20 pixels, two of them selected: the first two of the upper row
    assert 'transform="translate(0.00 0.00) scale(20.0000 20.0000)"' in shown
    assert re.findall(r'class="edge" d="(.*?)"', shown)[0] == "M0 0h1v1h-1ZM1 0h1v1h-1Z"
    assert 'aria-label="BLA: 2 of 6 cells, around the top' in shown
    assert 'aria-label="CAM, Grad-CAM: 2 of 6 cells, around the bottom right"' in shown


def test_a_map_of_pixels_is_drawn_as_a_picture(tmp_path: Path) -> None:
    saved(tmp_path, record_of(tmp_path, photos=1, grid=(40, 60)))
    page = write_report(tmp_path, photos=1).path.read_text()
    assert "data:image/png" in page
    assert 'class="edge"' not in page


def test_one_photo_without_labels_objects_or_leakage(tmp_path: Path) -> None:
    record = record_of(tmp_path, photos=1)
    record["methods"] = {"bla": record["methods"]["bla"]}
    record["comparisons"], record["leakage"], record["baseline"] = [], None, {"accuracy": None, "forward_ms": None}
    record["images"][0]["label"] = None
    record["metrics"] = {"loss": record["metrics"]["loss"]}
    record["methods"]["bla"]["values"] = {"loss": {"mean": 0.3, "low": 0.3, "high": 0.3, "images": 1}}
    record["methods"]["bla"]["each"] = {"loss": [0.3]}
    saved(tmp_path, record)
    page = write_report(tmp_path, photos=3).path.read_text()
    assert "1 photo " in page
    assert "(correct)" not in page


def test_mistakes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ReportError, match=r"got no compare.json there or in .*bla compare RUN"):
        write_report(tmp_path)
    assert run_command(["report", str(tmp_path)]) == 2
    assert "compare.json" in capsys.readouterr().err
    (tmp_path / "compare.json").write_text("{")
    with pytest.raises(ReportError, match="got another file"):
        write_report(tmp_path)
    record = record_of(tmp_path)
    saved(tmp_path, record)
    with pytest.raises(ReportError, match="got the folder"):
        write_report(tmp_path, tmp_path)
    with pytest.raises(ReportError, match="at least one photo"):
        write_report(tmp_path, photos=0)
    with pytest.raises(ReportError, match="schema_version 1, got 'comparison' 2"):
        saved(tmp_path, record | {"schema_version": 2})
    with pytest.raises(ReportError, match="missing required field `methods`"):
        saved(tmp_path, {key: value for key, value in record.items() if key != "methods"})
    saved(tmp_path, record)
    Path(record["images"][0]["image"]).unlink()
    with pytest.raises(ReportError, match=r"expected the photo of the comparison.*photo 0"):
        write_report(tmp_path)
    (tmp_path / "explanations/bla.jsonl").write_text("")
    with pytest.raises(ReportError, match="expected the explanations of the comparison"):
        write_report(tmp_path)


def test_a_damaged_comparison_is_shown_or_refused(tmp_path: Path) -> None:
    saved(tmp_path, record_of(tmp_path, photos=2))
    file, rng, refused = tmp_path / "compare.json", random.Random(0), 0
    whole = file.read_bytes()
    for _ in range(25):
        file.write_bytes(damaged(whole, rng))
        try:
            write_report(tmp_path, photos=1)
        except ReportError:
            refused += 1
    assert refused > 10


def test_the_command_reads_what_compare_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From photos to the page: train, compare, report."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bla.metrics.leakage.STEPS", 20)
    Path("reportednet.py").write_text(
        "import torch\nfrom torch import nn\n\ndef build():\n    torch.manual_seed(0)\n"
        "    stem = nn.Sequential(nn.Conv2d(3, 8, 9, stride=32, padding=4), nn.ReLU())\n"
        "    return nn.Sequential(stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))\n"
    )
    generator = np.random.RandomState(0)
    for split, name in ((split, name) for split in ("train", "test") for name in ("a", "b")):
        folder = Path("data", split, name)
        folder.mkdir(parents=True)
        for index in range(6):
            pixels = generator.randint(0, 200, (40, 60, 3), np.uint8)
            pixels[10:30, 10:30, "ab".index(name)] += 50
            Image.fromarray(pixels).save(folder / f"{index}.png")
    assert run_command(["train", "data", "--model", "reportednet:build", "--epochs", "1", "--out", "run"]) == 0
    assert run_command(["compare", "run", "--leakage", "--trust-code", "reportednet:build"]) == 0
    capsys.readouterr()
    assert run_command(["report", "run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert Path(told["report"]) == Path("run/comparison/report.html")
    assert {finding["answer"] for finding in told["findings"]} <= {"for", "against", "open"}
    assert len(told["findings"]) >= 6
    assert run_command(["report", "run"]) == 0
    assert "The page is run/comparison/report.html." in capsys.readouterr().out


def test_in_a_browser(tmp_path: Path, browser: Browser) -> None:
    """Nothing is asked of the network, nothing runs over the edge, and axe finds nothing serious."""
    from axe_playwright_python.sync_playwright import Axe

    saved(tmp_path, record_of(tmp_path))
    page_file = write_report(tmp_path, photos=4).path
    # the page forbids scripts by its own policy; the checker is one
    context = browser.new_context(bypass_csp=True)
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.goto(page_file.as_uri())
    violations = []
    for width, scheme in ((1280, "light"), (390, "dark")):
        page.set_viewport_size({"width": width, "height": 800})
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(
            "[...document.querySelectorAll('svg.cut')].every(e => e.getBoundingClientRect().width > 60)"
        )
        violations += Axe().run(page).response["violations"]
    context.close()
    assert [url for url in asked if not url.startswith("data:")] == [page_file.as_uri()]
    assert not complaints
    assert not [entry["id"] for entry in violations if entry["impact"] in ("serious", "critical")]
