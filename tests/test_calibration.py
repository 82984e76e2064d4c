"""What the quantizer listens to is what the served model reads (spec: quantization 2.2, 6.1 M4)."""

import gzip
import importlib.util
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from golden_models import Caller, run
from torch import Tensor

from omnispeech import speech_calibration as spoken
from omnispeech.assembly import load_models
from omnispeech.calibration import datasets
from omnispeech.calibration.datasets import dataset_items
from omnispeech.calibration.items import (
    SHIPPED,
    Conversation,
    Item,
    PlainText,
    Sound,
    Turn,
    read_items,
    shipped_items,
)
from omnispeech.calibration.samples import Calibration, text_calibration
from omnispeech.calibration.tokens import TextTokens
from omnispeech.checkpoint.language import LanguageFiles
from omnispeech.checkpoint.shards import Shards
from omnispeech.config import DecoderConfig, EngineConfig
from omnispeech.engine.conversations import Conversations
from omnispeech.engine.events import Audio, Message, Text, TurnRequest
from omnispeech.engine.runner import Models
from omnispeech.errors import CheckpointError, ConfigError
from omnispeech.prompt import AUDIO, AUDIO_SLOT, PromptBuilder, PromptMessage, TextStream
from omnispeech.speech_calibration import speech_calibration, speech_lm_calibration
from omnispeech.tiny.directory import write_tiny

CPU = torch.device("cpu")
REPLY = "Take an umbrella with you when you leave the house."


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    write_tiny(path, 3)
    return path


@pytest.fixture(scope="module")
def source(directory: Path) -> LanguageFiles:
    return LanguageFiles.open(directory / "OpenS2S", "llm")


@pytest.fixture(scope="module")
def models(directory: Path) -> Models:
    return load_models(directory, CPU, torch.float32)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_clip(tmp_path / "clip.wav", 2.0, 0.1)


def write_clip(path: Path, seconds: float, frequency: float) -> Path:
    samples = np.sin(np.arange(int(16_000 * seconds)) * frequency).astype(np.float32) * 0.3
    soundfile.write(path, samples, 16_000)
    return path


def asked(clip: Path, reply: str = REPLY, text: str = "And now? ") -> Conversation:
    turns = [Turn("user", (text, Sound(clip))), Turn("assistant", (reply,))]
    return Conversation(tuple(turns), "here:1")


def heard(source: LanguageFiles, items: Sequence[Item], **limits: int) -> Calibration:
    limits = {"seq_len": 512, "max_tokens": 10_000, **limits}
    return speech_calibration(source.directory, source, items, device=CPU, **limits)


def read(source: LanguageFiles, texts: Sequence[Any], **limits: Any) -> Calibration:
    return text_calibration(source, texts, **{"seq_len": 64, "max_tokens": 10_000, **limits})


def ids_of(source: LanguageFiles, text: str) -> list[int]:
    return TextTokens(source.directory).of_text(text)


def conversations(models: Models) -> Conversations:
    config = EngineConfig(kv_tokens=4096, context_length=4096, reuse_prefixes=False)
    return Conversations(models, config, DecoderConfig(euler_steps=1))


def request(item: Conversation, **settings: Any) -> TurnRequest:
    content = [
        Text(part) if isinstance(part, str) else Audio(part.samples())
        for part in item.turns[0].parts
    ]
    return TurnRequest(messages=(Message("user", tuple(content)),), temperature=0.0, **settings)


def watch(module: torch.nn.Module) -> list[Tensor]:
    calls: list[Tensor] = []
    module.register_forward_pre_hook(lambda _, given: calls.append(given[0].clone()))
    return calls


def test_the_prompt_is_what_the_served_model_reads(
    source: LanguageFiles, models: Models, clip: Path
) -> None:
    """M4: every vector, the sound of the encoder and adapter among them."""
    engine = conversations(models)
    served = watch(models.language.lm.llm_model)
    Caller(engine, request(asked(clip), max_new_tokens=1, seed=0))
    run(engine)
    (sample,) = heard(source, [asked(clip)]).samples
    assert torch.equal(sample.vectors[: len(served[0])], served[0])
    assert torch.equal(
        sample.vectors[len(served[0]) :], source.embed(torch.tensor(ids_of(source, REPLY)))
    )


