"""The same application as a Ray Serve deployment: one engine per GPU, or per few processor cores.

`omnispeech scale` starts it here; `import_path: omnispeech.ray_deployment:build` names it in the
config file of a cluster. Routing, replacing, draining and scaling are Ray's.
"""

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
from starlette.types import ASGIApp

from omnispeech.config import (
    AccessConfig,
    EngineConfig,
    PlaceConfig,
    ScaleConfig,
    ServerConfig,
)
from omnispeech.config_reader import build_config, check_names
from omnispeech.errors import ConfigError, GenerationError
from omnispeech.logs import log_to_stdout
from omnispeech.server.access.tls import check_tls
from omnispeech.server.app import create_app
from omnispeech.server.door import listen
from omnispeech.server.one_of_many import Answer, OneOfMany
from omnispeech.service import Settings, build_worker, choose_target, find_sources, settings_of

try:
    import ray
    from ray import serve
    from ray.serve.exceptions import DeploymentUnavailableError
except ImportError as exc:
    raise ConfigError(
        "Ray Serve is not installed, and more than one replica needs it; "
        "run: pip install 'ray[serve]>=2.60'"
    ) from exc

logger = logging.getLogger(__name__)

NAME = "omnispeech"
SPARE = 8  # requests of a full replica that are being told so, in its own words
LOOK_S = 0.1
WATCH_S = 1.0
FAREWELL_S = 1.0  # in which callers of an engine that failed are told
HEALTH_S = 2.0
ATTEMPTS = 3  # of a replica to start, before the deployment counts as failed
ASK_S = 5.0
RETRY_AFTER_S = 1


class Replica:
    """One engine. It gets requests once it has an application: after the warm-up turn."""

    def __init__(self, settings: Settings) -> None:
        log_to_stdout(settings.server.log_format, settings.server.log_level)
        self._settings = settings
        self._worker = build_worker(settings)
        self._up = False

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """The hook of `serve.ingress()`. What it raises is the reason in Ray's status."""
        await self._start()
        context = serve.get_replica_context()
        self._name = str(context.replica_id.unique_id)
        self._handle = serve.get_deployment_handle(context.deployment, context.app_name)
        settings = self._settings
        self._app = create_app(self._worker, settings.server, settings.talk, settings.access)
        return OneOfMany(self._app, self._name, places(self._settings.engine), self._ask_all)

    async def _start(self) -> None:
        self._worker.start(on_failure=self._leave)
        while not (status := self._worker.status()).ready:
            if status.failure:
                raise GenerationError(status.failure)
            await asyncio.sleep(LOOK_S)
        self._up = True

    def check_health(self) -> None:
        if failure := self._worker.status().failure:
            raise GenerationError(failure)

    async def get(self, path: str, headers: dict[str, str]) -> Answer:
        """What this replica alone answers."""
        transport = httpx.ASGITransport(self._app)
        async with httpx.AsyncClient(transport=transport, base_url="http://replica") as client:
            reply = await client.get(path, headers=headers)
        media_type = reply.headers.get("content-type", "")
        return Answer(self._name, reply.status_code, reply.content, media_type)

    async def _ask_all(self, path: str, headers: dict[str, str]) -> Sequence[Answer]:
        """None if one was too slow: figures without its own would look like less work done."""
        try:
            answers = await self._ask_listed(path, headers)
        except TimeoutError:
            return []
        if all(answer.replica != self._name for answer in answers):
            answers.append(await self.get(path, headers))
        return answers

    async def _ask_listed(self, path: str, headers: dict[str, str]) -> list[Answer]:
        """Ray lists the replicas that get requests: this one no more as soon as it is to leave.

        When it leaves before the next is up, nobody is listed, which Ray calls a failed deployment.
        """
        try:
            answers = self._handle.broadcast("get", path, headers)
            told = await answers.results_async(timeout_s=ASK_S, return_exceptions=True)
        except DeploymentUnavailableError:
            return []
        return [answer for answer in told if isinstance(answer, Answer)]

    def _leave(self) -> None:
        """An engine that failed would be the emptiest replica, and get every request."""
        if self._up:
            threading.Timer(FAREWELL_S, os._exit, [1]).start()


def places(engine: EngineConfig) -> int:
    """Conversations that one replica takes: those that talk and those that wait."""
    return engine.max_conversations + engine.max_waiting


def build(values: dict[str, Any]) -> serve.Application:
    """For `import_path` of a Serve config file. values: its `args`, settings by their names."""
    check_names(values, "args")
    scale = replace(build_config(ScaleConfig, {}, values), ray_address="auto")
    return application(settings_of({}, values), scale, resources())


def resources() -> dict[str, float]:
    """Of all machines of the cluster together: CPU, GPU and more, by Ray's names."""
    return dict(ray.cluster_resources())  # type: ignore[no-untyped-call]


def application(
    settings: Settings, scale: ScaleConfig, there: Mapping[str, float]
) -> serve.Application:
    """there: the `resources` of the cluster."""
    check_server(settings.server)
    gpus = gpus_of_a_replica(settings.place, there)
    place = replace(settings.place, device="cuda" if gpus else "cpu")
    deployment = serve.deployment(
        name=NAME,
        ray_actor_options={"num_cpus": scale.replica_cpus, "num_gpus": gpus},
        **serve_options(settings.engine, scale, most_replicas(scale, gpus, there)),
    )
    replica = deployment(serve.ingress()(Replica))
    return replica.bind(replace(settings, place=place))


