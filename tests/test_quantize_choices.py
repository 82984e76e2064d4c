"""What flags, the environment and --quant_config mean together, and what contradicts itself."""

import pytest
from command_models import chosen

from omnispeech.errors import ConfigError
from omnispeech.quantize_cli.remarks import remarks


def test_the_defaults_are_those_of_the_guides() -> None:
    c = chosen()
    assert (c.method.method, c.method.bits, c.method.group_size) == ("awq", 4, 128)
    assert (c.method.passes, c.method.search_step) == (1, 1)
    assert c.calibrate.seq_len == 2048 and c.run.batch_tokens == 2048
    g = chosen("--gptq")
    assert (g.method.method, g.method.bits, g.method.group_size) == ("gptq", 8, 128)
    assert not g.method.act_order and g.method.symmetric
    assert chosen("--gptq", "--gptq_desc_act").method.act_order


def test_max_quality_is_what_the_guide_says_and_every_flag_goes_before_it() -> None:
    c = chosen("--max_quality")
    assert c.run.keep_fp_layers == (0, 1, -1)
    assert (c.method.passes, c.method.search_step) == (40, 2)
    assert (c.calibrate.seq_len, c.calibrate.max_samples) == (16_384, 20_000)
    assert c.method.act_order and not c.method.symmetric and c.method.dump_salient
    assert c.device == "auto"
    assert chosen("--max_quality", "--iter", "5").method.passes == 5


def test_seq_len_comes_from_the_environment_unless_it_is_given() -> None:
    assert chosen(SEQ_LEN="512").calibrate.seq_len == 512
    assert chosen("--seq_len", "256", SEQ_LEN="512").calibrate.seq_len == 256
    assert chosen("--max_calib_seq_len", "128").calibrate.seq_len == 128
    assert chosen("--max_quality", SEQ_LEN="1024").calibrate.seq_len == 1024
    with pytest.raises(ConfigError, match="SEQ_LEN='long'"):
        chosen(SEQ_LEN="long")


def test_a_switch_of_the_environment_gives_way_to_the_flag() -> None:
    assert chosen(FORCE_CPU="true").device == "cpu"
    assert chosen("--no-force-cpu", FORCE_CPU="true").device == "auto"
    with pytest.raises(ConfigError, match="FORCE_CPU='maybe'"):
        chosen(FORCE_CPU="maybe")


