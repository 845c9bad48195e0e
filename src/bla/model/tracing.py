"""Classifiers as graphs of operations, and the graph cut at the map that is averaged or flattened."""

from __future__ import annotations

import math
import warnings
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from bla import BlaError
from bla.model.heads import TracedHead, TracedMapHead


class TracingError(BlaError):
    """A classifier of which no graph can be made, or whose graph has no such cut."""


class TokenTrunk(nn.Module):
    """The patch tokens that a part of a classifier gives, (B, P + H*W, C), as a map (B, C, H, W) of the photo's shape.

    The P tokens in front, class token and registers, are left out. ``transposed``: the part gives (B, C, P + H*W).
    """

    def __init__(self, tokens: nn.Module, prefix: int, *, transposed: bool = False) -> None:
        super().__init__()
        self.tokens = tokens
        self.prefix = prefix
        self.transposed = transposed

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, h, w) to features (B, C, H, W)."""
        tokens: Tensor = self.tokens(pixels)
        tokens = (tokens.mT if self.transposed else tokens)[:, self.prefix :]
        size = (pixels.shape[2], pixels.shape[3])
        grid = token_grid(tokens.shape[1], size)
        if grid is None:
            raise TracingError(f"expected patch tokens in a grid over a picture of {size}, got {tokens.shape[1]}")
        height, width = grid
        return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, height, width)


class TracedTrunk(nn.Module):
    """The part of a traced classifier up to the map that is averaged, as (B, C, H, W)."""

    def __init__(self, graph: fx.GraphModule, channels_last: bool) -> None:
        super().__init__()
        self.graph = graph
        self.channels_last = channels_last

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.graph(pixels)
        return features.permute(0, 3, 1, 2) if self.channels_last else features


def token_grid(tokens: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """The grid of so many patches of a picture (h, w): of square patches, where its shape allows; None if none fits.

    >>> token_grid(49, (224, 224)), token_grid(6, (32, 48)), token_grid(50, (224, 224))
    ((7, 7), (2, 3), None)
    """
    height, width = size
    rows = round((tokens * height / width) ** 0.5)
    if not rows or tokens % rows or abs(tokens / rows / rows - width / height) > 0.5 * width / height:
        return None
    return rows, tokens // rows


def said(error: Exception) -> str:
    """An error's class and the first line of its message."""
    first, _, _ = str(error).partition("\n")
    return f"{type(error).__name__}: {first}"


def traced(own: nn.Module, pixels: Tensor) -> fx.GraphModule:
    """The graph by symbolic tracing, with the shapes that these pixels take in it."""
    try:
        graph = fx.symbolic_trace(own)
        ShapeProp(graph).propagate(pixels)
        return graph
    except Exception as error:
        raise TracingError(
            "expected a timm or torchvision classifier or a module that torch.fx or torch.export can trace, got "
            f"{said(error)}"
        ) from error


