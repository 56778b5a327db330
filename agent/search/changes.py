"""List every change of the catalogue that fits one train file, as edits of its bytes.

A change is left out if the file does not have the text that the catalogue looks for, or if the result could not train: a width
that is no multiple of the head size, a batch that is not a whole number of rows, rows longer than the data's. Some constants are
computed from others, such as width and batch from depth. They change along, and the description of the change says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from agent.search import catalogue
from agent.search.catalogue import FIRST, HIGH, KNOBS, LARGEST_TABLE, LOW, MEDIUM, SMALLEST_TABLE, SWITCHES, Knob, Switch
from agent.search.trainfile import Constant, Edit, TrainFile, spell

FUSED_HEADS = (64, 128)  # head sizes with a fast attention kernel on a GPU
CPU_HEADS = (16, 32, 64)
VALUE_LAYERS: dict[str, Callable[[int, int], bool]] = {  # the forms of `has_ve`, as the catalogue writes them
    "alternate": lambda layer, n_layer: layer % 2 == (n_layer - 1) % 2,
    "all": lambda layer, n_layer: layer < n_layer,
    "last": lambda layer, n_layer: layer == n_layer - 1,
    "none": lambda layer, n_layer: layer < 0,
}


@dataclass(frozen=True)
class Change:
    """One change. Its `arm`, the key and the direction, is what the bandit learns about."""

    key: str
    old: str
    new: str
    direction: str  # up, down, or the new form
    prior: float
    why: str
    edits: tuple[Edit, ...]
    note: str = ""

    @property
    def arm(self) -> tuple[str, str]:
        return self.key, self.direction

    def __str__(self) -> str:
        return f"{self.key} {self.old} -> {self.new}" + (f" ({self.note})" if self.note else "")


def changes(file: TrainFile, seq_len: int | None = None, steps: float | None = None) -> list[Change]:
    """List every change of the catalogue that fits this file. seq_len: tokens per row of the data; steps: optimizer steps that
    this file takes in its budget. None if unknown."""
    found = [change for knob in KNOBS for change in _knob(file, knob)]
    found += [change for switch in SWITCHES for change in _switch(file, switch)]
    found += [*_tables(file), *_shape(file), *_batch(file, seq_len, steps)]
    return [whole for change in found if (whole := _with_followers(file, change, seq_len))]


def trains(value: Mapping[str, Any], seq_len: int | None = None) -> bool:
    """Whether a model with these constants can train: whole heads, whole rows, at least one row per micro-batch."""
    if {"WIDTH", "HEAD_DIM"} <= set(value) and value["WIDTH"] % value["HEAD_DIM"]:
        return False
    if not {"BATCH_TOKENS", "SEQ_LEN"} <= set(value):
        return True
    batch, row = value["BATCH_TOKENS"], min(value["SEQ_LEN"], seq_len or value["SEQ_LEN"])
    return not batch % row and bool(min(batch, value.get("MICRO_TOKENS", batch)) >= row)


def _with_followers(file: TrainFile, change: Change, seq_len: int | None) -> Change | None:
    """Add to a change a note of the constants that change along. None if the result could not train."""
    spans = {(edit.start, edit.end) for edit in change.edits}
    changed = {name for name, c in file.constants.items() if (c.start, c.end) in spans}
    if not changed & file.leaders:
        return change
    value = {name: c.value for name, c in TrainFile(file.apply(change.edits), file.tier).constants.items()}
    if not trains(value, seq_len):
        return None
    moved = [f"{name} {value[name]}" for name, c in file.constants.items() if name not in changed and value.get(name) != c.value]
    return replace(change, note=", ".join([*filter(None, [change.note]), *moved]) + " too") if moved else change


def _knob(file: TrainFile, knob: Knob) -> Iterator[Change]:
    places = _places(file, knob) if knob.pattern else [file.constants[knob.key]] if knob.key in file.constants else []
    if not places or len({p.value for p in places}) > 1 or not isinstance(places[0].value, (int, float)):
        return
    value = places[0].value
    if knob.ladder:
        above = [v for v in knob.ladder if v > value * 1.01 + 1e-9][:2]
        below = [v for v in reversed(knob.ladder) if v < value * 0.99 - 1e-9][:2]
    else:
        above = [v for f in knob.factors if knob.low <= (v := value * f) <= knob.high and value]
        below = [v for f in knob.factors if knob.low <= (v := value / f) <= knob.high and value]
    if knob.on and not value:
        above = list(knob.on)
    targets = [(v, "up") for v in above] + [(v, "down") for v in below] + [(0, "off")] * bool(knob.off and value)
    for target, direction in targets:
        new = type(value)(target)
        if new == value:
            continue
        edits = tuple(Edit(p.start, p.end, "") if new == knob.default else p.set(new) for p in places)
        prior = knob.down if direction == "down" and knob.down is not None else knob.prior
        yield Change(knob.key, spell(value), spell(new), direction, prior, knob.why, edits)


def _places(file: TrainFile, knob: Knob) -> list[Constant]:
    begin, end = file.scope(knob.scope)
    found = []
    for match in re.finditer(knob.pattern.encode(), file.data[begin:end]):
        text = match[1].decode()
        number = re.search(r"[\d.]+", text)
        value: Any = float(number[0]) if number else knob.default
        if number and number[0].isdigit() and "." not in number[0]:
            value = int(value)
        elif value is not None:
            value = float(value)
        found.append(Constant(knob.key, value, begin + match.start(1), begin + match.end(1), text, knob.template))
    return found


def _switch(file: TrainFile, switch: Switch) -> Iterator[Change]:
    standing = {}
    for label, texts in switch.forms.items():
        spans = [file.find(switch.scope, text) for text in texts]
        if all(spans):
            standing[label] = [span for span in spans if span]
    if not standing:
        return
    present = max(standing, key=lambda label: sum(map(len, switch.forms[label])))  # one form's text may be part of another's
    for label, texts in switch.forms.items():
        if label == present or (switch.key == "value embeddings" and _same_layers(file, present, label)):
            continue
        places = zip(standing[present], texts, switch.forms[present], strict=True)
        edits = [Edit(*span, text) for span, text, old in places if text != old]
        if switch.remarks and (place := file.find(switch.scope, switch.remarks[present])):
            edits.append(Edit(*place, switch.remarks[label]))
        prior = (switch.others or {}).get(label, switch.prior)
        yield Change(switch.key, present, label, label, prior, switch.why, tuple(edits))


def _same_layers(file: TrainFile, old: str, new: str) -> bool:
    """Whether two forms of `has_ve` choose the same layers at this depth, so that the training would be the same."""
    n = file.constants["DEPTH"].value if "DEPTH" in file.constants else 0
    return n > 0 and all(VALUE_LAYERS[old](i, n) == VALUE_LAYERS[new](i, n) for i in range(n))


def _tables(file: TrainFile) -> Iterator[Change]:
    buckets = file.constants.get("NGRAM_BUCKETS")
    if buckets is None or not isinstance(buckets.value, tuple):
        return
    now, most = buckets.value, 4
    options = [("fewer", now[:-1], MEDIUM, "one table less is simpler and quicker")] if now else []
    if len(now) < most:
        size = min(now[-1], LARGEST_TABLE) if now else 2**15
        prior = (HIGH, HIGH, MEDIUM, LOW)[len(now)]
        options.append(("more", (*now, size), prior, "a hashed table of longer n-grams costs look-ups, no matrix products"))
    for direction, new, prior, why in options:
        yield Change("NGRAM_BUCKETS", _short(now), _short(new), direction, prior, why, (buckets.set(new),))
    for factor, direction, prior in ((2, "up", HIGH), (4, "up", HIGH), (0.5, "down", LOW)):
        new = tuple(int(size * factor) for size in now)
        if len(now) > 1 and all(SMALLEST_TABLE <= size <= LARGEST_TABLE for size in new):
            why = "only rows that a batch looks up cost time" if factor > 1 else "rows that are seen more often learn more"
            yield Change("n-gram rows", str(sum(now)), str(sum(new)), direction, prior, why, (buckets.set(new),))


def _short(value: tuple[int, ...]) -> str:
    return spell(value).replace(" ", "")


def _shape(file: TrainFile) -> Iterator[Change]:
    """Changes of width (in whole heads), of head size, and of depth against width at about equal cost."""
    width, head, depth = (file.constants.get(name) for name in ("WIDTH", "HEAD_DIM", "DEPTH"))
    if width is None or head is None:
        return
    W, D = width.value, head.value
    for new, direction in ((W + D, "up"), (W + 2 * D, "up"), (W - D, "down"), (W - 2 * D, "down")):
        if new % D == 0 and max(D, W / 2) <= new <= 1.5 * W:
            why = "a wider stream learns more from each token" if new > W else "a narrower stream sees more tokens"
            yield Change("WIDTH", str(W), str(new), direction, MEDIUM, why, (width.set(new),))
    for new in CPU_HEADS if file.tier == "cpu" else FUSED_HEADS:
        if new in (D // 2, 2 * D) and W % new == 0:
            yield Change("HEAD_DIM", str(D), str(new), "up" if new > D else "down", MEDIUM,
                         "fewer, wider heads" if new > D else "more, narrower heads", (head.set(new),))  # fmt: skip
    for layers in (depth.value - 1, depth.value + 1) if depth else ():
        if layers < 1 or depth is None:
            continue
        new = max(D, round(W * (depth.value / layers) ** 0.5 / D) * D)
        if new != W:
            why = "deeper and narrower at about equal cost" if layers > depth.value else "shallower and wider at about equal cost"
            direction = "deeper" if layers > depth.value else "wider"
            yield Change("depth by width", f"{depth.value}x{W}", f"{layers}x{new}", direction, MEDIUM, why,
                         (depth.set(layers), width.set(new)))  # fmt: skip


def _batch(file: TrainFile, data_seq_len: int | None, steps: float | None) -> Iterator[Change]:
    """Changes of the tokens per step and per row. A batch is always a whole number of rows; one of more than MICRO_TOKENS tokens is
    accumulated over several passes."""
    batch, micro, row = (file.constants.get(name) for name in ("BATCH_TOKENS", "MICRO_TOKENS", "SEQ_LEN"))
    if batch is None or row is None:
        return
    length = min(row.value, data_seq_len or row.value)  # the train file cuts longer rows to the data's seq_len
    down = catalogue.SURE if steps and steps < catalogue.FEW_STEPS else FIRST
    for factor, direction, prior in ((0.5, "down", down), (2, "up", MEDIUM), (0.25, "down", down)):
        new = int(batch.value * factor)
        if new < length or new % length:
            continue
        passes = -(-new // micro.value) if micro else 1
        why = "more and noisier steps" if new < batch.value else "fewer, steadier steps that use the machine better"
        note = f"in {passes} passes" if passes > 1 else ""
        yield Change("BATCH_TOKENS", str(batch.value), str(new), direction, prior, why, (batch.set(new),), note)
    if micro is not None and micro.value < batch.value:
        yield Change("MICRO_TOKENS", str(micro.value), str(2 * micro.value), "up", MEDIUM, "less accumulation, larger passes",
                     (micro.set(2 * micro.value),))  # fmt: skip
    for new, direction in ((length // 2, "down"), (length * 2, "up"), (length * 3 // 4, "down"), (length // 4, "down")):
        fits = new >= 8 and batch.value % new == 0 and (micro is None or micro.value >= new)
        if fits and (direction == "down" or (data_seq_len and new <= data_seq_len)):
            why = "shorter rows cost less attention" if new < length else "longer rows train the context that is scored"
            prior = HIGH if direction == "down" else MEDIUM
            yield Change("SEQ_LEN", str(row.value), str(new), direction, prior, why, (row.set(new),))
