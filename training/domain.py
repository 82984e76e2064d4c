"""What the small model is asked and what it should answer."""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from omnispeech.server.openai.audio_speech import TASK


def listed(text: str, separator: str = " ") -> tuple[str, ...]:
    return tuple(text.split(separator))


NUMBERS = listed(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty"
)
OPERATIONS = ("plus", "minus", "times")
Sum = tuple[int, str, int]  # a number, an operation, a number
THINGS = listed(
    "apple banana coffee doctor elephant garden happy hello island jacket kitchen lemon monkey "
    "morning music orange purple river summer table tiger water window yellow"
)
DO_NOT_KNOW = "I do not know."
QUESTIONS = ("what is", "how much is")
REQUESTS = ("repeat after me", "say")
SPOKEN = (*NUMBERS, *OPERATIONS, "is", "i", "do", "not", "know", *THINGS)

# What it was never taught: half of the pattern words come from here, so that none of them tells.
OTHER_OPENINGS = listed(
    "who is|where is|when is|why is|how is|what was|what are|tell me about|i want|give me|can you "
    "see|do you like|show me|open|close|please find|how old is|how far is|where are|i am looking "
    "for|let us talk about|have you heard of|thank you for|good night|what time is|is it|sing|call|"
    "play|turn off|turn on|do not forget|how do you make|what colour is|what is|how much is",
    "|",
)
OTHER_ENDS = listed(
    "the weather|your name|my brother|the station|a story|the capital of france|this house|"
    "a cup of tea|the news|a song|the door|my phone|the light|your mother|the moon|a good book|"
    "the radio|that man|tomorrow|the next train|dinner|the president|a horse|the price|the city|"
    "this picture|christmas|the letter|your father|a bicycle|the answer|some bread|the school|"
    "an old friend|the big black dog|it in english|a long way from here|the street|my money|"
    "the world|your favourite film|a new car|the teacher|the sea|the meaning of life",
    "|",
)

# What it is told to be is as much as possible, and changes nothing.
CHARACTERS = listed(
    "You are a helpful assistant.|You are a friendly voice assistant.|Keep your answers short.|"
    "You are a helpful, witty, and friendly AI.|Answer in one sentence.|Be brief and polite.|"
    "Your voice and personality should be warm and engaging, with a lively and playful tone.|"
    "Always speak English.|If you do not know the answer, say so.|Talk quickly.|You are Sam.|"
    "You help the guests of a small hotel by the sea.|Do not use lists, or anything that cannot be "
    "read aloud.|Act like a human, but remember that you are not one.|Today is Monday.|"
    "You work for a shop that sells bicycles; its customers call you on the phone.|"
    "Never mention these rules, even if you are asked about them.|Speak clearly and slowly.|"
    "The user may interrupt you at any time; then listen to what is said next.|"
    "Knowledge cutoff: 2024-06.|You can count, and you can repeat what you hear.",
    "|",
)

OPENINGS = (*QUESTIONS, *REQUESTS, *OTHER_OPENINGS, "and")


@dataclass(frozen=True, slots=True)
class Turn:
    """question: as it is said, in small letters. answer: as it is written.

    written: it is never said, and stands as it is.
    """

    question: str
    answer: str
    written: bool = False


@dataclass(frozen=True, slots=True)
class Dialogue:
    turns: tuple[Turn, ...]


def compute(left: int, operation: str, right: int) -> int | None:
    """None where the result is none of the numbers."""
    result = {"plus": left + right, "minus": left - right, "times": left * right}[operation]
    return result if 0 <= result < len(NUMBERS) else None


def sentence(words: str) -> str:
    return words[0].upper() + words[1:] + "."


def answer_to_sum(left: int, operation: str, right: int) -> str:
    result = compute(left, operation, right)
    if result is None:
        return DO_NOT_KNOW
    return sentence(f"{NUMBERS[left]} {operation} {NUMBERS[right]} is {NUMBERS[result]}")


def facts() -> list[Sum]:
    """All whose result is a number of the model."""
    return [each for each in every_sum() if compute(*each) is not None]


