"""Many replicas: what Ray is told, and a deployment of two on this machine."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence, Set
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Self

import httpx
import pytest
import soundfile
import websockets
import yaml
from fake_engine import FakeEngine
from prometheus_client.parser import text_string_to_metric_families
from websockets.asyncio.client import ClientConnection

from omnispeech.cli import main
from omnispeech.config import EngineConfig, PlaceConfig, ScaleConfig, ServerConfig
from omnispeech.config_reader import build_config, check_names
from omnispeech.errors import ConfigError, GenerationError, OmniSpeechError
from omnispeech.once import free_port
from omnispeech.server.app import create_app
from omnispeech.server.one_of_many import Answer, OneOfMany
from omnispeech.service import settings_of

pytest.importorskip(
    "ray.serve",
    reason="Ray Serve is not installed: pip install 'ray[serve]>=2.60'",
    exc_type=ImportError,
)
from ray import serve
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.schema import ServeDeploySchema

from omnispeech import ray_deployment
from omnispeech.ray_deployment import (
    application,
    check_server,
    gpus_of_a_replica,
    most_replicas,
    serve_options,
)

ROOT = Path(__file__).parent.parent
QUESTION = ROOT / "examples" / "question.wav"
WAIT_S = 300.0  # a machine that other tests keep busy starts a replica in minutes


def test_a_replica_has_room_for_talks_and_for_replies_and_a_few_more_to_refuse_them() -> None:
    engine = EngineConfig(max_conversations=8, max_waiting=16)
    options = serve_options(engine, ScaleConfig(), most=4)
    assert options["max_ongoing_requests"] == (8 + 16) + (8 + 16) + ray_deployment.SPARE
    assert options["autoscaling_config"]["target_ongoing_requests"] == 8
    assert options["autoscaling_config"]["max_replicas"] == 4
    assert options["backpressure_config"] == {"status_code": 503, "retry_after_s": 1}


@pytest.mark.parametrize(
    ("device", "resources", "gpus"),
    [("auto", {"CPU": 8}, 0), ("auto", {"CPU": 8, "GPU": 4}, 1), ("cpu", {"GPU": 4}, 0)],
)
def test_a_replica_has_a_gpu_where_there_is_one(
    device: str, resources: dict[str, float], gpus: int
) -> None:
    assert gpus_of_a_replica(PlaceConfig(device=device), resources) == gpus


def test_the_gpu_of_a_replica_is_chosen_by_ray() -> None:
    with pytest.raises(ConfigError, match="'cuda:1'; Ray gives each replica its GPU"):
        gpus_of_a_replica(PlaceConfig(device="cuda:1"), {"GPU": 2})


@pytest.mark.parametrize(
    ("gpus", "resources", "most"),
    [(1, {"CPU": 64, "GPU": 4}, 4), (1, {"CPU": 6, "GPU": 4}, 3), (0, {"CPU": 7}, 3)],
)
def test_there_are_as_many_replicas_as_there_is_room_for(
    gpus: int, resources: dict[str, float], most: int
) -> None:
    assert most_replicas(ScaleConfig(replica_cpus=2), gpus, resources) == most


def test_no_room_for_one_replica_is_told_at_once() -> None:
    with pytest.raises(ConfigError, match="Ray has 1 cores and 0 GPUs; a replica needs 2 and 0"):
        most_replicas(ScaleConfig(replica_cpus=2), 0, {"CPU": 1})


def test_machines_of_a_cluster_may_still_come_and_those_of_this_one_may_not() -> None:
    here = ScaleConfig(replica_cpus=2, max_replicas=3)
    assert most_replicas(replace(here, ray_address="auto"), 0, {"CPU": 1}) == 3
    with pytest.raises(ConfigError, match="Ray has 1 cores"):
        most_replicas(here, 0, {"CPU": 1})


@pytest.mark.parametrize(
    "server",
    [ServerConfig(controller="http://10.0.0.2:21001"), ServerConfig(port=0)],
    ids=["controller", "port"],
)
def test_what_has_no_effect_behind_ray_is_refused(server: ServerConfig) -> None:
    with pytest.raises(ConfigError, match="controller=|port=0"):
        check_server(server)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"models": "/nowhere"}, "/nowhere/OpenS2S is missing"),
        ({"controller": "http://c"}, "no controller"),
        ({"kernel": "fast"}, "unknown kernel 'fast'"),
        ({"dtype": "fp64"}, "--dtype 'fp64'"),
        ({"device": "cuda:99"}, "--device cuda:99: this machine has"),
    ],
)
def test_what_is_known_to_be_wrong_is_told_before_ray_starts(
    values: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_deployment, "cluster", None)
    with pytest.raises(OmniSpeechError, match=words):
        ray_deployment.serve_until_stopped(settings_of(values, {}), ScaleConfig())


def test_a_cluster_has_other_devices_than_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    scale = ScaleConfig(ray_address="auto")
    ray_deployment.check(settings_of({"device": "cuda"}, {}), scale)
    with pytest.raises(ConfigError, match="unknown kernel"):
        ray_deployment.check(settings_of({"kernel": "fast"}, {}), scale)


def test_a_signal_while_ray_starts_takes_away_what_was_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray sets handlers of its own when it starts: one leaves at once, one aborts."""
    ended: list[str] = []
    before = signal.getsignal(signal.SIGTERM)
    leave = partial(signal.signal, signal.SIGTERM, lambda number, frame: ended.append("at once"))
    monkeypatch.setattr("ray.init", lambda *_, **__: leave())
    monkeypatch.setattr("ray.serve.start", lambda **_: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr("ray.serve.shutdown", lambda: ended.append("serve"))
    monkeypatch.setattr("ray.shutdown", lambda: ended.append("ray"))
    try:
        settings = settings_of({"port": free_port()}, {})
        with pytest.raises(KeyboardInterrupt), ray_deployment.cluster(settings, ScaleConfig()):
            pass
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended == ["serve", "ray"]


def test_a_misspelt_setting_of_a_serve_config_is_named() -> None:
    with pytest.raises(ConfigError, match="args: unknown key 'max_conversation'"):
        ray_deployment.build({"max_conversation": 3})


def test_the_serve_config_that_ships_names_settings_and_what_builds_them() -> None:
    config = yaml.safe_load((ROOT / "deploy" / "ray.yaml").read_text(encoding="utf-8"))
    ServeDeploySchema.model_validate(config)
    [app] = config["applications"]
    assert (
        app["import_path"] == f"{ray_deployment.build.__module__}:{ray_deployment.build.__name__}"
    )
    check_names(app["args"], "deploy/ray.yaml")
    scale = build_config(ScaleConfig, {}, app["args"], {})
    settings = settings_of({}, app["args"])
    built = application(settings, scale, {"CPU": 16, "GPU": 8})
    assert isinstance(built, serve.Application)


class FailedWorker:
    def status(self) -> object:
        from omnispeech.engine.events import EngineStatus

        return EngineStatus(ready=False, failure="the device is gone")


def test_a_replica_whose_engine_failed_is_not_healthy_and_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda status: ended.set() if status == 1 else None)
    monkeypatch.setattr(ray_deployment, "FAREWELL_S", 0.0)
    replica = object.__new__(ray_deployment.Replica)
    replica.__dict__.update(_worker=FailedWorker(), _up=True)
    with pytest.raises(GenerationError, match="the device is gone"):
        replica.check_health()
    replica._leave()
    assert ended.wait(5.0)