def check_server(server: ServerConfig) -> None:
    if server.controller:
        raise ConfigError(
            f"controller={server.controller!r}; replicas behind Ray Serve register with no "
            "controller: leave it empty, or start omnispeech serve on each machine"
        )
    if not server.port:
        raise ConfigError("port=0; Ray's proxies need a port that is known: 1 to 65535")


def gpus_of_a_replica(place: PlaceConfig, there: Mapping[str, float]) -> int:
    if place.device.startswith("cuda:"):
        raise ConfigError(f"device={place.device!r}; Ray gives each replica its GPU: say cuda")
    if place.device == "auto":
        return int(there.get("GPU", 0) >= 1)
    return int(place.device == "cuda")


def most_replicas(scale: ScaleConfig, gpus: int, there: Mapping[str, float]) -> int:
    by_cpu = int(there.get("CPU", 0) // scale.replica_cpus)
    room = min(by_cpu, int(there.get("GPU", 0))) if gpus else by_cpu
    growing = scale.max_replicas and scale.ray_address != "local"
    if not room and not growing:
        raise ConfigError(
            f"Ray has {there.get('CPU', 0):g} cores and {there.get('GPU', 0):g} GPUs; a "
            f"replica needs {scale.replica_cpus} and {gpus}: change replica_cpus or device, or "
            "set max_replicas if machines of its cluster are still to come"
        )
    return scale.max_replicas or max(room, scale.min_replicas)


def serve_options(engine: EngineConfig, scale: ScaleConfig, most: int) -> dict[str, Any]:
    """What Ray is told of one deployment, in its own words.

    A replica refuses what is too much for it itself, so that callers hear what one process tells
    them: Ray leaves it room for as many open WebSockets as there are places, for as many replies
    to other requests, and for the refusals.
    """
    return {
        "autoscaling_config": {
            "min_replicas": scale.min_replicas,
            "max_replicas": most,
            "target_ongoing_requests": scale.target_conversations or engine.max_conversations,
            "upscale_delay_s": scale.upscale_delay_s,
            "downscale_delay_s": scale.downscale_delay_s,
        },
        "max_ongoing_requests": 2 * places(engine) + SPARE,
        "max_queued_requests": scale.max_queued,
        "backpressure_config": {"status_code": 503, "retry_after_s": RETRY_AFTER_S},
        "graceful_shutdown_timeout_s": scale.replica_drain_s,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": HEALTH_S,
        "max_constructor_retry_count": ATTEMPTS,
        "logging_config": {"enable_access_log": False},
    }


def serve_until_stopped(settings: Settings, scale: ScaleConfig) -> int:
    """`omnispeech scale`: the exit status. A signal lets conversations end, a second ends them."""
    check(settings, scale)
    with cluster(settings, scale):
        try:
            app = application(settings, scale, resources())
            logger.info("starting the replicas; the models of each are loaded first")
            serve.run(app, name=NAME)
            logger.info("serving on http://%s:%d", settings.server.host, settings.server.port)
            watch()
        except RuntimeError as exc:
            logger.error("%s %s", exc, reason())
            return 1
        except KeyboardInterrupt:
            drain(scale.replica_drain_s)
    return 0


def check(settings: Settings, scale: ScaleConfig) -> None:
    """Raises what Ray would tell after half a minute, and at length."""
    check_server(settings.server)
    check_tls(settings.access)
    if scale.ray_address == "local":
        choose_target(settings.place)
        find_sources(settings.place)
    else:  # its machines have other devices than this one
        choose_target(replace(settings.place, device="cpu"))


def reason() -> str:
    """Why the replicas did not start: what Ray's status says of them."""
    app = serve.status().applications.get(NAME)
    told = app.deployments[NAME].message if app and NAME in app.deployments else ""
    return told.strip().rpartition("\n")[2]


@contextmanager
def cluster(settings: Settings, scale: ScaleConfig) -> Iterator[None]:
    """Ray and its HTTP proxies: our own on loopback, or the cluster this machine belongs to."""
    server = settings.server
    local = scale.ray_address == "local"
    if local:
        listen(server).close()  # Ray would only say that a proxy is not healthy
        ray.init(include_dashboard=False, logging_level=logging.WARNING)
    else:
        ray.init(scale.ray_address, logging_level=logging.WARNING)
    try:
        # Ray's own handlers, set by now, would leave at once, or abort with a dump
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        serve.start(
            http_options={"host": server.host, "port": server.port, **tls(settings.access)},
            logging_config={"log_level": "WARNING"},
        )
        yield
    finally:
        with undisturbed():
            if local:
                serve.shutdown()  # type: ignore[no-untyped-call]
            ray.shutdown()


def tls(access: AccessConfig) -> dict[str, str]:
    """Of Ray's proxies, in its own words."""
    if not access.tls_certificate:
        return {}
    return {"ssl_certfile": access.tls_certificate, "ssl_keyfile": access.tls_key}


@contextmanager
def undisturbed() -> Iterator[None]:
    """No signal gets in between: what Ray started would stay behind."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.SIG_IGN) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def watch() -> None:
    """Tells what becomes of the replicas, until somebody takes the application away."""
    told = None
    while app := serve.status().applications.get(NAME):
        states = app.deployments[NAME].replica_states if NAME in app.deployments else {}
        now = (app.status.value, {str(state): count for state, count in states.items()})
        if now != told:
            logger.info("%s: %s %s", *now, app.message)
            told = now
        time.sleep(WATCH_S)
    logger.info("the application was taken away")


def drain(most_s: float) -> None:
    """Takes the application away: no new request gets in, conversations under way go on."""
    logger.info("stopping; conversations may go on for %g s, a second signal ends them", most_s)
    serve.delete(NAME, _blocking=False)
    while NAME in serve.status().applications:
        time.sleep(LOOK_S)