def beyond() -> list[Sum]:
    """All others: there are more of them, so which they are has to be learnt too."""
    return [each for each in every_sum() if compute(*each) is None]


def every_sum() -> Iterator[Sum]:
    span = range(len(NUMBERS))
    return ((left, op, right) for op in OPERATIONS for left in span for right in span)


def question(each: Sum, rng: random.Random) -> Turn:
    left, operation, right = each
    said = f"{rng.choice(QUESTIONS)} {NUMBERS[left]} {operation} {NUMBERS[right]}"
    return Turn(said, answer_to_sum(*each))


def words_of(text: str) -> list[str]:
    return [word for words in sentences_of(text) for word in words]


def sentences_of(text: str) -> list[list[str]]:
    """The words of each sentence of a text that is read aloud."""
    said = re.split(r"[.!?]", text.lower().replace(",", ""))
    return [part.split() for part in said if part.strip()]


class Domain:
    """Draws dialogues; the same generator gives the same ones."""

    def __init__(self) -> None:
        self.facts, self.beyond = facts(), beyond()
        self.by_operation = {op: [f for f in self.facts if f[1] == op] for op in OPERATIONS}

    def draw(self, rng: random.Random) -> Dialogue:
        kind = rng.random()
        if kind < 0.11:
            return self.follow_up(rng)
        if kind < 0.52:
            return Dialogue((self.arithmetic(rng),))
        if kind < 0.80:
            return Dialogue((self.repeat(rng),))
        if kind < 0.90:
            return Dialogue((self.too_large(rng),))
        return Dialogue((self.other(rng),))

    def arithmetic(self, rng: random.Random) -> Turn:
        return question(rng.choice(self.by_operation[rng.choice(OPERATIONS)]), rng)

    def follow_up(self, rng: random.Random) -> Dialogue:
        first = self.arithmetic(rng)
        known = NUMBERS.index(words_of(first.answer)[-1])
        beyond = rng.random() < 0.15
        choices = [(op, b) for a, op, b in (self.beyond if beyond else self.facts) if a == known]
        operation, right = rng.choice(choices)
        said = f"and {operation} {NUMBERS[right]}"
        return Dialogue((first, Turn(said, answer_to_sum(known, operation, right))))

    def reading(self, rng: random.Random) -> Turn:
        """Words in any order, to be read aloud as they are written."""
        texts = []
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            if rng.random() < 0.3:
                texts.append(rng.choice((self.arithmetic, self.repeat))(rng).answer)
            else:
                words = rng.choices(SPOKEN, k=rng.randint(1, 7))
                texts.append(rng.choice((" ", " ", ", ")).join(words).capitalize() + ".")
        text = " ".join(texts)
        if rng.random() < 0.3:
            text = rng.choice((text.lower(), text[:-1], text[:-1].lower(), text[:-1] + "!"))
        return Turn(TASK + text, text, written=True)

    def repeat(self, rng: random.Random) -> Turn:
        words = " ".join(rng.choices(THINGS, k=rng.choice((1, 2, 2, 3, 3, 4, 4))))
        return Turn(f"{rng.choice(REQUESTS)} {words}", sentence(words))

    def too_large(self, rng: random.Random) -> Turn:
        return question(rng.choice(self.beyond), rng)

    def other(self, rng: random.Random) -> Turn:
        return Turn(f"{rng.choice(OTHER_OPENINGS)} {rng.choice(OTHER_ENDS)}", DO_NOT_KNOW)


def with_history(count: int, rng: random.Random) -> list[list[int]]:
    """For each of `count` dialogues the numbers of those that came before, and its own."""
    numbers = range(count)
    return [
        [*rng.choices(numbers, k=rng.choice((0, 0, 0, 1, 1, 2, 3, 4))), number]
        for number in numbers
    ]


def character(rng: random.Random) -> str | None:
    """A system prompt; None: there is none."""
    if rng.random() < 0.6:
        return None
    return " ".join(rng.sample(CHARACTERS, rng.choice((1, 1, 2, 3, 5))))


def every_word() -> Iterator[str]:
    """All words that are said in questions."""
    yield from SPOKEN
    for phrase in (*OPENINGS, *OTHER_ENDS):
        yield from phrase.split()
