import struct
import threading
from collections.abc import Iterable, Iterator

import httpx
import numpy as np
import pytest
import soxr
from fake_engine import DONE, RATE_HZ, FakeEngine, call, serving, tone
from hypothesis import given, settings
from hypothesis import strategies as st

from omnispeech.audio.io import pcm16_from_samples
from omnispeech.engine.events import AudioDelta, TextDelta
from omnispeech.errors import GenerationError, Overloaded
from omnispeech.server.stream_infer import MAX_FRAME_BYTES, FrameReader

PATH = "/stream_infer"
NUMBERS = np.arange(40 * 16_000, dtype=np.int64).astype("<i2")  # 40 s; each sample its own number


def framed(pcm: bytes, size: int = 3200) -> bytes:
    pieces = [pcm[at : at + size] for at in range(0, len(pcm), size)]
    return b"".join(struct.pack("<I", len(piece)) + piece for piece in pieces)


def seconds(count: float) -> bytes:
    return framed(NUMBERS[: int(count * 16_000)].tobytes())


def unframed(pieces: Iterable[bytes]) -> Iterator[bytes]:
    reader = FrameReader()
    for piece in pieces:
        yield from reader.push(piece)
    reader.finish()


async def heard(body: bytes, query: str = "") -> list[int]:
    engine = FakeEngine()
    response = await call(engine, "POST", PATH + query, content=body)
    assert response.status_code == 200
    (message,) = engine.heard
    assert message.role == "user"
    return (message.content[0].samples * 32768).astype(int).tolist()


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 300), max_size=8),
    cuts=st.lists(st.integers(0, 2500), max_size=12),
)
def test_f10_frames_are_whole_however_the_body_is_cut(sizes: list[int], cuts: list[int]) -> None:
    payloads = [bytes([number]) * size for number, size in enumerate(sizes)]
    body = b"".join(struct.pack("<I", len(p)) + p for p in payloads)
    edges = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    pieces = [body[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    assert list(unframed(pieces)) == payloads


def test_f10_a_body_in_odd_chunks_over_the_network_is_understood() -> None:
    body = seconds(2)
    engine = FakeEngine()
    with serving(engine) as url:
        pieces = (body[at : at + 777] for at in range(0, len(body), 777))
        assert httpx.post(url + PATH, content=pieces).status_code == 200
    assert len(engine.heard[0].content[0].samples) == 32_000


async def test_the_last_10_seconds_are_the_question() -> None:
    assert await heard(seconds(12)) == NUMBERS[2 * 16_000 : 12 * 16_000].tolist()


async def test_the_question_may_be_as_long_as_the_window() -> None:
    assert await heard(seconds(40), "?window_s=30") == NUMBERS[10 * 16_000 :].tolist()


async def test_one_second_is_enough() -> None:
    assert await heard(seconds(1)) == NUMBERS[:16_000].tolist()


async def test_the_reply_is_16_khz_in_frames_of_a_tenth_of_a_second() -> None:
    spoken = tone(0.33, RATE_HZ).astype(np.float32)
    pcm = pcm16_from_samples(spoken)
    engine = FakeEngine(
        AudioDelta(pcm[:1001] + pcm[1001:1002]), TextDelta("a"), AudioDelta(pcm[1002:]), DONE
    )
    response = await call(engine, "POST", PATH, content=seconds(1))
    payloads = list(unframed([response.content]))
    assert [len(p) for p in payloads] == [3200, 3200, 3200, 960]
    rounded = np.frombuffer(pcm, "<i2").astype(np.float32) / 32768
    assert b"".join(payloads) == pcm16_from_samples(soxr.resample(rounded, RATE_HZ, 16_000))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "0.000 s of audio came; send at least 1 s"),
        (seconds(0.999), "0.999 s of audio came"),
        (framed(bytes(2 * 15_999)), "0.999 s of audio came; send at least 1 s"),
        (seconds(2)[:-1], "the body ends inside a frame (3203 bytes of it came)"),
        (seconds(2) + b"\x01\x00", "the body ends inside a frame (2 bytes of it came)"),
        (framed(bytes(3)), "3 bytes are not whole samples"),
        (struct.pack("<I", MAX_FRAME_BYTES + 2), "a frame of 960002 bytes; send at most 960000"),
        (b"RIFF" + bytes(100), "a frame of 1179011410 bytes"),
    ],
)
async def test_bodies_that_are_not_frames_of_speech_are_400(body: bytes, reason: str) -> None:
    engine = FakeEngine()
    response = await call(engine, "POST", PATH, content=body)
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(reason)
    assert engine.requests == []


@pytest.mark.parametrize("value", ["0.5", "31", "nan", "ten"])
async def test_a_wrong_window_is_400_and_named(value: str) -> None:
    response = await call(FakeEngine(), "POST", f"{PATH}?window_s={value}", content=seconds(1))
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(f"window_s='{value}': ")


async def test_f10_a_refusal_is_a_status_and_never_a_frame() -> None:
    response = await call(FakeEngine(Overloaded("full")), "POST", PATH, content=seconds(1))
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert response.json()["error"] == {"type": "Overloaded", "message": "full"}


def test_frames_are_sent_while_the_reply_is_made() -> None:
    gate = threading.Event()
    engine = FakeEngine(AudioDelta(bytes(2 * RATE_HZ)), gate, DONE)
    with (
        serving(engine) as url,
        httpx.stream("POST", url + PATH, content=seconds(1)) as response,
    ):
        assert len(next(unframed(response.iter_raw()))) == 3200
        gate.set()


def test_f10_an_error_in_mid_reply_breaks_the_connection() -> None:
    engine = FakeEngine(AudioDelta(bytes(2 * RATE_HZ)), GenerationError("device"))
    with serving(engine) as url, pytest.raises(httpx.RemoteProtocolError):
        httpx.post(url + PATH, content=seconds(1))


def test_c2_a_caller_that_leaves_ends_the_generation() -> None:
    engine = FakeEngine(AudioDelta(bytes(2 * RATE_HZ)), threading.Event())
    with serving(engine) as url:
        with httpx.stream("POST", url + PATH, content=seconds(1)) as response:
            next(unframed(response.iter_raw()))
        assert engine.cancelled.wait(2)
