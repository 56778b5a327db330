"""Text from outside: no secret, no control character, no line break."""

from __future__ import annotations

import json

import pytest
from conftest import PLANTED
from hypothesis import given
from hypothesis import strategies as st

from agent.text import Redactor, is_secret_name, one_line, redact, safe_tail, safe_text, secrets_in


@given(st.binary(max_size=400), st.integers(min_value=0, max_value=50))
def test_any_bytes_have_a_tail_that_can_be_shown(tmp_path_factory, raw, limit):
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(raw)
    tail = safe_tail(path, limit)
    assert len(tail) <= limit
    assert json.loads(json.dumps(tail)).encode() == tail.encode()
    assert not any(ord(char) < 32 and char not in "\n\t" for char in safe_text(raw))


def test_one_line_is_harmless() -> None:
    assert one_line("a\tb\nc\x1b[31m\u202ed\x00 \ud800") == "a b c [31m d ?"
    assert len(one_line("word " * 100, 50)) <= 50


SECRET = "OPENAI_API_KEY GH_TOKEN AWS_SECRET_ACCESS_KEY PGPASSWORD NPM_AUTH GITHUB_PAT Api_Key"
HARMLESS = "PATH TOKENIZERS_PARALLELISM KEYBOARD_LAYOUT GNOME_KEYRING_CONTROL XAUTHORITY PATTERN"


@pytest.mark.parametrize("name", SECRET.split())
def test_names_of_secrets(name):
    assert is_secret_name(name)


@pytest.mark.parametrize("name", HARMLESS.split())
def test_names_of_no_secrets(name):
    assert not is_secret_name(name)


def test_values_that_are_words_numbers_or_files_are_not_secrets(tmp_path):
    assert secrets_in({"A_KEY": "true", "MAX_OUTPUT_TOKENS": "1000000000", "KEY_FILE": str(tmp_path)}) == {}


def test_secrets_are_redacted_in_every_form(tmp_path):
    text = json.dumps(PLANTED) + json.dumps(PLANTED, ensure_ascii=False) + "\n".join(PLANTED.values())
    text += " https://x/?k=quo%22te%5Cd-pa%2Fss%20w%C3%B6rd " + PLANTED["SOME_PRIVATE_KEY"].splitlines()[1]
    clean = redact(text, PLANTED)
    for leak in ["planted", "pa/ss", "pa%2Fss", "pr0xy", "MIIEv", "ZZZZ"]:
        assert leak not in clean
    assert "[redacted GITHUB_TOKEN]" in clean
    assert redact("nothing to hide", PLANTED) == "nothing to hide"


@given(st.lists(st.binary(max_size=12), max_size=20), st.lists(st.text("abc", min_size=3, max_size=6), min_size=1, max_size=4))
def test_a_stream_is_redacted_however_it_is_cut(chunks, secrets):
    text = b"".join(chunks) + secrets[0].encode() + b"".join(chunks[::-1])
    names = dict.fromkeys(secrets, "X")
    redactor = Redactor(names)
    pieces = [redactor.feed(text[start : start + 1 + len(text) % 5]) for start in range(0, len(text), 1 + len(text) % 5)]
    clean = b"".join(pieces) + redactor.end()
    whole = Redactor(names)
    assert clean == whole.feed(text) + whole.end()
    assert not any(secret.encode() in clean.replace(b"[redacted X]", b"|") for secret in secrets)
