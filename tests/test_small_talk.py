"""Live conversations that make sense: real speech, the real turn detection, the small model."""

import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import soxr
from realtime_client import RATE_HZ, RealtimeClient, connected, serving, silence
from small_models import ANSWERS, MORE, heard, small_worker, spoken, words
from test_page import needs_vad
from torch import Tensor

from omnispeech.engine.vocoder import VocoderStream
from training.domain import NUMBERS

FIRST_BLOCK = 20  # units: 1.2 s of sound


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with small_worker(first_block=FIRST_BLOCK) as worker, serving(worker) as address:
        yield address


def question(name: str) -> np.ndarray:
    """[N] at 24 kHz, with the silence that ends a turn"""
    return np.concatenate([soxr.resample(spoken(name), 16_000, RATE_HZ), silence(1.0)])


async def asks(client: RealtimeClient, name: str) -> tuple[str, list[str]]:
    """What is answered, and what the judge hears of it."""
    begun = len(client.sound()), len(client.transcript())
    await client.append(question(name))
    response = (await client.until("response.done"))["response"]
    assert response["status"] == "completed"
    return client.transcript()[begun[1] :], heard(client.sound()[begun[0] :], RATE_HZ)


@needs_vad
async def test_a_talk_goes_on_from_its_last_answer(url: str) -> None:
    async with connected(url) as client:
        await client.begin()
        assert await asks(client, "sum") == (ANSWERS["sum"], words(ANSWERS["sum"]))
        assert await asks(client, "more") == (MORE, words(MORE))


@needs_vad
async def test_a_talk_of_several_questions_gives_each_its_own_answer(url: str) -> None:
    async with connected(url) as client:
        await client.begin()
        for name in ("sum", "repetition", "difference", "unknown"):
            assert await asks(client, name) == (ANSWERS[name], words(ANSWERS[name]))


async def test_a_talk_longer_than_the_context_of_the_model_stays_right(url: str) -> None:
    async with connected(url) as client:
        await client.begin()
        for number, word in enumerate(NUMBERS[:18]):
            await client.write(f"what is {word} plus two")
            [said] = (await client.reply(output_modalities=["text"]))["output"]
            right = f"{word} plus two is {NUMBERS[number + 2]}.".capitalize()
            assert said["content"][0]["text"] == right


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No sound behind the first block of a reply is made until this is set."""
    gate = threading.Event()
    push = VocoderStream.push

    def later(stream: VocoderStream, units: Sequence[int], final: bool) -> Tensor:
        assert not stream.units or gate.wait(60)
        return push(stream, units, final)

    monkeypatch.setattr(VocoderStream, "push", later)
    yield gate
    gate.set()


@needs_vad
async def test_who_interrupts_with_another_question_is_answered(
    url: str, held: threading.Event
) -> None:
    async with connected(url) as client:
        await client.begin()
        await client.append(question("long"))
        await client.until("response.output_audio.delta")
        await client.append(question("difference"))
        first = (await client.until("response.done"))["response"]
        cut = await client.until("conversation.item.truncated")
        played, told = client.sound(), client.transcript()
        held.set()
        second = (await client.until("response.done"))["response"]
        await client.send("conversation.item.retrieve", item_id=cut["item_id"])
        item = (await client.until("conversation.item.retrieved"))["item"]
    assert (first["status"], second["status"]) == ("cancelled", "completed")
    kept = item["content"][0]["transcript"]
    assert cut["audio_end_ms"] == pytest.approx(len(played) / 24, abs=1)
    assert kept and ANSWERS["long"].startswith(kept) and kept != ANSWERS["long"]
    assert heard(played, RATE_HZ)[:1] == words(kept)[:1]
    assert client.transcript()[len(told) :] == ANSWERS["difference"]
    assert heard(client.sound()[len(played) :], RATE_HZ) == words(ANSWERS["difference"])
