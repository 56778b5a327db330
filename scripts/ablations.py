"""What benchmark.py takes out of train_mlx.py, one technique at a time. When the file changes, this table follows it."""

from typing import Any

BASE = "train_mlx.py"
Edits = list[tuple[str, str]]
WINDOWS = {"WINDOW_PATTERN": '"S"', "SEQ_LEN": 2048}                            # SEQ_LEN: the data's, so that windows are shorter
ROTATED = '''def rotated(t, base):
    half = t.shape[-1] // 2
    angle = mx.arange(t.shape[-2])[:, None] * base ** (-mx.arange(half) / half)
    cos, sin, a, b = mx.cos(angle).astype(t.dtype), mx.sin(angle).astype(t.dtype), t[..., :half], t[..., half:]
    return mx.concatenate([a * cos + b * sin, b * cos - a * sin], axis=-1)


def attend('''
INLINE = '''def inline(run, rows, seq_len):
    tokens, rng = run.tokens(), np.random.default_rng(run.seed)
    while True:
        starts = rng.integers(0, len(tokens) - seq_len, rows)
        block = tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int32)
        yield block[:, :-1], block[:, 1:]


def train('''
STARTS = "[0, *range(window, T, max(1, -(-(T - window) // 3)))] if GPU else range(0, T, 64)"
FUSED: Edits = [  # as on a GPU
    ("if GPU else range(0, T, 64)", "if True else range(0, T, 64)"),
    ("        if GPU:\n            mask", "        if True:\n            mask"),
]
ABLATIONS: dict[str, tuple[str, dict[str, Any], Edits]] = {
    BASE: (BASE, {}, []),
    "attention by MLX's own": (BASE, {}, FUSED),
    "MLX's own, with an array as mask": ("attention by MLX's own", {}, [
        *FUSED, ('mask = "causal" if stop <= window + 1 else seen', "mask = seen")]),
    "attention in one piece": (BASE, {}, [(STARTS, "[0]")]),
    "windows (S), banded": (BASE, WINDOWS, []),
    "windows (S), dense mask": ("windows (S), banded", WINDOWS, [
        (STARTS, "[0]"), ("first = max(0, start - window)", "first = 0")]),
    "rms_norm written out": (BASE, {}, [
        ("return mx.fast.rms_norm(x, None, EPS)", "return x * mx.rsqrt(mx.mean(x * x, axis=-1, keepdims=True) + EPS)")]),
    "rope written out": (BASE, {}, [
        ("def attend(", ROTATED),
        ("mx.fast.rope(t, D, traditional=False, base=self._rope_base, scale=-1.0, offset=0)", "rotated(t, self._rope_base)")]),
    "relu² as a power": (BASE, {}, [("mx.square(mx.maximum(self.c_fc(x), 0))", "mx.maximum(self.c_fc(x), 0) ** 2")]),
    "cross entropy by logsumexp": (BASE, {}, [
        ('targets int [N] -> fp32 [N]."""\n',
         'targets int [N] -> fp32 [N]."""\n'
         "    return mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]\n")]),
    "MLX's own exp": (BASE, {}, [("exp(logits - largest)", "mx.exp(logits - largest)"), ("weights = exp(", "weights = mx.exp(")]),
    "exp as a power of e": (BASE, {}, [
        ("exp(logits - largest)", "mx.power(math.e, logits - largest)"), ("weights = exp(", "weights = mx.power(math.e, ")]),
    "loss in four chunks": (BASE, {"LOSS_TOKENS": "BATCH_TOKENS // 4"}, []),
    "softcap turned round": (BASE, {"SOFTCAP": "15.0 if TIER == 'cpu' else 0.0"}, []),
    "no n-grams (another model)": (BASE, {"NGRAM_BUCKETS": "()"}, []),
    "a look-up for each n-gram table": (BASE, {}, [
        ("table[seen].astype(mx.float32).sum(axis=0)", "sum(table[r].astype(mx.float32) for r in seen)")]),
    "n-gram tables by AdamW": (BASE, {}, [
        ("        ngrams, rows = model.embed_ngrams(x, params[NGRAMS], again) if NGRAMS in params else (None, None)\n", ""),
        ("        if rows is None:\n            return *mx.value_and_grad(loss_fn)(dense, x, y, hidden, ngrams), None",
         "        def whole(params, *rest):\n"
         "            return loss_fn(params, *rest, model.embed_ngrams(x, params[NGRAMS])[0])\n"
         "        return *mx.value_and_grad(whole)(params, x, y, hidden), None"),
        ("for n, p in params.items() if n != NGRAMS}, mx.array(0.0)", "for n, p in params.items()}, mx.array(0.0)"),
        ("    if NGRAMS in grads:\n        new[NGRAMS]", "    if False:\n        new[NGRAMS]"),
        ("    if NGRAMS in params:\n        state[NGRAMS]", "    if False:\n        state[NGRAMS]"),
        (" and n != NGRAMS}\n", "}\n"),
        (" and name != NGRAMS:\n", ":\n")]),
    "Muon a matrix at a time": (BASE, {}, [
        ("            p, *moments[key] = muon(p, g, *state[key], lr * MATRIX_LR, momentum, weight_decay)\n",
         "            one = [muon(*(a[i : i + 1] for a in (p, g, *state[key])), lr * MATRIX_LR, momentum, weight_decay)\n"
         "                   for i in range(len(names))]\n"
         "            p, *moments[key] = (mx.concatenate(parts) for parts in zip(*one, strict=True))\n")]),
    "five Muon iterations": (BASE, {"POLAR_STEPS": 5}, []),
    "one lane, BLAS with all cores": (BASE, {}, [
        ("range(min(4, cores))", "range(1)"), ("load_fast_blas(threads=1)", "load_fast_blas()")]),
    "one lane, BLAS with one core": (BASE, {}, [("range(min(4, cores))", "range(1)")]),
    "passes of a quarter of a step": (BASE, {"MICRO_TOKENS": "BATCH_TOKENS // 4"}, []),
    "each step awaited": (BASE, {}, [("mx.async_eval(params, state, loss)", "mx.eval(params, state, loss)")]),
    "loader in the loop": (BASE, {}, [("def train(", INLINE), ("batches = run.batches(a_pass, seq_len)",
                                                              "batches = inline(run, a_pass, seq_len)")]),
    "compile turned round": (BASE, {}, [  # on the CPU it is off
        ("    mx.disable_compile()", "    pass"), ("\nLANES = [", "\nif GPU:\n    mx.disable_compile()\nLANES = [")]),
    "MLX's own BLAS": (BASE, {}, [("load_fast_blas(threads=1)  # has", "pass  # has")]),
}

# The anchor's other optimizer: what the MLX fork does, no Muon
ADAMW_FOR_ALL: Edits = [('return name.startswith("blocks.")', "return False")]
