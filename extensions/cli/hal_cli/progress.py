"""How far a long command is: a bar on a terminal, and a line now and then where standard error is a file or a pipe."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress as Bar, TaskID

#: Seconds between two lines where there is no terminal. A command that ends sooner writes none.
INTERVAL = 5.0


class Progress:
    """A context manager that is called with a text and the share of the work that is done, 0 to 1.

    It writes to standard error alone, so that standard output holds nothing but the result.
    """

    def __init__(self, title: str, interval: float = INTERVAL) -> None:
        self._title, self._interval = title, interval
        self._last = time.monotonic()
        self._bar: tuple[Bar, TaskID] | None = None

    def __call__(self, text: str, share: float) -> None:
        if sys.stderr.isatty():
            self._draw(text, share)
        elif (now := time.monotonic()) - self._last >= self._interval:
            self._last = now
            print(f"{self._title}: {share:4.0%}  {text}", file=sys.stderr, flush=True)

    def _draw(self, text: str, share: float) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import Progress as Bar

            bar = Bar(console=Console(stderr=True), transient=True)
            self._bar = bar, bar.add_task(self._title, total=1.0)
            bar.start()
        bar, task = self._bar
        bar.update(task, completed=share, description=f"{self._title}: {text}")

    def close(self) -> None:
        """Remove the bar; what is printed next starts on a clean line."""
        if self._bar is not None:
            self._bar[0].stop()
            self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
