"""Before any address is looked at: who asks, from where, and how much.

Without API_TOKEN only pages and programs of this machine may ask: a name of another host in `Host`
is what a page of a stranger uses that had its name point here (DNS rebinding). With it, every
address but /health wants it, as `Authorization: Bearer TOKEN` or, from a browser, as the password
of any user. A form of another site (`Origin`) is refused either way.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

from ..errors import UserError
from .metrics import Metrics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/health",)  # told without a token: whether it lives, and nothing else
SHORTEST_TOKEN = 16
MAKE_TOKEN = "export API_TOKEN=$(openssl rand -hex 16)"
SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "content-security-policy": "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'"
    "; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
}


class RequestRejected(Exception):
    """A request that is not let in: status, one sentence, further headers."""

    def __init__(self, status: int, sentence: str, **headers: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


@dataclass(frozen=True)
class RequestLimits:
    """Of what is read. token: "" where none is asked for. body_bytes; body_timeout: seconds."""

    token: str
    body_bytes: int
    body_timeout: float


def validate_token(token: str, host: str) -> str:
    """The token. UserError for one that no header can hold or that is soon guessed, and for none
    where other machines may ask.
    """
    if not token and not is_loopback(host):
        raise UserError(
            f"LISTEN_HOST={host} lets other machines ask, but API_TOKEN is not set; set it: "
            f"API_TOKEN=$(openssl rand -hex 16) LISTEN_HOST={host} bash scripts/serve.sh"
        )
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise UserError(f"API_TOKEN holds what is no letter of a header; set another: {MAKE_TOKEN}")
    if token and len(token) < SHORTEST_TOKEN:
        raise UserError(
            f"API_TOKEN has {len(token)} letters and is soon guessed; set one of at least "
            f"{SHORTEST_TOKEN}: {MAKE_TOKEN}"
        )
    return token


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class AuthMiddleware:
    """ASGI middleware; see the module's docstring."""

    def __init__(self, app: App, limits: RequestLimits, counts: Metrics) -> None:
        self.app, self.limits, self.counts = app, limits, counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status = time.monotonic(), 500

        async def sent(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                there = {name.lower() for name, _ in message["headers"]}
                more = [
                    (k.encode(), v.encode())
                    for k, v in SECURITY_HEADERS.items()
                    if k.encode() not in there
                ]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        try:
            headers = {
                k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]
            }
            self._check(scope, headers)
            receive = await self._whole_body(headers, receive)
        except RequestRejected as refusal:
            await refuse(refusal, sent)
        else:
            await self.app(scope, receive, sent)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.counts.request(route, status, time.monotonic() - started)

    def _check(self, scope: Scope, headers: dict[str, str]) -> None:
        """TurnedAway for a request that may not ask."""
        host = headers.get("host", "")
        if not self.limits.token and not is_loopback(_place(f"//{host}").hostname or ""):
            raise RequestRejected(421, "this service answers to the names of this machine alone")
        origin = headers.get("origin")
        if origin is not None and _place(origin).netloc.lower() != host.lower():
            raise RequestRejected(403, "a page of another site may not ask this service")
        if self.limits.token and scope["path"] not in OPEN and not self._knows(headers):
            raise RequestRejected(
                401,
                "this service wants API_TOKEN, as 'Authorization: Bearer TOKEN' or as a password",
                www_authenticate='Basic realm="concept-trak", charset="UTF-8"',
            )

    def _knows(self, headers: dict[str, str]) -> bool:
        """Whether the token is among the headers; takes the same time for any wrong one."""
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).decode().partition(":")[2]
            except (binascii.Error, ValueError):
                given = ""
        elif kind.lower() != "bearer":
            given = ""
        return hmac.compare_digest(given.strip().encode(), self.limits.token.encode())

    async def _whole_body(self, headers: dict[str, str], receive: Receive) -> Receive:
        """A `receive` that gives the body, read here, and then what comes after it."""
        most = self.limits.body_bytes
        too_large = RequestRejected(413, f"the body of a request may have {most} bytes at most")
        length = headers.get("content-length", "0")
        if length.isdecimal() and (len(length) > 12 or int(length) > most):
            raise too_large
        body, more = b"", "content-length" in headers or "transfer-encoding" in headers
        deadline = time.monotonic() + self.limits.body_timeout
        while more:
            try:
                message = await asyncio.wait_for(receive(), max(0.001, deadline - time.monotonic()))
            except asyncio.TimeoutError:  # noqa: UP041 - another class before Python 3.11
                told = f"the body did not arrive within {self.limits.body_timeout:g} s"
                raise RequestRejected(408, told) from None
            if message["type"] != "http.request":  # who asked has gone
                break
            body, more = body + message.get("body", b""), message.get("more_body", False)
            if len(body) > most:
                raise too_large
        given = False

        async def again() -> MutableMapping[str, Any]:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        return again


def _place(address: str) -> SplitResult:
    """The parts of an address; empty ones for what is none."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")


async def refuse(refusal: RequestRejected, send: Send) -> None:
    """Answer with the sentence, and close the connection: what else it holds is not read."""
    body = json.dumps({"error": refusal.sentence}).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    headers |= {"connection": "close"} | refusal.headers
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
