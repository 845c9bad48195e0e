"""Settings: what makes no sense is refused, what is written is read again, the setups are the paper's."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from bla.model.attention import BoundedLogitAttention
from bla.training.settings import SETUPS, Settings, TrainingError
from small import MAP_CHANNELS as CHANNELS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"setup": "BLA"}, "expected setup one of bla, bla-t, bla-ph, l2x-f, got 'BLA'"),
        ({"head": "old"}, "expected head 'new' or 'own', got 'old'"),
        ({"targets": "classes"}, "expected targets 'labels' or 'predictions', got 'classes'"),
        ({"epochs": 0}, "expected epochs of at least 1, got 0"),
        ({"head_epochs": 0}, "expected head_epochs of at least 1, got 0"),
        ({"batch_size": 0}, "expected batch_size of at least 1, got 0"),
        ({"learning_rate": 0.0}, r"expected learning_rate above 0, got 0\.0"),
        ({"learning_rate": math.nan}, "expected learning_rate above 0, got nan"),
        ({"dropout": 1.0}, r"expected dropout in \[0, 1\), got 1\.0"),
        ({"dropout": -0.1}, r"expected dropout in \[0, 1\), got -0\.1"),
        ({"seed": -1}, r"expected seed in \[0, 2\*\*32\), got -1"),
        ({"seed": 2**32}, r"expected seed in \[0, 2\*\*32\), got 4294967296"),
        ({"validation": 1.0}, r"expected validation share in \[0, 1\), got 1\.0"),
        ({"patience": 0, "validation": 0.1}, "expected patience of at least 1, got 0"),
        ({"patience": 2}, r"expected a validation share for patience to watch, got none: set validation=0\.1"),
        ({"targets": "predictions"}, "expected head='own' for targets='predictions'"),
        ({"head": "own"}, "expected setup bla-ph or l2x-f with head='own', got 'bla'"),
        ({"head": "own", "setup": "bla-t"}, "expected setup bla-ph or l2x-f with head='own', got 'bla-t'"),
        ({"final_temperature": 0.0}, r"expected final_temperature above 0, got 0\.0"),
        ({"mean_size": 0.0}, r"expected mean_size above 0, got 0\.0"),
        ({"straight_through": 1.5}, r"expected straight_through, a share of the loss, in \[0, 1\], got 1\.5"),
        ({"dial": -0.1}, r"expected dial, a share of the batches, in \[0, 1\], got -0\.1"),
        ({"setup": "l2x-f", "mean_size": 8}, "expected no mean_size with setup l2x-f, which bounds nothing"),
        ({"setup": "l2x-f", "dial": 0.5}, "expected no dial with setup l2x-f"),
        ({"hidden": (4, 0)}, r"expected hidden layers of at least 1 channel, got \(4, 0\)"),
        ({"temperature": 0.0}, r"expected temperature > 0, got 0\.0"),
        ({"threshold": -0.1}, r"expected threshold 'auto' or a number in \[0, 1\), got -0\.1"),
        ({"setup": "bla-ph", "gate": True}, "expected no threshold with the sigmoid gate, got auto"),
        ({"setup": "l2x-f", "size": 0}, "expected size > 0, got 0"),
        ({"setup": "l2x-f", "variant": "new"}, "expected variant 'official' or 'corrected', got 'new'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        Settings(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"seed": 2**32 - 1, "dropout": 0.0, "batch_size": 1, "epochs": 1, "head_epochs": 1},
        {"validation": 0.5, "patience": 1},
        {"head": "own", "setup": "bla-ph", "targets": "predictions"},
        {"head": "own", "setup": "l2x-f", "targets": "labels"},
    ],
)
def test_settings_survive_json(changes: dict[str, Any]) -> None:
    settings = Settings(**changes, hidden=(3, 2))
    assert Settings(**json.loads(json.dumps(dataclasses.asdict(settings)))) == settings


@pytest.mark.parametrize(
    ("setup", "threshold", "frozen"),
    [("bla", 0.0, False), ("bla-t", "auto", False), ("bla-ph", "auto", True), ("l2x-f", None, False)],
)
def test_the_setups_are_the_papers(setup: Any, threshold: Any, frozen: bool) -> None:
    settings = Settings(setup=setup, temperature=0.3, size=5, variant="corrected", hidden=(4,), context=True)
    attention = settings.attention(CHANNELS)
    assert settings.frozen_head == frozen
    assert (attention.temperature, attention.score[0].out_channels) == (0.3, 4)
    assert attention.context is not None
    if isinstance(attention, BoundedLogitAttention):
        assert attention.threshold == threshold
        assert Settings(setup=setup, threshold=0.01).attention(CHANNELS).threshold == 0.01
        assert Settings(setup=setup, threshold=0).attention(CHANNELS).threshold == 0
        assert Settings(setup=setup, threshold=0, gate=True).attention(CHANNELS).gate
    else:
        assert (attention.size, attention.variant) == (5, "corrected")
    assert set(SETUPS) == {"bla", "bla-t", "bla-ph", "l2x-f"}
    assert Settings(setup="l2x-f", head="own").frozen_head


def test_the_recommended_settings_are_replaced_by_what_is_given() -> None:
    settings = Settings.recommended(seed=3)
    assert (settings.setup, settings.class_aware, settings.mean_size, settings.seed) == ("bla", True, 8, 3)
    assert settings.name == "BLA, class-aware"
    assert Settings.recommended(mean_size=4).mean_size == 4
    post_hoc = Settings.recommended(head="own", targets="predictions")
    assert (post_hoc.setup, post_hoc.frozen_head, post_hoc.threshold) == ("bla-ph", True, 0)
    assert Settings.recommended(class_aware=False, hidden=()).attention(4).score.in_channels == 4
