"""The thread that encodes and writes what was recorded, beside the training thread."""

import queue
import threading
import time
from collections.abc import Callable

from pgt_diag.encoder import Block, TraceEncoder


class WriterThread:
    """Encodes blocks beside the training thread, in order, flushing every `flush_seconds`.

    An error there (a full disk, say) is raised by the next call from the training thread.
    """

    def __init__(self, encoder: TraceEncoder, flush_seconds: float = 2.0) -> None:
        self.encoder = encoder
        self._flush_seconds = flush_seconds
        self._flushed = time.monotonic()
        # Two blocks in flight, as the ring has two halves: a third waits for the disk.
        self._tasks: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=2)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="pgt-diag-writer", daemon=True)
        self._thread.start()

    def submit(self, block: Callable[[], Block]) -> None:
        """Hand over a function that waits for the device and then returns a block."""
        self._raise()
        self._tasks.put(lambda: self._encode(block()))

    def flush(self) -> None:
        """Wait until everything handed over is encoded and on disk."""
        self._tasks.put(self.encoder.flush)
        self._tasks.join()
        self._raise()

    def close(self) -> None:
        """Encode and write what is left, seal the trace, and end the thread."""
        self._tasks.put(self.encoder.seal)
        self._tasks.put(None)
        self._thread.join()
        self._raise()

    def _encode(self, block: Block) -> None:
        self.encoder.add(block)
        if time.monotonic() - self._flushed >= self._flush_seconds:
            self.encoder.flush()
            self._flushed = time.monotonic()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                if self._error is None:
                    task()
            except BaseException as error:  # carried to the training thread
                self._error = error
            finally:
                self._tasks.task_done()
