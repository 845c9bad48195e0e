"""The front of an ONNX graph: inputs that may be left out, and photos of any size."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bla.data.photo import Transform
from bla.deploy.engine import Card

if TYPE_CHECKING:
    import onnx


def optional_inputs(model: onnx.ModelProto, card: Card) -> None:
    """Give ``size``, ``target`` and ``masks`` defaults, and let one value serve a whole batch."""
    import onnx

    defaults: dict[str, npt.NDArray[Any]] = {
        "size": np.zeros(1, np.int64),
        "target": np.full(1, -1, np.int64),
        "masks": np.zeros((1, 0, *card.grid), np.float32),
    }
    rank = len(card.grid)
    front = f"""
        batch = Shape <start = 0, end = 1> (pixels)
        ones = Constant <value = int64[{rank + 1}] {{{", ".join("1" * (rank + 1))}}}> ()
        masks_shape = Concat <axis = 0> (batch, ones)"""
    for value in model.graph.input:
        if (default := defaults.get(value.name)) is None:
            continue
        model.graph.initializer.append(onnx.numpy_helper.from_array(default, value.name))
        value.type.tensor_type.shape.dim[0].dim_param = f"one_or_batch_{value.name}"
        for node in model.graph.node:
            node.input[:] = [f"each_{name}" if name == value.name else name for name in node.input]
        shape = "masks_shape" if value.name == "masks" else "batch"
        front += f"\n each_{value.name} = Expand ({value.name}, {shape})"
    _put_first(model, front, {f"each_{name}" for name in defaults})


def photos_entry(model: onnx.ModelProto, transform: Transform) -> None:
    """Resize (antialiased, on uint8, as Pillow does) and normalise the new input ``photos``, (B, h, w, 3), first."""
    import onnx

    kinds = {
        "nearest": 'mode = "nearest", nearest_mode = "round_prefer_ceil"',
        "bilinear": 'mode = "linear", antialias = 1',
        "bicubic": 'mode = "cubic", antialias = 1, cubic_coeff_a = -0.5',  # as in Pillow and torch
    }
    kind = kinds[transform.interpolation]
    height, width = transform.size
    std = np.array(transform.std, np.float64)
    crop = transform.mode != "squash"
    # The centre starts at round((whole - input) / 2), half to even as Python rounds.
    centre = """
        room = Sub (whole, input_size)
        room_exact = Cast <to = 11> (room)
        two = Constant <value = double {2.0}> ()
        start_exact = Div (room_exact, two)
        start_round = Round (start_exact)
        start = Cast <to = 7> (start_round)
        end = Add (start, input_size)
        axes = Constant <value = int64[2] {2, 3}> ()
        seen = Slice (resized, start, end, axes)"""
    front = f"""
        planes = Transpose <perm = [0, 3, 1, 2]> (photos)
        batch_and_colours = Shape <start = 0, end = 2> (planes)
        input_size = Constant <value = int64[2] {{{height}, {width}}}> ()
        {_whole(transform) if crop else "whole = Identity (input_size)"}
        sizes = Concat <axis = 0> (batch_and_colours, whole)
        resized = Resize <coordinate_transformation_mode = "half_pixel", {kind}> (planes, , , sizes)
        {centre if crop else "seen = Identity (resized)"}
        values = Cast <to = 1> (seen)
        scale = Constant <value = float[3, 1, 1] {{{_numbers(1 / (255 * std))}}}> ()
        offset = Constant <value = float[3, 1, 1] {{{_numbers(np.array(transform.mean) / std)}}}> ()
        scaled = Mul (values, scale)
        pixels = Sub (scaled, offset)"""
    _put_first(model, front, {"pixels"})
    hide(model, model.graph.input, "pixels")
    photos = onnx.helper.make_tensor_value_info("photos", onnx.TensorProto.UINT8, ["batch", "rows", "columns", 3])
    model.graph.input.insert(0, photos)


def _whole(transform: Transform) -> str:
    """The size (height, width) to which ``Transform`` resizes the whole photo before it takes the centre."""
    rows, columns = (int(np.floor(side / transform.crop_fraction)) for side in transform.size)
    if transform.mode == "squash-crop":
        return f"whole = Constant <value = int64[2] {{{rows}, {columns}}}> ()"
    if rows == columns:
        return f"""photo = Shape <start = 2, end = 4> (planes)
        short = ReduceMin <keepdims = 1> (photo)
        side = Constant <value = int64 {{{rows}}}> ()
        product = Mul (photo, side)
        whole = Div (product, short)"""
    return f"""photo = Shape <start = 2, end = 4> (planes)
        exact = Cast <to = 11> (photo)
        sides = Constant <value = double[2] {{{rows}.0, {columns}.0}}> ()
        ratios = Div (exact, sides)
        ratio = ReduceMin <keepdims = 1> (ratios)
        quotient = Div (exact, ratio)
        rounded = Round (quotient)
        whole = Cast <to = 7> (rounded)"""


def _numbers(values: Any) -> str:
    return ", ".join(repr(float(np.float32(value))) for value in values)


def _put_first(model: onnx.ModelProto, lines: str, gives: Collection[str]) -> None:
    """Put nodes, given as lines of ONNX's textual syntax, before all others, to which they give some tensors."""
    import onnx

    nodes = [onnx.parser.parse_node(line) for line in lines.splitlines() if line.strip()]
    inner = {name for node in nodes for name in node.output if name not in gives}
    for node in nodes:
        for names in (node.input, node.output):  # the exporter may have used the same names
            names[:] = [f"front/{name}" if name in inner else name for name in names]
    rest = [*model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *rest])


def hide(model: onnx.ModelProto, among: Any, name: str) -> None:
    """Make an input or output a tensor inside of the graph."""
    (value,) = (value for value in among if value.name == name)
    model.graph.value_info.append(value)
    among.remove(value)
