"""Two results side by side: per cell and metric, the change and whether it is beyond the spread of both.

    Results, Results -> comparison -> Change(regression | improvement | changed | within spread), warnings

A change counts where the medians lie further apart than both spreads together, and further than `LEAST_CHANGE`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import ValidationError
from pydantic_core import from_json

from rl.bench.metric import METRICS, Better, Unit
from rl.bench.numbers import cell_name, size
from rl.bench.results import SCHEMA_VERSION, Recovery, Results, Transport
from rl.bench.spread import Spread, by_cell, spread_of
from rl.types import Frozen

LEAST_CHANGE = 0.02
"""Smaller changes are none, however small the spread; a share of the number before."""
_QUIET_CONFIG = {"quick"}

Verdict = Literal["regression", "improvement", "changed", "within spread"]
"""`changed`: beyond the spread, of a number of which neither direction is better."""


class ResultsError(Exception):
    """A file that is no results of this schema. The second argument is a hint."""


class Change(Frozen):
    """One number of one subject, before and after."""

    subject: str
    """A cell, a transport with its size, or a kill."""
    metric: str
    unit: Unit
    better: Better
    before: Spread
    after: Spread
    change: float | None
    """Of the median, as a share of the one before; None where that is 0."""
    verdict: Verdict


class Comparison(Frozen):
    """Everything that both results have, and what makes them hard to compare."""

    changes: tuple[Change, ...]
    lost: tuple[str, ...]
    """Subjects that the first results have, and whose every run failed in the second."""
    only_before: tuple[str, ...]
    """Other subjects that the second results do not have."""
    only_after: tuple[str, ...]
    warnings: tuple[str, ...]

    def of(self, verdict: Verdict) -> list[Change]:
        """The changes of one kind."""
        return [one for one in self.changes if one.verdict == verdict]


def read_results(path: Path) -> Results:
    """Raises `ResultsError` for what cannot be read, is no results, or has another schema."""
    hint = "give the path of a `results.json` that `orchestrate rl bench` wrote"
    try:
        data = from_json(path.read_bytes())
    except OSError as error:
        raise ResultsError(f"cannot read `{path}`: {error.strerror or error}", hint) from None
    except ValueError as error:
        raise ResultsError(f"cannot read `{path}`: not JSON: {error}", hint) from None
    if not isinstance(data, dict) or "schema_version" not in data:
        raise ResultsError(f"`{path}`: these are no results of a benchmark: `schema_version` is missing", hint)
    if data["schema_version"] != SCHEMA_VERSION:
        raise ResultsError(
            f"`{path}`: got schema version `{data['schema_version']}`, wanted `{SCHEMA_VERSION}`",
            "compare results of the same version of this project, or measure again",
        )
    try:
        return Results.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise ResultsError(f"`{path}`: `{place}`: {first['msg']}{more}", hint) from None


def compare(before: Results, after: Results) -> Comparison:
    """What changed from `before` to `after`."""
    old, new = _measurements(before), _measurements(after)
    changes = [
        change
        for subject in old
        if subject in new
        for metric, (unit, better, first) in old[subject].items()
        if metric in new[subject]
        for change in [_change(subject, metric, unit, better, first, new[subject][metric][2])]
    ]
    failed = _failed(after)
    missing = [subject for subject in old if subject not in new]
    return Comparison(
        changes=tuple(changes),
        lost=tuple(subject for subject in missing if subject in failed),
        only_before=tuple(subject for subject in missing if subject not in failed),
        only_after=tuple(subject for subject in new if subject not in old),
        warnings=tuple(_warnings(before, after, changes)),
    )


def _change(subject: str, metric: str, unit: Unit, better: Better, before: Spread, after: Spread) -> Change:
    difference = after.median - before.median
    verdict: Verdict = "within spread"
    if before.apart(after) and abs(difference) > LEAST_CHANGE * abs(before.median):
        worse = (difference > 0) == (better == "lower")
        verdict = "changed" if better == "neither" else "regression" if worse else "improvement"
    return Change(
        subject=subject, metric=metric, unit=unit, better=better, before=before, after=after,
        change=difference / abs(before.median) if before.median else None, verdict=verdict,
    )  # fmt: skip


def _failed(results: Results) -> set[str]:
    failed = {cell_name(run.key) for run in results.runs if run.error}
    failed |= {_transport_name(one) for one in results.transports if one.error}
    return failed | {_kill_name(one) for one in results.recoveries if one.error}


def _transport_name(one: Transport) -> str:
    return f"weights by {one.name}, {size(one.num_bytes)}"


def _kill_name(one: Recovery) -> str:
    return f"{one.killed} of {one.stack} killed"


Measured = dict[str, tuple[Unit, Better, Spread]]


def _measurements(results: Results) -> dict[str, Measured]:
    """Subject -> metric -> its number."""
    found: dict[str, Measured] = {}
    for key, runs in by_cell(results.runs).items():
        of = {metric.name: (metric.unit, metric.better, metric.over(runs)) for metric in METRICS}
        found[cell_name(key)] = {name: (unit, better, one) for name, (unit, better, one) in of.items() if one}
    for transport in results.transports:
        if transport.seconds and not transport.error:
            spread = spread_of(transport.seconds)
            if spread is not None:
                found[_transport_name(transport)] = {"seconds": ("s", "lower", spread)}
    for name in dict.fromkeys(_kill_name(one) for one in results.recoveries):
        whole = [one for one in results.recoveries if _kill_name(one) == name and not one.error]
        numbers: dict[str, tuple[Unit, Spread | None]] = {
            "back_s": ("s", spread_of(one.back_s for one in whole)),
            "next_update_s": ("s", spread_of(one.next_update_s for one in whole)),
            "samples_lost": ("", _exact(sum(one.samples_lost for one in whole) if whole else None)),
            "samples_doubled": ("", _exact(sum(one.samples_doubled for one in whole) if whole else None)),
        }
        known: Measured = {metric: (unit, "lower", one) for metric, (unit, one) in numbers.items() if one is not None}
        if known:
            found[name] = known
    return found


def _exact(count: int | None) -> Spread | None:
    """A number without spread: one lost sample is one too many."""
    return None if count is None else Spread(median=count, low=count, high=count, n=2)


def _warnings(before: Results, after: Results, changes: list[Change]) -> Iterator[str]:
    names = sorted({*before.config, *after.config} - _QUIET_CONFIG)
    for name in names:
        first, second = before.config.get(name), after.config.get(name)
        if first != second:
            yield f"the settings differ: `{name}` was `{first}` and is `{second}`"
    for field in ("processor", "num_cores", "memory_bytes", "system", "python"):
        first, second = getattr(before.machine, field), getattr(after.machine, field)
        if first != second:
            yield f"the machines differ: `{field}` was `{first}` and is `{second}`"
    for name in sorted({*before.machine.versions, *after.machine.versions}):
        first, second = (one.machine.versions.get(name, "not there") for one in (before, after))
        if first != second:
            yield f"the packages differ: `{name}` was `{first}` and is `{second}`"
    if before.quick or after.quick:
        which = "both are" if before.quick and after.quick else "one of them is"
        yield f"{which} from a quick run, which says little"
    failed = sorted(_failed(after))
    if failed:
        yield f"runs failed in the second results: {', '.join(failed)}"
    single = sum(change.before.n == 1 or change.after.n == 1 for change in changes)
    if single:
        yield f"{single} numbers are of a single run, whose spread is not known and assumed"
