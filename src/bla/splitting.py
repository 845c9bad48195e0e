"""A classifier cut in two before its global average pooling, and the check that the cut is right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from bla.attention import weighted_sum
from bla.photo import Transform

SELF_CHECK_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""How far uniform weights may miss the classifier's logits at wrap time, of the largest logit; half precision: 2e-2."""


class ClassifierError(ValueError):
    """A classifier that cannot be split, or is used before it can explain."""


class TimmTrunk(nn.Module):
    """A timm classifier's unpooled features, as (B, C, H, W)."""

    def __init__(self, model: nn.Module, channels_last: bool) -> None:
        super().__init__()
        self.model = model
        self.channels_last = channels_last

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, h, w) to features (B, C, H, W)."""
        features: Tensor = self.model.forward_features(pixels)  # type: ignore[operator]
        return features.permute(0, 3, 1, 2) if self.channels_last else features


class TimmHead(nn.Module):
    """What follows a timm classifier's pooling, whatever it is, for one pooled vector.

    The vector is handed over as a map of one cell, on which the pooling is the identity.
    """

    def __init__(self, model: nn.Module, channels_last: bool) -> None:
        super().__init__()
        self.model = model
        self.channels_last = channels_last

    def forward(self, pooled: Tensor) -> Tensor:
        """Pooled features (B, C) to logits (B, K)."""
        one_cell = pooled[:, None, None, :] if self.channels_last else pooled[:, :, None, None]
        logits: Tensor = self.model.forward_head(one_cell)  # type: ignore[operator]
        return logits


class TracedTrunk(nn.Module):
    """The part of a traced classifier up to the map that is averaged, as (B, C, H, W)."""

    def __init__(self, graph: fx.GraphModule, channels_last: bool) -> None:
        super().__init__()
        self.graph = graph
        self.channels_last = channels_last

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, h, w) to features (B, C, H, W)."""
        features: Tensor = self.graph(pixels)
        return features.permute(0, 3, 1, 2) if self.channels_last else features


class TracedHead(nn.Module):
    """The part of a traced classifier after its average, for one pooled vector."""

    def __init__(self, graph: fx.GraphModule, pooled_shape: Sequence[int]) -> None:
        super().__init__()
        self.graph = graph
        self.pooled_shape = tuple(pooled_shape)

    def forward(self, pooled: Tensor) -> Tensor:
        """Pooled features (B, C) to logits (B, K)."""
        logits: Tensor = self.graph(pooled.reshape(-1, *self.pooled_shape))
        return logits


def drop_hooks(own: nn.Module) -> None:
    """Hooks that observe the original are not for the copy to call; torch's own ones compute weights."""
    for module in own.modules():
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        ):
            for key in [key for key, hook in hooks.items() if not type(hook).__module__.startswith("torch.")]:
                del hooks[key]


