from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from omnispeech.audio.vad import WINDOW, SpeechDetector
from omnispeech.server.realtime.hearing.turn_detection import (
    Paused,
    Resumed,
    SpeechStarted,
    SpeechStopped,
    TurnDetector,
    TurnEvent,
)
from omnispeech.server.realtime.settings.turn_settings import ServerVAD

ROOT = Path(__file__).parent.parent
SPEECH = {
    "question": soundfile.read(ROOT / "examples/question.wav", dtype="float32")[0][:24_330],
    "yes": soundfile.read(ROOT / "tests/golden/speech/yes.flac", dtype="float32")[0],
    "german": soundfile.read(ROOT / "tests/golden/speech/german.flac", dtype="float32")[0],
}
NO_PADDING = ServerVAD(prefix_padding_ms=0)


class Scripted:
    """The first sample of each window is its probability."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._sound = np.zeros(0, np.float32)

    def push(self, samples: np.ndarray) -> list[float]:
        self._sound = np.concatenate([self._sound, samples])
        windows = len(self._sound) // WINDOW
        said = self._sound[: windows * WINDOW : WINDOW].tolist()
        self._sound = self._sound[windows * WINDOW :]
        return said


def scripted(vad: ServerVAD = NO_PADDING, speculate_ms: int = 200, **place: int) -> TurnDetector:
    return TurnDetector(vad, speculate_ms, Scripted(), **place)


def windows(*parts: tuple[float, int]) -> np.ndarray:
    """(probability, how many windows of 32 ms) one after the other"""
    probabilities = [p for p, count in parts for _ in range(count)]
    return np.repeat(np.array(probabilities, np.float32), WINDOW)


def silence(ms: int, level: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(ms)
    return (level * rng.standard_normal(ms * 16)).astype(np.float32)


def heard(
    sound: np.ndarray, vad: ServerVAD = NO_PADDING, speculate_ms: int = 200
) -> list[TurnEvent]:
    return TurnDetector(vad, speculate_ms, SpeechDetector()).push(sound)


def of_kind(kind: type, events: Sequence[TurnEvent]) -> list[TurnEvent]:
    return [event for event in events if isinstance(event, kind)]


# What real speech gives. Measured on these clips: a turn begins up to 39 ms after the truth and is
# told 68 to 103 ms after it; the end of speech is found 0 to 171 ms late, later in noise.


@pytest.mark.parametrize("clip", SPEECH)
@pytest.mark.parametrize("level", [0.0, 0.001, 0.01])
@pytest.mark.parametrize("before_ms", [700, 1337])
def test_speech_is_found_where_it_is(clip: str, level: float, before_ms: int) -> None:
    sound = np.concatenate([silence(before_ms), SPEECH[clip], silence(1500)])
    sound += silence(len(sound) // 16 + 1, level)[: len(sound)]
    end_ms = before_ms + len(SPEECH[clip]) / 16
    started, paused, stopped = heard(sound)
    assert -32 <= started.start_ms - before_ms <= 64
    assert 0 <= stopped.end_ms - 200 - end_ms <= 192
    assert paused == Paused(stopped.start_ms, stopped.end_ms)


@pytest.mark.parametrize(("pause_ms", "turns", "resumed"), [(150, 1, 0), (300, 1, 1), (900, 2, 0)])
def test_a_short_pause_ends_no_turn(pause_ms: int, turns: int, resumed: int) -> None:
    parts = [silence(700), SPEECH["question"], silence(pause_ms), SPEECH["german"], silence(1000)]
    events = heard(np.concatenate(parts))
    assert len(of_kind(SpeechStarted, events)) == len(of_kind(SpeechStopped, events)) == turns
    assert len(of_kind(Resumed, events)) == resumed


def test_a_longer_silence_setting_waits_longer() -> None:
    sound = np.concatenate([SPEECH["question"], silence(900), SPEECH["german"], silence(1500)])
    patient = ServerVAD(silence_duration_ms=1000)
    assert len(of_kind(SpeechStopped, heard(sound, patient))) == 1


TIMES = np.arange(4 * 16_000) / 16_000
NOTES = (262, 294, 330, 349, 392, 440, 494, 523)
SOUNDS = {
    "silence": silence(4000),
    "noise": silence(4000, 0.2),
    "hum": 0.3 * np.sin(2 * np.pi * 50 * TIMES) + 0.1 * np.sin(2 * np.pi * 150 * TIMES),
    "tone": 0.3 * np.sin(2 * np.pi * 440 * TIMES),
    "chord": sum(0.1 * np.sin(2 * np.pi * f * TIMES) * TIMES.clip(0, 1) for f in (220, 277, 330)),
    "melody": np.concatenate(
        [0.3 * np.sin(2 * np.pi * f * TIMES[:8000]) * np.exp(-8 * TIMES[:8000]) for f in NOTES]
    ),
    "clicks": 0.9 * (np.random.default_rng(0).random(4 * 16_000) < 2e-4),
}


@pytest.mark.parametrize("name", SOUNDS)
def test_what_is_no_speech_begins_no_turn(name: str) -> None:
    assert heard(SOUNDS[name].astype(np.float32)) == []


@settings(max_examples=10)
@given(cuts=st.lists(st.integers(0, 60_000), max_size=10).map(sorted))
def test_the_network_hears_the_same_turns_for_any_cutting(cuts: list[int]) -> None:
    sound = np.concatenate([silence(300), SPEECH["yes"], silence(700), SPEECH["yes"], silence(700)])
    detector = TurnDetector(NO_PADDING, 200, SpeechDetector())
    cut = [event for piece in np.split(sound, cuts) for event in detector.push(piece)]
    assert cut == heard(sound) and len(of_kind(SpeechStopped, cut)) == 2


# What the rules give, with probabilities that are written down.


def test_the_times_of_a_turn() -> None:
    events = scripted(ServerVAD(prefix_padding_ms=300)).push(
        windows((0.0, 20), (0.9, 10), (0.0, 20))
    )
    assert events == [SpeechStarted(340), Paused(340, 1160), SpeechStopped(340, 1160)]


def test_the_padding_reaches_neither_before_the_begin_nor_into_the_turn_before() -> None:
    vad = ServerVAD(prefix_padding_ms=5000)
    events = scripted(vad).push(windows((0.9, 5), (0.0, 20), (0.9, 5), (0.0, 20)))
    assert of_kind(SpeechStarted, events) == [SpeechStarted(0), SpeechStarted(360)]
    assert of_kind(SpeechStopped, events) == [SpeechStopped(0, 360), SpeechStopped(360, 1160)]


def test_events_come_with_the_window_that_makes_them_certain() -> None:
    detector = scripted()
    told = [
        (index, type(event))
        for index in range(40)
        for event in detector.push(windows((0.9 if index < 10 else 0.0, 1)))
    ]
    # 2 windows of speech; 200 ms are over with the 7th of silence, 500 ms with the 16th
    assert told == [(1, SpeechStarted), (16, Paused), (25, SpeechStopped)]


def test_a_click_begins_no_turn() -> None:
    assert scripted().push(windows((0.0, 5), (0.99, 1), (0.0, 5), (0.99, 1), (0.0, 5))) == []


def test_between_the_thresholds_it_goes_on_with_what_was() -> None:
    detector = scripted()
    assert detector.push(windows((0.4, 50))) == []
    assert detector.push(windows((0.9, 2), (0.4, 50))) == [SpeechStarted(1600)]
    assert of_kind(SpeechStopped, detector.push(windows((0.3, 1), (0.4, 15)))) == [
        SpeechStopped(1600, 3464)
    ]


def test_speech_after_a_pause_takes_the_pause_back() -> None:
    events = scripted().push(windows((0.9, 5), (0.0, 10), (0.9, 5), (0.0, 20)))
    assert events == [
        SpeechStarted(0),
        Paused(0, 360),
        Resumed(),
        Paused(0, 840),
        SpeechStopped(0, 840),
    ]


@pytest.mark.parametrize("speculate_ms", [0, 500, 900])
def test_without_speculation_a_turn_ends_and_does_not_pause(speculate_ms: int) -> None:
    events = scripted(speculate_ms=speculate_ms).push(windows((0.9, 5), (0.0, 30)))
    assert events == [SpeechStarted(0), SpeechStopped(0, 660)]


@pytest.mark.parametrize(("threshold", "stops"), [(0.0, 0), (0.05, 1), (0.5, 1)])
def test_low_thresholds(threshold: float, stops: int) -> None:
    vad = ServerVAD(threshold=threshold)
    events = scripted(vad).push(windows((0.9, 5), (0.0, 30)))
    assert len(of_kind(SpeechStarted, events)) == 1
    assert len(of_kind(SpeechStopped, events)) == stops


def test_with_a_threshold_of_one_only_certainty_is_speech() -> None:
    assert scripted(ServerVAD(threshold=1.0)).push(windows((0.99, 50))) == []


def test_speech_without_end_is_cut_and_nothing_of_it_is_lost() -> None:
    events = scripted(longest_ms=1000).push(windows((0.9, 80)))
    stops = of_kind(SpeechStopped, events)
    assert stops == [SpeechStopped(0, 992), SpeechStopped(992, 1984)]
    assert events[2] == SpeechStarted(992) and len(of_kind(SpeechStarted, events)) == 3


def test_a_turn_that_hesitates_to_begin_keeps_no_more_than_the_longest() -> None:
    detector = scripted(longest_ms=1000)
    assert detector.push(windows((0.9, 1), (0.4, 100))) == []
    assert detector.needed_from_ms == 102 * 32 - 1000
    assert detector.push(windows((0.9, 2))) == [SpeechStarted(2296), SpeechStopped(2296, 3296)]


def test_the_clock_begins_where_it_was_switched_on() -> None:
    events = scripted(ServerVAD(), start_ms=10_000).push(windows((0.9, 5), (0.0, 20)))
    assert (events[0], events[-1]) == (SpeechStarted(10_000), SpeechStopped(10_000, 10_360))


def test_reset_forgets_the_open_turn_and_goes_on_with_the_clock() -> None:
    detector = scripted(ServerVAD())
    detector.push(windows((0.9, 5))[:-100])
    detector.reset(5000)
    assert not detector.speaking
    assert detector.push(windows((0.0, 20), (0.9, 2))) == [SpeechStarted(5340)]


def test_other_settings_hold_from_the_next_window_on() -> None:
    detector = scripted()
    detector.push(windows((0.9, 5), (0.0, 10)))
    detector.change(ServerVAD(silence_duration_ms=2000))
    assert detector.push(windows((0.0, 10))) == [] and detector.speaking


def test_what_was_told_at_a_pause_holds_whatever_settings_change() -> None:
    detector = scripted()
    (_, paused) = detector.push(windows((0.9, 5), (0.0, 10)))
    detector.change(ServerVAD(silence_duration_ms=150))
    assert paused == Paused(0, 360)
    assert detector.push(windows((0.0, 1))) == [SpeechStopped(0, 360)]


PROBABILITIES = st.lists(st.sampled_from([0.0, 0.3, 0.4, 0.6, 0.9]), max_size=150)


@given(
    probabilities=PROBABILITIES,
    cuts=st.lists(st.integers(0, 80_000), max_size=8).map(sorted),
    padding_ms=st.integers(0, 600),
    silence_ms=st.integers(100, 700),
    speculate_ms=st.integers(0, 700),
)
def test_turns_are_in_order_and_the_same_for_any_cutting(
    probabilities: list[float], cuts: list[int], padding_ms: int, silence_ms: int, speculate_ms: int
) -> None:
    vad = ServerVAD(prefix_padding_ms=padding_ms, silence_duration_ms=silence_ms)
    sound = windows(*((p, 1) for p in probabilities))
    whole = scripted(vad, speculate_ms, longest_ms=2000).push(sound)
    detector = scripted(vad, speculate_ms, longest_ms=2000)
    cut: list[TurnEvent] = []
    for piece in np.split(sound, cuts):
        needed_ms = detector.needed_from_ms
        events = detector.push(piece)
        assert all(e.start_ms >= needed_ms for e in events if not isinstance(e, Resumed))
        cut += events
    assert cut == whole
    assert_order(whole)


def assert_order(events: list[TurnEvent]) -> None:
    """(SpeechStarted (Paused Resumed)* Paused? SpeechStopped)*, and what was Paused is committed"""
    start, end, paused = None, 0, None
    for event in events:
        match event:
            case SpeechStarted(start_ms):
                assert start is None and start_ms >= end
                start = start_ms
            case Paused(start_ms, end_ms):
                assert paused is None and (start, True) == (start_ms, end_ms > start_ms)
                paused = event
            case Resumed():
                assert paused is not None
                paused = None
            case SpeechStopped(start_ms, end_ms):
                assert start == start_ms < end_ms <= start_ms + 2000
                assert paused is None or paused == Paused(start_ms, end_ms)
                start, end, paused = None, end_ms, None
