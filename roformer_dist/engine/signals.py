"""A request to stop, noted in a handler and acted on between steps."""

from __future__ import annotations

import signal
from types import FrameType


class StopFlag:
    """True once SIGINT, SIGTERM or SIGUSR1 has arrived.

    Nothing is saved in the handler and nobody exits there: the first rank to leave would break the
    others' collectives. All ranks agree on the flag at the end of a step. Repeated signals change
    nothing, because one Ctrl-C reaches a rank both from the terminal and from its launcher.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.requested: str | None = None

    def install(self) -> None:
        """Take the signals over from now on."""
        for number in self.SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
