"""What is trained: examples keep together, and networks take back what they saved."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from bla.training.networks import Networks, new_head
from bla.training.settings import Settings, TrainingError
from small import MAP_CHANNELS as CHANNELS
from small import MAP_CLASSES as CLASSES
from small import assert_same, make_examples, make_networks, tensors


def test_subsets_keep_rows_and_labels_together() -> None:
    examples = make_examples(10)
    some = examples.subset(np.array([7, 2]))
    assert (some.rows.tolist(), some.labels.tolist()) == (
        [examples.rows[7], examples.rows[2]], [examples.labels[7], examples.labels[2]],
    )  # fmt: skip
    assert dataclasses.replace(examples, labels=None).subset(np.array([1])).labels is None


def test_networks_take_back_what_they_saved_and_nothing_else() -> None:
    settings = Settings()
    networks, other = make_networks(settings), make_networks(settings, seed=1)
    other.restore({name: value.clone() for name, value in networks.saved().items()})
    assert_same(tensors(other), tensors(networks))
    with pytest.raises(TrainingError, match=r"expected the tensors of these networks, got others: \['attention"):
        networks.restore(make_networks(Settings(hidden=(4,))).saved())
    wider = Networks(settings.attention(CHANNELS), new_head(CHANNELS, CLASSES + 1, 0.2), own_head=False)
    with pytest.raises(TrainingError, match="other shapes"):
        networks.restore(wider.saved())
