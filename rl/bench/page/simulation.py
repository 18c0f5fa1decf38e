"""Section about sizes that this machine does not have: more generators, simulated or emulated."""

from collections.abc import Callable

from rl.bench.numbers import digits, seconds, share
from rl.bench.page.block import NUM_COLOURS, Figure, Legend, Section, Table
from rl.bench.page.plot import Line, plot
from rl.bench.page.svg import Format, Scale, scale
from rl.bench.results import Results, Simulation
from rl.bench.spread import Spread
from rl.bench.targets import ASYNC_EFFICIENCY

_CHARTS: tuple[tuple[str, Callable[[Simulation], float], float, Format], ...] = (
    ("Bound over update time", lambda one: one.bound_s / one.update_s, 1.0, lambda value: f"{value:.2f}"),
    ("Wasted tokens", lambda one: one.wasted_share, 0.1, share),
)
"""Title, what is drawn, the least that the scale goes up to, and how it is written."""


def simulation_section(results: Results) -> Section:
    """Efficiency, waste and staleness against the number of generators."""
    points = [one for one in results.simulations if one.update_s > 0]
    figures = []
    for kind in dict.fromkeys((one.placement, one.stack) for one in points):
        of = [one for one in points if (one.placement, one.stack) == kind]
        series: dict[tuple[int, str], list[Simulation]] = {}
        for one in sorted(of, key=lambda one: (one.max_staleness, one.policy, one.num_generators)):
            series.setdefault((one.max_staleness, one.policy), []).append(one)
        colours = {key: f"c{place % NUM_COLOURS}" for place, key in enumerate(series)}
        legend = [
            Legend(f"max_staleness {bound}, {policy}", colours[bound, policy], "line") for bound, policy in series
        ]
        counts = sorted({one.num_generators for one in of})
        sizes = Scale(counts[0], counts[-1], log=True)
        where = f"{kind[0]}, {'no stack' if kind[1] == 'loop' else kind[1]}"
        for title, read, highest, words in _CHARTS:
            lines = [
                Line(f"max_staleness {key[0]}, {key[1]}", colours[key],
                     [(one.num_generators, _exact(read(one))) for one in ones])
                for key, ones in series.items()
            ]  # fmt: skip
            high = scale([highest, *(one.median for line in lines for _, one in line.points)], zero=True).rounded()
            drawing = plot(
                lines,
                sizes,
                high,
                x_title="generators",
                x_format=lambda at: f"{at:,.0f}",
                x_ticks=counts,
                y_format=words,
            )
            figures.append(Figure(drawing, f"{title} ({where})", legend))
    rows = [
        (
            f"{one.num_generators:,} generators, {one.placement}, {one.stack}", str(one.max_staleness), one.policy,
            seconds(one.update_s), f"{one.bound_s / one.update_s:.2f} ({seconds(one.bound_s)})",
            share(one.wasted_share), digits(one.staleness_mean, 2),
            f"{share(one.trainer_idle)} / {share(one.generator_idle)}",
        )
        for one in points
    ]  # fmt: skip
    header = ("size", "max_staleness", "policy", "update time", "of its bound", "wasted", "staleness, mean",
              "idle trainer / generator")  # fmt: skip
    intro = "`simulated`: the real loop in virtual time, by models of latency that were fitted to measured calls; "
    intro += f"`emulated`: real processes, device time slept. {ASYNC_EFFICIENCY} of the bound is the aim."
    tables = [Table(header, rows)] if rows else []
    return Section("simulation", "Sizes beyond this machine", intro, figures, tables)


def _exact(value: float) -> Spread:
    return Spread(median=value, low=value, high=value, n=1)
