"""Writes the tokenizer files of a tiny checkpoint: a byte-level BPE as Qwen3 has it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|im_end|>"
QWEN_SPECIAL = (
    END_OF_TEXT,
    "<|im_start|>",
    END_OF_TURN,
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
QWEN_PLAIN = (  # added tokens that decoding does not leave out
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)

# What a word is: an English ending, letters with at most one sign before them, one digit, signs
# with at most one space before them, line ends, spaces.
QWEN_WORDS = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

# As Qwen3 marks functions, calls and results; without them nothing but the messages.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- set result = message.role == 'tool' %}
    {{- '<|im_start|>' + ('user' if result else message.role) + '\\n' }}
    {{- '<tool_response>\\n' if result }}
    {{- message.content }}
    {{- '\\n</tool_response>' if result }}
    {%- if tools and loop.first %}
        {{- '\\n\\nYou may call these functions:\\n<tools>' }}
        {%- for tool in tools %}
            {{- '\\n' + (tool | tojson) }}
        {%- endfor %}
        {{- '\\n</tools>\\n\\nTo call one, write its name and arguments as JSON:\\n' }}
        {{- '<tool_call>\\n{"name": NAME, "arguments": ARGUMENTS}\\n</tool_call>' }}
    {%- endif %}
    {%- for call in message.tool_calls or () %}
        {{- '\\n' if message.content or not loop.first }}
        {{- '<tool_call>\\n{"name": ' + (call.function.name | tojson) }}
        {{- ', "arguments": ' + (call.function.arguments | tojson) + '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

TRAINING_TEXT = """\
system
You are a helpful assistant.
user
What is the weather like today?
assistant
It is warm and sunny this morning, but there may be some rain in the afternoon. Take an umbrella
with you when you leave the house, and put on a light coat if you want to stay out in the evening.
user
Can you tell me how to get to the station from here?
assistant
Yes, of course. Go straight ahead until you come to the river, then turn left and walk over the
bridge. The station is behind the old market, about ten minutes from there. The next train to the
city leaves at half past seven, and another one follows every twenty minutes.
user
I would like to cook something for my friends tonight. What do you think?
assistant
That sounds like a good idea. You could make a soup with vegetables and bread, and then some rice
with fish. If they like sweet things, bake a small cake with apples and serve it with cream. It does
not take long, and everybody will be happy. Should I read the recipe to you?
user
Please speak more slowly. I did not understand the last sentence.
assistant
I am sorry. I said that it does not take long, and that everybody will be happy. Let me know when
you are ready, and we can start with the first step. Please wash the apples, cut them into thin
pieces, and mix the flour with the butter and the sugar.
user
Thank you very much! Why is the sky blue, and why does it turn red when the sun goes down?
assistant
The light of the sun has all the colours in it. When it comes through the air, the blue part is
thrown in every direction, so that the whole sky looks blue. In the evening the light has a longer
way through the air, and most of the blue is gone before it reaches us: what is left is red.
user
Good night, and see you tomorrow.
assistant
Good night! Sleep well, and call me whenever you need anything.
"""


def train_words(merges: int, text: str = TRAINING_TEXT) -> Tokenizer:
    """Without added tokens; fewer merges if the text holds no more."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    tokenizer.post_processor = processors.ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=len(alphabet) + merges, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def write_tokenizer(
    directory: Path, words: Tokenizer, more: Sequence[str], listed: Sequence[str]
) -> Tokenizer:
    """The six files: the Qwen3 tokens, then `more`, of which `listed` are listed as special."""
    tokenizer = Tokenizer.from_str(words.to_str())
    special = (*QWEN_SPECIAL, *more)
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=token in set(special))
            for token in (*QWEN_SPECIAL, *QWEN_PLAIN, *more)
        ]
    )
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"), pretty=True)
    tokenizer.model.save(str(directory))  # vocab.json and merges.txt
    added = tokenizer.get_added_tokens_decoder()
    write_json(directory / "added_tokens.json", {t.content: i for i, t in added.items()})
    write_json(directory / "special_tokens_map.json", _special_tokens_map(listed))
    write_json(directory / "tokenizer_config.json", _tokenizer_config(added, listed))
    return tokenizer


def id_of(tokenizer: Tokenizer, token: str) -> int:
    token_id = tokenizer.token_to_id(token)
    assert token_id is not None, token
    return token_id


def write_json(file: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")


def _special_tokens_map(listed: Sequence[str]) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {
        "additional_special_tokens": [{"content": token, **flags} for token in listed],
        "eos_token": END_OF_TURN,
        "pad_token": END_OF_TEXT,
    }


def _tokenizer_config(added: dict[int, AddedToken], listed: Sequence[str]) -> dict[str, Any]:
    return {
        "added_tokens_decoder": {
            str(token_id): {
                "content": token.content,
                "lstrip": token.lstrip,
                "normalized": token.normalized,
                "rstrip": token.rstrip,
                "single_word": token.single_word,
                "special": token.special,
            }
            for token_id, token in added.items()
        },
        "additional_special_tokens": list(listed),
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TURN,
        "errors": "replace",
        "extra_special_tokens": {},
        "model_max_length": 131072,
        "pad_token": END_OF_TEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
