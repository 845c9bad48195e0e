"""A classifier cut in two before its global average pooling, and the check that the cut is right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

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
        tokens: Tensor = self.tokens(pixels)[:, self.prefix :]
        height, width = token_grid(tokens.shape[1], (pixels.shape[2], pixels.shape[3]))
        return tokens.transpose(1, 2).reshape(len(tokens), -1, height, width)


class TokenHead(nn.Module):
    """What follows a timm classifier's average over patch tokens, for one pooled vector.

    The vector is handed over as the one patch token, on which the average is the identity; tokens in front are zero.
    """

    def __init__(self, model: nn.Module, prefix: int) -> None:
        super().__init__()
        self.model = model
        self.prefix = prefix

    def forward(self, pooled: Tensor) -> Tensor:
        """Pooled features (B, C) to logits (B, K)."""
        logits: Tensor = self.model.forward_head(nn.functional.pad(pooled[:, None], (0, 0, self.prefix, 0)))  # type: ignore[operator]
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


def token_grid(tokens: int, size: tuple[int, int]) -> tuple[int, int]:
    """The grid of so many patches of a picture (h, w): square patches, where its shape allows.

    >>> token_grid(49, (224, 224)), token_grid(6, (32, 48))
    ((7, 7), (2, 3))

    Raises
    ------
    ClassifierError
        If no grid of the picture's shape has so many cells.
    """
    height, width = size
    rows = round((tokens * height / width) ** 0.5)
    if not rows or tokens % rows or abs(tokens / rows / rows - width / height) > 0.5 * width / height:
        raise ClassifierError(f"expected patch tokens in a grid over a picture of {size}, got {tokens} of them")
    return rows, tokens // rows


def checked_trunk(own: nn.Module, transform: Transform, name: str) -> tuple[nn.Module, int]:
    """Trunk and channels of our copy, for a head of another make: of any classifier with a last map of several cells.

    What follows that map in the classifier does not matter, be it a class token or a flattening (VGG, AlexNet).
    """
    pixels = _probe(own, transform)
    with torch.inference_mode():
        try:
            if speaks_timm(own):
                trunk, _ = _split_timm(own, pixels, name)
            else:
                trunk = _traced_trunk(_traced(own, pixels, name), pixels, name)
            features = trunk(pixels)
        except ClassifierError:
            raise
        except Exception as error:
            raise ClassifierError(
                f"{name}: expected a classifier of pixels {tuple(pixels.shape)}, got {type(error).__name__}: {error}; "
                "pass the transform= that it was trained with"
            ) from error
    _check_several_cells(features, transform, name)
    if not torch.isfinite(features).all():
        raise ClassifierError(f"{name}: expected finite features, got NaN or infinity: check its weights")
    return trunk, features.shape[1]


def checked_split(own: nn.Module, transform: Transform, name: str) -> tuple[nn.Module, nn.Module, int, int]:
    """Trunk, head, channels and classes of our copy, after the self-check."""
    pixels = _probe(own, transform)
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
            _check_several_cells(features, transform, name)
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
    if isinstance(trunk, TokenTrunk) and trunk.prefix and not torch.allclose(same, logits, rtol=1e-2, atol=1e-2):
        raise ClassifierError(
            f"{name}: expected a head that reads the average of the patch tokens, got one that reads a class token, "
            "which has read every patch by then; it needs a new head (head=)"
        )
    miss = (same - logits).abs().max() / logits.abs().max().clamp(min=1e-12)
    tolerance = SELF_CHECK_TOLERANCE.get(logits.dtype, 2e-2)
    if not miss <= tolerance:
        raise ClassifierError(
            f"{name}: expected a head that reads the average of the last feature map, got one whose logits differ "
            f"by {miss.item():.1e} of the largest when the average is put in its place; it needs a new head (head=)"
        )
    if not moved > 0:
        raise ClassifierError(
            f"{name}: expected logits that depend on the cells of the feature map, got the same from any cell "
            "(a class token that pools by itself, or a head that is all zero); it needs a new or a trained head"
        )
    return trunk, head, features.shape[1], logits.shape[1]


def _probe(own: nn.Module, transform: Transform) -> Tensor:
    """Noise of two pictures' size, the same at every call."""
    like = next((parameter for parameter in own.parameters()), torch.empty(0))
    return torch.randn(2, 3, *transform.size, generator=torch.Generator().manual_seed(0)).to(like)


