"""The page, asked in writing: in a talk, without a microphone, and where there can be none."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import DONE, FakeEngine, serving
from page_browser import (
    QUESTION,
    Browsers,
    Visit,
    browsers_hearing,
    needs_browser,
    visiting_by_line,
    write_microphone,
)
from test_page import HOSTILE, KEY, PHONE, hum, speaker

from omnispeech.config import AccessConfig, TalkConfig
from omnispeech.engine.events import TextDelta

ASIDE = {"width": 740, "height": 360}
# the texts, sent one after the other, and what is seen before anything can come back
SENDING = """async (texts) => {
  const form = document.querySelector("#typing");
  for (const text of texts) {
    form.elements.question.value = text;
    form.requestSubmit();
    await new Promise((resolve) => setTimeout(resolve, 0));
  }
  return [...document.querySelectorAll(".entry.user .words")].map((p) => p.textContent);
}"""


@pytest.fixture(scope="module")
def browsers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browsers]:
    microphone = tmp_path_factory.mktemp("typing") / "microphone.wav"
    with browsers_hearing(write_microphone(microphone)) as begun:
        yield begun


def asked(engine: FakeEngine) -> list[str]:
    """What the model reads of the last question, role by role."""
    return [f"{m.role}: {part.text}" for m in engine.heard for part in m.content]


def sent(visit: Visit, *kinds: str) -> list[str]:
    return [frame.type for frame in visit.frames if frame.sent and frame.type in kinds]


@needs_browser
def test_a_typed_question_is_shown_at_once_and_answered_aloud(browsers: Browsers) -> None:
    engine = speaker("one", "two")
    with serving(engine) as url, browsers.visiting(url) as visit:
        visit.start()
        visit.waits_for("ready")
        assert visit.page.evaluate(SENDING, [HOSTILE]) == [HOSTILE]
        visit.waits_for("answering")
        visit.waits_for_level("#played", "> 0.3")
        visit.waits_for("ready")
        assert asked(engine) == [f"user: {HOSTILE}"]
        assert visit.typed() == ""
        assert visit.text(".entry.assistant .words") == "one two "
        assert visit.page.locator(".entry img, .entry script").count() == 0
        assert visit.page.title() == "omnispeech"
        item = visit.of("conversation.item.create")[0].event["item"]
        assert item["content"] == [{"type": "input_text", "text": HOSTILE}]
        assert sent(visit, "conversation.item.create", "response.create") == [
            "conversation.item.create",
            "response.create",
        ]
        with visit.page.expect_download() as text:
            visit.page.locator("#save-text").click()
        assert f"You: {HOSTILE}\n" in Path(text.value.path()).read_text(encoding="utf-8")


@needs_browser
@pytest.mark.parametrize("whole", [False, True], ids=["being made", "being played"])
def test_a_typed_question_interrupts_a_reply_that_is(browsers: Browsers, whole: bool) -> None:
    go_on = threading.Event()
    if whole:
        go_on.set()
    engine = FakeEngine(TextDelta("one two three four five six seven "), hum(3), go_on, DONE)
    with serving(engine) as url, browsers.visiting(url) as visit:
        visit.types("first")
        visit.waits_for("answering")
        visit.waits_for_level("#played", "> 0.3")
        visit.page.wait_for_timeout(800)
        visit.types("second")
        visit.until("conversation.item.create", 2)
        go_on.set()
        visit.until("response.done", 2)
        statuses = [frame.event["response"]["status"] for frame in visit.of("response.done")]
        assert statuses == ["incomplete" if whole else "cancelled", "incomplete"]
        cut = visit.of("conversation.item.truncate")[0]
        assert 500 < cut.event["audio_end_ms"] < 2500
        assert visit.frames.index(cut) < visit.frames.index(visit.of("conversation.item.create")[1])
        assert visit.text(".entry.assistant >> nth=0 >> .badge") == "interrupted"
        said = asked(engine)
        assert said[0::2] == ["user: first", "user: second"]
        assert said[1].startswith("assistant: one")
        assert "seven" not in said[1]
        assert visit.of("error") == []


@needs_browser
def test_two_questions_typed_at_once_have_one_answer_to_both(browsers: Browsers) -> None:
    engine = speaker("both")
    with serving(engine) as url, browsers.visiting(url) as visit:
        visit.start()
        visit.waits_for("ready")
        assert visit.page.evaluate(SENDING, ["first", "second"]) == ["first", "second"]
        visit.waits_for("answering")
        visit.waits_for("ready")
        assert asked(engine) == ["user: first", "user: second"]
        assert visit.page.locator(".entry.assistant").count() == 1
        assert visit.page.locator("#table tbody tr").count() == 2
        assert visit.figures()["First sound"] > 0
        assert visit.page.locator(".entry.note").count() == 0


class Held:
    """The way of a page to its server, on which what comes back can be held up."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._server = socket.connect_to_server()
        self._held: list[str] = []
        self.hold: Callable[[dict[str, Any]], bool] = lambda event: False
        self.sent: list[str] = []
        socket.on_message(self._to_server)
        self._server.on_message(self._to_page)

    def release(self) -> None:
        self.hold = lambda event: False
        for message in self._held:
            self._socket.send(message)
        self._held.clear()

    def close(self, code: int) -> None:
        self._socket.close(code=code)

    def _to_server(self, message: str) -> None:
        self.sent.append(json.loads(message)["type"])
        self._server.send(message)

    def _to_page(self, message: str) -> None:
        if self._held or self.hold(json.loads(message)):
            self._held.append(message)
        else:
            self._socket.send(message)


