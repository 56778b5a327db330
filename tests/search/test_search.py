"""The proposer without a language model: every change it can make is minimal, sane and trains; it learns, and never repeats."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import PINNED, ROOT

from agent.coders import choice
from agent.coders.coder import Job
from agent.journal.journal import Journal
from agent.journal.state import Night, fold
from agent.search import proposer
from agent.search.bandit import Bandit, Lesson, arms_of, lessons
from agent.search.catalogue import COUPLED, FIRST, HIGH, KNOBS, SWITCHES
from agent.search.changes import Change, changes
from agent.search.trainfile import TrainFile, spell

SOURCE = (PINNED / "train_mlx.py").read_bytes()
TIERS = {"cpu": 128, "mac": 512, "mac-max": 1024, "cuda": 2048}  # and the data's seq_len there


@functools.cache
def everything(tier: str = "cpu", seq_len: int | None = None, source: bytes = SOURCE) -> list[Change]:
    return changes(TrainFile(source, tier), seq_len or TIERS[tier])


@functools.cache
def applied(tier: str) -> list[tuple[Change, str, str, dict[str, Any]]]:
    """Every change; the text, the tree and the constants of the file with it."""
    file, found = TrainFile(SOURCE, tier), []
    for change in everything(tier):
        after = TrainFile(file.apply(change.edits), tier)
        found.append((change, after.text, ast.dump(after.tree), {name: c.value for name, c in after.constants.items()}))
    return found


def named(key: str, options: list[Change]) -> list[Change]:
    found = [change for change in options if change.key == key]
    assert found, f"no change of {key}"
    return found


class Story:
    """A night told in a few words: journal events as the driver writes them."""

    def __init__(self, source: bytes = SOURCE, **dataset: Any) -> None:
        self.events: list[dict[str, Any]] = []
        self.n = 0
        self.best, self.level = "c0", 1.0
        self.add("night_start", tag="t", base="c0", train_file="train_mlx.py", seed=1,
                 dataset={"seq_len": 128, "device": "cpu", **dataset}, sources={})  # fmt: skip
        self.add("experiment", n=0, parent="c0")
        self.add("candidate", n=0, commit="c0", ast=proposer.identity(source), lines=1, description="baseline", usage={}, seconds=0)
        for k, score in enumerate((0.999, 1.0, 1.001)):
            self.trial(0, k, score)
        self.verdict(0, "keep", 1.0, "baseline")

    def add(self, event: str, **fields: Any) -> None:
        self.events.append({"event": event, "seq": len(self.events), "t": 1000.0 + len(self.events), **fields})

    def trial(self, n: int, k: int, score: float | None, status: str = "ok") -> None:
        self.add("trial_start", n=n, k=k, seed=1 + k, dir=f"{n:04d}-{1 + k}")
        self.add("trial_end", n=n, k=k, seed=1 + k, dir=f"{n:04d}-{1 + k}", status=status, val_bpb=score, summary={}, seconds=1.0,
                 error=None)  # fmt: skip

    def verdict(self, n: int, status: str, score: float | None, description: str) -> None:
        self.add("verdict", n=n, status=status, reason="", val_bpb=score, description=description, error=None, usage={}, seconds=0)

    def tried(self, description: str, gain: float, status: str = "", identity: str = "") -> None:
        """An experiment that lowered val_bpb by `gain`; a keep if that is much."""
        self.n += 1
        status = status or ("keep" if gain > 0.004 else "discard")
        score = self.level - gain if status in ("keep", "discard") else None
        self.add("experiment", n=self.n, parent=self.best)
        self.add("candidate", n=self.n, commit=f"c{self.n}", ast=identity or f"x{self.n}", lines=1, description=description,
                 usage={}, seconds=0)  # fmt: skip
        self.trial(self.n, 0, score, "ok" if score is not None else status)
        self.verdict(self.n, status, score, description)
        if status == "keep":
            self.best, self.level = f"c{self.n}", self.level - gain

    def night(self) -> Night:
        return fold(self.events)

    def write(self, folder: Path) -> Path:
        with Journal(folder) as journal:
            for event in self.events:
                journal.append(event["event"], **{k: v for k, v in event.items() if k not in ("event", "seq", "t")})
        return folder / "journal.jsonl"


# Reading and editing


def test_of_a_table_by_tier_only_this_machines_entry_changes() -> None:
    before = TrainFile(SOURCE, "mac")
    change = named("DEPTH", everything("mac"))[0]
    data = before.apply(change.edits)
    assert TrainFile(data, "mac").constants["DEPTH"].value == before.constants["DEPTH"].value + 1
    for tier in ("cpu", "mac-max", "cuda"):
        values = [{name: c.value for name, c in TrainFile(source, tier).constants.items()} for source in (SOURCE, data)]
        assert values[0] == values[1]


def test_a_constants_comment_and_every_other_byte_stay() -> None:
    source = '# größer\r\nMATRIX_LR = 0.02  # für alle\r\nROPE_BASE = 10_000\r\nX = "é"; BATCH_TOKENS = 2**18 ; Y = 2\r\n'
    file = TrainFile(source.encode(), "cpu")
    wanted = {"MATRIX_LR": 0.03, "ROPE_BASE": 20000, "BATCH_TOKENS": 2**17}
    edits = [file.constants[name].set(value) for name, value in wanted.items()]
    expected = source.replace("0.02", "0.03").replace("10_000", "20_000").replace("2**18", "2**17")
    assert file.apply(edits) == expected.encode()
    with_mark = TrainFile(b"\xef\xbb\xbf" + source.encode(), "cpu")
    edited = with_mark.apply([with_mark.constants["MATRIX_LR"].set(0.03)])
    assert edited == b"\xef\xbb\xbf" + source.replace("0.02", "0.03").encode()


def test_parts_of_a_tuple_are_constants_of_their_own() -> None:
    file = TrainFile(b"ADAM_BETAS = (0.8, 0.95)  # AdamW\n", "cpu")
    assert file.apply([file.constants["ADAM_BETAS[1]"].set(0.98)]) == b"ADAM_BETAS = (0.8, 0.98)  # AdamW\n"


def test_what_is_no_literal_is_left_alone() -> None:
    source = b"A = f()\nB = A + 1\nC = {'cpu': g()}[TIER]\nD = 3 ** 10 ** 10\nE = not 1\nlower = 3\nF = 1 // 0\nG = 1\nG = f()\n"
    file = TrainFile(source, "cpu")
    assert file.constants == {}
    assert file.lacking == []


def test_what_is_computed_of_constants_has_a_value_and_becomes_a_literal_once_it_is_set() -> None:
    source = (b"DEPTH = {'cpu': 2, 'mac': 3}[TIER]\nHEAD_DIM = 48\n"
              b"WIDTH = (64 * DEPTH + HEAD_DIM - 1) // HEAD_DIM * HEAD_DIM  # whole\n"
              b"BATCH = {'cpu': 2**9, 'mac': 3_072}[TIER] * DEPTH\nOTHER = {'mac': 1}[TIER] * DEPTH\n")  # fmt: skip
    file = TrainFile(source, "cpu")
    assert {name: c.value for name, c in file.constants.items()} == {"DEPTH": 2, "HEAD_DIM": 48, "WIDTH": 144, "BATCH": 1024}
    assert {name: c.value for name, c in TrainFile(source, "mac").constants.items()} == {
        "DEPTH": 3, "HEAD_DIM": 48, "WIDTH": 192, "BATCH": 9216, "OTHER": 3}  # fmt: skip
    assert file.leaders == {"DEPTH", "HEAD_DIM"}
    assert file.lacking == ["OTHER"]
    after = file.apply([file.constants["WIDTH"].set(1024), file.constants["BATCH"].set(2048)])
    assert after.splitlines()[2:4] == [b"WIDTH = 1024  # whole", b"BATCH = 2048"]
    deeper = TrainFile(file.apply([file.constants["DEPTH"].set(4)]), "cpu").constants
    assert (deeper["WIDTH"].value, deeper["BATCH"].value) == (288, 2048)


def test_two_edits_of_one_place_are_refused() -> None:
    file = TrainFile(b"A = 1\n", "cpu")
    with pytest.raises(ValueError, match="two edits"):
        file.apply([file.constants["A"].set(2), file.constants["A"].set(3)])


def test_numbers_are_spelled_as_a_person_would() -> None:
    spelled = [spell(value) for value in (0.02 * 1.5, 0.004 / 1.5, 8192, (8192,), (1, 2), "SL")]
    assert spelled == ["0.03", "0.00267", "8192", "(8192,)", "(1, 2)", '"SL"']


# The catalogue


def test_every_entry_of_the_catalogue_fits_the_train_file() -> None:
    keys = {change.key for tier in TIERS for change in everything(tier)}
    wanted = {knob.key for knob in KNOBS} | {switch.key for switch in SWITCHES}
    wanted |= {"NGRAM_BUCKETS", "n-gram rows", "WIDTH", "HEAD_DIM", "depth by width", "BATCH_TOKENS",
               "MICRO_TOKENS", "SEQ_LEN"}  # fmt: skip
    assert keys == wanted
    assert {name for key, others in COUPLED.items() for name in (key, *others)} <= wanted


@pytest.mark.parametrize("tier", ["cpu", *(pytest.param(tier, marks=pytest.mark.slow) for tier in ("mac", "cuda"))])
def test_every_change_is_a_small_edit_that_parses_and_makes_another_source(tier: str) -> None:
    sources = {ast.dump(TrainFile(SOURCE, tier).tree)}
    for change, text, tree, _ in applied(tier):
        sources.add(tree)
        old, new = SOURCE.decode().splitlines(), text.splitlines()
        assert abs(len(old) - len(new)) <= 3, change
        assert len(set(old) - set(new)) <= 4, change
        assert arms_of(str(change)) == [change.arm], change
        assert change.why
        assert 0 < change.prior < 1
    assert len(sources) == 1 + len(everything(tier)), "two changes make the same source"


@pytest.mark.parametrize("tier", ["cpu", *(pytest.param(tier, marks=pytest.mark.slow) for tier in ("mac", "cuda"))])
def test_every_change_leaves_shapes_that_can_train(tier: str) -> None:
    file = TrainFile(SOURCE, tier)
    for change, _, _, value in applied(tier):
        row = min(value["SEQ_LEN"], TIERS[tier])
        assert value["BATCH_TOKENS"] % row == 0, change
        assert min(value["BATCH_TOKENS"], value["MICRO_TOKENS"]) >= row, change
        assert value["SEQ_LEN"] <= max(TIERS[tier], file.constants["SEQ_LEN"].value), change
        assert value["WIDTH"] % value["HEAD_DIM"] == 0, change
        assert value["HEAD_DIM"] % 2 == 0, change
        assert min(value["DEPTH"], value["MUON_MOMENTUM"][2], value["WIDTH"]) >= 1, change
        assert all(0 <= value[name] <= 1 for name in ("WARMUP_RATIO", "WARMDOWN_RATIO", "FINAL_LR_FRAC", "MUON_BETA2")), change
        assert value["WARMUP_RATIO"] + value["WARMDOWN_RATIO"] <= 1, change
        assert all(0 < value[name] < 3 for name in ("MATRIX_LR", "EMBEDDING_LR", "UNEMBEDDING_LR", "SCALAR_LR")), change
        assert 0.5 <= value["NGRAM_LR"] <= 8, change
        assert all(512 <= rows <= 2**20 for rows in value["NGRAM_BUCKETS"]), change


def test_a_pass_has_its_limit_and_what_a_step_has_more_is_accumulated() -> None:
    def told(tier: str, factor: float) -> str:
        batch = TrainFile(SOURCE, tier).constants["BATCH_TOKENS"].value
        change = next(c for c in named("BATCH_TOKENS", everything(tier)) if int(c.new) == batch * factor)
        assert [edit.text for edit in change.edits] == [str(int(batch * factor))], "MICRO_TOKENS stays"
        return change.note

    assert (told("mac", 0.5), told("mac", 2)) == ("", "in 2 passes")
    assert told("cuda", 0.5) == "in 4 passes"  # 2**17 tokens a step in passes of 2**15
    assert [change.key for change in everything("mac")].count("MICRO_TOKENS") == 0, "nothing accumulates there"
    assert [change.new for change in named("MICRO_TOKENS", everything("cuda"))] == [str(2**16)]


def test_what_is_computed_of_a_constant_moves_with_it_and_the_change_says_so() -> None:
    file = TrainFile(SOURCE, "cpu")
    for change in [c for c in everything() if c.key in ("DEPTH", "depth by width", "HEAD_DIM", "WIDTH")]:
        value = {name: c.value for name, c in TrainFile(file.apply(change.edits), "cpu").constants.items()}
        told = dict(part.split() for part in change.note.removesuffix(" too").split(", ") if part)
        own = {"DEPTH": ["DEPTH"], "depth by width": ["DEPTH", "WIDTH"]}.get(change.key, [change.key])
        moved = {name for name, c in file.constants.items() if value[name] != c.value}
        assert moved == {*own, *told}, change
        assert told == {name: str(value[name]) for name in told}, change
    assert str(named("DEPTH", everything())[0]) == "DEPTH 2 -> 3 (WIDTH 192, BATCH_TOKENS 3072 too)"
    alone = TrainFile(file.apply([file.constants["WIDTH"].set(128), file.constants["BATCH_TOKENS"].set(1024)]), "cpu")
    assert {change.note for change in named("DEPTH", everything(source=alone.data))} == {""}


def test_a_change_whose_followers_cannot_train_is_passed_over() -> None:
    source = b"DEPTH = 2\nSEQ_LEN = 96\nBATCH_TOKENS = 96 * DEPTH * DEPTH // 4\n"  # 96 tokens; 216 at a depth of 3, 24 at 1
    assert {change.new for change in named("DEPTH", changes(TrainFile(source, "cpu")))} == {"4"}


def test_a_cap_that_is_off_is_turned_on_at_a_sane_value() -> None:
    assert {(change.new, change.direction) for change in named("SOFTCAP", everything("cpu"))} == {("15", "up"), ("30", "up")}
    assert "off" in {change.direction for change in named("SOFTCAP", everything("mac"))}


def test_rows_are_never_longer_than_the_datas() -> None:
    assert {change.new for change in named("SEQ_LEN", everything("cpu", 128))} == {"64", "32"}
    assert {change.direction for change in named("SEQ_LEN", everything("cpu", 64))} == {"down"}
    assert {change.new for change in named("SEQ_LEN", everything("cpu", 32))} == {"16", "8"}  # 128 is cut to 32 already
    assert {change.direction for change in named("SEQ_LEN", changes(TrainFile(SOURCE, "cpu"), None))} == {"down"}


def test_forms_of_the_code_go_there_and_back() -> None:
    file = TrainFile(SOURCE, "cpu")
    for switch in SWITCHES:
        for change in named(switch.key, everything()):
            there = TrainFile(file.apply(change.edits), "cpu")
            back = [c for c in named(switch.key, everything(source=there.data)) if c.new == change.old]
            assert [c.old for c in back] == [change.new], change
            assert there.apply(back[0].edits) == SOURCE, change


def test_forms_that_mean_the_same_at_this_depth_are_no_experiment() -> None:
    forms = {change.new for change in named("value embeddings", everything("cpu"))}
    assert TrainFile(SOURCE, "cpu").constants["DEPTH"].value == 2
    assert forms == {"all", "none"}  # at depth 2 `last` is what `alternate` is already
    assert "last" in {change.new for change in named("value embeddings", everything("mac-max"))}


def test_what_the_file_does_not_have_is_passed_over() -> None:
    without = SOURCE.replace(b"mx.square(mx.maximum(self.c_fc(x), 0))", b"mine(self.c_fc(x))").replace(b"MATRIX_LR", b"RATE")
    keys = {change.key for change in everything(source=without)}
    assert not keys & {"activation", "MLP", "MATRIX_LR"}
    assert {"EMBEDDING_LR", "norm after sublayer"} <= keys


# The bandit


def test_the_arms_of_a_description_are_read_back() -> None:
    assert arms_of("MATRIX_LR 0.02 -> 0.03") == [("MATRIX_LR", "up")]
    assert arms_of("BATCH_TOKENS 2**18 -> 2**17 (MICRO_TOKENS too)") == [("BATCH_TOKENS", "down")]
    assert arms_of("DEPTH 2 -> 3 + init scale 1.0 -> 0.8") == [("DEPTH", "up"), ("init scale", "down")]
    assert arms_of("use a cosine schedule") == []
    assert arms_of("") == []


def test_keeps_raise_an_arms_chance_and_failures_lower_it() -> None:
    story = Story()
    story.tried("MATRIX_LR 0.02 -> 0.03", 0.05)
    for i in range(4):
        story.tried(f"SOFTCAP 15.0 -> {20 + i}", -0.05)
    story.tried("ROPE_BASE 10000 -> 30000", 0.0005)
    bandit = Bandit(lessons(story.night()), random.Random(0))
    options = everything()

    def chance(key: str, direction: str) -> tuple[float, float]:
        change = next(c for c in options if c.arm == (key, direction))
        won, lost = bandit.chance(change)
        return won / (won + lost), change.prior

    assert chance("MATRIX_LR", "up")[0] > 0.15 + chance("MATRIX_LR", "up")[1]
    assert chance("SOFTCAP", "up")[0] < 0.6 * chance("SOFTCAP", "up")[1]
    assert chance("ROPE_BASE", "up")[0] > chance("ROPE_BASE", "up")[1]  # a near miss is a sign of life
    assert chance("SCALAR_LR", "up")[0] == pytest.approx(chance("SCALAR_LR", "up")[1])


def test_a_failure_counts_for_less_once_what_it_failed_against_has_changed() -> None:
    def weight(*then: tuple[str, float]) -> float:
        story = Story()
        story.tried("MATRIX_LR 0.02 -> 0.03", -0.05)
        for description, gain in then:
            story.tried(description, gain)
        return next(o.weight for o in lessons(story.night()) if o.arm == ("MATRIX_LR", "up"))

    assert weight() == 1
    assert weight(("SOFTCAP 15.0 -> 20.0", -0.05)) == 1  # nothing was kept
    assert weight(("SOFTCAP 15.0 -> 20.0", 0.05)) < 1
    assert weight(("BATCH_TOKENS 1024 -> 512", 0.05)) < 0.5 * weight(("SOFTCAP 15.0 -> 20.0", 0.05))  # coupled


def test_of_two_changes_together_each_gets_half_the_evidence() -> None:
    story = Story()
    story.tried("DEPTH 2 -> 3 + SOFTCAP 15.0 -> 20.0", -0.05)
    assert {(o.arm, o.weight) for o in lessons(story.night())} == {(("DEPTH", "up"), 0.5), (("SOFTCAP", "up"), 0.5)}


def test_failed_trainings_count_and_agents_failures_do_not() -> None:
    story = Story()
    for status in ("oom", "noop", "agent_error"):
        story.tried("WIDTH 128 -> 192", 0.0, status)
    assert lessons(story.night()) == [Lesson(("WIDTH", "up"), 0.0, 1.0)]


def test_nothing_that_was_trained_is_proposed_again_and_the_end_is_said() -> None:
    source = b"MATRIX_LR = 0.02\nFINAL_LR_FRAC = 0.05\n"
    story = Story(source)
    file, seen = TrainFile(source, "cpu"), set()
    for turn in range(500):
        found = proposer.propose(file, story.night(), random.Random(turn))
        if found is None:
            break
        identity = proposer.identity(found[1])
        assert identity not in seen
        seen.add(identity)
        story.tried(" + ".join(map(str, found[0])), -0.05, identity=identity)
    else:
        pytest.fail("it never ended")
    singles = {proposer.identity(file.apply(change.edits)) for change in changes(file)}
    assert singles < seen  # pairs too
    better = file.apply(changes(file)[0].edits)
    assert proposer.propose(TrainFile(better, "cpu"), story.night(), random.Random(0)) is not None  # another best, another night


LANDSCAPE = {"MATRIX_LR": 0.16, "EMBEDDING_LR": 1.6, "MUON_BETA2": 0.8}  # the best values; nothing else matters or it hurts
TOY = b"".join(
    f"{name} = {value}\n".encode()
    for name, value in {
        "MATRIX_LR": 0.02, "EMBEDDING_LR": 0.2, "UNEMBEDDING_LR": 0.004, "SCALAR_LR": 0.3, "WEIGHT_DECAY": 0.15, "SOFTCAP": 15.0,
        "WARMDOWN_RATIO": 0.4, "FINAL_LR_FRAC": 0.05, "ROPE_BASE": 10000, "MUON_BETA2": 0.95, "GATE_CHANNELS": 32, "DEPTH": 3,
        "ADAM_BETAS": (0.8, 0.95), "MUON_MOMENTUM": (0.85, 0.95, 200), "NGRAM_BUCKETS": (8192, 16384),
    }.items()
)  # fmt: skip


def simulated_night(learn: bool, seed: int, length: int = 30) -> float:
    """The val_bpb after a night on a landscape with three ways down."""

    def bpb(source: bytes) -> float:
        value = {name: c.value for name, c in TrainFile(source, "cpu").constants.items() if "[" not in name}
        start = {name: c.value for name, c in TrainFile(TOY, "cpu").constants.items() if "[" not in name}
        distance = sum(abs(math.log(value[name] / best)) for name, best in LANDSCAPE.items())
        return 1 + 0.02 * distance + 0.01 * sum(value[name] != start[name] for name in value if name not in LANDSCAPE)

    best, story = TOY, Story(TOY)
    story.level = bpb(TOY)
    for turn in range(length):
        found = proposer.propose(TrainFile(best, "cpu"), story.night(), random.Random(f"{seed} {turn}"), learn=learn)
        assert found
        gain = bpb(best) - bpb(found[1])
        story.tried(" + ".join(map(str, found[0])), gain, identity=proposer.identity(found[1]))
        best = found[1] if gain > 0.004 else best
    return bpb(best)


def test_learning_finds_more_than_chance() -> None:
    nights = range(8)
    learnt = [simulated_night(True, seed) for seed in nights]
    chance = [simulated_night(False, seed) for seed in nights]
    start = 1 + 0.02 * sum(abs(math.log(TrainFile(TOY, "cpu").constants[name].value / best)) for name, best in LANDSCAPE.items())
    assert start - sum(learnt) / len(nights) > 1.25 * (start - sum(chance) / len(nights)), (learnt, chance)


@pytest.mark.slow
def test_a_short_night_begins_with_what_helps_most_often() -> None:
    """Nights of eight experiments that all fail: mostly the first ideas of the brief, each way round."""
    file, keys = TrainFile(SOURCE, "mac"), []
    for night in range(4):
        story = Story(seq_len=512)
        for turn in range(8):
            found = proposer.propose(file, story.night(), random.Random(f"{night} {turn}"))
            assert found
            keys += [change.arm for change in found[0] if change.prior >= HIGH]
            story.tried(" + ".join(map(str, found[0])), -0.05, identity=proposer.identity(found[1]))
    assert len(keys) > 0.75 * 4 * 8
    first = {change.arm for change in everything("mac") if change.prior == FIRST}
    assert first == {("BATCH_TOKENS", "down"), ("MATRIX_LR", "up"), ("MATRIX_LR", "down"), ("DEPTH", "up"), ("DEPTH", "down")}
    assert sum(arm in first for arm in keys) > 0.4 * 4 * 8
    assert first <= set(keys)
    assert len(set(keys)) > len(first) + 3, "not always the same"
    likeliest = {arm: next(c for c in everything("mac") if c.arm == arm) for arm in first}
    assert likeliest["BATCH_TOKENS", "down"].new == "4608", "halve it before anything else"
    assert (likeliest["MATRIX_LR", "up"].new, likeliest["MATRIX_LR", "down"].new) == ("0.04", "0.01")


def test_where_a_training_has_few_steps_the_batch_is_halved_first() -> None:
    def share(steps: float) -> float:
        story = Story()
        for event in story.events:
            if event["event"] == "trial_end":
                event["summary"] = {"num_steps": steps}
        file, night = TrainFile(SOURCE, "cpu"), story.night()
        found = [proposer.propose(file, night, random.Random(turn)) for turn in range(6)]
        return sum(choice is not None and choice[0][0].arm == ("BATCH_TOKENS", "down") for choice in found) / 6

    assert share(30.0) > 0.8
    assert share(3000.0) < 0.5


def test_the_random_control_draws_every_change_alike() -> None:
    file = TrainFile(TOY, "cpu")
    story = Story(TOY)
    for i in range(12):
        story.tried(f"MATRIX_LR 0.02 -> 0.0{3 + i}", 0.05)  # what a learner would follow
    options, state, counts = changes(file), story.night(), {}
    for turn in range(400):
        found = proposer.propose(file, state, random.Random(turn), learn=False)
        assert found
        counts[found[0][0].key] = counts.get(found[0][0].key, 0) + 1
    share = len(named("MATRIX_LR", options)) / len(options)
    assert abs(counts["MATRIX_LR"] / 400 - share) < 4 * math.sqrt(share * (1 - share) / 400)


# As a process


def started(folder: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """As the driver starts it: from a worktree, with the driver's modules on the path."""
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1", **environ}
    return subprocess.run([sys.executable, "-m", "agent.search", *arguments], cwd=folder, env=env, input="A briefing.\n",
                          capture_output=True, text=True, timeout=60)  # fmt: skip


