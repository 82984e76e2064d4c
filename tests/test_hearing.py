from dataclasses import replace

import pytest
from realtime_client import Loudness

from omnispeech.audio.formats import PCM_24K
from omnispeech.errors import AudioError
from omnispeech.server.realtime.hearing.hearing import Hearing
from omnispeech.server.realtime.settings.session_settings import SessionSettings

HANDS_FREE = SessionSettings()
MANUAL = replace(HANDS_FREE, turn_detection=None)
SECOND = bytes(48_000)


@pytest.fixture(autouse=True)
def loudness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omnispeech.server.realtime.hearing.hearing.SpeechDetector", Loudness)


async def test_a_buffer_that_was_full_is_no_obstacle_to_the_detection_of_turns() -> None:
    hearing = Hearing(MANUAL, max_audio_s=1.0, speculate_ms=200)
    await hearing.change(MANUAL)
    assert [event async for event in hearing.append(SECOND)] == []
    await hearing.change(HANDS_FREE)
    for piece in PCM_24K.pieces(5 * SECOND, 0.5):
        assert [event async for event in hearing.append(piece)] == []
    assert hearing.clock_ms > 5900


async def test_without_detection_the_buffer_holds_what_one_sound_may_be() -> None:
    hearing = Hearing(MANUAL, max_audio_s=1.0, speculate_ms=200)
    await hearing.change(MANUAL)
    with pytest.raises(AudioError, match="at most 1 s"):
        assert [event async for event in hearing.append(SECOND + bytes(9600))] == []
