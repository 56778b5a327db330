"""A model's answer as an edited file: SEARCH/REPLACE blocks or the whole file, applied in exactly one way or refused by name.

Small models wrap, indent and decorate what they write. Whatever can be applied in exactly one way is applied; a SEARCH that
matches two places, or none, is an `EditError` whose text is written for the model. Nothing here reads or writes a file, and the
work is bounded: an answer costs less than a second, whatever is in it.
"""

from __future__ import annotations

import ast
import difflib
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

# Limits that keep the work small. A train file has 800 lines with 40,000 characters.
MAX_CHARACTERS = 300_000  # in an answer, its thoughts aside
MAX_THOUGHTS = 600_000  # characters; longer ones are not searched for blocks
MAX_GROWTH = 3_000  # lines that an answer may add to the file
MAX_BLOCKS = 50
MAX_MIDDLES = 4  # lines in one block that look like =======
MAX_ELISIONS = 40  # lines in an answer that look like ...
SHOWN_LINES = 14  # of the file, in an error
_MARKER_LENGTH = 300  # a longer line is no marker

# What ends a model's thoughts in its text. The last one in an answer counts: a template may have opened them already.
_THOUGHT_ENDS = ("</think>", "</thinking>", "</thought>", "</reasoning>", "[/THINK]", "</seed:think>", "<|end_of_thought|>",
                 "<|channel|>final<|message|>", "◁/think▷")  # fmt: skip
_THOUGHT_STARTS = ("<think>", "<thinking>", "<thought>", "<reasoning>", "[THINK]", "<seed:think>", "<|begin_of_thought|>",
                   "<|channel|>analysis", "◁think▷")  # fmt: skip
_END_TOKEN = re.compile(r"(?:<\|[a-z_]{1,30}\|>|</s>|<eos>|<end_of_turn>|\[/INST\])\Z")
_OPENING = re.compile(
    r"(?:[-*+>]|\d{1,3}[.)])?[ \t]{0,8}<{5,9}[ \t]{0,8}(?:[\w./-]{1,100}[ \t]{1,8})?(?:SEARCH|ORIGINAL|HEAD)\b", re.I
)
_FENCE = re.compile(r"(`{3,}|~{3,})[\w+.-]{0,40}(?:[ \t][^`]*)?\Z")
_ELISION = re.compile(
    r"(?:#|//)?\s?(?:\.\.\.|…).*|#.*(?:\.\.\.|…)|#\W*(?:the )?(?:rest|remain|other|existing|previous|unchanged)\b.*"
    r"(?:unchanged|same|code|as before|here|omitted|function)\W*",
    re.I,
)
_CALLED_BY_THE_HARNESS = "load_model", "start_run"  # the scorer calls the first; the second ties a training to its run directory


class EditError(Exception):
    """An answer that can't be applied. `name` is one word; the message says what was expected and what came; `shown` are the
    lines of the file that come nearest, for the model's second attempt."""

    def __init__(self, name: str, message: str, shown: str = "") -> None:
        super().__init__(f"{name}: {message}")
        self.name = name
        self.shown = shown


def spoken(text: str) -> tuple[str, str]:
    """An answer without its thoughts, and the thoughts. Thoughts that never end are all that there is after their beginning."""
    end = max((at + len(mark) for mark in _THOUGHT_ENDS if (at := text.rfind(mark)) >= 0), default=0)
    start = min((at for mark in _THOUGHT_STARTS if (at := text.find(mark, end)) >= 0), default=len(text))
    said = text[end:start].rstrip()
    while hit := _END_TOKEN.search(said, max(0, len(said) - 40)):
        said = said[: hit.start()].rstrip()
    return said.strip("\r\n"), text[:end] + text[start:]


def apply_answer(source: str, answer: str, reasoning: str = "") -> str:
    """`source` as the answer wants it. Raises EditError, and then nothing is applied:

    too_long, no_blocks, unfinished_block, empty_search, not_found, ambiguous, elision, no_change, not_python, breaks_contract.
    `reasoning` is what the model thought beside its answer: it counts only where the answer itself holds no edit."""
    text, thoughts = spoken(answer)
    if len(text) > MAX_CHARACTERS:
        raise EditError("too_long", f"the reply has {len(text):,} characters; expected a few short blocks")
    newline = "\r\n" if "\r\n" in source else "\n"
    old = source.replace("\r\n", "\n")
    new = _edited(old, text.replace("\r\n", "\n"), (thoughts + "\n" + reasoning).replace("\r\n", "\n"))
    if new == old:
        raise EditError("no_change", "the reply leaves the file as it was")
    _require_sound(old, new)
    return new.replace("\n", newline)


