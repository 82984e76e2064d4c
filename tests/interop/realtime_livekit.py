"""A talk by LiveKit's AgentSession: python realtime_livekit.py URL WAV STEP..."""

import asyncio
from collections.abc import AsyncIterator

from livekit import rtc
from livekit.agents import Agent, AgentSession, function_tool
from livekit.agents.voice.io import AudioInput, AudioOutput, AudioOutputCapabilities, TextOutput
from livekit.plugins.openai.realtime import RealtimeModel
from realtime_side import Answer, Microphone, Report, arguments, keep_logs, until


async def main() -> None:
    url, path, steps = arguments()
    report, microphone = Report(), Microphone(path)
    keep_logs(report)
    model = RealtimeModel(base_url=url + "/v1", api_key="nobody")
    session: AgentSession = AgentSession(llm=model)
    session.input.audio = Ear(microphone)
    session.output.audio = Loudspeaker(report)
    session.output.transcription = Screen(report)
    session.on("error", lambda event: report.errors.append(str(event.error)))
    tools = [weather(report)] if "call" in steps else []
    await session.start(Agent(instructions="Answer.", tools=tools), record=False)
    for step in steps:
        await take(step, session, microphone, report)
    await session.aclose()
    report.closed = True
    report.print()


def weather(report: Report):
    @function_tool
    async def weather(city: str) -> str:
        """The weather of a city."""
        report.calls.append(city)
        return "rain"

    return weather


class Ear(AudioInput):
    def __init__(self, microphone: Microphone) -> None:
        super().__init__(label="microphone")
        self._pieces: AsyncIterator[bytes] = microphone.pieces()

    async def __anext__(self) -> rtc.AudioFrame:
        piece = await anext(self._pieces)
        return rtc.AudioFrame(piece, 24_000, 1, len(piece) // 2)


class Loudspeaker(AudioOutput):
    """Plays in real time."""

    def __init__(self, report: Report) -> None:
        capabilities = AudioOutputCapabilities(pause=False)
        super().__init__(label="loudspeaker", capabilities=capabilities, sample_rate=24_000)
        self._report = report
        self._begun_s: float | None = None
        self._pushed_s = 0.0
        self._end: asyncio.Task[None] | None = None

    async def capture_frame(self, frame: rtc.AudioFrame) -> None:
        await super().capture_frame(frame)
        if self._begun_s is None:
            self._begun_s, self._pushed_s = asyncio.get_running_loop().time(), 0.0
            self._report.answers.append(Answer())
        self._pushed_s += frame.duration
        self._report.answers[-1].sound += len(frame.data) * 2

    def flush(self) -> None:
        super().flush()
        if self._begun_s is not None and self._end is None:
            self._end = asyncio.create_task(self._play_out())

    def clear_buffer(self) -> None:
        if self._begun_s is not None:
            self._finish(cut=True)

    async def _play_out(self) -> None:
        assert self._begun_s is not None
        left = self._begun_s + self._pushed_s - asyncio.get_running_loop().time()
        await asyncio.sleep(max(0.0, left))
        self._end = None
        self._finish(cut=False)

    def _finish(self, *, cut: bool) -> None:
        if self._end:
            self._end.cancel()
        assert self._begun_s is not None
        played = min(self._pushed_s, asyncio.get_running_loop().time() - self._begun_s)
        self._begun_s = self._end = None
        self._report.answers[-1].done, self._report.answers[-1].cut = True, cut
        self.on_playback_finished(playback_position=played, interrupted=cut)


class Screen(TextOutput):
    def __init__(self, report: Report) -> None:
        super().__init__(label="screen", next_in_chain=None)
        self._report = report
        self._text = ""

    async def capture_text(self, text: str) -> None:
        self._text += text

    def flush(self) -> None:
        if self._text and self._report.answers:
            self._report.answers[-1].text, self._text = self._text, ""


async def take(step: str, session: AgentSession, microphone: Microphone, report: Report) -> None:
    before = len(report.answers)
    microphone.ask()
    await until(lambda: len(report.answers) > before, f"sound of a reply: {step}")
    if step == "interrupt":
        await session.interrupt()
        await asyncio.sleep(1.0)  # the server's response.done: without it aclose() warns
    await until(lambda: report.answers[-1].done, f"the end: {step}")


if __name__ == "__main__":
    asyncio.run(main())
