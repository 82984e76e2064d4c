"""How likely it is that somebody is speaking, window by window: Silero VAD under ONNX Runtime.

The package silero-vad is only where its model file is found: importing it would import torch and
set torch's number of threads.
"""

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from omnispeech.audio.resample import Samples
from omnispeech.errors import Unsupported

RATE_HZ = 16_000
WINDOW = 512  # samples: 32 ms
WINDOW_MS = WINDOW * 1000 // RATE_HZ
CONTEXT = 64  # samples before a window that the network reads with it
STATE_SHAPE = (2, 1, 128)
INSTALL = "run: pip install onnxruntime silero-vad"


class Probabilities(Protocol):
    """What the detection of turns needs of a voice activity detector."""

    def push(self, samples: Samples) -> list[float]:
        """[N] of the next sound at 16 kHz -> one probability for each window that is now whole"""
        ...

    def reset(self) -> None:
        """What comes next has nothing to do with what came before."""
        ...


class SpeechDetector:
    """The state of one stream of sound; the network is shared by all.

    Raises Unsupported if it is not installed. A window takes about a quarter of a millisecond of
    one core: call `push` outside the event loop.
    """

    def __init__(self) -> None:
        self._network = load_model()
        self._rate = np.array(RATE_HZ, np.int64)
        self.reset()

    def reset(self) -> None:
        self._state = np.zeros(STATE_SHAPE, np.float32)
        self._sound = np.zeros(CONTEXT, np.float32)  # the context, and what is no window yet

    def push(self, samples: Samples) -> list[float]:
        """[N] at 16 kHz -> one probability for each 32 ms; the same for any cutting"""
        self._sound = np.concatenate([self._sound, samples])
        windows = (len(self._sound) - CONTEXT) // WINDOW
        probabilities = [self._probability(index * WINDOW) for index in range(windows)]
        self._sound = self._sound[windows * WINDOW :].copy()
        return probabilities

    def _probability(self, start: int) -> float:
        sound = self._sound[None, start : start + CONTEXT + WINDOW]  # [1, 576]
        inputs = {"input": sound, "state": self._state, "sr": self._rate}
        probability, self._state = self._network.run(None, inputs)  # [1, 1], [2, 1, 128]
        return float(probability[0, 0])


@lru_cache(maxsize=1)
def load_model() -> Any:
    """The onnxruntime.InferenceSession of all streams: it keeps no state and may run in many
    threads at once, each run on the one that calls. Raises Unsupported."""
    try:
        import onnxruntime
    except ImportError as exc:
        raise Unsupported(
            f"turn detection needs onnxruntime, which is not installed; {INSTALL}"
        ) from exc
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    for pool in ("intra_op", "inter_op"):
        options.add_session_config_entry(f"session.{pool}.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        str(_model_file()), options, providers=["CPUExecutionProvider"]
    )


def _model_file() -> Path:
    package = find_spec("silero_vad")
    if package is None or package.origin is None:
        raise Unsupported(f"turn detection needs silero-vad, which is not installed; {INSTALL}")
    file = Path(package.origin).parent / "data" / "silero_vad.onnx"
    if not file.is_file():
        raise Unsupported(
            f"turn detection needs {file}, which is missing; "
            "run: pip install --force-reinstall --no-deps silero-vad"
        )
    return file
