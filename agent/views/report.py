"""The report of a night, from its journal: pictures, one HTML file that stands alone, Markdown for a pull request, plain text."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.errors import UsageError
from agent.files import write_anew
from agent.journal.journal import read_events
from agent.journal.state import FAILURES, STATUSES, Experiment, Night, fold
from agent.text import one_line
from agent.views import results
from agent.views.glance import BEYOND_NOISE, DIFF_CHARACTERS, ENDS, compared, error_of, families, proposer, score, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BASELINE, KEEP, DISCARD, FAILED = "#24292f", "#1a7f37", "#9aa4ad", "#cf222e"
# Places to try for the label of a keep, relative to its point: (points to the right, alignment, points down). The area below and to
# the left comes first: a staircase that falls leaves it empty.
PLACES = [(-side, "right", down) for down in range(7, 70, 11) for side in (3, 20)]
PLACES += [(side, "left", down) for down in (*range(7, 70, 11), -9, -20, -31) for side in (3, 20)]
Point = tuple[float, float]


def load(folder: Path) -> Night:
    """The night in a folder. UsageError if there is none."""
    events, _ = read_events(folder / "journal.jsonl")
    if not events:
        raise UsageError(f"there is no night in {folder}: expected a journal.jsonl")
    return fold(events)


def draw(night: Night, path: Path, sigma: float = 0.0) -> None:
    """Draw progress.png: every score with its standard error, the best so far as a staircase with a band, failures on the lower
    edge. sigma: standard deviation of one training's score, bpb."""
    figure, axes = _figure()
    scored = [e for e in night.experiments if e.mean is not None and e.status is not None]
    losses = [e for e in scored if e.status == "discard"]
    kept = [e for e in scored if e.status == "keep"]
    failed = [e for e in night.experiments if e.status in FAILURES]
    last = max((e.n for e in night.experiments), default=0)
    axes.set_xlim(-0.02 * max(last, 4), 1.02 * max(last, 4))
    beyond: list[Experiment] = []
    if kept:
        lowest = min((e.mean or 0.0) - BEYOND_NOISE * (error_of(e, sigma) or 0.0) for e in kept)
        low, high = limits(kept[0].mean or 0.0, lowest, kept[0].scores, [e.mean or 0.0 for e in losses])
        axes.set_ylim(low, high)
        beyond = [e for e in losses if (e.mean or 0.0) > high]
    edge = axes.get_xaxis_transform()  # x in experiments, y in heights of the picture

    def dots(group: list[Experiment], colour: str, label: str) -> None:
        numbers, scores, errors = ([e.n for e in group], [e.mean or 0.0 for e in group], [error_of(e, sigma) or 0.0 for e in group])
        axes.errorbar(numbers, scores, yerr=errors, fmt="none", ecolor=colour, elinewidth=1, alpha=0.7)
        axes.scatter(numbers, scores, s=24, color=colour, label=label, zorder=3)

    def marks(group: list[Experiment], sign: str, height: float, colour: str, label: str) -> None:
        if group:
            axes.plot([e.n for e in group], [height] * len(group), sign, color=colour, ms=5, transform=edge, label=label)

    seen = [e for e in losses if e not in beyond]
    dots(seen, DISCARD, f"discarded ({len(losses)})")
    marks(beyond, "^", 0.985, DISCARD, f"of these above the picture ({len(beyond)})")
    marks(failed, "x", 0.02, FAILED, f"failed ({len(failed)})")
    dots(kept[:1], BASELINE, "baseline")
    dots(kept[1:], KEEP, f"kept ({len(kept[1:])})")
    if kept:
        stairs = [(e.n, e.mean or 0.0) for e in kept] + [(max(last, kept[-1].n + 0.5), kept[-1].mean or 0.0)]
        axes.step(*zip(*stairs, strict=True), where="post", color=KEEP, lw=1.6, label="best so far")
    if kept and sigma:
        bounds = [(e.mean or 0.0, BEYOND_NOISE * (error_of(e, sigma) or 0.0)) for e in (*kept, kept[-1])]
        low_edge, high_edge = [y - r for y, r in bounds], [y + r for y, r in bounds]
        label = f"±{BEYOND_NOISE:g} standard errors"
        axes.fill_between([x for x, _ in stairs], low_edge, high_edge, step="post", color=KEEP, alpha=0.13, lw=0, label=label)
    axes.set_xlabel("experiment (a bar through a point: ± one standard error of its mean)" if sigma else "experiment")
    axes.set_ylabel("val_bpb (bits per byte, lower is better)")
    axes.set_title(results.last_line(night).replace("$", r"\$"), fontsize=9, loc="left", wrap=True)
    handles, labels = axes.get_legend_handles_labels()
    below = [e for e in seen if any(k.n < e.n for k in kept) and (e.mean or 0.0) < min(k.mean or 0.0 for k in kept if k.n < e.n)]
    if handles:
        figure.legend(handles, labels, fontsize=8, frameon=False, loc="lower center", ncol=min(len(handles), 7))
    figure.tight_layout(rect=(0, 0.075 if below else 0.04, 1, 1))
    if below:
        text = f"{len(below)} discarded below the best so far: by the trainings that were compared, their lead may be luck"
        figure.text(0.5, 0.053, text, fontsize=8, ha="center", color="#57606a")
    if kept:
        describe(axes, kept, stairs, [(e.n, e.mean or 0.0) for e in scored])
    _save(figure, path)


