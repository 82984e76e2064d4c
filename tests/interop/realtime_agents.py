"""A talk by openai-agents: python realtime_agents.py URL WAV STEP..."""

import asyncio

from agents import function_tool
from agents.realtime import RealtimeAgent, RealtimeRunner, RealtimeSession
from realtime_side import Answer, Microphone, Report, arguments, keep_logs, play_out, until


async def main() -> None:
    url, path, steps = arguments()
    report, microphone = Report(), Microphone(path)
    keep_logs(report)
    tools = [weather(report)] if "call" in steps else []
    agent = RealtimeAgent(name="host", instructions="Answer.", tools=tools)
    runner = RealtimeRunner(agent)
    address = url.replace("http", "ws", 1) + "/v1/realtime?model=opens2s"
    session = await runner.run(model_config={"url": address, "api_key": "nobody"})
    async with session:
        tasks = [
            asyncio.create_task(speak(session, microphone)),
            asyncio.create_task(listen(session, report)),
        ]
        for step in steps:
            await take(step, session, microphone, report)
        for task in tasks:
            task.cancel()
    report.closed = True
    report.print()


def weather(report: Report):
    @function_tool
    def weather(city: str) -> str:
        """The weather of a city."""
        report.calls.append(city)
        return "rain"

    return weather


async def speak(session: RealtimeSession, microphone: Microphone) -> None:
    async for piece in microphone.pieces():
        await session.send_audio(piece)


async def listen(session: RealtimeSession, report: Report) -> None:
    async for event in session:
        match event.type:
            case "agent_start":
                report.answers.append(Answer())
            case "audio":
                report.answers[-1].sound += len(event.audio.data)
            case "audio_interrupted" if report.answers:
                report.answers[-1].cut = True
            case "agent_end":
                report.answers[-1].done = True
            case "error":
                report.errors.append(str(event.error))
            case "raw_model_event" if event.data.type == "transcript_delta":
                report.answers[-1].text += event.data.delta


async def take(step: str, session: RealtimeSession, microphone: Microphone, report: Report) -> None:
    before = len(report.answers)
    microphone.ask()
    replies = 1 if step == "turn" else 2
    if step == "interrupt":
        await until(lambda: report.answers[before:] and report.answers[-1].sound, "a long reply")
        await session.interrupt()
        microphone.ask()  # the response goes on until the server hears the user, says this client
    await until(lambda: len(report.answers) == before + replies and report.answers[-1].done, step)
    await play_out(report.answers[-1])


if __name__ == "__main__":
    asyncio.run(main())
