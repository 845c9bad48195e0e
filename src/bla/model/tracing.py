"""Classifiers as graphs of operations, and the graph cut where maps are averaged, or where they are flattened."""

from __future__ import annotations

import math
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from torch.utils import _pytree as pytree

from bla import BlaError
from bla.model.heads import TracedHead, TracedMapHead, grid_of
from bla.progress import quiet

_NEAR = 60
"""How many operations before an average its map is looked for."""


class TracingError(BlaError):
    """A classifier of which no graph can be made, or whose graph has no such cut."""


class ReadsMoreError(TracingError):
    """A head that reads more of the photo than feature maps."""


Layout = Literal["channels first", "channels last", "tokens", "channels, tokens"]
"""Of a map (B, C, H, W) or (B, H, W, C), and of patch tokens (B, N, C) or (B, C, N)."""


def as_map(values: Tensor, layout: Layout, size: Sequence[int], prefix: int = 0) -> Tensor:
    """A map (B, C, H, W) of a picture of this ``size`` from one of such a layout; the first tokens may be no cells."""
    if layout == "channels first":
        return values
    if layout == "channels last":
        return values.movedim(-1, 1)
    tokens = values.mT if layout == "channels, tokens" else values[:, prefix:] if prefix else values
    grid = token_grid(tokens.shape[1], size)
    if grid is None:
        raise TracingError(f"expected patch tokens in a grid over a picture of {size}, got {tokens.shape[1]}")
    return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *grid)


def joined_maps(maps: Sequence[Tensor]) -> Tensor:
    """Maps (B, C, H, W) behind one another, averaged to the coarsest grid."""
    if len(maps) == 1:
        return maps[0]
    grid = tuple(min((each.shape[2:] for each in maps), key=math.prod))
    pool: Any = functional.adaptive_avg_pool2d if len(grid) == 2 else functional.adaptive_avg_pool3d
    return torch.cat([pool(each, grid) for each in maps], dim=1)


class TokenTrunk(nn.Module):
    """The patch tokens that a part of a classifier gives, (B, P + H*W, C), as a map (B, C, H, W) of the photo's shape.

    The P tokens in front, class token and registers, are left out.
    """

    def __init__(self, tokens: nn.Module, prefix: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.prefix = prefix

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, h, w) to features (B, C, H, W)."""
        return as_map(self.tokens(pixels), "tokens", tuple(pixels.shape[2:]), self.prefix)


class TracedTrunk(nn.Module):
    """The part of a traced classifier up to the maps that its head reads, as one (B, C, H, W)."""

    def __init__(self, graph: fx.GraphModule, layouts: Sequence[Layout]) -> None:
        super().__init__()
        self.graph = graph
        self.layouts = tuple(layouts)

    def forward(self, pixels: Tensor) -> Tensor:
        size = tuple(pixels.shape[2:])
        pairs = zip(self.graph(pixels), self.layouts, strict=True)
        return joined_maps([as_map(values, layout, size) for values, layout in pairs])


def token_grid(tokens: int, size: Sequence[int]) -> tuple[int, ...] | None:
    """The grid of so many patches of a picture (h, w): of square patches, where its shape allows; None if none fits.

    Of a volume (d, h, w): of cubes.

    >>> token_grid(49, (224, 224)), token_grid(6, (32, 48)), token_grid(50, (224, 224)), token_grid(32, (16, 32, 32))
    ((7, 7), (2, 3), None, (2, 4, 4))
    """
    if len(size) == 3:
        side = (math.prod(size) / tokens) ** (1 / 3)
        grid = tuple(round(each / side) for each in size)
        return grid if math.prod(grid) == tokens else None
    height, width = size
    rows = round((tokens * height / width) ** 0.5)
    if not rows or tokens % rows or abs(tokens / rows / rows - width / height) > 0.5 * width / height:
        return None
    return rows, tokens // rows


def is_over(grid: Sequence[int], size: Sequence[int]) -> bool:
    """Whether several cells may lie over a picture, each as high as wide but for rounding.

    >>> is_over((7, 7), (224, 224)), is_over((3, 197), (224, 224)), is_over((1, 1), (224, 224))
    (True, False, False)
    """
    if len(grid) != len(size):
        return False
    (*_, rows, columns), (*_, height, width) = grid, size
    square = abs(rows * width - columns * height) <= max(height, width)
    return math.prod(grid) > 1 and 2 * rows <= height and square


def said(error: BaseException) -> str:
    """An error's class and the first line of its message, of at most 200 characters."""
    first, _, _ = str(error).partition("\n")
    return f"{type(error).__name__}: {first[:200]}"


