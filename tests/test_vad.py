import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from omnispeech.audio import vad
from omnispeech.audio.vad import SpeechDetector, load_model
from omnispeech.errors import Unsupported

ROOT = Path(__file__).parent.parent
QUESTION, _ = soundfile.read(ROOT / "examples/question.wav", dtype="float32")


@pytest.fixture
def nothing_loaded() -> object:
    load_model.cache_clear()
    yield
    load_model.cache_clear()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_it_says_what_the_authors_own_program_says() -> None:
    import torch

    threads = torch.get_num_threads()
    from silero_vad import load_silero_vad  # sets the number of threads

    with torch.no_grad():
        network = load_silero_vad()  # TorchScript: another program for the same weights
        whole = QUESTION[: len(QUESTION) // 512 * 512]
        expected = [network(torch.from_numpy(w), 16_000).item() for w in whole.reshape(-1, 512)]
    torch.set_num_threads(threads)
    np.testing.assert_allclose(SpeechDetector().push(QUESTION), expected, atol=1e-4)


def test_speech_is_likely_where_somebody_speaks() -> None:
    probabilities = np.array(SpeechDetector().push(QUESTION))
    assert np.median(probabilities) > 0.95
    assert max(SpeechDetector().push(np.zeros(32_000, np.float32))) < 0.1


@settings(max_examples=10)
@given(cuts=st.lists(st.integers(0, 16_000), max_size=12))
def test_any_cutting_gives_the_same(cuts: list[int]) -> None:
    sound = QUESTION[:16_000]
    detector = SpeechDetector()
    cut = [p for piece in np.split(sound, sorted(cuts)) for p in detector.push(piece)]
    assert cut == SpeechDetector().push(sound)


def test_conversations_share_the_network_and_no_state() -> None:
    alone = SpeechDetector().push(QUESTION)
    detectors = [SpeechDetector() for _ in range(8)]
    with ThreadPoolExecutor(4) as threads:
        assert all(said == alone for said in threads.map(lambda d: d.push(QUESTION), detectors))


def test_reset_begins_anew() -> None:
    detector = SpeechDetector()
    first = detector.push(QUESTION)
    detector.reset()
    assert detector.push(QUESTION) == first


def test_twenty_conversations_cost_less_than_half_a_core() -> None:
    detector = SpeechDetector()
    begin = time.process_time()
    windows = len(detector.push(np.tile(QUESTION, 10)))
    per_window_s = (time.process_time() - begin) / windows
    assert 20 * per_window_s / 0.032 < 0.5


def test_it_needs_no_torch() -> None:
    code = (
        "import numpy, sys; from omnispeech.audio.vad import SpeechDetector; "
        "SpeechDetector().push(numpy.zeros(512, numpy.float32)); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_without_onnxruntime_the_error_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch, nothing_loaded: object
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(Unsupported, match="onnxruntime.*pip install onnxruntime silero-vad"):
        SpeechDetector()


def test_without_silero_vad_the_error_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch, nothing_loaded: object
) -> None:
    monkeypatch.setattr(vad, "find_spec", lambda name: None)
    with pytest.raises(Unsupported, match="silero-vad.*pip install onnxruntime silero-vad"):
        SpeechDetector()


def test_a_package_without_its_model_is_named(
    monkeypatch: pytest.MonkeyPatch, nothing_loaded: object
) -> None:
    import json as another

    monkeypatch.setattr(vad, "find_spec", lambda name: another.__spec__)
    with pytest.raises(Unsupported, match=r"silero_vad\.onnx, which is missing"):
        SpeechDetector()