def test_sound_is_spliced_where_its_slot_is(
    source: LanguageFiles, models: Models, clip: Path
) -> None:
    lm = models.language.lm
    ears = spoken.Ears(source.directory, CPU, torch.float32)
    audio = ears.hear(Sound(clip).samples())
    builder = PromptBuilder.from_directory(source.directory)
    ids = builder.build([PromptMessage("user", ("And now? ", AUDIO))])
    (sample,) = heard(source, [asked(clip)]).samples
    expected = lm.splice(ids + ids_of(source, REPLY), [audio])
    assert torch.equal(sample.vectors, expected)
    assert torch.equal(sample.vectors[ids.index(AUDIO_SLOT)], audio[0])


def test_tokens_are_counted_by_kind(source: LanguageFiles, models: Models, clip: Path) -> None:
    calibration = heard(source, [asked(clip)])
    (sample,) = calibration.samples
    assert calibration.tokens["audio"] == 13  # 2 s: 50 frames, halved twice
    assert sum(calibration.tokens.values()) == len(sample.vectors) == int(sample.counted.sum())
    control = {"<|im_start|>": 3, "<|im_end|>": 2}
    single = ("<|im_audio_start|>", "<|im_audio_end|>", "<think>", "</think>", "<|im_tts_start|>")
    assert calibration.tokens["template"] == sum(control.values()) + len(single)


def test_the_frame_that_all_prompts_share_counts_once(
    source: LanguageFiles, tmp_path: Path
) -> None:
    clips = [write_clip(tmp_path / f"{i}.wav", 1.0, 0.1 + i / 50) for i in range(3)]
    calibration = heard(source, [asked(clip) for clip in clips])
    samples = calibration.samples
    builder = PromptBuilder.from_directory(source.directory)
    slot = builder.build([PromptMessage("user", ("And now? ", AUDIO))]).index(AUDIO_SLOT)
    assert samples[0].counted.all()
    for sample in samples[1:]:
        assert sample.counted.tolist() == [False] * slot + [True] * (len(sample.counted) - slot)
    assert sum(calibration.tokens.values()) == sum(int(s.counted.sum()) for s in samples)


def test_a_conversation_that_comes_twice_counts_once(source: LanguageFiles, clip: Path) -> None:
    once, twice = (heard(source, [asked(clip)] * n) for n in (1, 2))
    assert once.tokens == twice.tokens and once.digest == twice.digest


