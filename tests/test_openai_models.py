import openai
import pytest
from fake_engine import FakeEngine, call
from openai_client import MODEL, async_client_address, check_type, client_of


def test_the_model_that_is_served_is_listed() -> None:
    with client_of(FakeEngine(), model_name="org/mine-4bit") as client:
        (model,) = client.models.list()
        check_type(model)
        assert model.id == "org/mine-4bit"
        assert client.models.retrieve("org/mine-4bit") == model


async def test_the_async_client_lists_it_too() -> None:
    with async_client_address(FakeEngine()) as arguments:
        async with openai.AsyncOpenAI(**arguments) as client:
            assert [model.id async for model in client.models.list()] == [MODEL]


def test_another_model_is_not_found_and_the_right_name_is_told() -> None:
    with client_of(FakeEngine()) as client, pytest.raises(openai.NotFoundError) as info:
        client.models.retrieve("gpt-4o")
    assert (info.value.code, info.value.param) == ("model_not_found", "model")
    assert "'omnispeech'" in info.value.message


async def test_the_list_is_there_before_the_model_is_ready() -> None:
    assert (await call(FakeEngine(), "GET", "/v1/models")).json()["object"] == "list"
