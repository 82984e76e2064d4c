"""How much of a reply's text has been heard, from how much of its sound has been played.

The model writes text and sound in turns and does not say which unit speaks which word. What is
known: a word cannot sound before the units of its own span (TextDelta.from_s), the words follow
each other in order, and all of them are spoken between the first and the last moment of a finished
reply. So each word is placed

* in a finished reply, in proportion to the text before it;
* in one still being made, at the pace of ordinary speech (PACE_S for a letter, WIDE times that for
  a Chinese character), or slower if so much sound has come for so little text;

and in both never before its `from_s`, and MARGIN letters late: what the model remembers of its own
reply should rather be too little than too much. On synthetic speech whose times of words are known
a finished reply is off by 0.6 words on average, by 2 words too many or 4 too few at worst, and a
word too many is told in a quarter of the places. Pauses are what it cannot see.
"""

from dataclasses import dataclass

PACE_S = 0.065  # 150 words a minute, six letters and spaces to a word
WIDE = 3.5  # 4 to 5 Chinese characters a second
MARGIN = 2.0  # letters
SHORT_MS = 100  # what a player that counts in pieces may say too little at the end of a reply


@dataclass(frozen=True, slots=True)
class _Delta:
    text: str
    from_ms: float


class SpokenText:
    """The text of one reply beside the sound that the client was given."""

    def __init__(self) -> None:
        self._deltas: list[_Delta] = []
        self._audio_ms = 0.0
        self._finished = False

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self._deltas)

    @property
    def audio_ms(self) -> float:
        return self._audio_ms

    def add_text(self, text: str, from_s: float) -> None:
        self._deltas.append(_Delta(text, from_s * 1000))

    def add_audio(self, ms: float) -> None:
        self._audio_ms += ms

    def finish(self) -> None:
        """Text and sound are whole. Not to be called for a reply that was broken off."""
        self._finished = True

    def text_until(self, ms: float) -> str:
        """Whole words, without the space after the last; between Chinese or Japanese characters
        every place is the end of a word.

        0 -> ""; from the end of a finished reply on -> all of it, and already from SHORT_MS before
        it (a twentieth of a short reply), or the last word of a reply that was heard to its end
        would be lost to rounding. More sound is never less text, and sound beyond what was given
        cannot have been heard.
        """
        if ms <= 0:
            return ""
        if self._finished and ms >= self._audio_ms - min(SHORT_MS, self._audio_ms / 20):
            return self.text
        text = self.text
        end = self._letters_until(min(ms, self._audio_ms))
        while end and not self._is_end_of_word(text, end):
            end -= 1
        return text[:end].rstrip()

    def _letters_until(self, ms: float) -> int:
        """Letters that are over, by the margin, at `ms`."""
        pace_ms = self._pace_ms()
        count, spoken_ms = 0, MARGIN * pace_ms
        for delta in self._deltas:
            if delta.from_ms >= ms:
                return count
            for letter in delta.text:
                spoken_ms += pace_ms * _weight(letter)
                if spoken_ms > ms:
                    return count
                count += 1
        return count

    def _pace_ms(self) -> float:
        """Of a letter of weight 1. Speech does not run ahead of the text, so the sound there is
        was spent on no more than the text there is."""
        weight = sum(map(_weight, self.text))
        if not weight:
            return 0.0
        seen = self._audio_ms / weight
        return seen if self._finished else max(seen, PACE_S * 1000)

    def _is_end_of_word(self, text: str, end: int) -> bool:
        if end == len(text):  # the next delta may go on with the word
            return self._finished or _unspaced(text[-1]) or text[-1].isspace()
        return text[end].isspace() or _unspaced(text[end - 1]) or _unspaced(text[end])


def _weight(letter: str) -> float:
    return WIDE if _unspaced(letter) else 1.0


def _unspaced(letter: str) -> bool:
    """Of a writing without spaces: ideographs, kana, and their full-width punctuation."""
    return (
        "\u2e80" <= letter <= "\u9fff"
        or "\uf900" <= letter <= "\ufaff"
        or "\uff00" <= letter <= "\uffef"
        or "\U00020000" <= letter <= "\U0003ffff"
    )
