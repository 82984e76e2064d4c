"""Joins ear and language: spoken questions to spoken answers, everything trained together."""

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from omnispeech.models.omnispeech import OmniSpeechConfig
from omnispeech.models.whisper import WhisperEncoder
from training.answers import Lexicon
from training.domain import Domain, character, with_history
from training.fitting import Figures, Plan, fit, load
from training.hearing import Heads, draw, features, spoiled
from training.hearing import listen as hearing
from training.language import (
    Writer,
    new_model,
    text_loss,
    unit_loss,
    words_as_sounds,
    written_items,
)
from training.recordings import Clip, Recordings

BATCH = 24
HEARD = 20  # of them by ear


class Talker(nn.Module):
    def __init__(self, config: OmniSpeechConfig) -> None:
        super().__init__()
        self.model = new_model(config)
        self.heads = Heads(config.audio_encoder.d_model, config.llm.hidden_size)

    def start_from(self, ear: dict[str, Tensor], language: dict[str, Tensor]) -> None:
        heard = {f"model.{name}": value for name, value in ear.items() if name.startswith("audio_")}
        heads = {name: value for name, value in ear.items() if not name.startswith("audio_")}
        said = {f"model.{name}": value for name, value in language.items()}
        self.load_state_dict(said | heard | heads)


def train_talk(
    config: OmniSpeechConfig,
    directory: Path,
    lexicon: Lexicon,
    recordings: Recordings,
    steps: int,
    work: Path,
) -> dict[str, Tensor]:
    talker = Talker(config)
    talker.start_from(load(work, "ear"), load(work, "language"))
    writer, domain = Writer(directory, lexicon), Domain()
    plan = Plan(steps=steps, rate=1e-3, warm_up=100, average=0.998, decay_from=0.3)
    known = sorted(recordings.dialogues, key=lambda d: max(clip.length for _, clip in d))

    def loss(rng: random.Random, done: float) -> tuple[Tensor, Figures]:
        model = talker.model
        dialogues, whole = draw(known, HEARD, rng)
        clips = [clip for dialogue in dialogues for _, clip in dialogue]
        samples = [spoiled(recordings.read(c), rng, 1.0, longer=whole) for c in clips]
        sounds, early, late = listen(talker, clips, features(samples, rng, 1.0), whole=whole)
        heard = [[next(sounds) for _ in dialogue] for dialogue in dialogues]
        items, prompts = [], []
        for numbers in with_history(HEARD, rng):
            turns = [turn for number in numbers for turn, _ in dialogues[number]]
            items.append(writer.item(turns, [None] * len(turns), character(rng)))
            vectors = [vector for number in numbers for vector in heard[number]]
            prompts.append(model.splice(items[-1].prompt, vectors))
        for item in written_items(writer, domain, BATCH - HEARD, rng):
            items.append(item)
            prompts.append(model.splice(item.prompt, words_as_sounds(model, item)))
        text, states, exact = text_loss(model, prompts, items)
        half = torch.split(states, [len(item.reply) for item in items])[::2]
        speech, spoken = unit_loss(model, torch.cat(half), items[::2], rng)
        total = text + speech + 0.2 * (early + late)
        return total, {
            "text": float(text.detach()),
            "exact": exact,
            "units": float(speech.detach()),
            "said": spoken,
            "words": float(late.detach()),
        }

    return fit("talk", talker, plan, loss, work)


def listen(
    talker: Talker, clips: list[Clip], heard: tuple[list[Tensor], list[int]], *, whole: bool = True
) -> tuple[Iterator[Tensor], Tensor, Tensor]:
    """-> [T', H] of each clip, and how badly sounds and words can be told."""
    encoder = talker.model.audio_encoder_model
    assert isinstance(encoder, WhisperEncoder)
    found = hearing(encoder, talker.model.audio_adapter, *heard, whole=whole)
    return iter(found.of_clips()), *talker.heads(clips, found)
