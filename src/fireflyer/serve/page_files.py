"""The chat page's files, which load and ask nothing from elsewhere. In: a request's path. Out: a file."""

from __future__ import annotations

from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

_FOLDER = Path(__file__).parent / "page"

# A model's words are shown on this page: should some ever become markup, nothing of it is run, fetched or sent.
# data: is for the masks in Temml's style sheet.
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # a browser asks whether its copy is still good, and gets 304
}


class PageFiles(StaticFiles):
    """To be mounted on /."""

    def __init__(self) -> None:
        super().__init__(directory=_FOLDER, html=True)

    async def get_response(self, path: str, scope: Scope) -> Response:
        if scope["method"] not in ("GET", "HEAD"):  # a wrong path of the API's ends here
            raise HTTPException(404)
        response = await super().get_response(path, scope)
        response.headers.update(_HEADERS)
        return response
