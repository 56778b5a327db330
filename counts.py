"""
An n-gram model by counting: interpolated Kneser-Ney (Chen and Goodman, 1999, with one discount an order), in NumPy.

What a train file may mix its network with: `Counts.of(tokens, vocab_size, order)` reads millions of tokens in seconds, far more
than a network on a CPU is trained on in a minute, and `mixed(logits, rows, share)` mixes what the counts expect with what the
network does; `count` and `with_counts` are the two for a run. The network knows what words are like, the counts know what was said
before; together they are better than either.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from prepare_mlx import Run


def distinct(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """np.unique's values and inverse of whole numbers [N], in half the time: a plain sort, each number with its place."""
    bits = len(codes).bit_length()
    if int(codes.max()) >> (63 - bits):
        raise ValueError(f"{len(codes):,} tokens of this vocabulary are more than can be counted; count fewer")
    both = np.sort(codes << bits | np.arange(len(codes)))
    codes, places = both >> bits, both & ((1 << bits) - 1)
    new = np.concatenate([[True], codes[1:] != codes[:-1]])
    inverse = np.empty(len(codes), np.int64)
    inverse[places] = np.cumsum(new) - 1
    return codes[new], inverse


def repeats(row: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """For each place of a row, int [T]: how many tokens, `longest` at most, end there that stood in the row before (int64 [T],
    0: none), and the earlier places where so many do (bool [T, T], by place and earlier place)."""
    same = np.tril(row[:, None] == row, -1)                                     # [T, T]
    alike, length, places = same, np.zeros(len(row), np.int64), same
    for n in range(1, longest + 1):
        if n > 1:
            alike = same & np.pad(alike[:-1, :-1], ((1, 0), (1, 0)))  # n - 1 tokens before it are alike
        some = alike.any(axis=1)                                                # [T]
        length[some] = n
        places = np.where(some[:, None], alike, places)
    return length, places


def spread(tokens: np.ndarray, limit: int, pieces: int = 64) -> np.ndarray:
    """At most `limit` of the tokens [N], in pieces from all over the text: its beginning may be about something else."""
    if len(tokens) <= limit:
        return tokens
    size = max(1, limit // pieces)
    starts = np.linspace(0, len(tokens) - size, max(1, limit // size)).astype(np.int64)
    return np.concatenate([tokens[start : start + size] for start in starts])


class Counts:
    """Probabilities of the next token by the longest known n-gram before it, and by all shorter ones.

    A context of n tokens is a number from 0 on; it is found by the number of its last n - 1 tokens and its first token. For each
    n from 1 to order - 1 `arrays` has
        contexts.n  int64 [C], sorted: number of the shorter context * vocab_size + first token; the place is the number
        starts.n    int64 [C + 1]: where a context's words begin
        words.n     int32 [W]: tokens seen after it, context by context
        share.n     float32 [W]: their discounted probabilities
        rest.n      float32 [C]: what the discounts leave to the shorter context
    and `unigrams` float32 [vocab_size].
    """

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.arrays = arrays
        self.vocab_size = len(arrays["unigrams"])
        self.order = 1 + sum(name.startswith("words.") for name in arrays)

    @classmethod
    def of(cls, tokens: np.ndarray, vocab_size: int, order: int) -> "Counts":
        """Count whole numbers [N] below vocab_size; order: tokens of the longest n-gram, context and word, from 1 on."""
        if len(tokens) < 2 or order < 1:
            raise ValueError(f"at least two tokens and an order of at least 1 were expected, got {len(tokens)} and {order}")
        tokens, order = np.asarray(tokens).astype(np.int64), min(order, len(tokens) - 1)
        arrays, context = {}, np.zeros(len(tokens), np.int64)                   # of each token: the number of what is before it
        pairs, place = distinct(tokens)                                         # of context and word [W]; each token's pair
        pairs_of, times_of = [pairs], []                                        # by n: pairs, how often each counts [W]
        for n in range(1, order):
            shorter = place
            arrays[f"contexts.{n}"], context = distinct(context[1:] * vocab_size + tokens[:-n])
            pairs, place = distinct(context * vocab_size + tokens[n:])
            # A shorter n-gram counts once for each token that it follows: for each of these n-grams, without its first token
            somewhere = np.empty(len(pairs), np.int64)                          # a place of each; the shorter's is one further on
            somewhere[place] = np.arange(len(place))
            times_of.append(np.bincount(shorter[somewhere + 1], minlength=len(pairs_of[-1])))
            pairs_of.append(pairs)
        times_of.append(np.bincount(place))

        for n, (pairs, times) in enumerate(zip(pairs_of, times_of, strict=True)):
            once, twice = np.sum(times == 1), np.sum(times == 2)
            discount = np.clip(once / max(once + 2 * twice, 1), 0.1, 0.95)
            owner, word = np.divmod(pairs, vocab_size)                          # [W]
            size = len(arrays[f"contexts.{n}"]) if n else 1
            total = np.bincount(owner, times, size)                             # [C]; 0: stood at the text's beginning only
            share = np.maximum(times - discount, 0) / np.maximum(total, 1)[owner]
            rest = np.where(total > 0, discount * np.bincount(owner, times > 0, size) / np.maximum(total, 1), 1)
            if n == 0:
                arrays["unigrams"] = (rest / vocab_size + np.bincount(word, share, vocab_size)).astype(np.float32)
            else:
                arrays[f"starts.{n}"] = np.searchsorted(owner, np.arange(size + 1))
                arrays[f"words.{n}"], arrays[f"share.{n}"] = word.astype(np.int32), share.astype(np.float32)
                arrays[f"rest.{n}"] = rest.astype(np.float32)
        return cls(arrays)

    def save(self, path: Path) -> None:
        np.savez(path, **self.arrays)

    @classmethod
    def load(cls, path: Path) -> "Counts":
        with np.load(path) as file:
            return cls(dict(file))

    def find(self, rows: np.ndarray) -> list[np.ndarray]:
        """The context of each length from 0 on that ends at a token, -1 where unknown: int [B, T] -> int64 [B, T] each."""
        found = [np.zeros(rows.shape, np.int64)]
        for n in range(1, self.order):
            known = self.arrays[f"contexts.{n}"]
            code = np.full(rows.shape, -1, np.int64)  # a row's first tokens have no context so long
            before = found[-1][:, n - 1 :]
            code[:, n - 1 :] = np.where(before >= 0, before * self.vocab_size + rows[:, : before.shape[1]], -1)
            place = np.minimum(np.searchsorted(known, code), len(known) - 1)
            found.append(np.where(known[place] == code, place, -1))
        return found

    def probabilities(self, rows: np.ndarray) -> np.ndarray:
        """Of every token to be the next, by the row so far alone: int [B, T] -> float32 [B, T, vocab_size], which add up to 1."""
        found = [numbers.reshape(-1) for numbers in self.find(rows)]            # [B * T] each
        weight, weights = np.ones(rows.size, np.float32), {}
        for n in range(self.order - 1, 0, -1):  # from the longest on, what is left to the shorter ones
            weights[n] = weight
            weight = np.where(found[n] >= 0, weight * self.arrays[f"rest.{n}"][found[n]], weight)
        out = np.outer(weight, self.arrays["unigrams"])                         # [B * T, V]
        for n in range(1, self.order):
            starts = self.arrays[f"starts.{n}"]
            at = np.flatnonzero(found[n] >= 0)
            begin, end = starts[found[n][at]], starts[found[n][at] + 1]
            where = np.repeat(at, end - begin)                                  # [K]: a place for each word that followed
            entry = np.arange(len(where)) + np.repeat(end - np.cumsum(end - begin), end - begin)
            out[where, self.arrays[f"words.{n}"][entry]] += weights[n][where] * self.arrays[f"share.{n}"][entry]
        return out.reshape(*rows.shape, self.vocab_size)

    def mixed(self, logits: np.ndarray, rows: np.ndarray, share: float, copied: tuple[float, ...] = ()) -> np.ndarray:
        """Logits of a mixture of a network and the counts for the rows, int [B, T], from the network's, float32 [B, T, V].

        Half of it is the sum of both probabilities, the counts' with `share` as weight, the network's with the rest; half is
        the product of their powers with the same weights, which says no where either does.
        copied: the shares of what followed in the row itself when its last 1, 2, ... tokens stood there before, the longest match.
        """
        out = np.empty_like(logits)
        for row, network, mixture in zip(rows, logits, out, strict=True):  # one row at a time stays in the cache
            p = np.exp(network - network.max(axis=-1, keepdims=True))           # [T, V]
            p /= p.sum(axis=-1, keepdims=True)
            q = self.probabilities(row[None])[0]                                # [T, V]
            product = p ** (1 - share) * q**share
            p = ((1 - share) * p + share * q + product / product.sum(axis=-1, keepdims=True)) / 2
            length, places = repeats(row, len(copied))                          # [T], [T, T]
            weight = np.array([0.0, *copied], np.float32)[length]               # [T]
            p *= 1 - weight[:, None]
            t, earlier = np.nonzero(places)
            np.add.at(p, (t, row[earlier + 1]), (weight / np.maximum(places.sum(axis=1), 1))[t])
            np.log(np.maximum(p, 1e-30), out=mixture)  # a share of 0 or 1 may leave nothing of a token
        return out


def count(run: Run, order: int, most: int, rate: float) -> None:
    """Count the n-grams of a run's training text into its directory, from all over the text: they know more of it than a network
    is trained on. order: as in Counts.of, 0 for no counts; most: tokens; rate: and at most so many a second of the budget."""
    (run.dir / "counts.npz").unlink(missing_ok=True)
    if order:
        limit = min(most, int(rate * run.budget.amount)) if run.budget.unit == "s" else most
        Counts.of(spread(run.tokens(), limit), run.vocab_size, order).save(run.dir / "counts.npz")


def with_counts(logits: Callable[[np.ndarray], np.ndarray], run_dir: Path, share: float, copied: tuple[float, ...]) -> Callable:
    """A network's logits(tokens), mixed with the counts that `count` left in its run directory; the same where it left none."""
    if not (run_dir / "counts.npz").exists():
        return logits
    counts = Counts.load(run_dir / "counts.npz")
    return lambda tokens: counts.mixed(logits(tokens), tokens, share, copied)
