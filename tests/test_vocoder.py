import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from omnispeech.checkpoint.decoder import load_decoder
from omnispeech.checkpoint.decoder_config import read_config
from omnispeech.config import DecoderConfig
from omnispeech.engine.noise import StreamNoise
from omnispeech.engine.vocoder import CompatibleStream, CorrectedStream, open_stream
from omnispeech.errors import GenerationError
from omnispeech.models.flow import Flow
from omnispeech.models.hift import HiFT
from omnispeech.models.speech_decoder import SpeechDecoder

GOLDEN = Path(__file__).parent / "golden" / "decoder"
QUICK = DecoderConfig(euler_steps=1)
COMPATIBLE = DecoderConfig(euler_steps=1, streaming="compatible")
HOP = 256


@cache
def golden_decoder() -> SpeechDecoder:
    return load_decoder(GOLDEN, convert=False)


@pytest.fixture
def decoder() -> SpeechDecoder:
    return golden_decoder()


def some_units(count: int) -> list[int]:
    return random.Random(count).choices(range(512), k=count)


def speak(
    decoder: SpeechDecoder, units: list[int], sizes: list[int], config: DecoderConfig = QUICK
) -> list[Tensor]:
    """Blocks of these sizes, then a final push of whatever is left."""
    stream = open_stream(decoder, config, seed=5)
    cuts = [sum(sizes[:k]) for k in range(len(sizes) + 1)]
    parts = [stream.push(units[cuts[k] : cuts[k + 1]], False) for k in range(len(sizes))]
    return [*parts, stream.push(units[cuts[-1] :], True)]


