"""What is asked for the report, in voices that are held out, and what is right."""

import base64
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from omnispeech.audio.io import encode_wav
from training.asking import Reply, chat, read_aloud, speak_to
from training.domain import DO_NOT_KNOW, QUESTIONS, SPOKEN, Turn, beyond, question, sentence
from training.recordings import HEARD_HZ, Clip, Recordings

SILENCE_S = 0.2  # around a question
COUNTS = {
    "typed": 200,
    "beyond": 150,
    "spoken": 200,
    "second": 100,
    "third": 60,
    "told": 60,
    "other": 100,
}
READ = 60  # answers, and as many texts of any words
# As people write them who use a server like this; none was trained on.
OTHER_CHARACTERS = (
    "You are in a phone call. What you write is read aloud: plain words, no emojis, no bullet "
    "points, two sentences at most.",
    "Be a patient teacher. Explain what you do, and ask whether it was understood!",
    "You're the concierge of a smart home; respond in the language of the user.",
    "Du bist ein freundlicher Assistent.",
    "Your knowledge ends in October 2023. People talk with you in real time, so be quick and kind.",
    "# Role\nA support agent of ACME Inc.\n# Rules\n- Confirm names.\n- Never give refunds.",
)

Send = Callable[[str, int], Reply]  # to an address, with a seed
Said = tuple[Turn, Clip]
Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Question:
    told: str  # to whoever reads about it
    wanted: str
    send: Send

    @property
    def kind(self) -> str:
        if self.wanted == DO_NOT_KNOW:
            return "unknown"
        return "sums" if self.told.startswith(QUESTIONS) else "repetitions"


def typed(heard: Recordings) -> list[Question]:
    return [typed_question(turn) for (turn, _), *_ in heard.dialogues[: COUNTS["typed"]]]


def sums_beyond() -> list[Question]:
    """Typed sums whose result is no number of the model: it does not know them."""
    rng = random.Random("sums beyond")
    turns = [question(each, rng) for each in rng.sample(beyond(), COUNTS["beyond"])]
    return [typed_question(turn) for turn in turns]


def spoken(heard: Recordings, count: int) -> list[Question]:
    """The first question of each dialogue, by the server's own route"""
    return [
        asked([said], partial(speak_to, wav(heard, said[1])))
        for said, *_ in heard.dialogues[:count]
    ]


def second_turns(heard: Recordings) -> list[Question]:
    """They go on with the right answer to the first."""
    two = [dialogue for dialogue in heard.dialogues if len(dialogue) == 2]
    return [talk(heard, dialogue) for dialogue in two[: COUNTS["second"]]]


def third_questions(heard: Recordings) -> list[Question]:
    """Each stands behind two others, and their right answers, that have nothing to do with it."""
    first = [dialogue[0] for dialogue in heard.dialogues[: COUNTS["third"] + 2]]
    return [talk(heard, list(three)) for three in zip(first, first[1:], first[2:], strict=False)]


def under_other_prompts(heard: Recordings) -> list[Question]:
    first = [dialogue[0] for dialogue in heard.dialogues[: COUNTS["told"]]]
    return [
        talk(heard, [said], OTHER_CHARACTERS[number % len(OTHER_CHARACTERS)])
        for number, said in enumerate(first)
    ]


def answers_to_read(heard: Recordings) -> list[Question]:
    return [reading(dialogue[-1][0].answer) for dialogue in heard.dialogues[-READ:]]


def words_to_read() -> list[Question]:
    """One to seven words in any order"""
    rng = random.Random("words to read")
    texts = (" ".join(rng.choices(SPOKEN, k=rng.randint(1, 7))) for _ in range(READ))
    return [reading(sentence(words)) for words in texts]


def reading(text: str) -> Question:
    return Question(text, text, partial(read_aloud, text))


def typed_question(turn: Turn) -> Question:
    return Question(turn.question, turn.answer, partial(chat, [user(turn.question)]))


def talk(heard: Recordings, dialogue: list[Said], system: str | None = None) -> Question:
    """Over /v1/chat/completions, the last of the dialogue's questions"""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for turn, clip in dialogue:
        sound = base64.b64encode(wav(heard, clip)).decode()
        audio = {"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}}
        messages += [user([audio]), {"role": "assistant", "content": turn.answer}]
    return asked(dialogue, partial(chat, messages[:-1]))


def asked(dialogue: list[Said], send: Send) -> Question:
    turn, clip = dialogue[-1]
    before = "".join(f"; before: {t.answer}" for t, _ in dialogue[:-1])
    return Question(f"{turn.question} ({clip.voice}){before}", turn.answer, send)


def user(content: str | list[Message]) -> Message:
    return {"role": "user", "content": content}


def wav(heard: Recordings, clip: Clip) -> bytes:
    silence = np.zeros(int(SILENCE_S * HEARD_HZ), np.float32)
    sound = np.concatenate([silence, heard.read(clip), silence])
    return encode_wav((sound * 32767).astype("<i2").tobytes(), HEARD_HZ)