def test_only_the_ears_are_read_of_the_shards(
    source: LanguageFiles, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: set[str] = set()
    original = Shards.read

    def read(self: Shards, name: str, *rest: Any) -> Tensor:
        names.add(name.partition(".")[0])
        return original(self, name, *rest)

    monkeypatch.setattr(Shards, "read", read)
    spoken.Ears(source.directory, CPU, torch.float32).hear(Sound(clip).samples())
    assert names == {"audio_encoder_model", "audio_adapter"}


def test_the_ears_are_loaded_once(
    source: LanguageFiles, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[spoken.Ears] = []

    class Counted(spoken.Ears):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            loaded.append(self)

    monkeypatch.setattr(spoken, "Ears", Counted)
    heard(source, [asked(clip), asked(clip, "Yes.")])
    assert len(loaded) == 1


def test_texts_alone_do_not_load_the_ears(
    source: LanguageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spoken, "Ears", None)
    item = Conversation((Turn("user", ("Hello?",)),), "here:1")
    assert "audio" not in heard(source, [item, PlainText("Some words.", "here:2")]).tokens


def test_ears_that_do_not_fit_are_refused(directory: Path, tmp_path: Path) -> None:
    write_tiny(tmp_path, 3)
    config = tmp_path / "OpenS2S" / "config.json"
    raw = json.loads(config.read_text())
    raw["adapter_inner_dim"] *= 2
    config.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="audio_adapter of .* misshapen: fc1.weight"):
        spoken.Ears(tmp_path / "OpenS2S", CPU, torch.float32)


def test_a_clip_too_short_to_be_heard_is_named(source: LanguageFiles, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "click.wav", 0.001, 0.1)
    with pytest.raises(ConfigError, match=r"click\.wav is too short"):
        heard(source, [asked(clip)])


def test_a_long_text_is_cut_and_nothing_of_it_is_lost(source: LanguageFiles) -> None:
    text = "The station is behind the old market. " * 40
    ids = ids_of(source, text)
    samples = read(source, [text]).samples
    assert {len(s.vectors) for s in samples[:-1]} == {64} and len(samples) == -(-len(ids) // 64)
    assert torch.equal(torch.cat([s.vectors for s in samples]), source.embed(torch.tensor(ids)))


def test_the_budget_is_met_to_the_token(source: LanguageFiles, clip: Path) -> None:
    texts = [f"Number {i} comes after {i - 1}." for i in range(200)]
    for calibration in (
        read(source, texts, max_tokens=333),
        heard(source, [asked(clip), *(PlainText(t, "here:1") for t in texts)], max_tokens=333),
    ):
        assert sum(len(s.vectors) for s in calibration.samples) == 333


def test_lists_of_token_ids_are_samples(source: LanguageFiles) -> None:
    text = "It is warm this morning."
    assert read(source, [ids_of(source, text)]).digest == read(source, [text]).digest


@pytest.mark.parametrize("wrong", [[1, -1], [10**6], [1, "a"], [True]])
def test_ids_that_the_tokenizer_does_not_have_are_refused(
    source: LanguageFiles, wrong: list[Any]
) -> None:
    with pytest.raises(ConfigError, match="sample 1 of the calibration list has the token id"):
        read(source, ["Good night.", wrong])


def test_no_more_samples_are_taken_than_asked(source: LanguageFiles) -> None:
    texts = ["One word.", "Two words.", "Three words."]
    assert read(source, texts, max_samples=2).digest == read(source, texts[:2]).digest


def test_the_digest_follows_the_vectors(source: LanguageFiles) -> None:
    first, again, other = (read(source, [t]).digest for t in ("One.", "One.", "Two."))
    assert first == again != other and re.fullmatch("[0-9a-f]{64}", first)


@pytest.mark.parametrize(
    ("turns", "rendered", "control"),
    [
        (2, "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n", 4),
        (1, "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", 5),
    ],
)
def test_a_conversation_goes_through_the_chat_template(
    source: LanguageFiles, turns: int, rendered: str, control: int
) -> None:
    both = (Turn("user", ("How?",)), Turn("assistant", ("So.",)))
    calibration = read(source, [Conversation(both[:turns], "here:1")])
    assert calibration.digest == read(source, [rendered]).digest
    assert calibration.tokens["template"] == control


def test_without_a_chat_template_a_conversation_is_its_lines(
    source: LanguageFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((source.directory / "tokenizer.json").read_bytes())
    tokens = TextTokens(tmp_path)
    item = Conversation((Turn("user", ("How?",)), Turn("assistant", ("So.",))), "here:1")
    assert tokens.of_conversation(item) == tokens.of_text("How?\nSo.")


def test_a_text_begins_as_the_model_wants_and_a_piece_does_not(
    source: LanguageFiles, tmp_path: Path
) -> None:
    """Llama and Mistral open every text with a token of their own."""
    raw = json.loads((source.directory / "tokenizer.json").read_text(encoding="utf-8"))
    first = next(t["id"] for t in raw["added_tokens"] if t["content"] == "<|endoftext|>")
    opening = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [opening, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [first], "tokens": ["<|endoftext|>"]}
        },
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    tokens = TextTokens(tmp_path)
    assert tokens.of_text("Hello.") == [first, *tokens.of_piece("Hello.")]
    assert tokens.of_piece("Hello.") == ids_of(source, "Hello.")


def test_a_transcript_stands_for_sound_where_there_are_no_ears(
    source: LanguageFiles, clip: Path
) -> None:
    turns = (Turn("user", (Sound(clip, "Where is it?"),)),)
    typed = (Turn("user", ("Where is it?",)),)
    spelled, written = (read(source, [Conversation(t, "here:1")]) for t in (turns, typed))
    assert spelled.digest == written.digest
    with pytest.raises(ConfigError, match="here:1: sound without a transcript"):
        read(source, [asked(clip)])


@pytest.mark.parametrize("limits", [{"seq_len": 0}, {"max_tokens": 0}])
def test_limits_below_one_are_refused(source: LanguageFiles, limits: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="=0; allowed: 1 or more"):
        read(source, ["Hello."], **limits)


def test_nothing_to_read_is_an_error(source: LanguageFiles) -> None:
    with pytest.raises(ConfigError, match="has no tokens"):
        read(source, [])


def test_the_speech_lm_is_calibrated_on_what_it_reads_when_served(
    models: Models, clip: Path
) -> None:
    item = asked(clip)
    calibration = speech_lm_calibration(
        models, [item], seq_len=4096, max_tokens=4096, max_new_tokens=20
    )
    engine = conversations(models)
    served = watch(models.language.lm.tts_lm_model.model)
    caller = Caller(engine, request(item, max_new_tokens=20, seed=0))
    run(engine)
    (sample,) = calibration.samples
    assert torch.equal(sample.vectors, torch.cat(served))
    text_ids, unit_ids = caller.ids
    assert calibration.tokens == {
        "speaker": 1,
        "state": len(text_ids),
        "unit": len(unit_ids) - 1,  # the last is never read
    }


def test_what_is_longer_than_the_context_is_left_out_of_what_the_speech_lm_reads(
    models: Models, clip: Path
) -> None:
    long = Conversation((Turn("user", ("word " * 9000,)),), "here:2")
    limits = {"seq_len": 64, "max_tokens": 64, "max_new_tokens": 4}
    both = speech_lm_calibration(models, [long, asked(clip)], **limits)
    assert both.digest == speech_lm_calibration(models, [asked(clip)], **limits).digest
    with pytest.raises(ConfigError, match="no item is a conversation that fits"):
        speech_lm_calibration(models, [long], **limits)


def test_the_speech_lm_needs_a_question(models: Models) -> None:
    with pytest.raises(ConfigError, match="no item is a conversation"):
        speech_lm_calibration(models, [PlainText("a", "here:1")], seq_len=9, max_tokens=9)


def test_a_reply_gives_its_memory_back(
    models: Models, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spoken, "CONTEXT_LENGTH", 512)  # one reply fits, two do not
    items = [asked(clip, text=f"{i} ") for i in range(3)]
    calibration = speech_lm_calibration(
        models, items, seq_len=512, max_tokens=10**6, max_new_tokens=64
    )
    assert len(calibration.samples) == 3


def test_nothing_listens_to_the_speech_lm_afterwards(models: Models, clip: Path) -> None:
    hooks = models.language.lm.tts_lm_model.model._forward_pre_hooks
    before = dict(hooks)
    speech_lm_calibration(models, [asked(clip)], seq_len=512, max_tokens=9, max_new_tokens=4)
    assert dict(hooks) == before


def test_a_reply_that_fails_is_an_error(
    models: Models, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextStream, "push", lambda self, ids: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        speech_lm_calibration(models, [asked(clip)], seq_len=512, max_tokens=9)


def jsonl(path: Path, *lines: Any) -> Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


def message(content: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content}]}


def test_a_jsonl_file_holds_texts_and_conversations(clip: Path) -> None:
    parts = [
        {"type": "text", "text": "Listen: "},
        {"type": "audio", "path": clip.name, "transcript": "Hello."},
    ]
    file = jsonl(clip.parent / "a.jsonl", {"text": "Some text."}, "", message(parts))
    assert read_items(file) == [
        PlainText("Some text.", f"{file}:1"),
        Conversation((Turn("user", ("Listen: ", Sound(clip, "Hello."))),), f"{file}:3"),
    ]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "is not valid JSON"),
        ([1], 'allowed: an object with "messages" or "text"'),
        ({"text": "a", "lang": "en"}, 'allowed: an object with "messages" or "text"'),
        ({"text": " "}, "text is ' '; allowed: text that is not empty"),
        ({"messages": {}}, "messages is dict; allowed: a list"),
        ({"messages": []}, "no message is the user's"),
        (message("So.", "assistant"), "no message is the user's"),
        (message("a", "robot"), "message 1: role 'robot'; allowed: system, user, assistant"),
        (message(None), "message 1: content is None; allowed: text"),
        (message([{"type": "image"}]), "a part of the type 'image'; allowed: text, audio"),
        (message([{"type": "audio"}]), "keys type; needed: path, type; optional: transcript"),
        (message([{"type": "audio", "path": "no.wav"}]), "no.wav does not exist; paths start"),
        (message([{"type": "audio", "path": "clip.wav"}], "assistant"), "sound of the assistant"),
        ({"messages": [{"role": "user", "text": "a"}]}, "keys role, text; needed: content, role"),
    ],
)
def test_a_wrong_line_is_named(clip: Path, line: Any, complaint: str) -> None:
    file = jsonl(clip.parent / "a.jsonl", {"text": "fine"}, line)
    with pytest.raises(ConfigError, match=re.escape(f"{file}:2")) as error:
        read_items(file)
    assert complaint in str(error.value)


