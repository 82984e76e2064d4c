"""API keys: those of a TOML file, read again when it changes, and those of the environment.

    open_metrics = true               # /metrics needs no key

    [keys.alice]
    sha256 = "0f4e..."                # or key = "the key itself"
    conversations = 2                 # limits; those left out do not limit
    requests_per_minute = 30
    audio_seconds_per_minute = 300

Only digests are held. A new one, and its lines: omnispeech key NAME
"""

import hashlib
import hmac
import logging
import re
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omnispeech.errors import ConfigError
from omnispeech.server.access.quotas import NO_LIMITS, Account, Clock, Limits

logger = logging.getLogger(__name__)

VARIABLE = "OMNISPEECH_API_KEY"
LOOK_S = 1.0  # the file is looked at this often at most
SHORTEST = 16  # characters of a key
# what may stand in a header and in the name of a WebSocket subprotocol (RFC 9110, token)
KEY = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
OTHERS_MAY = 0o007  # of a file's mode; the group is the server's own where a secret is mounted

Stamp = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class KeyFile:
    """What one reading of a file gave; the key is known by its SHA-256 alone."""

    limits: dict[bytes, tuple[str, Limits]] = field(default_factory=dict)  # digest -> name, limits
    open_metrics: bool = False
    says_keys: bool = False  # has the table, which may be empty


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def environment_keys(text: str) -> dict[bytes, tuple[str, Limits]]:
    """text: of OMNISPEECH_API_KEY; keys without limits, by commas."""
    keys = [key.strip() for key in text.split(",") if key.strip()]
    found = {}
    for number, key in enumerate(keys, 1):
        name = VARIABLE if len(keys) == 1 else f"{VARIABLE} {number}"
        found[checked_key(key, name)] = name, NO_LIMITS
    return found


def checked_key(key: str, name: str) -> bytes:
    """Its digest. The key stands in no message."""
    if len(key) < SHORTEST or not KEY.fullmatch(key):
        raise ConfigError(
            f"{name}: a key has at least {SHORTEST} characters, letters, digits and signs such as "
            "- and _; this one does not: make one with omnispeech key NAME"
        )
    return digest(key)


