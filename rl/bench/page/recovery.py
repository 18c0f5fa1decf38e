"""Section about recovery: from SIGKILL to the role being there again, and to the next update."""

from rl.bench.numbers import seconds, with_spread
from rl.bench.page.bars import Bar, bar_chart
from rl.bench.page.block import Figure, Legend, Section, Table, check
from rl.bench.page.svg import scale
from rl.bench.results import Recovery, Results
from rl.bench.spread import STACKS, spread_of


def recovery_section(results: Results) -> Section:
    """Timelines that begin at the kill, and what it cost."""
    groups: dict[tuple[str, str], list[Recovery]] = {}
    order = {name: place for place, name in enumerate(STACKS)}
    for one in sorted(results.recoveries, key=lambda one: (one.killed, order.get(one.stack, len(order)), one.seed)):
        groups.setdefault((one.killed, one.stack), []).append(one)
    bars, rows, before = [], [], ""
    for (killed, stack), of in groups.items():
        whole = [one for one in of if not one.error]
        back, update = spread_of(one.back_s for one in whole), spread_of(one.next_update_s for one in whole)
        lost, doubled, again = (sum(getattr(one, name) for one in whole)
                                for name in ("samples_lost", "samples_doubled", "repeated_updates"))  # fmt: skip
        rows.append(
            (
                f"{killed} of {stack}", f"{len(whole)} of {len(of)}", with_spread(back, "s"), with_spread(update, "s"),
                str(lost), str(doubled), str(again), check(len(whole) == len(of) and not lost and not doubled),
            )
        )  # fmt: skip
        if back is not None and update is not None:
            # A trainer's next update may be the older one's last, before the role is there again.
            first, second = sorted(((back.median, "back"), (update.median, "update")))
            parts = [
                (first[0], "c2" if first[1] == "back" else "c3", _words(first)),
                (second[0] - first[0], "c2" if second[1] == "back" else "c3", _words(second)),
            ]
            heading = f"{killed} killed" if killed != before else ""
            bars.append(Bar(stack, f"{seconds(back.median)} · {seconds(update.median)}", "c2", parts, heading=heading))
            before = killed
    lengths = scale([sum(length for length, _, _ in bar.parts) for bar in bars], zero=True)
    legend = [Legend("until the role is there again", "c2"), Legend("until the next update", "c3")]
    figures = [Figure(bar_chart(bars, lengths), "From the kill (SIGKILL)", legend, wide=True)] if bars else []
    header = ("killed", "recovered", "back after", "next update after", "groups lost", "groups doubled",
              "updates done again", "whole")  # fmt: skip
    note = " ".join(
        f"{one.killed} of {one.stack}, seed {one.seed}: {one.error}." for one in results.recoveries if one.error
    )
    return Section("recovery", "Recovery", figures=figures, tables=[Table(header, rows, note=note)] if rows else [])


def _words(end: tuple[float, str]) -> str:
    what = {"back": "the role is there again", "update": "the next update is done"}[end[1]]
    return f"{what} after {seconds(end[0])}"
