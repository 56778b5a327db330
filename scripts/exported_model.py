"""The model file of an exported folder: the trained model behind the interface that mlx-lm expects.

scripts/export.py copies this file to OUT/model.py, the run directory to OUT/run and the code that the model needs to OUT/code.
"""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

HERE = Path(__file__).resolve().parent


@dataclass
class ModelArgs:
    model_type: str
    context: int
    train_file: str

    @classmethod
    def from_dict(cls, config: dict) -> "ModelArgs":
        return cls(config["model_type"], config["max_position_embeddings"], config["train_file"])


class Tokens:
    """The cache of one conversation in mlx-lm's interface: the tokens so far, and `decoding.Cached` with their keys and values."""

    def __init__(self, next_logits):
        self.tokens, self.next_logits = [], next_logits

    @property
    def state(self):
        return mx.array(self.tokens, mx.int32) if self.tokens else mx.zeros((0,), mx.int32)

    @state.setter
    def state(self, value):
        self.tokens = value.tolist()
        self.next_logits.forget()

    meta_state = ""
    offset = property(lambda self: len(self.tokens))
    nbytes = property(lambda self: 4 * len(self.tokens) + sum(k.nbytes + v.nbytes for k, v in self.next_logits.layers))

    def empty(self):
        return not self.tokens

    def is_trimmable(self):
        return True

    def trim(self, n):
        n = min(n, len(self.tokens))
        self.tokens = self.tokens[: len(self.tokens) - n]
        self.next_logits.forget()
        return n


class Model(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args, self.model_type = args, args.model_type
        sys.path.insert(0, str(HERE / "code"))
        from decoding import Cached

        spec = importlib.util.spec_from_file_location("trained", HERE / "run" / args.train_file)
        trained = importlib.util.module_from_spec(spec)
        sys.modules["trained"] = trained
        spec.loader.exec_module(trained)
        mx.disable_compile()  # a compiled function would not see the cache
        self._logits = trained.load_model(HERE / "run")
        self._cache = lambda: Cached(self._logits, args.context, trained)

    def __call__(self, inputs, cache=None, **_):
        """Logits at the positions of the new tokens: int [1, n] -> [1, n, vocab]. The cache has the tokens before them."""
        new, before = inputs[0].tolist(), cache[0].tokens if cache else []
        tokens = [*before, *new]
        if cache:
            cache[0].tokens = tokens
            if len(new) == 1:
                return mx.array(cache[0].next_logits(tokens).astype(np.float32))[None, None]
        rows, context = [], self.args.context
        for end in range(len(tokens), len(tokens) - len(new), -context):
            start = max(0, end - context)
            row = np.zeros((1, context), np.int32)  # always the same shape, padded at the end
            row[0, : end - start] = tokens[start:end]
            wanted = min(context, end - (len(tokens) - len(new)))
            rows.insert(0, self._logits(row)[:, end - start - wanted : end - start])
        return mx.array(np.concatenate(rows, axis=1))

    def sanitize(self, weights):
        return {}  # load_model of the train file has already loaded the weights

    @property
    def layers(self):
        return [None]

    def make_cache(self):
        return [Tokens(self._cache())]
