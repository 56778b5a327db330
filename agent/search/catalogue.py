"""The catalogue of changes that the search can try: constants and their values, numbers in the code, alternative pieces of code.

`agent/search/changes.py` turns the catalogue into edits of a train file. Changes that follow rules of their own (shapes, batches,
tables) are made there. A prior is an estimate of the probability that a change of this kind helps a training of a few minutes.
"""

from __future__ import annotations

from dataclasses import dataclass

SURE, FIRST, HIGH, MEDIUM, LOW = 0.85, 0.45, 0.3, 0.12, 0.05
FEW_STEPS = 150  # a training with fewer optimizer steps than this almost surely gains from more and smaller steps
SMALLEST_TABLE, LARGEST_TABLE = 512, 2**20  # rows of an n-gram table


@dataclass(frozen=True)
class Knob:
    """A number that can be changed. With a `ladder` of sensible values, the next two in each direction are tried; without one, the
    number is multiplied and divided by `factors`.

    A knob without a `pattern` is the constant named `key`. A knob with one is a number in the code of the class or function
    `scope`: group 1 of the pattern is the number, or the text that `template` makes of it, which is missing if the number is
    `default`.
    """

    key: str
    prior: float
    why: str
    down: float | None = None  # prior of a smaller value, if it differs from `prior`
    ladder: tuple[float, ...] = ()
    factors: tuple[float, ...] = (1.5, 2.0, 1.25)
    low: float = 0.0  # smallest value that `factors` may give
    high: float = float("inf")  # largest value that `factors` may give
    off: bool = False  # whether to try 0, which switches the mechanism off
    on: tuple[float, ...] = ()  # values to try if it is switched off
    scope: str = ""
    pattern: str = ""
    template: str = ""
    default: float | None = None


@dataclass(frozen=True)
class Switch:
    """Alternative pieces of code within the class or function `scope`. forms: label -> the texts, in the order in which they
    occur."""

    key: str
    prior: float
    why: str
    forms: dict[str, tuple[str, ...]]
    scope: str = ""
    remarks: dict[str, str] | None = None  # label -> comment or docstring that changes with the form, if it is found
    others: dict[str, float] | None = None  # label -> prior of a form, if it differs from `prior`


