"""The description at /openapi.json. Bodies are read by hand (streaming.read_body), so their schemas are added here."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from fireflyer.serve.protocol import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

_BODIES: tuple[type[BaseModel], ...] = (ChatCompletionRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
_REFERENCE = "#/components/schemas/{model}"

ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "Refused", "content": {"application/json": {"schema": ERROR_SCHEMA}}},
    "5XX": {"description": "Failed", "content": {"application/json": {"schema": ERROR_SCHEMA}}},
}
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
    **ERRORS,
}


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """For a route's openapi_extra."""
    reference = {"$ref": _REFERENCE.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def add_bodies(description: dict[str, Any]) -> dict[str, Any]:
    """The description with the schemas that `body_of` refers to."""
    schemas = models_json_schema([(model, "validation") for model in _BODIES], ref_template=_REFERENCE)[1]["$defs"]
    description.setdefault("components", {}).setdefault("schemas", {}).update(schemas)
    return description
