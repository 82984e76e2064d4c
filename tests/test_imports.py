"""Which part may import which: down only, never up, never sideways."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "omnispeech"
FILES = sorted(PACKAGE.rglob("*.py"))

BASE = {"errors", "config"}
ANYTHING = {"*"}
MAY_IMPORT = {
    "__init__": set(),
    "errors": set(),
    "config": {"errors"},
    "config_reader": BASE,
    "json_file": {"errors"},
    "phases": set(),
    "logs": set(),
    "chat_template": BASE | {"json_file"},
    "prompt": BASE | {"chat_template", "json_file"},
    "audio": BASE,
    "layers": BASE,
    "models": BASE | {"layers"},
    "checkpoint": BASE | {"json_file", "layers", "models", "phases", "prompt"},
    "download": BASE | {"checkpoint", "config_reader", "json_file"},
    "small": BASE | {"checkpoint", "download"},
    "tiny": BASE | {"checkpoint", "layers", "models", "prompt"},
    "calibration": BASE | {"audio", "chat_template", "checkpoint", "json_file"},
    "quantization": BASE | {"calibration", "checkpoint", "json_file", "layers", "models"},
    "engine": BASE | {"audio", "layers", "models", "phases", "prompt"},
    "server": BASE | {"audio", "engine.events", "logs", "phases"},
    "client": BASE | {"audio"},
    "terminal": BASE | {"audio", "client"},
    "assembly": ANYTHING,
    "caches": set(),
    "deployment": ANYTHING,
    "speech_calibration": ANYTHING,
    "verification": ANYTHING,
    "parity": ANYTHING,
    "bridge_training": BASE
    | {"assembly", "audio", "calibration", "checkpoint", "json_file", "models"}
    | {"quantization", "speech_calibration"},
    "quantize_cli": ANYTHING,
    "commands": ANYTHING,
    "service": ANYTHING,
    "startup": ANYTHING,
    "once": {"checkpoint.whole_file", "client"},
    "ray_deployment": ANYTHING,
    "cli": ANYTHING,
}
TOP = {part for part, allowed in MAY_IMPORT.items() if allowed is ANYTHING}
NO_TORCH = (
    "errors",
    "config",
    "config_reader",
    "json_file",
    "phases",
    "caches",
    "chat_template",
    "prompt",
    "server",
    "client",
    "terminal",
    "cli",
    "commands",
    "download",
    "logs",
    "small",
    "startup",
    "once",
    "__init__",
)
NO_TORCH_FILES = {"engine/events.py", "engine/interleave.py", "engine/playback.py"}
NO_TORCH_FILES |= {"engine/scheduler.py", "engine/session.py", "audio/io.py", "audio/resample.py"}
NO_TORCH_FILES |= {"engine/reply_text.py", "engine/tool_calls.py"}
NO_TORCH_FILES |= {"audio/formats.py", "audio/g711.py", "audio/polyphase.py", "audio/vad.py"}

# parts of server/realtime: each may import those before it
OF_A_TALK = ("protocol", "settings", "items", "hearing", "outbox", "conversation", "replies")
OF_A_TALK += ("idle_timer", "transcripts", "turns", "commands", "talk", "connection", "talks")
OF_A_TALK += ("route",)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Modules that a file needs to run: what stands under TYPE_CHECKING is not among them."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        waiting.extend(ast.iter_child_nodes(node))


def wrong_imports(path: Path) -> list[str]:
    part = part_of(path)
    allowed = MAY_IMPORT[part] | {part}
    own = [m.removeprefix("omnispeech.") for m in imported(path) if m.startswith("omnispeech.")]
    if "*" in allowed:
        return [m for m in own if part != "cli" and m.split(".")[0] == "cli"]
    return [
        m
        for m in own
        if m.split(".")[0] not in allowed and not any(f"{m}.".startswith(f"{a}.") for a in allowed)
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downwards(path: Path) -> None:
    wrong = wrong_imports(path)
    assert not wrong, f"{part_of(path)} may import {sorted(MAY_IMPORT[part_of(path)])}, not {wrong}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_decisions_and_the_wire_know_no_torch(path: Path) -> None:
    name = path.relative_to(PACKAGE).as_posix()
    if part_of(path) in NO_TORCH or name in NO_TORCH_FILES:
        assert not [m for m in imported(path) if m.split(".")[0] == "torch"]


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("server/app.py", "from omnispeech.engine.worker import Worker"),
        ("server/app.py", "import omnispeech.engine"),
        ("models/qwen3.py", "from omnispeech.engine.events import Done"),
        ("checkpoint/files.py", "from omnispeech.audio.io import decode_audio"),
        ("checkpoint/files.py", "from omnispeech.tiny.weights import random_weights"),
        ("engine/runner.py", "from omnispeech.checkpoint.files import assign_weights"),
        ("config.py", "from omnispeech.prompt import PromptBuilder"),
    ],
)
def test_an_arrow_turned_round_is_found(
    path: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / path
    copy.parent.mkdir(exist_ok=True)
    copy.write_text(f"{line}\n{(PACKAGE / path).read_text(encoding='utf-8')}", encoding="utf-8")
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    assert wrong_imports(copy)


def test_the_parts_of_a_live_conversation_build_on_those_before_them() -> None:
    folder, found = PACKAGE / "server" / "realtime", set()
    for path in sorted(folder.rglob("*.py")):
        part = path.relative_to(folder).parts[0].removesuffix(".py")
        prefix = "omnispeech.server.realtime."
        used = {m.removeprefix(prefix).split(".")[0] for m in imported(path) if prefix in m}
        if part != "__init__":
            found.add(part)
            assert used <= {*OF_A_TALK[: OF_A_TALK.index(part) + 1]}, path
    assert found == {*OF_A_TALK}


def test_every_part_is_in_the_table() -> None:
    assert {part_of(path) for path in FILES} == set(MAY_IMPORT)


def test_importing_the_package_imports_nothing_else() -> None:
    code = "import omnispeech, sys; sys.exit(any(m in sys.modules for m in ('torch', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
