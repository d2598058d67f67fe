"""Whether a host can be reached at all, asked once before anything is wanted from it; and how an
address is told.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import socket
import threading
import urllib.request
from urllib.parse import SplitResult, urlsplit

from .errors import UserError

SECONDS = 4.0  # to connect; a resolver that does not answer hangs longer by itself
PORTS = {"https": 443, "socks4": 1080, "socks5": 1080, "socks5h": 1080}
# A user's name and password before the host; keys of object storage hold slashes, a port does not.
# In abfs://container@account it is no user.
USER = re.compile(
    r"(?<=://)(?<!abfs://)(?<!abfss://)(?:[^\s/?#]*|[^\s/?#:]*:(?!\d*(?:[\s/?#]|$))\S*)@"
)
QUERY = re.compile(r"(?<=://)([^\s?#'\"<>]*)[?#][^\s'\"<>]*")  # that of a signed address opens it


def without_credentials(address: str) -> str:
    """An address, or a text that holds some, as it may be told and kept: without user, password and
    query.
    """
    return QUERY.sub(r"\1", USER.sub("", address))


def way_to(address: str) -> tuple[SplitResult, str]:
    """(what is connected to for a web address: the host, or the proxy to it; how that is told)."""
    target, proxies = _split(address), urllib.request.getproxies()
    told = target.hostname or ""
    proxy = proxies.get(target.scheme) or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(told):
        return target, told
    target = _split(proxy if "://" in proxy else f"http://{proxy}")
    named = (k for k, v in os.environ.items() if k.lower().endswith("_proxy") and v == proxy)
    of = next(named, "the system's settings")
    return target, f"{told} by way of the proxy {target.hostname} (of {of})"


def _split(address: str) -> SplitResult:
    """UserError for an address without a host."""
    with contextlib.suppress(ValueError):
        if (target := urlsplit(address)).scheme and target.hostname:
            return target
    raise UserError(
        f"{without_credentials(address)!r} is no web address; mend HF_ENDPOINT or HTTPS_PROXY"
    )


def check_reachable(address: str, remedy: str) -> None:
    """UserError within 5 s if the host of a web address, or the proxy to it, takes no connection.

    remedy: what the user can do instead.
    """
    target, told = way_to(address)
    found: queue.SimpleQueue[str] = queue.SimpleQueue()

    def connect() -> None:
        try:
            port = target.port or PORTS.get(target.scheme, 80)
            socket.create_connection((target.hostname, port), SECONDS).close()
            found.put("")
        except (OSError, ValueError) as error:
            found.put(getattr(error, "strerror", None) or str(error))

    threading.Thread(target=connect, daemon=True).start()
    try:
        reason = found.get(timeout=SECONDS)
    except queue.Empty:
        reason = "no answer"
    if reason:
        raise UserError(f"offline: {told} cannot be reached ({reason}); {remedy}")
