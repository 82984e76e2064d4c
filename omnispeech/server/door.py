"""The socket that a server listens on, opened before anything slow is imported or done."""

import socket

from omnispeech.config import ServerConfig
from omnispeech.errors import ConfigError


def listen(config: ServerConfig) -> socket.socket:
    """A port in use is found here, before anything slow is done for it."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    both = config.host == "::" and socket.has_dualstack_ipv6()  # every address, of IPv4 too
    try:
        return socket.create_server((config.host, config.port), family=family, dualstack_ipv6=both)
    except (OSError, UnicodeError) as exc:  # UnicodeError: no name that a host can have
        reason = getattr(exc, "strerror", None) or exc
        raise ConfigError(
            f"cannot listen on {config.host}:{config.port}: {reason}; "
            "choose another --port or --host"
        ) from exc
