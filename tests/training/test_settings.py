"""Settings: what makes no sense is refused, what is written is read again, the setups are the paper's."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from bla.model.attention import BoundedLogitAttention
from bla.training.settings import PAPER, SETUPS, Settings, TrainingError
from small import MAP_CHANNELS as CHANNELS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"setup": "BLA"}, "expected setup one of bla, bla-t, bla-ph, l2x-f, bla-px, got 'BLA'"),
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
        ({"validation": 1.0}, r"expected validation in \[0, 1\), got 1\.0"),
        ({"patience": 0, "validation": 0.1}, "expected patience of at least 1, got 0"),
        ({"patience": 2}, r"expected no patience without a validation share to watch: set validation=0\.1"),
        ({"targets": "predictions"}, "expected head='own' for targets='predictions'"),
        ({"augment": True}, "expected no augment without trunk_rate: a frozen trunk gives features once"),
        ({"head": "own"}, "expected setup bla-ph or l2x-f with head='own', got 'bla'"),
        ({"head": "own", "setup": "bla-t"}, "expected setup bla-ph or l2x-f with head='own', got 'bla-t'"),
        ({"final_temperature": 0.0}, r"expected final_temperature above 0, got 0\.0"),
        ({"mean_size": 0.0}, r"expected mean_size above 0, got 0\.0"),
        ({"straight_through": 1.5}, r"expected straight_through in \[0, 1\], got 1\.5"),
        ({"dial": -0.1}, r"expected dial in \[0, 1\], got -0\.1"),
        ({"setup": "l2x-f", "mean_size": 8}, "expected no mean_size with setup l2x-f, which bounds nothing"),
        ({"setup": "l2x-f", "dial": 0.5}, "expected no dial with setup l2x-f"),
        ({"hidden": (4, 0)}, r"expected hidden channels from 1 to 16,384, got \(4, 0\)"),
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


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(TypeError, match="expected options of Settings, got epoch"):
        Settings(epoch=3)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"seed": 2**32 - 1, "dropout": 0.0, "batch_size": 1, "epochs": 1, "head_epochs": 1},
        {"validation": 0.5, "patience": 1},
        {"trunk_rate": 1e-4, "augment": True},
        {"head": "own", "setup": "bla-ph", "targets": "predictions"},
        {"head": "own", "setup": "l2x-f", "targets": "labels"},
    ],
)
def test_settings_survive_json(changes: dict[str, Any]) -> None:
    settings = Settings(**changes, hidden=(3, 2))
    assert Settings.from_record(json.loads(json.dumps(settings.record()))) == settings
    other = settings.replace(seed=5, hidden=())
    assert (other.seed, other.score.hidden, other.head, other.trunk) == (5, (), settings.head, settings.trunk)


def test_records_of_flat_settings_are_read() -> None:
    """As written when every setting was a field beside the others, whatever the setup."""
    old = {
        "setup": "bla-t", "head": "new", "targets": "labels", "epochs": 4, "head_epochs": None, "batch_size": 32,
        "learning_rate": 0.001, "dropout": 0.2, "seed": 0, "temperature": 0.1, "threshold": None, "hidden": [8],
        "context": False, "gate": False, "class_aware": False, "straight_through": 0.0, "final_temperature": None,
        "mean_size": None, "dial": 0.0, "size": 3, "variant": "official", "trunk_rate": None, "augment": False,
        "precision": "float32", "validation": 0.0, "patience": None, "several_labels": False,
    }  # fmt: skip
    assert Settings.from_record(old) == Settings("bla-t", epochs=4, hidden=(8,))
    assert Settings.from_record(old | {"setup": "l2x-f"}) == Settings("l2x-f", epochs=4, hidden=(8,), size=3)


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
    assert setup in PAPER
    assert {*SETUPS} == {*PAPER, "bla-px"}
    assert Settings(setup="l2x-f", head="own").frozen_head


def test_the_recommended_settings_are_replaced_by_what_is_given() -> None:
    settings = Settings.recommended(seed=3)
    selection = settings.selection
    assert (settings.setup, selection.class_aware, selection.mean_size, settings.seed) == ("bla", True, 8, 3)
    assert settings.name == "BLA, class-aware"
    assert Settings.recommended(mean_size=4).selection.mean_size == 4
    post_hoc = Settings.recommended(head="own", targets="predictions")
    assert (post_hoc.setup, post_hoc.frozen_head, post_hoc.threshold) == ("bla-px", True, 0)
    assert Settings.recommended(setup="bla-ph").selection.mean_size == 8
    assert Settings.recommended(class_aware=False, hidden=()).attention(4).score.in_channels == 4
