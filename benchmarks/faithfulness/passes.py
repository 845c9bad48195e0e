"""Many passes of a classifier, as fast as this machine can."""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bla.comparison.methods import PooledClassifier

Network = Callable[[Tensor], Tensor]
"""Normalised pixels (B, 3, h, w) to logits (B, K)."""


def fastest(pooled: PooledClassifier, example: Tensor) -> Network:
    """The classifier in ONNX Runtime where it is installed and gives the same logits to a thousandth; else in torch."""

    def in_torch(pixels: Tensor) -> Tensor:
        logits: Tensor = pooled(pixels.contiguous(memory_format=torch.channels_last))
        return logits

    if example.is_cuda or not all(map(importlib.util.find_spec, ("onnxruntime", "onnxscript"))):
        return in_torch
    import onnxruntime

    graph = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            nn.Sequential(pooled.trunk, nn.AdaptiveAvgPool2d(1), nn.Flatten(), pooled.head).eval(),
            (example.contiguous(),), input_names=["pixels"], dynamic_shapes=({0: "batch"},), dynamo=True, verbose=False,
        )  # fmt: skip
        assert program is not None
        program.save(graph)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(graph.getvalue(), options, providers=["CPUExecutionProvider"])

    def in_runtime(pixels: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"pixels": pixels.contiguous().numpy()})[0])

    same = torch.allclose(in_runtime(example), in_torch(example), atol=1e-3, rtol=1e-3)
    return in_runtime if same else in_torch
