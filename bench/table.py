"""The terminal's view of the measurements."""

from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

Result = dict[str, Any]
"""`{system, shape, count, kind, samples, cut_off_s?, error?}`; samples in seconds."""


def print_tables(results: list[Result], memory: dict[str, dict[str, float]]) -> None:
    """Medians by system and shape: inside the runtime, from the shell, and memory."""
    console = Console(width=None if Console().is_terminal else 140)
    systems = list(dict.fromkeys(result["system"] for result in results))
    for kind, title in (
        ("inside", "inside the runtime, warm"),
        ("shell", "from the shell"),
        ("cold", "from the shell, cold"),
    ):
        cells = {(found["system"], _name(found)): found for found in results if found["kind"] == kind}
        shapes = list(dict.fromkeys(shape for _, shape in cells))
        if not shapes:
            continue
        table = Table(title=f"seconds, {title} (ms per step)", title_justify="left")
        table.add_column("")
        for shape in shapes:
            table.add_column(shape, justify="right")
        for system in systems:
            row = [_cell(cells.get((system, shape))) for shape in shapes]
            if any(row):
                table.add_row(system, *row)
        console.print(table)
    table = Table("", "process", "MB", title="memory after the largest fan", title_justify="left")
    for system, processes in memory.items():
        for name, size in processes.items():
            table.add_row(system, name, f"{size:.0f}")
    console.print(table)


def print_ratios(results: list[Result], ours: str, floor: str) -> None:
    """Ours as a multiple of the floor, for the shapes that both have."""
    console = Console()
    for found in results:
        if found["system"] == ours and found["kind"] == "inside" and found["samples"]:
            same = [other for other in results if other["system"] == floor and _key(other) == _key(found)]
            if same and same[0]["samples"]:
                ratio = median(found["samples"]) / median(same[0]["samples"])
                console.print(f"{ours}, {_name(found)}: {ratio:.2f} x {floor}", highlight=False)


def _key(result: Result) -> tuple[Any, ...]:
    return result["kind"], result["shape"], result["count"]


def _name(result: Result) -> str:
    shape, count = result["shape"], result["count"]
    return {"one": "1 step", "chain": f"chain of {count}", "fan": f"{count} independent", "cached": f"{count} cached"}[
        shape
    ]


def _cell(result: Result | None) -> str:
    if result is None:
        return ""
    if result["samples"]:
        value = median(result["samples"])
        return f"{value:.3f} ({value / result['count'] * 1000:.1f})"
    if "cut_off_s" in result:
        return f"> {result['cut_off_s']:.0f}"
    return "failed" if "error" in result else "-"
