"""The methods on one decoder layer: what is stored, how well, and what is refused."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from omnispeech.errors import CheckpointError, ConfigError
from omnispeech.models.qwen3 import Block, Qwen3Config
from omnispeech.quantization.method import LayerResult
from omnispeech.quantization.methods import layer_quantizer
from omnispeech.quantization.methods.branches import (
    ATTENTION,
    BRANCHES,
    MLP,
    SHARE,
    Branch,
    Originals,
    Trial,
    linear,
)
from omnispeech.quantization.methods.grid import Rule
from omnispeech.quantization.methods.layer_quantizer import build_method
from omnispeech.quantization.methods.scales import Search, final_fit, fold_into_norm, fold_into_rows
from omnispeech.quantization.methods.settings import MethodSettings
from omnispeech.quantization.methods.statistics import Moments, observe, output_energy
from omnispeech.quantization.stream import Stream

WIDTH, INNER, TOKENS = 64, 128, 40
KINDS: list[dict[str, Any]] = [
    {},
    {"rounding": "rtn"},
    {"zero_point": False},
    {"passes": 3},
    {"apply_clip": True},
    {"bits": 8},
    {"method": "rtn"},
    {"method": "gptq"},
    {"method": "gptq", "desc_act": True},
    {"method": "gptq", "bits": 8, "static_groups": True, "desc_act": True},
    {"compatible": True, "compatible_dtype": "float32"},
    {"method": "rtn", "compatible": True, "compatible_dtype": "float32"},
]


def shape(kind: str = "qwen3") -> Qwen3Config:
    return Qwen3Config.from_dict(
        {
            "model_type": kind,
            "hidden_size": WIDTH,
            "intermediate_size": INNER,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 8,
        }
    )


def make_block(kind: str = "qwen3") -> Block:
    torch.manual_seed(0)
    block = Block(shape(kind)).eval().requires_grad_(False)
    for name, parameter in block.named_parameters():
        if "norm" in name:
            parameter.copy_(torch.ones_like(parameter))
        else:
            parameter.copy_(torch.randn_like(parameter) * 0.15)
    return block


def with_outliers(block: Block, strength: float = 40) -> Block:
    """The same function, with a few channels that are far larger than the others."""
    torch.manual_seed(7)
    for branch in BRANCHES:
        factors = torch.randn(WIDTH).mul(0.8).exp()
        factors[::30] *= strength
        fold_into_norm(block, branch, 1 / factors, torch.float32)
        rows = linear(block, branch.before).out_features
        factors = torch.randn(rows).mul(0.8).exp()
        factors[::30] *= strength
        fold_into_rows(block, branch, 1 / factors, branch.tie(block), torch.float32)
    return block


def stream(samples: int = 12, *, batch_tokens: int = 200, seed: int = 3) -> Stream:
    torch.manual_seed(1)
    mix = torch.randn(10, WIDTH)
    torch.manual_seed(seed)
    states = [
        torch.randn(TOKENS, 10) @ mix + 0.4 * torch.randn(TOKENS, WIDTH) for _ in range(samples)
    ]
    counted = [torch.ones(TOKENS, dtype=torch.bool) for _ in states]
    return Stream(shape(), states, counted, device=torch.device("cpu"), batch_tokens=batch_tokens)


def quantize(block: Block, heard: Stream | None = None, **settings: Any) -> LayerResult:
    heard = heard or stream()
    chosen = MethodSettings(**{"group_size": 32, **settings})
    return build_method(chosen).quantize(block, heard, heard)


def outputs(block: Block, branch: Branch, heard: Stream) -> Tensor:
    return torch.cat([branch.run(block, b, b.x) for b in heard.batches()])


def error(block: Block, reference: Block, branch: Branch, seed: int = 3) -> float:
    wanted = outputs(reference, branch, stream(seed=seed))
    return float((outputs(block, branch, stream(seed=seed)) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_block_computes_what_is_stored(settings: dict[str, Any]) -> None:
    block = make_block()
    result = quantize(block, **settings)
    parameters = dict(block.named_parameters())
    for name, weight in result.weights.items():
        assert torch.equal(parameters.pop(f"{name}.weight"), weight.dequantize())
        assert weight.bits == settings.get("bits", 4)
    assert parameters.keys() == result.plain.keys()
    for name, stored in result.plain.items():
        assert stored.dtype == torch.float16
        assert torch.equal(parameters[name], stored.float())
    assert result.linears.keys() == result.weights.keys()


@pytest.mark.parametrize("kept", [BRANCHES[0].readers, ("mlp.down_proj",), BRANCHES[1].linears])
@pytest.mark.parametrize("settings", [{}, {"compatible": True}, {"method": "gptq"}], ids=str)
def test_kept_linears_stay_float_and_the_layer_gets_closer(
    settings: dict[str, Any], kept: tuple[str, ...]
) -> None:
    block, whole, heard = make_block(), make_block(), stream()
    chosen = MethodSettings(group_size=32, **settings)
    result = build_method(chosen).quantize(block, heard, heard, kept)
    quantize(whole, **settings)
    assert result.weights.keys().isdisjoint(kept) and len(result.weights) == 7 - len(kept)
    for name in kept:
        assert torch.equal(linear(block, name).weight, result.plain[f"{name}.weight"].float())
    branch = next(b for b in BRANCHES if kept[0] in b.linears)
    assert error(block, make_block(), branch) < 0.95 * error(whole, make_block(), branch)


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_every_method_stays_close_to_the_float_layer(settings: dict[str, Any]) -> None:
    block = make_block()
    quantize(block, **settings)
    for branch in BRANCHES:
        allowed = 0.012 if settings.get("bits") == 8 else 0.2
        assert error(block, make_block(), branch) < allowed


@pytest.mark.parametrize("branch", BRANCHES, ids=lambda b: b.module)
def test_default_beats_plain_rounding_on_tokens_it_never_heard(branch: Branch) -> None:
    default, plain = make_block(), make_block()
    quantize(default)
    quantize(plain, method="rtn")
    reference = make_block()
    assert error(default, reference, branch, 9) < 0.7 * error(plain, reference, branch, 9)


def test_strong_outliers_cost_nothing() -> None:
    calm, wild = make_block(), with_outliers(make_block())
    quantize(calm)
    quantize(wild)
    for branch in BRANCHES:
        reference = error(with_outliers(make_block()), make_block(), branch)
        assert reference < 1e-4  # the outliers alone change nothing
        assert error(wild, make_block(), branch) < 1.3 * error(calm, make_block(), branch)


@pytest.mark.parametrize("settings", [{}, {"rounding": "rtn"}, {"method": "gptq"}], ids=str)
@pytest.mark.parametrize("strength", [1, 40])
def test_no_branch_is_worse_than_plain_rounding(settings: dict[str, Any], strength: float) -> None:
    def fresh() -> Block:
        return with_outliers(make_block(), strength)

    block, plain = fresh(), fresh()
    result = quantize(block, **settings)
    quantize(plain, method="rtn", zero_point=settings.get("method") != "gptq")
    assert error(block, fresh(), ATTENTION) <= error(plain, fresh(), ATTENTION) * 1.0001
    for branch in BRANCHES:
        last = result.linears[branch.last]
        assert last.loss <= last.nearest_loss


def test_bad_rounding_falls_back_to_plain_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        layer_quantizer,
        "compensate",
        lambda w, factor, grid: torch.zeros(w.shape, dtype=torch.uint8),
    )
    block, plain = make_block(), make_block()
    result = quantize(block)
    expected = quantize(plain, method="rtn")
    for name, report in result.linears.items():
        assert report.notes["fallback"] == "nearest"
        assert torch.equal(result.weights[name].codes, expected.weights[name].codes)
    for name, stored in expected.plain.items():
        assert torch.equal(result.plain[name], stored)


@pytest.mark.parametrize("judge", ["output", "last linear"])
def test_each_judge_can_bring_plain_rounding_back(
    judge: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if judge == "output":
        losses = itertools.count()
        monkeypatch.setattr(Trial, "loss", lambda self: float(next(losses)))
    else:
        monkeypatch.setattr(layer_quantizer, "losses_of_rows", lambda *_: (2.0, 1.0))
    result = quantize(make_block())
    assert {report.notes["fallback"] for report in result.linears.values()} == {"nearest"}


def test_outliers_do_not_change_the_reported_loss() -> None:
    calm = quantize(make_block(), rounding="rtn").linears
    wild = quantize(with_outliers(make_block()), rounding="rtn").linears
    for name, report in calm.items():
        assert wild[name].loss == pytest.approx(report.loss, rel=0.5)


def test_reported_loss_is_that_of_the_output() -> None:
    block, heard = make_block(), stream()
    report = quantize(block, heard, method="rtn").linears["self_attn.q_proj"]
    x = torch.cat([make_block().input_layernorm(b.x) for b in heard.batches()])
    wanted = x @ make_block().self_attn.q_proj.weight.T
    got = x @ block.self_attn.q_proj.weight.T
    true = float((got - wanted).square().sum() / wanted.square().sum())
    assert report.loss == pytest.approx(true, rel=1e-3)
    assert report.nearest_loss == pytest.approx(true, rel=1e-3)


@pytest.mark.parametrize("kind", ["qwen3", "qwen2"])
@pytest.mark.parametrize("branch", BRANCHES, ids=lambda b: b.module)
def test_folding_scales_changes_nothing(kind: str, branch: Branch) -> None:
    block, heard = make_block(kind), stream()
    wanted = outputs(block, branch, heard)
    torch.manual_seed(5)
    scales = torch.randn(WIDTH).exp()
    fold_into_norm(block, branch, scales, torch.float16)
    rows = linear(block, branch.before).out_features
    fold_into_rows(block, branch, torch.randn(rows).exp(), branch.tie(block), torch.float32)
    torch.testing.assert_close(outputs(block, branch, heard), wanted, rtol=1e-4, atol=3e-5)
    norm = branch.norm_of(block).weight
    assert torch.equal(norm, norm.half().float())
    torch.testing.assert_close(norm, 1 / scales, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_float_weights_are_remembered_exactly_in_what_they_were_stored_in(
    stored: torch.dtype,
) -> None:
    block = make_block().to(stored).float()
    floats = Originals(block, MLP)
    assert floats._kept["mlp.up_proj.weight"].dtype == stored
    before = block.mlp.up_proj.weight.clone()
    floats.weight("mlp.up_proj").zero_()
    block.mlp.up_proj.weight.mul_(0.7)
    assert torch.equal(floats.weight("mlp.up_proj", slice(5, 9)), before[5:9])
    floats.restore()
    assert torch.equal(block.mlp.up_proj.weight, before)


@pytest.mark.parametrize("branch", BRANCHES, ids=lambda b: b.module)
def test_trial_tells_the_error_of_the_output_and_leaves_weights_alone(branch: Branch) -> None:
    block, heard = make_block(), stream()
    trial = Trial(block, branch, heard, 10**6)
    before = [parameter.clone() for parameter in block.parameters()]
    assert trial.loss_with([branch.last], lambda rows: 0.5 * rows) == pytest.approx(0.25)
    assert all(map(torch.equal, block.parameters(), before))
    assert trial.loss() == 0


@pytest.mark.parametrize("batch_tokens", [1, 4000])
def test_sequences_longer_than_what_an_mlp_takes_are_heard_whole(batch_tokens: int) -> None:
    block = make_block()
    heard = stream(3, batch_tokens=batch_tokens)
    torch.manual_seed(4)
    heard.states[1] = torch.randn(2 * SHARE + 7, WIDTH)
    heard.counted[1] = torch.rand(len(heard.states[1])) > 0.3
    found = observe(block, MLP, heard, [MLP.readers[0], MLP.last])
    x = torch.cat([MLP.enter(block, b)[b.counted] for b in heard.batches()])
    x = block.post_attention_layernorm(x)
    inner = torch.nn.functional.silu(block.mlp.gate_proj(x)) * block.mlp.up_proj(x)
    for name, inputs in ((MLP.readers[0], x), (MLP.last, inner)):
        assert found[name].tokens == len(x)
        torch.testing.assert_close(found[name].gram, inputs.T @ inputs / len(x))


def test_biases_are_kept() -> None:
    block = make_block("qwen2")
    result = quantize(block)
    for name, stored in result.plain.items():
        assert torch.equal(block.get_parameter(name), stored.float())
    before = make_block("qwen2").self_attn
    assert torch.equal(result.plain["self_attn.q_proj.bias"], before.q_proj.bias.half())
    assert result.plain["self_attn.v_proj.bias"].shape == before.v_proj.bias.shape


def search(moments: Moments, **settings: Any) -> Search:
    block = make_block()
    chosen = MethodSettings(group_size=32, **settings)
    weights = [linear(block, name).weight for name in MLP.readers]
    return Search(weights, moments, chosen, torch.arange(WIDTH))


def moments() -> Moments:
    torch.manual_seed(2)
    x = torch.randn(500, WIDTH) * torch.randn(WIDTH).exp()
    found = Moments(WIDTH, x.device)
    found.add(x)
    found.finish("x")
    return found


def test_identity_wins_where_nothing_is_better() -> None:
    silent = moments()
    silent.gram.zero_()
    assert search(silent).best().kind == "identity"


@pytest.mark.parametrize("settings", [{}, {"rounding": "rtn"}], ids=str)
def test_denser_grid_is_never_worse(settings: dict[str, Any]) -> None:
    losses = [search(moments(), search_step=m, **settings).best().loss for m in (1, 2, 4)]
    assert losses[2] <= losses[1] <= losses[0]


def test_search_finds_the_best_of_all_ratios() -> None:
    found = search(moments(), duo_scaling="off")
    scaled = [found._choice("activation", i / 20) for i in range(1, 21)]
    every = found._judged(scaled, found.final)
    assert found.best().loss <= every[0].loss * 1.01


def test_narrowed_rows_are_better_as_a_whole() -> None:
    """Errors of groups that are small one by one add up where inputs have a mean."""
    rule, w = Rule(4, 32, symmetric=False), make_block().mlp.gate_proj.weight
    x = torch.randn(500, WIDTH) + 2
    gram = x.T @ x / 500
    grids = (
        final_fit(MethodSettings(rounding="rtn"), rule)(w, gram),
        rule.heard(w, rule.blocks(gram)),
    )
    chosen, groupwise = (output_energy(grid.nearest(w) - w, gram) for grid in grids)
    widest = output_energy(rule.widest(w).nearest(w) - w, gram)
    assert (groupwise > widest).any()
    assert torch.equal(chosen, torch.minimum(groupwise, widest))


def test_duo_scaling_chooses_the_grid() -> None:
    for duo, kinds in (("on", {"duo"}), ("off", {"activation"}), ("both", {"duo", "activation"})):
        found = {c.kind for c in search(moments(), duo_scaling=duo)._coarse()}
        assert found == kinds


def test_without_zero_point_every_zero_is_the_middle() -> None:
    result = quantize(make_block(), zero_point=False)
    assert all((w.zeros == 8).all() for w in result.weights.values())


def test_gptq_is_symmetric_and_keeps_its_groups_unless_told_otherwise() -> None:
    for settings, indexed in (
        ({}, False),
        ({"desc_act": True}, True),
        ({"desc_act": True, "static_groups": True}, False),
    ):
        result = quantize(make_block(), method="gptq", bits=8, **settings)
        for weight in result.weights.values():
            assert (weight.zeros == 128).all()
            assert (weight.group_of is not None) == indexed


def test_tokens_that_are_not_counted_have_no_say() -> None:
    """Uncounted tokens stand behind the counted ones, which therefore cannot see them."""
    clean, dirty = stream(), stream()
    torch.manual_seed(11)
    for i, state in enumerate(dirty.states):
        dirty.states[i] = torch.cat([state, 50 * torch.randn(9, WIDTH)])
        dirty.counted[i] = torch.cat([dirty.counted[i], torch.zeros(9, dtype=torch.bool)])
    for settings in ({}, {"rounding": "rtn"}):
        first = quantize(make_block(), clean, **settings).weights
        second = quantize(make_block(), dirty, **settings).weights
        for name, weight in first.items():
            assert (weight.codes == second[name].codes).float().mean() > 0.99


def test_size_of_batches_does_not_matter() -> None:
    first = quantize(make_block(), stream(batch_tokens=40)).weights
    second = quantize(make_block(), stream(batch_tokens=4000)).weights
    for name, weight in first.items():
        assert (weight.codes == second[name].codes).float().mean() > 0.99


def test_silent_channels_and_empty_groups_are_harmless() -> None:
    block = make_block()
    block.input_layernorm.weight[5] = 0
    block.mlp.up_proj.weight[3] = 0
    block.mlp.gate_proj.weight[:, 32:64] = 0
    for settings in KINDS:
        if settings.get("compatible"):
            continue
        result = quantize(block, **settings)
        for name, report in result.linears.items():
            assert torch.isfinite(result.weights[name].dequantize()).all()
            assert report.loss <= report.nearest_loss * 1.01 + 1e-6


def test_damaged_weight_is_named() -> None:
    block = make_block()
    block.mlp.down_proj.weight[4, 17] = float("nan")
    with pytest.raises(CheckpointError, match="mlp.down_proj.weight is not finite at channel 17"):
        quantize(block)


def test_input_that_is_not_finite_is_named() -> None:
    block = make_block()
    block.mlp.up_proj.weight[9] = 3e38
    with pytest.raises(CheckpointError, match="input of mlp.down_proj is not finite at channel 9"):
        quantize(block)


def test_stream_without_counted_tokens_is_refused() -> None:
    heard = stream()
    heard.counted = [torch.zeros(TOKENS, dtype=torch.bool) for _ in heard.states]
    with pytest.raises(ConfigError, match="no calibration token is counted"):
        quantize(make_block(), heard)


def test_salient_columns_leave_the_file_alone_and_lower_the_error() -> None:
    with_quota, without = make_block(), make_block()
    result = quantize(with_quota, rounding="rtn", salient_quota=0.05)
    expected = quantize(without, rounding="rtn")
    assert not expected.salient
    for name, weight in expected.weights.items():
        assert torch.equal(result.weights[name].codes, weight.codes)
        salient = result.salient[name]
        count = max(1, round(0.05 * weight.codes.shape[1]))
        assert salient.residual.shape == (len(weight.codes), count)
        assert salient.residual.dtype == torch.int8
    name = "self_attn.q_proj"
    salient = result.salient[name]
    ratio = make_block().input_layernorm.weight / with_quota.input_layernorm.weight
    true = make_block().self_attn.q_proj.weight * ratio
    mended = result.weights[name].dequantize()
    before = (mended - true).norm()
    mended[:, salient.columns] += salient.residual.float() * salient.scales.float()
    assert (mended - true)[:, salient.columns].abs().max() < 0.01 * true.abs().max()
    assert (mended - true).norm() < before


def test_dump_names_the_loud_channels() -> None:
    block = make_block()
    factors = torch.ones(WIDTH)
    factors[[7, 21]] = 60
    fold_into_norm(block, ATTENTION, 1 / factors, torch.float32)
    notes = quantize(block, dump_salient=True).linears["self_attn.k_proj"].notes["salient"]
    assert [o["index"] for o in notes["outliers"]] == [7, 21]
    assert 0 < notes["share"] <= 1
    scores = [column["score"] for column in notes["columns"]]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "hqq"}, "method is 'hqq'; allowed: awq, gptq, rtn"),
        ({"bits": 3}, "--bits is 3; allowed: 4, 8"),
        ({"group_size": 48}, "--q-group-size is 48; allowed: 32, 64, 128, 256, -1"),
        ({"search_step": 0}, "--search-step is 0"),
        ({"search_step": 1.5}, "--search-step is 1.5"),
        ({"passes": 0}, "--iter is 0"),
        ({"damping": 0.0}, "damp_percent is 0.0"),
        ({"salient_quota": 0.9, "rounding": "rtn"}, "--salient-quota is 0.9"),
        ({"bits": 8, "zero_point": True}, "8-bit AWQ has no zero points"),
        ({"compatible": True, "rounding": "gptq"}, "recipe rounds to nearest"),
        ({"compatible": True, "duo_scaling": "both"}, "searches one grid"),
        ({"compatible": True, "search_step": 2}, "a fixed grid and one pass"),
        ({"compatible": True, "bits": 8}, "is 4 bit, not 8"),
        ({"compatible": True, "method": "gptq"}, "is AWQ, not gptq"),
        ({"compatible": True, "dump_salient": True}, "knows no salient columns"),
        ({"method": "rtn", "passes": 2}, "rtn rounds once"),
        ({"method": "gptq", "zero_point": True}, "symmetric"),
        ({"method": "gptq", "rounding": "rtn"}, "method rtn"),
        ({"method": "gptq", "duo_scaling": "on"}, "gptq has none"),
        ({"method": "rtn", "rounding": "gptq"}, "rtn rounds to nearest"),
        (
            {"rounding": "rtn", "desc_act": True},
            "--desc-act has no effect on round-to-nearest AWQ; "
            "use --rounding gptq or drop the flag",
        ),
        ({"method": "rtn", "static_groups": True}, "--static-groups has no effect"),
        (
            {"salient_quota": 0.004},
            "salient columns are already compensated; "
            "use --dump-salient for analysis or --rounding rtn",
        ),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MethodSettings(**settings)


def test_what_is_not_chosen_suits_the_method() -> None:
    default, nearest = MethodSettings(), MethodSettings(rounding="rtn")
    assert (default.rounds, default.duo, default.symmetric) == ("gptq", "both", False)
    assert default.act_order and not default.clips
    assert nearest.clips and not nearest.act_order
    gptq = MethodSettings(method="gptq")
    assert gptq.symmetric and not gptq.act_order and not gptq.fixed_groups
    autoawq = MethodSettings(compatible=True)
    assert (autoawq.rounds, autoawq.duo, autoawq.clips) == ("rtn", "on", True)
    assert MethodSettings(bits=8).symmetric
