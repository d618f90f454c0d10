"""One client's connection, with limits on how long it may say nothing and take nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

logger = logging.getLogger(__name__)

_CHECKS = 4  # in the time that a client has


class Connection(H11Protocol):
    """uvicorn's connection, closed also if nothing is ever asked or what is answered is not taken.

    The first after the keep-alive time. The second is nginx' `send_timeout`: not of a whole answer,
    but of a time in which nothing of what waits left for the client (behind TLS, which collects:
    less than 48 KiB). Without it such a client keeps its call's places, or the server its answer,
    for as long as it likes.

    Args:
        arguments, options: uvicorn's.
        write_timeout: seconds in which a client has to take something.
        on_write_timeout: called for each that did not.
    """

    def __init__(
        self,
        *arguments: Any,
        write_timeout: float,
        on_write_timeout: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self._write_timeout = write_timeout
        self._on_write_timeout = on_write_timeout
        self._write_check: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock of the first bytes, which they stop."""
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )
        # `pause_writing` comes with the first byte that the socket does not take, not after 64 KiB.
        transport.set_write_buffer_limits(high=1, low=0)

    def pause_writing(self) -> None:
        """Start the clock of what waits for the client."""
        super().pause_writing()
        self._stop_write_check()
        self._check_writing(self.transport.get_write_buffer_size(), self.loop.time())

    def resume_writing(self) -> None:
        """Stop that clock: everything is on its way."""
        self._stop_write_check()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop that clock: nobody is there."""
        self._stop_write_check()
        super().connection_lost(exc)

    def _check_writing(self, fewest: int, since: float) -> None:
        """Close the connection if since then no fewer bytes wait than the fewest; else look again.

        While bytes wait, no more than the end of an answer is added to them.
        """
        waiting, now = self.transport.get_write_buffer_size(), self.loop.time()
        if waiting < fewest:
            fewest, since = waiting, now
        if now - since < self._write_timeout:
            self._write_check = self.loop.call_later(
                self._write_timeout / _CHECKS, self._check_writing, fewest, since
            )
            return
        self._write_check = None
        logger.warning(
            "%s took nothing of its answer for %g s: its connection is closed, %d bytes unsent",
            "a client" if self.client is None else "{}:{}".format(*self.client),
            self._write_timeout,
            waiting,
        )
        self._on_write_timeout()
        self.transport.abort()  # `close` would wait until it has taken everything

    def _stop_write_check(self) -> None:
        if self._write_check is not None:
            self._write_check.cancel()
            self._write_check = None
