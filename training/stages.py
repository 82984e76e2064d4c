"""What is made of what, in the order in which it is made; whatever is there is not made again."""

import random
from collections.abc import Callable
from pathlib import Path

from training.answers import Sentence, make_lexicon, make_sentence
from training.domain import Domain, words_of
from training.recordings import JUDGED, STRANGERS, TRAINED, Recordings, record
from training.shape import write_decoder_settings, write_opens2s_settings

SENTENCES = 500  # answers the decoder is trained on
RECORDED = {"trained": 24_000, "judged": 1_000, "strangers": 300}  # dialogues
STEPS = {"vocoder": 2000, "flow": 4000, "ear": 1800, "language": 2800, "talk": 2400}


def models(work: Path) -> Path:
    return work / "models"


def opens2s(work: Path) -> Path:
    return models(work) / "OpenS2S"


def decoder(work: Path) -> Path:
    return models(work) / "glm-4-voice-decoder"


def sentences(work: Path) -> list[Sentence]:
    lexicon, rng, domain = make_lexicon(work), random.Random("answers"), Domain()
    drawn = (words_of(domain.draw(rng).turns[-1].answer) for _ in range(SENTENCES))
    return [make_sentence(lexicon, words) for words in drawn]


def trained(work: Path) -> Recordings:
    return record(work, "trained", RECORDED["trained"], TRAINED)


def judged(work: Path) -> Recordings:
    return record(work, "judged", RECORDED["judged"], JUDGED)


def strangers(work: Path) -> Recordings:
    return record(work, "strangers", RECORDED["strangers"], STRANGERS)


def settings(work: Path) -> None:
    write_opens2s_settings(opens2s(work))
    write_decoder_settings(decoder(work))


def recordings(work: Path) -> None:
    make_lexicon(work)
    judged(work)
    strangers(work)
    trained(work)


def vocoder(work: Path) -> None:
    from training.vocoder import train_vocoder

    config = write_decoder_settings(decoder(work))[1]
    train_vocoder(config, sentences(work), STEPS["vocoder"], work)


def flow(work: Path) -> None:
    from training.flow import train_flow

    config = write_decoder_settings(decoder(work))[0]
    train_flow(config, sentences(work), STEPS["flow"], work)


def ear(work: Path) -> None:
    from training.hearing import train_ear

    train_ear(write_opens2s_settings(opens2s(work)), trained(work), STEPS["ear"], work)


def language(work: Path) -> None:
    from training.language import train_language

    config = write_opens2s_settings(opens2s(work))
    train_language(config, opens2s(work), make_lexicon(work), STEPS["language"], work)


def talk(work: Path) -> None:
    from training.talk import train_talk

    config = write_opens2s_settings(opens2s(work))
    heard = trained(work)
    train_talk(config, opens2s(work), make_lexicon(work), heard, STEPS["talk"], work)


def export(work: Path) -> None:
    from training.export import export_decoder, export_opens2s, tell_size
    from training.fitting import load

    export_opens2s(opens2s(work), load(work, "talk"))
    export_decoder(decoder(work), load(work, "flow"), load(work, "vocoder"))
    tell_size(models(work))


def figures(work: Path) -> None:
    from training.report import report

    report(work, models(work), make_lexicon(work), judged(work), strangers(work))


STAGES: dict[str, Callable[[Path], None]] = {
    "settings": settings,
    "recordings": recordings,
    "vocoder": vocoder,
    "flow": flow,
    "ear": ear,
    "language": language,
    "talk": talk,
    "export": export,
    "report": figures,
}
