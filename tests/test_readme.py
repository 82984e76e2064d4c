"""What the README promises exists."""

import re
import subprocess
from pathlib import Path

import httpx
import pytest
from fake_engine import FakeEngine

from omnispeech.config import ServerConfig
from omnispeech.server.app import create_app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINKED = [
    "README.md",
    "CONTRIBUTING.md",
    *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md")),
]


def test_a_command_stands_before_line_25() -> None:
    assert "./build_and_run.sh --local" in README.splitlines()[:25]


@pytest.mark.parametrize("name", LINKED)
def test_every_relative_link_leads_somewhere(name: str) -> None:
    page = ROOT / name
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]


def test_every_path_of_the_map_exists() -> None:
    rows = README.split("## Map")[1].split("\n\n[docs")[0]
    names = re.findall(r"`([\w./]+)`", rows)
    found = [n for n in names if (ROOT / n).exists() or (ROOT / "omnispeech" / n).exists()]
    assert len(names) > 10
    assert found == names


async def test_every_route_is_served() -> None:
    routes = re.findall(r"`(GET|POST) (/[\w/]+)`", README)
    assert len(routes) >= 6
    app = create_app(FakeEngine(), ServerConfig())
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test"
    ) as client:
        for method, path in routes:
            assert (await client.request(method, path)).status_code not in (404, 405), path


def test_every_option_of_the_set_up_script_is_in_its_help() -> None:
    shown = subprocess.run(
        ["bash", "build_and_run.sh", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    used = set(re.findall(r"(--\w+)", " ".join(re.findall(r"`[^`]*build_and_run[^`]*`", README))))
    assert used <= set(re.findall(r"--\w+", shown))


def test_an_unknown_option_of_the_set_up_script_is_refused_by_name() -> None:
    ran = subprocess.run(
        ["bash", "build_and_run.sh", "--lokal"], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode != 0
    assert "--lokal" in ran.stderr
