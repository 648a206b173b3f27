"""How the processes of one attempt find each other where earlier attempts left their traces."""

import time
import uuid
from datetime import timedelta

from torch.distributed import DistStoreError, PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

_LOOK_SECONDS = 0.05


def meet(rank: int, size: int, seconds: float) -> Store:
    """Return a store that the processes of this attempt share, and no earlier ones have used.

    torchrun's agents keep one store over all attempts. There gloo would find the addresses of
    processes that are gone, and wait for them for ever. The number of restarts does not tell
    attempts apart: on several machines each agent counts its own.
    """
    found = rendezvous("env://", rank, size, timeout=timedelta(seconds=seconds))
    store, _, _ = next(iter(found))
    return unused_part(store, rank, size, seconds)


def unused_part(store: Store, rank: int, size: int, seconds: float) -> Store:
    """Agree with the other processes that are there now on a new name; return that part of a store.

    Whatever the store holds, the first process waits for an answer that only a process of this
    attempt can give, and each other one for a list with its own, new name in it.
    Raises DistStoreError when some process has not answered for so many seconds.
    """
    store = PrefixStore("pgt-diag", store)
    mine = uuid.uuid4().hex
    deadline = time.monotonic() + seconds
    others = range(1, size)
    if rank:
        store.set(f"name/{rank}", mine)
    while time.monotonic() < deadline:
        if rank:
            attempt, *names = store.get("names").decode().split(",")
            if names[rank - 1 : rank] == [mine]:
                store.set(f"{attempt}/{rank}", "")
                return PrefixStore(attempt, store)
        else:
            if store.check([f"{mine}/{other}" for other in others]):
                return PrefixStore(mine, store)
            names = [store.get(f"name/{other}").decode() for other in others]
            store.set("names", ",".join([mine, *names]))
        time.sleep(_LOOK_SECONDS)
    raise DistStoreError("some process did not answer")