def draw_costs(night: Night, path: Path) -> None:
    """Draw the best score so far against hours and, if the agent cost something, against US dollars."""
    done = [e for e in night.experiments if e.status is not None]
    hours, money, levels = [(e.ended - night.started) / 3600 for e in done], [0.0], [float("nan")]
    for experiment in done:
        money.append(money[-1] + experiment.cost)
        levels.append((experiment.mean if experiment.status == "keep" else None) or levels[-1])
    money, levels, spent = money[1:], levels[1:], money[-1]
    figure, axes = _figure(2 if spent else 1, height=3.0)
    for one, across, label in zip(axes if spent else [axes], (hours, money), ("hours", "US dollars"), strict=False):
        one.step(across, levels, where="post", color=KEEP, lw=1.6)
        one.set_xlabel(label)
        one.xaxis.set_major_locator(_locator(integer=False))
    (axes[0] if spent else axes).set_ylabel("best val_bpb")
    figure.tight_layout()
    _save(figure, path)


def _locator(**options: Any) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(**options)


def _figure(columns: int = 1, height: float = 5.6) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(10, height), dpi=120, sharey=True)
    for one in axes if columns > 1 else [axes]:
        one.xaxis.set_major_locator(_locator(integer=True))
        one.ticklabel_format(axis="y", useOffset=False)
        one.grid(alpha=0.25)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    pyplot.close(figure)
    write_anew(path, content.getvalue())


def limits(baseline: float, best: float, seeds: list[float], discards: list[float]) -> tuple[float, float]:
    """Lower and upper end of the y axis, bpb: it shows every keep and every discard, except discards that are far worse."""
    low = min([best, *seeds, *discards])
    won, most = baseline - best, max(seeds)
    if discards:
        ranked = sorted(discards)
        first, middle, third = (ranked[int(part * (len(ranked) - 1))] for part in (0.25, 0.5, 0.75))
        most = max(most, min(ranked[-1], third + 1.5 * (third - first), best + 4 * (middle - best)))
        if won > 0:
            most = min(most, max(baseline + 6 * won, max(seeds)))  # bad discards must not shrink the gain to nothing
    top = max(most, baseline + 0.3 * won, low + 0.004 * baseline)
    return low - 0.12 * (top - low), top + 0.05 * (top - low)


