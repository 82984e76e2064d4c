"""`omnispeech scale`, up to the point where Ray takes over."""

import subprocess
import sys
from pathlib import Path

import pytest

from omnispeech.config import ScaleConfig
from omnispeech.config_reader import build_config, read_config_file
from omnispeech.errors import ConfigError

ROOT = Path(__file__).parent.parent


def test_without_ray_the_line_that_installs_it_is_told() -> None:
    code = (
        "import sys; sys.modules['ray'] = None; from omnispeech.cli import main; "
        "sys.exit(main(['scale', '--device', 'cpu']))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert "pip install 'ray[serve]>=2.60'" in run.stderr


def test_one_file_holds_the_settings_of_both_commands(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("max_conversations = 4\nmin_replicas = 3\n", encoding="utf-8")
    values = read_config_file(file)
    assert build_config(ScaleConfig, {}, values, {}).min_replicas == 3
    assert build_config(ScaleConfig, {"min_replicas": 5}, values, {}).min_replicas == 5


def test_fewer_replicas_at_most_than_at_least_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_replicas=1 is less than min_replicas=2"):
        ScaleConfig(min_replicas=2, max_replicas=1)
