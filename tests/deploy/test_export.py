"""Export: the graph says what the module says, for every attention, entry and input; what does not is refused."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import bla
from bla.cli import run_command
from bla.data.photo import Transform
from bla.deploy.engine import KEY, Card, Engine, EngineError, kept_path, open_engine
from bla.deploy.export import ExportError, export
from bla.deploy.export.checking import check_onnx, maps_to_check
from bla.deploy.export.graph import OUTPUTS
from bla.explanations.explanation import Unexplained
from bla.model.attention import BoundedLogitAttention, L2XAttention
from bla.runs.record import RunError
from small_exports import CLASSES, Pair, flattening, of_tokens, wrapped

HALF = (0.5, 0.5, 0.5)
SHIPPED = Path(bla.__file__).parent / "runs" / "explainers" / "tf_efficientnet_lite0"


def photos(rows: int, height: int = 64, width: int = 80, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (rows, height, width, 3), np.uint8)


def test_the_contract_of_the_file(plain: Pair) -> None:
    classifier, path = plain[0], plain[1].path
    session = onnxruntime.InferenceSession(path)
    (pixels,) = session.get_inputs()
    assert (pixels.name, pixels.type, pixels.shape) == ("pixels", "tensor(float)", ["batch", 3, 64, 80])
    assert tuple(output.name for output in session.get_outputs()) == OUTPUTS
    record = json.loads(session.get_modelmeta().custom_metadata_map[KEY])
    assert record["classes"] == CLASSES
    assert Transform.from_dict(record["transform"]) == classifier.transform
    assert record["setup"] == classifier.setup
    assert record["schema_version"] == 1
    assert record["version"]
    assert b"/site-packages/" not in path.read_bytes(), "no paths of the machine that wrote it"
    for rows in (1, 2, 7):
        outputs = session.run(None, {"pixels": np.zeros((rows, 3, 64, 80), np.float32)})
        assert [output.shape for output in outputs] == [(rows, 5), *4 * [(rows, 4, 5)], (rows, 0, 5)]


@pytest.fixture(scope="module", params=["plain", "class_aware", "l2x, flattened", "gate, context, tokens, photos"])
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """An explainer with some attention and some head, and its graph."""
    if request.param in ("plain", "class_aware"):
        pair: Pair = request.getfixturevalue(request.param)
        return pair
    path = tmp_path_factory.mktemp("each") / "graph.onnx"
    square = Transform((64, 64), HALF, HALF, "bicubic")
    if request.param.startswith("l2x"):
        classifier = wrapped(L2XAttention(8, size=3), square, flattening)
        return classifier, export(classifier, path)
    classifier = wrapped(BoundedLogitAttention(48, gate=True, context=True), square, of_tokens)
    return classifier, export(classifier, path, entry="photos")


def test_every_attention_says_what_the_module_says(each: Pair) -> None:
    classifier, exported = each
    assert exported.misses["selected"] == 0
    assert exported.misses.get("photos", 0) < 0.2
    assert max(miss for name, miss in exported.misses.items() if name != "photos") < 1e-4
    engine = Engine(exported.path)
    images = list(photos(5))
    asked: list[dict[str, Any]] = [{}]
    if engine.card.sizes:
        asked += [{"size": size} for size in (1, 7, engine.card.cells)]
    if engine.card.targets:
        asked += [{"target": 3}, {"target": 0, "size": 4}]
    for arguments in asked:
        for ours, theirs in zip(
            engine.explain_each(images, batch_size=3, **arguments), classifier.explain(images, **arguments), strict=True
        ):
            assert not isinstance(ours, Unexplained)
            one, other = ours.to_dict(), theirs.to_dict()
            for key in ("unbounded", "scores", "soft"):
                np.testing.assert_allclose(one.pop(key), other.pop(key), atol=1e-5)
            for left, right in zip(one.pop("top"), other.pop("top"), strict=True):
                assert left == right | {"probability": pytest.approx(right["probability"], abs=1e-5)}
            one.pop("prediction")
            other.pop("prediction")
            assert ("votes" in other) == ("target" in arguments)
            other.pop("votes", None)  # a graph says what is selected, not what each cell says for the class
            assert one == other
    if not engine.card.sizes:
        with pytest.raises(EngineError, match="its size is fixed"):
            engine.run(photos(1), sizes=3)
    if not engine.card.targets:
        with pytest.raises(EngineError, match="not class-aware"):
            engine.run(photos(1), targets=1)
    if engine.card.entry == "photos":
        outputs = engine.run(photos(2, 150, 210), sizes=3)
        assert outputs.selected.sum(axis=(1, 2)).tolist() == [3, 3]


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


def test_the_answers_are_those_of_the_head(each: Pair) -> None:
    classifier, exported = each
    engine = Engine(exported.path)
    batch = photos(3, *classifier.transform.size)
    masks = (torch.rand(3, 2, *engine.grid, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    masks[:, :, 0, 0] = 1
    got = engine.run(batch, masks=masks.numpy() > 0)
    with torch.no_grad():
        features = classifier.trunk(classifier.pixels(batch))
        for index in range(2):
            weights = masks[:, index]
            if not classifier.attention.gate:
                weights = weights / weights.sum(dim=(1, 2), keepdim=True)
            np.testing.assert_allclose(got.answers[:, index], classifier.classify(features, weights), atol=1e-4)


@pytest.mark.parametrize("mode", ["squash", "crop"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("size", [(64, 64), (64, 80)])
def test_the_photos_entry_resizes_as_pillow_does(mode: Any, interpolation: Any, size: tuple[int, int]) -> None:
    """The prepared pixels, within half a level of 255 on average, and of the same centre for crop."""
    from skimage.data import chelsea

    from bla.deploy.export.entries import photos_entry

    transform = Transform(size, HALF, (0.2, 0.3, 0.4), interpolation, mode, crop_fraction=0.83)
    identity = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["pixels"], ["seen"])],
        "front",
        [onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.FLOAT, ["batch", 3, *size])],
        [onnx.helper.make_tensor_value_info("seen", onnx.TensorProto.FLOAT, ["batch", 3, *size])],
    )
    model = onnx.helper.make_model(identity, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    photos_entry(model, transform)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    whole = chelsea()
    for photo in (whole, whole[:, :201], whole[:90], whole[:61, :333]):
        (seen,) = session.run(None, {"photos": photo[None]})[0]
        levels = (seen.transpose(1, 2, 0) * transform.std + transform.mean) * 255
        difference = np.abs(levels - transform.read(photo).pixels)
        assert difference.mean() < (0.05 if interpolation != "nearest" else 0.5)
        assert np.percentile(difference, 99.9) < (4 if interpolation != "nearest" else 256)


def test_a_resize_that_onnx_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="got squash, lanczos"):
        export(wrapped(transform=Transform((64, 80), HALF, HALF, "lanczos")), tmp_path / "no.onnx", entry="photos")
    assert not (tmp_path / "no.onnx").exists()


@pytest.mark.parametrize("entry", ["pixels", "photos"])
def test_torch(entry: Any, tmp_path: Path) -> None:
    classifier = wrapped()
    exported = export(classifier, tmp_path / "file.pt2", to="torch", entry=entry)
    extra = {f"{KEY}.json": ""}
    program = torch.export.load(exported.path, extra_files=extra).module()
    assert Card.from_dict(json.loads(extra[f"{KEY}.json"])) == exported.card
    images = photos(3)
    outputs = program(classifier.pixels(images) if entry == "pixels" else torch.from_numpy(images))
    assert set(outputs) == set(OUTPUTS) - {"answers"}
    with torch.inference_mode():
        assert torch.allclose(outputs["logits"], classifier(classifier.pixels(images)), atol=1e-5)


@pytest.mark.parametrize(
    ("output", "change", "operand"),
    [
        ("logits", "Add", np.float32(1)),
        ("soft", "Mul", np.float32(0.99)),
        ("selected", "Xor", np.bool_(True)),
        ("unbounded", "Mul", np.float32(np.nan)),
    ],
)
def test_a_graph_that_differs_is_refused_with_figures(output: str, change: str, operand: Any, plain: Pair) -> None:
    classifier, path = plain[0], plain[1].path
    model = onnx.load(path)
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = ["honest" if name == output else name for name in names]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(operand), "operand"))
    model.graph.node.append(onnx.helper.make_node(change, ["honest", "operand"], [output]))
    with pytest.raises(ExportError, match=rf"got one that misses .*{output} by .* \(at most"):
        check_onnx(classifier, model, Engine(path).card)


def test_tied_clipped_and_unclipped_maps_are_among_those_checked() -> None:
    classifier = wrapped()
    with torch.inference_mode():
        found = list(maps_to_check(classifier, torch.randn(3, 3, 64, 80)))
        unbounded = [classifier.attention(features).unbounded.flatten(1) for features in found]
        assert any((values >= 0).all() for values in unbounded)
        assert any((values < 0).all() for values in unbounded)
        assert any((values == values[:, :1]).all(dim=1).any() for values in unbounded)


def test_what_cannot_be_exported_says_so(tmp_path: Path) -> None:
    never = wrapped()
    never.fitted = False
    with pytest.raises(ExportError, match="never fitted"):
        export(never, tmp_path / "x.onnx")
    with pytest.raises(ExportError, match="float32"):
        export(wrapped().double(), tmp_path / "x.onnx")
    with pytest.raises(ExportError, match="got the folder"):
        export(wrapped(), tmp_path)

    class Odd(nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            return torch.from_numpy(np.linalg.pinv(features.detach().numpy()))

    odd = wrapped()
    odd.trunk = nn.Sequential(odd.trunk, Odd())
    odd.trunk[0] = copy.deepcopy(wrapped().trunk)
    with pytest.raises(ExportError, match=r"expected a classifier that torch\.export takes"):
        export(odd, tmp_path / "x.pt2", to="torch")


def test_files_that_are_not_ours(plain: Pair, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="is no file"):
        Engine(tmp_path / "nothing.onnx")
    (tmp_path / "text.onnx").write_text("no graph")
    with pytest.raises(EngineError, match="expected an ONNX file"):
        Engine(tmp_path / "text.onnx")
    model = onnx.load(plain[1].path)
    record = json.loads(model.metadata_props[0].value)
    for value, message in (
        (json.dumps(record | {"schema_version": 99}), "expected schema_version 1, got 99"),
        (json.dumps(record | {"transform": {}}), "a transform's keys"),
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


def test_the_command(plain: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["export", "nowhere", "--out", str(tmp_path / "x.onnx")]) == 2
    assert "expected a run folder" in capsys.readouterr().err


def test_a_run_is_exported_once_and_kept(plain: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def exporting(command: list[str], **_: Any) -> Any:
        calls.append(command)
        Path(command[-1]).parent.mkdir(parents=True, exist_ok=True)
        Path(command[-1]).write_bytes(plain[1].path.read_bytes())
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", exporting)
    for _ in range(2):
        assert open_engine("tf_efficientnet_lite0").path == kept_path(SHIPPED)
    assert [command[1:5] for command in calls] == [["-m", "bla", "export", str(SHIPPED)]]
    kept_path(SHIPPED).unlink()


def test_a_run_that_cannot_be_exported_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_this_process(command: list[str], **_: Any) -> Any:
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            code = run_command(command[3:])
        return subprocess.CompletedProcess(command, code, stderr=errors.getvalue())

    monkeypatch.setattr(subprocess, "run", in_this_process)
    for name in ("run.json", "model.safetensors"):
        (tmp_path / name).write_bytes((SHIPPED / name).read_bytes()[:100])
    with pytest.raises(EngineError, match=f"{tmp_path}: .*expected"):
        open_engine(tmp_path)


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
    from PIL import Image
    from skimage.data import chelsea

    program = Path(__file__).parents[2] / "examples" / "explain_onnx.py"
    photo = tmp_path / "cat.png"
    Image.fromarray(chelsea()).save(photo)
    command = [sys.executable, "-c", WITHOUT_TORCH, str(program), str(path), str(photo)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    (expected,) = classifier.explain(photo)
    assert len([line for line in program.read_text().splitlines() if line]) <= 20
    assert done.stdout.splitlines()[0].startswith(f"{expected.prediction.label} {expected.prediction.probability:.1%}")
    drawn = [[character == "#" for character in line.split()] for line in done.stdout.splitlines()[1:5]]
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