def describe(axes: Axes, kept: list[Experiment], stairs: list[Point], points: list[Point]) -> None:
    """Label the keeps, those with the largest gain first. A keep without a free place beside it gets no label."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    to_pixels = axes.transData.transform
    corners = [point for (x, y), (right, low) in pairwise(stairs) for point in ((x, y), (right, y), (right, low))]
    taken = [Bbox([a, b]).padded(2) for a, b in pairwise(to_pixels(corners))]
    taken += [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in to_pixels(points)]
    figure: Any = axes.figure
    room, drawer = axes.get_window_extent(), figure.canvas.get_renderer()
    gains = {e.n: (before.mean or 0.0) - (e.mean or 0.0) for before, e in pairwise(kept)}
    for experiment in sorted(kept[1:], key=lambda e: -gains[e.n]):
        text = f"{experiment.n}: {experiment.description}"
        text = (text if len(text) <= 40 else text[:39] + "…").replace("$", r"\$")
        point = (experiment.n, experiment.mean or 0.0)
        note = axes.annotate(
            text, point, xytext=(0, 0), textcoords="offset points", fontsize=7, color=KEEP,
            arrowprops={"arrowstyle": "-", "color": KEEP, "lw": 0.4, "alpha": 0.6},
        )  # fmt: skip
        for across, along, down in PLACES:
            note.set(position=(across, -down), ha=along, va="top" if down > 0 else "bottom")
            note.update_positions(drawer)
            box = Text.get_window_extent(note, drawer)  # of the text alone, without the line to its point
            free = not any(box.overlaps(other) for other in taken)
            if free and room.x0 <= box.x0 and box.x1 <= room.x1 and room.y0 + 12 <= box.y0 and box.y1 <= room.y1:
                taken.append(box.padded(2))
                break
        else:
            note.remove()


def facts(night: Night, sigma: float, diff: Callable[[str, str], str] = lambda parent, commit: "") -> dict[str, Any]:
    """The content of the report as plain data, not escaped. sigma: standard deviation of one training's score, bpb. diff: returns
    the diff between two commits."""
    kept, before = [], night.baseline
    for experiment in (night.experiments[n] for n in night.kept):
        gain = (before.mean or 0.0) - (experiment.mean or 0.0) if before else 0.0
        words = compared(experiment, before, sigma) if before else ""
        shown = diff(before.commit or night.base, experiment.commit or "") if before else ""
        kept.append({**_told(experiment, sigma), "gain": f"{gain:+.4f}", "words": words, "diff": visible(shown[:DIFF_CHARACTERS])})
        before = experiment
    baseline, leader = night.baseline, night.leader if night.best is not None else None
    whole = diff(baseline.commit or night.base, leader.commit or "") if night.kept and baseline and leader else ""
    missed = near_misses(night, sigma)
    return {
        "tag": night.tag, "won": results.last_line(night).partition("; branch")[0], "sigma": f"{sigma:.4f}",
        "about": _about(night), "kept": kept, "whole": visible(whole[:DIFF_CHARACTERS]), "tests": _tests(night),
        "stories": _stories(night),
        "near": [{**_told(e, sigma), "words": words} for e, _, words in missed],
        "families": families(night.done), "next": _next(night, missed), "notes": [one_line(note, 300) for note in night.notes],
        "all": [_told(e, sigma) for e in night.experiments if e.status is not None],
        "spent": _spent(night),
    }  # fmt: skip


def page(known: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The report as one HTML file that loads nothing else. The template escapes everything that comes from agents and logs."""
    from jinja2 import Environment, FileSystemLoader

    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    drawn = {name: base64.b64encode(content).decode() for name, content in pictures.items()}
    return templates.get_template("report.html").render({**known, **drawn})


def markdown(known: Mapping[str, Any], branch: str) -> str:
    """The report in short, for a pull request."""
    lines = [f"# {plain(known['won'])}", "", plain(known["about"]), "", f"Branch `{branch}`. {plain(known['spent'])}.", ""]
    if known["kept"]:
        lines += ["| # | kept change | val_bpb | gain |", "| ---: | --- | ---: | ---: |"]
        lines += [f"| {e['n']} | {plain(e['description'])} | {e['score']} | {e['gain']} |" for e in known["kept"]]
    else:
        lines.append("Nothing was kept.")
    for test in known["tests"]:
        lines += ["", f"Held-out test, {test['name']}: {plain(test['test'])} (this training on validation text: {test['val']})"]
    if known["near"]:
        lines += ["", "Near misses:", ""]
        lines += [f"- {e['n']}, {plain(e['description'])}: {plain(e['words'])}. Verdict: {plain(e['reason'])}"
                  for e in known["near"]]  # fmt: skip
    if known["next"]:
        lines += ["", "What to try next:", ""] + [f"- {plain(line)}" for line in known["next"]]
    return "\n".join(lines) + "\n"


def plain(text: str) -> str:
    """One line with all Markdown and HTML escaped, so that an agent's words cannot become a heading, a link or a mention."""
    return re.sub(r"([\\`*_{}\[\]<>()#|~!@])", r"\\\1", one_line(text, 300))


def near_misses(night: Night, sigma: float, most: int = 8) -> list[tuple[Experiment, float, str]]:
    """Discarded experiments whose score is better than that of the best at their time, or worse by less than the noise. Each comes
    with its gain (bpb) and the comparison in words; the largest gain is first."""
    found, best = [], night.baseline
    for experiment in night.experiments[1:]:
        if experiment.status == "keep":
            best = experiment
        elif experiment.status == "discard" and best and best.mean is not None and experiment.mean is not None:
            words = compared(experiment, best, sigma)
            gain, count = best.mean - experiment.mean, len(experiment.scores)
            if gain > 0 or "within" in words:
                if "noise" in experiment.reason:  # the verdict's own comparison counts, perhaps of fewer trainings: one is enough
                    words = words.partition(", ")[0]
                found.append((experiment, gain, f"{words}, after {count} training{'s' * (count != 1)}"))
    return sorted(found, key=lambda item: -item[1])[:most]


