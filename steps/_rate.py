"""How fast bytes arrive, as progress for people."""

import time


class Rate:
    """Bytes per second, since the transfer began."""

    def __init__(self) -> None:
        self._started_at = time.monotonic()
        self._bytes = 0

    def progress(self, arrived: int, offset: int, total: int | None) -> dict[str, object]:
        """Count `arrived` bytes; what to show with `offset` of `total` bytes there. Without a total no fraction."""
        self._bytes += arrived
        rate = self._bytes / max(time.monotonic() - self._started_at, 1e-3)
        done = f"{_size(offset)} of {_size(total)}" if total else _size(offset)
        progress: dict[str, object] = {"text": f"{done}, {_size(rate)}/s", "bytes_per_s": round(rate)}
        return {**progress, "fraction": offset / total} if total else progress


def _size(number: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"
