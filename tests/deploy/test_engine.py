"""The engine: exported files opened, photos explained without torch, runs exported once and kept."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from bla.cli import run_command
from bla.deploy.batch import BatchError, explain_all
from bla.deploy.engine import STEP, Engine, EngineError, graph_of, open_engine, seal
from bla.deploy.pictures import explain_files
from bla.explanations.explanation import Explanation, Unexplained
from bla.model.classifier import ClassifierError
from bla.runs.record import SHIPPED, RunError
from small_exports import Pair, photos

EXPLAINER = SHIPPED / "tf_efficientnet_lite0"


def test_a_size_and_a_subset_for_each_photo_of_a_batch(plain: Pair) -> None:
    classifier, path = plain[0], plain[1].path
    engine = Engine(path)
    batch = photos(4)
    own = engine.run(batch)
    outputs = engine.run(batch, sizes=[0, 1, 6, 20])
    assert outputs.selected.sum(axis=(1, 2)).tolist() == [own.selected[0].sum(), 1, 6, 20]
    masks = np.stack([own.selected, np.ones_like(own.selected)], axis=1)
    answers = engine.run(batch, masks=masks).answers
    np.testing.assert_allclose(answers[:, 0], own.logits, atol=1e-5)
    with torch.inference_mode():
        features = classifier.trunk(classifier.pixels(batch))
        np.testing.assert_allclose(answers[:, 1], classifier.head(features.mean(dim=(2, 3))), atol=1e-5)
        # the other cells are unread: the same logits from features that have anything there
        spoilt = features.masked_fill(~torch.from_numpy(own.selected)[:, None], 1e6)
        weights = torch.from_numpy(own.selected / own.selected.sum(axis=(1, 2), keepdims=True)).float()
        np.testing.assert_allclose(classifier.classify(spoilt, weights), own.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("pair", "tolerance"), [("plain", 1e-5), ("of_photos", 2e-3)])
def test_a_check_is_torchs_and_nearly_so_where_photos_are_rounded(
    pair: str, tolerance: float, request: pytest.FixtureRequest
) -> None:
    classifier, exported = request.getfixturevalue(pair)
    engine = Engine(exported.path)
    images = list(photos(3, 90, 200))
    for own, found in zip(
        classifier.explain(images, check=True, fill="blur"),
        engine.explain_each(images, check=True, fill="blur"),
        strict=True,
    ):
        assert isinstance(found, Explanation)
        assert own.check is not None
        assert found.check is not None
        assert found.check.about.probability == pytest.approx(own.check.about.probability, abs=1e-5)
        assert found.check.probability_kept == pytest.approx(own.check.probability_kept, abs=tolerance)
        assert found.check.probability_removed == pytest.approx(own.check.probability_removed, abs=tolerance)
    assert all(isinstance(each, Explanation) and each.check is None for each in engine.explain_each(images))


def test_files_that_are_not_ours(plain: Pair, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="is no file"):
        Engine(tmp_path / "nothing.onnx")
    (tmp_path / "text.onnx").write_text("no graph")
    with pytest.raises(EngineError, match="expected an ONNX file"):
        Engine(tmp_path / "text.onnx")
    model = onnx.load(plain[1].path)
    record = json.loads(model.metadata_props[0].value)
    for value, message in (
        (json.dumps(record | {"schema_version": 99}), "expected schema_version 2, got 99"),
        (json.dumps(record | {"transform": {}}), "missing required field `size` - at `.*transform`"),
    ):
        model.metadata_props[0].value = value
        (tmp_path / "other.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(EngineError, match=message):
            Engine(tmp_path / "other.onnx")
    del model.metadata_props[:]
    (tmp_path / "other.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(EngineError, match="of another's"):
        Engine(tmp_path / "other.onnx")
    with pytest.raises(RunError, match="a run folder or a shipped explainer"):
        open_engine("nowhere")
    with pytest.raises(RunError, match="expected a complete run"):
        open_engine(tmp_path)


def test_with_several_labels_each_has_its_own_probability(plain: Pair, tmp_path: Path) -> None:
    classifier = copy.deepcopy(plain[0])
    classifier.several_labels = True
    model = onnx.load(plain[1].path)
    record = json.loads(model.metadata_props[0].value)
    model.metadata_props[0].value = json.dumps(record | {"several_labels": True})
    graph = tmp_path / "several.onnx"
    graph.write_bytes(model.SerializeToString())
    photo = photos(1)[0]
    (one,), (other,) = classifier.explain(photo), Engine(graph).explain_each([photo])
    assert isinstance(other, Explanation)
    assert [guess.index for guess in other.top] == [guess.index for guess in one.top]
    assert sum(guess.probability for guess in one.top) > 1.1
    for mine, theirs in zip(one.top, other.top, strict=True):
        assert theirs.probability == pytest.approx(mine.probability, abs=1e-5)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    with pytest.raises(BatchError, match="one class a photo, as a row of the results has, got one of several labels"):
        explain_all(tmp_path, tmp_path / "out", graph)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": 21}, "expected a size from 1 to 20, got 21"),
        ({"sizes": -1}, "expected a size"),
        ({"sizes": 2.5}, "expected a size"),
        ({"masks": np.zeros((1, 4, 5))}, "at least one cell"),
        ({"masks": np.full((1, 4, 5), 0.5)}, "of 0 and 1"),
        ({"masks": np.ones((1, 5, 4))}, "expected masks of shape"),
    ],
)
def test_wrong_questions(plain: Pair, arguments: Any, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        Engine(plain[1].path).run(photos(1), **arguments)


def test_photos_that_cannot_be_read_and_numbers_that_are_none(plain: Pair) -> None:
    engine = Engine(plain[1].path)
    found = list(engine.explain_each(["nowhere.jpg", photos(1)[0], b"no photo"], batch_size=2))
    assert [isinstance(result, Unexplained) for result in found] == [True, False, True]
    assert "no such file" in found[0].to_dict()["error"]
    broken = io.BytesIO()
    model = onnx.load(plain[1].path)
    for tensor in model.graph.initializer:
        if tensor.name.endswith("head.graph.3.bias") or (tensor.dims == [5] and tensor.data_type == 1):
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(5, np.nan, np.float32), tensor.name))
    broken.write(model.SerializeToString())
    path = plain[1].path.with_name("nan.onnx")
    path.write_bytes(broken.getvalue())
    (result,) = Engine(path).explain_each([photos(1)[0]])
    assert isinstance(result, Unexplained)
    assert "NaN" in result.error


def test_a_gpu_is_used_where_the_runtime_can(plain: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, asked = photos(4), []
    either, cpu = (Engine(plain[1].path, gpu=gpu).run(batch) for gpu in (True, False))
    np.testing.assert_allclose(either.unbounded, cpu.unbounded, rtol=1e-4, atol=1e-4)  # compares where there is a GPU

    def opened(model: Path, options: Any, providers: list[Any]) -> onnxruntime.InferenceSession:
        asked.append(providers[0])
        return session(model, options, providers=providers)  # of a build that knows no GPU

    session = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: both)
    assert Engine(plain[1].path).device == "CPU"
    assert Engine(plain[1].path, gpu=False).device == "CPU"
    said: list[str] = []
    photo = Path(__file__).parents[2] / "docs" / "cat.png"
    list(explain_files([photo], run=plain[1].path, device="cpu", report=lambda text, *_: said.append(text)))
    assert [provider[0] if isinstance(provider, tuple) else provider for provider in asked] == [*both, both[1]]
    assert said[0].endswith("; computed on the CPU")


def test_a_run_is_exported_once_and_kept(plain: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, said = [], list[str]()

    def exporting(command: list[str], **_: Any) -> Any:
        calls.append(command)
        graph_of(command[-1]).parent.mkdir(parents=True, exist_ok=True)
        graph_of(command[-1]).write_bytes(plain[1].path.read_bytes())
        seal(graph_of(command[-1]))
        return contextlib.nullcontext(SimpleNamespace(returncode=0, stderr=["a warning\n", f"{STEP}making\n"]))

    monkeypatch.setattr(subprocess, "Popen", exporting)
    kept, again = (
        open_engine("tf_efficientnet_lite0", report=lambda text, *_: said.append(text)).path for _ in range(2)
    )
    assert said[:2] == ["exporting tf_efficientnet_lite0, which takes up to a minute, once", f"{STEP}making"]
    assert kept == again
    assert kept.is_relative_to(os.environ["BLA_CACHE"])
    assert [command[2:] for command in calls] == [["-m", "bla", "export", str(EXPLAINER)]]
    photos = [Path(__file__).parents[2] / "docs" / "cat.png"]
    (explanation,) = explain_files(photos, run=EXPLAINER, report=lambda text, *_: said.append(text))
    assert explanation.model == plain[1].card.model, "explained by the graph, not by torch"
    assert said[2] == f"using the exported graph of {EXPLAINER}"
    with pytest.raises(ClassifierError, match="expected a target, to be held against another class, got none"):
        list(explain_files(photos, run=EXPLAINER, against="tabby"))
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1
    kept.write_bytes(content)
    assert open_engine("tf_efficientnet_lite0").path == kept
    assert len(calls) == 2, "a damaged export is made anew"
    kept.unlink()


def test_a_run_that_cannot_be_exported_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_this_process(command: list[str], **_: Any) -> Any:
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            code = run_command(command[4:])
        return contextlib.nullcontext(SimpleNamespace(returncode=code, stderr=errors.getvalue().splitlines()))

    monkeypatch.setattr(subprocess, "Popen", in_this_process)
    for name in ("run.json", "model.safetensors"):
        (tmp_path / name).write_bytes((EXPLAINER / name).read_bytes()[:100])
    with pytest.raises(EngineError, match=f"{tmp_path}: .*expected"):
        open_engine(tmp_path)


def test_the_command_explains_by_an_exported_file(
    class_aware: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photos(1)[0]).save("photo.png")
    explain = ["explain", "photo.png", "--run", str(class_aware[1].path)]
    assert run_command([*explain, "--target", "bee", "--size", "3", "--out", "why", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (expected,) = class_aware[0].explain("photo.png", target="bee", size=3)
    assert (found["size"], found["target"], found["selected"]) == (3, 1, expected.to_dict()["selected"])
    assert Explanation.load(tmp_path / "why" / "photo.json").to_dict() == found
    for mistake in ("--target be", "--size 99", "--target bee --against ant", "--size certified"):
        assert run_command([*explain, *mistake.split()]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("bla: expected ")


WITHOUT_TORCH = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "timm", "torchvision", "onnx"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
sys.argv = sys.argv[1:]
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_documented_program_needs_no_torch(plain: Pair, tmp_path: Path) -> None:
    """examples/explain_onnx.py, of 20 lines, explains a photograph with onnxruntime, numpy and Pillow alone."""
    classifier, path = plain[0], plain[1].path
    from skimage.data import chelsea

    program = Path(__file__).parents[2] / "examples" / "explain_onnx.py"
    photo = tmp_path / "cat.png"
    Image.fromarray(chelsea()).save(photo)
    command = [sys.executable, "-c", WITHOUT_TORCH, str(program), str(path), str(photo)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    (expected,) = classifier.explain(photo)
    assert len([line for line in program.read_text().splitlines() if line]) <= 20
    first, second, *rows = done.stdout.splitlines()
    assert first == f"the classifier: {expected.classifier}"
    assert second == f"{expected.size} of 20 cells alone: {expected.prediction}"
    drawn = [[character == "#" for character in line.split()] for line in rows]
    assert drawn == expected.selected.tolist()


def test_the_answers_to_cells_by_themselves_are_their_votes(plain: Pair) -> None:
    classifier, path = plain[0], plain[1].path
    photo = photos(1)[0]
    (why,) = classifier.explain(photo, size=4, target="cat", against="ant")
    assert why.votes is not None
    cells = np.argwhere(why.selected)
    masks = np.zeros((1, len(cells), *why.grid))
    masks[0, range(len(cells)), cells[:, 0], cells[:, 1]] = 1
    engine = Engine(path)
    answers = engine.run(photo[None], masks=masks).answers[0]
    margins = answers[:, 2] - answers[:, 0]
    assert margins.mean() == pytest.approx(why.votes.logit, abs=1e-4)
    votes = (margins - why.votes.offset) / len(cells)
    assert votes == pytest.approx(why.votes.cells[why.selected], abs=1e-4)