class Listed:
    """The handle of a deployment: what the replicas that Ray lists answer, or what Ray raises."""

    def __init__(self, told: Sequence[object] | Exception) -> None:
        self._told = told

    def broadcast(self, *question: object) -> Self:
        return self

    async def results_async(self, **how: object) -> Sequence[object]:
        if isinstance(self._told, Exception):
            raise self._told
        return self._told


OTHER = Answer("two", 200, b"# TYPE talks gauge\ntalks 1.0\n", "text/plain")


async def replica_says(told: Sequence[object] | Exception) -> httpx.Response:
    """What replica "one" answers when it is asked for the metrics of all."""
    replica = object.__new__(ray_deployment.Replica)
    app = create_app(FakeEngine(), ServerConfig())
    replica.__dict__.update(_app=app, _name="one", _handle=Listed(told))
    every = OneOfMany(app, "one", 2, replica._ask_all)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(every), base_url="http://test"
    ) as client:
        return await client.get("/metrics")


@pytest.mark.parametrize(
    ("told", "there"),
    [
        (DeploymentUnavailableError(DeploymentID(name="omnispeech")), {"one"}),
        ([RuntimeError("it died"), OTHER], {"one", "two"}),
    ],
    ids=["nobody is listed", "another is listed"],
)
async def test_a_replica_that_ray_does_not_list_answers_for_itself(
    told: Sequence[object] | Exception, there: set[str]
) -> None:
    """The last one of a version leaves while it is asked: nothing has failed to deploy."""
    answer = await replica_says(told)
    assert answer.status_code == 200, answer.text
    assert named(answer.text) == there


