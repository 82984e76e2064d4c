"""Parts of a conversation in the terminal, without a process of their own."""

import io
import threading

import numpy as np
import pytest
from fake_engine import FakeEngine, serving
from page_browser import line_to

from omnispeech.client import ServerError
from omnispeech.terminal import link as link_module
from omnispeech.terminal.link import LOST, Link
from omnispeech.terminal.player import BLOCK, BYTES_A_MS, Nowhere, Player
from omnispeech.terminal.record import Record
from omnispeech.terminal.replies import Replies
from omnispeech.terminal.screen import Screen, clean, wrapped
from omnispeech.terminal.sent import BYTES_A_MS as SENT_A_MS
from omnispeech.terminal.sent import KEPT_MS, Sent
from omnispeech.terminal.timing import Timing, end_of_speech_s


async def test_a_connection_that_does_not_come_back_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link_module, "COME_BACK_S", 0.4)
    told: list[str] = []
    with serving(FakeEngine()) as url, line_to(url) as line:
        async with Link(line.url) as link:
            with pytest.raises(ServerError, match=r"did not come back within 0\.4 s: "):
                async for event in link.events():
                    told.append(event["type"])
                    line.cut()
    assert told == ["session.created", LOST]


def test_what_the_model_remembers_is_told_once() -> None:
    shown, player = io.StringIO(), Player(Nowhere())
    handlers = Replies(Link(""), player, Screen(shown), Record(None)).handlers()
    handlers["response.created"]({"response": {"id": "r"}})
    handlers["response.output_item.added"]({"item": {"id": "i", "type": "message"}})
    for text in ("one two", "one", "one"):
        handlers["conversation.item.retrieved"](
            {"item": {"id": "i", "content": [{"transcript": text}]}}
        )
    player.close()
    assert shown.getvalue() == "the model remembers: one two\nthe model remembers: one\n"


def test_gaps_are_times_with_nothing_to_play() -> None:
    timing = Timing(asked_s=10.0, speech_end_s=9.4)
    timing.text(10.2)
    timing.audio(10.5, 1.0)
    timing.audio(11.4, 1.0)  # in time: the first ends at 11.5
    timing.audio(12.7, 1.0)  # 0.2 s late
    timing.audio(13.6, 1.0)  # in time, for all after the gap is later
    timing.done_s = 14.0
    assert timing.report() == (
        "endpointing 0.60 s, first text after 0.20 s, first audio after 0.50 s, "
        "4.00 s of sound in 4.00 s, real-time factor 1.00, gaps: 1, 0.20 s in all"
    )


def test_speech_ends_with_its_last_loud_part() -> None:
    sound = np.concatenate([np.full(1600, 9000), np.full(3200, 40)]).astype("<i2")
    assert end_of_speech_s(sound.tobytes(), 16_000) == pytest.approx(0.1)
    assert end_of_speech_s(b"", 16_000) == 0.0


def test_what_was_sent_is_found_by_the_clock_of_the_server() -> None:
    sent = Sent(from_ms=1000)
    sent.push(b"a" * 100 * SENT_A_MS, 5.0)
    sent.push(b"b" * 100 * SENT_A_MS, 5.1)
    assert sent.now_ms == 1200 and sent.moment_s(1150) == pytest.approx(5.05)
    assert sent.cut(1090, 1110) == b"a" * 10 * SENT_A_MS + b"b" * 10 * SENT_A_MS
    sent.push(bytes(KEPT_MS * SENT_A_MS), 200.0)
    assert sent.cut(0, 1200) == b""


class Gate:
    """A sink that takes one block at a time."""

    latency_s = 0.0

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.dropped = 0
        self.room = threading.Semaphore(0)
        self.waiting = threading.Event()

    def write(self, pcm: bytes) -> None:
        self.waiting.set()
        self.room.acquire()
        self.written.append(pcm)

    def drop(self) -> None:
        self.dropped += 1

    def close(self) -> None: ...


def test_a_stop_tells_how_much_was_heard_and_plays_nothing_more() -> None:
    gate = Gate()
    player = Player(gate)
    player.push("one", bytes(10 * BLOCK))
    gate.waiting.wait(5)
    ((item, heard_ms),) = player.stop()
    assert item == "one" and heard_ms == 0
    player.push("two", b"\1" * BLOCK)
    gate.room.release(2)
    player.close()
    assert gate.written == [bytes(BLOCK), b"\1" * BLOCK] and gate.dropped == 1
    assert BLOCK == 20 * BYTES_A_MS


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("", [""]),
        ("one two three", ["one two", "three"]),
        ("onetwothree", ["onetwoth", "ree"]),
        ("你好你好你", ["你好你好", "你"]),
    ],
)
def test_rows_fit(text: str, rows: list[str]) -> None:
    assert wrapped(text, 8) == rows


def test_nothing_from_elsewhere_steers_the_terminal() -> None:
    assert clean("a\x1b[2Jb\x07\x9b\u202ec\td\ne") == "a[2Jbc    d e"


def test_what_is_told_during_a_reply_waits_for_its_end() -> None:
    shown = io.StringIO()
    screen = Screen(shown)
    screen.begin("reply")
    screen.grow("Hel")
    screen.line("you: hm", "you")
    screen.grow("lo")
    screen.end()
    assert shown.getvalue() == "reply: Hello\nyou: hm\n"