def read_key_file(path: Path) -> KeyFile:
    """Raises ConfigError by the name of the file and of the key; never with a key in it."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise ConfigError(f"{path} does not exist; make it: omnispeech key NAME >> {path}") from exc
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read: {exc.strerror}") from exc
    except ValueError as exc:
        # what the parser says may quote the line with the key
        line = re.search(r" \(at line \d+", str(exc))
        where = f"{line[0]})" if line else ""
        raise ConfigError(f"{path} is not valid TOML in UTF-8{where}") from None
    return parse_keys(values, str(path))


def parse_keys(values: Mapping[str, Any], place: str) -> KeyFile:
    refuse_unknown(values, {"keys", "open_metrics"}, place)
    tables, open_metrics = values.get("keys", {}), values.get("open_metrics", False)
    if type(open_metrics) is not bool:
        raise ConfigError(f"{place}: open_metrics is not true or false")
    if not isinstance(tables, dict) or not all(isinstance(t, dict) for t in tables.values()):
        raise ConfigError(f"{place}: each key is a table of its own, [keys.NAME]")
    found: dict[bytes, tuple[str, Limits]] = {}
    for name, table in tables.items():
        where = f"{place}: keys.{name}"
        one = parse_digest(table, where)
        if one in found:
            raise ConfigError(f"{where} is the same key as keys.{found[one][0]}; take one away")
        found[one] = name, parse_limits(table, where)
    return KeyFile(found, open_metrics, "keys" in values)


def refuse_unknown(values: Mapping[str, Any], known: set[str], place: str) -> None:
    if unknown := sorted(values.keys() - known):
        known_names = ", ".join(sorted(known))
        raise ConfigError(f"{place}: unknown name {unknown[0]!r}; known: {known_names}")


LIMITS = {f.name for f in fields(Limits)}


def parse_digest(table: Mapping[str, Any], where: str) -> bytes:
    refuse_unknown(table, LIMITS | {"key", "sha256"}, where)
    if ("key" in table) == ("sha256" in table):
        raise ConfigError(f"{where} needs one of key and sha256")
    text = table.get("key", table.get("sha256"))
    if "key" in table and isinstance(text, str):
        return checked_key(text, where)
    if not isinstance(text, str) or not re.fullmatch("[0-9a-fA-F]{64}", text):
        raise ConfigError(f"{where}: a key is a text, and its sha256 one of 64 hexadecimal digits")
    return bytes.fromhex(text)


def parse_limits(table: Mapping[str, Any], where: str) -> Limits:
    given = {name: table[name] for name in LIMITS & table.keys()}
    for name, value in given.items():
        kinds = (int, float) if name == "audio_seconds_per_minute" else (int,)
        if type(value) not in kinds or not 1 <= value <= 1_000_000:
            raise ConfigError(f"{where}.{name}={value!r}; allowed: numbers from 1 to 1000000")
    return Limits(**given)


class Keys:
    """The keys that are good now. Without a file and a variable there are none: all is open.

    text: of OMNISPEECH_API_KEY. Raises ConfigError for what cannot be used at the start; a file
    that becomes wrong later, or loses all its keys without an empty [keys], leaves them as they
    were.
    """

    def __init__(self, path: Path | None, text: str = "", clock: Clock = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._of_environment = environment_keys(text)
        self._accounts: dict[bytes, Account] = {}
        self._stamp = stamp(path) if path else None
        self._looked_s = clock()
        self._take(read_key_file(path) if path else KeyFile())
        if path and not self._accounts:
            raise ConfigError(f"{path} has no key in it; add one: omnispeech key NAME >> {path}")
        self.needed = bool(self._accounts)  # stays so when the last one is taken away
        self._warn()

    def find(self, key: str) -> Account | None:
        """Takes the same time whichever key it is, and however much of it is right."""
        self._refresh()
        asked, found = digest(key), None
        for known, account in self._accounts.items():
            if hmac.compare_digest(asked, known):
                found = account
        return found

    @property
    def metrics_are_open(self) -> bool:
        self._refresh()
        return self._open_metrics

    def _refresh(self) -> None:
        now_s = self._clock()
        if self._path is None or now_s - self._looked_s < LOOK_S:
            return
        self._looked_s = now_s
        if (now := stamp(self._path)) == self._stamp:
            return
        self._stamp = now
        try:
            self._take(self._not_lost(read_key_file(self._path), self._path))
        except ConfigError as exc:
            logger.error("the API keys stay as they were: %s", exc)
            return
        logger.info("%s was read again; API keys: %d", self._path, len(self._accounts))
        self._warn()

    def _not_lost(self, file: KeyFile, path: Path) -> KeyFile:
        """Raises ConfigError for one that had keys and says nothing of them now: it is being
        written, or was overwritten."""
        if not file.says_keys and self._accounts.keys() - self._of_environment.keys():
            raise ConfigError(
                f"{path} has no key in it any more; an empty table [keys] takes the last one away"
            )
        return file

    def _take(self, file: KeyFile) -> None:
        """A key that stays keeps what was used of its limits."""
        self._open_metrics = file.open_metrics
        accounts = {}
        for one, (name, limits) in (self._of_environment | file.limits).items():
            account = self._accounts.get(one)
            if account is None or account.name != name:
                account = Account(name, limits, self._clock, self._refresh)
            account.set_limits(limits)
            accounts[one] = account
        for account in self._accounts.values():
            account.revoked = account not in accounts.values()
        self._accounts = accounts

    def _warn(self) -> None:
        if self._path and self._path.stat().st_mode & OTHERS_MAY:
            logger.warning(
                "%s may be read by other users of this machine; run: chmod 600 %s",
                self._path,
                self._path,
            )


def stamp(path: Path) -> Stamp | None:
    """Changes when the file does; None: it is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