KNOBS = (
    Knob("MATRIX_LR", FIRST, "the step of the matrices decides most of a short run", factors=(2.0, 1.5, 1.25)),
    Knob("EMBEDDING_LR", HIGH, "tables see few tokens in a short run, their step must fit"),
    Knob("NGRAM_LR", HIGH, "a row of the n-gram tables is seen a few times only, its step must fit",
         ladder=(0.5, 1, 1.5, 2, 3, 4, 6, 8)),
    Knob("UNEMBEDDING_LR", MEDIUM, "the head's step sets how fast the logits sharpen"),
    Knob("SCALAR_LR", MEDIUM, "the residual scalars may move too slowly or too fast", factors=(2.0, 1.5)),
    Knob("WEIGHT_DECAY", MEDIUM, "the right decay depends on the number of steps",
         ladder=(0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)),
    Knob("WARMDOWN_RATIO", HIGH, "the length of the warmdown trades progress for settling",
         ladder=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)),
    Knob("FINAL_LR_FRAC", MEDIUM, "a rate that does not end at zero keeps the last steps useful",
         ladder=(0, 0.02, 0.05, 0.1, 0.15, 0.2)),
    Knob("WARMUP_RATIO", LOW, "a short warm-up may tame the first steps", ladder=(0, 0.01, 0.02, 0.05)),
    Knob("ADAM_BETAS[0]", MEDIUM, "few steps want a mean that forgets at another rate",
         ladder=(0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)),
    Knob("ADAM_BETAS[1]", MEDIUM, "small batches want a longer mean square", ladder=(0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995)),
    Knob("MUON_MOMENTUM[0]", LOW, "the first steps want another momentum", ladder=(0.7, 0.8, 0.85, 0.9, 0.95)),
    Knob("MUON_MOMENTUM[1]", MEDIUM, "momentum has to fit the number of steps", ladder=(0.85, 0.9, 0.93, 0.95, 0.97, 0.98)),
    Knob("MUON_MOMENTUM[2]", LOW, "momentum may reach its end sooner or later", ladder=(25, 50, 100, 200, 300, 500, 1000)),
    Knob("NEWTON_SCHULZ_STEPS", MEDIUM, "fewer steps orthogonalize less exactly and cost less", ladder=(3, 4, 5)),
    Knob("MUON_BETA2", LOW, "the rows' mean square may be remembered longer or shorter", ladder=(0.8, 0.9, 0.95, 0.98, 0.99)),
    Knob("SOFTCAP", MEDIUM, "the cap on logits limits confidence and costs a tanh", ladder=(5, 10, 15, 20, 30, 50), off=True,
         on=(15, 30)),
    Knob("ROPE_BASE", MEDIUM, "the slowest rotation has to fit the context",
         ladder=(500, 1000, 2000, 5000, 10_000, 30_000, 100_000, 200_000)),
    Knob("DEPTH", FIRST, "another layer buys capacity for speed, one less the reverse", ladder=tuple(range(1, 33))),
    Knob("GATE_CHANNELS", LOW, "gates may read more or fewer channels", ladder=(8, 16, 32, 64, 128)),
    Knob("NGRAM_BUCKETS[0]", HIGH, "fewer collisions of bigrams against rarer updates; rows cost memory, no time", down=MEDIUM,
         factors=(2.0, 4.0), low=SMALLEST_TABLE, high=LARGEST_TABLE),
    Knob("NGRAM_BUCKETS[1]", HIGH, "fewer collisions of trigrams against rarer updates; rows cost memory, no time", down=MEDIUM,
         factors=(2.0, 4.0), low=SMALLEST_TABLE, high=LARGEST_TABLE),
    Knob("QK gain", HIGH, "sharper attention from normed queries and keys", ladder=(1, 1.1, 1.2, 1.35, 1.5, 1.75),
         scope="CausalSelfAttention", pattern=r"\(((?:[\d.]+ \* )?)norm\(mx\.fast\.rope", template="{} * ", default=1),
    Knob("init scale", MEDIUM, "smaller first matrices turn faster under equal steps", ladder=(0.4, 0.5, 0.68, 0.8, 1, 1.25),
         scope="GPT", pattern=r"\bs = ((?:[\d.]+ \* )?)3\*\*0\.5", template="{} * ", default=1),
    Knob("x0 init", MEDIUM, "how much of the embedding every layer sees at first", ladder=(0, 0.05, 0.1, 0.2, 0.3),
         scope="GPT", pattern=r'"x0_lambdas":\s+p = mx\.full\(p\.shape, ([\d.]+)\)'),
    Knob("wte init", LOW, "a smaller first embedding learns faster in relation", ladder=(0.25, 0.5, 1, 2),
         scope="GPT", pattern=r'"wte\.weight":\s+p = ((?:[\d.]+ \* )?)mx\.random\.normal', template="{} * ", default=1),
    Knob("lm_head init", LOW, "where the logits begin", ladder=(0.0003, 0.001, 0.003, 0.01, 0.03),
         scope="GPT", pattern=r'"lm_head\.weight":\s+p = ([\d.]+) \* mx\.random\.normal'),
    Knob("MLP ratio", MEDIUM, "width of the MLP against speed", ladder=(2, 3, 4, 5, 6),
         scope="MLP", pattern=r"(\d+) \* config\.n_embd"),
    Knob("resid lr", LOW, "residual weights move at a share of the scalars' rate", ladder=(0.001, 0.003, 0.01, 0.03, 0.1),
         scope="adam_group", pattern=r"SCALAR_LR \* ([\d.]+)"),
)  # fmt: skip

