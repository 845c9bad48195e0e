"""What the OpenAPI document says: bodies, answers, examples."""

from __future__ import annotations

from typing import Any

DESCRIPTION = "A prediction, and the cells of the photo that alone made it. No gradient, nothing kept."
SIZE = "Select exactly so many cells; by default the explainer chooses."
TARGET = "Ask a class-aware explainer about this class, by name or index."
FORMAT = "json, or png for a picture of one photo; by default as Accept says."

_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGM4MWEuAARUAeePzIjeAAAAAElFTkSuQmCC"
_ERROR = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
_GUESS = {
    "type": "object",
    "required": ["index", "label", "probability"],
    "properties": {
        "index": {"type": "integer"},
        "label": {"type": "string"},
        "probability": {"type": "number", "minimum": 0, "maximum": 1},
    },
}
_PHOTOS = {"type": "array", "minItems": 1, "items": {"type": "string", "contentEncoding": "base64"}}
_MASKS = {
    "type": "array",
    "minItems": 1,
    "items": {"type": "array", "items": {"type": "array", "items": {"type": "integer", "enum": [0, 1]}}},
}
_REASONS = {
    400: "A body that ends early",
    413: "More bytes than are allowed",
    415: "Another content type",
    422: "A broken photo or a wrong value, with the reason",
    429: "Busy; Retry-After says when to try again",
    504: "No answer in time",
}


def _answer(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


_ERRORS: dict[int | str, dict[str, Any]] = {status: _answer(reason, _ERROR) for status, reason in _REASONS.items()}
_ERRORS[429]["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds"}}


def _list_of(name: str, item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": [name], "properties": {name: {"type": "array", "items": item}}}


def _body(properties: dict[str, Any], example: dict[str, Any], multipart: dict[str, Any]) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    form = {"type": "object", "properties": multipart, "required": [*multipart]}
    return {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": schema, "example": example},
                "multipart/form-data": {"schema": form},
            },
        }
    }


_EXPLANATION = {
    "type": "object",
    "required": ["image"],
    "description": "An explanation as `bla explain --json` prints it; of a photo that failed, image and error.",
    "properties": {
        "image": {"type": "string"},
        "error": {"type": "string"},
        "prediction": _GUESS,
        "top": {"type": "array", "items": _GUESS},
        "grid": {"type": "array", "items": {"type": "integer"}},
        "size": {"type": "integer"},
    },
}
_explain_body = _body({"photos": _PHOTOS}, {"photos": [_PIXEL]}, {"photo": {"type": "string", "format": "binary"}})
_explain_body["requestBody"]["content"]["image/*"] = {"schema": {"type": "string", "format": "binary"}}
_explained = _answer("Explanations, in order", _list_of("explanations", _EXPLANATION))
_explained["content"]["image/png"] = {"schema": {"type": "string", "format": "binary"}}

EXPLAIN: dict[str, Any] = {
    "summary": "Explain photos",
    "operation_id": "explain",
    "responses": _ERRORS | {200: _explained},
    "openapi_extra": _explain_body,
    "response_model": None,
}
ANSWERS: dict[str, Any] = {
    "summary": "What the head says of other subsets of cells",
    "operation_id": "answers",
    "responses": _ERRORS
    | {
        200: _answer(
            "An answer a mask, in order",
            _list_of(
                "answers",
                {
                    "type": "object",
                    "required": ["size", "prediction", "top"],
                    "properties": {
                        "size": {"type": "integer"},
                        "prediction": _GUESS,
                        "top": {"type": "array", "items": _GUESS},
                    },
                },
            ),
        )
    },
    "openapi_extra": _body(
        {"photos": _PHOTOS, "masks": _MASKS},
        {"photos": [_PIXEL], "masks": [[[1] * 7] * 7]},
        {"photo": {"type": "string", "format": "binary"}, "masks": {"type": "string"}},
    ),
    "response_model": None,
}
EXPLAINER: dict[str, Any] = {"summary": "What is served: classes, grid, limits", "operation_id": "explainer"}
HEALTH: dict[str, Any] = {"summary": "Whether it is well", "operation_id": "health"}
