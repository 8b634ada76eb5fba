"""`audit report`: one HTML page that an auditor opens without a network.

The log is read once, verified as it is read; what is kept of it are counts, and so memory grows with the
number of DEKs and hours and not of records. The page has no script and fetches nothing, by a policy in its
own head; every text from the log or the store goes through `esc`.
"""

from __future__ import annotations

import heapq
import html
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from .. import __version__
from ..audit.chain import Report
from ..encoding import timestamp
from ..service.usage import near
from ..store.contract import DekRecord, Usage
from ..store.policy import PENDING_DELETION, SHREDDED
from ..store.sealed import Reader
from .auditcounts import EVENTS, Counts
from .auditsearch import missing
from .console import safe

BARS = 96
"""Bars of the chart at most: four days by the hour; a longer time is put together by days."""

DAYS = 20 * BARS
"""Bars of days at most: five years."""

MOST = 20
"""Rows of "used most" and of "never used" that are shown."""

STALE_DAYS = 90
"""DEKs that were not used for so long are counted: they may be ripe for a shred."""

WORDS = 1000
"""Characters that are shown of an event."""

PAGE = 1000

WIDTH = 960  # of the chart, in units of its own

_HATCH = (
    '<defs><pattern id="h" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<line x1="0" y1="0" x2="0" y2="5" stroke="currentColor" stroke-width="2"/></pattern></defs>'
)


class Holdings(NamedTuple):
    """What the page tells of the store."""

    states: Mapping[tuple[str, str], int]  # kek_id, state
    active: str
    due: Sequence[DekRecord]  # the first of them
    never: Sequence[str]
    unused: int
    total: int
    usage: Mapping[str, Usage]  # of those that are named
    stale: int
    heavy: Mapping[str, int]


def holdings(reader: Reader, used: Counter[bytes], now: float) -> Holdings:
    states: Counter[tuple[str, str]] = Counter()
    due: list[DekRecord] = []
    never: list[str] = []
    unused = stale = 0
    since = timestamp(now - STALE_DAYS * 86400)
    for record, usage in _records(reader):
        if record.state != SHREDDED:
            last = timestamp(usage.last) if usage else ""
            stale += max(record.created_at, last) < since
        states[record.kek_id, record.state] += 1
        if record.state == PENDING_DELETION:
            due.append(record)
            if len(due) > 2 * EVENTS:
                due = _first(due)
        if record.state != SHREDDED and record.key_id.encode() not in used:
            unused += 1
            if len(never) < MOST:
                never.append(record.key_id)
    active = reader.state().active
    named = [*never, *(_text(name) for name, _ in most(used))]
    kept = (reader.usage(named), stale, reader.heavy())
    kek_id = active.kek_id if active else ""
    return Holdings(states, kek_id, _first(due), never, unused, sum(states.values()), *kept)


def most(used: Counter[bytes]) -> list[tuple[bytes, int]]:
    """Where two are used as often, by name: whoever counted them in whatever order."""
    return heapq.nsmallest(MOST, used.items(), key=lambda item: (-item[1], item[0]))


def _first(due: list[DekRecord]) -> list[DekRecord]:
    return sorted(due, key=lambda record: record.delete_at)[:EVENTS]


def _records(reader: Reader) -> Iterator[tuple[DekRecord, Usage | None]]:
    after = ""
    while page := reader.page(after, PAGE):
        usage = reader.usage([record.key_id for record in page])
        yield from ((record, usage.get(record.key_id)) for record in page)
        after = page[-1].key_id


# ---- the page --------------------------------------------------------------------------------------------


def esc(text: str) -> str:
    """As text of the page: neither markup, nor characters that turn round what stands beside them."""
    return html.escape(safe(text))


def _text(name: bytes) -> str:
    """Of a line that nobody vouches for it may be anything."""
    return name.decode("utf-8", "replace")


STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--dim:#5b6570;--line:#d5dae0;--ground:#fff;--bar:#2f6db3;
--bad:#b3261e;--good:#1d6b37}
@media (prefers-color-scheme:dark){:root{--ink:#e4e8ec;--dim:#9aa5b1;--line:#39414a;--ground:#14181d;
--bar:#6aa5e8;--bad:#ff8a80;--good:#7fd39a}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:62rem;padding:1.5rem 1rem 4rem;background:var(--ground);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;margin:0}h2{font-size:1.1rem;margin:2.2rem 0 .6rem}
p{margin:.4rem 0}.dim{color:var(--dim)}
.verdict{border:1px solid var(--line);border-left:.4rem solid var(--good);padding:.6rem .9rem;margin:1rem 0}
.verdict.bad{border-left-color:var(--bad)}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.25rem .8rem .25rem 0;border-bottom:1px solid var(--line);vertical-align:top;
overflow-wrap:break-word;min-width:4.5rem;max-width:28rem}
th{font-weight:600;color:var(--dim);font-size:.85rem}
td.n,th.n{text-align:right;white-space:nowrap}
code{font-size:.9em}
svg{display:block;color:var(--bar)}svg.chart{width:100%;height:12rem}svg.spark{width:10rem;height:1.25rem}
.axis{display:flex;justify-content:space-between}
@media (max-width:40rem){.spark{display:none}}
.bad-text{color:var(--bad);font-weight:600}
@media print{body{max-width:none;padding:0;font-size:11pt}h2{break-after:avoid}tr{break-inside:avoid}}
"""

BEGINS = b"<!doctype html>\n"
"""So each page begins."""

HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head><body>
"""


def page(counts: Counts, held: Holdings, report: Report, source: str, now: str) -> str:
    """The whole document. `source`: the data-dir; `now`: when it was made."""
    title = "progressdb-kms: audit report"
    parts = [
        HEAD.format(title=title, style=STYLE),
        f"<h1>{title}</h1>",
        f'<p class="dim">{esc(source)}, made {esc(now[:19])} UTC by progressdb-kms {esc(__version__)}; '
        f"records {_span(counts)}</p>",
        _verdict(report, counts.lines),
        _section("Calls by time", _chart(counts.calls)),
        _section("Calls by operation", _operations(counts.calls)),
        _section("Callers", _callers(counts.uids)),
        _section("DEKs by KEK and state", _states(held)),
        _section("DEKs used most", _most(counts.keys, held)),
        _section("DEKs never used in these records", _never(held)),
        _section("Deletions due", _due(held)),
        _section("Rotations, shreds, starts and the like", _events(counts.told)),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _section(title: str, body: str) -> str:
    return f'<section><h2>{esc(title)}</h2><div class="wide">{body}</div></section>'


def _span(counts: Counts) -> str:
    hours = sorted({hour for hour, _, _ in counts.calls})
    if not hours:
        return "none in this time"
    return f"from {esc(_text(hours[0]))}h to {esc(_text(hours[-1]))}h UTC"


def _verdict(report: Report, lines: int) -> str:
    files = f"{len(report.files)} file{'s' * (len(report.files) != 1)}"
    if report.fault is None:
        recovered = (
            f" {report.recoveries} torn records were closed by a recovery." if report.recoveries else ""
        )
        chains = f"{len(report.chains)} chain{'s' * (len(report.chains) != 1)}"
        told = f"{lines:,} records in {chains}, {files}"
        if late := sum(first > 1 for first, _ in report.chains.values()):
            told += f" ({late:,} of the chains begin in older files that were not read)"
        if report.unchecked:
            return (
                f'<div class="verdict bad"><strong class="bad-text">What is here verifies, and '
                f"something is not here.</strong> {told}: signatures and order agree; "
                f"{esc(missing(report))}.{recovered}</div>"
            )
        return (
            f'<div class="verdict"><strong>The chains verify.</strong> {told}: signatures, order and the '
            f"heads kept in the store agree.{recovered}</div>"
        )
    return (
        f'<div class="verdict bad"><strong class="bad-text">The log has a fault.</strong> '
        f"{esc(str(report.fault))}. Records up to there are verified; those behind it are counted below, and "
        f"nobody can vouch for them. {lines:,} records, {files}.</div>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[object]], numbers: Iterable[int] = ()) -> str:
    """Cells are escaped, but for those that are SVG made here. Of very many rows the first are shown."""
    right = set(numbers)
    kind = [' class="n"' if i in right else "" for i in range(len(head))]
    lines = [
        "<table><thead><tr>",
        *(f"<th{k}>{esc(name)}</th>" for name, k in zip(head, kind)),
        "</tr></thead><tbody>",
    ]
    for row in rows[:EVENTS]:
        lines.append("<tr>" + "".join(f"<td{k}>{_cell(cell)}</td>" for cell, k in zip(row, kind)) + "</tr>")
    return (
        "".join(lines) + "</tbody></table>" + _more(len(rows) - EVENTS)
        if rows
        else '<p class="dim">None.</p>'
    )


def _more(left: int) -> str:
    return f'<p class="dim">and {left:,} more</p>' if left > 0 else ""


class _Markup(str):
    """Text that was made here and needs no escaping."""


def _cell(value: object) -> str:
    if isinstance(value, _Markup):
        return value
    return f"{value:,}" if isinstance(value, int) else esc(str(value))


def _hours(calls: Mapping[tuple[bytes, bytes, bytes], int]) -> tuple[list[str], int]:
    """(the beginnings of the bars, how many characters of a time make one)."""
    hours = sorted({_text(hour) for hour, _, _ in calls})
    try:
        first, last = (datetime.strptime(hour, "%Y-%m-%dT%H") for hour in (hours[0], hours[-1]))
    except (IndexError, ValueError):
        return hours[-BARS:], 13
    step, size = (timedelta(hours=1), 13) if last - first < timedelta(hours=BARS) else (timedelta(days=1), 10)
    count = (last - first) // step + 2
    if count > DAYS:  # a clock was wrong for a while: the days that there are, side by side
        return sorted({hour[:size] for hour in hours})[-DAYS:], size
    found = [(first + step * i).strftime("%Y-%m-%dT%H")[:size] for i in range(count)]
    return [begin for begin in dict.fromkeys(found) if begin <= hours[-1][:size]], size


def _chart(calls: Mapping[tuple[bytes, bytes, bytes], int]) -> str:
    """Bars of all calls; what was refused or failed stands hatched on their feet."""
    begins, size = _hours(calls)
    if not begins:
        return '<p class="dim">No records.</p>'
    good, bad = dict.fromkeys(begins, 0), dict.fromkeys(begins, 0)
    for (hour, _, outcome), count in calls.items():
        begin = _text(hour)[:size]
        if begin in good:
            (good if outcome == b"ok" else bad)[begin] += count
    top = max(good[b] + bad[b] for b in begins) or 1
    gap = WIDTH / len(begins)
    bars = []
    for i, begin in enumerate(begins):
        x, w = i * gap, max(gap - 2, 0.8)
        low, high = bad[begin] / top * 180, good[begin] / top * 180
        told = f"<title>{esc(begin)}: {good[begin]:,} ok, {bad[begin]:,} refused or failed</title>"
        bars.append(
            f'<g>{told}<rect x="{x:.1f}" y="{180 - low - high:.1f}" width="{w:.1f}" height="{high:.1f}" '
            f'fill="currentColor"/><rect x="{x:.1f}" y="{180 - low:.1f}" width="{w:.1f}" height="{low:.1f}" '
            f'fill="url(#h)" stroke="currentColor" stroke-width=".5"/></g>'
        )
    unit = "hour" if size == 13 else "day"
    return (
        f'<p class="dim">{top:,} in the busiest {unit}. Full: answered. Hatched: refused or failed.</p>'
        f'<svg class="chart" viewBox="0 0 {WIDTH} 180" preserveAspectRatio="none" role="img" '
        f'aria-label="Calls by {unit}">{_HATCH}{"".join(bars)}</svg>'
        f'<p class="dim axis"><span>{esc(begins[0])}</span><span>{esc(begins[-1])}</span></p>'
    )


def _outcomes(counts: Mapping[Any, int], at: int) -> dict[bytes, Counter[bytes]]:
    result: dict[bytes, Counter[bytes]] = {}
    for names, count in counts.items():
        result.setdefault(names[at], Counter())[names[-1]] += count
    return result


def _operations(calls: Mapping[tuple[bytes, bytes, bytes], int]) -> str:
    begins, size = _hours(calls)
    by_op = _outcomes(calls, 1)
    rows = []
    for op, outcomes in sorted(by_op.items(), key=lambda item: (-sum(item[1].values()), item[0])):
        line: Counter[str] = Counter()
        for (hour, name, _), count in calls.items():
            if name == op:
                line[_text(hour)[:size]] += count
        rows.append(
            (
                op.decode(),
                outcomes[b"ok"],
                outcomes[b"refused"],
                outcomes[b"failed"],
                _spark([line[b] for b in begins]),
            )
        )
    return _table(("operation", "ok", "refused", "failed", "over the time"), rows, (1, 2, 3))


def _spark(values: Sequence[int]) -> _Markup:
    top = max(values, default=0) or 1
    step = 160 / max(len(values), 1)
    rects = "".join(
        f'<rect x="{i * step:.1f}" y="{20 - v / top * 20:.1f}" width="{max(step - 0.5, 0.5):.1f}" '
        f'height="{v / top * 20:.1f}" fill="currentColor"/>'
        for i, v in enumerate(values)
        if v
    )
    return _Markup(f'<svg class="spark" viewBox="0 0 160 20" aria-hidden="true">{rects}</svg>')


def _callers(uids: Mapping[tuple[bytes, bytes], int]) -> str:
    rows = [
        (uid.decode(), row[b"ok"], row[b"refused"], row[b"failed"], row[b"items"])
        for uid, row in sorted(
            _outcomes({row: count for row, count in uids.items() if row[0]}, 0).items(),
            key=lambda item: (-item[1][b"refused"], -sum(item[1].values()), item[0]),
        )
    ]
    return _table(("UID", "ok", "refused", "failed", "failed items of batches"), rows, (1, 2, 3, 4))


def _states(held: Holdings) -> str:
    rows = [
        (f"{kek_id} (active)" if kek_id == held.active else kek_id or "-", state, count)
        for (kek_id, state), count in sorted(held.states.items())
    ]
    stale = f" {held.stale:,} are older than {STALE_DAYS} days and were not used since." if held.stale else ""
    worn = "".join(f'<p class="bad-text">{esc(line)}</p>' for line in near(dict(held.heavy))[:MOST])
    total = f"{held.total:,} DEK" + "s" * (held.total != 1)
    return f"<p>{total}.{stale}</p>{worn}" + _table(("KEK", "state", "DEKs"), rows, (2,))


def _most(keys: Counter[bytes], held: Holdings) -> str:
    """Uses in these records, and what the store has counted since the DEK was made."""
    rows = []
    for key, count in most(keys):
        usage = held.usage.get(_text(key), Usage())
        uid = usage.uid if usage.uid >= 0 else ""
        rows.append((_text(key), count, usage.encrypts, usage.decrypts, _last(usage), f"{uid}"))
    head = ("key_id", "uses", "encrypts ever", "decrypts ever", "last used (UTC)", "by UID")
    return _table(head, rows, (1, 2, 3))


def _last(usage: Usage | None) -> str:
    return timestamp(usage.last)[:19] if usage and usage.last else ""


def _never(held: Holdings) -> str:
    rows = [(name, _last(held.usage.get(name)) or "never") for name in held.never]
    return _table(("key_id", "last used (UTC)"), rows) + _more(held.unused - len(held.never))


def _due(held: Holdings) -> str:
    rows = [(record.delete_at, record.key_id, record.thread_id) for record in held.due]
    every = sum(count for (_, state), count in held.states.items() if state == PENDING_DELETION)
    return _table(("due", "key_id", "thread"), rows) + _more(every - len(rows))


def _events(told: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            event["ts"][:19],
            event["op"],
            event["outcome"],
            event.get("uid", ""),
            _about(event),
        )
        for event in reversed(told)
    ]
    return _table(("time (UTC)", "operation", "outcome", "UID", "what"), rows)


_PLAIN = frozenset(
    (
        *("ts", "op", "outcome", "uid", "chain", "seq", "prev", "sig"),
        *("status", "gid", "pid", "actor", "request_id", "previous"),
    )
)


def _about(event: Mapping[str, Any]) -> str:
    text = ", ".join(
        f"{name} {value}" for name, value in event.items() if name not in _PLAIN and value is not None
    )
    return text if len(text) <= WORDS else f"{text[:WORDS]} …"
