"""What a person sees of a run: a progress bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class RunConsole:
    """The one rank that speaks, speaks through this; the others get a silent one.

    Args:
        num_steps: length of the run.
        first_step: steps already finished.
        speaks: whether this rank prints.
    """

    def __init__(self, num_steps: int, first_step: int, *, speaks: bool) -> None:
        self._console = Console(quiet=not speaks, soft_wrap=True)
        self._bar = Progress(
            TextColumn("[bold]train"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            disable=not (speaks and self._console.is_terminal),
        )
        self._task = self._bar.add_task("", total=num_steps, completed=first_step, numbers="")
        self._num_steps = num_steps
        self._bar.start()

    def say(self, text: str) -> None:
        """One line above the bar."""
        self._console.print(text, markup=False, highlight=False)

    def advance(self, step: int, numbers: dict[str, Any], *, eta_s: float, log: bool) -> None:
        """Show ``loss`` and ``tokens_per_sec`` of ``step``; without a terminal, a line when ``log``."""
        text = f"loss {numbers['loss']:.4f} · {numbers['tokens_per_sec']:,.0f} tokens/s"
        self._bar.update(self._task, completed=step, numbers=text)
        if log and not self._console.is_terminal:
            self.say(f"step {step}/{self._num_steps} · {text} · ETA {eta_s:.0f} s")

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._bar.stop()
