"""What stands before an application, as the settings say."""

import logging
import os
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware

from omnispeech.config import AccessConfig
from omnispeech.server.access.guard import Guard
from omnispeech.server.access.keys import VARIABLE, Keys
from omnispeech.server.access.origins import Origins

logger = logging.getLogger(__name__)

# headers, by pages of other origins
READABLE = ["Retry-After", "X-Turn-Id", "X-Sample-Rate", "X-Request-Id"]


def guard(
    app: Starlette, access: AccessConfig, host: str, environ: Mapping[str, str] = os.environ
) -> None:
    """Lets in who may come in. host: the address that is listened on.

    Raises ConfigError for keys that cannot be used.
    """
    keys = keys_of(access, environ)
    if not keys.needed and not is_loopback(host):
        logger.warning(
            "no API key is needed here: whoever reaches the address %s may use this server; "
            "docs/security.md tells how to set keys",
            host,
        )
    listed = access.listed_origins
    app.add_middleware(Guard, keys=keys, origins=Origins(listed, with_keys=keys.needed))
    if listed:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=listed,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=READABLE,
        )


def keys_of(access: AccessConfig, environ: Mapping[str, str] = os.environ) -> Keys:
    """Raises ConfigError for keys that cannot be used."""
    path = Path(access.api_keys).expanduser() if access.api_keys else None
    return Keys(path, environ.get(VARIABLE, ""))


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:  # a name
        return False