def exported(own: nn.Module, pixels: Tensor) -> fx.GraphModule:
    """The graph by torch.export, of any batch but of this input size: slower, for what symbolic tracing cannot read."""
    try:
        with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
            warnings.simplefilter("ignore")  # of torch, about itself
            program = torch.export.export(own, (pixels.clone(),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
            graph = program.module(check_guards=False)
            ShapeProp(graph).propagate(pixels)
            return graph
    except Exception as error:
        raise TracingError(f"expected a module that torch.export can trace, got {said(error)}") from error


def split_at_average(graph: fx.GraphModule) -> tuple[nn.Module, nn.Module]:
    """Cut at the last operation that takes a map (B, C, H, W) to (B, C) or (B, C, 1, 1)."""
    average = _average(graph)
    if average is None:
        raise TracingError(
            "expected an average over a feature map of several cells before the head, found none at input size "
            f"{_input_size(graph)} (a small input leaves one cell: then use a larger input)"
        )
    return _until_average(graph, average), TracedHead(_graph_after(graph, average), _shape(average)[1:])


def split_at_map(graph: fx.GraphModule) -> tuple[nn.Module, nn.Module]:
    """Cut at the last map (B, C, H, W) that an operation flattens, or reduces to one vector in another way."""
    for node in reversed(graph.graph.nodes):
        shape = _shape(node)
        for source in node.all_input_nodes if len(shape) == 2 or shape[2:] == (1, 1) else ():
            before = _shape(source)
            if len(before) == 4 and before[2:] != (1, 1) and shape[1] in (before[1], math.prod(before[1:])):
                head = TracedMapHead(_graph_after(graph, source))
                return TracedTrunk(_graph_until(graph, source), channels_last=False), head
    raise TracingError("expected a feature map that is flattened, found none")


def trunk_of(graph: fx.GraphModule) -> nn.Module:
    """The graph up to the average over its last map; where there is none, up to the last map or row of tokens."""
    average = _average(graph)
    if average is not None:
        return _until_average(graph, average)
    for node in reversed(graph.graph.nodes):
        shape = _shape(node)
        if len(shape) == 4:
            return TracedTrunk(_graph_until(graph, node), channels_last=False)
        if len(shape) == 3 and shape[1] > 1:
            height, width = _input_size(graph)
            prefix = shape[1] - int(shape[1] ** 0.5) ** 2 if height == width else 1
            return TokenTrunk(_graph_until(graph, node), prefix)
    raise TracingError("expected a feature map of several cells, found none before the head")


def _average(graph: fx.GraphModule) -> fx.Node | None:
    """The last operation that takes a map of several cells, or a row of patch tokens, to one vector an image."""
    for node in reversed(graph.graph.nodes):
        sources = node.all_input_nodes
        before, after = _shape(sources[0]) if len(sources) == 1 else (), _shape(node)
        lengths = [length for length in after[1:] if length != 1]
        if len(before) not in (3, 4) or len(lengths) != 1 or lengths[0] not in (before[1], before[-1]):
            continue
        if math.prod(before[1:]) == lengths[0]:  # a flattening of one cell, after the average
            continue
        tokens = before[1] if lengths[0] == before[2] else before[2]
        if len(before) == 3 and (tokens == 1 or token_grid(tokens, _input_size(graph)) is None):
            continue
        return cast("fx.Node", node)
    return None


def _until_average(graph: fx.GraphModule, average: fx.Node) -> nn.Module:
    (source,) = average.all_input_nodes
    (channels,) = (length for length in _shape(average)[1:] if length != 1)
    part, before = _graph_until(graph, source), _shape(source)
    if len(before) == 3:
        return TokenTrunk(part, 0, transposed=channels != before[2])
    return TracedTrunk(part, channels_last=channels != before[1])


def _input_size(graph: fx.GraphModule) -> tuple[int, int]:
    height, width = next(
        _shape(node)[2:] for node in graph.graph.nodes if node.op == "placeholder" and len(_shape(node)) == 4
    )
    return height, width


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(getattr(node.meta.get("tensor_meta"), "shape", ()))


def _graph_until(graph: fx.GraphModule, last: fx.Node) -> fx.GraphModule:
    copied = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        copies[node] = copied.node_copy(node, copies.__getitem__)
        if node is last:
            break
    copied.output(copies[last])
    return _compiled(graph, copied)


def _graph_after(graph: fx.GraphModule, cut: fx.Node) -> fx.GraphModule:
    copied = fx.Graph()
    copies = {cut: copied.placeholder("pooled")}
    nodes = list(graph.graph.nodes)
    for node in nodes[: nodes.index(cut)]:
        if node.op == "get_attr":  # of an exported graph all weights come first
            copies[node] = copied.node_copy(node, copies.__getitem__)
    for node in nodes[nodes.index(cut) + 1 :]:
        if node.op == "output":
            logits = node.args[0][0] if isinstance(node.args[0], (tuple, list)) else node.args[0]
            if logits not in copies:
                raise TracingError("expected logits that are made from the feature map, got none")
            copied.output(copies[logits])
            break
        missing = [source for source in node.all_input_nodes if source not in copies]
        if node.op != "get_attr" and missing:
            raise TracingError(
                "expected a head that reads one feature map alone, got one that also reads "
                f"{', '.join(source.name for source in missing)}"
            )
        copies[node] = copied.node_copy(node, copies.__getitem__)
    return _compiled(graph, copied)


def _compiled(graph: fx.GraphModule, part: fx.Graph) -> fx.GraphModule:
    found = fx.GraphModule(graph, part)
    found.graph.eliminate_dead_code()  # what served the other part alone
    found.recompile()
    return found