def _check_several_cells(features: Tensor, transform: Transform, name: str) -> None:
    if features.shape[2] * features.shape[3] == 1:
        raise ClassifierError(
            f"{name}: expected a feature map of several cells, got one of 1x1 at input size {transform.size}: there is "
            "nothing to select; use a larger input"
        )


def speaks_timm(model: nn.Module) -> bool:
    return all(hasattr(model, name) for name in ("forward_features", "forward_head", "num_features", "pretrained_cfg"))


def _split_timm(own: nn.Module, pixels: Tensor, name: str) -> tuple[nn.Module, nn.Module]:
    features = own.forward_features(pixels)  # type: ignore[operator]
    if isinstance(features, Tensor) and features.ndim == 3:
        prefix = int(getattr(own, "num_prefix_tokens", 0))
        return TokenTrunk(_TimmTokens(own), prefix), TokenHead(own, prefix)
    if not isinstance(features, Tensor) or features.ndim != 4:
        came = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
        raise ClassifierError(f"{name}: expected a feature map (batch, channels, height, width), got {came}")
    channels_last = getattr(own, "output_fmt", "NCHW") == "NHWC"
    return TimmTrunk(own, channels_last), TimmHead(own, channels_last)


class _TimmTokens(nn.Module):
    """A timm classifier's features as they come."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, h, w) to tokens (B, P + H*W, C)."""
        tokens: Tensor = self.model.forward_features(pixels)  # type: ignore[operator]
        return tokens


def _traced(own: nn.Module, pixels: Tensor, name: str) -> fx.GraphModule:
    """The graph, with the shapes that these pixels take in it."""
    try:
        traced = fx.symbolic_trace(own)
        ShapeProp(traced).propagate(pixels)
    except Exception as error:
        raise ClassifierError(
            f"{name}: expected a timm or torchvision classifier or a module that torch.fx can trace, got "
            f"{type(error).__name__}: {error}"
        ) from error
    return traced


def _traced_trunk(traced: fx.GraphModule, pixels: Tensor, name: str) -> nn.Module:
    """The graph up to the average over its last map; where there is none, up to the last map or row of tokens."""
    average = _average(traced)
    if average is not None:
        return _until_average(traced, average)
    for node in reversed(traced.graph.nodes):
        shape = _shape(node)
        if len(shape) == 4:
            return TracedTrunk(_graph_until(traced, node), channels_last=False)
        if len(shape) == 3 and shape[1] > 1:
            side = int(shape[1] ** 0.5)
            prefix = shape[1] - side * side if pixels.shape[2] == pixels.shape[3] else 1
            return TokenTrunk(_graph_until(traced, node), prefix)
    raise ClassifierError(f"{name}: expected a feature map of several cells, found none before the head")


def _split_traced(own: nn.Module, pixels: Tensor, name: str) -> tuple[nn.Module, nn.Module]:
    """Cut the traced graph at the last operation that takes a map (B, C, H, W) to (B, C) or (B, C, 1, 1)."""
    traced = _traced(own, pixels, name)
    average = _average(traced)
    if average is None:
        raise ClassifierError(
            f"{name}: expected an average over a feature map of several cells before the head, found none at input "
            f"size {tuple(pixels.shape[2:])} (VGG and AlexNet flatten the map instead, a ViT reads its class token; a "
            "small input leaves one cell); it needs a new head (head=) or a larger input"
        )
    head = TracedHead(_graph_after(traced, average, name), _shape(average)[1:])
    return _until_average(traced, average), head


def _average(traced: fx.GraphModule) -> fx.Node | None:
    """The last operation that takes a map of several cells to one vector an image."""
    for node in reversed(traced.graph.nodes):
        sources = node.all_input_nodes
        before, after = _shape(sources[0]) if len(sources) == 1 else (), _shape(node)
        lengths = [length for length in after[1:] if length != 1]
        if len(before) != 4 or len(lengths) != 1 or lengths[0] not in (before[1], before[3]):
            continue
        if before[1] * before[2] * before[3] == lengths[0]:  # a flattening of one cell, after the average
            continue
        return cast("fx.Node", node)
    return None


def _until_average(traced: fx.GraphModule, average: fx.Node) -> TracedTrunk:
    (source,) = average.all_input_nodes
    lengths = [length for length in _shape(average)[1:] if length != 1]
    return TracedTrunk(_graph_until(traced, source), channels_last=lengths[0] != _shape(source)[1])


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
