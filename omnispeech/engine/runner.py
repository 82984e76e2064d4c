"""The only place where the engine touches tensors: runs the models for several replies at once."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from omnispeech.audio.features import FrontEnd
from omnispeech.audio.io import pcm16_from_samples
from omnispeech.engine.prefix_cache import PrefixCache
from omnispeech.engine.sampling import NOT_FINITE, choose
from omnispeech.engine.scheduler import LLMTurn, SoundBlock
from omnispeech.engine.session import Session
from omnispeech.errors import GenerationError
from omnispeech.layers.kv_cache import Row
from omnispeech.models.omnispeech import OmniSpeech
from omnispeech.models.qwen3 import CausalLM
from omnispeech.models.speech_decoder import SpeechDecoder
from omnispeech.prompt import AUDIO_SLOT, PromptBuilder, UnitVocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageModels:
    """What turns sound and text into text and units, loaded, and the rules that came with it."""

    lm: OmniSpeech
    prompt: PromptBuilder
    units: UnitVocabulary
    front_end: FrontEnd
    text_end: frozenset[int]
    speech_end: frozenset[int]
    text_top_k: int
    speech_top_k: int
    unit_limit: int


@dataclass(frozen=True, slots=True)
class Models:
    """Everything a conversation needs."""

    language: LanguageModels
    decoder: SpeechDecoder


class Runner:
    def __init__(
        self, models: LanguageModels, kv_tokens: int, *, reuse_prefixes: bool = False
    ) -> None:
        """kv_tokens: positions of all replies together, for each of the two language models."""
        self.models = models
        self.llm_cache = models.lm.llm_model.new_cache(kv_tokens)
        self.speech_cache = models.lm.tts_lm_model.new_cache(kv_tokens)
        self.prefixes = PrefixCache(self.llm_cache, enabled=reuse_prefixes)
        self.unit_head = UnitHead(models.lm.tts_lm_model, models.units, models.speech_end)
        with torch.inference_mode():
            self._speaker = models.lm.tts_lm_model.speaker()[None]  # [1, D]

    @property
    def device_bytes(self) -> int:
        """Memory that torch holds tensors in; 0 where there is no counting it."""
        device = self.llm_cache.keys.device
        return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

    @torch.inference_mode()
    def enter(self, session: Session) -> bool:
        """Takes the memory a reply can ever need; False if it must wait."""
        rules = session.rules
        if rules.speech:
            speech = self.speech_cache.allocate(rules.speech_positions)
            if speech is None:
                return False
            session.speech_row = speech
        session.llm_row = self.prefixes.take(session.key, session.prompt_length + rules.text_limit)
        if session.llm_row is None:
            self._release_speech(session)
            return False
        session.reused = session.llm_row.length
        return True

    def _release_speech(self, session: Session) -> None:
        if session.speech_row is not None:
            self.speech_cache.release(session.speech_row)
            session.speech_row = None

    def leave(self, session: Session) -> None:
        """What a healthy reply has read stays for the next turn."""
        row = _row(session.llm_row)
        if session.failed:
            self.llm_cache.release(row)
        else:
            self.prefixes.keep([*session.key, *session.interleaver.text_ids], row)
        self._release_speech(session)
        session.llm_row = session.prompt_vectors = None
        session.conditions.clear()

    @torch.inference_mode()
    def listen(self, session: Session) -> None:
        """Puts the next audio of the request through the encoder; after the last, the prompt is
        spliced. What the row has in it already is left out."""
        lm = self.models.lm
        first, known = unread(session.prompt, session.audio_lengths, session.reused)
        heard = known + len(session.frames)
        if heard < len(session.features):
            clip, valid = session.features[heard](), session.valid_frames[heard]
            session.frames.append(lm.audio_encoder_model.encode(clip, valid))
        if known + len(session.frames) == len(session.features):
            lengths = map(lm.audio_encoder_model.output_length, session.valid_frames[known:])
            rule = session.rules.compatible
            audios = lm.adapt_audio(session.frames, list(lengths), batch_rule=rule)
            vectors = lm.splice(session.prompt[first:], audios)
            session.prompt_vectors = vectors[len(vectors) - session.prompt_left :]
            session.features, session.frames = [], []

    @torch.inference_mode()
    def run_llm(self, turns: Sequence[LLMTurn]) -> None:
        """One call: each row reads a piece of its prompt or its last token, and unless more of
        the prompt is to come, writes a token."""
        lm = self.models.lm.llm_model
        layout = self.llm_cache.layout(
            [(_row(t.session.llm_row), t.prompt_positions or 1) for t in turns]
        )
        states = lm(self._llm_vectors(turns), self.llm_cache, layout)  # [T, D]
        writing = [
            i for i, t in enumerate(turns) if t.prompt_positions in (0, t.session.prompt_left)
        ]
        sessions = [turns[i].session for i in writing]
        chosen = self._choose_text(states[[layout.last[i] for i in writing]], sessions)
        layout.commit()
        for session, (token, condition) in zip(sessions, chosen, strict=True):
            with session.own_errors():
                self._write_token(session, token, condition)

    def _choose_text(
        self, states: Tensor, sessions: Sequence[Session]
    ) -> list[tuple[int, Tensor | None]]:
        """[B, D] -> a token per row, and what its state tells the speech LM: [D']"""
        if not sessions:
            return []
        lm = self.models.lm
        ids = choose(lm.llm_model.lm_head(states), [s.text_sampler for s in sessions])
        if all(s.interleaver.spoken_end is not None for s in sessions):
            return [(token, None) for token in ids]
        return list(zip(ids, lm.speech_condition(states), strict=True))

    def _llm_vectors(self, turns: Sequence[LLMTurn]) -> Tensor:
        """[T, D]"""
        ids = [t.session.interleaver.text_ids[-1] for t in turns if not t.prompt_positions]
        embedded = iter(self._embed(self.models.lm.llm_model, ids)[:, None] if ids else ())
        return torch.cat(
            [
                _prompt_piece(t.session, t.prompt_positions)
                if t.prompt_positions
                else next(embedded)
                for t in turns
            ]
        )

    def _write_token(self, session: Session, token: int, condition: Tensor | None) -> None:
        if token == NOT_FINITE:
            raise GenerationError("the language model gave numbers that are not finite")
        session.prompt_vectors = None  # read, and of no more use
        if condition is not None and session.interleaver.spoken_end is None:
            session.conditions.append(condition)
        session.write(
            session.script[len(session.interleaver.text_ids)] if session.script else token
        )

    @torch.inference_mode()
    def run_speech(self, sessions: Sequence[Session]) -> None:
        """One call: each row reads its last unit or new states, or both, and writes one unit."""
        rows = [s for s in sessions if self._has_input(s)]
        if not rows:
            return
        lm = self.models.lm.tts_lm_model
        vectors = self._speech_vectors(rows)
        layout = self.speech_cache.layout(
            [(_row(s.speech_row), len(v)) for s, v in zip(rows, vectors, strict=True)]
        )
        states = lm(torch.cat(vectors), self.speech_cache, layout)  # [T, D]
        chosen = self.unit_head.choose(states[layout.last], rows)
        layout.commit()
        for session, unit in zip(rows, chosen, strict=True):
            with session.own_errors():
                self._write_unit(session, unit)

    def _write_unit(self, session: Session, chosen: int) -> None:
        if chosen == NOT_FINITE:
            raise GenerationError("the speech model gave numbers that are not finite")
        assert session.speech_input is not None
        for _ in session.speech_input.states:
            session.conditions.popleft()
        session.speech_input = None
        session.interleaver.add_unit(chosen)
        if chosen in self.models.units and chosen not in self.models.speech_end:
            session.pending_units.append(self.models.units.to_unit(chosen))

    def _has_input(self, session: Session) -> bool:
        """Kept until computed, so that a call that failed can be made again."""
        session.speech_input = session.speech_input or session.interleaver.next_input()
        return session.speech_input is not None

    def _speech_vectors(self, sessions: Sequence[Session]) -> list[Tensor]:
        """What each row reads: its last unit or the speaker, then its new states: [T, D] each."""
        leads = [s.speech_input.lead for s in sessions if s.speech_input]
        known = [lead for lead in leads if lead is not None]
        embedded = iter(self._embed(self.models.lm.tts_lm_model, known)[:, None] if known else ())
        vectors = []
        for session, lead in zip(sessions, leads, strict=True):
            first = self._speaker if lead is None else next(embedded)
            count = len(session.speech_input.states) if session.speech_input else 0
            states = [session.conditions[i][None] for i in range(count)]
            vectors.append(torch.cat([first, *states]) if states else first)
        return vectors

    def _embed(self, lm: CausalLM, ids: list[int]) -> Tensor:
        return lm.embed(torch.tensor(ids, device=lm.lm_head.weight.device))

    @torch.inference_mode()
    def decode(self, block: SoundBlock) -> None:
        """Turns units of one reply into sound."""
        session = block.session
        samples = session.vocoder.push(session.pending_units[: block.units], block.final)  # [N]
        del session.pending_units[: block.units]
        session.blocks += 1
        seconds = len(samples) / session.vocoder.decoder.sample_rate_hz
        session.send_audio(pcm16_from_samples(samples.numpy()), seconds)
        if block.final:
            session.flushed = True
            session.finish()


class UnitHead:
    """Speech logits of the ids that may be chosen, and of no others (defects B5, D5)."""

    def __init__(self, lm: CausalLM, units: UnitVocabulary, ends: frozenset[int]) -> None:
        bias, count = units.units_bias, units.count
        weight = lm.lm_head.weight
        outside = sorted(end for end in ends if end not in units and 0 <= end < len(weight))
        self._vocabulary_head = lm.lm_head
        self._ids = [*range(bias, bias + count), *outside]
        self._unit_weight = weight[bias : bias + count]  # [U, D], a view
        self._end_weight = weight[outside]  # [E, D]
        self._is_end = torch.tensor([i in ends for i in self._ids], device=weight.device)

    def choose(self, states: Tensor, sessions: Sequence[Session]) -> list[int]:
        """[B, D] -> an id of the speech vocabulary per row."""
        samplers = [s.speech_sampler for s in sessions]
        choices = [s.interleaver.choice for s in sessions]
        if "vocabulary" in choices:  # compatible rules hold for the whole engine
            return choose(self._vocabulary_head(states), samplers)
        logits = torch.cat([states @ self._unit_weight.T, states @ self._end_weight.T], dim=1)
        no_end = torch.tensor([c == "units" for c in choices], device=logits.device)
        logits.masked_fill_(no_end[:, None] & self._is_end, -torch.inf)
        picked = choose(logits, samplers)
        return [self._ids[i] if i != NOT_FINITE else NOT_FINITE for i in picked]


def _row(row: Row | None) -> Row:
    assert row is not None, "the session holds no memory"
    return row


def unread(prompt: list[int], audio_lengths: list[int], reused: int) -> tuple[int, int]:
    """The first id of the prompt that is not reused as a whole, and how many audios are before."""
    lengths = iter(audio_lengths)
    widths = [next(lengths) if i == AUDIO_SLOT else 1 for i in prompt]
    first = bisect_right(list(accumulate(widths)), reused)
    return first, prompt[:first].count(AUDIO_SLOT)


def _prompt_piece(session: Session, count: int) -> Tensor:
    """The next `count` vectors of the prompt: [T, D]"""
    assert session.prompt_vectors is not None
    start = _row(session.llm_row).length - session.reused
    return session.prompt_vectors[start : start + count]
