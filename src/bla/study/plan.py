"""The registered plan of a study: everything that must stand before the first person answers.

A frozen record: any change gives another digest, and a study that has begun refuses it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from bla.files import write_atomically
from bla.study.errors import StudyError

Task = Literal["preference", "prediction", "agreement"]
"""preference: which of two explanations of one photo; prediction: what the program says, from the explanation alone;
agreement: whether the program is right, with its explanation in view."""

Population = Literal["people", "people and photos"]
"""What the registered test generalises to: people, on these photos; or people and photos like these, too."""

Words = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=400)]
Identifier = Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,40}$")]
Token = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]{16,40}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Record(BaseModel):
    """Frozen, and nothing in it that is not named here."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Arm(Record):
    """One of the explanations compared: a folder of saved explanations under a name."""

    name: Words = Field(description="as results call it; never sent to participants")
    method: str = Field(description="the explanations' own method, setup and model")
    setup: str = ""
    model: str = ""


class Picture(Record):
    """A picture's file: `pictures/TOKEN.jpg`."""

    token: Token = Field(description="random: says nothing of photo or arm")
    sha256: Sha256 = Field(description="of the file's bytes")
    cells: int | None = Field(default=None, ge=1, description="cells shown; null for the photo itself")


class Photo(Record):
    """A photo of the study with its pictures."""

    id: Identifier
    name: str = Field(description="the photo's file name, for the researcher")
    sha256: Sha256 = Field(description="of the photo's file")
    prediction: Words = Field(description="what the program says")
    truth: str | None = Field(default=None, description="what it is, where that is known")
    options: tuple[Words, ...] = Field(default=(), description="of the prediction task: what may be answered")
    plain: Picture = Field(description="the photo itself")
    explained: dict[str, Picture] = Field(description="arm -> its explanation of the photo")

    @property
    def program_is_right(self) -> bool | None:
        """Whether the prediction is the truth; None if that is not known."""
        return None if self.truth is None else self.prediction == self.truth


class Catch(Record):
    """An attention check: its right answer does not depend on the quality of the explanations.

    For a preference, the arm's explanation of the photo stands against that of another photo, the `decoy`. In other
    tasks the question is replaced by the request to give a certain answer.
    """

    photo: Identifier
    arm: Words
    decoy: Identifier | None = None


class Exclusions(Record):
    """Rules, fixed beforehand, by which people are excluded."""

    catches_to_pass: int = Field(default=0, ge=0, description="attention checks that must be passed")
    seconds_at_least: float = Field(default=0.0, ge=0, description="of a person's median main trial")
    share_to_complete: float = Field(default=1.0, ge=0, le=1, description="of a person's main trials")


class Analysis(Record):
    """What is tested."""

    population: Population = "people"
    alpha: float = Field(default=0.05, gt=0, lt=1)
    seed: int = Field(default=0, ge=0, description="of resampling")


