"""Signals that wait: Ctrl-C and SIGTERM end a training between two steps, not within one."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """A context in which signals that arrive while they are held wait.

    Whatever handled them before handles them then: it is passed the signal on release. A second signal of a
    kind is not held, so that a step that never ends can be ended. Outside the main thread, where Python
    allows no handlers, nothing is held.
    """

    def __init__(self) -> None:
        self._held = False
        self._waiting: list[int] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in _SIGNALS}
            self._before = {number: handler for number, handler in handlers.items() if callable(handler)}
            for number in self._before:
                signal.signal(number, self._arrived)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            # A handler may have put another in its own place: the command line's does, for SIGTERM.
            if signal.getsignal(number) == self._arrived:
                signal.signal(number, handler)

    @property
    def waiting(self) -> bool:
        """True if a signal arrived while they were held."""
        return bool(self._waiting)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold signals in here, unless what is in here fails; pass them on at the end."""
        outer, self._held = self._held, True
        try:
            yield
        finally:
            self._held = outer
        if not outer:
            self.release()

    def release(self) -> None:
        """Pass on what is waiting."""
        while self._waiting:
            number = self._waiting.pop(0)
            self._before[number](number, None)

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if self._held and number not in self._waiting:
            self._waiting.append(number)
        else:
            self._before[number](number, frame)
