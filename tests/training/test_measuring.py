"""What is said of a module that explains nothing."""

from __future__ import annotations

import re
from typing import Any

import pytest
from torch import nn

from bla.training.measuring import diagnosed, measure
from bla.training.settings import Settings
from small import make_examples, make_networks


@pytest.mark.parametrize(
    ("bias", "options", "said"),
    [
        (None, {}, None),
        (-100.0, {}, "the module has died: all 12 cells of every image"),
        (100.0, {"learning_rate": 0.3}, "no cell of any image reaches the bound, .* rate \\(0.3\\), or"),
        (100.0, {"mean_size": 1}, None),
        (-100.0, {"setup": "l2x-f"}, None),
    ],
    ids=["well", "all", "none", "one wanted", "rival"],
)  # fmt: skip
def test_a_module_that_explains_nothing_is_diagnosed(bias: float | None, options: dict[str, Any], said: str) -> None:
    settings, examples = Settings(**options), make_examples()
    networks = make_networks(settings)
    networks.attention.calibrate(examples.cache.batch(examples.rows))
    if bias is not None:
        nn.init.constant_(networks.attention.score.bias, bias)
    found = diagnosed(networks, settings, examples, measure(networks, examples), dead=False)
    assert (found is None) if said is None else (found is not None and re.match(said, found))


def test_logits_that_never_change_are_said() -> None:
    settings, examples = Settings(), make_examples()
    networks = make_networks(settings)
    networks.attention.calibrate(examples.cache.batch(examples.rows))
    nn.init.zeros_(networks.head.get_parameter("1.weight"))
    found = diagnosed(networks, settings, examples, measure(networks, examples), dead=False)
    assert found == "the logits are the same for every image: check the classifier's weights, and the transform"
