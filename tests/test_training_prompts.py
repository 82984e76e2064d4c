"""What is trained on is what the server reads and writes, message by message."""

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fake_engine import DONE, FakeEngine, serving, sound

from omnispeech.engine.conversations import _prompt_message
from omnispeech.engine.events import TextDelta
from omnispeech.prompt import END_OF_TURN, SPEECH_END, PromptBuilder
from training.answers import TAIL_UNITS, Lexicon
from training.asking import Reply, chat, read_aloud, speak_to
from training.domain import CHARACTERS, SPOKEN, Domain, Turn, character, facts, with_history
from training.language import Writer, as_typed, written_items
from training.questions import OTHER_CHARACTERS
from training.recordings import HELD_OUT, JUDGED, STRANGERS, TRAINED, VARIANTS
from training.shape import write_opens2s_settings

ROOT = Path(__file__).parent.parent
SUM = Turn("what is three plus four", "Three plus four is seven.")
NEXT = Turn("and plus two", "Seven plus two is nine.")
ANSWER = (TextDelta("Three"), sound(500), TextDelta(" plus"), sound(300, 500), DONE)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("opens2s")
    write_opens2s_settings(path)
    return path


@pytest.fixture(scope="module")
def writer(directory: Path) -> Writer:
    forms = (word + end for word in SPOKEN for end in ("", "."))
    units = {form: [number, number + 200] for number, form in enumerate(forms)}
    return Writer(directory, Lexicon({}, units, 0, torch.empty(0)))


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine(*ANSWER)


@pytest.fixture(scope="module")
def address(engine: FakeEngine) -> Iterator[str]:
    with serving(engine) as url:
        yield url


@pytest.fixture
def asked(engine: FakeEngine, directory: Path) -> Callable[[], list[int]]:
    """The prompt of the server for what it was asked last"""
    builder = PromptBuilder.from_directory(directory)
    return lambda: builder.build([_prompt_message(message) for message in engine.heard])


@pytest.mark.parametrize("system", [None, "You are Sam."])
def test_a_talk_is_trained_as_the_server_reads_it(
    address: str, asked: Callable[[], list[int]], writer: Writer, system: str | None
) -> None:
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [
        {"role": "user", "content": SUM.question},
        {"role": "assistant", "content": SUM.answer},
        {"role": "user", "content": NEXT.question},
    ]
    chat(messages, address, 0)
    typed = [SUM.question, NEXT.question]
    assert writer.item([SUM, NEXT], typed, system).prompt == asked()


def test_a_heard_question_is_trained_as_the_server_reads_it(
    address: str, asked: Callable[[], list[int]], writer: Writer
) -> None:
    speak_to((ROOT / "examples" / "question.wav").read_bytes(), address, 0)
    assert writer.item([SUM], [None]).prompt == asked()


def test_a_text_to_be_read_is_trained_as_the_server_reads_it(
    address: str, asked: Callable[[], list[int]], writer: Writer
) -> None:
    turn = Domain().reading(random.Random(1))
    read_aloud(turn.answer, address, 0)
    assert writer.item([turn], [as_typed(turn, random.Random(1))]).prompt == asked()


def test_what_the_server_says_is_taken_whole(address: str) -> None:
    reply = chat([{"role": "user", "content": "what is three plus four"}], address, 0)
    assert reply.text == "Three plus"
    assert len(reply.samples) == round(800 * reply.rate_hz / 22_050)
    assert Reply("", reply.samples[:0], 24_000, 1.0).real_time is None


def test_replies_end_as_the_published_model_ends_them(writer: Writer) -> None:
    item = writer.item([SUM], [None])
    ends = [writer.text.token_to_id(token) for token in (SPEECH_END, END_OF_TURN)]
    assert item.reply[-2:] == ends
    assert writer.text.decode(item.reply[:-2]) == SUM.answer
    assert item.units[-1] == writer.speech_end


def test_a_text_is_read_word_for_word(writer: Writer) -> None:
    turn = Turn("read this", "Apple, seven. zero", written=True)
    units = [u for form in ("apple", "seven.", "zero.") for u in writer.lexicon.units[form]]
    silence = [0] * TAIL_UNITS
    heard = [writer.units.to_unit(i) for i in writer.item([turn], [turn.question]).units[:-1]]
    assert heard == [*units[:4], *silence, *units[4:], *silence]


def test_every_text_to_be_read_can_be_said(writer: Writer) -> None:
    rng, domain = random.Random(1), Domain()
    for _ in range(200):
        turn = domain.reading(rng)
        assert turn.question.endswith(turn.answer)
        assert writer.lexicon.read_units(turn.answer)


def test_histories_and_system_prompts_are_among_what_is_trained(writer: Writer) -> None:
    rng = random.Random(1)
    told = [character(rng) for _ in range(100)]
    assert None in told and any(told)
    histories = with_history(100, rng)
    assert [numbers[-1] for numbers in histories] == [*range(100)]
    assert {len(numbers) for numbers in histories} == {1, 2, 3, 4, 5}
    assert len(written_items(writer, Domain(), 24, rng)) == 24


def test_no_voice_that_judges_was_trained_on() -> None:
    assert not {*HELD_OUT} & {*VARIANTS}
    assert not {*TRAINED.people} & {*STRANGERS.people}
    rng = random.Random(1)
    voices = [{v.draw(rng)[0].name for _ in range(2000)} for v in (TRAINED, JUDGED, STRANGERS)]
    assert not voices[0] & (voices[1] | voices[2])


def test_no_system_prompt_of_the_report_was_trained_on() -> None:
    for prompt in OTHER_CHARACTERS:
        assert all(known not in prompt for known in CHARACTERS)


def test_no_fact_is_held_out() -> None:
    rng, domain = random.Random(1), Domain()
    drawn = {domain.arithmetic(rng).answer for _ in range(20_000)}
    assert len(drawn) == len(facts())


def test_nothing_that_serves_imports_the_training() -> None:
    imports = re.compile(r"^\s*(from|import) training\b", re.MULTILINE)
    files = [*(ROOT / "omnispeech").rglob("*.py"), *ROOT.glob("*.py")]
    assert not [path for path in files if imports.search(path.read_text(encoding="utf-8"))]
