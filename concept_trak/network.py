"""Whether a host can be reached at all, asked once before anything is wanted from it; and how an
address is told.
"""

from __future__ import annotations

import queue
import re
import socket
import threading
import urllib.request
from urllib.parse import urlsplit

from .errors import UserError

SECONDS = 4.0  # to connect; a resolver that does not answer hangs longer by itself
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


def refuse_offline(address: str, remedy: str) -> None:
    """UserError within 5 s if the host of a web address, or the proxy to it, takes no connection.

    remedy: what the user can do instead.
    """
    target = urlsplit(address)
    host, proxies = target.hostname or "", urllib.request.getproxies()
    if (proxy := proxies.get(target.scheme)) and not urllib.request.proxy_bypass(host):
        target = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    found: queue.SimpleQueue[str] = queue.SimpleQueue()

    def connect() -> None:
        try:
            port = target.port or (443 if target.scheme == "https" else 80)
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
        raise UserError(f"offline: {target.hostname} cannot be reached ({reason}); {remedy}")