def frames_of(parts: list[Tensor]) -> list[int]:
    assert all(len(part) % HOP == 0 for part in parts)
    return [len(part) // HOP for part in parts]


@pytest.mark.parametrize("count", [1, 5, 6, 10, 23])
def test_reply_shorter_than_one_block_is_spoken(decoder: SpeechDecoder, count: int) -> None:
    parts = speak(decoder, some_units(count), [])
    assert frames_of(parts) == [decoder.flow.frames(count)]
    assert parts[0].abs().max() > 0.01


@pytest.mark.parametrize("count", [24, 48, 72])
def test_reply_that_ends_with_a_whole_block_is_spoken_to_its_end(
    decoder: SpeechDecoder, count: int
) -> None:
    parts = speak(decoder, some_units(count), [24] * (count // 24))
    assert frames_of(parts)[-1] == 34
    assert sum(frames_of(parts)) == decoder.flow.frames(count)


@pytest.mark.parametrize("count", [1, 5, 6, 10, 24, 25, 48])
@pytest.mark.parametrize("block", [5, 24])
@pytest.mark.parametrize("context", [0, 10])
def test_no_frame_is_lost_however_the_reply_is_cut(
    decoder: SpeechDecoder, count: int, block: int, context: int
) -> None:
    config = DecoderConfig(euler_steps=1, context_tokens=context)
    parts = speak(decoder, some_units(count), [block] * (count // block), config)
    assert sum(frames_of(parts)) == decoder.flow.frames(count)


@given(st.lists(st.integers(0, 30), max_size=4), st.integers(0, 20), st.integers(19, 60))
@settings(max_examples=12)
def test_total_is_that_of_the_offline_run_for_any_chunking(
    sizes: list[int], rest: int, overlap: int
) -> None:
    config = DecoderConfig(euler_steps=1, context_tokens=20, overlap_frames=overlap)
    decoder = golden_decoder()
    units = some_units(sum(sizes) + rest)
    parts = speak(decoder, units, sizes, config)
    assert sum(frames_of(parts)) == decoder.flow.frames(len(units))


def test_lengths_of_each_corrected_block_hold_back_the_overlap(decoder: SpeechDecoder) -> None:
    total = [decoder.flow.frames(n) for n in (24, 48, 72, 81)]
    frames = frames_of(speak(decoder, some_units(81), [24, 24, 24]))
    assert frames == [
        total[0] - 34,
        total[1] - total[0],
        total[2] - total[1],
        total[3] - total[2] + 34,
    ]


def test_lengths_of_each_compatible_block_are_those_of_the_original(decoder: SpeechDecoder) -> None:
    f = [decoder.flow.frames(n) for n in (24, 48, 72, 81)]
    frames = frames_of(speak(decoder, some_units(81), [24, 24, 24], COMPATIBLE))
    assert frames == [f[0] - 35, f[1] - f[0], f[2] - f[1] - 1, f[3] - f[2] + 34]
    assert sum(frames) == f[3] - 2  # one frame is lost per block from the third on


def test_compatible_reply_of_whole_blocks_loses_its_tail(decoder: SpeechDecoder) -> None:
    frames = frames_of(speak(decoder, some_units(48), [24, 24], COMPATIBLE))
    assert frames == [130, 165, 0]


@pytest.mark.parametrize("config", [QUICK, COMPATIBLE])
def test_first_block_too_short_to_speak_waits_for_the_next(
    decoder: SpeechDecoder, config: DecoderConfig
) -> None:
    stream = open_stream(decoder, config, seed=5)
    assert len(stream.push(some_units(10)[:5], False)) == 0
    late = stream.push(some_units(10)[5:], False)
    assert torch.equal(late, open_stream(decoder, config, seed=5).push(some_units(10), False))
    assert stream.units == 10


@pytest.mark.parametrize("config", [QUICK, COMPATIBLE])
def test_reply_without_units_is_silent(decoder: SpeechDecoder, config: DecoderConfig) -> None:
    assert frames_of(speak(decoder, [], [0, 0], config)) == [0, 0, 0]


def test_networks_run_in_inference_mode(decoder: SpeechDecoder) -> None:
    modes: list[bool] = []
    handle = decoder.hift.register_forward_hook(
        lambda *_: modes.append(torch.is_inference_mode_enabled())
    )
    speak(decoder, some_units(30), [20])
    handle.remove()
    assert modes == [True, True]


OTHER_DIMENSIONS = {
    "input_frame_rate: 12.5": "input_frame_rate: 25", "block_size: 10": "block_size: 4",
    "channels: [16, 16]": "channels: [16, 24, 8]", "nb_harmonics: 8": "nb_harmonics: 3",
    "upsample_rates: [8, 8]": "upsample_rates: [8, 5, 3]",
    "upsample_kernel_sizes: [16, 16]": "upsample_kernel_sizes: [16, 11, 7]",
    "source_resblock_kernel_sizes: [7, 11]": "source_resblock_kernel_sizes: [7, 7, 11]",
    "source_resblock_dilation_sizes: [[1, 3, 5], [1, 3, 5]]":
    "source_resblock_dilation_sizes: [[1, 3, 5], [1, 3], [1]]",
    "t_scheduler: 'cosine'": "t_scheduler: 'linear'", "cfg_rate: 0.7": "cfg_rate: 0.0",
    "sample_rate: 22050": "sample_rate: 24000", "vocab_size: 512": "vocab_size: 600",
    "output_size: 80\n": "output_size: 40\n", "in_channels: 320": "in_channels: 160",
    "out_channels: 80": "out_channels: 40", " channels: 80": " channels: 40",
    "in_channels: 80": "in_channels: 40",
}  # fmt: skip


def test_decoder_of_other_dimensions_speaks_every_frame(tmp_path: Path) -> None:
    text = (GOLDEN / "config.yaml").read_text(encoding="utf-8")
    for old, new in OTHER_DIMENSIONS.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    flow_config, hift_config = read_config(tmp_path / "config.yaml")
    for name, model in (("flow", Flow(flow_config)), ("hift", HiFT(hift_config))):
        weights = {key: torch.full_like(value, 0.01) for key, value in model.state_dict().items()}
        save_file(weights, tmp_path / f"{name}.safetensors")
    decoder = load_decoder(tmp_path)
    sizes = [20, 3, 30]
    assert decoder.hift.config.hop == 480 and decoder.sample_rate_hz == 24000
    config = DecoderConfig(euler_steps=1, context_tokens=20)
    frames = [len(part) / 480 for part in speak(decoder, some_units(60), sizes, config)]
    assert sum(frames) == decoder.flow.frames(60) == 206
    compatible = speak(decoder, some_units(60), sizes, COMPATIBLE)
    # one frame is given to the vocoder twice, 256 samples are kept back three times
    assert sum(len(part) for part in compatible) == 480 * (206 + 1) - 3 * 256


def test_push_after_the_last_block_is_refused(decoder: SpeechDecoder) -> None:
    stream = open_stream(decoder, QUICK, seed=5)
    stream.push([1, 2], True)
    with pytest.raises(GenerationError, match="after the last block"):
        stream.push([3], False)


def test_unit_outside_the_vocabulary_is_refused_before_the_device_sees_it(
    decoder: SpeechDecoder,
) -> None:
    with pytest.raises(GenerationError, match="unit 512 is not below 512"):
        open_stream(decoder, QUICK, seed=5).push([3, 512], True)


def test_samples_are_plain_float32_that_may_be_written(decoder: SpeechDecoder) -> None:
    samples = open_stream(decoder, QUICK, seed=5).push(some_units(10), True)
    samples *= 0.5
    assert samples.dtype == torch.float32 and samples.dim() == 1 and not samples.is_inference()


@pytest.mark.parametrize("config", [QUICK, COMPATIBLE])
def test_decoding_leaves_the_global_generator_untouched(
    decoder: SpeechDecoder, config: DecoderConfig
) -> None:
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    speak(decoder, some_units(30), [24], config)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_seed_decides_the_sound(decoder: SpeechDecoder) -> None:
    one, same, other = (
        open_stream(decoder, QUICK, seed=seed).push(some_units(10), True) for seed in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize("config", [QUICK, COMPATIBLE])
def test_interleaved_streams_do_not_touch_each_other(
    decoder: SpeechDecoder, config: DecoderConfig
) -> None:
    blocks = [some_units(10), some_units(12), some_units(14)]
    alone = open_stream(decoder, config, seed=5)
    wanted = [alone.push(units, k == 2) for k, units in enumerate(blocks)]
    stream, other = (open_stream(decoder, config, seed=seed) for seed in (5, 6))
    for k, units in enumerate(blocks):
        assert torch.equal(stream.push(units, k == 2), wanted[k])
        other.push(some_units(11), k == 2)


def watched_prompts(decoder: SpeechDecoder, config: DecoderConfig) -> Iterator[tuple[int, ...]]:
    """(units, frames, prompt frames) of each flow call of a reply of 100 units in tens"""
    seen: list[tuple[int, ...]] = []
    handle = decoder.flow.register_forward_hook(
        lambda _, args, __: seen.append((len(args[0]), args[1].shape[2], args[3].shape[2]))
    )
    speak(decoder, some_units(100), [10] * 9, config)
    handle.remove()
    return iter(seen)


def test_prompt_is_never_a_frame_too_long(decoder: SpeechDecoder) -> None:
    config = DecoderConfig(euler_steps=1, context_tokens=0)
    decoded = 0
    for units, frames, prompt in watched_prompts(decoder, config):
        assert frames == decoder.flow.frames(units)
        assert prompt == max(0, decoded - 34)
        decoded = frames


@pytest.mark.parametrize("context", [10, 20, 50])
def test_bounded_context_makes_as_many_new_frames_as_all_of_it(
    decoder: SpeechDecoder, context: int
) -> None:
    config = DecoderConfig(euler_steps=1, context_tokens=context)
    for k, (units, frames, prompt) in enumerate(watched_prompts(decoder, config)):
        assert units == min(10 * k, context) + 10
        new = decoder.flow.frames(10 * k + 10) - decoder.flow.frames(10 * k)
        assert frames - prompt == new + (34 if k else 0)


@pytest.mark.parametrize("context", [0, 20])
def test_prompt_is_the_last_final_frames(decoder: SpeechDecoder, context: int) -> None:
    config = DecoderConfig(euler_steps=1, context_tokens=context)
    stream = open_stream(decoder, config, seed=5)
    assert isinstance(stream, CorrectedStream)
    prompts: list[Tensor] = []
    handle = decoder.flow.register_forward_hook(lambda _, args, __: prompts.append(args[3]))
    for _ in range(5):
        final = stream._mel
        stream.push(some_units(13), False)
        assert torch.equal(prompts[-1], final[:, :, final.shape[2] - prompts[-1].shape[2] :])
    handle.remove()
    assert prompts[-1].shape[2] > 100


@pytest.mark.parametrize("context", [0, 10, 30])
def test_frame_keeps_its_noise_when_history_is_cut(decoder: SpeechDecoder, context: int) -> None:
    config = DecoderConfig(euler_steps=1, context_tokens=context)
    noise = StreamNoise(decoder, seed=5)
    used: list[tuple[int, Tensor]] = []

    class Watched(StreamNoise):
        def start(self, first: int, frames: int) -> Tensor:
            used.append((first + frames, super().start(first, frames)))
            return used[-1][1]

    stream = open_stream(decoder, config, seed=5, noise=Watched(decoder, seed=5))
    for _ in range(5):
        stream.push(some_units(13), False)
    assert [end for end, _ in used] == [decoder.flow.frames(13 * k) for k in range(1, 6)]
    whole = noise.start(0, used[-1][0])
    assert all(torch.equal(got, whole[:, :, end - got.shape[2] : end]) for end, got in used)


def test_context_is_cut_where_a_block_of_the_encoder_starts(decoder: SpeechDecoder) -> None:
    stream = open_stream(decoder, DecoderConfig(euler_steps=1, context_tokens=20), seed=5)
    assert isinstance(stream, CorrectedStream)
    for size in (13, 14, 9, 17, 8):
        stream.push(some_units(size), False)
        assert stream._first_unit % 10 == 0
        assert stream.units - stream._first_unit in range(20, 30) or stream._first_unit == 0


def test_context_longer_than_the_reply_changes_nothing(decoder: SpeechDecoder) -> None:
    units, sizes = some_units(60), [20, 20]
    for context in (40, 120):
        config = DecoderConfig(euler_steps=1, context_tokens=context)
        bounded = torch.cat(speak(decoder, units, sizes, config))
        everything = DecoderConfig(euler_steps=1, context_tokens=0)
        assert torch.equal(bounded, torch.cat(speak(decoder, units, sizes, everything)))


def test_long_reply_with_bounded_context_needs_no_more_memory(decoder: SpeechDecoder) -> None:
    stream = open_stream(decoder, DecoderConfig(euler_steps=1, context_tokens=20), seed=5)
    assert isinstance(stream, CorrectedStream) and isinstance(stream.noise, StreamNoise)
    for _ in range(12):
        stream.push(some_units(20), False)
    assert len(stream._ids) == 20
    assert stream._mel.untyped_storage().nbytes() < 4 * 80 * 180
    assert stream.noise._start.kept.shape[1] <= 3 * 256
    assert stream.noise._sines.kept.shape[1] <= 5 * 16384
    assert stream._vocoder._mel.shape[2] == 19


def test_stream_in_one_block_equals_the_networks_run_offline(decoder: SpeechDecoder) -> None:
    flow, hift, noise = decoder.flow, decoder.hift, StreamNoise(decoder, seed=5)
    frames = flow.frames(25)
    mel = flow(some_units(25), noise.start(0, frames), flow.solver(steps=1))
    start = torch.zeros(1, dtype=torch.float64)
    sines = noise.sines(0, frames * HOP)
    source = hift.m_source(hift.f0_predictor(mel), noise.phases(), sines, start)
    streamed = open_stream(decoder, QUICK, seed=5).push(some_units(25), True)
    torch.testing.assert_close(streamed, hift(mel, source)[0], atol=1e-5, rtol=0)


def test_options_of_the_solver_reach_the_flow(decoder: SpeechDecoder) -> None:
    config = DecoderConfig(euler_steps=4, schedule="linear", guidance=0.25)
    solver = open_stream(decoder, config, seed=5)._solver
    assert (solver.times, solver.guidance) == ((0, 0.25, 0.5, 0.75, 1), 0.25)
    default = open_stream(decoder, DecoderConfig(), seed=5)._solver
    assert (len(default.times), default.guidance) == (11, decoder.flow.config.guidance)


def test_compatible_stream_speaks_with_random_numbers_of_its_own(decoder: SpeechDecoder) -> None:
    stream = open_stream(decoder, COMPATIBLE, seed=1)
    assert isinstance(stream, CompatibleStream)
    again = open_stream(decoder, COMPATIBLE, seed=2)
    assert torch.equal(stream.push(some_units(24), True), again.push(some_units(24), True))
