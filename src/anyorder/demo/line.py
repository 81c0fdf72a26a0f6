"""Requests wait in a line for the model; no request can hold up the others.

A client that does not read has its turn taken, and is cut off later: while the server sends, `EventStream`
counts the seconds outside of the sampling. The next event is sampled only after the last one was sent, so
that at most one event per client is held in memory.
"""

import asyncio
import functools
import json
import logging
from collections import abc
from typing import Any

from starlette import types
from starlette.concurrency import iterate_in_threadpool
from starlette.responses import StreamingResponse

MAX_REQUESTS = 64
"""Requests at once: one is served, the others wait."""
GRACE, PATIENCE = 0.25, 10
"""Seconds without reading after which a client loses its turn, and its connection."""
LOG = logging.getLogger(__name__)


class Line:
    """The streams that wait for the model, in order; the first one is served."""

    def __init__(self) -> None:
        self.waiting: list[EventStream] = []
        self.open = 0
        self.moved = asyncio.Event()

    def leave(self, stream: "EventStream") -> None:
        """Those behind move up; nothing happens if the stream is not in the line."""
        if stream in self.waiting:
            self.waiting.remove(stream)
            self.moved.set()
            self.moved = asyncio.Event()

    async def places(self, stream: "EventStream") -> abc.AsyncIterator[int]:
        """Wait for the turn; yields the place in the line after each move, 1 is next."""
        while True:
            if stream not in self.waiting:  # it is new, or lost its turn
                self.waiting.append(stream)
            moved, place = self.moved, self.waiting.index(stream)
            if place == 0:
                return
            yield place
            await moved.wait()


class EventStream(StreamingResponse):
    """Server-sent events: `waiting` (place), `step` (as given), at last `end` or `error` (a sentence).

    Args:
        events: what is sampled, one step at a time, in another thread.
        line: where the stream waits for its turn.
    """

    def __init__(self, events: abc.Iterator[dict[str, Any]], line: Line) -> None:
        self.line = line
        line.open += 1
        line.waiting.append(self)
        # iterate_in_threadpool: a cancelled request (its client is gone) asks for no further step.
        self.messages = self._messages(iterate_in_threadpool(events))
        super().__init__(self.messages, media_type="text/event-stream")

    async def __call__(self, scope: types.Scope, receive: types.Receive, send: types.Send) -> None:
        """As of `StreamingResponse`; the turn is given back however it ends."""
        try:
            await super().__call__(scope, receive, functools.partial(self._send, send))
        except TimeoutError:
            LOG.warning("a client did not read for %g s and was cut off", PATIENCE)
        finally:
            self.line.open -= 1
            self.line.leave(self)
            await self.messages.aclose()

    async def _send(self, send: types.Send, message: types.Message) -> None:
        late = asyncio.get_running_loop().call_later(GRACE, self.line.leave, self)
        try:
            async with asyncio.timeout(PATIENCE):
                await send(message)
        finally:
            late.cancel()

    async def _messages(self, events: abc.AsyncIterator[dict[str, Any]]) -> abc.AsyncGenerator[str, None]:
        try:
            while True:
                async for place in self.line.places(self):
                    yield _message("waiting", {"place": place})
                if (event := await anext(events, None)) is None:
                    break
                yield _message("step", event)
            yield _message("end", {})
        except Exception as e:
            LOG.error("sampling failed: %s", text := one_line(e))
            yield _message("error", {"error": f"The images could not be generated: {text}"})


def one_line(error: BaseException) -> str:
    """Type and first line of an error, at most 200 characters."""
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]


def _message(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"
