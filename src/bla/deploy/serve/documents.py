"""What the OpenAPI document says: bodies, answers, examples."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from bla.explanations.explanation import Prediction, Unexplained

DESCRIPTION = "A classifier's answer, and what it says from selected cells alone. No gradient; no photo is stored."
SIZE = "Select exactly this many cells; by default the explainer chooses."
TARGET = "The class that a class-aware explainer explains, by name or index; by default the predicted one."
PROBABILITY = "A class, by name or index, whose probability each answer is to hold."
CHECK = "Also ask the whole classifier, in two more passes, about the selected pixels alone and the other ones."
FILL = "With check, what replaces the other pixels."
FORMAT = "json, or png for a picture of one photo; by default the Accept header decides."


class Error(BaseModel):
    """Why a request was refused."""

    error: str


class Answer(BaseModel):
    """What the head predicts from a subset of cells."""

    size: int
    prediction: Prediction
    top: list[Prediction]


class Asked(Answer):
    """What the head predicts from a subset of cells, and the probability of the class asked about, if one is."""

    target: Prediction | None = None


class Answers(BaseModel):
    """Answers, in the order of the masks."""

    answers: list[Asked]


class Explained(Answer):
    """An explanation, as `bla explain --json` prints it."""

    image: str
    grid: list[int]
    classifier: Prediction
    agrees: bool
    check: dict[str, Any] | None = None


class Explanations(BaseModel):
    """Explanations, in the order of the photos."""

    explanations: list[Explained | Unexplained]


_Base64 = Annotated[str, Field(min_length=1, json_schema_extra={"contentEncoding": "base64"})]
_Row = Annotated[list[Literal[0, 1]], Field(min_length=1)]
Masks = Annotated[list[Annotated[list[_Row], Field(min_length=1)]], Field(min_length=1)]


class Photos(BaseModel):
    """Photos, as base64."""

    model_config = ConfigDict(extra="forbid")
    photos: Annotated[list[_Base64], Field(min_length=1, max_length=256)]


class PhotosAndMasks(Photos):
    """A photo, and subsets of its cells."""

    masks: Masks


_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGM4MWEuAARUAeePzIjeAAAAAElFTkSuQmCC"
_FILE = {"type": "string", "format": "binary"}
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "A body that ends early", "model": Error},
    408: {"description": "A body that stops coming", "model": Error},
    413: {"description": "More bytes than are allowed", "model": Error},
    415: {"description": "Another content type", "model": Error},
    422: {"description": "A broken photo or a wrong value, with the reason", "model": Error},
    429: {"description": "Busy; Retry-After says when to try again", "model": Error},
    503: {"description": "No answer in time; Retry-After says when to try again", "model": Error},
}
for _status in (429, 503):
    _ERRORS[_status]["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds"}}


def _body(model: type[BaseModel], example: dict[str, Any], form: dict[str, Any], **others: Any) -> dict[str, Any]:
    content = {
        "application/json": {"schema": model.model_json_schema(), "example": example},
        "multipart/form-data": {"schema": {"type": "object", "properties": form, "required": [*form]}},
    }
    return {"requestBody": {"required": True, "content": content | others}}


def _answered(model: type[BaseModel], **others: Any) -> dict[int | str, dict[str, Any]]:
    return _ERRORS | {200: {"description": model.__doc__, "model": model, "content": others}}


EXPLAIN: dict[str, Any] = {
    "responses": _answered(Explanations, **{"image/png": {"schema": _FILE}}),
    "openapi_extra": _body(Photos, {"photos": [_PIXEL]}, {"photo": _FILE}, **{"image/*": {"schema": _FILE}}),
}
ANSWERS: dict[str, Any] = {
    "responses": _answered(Answers),
    "openapi_extra": _body(
        PhotosAndMasks, {"photos": [_PIXEL], "masks": [[[1] * 7] * 7]}, {"photo": _FILE, "masks": {"type": "string"}}
    ),
}
