"""The page, and a browser that talks with it: a fake microphone, a real server."""

import importlib.util
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile
from fake_engine import DONE, FakeEngine, serving
from golden_models import golden_worker
from page_browser import (
    QUESTION,
    Browsers,
    browsers_hearing,
    needs_browser,
    visiting_by_line,
    write_microphone,
)

from omnispeech.config import AccessConfig, TalkConfig
from omnispeech.engine.events import AudioDelta, TextDelta
from omnispeech.errors import Unsupported

WEB = Path(__file__).parent.parent / "omnispeech" / "web"
MODULES = sorted(WEB.glob("*.js"))
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
RATE_HZ = FakeEngine().sample_rate_hz
PHONE = {"width": 360, "height": 740}
KEY = "a-key-of-the-tests"

needs_vad = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("onnxruntime", "silero_vad")),
    reason="onnxruntime or silero-vad is not installed",
)


def hum(seconds: float) -> AudioDelta:
    wave = 8000 * np.sin(2 * np.pi * 220 * np.arange(int(seconds * RATE_HZ)) / RATE_HZ)
    return AudioDelta(wave.astype("<i2").tobytes())


def speaker(*words: str, seconds: float = 0.5) -> FakeEngine:
    steps = [step for word in words for step in (TextDelta(f"{word} "), hum(seconds))]
    return FakeEngine(*steps, DONE)


