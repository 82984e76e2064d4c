"""The training computes what the server will compute, and starts where it says it starts."""

import random
import re
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from omnispeech.models.flow import Flow, FlowConfig
from omnispeech.models.omnispeech import OmniSpeechConfig
from training.answers import k_means
from training.batched import run
from training.domain import DO_NOT_KNOW, Domain, answer_to_sum, compute, facts, words_of
from training.fitting import Plan, fit, save
from training.flow import STRENGTH, new_flow
from training.hearing import MEL, features, listen
from training.judge import distance, score
from training.language import new_model, reading_order
from training.listening import pause_level_db
from training.recordings import HEARD_HZ
from training.shape import write_decoder_settings, write_opens2s_settings
from training.stages import RECORDED, STEPS

README = Path(__file__).parent.parent / "training" / "README.md"


@pytest.fixture(scope="module")
def opens2s(tmp_path_factory: pytest.TempPathFactory) -> OmniSpeechConfig:
    return write_opens2s_settings(tmp_path_factory.mktemp("opens2s"))


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Flow:
    config: FlowConfig = write_decoder_settings(tmp_path_factory.mktemp("decoder"))[0]
    return new_flow(config).eval()


def test_answers_are_right_or_admit_that_they_are_not_known() -> None:
    assert answer_to_sum(3, "plus", 4) == "Three plus four is seven."
    assert answer_to_sum(19, "plus", 18) == DO_NOT_KNOW
    assert compute(3, "minus", 4) is None
    assert all(compute(*fact) is not None for fact in facts())


def test_a_follow_up_goes_on_from_the_last_answer() -> None:
    first, second = Domain().follow_up(random.Random(1)).turns
    assert words_of(second.answer)[0] == words_of(first.answer)[-1]


def test_batched_language_models_are_those_of_the_server(opens2s: OmniSpeechConfig) -> None:
    model = new_model(opens2s).eval()
    with torch.inference_mode():
        for lm in (model.llm_model, model.tts_lm_model):
            x = torch.randn(2, 20, lm.config.hidden_size)
            cache = lm.new_cache(64)
            rows = [cache.allocate(20), cache.allocate(20)]
            layout = cache.layout([(row, 20) for row in rows if row is not None])
            of_server = lm(x.flatten(0, 1), cache, layout).view_as(x)
            assert torch.allclose(run(lm, x), of_server, atol=1e-5)


def test_batched_hearing_is_that_of_the_server(opens2s: OmniSpeechConfig) -> None:
    model = new_model(opens2s).eval()
    rng = torch.Generator().manual_seed(1)
    clips = [torch.randn(n, generator=rng) * 0.1 for n in (HEARD_HZ, 3 * HEARD_HZ, 6 * HEARD_HZ)]
    with torch.inference_mode():
        mels, frames = features([clip.numpy() for clip in clips])
        found = listen(model.audio_encoder_model, model.audio_adapter, mels, frames)
        of_server = model.embed_audio(mels, frames, batch_rule=False)
    assert MEL.valid_frames(HEARD_HZ) == 100
    for mine, theirs in zip(found.of_clips(), of_server, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_speech_reads_four_states_and_writes_eight_units() -> None:
    order = reading_order(6, 20, 4, 8)
    kinds = [kind.rstrip("!") for kind, _ in order]
    assert kinds[:5] == ["speaker", "state", "state", "state", "state"]
    assert kinds[5:15] == ["unit"] * 8 + ["state"] * 2
    assert sum(kind.endswith("!") for kind, _ in order) == 20


def field(flow: Flow, x: Tensor, mu: Tensor, time: float) -> Tensor:
    unet = flow.decoder.estimator
    others = torch.zeros(len(mu), 160, mu.shape[2])
    return unet(x, torch.cat((mu, others), dim=1), unet.time_vectors(torch.tensor([time])))


@pytest.mark.parametrize("time", [0.0, 0.5, 0.9])
def test_the_untrained_flow_points_at_the_estimate(flow: Flow, time: float) -> None:
    rng = torch.Generator().manual_seed(1)
    mu = torch.randn(2, 80, 60, generator=rng) + torch.randn(2, 80, 1, generator=rng)
    x = torch.randn(2, 80, 60, generator=rng)
    with torch.inference_mode():
        wanted = STRENGTH * (mu - x)
        assert (field(flow, x, mu, time) - wanted).abs().mean() < 0.02 * wanted.abs().mean()


def test_ten_steps_leave_nothing_of_the_noise(flow: Flow) -> None:
    rng = torch.Generator().manual_seed(1)
    mu, noise = torch.randn(2, 1, 80, 60, generator=rng)
    with torch.inference_mode():
        conditions = torch.cat((mu, torch.zeros(1, 160, 60)), dim=1)
        assert (flow.decoder(noise, conditions, flow.solver()) - mu).abs().max() < 0.1


def test_k_means_finds_clusters_and_leaves_no_centre_unused() -> None:
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = centres.repeat(20, 1) + 0.1 * torch.randn(60, 2)
    found = k_means(points, 3)
    assert torch.cdist(centres, found).min(1).values.max() < 0.2


def test_the_judge_counts_words() -> None:
    assert distance(["a", "b", "c"], ["a", "c", "d"]) == 2
    found = score([["a", "b"], ["c"]], [["a", "b"], []])
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.exact == 0.5


def test_hiss_is_measured_where_the_recording_is_silent() -> None:
    tone = np.sin(np.arange(22050) * 0.1)
    recording = np.concatenate((tone, np.zeros(11025))).astype(np.float32)
    hiss = np.random.default_rng(1).normal(0, 0.01, len(recording)).astype(np.float32)
    level = pause_level_db(recording + hiss, recording)
    assert level is not None and -39 < level < -35


def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def trained(work: Path, stop: int | None) -> Tensor:
        torch.manual_seed(0)
        line = torch.nn.Linear(3, 1)

        def loss(rng: random.Random, done: float) -> tuple[Tensor, dict[str, float]]:
            if stop is not None and done >= stop / 20:
                raise Stopped
            x = torch.randn(8, 3)
            return (line(x)[:, 0] - x.sum(1)).square().mean(), {}

        plan = Plan(steps=20, rate=0.05, warm_up=2)
        return fit("line", line, plan, loss, work)["weight"]

    whole = trained(_made(tmp_path / "a"), None)
    monkey = pytest.MonkeyPatch()
    monkey.setattr("training.fitting.Fitting.SAVE_S", -1.0)
    with pytest.raises(Stopped):
        trained(_made(tmp_path / "b"), 11)
    monkey.undo()
    assert torch.equal(trained(tmp_path / "b", None), whole)


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    save(tmp_path / "weights.pt", {"a": torch.zeros(2)})
    before = (tmp_path / "weights.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError):
            save(tmp_path / "weights.pt", {"a": torch.zeros(10**6)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["weights.pt"]
    assert (tmp_path / "weights.pt").read_bytes() == before


def test_the_readme_states_how_much_is_made() -> None:
    table = README.read_text(encoding="utf-8")
    steps = re.findall(r"^\| (\w+) \|.*\| ([\d,]+) steps \|", table, re.MULTILINE)
    assert {name: int(count.replace(",", "")) for name, count in steps} == STEPS
    trained, judged, strangers = (f"{n:,}" for n in RECORDED.values())
    assert f"{trained} + {judged} + {strangers} dialogues" in table


def _made(path: Path) -> Path:
    path.mkdir()
    return path
