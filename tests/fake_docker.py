"""What stands for `docker` in the tests of build_and_run.sh: keeps one container in a directory.

Called as a program: FAKE_DOCKER names the directory. Files there say how things go: `info` what the
daemon says, `no-daemon` that it does not answer, `build-fails`, `run-fails`, `name-taken` by a
container of another call, `gone` is a container that was there, `dies` with the exit status of a
server, `quantizer-fails` with the status in it. Every call is a line of `calls`.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

RUNTIMES = '{"io.containerd.runc.v2":{},"nvidia":{}} [name=seccomp]'
STATE = Path(os.environ.get("FAKE_DOCKER", "."))


def main(arguments: list[str]) -> int:
    with (STATE / "calls").open("a") as calls:
        calls.write(json.dumps(arguments) + "\n")
    command = arguments[0] if arguments[0] != "container" else arguments[1]
    return COMMANDS[command](arguments)


def info(_: list[str]) -> int:
    if (reason := STATE / "no-daemon").exists():
        sys.stderr.write(reason.read_text())
        return 1
    told = STATE / "info"
    return say(told.read_text() if told.exists() else RUNTIMES)


def build(_: list[str]) -> int:
    return int((STATE / "build-fails").exists())


def port(_: list[str]) -> int:
    return told(container().get("published"))


def inspect(arguments: list[str]) -> int:
    if not (STATE / "container").exists() or (STATE / "gone").exists():
        return 1
    state = container()
    if "--format" in arguments and "RestartCount" in arguments[arguments.index("--format") + 1]:
        return told(f"{state['running']} {state['restarts']} {state['status']}")
    return told(state["running"])


def stop(_: list[str]) -> int:
    state = container()
    pid = state.pop("pid", None)
    if isinstance(pid, int):
        os.kill(pid, signal.SIGKILL)
    keep({**state, "running": "false"})
    return 0


def rm(arguments: list[str]) -> int:
    if arguments[-1] != "opens2s-server":
        return 1
    if container().get("running") == "true" and "--force" not in arguments:
        sys.stderr.write("cannot remove a running container\n")
        return 1
    (STATE / "container").unlink(missing_ok=True)
    return 0


def logs(arguments: list[str]) -> int:
    return told("the last words" if "--tail" in arguments else "loading")


def run(arguments: list[str]) -> int:
    if "--detach" not in arguments:
        path = STATE / "quantizer-fails"
        return int(path.read_text() or 1) if path.exists() else 0
    if (STATE / "name-taken").exists():
        keep({"running": "true", "restarts": 0, "status": 0})
        sys.stderr.write("docker: the container name is already in use\n")
        return 125
    keep({"running": "false", "restarts": 0, "status": 0})  # Docker makes it before it starts it
    if (STATE / "run-fails").exists():
        sys.stderr.write("docker: port is already allocated\n")
        return 125
    published = arguments[arguments.index("--publish") + 1].removesuffix(":8000")
    state = {"running": "true", "restarts": 0, "status": 0, "published": published}
    if (status := STATE / "dies").exists():
        keep({**state, "restarts": 1, "status": int(status.read_text())})
        return 0
    server = subprocess.Popen(
        [sys.executable, __file__, "server", published.rsplit(":", 1)[1]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert server.stdout is not None
    server.stdout.readline()  # it listens
    keep({**state, "pid": server.pid})
    return 0


def serve(port: int) -> int:
    from http.server import BaseHTTPRequestHandler, HTTPServer  # slow to import

    class Ready(BaseHTTPRequestHandler):
        asked = 0

        def do_GET(self) -> None:
            Ready.asked += 1
            self.send_response(200 if Ready.asked > 1 and self.path == "/ready" else 503)
            self.end_headers()

    server = HTTPServer(("127.0.0.1", port), Ready)
    say("listens")
    server.serve_forever()
    return 0


def container() -> dict[str, object]:
    path = STATE / "container"
    return json.loads(path.read_text()) if path.exists() else {}


def keep(state: dict[str, object]) -> None:
    (STATE / "container").write_text(json.dumps(state))


def told(what: object) -> int:
    """As Docker does: status 1 and nothing said where there is nothing."""
    if what is None:
        return 1
    return say(what)


def say(what: object) -> int:
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()
    return 0


COMMANDS = {
    "info": info,
    "build": build,
    "port": port,
    "inspect": inspect,
    "stop": stop,
    "rm": rm,
    "logs": logs,
    "run": run,
}

if __name__ == "__main__":
    sys.exit(serve(int(sys.argv[2])) if sys.argv[1] == "server" else main(sys.argv[1:]))
