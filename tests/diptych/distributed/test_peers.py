"""Ranks that really die, and what the others say."""

import datetime
import logging
import multiprocessing as mp
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from diptych.distributed.peers import Pace, Peers, watching
from diptych.distributed.runtime import Ranks
from diptych.errors import DataError, DistributedError, Interrupted

pytestmark = pytest.mark.distributed
QUICK = Pace(interval=0.05, patience=20, grace=1.0)
Part = Callable[[int, Peers], None]


class Ranks2:
    """Two ranks that do something under watch, and the line with which each ends."""

    def __init__(self, folder: Path, part: Part, pace: Pace = QUICK) -> None:
        context = mp.get_context("fork")
        self.folder = folder
        self.processes: list[BaseProcess] = [
            context.Process(target=_rank, args=(rank, folder, part, pace)) for rank in range(2)
        ]
        for process in self.processes:
            process.start()

    def await_start(self) -> None:
        """Until both have met."""
        while not all((self.folder / f"{rank}.started").exists() for rank in range(2)):
            time.sleep(0.01)

    def lines(self) -> list[str]:
        """What each rank raised, or logged before it ended itself; "done" where nothing, "" where it was killed."""
        for process in self.processes:
            process.join(30)
            if process.exitcode is None:
                process.kill()
                process.join()
                pytest.fail("a rank did not end")
        files = [self.folder / f"{rank}.line" for rank in range(2)]
        return [file.read_text() if file.exists() else "" for file in files]


def _rank(rank: int, folder: Path, part: Part, pace: Pace) -> None:
    torch.set_num_threads(1)
    logging.basicConfig(filename=folder / f"{rank}.line", format="%(message)s", force=True)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=3)
    )
    line = "done"
    try:
        with watching(Ranks(rank, 2), pace) as peers:
            (folder / f"{rank}.started").touch()
            part(rank, peers)
    except BaseException as error:
        line = f"{type(error).__name__}: {error}"
    (folder / f"{rank}.line").write_text(line)
    os._exit(0)


def meet_for_ever(_rank: int, _peers: Peers) -> None:
    """A training loop, for those who watch it from outside."""
    while True:
        dist.all_reduce(torch.ones(1))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named_by_the_other(victim: int, tmp_path: Path) -> None:
    ranks = Ranks2(tmp_path, meet_for_ever)
    ranks.await_start()
    ranks.processes[victim].kill()
    lines = ranks.lines()
    assert lines[victim] == ""
    how = "ended without a word" if victim else ""  # the first rank takes the store with it
    assert lines[1 - victim].startswith(f"DistributedError: rank {victim} of 2 {how}")
    assert f"process {ranks.processes[victim].pid}" in lines[1 - victim]


def test_a_rank_that_fails_tells_the_other_why(tmp_path: Path) -> None:
    def part(rank: int, peers: Peers) -> None:
        if rank == 1:
            raise ValueError("of its own")
        meet_for_ever(rank, peers)

    first, second = Ranks2(tmp_path, part).lines()
    assert second == "ValueError: of its own"
    assert first.startswith("DistributedError: rank 1 of 2 failed: ValueError: of its own · ")


def test_the_first_rank_stays_until_the_others_know(tmp_path: Path) -> None:
    def part(rank: int, peers: Peers) -> None:
        if rank == 0:
            raise MemoryError("too small")
        meet_for_ever(rank, peers)

    first, second = Ranks2(tmp_path, part).lines()
    assert first == "MemoryError: too small"
    assert "rank 0 of 2 failed: MemoryError: too small" in second


@pytest.mark.parametrize(
    ("victim", "how"), [(0, "cannot be reached any more"), (1, "gave no sign of life for 21 heartbeats")]
)
def test_a_silent_rank_is_missed(victim: int, how: str, tmp_path: Path) -> None:
    ranks = Ranks2(tmp_path, meet_for_ever)
    ranks.await_start()
    assert ranks.processes[victim].pid is not None
    os.kill(ranks.processes[victim].pid, signal.SIGSTOP)
    ranks.processes[1 - victim].join(30)
    assert ranks.processes[victim].exitcode is None
    ranks.processes[victim].kill()
    assert ranks.lines()[1 - victim].startswith(f"rank {victim} of 2 {how}")
    assert ranks.processes[1 - victim].exitcode == 1


def test_a_rank_that_hangs_in_a_collective_ends(tmp_path: Path) -> None:
    def part(rank: int, _peers: Peers) -> None:
        time.sleep(600)  # as NCCL waits for a rank that is gone: no exception comes

    ranks = Ranks2(tmp_path, part)
    ranks.await_start()
    ranks.processes[1].kill()
    first, second = ranks.lines()
    assert first.startswith("rank 1 of 2 ended without a word")
    assert second == ""
    assert ranks.processes[0].exitcode == 1


def test_the_first_rank_may_work_longer_than_a_collective_waits(tmp_path: Path) -> None:
    def part(rank: int, peers: Peers) -> None:
        with peers.first_alone():
            if rank == 0:
                time.sleep(4)
                (tmp_path / "worked").touch()
        assert (tmp_path / "worked").exists()
        with peers.first_alone():  # turns are told apart
            pass
        dist.barrier()

    assert Ranks2(tmp_path, part).lines() == ["done", "done"]


@pytest.mark.parametrize("error", [DataError("bad · shard"), Interrupted("SIGTERM")])
def test_what_all_ranks_raise_together_stays_what_it_is(error: Exception, tmp_path: Path) -> None:
    def part(rank: int, _peers: Peers) -> None:
        time.sleep(0.3 * rank)
        raise error

    assert Ranks2(tmp_path, part).lines() == [f"{type(error).__name__}: {error}"] * 2


def test_a_rank_that_is_done_is_not_missed(tmp_path: Path) -> None:
    def part(rank: int, _peers: Peers) -> None:
        time.sleep(1.5 * (1 - rank))

    assert Ranks2(tmp_path, part).lines() == ["done", "done"]


def test_one_process_watches_nobody() -> None:
    with watching(Ranks(0, 1)) as peers, peers.first_alone():
        pass
    with pytest.raises(RuntimeError, match="gloo"), watching(Ranks(0, 1)):
        raise RuntimeError("gloo")


def test_another_error_of_the_first_rank_alone_reaches_those_who_wait(tmp_path: Path) -> None:
    def part(rank: int, peers: Peers) -> None:
        with peers.first_alone():
            if rank == 0:
                raise DataError("evaluation set is empty · x · y")

    first, second = Ranks2(tmp_path, part).lines()
    assert first.startswith("DataError: evaluation set is empty")
    assert second.startswith(f"{DistributedError.__name__}: rank 0 of 2 failed: DataError: evaluation set is empty")