async def test_a_replica_that_is_slow_to_answer_the_others_is_asked_for_later() -> None:
    answer = await replica_says(TimeoutError("Timed out waiting for broadcast results."))
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    assert "did not answer in time" in answer.json()["error"]["message"]


class Scale:
    """`omnispeech scale` as a user starts it, with what it printed."""

    def __init__(self, folder: Path, port: int, ray_port: int, *arguments: str) -> None:
        environ = os.environ | {
            "RAY_TMPDIR": str(folder),
            "RAY_GCS_SERVER_PORT": str(ray_port),
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": str(WAIT_S),  # Ray's 5 s are few when busy
            "RAY_AUTH_MODE": "disabled",  # no token file in the home directory of a tester
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback, for those who join as well
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
        }
        settings = ["--models", str(folder / "models"), "--device", "cpu", "--port", str(port)]
        settings += ["--replica-cpus", "1", "--max-conversations", "2", "--max-waiting", "2"]
        code = "import sys; from omnispeech.cli import main; sys.exit(main())"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "scale", *settings, *arguments],
            cwd=folder,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(iter(self.process.stdout.readline, ""))

    async def until(self, told: str) -> None:
        async with asyncio.timeout(WAIT_S):
            while not any(told in line for line in self.lines):
                assert self.process.poll() is None, "".join(self.lines)
                await asyncio.sleep(0.1)

    def replica_pids(self) -> list[int]:
        found = re.findall(r"ServeReplica:\S+ pid=(\d+)", "".join(self.lines))
        return sorted({int(pid) for pid in found})

    def close(self) -> int:
        """The exit status. What Ray started ends with the process that started it."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=WAIT_S)
        finally:
            self.process.kill()
            self._reader.join()
            assert self.process.stdout is not None
            self.process.stdout.close()


class Talk:
    """A WebSocket conversation, and the replica that it is pinned to."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        assert connection.response is not None
        self.replica = connection.response.headers["X-Replica"]

    async def turn(self) -> str:
        """Asks a question; what the reply ended with, or how the connection broke."""
        samples, _ = soundfile.read(QUESTION, dtype="int16")
        try:
            async with asyncio.timeout(WAIT_S):
                await self._connection.send(samples.tobytes())
                await self._connection.send(json.dumps({"type": "trigger_response"}))
                async for message in self._connection:
                    if isinstance(message, str) and (told := json.loads(message)["type"]) != "text":
                        return str(told)
        except websockets.ConnectionClosedError:
            pass
        return "broken"

    async def close(self) -> None:
        await self._connection.close()