class Plan(Record):
    """All that is fixed before the first answer."""

    schema_version: Literal[1] = 1
    title: Words
    question: Words = Field(description="put to participants in each trial; {prediction} is what the program says")
    task: Task
    arms: tuple[Arm, ...] = Field(min_length=2, max_length=12)
    photos: tuple[Photo, ...] = Field(min_length=1, description="of the main trials")
    practice: tuple[Photo, ...] = Field(default=(), description="of the practice trials; none of them is a main one")
    spare: tuple[Photo, ...] = Field(default=(), description="of the catch trials; none of them is a main one")
    catches: tuple[Catch, ...] = ()
    trials: int = Field(ge=1, description="main trials of a person, each of another photo")
    repeats: int = Field(default=0, ge=0, description="main trials that come again, sides exchanged")
    people: int = Field(ge=1, description="planned to be analysed")
    places: int | None = Field(default=None, ge=1, description="people who may begin; null: no limit")
    exclusions: Exclusions = Exclusions()
    analysis: Analysis = Analysis()
    seed: int = Field(default=0, ge=0, description="of photos, sides and order")
    rule: Literal["all", "correct", "wrong", "half"] = Field(default="all", description="which photos were drawn from")
    area: Literal["equal", "own"] = Field(default="equal", description="explanations cut to one size, or as they are")
    identical: Literal["left out", "asked"] | None = Field(
        default=None, description="photos of which two arms show the same picture; null: no rule, they are asked"
    )
    cells: int | None = Field(default=None, ge=1, description="the equal size; null: as the first arm chose it")
    considered: int = Field(default=0, ge=0, description="photos that all arms explain")
    left_out: dict[str, int] = Field(default_factory=dict, description="reason -> photos that were not drawn from")
    width: int = Field(ge=16, le=2000, description="of every picture, in pixels")
    height: int = Field(ge=16, le=2000)
    file_size: int = Field(ge=1, description="of every picture's file, in bytes")
    created: str = Field(description="when, in ISO 8601")

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        names = self.arm_names
        known = self.every_photo
        ids = [photo.id for photo in (*self.photos, *self.practice, *self.spare)]
        tokens = [picture.token for one in known.values() for picture in (one.plain, *one.explained.values())]
        for what, values in (("arms", names), ("photos", ids), ("pictures", tokens)):
            if twice := [value for value, count in Counter(values).items() if count > 1]:
                raise ValueError(f"expected {what} of different names, got some twice: {', '.join(twice[:3])}")
        for photo in known.values():
            if set(photo.explained) != set(names):
                raise ValueError(f"expected photo {photo.id} explained by every arm, got {sorted(photo.explained)}")
            if self.task == "prediction" and not (len(set(photo.options)) > 1 and photo.prediction in photo.options):
                raise ValueError(f"expected two options or more for {photo.id}, the prediction one of them")
            if self.task == "agreement" and photo.truth is None:
                raise ValueError(f"expected the truth of {photo.id}: without it no answer is right")
        if self.trials > len(self.photos):
            raise ValueError(f"expected at most {len(self.photos)} trials, a photo each, got {self.trials}")
        if self.repeats > self.trials:
            raise ValueError(f"expected at most {self.trials} repeats, got {self.repeats}")
        for catch in self.catches:
            if {catch.photo, catch.decoy or catch.photo} - set(known) or catch.arm not in names:
                raise ValueError(f"expected a catch of known photos and arm, got {catch}")
            if (catch.decoy is None) == (self.task == "preference"):
                raise ValueError("expected decoys in the catches of a preference, and in no others")
        if self.exclusions.catches_to_pass > len(self.catches):
            raise ValueError(f"expected at most {len(self.catches)} attention checks to pass, as many as there are")
        return self

    @property
    def arm_names(self) -> tuple[str, ...]:
        """The arms in the plan's order: the first is what results are told of."""
        return tuple(arm.name for arm in self.arms)

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        return tuple(combinations(self.arm_names, 2))

    @property
    def identical_photos(self) -> int:
        """Photos of the main trials of which two arms show the same picture."""
        pictures = [{picture.sha256 for picture in photo.explained.values()} for photo in self.photos]
        return sum(len(different) < len(self.arms) for different in pictures)

    @property
    def every_photo(self) -> dict[str, Photo]:
        """Photos of main, practice and catch trials by their ids."""
        return {photo.id: photo for photo in (*self.photos, *self.practice, *self.spare)}

    @property
    def every_picture(self) -> dict[str, tuple[str, str | None, Picture]]:
        """Each picture's token -> its photo's id, its arm (None for the photo itself), and the picture."""
        photos = self.every_photo.values()
        found = [(p.id, arm, picture) for p in photos for arm, picture in ((None, p.plain), *p.explained.items())]
        return {entry[2].token: entry for entry in found}

    def digest(self) -> str:
        """SHA-256 of the plan's canonical JSON: what a registration quotes."""
        fields = self.model_dump(mode="json", exclude={"identical"} if self.identical is None else None)  # as before it
        canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_json(self) -> str:
        """For people and programs; `from_json` gives the same plan back."""
        return self.model_dump_json(indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            problem = error.errors()[0]
            said = ".".join(map(str, problem["loc"])) + f" {problem['msg']}"
            raise StudyError(f"expected a study's plan, got one that says: {said.strip()}") from error

    def save(self, path: Path) -> Path:
        return write_atomically(path, self.to_json().encode())

    @classmethod
    def load(cls, study: Path) -> Plan:
        """Read `plan.json` of a study's folder."""
        path = study / "plan.json"
        try:
            return cls.from_json(path.read_bytes())
        except OSError as error:
            raise StudyError(
                f"expected a study's folder with a plan.json, got {study} ({error.strerror}): make one with "
                f"bla study init {study} --arms FOLDER FOLDER"
            ) from error
