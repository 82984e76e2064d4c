"""What stands for `docker` in the tests of build_and_run.sh: keeps containers in a directory.

Called as a program: FAKE_DOCKER names the directory. Files there say how things go: `info` what the
daemon says, `no-daemon` that it does not answer, `build-fails`, `create-fails`, `start-fails` of
what never ran, `started-meanwhile` by another call while the LLM is quantized, `gone` is a
container that was there, `dies` with the exit status of a server, `quantizer-fails` with the status
in it. Every call is a line of `calls`.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

RUNTIMES = '{"io.containerd.runc.v2":{},"nvidia":{}} [name=seccomp]'
NAME = "opens2s-server"
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


def port(arguments: list[str]) -> int:
    state = container(arguments[1])
    return told(state.get("published") if state.get("running") == "true" else None)


def inspect(arguments: list[str]) -> int:
    state = container(arguments[-1])
    if not state or (STATE / "gone").exists():
        return 1
    if "RestartCount" in arguments[arguments.index("--format") + 1]:
        return told(f"{state['running']} {state['restarts']} {state['status']}")
    return told(state["running"])


def stop(arguments: list[str]) -> int:
    state = container(arguments[1])
    pid = state.pop("pid", None)
    if isinstance(pid, int):
        os.kill(pid, signal.SIGKILL)
    keep(arguments[1], {**state, "running": "false"})
    return 0


def rm(arguments: list[str]) -> int:
    status = 0
    for name in [word for word in arguments[1:] if word != "--force"]:
        if container(name).get("running", "true") == "true":  # or there is none
            status = 1
        else:
            path(name).unlink()
    return status


def rename(arguments: list[str]) -> int:
    _, old, new = arguments
    if not path(old).exists() or path(new).exists():
        return 1
    path(old).rename(path(new))
    return 0


def logs(arguments: list[str]) -> int:
    return told("the last words" if "--tail" in arguments else "loading")


def run(_: list[str]) -> int:
    if (STATE / "started-meanwhile").exists():
        keep(NAME, {"running": "true", "restarts": 0, "status": 0})
    told = STATE / "quantizer-fails"
    return int(told.read_text() or 1) if told.exists() else 0


def exec_(arguments: list[str]) -> int:
    """`answers` of the image: here it finds that the server is ready when it is asked again."""
    asked = STATE / "asked"
    if asked.exists():
        return 0
    asked.touch()
    return 1


def create(arguments: list[str]) -> int:
    name = arguments[arguments.index("--name") + 1]
    if (STATE / "create-fails").exists() or path(name).exists():
        sys.stderr.write("docker: invalid restart policy\n")
        return 125
    published = arguments[arguments.index("--publish") + 1].removesuffix(":8000")
    keep(name, {"running": "false", "restarts": 0, "status": 0, "published": published})
    return 0


def start(arguments: list[str]) -> int:
    state = container(arguments[1])
    if (STATE / "start-fails").exists() and "started" not in state:
        sys.stderr.write("docker: cannot assign requested address\n")
        return 1
    state |= {"running": "true", "started": True}
    if (status := STATE / "dies").exists():
        keep(arguments[1], {**state, "restarts": 1, "status": int(status.read_text())})
        return 0
    server = subprocess.Popen(
        [sys.executable, __file__, "server", str(state["published"]).rsplit(":", 1)[1]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert server.stdout is not None
    server.stdout.readline()  # it listens
    keep(arguments[1], {**state, "pid": server.pid})
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


def path(name: str) -> Path:
    return STATE / f"container-{name}"


def container(name: str) -> dict[str, object]:
    """Empty: there is none."""
    return json.loads(path(name).read_text()) if path(name).exists() else {}


def keep(name: str, state: dict[str, object]) -> None:
    path(name).write_text(json.dumps(state))


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
    "rename": rename,
    "logs": logs,
    "run": run,
    "create": create,
    "exec": exec_,
    "start": start,
}

if __name__ == "__main__":
    sys.exit(serve(int(sys.argv[2])) if sys.argv[1] == "server" else main(sys.argv[1:]))
