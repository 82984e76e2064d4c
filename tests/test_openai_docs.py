import re
import subprocess
import sys
from pathlib import Path

import soundfile
from fake_engine import FakeEngine, serving, sound_file, tone

TEXT = (Path(__file__).parent.parent / "docs/openai.md").read_text(encoding="utf-8")


def test_the_example_in_python_runs_as_it_stands(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "examples").mkdir()
    for name in ("question.wav", "follow-up.wav"):
        (tmp_path / "examples" / name).write_bytes(sound_file(tone(0.5)))
    with serving(FakeEngine()) as url:
        code = code.replace("http://127.0.0.1:8000", url)
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
        )
    assert (run.returncode, run.stdout) == (0, "Hello\nHello"), run.stderr
    for name in ("answer.wav", "said.mp3"):
        assert soundfile.info(tmp_path / name).samplerate == 24_000
    assert (tmp_path / "answer.pcm").stat().st_size > 1000