@needs_browser
def test_nothing_is_heard_of_a_reply_that_was_cancelled_before_the_page_knew_of_it(
    browsers: Browsers,
) -> None:
    engine = speaker("one")
    ways: list[Held] = []
    with serving(engine) as url, browsers.visiting(url) as visit:
        visit.page.route_web_socket(re.compile("/v1/realtime"), lambda ws: ways.append(Held(ws)))
        visit.types("zeroth")
        visit.waits_for("typing")
        visit.page.locator(".entry.assistant .sound").wait_for()
        way = ways[0]
        way.hold = lambda event: event["type"] == "response.created"
        visit.types("first")
        while way.sent.count("response.create") < 2:
            visit.page.wait_for_timeout(20)
        visit.types("second")
        while way.sent.count("conversation.item.create") < 3:
            visit.page.wait_for_timeout(20)
        way.release()
        visit.page.locator(".entry.assistant .sound >> nth=1").wait_for()
        visit.waits_for("typing")
        assert visit.page.locator(".entry.assistant").count() == 2
        assert visit.page.locator(".entry.note, .badge:text('interrupted')").count() == 0
        assert visit.figures()["First sound"] > 0


@needs_browser
@pytest.mark.parametrize("wanted", [True, False], ids=["", "unless it is interrupted"])
def test_what_was_said_while_a_reply_began_is_answered_after_it(
    browsers: Browsers, wanted: bool
) -> None:
    go_on = threading.Event()
    engine = FakeEngine(TextDelta("one "), hum(0.2), go_on, DONE)
    with serving(engine) as url, browsers.visiting(url) as visit:
        visit.start()
        visit.waits_for("ready")
        visit.page.locator("#talk").click()  # a tap: it stays down
        visit.waits_for("recording")
        visit.page.wait_for_timeout(400)
        visit.types("typed, with spaces")
        visit.until("response.created")
        visit.page.locator("#talk").click()
        visit.until("error")
        if not wanted:
            visit.page.keyboard.press("Escape")
        go_on.set()
        visit.until("response.done", 1 + wanted)
        visit.waits_for("ready")
        assert len(engine.requests) == 1 + wanted
        assert visit.page.locator(".entry.note").count() == 0


@needs_browser
@pytest.mark.parametrize("viewport", [PHONE, ASIDE], ids=["upright", "aside"])
def test_typing_needs_no_microphone_and_the_button_adds_one(
    browsers: Browsers, viewport: dict[str, int]
) -> None:
    engine = speaker("one", "two")
    with serving(engine) as url, browsers.visiting(url, viewport=viewport) as visit:
        visit.page.locator("input[value=push]").check(force=True)
        visit.types("hello")
        visit.waits_for("answering")
        visit.waits_for("typing")
        assert visit.text("#hint") == "Press to speak"
        assert visit.of("input_audio_buffer.append") == []
        assert visit.page.evaluate("document.documentElement.scrollWidth") == viewport["width"]
        for name in ("field", "Send"):
            box = visit.page.locator("#typing" if name == "field" else "#typing button")
            assert box.bounding_box()["height"] >= 40
        visit.page.get_by_role("button", name="Open the microphone").click()
        visit.waits_for("ready")
        visit.says(0.8)
        visit.until("response.done", 2)
        assert len(visit.of("session.created")) == 1
        assert [message.role for message in engine.heard] == ["user", "assistant", "user"]
        visit.page.locator("#end").click()
        visit.types("hello again")
        visit.waits_for("typing")
        visit.page.locator("#end").click()
        visit.page.locator("#talk").click()
        visit.waits_for("ready")