def test_a_directory_is_read_whole_and_nothing_twice(clip: Path) -> None:
    folder = clip.parent
    jsonl(folder / "a.jsonl", message([{"type": "audio", "path": "clip.wav"}]))
    other = write_clip(folder / "other.flac", 1.0, 0.2)
    (folder / "other.txt").write_text("It is a flac.\n")
    (folder / "texts.txt").write_text("One\nparagraph.\n\n\nAnother.\n")
    (folder / "notes.md").write_text("no data")
    question, reply, one, another = read_items(folder)
    assert isinstance(question, Conversation) and question.sounds == [Sound(clip)]
    assert isinstance(reply, Conversation) and reply.sounds == [Sound(other)]
    assert reply.turns[1] == Turn("assistant", ("It is a flac.",))
    assert one == PlainText("One\nparagraph.", f"{folder / 'texts.txt'}:1")
    assert another == PlainText("Another.", f"{folder / 'texts.txt'}:5")


@pytest.mark.parametrize("name", ["missing", "empty", "empty/notes.md"])
def test_what_holds_no_data_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").touch()
    with pytest.raises(ConfigError, match=r"\.jsonl, \.txt, \.wav"):
        read_items(tmp_path / name)


def test_sound_that_cannot_be_decoded_is_named(source: LanguageFiles, tmp_path: Path) -> None:
    (tmp_path / "noise.wav").write_bytes(b"not a sound")
    with pytest.raises(ConfigError, match=r"noise\.wav: the audio \(11 bytes\) cannot be decoded"):
        heard(source, read_items(tmp_path))


