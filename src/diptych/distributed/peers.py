"""Are the other ranks alive? One that ends takes all with it, in a line that names it; nobody waits for ever.

A collective alone does not tell: over NCCL it hangs until a time-out, over gloo it fails without a name. So a thread of
each rank writes heartbeats into a store that the first rank keeps, and watches the next rank (the last one the first):

    ended       the process is gone, seen at once on the same machine
    silent      no heartbeat for `patience` beats
    unreachable the store itself does not answer, so the first rank or its machine is gone

What it finds it notes in the store, where the threads of all ranks read it. A rank that fails by an exception of its
own notes that itself.
"""

import datetime
import logging
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]  # torch's stubs do not export them

from diptych.distributed.collectives import barrier, gather_objects
from diptych.distributed.runtime import Ranks, main_address
from diptych.errors import DiptychError, DistributedError, Interrupted, one_line

log = logging.getLogger(__name__)

_LINGER = 5


@dataclass(frozen=True)
class Pace:
    """How soon a rank counts as dead."""

    interval: float = 1.0
    """Seconds between beats."""
    patience: int = 60
    """Beats of another machine's rank that may stay away. Counted in own beats: a machine that slept accuses nobody."""
    grace: float = 15.0
    """Seconds that the training thread has to fail by itself, after which the process ends under it."""


@dataclass(frozen=True)
class _Process:
    """Where a rank runs."""

    host: str
    machine: str
    """The same for processes that see each other's numbers."""
    number: int


class Peers:
    """The ranks of this run, as one of them sees them."""

    def __init__(self, ranks: Ranks, pace: Pace) -> None:
        """Every rank must call."""
        self._ranks, self._pace = ranks, pace
        self._fault = ""
        self._found, self._leaving = threading.Event(), threading.Event()
        self._looks, self._turn, self._store_lost = 0, 0, False
        if ranks.world_size == 1:
            return
        self._store, self._processes = self._meet()
        self._looking = threading.Thread(target=self._look, name="diptych-look", daemon=True)
        self._looking.start()
        threading.Thread(target=self._judge, name="diptych-judge", daemon=True).start()

    def _meet(self) -> tuple[Store, list[_Process]]:
        """The store, kept by the first rank beside the launcher's own, and where each rank runs."""
        store = self._store_at(0) if self._ranks.is_main else None
        port = store.port if store is not None else 0
        meeting = gather_objects((port, _Process(socket.gethostname(), _machine(), os.getpid())))
        store = store or self._store_at(meeting[0][0])
        barrier()  # nobody dies while another one is on its way to the store
        return store, [process for _, process in meeting]

    def _store_at(self, port: int) -> TCPStore:
        """On the first rank the store itself, on the others a way to it."""
        patience = datetime.timedelta(seconds=self._pace.patience * self._pace.interval)
        return TCPStore(main_address(), port, is_master=self._ranks.is_main, wait_for_workers=False, timeout=patience)

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Within, the first rank may work alone for as long as it likes; the others wait at the end.

        Raises:
            DistributedError: some rank has died meanwhile.
        """
        yield
        if self._ranks.world_size == 1:
            return
        self._turn += 1
        turn, pause = f"turn/{self._turn}", 0.01
        if self._ranks.is_main:
            self._store.set(turn, "over")
        while not self._store.check([turn]):
            if self._found.wait(pause):
                raise DistributedError(self._fault)
            pause = min(1.0, 2 * pause)

    def cause(self, error: BaseException) -> str:
        """Which other rank's end is behind an error of this one; empty where it is its own."""
        of_collective = isinstance(error, dist.DistError) or "gloo" in str(error)
        if self._ranks.world_size == 1 or isinstance(error, DiptychError) or not of_collective:
            return ""
        # A collective fails at once, a silent rank is missed after a while.
        self._found.wait((self._pace.patience + 5) * self._pace.interval)
        return self._fault

    def report(self, error: BaseException) -> None:
        """Tells the others that this rank fails, and why."""
        if self._ranks.world_size > 1:
            self._note(self._named(self._ranks.rank, f"failed: {type(error).__name__}: {one_line(error)}"))

    def leave(self) -> None:
        """Watches no more, and is not missed."""
        self._leaving.set()
        if self._ranks.world_size == 1 or self._store_lost:
            return
        with suppress(dist.DistError):  # the first rank may have left already
            self._store.set(f"left/{self._ranks.rank}", "")
            self._store.add("left", 1)
            deadline = time.monotonic() + _LINGER * self._pace.interval
            # The store goes with the first rank: the others are to read in it why.
            alive = self._ranks.world_size - bool(self._fault)
            while self._ranks.is_main and self._store.add("left", 0) < alive:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.01)
        self._looking.join()

    def _look(self) -> None:
        """A thread: beats, and looks, until some rank has died or this one leaves. May hang where the store does."""
        next_rank = (self._ranks.rank + 1) % self._ranks.world_size
        with closing(_Watched(self._store, next_rank, self._processes, self._pace)) as watched:
            while not self._fault and not self._leaving.wait(self._pace.interval):
                self._looks += 1
                try:
                    self._fault = self._fault_now(watched)
                except dist.DistError:
                    self._lose_store()

    def _fault_now(self, watched: "_Watched") -> str:
        self._store.set(f"beat/{self._ranks.rank}", str(self._looks))
        if self._store.check(["fault"]):
            return self._store.get("fault").decode()
        how = watched.missed()
        return self._note(self._named(watched.rank, how)) if how else ""

    def _judge(self) -> None:
        """A thread: makes known what the other found, or that it hangs; in the end ends the process."""
        before, silent = 0, 0
        while not self._fault:
            if self._leaving.wait(self._pace.interval):
                return
            silent = silent + 1 if self._looks == before else 0
            before = self._looks
            if silent > self._pace.patience:
                self._lose_store()
        self._found.set()
        if not self._leaving.wait(self._pace.grace):
            # The training thread waits within a collective that nobody will complete: no exception reaches it.
            log.error("%s", self._fault)
            sys.stderr.flush()
            os._exit(1)

    def _lose_store(self) -> None:
        self._store_lost = True
        self._fault = self._named(0, "cannot be reached any more")

    def _note(self, fault: str) -> str:
        """Leaves a note for all ranks; the first one stays, and is returned."""
        try:
            return self._store.compare_set("fault", "", fault).decode()
        except dist.DistError:
            return fault

    def _named(self, rank: int, how: str) -> str:
        process = self._processes[rank]
        return (
            f"rank {rank} of {self._ranks.world_size} {how} · {process.host}, process {process.number} · "
            "see its log; the same command goes on from the newest checkpoint"
        )


