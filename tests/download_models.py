"""Small repositories for the tests of fetching, and the settings that go with a hub."""

import random
from pathlib import Path

from hub_server import Hub, Mishap

from omnispeech.config import HubConfig
from omnispeech.download.directory import fetch_all
from omnispeech.download.retries import Patience

OPENS2S, DECODER = "CASIA-LM/OpenS2S", "THUDM/glm-4-voice-decoder"
SHARD = "model-00001-of-00002.safetensors"
QUICK = Patience(failures=4, first_s=0.001, longest_s=0.01)


def content(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def opens2s_files(size: int = 200_000) -> dict[str, bytes]:
    """Named as in the real repository; some are large files, some are not, two are equal."""
    return {
        ".gitattributes": b"*.safetensors filter=lfs",
        "README.md": b"# OpenS2S",
        "config.json": b'{"architectures": []}',
        "tokenizer.json": b"{}",
        "tts/tokenizer.json": b"{}",
        "audio/preprocessor_config.json": b'{"a": 1}',
        "empty.txt": b"",
        SHARD: content(size, 1),
        "model-00002-of-00002.safetensors": content(size // 2, 2),
    }


def decoder_files() -> dict[str, bytes]:
    pickles = {"flow.pt": content(20_000, 3), "hift.pt": content(9_000, 4)}
    return {"config.yaml": b"a: 1\n", "speech.wav": b"not fetched", **pickles}


def repositories() -> dict[str, dict[str, bytes]]:
    return {OPENS2S: opens2s_files(), DECODER: decoder_files()}


def settings(hub: Hub, **others: object) -> HubConfig:
    return HubConfig(**{"hub_endpoint": hub.url, "connections": 2, **others})  # type: ignore[arg-type]


def bring(hub: Hub, models: Path, *names: str, update: bool = False) -> None:
    wanted = names or ("OpenS2S",)
    fetch_all(wanted, models, settings(hub), update=update, patience=QUICK)


def published(files: dict[str, bytes]) -> dict[str, bytes]:
    """What of a repository becomes the directory."""
    return {path: data for path, data in files.items() if not path.startswith(".")}


def found(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def beside(models: Path) -> set[str]:
    """All that lies in a models directory and is not hidden."""
    return {path.name for path in models.iterdir() if not path.name.startswith(".")}


def befall(hub: Hub, part: str, times: int = 1_000_000, **mishap: object) -> None:
    hub.mishaps.append(Mishap(part, times=times, **mishap))  # type: ignore[arg-type]
