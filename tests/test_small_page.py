"""The page with the small model: somebody asks aloud, and reads and hears the answer."""

from pathlib import Path

import numpy as np
import soundfile
from fake_engine import serving
from page_browser import browsers_hearing, needs_browser
from small_models import ANSWERS, heard, small_worker, spoken, words
from test_page import needs_vad

MICROPHONE_HZ = 16_000
ANSWERING_S = 8.0  # of silence behind the question, before Chromium plays it again


def write_microphone(path: Path) -> Path:
    before, after = (np.zeros(int(s * MICROPHONE_HZ)) for s in (0.5, ANSWERING_S))
    samples = np.concatenate([before, spoken("sum"), after])
    soundfile.write(path, samples, MICROPHONE_HZ, subtype="PCM_16")
    return path


@needs_browser
@needs_vad
def test_a_question_asked_hands_free_is_answered_on_the_page(tmp_path: Path) -> None:
    microphone = write_microphone(tmp_path / "microphone.wav")
    with (
        small_worker() as worker,
        serving(worker) as url,
        browsers_hearing(microphone) as browsers,
        browsers.visiting(url) as visit,
    ):
        visit.start("hands-free")
        visit.until("response.done")
        visit.page.get_by_text(ANSWERS["sum"]).wait_for()
        assert visit.text(".entry.assistant .words") == ANSWERS["sum"]
        visit.waits_for("hearing")
        with visit.page.expect_download() as sound:
            visit.page.locator("#save-sound").click()
        samples, rate_hz = soundfile.read(sound.value.path(), dtype="int16")
        assert heard(samples[:, 1], rate_hz) == words(ANSWERS["sum"])
