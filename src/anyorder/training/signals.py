"""Ctrl-C and SIGTERM, as clusters send it before they end a job: the step is finished, and a state saved."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

from anyorder.inference import processes


@contextlib.contextmanager
def postponed_signals() -> Iterator[Callable[[], bool]]:
    """Yield a function: whether any process was sent SIGINT or SIGTERM; a second one interrupts at once."""
    stopped: list[int] = []

    def handle(number: int, frame: object) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(number)

    allowed = threading.current_thread() is threading.main_thread()  # Python allows handlers only there
    numbers = (signal.SIGINT, signal.SIGTERM) if allowed else ()
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield lambda: processes.agreed(bool(stopped))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
