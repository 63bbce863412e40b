"""The queue as a page on this machine: read-only, no outside resources, no scripts; it loads itself again every 2 s."""

from __future__ import annotations

import http.server
import threading
from html import escape
from typing import Any

from fireflyer.errors import UserError
from fireflyer.fleet import views
from fireflyer.fleet.controller import Controller

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em;
       color: #222; background: #fff }
table { border-collapse: collapse; margin: 1em 0 2em; width: 100% }
th, td { text-align: left; padding: .3em .8em .3em 0; border-bottom: 1px solid #ddd; vertical-align: top }
th { font-weight: 600 } .bar { background: #eee; height: .8em; width: 12em; position: relative }
.bar i { background: #4a7; position: absolute; inset: 0 auto 0 0 } .bad { color: #b00 }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #181818 } th, td { border-color: #333 }
  .bar { background: #333 } .bad { color: #f77 } }
"""
_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class Page:
    """Serves until closed."""

    def __init__(self, port: int, fleet: Controller) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                known = self.path == "/" and self.headers.get("Host", "").partition(":")[0] in (
                    "127.0.0.1",
                    "localhost",
                )
                body = page_html(views.queue(fleet), views.node_rows(fleet)).encode() if known else b"not found\n"
                self.send_response(200 if known else 404)
                for name, value in _HEADERS.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing: looking is no event."""

        try:
            self._server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        except (OSError, OverflowError) as error:
            raise UserError(f"--web {port}: the port can't be had: {error}; give another") from error
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def page_html(shown: dict[str, Any], nodes: list[dict[str, Any]]) -> str:
    """The queue and the nodes; whatever users wrote is escaped."""
    use = "not known yet" if shown["real_use"] is None else f"{shown['real_use']:.0%}"
    held = f"{shown['nodes']['busy']} of {shown['nodes']['up']} nodes held (occupancy {shown['occupancy']:.0%})"
    trouble = f'<p class="bad">{escape(shown["trouble"])}</p>' if shown["trouble"] else ""
    tasks = [
        [
            task["task"],
            task["user"],
            task["name"],
            task["nodes"],
            task["state"],
            _time(task["for_s"]),
            task["slices"],
            "" if task["expected_in_s"] is None else f"in {_time(task['expected_in_s'])}",
            ", ".join(task["on"]) + (": " if task["on"] and task["why"] else "") + task["why"],
        ]
        for task in [*shown["tasks"], *shown["ended"]]
    ]
    users = [
        [user["user"], _bar(user["share"]), f"{user['fair_share']:.0%}", user["running"], user["waiting"]]
        for user in shown["users"]
    ]
    machines = [
        [
            node["name"],
            node["zone"],
            node["health"],
            "" if node["task"] is None else f"task {node['task']}",
            "" if node["use"] is None else f"{node['use']:.0%}",
            node["reason"],
        ]
        for node in nodes
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="2">'
        f'<meta name="viewport" content="width=device-width"><title>fleet</title><style>{_STYLE}</style>'
        f"<h1>fleet</h1><p>{escape(shown['backend'])}: {held}, real use {use}</p>{trouble}"
        + _table(["task", "user", "name", "nodes", "state", "for", "slices", "next slice", "why"], tasks)
        + _table(["user", "share of recent node-hours", "fair share", "run", "wait"], users)
        + _table(["node", "zone", "health", "held by", "use", "why"], machines)
        + "</html>\n"
    )


class _Markup(str):
    """Ours, not to be escaped."""


def _bar(share: float) -> _Markup:
    return _Markup(f'<div class="bar" title="{share:.0%}"><i style="width:{share:.0%}"></i></div>')


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _cell(value: Any) -> str:
    return f"<td>{value if isinstance(value, _Markup) else escape(str(value))}</td>"


def _table(columns: list[str], rows: list[list[Any]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>"
        + "".join(f"<td>{cell if isinstance(cell, _Markup) else escape(str(cell))}</td>" for cell in row)
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
