"""Choosing ids (spec: opens2s 12; defect B6)."""

import random

import pytest
import torch

from omnispeech.engine.sampling import NOT_FINITE, Sampler, choose


def sampler(seed: int = 0, **settings: float) -> Sampler:
    return Sampler(random=random.Random(seed), **settings)  # type: ignore[arg-type]


def test_greedy_below_the_threshold_of_the_original() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.9], [5.0, 1.0, 1.0]])
    assert choose(logits, [sampler(temperature=0.001)] * 2) == [1, 0]


def test_greedy_and_sampled_rows_share_a_call() -> None:
    logits = torch.randn(2, 50)
    greedy = choose(logits, [sampler(temperature=0.0), sampler(seed=3)])[0]
    assert greedy == int(logits[0].argmax())


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.6}, {"temperature": 0.5}])
def test_frequencies_are_those_of_the_filtered_distribution(settings: dict[str, float]) -> None:
    from transformers import (
        LogitsProcessorList,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = torch.linspace(-2.0, 2.0, 12)
    warpers = LogitsProcessorList(
        [
            TemperatureLogitsWarper(float(settings.get("temperature", 1.0))),
            TopKLogitsWarper(int(settings.get("top_k", 12))),
            TopPLogitsWarper(float(settings.get("top_p", 1.0))),
        ]
    )
    expected = warpers(torch.zeros(1, 1, dtype=torch.long), logits[None])[0].softmax(-1)
    one = sampler(seed=1, **settings)
    drawn = [choose(logits[None], [one])[0] for _ in range(4000)]
    seen = torch.bincount(torch.tensor(drawn), minlength=12) / len(drawn)
    torch.testing.assert_close(seen, expected, atol=0.03, rtol=0.0)


def test_a_row_draws_the_same_alone_and_in_company() -> None:
    logits = torch.randn(4, 40)
    alone = choose(logits[2:3], [sampler(seed=7)])
    company = [sampler(0), sampler(1, temperature=0.0), sampler(7), sampler(2, top_k=3)]
    assert choose(logits, company)[2] == alone[0]


def test_ids_that_are_barred_are_never_chosen() -> None:
    logits = torch.zeros(1, 10)
    logits[0, 3:] = -torch.inf
    one = sampler(seed=5)
    assert {choose(logits, [one])[0] for _ in range(200)} == {0, 1, 2}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_row_with_a_broken_number_is_told_and_its_neighbour_is_not(value: float) -> None:
    logits = torch.zeros(2, 5)
    logits[0, 2] = value
    logits[1, 4] = 9.0
    assert choose(logits, [sampler(), sampler(temperature=0.0)]) == [NOT_FINITE, 4]


def test_the_generators_of_the_process_are_left_alone() -> None:
    torch.manual_seed(1)
    random.seed(1)
    before = torch.get_rng_state(), random.getstate()
    choose(torch.randn(3, 9, generator=torch.Generator().manual_seed(0)), [sampler()] * 3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
