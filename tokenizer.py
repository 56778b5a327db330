"""
Text <-> token ids without loss: SentencePiece BPE with byte fallback, or plain bytes.

`Tokenizer.train(texts, vocab_size)` learns the merges, `Tokenizer(model)` reads what `.model` holds. What the score needs is
`token_bytes`: the bytes of every token, which add up to the text's, so that bits per byte are the same for every vocabulary.
"""

import io
import os
import re
from collections.abc import Iterator

import numpy as np

from prepare_mlx import HarnessError

# Where merges end, close to GPT-4's pattern: words with the space before, numbers by three digits, signs with the line ends
# after. Only learning the merges sees it: pieces end there, and text that is encoded needs no cutting.
LETTER = r"[^\W\d_]"
PIECES = re.compile(rf"'(?:[sdmt]|ll|ve|re)|[^\r\n\w]?{LETTER}+|\d{{1,3}}| ?(?:[^\s\w]|_)+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+", re.I)
BORDER = "\ue000"               # between them; private use, and no harm where a text has it


class Tokenizer:
    """Text <-> token ids without loss: `decode(encode(s)) == s`, and the token_bytes of its ids add up to its UTF-8 length.

    `model` is a serialised SentencePiece model, or empty for plain bytes: ids 0..255, where 255, which UTF-8 never uses,
    is the document mark. A token's bytes come from its piece, never through decode (which would count U+FFFD as 3).
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
        """Learn the merges. Errors: HarnessError("usage") for a vocabulary below the 256 bytes and the marks."""
        if vocab_size == 256:
            return cls()
        if vocab_size < 320:
            raise HarnessError("usage", f"vocab_size {vocab_size}: expected 256 (plain bytes) or at least 320 (bytes and letters)")
        import sentencepiece
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(BORDER.join(PIECES.findall(text[i : i + 50_000])) for text in texts
                                   for i in range(0, len(text), 50_000)),
                model_writer=model, pretokenization_delimiter=BORDER, split_by_unicode_script=False, split_by_number=False,
                model_type="bpe", vocab_size=vocab_size, hard_vocab_limit=False, byte_fallback=True,
                character_coverage=0.9995 if vocab_size >= 1024 else 0.99,  # rarer letters are left to their bytes
                normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True, max_sentence_length=1 << 20,
                unk_id=0, bos_id=1, eos_id=-1, pad_id=-1, num_threads=os.cpu_count() or 1, minloglevel=2)
        except RuntimeError as error:
            raise HarnessError("data", f"no tokenizer of {vocab_size} tokens could be made of this text: {error}") from error
        return cls(model.getvalue())

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Errors: HarnessError("data") for lone surrogates, which no UTF-8 text has."""
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise HarnessError("data", f"expected text that UTF-8 can hold, got a lone surrogate at {error.start}") from error
        if not self.model:
            return list(data)
        ids: list[int] = []
        for i, part in enumerate(text.split("\u2581")):  # SentencePiece writes its spaces so; a real one goes as bytes
            ids += [self._sp.piece_to_id(f"<0x{b:02X}>") for b in "\u2581".encode()] if i else []
            ids += self._sp.encode(part)
        return ids

    def encode_documents(self, texts: list[str]) -> np.ndarray:
        """uint16 or uint32 [n]: the documents one after another, each begun by the document mark."""
        dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        return np.concatenate([np.empty(0, dtype), *(np.array([self.bos_id, *self.encode(text)], dtype) for text in texts)])

    def decode_bytes(self, ids) -> bytes:
        return b"".join(self.pieces[i] for i in ids)

    def decode(self, ids) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")