def test_the_shipped_set_is_small_and_varied() -> None:
    items = shipped_items()
    sounds = [s for item in items if isinstance(item, Conversation) for s in item.sounds]
    texts = [item for item in items if isinstance(item, PlainText)]
    assert len(items) >= 140 and len(sounds) >= 100
    assert {s.path.name[:2] for s in sounds} == {"en", "zh", "de", "fr", "es"}
    assert all(s.transcript for s in sounds)
    assert max(len(text.text.split()) for text in texts) > 500
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) < 3_000_000


def test_every_shipped_clip_can_be_heard() -> None:
    clips = sorted((SHIPPED / "sound").iterdir())
    named = {s.path for i in shipped_items() if isinstance(i, Conversation) for s in i.sounds}
    assert set(clips) == named
    for clip in clips:
        samples = Sound(clip).samples()
        assert 1.0 < len(samples) / 16_000 < 20.0
        assert 0.005 < np.sqrt(np.mean(samples**2)) < 0.3


def test_the_shipped_set_calibrates(source: LanguageFiles) -> None:
    calibration = heard(source, shipped_items()[:8])
    assert calibration.tokens.keys() == {"audio", "template", "text"}
    assert calibration.sources == (str(SHIPPED / "conversations.jsonl"),)


def test_the_sound_of_the_set_is_written_the_same_again() -> None:
    """Ogg streams carry a number drawn at random, and checksums over it."""
    path = Path(__file__).parent.parent / "tools" / "make_calibration_set.py"
    spec = importlib.util.spec_from_file_location("make_calibration_set", path)
    assert spec and spec.loader
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    samples = np.sin(np.arange(16_000) * 0.1).astype(np.float32) * 0.3
    first, again = maker.encode(samples), maker.encode(samples)
    assert first == again
    assert np.corrcoef(soundfile.read(io.BytesIO(first))[0], samples)[0, 1] > 0.9
    shipped = (SHIPPED / "sound" / "en-001.ogg").read_bytes()
    assert maker.with_serial(shipped) == shipped


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    files = DirFileSystem(path=str(tmp_path / "hub"), fs=LocalFileSystem())
    monkeypatch.setattr(datasets, "_hub", lambda: files)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path / "hub"


