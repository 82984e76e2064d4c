import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from omnispeech.checkpoint.decoder import load_decoder
from omnispeech.checkpoint.files import build_on_meta
from omnispeech.models.flow import Flow, FlowConfig, unit_of_frame
from omnispeech.models.flow_encoder import FlowEncoder, FlowEncoderConfig, visible_keys
from omnispeech.models.unet import UNet, UNetConfig

GOLDEN = Path(__file__).parent / "golden" / "decoder"
TINY_ENCODER = FlowEncoderConfig(
    input_size=8, output_size=16, attention_heads=2, linear_units=24, num_blocks=2, block_size=4
)


@pytest.fixture(scope="module")
def flow() -> Flow:
    return load_decoder(GOLDEN, convert=False).flow


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.eval().requires_grad_(False)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def resnet(width_in: int, width: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"mlp.1.weight": (width, 1024), "mlp.1.bias": (width,)}
    for block, channels in (("block1", width_in), ("block2", width)):
        shapes[f"{block}.block.0.weight"] = (width, channels, 3)
        shapes |= {f"{block}.block.{n}": (width,) for n in ("0.bias", "1.weight", "1.bias")}
    return shapes | {"res_conv.weight": (width, width_in, 1), "res_conv.bias": (width,)}


def transformer() -> dict[str, tuple[int, ...]]:
    norms = [f"norm{n}.{kind}" for n in (1, 3) for kind in ("weight", "bias")]
    return {
        **{f"attn1.to_{name}.weight": (512, 256) for name in "qkv"},
        **{name: (256,) for name in (*norms, "attn1.to_out.0.bias", "ff.net.2.bias")},
        "attn1.to_out.0.weight": (256, 512),
        "ff.net.0.proj.weight": (1024, 256),
        "ff.net.0.proj.bias": (1024,),
        "ff.net.2.weight": (256, 1024),
    }


def published_estimator() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    stages = {"down_blocks.0": 320, "down_blocks.1": 256, "up_blocks.0": 512, "up_blocks.1": 512}
    for stage, width in (stages | {f"mid_blocks.{i}": 256 for i in range(12)}).items():
        shapes |= {f"{stage}.0.{name}": shape for name, shape in resnet(width, 256).items()}
        for j in range(4):
            shapes |= {f"{stage}.1.{j}.{name}": shape for name, shape in transformer().items()}
    for name, kernel in (("down_blocks.0.2.conv", 3), ("up_blocks.0.2.conv", 4)):
        shapes |= {f"{name}.weight": (256, 256, kernel), f"{name}.bias": (256,)}
    for name in ("down_blocks.1.2", "up_blocks.1.2", "final_block.block.0"):
        shapes |= {f"{name}.weight": (256, 256, 3), f"{name}.bias": (256,)}
    for name, out, width in (("linear_1", 1024, 320), ("linear_2", 1024, 1024)):
        shapes |= {f"time_mlp.{name}.weight": (out, width), f"time_mlp.{name}.bias": (out,)}
    shapes |= {"final_block.block.1.weight": (256,), "final_block.block.1.bias": (256,)}
    return shapes | {"final_proj.weight": (80, 256, 1), "final_proj.bias": (80,)}


def published_encoder_layer() -> dict[str, tuple[int, ...]]:
    linears = [f"self_attn.linear_{name}" for name in ("q", "k", "v", "out")]
    vectors = [f"{name}.bias" for name in linears]
    vectors += [f"{norm}.{kind}" for norm in ("norm_mha", "norm_ff") for kind in ("weight", "bias")]
    return {
        **{f"{name}.weight": (512, 512) for name in (*linears, "self_attn.linear_pos")},
        **{name: (512,) for name in (*vectors, "feed_forward.w_2.bias")},
        **{f"self_attn.pos_bias_{name}": (8, 64) for name in "uv"},
        "feed_forward.w_1.weight": (2048, 512),
        "feed_forward.w_1.bias": (2048,),
        "feed_forward.w_2.weight": (512, 2048),
    }


def published_flow() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "input_embedding.weight": (16384, 512),
        "spk_embed_affine_layer.weight": (80, 192),
        "spk_embed_affine_layer.bias": (80,),
        "encoder.embed.out.0.weight": (512, 512),
        "encoder_proj.weight": (80, 512),
        "encoder_proj.bias": (80,),
        "length_regulator.model.12.weight": (80, 80, 1),
        "length_regulator.model.12.bias": (80,),
    }
    for name in ("embed.out.0.bias", "embed.out.1.weight", "embed.out.1.bias"):
        shapes[f"encoder.{name}"] = (512,)
    shapes |= {f"encoder.after_norm.{kind}": (512,) for kind in ("weight", "bias")}
    for i in range(6):
        layer = published_encoder_layer()
        shapes |= {f"encoder.encoders.{i}.{name}": shape for name, shape in layer.items()}
    for i in (0, 3, 6, 9):
        shapes[f"length_regulator.model.{i}.weight"] = (80, 80, 3)
        for name in (f"{i}.bias", f"{i + 1}.weight", f"{i + 1}.bias"):
            shapes[f"length_regulator.model.{name}"] = (80,)
    estimator = published_estimator()
    return shapes | {f"decoder.estimator.{name}": shape for name, shape in estimator.items()}


