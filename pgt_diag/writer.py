"""The thread that encodes and writes what was recorded, beside the training thread.

Ctrl-C may interrupt the training thread between any two bytecodes. It is left holding no lock by
that: only queues and locks whose waits are one C call are used, not `queue.Queue`.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue

from pgt_diag.encoder import Block, TraceEncoder

FLUSH_SECONDS = 0.7
"""With a quarter of a second before it is handed over, no row waits a second for the disk."""
_BLOCKS_IN_FLIGHT = 2  # as the ring has two halves: a third waits for the disk


class WriterThread:
    """Encodes blocks beside the training thread, in order; they are on disk `flush_seconds` later.

    An error there (a full disk, say) is raised by the next call from the training thread.
    """

    def __init__(self, encoder: TraceEncoder, flush_seconds: float = FLUSH_SECONDS) -> None:
        self.encoder = encoder
        self._flush_seconds = flush_seconds
        self._waiting_since: float | None = None
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._slots: SimpleQueue[None] = SimpleQueue()
        for _ in range(_BLOCKS_IN_FLIGHT):
            self._slots.put(None)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="pgt-diag-writer", daemon=True)
        self._thread.start()

    def submit(self, block: Callable[[], Block]) -> None:
        """Hand over a function that waits for the device and then returns a block."""
        self._raise()
        self._slots.get()
        self._tasks.put(lambda: self._encode(block))

    def flush(self) -> None:
        """Wait until everything handed over is encoded and on disk."""
        done: SimpleQueue[None] = SimpleQueue()
        self._tasks.put(self._unless_failed(self._flush))
        self._tasks.put(lambda: done.put(None))
        done.get()
        self._raise()

    def close(self, *, complete: bool) -> dict[str, bytes]:
        """Encode and write what is left, end the thread; return what `TraceEncoder.seal` does."""
        sealed: dict[str, bytes] = {}
        self._tasks.put(
            self._unless_failed(lambda: sealed.update(self.encoder.seal(complete=complete)))
        )
        self._tasks.put(None)
        self._thread.join()
        self._raise()
        return sealed

    def _encode(self, block: Callable[[], Block]) -> None:
        try:
            if self._error is None:
                self.encoder.add(block())
                if self._waiting_since is None:
                    self._waiting_since = time.monotonic()
        finally:
            self._slots.put(None)
        self._flush_if_due()

    def _seconds_left(self) -> float | None:
        """Return for how long what is encoded may wait for the disk, if anything is."""
        if self._waiting_since is None:
            return None
        return max(0.0, self._waiting_since + self._flush_seconds - time.monotonic())

    def _flush_if_due(self) -> None:
        if self._error is None and self._seconds_left() == 0:
            self._flush()

    def _flush(self) -> None:
        self._waiting_since = None
        self.encoder.flush()

    def _unless_failed(self, task: Callable[[], None]) -> Callable[[], None]:
        return lambda: task() if self._error is None else None

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while True:
            task: Callable[[], None] | None = self._flush_if_due
            with suppress(Empty):
                task = self._tasks.get(timeout=self._seconds_left())
            if task is None:
                return
            try:
                task()
            except BaseException as error:  # carried to the training thread
                self._error = error
                self._waiting_since = None