def checked_split(own: nn.Module, transform: Transform, name: str) -> tuple[nn.Module, nn.Module, int, int]:
    """Trunk, head, channels and classes of our copy, after the self-check."""
    like = next((parameter for parameter in own.parameters()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, *transform.size, generator=generator).to(like)
    with torch.inference_mode():
        try:
            logits = own(pixels)
        except Exception as error:
            raise ClassifierError(
                f"{name}: expected a classifier of pixels {tuple(pixels.shape)}, got {type(error).__name__}: {error}; "
                "pass the transform= that it was trained with"
            ) from error
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            came = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ClassifierError(f"{name}: expected logits of shape (batch, classes), got {came}")
        split = _split_timm if speaks_timm(own) else _split_traced
        trunk, head = split(own, pixels, name)
        try:
            features = trunk(pixels)
            cells = features.shape[2] * features.shape[3]
            if cells == 1:
                raise ClassifierError(
                    f"{name}: expected a feature map of several cells, got one of 1x1 at input size "
                    f"{transform.size}: there is nothing to select; use a larger input"
                )
            uniform = features.new_full((2, *features.shape[2:]), 1 / cells)
            same = head(weighted_sum(features, uniform))
            first, last = torch.zeros_like(uniform), torch.zeros_like(uniform)
            first[:, 0, 0] = last[:, -1, -1] = 1
            moved = (head(weighted_sum(features, first)) - head(weighted_sum(features, last))).abs().max()
        except ClassifierError:
            raise
        except Exception as error:
            raise ClassifierError(
                f"{name}: expected a head that reads the average of the last feature map, got one that fails on "
                f"a pooled vector ({type(error).__name__}: {error}); it needs a new head"
            ) from error
    miss = (same - logits).abs().max() / logits.abs().max().clamp(min=1e-12)
    tolerance = SELF_CHECK_TOLERANCE.get(logits.dtype, 2e-2)
    if not miss <= tolerance:
        raise ClassifierError(
            f"{name}: expected a head that reads the average of the last feature map, got one whose logits differ "
            f"by {miss.item():.1e} of the largest when the average is put in its place; it needs a new head"
        )
    if not moved > 0:
        raise ClassifierError(
            f"{name}: expected logits that depend on the cells of the feature map, got the same from any cell "
            "(a class token that pools by itself, or a head that is all zero); it needs a new or a trained head"
        )
    return trunk, head, features.shape[1], logits.shape[1]


def speaks_timm(model: nn.Module) -> bool:
    return all(hasattr(model, name) for name in ("forward_features", "forward_head", "num_features", "pretrained_cfg"))


def _split_timm(own: nn.Module, pixels: Tensor, name: str) -> tuple[nn.Module, nn.Module]:
    features = own.forward_features(pixels)  # type: ignore[operator]
    if not isinstance(features, Tensor) or features.ndim != 4:
        came = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
        raise ClassifierError(f"{name}: expected a feature map (batch, channels, height, width), got {came}")
    channels_last = getattr(own, "output_fmt", "NCHW") == "NHWC"
    return TimmTrunk(own, channels_last), TimmHead(own, channels_last)


def _split_traced(own: nn.Module, pixels: Tensor, name: str) -> tuple[nn.Module, nn.Module]:
    """Cut the traced graph at the last operation that takes a map (B, C, H, W) to (B, C) or (B, C, 1, 1)."""
    try:
        traced = fx.symbolic_trace(own)
        ShapeProp(traced).propagate(pixels)
    except Exception as error:
        raise ClassifierError(
            f"{name}: expected a timm or torchvision classifier or a module that torch.fx can trace, got "
            f"{type(error).__name__}: {error}"
        ) from error
    for node in reversed(traced.graph.nodes):
        sources = node.all_input_nodes
        before, after = _shape(sources[0]) if len(sources) == 1 else (), _shape(node)
        lengths = [length for length in after[1:] if length != 1]
        if len(before) != 4 or len(lengths) != 1 or lengths[0] not in (before[1], before[3]):
            continue
        if before[1] * before[2] * before[3] == lengths[0]:  # a flattening of one cell, after the average
            continue
        channels_last = lengths[0] != before[1]
        trunk = TracedTrunk(_graph_until(traced, sources[0]), channels_last)
        return trunk, TracedHead(_graph_after(traced, node, name), after[1:])
    raise ClassifierError(
        f"{name}: expected an average over a feature map of several cells before the head, found none at input size "
        f"{tuple(pixels.shape[2:])} (VGG and AlexNet flatten the map instead; a small input leaves one cell); "
        "it needs a new head or a larger input"
    )


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(getattr(node.meta.get("tensor_meta"), "shape", ()))


def _graph_until(traced: fx.GraphModule, last: fx.Node) -> fx.GraphModule:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in traced.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node is last:
            break
    graph.output(copies[last])
    part = fx.GraphModule(traced, graph)
    part.graph.eliminate_dead_code()  # what served the head alone
    part.recompile()
    return part


def _graph_after(traced: fx.GraphModule, pool: fx.Node, name: str) -> fx.GraphModule:
    graph = fx.Graph()
    copies = {pool: graph.placeholder("pooled")}
    nodes = list(traced.graph.nodes)
    for node in nodes[nodes.index(pool) + 1 :]:
        missing = [source for source in node.all_input_nodes if source not in copies]
        if node.op != "get_attr" and missing:
            raise ClassifierError(
                f"{name}: expected a head that reads the average of one feature map alone, got one that also reads "
                f"{', '.join(source.name for source in missing)}; it needs a new head"
            )
        copies[node] = graph.node_copy(node, copies.__getitem__)
    return fx.GraphModule(traced, graph)