@needs_browser
@pytest.mark.parametrize(("allowed", "kind"), [(False, "permission"), (True, "missing")])
def test_a_talk_whose_microphone_is_not_to_be_had_goes_on_in_writing(
    browsers: Browsers, allowed: bool, kind: str
) -> None:
    engine = speaker("one")
    with (
        serving(engine) as url,
        browsers.visiting(url, device=not allowed, allowed=allowed) as visit,
    ):
        visit.start()
        assert visit.notice() == kind
        visit.types("hello")
        visit.until("response.done")
        visit.waits_for("deaf")
        assert visit.page.locator(".notice").count() == 0
        visit.page.locator("#talk").click()
        assert visit.notice() == kind
        visit.types("again")
        visit.until("response.done", 2)
        assert len(visit.of("session.created")) == 1


@needs_browser
def test_typing_works_where_browsers_allow_no_microphone(browsers: Browsers) -> None:
    engine = speaker("one", "two", "three")
    everybody = AccessConfig(origins="*")
    with (
        serving(engine, access=everybody) as url,
        browsers.visiting(url.replace("127.0.0.1", "vm.test")) as visit,
    ):
        assert visit.notice() == "insecure"
        visit.types("hello")
        visit.waits_for("answering")
        assert visit.page.locator(".notice").count() == 0
        visit.waits_for_level("#played", "> 0.3")
        visit.waits_for("typing")
        assert visit.figures()["Gaps"] == 0
        visit.page.locator("#talk").click()
        assert visit.notice() == "insecure"
        visit.types("again")
        visit.waits_for_level("#played", "> 0.3")
        visit.page.wait_for_timeout(300)
        visit.page.keyboard.press("Escape")
        cut = visit.until("conversation.item.truncate").event["audio_end_ms"]
        assert 100 < cut < 1400
        visit.waits_for_level("#played", "=== 0")
        visit.page.locator("#file").set_input_files(QUESTION)
        visit.until("response.done", 3)
        assert (
            not visit.page.locator("select[name=microphone], #devices-note")
            .filter(visible=True)
            .count()
        )


@needs_browser
def test_nothing_but_spaces_is_not_sent(browsers: Browsers) -> None:
    with serving(FakeEngine()) as url, browsers.visiting(url) as visit:
        visit.types("  ")
        visit.page.get_by_role("button", name="Send").click()
        assert visit.page.get_by_label("Type a question").evaluate(
            "e => e === document.activeElement"
        )
        assert visit.page.locator("body").get_attribute("data-state") == "idle"
        visit.start()
        visit.waits_for("ready")
        visit.types("  ")
        visit.page.wait_for_timeout(200)
        assert visit.of("conversation.item.create") == []
        assert visit.page.locator(".entry").count() == 0