def test_real_flow_has_the_published_names_and_shapes() -> None:
    model = build_on_meta(lambda: Flow(FlowConfig()))
    found = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert found == published_flow()
    assert len(found) == 1185


def test_real_flow_has_111166208_parameters_and_takes_no_memory_on_meta() -> None:
    model = build_on_meta(lambda: Flow(FlowConfig()))
    assert sum(parameter.numel() for parameter in model.parameters()) == 111_166_208
    assert all(value.is_meta for value in (*model.parameters(), *model.buffers()))


def test_frames_are_the_exact_integer_quotient(flow: Flow) -> None:
    assert [flow.frames(n) for n in range(5000)] == [441 * n // 64 for n in range(5000)]
    known = {6: 41, 10: 68, 24: 165, 25: 172, 48: 330, 57: 392, 64: 441, 130: 895, 3392: 23373}
    assert {n: flow.frames(n) for n in known} == known


@pytest.mark.parametrize("rate", [25.0, 12.3, 50.0])
def test_frames_follow_the_rate_of_the_file_as_it_is_written(rate: float) -> None:
    flow = build_on_meta(lambda: Flow(FlowConfig(input_frame_rate=rate)))
    exact = Fraction(22050, 256) / Fraction(str(rate))
    assert [flow.frames(n) for n in range(300)] == [math.floor(n * exact) for n in range(300)]


def test_frame_55_of_24_units_shows_unit_7_as_in_float32() -> None:
    index = unit_of_frame(24, 165)
    assert (index[55], index[110], index[164]) == (7, 15, 23)


def test_units_that_float32_moves_are_the_known_ones(flow: Flow) -> None:
    def moved(n: int) -> bool:
        frames = flow.frames(n)
        exact = torch.arange(frames) * n // frames
        return not torch.equal(unit_of_frame(n, frames), exact)

    known = [16, 24, 32, 40, 48, 56, 250, 292, 365, 375, 380]
    assert [n for n in range(6, 400) if moved(n)] == known


def test_unit_of_frame_equals_nearest_resampling_for_1_to_400_units(flow: Flow) -> None:
    for n in range(1, 401):
        units = torch.arange(n, dtype=torch.float32)[None, None]
        wanted = nn.functional.interpolate(units, size=flow.frames(n), mode="nearest")[0, 0]
        assert torch.equal(unit_of_frame(n, flow.frames(n)).float(), wanted), n


def test_query_sees_the_left_and_its_whole_block() -> None:
    seen = visible_keys(25, 10, torch.device("cpu")).sum(1)
    assert seen.tolist() == [10] * 10 + [20] * 10 + [25] * 5


@pytest.mark.parametrize("more", [1, 3, 4, 9])
def test_complete_blocks_do_not_change_when_units_are_added(more: int) -> None:
    encoder = randomised(FlowEncoder(TINY_ENCODER))
    x = noise(1, 8 + more, 8)
    # rounding only: the products are summed in another order
    torch.testing.assert_close(encoder(x)[:, :8], encoder(x[:, :8]), atol=2e-6, rtol=0)


def test_partial_block_changes_when_units_are_added() -> None:
    encoder = randomised(FlowEncoder(TINY_ENCODER))
    x = noise(1, 12, 8)
    assert (encoder(x)[:, 8:10] - encoder(x[:, :10])[:, 8:10]).abs().max() > 1e-3


def test_attention_scores_follow_the_formula_of_relative_positions() -> None:
    attention = randomised(FlowEncoder(TINY_ENCODER)).encoders[0].self_attn
    positions = noise(1, 9, 16)
    x = noise(1, 5, 16)
    q, k, v = (
        attention._split(f(x)) for f in (attention.linear_q, attention.linear_k, attention.linear_v)
    )
    r = attention._split(attention.linear_pos(positions))[0]
    scores = torch.empty(2, 5, 5)
    for h in range(2):
        for i in range(5):
            for j in range(5):
                content = (q[0, h, i] + attention.pos_bias_u[h]) @ k[0, h, j]
                place = (q[0, h, i] + attention.pos_bias_v[h]) @ r[h, 4 - (i - j)]
                scores[h, i, j] = (content + place) / math.sqrt(8)
    mixed = (scores.softmax(2) @ v[0]).transpose(0, 1).flatten(1)
    got = attention(x, positions, torch.ones(5, 5, dtype=torch.bool))[0]
    torch.testing.assert_close(got, attention.linear_out(mixed))


@pytest.mark.parametrize("channels", [(16,), (16, 24), (16, 24, 32)])
@pytest.mark.parametrize("frames", [1, 7, 8])
def test_estimator_of_any_depth_keeps_the_length(channels: tuple[int, ...], frames: int) -> None:
    config = UNetConfig(
        in_channels=16, out_channels=4, channels=channels, attention_head_dim=4, n_blocks=1,
        num_mid_blocks=1, num_heads=2,
    )  # fmt: skip
    estimator = randomised(UNet(config))
    tau = estimator.time_vectors(torch.tensor([0.3]))
    assert estimator(noise(1, 4, frames), noise(1, 12, frames), tau).shape == (1, 4, frames)


def test_cosine_times_are_the_published_table(flow: Flow) -> None:
    table = [0, 0.012312, 0.048943, 0.108993, 0.190983, 0.292893, 0.412215, 0.546009, 0.690983]
    assert flow.solver().times == pytest.approx([*table, 0.843566, 1], abs=1e-6)
    assert flow.solver(steps=4, schedule="linear").times == (0, 0.25, 0.5, 0.75, 1)
    assert flow.solver().guidance == 0.7


def test_one_euler_step_combines_the_guided_and_the_free_estimate(flow: Flow) -> None:
    start, conditions = noise(1, 80, 20), noise(1, 240, 20)
    matching = flow.decoder
    tau = matching.estimator.time_vectors(torch.zeros(1))
    guided = matching.estimator(start, conditions, tau)
    free = matching.estimator(start, torch.zeros_like(conditions), tau)
    got = matching(start, conditions, flow.solver(steps=1, guidance=0.5))
    torch.testing.assert_close(got, start + 1.5 * guided - 0.5 * free, atol=2e-5, rtol=0)


def test_guided_and_free_estimate_are_one_call_of_two_rows(flow: Flow) -> None:
    """Defect D1: the original's are two calls per Euler step."""
    rows: list[int] = []
    estimator = flow.decoder.estimator
    handle = estimator.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    flow([1, 2, 3], noise(1, 80, 20), flow.solver(steps=3, guidance=0.7))
    handle.remove()
    assert rows == [2, 2, 2]


def test_guidance_zero_makes_no_free_estimate(flow: Flow) -> None:
    rows: list[int] = []
    estimator = flow.decoder.estimator
    handle = estimator.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    flow([1, 2, 3], noise(1, 80, 20), flow.solver(steps=2, guidance=0.0))
    handle.remove()
    assert rows == [1, 1]


def test_prompt_frames_are_not_returned_and_condition_the_rest(flow: Flow) -> None:
    start, prompt = noise(1, 80, 68), noise(1, 80, 30)
    alone = flow(range(10), start, flow.solver(steps=2))
    after = flow(range(10), start, flow.solver(steps=2), prompt)
    assert after.shape == (1, 80, 38)
    assert (alone[:, :, 30:] - after).abs().max() > 1e-3


def test_ids_below_zero_are_heard_as_unit_zero(flow: Flow) -> None:
    start, solver = noise(1, 80, 13), flow.solver(steps=1)
    torch.testing.assert_close(flow([-24, 5], start, solver), flow([0, 5], start, solver))


def test_speaker_is_scaled_to_length_one_before_the_affine_layer(flow: Flow) -> None:
    speaker = noise(1, 192)
    torch.testing.assert_close(flow.voice(speaker), flow.voice(3 * speaker))
    torch.testing.assert_close(flow.voice(None)[0], flow.spk_embed_affine_layer.bias)


def test_the_work_of_python_does_not_grow_with_the_units(flow: Flow) -> None:
    """Defect D1: the original builds its masks in a loop over positions."""

    class Counter(TorchFunctionMode):
        calls = 0

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.calls += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for units in (20, 200):
        start = noise(1, 80, flow.frames(units))
        with Counter() as counter:
            flow([1] * units, start, flow.solver(steps=1))
        counts.append(counter.calls)
    assert counts[0] == counts[1] > 100


def test_the_mask_is_built_once_per_call_and_not_per_layer(
    flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defect D1."""
    built: list[int] = []

    def counted(length: int, *args: Any) -> Tensor:
        built.append(length)
        return visible_keys(length, *args)

    monkeypatch.setattr("omnispeech.models.flow_encoder.visible_keys", counted)
    flow.condition(range(30), flow.frames(30))
    assert built == [30] and len(flow.encoder.encoders) > 1
