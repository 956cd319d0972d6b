"""Lock that threads get in the order in which they ask for it."""

from __future__ import annotations

import threading
from collections import deque

__all__ = ["FairLock"]


class FairLock:
    """Lock for ``with`` statements that the thread that waits longest gets next.

    A thread that releases a ``threading.Lock`` and asks for it again usually gets it, so one that predicts the frames
    of a video would keep all others waiting until the end of the video.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._is_held = False
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        with self._guard:
            if not self._is_held:
                self._is_held = True
                return
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        turn.acquire()

    def __exit__(self, *_: object) -> None:
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()  # the lock stays held, by the thread of this turn
            else:
                self._is_held = False
