"""OpenAI's own clients against a server of ours, and answers held against their types."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
from fake_engine import FakeEngine, serving
from pydantic import BaseModel

MODEL = "omnispeech"


@contextmanager
def client_of(engine: FakeEngine, **settings: Any) -> Iterator[openai.OpenAI]:
    """Nothing is tried twice: what is refused is seen at once."""
    with (
        serving(engine, **settings) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


@contextmanager
def async_client_address(engine: FakeEngine, **settings: Any) -> Iterator[dict[str, Any]]:
    """Arguments of AsyncOpenAI."""
    with serving(engine, **settings) as url:
        yield {"base_url": f"{url}/v1", "api_key": "none", "max_retries": 0}


def check_type(answer: BaseModel) -> None:
    """The SDK itself checks nothing: every field must be there, of its type, and known."""
    raw = answer.model_dump(exclude_unset=True)
    type(answer).model_validate(raw, strict=True)
    assert list(unknown_fields(answer)) == []


def unknown_fields(value: Any, place: str = "") -> Iterator[str]:
    if isinstance(value, BaseModel):
        yield from (f"{place}.{name}" for name in value.model_extra or {})
        for name in value.model_fields_set:
            yield from unknown_fields(getattr(value, name), f"{place}.{name}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from unknown_fields(item, f"{place}[{number}]")
