"""The certificate and the key of https, looked at before anything slow is done."""

import ssl

from omnispeech.config import AccessConfig
from omnispeech.errors import ConfigError


def check_tls(access: AccessConfig) -> None:
    """Raises ConfigError for files that no server could speak https with."""
    for name, path in (
        ("tls_certificate", access.tls_certificate),
        ("tls_key", access.tls_key),
    ):
        if path:
            _check_readable(name, path)
    if not access.tls_certificate:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(access.tls_certificate, access.tls_key, password=_no_password)
    except ssl.SSLError as exc:
        reason = exc.reason or "no PEM"
        raise ConfigError(
            f"tls_certificate={access.tls_certificate!r} and tls_key={access.tls_key!r} do not go "
            f"together, or one is none ({reason}); give the chain of a certificate and its own "
            "key, as PEM and without a password"
        ) from exc


def _check_readable(name: str, path: str) -> None:
    try:
        with open(path, "rb"):
            pass
    except OSError as exc:
        raise ConfigError(f"{name}={path!r} cannot be read: {exc.strerror}") from exc


def _no_password() -> bytes:
    """OpenSSL would ask at the terminal."""
    return b""
