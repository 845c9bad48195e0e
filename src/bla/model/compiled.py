"""ONNX Runtime: a graph's session, and a network as a graph, on the CPU several times as fast as torch's operations."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bla.progress import quiet

if TYPE_CHECKING:
    import onnxruntime
    from torch import Tensor, nn

_AGREES = 1e-3
"""How far what a graph gives may lie from what the network gives, of the largest."""
_LONG = 30.0
"""Seconds of passes for which it pays to make a graph, which takes some ten."""


def has_cuda() -> bool:
    """Whether this build of ONNX Runtime computes on NVIDIA's GPUs, as the package onnxruntime-gpu does."""
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def session(model: Path | bytes, *, threads: int | None = None, gpu: bool = False) -> onnxruntime.InferenceSession:
    """A graph, ready to run, without the warnings; on a GPU if wanted and there is one. It needs no torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    # A thread that spins while it waits takes the core from decoding.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers: list[Any] = ["CPUExecutionProvider"]
    if not (gpu and has_cuda()):
        return onnxruntime.InferenceSession(model, options, providers=providers)
    # Full float32, so that rows are those of a CPU; no search for algorithms at each new size of a batch.
    cuda = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
    with quiet():  # both print what they miss
        onnxruntime.preload_dlls()
        return onnxruntime.InferenceSession(model, options, providers=[("CUDAExecutionProvider", cuda), *providers])


def compiled(network: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor] | None:
    """The network, pixels to a tensor, by ONNX Runtime; None if that is not installed, cannot take it, or differs.

    ``example``: two photos' pixels or more, on the CPU; the graph takes any number.
    """
    import torch
    from torch import nn

    within = nn.Sequential(network)  # a part that is called `graph` would stand in the exporter's way
    try:
        batch = {0: torch.export.Dim("batch")}
        with quiet(), torch.inference_mode(False), torch.no_grad():
            program = torch.onnx.export(within, (example,), dynamic_shapes=(batch,), dynamo=True, verbose=False)
        assert program is not None
        graph = session(program.model_proto.SerializeToString(), threads=torch.get_num_threads())
        name = graph.get_inputs()[0].name

        def run(pixels: Tensor) -> Tensor:
            return torch.from_numpy(graph.run(None, {name: pixels.contiguous().numpy()})[0])

        # of other numbers, too: some networks take one photo, or many, in another way than two
        noise = torch.randn(17, *example.shape[1:], generator=torch.Generator().manual_seed(0))
        return run if all(_agree(run(photos), network(photos)) for photos in (example, noise, noise[:1])) else None
    except Exception:  # whatever the exporter or the runtime cannot do: torch can
        return None


def _agree(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs (B, C, ...) are the same but for rounding, channel by channel."""
    apart, size = ((values.abs().movedim(1, 0).flatten(1).amax(dim=1)) for values in (one - other, other))
    return bool((apart <= _AGREES * (size + size.max() / 100)).all())


def quickest(network: nn.Module, pixels: Tensor, photos: int) -> tuple[Callable[[Tensor], Tensor], float]:
    """What runs so many photos soonest, a batch like ``pixels`` at a time, and its seconds for one.

    That is the network itself or, on a CPU and where all take long, its graph if that is quicker.
    """
    seconds = _seconds(network, pixels)
    if photos * seconds > _LONG and pixels.device.type == "cpu":
        graph = compiled(network, pixels[:2].contiguous())
        if graph is not None and (by_graph := _seconds(graph, pixels)) < seconds:
            return graph, by_graph
    return network, seconds


def _seconds(network: Callable[[Tensor], Tensor], pixels: Tensor) -> float:
    """For a photo, by one pass after another that warms up."""
    import torch

    with torch.inference_mode():
        for _ in range(2):
            begun = time.perf_counter()
            network(pixels).cpu()
    return (time.perf_counter() - begun) / len(pixels)