def _edited(old: str, text: str, thoughts: str) -> str:
    blocks = _blocks(text)
    if not blocks:
        whole = _whole_file(old, text)
        if whole is not None:
            return whole
        # Some servers put the whole reply into the reasoning. Drafts of one place contradict each other, and are refused.
        for mark in (*_THOUGHT_STARTS, *_THOUGHT_ENDS):
            thoughts = thoughts.replace(mark, "\n")
        with_edit = [] if text.strip() or len(thoughts) > MAX_THOUGHTS else _blocks(thoughts)
        if not with_edit:
            raise EditError("no_blocks", "expected at least one SEARCH/REPLACE block, found none" + ("" if text.strip() else
                            ": the reply is empty" + (" but for its reasoning" if thoughts.strip() else "")))  # fmt: skip
        blocks = with_edit
    lines = (old if old.endswith("\n") else old + "\n").split("\n")[:-1]
    if (gaps := len(_elisions([line for block in blocks for line in block.lines], old))) > MAX_ELISIONS:
        raise EditError("elision", f"{gaps:,} lines such as '...' leave code out; write every line")
    most = len(lines) + MAX_GROWTH
    for number, block in enumerate(blocks, 1):
        lines = _replace(lines, block, f"block {number} of {len(blocks)}")
        if len(lines) > most:
            raise EditError("too_long", f"the edited file has more than {most:,} lines; expected one small change")
    return "".join(line + "\n" for line in lines)


# --- reading an answer -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    lines: list[str]  # between its first and last marker
    middles: list[int]  # those that look like =======

    def readings(self) -> Iterator[tuple[list[str], list[str]]]:
        """SEARCH and REPLACE, once for each line that may be the one between them."""
        exact = [at for at in self.middles if len(self.lines[at].strip()) == 7]
        for at in exact if len(exact) == 1 else self.middles:
            yield _unfenced(self.lines[:at]), _unfenced(self.lines[at + 1 :])


def _blocks(text: str) -> list[_Block]:
    found: list[_Block] = []
    opened, complete = 0, True
    lines: list[str] = []
    for line in text.split("\n"):
        mark = line.strip() if len(line) < _MARKER_LENGTH else ""
        if mark and "<<<<<" in mark and _OPENING.match(mark):
            opened += 1
            if not complete or opened > MAX_BLOCKS:
                break
            complete, lines = False, []
        elif complete:
            continue
        elif mark.startswith(">>>>>"):
            middles = [at for at, body in enumerate(lines) if 5 <= len(body.strip()) <= 9 and set(body.strip()) == {"="}]
            if not middles or len(middles) > MAX_MIDDLES:
                break
            found.append(_Block(lines, middles))
            complete = True
        else:
            lines.append(line)
    if opened > MAX_BLOCKS:
        raise EditError("too_long", f"expected at most {MAX_BLOCKS} blocks; send fewer")
    if not complete:
        raise EditError(
            "unfinished_block", f"{opened} blocks begin, {len(found)} are complete: <<<<<<< SEARCH, =======, >>>>>>> REPLACE"
        )
    return found


def _unfenced(lines: list[str]) -> list[str]:
    """Without a Markdown fence right inside the markers."""
    filled = [at for at, line in enumerate(lines) if line.strip()]
    if filled and _FENCE.match(lines[filled[0]].strip()[:_MARKER_LENGTH]):
        closed = len(filled) > 1 and set(lines[filled[-1]].strip()) <= {"`", "~"}
        return lines[filled[0] + 1 : filled[-1] if closed else len(lines)]
    return lines


def _whole_file(old: str, text: str) -> str | None:
    """The file that the answer holds in full instead of blocks; None where it holds none, or two different ones."""
    fenced: list[list[str]] = []
    fence = ""
    for line in text.split("\n"):
        mark = line.strip()[:_MARKER_LENGTH]
        if not fence and (opening := _FENCE.match(mark)):
            fence = opening[1]
            fenced.append([])
            if len(fenced) > MAX_BLOCKS:
                return None
        elif fence and mark.startswith(fence) and set(mark) == {fence[0]}:
            fence = ""
        elif fence:
            fenced[-1].append(line)
    if not fenced:
        fenced = [[line for line in text.split("\n") if not re.match(r"[\s*_`#>-]{0,9}(?:HYPOTHESIS|DESCRIPTION)\b", line)]]
    wholes = {"\n".join(lines).strip("\n") + "\n" for lines in fenced if _resembles(old, lines)}
    if len(wholes) != 1:
        return None
    whole = wholes.pop()
    if gap := _elisions(whole.split("\n"), old):
        raise EditError("elision", f"the file is sent whole but for what {gap[0]!r} leaves out; send blocks, or every line")
    if lost := _names(old) - _names(whole):
        raise EditError("elision", f"the file is sent whole but without {', '.join(sorted(lost)[:5])}; send blocks instead")
    return whole


