"""Spoken questions, asked of a server as anybody starts it; what it says is judged by another."""

import base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai_client import MODEL
from small_models import ANSWERS, MORE, heard, pcm, recorded, words

from omnispeech.cli import main
from omnispeech.client import server_sent
from training.asking import server

SPOKEN: Any = {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "pcm16"}}
OPENAI_HZ = 24_000
THREE = ("sum", "repetition", "unknown")


@dataclass
class Reply:
    text: str = ""
    pieces: list[bytes] = field(default_factory=list)
    rates: set[int] = field(default_factory=set)
    done: dict[str, Any] = field(default_factory=dict)

    @property
    def samples(self) -> np.ndarray:
        return pcm(self.pieces)

    @property
    def seconds(self) -> float:
        return len(self.samples) / 22_050


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    place = tmp_path_factory.mktemp("answers")
    assert main(["small", str(place / "models")]) == 0
    with server(place / "models", 2, place / "log") as address:
        yield address


def ask(url: str, name: str, seed: int = 1) -> Reply:
    """POST /v1/speech, read as it comes."""
    reply, query = Reply(), {"format": "events", "seed": seed}
    with httpx.stream(
        "POST", f"{url}/v1/speech", params=query, content=recorded(name), timeout=60
    ) as response:
        for event, data in server_sent(response.iter_lines()):
            if event == "text":
                reply.text += data["text"]
            elif event == "audio":
                reply.pieces.append(base64.b64decode(data["audio"]))
                reply.rates.add(data["rate_hz"])
            else:
                assert event == "done", data
                reply.done = data
    return reply


@pytest.mark.parametrize("name", THREE)
def test_a_spoken_question_is_answered_in_speech_that_is_understood(url: str, name: str) -> None:
    reply = ask(url, name)
    assert reply.text == ANSWERS[name]
    assert reply.rates == {22_050}
    assert heard(reply.samples, 22_050) == words(reply.text)


@pytest.mark.parametrize("name", THREE)
def test_an_answer_ends_by_itself_with_its_last_word(url: str, name: str) -> None:
    reply = ask(url, name, seed=2)
    assert reply.done["finish"] == {"text": "stop", "speech": "stop"}
    assert len(reply.samples) == reply.done["usage"]["units"] * 441 // 64 * 256
    assert 0.25 < reply.seconds / len(words(reply.text)) < 0.75


def test_sound_is_streamed_before_the_answer_is_whole(url: str) -> None:
    reply = ask(url, "long")
    assert len(reply.pieces) > 1
    assert reply.done["timings"]["first_audio_s"] < reply.done["timings"]["total_s"]
    assert heard(reply.samples, 22_050) == words(ANSWERS["long"])


def test_people_who_ask_at_once_are_each_given_their_own_answer(url: str) -> None:
    with ThreadPoolExecutor() as pool:
        replies = dict(zip(ANSWERS, pool.map(lambda name: ask(url, name), ANSWERS), strict=True))
    assert {name: reply.text for name, reply in replies.items()} == ANSWERS
    for reply in replies.values():
        assert heard(reply.samples, 22_050) == words(reply.text)


def said(name: str) -> Any:
    data = base64.b64encode(recorded(name)).decode()
    part = {"type": "input_audio", "input_audio": {"data": data, "format": "flac"}}
    return {"role": "user", "content": [part]}


def completed(url: str, *messages: Any) -> Any:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(model=MODEL, messages=messages, seed=1, **SPOKEN)
    return answer.choices[0].message


def test_a_follow_up_goes_on_from_what_was_answered(url: str) -> None:
    first = completed(url, said("sum"))
    assert first.audio.transcript == ANSWERS["sum"]
    then = completed(url, said("sum"), first, said("more"))
    assert then.audio.transcript == MORE
    sound = np.frombuffer(base64.b64decode(then.audio.data), "<i2")
    assert heard(sound, OPENAI_HZ) == words(MORE)


def test_another_question_is_not_confused_by_the_first(url: str) -> None:
    first = completed(url, said("sum"))
    then = completed(url, said("sum"), first, said("difference"))
    assert then.audio.transcript == ANSWERS["difference"]
    sound = np.frombuffer(base64.b64decode(then.audio.data), "<i2")
    assert heard(sound, OPENAI_HZ) == words(ANSWERS["difference"])