_RELU2 = "mx.square(mx.maximum(self.c_fc(x), 0))"
_FC = "self.c_fc = nn.Linear(config.n_embd, {0} * config.n_embd, bias=False)"
_PROJ = "self.c_proj = nn.Linear({0} * config.n_embd, config.n_embd, bias=False)"
_BLOCK = "x = block(resid[i] * x + skip[i] * x0, ve)"
_HEAD = "self.lm_head(dropout(norm({0}), dropout_rate))"
_EMBED, _OUT = "x = x0 = dropout(norm(x.astype(DTYPE)), dropout_rate)", "self.c_proj = nn.Linear(C, C, bias=False)"
_OUT_GATE = "\n        self.out_gate = nn.Linear(min(GATE_CHANNELS, C), config.n_head, bias=False)"
_VE_GATE = """
        if has_ve(layer, config.n_layer):
            self.ve_gate = nn.Linear(min(GATE_CHANNELS, C), config.n_head, bias=False)"""
_GATED = """gate = 2 * mx.sigmoid(self.ve_gate(x[..., :GATE_CHANNELS]))         # [B, T, H]
            v = v + gate[..., None] * ve.reshape(B, T, H, D)"""
_ATTENTION = "y.transpose(0, 2, 1, 3)"
_BEFORE = "mx.pad(x[:, :-1], [(0, 0), (1, 0), (0, 0)])"
_MIDDLE = "\n            middle = x if i == (len(self.blocks) - 1) // 2 else middle if i else None"
_LOGITS = "with_weights(model, dense)(x, ngrams, rates.get(\"dropout\"))"
_ZLOSS = " + 1e-4 * mx.square(mx.logsumexp(logits, axis=-1))"
_UNIT_ROWS = "u * mx.rsqrt(mx.mean(mx.square(u), axis=2, keepdims=True) + 1e-20)"

SWITCHES = (
    Switch("activation", MEDIUM, "which activation is best differs by size and machine", {
        "relu2": (_RELU2,),
        "silu": ("nn.silu(self.c_fc(x))",),
        "gelu": ("nn.gelu_approx(self.c_fc(x))",),
        "leaky-relu2": ("mx.square(nn.leaky_relu(self.c_fc(x), 0.3))",),
    }, scope="MLP", remarks={"relu2": "# relu²", "silu": "# SiLU", "gelu": "# GELU", "leaky-relu2": "# leaky relu²"}),
    Switch("MLP", MEDIUM, "a gated MLP of about equal cost", {
        "plain": (_FC.format(4), _PROJ.format(4), _RELU2),
        "SwiGLU": (_FC.format(3) + "\n        " + _FC.format(3).replace("c_fc", "c_up"), _PROJ.format(3),
                   "nn.silu(self.c_fc(x)) * self.c_up(x)"),
    }, scope="MLP", remarks={"plain": "# relu²", "SwiGLU": "# SwiGLU"}),
    Switch("value embeddings", MEDIUM, "value embeddings are table look-ups, nearly free", {
        "alternate": ("return layer % 2 == (n_layer - 1) % 2",),
        "all": ("return layer < n_layer",),
        "last": ("return layer == n_layer - 1",),
        "none": ("return layer < 0",),
    }, scope="has_ve", remarks={
        "alternate": "Every second layer has value embeddings, the last one included.",
        "all": "Every layer has value embeddings.",
        "last": "The last layer has value embeddings.",
        "none": "No layer has value embeddings.",
    }, others={"last": LOW, "none": LOW, "alternate": MEDIUM}),
    Switch("value gate", LOW, "a gate less is a matrix less to train", {
        "on": (_OUT_GATE + _VE_GATE, _GATED),
        "off": (_OUT_GATE, "v = v + ve.reshape(B, T, H, D)"),
    }, scope="CausalSelfAttention"),
    Switch("attention output gate", MEDIUM, "a head that has nothing to say can be silent", {
        "off": (_OUT, f"return self.c_proj({_ATTENTION}.reshape(B, T, C))"),
        "on": (_OUT + _OUT_GATE,
               "gate = 2 * mx.sigmoid(self.out_gate(x[..., :GATE_CHANNELS]))            # [B, T, H]: a head can be silent\n"
               f"        return self.c_proj(({_ATTENTION} * gate[..., None]).reshape(B, T, C))"),
    }),
    Switch("norm after sublayer", MEDIUM, "a norm after each sublayer keeps the residual stream even", {
        "off": ("x = x + self.attn(norm(x), ve)", "return x + self.mlp(norm(x))"),
        "on": ("x = x + norm(self.attn(norm(x), ve))", "return x + norm(self.mlp(norm(x)))"),
    }, scope="Block"),
    Switch("smeared embedding", MEDIUM, "the token before, mixed into the embedding, gives attention a head start", {
        "off": (_EMBED,),
        "0.1": (f"x = x + 0.1 * {_BEFORE}\n        " + _EMBED,),
        "0.3": (f"x = x + 0.3 * {_BEFORE}\n        " + _EMBED,),
    }, scope="GPT"),
    Switch("middle layer backed out", MEDIUM, "what the middle of the network computed need not reach the head", {
        "off": (_BLOCK, _HEAD.format("x")),
        "0.3": (_BLOCK + _MIDDLE, _HEAD.format("x - 0.3 * middle")),
    }, scope="GPT"),
    Switch("Muon equal rows", LOW, "rows of equal size before orthogonalising treat rare directions alike", {
        "off": ("u = orthogonalize(g + momentum * (m - g))",),
        "on": (f"u = g + momentum * (m - g)\n    u = orthogonalize({_UNIT_ROWS})",),
    }, scope="muon"),
    Switch("cautious decay", LOW, "decay everywhere is simpler and may regularise better", {
        "on": ("(u + weight_decay * p * (u * p >= 0))",), "off": ("(u + weight_decay * p)",),
    }, scope="muon"),
    Switch("z-loss", LOW, "holding the logits' sum near one steadies the head", {
        "off": (f"loss = mx.mean(cross_entropy({_LOGITS}, y))",),
        "1e-4": (f"logits = {_LOGITS}\n        loss = mx.mean(cross_entropy(logits, y){_ZLOSS})",),
    }, scope="make_gradients"),
)  # fmt: skip

