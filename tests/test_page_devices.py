"""The page and its sound devices: chosen, kept, gone, and back again."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fake_engine import serving
from page_browser import (
    LIMIT_MS,
    Browsers,
    Visit,
    browsers_hearing,
    needs_browser,
    write_microphone,
)
from test_page import HOSTILE, needs_vad, speaker

# what the page opens and what it plays through, told from inside; `gone` hides devices from it
WATCHING = """
window.tracks = [];
window.sinks = [];
window.gone = localStorage.getItem("gone") ?? "";
const devices = navigator.mediaDevices;
const [open, list] = [devices.getUserMedia.bind(devices), devices.enumerateDevices.bind(devices)];
const isThere = ({ label }) => !window.gone || !label.includes(window.gone);
devices.getUserMedia = async (wanted) => {
  const id = wanted.audio.deviceId?.exact;
  const there = (await list()).filter(isThere).some(({ deviceId }) => deviceId === id);
  if (id && !there) throw new OverconstrainedError("deviceId");
  const stream = await open(wanted);
  window.tracks.push(...stream.getTracks());
  return stream;
};
devices.enumerateDevices = async () => (await list()).filter(isThere);
const route = AudioContext.prototype.setSinkId;
AudioContext.prototype.setSinkId = async function (id) {
  if (window.gone === "all sinks") throw new DOMException("it is in use", "AbortError");
  await route.call(this, id);
  const sink = (await list()).find(({ deviceId }) => id && deviceId === id);
  window.sinks.push(sink?.label ?? "default");
};
"""
HEARD = "tracks.filter((t) => t.readyState === 'live').map((t) => t.label)"
FIRST, SECOND = "Fake Audio Input 1", "Fake Audio Input 2"
DEFAULT = "Fake Default Audio Input"
LOUD = "Fake Audio Output 2"


@pytest.fixture(scope="module")
def browsers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browsers]:
    microphone = tmp_path_factory.mktemp("devices") / "microphone.wav"
    with browsers_hearing(write_microphone(microphone)) as begun:
        yield begun


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(speaker("one")) as url:
        yield url


@contextmanager
def watching(browsers: Browsers, url: str) -> Iterator[Visit]:
    """The page, seen from inside."""
    with browsers.visiting(url) as visit:
        visit.page.add_init_script(WATCHING)
        visit.page.reload()
        yield visit


def opens(visit: Visit, how: str) -> None:
    """A microphone, from now on: a function of what is wanted; `open` is the usual way."""
    visit.page.evaluate(
        f"""() => {{
          const open = navigator.mediaDevices.getUserMedia;
          navigator.mediaDevices.getUserMedia = {how};
        }}"""
    )


def listing(visit: Visit, name: str) -> Any:
    return visit.page.get_by_role("combobox", name=name, exact=True)


def choose(visit: Visit, name: str, device: str) -> None:
    listing(visit, name).select_option(label=device)


def listed(visit: Visit, name: str) -> list[str]:
    return listing(visit, name).locator("option").all_inner_texts()


def shown(visit: Visit, name: str) -> str:
    return listing(visit, name).evaluate("e => e.selectedOptions[0].text")


def waits_until(visit: Visit, test: str) -> None:
    visit.page.wait_for_function(f"() => {test}", timeout=LIMIT_MS)


def hears(visit: Visit, device: str) -> None:
    """Through that one alone."""
    waits_until(visit, f"({HEARD}).join() === {device!r}")


def hide(visit: Visit, part: str) -> None:
    """Devices whose label has that part are unplugged; "": all are there again."""
    visit.page.evaluate(
        """(part) => {
          window.gone = part;
          localStorage.setItem("gone", part);
          navigator.mediaDevices.dispatchEvent(new Event("devicechange"));
        }""",
        part,
    )


@needs_browser
def test_another_microphone_is_heard_at_once_and_the_talk_goes_on(browsers: Browsers) -> None:
    engine = speaker("one")
    with serving(engine) as url, watching(browsers, url) as visit:
        visit.start()
        visit.waits_for("ready")
        hears(visit, DEFAULT)
        assert listed(visit, "Microphone") == ["Default", FIRST, SECOND]
        updates = len(visit.of("session.update"))
        choose(visit, "Microphone", SECOND)
        hears(visit, SECOND)
        visit.waits_for("ready")
        visit.says(0.8)
        visit.until("response.done")
        assert 0.6 < len(engine.heard[-1].content[0].samples) / 16_000 < 1.5
        assert len(visit.of("session.created")) == 1
        assert len(visit.of("session.update")) == updates  # the server has no part in it
        assert visit.page.locator(".notice").count() == 0


@needs_browser
def test_another_loudspeaker_plays_at_once_and_the_talk_goes_on(browsers: Browsers) -> None:
    with (
        serving(speaker(*["word"] * 6)) as url,
        watching(browsers, url) as visit,
    ):
        visit.types("hello")
        visit.waits_for("answering")
        assert visit.page.evaluate("sinks") == []
        choose(visit, "Loudspeaker", LOUD)
        waits_until(visit, f"sinks.join() === {LOUD!r}")
        visit.waits_for("typing")
        assert visit.page.locator(".badge:text('interrupted'), .notice").count() == 0
        choose(visit, "Loudspeaker", "Default")
        waits_until(visit, f"sinks.join() === '{LOUD},default'")


@needs_browser
def test_chosen_devices_are_kept_until_the_next_visit(browsers: Browsers, url: str) -> None:
    with watching(browsers, url) as visit:
        choose(visit, "Microphone", SECOND)
        choose(visit, "Loudspeaker", LOUD)
        visit.page.reload()
        assert shown(visit, "Microphone") == SECOND
        visit.start()
        visit.waits_for("ready")
        hears(visit, SECOND)
        assert visit.page.evaluate("tracks.length") == 1
        assert visit.page.evaluate("sinks") == [LOUD]
        assert SECOND in visit.page.evaluate("localStorage.getItem('omnispeech.settings')")
        visit.page.context.clear_permissions()
        visit.page.reload()
        assert listed(visit, "Microphone") == ["Default", SECOND]
        visit.page.context.grant_permissions(["microphone"])
        visit.start()
        visit.waits_for("ready")
        hears(visit, SECOND)
        assert visit.page.evaluate("tracks.length") == 1


@needs_browser
def test_devices_have_names_once_the_microphone_is_allowed(browsers: Browsers, url: str) -> None:
    with browsers.visiting(url, allowed=False) as visit:
        note = visit.page.locator("#devices-note")
        assert listed(visit, "Microphone") == ["Default"]
        assert note.is_visible()
        visit.page.context.grant_permissions(["microphone"])
        visit.start()
        visit.waits_for("ready")
        listing(visit, "Microphone").get_by_text(FIRST).wait_for(state="attached")
        assert listed(visit, "Loudspeaker") == ["Default", "Fake Audio Output 1", LOUD]
        assert not note.is_visible()


@needs_browser
def test_a_chosen_microphone_that_goes_is_replaced_and_taken_again_when_it_is_back(
    browsers: Browsers,
) -> None:
    engine = speaker("one")
    with serving(engine) as url, watching(browsers, url) as visit:
        visit.start()
        visit.waits_for("ready")
        choose(visit, "Microphone", SECOND)
        hears(visit, SECOND)
        hide(visit, "Input 2")
        hears(visit, DEFAULT)
        assert visit.notice() == "gone"
        assert visit.text(".notice .reason") == SECOND
        assert shown(visit, "Microphone") == f"{SECOND} (not connected)"
        visit.waits_for("ready")
        visit.says(0.8)
        visit.until("response.done")
        hide(visit, "")
        hears(visit, SECOND)
        visit.page.locator(".notice").wait_for(state="detached")
        assert listed(visit, "Microphone") == ["Default", FIRST, SECOND]
        assert len(visit.of("session.created")) == 1


@needs_browser
def test_a_microphone_that_breaks_off_is_replaced_by_the_default_one(
    browsers: Browsers, url: str
) -> None:
    with watching(browsers, url) as visit:
        visit.start()
        visit.waits_for("ready")
        choose(visit, "Microphone", SECOND)
        hears(visit, SECOND)
        visit.page.evaluate(
            """() => {
              window.gone = "Input 2"; // no devicechange: some systems tell of it later
              tracks.at(-1).stop();
              tracks.at(-1).dispatchEvent(new Event("ended"));
            }"""
        )
        hears(visit, DEFAULT)
        assert visit.notice() == "gone"
        visit.waits_for("ready")
        visit.page.get_by_role("button", name="Go on").click()
        hide(visit, "Input 2")  # it has been said
        visit.page.wait_for_timeout(200)
        assert visit.page.locator(".notice").count() == 0
        choose(visit, "Microphone", FIRST)
        hears(visit, FIRST)


@needs_browser
def test_devices_that_are_gone_at_the_next_visit_are_named_and_not_forgotten(
    browsers: Browsers, url: str
) -> None:
    with watching(browsers, url) as visit:
        choose(visit, "Microphone", SECOND)
        choose(visit, "Loudspeaker", LOUD)
        hide(visit, "put 2")
        visit.page.reload()
        assert visit.notice() == "gone"
        assert visit.text(".notice .reason") == f"{SECOND}, {LOUD}"
        visit.start()
        visit.waits_for("ready")
        hears(visit, DEFAULT)
        assert visit.page.evaluate("sinks") == []
        visit.page.get_by_role("slider", name="Variety").fill("0.5")  # keeps all settings
        hide(visit, "")
        hears(visit, SECOND)
        waits_until(visit, f"sinks.join() === {LOUD!r}")


@needs_browser
def test_a_loudspeaker_that_cannot_be_used_is_told_of(browsers: Browsers, url: str) -> None:
    with watching(browsers, url) as visit:
        visit.types("hello")
        visit.waits_for("typing")
        visit.page.evaluate("window.gone = 'all sinks'")
        choose(visit, "Loudspeaker", LOUD)
        assert visit.notice() == "loudspeaker"
        assert visit.text(".notice .reason") == "it is in use"


@needs_browser
def test_a_microphone_that_can_be_opened_ends_the_notice_about_one_that_cannot(
    browsers: Browsers, url: str
) -> None:
    with watching(browsers, url) as visit:
        opens(
            visit,
            """(wanted) => {
              if (wanted.audio.deviceId) return open(wanted);
              return Promise.reject(new DOMException("in use", "NotReadableError"));
            }""",
        )
        visit.start()
        assert visit.notice() == "busy"
        choose(visit, "Microphone", FIRST)
        visit.waits_for("ready")
        assert visit.page.locator(".notice").count() == 0


@needs_browser
def test_a_microphone_that_is_chosen_while_another_is_opened_is_the_one(
    browsers: Browsers, url: str
) -> None:
    with watching(browsers, url) as visit:
        opens(
            visit,
            """async (wanted) => {
              const allowed = new Promise((resolve) => (window.allow = resolve));
              if (!wanted.audio.deviceId) await allowed;
              return open(wanted);
            }""",
        )
        visit.start()
        visit.waits_for("asking")
        choose(visit, "Microphone", FIRST)
        visit.page.evaluate("allow()")
        hears(visit, FIRST)
        visit.waits_for("ready")


@needs_browser
def test_a_microphone_that_is_chosen_while_another_cannot_be_opened_is_the_one(
    browsers: Browsers, url: str
) -> None:
    with watching(browsers, url) as visit:
        opens(
            visit,
            """(wanted) => {
              if (wanted.audio.deviceId) return open(wanted);
              return new Promise((_, refuse) => {
                window.refuse = () => refuse(new DOMException("in use", "NotReadableError"));
              });
            }""",
        )
        visit.start()
        visit.waits_for("asking")
        choose(visit, "Microphone", FIRST)
        visit.page.evaluate("refuse()")
        hears(visit, FIRST)
        visit.waits_for("ready")
        assert visit.page.locator(".notice").count() == 0


@needs_browser
def test_a_hostile_name_of_a_device_is_a_text(browsers: Browsers, url: str) -> None:
    device = {"kind": "audioinput", "deviceId": "1", "label": HOSTILE}
    with browsers.visiting(url) as visit:
        visit.page.evaluate(
            """(device) => {
              navigator.mediaDevices.enumerateDevices = async () => [device];
              navigator.mediaDevices.dispatchEvent(new Event("devicechange"));
            }""",
            device,
        )
        waits_until(visit, "document.querySelector('[name=microphone]').length === 2")
        assert listed(visit, "Microphone") == ["Default", HOSTILE]
        assert visit.page.title() == "omnispeech"


@needs_browser
def test_a_microphone_that_breaks_off_whenever_it_is_opened_is_told_of_and_left_alone(
    browsers: Browsers, url: str
) -> None:
    with watching(browsers, url) as visit:
        opens(
            visit,
            """async (wanted) => {
              const stream = await open(wanted);
              const [track] = stream.getTracks();
              setTimeout(() => {
                if (!wanted.audio.deviceId) return;
                track.stop();
                track.dispatchEvent(new Event("ended"));
              }, 200);
              return stream;
            }""",
        )
        visit.start()
        visit.waits_for("ready")
        choose(visit, "Microphone", SECOND)
        hears(visit, SECOND)
        hears(visit, DEFAULT)
        assert visit.notice() == "gone"
        assert visit.text(".notice .reason") == SECOND
        visit.page.wait_for_timeout(1000)
        assert visit.page.evaluate("tracks.length") == 3
        hears(visit, DEFAULT)
        choose(visit, "Microphone", FIRST)
        hears(visit, FIRST)


@needs_browser
def test_a_microphone_that_has_ended_before_it_is_heard_is_not_one(
    browsers: Browsers, url: str
) -> None:
    with watching(browsers, url) as visit:
        opens(
            visit,
            """async (wanted) => {
              const stream = await open(wanted);
              for (const track of stream.getTracks()) track.stop();
              return stream;
            }""",
        )
        visit.start()
        assert visit.notice() == "busy"
        visit.waits_for("deaf")


@needs_browser
def test_a_microphone_that_cannot_be_listened_to_is_given_back(
    browsers: Browsers, url: str
) -> None:
    with watching(browsers, url) as visit:
        visit.page.evaluate(
            """() => {
              const add = AudioWorklet.prototype.addModule;
              AudioWorklet.prototype.addModule = async function (url) {
                if (url.includes("microphone")) throw new DOMException("lost", "AbortError");
                return add.call(this, url);
              };
            }"""
        )
        visit.start()
        assert visit.notice() == "busy"
        assert visit.page.evaluate("tracks.length") == 1
        assert visit.page.evaluate(HEARD) == []


@needs_browser
@needs_vad
@pytest.mark.parametrize("how", ["lost", "muted"])
def test_a_question_ends_with_the_microphone(browsers: Browsers, url: str, how: str) -> None:
    with watching(browsers, url) as visit:
        visit.page.locator("input[name=silence]").fill("2000")
        visit.start("hands-free")
        visit.waits_for("hearing")
        if how == "muted":
            visit.page.get_by_role("button", name="Switch the microphone off").click()
        else:
            visit.page.evaluate("tracks.at(-1).dispatchEvent(new Event('ended'))")
            assert visit.notice() == "unplugged"
        visit.until("response.done")
        visit.waits_for("muted" if how == "muted" else "deaf")


@needs_browser
def test_devices_are_not_gone_because_the_browser_names_them_no_more(
    browsers: Browsers, url: str
) -> None:
    with watching(browsers, url) as visit:
        choose(visit, "Microphone", SECOND)
        visit.page.context.clear_permissions()
        hide(visit, "")
        visit.page.wait_for_timeout(200)
        assert visit.page.locator(".notice").count() == 0
        assert shown(visit, "Microphone") == SECOND


@needs_browser
def test_a_browser_that_lists_no_devices_has_the_default_ones(browsers: Browsers, url: str) -> None:
    with browsers.visiting(url) as visit:
        visit.page.add_init_script("navigator.mediaDevices.enumerateDevices = undefined")
        visit.page.reload()
        visit.start()
        visit.waits_for("ready")
        assert listed(visit, "Microphone") == ["Default"]
        assert not visit.page.locator("#devices-note").is_visible()


@needs_browser
def test_of_two_lists_of_devices_the_later_one_counts(browsers: Browsers, url: str) -> None:
    with watching(browsers, url) as visit:
        listing(visit, "Microphone").get_by_text(FIRST).wait_for(state="attached")
        visit.page.evaluate(
            """async () => {
              const devices = navigator.mediaDevices;
              const list = await devices.enumerateDevices();
              const late = new Promise((resolve) => setTimeout(resolve, 100, list.slice(0, 2)));
              const lists = [late, Promise.resolve(list)];
              devices.enumerateDevices = () => lists.shift();
              devices.dispatchEvent(new Event("devicechange"));
              devices.dispatchEvent(new Event("devicechange"));
              await new Promise((resolve) => setTimeout(resolve, 200));
            }"""
        )
        assert listed(visit, "Microphone") == ["Default", FIRST, SECOND]
