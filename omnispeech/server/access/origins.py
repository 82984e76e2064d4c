"""Which web pages may ask. A browser names the page's origin; other programs name none."""

from collections.abc import Collection
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from omnispeech.errors import Forbidden

ALL = "*"
PORTS = {"http": 80, "https": 443}


class Origins:
    """listed: of the setting `origins`.

    Without keys a page that was fetched from a host name by plain http is not trusted although the
    name is that of this server: whoever owns a name can let it lead to any address (DNS
    rebinding). An address, localhost and a name with a certificate cannot be borrowed so.
    """

    def __init__(self, listed: Collection[str], *, with_keys: bool) -> None:
        self._listed = listed
        self._with_keys = with_keys

    def check(self, headers: Headers) -> None:
        """Raises Forbidden."""
        origin = headers.get("origin")
        if origin is None or ALL in self._listed or origin in self._listed:
            return
        if not is_same(origin, headers.get("host", "")):
            raise Forbidden(
                f"pages of {_shown(origin)} may not ask; the setting origins names some"
            )
        if not self._with_keys and not cannot_be_borrowed(origin):
            raise Forbidden(
                f"without API keys, name {_shown(origin)} in the setting origins, or use https"
            )


def _shown(origin: str) -> str:
    """Short enough for the reason of a close frame."""
    return repr(origin[:40])


def is_same(origin: str, host: str) -> bool:
    """Whether `host`, a Host header, is where the page came from. The scheme may be another one:
    https may end at a proxy before us."""
    try:
        page = urlsplit(origin)
        asked = urlsplit(f"{page.scheme}://{host}")
        port = PORTS[page.scheme]
        same_port = (page.port or port) == (asked.port or port)
    except (ValueError, KeyError):  # no port, no brackets, no web page: "null"
        return False
    return bool(page.hostname) and page.hostname == asked.hostname and same_port


def cannot_be_borrowed(origin: str) -> bool:
    page = urlsplit(origin)
    name = page.hostname or ""
    if page.scheme == "https" or name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ip_address(name)
    except ValueError:  # a name
        return False
    return True
