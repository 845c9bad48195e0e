"""What goes in at the graph's front: inputs that may be left out, and photos of any size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bla.data.photo import Transform
from bla.deploy.engine import Card
from bla.deploy.export.checking import ExportError
from bla.deploy.export.graph import FEATURES

if TYPE_CHECKING:
    import onnx


def tidied(model: onnx.ModelProto, card: Card) -> onnx.ModelProto:
    """Without the exporter's notes (of a machine's paths, among others), with the dimensions named."""
    names: dict[str, str] = {}
    inputs = {value.name: value for value in model.graph.input}
    for name, dimension, readable in (("pixels", 0, "batch"), ("masks", 1, "subsets")):
        names[inputs[name].type.tensor_type.shape.dim[dimension].dim_param] = readable
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        del value.metadata_props[:]
        for length in value.type.tensor_type.shape.dim:
            if length.dim_param:
                length.dim_param = names.get(length.dim_param, length.dim_param)
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    kept = [value for value in model.graph.output if value.name != FEATURES]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    model.producer_name, model.producer_version = "bla", card.version
    model.graph.name = "bla"
    model.doc_string = f"{card.setup} on {card.model}: a prediction, and the cells that alone made it"
    return model


def optional_inputs(model: onnx.ModelProto, card: Card) -> None:
    """Give ``size``, ``target`` and ``masks`` defaults, and let one value serve a whole batch."""
    height, width = card.grid
    defaults: dict[str, npt.NDArray[np.int64] | npt.NDArray[np.float32]] = {
        "size": np.zeros(1, np.int64),
        "target": np.full(1, -1, np.int64),
        "masks": np.zeros((1, 0, height, width), np.float32),
    }
    front = _Front()
    batch = front.node("Shape", ["pixels"], "pixels/batch", start=0, end=1)
    for value in model.graph.input:
        default = defaults.get(value.name)
        if default is None:
            continue
        front.constant(value.name, default)
        value.type.tensor_type.shape.dim[0].dim_param = f"one_or_batch_{value.name}"
        whole = batch
        if default.ndim > 1:
            ones = front.constant("ones", np.ones(default.ndim - 1, np.int64))
            whole = front.node("Concat", [batch, ones], "masks/shape", axis=0)
        each = f"{value.name}/each"
        for node in model.graph.node:
            node.input[:] = [each if name == value.name else name for name in node.input]
        front.node("Expand", [value.name, whole], each)
    front.put(model)


def photos_entry(model: onnx.ModelProto, transform: Transform) -> None:
    r"""Put resizing and normalising before ``pixels``; the input is then ``photos``, uint8 (B, h, w, 3).

    .. math:: \text{pixels} = (\mathrm{resize}(\text{photos}) / 255 - \text{mean}) / \text{std}

    The resize is ONNX's, antialiased, on uint8, as Pillow does it.

    Raises
    ------
    ExportError
        If ONNX has no such resize.
    """
    import onnx

    if transform.interpolation == "lanczos":
        raise ExportError(
            "expected an interpolation that ONNX has (bilinear, bicubic, nearest), got lanczos: take the entry pixels, "
            "and let Pillow resize"
        )
    front = _Front()
    height, width = transform.size
    resizes: dict[str, dict[str, Any]] = {
        "nearest": {"mode": "nearest", "nearest_mode": "round_prefer_ceil"},
        "bilinear": {"mode": "linear", "antialias": 1},
        "bicubic": {"mode": "cubic", "antialias": 1, "cubic_coeff_a": -0.5},  # Pillow's and torch's, not ONNX's default
    }
    resize = resizes[transform.interpolation]
    planes = front.node("Transpose", ["photos"], "photos/planes", perm=[0, 3, 1, 2])
    shape = front.node("Shape", [planes], "photos/shape", start=0, end=2)
    input_size = front.constant("photos/input", np.array([height, width], np.int64))
    whole = input_size if transform.mode == "squash" else _whole(front, planes, transform)
    sizes = front.node("Concat", [shape, whole], "photos/sizes", axis=0)
    seen = front.node(
        "Resize", [planes, "", "", sizes], "photos/resized", coordinate_transformation_mode="half_pixel", **resize
    )
    if transform.mode == "crop":
        # the centre, from round((whole - input) / 2) on, half to even as Python rounds
        room = front.node("Sub", [whole, input_size], "photos/room")
        exact = front.node("Cast", [room], "photos/room_exact", to=onnx.TensorProto.DOUBLE)
        half = front.node("Mul", [exact, front.constant("photos/half", np.float64(0.5))], "photos/half_room")
        start = front.node("Round", [half], "photos/start_exact")
        start = front.node("Cast", [start], "photos/start", to=onnx.TensorProto.INT64)
        end = front.node("Add", [start, input_size], "photos/end")
        seen = front.node(
            "Slice", [seen, start, end, front.constant("photos/axes", np.array([2, 3], np.int64))], "photos/seen"
        )
    std = np.array(transform.std, np.float64)
    scale = front.constant("photos/scale", (1 / (255 * std)).astype(np.float32)[:, None, None])
    offset = front.constant("photos/offset", (np.array(transform.mean) / std).astype(np.float32)[:, None, None])
    values = front.node("Cast", [seen], "photos/values", to=onnx.TensorProto.FLOAT)
    front.node("Sub", [front.node("Mul", [values, scale], "photos/scaled"), offset], "pixels")
    front.put(model)
    kept = [value for value in model.graph.input if value.name != "pixels"]
    photos = onnx.helper.make_tensor_value_info("photos", onnx.TensorProto.UINT8, ["batch", "rows", "columns", 3])
    del model.graph.input[:]
    model.graph.input.extend([photos, *kept])


def _whole(front: _Front, planes: str, transform: Transform) -> str:
    """The size, (height, width), to which the whole photo is resized, as ``Transform`` reckons it for ``crop``."""
    import onnx

    rows = int(np.floor(transform.size[0] / transform.crop_fraction))
    columns = int(np.floor(transform.size[1] / transform.crop_fraction))
    photo = front.node("Shape", [planes], "photos/size", start=2, end=4)
    if rows == columns:
        short = front.node("ReduceMin", [photo], "photos/short", keepdims=1)
        times = front.node("Mul", [photo, front.constant("photos/rows", np.int64(rows))], "photos/times")
        return front.node("Div", [times, short], "photos/whole")
    exact = front.node("Cast", [photo], "photos/exact", to=onnx.TensorProto.DOUBLE)
    short = front.constant("photos/short", np.array([rows, columns], np.float64))
    ratios = front.node("Div", [exact, short], "photos/ratios")
    ratio = front.node("ReduceMin", [ratios], "photos/ratio", keepdims=1)
    whole = front.node("Round", [front.node("Div", [exact, ratio], "photos/whole_exact")], "photos/whole_round")
    return front.node("Cast", [whole], "photos/whole", to=onnx.TensorProto.INT64)


class _Front:
    """Nodes and constants that are to come first."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        import onnx

        self.nodes.append(onnx.helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def constant(self, name: str, values: npt.ArrayLike) -> str:
        import onnx

        self.constants.append(onnx.numpy_helper.from_array(np.asarray(values), name))
        return name

    def put(self, model: onnx.ModelProto) -> None:
        rest = list(model.graph.node)
        del model.graph.node[:]
        model.graph.node.extend([*self.nodes, *rest])
        model.graph.initializer.extend(self.constants)
