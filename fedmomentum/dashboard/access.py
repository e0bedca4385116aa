"""Who may see the page: the names it is asked for by, and the token.

A page of another site can have a browser ask a server on this machine. It may not read the answers,
unless its own name is made to lead here (DNS rebinding), so only names that nobody else can hold
are answered to. On another address than this machine's own a token is asked for: once in the URL,
and then in a cookie that scripts cannot read and other sites cannot send.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import socket
from collections.abc import Sequence

from starlette.datastructures import Headers, QueryParams
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response

from fedmomentum.web.asgi import Scope

TOKEN = "token"
"""The parameter of the URL."""
NO_TOKEN = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>No access</title>
</head><body><h1>No access yet</h1><p>Copy the address that the run's terminal printed, token
included, into the address bar. If you came by a link from elsewhere, <a href="/">try again</a>.</p>
</body></html>"""


def is_local(address: str) -> bool:
    """Return whether an IP address is reached from this machine only."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


class Access:
    """Decides about requests by their headers.

    Args:
        host: The name or address that the operator gave.
        addresses: The IP addresses that it stands for.
        port: The port; cookies are shared by all ports of a host.

    Attributes:
        token: What the URL must hold once; None if the page is for this machine only.
    """

    def __init__(self, host: str, addresses: Sequence[str], port: int) -> None:
        self.token: str | None = None
        self._session = secrets.token_urlsafe(32)
        self._cookie = f"fedmomentum-{port}"
        self._is_local = all(is_local(address) for address in addresses)
        # Names that a browser resolves by itself to this machine, or that the operator vouches for.
        self._names = {"localhost"}
        if not self._is_local:
            self.token = secrets.token_urlsafe(32)
            self._names |= {host.lower(), socket.gethostname().lower()}

    def refuse(self, scope: Scope) -> Response | None:
        """Return the answer to a request that may not see anything; None for one that may."""
        # By another name, not even the method is looked at.
        headers = Headers(scope=scope)
        if not self._is_known(headers.getlist("host")):
            return PlainTextResponse("This page does not go by that name.\n", 421)
        if scope["method"] != "GET":
            text = "This page can only be read.\n"
            return PlainTextResponse(text, 405, headers={"allow": "GET"})
        # Pages of other sites may link here, and do nothing else.
        origin = headers.get("sec-fetch-site", "none")
        if origin not in ("none", "same-origin") and scope["path"] != "/":
            return PlainTextResponse("Ask for this from the page itself.\n", 403)
        return self._check_token(scope, headers)

    def _check_token(self, scope: Scope, headers: Headers) -> Response | None:
        if self.token is None:
            return None
        # Every request but a browser's first has the cookie.
        if self._has_session(headers):
            return None
        # The first request: the token moves from the URL into a cookie.
        given = QueryParams(scope["query_string"]).get(TOKEN, "")
        if scope["path"] != "/" or not _equal(given, self.token):
            return HTMLResponse(NO_TOKEN, 401)
        # The browser is redirected to an address without it, which is what its history holds.
        response = RedirectResponse("/", 303)
        response.set_cookie(self._cookie, self._session, httponly=True, samesite="strict", path="/")
        return response

    def _has_session(self, headers: Headers) -> bool:
        """Return whether a request has the cookie; it may have more of that name."""
        found = False
        for line in headers.getlist("cookie"):
            for pair in line.split(";"):
                name, _, value = pair.strip().partition("=")
                # Compared whatever the name is, so that time says nothing.
                is_session = _equal(value, self._session)
                found = found or (name == self._cookie and is_session)
        return found

    def _is_known(self, hosts: Sequence[str]) -> bool:
        """Return whether a request names this server; through a tunnel its port may be another."""
        if len(hosts) != 1:
            return False
        name = _host_name(hosts[0])
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name in self._names
        # No name leads to a number, so no other site can go by one.
        return address.is_loopback or not self._is_local


def _host_name(host: str) -> str:
    """Return a Host header without its port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()


def _equal(given: str, wanted: str) -> bool:
    """Compare two texts in a time that does not depend on where they differ."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), wanted.encode())
