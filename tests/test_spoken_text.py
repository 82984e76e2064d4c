import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnispeech.server.realtime.items.spoken_text import SpokenText

SENTENCE = "It will be sunny today, with a light wind from the west."
CHINESE = "今天天气很好，我们去公园吧。"
TEXTS = st.text(alphabet="ab c,\n今天。", max_size=40)


def reply(
    text: str, ms: float, *, finished: bool, group: int = 12, group_s: float = 0.64
) -> SpokenText:
    """As the model writes it: a few letters before each span of units"""
    spoken = SpokenText()
    for start in range(0, len(text), group):
        spoken.add_text(text[start : start + group], start // group * group_s)
    spoken.add_audio(ms)
    if finished:
        spoken.finish()
    return spoken


def test_nothing_played_is_nothing_heard() -> None:
    assert reply(SENTENCE, 4000, finished=True).text_until(0) == ""
    assert reply(SENTENCE, 4000, finished=True).text_until(-5) == ""


@pytest.mark.parametrize("ms", [4000, 4001, 1e9])
def test_a_finished_reply_played_to_its_end_was_heard_whole(ms: float) -> None:
    assert reply(SENTENCE, 4000.4, finished=True).text_until(ms) == SENTENCE


def test_a_player_that_is_a_piece_short_loses_no_word_at_the_end() -> None:
    spoken = reply(SENTENCE, 4000, finished=True)
    assert spoken.text_until(3915) == SENTENCE
    assert spoken.text_until(3850) == SENTENCE.removesuffix(" west.")
    assert reply("Yes, indeed", 400, finished=True).text_until(370) == "Yes,"


def test_half_of_the_sound_is_about_half_of_the_words() -> None:
    assert reply(SENTENCE, 4000, finished=True).text_until(2000) == "It will be sunny today,"


def test_a_word_that_was_broken_off_was_not_heard() -> None:
    spoken = reply("Hello there everybody", 2100, finished=True, group_s=0)
    # 100 ms a letter, and two letters late
    told = [spoken.text_until(ms) for ms in (690, 700, 1290, 1300)]
    assert told == ["", "Hello", "Hello", "Hello there"]


def test_chinese_is_cut_between_characters() -> None:
    spoken = reply(CHINESE, 2800, finished=True, group_s=0)
    assert spoken.text_until(1120) == "今天天气很"


def test_mixed_writing_keeps_its_words_whole() -> None:
    spoken = reply("我用 Python 写", 2700, finished=True, group_s=0)
    assert [spoken.text_until(ms) for ms in (1320, 2000, 2340)] == ["我用", "我用", "我用 Python"]


def test_no_word_is_heard_before_its_own_units() -> None:
    spoken = SpokenText()
    spoken.add_text("One. ", 0.0)
    spoken.add_text("Two and three and four and five.", 3.0)  # after a long pause
    spoken.add_audio(5000)
    spoken.finish()
    assert spoken.text_until(2999) == "One."
    assert spoken.text_until(4000) == "One. Two and three and four"


def test_a_reply_still_being_made_goes_at_the_pace_of_speech() -> None:
    """The text is far ahead of the sound: its proportion would say that a quarter was heard."""
    spoken = reply(SENTENCE * 20, 1640, finished=False, group_s=0)
    assert spoken.text_until(1640) == "It will be sunny today,"


def test_slow_speech_is_seen_in_the_sound_there_is() -> None:
    spoken = SpokenText()
    spoken.add_text("One two three four ", 0.0)
    spoken.add_audio(4000)
    assert spoken.text_until(2000) == "One two"


def test_sound_that_was_not_sent_was_not_heard() -> None:
    spoken = reply(SENTENCE, 600, finished=False, group_s=0)
    assert spoken.text_until(60_000) == spoken.text_until(600) == "It will"


def test_a_word_is_not_heard_before_it_is_known_to_be_whole() -> None:
    spoken = SpokenText()
    spoken.add_text("to", 0.0)
    spoken.add_audio(5000)
    assert spoken.text_until(5000) == ""
    spoken.add_text("day it", 0.0)
    assert spoken.text_until(5000) == "today"


def test_a_reply_without_sound_is_whole_or_nothing() -> None:
    spoken = SpokenText()
    spoken.add_text(SENTENCE, 0.0)
    spoken.finish()
    assert spoken.text_until(0) == "" and spoken.text_until(1) == SENTENCE
    assert SpokenText().text_until(100) == ""


def test_it_tells_what_it_was_given() -> None:
    spoken = reply(SENTENCE, 4000, finished=True)
    assert (spoken.text, spoken.audio_ms) == (SENTENCE, 4000)


@given(
    text=TEXTS,
    sound_ms=st.integers(0, 5000),
    finished=st.booleans(),
    group=st.integers(1, 12),
    earlier_ms=st.integers(0, 6000),
    later_ms=st.integers(0, 6000),
)
def test_more_sound_is_never_less_text(
    text: str, sound_ms: int, finished: bool, group: int, earlier_ms: int, later_ms: int
) -> None:
    spoken = reply(text, sound_ms, finished=finished, group=group, group_s=0.1)
    earlier_ms, later_ms = sorted((earlier_ms, later_ms))
    before, after = spoken.text_until(earlier_ms), spoken.text_until(later_ms)
    assert after.startswith(before) and text.startswith(after)


@given(text=st.text(alphabet="ab ", min_size=1, max_size=40), ms=st.integers(0, 3000))
def test_words_are_whole(text: str, ms: int) -> None:
    spoken = reply(text, 2500, finished=True, group_s=0).text_until(ms)
    assert spoken.split() == text.split()[: len(spoken.split())]
