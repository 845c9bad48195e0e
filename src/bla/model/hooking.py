"""Classifiers cut where they run, for those of which no graph can be made: by the modules that give their last maps.

The trunk runs the classifier's own code until these modules have given their maps. The head runs it again on a blank
photo, with other maps in their place; modules that were done by then are passed over, so that it costs what follows the
maps. Whatever the code reads of the photo beside these maps is missing then, and shows in the check of the split.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bla.model.heads import MapHead
from bla.model.joining import Around, Keeping
from bla.model.tracing import Layout, TracingError, as_map, is_over, joined_maps, token_grid
from bla.model.untouched import seeing

_TRIED = 6
"""How many of the last maps are tried."""
_PAIRED = 4
"""Of how many of the last maps two are tried together."""
_MOST_PREFIX = 16


class _ReachedError(BaseException):
    """All maps are there; the rest of the classifier need not run."""


@dataclasses.dataclass(frozen=True)
class _Blank:
    """A tensor that a module gave for two images: its shape, in which dimensions those are, and its type.

    The type is None where it is the photos', which may be converted later.
    """

    shape: tuple[int, ...]
    varies: tuple[bool, ...]
    dtype: torch.dtype | None

    def zeros(self, like: Tensor) -> Tensor:
        """Zeros in its place, for as many images as ``like`` has, which take no memory."""
        each = zip(self.shape, self.varies, strict=True)
        shape = [length // 2 * like.shape[0] if varies else length for length, varies in each]
        return like.new_zeros((), dtype=self.dtype).expand(shape)


@dataclasses.dataclass(frozen=True)
class Place:
    """A module that gives a map as the tensor ``leaf`` of what it returns; the first ``prefix`` tokens are no cells."""

    module: str
    leaf: int
    layout: Layout
    prefix: int
    channels: int
    grid: tuple[int, ...]

    def map_in(self, returned: Any, size: Sequence[int]) -> Tensor:
        """The map (B, C, H, W) in what the module returned."""
        values: Tensor = pytree.tree_leaves(returned)[self.leaf]
        return as_map(values, self.layout, size, self.prefix)

    def returning(self, blank: Any, values: Tensor) -> Any:
        """What the module would return with this map (B, C, H, W); all else blank."""
        like = values
        leaves, spec = pytree.tree_flatten(blank)
        if self.layout == "channels last":
            values = values.movedim(1, -1)
        elif self.layout == "tokens":
            values = nn.functional.pad(values.flatten(2).mT, (0, 0, self.prefix, 0))
        elif self.layout == "channels, tokens":
            values = values.flatten(2)
        made = [each.zeros(like) if isinstance(each, _Blank) else each for each in leaves]
        made[self.leaf] = values.to(leaves[self.leaf].dtype or values.dtype).contiguous()
        return pytree.tree_unflatten(made, spec)


class _Run(threading.local):
    """What a hooked classifier's modules do in this thread: give their maps away, or take others, or as ever."""

    seen: dict[str, Any] | None = None
    wanted = 0
    given: Mapping[str, Any] | None = None
    like = torch.empty(0)


_RUN = _Run()


class _Watched:
    """A module's ``forward`` that is passed over, or its return kept or exchanged, as :class:`_Run` says."""

    def __init__(self, name: str, forward: Any, blank: Any) -> None:
        self.name, self.forward, self.blank = name, forward, blank

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _RUN.given is not None:
            if self.name in _RUN.given:
                return _RUN.given[self.name]
            return pytree.tree_map(lambda each: each.zeros(_RUN.like) if isinstance(each, _Blank) else each, self.blank)
        returned = self.forward(*args, **kwargs)
        if _RUN.seen is not None and self.name in _RUN.seen:
            _RUN.seen[self.name] = returned
            _RUN.wanted -= 1
            if not _RUN.wanted:
                raise _ReachedError
        return returned


