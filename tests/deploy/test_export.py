"""Export: the graph says what the module says, for every attention, entry and input; what does not is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import bla
from bla.cli import run_command
from bla.data.photo import Transform
from bla.deploy.engine import KEY, Card, Engine, EngineError
from bla.deploy.export import ExportError, export
from bla.deploy.export.checking import check_onnx, maps_to_check
from bla.deploy.export.graph import OUTPUTS
from bla.deploy.export.quantising import disagreement, quantised
from bla.explanations.explanation import Explanation, Unexplained
from bla.model.attention import L2XAttention
from bla.model.own_prediction import OwnPredictionAttention
from small_exports import CLASSES, Pair, averaging, deepening, flattening, normalising, photos, wrapped

HALF = (0.5, 0.5, 0.5)


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
    assert record["schema_version"] == 2
    assert record["version"]
    assert b"/site-packages/" not in path.read_bytes(), "no paths of the machine that wrote it"
    for rows in (1, 2, 7):
        outputs = session.run(None, {"pixels": np.zeros((rows, 3, 64, 80), np.float32)})
        assert [output.shape for output in outputs] == [*2 * [(rows, 5)], *4 * [(rows, 4, 5)], (rows, 3), (rows, 0, 5)]


KINDS = (
    "plain",
    "class_aware",
    "of_photos",
    "own, normalised",
    "l2x, flattened",
)


@pytest.fixture(scope="module", params=KINDS)
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """An explainer with some attention and some head, and its graph."""
    if request.param in ("plain", "class_aware", "of_photos"):
        pair: Pair = request.getfixturevalue(request.param)
        return pair
    path = tmp_path_factory.mktemp("each") / "graph.onnx"
    square = Transform((64, 64), HALF, HALF, "bicubic")
    if request.param.startswith("own"):
        classifier = wrapped(OwnPredictionAttention(8), square, normalising)
        return classifier, export(classifier, path)
    classifier = wrapped(L2XAttention(8, size=3), square, flattening)
    return classifier, export(classifier, path)


def test_every_attention_says_what_the_module_says(each: Pair) -> None:
    classifier, exported = each
    assert exported.misses["selected"] == 0
    assert exported.misses.get("photos", 0) < 0.2
    assert max(miss for name, miss in exported.misses.items() if name != "photos") < 1e-4
    engine = Engine(exported.path)
    images = list(photos(5))
    questions: list[dict[str, Any]] = [{}]
    if engine.card.sizes:
        questions += [{"size": size} for size in (1, 7, engine.card.cells)]
    if engine.card.targets:
        questions += [{"target": 3}, {"target": 0, "size": 4}]
    for arguments in questions:
        for ours, theirs in zip(
            engine.explain_each(images, batch_size=3, **arguments), classifier.explain(images, **arguments), strict=True
        ):
            assert not isinstance(ours, Unexplained)
            one, other = ours.to_dict(), theirs.to_dict()
            for key in ("unbounded", "scores", "soft"):
                np.testing.assert_allclose(one.pop(key), other.pop(key), atol=1e-5)
            tops = ([*record.pop("top"), *record.pop("classifier_top")] for record in (one, other))
            for left, right in zip(*tops, strict=True):
                assert left == right | {"probability": pytest.approx(right["probability"], abs=1e-5)}
            for answer in ("prediction", "classifier"):
                probability = other.pop(answer)["probability"]
                assert one.pop(answer)["probability"] == pytest.approx(probability, abs=1e-5)
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


@pytest.mark.parametrize("mode", ["squash", "crop", "squash-crop"])
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
        # Pillow rounds between its two passes, and where it changes their order a sixth of the pixels differ by a level
        assert difference.mean() < {"nearest": 0.5}.get(interpolation, 0.2 if mode == "squash-crop" else 0.05)
        assert np.percentile(difference, 99.9) < (4 if interpolation != "nearest" else 256)


@pytest.mark.parametrize("mode", ["crop", "squash-crop"])
@pytest.mark.parametrize("size", [(64, 64), (64, 80)])
def test_the_photos_entry_of_a_torch_file_crops_photos_of_every_shape(mode: Any, size: tuple[int, int]) -> None:
    from skimage.data import chelsea

    from bla.deploy.export.graph import _prepared

    transform = Transform(size, HALF, (0.2, 0.3, 0.4), "bicubic", mode, crop_fraction=0.83)

    class Front(nn.Module):
        def forward(self, photos: Tensor) -> Tensor:
            return _prepared(photos, transform)

    sides = {1: torch.export.Dim("rows", min=2), 2: torch.export.Dim("columns", min=2)}
    example = torch.zeros(1, 300, 400, 3, dtype=torch.uint8)
    program = torch.export.export(Front(), (example,), dynamic_shapes=(sides,)).module()
    whole = chelsea()
    for photo in (whole, whole[:, :201], whole[:90], whole[:61, :333], whole[:20, :15]):
        (seen,) = program(torch.from_numpy(photo[None]))
        levels = (seen.permute(1, 2, 0).numpy() * transform.std + transform.mean) * 255
        difference = np.abs(levels - transform.read(photo).pixels)
        assert difference.mean() < 0.3
        assert difference.max() < 1.1


def test_a_resize_that_onnx_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="expected a resize that a graph can do, got lanczos"):
        export(wrapped(transform=Transform((64, 80), HALF, HALF, "lanczos")), tmp_path / "no.onnx", entry="photos")
    assert not (tmp_path / "no.onnx").exists()


@pytest.mark.parametrize("kind", ["pixels", "photos", "own, flattened"])
def test_torch(kind: str, tmp_path: Path) -> None:
    square = Transform((64, 64), HALF, HALF, "bicubic")
    classifier = wrapped(OwnPredictionAttention(8), square, flattening) if kind == "own, flattened" else wrapped()
    entry: Literal["pixels", "photos"] = "photos" if kind == "photos" else "pixels"
    classifier.several_labels = kind == "photos"
    exported = export(classifier, tmp_path / "file.pt2", to="torch", entry=entry)
    assert exported.misses["selected"] == 0
    assert exported.card.several_labels == classifier.several_labels
    extra = {f"{KEY}.json": ""}
    program = torch.export.load(exported.path, extra_files=extra).module()
    assert Card.from_json(extra[f"{KEY}.json"]) == exported.card
    images = photos(3, *classifier.transform.size)
    outputs = program(classifier.pixels(images).contiguous() if entry == "pixels" else torch.from_numpy(images))
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


def test_a_regression_exports_its_value(tmp_path: Path) -> None:
    network = averaging()
    network[3] = nn.Linear(8, 1)
    transform = Transform((64, 80), HALF, HALF, "bilinear")
    regression = bla.explainable(network, transform=transform, meaning="value")
    engine = Engine(export(regression, tmp_path / "x.onnx").path)
    for came, own in zip(engine.explain_each(photos(2)), regression.explain(photos(2)), strict=True):
        assert isinstance(came, Explanation)
        assert came.classifier is not None
        assert own.classifier is not None
        assert came.classifier.value == pytest.approx(own.classifier.value, rel=1e-4)
        assert (came.agrees, came.sizes, str(came)) == (None, None, str(own))
    with pytest.raises(ExportError, match="expected a classifier for int8, got the regression"):
        export(regression, tmp_path / "x.onnx", calibration=[tmp_path])


def test_the_command(plain: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["export", "nowhere", "--out", str(tmp_path / "x.onnx")]) == 2
    assert "expected a run folder" in capsys.readouterr().err


def test_an_explainer_with_an_earlier_map_exports_before_it_was_ever_called(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = bla.explainable(deepening(), transform=Transform((64, 64), HALF, HALF), classes=CLASSES)
    assert classifier.attention.earlier == 6
    exported = export(classifier, tmp_path / "graph.onnx")
    images = list(photos(3))
    for ours, theirs in zip(Engine(exported.path).explain_each(images), classifier.explain(images), strict=True):
        assert isinstance(ours, Explanation)
        assert (ours.selected == theirs.selected).all()
        assert ours.agrees
        assert ours.sizes == theirs.sizes


def test_the_cells_of_volumes_are_compared_photo_by_photo() -> None:
    def engine(logits: list[list[int]], cells: list[list[int]], several: bool = False) -> Any:
        selected = np.array(cells, bool).reshape(2, 1, 2, 2)
        outputs = SimpleNamespace(classifier_logits=np.array(logits), selected=selected)
        return SimpleNamespace(run=lambda _: outputs, card=SimpleNamespace(several_labels=several))

    one = engine([[1, 0], [1, 0]], [[1, 0, 0, 0], [1, 1, 0, 0]])
    other = engine([[1, 0], [0, 1]], [[1, 1, 0, 0], [0, 1, 1, 0]])  # alike: 1 of 2, 1 of 3
    found = disagreement(one, other, [np.zeros(1, np.uint8)] * 2)
    assert found == {"classifier": 0.5, "selected": pytest.approx((1 / 2 + 2 / 3) / 2)}
    cells = [[1, 0, 0, 0]] * 2
    one, other = engine([[2, 1], [-1, -2]], cells, True), engine([[2, -1], [-1, -3]], cells, True)
    found = disagreement(one, other, [np.zeros(1, np.uint8)] * 2)
    assert found["classifier"] == 0.5, "of several labels, every decision counts, and no likeliest class"


def test_int8_says_how_far_it_agrees(class_aware: Pair, tmp_path: Path) -> None:
    graph = class_aware[1].path.read_bytes()
    for index, pixels in enumerate(photos(16)):
        Image.fromarray(pixels).save(tmp_path / f"{index:02}.png")
    content, card, misses = quantised(graph, [tmp_path])
    (tmp_path / "int8.onnx").write_bytes(content)
    engine, exact = Engine(tmp_path / "int8.onnx"), Engine(class_aware[1].path)
    assert engine.card == card
    assert card.note == (
        f"int8: the classifier's class differs from float32's on {misses['classifier']:.1%} of 8 photos, "
        f"{misses['selected']:.1%} of the cells"
    )
    kinds = {node.op_type for node in onnx.load_from_string(content).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    batch = photos(4)
    difference = np.abs(engine.run(batch).classifier_logits - exact.run(batch).classifier_logits).max()
    assert 0 < difference < 0.1 * np.abs(exact.run(batch).classifier_logits).max()
    with pytest.raises(ExportError, match="expected 16 photos or more to calibrate int8 on, got 1"):
        quantised(graph, [tmp_path / "00.png"])