class Deployment:
    """The address of a deployment, and what one asks it. It leaves no connection open."""

    def __init__(self, port: int) -> None:
        self.client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=WAIT_S)
        self._port = port
        self._talks: list[Talk] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *failure: object) -> None:
        await asyncio.gather(*(talk.close() for talk in self._talks))
        await self.client.aclose()

    async def talk(self) -> Talk:
        address = f"ws://127.0.0.1:{self._port}/ws/stream?events=1"
        talk = Talk(await websockets.connect(address, max_size=None, open_timeout=WAIT_S))
        self._talks.append(talk)
        return talk

    async def talks_on(self, replicas: Set[str]) -> list[Talk]:
        """One on each. A busy proxy learns late which one is emptier; what lands elsewhere ends."""
        talks: dict[str, Talk] = {}
        end = time.monotonic() + WAIT_S
        while talks.keys() != replicas:
            assert time.monotonic() < end, f"talks on {set(talks)}, none on others of {replicas}"
            talk = await self.talk()
            if talk.replica in replicas - talks.keys():
                talks[talk.replica] = talk
            else:
                await talk.close()
        return list(talks.values())

    async def ask(self) -> httpx.Response:
        query = {"max_new_tokens": "16", "format": "pcm", "seed": "3"}
        return await self.client.post("/v1/speech", params=query, content=QUESTION.read_bytes())

    def reply(self, response_format: str) -> AbstractAsyncContextManager[httpx.Response]:
        """A long one, as it is made: with other seeds this model may be done after one block."""
        query = {"max_new_tokens": "48", "format": response_format, "seed": "3"}
        body = QUESTION.read_bytes()
        return self.client.stream("POST", "/v1/speech", params=query, content=body)

    async def replicas(self) -> set[str]:
        """As /metrics names them. Nobody is named when a busy one takes longer than `ASK_S`."""
        answer = await self.client.get("/metrics")
        if answer.status_code == 503 and "did not answer in time" in answer.text:
            return set()
        assert answer.status_code == 200, f"/metrics: {answer.status_code} {answer.text}"
        return named(answer.text)

    async def until_replicas(self, count: int, without: frozenset[str] = frozenset()) -> set[str]:
        end = time.monotonic() + WAIT_S
        while len(there := await self.replicas()) != count or there & without:
            assert time.monotonic() < end, f"waited for {count} without {without}, have {there}"
            await asyncio.sleep(0.2)
        return there


def named(metrics: str) -> set[str]:
    """The replicas whose samples these are."""
    families = text_string_to_metric_families(metrics)
    return {sample.labels["replica"] for family in families for sample in family.samples}