@pytest.fixture
def worktree(tmp_path: Path) -> Path:
    folder = tmp_path / "worktree"
    folder.mkdir()
    (folder / "train_mlx.py").write_bytes(SOURCE)
    return folder


def digest(folder: Path) -> Mapping[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("options", [(), ("--model", "random")])
def test_the_file_is_edited_and_the_last_lines_say_why_and_what(worktree: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    journal = Story().write(tmp_path / "night")
    done = started(worktree, *options, AUTORESEARCH_JOURNAL=str(journal), AUTORESEARCH_SEED="7", AUTORESEARCH_EXPERIMENT="1")
    assert done.returncode == 0, done.stderr
    *_, why, what = done.stdout.splitlines()
    assert why.startswith("HYPOTHESIS: ")
    assert what.startswith("DESCRIPTION: ")
    assert arms_of(what.removeprefix("DESCRIPTION: "))
    changed = (worktree / "train_mlx.py").read_bytes()
    assert proposer.identity(changed) not in ("", proposer.identity(SOURCE))
    assert digest(worktree).keys() == {"train_mlx.py"}
    (worktree / "train_mlx.py").write_bytes(SOURCE)
    again = started(worktree, *options, AUTORESEARCH_JOURNAL=str(journal), AUTORESEARCH_SEED="7", AUTORESEARCH_EXPERIMENT="1")
    assert again.stdout == done.stdout
    assert (worktree / "train_mlx.py").read_bytes() == changed


@pytest.mark.parametrize("model", [None, "random"])
def test_the_drivers_table_starts_it(worktree: Path, tmp_path: Path, model: str | None) -> None:
    job = Job(worktree, "train_mlx.py", "A briefing.", tmp_path, model=model)
    command = choice.get("search").command(job, os.environ)
    done = subprocess.run(command.argv, cwd=worktree, env=command.env, input=command.stdin, capture_output=True, text=True,
                          timeout=60)  # fmt: skip
    reply = choice.get("search").reply(done.stdout, done.stderr, job)
    assert reply.failure is None
    assert reply.description
    assert reply.hypothesis
    assert arms_of(reply.description)
    assert (worktree / "train_mlx.py").read_bytes() != SOURCE


def test_without_a_journal_the_priors_decide(worktree: Path) -> None:
    words = {started(worktree, AUTORESEARCH_SEED=str(seed)).stdout for seed in range(8)}
    assert len(words) >= 4


def test_a_damaged_journal_costs_no_experiment(worktree: Path, tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    journal.write_text("no journal\nat all\n")
    done = started(worktree, AUTORESEARCH_JOURNAL=str(journal))
    assert done.returncode == 0
    assert "the journal can't be read" in done.stdout
    assert "DESCRIPTION: " in done.stdout


def test_errors_say_what_is_wrong_and_change_nothing(worktree: Path) -> None:
    done = started(worktree, "--train-file", "train_other.py")
    assert done.returncode == 2
    assert "train_other.py can't be read" in done.stderr
    (worktree / "train_mlx.py").write_text("def broken(:\n")
    before = digest(worktree)
    assert started(worktree).returncode == 2
    (worktree / "train_mlx.py").write_text("print('nothing to turn')\n")
    done = started(worktree)
    assert done.returncode == 1
    assert "nothing in the catalogue is left to try on this train_mlx.py" in done.stderr
    assert digest(worktree).keys() == before.keys()


def test_a_table_without_this_machine_is_said_and_another_constant_chosen(worktree: Path) -> None:
    (worktree / "train_mlx.py").write_text('DEPTH = {"mac": 3}[TIER]\nMATRIX_LR = 0.02\n')
    done = started(worktree, AUTORESEARCH_TIER="cpu")
    assert "no entry for this machine's tier 'cpu' in DEPTH" in done.stdout
    assert "DESCRIPTION: MATRIX_LR 0.02 -> " in done.stdout


@pytest.mark.parametrize("tier", ["cpu", "mac", "mac-max", "cuda"])
def test_the_entry_that_was_trained_is_edited_whatever_this_machine_is(worktree: Path, tmp_path: Path, tier: str) -> None:
    """Even where two tiers have the same depth, as after a keep."""
    (worktree / "train_mlx.py").write_text('DEPTH = {"cpu": 3, "mac": 3, "mac-max": 3, "cuda": 3}[TIER]\n')
    story = Story()
    next(e for e in reversed(story.events) if e["event"] == "trial_end")["summary"] = {"depth": 3.0, "tier": tier}
    done = started(worktree, AUTORESEARCH_JOURNAL=str(story.write(tmp_path / "night")))
    assert done.returncode == 0, done.stderr
    changed = TrainFile((worktree / "train_mlx.py").read_bytes(), tier)
    assert changed.constants["DEPTH"].value != 3


def test_without_a_training_the_tier_is_the_one_that_is_told() -> None:
    assert proposer.night_tier(None, {"AUTORESEARCH_TIER": "mac-max"}) == "mac-max"
    night = Night(machine={"tier": "", "device": "cpu"})
    assert proposer.night_tier(night, {}) == "cpu", "a GPU machine that trains on its CPU"
    night.machine["tier"] = "cuda"
    assert proposer.night_tier(night, {}) == "cuda"


# Trained for real


def train(folder: Path, home: Path, source: bytes, *, score: bool = False) -> tuple[subprocess.CompletedProcess[str], str]:
    """Four steps on tiny data; the digest of the weights, and of the score where there is one."""
    (folder / "train_mlx.py").write_bytes(source)
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "AUTORESEARCH_HOME": str(home), "AUTORESEARCH_BUDGET": "4steps",
           "AUTORESEARCH_SCORE": str(int(score)), "AUTORESEARCH_RUN_DIR": str(run), "AUTORESEARCH_SEED": "1"}  # fmt: skip
    done = subprocess.run([sys.executable, "train_mlx.py"], cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    scored = re.findall(rb"val_bpb:.*", done.stdout.encode())
    weights = run / "weights.safetensors"
    return done, hashlib.sha256(b"".join([weights.read_bytes(), *scored])).hexdigest() if weights.exists() else ""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:
    """A folder to train in, prepared data, and the data's seq_len."""
    folder = tmp_path_factory.mktemp("bench")
    env = {**os.environ, "AUTORESEARCH_HOME": str(folder / "home")}
    subprocess.run([sys.executable, ROOT / "prepare_mlx.py", "--preset", "tiny", "--dataset", "stories"],
                   cwd=folder, env=env, capture_output=True, check=True, timeout=120)  # fmt: skip
    return folder, folder / "home", json.loads((folder / "home" / "current.json").read_text())["seq_len"]


def check_training(bench: tuple[Path, Path, int], picked: list[Change]) -> None:
    """Each change trains, what changed the code can be scored, and no change is without effect."""
    folder, home, _ = bench
    file = TrainFile(SOURCE, "cpu")
    unchanged = {score: train(folder, home, SOURCE, score=score) for score in (False, True)}
    assert not any(done.returncode for done, _ in unchanged.values()), unchanged
    wrong = []
    for change in picked:
        score = change.key in {switch.key for switch in SWITCHES}
        done, digest = train(folder, home, file.apply(change.edits), score=score)
        same = digest == unchanged[score][1]
        if done.returncode or same:
            wrong.append(f"{change}: exit {done.returncode}{' no effect' * same} {done.stderr[-300:]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_a_nights_worth_of_keeps_on_top_of_each_other_trains(
    bench: tuple[Path, Path, int], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(proposer, "PAIRS", 0.4)
    draw, data, words = random.Random(seed), SOURCE, []
    for _ in range(12 if seed else 6):
        found = proposer.propose(TrainFile(data, "cpu"), None, draw, learn=seed % 2 == 0)
        assert found
        words.append(" + ".join(map(str, found[0])))
        data = found[1]
    done, _ = train(bench[0], bench[1], data, score=True)
    assert done.returncode == 0, "\n".join([*words, done.stderr[-500:]])
    assert "val_bpb:" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_change_of_the_catalogue_trains(bench: tuple[Path, Path, int]) -> None:
    check_training(bench, changes(TrainFile(SOURCE, "cpu"), bench[2]))
