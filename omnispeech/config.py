"""Settings. Each is a frozen dataclass that checks itself.

A value comes from the command line, else from the environment (`OMNISPEECH_` and the name in
capitals), else from the file given with `--config` (TOML), else from the default here.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from omnispeech.errors import ConfigError

EVERY_ADDRESS = ("", "0.0.0.0", "::")


def setting(default: Any, help: str) -> Any:
    """A field that becomes a flag of the command line, with `help` beside it."""
    return field(default=default, metadata={"help": help})


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name}={value}; allowed: {low} to {high}")


def check_url(name: str, url: str) -> None:
    if url and not _is_url(url):
        raise ConfigError(f"{name}={url!r}; allowed: a URL such as http://10.0.0.2:21001")


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        named = bool(parts.hostname) and parts.port != 0 and parts.username is None
    except ValueError:  # the port is no number, or the brackets of an IPv6 address are wrong
        return False
    return named and re.fullmatch(r"https?://[^\s?#]+", text) is not None


def _check_origin(origin: str) -> None:
    """As browsers send it, without a path; null is that of no page."""
    known = origin in ("*", "null") or re.fullmatch(r"[a-z][a-z0-9+.-]*://[^\s/?#@A-Z]+", origin)
    if not known:
        raise ConfigError(
            f"origins: {origin!r} is none; allowed: such as https://talk.example.org, in small "
            "letters and without a path, several by commas, or *"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceConfig:
    models: str = setting("/models", "models directory")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = setting("auto", "auto, bf16, fp16 or fp32")
    llm: Literal["auto", "bf16", "awq", "gptq", "8bit"] = setting(
        "auto", "which LLM of the models directory; auto: the first there of awq, gptq, 8bit, bf16"
    )
    speech_lm: Literal["bf16", "awq"] = setting("bf16", "bf16: as in the checkpoint of the LLM")
    audio_encoder: Literal["checkpoint", "wavlm"] = setting(
        "checkpoint", "wavlm: wavlm-base-plus and its trained bridge (omnispeech train-bridge)"
    )
    kernel: str = setting(
        "auto", "of quantized linears: auto and torch compute in bfloat16, reference exactly"
    )
    prepare: bool = setting(
        True, "keep quantized weights in the models directory as the kernels of this machine want"
    )
    read_threads: int = setting(0, "that read weights; 0: one for each core, up to 8")
    prefetch: bool = setting(False, "read the files of a start ahead, for disks that answer slowly")

    def __post_init__(self) -> None:
        _check_range("read_threads", self.read_threads, 0, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    max_conversations: int = setting(8, "rows that share each model call")
    max_waiting: int = setting(16, "conversations that may wait for a row")
    context_length: int = setting(
        8192, "LLM positions of one conversation, prompt and reply; at most those of the model"
    )
    kv_tokens: int = setting(16384, "positions of all conversations together, per language model")
    prefill_tokens: int = setting(256, "prompt positions per step while others are talking")
    run_ahead: int = setting(64, "text tokens the LLM may be ahead of the speech")
    max_new_tokens: int = setting(1024, "text tokens of one reply, whatever the request asks")
    reuse_prefixes: bool = setting(True, "keep what finished turns have read for the next turn")
    compatible: bool = setting(False, "the original's rules, its defects included")

    def __post_init__(self) -> None:
        _check_range("max_conversations", self.max_conversations, 1, 1024)
        _check_range("max_waiting", self.max_waiting, 0, 100_000)
        _check_range("context_length", self.context_length, 64, 1 << 20)
        _check_range("prefill_tokens", self.prefill_tokens, 1, 1 << 20)
        _check_range("run_ahead", self.run_ahead, 0, 1 << 20)
        _check_range("max_new_tokens", self.max_new_tokens, 1, 1 << 20)
        if self.kv_tokens < self.context_length:
            raise ConfigError(
                f"kv_tokens={self.kv_tokens} is less than context_length={self.context_length}; "
                "one conversation must fit"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """How units become sound: spec of the GLM-4-Voice decoder, streaming."""

    streaming: Literal["corrected", "compatible"] = setting("corrected", "how blocks are joined")
    euler_steps: int = setting(10, "of the flow, per block")
    schedule: Literal["checkpoint", "cosine", "linear"] = setting(
        "checkpoint", "times of the Euler steps"
    )
    guidance: float = setting(-1.0, "weight of classifier-free guidance; -1: as in the checkpoint")
    context_tokens: int = setting(60, "units of history a block is conditioned on; 0: all")
    first_block: int = setting(0, "units; 0: chosen from the measured speed (10 or 20)")
    max_block: int = setting(200, "blocks grow in steps of ten up to this")
    compatible_block: int = setting(24, "every block of the compatible mode")
    overlap_frames: int = setting(34, "mel frames held back and blended with the next block")

    def __post_init__(self) -> None:
        _check_range("euler_steps", self.euler_steps, 1, 1000)
        _check_range("context_tokens", self.context_tokens, 0, 100_000)
        _check_range("first_block", self.first_block, 0, self.max_block)
        _check_range("max_block", self.max_block, 10, 10_000)
        _check_range("compatible_block", self.compatible_block, 6, 10_000)
        _check_range("overlap_frames", self.overlap_frames, 19, 60)
        if self.guidance != -1.0:
            _check_range("guidance", self.guidance, 0.0, 10.0)

    def check_step(self, step: int) -> None:
        """`step`: units that the flow encoder of the checkpoint takes at a time."""
        for name in ("context_tokens", "first_block", "max_block"):
            if getattr(self, name) % step:
                raise ConfigError(
                    f"{name}={getattr(self, name)}; allowed with this checkpoint: "
                    f"multiples of {step}"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(8000, "0: any free port")
    model_name: str = setting("omnispeech", "told to clients and controllers")
    max_audio_s: float = setting(120.0, "of one audio item")
    max_body_mb: int = setting(64, "of one request")
    max_text_chars: int = setting(200_000, "characters of text in one request")
    max_messages: int = setting(1000, "messages in one request")
    keep_texts: int = setting(256, "spoken replies whose text is kept: of /v1/speech, and of chats")
    drain_s: float = setting(30.0, "replies under way may finish this long after a stop signal")
    controller: str = setting("", "URL of an OpenS2S controller to register with")
    worker_address: str = setting("", "URL of this worker, told to the controller")
    log_format: Literal["text", "json"] = setting("text", "json: one object in each line")
    log_level: Literal["debug", "info", "warning"] = setting(
        "info", "debug: also errors that quote what a caller sent"
    )

    def __post_init__(self) -> None:
        _check_range("port", self.port, 0, 65535)
        _check_range("max_audio_s", self.max_audio_s, 1.0, 3600.0)
        _check_range("max_body_mb", self.max_body_mb, 1, 4096)
        _check_range("max_messages", self.max_messages, 1, 1_000_000)
        _check_range("max_text_chars", self.max_text_chars, 1, 100_000_000)
        _check_range("keep_texts", self.keep_texts, 1, 1_000_000)
        _check_range("drain_s", self.drain_s, 0.0, 86_400.0)
        check_url("controller", self.controller)
        check_url("worker_address", self.worker_address)
        if self.controller and not self.worker_address and self.host in EVERY_ADDRESS:
            raise ConfigError(
                f"host={self.host!r} is no address that the controller {self.controller} could "
                "reach; give --worker-address, the URL of this worker as the controller sees it"
            )

    @property
    def address(self) -> str:
        """Where the controller finds this worker."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return self.worker_address or f"http://{host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TalkConfig:
    """Live conversations: /v1/realtime."""

    max_talks: int = setting(64, "live conversations that may be open, talking or silent")
    talk_idle_s: float = setting(600.0, "one in which nobody speaks ends after this")
    max_talk_s: float = setting(3600.0, "one ends after this")
    resume_s: float = setting(30.0, "one that lost its connection waits this long; 0: not")
    speculate_ms: int = setting(
        200, "silence after which an answer is begun, and thrown away if speech goes on; 0: not"
    )
    talk_audio_s: float = setting(
        800.0, "of sound that one conversation keeps: 26 MB; a context of 8192 holds 655"
    )
    reply_tokens: int = setting(256, "text tokens of a reply where the client names no limit")
    max_frame_mb: int = setting(24, "of one WebSocket message")
    transcription: Literal["off", "model"] = setting(
        "off", "model: the LLM writes down what it heard, on request; not measured"
    )
    page: bool = setting(True, "serve the page to talk with, at /")

    def __post_init__(self) -> None:
        _check_range("max_talks", self.max_talks, 1, 100_000)
        _check_range("talk_idle_s", self.talk_idle_s, 1.0, 86_400.0)
        _check_range("max_talk_s", self.max_talk_s, 1.0, 86_400.0)
        _check_range("resume_s", self.resume_s, 0.0, 3600.0)
        _check_range("speculate_ms", self.speculate_ms, 0, 5000)
        _check_range("talk_audio_s", self.talk_audio_s, 1.0, 86_400.0)
        _check_range("reply_tokens", self.reply_tokens, 1, 4096)
        _check_range("max_frame_mb", self.max_frame_mb, 1, 1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessConfig:
    """Who may come in, and how much one may ask for."""

    api_keys: str = setting("", "TOML file, read again when it changes; none: no key is needed")
    origins: str = setting("", "web pages that may ask, by commas; *: all; none: those served here")
    tls_certificate: str = setting("", "PEM file; with tls_key the server speaks https and wss")
    tls_key: str = setting("", "PEM file")
    upload_s: float = setting(60.0, "the body of a request may take this long to arrive")
    stalled_s: float = setting(
        60.0, "a caller that takes nothing of its reply this long is given up"
    )
    max_connections: int = setting(512, "open at a time; one more is told to come back later")

    def __post_init__(self) -> None:
        _check_range("upload_s", self.upload_s, 1.0, 86_400.0)
        _check_range("stalled_s", self.stalled_s, 1.0, 86_400.0)
        _check_range("max_connections", self.max_connections, 1, 1_000_000)
        for origin in self.listed_origins:
            _check_origin(origin)
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise ConfigError("tls_certificate and tls_key go together; give both or none")

    @property
    def listed_origins(self) -> list[str]:
        return [origin.strip() for origin in self.origins.split(",") if origin.strip()]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleConfig:
    """Many engines behind one address (`omnispeech scale`): each replica has one GPU, or cores."""

    ray_address: str = setting("local", "local: this machine alone; auto: its Ray cluster")
    min_replicas: int = setting(1, "replicas that always run")
    max_replicas: int = setting(0, "under load; 0: one for each GPU (or replica_cpus cores) now")
    replica_cpus: int = setting(2, "cores of one replica, beside its GPU if it has one")
    target_conversations: int = setting(
        0, "ongoing ones per replica before another starts; 0: as max_conversations"
    )
    upscale_delay_s: float = setting(5.0, "more are needed this long before one starts")
    downscale_delay_s: float = setting(300.0, "fewer are needed this long before one leaves")
    replica_drain_s: float = setting(
        900.0, "conversations of a replica that leaves may go on this long"
    )
    max_queued: int = setting(1000, "requests that one proxy keeps until a replica takes them")

    def __post_init__(self) -> None:
        _check_range("min_replicas", self.min_replicas, 1, 10_000)
        _check_range("max_replicas", self.max_replicas, 0, 10_000)
        _check_range("replica_cpus", self.replica_cpus, 1, 1024)
        _check_range("target_conversations", self.target_conversations, 0, 100_000)
        _check_range("upscale_delay_s", self.upscale_delay_s, 0.0, 86_400.0)
        _check_range("downscale_delay_s", self.downscale_delay_s, 0.0, 86_400.0)
        _check_range("replica_drain_s", self.replica_drain_s, 0.0, 86_400.0)
        _check_range("max_queued", self.max_queued, 1, 1_000_000)
        if self.max_replicas and self.max_replicas < self.min_replicas:
            raise ConfigError(
                f"max_replicas={self.max_replicas} is less than min_replicas={self.min_replicas}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class StartConfig:
    """What `startup.py` brings."""

    small: bool = setting(
        False,
        "where no model is: the small one that comes with omnispeech, instead of 22 GB of the hub",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HubConfig:
    """Where models are fetched from. A token and being offline are matters of huggingface_hub."""

    opens2s_repo: str = setting("CASIA-LM/OpenS2S", "repository of OpenS2S")
    opens2s_revision: str = setting("main", "branch, tag or commit of it")
    decoder_repo: str = setting("THUDM/glm-4-voice-decoder", "repository of the speech decoder")
    decoder_revision: str = setting("main", "branch, tag or commit of it")
    wavlm_repo: str = setting("microsoft/wavlm-base-plus", "repository of WavLM")
    wavlm_revision: str = setting("main", "branch, tag or commit of it")
    hub_endpoint: str = setting("", "URL of the hub; empty: HF_ENDPOINT, or the public one")
    connections: int = setting(4, "files that are fetched at a time")

    def __post_init__(self) -> None:
        _check_range("connections", self.connections, 1, 64)
        check_url("hub_endpoint", self.hub_endpoint)