@pytest.fixture
def folder() -> Iterator[Path]:
    """Of a short name: Ray keeps sockets in it."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as name:
        assert main(["tiny", f"{name}/models", "--seed", "3"]) == 0
        yield Path(name)


async def reply_streams(deployment: Deployment) -> None:
    """The first sound is heard long before the last is made."""
    arrivals = []
    async with deployment.reply("events") as reply:
        assert reply.status_code == 200
        async for line in reply.aiter_lines():
            if line.startswith("event:"):
                arrivals.append((line, time.monotonic()))
        turn_id = reply.headers["X-Turn-Id"]
    assert arrivals[-1][0] == "event: done"
    assert arrivals[-1][1] - arrivals[0][1] > 0.1
    text = await deployment.client.get(f"/v1/speech/{turn_id}")
    assert text.json()["status"] == "done"


async def refusals_are_those_of_one_process(deployment: Deployment) -> None:
    wrong = await deployment.client.post("/v1/speech", content=b"no sound")
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (400, "AudioError")
    answers = await asyncio.gather(*(deployment.ask() for _ in range(10)))
    refused = [answer for answer in answers if answer.status_code == 503]
    assert sorted(a.status_code for a in answers) == [200] * 4 + [503] * 6
    assert {answer.headers["Retry-After"] for answer in refused} == {"1"}
    assert {answer.json()["error"]["type"] for answer in refused} == {"Overloaded"}


async def load_starts_another_replica(deployment: Deployment) -> list[Talk]:
    """Conversations, on each of the two."""
    talks = [await deployment.talk() for _ in range(3)]
    there = await deployment.until_replicas(2)
    return talks + await deployment.talks_on(there - {talk.replica for talk in talks})


async def one_killed_costs_its_own(deployment: Deployment, talks: list[Talk], pid: int) -> None:
    before = await deployment.until_replicas(2)
    turns = [asyncio.create_task(talk.turn()) for talk in talks]
    await asyncio.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    ends = list(zip(talks, await asyncio.gather(*turns), strict=True))
    broken = {talk.replica for talk, end in ends if end == "broken"}
    assert len(broken) == 1
    assert {end for talk, end in ends if talk.replica not in broken} == {"end"}
    now = await deployment.until_replicas(2, without=frozenset(broken))
    assert len(now & before) == 1


async def talks_outlive_a_redeployment(deployment: Deployment) -> None:
    """One replica leaves, the other is replaced: both wait for the talks that they have."""
    old = await deployment.until_replicas(2)
    talks = await deployment.talks_on(old)
    await deployment.until_replicas(1)
    assert {await talk.turn() for talk in talks * 2} == {"end"}
    await asyncio.gather(*(talk.close() for talk in talks))
    await deployment.until_replicas(1, without=frozenset(old))


async def a_stop_lets_replies_end(deployment: Deployment, scale: Scale) -> None:
    async with deployment.reply("pcm") as reply:
        assert reply.status_code == 200
        ended, sound = await asyncio.gather(asyncio.to_thread(scale.close), reply.aread())
    assert ended == 0
    assert sound


@contextmanager
def explained(folder: Path, *scales: Scale) -> Iterator[None]:
    """A failure tells what the processes printed, and what Ray wrote of its replicas."""
    try:
        yield
    except BaseException as failure:
        for number, scale in enumerate(scales, start=1):
            failure.add_note(last(f"omnispeech scale, number {number}", scale.lines, 40))
        for log in sorted(folder.glob("ray/session_latest/logs/serve/*.log")):
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            failure.add_note(last(log.name, lines, 20))
        raise


def last(title: str, lines: list[str], most: int) -> str:
    """Without what a replica says twice a second while it waits for its talks."""
    told = [line for line in lines if "Waiting for an additional" not in line]
    return f"\n{title}:\n{''.join(told[-most:])}"


async def test_two_replicas_share_the_load_replace_each_other_and_cut_nobody(
    folder: Path,
) -> None:
    port, ray_port = free_port(), free_port()
    with ExitStack() as started:
        load = ["--target-conversations", "1", "--max-replicas", "2", "--upscale-delay-s", "0"]
        first = Scale(folder, port, ray_port, *load)
        started.callback(first.close)
        async with Deployment(port) as deployment:
            with explained(folder, first):
                await first.until("serving on")
                await deployment.until_replicas(1)
                await reply_streams(deployment)
                await refusals_are_those_of_one_process(deployment)
                talks = await load_starts_another_replica(deployment)
                await one_killed_costs_its_own(deployment, talks, first.replica_pids()[0])
                await asyncio.gather(*(talk.close() for talk in talks))
            # other settings, and one replica fewer; `auto` would join any Ray of this machine
            changed = ["--max-replicas", "1", "--max-new-tokens", "64"]
            changed += ["--ray-address", f"127.0.0.1:{ray_port}"]
            second = Scale(folder, port, ray_port, *changed)
            started.callback(second.close)
            with explained(folder, first, second):
                await talks_outlive_a_redeployment(deployment)
                await a_stop_lets_replies_end(deployment, second)
                assert first.process.wait(timeout=WAIT_S) == 0
