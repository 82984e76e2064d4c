"""A talk by Pipecat's OpenAIRealtimeLLMService: python realtime_pipecat.py URL WAV STEP..."""

import asyncio
import sys

from loguru import logger
from pipecat.adapters.llm.schemas.function_schema import FunctionSchema
from pipecat.adapters.llm.schemas.tools_schema import ToolsSchema
from pipecat.frames.frames import (
    EndFrame,
    ErrorFrame,
    Frame,
    InputAudioRawFrame,
    InterruptionFrame,
    LLMFullResponseEndFrame,
    LLMFullResponseStartFrame,
    LLMRunFrame,
    TTSAudioRawFrame,
    TTSTextFrame,
)
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.services.llm_service import FunctionCallParams
from pipecat.services.openai.realtime.llm import OpenAIRealtimeLLMService
from pipecat.workers.runner import WorkerRunner
from realtime_side import Answer, Microphone, Report, arguments, play_out, until

WEATHER = FunctionSchema(
    name="weather",
    description="The weather of a city.",
    properties={"city": {"type": "string"}},
    required=["city"],
)


async def main() -> None:
    url, path, steps = arguments()
    report, microphone = Report(), Microphone(path)
    logger.remove()
    logger.add(lambda line: report.logged.append(line.strip()), level="WARNING")
    logger.add(sys.stderr, level="WARNING")
    worker = talking(url, report, functions="call" in steps)
    runner = WorkerRunner(handle_sigint=False)
    await runner.add_workers(worker)
    tasks = [
        asyncio.create_task(runner.run()),
        asyncio.create_task(speak(worker, microphone)),
    ]
    await worker.queue_frame(LLMRunFrame())
    await until(lambda: report.answers and report.answers[-1].done, "the greeting")
    await play_out(report.answers.pop())
    for step in steps:
        await take(step, microphone, report)
    tasks[1].cancel()
    await worker.queue_frame(EndFrame())
    await tasks[0]
    report.closed = True
    report.print()


def talking(url: str, report: Report, *, functions: bool) -> PipelineWorker:
    address = url.replace("http", "ws", 1) + "/v1/realtime"
    llm = OpenAIRealtimeLLMService(
        api_key="nobody",
        base_url=address,
        settings=OpenAIRealtimeLLMService.Settings(system_instruction="Answer."),
    )
    context = LLMContext([{"role": "developer", "content": "Greet the user."}])
    if functions:
        context.set_tools(ToolsSchema(standard_tools=[WEATHER]))
        llm.register_function("weather", weather(report))
    pair = LLMContextAggregatorPair(context)
    parts = [Errors(report), pair.user(), llm, Loudspeaker(report), pair.assistant()]
    return PipelineWorker(Pipeline(parts))


def weather(report: Report):
    async def answer(params: FunctionCallParams) -> None:
        report.calls.append(params.arguments["city"])
        await params.result_callback({"weather": "rain"})

    return answer


class Errors(FrameProcessor):
    def __init__(self, report: Report) -> None:
        super().__init__()
        self._report = report

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        if isinstance(frame, ErrorFrame):
            self._report.errors.append(frame.error)
        await self.push_frame(frame, direction)


class Loudspeaker(FrameProcessor):
    def __init__(self, report: Report) -> None:
        super().__init__()
        self._report = report

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        self._note(frame)
        await self.push_frame(frame, direction)

    def _note(self, frame: Frame) -> None:
        answers = self._report.answers
        match frame:
            # one that it asked for itself begins twice
            case LLMFullResponseStartFrame() if not answers or answers[-1].done:
                answers.append(Answer())
            case TTSAudioRawFrame():
                answers[-1].sound += len(frame.audio)
            case TTSTextFrame():
                answers[-1].text += frame.text
            case LLMFullResponseEndFrame() if answers:
                answers[-1].done = True
            case InterruptionFrame() if answers and not answers[-1].done:
                answers[-1].cut = True


async def speak(worker: PipelineWorker, microphone: Microphone) -> None:
    async for piece in microphone.pieces():
        frame = InputAudioRawFrame(audio=piece, sample_rate=24_000, num_channels=1)
        await worker.queue_frame(frame)


async def take(step: str, microphone: Microphone, report: Report) -> None:
    """Its one interruption, where the server finds the turns, is to speak."""
    before = len(report.answers)
    microphone.ask()
    if step == "interrupt":
        await until(lambda: report.answers[before:] and report.answers[-1].sound, "a long reply")
        before += 1
        microphone.ask()
    await until(lambda: len(report.answers) > before and report.answers[-1].done, step)
    await play_out(report.answers[-1])


if __name__ == "__main__":
    asyncio.run(main())
