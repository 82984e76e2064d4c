"""What a replica does that a server alone need not."""

import asyncio
from collections.abc import Sequence

import httpx
from fake_engine import FakeEngine, sound_file, tone
from starlette.types import Message, Receive, Scope, Send

from omnispeech.config import ServerConfig
from omnispeech.server.app import create_app
from omnispeech.server.one_of_many import Answer, OneOfMany, credentials

FIGURES = '# HELP talks_total Talks.\n# TYPE talks_total counter\ntalks_total{{kind="x"}} {}\n'


async def get(path: str, *answers: Answer) -> httpx.Response:
    """What replica "one" says to a GET, when all of them answer it so."""

    async def ask_all(asked: str, headers: dict[str, str]) -> Sequence[Answer]:
        assert asked == path and headers == {"host": "test"}
        return answers

    app = OneOfMany(create_app(FakeEngine(), ServerConfig()), "one", 2, ask_all)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.get(path)


def text(name: str, status: int) -> Answer:
    return Answer(name, status, f'{{"from": "{name}"}}'.encode(), "application/json")


async def test_an_answer_names_its_replica() -> None:
    assert (await get("/health")).headers["X-Replica"] == "one"


async def test_the_text_of_a_turn_comes_from_the_replica_that_made_it() -> None:
    answer = await get("/v1/speech/abc", text("one", 404), text("two", 200), text("three", 404))
    assert (answer.status_code, answer.json()) == (200, {"from": "two"})


async def test_a_turn_that_no_replica_knows_is_not_found() -> None:
    answer = await get("/v1/speech/abc", text("one", 404), text("two", 404))
    assert answer.status_code == 404


async def test_replicas_that_do_not_answer_are_asked_for_later() -> None:
    for path in ("/v1/speech/abc", "/metrics"):
        answer = await get(path)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")


async def test_a_key_that_the_replicas_do_not_know_is_refused_by_all_of_them() -> None:
    for path in ("/v1/speech/abc", "/metrics"):
        answer = await get(path, text("one", 401), text("two", 401))
        assert answer.status_code == 401


def test_a_question_to_all_brings_its_key_and_its_origin() -> None:
    headers = [(b"authorization", b"Bearer k"), (b"origin", b"http://a"), (b"accept", b"*/*")]
    brought = credentials({"type": "http", "headers": headers})
    assert brought == {"authorization": "Bearer k", "origin": "http://a"}


async def test_metrics_are_those_of_all_replicas_told_apart() -> None:
    answers = [Answer(n, 200, FIGURES.format(v).encode(), "") for n, v in (("a", 1), ("b", 2))]
    lines = (await get("/metrics", *answers)).text.splitlines()
    assert 'talks_total{kind="x",replica="a"} 1.0' in lines
    assert 'talks_total{kind="x",replica="b"} 2.0' in lines
    assert lines.count("# TYPE talks_total counter") == 1


async def test_histograms_and_labels_of_replicas_stay_what_they_are() -> None:
    app = create_app(FakeEngine(), ServerConfig())
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        await client.post("/v1/speech", content=sound_file(tone(0.2)))
        own = await client.get("/metrics")
    lines = (await get("/metrics", *(Answer(n, 200, own.content, "") for n in "ab"))).text
    for name in "ab":
        for line in (
            f'omnispeech_underrun_seconds_bucket{{le="+Inf",replica="{name}"}} 1.0',
            f'omnispeech_continuous_replies_total{{gap_ms="100",replica="{name}"}} 1.0',
            f'omnispeech_requests_total{{replica="{name}",route="/v1/speech",status="200"}} 1.0',
        ):
            assert line in lines.splitlines()


class Talks:
    """WebSockets to a replica that has room for one. A talk goes on until it is told to end."""

    def __init__(self) -> None:
        self.end = asyncio.Event()
        self._app = OneOfMany(self._talk, "one", 1, self._ask_all)

    async def _talk(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})
        await self.end.wait()

    async def _ask_all(self, path: str, headers: dict[str, str]) -> Sequence[Answer]:
        raise AssertionError("a talk asks nobody")

    async def connect(self, sent: list[Message]) -> None:
        async def receive() -> Message:
            return {"type": "websocket.connect"}

        async def send(message: Message) -> None:
            sent.append(message)

        await self._app({"type": "websocket", "path": "/ws/stream"}, receive, send)


async def test_one_talk_too_many_is_told_so_and_a_place_becomes_free_again() -> None:
    talks = Talks()
    taken: list[Message] = []
    refused: list[Message] = []
    first = asyncio.create_task(talks.connect(taken))
    await asyncio.sleep(0)
    await talks.connect(refused)
    assert taken == [{"type": "websocket.accept", "headers": [(b"x-replica", b"one")]}]
    assert refused[1]["code"] == 1013
    assert refused[1]["reason"] == "1 conversations are open; try again in a second"
    talks.end.set()
    await first
    again: list[Message] = []
    await talks.connect(again)
    assert [message["type"] for message in again] == ["websocket.accept"]