@pytest.fixture(scope="module")
def browsers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browsers]:
    microphone = tmp_path_factory.mktemp("page") / "microphone.wav"
    with browsers_hearing(write_microphone(microphone)) as begun:
        yield begun


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Of a server whose answers do not matter."""
    with serving(FakeEngine()) as url:
        yield url


def test_the_page_and_its_files_come_with_their_types_and_a_policy(url: str) -> None:
    with httpx.Client(base_url=url) as client:
        page = client.get("/")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert page.headers["content-security-policy"].startswith("default-src 'self'; ")
        assert "unsafe" not in page.headers["content-security-policy"]
        for file in WEB.iterdir():
            answer = client.get(f"/page/{file.name}")
            assert answer.content == file.read_bytes()
            assert answer.headers["x-content-type-options"] == "nosniff"
        script = client.head("/page/app.js")
        assert script.headers["content-type"] == "text/javascript; charset=utf-8"
        assert script.content == b""


def test_what_did_not_change_is_not_sent_again(url: str) -> None:
    with httpx.Client(base_url=url) as client:
        first = client.get("/")
        assert first.headers["cache-control"] == "no-cache"
        again = client.get("/", headers={"If-None-Match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        other = client.get("/page/app.js", headers={"If-None-Match": first.headers["etag"]})
        assert other.status_code == 200


@pytest.mark.parametrize(
    "name", ["..%2fconfig.py", "%2e%2e/config.py", "app.py", "", "/etc/passwd"]
)
def test_only_files_of_the_page_can_be_named(name: str, url: str) -> None:
    with httpx.Client(base_url=url) as client:
        assert client.get(f"/page/{name}").status_code == 404


def test_no_page_where_it_is_switched_off() -> None:
    with (
        serving(FakeEngine(), TalkConfig(page=False)) as url,
        httpx.Client(base_url=url) as client,
    ):
        assert client.get("/").status_code == 404
        assert client.get("/page/app.js").status_code == 404
        assert client.get("/health").status_code == 200


def test_the_page_needs_nothing_from_elsewhere() -> None:
    names = {file.name for file in WEB.iterdir()}
    for file in WEB.iterdir():
        text = file.read_text(encoding="utf-8")
        assert re.findall(r"https?://[^\s\"']+", text) in ([], ["http://www.w3.org/2000/svg"])
        named = re.findall(r"(?:/page|from \"\.|import \"\.)/([\w.-]+)", text)
        assert set(named) <= names


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name)
def test_modules_are_short_and_make_no_markup_from_texts(module: Path) -> None:
    text = module.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 250
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b", text)


@needs_browser
@needs_vad
def test_hands_free_a_turn_is_answered_and_speech_stops_the_answer(browsers: Browsers) -> None:
    engine = speaker(*["word"] * 11)
    with serving(engine) as url, browsers.visiting(url) as visit:
        visit.start("hands-free")
        visit.waits_for("answering")
        visit.page.keyboard.press(" ")
        assert visit.text("#hint") == "Speaking, microphone off"
        visit.page.keyboard.press(" ")
        assert visit.text("#hint") == "Speaking"
        assert visit.text(".entry.user .sound") == "2.1 s"
        heard = engine.heard[-1].content[0].samples
        assert 1.7 < len(heard) / 16_000 < 2.9
        assert 300 < visit.figures()["Endpointing"] < 1500
        assert visit.figures()["First sound"] < 1000
        first = visit.of("response.output_audio.delta")[0]
        interruption = visit.until("input_audio_buffer.speech_started", 2)
        cut = visit.until("conversation.item.truncate")
        visit.waits_for("hearing")
        visit.page.locator(".entry.assistant .words s").wait_for()
        assert cut.at_s - interruption.at_s < 0.2
        played_s = interruption.at_s - first.at_s
        assert played_s - 0.7 < cut.event["audio_end_ms"] / 1000 <= played_s + 0.1
        assert visit.text(".entry.assistant .badge") == "interrupted"
        assert visit.figures()["Gaps"] == 0


@needs_browser
def test_push_to_talk_by_keyboard_with_a_hostile_text(browsers: Browsers) -> None:
    engine = speaker(HOSTILE, *["word"] * 6)
    with serving(engine) as url, browsers.visiting(url) as visit:
        visit.start()
        visit.waits_for("ready")
        visit.says(0.8)
        visit.waits_for("answering")
        assert visit.text(".entry.assistant .words").startswith(HOSTILE)
        assert visit.page.title() == "omnispeech"
        assert visit.page.locator(".entry img, .entry script").count() == 0
        assert 0.6 < len(engine.heard[-1].content[0].samples) / 16_000 < 1.5
        visit.waits_for_level("#played", "> 0.3")
        visit.page.wait_for_timeout(200)  # the level rises with the first 50 ms
        visit.page.keyboard.press("Escape")
        visit.waits_for("ready")
        visit.waits_for_level("#played", "=== 0")
        ms = visit.until("conversation.item.truncate").event["audio_end_ms"]
        assert 50 < ms < 3000
        assert visit.of("error") == []


@needs_browser
def test_a_whole_reply_is_heard_without_a_gap_and_can_be_kept(browsers: Browsers) -> None:
    with serving(speaker("one", "two")) as url, browsers.visiting(url) as visit:
        visit.start()
        visit.waits_for("ready")
        visit.page.locator("#talk").click()  # a tap, and another: nothing needs to be held
        visit.waits_for("recording")
        visit.page.wait_for_timeout(500)
        visit.page.locator("#talk").click()
        visit.waits_for("answering")
        visit.waits_for("ready")
        assert visit.figures()["Gaps"] == 0
        assert visit.figures()["Real time factor"] < 1
        assert visit.page.locator("#table tbody tr").count() == 1
        assert visit.page.locator("#chart rect.first-sound").count() == 1
        with visit.page.expect_download() as text:
            visit.page.locator("#save-text").click()
        assert "omnispeech: one two" in Path(text.value.path()).read_text(encoding="utf-8")
        with visit.page.expect_download() as sound:
            visit.page.locator("#save-sound").click()
        samples, rate_hz = soundfile.read(sound.value.path())
        said, replied = np.abs(samples).max(axis=0)
        assert (rate_hz, samples.shape[1]) == (24_000, 2)
        assert replied == pytest.approx(8000 / 32768, rel=0.05)
        assert np.count_nonzero(np.abs(samples[:, 1]) > 0.01) / rate_hz == pytest.approx(1, abs=0.1)


@needs_browser
def test_sound_that_comes_too_late_is_counted_as_a_gap(browsers: Browsers) -> None:
    go_on = threading.Event()
    engine = FakeEngine(TextDelta("late"), hum(0.3), go_on, hum(0.3), DONE)
    with serving(engine) as url, browsers.visiting(url) as visit:
        visit.start()
        visit.waits_for("ready")
        visit.says()
        visit.waits_for("answering")
        visit.page.wait_for_timeout(600)
        go_on.set()
        visit.waits_for("ready")
        assert visit.figures()["Gaps"] == 1
        assert visit.page.locator("#chart circle.gap").count() == 1


@needs_browser
def test_a_file_is_a_question_where_there_is_no_microphone(
    browsers: Browsers, tmp_path: Path
) -> None:
    engine = speaker("yes")
    nothing = tmp_path / "no sound.wav"
    nothing.write_text("not a sound")
    with serving(engine) as url, browsers.visiting(url, device=False) as visit:
        visit.page.locator("#file").set_input_files(QUESTION)
        visit.until("response.done")
        assert visit.notice() == "missing"
        assert len(engine.heard[-1].content[0].samples) / 16_000 == pytest.approx(1.9, abs=0.05)
        visit.page.locator(".entry.assistant .sound").wait_for()
        visit.page.locator("#file").set_input_files(nothing)
        assert "no sound this browser can read" in visit.text(".entry.note")


@needs_browser
def test_a_file_that_is_too_long_is_refused_and_not_followed_by_an_answer(
    browsers: Browsers, url: str, tmp_path: Path
) -> None:
    long, longer = tmp_path / "long.wav", tmp_path / "longer.wav"
    soundfile.write(long, np.zeros(121 * 3000), 3000)
    soundfile.write(longer, np.zeros(301 * 3000), 3000)
    with browsers.visiting(url) as visit:
        visit.page.locator("#file").set_input_files(long)
        assert "send at most 120 s" in visit.text(".entry.note")
        assert visit.text(".entry.user .badge") == "failed"
        assert visit.of("response.create") == []
        visit.page.locator("#file").set_input_files(longer)
        visit.page.get_by_text("longer.wav is 301 s long; send at most 300 s").wait_for()


@needs_browser
def test_a_lost_connection_is_taken_up_again_in_the_middle_of_a_question(
    browsers: Browsers,
) -> None:
    engine = speaker("here")
    with serving(engine) as server, visiting_by_line(browsers, server) as (line, visit):
        visit.start()
        visit.waits_for("ready")
        visit.page.locator("h1").click()
        visit.page.keyboard.down(" ")
        visit.page.wait_for_timeout(500)
        line.cut()
        visit.waits_for("connecting")
        assert visit.notice() == "lost"
        visit.page.wait_for_timeout(400)
        line.mend()
        visit.waits_for("recording")
        first, second = visit.of("session.created")
        assert first.event["session"]["id"] == second.event["session"]["id"]
        visit.page.keyboard.up(" ")
        visit.until("response.done")
        assert visit.page.locator(".notice, .entry.note").count() == 0
        # what was said before the loss, during it and after it, is one question
        assert len(engine.heard[-1].content[0].samples) / 16_000 > 0.8


@needs_browser
def test_a_conversation_that_the_server_forgot_begins_anew_and_says_so(browsers: Browsers) -> None:
    with (
        serving(speaker("here"), TalkConfig(resume_s=0)) as server,
        visiting_by_line(browsers, server) as (line, visit),
    ):
        visit.start()
        visit.waits_for("ready")
        visit.says()
        visit.until("response.done")
        line.cut()
        visit.waits_for("connecting")
        line.mend()
        visit.waits_for("ready")
        assert "new conversation" in visit.text(".entry.note")
        visit.says()
        visit.until("response.done", 2)


@needs_browser
@pytest.mark.parametrize(("allowed", "kind"), [(False, "permission"), (True, "missing")])
def test_without_a_microphone_the_page_says_why(
    browsers: Browsers, url: str, allowed: bool, kind: str
) -> None:
    aside = {"width": 740, "height": 360}
    with browsers.visiting(url, device=not allowed, allowed=allowed, viewport=aside) as visit:
        visit.start()
        assert visit.notice() == kind
        visit.page.locator(".notice strong").click(trial=True)  # nothing covers it
        assert visit.page.locator("body").get_attribute("data-state") == "deaf"


@needs_browser
def test_while_the_visitor_is_asked_for_the_microphone_none_is_missed(
    browsers: Browsers, url: str
) -> None:
    with browsers.visiting(url) as visit:
        unanswered = "() => { navigator.mediaDevices.getUserMedia = () => new Promise(() => {}) }"
        visit.page.evaluate(unanswered)
        visit.start()
        visit.waits_for("asking")
        assert visit.text("#hint") == "Opening the microphone"


@needs_browser
def test_where_browsers_allow_no_sound_the_page_says_so_at_once(
    browsers: Browsers, url: str
) -> None:
    with browsers.visiting(url.replace("127.0.0.1", "vm.test")) as visit:
        assert visit.notice() == "insecure"
        visit.start()
        assert visit.notice() == "insecure"
        assert visit.page.locator("body").get_attribute("data-state") == "idle"


@needs_browser
def test_a_server_that_went_before_the_first_press_can_be_tried_again(
    browsers: Browsers, url: str
) -> None:
    with visiting_by_line(browsers, url) as (line, visit):
        line.cut()
        visit.start()
        assert visit.notice() == "unreachable"
        line.mend()
        visit.page.locator(".notice button").click()
        visit.waits_for("ready")


@needs_browser
def test_a_conversation_begun_again_hears_the_microphone_once(browsers: Browsers) -> None:
    engine = speaker("here")
    with serving(engine) as url, browsers.visiting(url) as visit:
        visit.start()
        visit.waits_for("ready")
        visit.page.locator("#end").click()
        visit.start()
        visit.waits_for("ready")
        visit.says(0.8)
        visit.until("response.done")
        assert len(engine.heard[-1].content[0].samples) / 16_000 < 1.4


@needs_browser
def test_nothing_is_kept_for_a_page_that_was_left(browsers: Browsers) -> None:
    with serving(FakeEngine()) as url, browsers.visiting(url) as visit:
        visit.start()
        visit.waits_for("ready")
        visit.page.reload()
        visit.page.wait_for_timeout(300)
        figures = httpx.get(f"{url}/metrics").text
        assert 'omnispeech_talks_closed_total{reason="left"} 1.0' in figures


@needs_browser
def test_a_full_server_is_tried_again(browsers: Browsers) -> None:
    with (
        serving(FakeEngine(), TalkConfig(max_talks=1)) as url,
        browsers.visiting(url) as visit,
    ):
        visit.start()
        visit.waits_for("ready")
        other = visit.page.context.new_page()
        other.goto(url)
        other.locator("#talk").click()
        notice = other.locator('.notice[data-kind="full"]')
        notice.wait_for()
        assert "max_talks" in notice.inner_text()
        assert re.search(r"again in \d+ s", notice.inner_text())
        visit.page.locator("#end").click()
        visit.waits_for("idle")
        other.locator(".notice button").click()
        other.wait_for_selector('body[data-state="ready"]')


@needs_browser
def test_a_key_is_asked_for_until_it_is_right(browsers: Browsers, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[keys.tests]\nkey = "{KEY}"\n')
    keys.chmod(0o600)
    with (
        serving(FakeEngine(), access=AccessConfig(api_keys=str(keys))) as url,
        browsers.visiting(url) as visit,
    ):
        visit.start()
        assert visit.notice() == "key"
        for typed in ("not a key", "a-wrong-key-of-the-tests"):
            visit.page.locator(".notice input").fill(typed)
            visit.page.locator(".notice form button").click()
            assert visit.notice() == "key"
        visit.page.locator(".notice input").fill(f" {KEY} ")  # as it may be copied
        visit.page.locator(".notice input").press("Enter")
        visit.waits_for("ready")
        assert visit.page.evaluate("sessionStorage.getItem('omnispeech.key')") == KEY
        assert KEY not in visit.page.url


@needs_browser
def test_a_phone_s_width_is_enough(browsers: Browsers) -> None:
    with (
        serving(speaker("A-very-long-word-" * 12)) as url,
        browsers.visiting(url, viewport=PHONE) as visit,
    ):
        visit.start()
        visit.waits_for("ready")
        visit.says()
        visit.waits_for("answering")
        assert visit.page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
        for name in ("#send-file", "#talk", "#interrupt", "#end"):
            box = visit.page.locator(name).bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"]
            assert box["width"] >= 40 and box["height"] >= 40
        visit.page.locator("#panel").click()
        visit.page.locator("textarea").fill("Answer in one word.")
        visit.page.locator("select[name=modality]").select_option("text")
        assert visit.page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
        visit.page.locator("#save-sound").scroll_into_view_if_needed()
        assert visit.page.locator("#save-sound").bounding_box()["y"] < PHONE["height"] - 40
        visit.page.keyboard.press("Escape")
        assert not visit.page.locator("textarea").is_visible()
        last = visit.of("session.updated")[-1].event["session"]
        assert (last["instructions"], last["output_modalities"]) == (
            "Answer in one word.",
            ["text"],
        )


@needs_browser
def test_a_stopping_server_and_the_end_of_an_idle_talk_are_told_apart(browsers: Browsers) -> None:
    idle = TalkConfig(talk_idle_s=1)
    with serving(FakeEngine(), idle) as url, browsers.visiting(url) as visit:
        visit.start()
        assert visit.notice() == "ended"
        visit.page.route_web_socket(
            re.compile("/v1/realtime"),
            lambda socket: socket.close(code=1012, reason="<b>later</b>"),
        )
        visit.page.locator(".notice button").click()
        visit.page.locator('.notice[data-kind="stopping"]').wait_for()
        assert visit.text(".notice .reason") == "<b>later</b>"


@needs_browser
def test_where_the_server_hears_no_ends_of_speech_a_button_does(
    browsers: Browsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def detector() -> None:
        raise Unsupported("onnxruntime is not installed")

    monkeypatch.setattr("omnispeech.server.realtime.hearing.hearing.SpeechDetector", detector)
    with serving(speaker("here")) as url, browsers.visiting(url) as visit:
        visit.start("hands-free")
        visit.waits_for("ready")
        assert "onnxruntime is not installed" in visit.text(".entry.note")
        visit.says()
        visit.until("response.done")


@needs_browser
def test_the_page_resamples_where_the_browser_does_not(browsers: Browsers, url: str) -> None:
    script = """async ([fromHz, toneHz]) => {
      const { Resampler } = await import("/page/resampler.js");
      const resampler = new Resampler(fromHz, 24000);
      const sine = Float32Array.from({ length: fromHz / 4 }, (_, i) =>
        0.5 * Math.sin((2 * Math.PI * toneHz * i) / fromHz));
      const out = [];
      for (let at = 0; at < sine.length; at += 1111)
        out.push(...resampler.push(sine.slice(at, at + 1111)));
      return out;
    }"""
    with browsers.visiting(url) as visit:
        for from_hz in (44_100, 48_000, 16_000):
            resampled = np.array(visit.page.evaluate(script, [from_hz, 1000]))
            expected = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(len(resampled)) / 24_000)
            assert 6000 - 30 < len(resampled) <= 6000
            assert np.abs(resampled - expected)[100:].max() < 0.005
        folded = np.array(visit.page.evaluate(script, [48_000, 15_000]))
        assert np.abs(folded)[100:-100].max() < 0.005


@needs_browser
def test_a_track_waits_for_a_little_sound_but_not_after_its_end(
    browsers: Browsers, url: str
) -> None:
    script = """async () => {
      const { Track } = await import("/page/track.js");
      const out = new Float32Array(128);
      const track = new Track("a");
      track.push(new Float32Array(100).fill(1));
      const taken = [track.read(out, 0)];
      track.ended = true;
      taken.push(track.read(out, 28), out[27], out[28], out[127]);
      return [...taken, track.finished, track.played, track.gaps];
    }"""
    with browsers.visiting(url) as visit:
        assert visit.page.evaluate(script) == [0, 100, 0, 1, 1, True, 100, 0]


@needs_browser
@pytest.mark.usefixtures("no_settings")
def test_a_turn_with_a_real_model(browsers: Browsers) -> None:
    with (
        golden_worker(kv_tokens=4096, context_length=1000) as worker,
        serving(worker) as url,
        browsers.visiting(url) as visit,
    ):
        visit.start()
        visit.waits_for("ready")
        visit.page.get_by_role("slider", name="Longest reply").fill("32")
        visit.says()
        done = visit.until("response.done").event["response"]
        assert done["status"] == "incomplete"
        visit.page.locator(".entry.assistant .sound").wait_for()
        assert visit.text(".entry.assistant .words")
        assert visit.figures()["First sound"] > 0
        visit.page.keyboard.press("Escape")
        visit.waits_for("ready")
