"""A network for the CPU as a graph of ONNX Runtime, which is several times as fast there as torch's operations."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

_AGREES = 1e-3
"""How far a graph's logits may lie from the network's, of the largest."""


def compiled(network: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor] | None:
    """The network (pixels to logits) by ONNX Runtime; None if that is not installed, takes no such network, or differs.

    ``example``: two photos' pixels or more, on the CPU; the graph takes any number.
    """
    try:
        import onnxruntime

        batch = {0: torch.export.Dim("batch")}
        with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(network, (example,), dynamic_shapes=(batch,), dynamo=True, verbose=False)
        assert program is not None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(
            program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        name = session.get_inputs()[0].name

        def run(pixels: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, {name: pixels.contiguous().numpy()})[0])

        own, noise = network(example), torch.randn_like(example)
        pairs = [(run(example), own), (run(noise), network(noise))]
    except Exception:  # whatever the exporter or the runtime cannot do: torch can
        return None
    return run if all((a - b).abs().max() <= _AGREES * b.abs().max() for a, b in pairs) else None