def _next(night: Night, missed: list[tuple[Experiment, float, str]]) -> list[str]:
    """What to try next, as far as the numbers suggest it."""
    lines = []
    if hopeful := [f"{e.n} ({one_line(e.description, 80)})" for e, gain, _ in missed if gain > 0][:4]:
        together = "Combine these, each of which" if len(hopeful) > 1 else "Combine this one with something else; it"
        lines.append(f"{together} was ahead, but by too little to rule out luck: {', '.join(hopeful)}")
    table = families(night.done)
    if good := [f["family"] for f in table if f["kept"]][:3]:
        lines.append(f"Try more ideas of the kinds that were kept most often: {', '.join(good)}")
    if idle := [f"{f['family']} ({f['tried']} tried)" for f in table if not f["kept"] and f["tried"] >= 5][:4]:
        lines.append(f"Try fewer ideas of the kinds that were never kept: {', '.join(idle)}")
    counts = {s: sum(e.status == s for e in night.done) for s in FAILURES}
    if often := [f"{count} {s}" for s, count in counts.items() if count >= max(2, len(night.done) / 10)]:
        lines.append(f"Say in program.md how to avoid frequent failures: {', '.join(often)}")
    return lines


def _about(night: Night) -> str:
    done, counts = night.done, {s: sum(e.status == s for e in night.done) for s in STATUSES}
    words = {"keep": "kept", "discard": "discarded"}
    verdicts = ", ".join(f"{count} {words.get(s, s)}" for s, count in counts.items() if count)
    ended = f" The night ended: {ENDS.get(night.ended, night.ended)}." if night.ended else ""
    data, budget = night.dataset.get("id") or "its data", night.dataset.get("budget") or "one budget"
    budget = re.sub(r"^([\d.]+[kM]?)(s|steps|tokens)$", r"\1 \2", budget)
    who = f" Changes were proposed by {proposer(night)}." if night.agent else ""
    return f"{night.train_file} on {data}, {budget} per training.{who} {len(done)} experiments: {verdicts or 'none'}.{ended}"


def _spent(night: Night) -> str:
    parts = [results.lasting(night.last - night.started), f"{night.trials} trainings"]
    if night.tokens or night.cost or night.unpriced:
        parts += [f"{night.tokens:,} tokens of the agent", f"${night.cost:.2f}"]
    return ", ".join(parts) + (" and calls of unknown price" if night.unpriced else "")


def _told(experiment: Experiment, sigma: float) -> dict[str, Any]:
    return {
        "n": experiment.n, "status": experiment.status, "score": score(experiment, sigma), "trainings": len(experiment.scores),
        "description": one_line(experiment.description, 200), "hypothesis": one_line(experiment.hypothesis, 400),
        "reason": one_line(experiment.reason, 300),
    }  # fmt: skip


def _tests(night: Night) -> list[dict[str, str]]:
    rows = []
    for n, test in sorted(night.tests.items()):
        scored = test.get("test_bpb") is not None
        told = f"{test['test_bpb']:.4f}" if scored else f"refused: {one_line(str((test.get('error') or {}).get('message')), 200)}"
        gap = f"{test['test_bpb'] - test['val_bpb']:+.4f}" if scored else ""
        rows.append({"name": night.experiments[n].name, "val": f"{test['val_bpb']:.4f}", "test": told, "gap": gap})
    return rows


def _stories(night: Night) -> list[dict[str, Any]]:
    """The texts that baseline and best wrote from the same prompts, side by side."""
    sides = [(night.experiments[n].name, texts) for n, texts in sorted(night.stories.items()) if n in (0, night.best)]
    prompts = [text["prompt"] for text in sides[0][1]] if sides else []
    return [
        {"prompt": prompt, "sides": [{"name": name, "text": next((t["text"] for t in texts if t["prompt"] == prompt), "")}
                                     for name, texts in sides]}
        for prompt in prompts
    ]  # fmt: skip


def summary(night: Night, pid: int | None, sigma: float = 0.0) -> str:
    """The night in plain text: status, what was kept, what the agent used, the held-out test."""
    lines = results.status(night, pid, sigma)
    if night.kept:
        lines.append("kept:")
    previous = night.baseline
    for n in night.kept:
        experiment = night.experiments[n]
        before, after = previous.mean if previous else None, experiment.mean
        gain = f" ({after - before:+.4f})" if before is not None and after is not None else ""
        lines.append(f"  {n:>4}  {(experiment.commit or '')[:7]}  {after or 0.0:.4f}{gain}  {experiment.description}")
        previous = experiment
    asked = [e for e in night.experiments if e.tokens or e.cost]
    if asked:
        lines.append("what the agent used, by experiment:")
        lines += [f"  {e.n:>4}  {e.tokens:>9,} tokens  ${e.cost:.4f}  {e.status or 'open':<11}  {e.description}" for e in asked]
    lines += [f"held-out test, {t['name']}: test_bpb {t['test']}, val_bpb {t['val']}" + f", gap {t['gap']}" * bool(t["gap"])
              for t in _tests(night)]  # fmt: skip
    return "\n".join(lines)
