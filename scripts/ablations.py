"""Ablations of train_mlx.py for benchmark.py: edits of the file's text, each of which removes or replaces one technique.

A night may change train_mlx.py. An ablation whose text is no longer in the file is reported and skipped; the others still run.
"""

from typing import Any

BASE = "train_mlx.py"
Edits = list[tuple[str, str]]
ROTATED = '''def rotated(t, base):
    half = t.shape[-1] // 2
    angle = mx.arange(t.shape[-2])[:, None] * base ** (-mx.arange(half) / half)
    cos, sin, a, b = mx.cos(angle).astype(t.dtype), mx.sin(angle).astype(t.dtype), t[..., :half], t[..., half:]
    return mx.concatenate([a * cos + b * sin, b * cos - a * sin], axis=-1)


def ngram_rows('''
INLINE = '''def inline(run, rows, seq_len):
    tokens, rng = run.tokens(), np.random.default_rng(run.seed)
    while True:
        starts = rng.integers(0, len(tokens) - seq_len, rows)
        block = tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int32)
        yield block[:, :-1], block[:, 1:]


def train('''
ABLATIONS: dict[str, tuple[str, dict[str, Any], Edits]] = {
    BASE: (BASE, {}, []),
    "attention by MLX's own": (BASE, {}, [("= attention(q, k, v,", "= mx.fast.scaled_dot_product_attention(q, k, v,")]),
    "MLX's own, with an array as mask": ("attention by MLX's own", {}, [
        ('= attention(q, k, v, scale=D**-0.5, mask="causal")',
         "= mx.fast.scaled_dot_product_attention(q, k, v, scale=D**-0.5, mask=mx.arange(T) <= mx.arange(T)[:, None])")]),
    "cross entropy by MLX's own": (BASE, {}, [("mx.mean(cross_entropy(", "mx.mean(mx.fast.cross_entropy(")]),
    "rms_norm written out": (BASE, {}, [
        ("return mx.fast.rms_norm(x, None, EPS)", "return x * mx.rsqrt(mx.mean(x * x, axis=-1, keepdims=True) + EPS)")]),
    "rope written out": (BASE, {}, [
        ("def ngram_rows(", ROTATED),
        ("mx.fast.rope(t, D, traditional=False, base=self._rope_base, scale=-1.0, offset=0)", "rotated(t, self._rope_base)")]),
    "relu² as a power": (BASE, {}, [("mx.square(mx.maximum(self.c_fc(x), 0))", "mx.maximum(self.c_fc(x), 0) ** 2")]),
    "softcap turned round": (BASE, {"SOFTCAP": "15.0 if TIER == 'cpu' else 0.0"}, []),
    "no dropout": (BASE, {}, [("ngrams, rates.get(\"dropout\"))", "ngrams, None)")]),
    "no n-grams (another model)": (BASE, {"NGRAM_BUCKETS": "()"}, []),
    "one row for each n-gram": (BASE, {}, [
        ("ngrams = params[NGRAMS][rows].sum(axis=(0, 1))", "ngrams = params[NGRAMS][rows[0]].sum(axis=0)"),
        ("self.ngrams(rows).astype(mx.float32).sum(axis=(0, 1))", "self.ngrams(rows[0]).astype(mx.float32).sum(axis=0)"),
        ("own = mixed(codes[-1]) & 1", "own = mixed(codes[-1]) & 0")]),
    "n-gram tables by AdamW": (BASE, {}, [
        ("        dense, ngrams = {n: p for n, p in params.items() if n != NGRAMS}, None\n",
         "        dense, ngrams = params, None\n"
         "        if NGRAMS in params:\n"
         "            def whole(params):\n"
         "                rows = ngram_rows(x, model.config.ngram_buckets)\n"
         "                return loss_fn(params, params[NGRAMS][rows].sum(axis=(0, 1)), rates, x, y)\n"
         "            return *mx.value_and_grad(whole)(params), None\n"),
        ("        if name == NGRAMS:\n            params[name]", "        if False:\n            params[name]"),
        ("    if NGRAMS in params:\n        moments[NGRAMS]", "    if False:\n        moments[NGRAMS]"),
        (" and n != NGRAMS}\n    if False", "}\n    if False")]),
    "Muon a matrix at a time": (BASE, {}, [
        ("        p, *moments[key] = muon(p, g, *moments[key], lr * MATRIX_LR, rates[\"momentum\"], rates[\"weight_decay\"])\n",
         "        one = [muon(*(a[i : i + 1] for a in (p, g, *moments[key])), lr * MATRIX_LR, rates[\"momentum\"],\n"
         "                    rates[\"weight_decay\"]) for i in range(len(names))]\n"
         "        p, *moments[key] = (mx.concatenate(parts) for parts in zip(*one, strict=True))\n")]),
    "five Newton-Schulz steps": (BASE, {"NEWTON_SCHULZ_STEPS": 5}, []),
    "micro-batches of a quarter of a step": (BASE, {"MICRO_TOKENS": "BATCH_TOKENS // 4"}, []),
    "passes one after the other": (BASE, {}, [("            async_eval(total, ", "            mx.async_eval(total, ")]),
    "each step awaited": (BASE, {}, [("mx.async_eval(params, moments, loss)", "mx.eval(params, moments, loss)")]),
    "loader in the loop": (BASE, {}, [("def train(", INLINE), ("batches = run.batches(micro_rows, seq_len)",
                                                              "batches = inline(run, micro_rows, seq_len)")]),
    "compile turned round": (BASE, {}, [("\nTIER = ", "\n(mx.disable_compile if GPU else mx.enable_compile)()\nTIER = ")]),
}

# AdamW for all weights, as the MLX fork trains: the optimizer of the anchor's other run
ADAMW_FOR_ALL: Edits = [('    return name.startswith("blocks.")', "    return False"),
                        ('return is_matrix(name) or name == "lm_head.weight"', 'return name.startswith(("blocks.", "lm_head."))')]
