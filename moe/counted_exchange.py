"""An exchange of rows whose numbers only their senders know: first the counts, then exactly the rows, without the caller between.

When the counts arrive, the rows are submitted by whoever notices first: the communication's own thread, so that they travel while
the caller computes (ahead; CPU only: a device's counts arrive without anyone being told), or the caller who waits for them. Rows
leave in the order in which the exchanges were begun, on every rank alike.

Ahead costs a little: another thread works in between. A caller who has nothing else to do should wait for the rows himself.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.moe.communication import Communications, Pending


class CountedRows:
    """One exchange under way. After `wait`: `received` uint8 [M, row bytes], rank after rank, and `counts`, the rows of each rank's
    parts [R][P].
    """

    def __init__(self, exchange: CountedExchange, rows: Tensor, sent_counts: Tensor, room: Tensor | None) -> None:
        self._exchange = exchange
        self._callbacks: list[Callable[[], None]] = []
        self.rows = rows
        self.room = room
        self.sent: list[list[int]] = sent_counts.tolist()
        self.counts_wanted = torch.empty_like(sent_counts)
        self.counts_pending: Pending | None = None
        self.rows_pending: Pending | None = None
        self.counted = False
        self.error: Exception | None = None
        self.received: Tensor = rows
        self.counts: list[list[int]] = self.sent

    def wait(self) -> None:
        """Until the rows are here. Raises RuntimeError when an exchange failed or its group's deadline has passed."""
        self._exchange.await_rows(self)

    def when_done(self, callback: Callable[[], None]) -> None:
        """As `Pending.when_done`."""
        self._exchange.tell(self, callback)

    def submitted(self, pending: Pending) -> None:
        """The rows are on their way."""
        self.rows_pending = pending
        for callback in self._callbacks:
            pending.when_done(callback)
        self._callbacks.clear()

    def remember(self, callback: Callable[[], None]) -> None:
        """To be called when the rows, which are not yet on their way, have arrived."""
        self._callbacks.append(callback)


class CountedExchange:
    """Among `size` ranks. One of these per model and rank: the rows of all its layers leave in one order.

    counts_group: carries the counts, submitted by the caller. rows_group: carries the rows and nothing else: another thread may
    submit them, and ranks would disagree on the order.
    """

    def __init__(
        self,
        *,
        size: int,
        counts_group: dist.ProcessGroup | None,
        rows_group: dist.ProcessGroup | None,
        communications: Communications,
    ) -> None:
        if size > 1 and (counts_group is None or rows_group is None):
            raise ValueError(f"an exchange among {size} ranks needs a process group for counts and one for rows")
        self._size = size
        self._counts_group = counts_group
        self._rows_group = rows_group
        self._communications = communications
        self._lock = threading.Lock()
        self._begun: deque[CountedRows] = deque()

    def start(self, rows: Tensor, counts: Tensor, *, ahead: bool, most_rows: int) -> CountedRows:
        """rows uint8 [N, row bytes], rank after rank; counts int64 [R, P]: the rows for each rank, in P parts that follow each
        other (the receiver learns the size of each). most_rows: that can arrive. Alone, the rows are here at once.
        """
        # Room for what arrives is taken here: memory that a communication's thread takes is given back, and costs anew each time.
        room = rows.new_empty(most_rows, rows.shape[1]) if ahead else None
        exchange = CountedRows(self, rows, counts, room)
        if self._size == 1:
            return exchange
        work = dist.all_to_all_single(exchange.counts_wanted, counts, group=self._counts_group, async_op=True)
        exchange.counts_pending = self._communications.transfer("dispatch counts", work, counts)
        with self._lock:
            self._begun.append(exchange)
        if ahead:
            exchange.counts_pending.when_done(lambda: self._counts_arrived(exchange))
        return exchange

    def await_rows(self, exchange: CountedRows) -> None:
        """See `CountedRows.wait`."""
        if self._size == 1:
            return
        while (before := self._first_before(exchange)) is not None:
            assert before.counts_pending is not None, "counts are sent when an exchange begins"
            before.counts_pending.wait()
            self._counts_arrived(before)
        if exchange.error is not None:
            raise RuntimeError(f"the rows could not be sent: {exchange.error}") from exchange.error
        assert exchange.rows_pending is not None, "rows are on their way once all counts before them are here"
        exchange.rows_pending.wait()

    def tell(self, exchange: CountedRows, callback: Callable[[], None]) -> None:
        """See `CountedRows.when_done`."""
        with self._lock:
            pending = exchange.rows_pending
            if pending is None and self._size > 1:
                exchange.remember(callback)
                return
        if pending is None:
            callback()
        else:
            pending.when_done(callback)

    def _first_before(self, exchange: CountedRows) -> CountedRows | None:
        """The oldest exchange without rows on their way, as long as `exchange` has none."""
        with self._lock:
            return self._begun[0] if exchange in self._begun else None

    def _counts_arrived(self, exchange: CountedRows) -> None:
        """Submit all rows whose counts, and the counts of all before them, are here."""
        with self._lock:
            exchange.counted = True
            while self._begun and self._begun[0].counted:
                self._send(self._begun.popleft())

    def _send(self, exchange: CountedRows) -> None:
        try:
            with torch.inference_mode(exchange.rows.is_inference()):
                self._submit(exchange)
        except Exception as error:  # raised to the waiting caller: nobody hears what is raised in a communication's thread
            exchange.error = error

    def _submit(self, exchange: CountedRows) -> None:
        exchange.counts = exchange.counts_wanted.tolist()
        arriving, leaving = (list(map(sum, counts)) for counts in (exchange.counts, exchange.sent))
        if exchange.room is None:
            exchange.received = exchange.rows.new_empty(sum(arriving), exchange.rows.shape[1])
        else:
            exchange.received = exchange.room[: sum(arriving)]
        work = dist.all_to_all_single(exchange.received, exchange.rows, arriving, leaving, group=self._rows_group, async_op=True)
        exchange.submitted(self._communications.transfer("dispatch rows", work, exchange.rows))