class _Watched:
    """The one rank that this one looks after."""

    def __init__(self, store: Store, rank: int, processes: list[_Process], pace: Pace) -> None:
        self.rank = rank
        self._store, self._pace = store, pace
        self._last: bytes | None = None
        self._silent = 0
        self._end, self._handle = select.poll(), -1
        if processes[rank].machine == _machine() and hasattr(os, "pidfd_open"):
            with suppress(ProcessLookupError):  # already gone: its heartbeats will be missed
                self._handle = os.pidfd_open(processes[rank].number)
                self._end.register(self._handle, select.POLLIN)

    def missed(self) -> str:
        """How it ended; empty where it is alive, or has left as it should."""
        beat = self._store.get(f"beat/{self.rank}") if self._store.check([f"beat/{self.rank}"]) else None
        self._silent = self._silent + 1 if beat == self._last else 0
        self._last = beat
        ended = bool(self._end.poll(0))
        if not ended and self._silent <= self._pace.patience:
            return ""
        if self._store.check([f"left/{self.rank}"]):
            return ""
        return "ended without a word" if ended else f"gave no sign of life for {self._silent} heartbeats"

    def close(self) -> None:
        """Looks away."""
        if self._handle >= 0:
            os.close(self._handle)


def _machine() -> str:
    """What processes share that see each other's numbers: the running kernel and the name space of processes."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text() + str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return f"unknown, of process {os.getpid()}"


@contextmanager
def watching(ranks: Ranks, pace: Pace | None = None) -> Iterator[Peers]:
    """Within, no rank outlives another by more than seconds. Every rank must call.

    Raises:
        DistributedError: another rank has died; the message names it.
    """
    peers = Peers(ranks, pace or Pace())
    try:
        yield peers
    except Interrupted:
        raise
    except BaseException as error:
        if cause := peers.cause(error):
            raise DistributedError(cause) from error
        peers.report(error)
        raise
    finally:
        peers.leave()
