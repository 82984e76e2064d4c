"""The small model answers what lies in examples/ as examples/README.md says."""

import asyncio
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from small_models import small_worker

from omnispeech.audio.io import decode_audio
from omnispeech.engine.events import Audio, Message, Text, TextDelta, TurnRequest
from omnispeech.engine.worker import Worker

EXAMPLES = Path(__file__).parent.parent / "examples"
CONVERSATIONS = (EXAMPLES / "calibration/conversations.jsonl").read_text().splitlines()
STATED = re.findall(
    r"\| `([\w-]+\.wav)` \| .* \| ([\w ]+\.) \|", (EXAMPLES / "README.md").read_text()
)
SEEDS = 20


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with small_worker(max_conversations=4, max_waiting=100) as ready:
        yield ready


def spoken(name: str) -> Message:
    return Message("user", (Audio(decode_audio((EXAMPLES / name).read_bytes(), max_seconds=9)),))


def asked(worker: Worker, *messages: Message, **sampling: float) -> str:
    async def text() -> str:
        request = TurnRequest(messages=messages, speech=False, **sampling)
        events = [event async for event in worker.answer(request)]
        return "".join(event.text for event in events if isinstance(event, TextDelta))

    return asyncio.run(text())


def test_the_readme_names_a_question_and_a_follow_up() -> None:
    assert [name for name, _ in STATED] == ["question.wav", "follow-up.wav"]


@pytest.mark.parametrize("turns", [1, 2])
def test_the_answers_are_right_however_they_are_drawn(worker: Worker, turns: int) -> None:
    (question, first), (follow_up, second) = STATED
    history = (spoken(question), Message("assistant", (Text(first),)), spoken(follow_up))
    ask = partial(asked, worker, *history[: 2 * turns - 1])
    with ThreadPoolExecutor(4) as people:
        drawn = set(people.map(lambda seed: ask(seed=seed), range(SEEDS)))
    assert drawn | {ask(temperature=0.0)} == {(first, second)[turns - 1]}


@pytest.mark.parametrize("line", CONVERSATIONS)
def test_the_answers_to_calibrate_with_are_the_models_own(worker: Worker, line: str) -> None:
    history: list[Message] = []
    for message in json.loads(line)["messages"]:
        if message["role"] == "user":
            history.append(spoken(f"calibration/{message['content'][0]['path']}"))
        else:
            assert asked(worker, *history, temperature=0.0) == message["content"]
            history.append(Message("assistant", (Text(message["content"]),)))
