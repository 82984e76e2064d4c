import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# two cores in CI, several workers: torch's own threads would only fight
os.environ.setdefault("OMP_NUM_THREADS", "1")

# a busy machine is no defect; CI looks at the same examples every time
settings.register_profile(
    "omnispeech",
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("omnispeech")


@pytest.fixture(autouse=True)
def _log_levels_are_put_back() -> Iterator[None]:
    """A command that a test calls sets them; the next test may look for a silent log."""
    loggers = [logging.getLogger(name) for name in ("", "omnispeech", "httpx", "httpx2")]
    before = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


# What the tests of the quantizing commands share; the product is imported when they ask for it.


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from command_models import write_originals

    place = tmp_path_factory.mktemp("originals")
    write_originals(place)
    return place


@pytest.fixture
def model(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "text", tmp_path / "MyModel"))


@pytest.fixture
def models(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "models", tmp_path / "models"))


@pytest.fixture
def text(originals: Path) -> list[str]:
    return ["--calib-text", str(originals / "calibration.txt")]


@pytest.fixture
def no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    from command_models import VARIABLES

    from omnispeech.quantize_cli.commands import GPUS

    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name in GPUS:
        monkeypatch.setenv(name, "0")  # put back afterwards


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the environment, for the server."""
    from omnispeech.config_reader import PREFIX, setting_names

    for name in setting_names():
        monkeypatch.delenv(PREFIX + name.upper(), raising=False)
