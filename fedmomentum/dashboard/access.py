"""Who may see the page: checks of the requested host name and of the token.

Another site's page can make a browser send requests to a server on this machine. It cannot read the
answers, unless it points its own name here (DNS rebinding), so the server only answers to names
that nobody else can own. If the address is not local to this machine, a token is required: once in
the URL, then in a cookie that scripts cannot read and other sites cannot send.
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
"""The URL parameter."""
NO_TOKEN = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>No access</title>
</head><body><h1>No access yet</h1><p>Copy the address that the run's terminal printed, token
included, into the address bar. If you came by a link from elsewhere, <a href="/">try again</a>.</p>
</body></html>"""


def is_local(address: str) -> bool:
    """Return whether an IP address can only be reached from this machine."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


class Access:
    """Accepts or refuses requests based on their headers.

    Args:
        host: The name or address given by the operator.
        addresses: The IP addresses that it resolves to.
        port: The port, used in the cookie's name since all ports of a host share cookies.

    Attributes:
        token: The token that the URL must contain once; None if the page is local.
        host: The name or address to open the page by.
    """

    def __init__(self, host: str, addresses: Sequence[str], port: int) -> None:
        self.token: str | None = None
        self._session = secrets.token_urlsafe(32)
        self._cookie = f"fedmomentum-{port}"
        self._is_local = all(is_local(address) for address in addresses)
        # Names that browsers themselves resolve to this machine, or that the operator vouches for.
        self._names = {"localhost"}
        if not self._is_local:
            self.token = secrets.token_urlsafe(32)
            self._names |= {host.lower(), socket.gethostname().lower()}
        # A local page does not go by other names, which another site could point here.
        is_known = self._is_known([f"[{host}]" if ":" in host else host])
        self.host = host if is_known or not self._is_local else addresses[0]

    def refuse(self, scope: Scope) -> Response | None:
        """Return the response to an unauthorized request; None if the request is authorized."""
        # Check the name first, before anything else.
        headers = Headers(scope=scope)
        if not self._is_known(headers.getlist("host")):
            return PlainTextResponse("This page does not go by that name.\n", 421)
        if scope["method"] != "GET":
            text = "This page can only be read.\n"
            return PlainTextResponse(text, 405, headers={"allow": "GET"})
        # Pages of other sites may link here, but nothing else.
        origin = headers.get("sec-fetch-site", "none")
        if origin not in ("none", "same-origin") and scope["path"] != "/":
            return PlainTextResponse("Ask for this from the page itself.\n", 403)
        return self._check_token(scope, headers)

    def _check_token(self, scope: Scope, headers: Headers) -> Response | None:
        if self.token is None:
            return None
        # All requests but a browser's first have the cookie.
        if self._has_session(headers):
            return None
        # On the first request, move the token from the URL into a cookie.
        given = QueryParams(scope["query_string"]).get(TOKEN, "")
        if scope["path"] != "/" or not _equal(given, self.token):
            return HTMLResponse(NO_TOKEN, 401)
        # Redirect the browser to a URL without the token, so that it stays out of the history.
        response = RedirectResponse("/", 303)
        response.set_cookie(self._cookie, self._session, httponly=True, samesite="strict", path="/")
        return response

    def _has_session(self, headers: Headers) -> bool:
        """Return whether a request has the session cookie, possibly among others of that name."""
        found = False
        for line in headers.getlist("cookie"):
            for pair in line.split(";"):
                name, _, value = pair.strip().partition("=")
                # Compare regardless of the name, so that timing reveals nothing.
                is_session = _equal(value, self._session)
                found = found or (name == self._cookie and is_session)
        return found

    def _is_known(self, hosts: Sequence[str]) -> bool:
        """Return whether a request names this server; the port may differ behind a tunnel."""
        if len(hosts) != 1:
            return False
        name = _host_name(hosts[0])
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name in self._names
        # An IP address in the Host header cannot come from another site's name.
        return address.is_loopback or not self._is_local


def _host_name(host: str) -> str:
    """Return a Host header without its port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()


def _equal(given: str, wanted: str) -> bool:
    """Compare two texts in constant time."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), wanted.encode())
