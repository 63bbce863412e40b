"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}.

In: our own ApiError, a UserError from below, pydantic's and Starlette's errors. Out: JSON with one line of help.
"""

from __future__ import annotations

import logging
from difflib import get_close_matches
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from fireflyer.errors import UserError

_log = logging.getLogger("fireflyer.serve")

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
_INSTEAD = {
    "functions": "give tools",
    "function_call": "give tool_choice",
    "reasoning_effort": 'give chat_template_kwargs, such as {"thinking": true}',
    "guided_json": "give response_format of type json_schema",
    "guided_regex": "give response_format of type regex",
    "guided_grammar": "give response_format of type grammar",
    "guided_choice": "give response_format of type choice",
    "chat_template": "only the checkpoint's own template is used",
    "best_of": "give n, and choose among the answers yourself",
}
_LONGEST_VALUE = 80

_BRANCHES = ("str", "NamedTool")
"""What pydantic puts into the place of an error beside the keys: which of several types it tried."""


class ApiError(Exception):
    """What a request is answered with instead of a result."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def refusal(error: ValidationError, model: type[BaseModel]) -> ApiError:
    """The first fault of a body that is not what `model` describes."""
    first = error.errors(include_url=False, include_context=False)[0]
    param = ".".join(str(part) for part in first["loc"] if part not in _BRANCHES and "[" not in str(part)) or None
    if first["type"] == "json_invalid":
        return ApiError(
            400, f"the body is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}", code="invalid_json"
        )
    if first["type"] == "extra_forbidden":
        return ApiError(400, _unknown(str(first["loc"][-1]), param, model), param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{param} is missing", param=param, code="missing_required_parameter")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] != "value_error":
        message = f"{param or 'the body'}: {message}; it is {_shown(first['input'])}"
    return ApiError(400, message, param=param, code="invalid_value")


def _unknown(name: str, param: str | None, model: type[BaseModel]) -> str:
    message = f"unrecognized request argument: {_shown(name) if len(name) > _LONGEST_VALUE else param}"
    close = get_close_matches(name[:_LONGEST_VALUE], list(model.model_fields), n=1) if param == name else []
    hint = _INSTEAD.get(name) or (f"did you mean {close[0]}?" if close else "leave it out")
    return f"{message}; {hint}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "..."


def as_api_error(error: Exception) -> ApiError:
    """Any exception as an answer; what we did not foresee is logged, and its text stays here."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return ApiError(400, str(error), code="invalid_value")
    _log.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed on this request; its log says more", code="internal_error")


def add_handlers(app: FastAPI) -> None:
    """Give every error of `app` this shape."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    async def handle_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path}: {error.detail}"
        code = {404: "unknown_url", 405: "method_not_supported"}.get(error.status_code)
        response = ApiError(error.status_code, message, code=code).response()
        response.headers.update(error.headers or {})
        return response

    app.add_exception_handler(ApiError, handle)
    app.add_exception_handler(UserError, handle)
    app.add_exception_handler(HTTPException, handle_http)
    app.add_exception_handler(Exception, handle)
