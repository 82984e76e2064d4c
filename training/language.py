"""Trains the LLM and the speech LM together: what to answer, and in which units to say it."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from omnispeech.engine.interleave import Interleaver, Rules
from omnispeech.models.omnispeech import OmniSpeech, OmniSpeechConfig
from omnispeech.models.speech_lm import SpeechLM
from omnispeech.prompt import AUDIO, PromptBuilder, PromptMessage, UnitVocabulary
from omnispeech.tiny.tokenizer import END_OF_TURN, id_of
from training.answers import Lexicon
from training.batched import run, stacked
from training.domain import NUMBERS, Dialogue, Domain, Turn, character, with_history
from training.fitting import Figures, Plan, fit

BATCH = 24
REPLACED = 0.06  # of the units that are read while training: slips are lived with
TYPED = 0.35  # of the questions; the others stand where sound will be
READ = 0.15  # of what is written is to be read aloud
SIGNS = {"plus": "+", "minus": "-", "times": "*"} | {w: str(n) for n, w in enumerate(NUMBERS)}


@dataclass(frozen=True, slots=True)
class Item:
    """One reply in training."""

    prompt: list[int]  # ids, AUDIO_SLOT where sound goes
    heard: list[list[int]]  # ids of the words that stand in for each sound
    reply: list[int]  # text ids, the end included
    units: list[int]  # ids of the speech vocabulary, the end included


class Writer:
    """Dialogues -> ids, by the files the server reads."""

    def __init__(self, directory: Path, lexicon: Lexicon) -> None:
        self.prompts = PromptBuilder.from_directory(directory)
        self.text = Tokenizer.from_file(str(directory / "tokenizer.json"))
        speech = Tokenizer.from_file(str(directory / "tts" / "tokenizer.json"))
        self.speech_end = id_of(speech, END_OF_TURN)
        self.units = UnitVocabulary.from_directory(directory / "tts")
        self.lexicon = lexicon
        self.encode = lru_cache(maxsize=100_000)(self._encode)

    def item(
        self, turns: Sequence[Turn], typed: Sequence[str | None], system: str | None = None
    ) -> Item:
        """The last of the turns; typed: how each question is written, None where it is heard."""
        answer = turns[-1].answer
        return Item(
            self._prompt(turns, typed, system),
            [
                self.encode(turn.question)
                for turn, text in zip(turns, typed, strict=True)
                if text is None
            ],
            self.prompts.reply_ids(answer),
            [*map(self.units.to_id, self.lexicon.read_units(answer)), self.speech_end],
        )

    def _encode(self, text: str) -> list[int]:
        return self.text.encode(text, add_special_tokens=False).ids

    def _prompt(
        self, turns: Sequence[Turn], typed: Sequence[str | None], system: str | None
    ) -> list[int]:
        messages = [] if system is None else [PromptMessage("system", (system,))]
        for turn, text in zip(turns, typed, strict=True):
            messages.append(PromptMessage("user", (AUDIO if text is None else text,)))
            messages.append(PromptMessage("assistant", (turn.answer,)))
        return self.prompts.build(messages[:-1])


def as_typed(turn: Turn, rng: random.Random) -> str:
    if turn.written:
        return turn.question
    words = turn.question.split()
    if "is" in words and rng.random() < 0.4:
        words = [SIGNS.get(word, word) for word in words]
    question = " ".join(words)
    if rng.random() < 0.6:
        question = question[0].upper() + question[1:]
    return question + rng.choice(("", "", "?", "."))


@lru_cache(maxsize=4096)
def reading_order(texts: int, units: int, read: int, write: int) -> tuple[tuple[str, int], ...]:
    """What the speech LM reads for a reply of so many text tokens and units, ends included.

    ("speaker", 0), ("state", i) or ("unit", i); a unit is written after the last of each call.
    Another letter of the kind tells so: "unit!" or "state!".
    """
    rules = Rules(
        read=read, write=write, text_limit=1000, unit_limit=1000,
        text_end=frozenset((1,)), speech_end=frozenset((1,)),
    )  # fmt: skip
    spoken = Interleaver(rules)
    for i in range(texts):
        spoken.add_text(1 if i == texts - 1 else 0)
    order: list[tuple[str, int]] = []
    for i in range(units):
        step = spoken.next_input()
        assert step is not None and not spoken.done, (texts, units)
        order.append(("unit", i - 1) if i else ("speaker", 0))
        order += [("state", j) for j in step.states]
        kind, place = order[-1]
        order[-1] = (kind + "!", place)
        spoken.add_unit(1 if i == units - 1 else 0)
    assert spoken.done, (texts, units)
    return tuple(order)


def new_model(config: OmniSpeechConfig) -> OmniSpeech:
    torch.manual_seed(14)
    model = OmniSpeech(config)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.ones_(parameter)
        elif name.endswith(("embed_tokens.weight", "spk_ln.bias")):
            nn.init.normal_(parameter, std=0.1)
    nn.init.constant_(model.audio_adapter.ln.weight, 0.3)
    return model


def text_loss(
    model: OmniSpeech, prompts: list[Tensor], items: list[Item]
) -> tuple[Tensor, Tensor, float]:
    """prompts [L, H] each -> loss, states [all reply tokens, H], part of replies all right"""
    lm = model.llm_model
    rows = [
        torch.cat((p, lm.embed(torch.tensor(item.reply[:-1]))))
        for p, item in zip(prompts, items, strict=True)
    ]
    out = run(lm, stacked(rows))
    states = torch.cat(
        [
            out[i, len(p) - 1 : len(p) - 1 + len(item.reply)]
            for i, (p, item) in enumerate(zip(prompts, items, strict=True))
        ]
    )
    wanted = torch.tensor([token for item in items for token in item.reply])
    logits = lm.lm_head(states)
    right = all_right(logits.argmax(-1) == wanted, [len(item.reply) for item in items])
    return F.cross_entropy(logits, wanted), states, right


def unit_loss(
    model: OmniSpeech, states: Tensor, items: list[Item], rng: random.Random | None
) -> tuple[Tensor, float]:
    """states of all replies end to end -> loss, part of replies whose units are all right"""
    lm: SpeechLM = model.tts_lm_model
    conditions = torch.split(model.speech_condition(states), [len(item.reply) for item in items])
    rows, places = [], []
    for item, condition in zip(items, conditions, strict=True):
        config = model.config
        order = reading_order(len(item.reply), len(item.units), config.text_span, config.unit_span)
        units = lm.embed(torch.tensor(slips(item.units, rng)))
        kinds = {"speaker": lm.speaker()[None], "state": condition, "unit": units}
        rows.append(torch.stack([kinds[kind.rstrip("!")][place] for kind, place in order]))
        places.append([i for i, (kind, _) in enumerate(order) if kind.endswith("!")])
    out = run(lm, stacked(rows))
    wanted = torch.tensor([unit for item in items for unit in item.units])
    logits = lm.lm_head(torch.cat([out[i, at] for i, at in enumerate(places)]))
    right = all_right(logits.argmax(-1) == wanted, [len(item.units) for item in items])
    return F.cross_entropy(logits, wanted), right


def slips(units: list[int], rng: random.Random | None) -> list[int]:
    """Some are replaced by others of the reply."""
    if rng is None:
        return units
    return [rng.choice(units) if rng.random() < REPLACED else unit for unit in units]


def all_right(right: Tensor, lengths: list[int]) -> float:
    rows = torch.split(right, lengths)
    return sum(bool(row.all()) for row in rows) / len(rows)


def words_as_sounds(model: OmniSpeech, item: Item) -> list[Tensor]:
    return [model.llm_model.embed(torch.tensor(ids)) for ids in item.heard]


def train_language(
    config: OmniSpeechConfig, directory: Path, lexicon: Lexicon, steps: int, work: Path
) -> dict[str, Tensor]:
    model = new_model(config)
    for part in (model.audio_encoder_model, model.audio_adapter):
        part.requires_grad_(False)  # not heard yet
    writer, domain = Writer(directory, lexicon), Domain()
    plan = Plan(steps=steps, rate=2e-3, warm_up=100)

    def loss(rng: random.Random, done: float) -> tuple[Tensor, Figures]:
        items = written_items(writer, domain, BATCH, rng)
        prompts = [model.splice(item.prompt, words_as_sounds(model, item)) for item in items]
        text, states, exact = text_loss(model, prompts, items)
        speech, spoken = unit_loss(model, states, items, rng)
        return text + speech, {
            "text": float(text.detach()),
            "exact": exact,
            "units": float(speech.detach()),
            "said": spoken,
        }

    return fit("language", model, plan, loss, work)


def written_items(writer: Writer, domain: Domain, count: int, rng: random.Random) -> list[Item]:
    """No sound among them: what is not typed stands there in words."""
    dialogues = [
        Dialogue((domain.reading(rng),)) if rng.random() < READ else domain.draw(rng)
        for _ in range(count)
    ]
    items = []
    for numbers in with_history(count, rng):
        turns = [turn for number in numbers for turn in dialogues[number].turns]
        typed = [
            as_typed(turn, rng) if turn.written or rng.random() < TYPED else None for turn in turns
        ]
        items.append(writer.item(turns, typed, character(rng)))
    return items
