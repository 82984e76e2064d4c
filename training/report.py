"""The figures of a trained model, on answers and voices it was not trained on."""

import logging
from pathlib import Path

from omnispeech.checkpoint.decoder import load_decoder
from training.answers import make_lexicon
from training.asking import Outcome, ask_aloud, ask_in_writing, outcome, server
from training.judge import Judge
from training.listening import Chain, hiss_db, judged, unseen_answers
from training.recordings import Recordings

logger = logging.getLogger(__name__)

ANSWERS = 100
QUESTIONS = 200


def report_speech(work: Path, decoder: Path, answers: int = ANSWERS) -> None:
    """What is lost from the recording to the flow's sound."""
    chain = Chain(make_lexicon(work), load_decoder(decoder, convert=False))
    words, judge = unseen_answers(answers), Judge()
    for name, way in chain.ways().items():
        hiss = hiss_db(chain, words[:30], way)
        logger.info("%-24s %s; pauses %.0f dB", name, judged(judge, words, way), hiss)


def report_answers(work: Path, models: Path, held_out: Recordings, count: int = QUESTIONS) -> None:
    judge, lexicon = Judge(), make_lexicon(work)
    with server(models, threads=2) as address:
        tell("typed questions", outcome(judge, lexicon, ask_in_writing(address, held_out, count)))
        tell("spoken questions", outcome(judge, lexicon, ask_aloud(address, held_out, count)))


def tell(name: str, found: Outcome) -> None:
    logger.info("%s: text right %.3f", name, found.text_right)
    logger.info("  heard, against its text   %s", found.against_text)
    logger.info("  heard, against the truth  %s", found.against_truth)
    logger.info("  real-time factor %.2f; pauses %.0f dB", found.real_time, found.pauses_db)
    for question, voice, wanted, text in found.wrong[:40]:
        logger.info("  wrong: %s (%s): %s | %s", question, voice, wanted, text)
    for said, heard in found.misheard[:20]:
        logger.info("  misheard: %s | %s", said, heard)
