"""An operator by itself: bias and variance of its gradient against exact enumeration; time and memory."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.results import ROOT
from bla.operators import SubsetOperator


def distribution(operator: SubsetOperator, scores: Tensor) -> Tensor | None:
    """Probabilities of every subset, (2^N,) in the order of :func:`subsets`, that the noisy operator draws from.

    In closed form for independent items (bounded logits with noise, hard concrete at its bound of 0) and for
    successive draws (Gumbel noise and a top-k: Plackett-Luce). None where the operator has no distribution of its own.
    """
    chosen = subsets(scores.shape[-1])
    k, noise = getattr(operator, "k", None), getattr(operator, "noise", None)
    name = type(operator).__name__
    if name == "BoundedLogits" and k is None and noise:
        log = torch.nn.functional.logsigmoid
        return torch.exp(chosen @ log(scores / noise) + (1 - chosen) @ log(-scores / noise))
    if name == "HardConcrete":
        log = torch.nn.functional.logsigmoid
        return torch.exp(chosen @ log(scores) + (1 - chosen) @ log(-scores))
    if name == "Simple":
        log_weight = torch.where(chosen.sum(-1) == k, chosen @ scores, -torch.inf)
        return torch.softmax(log_weight, dim=0)
    if name in ("StraightThroughTopK", "RelaxedTopK"):
        return _plackett_luce(scores, chosen, k or 1)
    return None


def subsets(n: int) -> Tensor:
    """All subsets of n items, (2^n, n)."""
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=n)), dtype=torch.float64)


def _plackett_luce(scores: Tensor, chosen: Tensor, k: int) -> Tensor:
    weight = torch.exp(scores)
    total = torch.zeros(len(chosen), dtype=scores.dtype)
    index = {tuple(row): place for place, row in enumerate(chosen.long().tolist())}
    parts: dict[int, list[Tensor]] = {}
    for order in itertools.permutations(range(len(scores)), k):
        left, probability = weight.sum(), torch.ones((), dtype=scores.dtype)
        for item in order:
            probability = probability * weight[item] / left
            left = left - weight[item]
        row = tuple(int(n in order) for n in range(len(scores)))
        parts.setdefault(index[row], []).append(probability)
    return total.index_put(
        (torch.tensor(list(parts)),), torch.stack([torch.stack(each).sum() for each in parts.values()])
    )  # fmt: skip


def loss(memberships: Tensor) -> Tensor:
    """What the subset is for: not linear in it, so that relaxing costs something."""
    n = memberships.shape[-1]
    target = torch.linspace(-1.0, 1.5, n, dtype=memberships.dtype)
    return (memberships @ target - 1).square() + memberships[..., 0] * memberships[..., -1]


def bias_and_variance(operator: SubsetOperator, draws: int, n: int = 8) -> dict[str, Any]:
    """Of the gradient of E loss(subset), against its exact value: relative bias, cosine, deviation of one draw.

    Where an operator has no distribution of its own nothing can be exact, and bias is left empty.
    """
    scores = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    repeated = scores.detach().expand(draws, n).clone().requires_grad_()
    soft = operator.soft(repeated, generator=torch.Generator().manual_seed(1))
    (gradients,) = torch.autograd.grad(loss(soft).sum(), repeated)
    average, spread = gradients.mean(dim=0), gradients.var(dim=0).sum().sqrt()
    probabilities = distribution(operator, scores)
    figures = {"norm": float(average.norm()), "deviation of a draw": float(spread)}
    if probabilities is None:
        return figures
    (exact,) = torch.autograd.grad(probabilities @ loss(subsets(n)), scores)
    return {
        "relative bias": float((average - exact).norm() / exact.norm()),
        "cosine": float(torch.cosine_similarity(average, exact, dim=0)),
        "relative deviation": float(spread / exact.norm()),
        **figures,
    }


def cost_of(operator: SubsetOperator, n: int) -> dict[str, Any]:
    """Milliseconds forward and backward of one row of n scores; memory in KB; a softmax of the same scores beside it.

    Time in a fresh process. Memory is what the operator keeps for the way back and returns: the bytes of all
    tensors saved for backward, each storage once, and of the result, the scores themselves aside.
    """
    program = (
        "import json, torch\n"
        "from bla.operators import *\n"
        "from benchmarks.operators.rivals import *\n"
        "from benchmarks.operators.gradient_quality import timed\n"
        f"print(json.dumps(timed({operator!r}, {n})))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def timed(operator: SubsetOperator, n: int, seconds: float = 1.0) -> dict[str, Any]:
    """In this process: the least of at least five rounds, and as many as fit into some seconds.

    Operator and softmax take turns, so that caches and a busy machine are the same to both: an operator of O(N) keeps
    its ratio to a softmax, whatever N is.
    """
    torch.set_num_threads(1)
    scores = torch.randn(1, n, generator=torch.Generator().manual_seed(0)).requires_grad_()
    operator.soft(torch.zeros(1, 10).requires_grad_()).sum().backward()  # what is loaded on first use
    kept = kept_bytes(operator, scores)
    ways: list[Callable[[Tensor], Tensor]] = [operator.soft, lambda scores: torch.softmax(scores, dim=-1)]
    forward: list[list[float]] = [[], []]
    backward: list[list[float]] = [[], []]
    end = time.perf_counter() + seconds
    while len(forward[0]) < 5 or time.perf_counter() < end:
        for way, there, back in zip(ways, forward, backward, strict=True):
            scores.grad = None
            start = time.perf_counter()
            soft = way(scores)
            middle = time.perf_counter()
            soft.backward(soft.detach())
            there.append(middle - start)
            back.append(time.perf_counter() - middle)
    both = [min(there) + min(back) for there, back in zip(forward, backward, strict=True)]
    return {
        "forward ms": 1000 * min(forward[0]), "backward ms": 1000 * min(backward[0]), "softmax ms": 1000 * both[1],
        "times a softmax": both[0] / both[1], "kept KB": kept / 1024,
    }  # fmt: skip


def kept_bytes(operator: SubsetOperator, scores: Tensor) -> int:
    """Bytes of the result and of all that autograd holds until the backward pass, each storage once."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        soft = note(operator.soft(scores))
    storages.pop(scores.untyped_storage().data_ptr(), None)
    assert soft.requires_grad
    return sum(storages.values())