@needs_browser
def test_what_could_not_be_sent_stays_in_the_field(browsers: Browsers, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[keys.tests]\nkey = "{KEY}"\n')
    keys.chmod(0o600)
    access = AccessConfig(api_keys=str(keys))
    engine = speaker("one")
    with (
        serving(engine, access=access) as server,
        visiting_by_line(browsers, server) as (line, visit),
    ):
        line.cut()
        visit.types("hello")
        assert visit.notice() == "unreachable"
        line.mend()
        assert visit.typed() == "hello"
        visit.page.get_by_role("button", name="Send").click()
        visit.page.locator(".notice[data-kind=key]").wait_for()
        assert visit.typed() == "hello"
        assert visit.page.locator(".entry").count() == 0
        visit.page.locator(".notice input").fill(KEY)
        visit.page.locator(".notice input").press("Enter")
        visit.waits_for("typing")
        visit.page.get_by_label("Type a question").press("Enter")
        visit.until("response.done")
        assert asked(engine) == ["user: hello"]
        assert visit.typed() == ""


@needs_browser
def test_what_is_typed_while_the_connection_is_lost_is_sent_when_it_is_back(
    browsers: Browsers,
) -> None:
    engine = speaker("one")
    with serving(engine) as server, visiting_by_line(browsers, server) as (line, visit):
        visit.types("first")
        visit.until("response.done")
        visit.waits_for("typing")
        line.cut()
        visit.waits_for("connecting")
        visit.types("second")
        visit.page.get_by_label("Type a question").press("Enter")  # twice is not two questions
        assert visit.typed() == "second"
        assert not visit.page.get_by_label("Type a question").is_editable()
        line.mend()
        visit.until("response.done", 2)
        visit.waits_for("typing")
        assert asked(engine)[0::2] == ["user: first", "user: second"]
        assert visit.typed() == ""
        assert visit.page.get_by_label("Type a question").is_editable()


@needs_browser
def test_what_waits_for_a_connection_that_is_given_up_can_be_changed(browsers: Browsers) -> None:
    with serving(FakeEngine()) as server, visiting_by_line(browsers, server) as (line, visit):
        visit.types("first")
        visit.waits_for("typing")
        line.cut()
        visit.waits_for("connecting")
        visit.types("second")
        visit.page.locator("#end").click()
        visit.page.get_by_label("Type a question").fill("third")
        assert visit.page.locator(".entry.user").count() == 1


@needs_browser
def test_a_text_that_is_too_long_is_refused_and_not_followed_by_an_answer(
    browsers: Browsers,
) -> None:
    with serving(FakeEngine(), max_text_chars=20) as url, browsers.visiting(url) as visit:
        visit.types("a question that is too long")
        assert "20" in visit.text(".entry.note")
        assert visit.text(".entry.user .badge") == "failed"
        assert visit.of("response.create") == []
        visit.waits_for("typing")


@needs_browser
def test_a_refused_text_takes_no_answer_from_the_one_before(browsers: Browsers) -> None:
    engine = speaker("one")
    with serving(engine, max_text_chars=20) as url, browsers.visiting(url) as visit:
        visit.start()
        visit.waits_for("ready")
        visit.page.evaluate(SENDING, ["short", "a question that is too long"])
        visit.until("response.done")
        assert asked(engine) == ["user: short"]
        assert len(visit.of("response.create")) == 1


@needs_browser
def test_a_full_server_is_tried_again_without_a_microphone(browsers: Browsers) -> None:
    engine = speaker("one")
    with serving(engine, TalkConfig(max_talks=1)) as url, browsers.visiting(url) as visit:
        visit.types("first")
        visit.waits_for("typing")
        other = Visit(visit.page.context.new_page())
        other.page.goto(url)
        other.types("second")
        assert other.notice() == "full"
        visit.page.locator("#end").click()
        visit.waits_for("idle")
        other.page.locator(".notice button").click()
        other.waits_for("typing")
        assert other.typed() == "second"


@needs_browser
def test_a_question_whose_taking_was_never_heard_of_leaves_the_next_one_its_answer(
    browsers: Browsers,
) -> None:
    engine = speaker("one")
    ways: list[Held] = []
    with serving(engine) as server, visiting_by_line(browsers, server) as (line, visit):
        visit.page.route_web_socket(re.compile("/v1/realtime"), lambda ws: ways.append(Held(ws)))
        visit.start()
        visit.waits_for("ready")
        ways[0].hold = lambda event: event["type"] == "conversation.item.added"
        visit.types("first")
        visit.waits_for("thinking")
        line.cut()
        visit.waits_for("connecting")
        line.mend()
        visit.waits_for("ready")
        assert "ask again" in visit.text(".entry.note")
        visit.types("second")
        visit.page.locator(".entry.assistant .sound").wait_for()
        visit.waits_for("ready")
        assert asked(engine)[-1] == "user: second"


@needs_browser
def test_a_question_that_was_about_to_be_sent_when_the_connection_was_lost_is_answered(
    browsers: Browsers,
) -> None:
    engine = FakeEngine(TextDelta("one two three "), hum(3), DONE)
    slow = """
      const post = MessagePort.prototype.postMessage;
      MessagePort.prototype.postMessage = function (message, ...more) {
        setTimeout(() => post.call(this, message, ...more), message.type === "stop" ? 700 : 0);
      };"""
    with serving(engine) as server, visiting_by_line(browsers, server) as (line, visit):
        visit.page.add_init_script(slow)
        visit.page.reload()
        visit.types("first")
        visit.waits_for("answering")
        visit.waits_for_level("#played", "> 0.3")
        visit.types("second")
        line.cut()
        visit.waits_for("connecting")
        visit.page.locator(".badge:text('interrupted')").wait_for()
        line.mend()
        visit.until("response.done", 2)
        visit.waits_for("typing")
        assert asked(engine)[-1] == "user: second"
        assert visit.page.locator(".entry.note").count() == 0


@needs_browser
def test_a_question_that_is_interrupted_on_its_way_has_no_answer(browsers: Browsers) -> None:
    engine = speaker("one")
    ways: list[Held] = []
    with serving(engine) as url, browsers.visiting(url) as visit:
        visit.page.route_web_socket(re.compile("/v1/realtime"), lambda ws: ways.append(Held(ws)))
        visit.start()
        visit.waits_for("ready")
        ways[0].hold = lambda event: event["type"] == "conversation.item.added"
        visit.types("first")
        visit.waits_for("thinking")
        visit.page.keyboard.press("Escape")
        ways[0].release()
        visit.page.wait_for_timeout(300)
        assert visit.page.locator("body").get_attribute("data-state") == "ready"
        assert "response.create" not in ways[0].sent
        visit.types("second")
        visit.page.locator(".entry.assistant .sound").wait_for()
        assert asked(engine) == ["user: first", "user: second"]


@needs_browser
def test_a_reply_that_the_end_of_a_talk_broke_off_is_over_in_the_next_one(
    browsers: Browsers,
) -> None:
    engine = FakeEngine(TextDelta("one "), hum(0.5), threading.Event(), DONE)
    ways: list[Held] = []
    with serving(engine) as url, browsers.visiting(url) as visit:
        visit.page.route_web_socket(re.compile("/v1/realtime"), lambda ws: ways.append(Held(ws)))
        visit.types("hello")
        visit.waits_for("answering")
        ways[0].close(1012)
        assert visit.notice() == "stopping"
        visit.page.locator("#interrupt:disabled").wait_for()
        visit.page.locator(".notice button").click()
        visit.waits_for("typing")


@needs_browser
def test_what_was_read_of_a_reply_without_sound_is_not_struck_out(browsers: Browsers) -> None:
    engine = FakeEngine(TextDelta("one two "), threading.Event(), DONE)
    with serving(engine) as server, visiting_by_line(browsers, server) as (line, visit):
        visit.page.locator("select[name=modality]").select_option("text")
        visit.types("hello")
        visit.page.get_by_text("one two").wait_for()
        line.cut()
        visit.waits_for("connecting")
        line.mend()
        visit.waits_for("typing")
        visit.until("conversation.item.retrieved")
        assert visit.text(".entry.assistant .badge") == "interrupted"
        assert visit.page.locator(".entry s, .entry.note").count() == 0


@needs_browser
def test_half_a_character_is_sent_as_an_unknown_one(browsers: Browsers) -> None:
    engine = speaker("one")
    with serving(engine) as url, browsers.visiting(url) as visit:
        halve = "(field, text) => { field.value = String.fromCharCode(0xd83d) + text }"
        instructions = visit.page.locator("textarea[name=instructions]")
        for field in (instructions, visit.page.get_by_label("Type a question")):
            field.evaluate(halve, " or whole 😀")
        visit.page.get_by_role("button", name="Send").click()
        visit.until("response.done")
        assert asked(engine) == ["system: \ufffd or whole 😀", "user: \ufffd or whole 😀"]


@needs_browser
def test_where_no_sound_can_be_had_the_field_is_free_again(browsers: Browsers) -> None:
    with serving(speaker("one")) as url, browsers.visiting(url) as visit:
        visit.types("first")
        visit.waits_for("typing")
        visit.page.locator("#end").click()
        visit.page.evaluate(
            """() => {
              window.resume = AudioContext.prototype.resume;
              AudioContext.prototype.resume = async () => {
                throw new DOMException("a call took the sound", "InvalidStateError");
              };
            }"""
        )
        visit.types("hello")
        assert visit.notice() == "unreachable"
        assert visit.text(".notice .reason") == "a call took the sound"
        assert visit.typed() == "hello"
        visit.waits_for("idle")
        visit.page.evaluate("() => { AudioContext.prototype.resume = window.resume }")
        assert visit.page.get_by_label("Type a question").is_editable()
        visit.page.get_by_role("button", name="Send").click()
        visit.waits_for("answering")
        visit.waits_for_level("#played", "> 0.3")
        visit.waits_for("typing")