def _resembles(old: str, lines: list[str]) -> bool:
    """Whether most of the file's lines are there."""
    wanted = Counter(line.strip() for line in old.split("\n") if line.strip())
    there = sum((wanted & Counter(line.strip() for line in lines)).values())
    return there >= max(1, 0.6 * wanted.total())


def _names(text: str) -> set[str]:
    """Functions and classes that begin a line: a file that is sent whole has lost none of them."""
    return set(re.findall(r"^(?:async def|def|class) (\w+)", text, re.M))


def _elisions(lines: list[str], old: str) -> list[str]:
    """Lines such as `# ... rest as before` that stand for code which was left out."""
    known = {line.strip() for line in old.split("\n")}
    marks = [mark for line in lines if (mark := line.strip())[:1] in {"#", "/", ".", "…"} and len(line) < _MARKER_LENGTH]
    return [mark for mark in marks if mark not in known and _ELISION.fullmatch(mark)]


# --- applying a block --------------------------------------------------------------------------------------------------


def _replace(lines: list[str], block: _Block, where: str) -> list[str]:
    """The file's lines with one block applied."""
    applied: list[list[str]] = []
    errors: list[EditError] = []
    for search, new in block.readings():
        try:
            applied.append(_apply(lines, search, new, where))
        except EditError as error:
            errors.append(error)
    if len(applied) == 1:
        return applied[0]
    if applied:
        raise EditError("ambiguous", f"{where}: more than one of its ======= lines may part SEARCH from REPLACE; send two blocks")
    raise errors[0]


def _apply(lines: list[str], search: list[str], new: list[str], where: str) -> list[str]:
    if not any(line.strip() for line in search):
        raise EditError("empty_search", f"{where} searches for nothing; put the lines to replace there, or lines to extend")
    file = "\n".join(lines)
    gaps, holes = _elisions(search, file), _elisions(new, file)
    if holes and len(holes) != len(gaps):
        raise EditError("elision", f"{where}: {holes[0]!r} in REPLACE leaves lines out, and they would be lost; write every line")
    if gaps and holes:
        after = 0
        for old_piece, new_piece in zip(_split(search, gaps), _split(new, holes), strict=True):
            if not old_piece and not new_piece:
                continue
            start, end, made = _place(lines, old_piece, new_piece, where)
            if start < after:
                raise EditError("not_found", f"{where}: the parts of SEARCH around {gaps[0]!r} stand in another order in the file")
            lines = lines[:start] + made + lines[end:]
            after = start + len(made)
        return lines
    start, end, made = _place(lines, search, new, where)
    return lines[:start] + made + lines[end:]


def _split(lines: list[str], marks: list[str]) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for line in lines:
        if line.strip() in marks:
            parts.append([])
        else:
            parts[-1].append(line)
    return [_filled(part)[0] for part in parts]


def _place(lines: list[str], search: list[str], new: list[str], where: str) -> tuple[int, int, list[str]]:
    """First line and end of SEARCH in the file, and REPLACE as it fits there.

    Lines are compared exactly; then without blanks at their ends and blank lines around; then without their indentation, if it
    differs in the same way in all lines. Two places of one kind are never guessed."""
    bare, before, after = _filled(search)
    if not bare:
        raise EditError("empty_search", f"{where} searches for nothing beside '...'; put the lines to replace there")
    trimmed = _trimmed(new, before, after)
    for key, wanted, made in ((str, search, new), (_plain, bare, trimmed), (str.strip, bare, trimmed)):
        starts = _runs(lines, wanted, key)
        shifted = key is str.strip and len(starts) <= 10  # else it's ambiguous, whatever the indentation
        places = []
        for start in starts:
            moved = _moved(wanted, lines[start : start + len(wanted)], made) if shifted else made
            if moved is not None:
                places.append((start, start + len(wanted), moved))
        if len(places) == 1:
            return places[0]
        if places:
            at = ", ".join(str(start + 1) for start, _, _ in places[:10])
            raise EditError("ambiguous", f"{where}: the lines of SEARCH, from {_first(search)!r}, occur {len(places)} times, at "
                            f"lines {at}; add lines before or after")  # fmt: skip
    gap = _elisions(search, "\n".join(lines))
    why = f"; {gap[0]!r} is no line of it: write every line between" if gap else ""
    message = f"{where}: the lines of SEARCH, from {_first(search)!r}, are not in the file as they stand{why}"
    raise EditError("not_found", message, _nearest(lines, bare))


