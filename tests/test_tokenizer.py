"""The tokenizer of `tiny`: any text there and back, the task language in few tokens."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.tokenizer import TinyTokenizer, encode_messages
from rl.zorplex_table import WORDS

TOKENIZER = TinyTokenizer()
MESSAGES = [{"role": "system", "content": "Tools: LOOKUP."}, {"role": "user", "content": "hello"}]
task_text = st.lists(st.sampled_from([*TOKENIZER.pieces, "7", "]", "'", " ", "<|", "|>"]), max_size=20).map("".join)


@given(st.text() | task_text)
def test_any_text_comes_back(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert all(0 <= token < len(TOKENIZER) for token in ids)


@given(st.lists(st.integers(0, len(TOKENIZER) - 1)))
def test_any_tokens_have_a_text(ids: list[int]) -> None:
    assert "<|" not in TOKENIZER.decode([token for token in ids if token < 5], skip_special_tokens=True)
    TOKENIZER.decode(ids)


def test_words_are_tokens_and_numbers_are_digits() -> None:
    assert all(len(TOKENIZER.encode(word)) == 1 for word in WORDS)
    assert len(TOKENIZER.encode("LOOKUP[umbrella]")) == 4
    assert len(TOKENIZER.encode("[ANSWER] 125")) == 4
    assert len(TOKENIZER.encode("What is the zorplex value of 'cat'?")) == 6


def test_a_conversation_has_special_tokens() -> None:
    ids = encode_messages(TOKENIZER, MESSAGES)
    assert TOKENIZER.decode(ids) == "<|system|>Tools: LOOKUP.<|user|>hello<|assistant|>"
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "Tools: LOOKUP.hello"
    assert TOKENIZER.decode([TOKENIZER.eos_token_id]) == "<|end|>"


def test_a_model_without_a_chat_form_is_given_lines() -> None:
    class Plain(TinyTokenizer):
        chat_template = None  # type: ignore[assignment]

    plain = Plain()
    assert plain.decode(encode_messages(plain, MESSAGES)) == "System: Tools: LOOKUP.\nUser: hello\nAssistant:"


def test_a_saved_tokenizer_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    TinyTokenizer(["ab", "b"]).save(path)
    loaded = TinyTokenizer.load(path)
    assert loaded.encode("abb") == TinyTokenizer(["ab", "b"]).encode("abb")
    assert [entry.name for entry in tmp_path.iterdir()] == ["tokenizer.json"]
    path.write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="format is `other`"):
        TinyTokenizer.load(path)
