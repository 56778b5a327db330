"""
A lossless tokenizer: SentencePiece BPE with byte fallback, or plain bytes.

`Tokenizer.train(texts, vocab_size)` learns the merges; `Tokenizer(model)` loads them. The score uses `token_bytes`:
the byte lengths of a text's tokens sum to its UTF-8 length, so that bits per byte are comparable between vocabularies.
"""

import io
import os
import re
from collections.abc import Iterator

import numpy as np

from harness import HarnessError

# Pieces that no merge may cross, close to GPT-4's pattern: a word with the space before it, up to three digits, punctuation with
# the line ends after it. Only training uses the pattern: the learned tokens respect it, so that encoding does not split text.
LETTER = r"[^\W\d_]"
PIECES = re.compile(rf"'(?:[sdmt]|ll|ve|re)|[^\r\n\w]?{LETTER}+|\d{{1,3}}| ?(?:[^\s\w]|_)+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+", re.I)
BORDER = "\ue000"               # separates pieces in training; a private-use character, harmless if a text contains it


def rare_characters(parts: list[str], vocab_size: int) -> dict[int, str]:
    """The characters of a text that get no token of their own, as a table for str.translate that puts a border in their place.
    The most frequent ones get a token: those that make up 99.95 % of the text, if three quarters of the vocabulary suffice."""
    counts = np.zeros(0x110000, np.int64)
    for part in parts:
        points, seen = np.unique(np.frombuffer(part.encode("utf-32-le"), np.uint32), return_counts=True)
        counts[points] += seen
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    share = (np.cumsum(counts[order]) - counts[order]) / max(counts.sum(), 1)   # of the more frequent characters
    frequent = np.count_nonzero(share < (0.9995 if vocab_size >= 1024 else 0.99))
    return {int(point): BORDER for point in order[min(frequent, (vocab_size - 259) * 3 // 4) :]}


class Tokenizer:
    """Text to token ids and back: `decode(encode(s)) == s`, and `token_bytes` of the ids sum to the UTF-8 length of `s`.

    model: a serialised SentencePiece model, or b"" for plain bytes with ids 0..255. There 255, which UTF-8 never uses, is the
    document mark `bos_id`. token_bytes: int64 [vocab_size], taken from each token's piece: decoding a part of a character would
    give U+FFFD, which has 3 bytes.
    """

    def __init__(self, model: bytes = b""):
        self.model = model
        if model:
            import sentencepiece
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.vocab_size, self.bos_id = self._sp.vocab_size(), self._sp.bos_id()
            self.pieces = [self._piece(i) for i in range(self.vocab_size)]
        else:
            self.vocab_size, self.bos_id = 256, 255
            self.pieces = [bytes([i]) for i in range(255)] + [b""]
        self.token_bytes = np.array([len(p) for p in self.pieces], dtype=np.int64)  # [vocab]

    def _piece(self, i: int) -> bytes:
        piece = "" if self._sp.is_control(i) or self._sp.is_unknown(i) else self._sp.id_to_piece(i)
        return bytes([int(piece[3:-1], 16)]) if self._sp.is_byte(i) else piece.replace("\u2581", " ").encode()

    @classmethod
    def train(cls, texts: Iterator[str], vocab_size: int) -> "Tokenizer":
        """Learn the merges from training texts. 256 tokens give plain bytes.

        Letters that are too rare for the vocabulary, as most Chinese ones are for 1,024 tokens, are encoded as bytes.
        Errors: HarnessError("usage") for another vocabulary below 320, ("data") if SentencePiece cannot learn from the texts.
        """
        if vocab_size == 256:
            return cls()
        if vocab_size < 320:
            raise HarnessError("usage", f"vocab_size {vocab_size}: expected 256 (plain bytes) or at least 320 (bytes and letters)")
        import sentencepiece
        model = io.BytesIO()
        parts = [text[i : i + 50_000] for text in texts for i in range(0, len(text), 50_000)]
        rare = rare_characters(parts, vocab_size)
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(BORDER.join(PIECES.findall(part)).translate(rare) for part in parts),
                model_writer=model, pretokenization_delimiter=BORDER, split_by_unicode_script=False, split_by_number=False,
                model_type="bpe", vocab_size=vocab_size, hard_vocab_limit=False, byte_fallback=True,
                character_coverage=1.0,  # without the rare characters, which are encoded as bytes
                required_chars="\u2581",  # how SentencePiece writes a space: without it a rare space would come back as U+2581
                normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True, max_sentence_length=1 << 20,
                unk_id=0, bos_id=1, eos_id=-1, pad_id=-1, num_threads=os.cpu_count() or 1, minloglevel=2)
        except RuntimeError as error:
            raise HarnessError("data", f"this text does not give a tokenizer of {vocab_size} tokens; try another --vocab-size, 256 "
                               f"for plain bytes ({error})") from error
        return cls(model.getvalue())

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Errors: HarnessError("data") for a lone surrogate, which UTF-8 cannot encode."""
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise HarnessError("data", f"expected text that UTF-8 can encode, got a lone surrogate at {error.start}") from error
        if not self.model:
            return list(data)
        ids: list[int] = []
        for i, part in enumerate(text.split("\u2581")):  # SentencePiece writes spaces as U+2581: encode a real one as bytes
            ids += [self._sp.piece_to_id(f"<0x{b:02X}>") for b in "\u2581".encode()] if i else []
            ids += self._sp.encode(part)
        return ids

    def encode_documents(self, texts: list[str]) -> np.ndarray:
        """Encode documents one after another, each after a document mark: uint16 [n], or uint32 for a vocabulary beyond 65,536.
        Errors: those of `encode`."""
        dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        return np.concatenate([np.empty(0, dtype), *(np.array([self.bos_id, *self.encode(text)], dtype) for text in texts)])

    def decode_bytes(self, ids) -> bytes:
        """The bytes of token ids; document marks have none."""
        return b"".join(self.pieces[i] for i in ids)

    def decode(self, ids) -> str:
        """The text of token ids. Bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")