def write_c4(hub: Path, split: str, count: int) -> None:
    path = hub / "datasets/allenai/c4/en" / f"c4-{split}.00000-of-00008.json.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": f"{split} {i} " + "word " * 20} for i in range(count)]
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in [{"text": "too short"}, *rows])


def test_a_named_set_comes_from_the_hub_half_from_each_split(hub: Path) -> None:
    write_c4(hub, "train", 5)
    write_c4(hub, "validation", 5)
    starts = [i.text.split()[:2] for i in dataset_items("c4:4") if isinstance(i, PlainText)]
    assert starts == [["train", "0"], ["train", "1"], ["validation", "0"], ["validation", "1"]]
    assert len(dataset_items("c4:4", splits=["valid"])) == 4


def test_a_path_of_that_name_goes_first(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jsonl(tmp_path / "own.jsonl", *({"text": f"text {i}"} for i in range(9)))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert len(dataset_items(f"{tmp_path / 'own.jsonl'}:3")) == 3


def test_everything_that_was_not_found_is_listed(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_c4(hub, "train", 5)
    with pytest.raises(ConfigError) as error:
        dataset_items("c4,wikitext2,nonsense")
    assert "c4 (the hub has no allenai/c4/en/c4-validation" in str(error.value)
    assert "wikitext2 (the hub has no Salesforce/wikitext" in str(error.value)
    assert "nonsense (neither a path nor a name that is known)" in str(error.value)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"c4 \(no such path, and HF_HUB_OFFLINE forbids"):
        dataset_items("c4", splits=["train"])


def test_a_hub_that_cannot_be_reached_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoConnection(Exception):
        """As of an HTTP library."""

    def hub() -> None:
        raise NoConnection("name or service not known\nmore advice")

    monkeypatch.setattr(datasets, "_hub", hub)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(ConfigError, match=r"not found: c4 \(name or service not known\); allowed"):
        dataset_items("c4")


def test_a_line_of_a_local_set_that_is_wrong_is_named(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "own.jsonl", {"text": 1})
    complaint = f"{file}:1: text is 1; allowed: text"  # and not that it was not found
    with pytest.raises(ConfigError, match=f"^{re.escape(complaint)}"):
        dataset_items(str(file))


@pytest.mark.parametrize("mixture", ["c4:0", "c4:many", "c4:"])
def test_a_quota_is_a_number_of_texts(mixture: str) -> None:
    with pytest.raises(ConfigError, match="the quota is .*; allowed: 1 or more texts"):
        dataset_items(mixture)