class _Hooked(nn.Module):
    """A classifier whose modules at ``places`` give their maps away, or take others."""

    def __init__(self, model: nn.Module, places: Sequence[Place], shape: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.places = tuple(places)
        self.shape = tuple(shape)  # of the pixels of an image

    @property
    def of_tokens(self) -> bool:
        """Whether a grid was guessed from the number of tokens."""
        return any("tokens" in place.layout for place in self.places)


class HookedTrunk(_Hooked):
    """A classifier's own code until its last maps are there, as one (B, C, H, W)."""

    def forward(self, pixels: Tensor) -> Tensor:
        seen: dict[str, Any] = dict.fromkeys(place.module for place in self.places)
        _RUN.seen, _RUN.wanted = seen, len(seen)
        try:
            self.model(pixels)
        except _ReachedError:
            pass
        else:
            raise TracingError(f"expected a classifier that runs {', '.join(seen)}, got one that took another way")
        finally:
            _RUN.seen = None
        size = tuple(pixels.shape[2:])
        return joined_maps([place.map_in(seen[place.module], size) for place in self.places]).to(pixels.dtype)


class _HookedRest(_Hooked):
    """A classifier's own code from its last maps on."""

    def answer(self, maps: Sequence[Tensor]) -> Tensor:
        """What the classifier says with these maps (B, C, H, W) in their places."""
        blank = maps[0].new_zeros(maps[0].shape[0], *self.shape)
        given = {}
        for place, values in zip(self.places, maps, strict=True):
            watched: Any = self.model.get_submodule(place.module).forward
            given[place.module] = place.returning(watched.blank, values)
        _RUN.given, _RUN.like = given, maps[0]
        try:
            logits: Tensor = self.model(blank)
        finally:
            _RUN.given = None
        return logits


class HookedHead(_HookedRest):
    """What follows the last maps, for one pooled vector (B, C) of all: maps of it in every cell have it as average."""

    def forward(self, pooled: Tensor) -> Tensor:
        parts = torch.split(pooled, [place.channels for place in self.places], dim=1)
        return self.answer([
            part.reshape(*part.shape, *[1] * len(place.grid)).expand(*part.shape, *place.grid)
            for part, place in zip(parts, self.places, strict=True)
        ])  # fmt: skip


class HookedMapHead(_HookedRest, MapHead):
    """What follows the last maps, of one grid, for those with what is left out replaced."""

    @property
    def attends(self) -> bool:  # type: ignore[override]
        """Whether it reads the tokens of one place."""
        return [place.layout for place in self.places] == ["tokens"]

    def forward(self, features: Tensor, keep: Tensor | None = None) -> Tensor:
        if self.fill == "attention" and keep is not None:
            with Keeping(keep.flatten(1), Around(self.places[0].prefix, 0), features.dtype):
                return self.answer([features])
        channels = [place.channels for place in self.places]
        return self.answer(torch.split(self.emptied(features, keep), channels, dim=1))


def hooked(own: nn.Module, pixels: Tensor) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Trunks and heads to be tried: pooled at the last maps, reading these, and at last reading one of the first maps.

    All of a classifier is made from its first map, so that this is left where all else fails.
    """
    if any(isinstance(module, torch.jit.ScriptModule) for module in own.modules()):
        raise TracingError("expected Python code, got TorchScript: pass the module that was scripted")
    size = tuple(pixels.shape[2:])
    two, three = _recorded(own, pixels[:2]), _recorded(own, pixels[[0, 1, 0]])
    if [name for name, _ in two] != [name for name, _ in three]:
        raise TracingError("expected the same modules to run for two and for three images, got others")
    runs = [name for name, _ in two]
    blanks = {name: _as_blank(one, other) for (name, one), (_, other) in zip(two, three, strict=True)}
    once = [(name, place) for name in runs if runs.count(name) == 1 for place in _maps_in(name, blanks[name], size)]
    found: list[Place] = []
    for name, place in reversed(once):
        if not any(other.module.startswith(f"{name.rpartition('.')[0]}.") and other == place for other in found):
            found.append(place)
    found = found[:_TRIED]
    sets = [places for place in found for places in _with_siblings(place, [place for _, place in once])]
    for later, earlier in itertools.combinations(found[:_PAIRED], 2):
        if not _is_in(later.module, earlier.module) and not _is_in(earlier.module, later.module):
            sets.append([earlier, later])
    first = [[place] for _, place in once[:_TRIED] if place not in found]
    tries = [(HookedHead, sets), (HookedMapHead, sets), (HookedMapHead, first)]
    for kind, choices in tries:
        for places in choices:
            if kind is HookedHead or len({place.grid for place in places}) == 1:
                _watch(own, places, runs, blanks)
                yield HookedTrunk(own, places, pixels.shape[1:]), kind(own, places, pixels.shape[1:])


def _recorded(own: nn.Module, pixels: Tensor) -> list[tuple[str, Any]]:
    """Each module by name as it ends, and the shapes of what it returns."""
    events: list[tuple[str, Any]] = []

    def shape_of(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return _Blank(tuple(value.shape), (False,) * value.ndim, None if value.dtype == pixels.dtype else value.dtype)

    _unwatch(own)
    _, *inner = own.named_modules()
    with seeing(inner, lambda name, returned: events.append((name, pytree.tree_map(shape_of, returned)))):
        own(pixels)
    return events


def _as_blank(two: Any, three: Any) -> Any:
    """What a module returned for two images, with where their number shows in comparison with three."""

    def compared(one: Any, other: Any) -> Any:
        if not isinstance(one, _Blank) or not isinstance(other, _Blank):
            return one
        varies = tuple(length != more for length, more in zip(one.shape, other.shape, strict=True))
        return dataclasses.replace(one, varies=varies)

    return pytree.tree_map(compared, two, three)


def _maps_in(name: str, blank: Any, size: Sequence[int]) -> Iterator[Place]:
    """The maps over a picture of this size among what a module returns."""
    for leaf, each in enumerate(pytree.tree_leaves(blank)):
        if not isinstance(each, _Blank) or not (each.dtype is None or each.dtype.is_floating_point):
            continue
        shape = each.shape
        if each.varies[:1] != (True,) or each.varies.count(True) > 1 or shape[0] != 2:
            continue
        if is_over(shape[2:], size):
            yield Place(name, leaf, "channels first", 0, shape[1], shape[2:])
        elif is_over(shape[1:-1], size):
            yield Place(name, leaf, "channels last", 0, shape[-1], shape[1:-1])
        elif len(shape) == 3:
            readings: list[tuple[Layout, int, int, int]] = [
                ("tokens", prefix, shape[1] - prefix, shape[2]) for prefix in range(min(_MOST_PREFIX, shape[1] - 1))
            ]
            readings.append(("channels, tokens", 0, shape[2], shape[1]))
            over = [
                Place(name, leaf, layout, prefix, channels, grid)
                for layout, prefix, cells, channels in readings
                if (grid := token_grid(cells, size)) is not None and is_over(grid, size)
            ]
            # the first whose cells are square, of several readings
            yield from sorted(over, key=lambda place: place.grid[0] * size[1] != place.grid[1] * size[0])[:1]


def _with_siblings(place: Place, others: Sequence[Place]) -> Iterator[list[Place]]:
    """A place alone, and with those of the same name but for a number, as an ensemble's members have them."""
    yield [place]
    parts = place.module.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            before, after = parts[:index], parts[index + 1 :]
            pattern = re.compile(r"\.".join([*map(re.escape, before), r"\d+", *map(re.escape, after)]))
            alike = [other for other in others if pattern.fullmatch(other.module) and other.layout == place.layout]
            if len(alike) > 1:
                yield alike


def _watch(own: nn.Module, places: Sequence[Place], runs: Sequence[str], blanks: Mapping[str, Any]) -> None:
    """Let the modules at these places, and those that are done before, do as a run says."""
    _unwatch(own)
    names = {place.module for place in places}
    watched = set(names)
    for place in places:
        parts, others = place.module.split("."), names - {place.module}
        around = (".".join(parts[:depth]) for depth in range(len(parts) + 1))
        member = next(outer for outer in around if not any(_is_in(other, outer) for other in others))
        end = runs.index(place.module)
        done = [
            name for name in dict.fromkeys(runs[:end])
            if _is_in(name, member) and name not in runs[end:] and not _is_in(place.module, name)
        ]  # fmt: skip
        watched.update(name for name in done if not any(_is_in(name, outer) for outer in done if outer != name))
    for name in watched:
        module = own.get_submodule(name)
        module.forward = _Watched(name, module.forward, blanks[name])


def _unwatch(own: nn.Module) -> None:
    for module in own.modules():
        if isinstance(watched := vars(module).get("forward"), _Watched):
            module.forward = watched.forward


def _is_in(name: str, outer: str) -> bool:
    """Whether a module's name lies in another's, or is it."""
    return not outer or name == outer or name.startswith(f"{outer}.")
