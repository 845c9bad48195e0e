"""ONNX Runtime on the CPU: a graph's session, and a network as a graph, several times as fast as torch's operations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from bla.progress import quiet

if TYPE_CHECKING:
    import onnxruntime
    from torch import Tensor, nn

_AGREES = 1e-3
"""How far a graph's logits may lie from the network's, of the largest."""


def session(model: Path | bytes, *, threads: int | None = None) -> onnxruntime.InferenceSession:
    """A graph, ready to run, without the warnings. It needs no torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    # A thread that spins while it waits takes the core from decoding.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def compiled(network: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor] | None:
    """The network (pixels to logits) by ONNX Runtime; None if that is not installed, takes no such network, or differs.

    ``example``: two photos' pixels or more, on the CPU; the graph takes any number.
    """
    import torch

    try:
        batch = {0: torch.export.Dim("batch")}
        with quiet(), torch.inference_mode(False), torch.no_grad():
            program = torch.onnx.export(network, (example,), dynamic_shapes=(batch,), dynamo=True, verbose=False)
        assert program is not None
        graph = session(program.model_proto.SerializeToString(), threads=torch.get_num_threads())
        name = graph.get_inputs()[0].name

        def run(pixels: Tensor) -> Tensor:
            return torch.from_numpy(graph.run(None, {name: pixels.contiguous().numpy()})[0])

        own, noise = network(example), torch.randn_like(example)
        pairs = [(run(example), own), (run(noise), network(noise))]
    except Exception:  # whatever the exporter or the runtime cannot do: torch can
        return None
    return run if all((a - b).abs().max() <= _AGREES * b.abs().max() for a, b in pairs) else None
