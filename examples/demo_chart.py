"""A horizontal bar chart with stacked parts, drawn with Pillow's own font: it needs no display and no font file."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

WIDTH = 1200
MARGIN = 48
ROW_HEIGHT = 36
BAR_HEIGHT = 20
SCALE = 2
"""Drawn this much larger, then reduced: Pillow does not smooth the edges of shapes."""

PAPER, INK, FAINT, GRID = "#ffffff", "#1f2933", "#66788a", "#e4e7eb"
COLOURS = ("#2f6fde", "#f0a202", "#7bb26f", "#a05195")

Bar = tuple[str, Sequence[int]]


def draw_bars(bars: Sequence[Bar], parts: Sequence[str], title: str, subtitle: str) -> Image.Image:
    """One bar per (name, values); `parts` names the values of every bar."""
    chart = _Canvas(WIDTH, 148 + ROW_HEIGHT * len(bars) + MARGIN + 24)
    chart.text((MARGIN, 40), title, 28)
    chart.text((MARGIN, 72), subtitle, 17, FAINT)
    _draw_legend(chart, parts)
    left = MARGIN + max(chart.width_of(name, 16) for name, _ in bars) + 14
    right = WIDTH - MARGIN - chart.width_of(f"{max(sum(values) for _, values in bars):,}", 15) - 10
    top, bottom = 138, 138 + ROW_HEIGHT * len(bars)
    step, scale = _ticks(max(sum(values) for _, values in bars), right - left)
    for tick in range(0, int((right - left) / scale) + 1, step):
        x = left + tick * scale
        chart.box((x, top - 6, x + 1, bottom + 2), GRID)
        chart.text((x, bottom + 20), f"{tick:,}", 13, FAINT, anchor="mm")
    for row, (name, values) in enumerate(bars):
        middle = top + ROW_HEIGHT * row + ROW_HEIGHT / 2
        chart.text((left - 10, middle), name, 16, anchor="rm")
        x = left
        for value, colour in zip(values, COLOURS, strict=False):
            chart.box((x, middle - BAR_HEIGHT / 2, x + value * scale, middle + BAR_HEIGHT / 2), colour)
            x += value * scale
        chart.text((x + 8, middle), f"{sum(values):,}", 15, FAINT, anchor="lm")
    return chart.finished()


def _draw_legend(chart: "_Canvas", parts: Sequence[str]) -> None:
    x: float = MARGIN
    for part, colour in zip(parts, COLOURS, strict=False):
        chart.box((x, 98, x + 14, 112), colour)
        chart.text((x + 21, 105), part, 15, anchor="lm")
        x += 21 + chart.width_of(part, 15) + 24


def _ticks(largest: int, width: float) -> tuple[int, float]:
    """A round distance between grid lines (about six of them), and pixels per unit."""
    largest = max(largest, 1)
    rough = largest / 6
    power = 10 ** (len(str(int(rough))) - 1)
    step = next((factor * power for factor in (1, 2, 5) if factor * power >= rough), 10 * power)
    return step, width / largest


class _Canvas:
    """Shapes and text in the pixels of the finished picture."""

    def __init__(self, width: int, height: int) -> None:
        self._size = (width, height)
        self._image = Image.new("RGB", (width * SCALE, height * SCALE), PAPER)
        self._draw = ImageDraw.Draw(self._image)

    def box(self, corners: tuple[float, float, float, float], colour: str) -> None:
        left, top, right, bottom = (round(value * SCALE) for value in corners)
        if right > left:
            self._draw.rectangle((left, top, right - 1, bottom - 1), fill=colour)

    def text(self, at: tuple[float, float], text: str, size: int, colour: str = INK, *, anchor: str = "lm") -> None:
        position = (at[0] * SCALE, at[1] * SCALE)
        self._draw.text(position, text, fill=colour, font=ImageFont.load_default(size * SCALE), anchor=anchor)

    def width_of(self, text: str, size: int) -> float:
        return self._draw.textlength(text, font=ImageFont.load_default(size * SCALE)) / SCALE

    def finished(self) -> Image.Image:
        return self._image.resize(self._size, Image.Resampling.LANCZOS)