def _runs(lines: list[str], wanted: list[str], key: Callable[[str], str]) -> list[int]:
    """Where `wanted` begins in `lines`, compared by `key`."""
    have, want = ("\n".join(["", *map(key, part), ""]) for part in (lines, wanted))
    starts, at, counted, number = [], -1, 0, 0
    while (at := have.find(want, at + 1)) >= 0:  # linear, where comparing at each line is not
        number, counted = number + have.count("\n", counted, at), at
        starts.append(number)
    return starts


def _plain(line: str) -> str:
    return line.replace("\u00a0", " ").rstrip()


def _filled(lines: list[str]) -> tuple[list[str], int, int]:
    """Without blank lines at both ends, and how many there were."""
    filled = [at for at, line in enumerate(lines) if line.strip()]
    if not filled:
        return [], len(lines), 0
    return lines[filled[0] : filled[-1] + 1], filled[0], len(lines) - 1 - filled[-1]


def _trimmed(new: list[str], before: int, after: int) -> list[str]:
    """REPLACE without as many blank lines at its ends as SEARCH lost there."""
    bare, first, last = _filled(new)
    if not bare:
        return []
    blank = [""]
    return blank * max(0, first - before) + bare + blank * max(0, last - after)


def _moved(wanted: list[str], found: list[str], new: list[str]) -> list[str] | None:
    """REPLACE indented as the file is, where SEARCH differs from it by a shift, or by two blanks for four; else None."""
    pairs = [(_indent(a), _indent(b)) for a, b in zip(wanted, found, strict=True) if a.strip()]
    base, target = pairs[0]
    for up, down in ((1, 1), (2, 1), (1, 2)):
        if all((have - target) * down == (want - base) * up for want, have in pairs):
            break
    else:
        return None
    moved = []
    for line in new:
        extra = (_indent(line) - base) * up
        if line.strip() and (extra % down or target + extra // down < 0):
            return None
        moved.append(" " * (target + extra // down) + line.lstrip() if line.strip() else "")
    return moved


def _indent(line: str) -> int:
    """Columns of blanks that begin a line; a tab reaches the next multiple of four."""
    return len(line[: len(line) - len(line.lstrip())].expandtabs(4))


def _first(search: list[str]) -> str:
    return next((line for line in search if line.strip()), "").strip()[:120]


def _nearest(lines: list[str], search: list[str]) -> str:
    """The lines of the file that come nearest to SEARCH, exactly as they stand; "" where nothing comes near."""
    wanted = {line.strip() for line in search if line.strip()}
    size = min(len(search), SHOWN_LINES)
    hits = [line.strip() in wanted for line in lines]
    count = sum(hits[:size])
    best, start = count, 0
    for at in range(1, max(1, len(lines) - size + 1)):
        count += hits[at + size - 1] - hits[at - 1]
        if count > best:
            best, start = count, at
    if not best:
        firsts = {line.strip()[:200]: at for at, line in reversed(list(enumerate(lines[:2000]))) if line.strip()}
        close = difflib.get_close_matches(_first(search), firsts, 1, 0.5)
        if not close:
            return ""
        start = max(0, firsts[close[0]] - 1)
    size = max(size, 3)
    return "\n".join(line[:200] for line in lines[start : start + size])


# --- the result --------------------------------------------------------------------------------------------------------


def _require_sound(old: str, new: str) -> None:
    """The result is Python and keeps what the harness needs of a train file, where the file had it. Raises EditError."""
    if len(new) > len(old) + MAX_CHARACTERS // 3:
        raise EditError("too_long", f"the edited file has {len(new):,} characters, was {len(old):,}; expected one small change")
    try:
        kept = _contract(new)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        lines = new.split("\n")
        shown = lines[line - 1].strip()[:120] if line and line <= len(lines) else ""
        said = str(error)[:200] or type(error).__name__
        raise EditError("not_python", f"the edited file does not parse: {said}: {shown!r}") from None
    try:
        needed = _contract(old)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        needed = set()
    if lost := sorted(needed - kept):
        raise EditError("breaks_contract", f"the edited file no longer {' and '.join(lost)}, which the harness needs; keep that")


def _contract(text: str) -> set[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an odd escape in a string is the model's own affair
        tree = ast.parse(text)
    defined, called = _CALLED_BY_THE_HARNESS
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == defined and (node.args.args or node.args.vararg):
            found.add(f"defines {defined}(run_dir)")
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == called:
            found.add(f"calls {called}()")
    return found
