"""The tokenizer loses nothing, and the bytes of its tokens add up, on any text that UTF-8 can hold."""

import numpy as np
import pytest
from conftest import some_text
from hypothesis import example, given, settings
from hypothesis import strategies as st

from harness import HarnessError
from harness.stories import Storyteller
from harness.tokenizer import PIECES, Tokenizer

AWKWARD = [
    "\x00\x01\x7f\x85\u2028", "e\u0301\u0301 \u0301alone", "👩‍👩‍👧‍👦🏳️‍🌈👍🏽🇩🇪",
    "a\r\nb\rc\n\n\n", "\t\ttab\t", "    run   of      spaces ",
    "שלום עולם \u202eabc\u202c", "مرحبا", "\ufeffbom", "\u2581 meta \u2581\u2581",
    "<s></s><unk><0x41><pad>", "𝕏𐍈", "日本語テキスト", "\u00a0\u3000", "1234567890 3.14", "don't DON'T", "",
]
any_text = st.lists(st.one_of(st.text(max_size=20), st.sampled_from(AWKWARD), st.text(" \n\r\t\u2581", max_size=9))).map("".join)


@pytest.fixture(scope="module", params=[256, 320, 1500])
def tokenizer(request):
    return Tokenizer.train(iter([some_text(200_000)]), request.param)


@given(text=any_text)
@example(text="".join(AWKWARD))
@example(text="".join(map(chr, range(0x3100))))
@settings(max_examples=200)
def test_any_text_comes_back_and_its_bytes_add_up(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[np.array(ids, int)].sum() == len(text.encode())
    assert tokenizer.bos_id not in ids, "the document mark belongs to no text"


def test_vocabulary_has_every_byte_once_and_marks_have_none(tokenizer):
    singles = [p for p in tokenizer.pieces if len(p) == 1]
    assert set(singles) >= {bytes([b]) for b in range(256) if b != 255 or tokenizer.vocab_size > 256}
    assert tokenizer.token_bytes[tokenizer.bos_id] == 0
    assert len(tokenizer.pieces) == tokenizer.vocab_size == len(tokenizer.token_bytes)


def test_256_is_plain_bytes():
    tokenizer = Tokenizer.train(iter([]), 256)
    assert tokenizer.vocab_size == 256
    assert tokenizer.encode("aé\n") == [97, 0xC3, 0xA9, 10]


def test_a_lone_surrogate_is_refused_by_name():
    with pytest.raises(HarnessError, match="expected text that UTF-8 can encode, got a lone surrogate at 1") as caught:
        Tokenizer().encode("a\ud800")
    assert caught.value.kind == "data"


@pytest.mark.parametrize("size", [1, 255, 257, 319])
def test_a_vocabulary_without_room_for_the_bytes_is_refused(size):
    with pytest.raises(HarnessError, match=rf"vocab_size {size}: expected 256 \(plain bytes\) or at least 320"):
        Tokenizer.train(iter(["abc"]), size)


def test_documents_are_marked_and_stored_small(tokenizer):
    ids = tokenizer.encode_documents(["one", "", "two"])
    assert ids.dtype == np.uint16
    assert (ids == tokenizer.bos_id).sum() == 3
    assert tokenizer.decode(ids) == "onetwo"


GPT4 = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"


@pytest.mark.parametrize("vocab_size", [2048, 8192])
def test_tokens_are_as_long_as_a_gpt4_pattern_bpes(vocab_size):
    """Within 2 %, each trained on the text it encodes: the embedded stories, half a million characters of prose."""
    rustbpe, tiktoken = pytest.importorskip("rustbpe"), pytest.importorskip("tiktoken")
    teller = Storyteller(seed=3)
    text = "\n\n".join(teller.story() for _ in range(600))
    other = rustbpe.Tokenizer()
    other.train_from_iterator(iter([text]), vocab_size, pattern=GPT4)
    ranks = {bytes(piece): rank for piece, rank in other.get_mergeable_ranks()}
    reference = tiktoken.Encoding("gpt4 pattern", pat_str=GPT4, mergeable_ranks=ranks, special_tokens={}).encode_ordinary(text)
    ours = Tokenizer.train(iter([text]), vocab_size).encode(text)
    assert len(ours) == pytest.approx(len(reference), rel=0.02)


@given(text=any_text)
@settings(max_examples=200)
def test_pieces_for_training_are_the_text(text):
    assert "".join(PIECES.findall(text)) == text
