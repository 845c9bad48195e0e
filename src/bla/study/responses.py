"""What people answered, as the analysis and the world read it: frozen records, CSV and JSON with a codebook.

Two tables. A participant's record says who began and ended when; a response is one answered trial and is never
changed. Both carry the word "simulated" where no person was there.
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from bla.files import write_atomically
from bla.study.plan import Record, Task

Kind = Literal["main", "repeat", "catch", "practice"]

DECOY = "decoy"
"""In place of an arm, on the side of a catch trial's wrong picture."""


class Response(Record):
    """One answered trial."""

    participant: str = Field(description="opaque: random, made for this study")
    position: int = Field(ge=1, description="place among all trials of the person, practice included, from 1")
    kind: Kind = Field(description="main: analysed; repeat: a main trial again; catch: attention check; practice")
    repeats: int | None = Field(default=None, description="of a repeat: the position of the main trial that it repeats")
    task: Task = Field(description="preference, prediction or agreement")
    photo: str = Field(description="the photo's id in the plan")
    left: str | None = Field(
        default=None, description='preference: the arm on the left; "decoy": a catch\'s wrong picture'
    )
    right: str | None = Field(default=None, description="preference: the arm on the right")
    arm: str | None = Field(default=None, description="prediction, agreement: the arm that explained")
    options: tuple[str, ...] = Field(
        description="what could be answered, in the order shown: left and right; or labels; or yes and no (the program "
        "is right, is wrong)"
    )
    choice: str = Field(description="the answer, one of the options")
    expected: str | None = Field(default=None, description="the right answer, one of the options, where there is one")
    correct: bool | None = Field(default=None, description="whether choice is expected; null where no answer is right")
    milliseconds: int = Field(ge=0, description="from the pictures' appearance to the answer")
    clock: Literal["browser", "server", "unknown"] = Field(
        description="who measured: the browser once the pictures were loaded, or the server between page and answer "
        "(without JavaScript); unknown, at 0 milliseconds, where the server's clock was set back meanwhile"
    )
    shown_at: datetime = Field(description="when the page that was answered was sent (UTC)")
    answered_at: datetime = Field(description="when the answer was stored (UTC)")
    simulated: bool = Field(default=False, description="true: no person answered, a program did")

    @model_validator(mode="after")
    def _consistent(self) -> Response:
        if self.choice not in self.options:
            raise ValueError(f"expected a choice out of {list(self.options)}, got {self.choice!r}")
        if self.task == "preference" and (self.left is None or self.right is None or self.arm is not None):
            raise ValueError("expected arms on the left and right of a preference")
        if self.task != "preference" and (self.arm is None or self.left is not None or self.right is not None):
            raise ValueError(f"expected one arm in a task of {self.task}")
        if self.correct != (None if self.expected is None else self.choice == self.expected):
            raise ValueError(f"expected correct to say whether {self.choice!r} is {self.expected!r}")
        return self

    @property
    def chosen(self) -> str | None:
        """Of a preference: the arm that was chosen."""
        return {"left": self.left, "right": self.right}.get(self.choice) if self.task == "preference" else None

    @property
    def place(self) -> int:
        """Which of the options, in the order shown, was chosen; from 0."""
        return self.options.index(self.choice)

    @property
    def seconds(self) -> float:
        return self.milliseconds / 1000


class Participant(Record):
    """One person, or one simulated one. All exclusion rules read this and the responses."""

    participant: str = Field(description="opaque: random, made for this study")
    number: int = Field(ge=0, description="in the order of consent, from 0; with the plan it gives sides and order")
    trials: int = Field(ge=1, description="all trials before the person: practice, main, repeats and catches")
    started_at: datetime = Field(description="when consent was given (UTC)")
    finished_at: datetime | None = Field(
        default=None, description="when the last trial was answered (UTC); null: not finished"
    )
    withdrawn_at: datetime | None = Field(
        default=None, description="when the person withdrew (UTC), whose answers are then deleted; null: did not"
    )
    simulated: bool = Field(default=False, description="true: no person, a program")

    @property
    def finished(self) -> bool:
        return self.finished_at is not None

    @property
    def withdrawn(self) -> bool:
        return self.withdrawn_at is not None


def codebook() -> dict[str, dict[str, str]]:
    """What each column of each table means."""
    return {
        name: {column: field.description or "" for column, field in record.model_fields.items()}
        for name, record in (("participants", Participant), ("responses", Response))
    }


class Collected(Record):
    """All that a study has collected, with the digest of its plan."""

    schema_version: Literal[1] = 1
    plan: str = Field(description="the plan's digest")
    simulated: bool = Field(description="true: all of it comes from programs")
    participants: tuple[Participant, ...]
    responses: tuple[Response, ...]
    codebook: dict[str, dict[str, str]] = Field(default_factory=codebook)

    @model_validator(mode="after")
    def _consistent(self) -> Collected:
        known = {person.participant for person in self.participants}
        if strangers := {response.participant for response in self.responses} - known:
            raise ValueError(f"expected responses of the study's participants, got some of {len(strangers)} others")
        if len({(r.participant, r.position) for r in self.responses}) < len(self.responses):
            raise ValueError("expected one response to a trial, got two")
        kinds = {person.simulated for person in self.participants} | {given.simulated for given in self.responses}
        if kinds - {self.simulated}:
            raise ValueError("expected people who are all real or all simulated, got both")
        return self

    def to_json(self) -> str:
        """As one JSON object; `model_validate_json` reads it."""
        return json.dumps(self.model_dump(mode="json"), indent=1)

    def files(self) -> dict[str, bytes]:
        """Two tables, the codebook, and the JSON that holds all three; the names of simulated files say so."""
        word = "simulated-" if self.simulated else ""
        meanings = ((name, *row) for name, rows in codebook().items() for row in rows.items())
        return {
            f"{word}participants.csv": table(Participant, self.participants),
            f"{word}responses.csv": table(Response, self.responses),
            f"{word}responses.json": self.to_json().encode(),
            "codebook.csv": _written(("table", "column", "meaning"), meanings),
        }

    def save(self, folder: Path) -> list[Path]:
        """Write `files` into a folder, each all or nothing."""
        return [write_atomically(folder / name, content) for name, content in self.files().items()]

    def archive(self) -> bytes:
        """`files` as one ZIP."""
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in self.files().items():
                archive.writestr(name, data)
        return content.getvalue()


def table(record: type[Record], rows: Iterable[Record]) -> bytes:
    """A table as CSV: None is an empty field, true and false are words, lists are JSON."""
    cells = ([_cell(value) for value in row.model_dump(mode="json").values()] for row in rows)
    return _written(list(record.model_fields), cells)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    text = str(value)
    # A spreadsheet would run what begins so; the apostrophe in front prevents it.
    return f"'{text}" if text[:1] in {"=", "+", "-", "@", "\t", "\r", "'"} else text


def _written(header: Sequence[str], rows: Iterable[Sequence[str]]) -> bytes:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\r\n")  # of which it quotes both in a cell
    writer.writerow(header)
    writer.writerows(rows)
    return file.getvalue().encode()
