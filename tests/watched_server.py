"""Serves as `omnispeech` does and writes down what it opens for writing and where it connects to.

python watched_server.py RECORD FLAGS...: one line of JSON for each such event. The machine has
another name here, and no network but loopback.
"""

import json
import os
import socket
import sys
from typing import Any

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.utime")
CHANGES += ("os.truncate", "os.chmod", "shutil.rmtree", "shutil.copyfile", "shutil.move")
NAME = "another-machine"


def main() -> int:
    record = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def tell(event: str, *values: object) -> None:
        os.write(record, f"{json.dumps([event, *map(str, values)])}\n".encode())

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            tell(event, arguments[0])
        elif event in CHANGES:
            tell(event, *arguments)
        elif event == "socket.connect" and not _is_local(arguments[1]):
            tell(event, arguments[1])
            raise OSError("there is no network")
        elif event == "socket.getaddrinfo" and arguments[0] not in ("127.0.0.1", "localhost"):
            tell(event, arguments[0])
            raise OSError("there is no network")

    socket.gethostname = lambda: NAME
    os.uname = lambda: os.uname_result(("Linux", NAME, "1", "1", "x86_64"))
    sys.addaudithook(watch)
    from omnispeech.cli import main

    return main(["serve", *sys.argv[2:]])


def _is_local(address: object) -> bool:
    return isinstance(address, str) or (
        isinstance(address, tuple) and address[0] in ("127.0.0.1", "::1")
    )


if __name__ == "__main__":
    sys.exit(main())
