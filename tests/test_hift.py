import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from omnispeech.checkpoint.decoder import load_decoder
from omnispeech.checkpoint.files import build_on_meta
from omnispeech.models.hift import HiFT, HiFTConfig, Snake

GOLDEN = Path(__file__).parent / "golden" / "decoder"
RANDOM = torch.Generator().manual_seed(3)


@pytest.fixture(scope="module")
def hift() -> HiFT:
    return load_decoder(GOLDEN, convert=False).hift


def residual_block(name: str, channels: int, kernel: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for part in (1, 2):
        for i in range(3):
            shapes[f"{name}.convs{part}.{i}.weight"] = (channels, channels, kernel)
            shapes[f"{name}.convs{part}.{i}.bias"] = (channels,)
            shapes[f"{name}.activations{part}.{i}.alpha"] = (channels,)
    return shapes


def published_hift() -> dict[str, tuple[int, ...]]:
    """As published, with the weight norm folded."""
    layers = {
        "m_source.l_linear": ((1, 9), 1),
        "conv_pre": ((512, 80, 7), 512),
        "ups.0": ((512, 256, 16), 256),
        "ups.1": ((256, 128, 16), 128),
        "source_downs.0": ((256, 18, 16), 256),
        "source_downs.1": ((128, 18, 1), 128),
        "conv_post": ((18, 128, 7), 18),
        "f0_predictor.classifier": ((1, 512), 1),
        "f0_predictor.condnet.0": ((512, 80, 3), 512),
        **{f"f0_predictor.condnet.{i}": ((512, 512, 3), 512) for i in (2, 4, 6, 8)},
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (weight, bias) in layers.items():
        shapes |= {f"{name}.weight": weight, f"{name}.bias": (bias,)}
    for i in range(6):
        shapes |= residual_block(f"resblocks.{i}", (256, 128)[i // 3], (3, 7, 11)[i % 3])
    shapes |= residual_block("source_resblocks.0", 256, 7)
    return shapes | residual_block("source_resblocks.1", 128, 11)


def test_real_vocoder_has_the_published_names_and_shapes() -> None:
    model = build_on_meta(lambda: HiFT(HiFTConfig()))
    assert {name: tuple(v.shape) for name, v in model.state_dict().items()} == published_hift()
    assert all(value.is_meta for value in (*model.parameters(), *model.buffers()))


def test_reach_of_the_published_vocoder_is_the_measured_one() -> None:
    config = HiFTConfig()
    assert (config.hop, config.filter_reach, config.f0_reach) == (256, 14, 5)


def sound(hift: HiFT, mel: Tensor, source: Tensor) -> Tensor:
    with torch.inference_mode():
        return hift(mel, source)


@pytest.mark.parametrize("side", ["mel", "source"])
def test_a_change_is_not_heard_beyond_the_reach(hift: HiFT, side: str) -> None:
    mel, source = torch.randn(1, 80, 40, generator=RANDOM), torch.zeros(1, 1, 40 * 256)
    before = sound(hift, mel, source)
    if side == "mel":
        mel[:, :, 20] += 3
    else:
        source[:, :, 20 * 256 : 21 * 256] += 0.5
    heard = (sound(hift, mel, source) - before)[0].abs().view(40, 256).amax(1) > 1e-6
    reach = hift.config.filter_reach
    assert heard[20] and not heard[: 20 - reach].any() and not heard[21 + reach :].any()


@pytest.mark.parametrize(
    "config",
    [
        HiFTConfig(in_channels=8, base_channels=16, f0_channels=8),
        HiFTConfig(
            in_channels=8, base_channels=32, f0_channels=8, nb_harmonics=3,
            upsample_rates=(8, 5, 3), upsample_kernel_sizes=(16, 11, 7),
            resblock_kernel_sizes=(3, 5), resblock_dilation_sizes=((1, 2), (1,)),
            source_resblock_kernel_sizes=(3, 5, 7),
            source_resblock_dilation_sizes=((1,), (1, 2), (1,)),
        ),
        HiFTConfig(
            in_channels=8, base_channels=8, f0_channels=8, n_fft=8, hop_len=2,
            upsample_rates=(4,), upsample_kernel_sizes=(8,),
            source_resblock_kernel_sizes=(3,), source_resblock_dilation_sizes=((1,),),
        ),
    ],
)  # fmt: skip
def test_vocoder_of_any_rates_gives_hop_samples_per_frame(config: HiFTConfig) -> None:
    hift = HiFT(config).requires_grad_(False)
    for module in hift.modules():
        if isinstance(module, Snake):
            nn.init.ones_(module.alpha)
    mel = torch.randn(1, 8, 12, generator=RANDOM)
    harmonics = config.nb_harmonics + 1
    noise = torch.zeros(1, harmonics, 12 * config.hop)
    source = hift.m_source(hift.f0_predictor(mel), torch.zeros(1, harmonics), noise)
    assert hift(mel, source).shape == (1, 12 * config.hop)


def test_unvoiced_frames_are_noise_alone_and_louder(hift: HiFT) -> None:
    f0 = torch.cat([torch.full((1, 300), 10.0), torch.full((1, 300), 10.1)], dim=1)
    quiet = hift.m_source.l_sin_gen(f0, torch.zeros(1, 9), torch.zeros(1, 9, 600))
    loud = hift.m_source.l_sin_gen(f0, torch.zeros(1, 9), torch.ones(1, 9, 600))
    assert not quiet[:, :, :300].any() and quiet[:, :, 300:].any()
    torch.testing.assert_close((loud - quiet)[0, 0, [0, 599]], torch.tensor([0.1 / 3, 0.003]))


def test_fundamental_is_a_sine_of_its_pitch(hift: HiFT) -> None:
    sines = hift.m_source.l_sin_gen(
        torch.full((1, 2205), 100.0), torch.zeros(1, 9), torch.zeros(1, 9, 2205)
    )
    at = torch.arange(1, 2206)
    wanted = 0.1 * torch.sin(2 * math.pi * 300 * at / 22050)
    torch.testing.assert_close(sines[0, 2], wanted, atol=2e-5, rtol=0)


def test_cycles_counted_in_float64_make_the_same_sines(hift: HiFT) -> None:
    f0 = 20 + 200 * torch.rand(1, 2000, generator=RANDOM)
    phases, noise = torch.rand(1, 9, generator=RANDOM), torch.zeros(1, 9, 2000)
    zero = torch.zeros(1, dtype=torch.float64)
    original = hift.m_source.l_sin_gen(f0, phases, noise)
    counted = hift.m_source.l_sin_gen(f0, phases, noise, zero)
    # float32 sums of up to a hundred cycles
    torch.testing.assert_close(counted, original, atol=2e-5, rtol=0)


def test_carried_cycles_continue_the_sines_where_they_stopped(hift: HiFT) -> None:
    f0 = 200 * torch.rand(1, 20, generator=RANDOM)
    phases, noise = torch.rand(1, 9, generator=RANDOM), torch.zeros(1, 9, 20 * 256)
    zero = torch.zeros(1, dtype=torch.float64)
    whole = hift.m_source(f0, phases, noise, zero)
    carried = hift.m_source.cycles_after(f0[:, :7], zero)
    rest = hift.m_source(f0[:, 7:], phases, noise[:, :, 7 * 256 :], carried)
    torch.testing.assert_close(rest, whole[:, :, 7 * 256 :])


def test_samples_stay_within_the_limit(hift: HiFT) -> None:
    samples = sound(hift, 40 * torch.randn(1, 80, 9, generator=RANDOM), torch.ones(1, 1, 9 * 256))
    assert samples.abs().max() == pytest.approx(0.99)


def test_pitch_is_computed_without_tf32_and_leaves_the_setting(hift: HiFT) -> None:
    seen: list[bool] = []
    hook = hift.f0_predictor.condnet.register_forward_hook(
        lambda *_: seen.append(torch.backends.cudnn.allow_tf32)
    )
    before = torch.backends.cudnn.allow_tf32
    hift.f0_predictor(torch.zeros(1, 80, 3))
    hook.remove()
    assert seen == [False] and torch.backends.cudnn.allow_tf32 == before