def traced(own: nn.Module, pixels: Tensor) -> Graph:
    """The graph by symbolic tracing."""
    try:
        if any(isinstance(module, torch.jit.ScriptModule) for module in own.modules()):
            with quiet():
                return Graph(_of_script(own, pixels), pixels)
        try:
            return Graph(fx.symbolic_trace(own), pixels)
        except fx.proxy.TraceError:  # of optional and further arguments, too
            return Graph(fx.symbolic_trace(nn.Sequential(OrderedDict(model=own))), pixels)
    except Exception as error:
        raise TracingError(
            "expected a timm or torchvision classifier or a module that torch.fx or torch.export can trace, got "
            f"{said(error)}"
        ) from error


def exported(own: nn.Module, pixels: Tensor) -> Graph:
    """The graph by torch.export, of any batch but of this input size: slower, for what symbolic tracing cannot read."""
    try:
        with quiet(), torch.inference_mode(False), torch.no_grad():
            program = torch.export.export(own, (pixels.clone(),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
            return Graph(program.module(check_guards=False), pixels)
    except Exception as error:
        raise TracingError(f"expected a module that torch.export can trace, got {said(error)}") from error


def _of_script(own: nn.Module, pixels: Tensor) -> fx.GraphModule:
    """The operations that TorchScript runs; a way that depends on values is an error."""
    # which only the module that was scripted can take, by hooks
    with torch.inference_mode(False), torch.no_grad():
        try:
            graph = make_fx(own, tracing_mode="symbolic", _allow_non_fake_inputs=True)(pixels.clone())
        except RuntimeError:  # convolutions, with older versions of torch; what branches has no one graph
            if not isinstance(own, torch.jit.ScriptModule):
                raise
            if {"prim::If", "prim::Loop"} & {node.kind() for node in own.inlined_graph.nodes()}:
                raise
            graph = make_fx(own, tracing_mode="real", _allow_non_fake_inputs=True)(pixels.clone())
    for node in graph.graph.nodes:  # it may have written out the number of images
        if node.op == "call_function" and "view" in str(node.target) and node.args[1][0] == len(pixels):
            node.args = (node.args[0], [-1, *node.args[1][1:]])
    graph.recompile()
    return graph


class _Cut(NamedTuple):
    """An operation's output that the head reads, and the map that the trunk gives for it."""

    read: fx.Node
    source: fx.Node
    layout: Layout
    scale: float = 1.0
    """The output is so many times the average of the map."""


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps shapes of tensors, all other values, and the tensors of some nodes."""

    def __init__(self, graph: fx.GraphModule, kept: Iterable[fx.Node] = ()) -> None:
        super().__init__(graph)
        self.kept = {*kept}
        self.values: dict[fx.Node, Any] = {}
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape)
        if not isinstance(value, Tensor) or n in self.kept:
            self.values[n] = value
        return value


class Graph:
    """A classifier's operations, with the shapes that they give for some pixels."""

    def __init__(self, module: fx.GraphModule, pixels: Tensor) -> None:
        self.module = module
        self.pixels = pixels[:2]
        self.size = tuple(pixels.shape[2:])
        two, three = _Recorder(module), _Recorder(module)
        two.run(pixels[:2])
        three.run(pixels[[0, 1, 0]])
        self.shapes = two.shapes
        self.numbers = {node: (value, three.values.get(node)) for node, value in two.values.items()}
        (output,) = (node for node in module.graph.nodes if node.op == "output")
        answer = output.args[0]
        self.answer = cast("fx.Node", answer[0] if isinstance(answer, (tuple, list)) else answer)

    def split_at_averages(self) -> tuple[nn.Module, nn.Module]:
        """Cut at the last averages over maps, or over patch tokens, whatever operations make them."""
        averages = self._averages()
        cuts = self._cuts(averages.get)
        if averages and not cuts:
            raise ReadsMoreError(
                "expected a head that reads averages of feature maps alone, got one that also reads something else of "
                "the photo"
            )
        if not cuts:
            raise TracingError(
                "expected an average over a feature map of several cells before the head, found none at input size "
                f"{self.size} (a small input leaves one cell: then use a larger input)"
            )
        shapes = [self.shapes[cut.read][1:] for cut in cuts]
        head = TracedHead(self._after(cuts), shapes, [cut.scale for cut in cuts])
        return self._trunk(cuts), head

    def split_at_maps(self) -> tuple[nn.Module, nn.Module]:
        """Cut at the last maps (B, C, H, W), which are flattened, or reduced to one vector in another way."""
        maps = [node for node, shape in self.shapes.items() if is_over(shape[2:], self.size)]
        found = {node: _Cut(node, node, "channels first") for node in maps}
        cuts = self._cuts(found.get)
        if not cuts:
            raise TracingError("expected a head that reads feature maps alone, found no such maps")
        if len({self.shapes[cut.source][2:] for cut in cuts}) > 1:
            raise TracingError("expected a head that reads maps of one grid, got one that reads maps of several")
        return self._trunk(cuts), TracedMapHead(self._after(cuts), [self.shapes[cut.read][1] for cut in cuts])

    def trunk(self) -> nn.Module:
        """The graph up to the averages over its last maps; where there are none, up to the last map or row of tokens.

        An average that a class token's way passes by, as in a squeeze and excitation, is none.
        """
        try:
            return self.split_at_averages()[0]
        except TracingError:
            pass
        for node in reversed(self.module.graph.nodes):
            shape = self.shapes.get(node, ())
            if len(shape) == 2 + len(self.size):
                return TracedTrunk(self._until([node]), ["channels first"])
            if len(shape) == 3 and shape[1] > 1:
                prefix = shape[1] - int(shape[1] ** 0.5) ** 2 if self.size[0] == self.size[-1] else 1
                return TokenTrunk(TracedTrunk(self._until([node]), ["channels first"]), prefix)  # as they come
        raise TracingError("expected a feature map of several cells, found none before the head")

    def _averages(self) -> dict[fx.Node, _Cut]:
        """Of vectors on the way from the last maps to the answer those that are the average over a map."""
        near: dict[fx.Node, list[fx.Node]] = {}
        pending, seen = [self.answer], {self.answer}
        while pending:
            node = pending.pop()
            shape = self.shapes.get(node, ())
            if len(shape) > 1 and sum(length != 1 for length in shape[1:]) == 1:  # (B, C), (B, C, 1, 1) or (B, 1, C)
                near[node] = self._maps_before(node)
            if len(shape) != 2 + len(self.size) or math.prod(shape[2:]) == 1:  # no map of several cells
                fresh = [source for source in node.all_input_nodes if source not in seen]
                pending += fresh
                seen.update(fresh)
        recorder = _Recorder(self.module, {*near, *(each for maps in near.values() for each in maps)})
        recorder.run(self.pixels)
        found: dict[fx.Node, _Cut] = {}
        for node, maps in near.items():
            for source in maps:
                cut = self._as_average(node, source, recorder.values[node], recorder.values[source])
                if cut is not None:
                    found[node] = cut
                    break
        return found

    def _maps_before(self, node: fx.Node) -> list[fx.Node]:
        """The nearest maps, and behind them the nearest rows of tokens, that a vector is made from."""
        pending, found = list(node.all_input_nodes), []
        for source in pending:  # which grows
            shape = self.shapes.get(source, ())
            if len(shape) in (3, 2 + len(self.size)) and math.prod(shape[1:]) > math.prod(self.shapes[node][1:]):
                found.append(source)
            if len(pending) < _NEAR:
                pending += [each for each in source.all_input_nodes if each not in pending]
        return sorted(found, key=lambda source: -len(self.shapes[source]))

    def _as_average(self, node: fx.Node, source: fx.Node, vector: Tensor, values: Tensor) -> _Cut | None:
        channels = math.prod(vector.shape[1:])
        layouts: dict[Layout, tuple[int, ...]] = (
            {"channels first": grid_of(values), "channels last": grid_of(values[..., 0], 1)} if values.ndim > 3 else
            {"tokens": (1,), "channels, tokens": (2,)}
        )  # fmt: skip
        for layout, cells in layouts.items():
            counts = [values.shape[cell] for cell in cells]
            if len(values) != len(vector):
                continue
            if math.prod(values.shape[1:]) != channels * math.prod(counts) or math.prod(counts) == 1:
                continue
            if values.ndim == 3 and token_grid(counts[0], self.size) is None:
                continue
            mean, flat = values.double().mean(dim=cells), vector.double().reshape(len(vector), -1)
            scale = float((mean * flat).sum() / mean.square().sum().clamp(min=1e-300))
            if not math.isfinite(scale):
                continue
            scale = 1.0 if abs(scale - 1) < 1e-3 else float(round(scale)) if abs(scale - round(scale)) < 1e-2 else scale
            tolerance = 1e-5 if vector.dtype in (torch.float32, torch.float64) else 1e-2
            if scale and (scale * mean - flat).abs().max() <= tolerance * flat.abs().max():
                return _Cut(node, source, layout, scale)
        return None

    def _cuts(self, cut_at: Callable[[fx.Node], _Cut | None]) -> list[_Cut]:
        """The cuts nearest to the answer by which it reads the pixels; none where it also reads them another way."""
        found: dict[fx.Node, _Cut] = {}

        def is_cut(node: fx.Node) -> bool:
            if (cut := cut_at(node)) is not None:
                found[node] = cut
            return cut is not None

        if any(node.op == "placeholder" for node in self._between(is_cut)):
            return []
        order = list(self.module.graph.nodes)
        return sorted(found.values(), key=lambda cut: order.index(cut.source))

    def _between(self, is_cut: Callable[[fx.Node], bool]) -> set[fx.Node]:
        """The operations that the answer needs from the cuts on; numbers are known without any."""
        needed: set[fx.Node] = set()
        pending = [self.answer]
        while pending:
            node = pending.pop()
            if node in needed or is_cut(node):
                continue
            needed.add(node)
            if self._is_tensor(node):
                pending += node.all_input_nodes
        return needed

    def _is_tensor(self, node: fx.Node) -> bool:
        """Whether a node gives tensors: a tensor, several, or a module's parameter."""
        found, _ = self.numbers.get(node, (torch.empty(0), None))
        return any(isinstance(each, Tensor) for each in pytree.tree_leaves(found))

    def _trunk(self, cuts: Sequence[_Cut]) -> nn.Module:
        return TracedTrunk(self._until([cut.source for cut in cuts]), [cut.layout for cut in cuts])

    def _until(self, last: Sequence[fx.Node]) -> fx.GraphModule:
        copied = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        left = {*last}
        for node in self.module.graph.nodes:
            if not left:
                break
            copies[node] = copied.node_copy(node, copies.__getitem__)
            left.discard(node)
        copied.output(tuple(copies[node] for node in last))
        return self._compiled(copied)

    def _after(self, cuts: Sequence[_Cut]) -> fx.GraphModule:
        copied = fx.Graph()
        copies = {cut.read: copied.placeholder(f"read_{index}") for index, cut in enumerate(cuts)}
        first = copies[cuts[0].read]
        needed = self._between({cut.read for cut in cuts}.__contains__)
        batch = copied.call_method("size", (first, 0)) if any(not self._is_tensor(node) for node in needed) else first
        values: dict[fx.Node, Any] = dict(copies)
        for node in self.module.graph.nodes:
            if node in needed and not self._is_tensor(node):
                values[node] = _rebuilt(*self.numbers[node], batch)
            elif node in needed:
                values[node] = copied.node_copy(node, values.__getitem__)
        copied.output(values[self.answer])
        return self._compiled(copied)

    def _compiled(self, part: fx.Graph) -> fx.GraphModule:
        found = fx.GraphModule(self.module, part)
        found.graph.eliminate_dead_code()  # what served the other part alone
        found.recompile()
        return found


def _rebuilt(two: Any, three: Any, batch: fx.Node) -> Any:
    """A number, or several, that were found with batches of two and of three images: constant, or the batch's."""
    if isinstance(two, (tuple, list)):
        each = [_rebuilt(one, other, batch) for one, other in zip(two, three, strict=True)]
        return tuple(each) if isinstance(two, tuple) else each
    if two == three:
        return two
    if isinstance(two, int) and isinstance(three, int) and two % 2 == 0 and three == two // 2 * 3:
        return batch if two == 2 else batch.graph.call_function(operator.mul, (batch, two // 2))
    raise TracingError(f"expected sizes that are the batch's or constant, got {two} of two images and {three} of three")
