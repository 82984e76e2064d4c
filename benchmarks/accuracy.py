"""bench.py accuracy: what quantization costs a model that answers in speech.

python bench.py accuracy                  the small model, 200 spoken questions, every row
python bench.py accuracy --questions 40 --only "LLM, AWQ" "both, AWQ"
python bench.py accuracy --snr 0          questions in noise as loud as they are
python bench.py accuracy --models DIR     another model that `python -m training` has made

Needs espeak-ng, which asks, and pocketsphinx, which listens. Rows that --work holds are not
measured again.
"""

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.forced import Logits, Reply, compared, logits_at, reply_of
from benchmarks.hardware import hardware, say
from benchmarks.spoken import AT_ONCE, Listener, answer, calibration, held_out, requests
from benchmarks.tables import accuracy_table
from benchmarks.variants import CPU, FLOAT, QUANTIZED, ROOT, VARIANTS, language_bytes, load, make
from omnispeech.checkpoint.decoder import load_decoder
from omnispeech.checkpoint.models_directory import DECODER, OPENS2S
from omnispeech.config import DecoderConfig, EngineConfig
from omnispeech.engine.conversations import Conversations
from omnispeech.engine.runner import Models
from omnispeech.engine.session import Session
from training.answers import make_lexicon
from training.domain import words_of
from training.judge import score
from training.voices import RATE_HZ

SMALL = ROOT / "omnispeech" / "small"
WORK = Path.home() / ".cache" / "omnispeech-bench" / "accuracy"
POSITIONS = 1024  # of one reply, in either language model
CALIBRATING = 300  # dialogues of the domain
WAYS = {"sampled": False, "greedy": True}
CEILING = "ceiling"


class Bench:
    """What all rows share: questions, the speech decoder, the float model's own replies."""

    def __init__(self, models: Path, work: Path, questions: int, snr_db: float | None) -> None:
        """models: are copied first, so that all rows are of the same."""
        self.work = work
        make((), models, self._original, self._calibration)
        self.decoder = load_decoder(self._original / DECODER)
        self.listener = Listener(self.decoder)
        self.asked = held_out(work, questions, snr_db)

    @cached_property
    def replies(self) -> list[Reply]:
        """Greedy ones of the float model, which the others are made to give."""
        sessions = answer(self.engine(FLOAT), requests(self.asked, greedy=True))
        return [reply_of(session) for session in sessions]

    @cached_property
    def exact(self) -> list[Logits]:
        return self._logits(self.engine(FLOAT))

    def _logits(self, engine: Conversations) -> list[Logits]:
        return [logits_at(engine, reply) for reply in self.replies]

    def directory(self, name: str) -> Path:
        """The models directory of a row, which is made if it is not there."""
        made = VARIANTS[name].directory
        directory = self.work / "models" / made
        make(QUANTIZED[made], self._original, directory, self._calibration)
        return directory

    @property
    def _original(self) -> Path:
        return self.work / "models" / "original"

    def _calibration(self) -> Path:
        return calibration(self.work, CALIBRATING)

    def engine(self, name: str) -> Conversations:
        config = EngineConfig(kv_tokens=AT_ONCE * POSITIONS, reuse_prefixes=False)
        models = Models(load(VARIANTS[name], self.directory(name)), self.decoder)
        return Conversations(models, config, DecoderConfig())

    def row(self, name: str) -> dict[str, Any]:
        engine = self.engine(name)
        found = compared(self.exact, self._logits(engine))
        return {
            "bytes": language_bytes(VARIANTS[name], self.directory(name)),
            "divergence": {part: asdict(one) for part, one in found.items()},
            **{way: self._judged(engine, greedy=greedy) for way, greedy in WAYS.items()},
        }

    def _judged(self, engine: Conversations, *, greedy: bool) -> dict[str, Any]:
        sessions = answer(engine, requests(self.asked, greedy=greedy))
        texts = [_text_of(engine, session) for session in sessions]
        heard = [self.listener.hear(session.pending_units) for session in sessions]
        wanted = [question.wanted for question in self.asked]
        return {
            "text_right": sum(map(str.__eq__, texts, wanted)) / len(texts),
            "heard": asdict(score([words_of(text) or [""] for text in texts], heard)),
            "ended": sum(s.interleaver.speech_finish == "stop" for s in sessions) / len(texts),
            "wrong": [pair for pair in zip(wanted, texts, strict=True) if pair[0] != pair[1]],
        }

    def ceiling(self) -> dict[str, Any]:
        """What the judge hears of recordings of the right answers."""
        lexicon, judge = make_lexicon(self.work), self.listener.judge
        wanted = [words_of(question.wanted) for question in self.asked]
        heard = [judge.hear(lexicon.speech(words), RATE_HZ) for words in wanted]
        return {"heard": asdict(score(wanted, heard))}


def _text_of(engine: Conversations, session: Session) -> str:
    return engine.models.prompt.decode_text(session.interleaver.text_ids)


def measure(bench: Bench, names: Sequence[str], file: Path) -> dict[str, Any]:
    """The rows of `file`, and of those named what it lacks."""
    rows = dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}
    for name in (CEILING, *names):
        if name in rows:
            continue
        began = time.perf_counter()
        rows[name] = bench.ceiling() if name == CEILING else bench.row(name)
        file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        say(f"{name}: {time.perf_counter() - began:.0f} s")
    return rows


def identity(models: Path) -> str:
    """Of the weights: another model shares nothing with this one."""
    digest = hashlib.sha256()
    weights = [*(models / OPENS2S).glob("*.safetensors"), *(models / DECODER).glob("*.pt")]
    for file in sorted(weights):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def main(arguments: list[str]) -> None:
    args = parser().parse_args(arguments)
    torch.set_num_threads(args.threads)
    work = args.work / identity(args.models)
    if args.restart:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.models, work, args.questions, args.snr)
    names = args.only or list(VARIANTS)
    rows = measure(bench, names, work / f"rows-{args.questions}-{args.snr}.json")
    shown = {name: rows[name] for name in (CEILING, *names)}
    if args.json:
        args.json.write_text(json.dumps(shown, indent=1) + "\n", encoding="utf-8")
    noise = "" if args.snr is None else f" in noise, {args.snr:g} dB below them"
    caption = f"{args.questions} questions{noise}; {hardware(CPU)}, torch {torch.__version__}"
    sys.stdout.write(f"{accuracy_table(shown)}\n\n{caption}\n")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench.py accuracy", description="Measures what quantization costs in answers."
    )
    parser.add_argument("--models", type=Path, default=SMALL, help="default: the small model")
    parser.add_argument("--questions", type=int, default=200, help="default: 200")
    parser.add_argument("--snr", type=float, metavar="DB", help="noise over the questions")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, metavar="ROW", help="rows by name")
    parser.add_argument("--work", type=Path, default=WORK, help="what was measured is kept here")
    parser.add_argument("--restart", action="store_true", help="measure everything again")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    return parser
