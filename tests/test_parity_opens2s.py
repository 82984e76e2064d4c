import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from omnispeech.checkpoint.opens2s import load_opens2s
from omnispeech.errors import CheckpointError
from omnispeech.models.omnispeech import OmniSpeech, OmniSpeechConfig
from omnispeech.parity.cases import Case, case_names, distance, read_case
from omnispeech.parity.opens2s import compare, hear
from omnispeech.parity.report import Row
from omnispeech.prompt import AUDIO, PromptBuilder

GOLDEN = Path(__file__).parent / "golden" / "opens2s"
OTHER_SHAPES: dict[str, dict[str, Any]] = {
    "whisper": {
        "audio_encoder_config": {"model_type": "whisper", "num_mel_bins": 80},
        "conv_kernel_sizes": "3,5,3",
    },
    "ten seconds": {
        "audio_encoder_config": {"max_source_positions": 500, "num_mel_bins": 40},
        "conv_kernel_sizes": "3",
        "adapter_inner_dim": 7,
        "interleave_strategy": "3:5",
    },
    "qwen2": {"llm_config": {"model_type": "qwen2"}, "tts_lm_config": {"hidden_size": 32}},
}


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A copy with one case, to be damaged."""
    shutil.copytree(GOLDEN, tmp_path / "set")
    for path in (tmp_path / "set/expected-opens2s-tiny").glob("t*"):
        path.unlink()
    return tmp_path / "set"


def read_cases(checkpoint: Path) -> list[Case]:
    return [read_case(checkpoint, name) for name in case_names(checkpoint)]


def failures(directory: Path) -> list[str]:
    return [row.stage for row in compare(directory) if not row.passed]


def change_expected(golden: Path, **changes: Tensor) -> None:
    path = golden / "expected-opens2s-tiny/audio2s.safetensors"
    save_file(load_file(path) | changes, path)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return list(compare(GOLDEN))


def test_every_golden_number_is_reproduced(rows: list[Row]) -> None:
    assert [row for row in rows if not row.passed] == []


def test_every_golden_tensor_and_every_generation_is_compared(rows: list[Row]) -> None:
    compared = {(row.case, row.stage) for row in rows}
    cases = read_cases(GOLDEN / "opens2s-tiny")
    assert {case.name for case in cases} == {
        f"opens2s-tiny/{case}" for case in ("text", "audio2s", "twoturn")
    }
    for case in cases:
        assert {(case.name, name) for name in case.tensors} <= compared
        for name, facts in case.facts["generations"].items():
            assert {(f"{case.name}/{name}", key) for key in ("text_ids", "unit_ids")} <= compared
            assert facts["text_ids"]


def test_a_changed_id_of_a_generation_fails(golden: Path) -> None:
    path = golden / "expected-opens2s-tiny/audio2s.json"
    facts = json.loads(path.read_text())
    facts["generations"]["limits"]["unit_ids"][3] += 1
    facts["generations"]["limits"]["surprise"] = 1
    path.write_text(json.dumps(facts))
    change_expected(golden, **{"gen.surprise.tts_cond": torch.zeros(2)})
    assert failures(golden) == ["unit_ids", "gen.surprise.tts_cond (unknown)"]


def test_facts_of_the_json_file_are_compared(rows: list[Row]) -> None:
    stages = {row.stage for row in rows if row.case == "opens2s-tiny/twoturn"}
    names = ("input_ids", "prompt_text", "prompt_len", "mel_shape", "mel_valid_frames")
    assert {f"{name} (json)" for name in names} | {"mel_pad_value_0", "mel_pad_value_1"} <= stages


def test_ids_and_lengths_must_be_equal(rows: list[Row]) -> None:
    exact = [row for row in rows if row.stage.startswith(("input_ids", "encoder_l", "adapter_l"))]
    assert exact and all(row.tolerance == row.difference == 0.0 for row in exact)


def test_an_expected_tensor_that_nothing_answers_to_fails(golden: Path) -> None:
    change_expected(golden, surprise=torch.zeros(2), encoder_out_5=torch.zeros(1, 64))
    assert failures(golden) == ["encoder_out_5 (unknown)", "surprise (unknown)"]


def test_a_difference_over_the_tolerance_fails_where_it_is(golden: Path) -> None:
    mel = load_file(golden / "expected-opens2s-tiny/audio2s.safetensors")["mel_0.0"].clone()
    mel[0, 0] += 3e-4
    change_expected(golden, **{"mel_0.0": mel, "encoder_lengths": torch.tensor([51])})
    assert failures(golden) == ["encoder_lengths", "mel_0.0"]


def test_a_changed_weight_fails_from_its_stage_on(golden: Path) -> None:
    path = golden / "opens2s-tiny/model.safetensors"
    weights = load_file(path)
    weights["audio_adapter.ln.bias"] += 0.01
    save_file(weights, path)
    failed = failures(golden)
    assert failed[:2] == ["adapter_out_0", "prompt_embeds"]
    assert {"prompt_hidden", "first_logits"} <= set(failed)


def test_a_changed_fact_fails(golden: Path) -> None:
    path = golden / "expected-opens2s-tiny/audio2s.json"
    facts = json.loads(path.read_text()) | {"prompt_len": 47, "mel_pad_value": [0.0]}
    path.write_text(json.dumps(facts))
    assert failures(golden) == ["prompt_len (json)", "mel_pad_value_0"]


def test_a_case_with_half_its_files_fails_by_name(golden: Path) -> None:
    (golden / "expected-opens2s-tiny/audio2s.safetensors").unlink()
    assert re.search(r"not compared: .*audio2s\.safetensors cannot be read", failures(golden)[0])


def test_a_directory_without_expected_values_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no expected-\* folder"):
        list(compare(tmp_path))


@pytest.mark.parametrize("actual", [torch.tensor([1.0, torch.nan]), torch.zeros(3)], ids=str)
def test_a_number_that_is_not_finite_or_another_shape_is_infinitely_far(actual: Tensor) -> None:
    assert distance(actual, torch.ones(2)) == float("inf")


def test_messages_of_a_case_keep_the_order_of_text_and_sound() -> None:
    case = next(c for c in read_cases(GOLDEN / "opens2s-tiny") if c.name.endswith("twoturn"))
    assert case.messages[0].parts == (AUDIO,)
    assert case.messages[2].parts == ("What about this one? ", AUDIO)
    assert [len(sound) for sound in case.sounds] == [84_800, 499_200]


@pytest.mark.parametrize("name", OTHER_SHAPES)
def test_other_shapes_and_encoders_are_compared_without_a_change(name: str, tmp_path: Path) -> None:
    write_golden_set(tmp_path, OTHER_SHAPES[name])
    found = list(compare(tmp_path))
    assert [row for row in found if not row.passed] == []
    assert {"mel_1.0", "encoder_out_1", "adapter_solo_0", "prompt_embeds"} <= {
        row.stage for row in found
    }


def write_golden_set(directory: Path, changes: dict[str, Any]) -> None:
    """Random weights of another shape; what is expected is what they give here."""
    checkpoint = Path(shutil.copytree(GOLDEN / "opens2s-tiny", directory / "other"))
    raw = json.loads((checkpoint / "config.json").read_text())
    for key, value in changes.items():
        raw[key] = raw[key] | value if isinstance(value, dict) else value
    (checkpoint / "config.json").write_text(json.dumps(raw))
    encoder = raw["audio_encoder_config"]
    preprocessor = {
        "feature_size": encoder["num_mel_bins"],
        "chunk_length": encoder["max_source_positions"] // 50,
    }
    (checkpoint / "audio/preprocessor_config.json").write_text(json.dumps(preprocessor))
    torch.manual_seed(0)
    model = OmniSpeech(OmniSpeechConfig.from_dict(raw))
    for parameter in model.parameters():  # those of the norms are not initialised
        torch.nn.init.normal_(parameter, std=0.1)
    save_file(model.state_dict(), checkpoint / "model.safetensors")
    write_expected(directory, checkpoint)


def write_expected(directory: Path, checkpoint: Path) -> None:
    (directory / "waves").mkdir()
    for name, seconds in (("short", 1.5), ("long", 11.0)):
        samples = np.random.default_rng(0).uniform(-0.3, 0.3, round(seconds * 16_000))
        soundfile.write(directory / f"waves/{name}.wav", samples, 16_000, subtype="PCM_16")
    content = [{"wave": "short"}, {"text": " and "}, {"wave": "long"}]
    expected = directory / "expected-other"
    expected.mkdir()
    facts: dict[str, Any] = {"messages": [{"role": "user", "content": content}]}
    (expected / "case.json").write_text(json.dumps(facts))
    save_file({}, expected / "case.safetensors")
    loaded = load_opens2s(checkpoint, torch.device("cpu"), torch.float32)
    prompts = PromptBuilder.from_directory(checkpoint, compatible=True)
    heard = hear(read_cases(checkpoint)[0], loaded, prompts)
    (expected / "case.json").write_text(json.dumps(facts | heard.facts))
    windows = {f"mel_{i}.0": mel[:, :90].contiguous() for i, mel in enumerate(heard.mels)}
    tensors = {name: t.contiguous() for name, t in heard.tensors.items()} | windows
    save_file(tensors, expected / "case.safetensors")


def expected(golden: Path) -> Path:
    return golden / "expected-opens2s-tiny"


def test_a_dot_in_the_name_of_a_case_is_part_of_it(golden: Path) -> None:
    """`audio2s.5` once was read from the files of `audio2s`."""
    for ending in (".json", ".safetensors"):
        shutil.copy(expected(golden) / f"audio2s{ending}", expected(golden) / f"audio2s.5{ending}")
    path = expected(golden) / "audio2s.5.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prompt_len": 3}))
    failed = [(row.case, row.stage) for row in compare(golden) if not row.passed]
    assert failed == [("opens2s-tiny/audio2s.5", "prompt_len (json)")]


def test_states_of_the_prompt_are_compared_without_any_generation(golden: Path) -> None:
    path = expected(golden) / "audio2s.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"generations": {}}))
    tensors = load_file(path.with_suffix(".safetensors"))
    save_file(
        {name: tensor for name, tensor in tensors.items() if not name.startswith("gen.")},
        path.with_suffix(".safetensors"),
    )
    rows = list(compare(golden))
    assert all(row.passed for row in rows)
    assert {"prompt_hidden", "first_logits"} <= {row.stage for row in rows}


def test_a_case_that_cannot_be_read_fails_and_hides_no_other(golden: Path) -> None:
    (expected(golden) / "broken.json").write_text('{"messages": [], "generations": {}}')
    (expected(golden) / "notes.json").write_text('{"made": "on a Monday"}')
    rows = list(compare(golden))
    assert [row.case for row in rows if not row.passed] == ["opens2s-tiny/broken"]
    assert sum(row.case.startswith("opens2s-tiny/audio2s") for row in rows) > 50


def test_logits_that_were_cut_short_fail(golden: Path) -> None:
    tensors = load_file(expected(golden) / "audio2s.safetensors")
    change_expected(golden, **{"gen.llm_logits": tensors["gen.llm_logits"][:5].contiguous()})
    assert failures(golden) == ["gen.llm_logits"]


@pytest.mark.parametrize("wave", ["chirp2s.wav", "sub/chirp2s", "chirp2s"])
def test_a_sound_is_found_by_its_name_with_or_without_ending(golden: Path, wave: str) -> None:
    (golden / "waves" / "sub").mkdir()
    shutil.copy(golden / "waves" / "chirp2s.wav", golden / "waves" / "sub")
    path = expected(golden) / "audio2s.json"
    facts = json.loads(path.read_text())
    assert facts["messages"][-1]["content"] in ({"wave": "chirp2s"}, [{"wave": "chirp2s"}])
    facts["messages"][-1]["content"] = ["", {"wave": wave, "text": ""}]
    path.write_text(json.dumps(facts))
    assert failures(golden) == []
