"""How the server behaves, apart from how tokens are made. In: the command line's values. Out: frozen, checked."""

from __future__ import annotations

from dataclasses import dataclass, fields

from fireflyer.errors import UserError


@dataclass(frozen=True)
class ServeSettings:
    """Every limit is checked before a request costs anything. Raises UserError.

    served_model_name: the model's name in the API.
    api_key: what `Authorization: Bearer` must carry on /v1; None: no key is asked for.
    allowed_hosts: names that the Host header may carry, without port; empty: any. A server on the loopback address
        needs them, or a web page could reach it under a name of its own (DNS rebinding).
    allowed_origins: web pages that may read answers from a browser; none by default.
    max_queue: sequences that may wait for a place; more are refused with 429.
    max_body_bytes, max_n: largest body of a request, most answers to one prompt.
    max_output_tokens: most tokens that one answer may have; None: what the context leaves.
    request_timeout_s: the longest that one request may take, waiting included.
    step_timeout_s: /ready says 503 when there is work and no step has ended for so long.
    drain_s: after SIGTERM or Ctrl-C, how long running answers may go on.
    """

    served_model_name: str
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_queue: int = 256
    max_body_bytes: int = 8 * 2**20
    max_n: int = 16
    max_output_tokens: int | None = None
    request_timeout_s: float = 3600.0
    step_timeout_s: float = 120.0
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        if self.api_key is not None and not self.api_key.strip():
            raise UserError("the API key is empty; give one, or none at all for a server without a key")
        if not self.served_model_name.strip():
            raise UserError("the served model's name is empty; give one with --served-model-name")
        for field in fields(self):
            value = getattr(self, field.name)
            smallest = 0 if field.name in ("max_queue", "drain_s") else 1
            if isinstance(value, (int, float)) and not value >= smallest:
                option = field.name.removesuffix("_s").replace("_", "-")
                raise UserError(f"--{option} is {value}; it must be at least {smallest}")