def test_the_number_of_samples_is_shared_among_the_sets() -> None:
    c = chosen("--dataset", "c4,book:7,stack", "--calib-size", "30", "--calib-split", "validation")
    assert c.calibrate.mixture == "c4:10,book:7,stack:10"
    assert c.calibrate.splits == ("valid",)
    assert chosen("--gptq", "--gptq_dataset", "c4").calibrate.mixture == "c4"
    assert chosen("--calib_data", "pileval").calibrate.mixture == "pileval"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--version", "marlin"], "arranges weights when it loads"),
        (["--version", "exllama"], "write GEMM"),
        (["--version", "ipex"], "write GEMM"),
        (["--version", "gguf"], "GEMM, GEMV, gemv_fast"),
        (["--rounding", "rtn", "--desc-act"], "--desc-act has no effect"),
        (["--bits", "3"], "allowed: 4, 8"),
        (["--bits", "8", "--strict-format"], "no server reads 8-bit AWQ"),
        (["--gptq_desc_act"], "add --gptq"),
        (["--gptq", "--version", "gemv"], "GPTQ has one layout"),
        (["--gptq", "--zero-point"], "symmetric"),
        (["--gptq", "--quant_config", '{"sym": false}'], "sym is false"),
        (["--quant_config", "{"], "not valid JSON"),
        (["--quant_config", "[]"], "allowed: one JSON object"),
        (["--quant_config", '{"w_bit": "4"}'], "w_bit is '4'; allowed: int"),
        (["--quant_config", '{"bits": 4, "w_bit": 8}'], "give it once"),
        (["--quant_config", '{"zero_point": true}', "--no-zero-point"], "give it once"),
        (["--seq_len", "32"], "64 or more"),
        (["--calib-size", "0"], "1 or more"),
        (["--batch_size", "0"], "1 or more"),
        (["--duo_scaling", "perhaps"], "on, off, both"),
        (["--compatible", "--max_quality"], "fixed grid"),
        (["--engine", "autoawq", "--gptq"], "AutoAWQ has nothing like --gptq"),
        (["--engine", "autoawq", "--keep-fp-layers", "0"], "--engine native"),
        (["--force_cpu", "--device", "cuda"], "hides every GPU"),
        (["--dataset", "nowhere", "--calib-text", "x"], "text alone"),
        (["--dump-salient", "nowhere/outlier.json"], "nowhere is not a directory"),
        (["--engine", "autoawq", "--no-zero-point"], "can be loaded"),
        (["--iter", "0"], "--iter is 0"),
        (["--q-group-size", "100"], "--q-group-size is 100; allowed: 32"),
        (["--gptq", "--gptq_group_size", "100"], "--gptq_group_size is 100"),
        (["--quant_config", '{"q_group_size": 100}'], "q_group_size in --quant_config is 100"),
        (
            ["--quant_config", '{"q_group_size": 64}', "--q-group-size", "32"],
            "--q-group-size is 32 and q_group_size in --quant_config is 64",
        ),
        (["--quant_config", '{"bits": 4, "bits": 8}'], "'bits' is there twice"),
        (["--compatible", "--max_quality"], "drop --iter, --search-step and --max_quality"),
        (["--gptq", "--salient-quota", "0.004"], "--rounding rtn with --awq"),
        (["--private"], "add --push-to-hub"),
        (["--calib-split", "train"], "add --dataset"),
        (["--gptq", "--static-groups"], "add --gptq_desc_act"),
    ],
)
def test_what_has_no_sound_meaning_is_refused_with_the_reason(
    flags: list[str], reason: str
) -> None:
    with pytest.raises(ConfigError) as error:
        chosen(*flags)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--batch-tokens", "0"), "--batch-tokens is 0; allowed: 1 or more"),
        (("--calib-size", "0"), "--calib-size is 0; allowed: 1 or more"),
        (("--gptq", "--search-step", "2"), "are of AWQ's search"),
        (("--gptq", "--apply_clip"), "are of AWQ's search"),
        (("--gptq", "--quant_config", '{"damp_percent": NaN}'), "is not valid JSON: NaN"),
        (("--dump-salient", "."), "cannot be written"),
    ],
)
def test_a_value_that_means_nothing_is_refused_by_its_flag(
    flags: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        chosen(*flags)


def test_a_value_of_the_environment_is_refused_by_its_variable() -> None:
    with pytest.raises(ConfigError, match="SEQ_LEN of the environment is 10; allowed: 64"):
        chosen(SEQ_LEN="10")
    with pytest.raises(ConfigError, match="FORCE_CPU=1 of the environment hides every GPU"):
        chosen("--device", "cuda", FORCE_CPU="1")


def test_splits_and_static_groups_that_have_an_effect_are_taken() -> None:
    assert chosen("--calib", "c4", "--calib-split", "test").calibrate.splits == ("test",)
    assert chosen("--dataset", "c4").calibrate.splits == ("train", "valid")
    assert chosen("--gptq", "--static-groups", "--gptq_desc_act").method.fixed_groups


@pytest.mark.parametrize(
    ("flags", "said", "not_said"),
    [
        ([], ["layers 0, 1, -1 stay float", "up to 40 times", "--rounding rtn --salient"], []),
        (["--iter", "3", "--keep-fp-layers", "2"], ["layer 2 stays", "up to 3 times"], ["40"]),
        (["--search-step", "5"], ["5 times the grid"], []),
        (["--gptq"], ["--awq --rounding rtn --salient"], ["grid"]),
        (["--rounding", "rtn"], ["--salient-quota 0.004 stores"], ["GPTQ rounding"]),
        (["--rounding", "rtn", "--salient-quota", "0.01"], ["read by omnispeech"], ["no residu"]),
        (["--force_cpu"], [], ["GPU"]),
        (["--seq_len", "512", "--calib-size", "9"], ["9 samples of up to 512"], ["16384"]),
    ],
)
def test_remarks_on_max_quality_are_true_of_what_was_chosen(
    flags: list[str], said: list[str], not_said: list[str]
) -> None:
    text = "\n".join(remarks(chosen("--max_quality", *flags)))
    assert all(part in text for part in said), text
    assert not any(part in text for part in not_said), text


def test_max_quality_has_no_grid_with_gptq_and_the_target_is_named_as_in_errors() -> None:
    assert chosen("--max_quality", "--gptq").method.search_step == 1
    assert chosen("--target", "transformers-marlin").run.target == "transformers-marlin"