COUPLED = {  # once a change of the first key was kept, earlier failures of the others count less: the file they failed in is gone
    "BATCH_TOKENS": ("MATRIX_LR", "EMBEDDING_LR", "WARMDOWN_RATIO", "ADAM_BETAS[1]", "MUON_MOMENTUM[1]", "DEPTH"),
    "MATRIX_LR": ("WEIGHT_DECAY", "WARMDOWN_RATIO", "init scale", "BATCH_TOKENS"),
    "EMBEDDING_LR": ("NGRAM_LR", "wte init"),
    "NGRAM_LR": ("NGRAM_BUCKETS", "NGRAM_BUCKETS[0]", "NGRAM_BUCKETS[1]", "EMBEDDING_LR"),
    "NGRAM_BUCKETS": ("NGRAM_LR", "n-gram rows", "smeared embedding", "SEQ_LEN"),
    "n-gram rows": ("NGRAM_LR", "NGRAM_BUCKETS", "smeared embedding"),
    "DEPTH": ("WIDTH", "MATRIX_LR", "BATCH_TOKENS", "value embeddings"),
    "WIDTH": ("DEPTH", "MATRIX_LR", "HEAD_DIM", "BATCH_TOKENS"),
    "depth by width": ("MATRIX_LR", "HEAD_DIM", "BATCH_TOKENS"),
    "SEQ_LEN": ("BATCH_TOKENS", "ROPE_BASE"),
    "WARMDOWN_RATIO": ("FINAL_LR_FRAC", "MATRIX_LR", "EMBEDDING_LR"),
    "activation": ("MATRIX_LR", "MLP ratio"),
    "MLP": ("MATRIX_LR", "MLP ratio"),
    "init scale": ("MATRIX_LR", "QK gain"),
    "NEWTON_SCHULZ_STEPS": ("MATRIX_LR", "MUON_BETA2"),
}
