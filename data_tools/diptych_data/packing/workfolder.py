"""Where shards lie until all are complete, and what lets an interrupted pack go on.

.OUT.tmp/             the shards; becomes OUT in the end
.OUT.old/             what OUT held, until it is replaced
.OUT.work/
  digest              checksum of the options and of the source; another one, and the work starts afresh
  lock                held by the process that packs
  outcomes/000000.json   what became of each complete shard's rows
  rows-00000.arrow    copies that a source needs
"""

import fcntl
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from diptych.errors import DataError
from diptych.runfolder import sync, write_text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkFolder:
    """The folders of one pack."""

    out: Path
    """Absolute, links resolved."""

    @property
    def shards(self) -> Path:
        """What becomes the output folder."""
        return self.out.with_name(f".{self.out.name}.tmp")

    @property
    def work(self) -> Path:
        """Everything else."""
        return self.out.with_name(f".{self.out.name}.work")

    @property
    def outcomes(self) -> Path:
        """One file per complete shard."""
        return self.work / "outcomes"

    @property
    def old(self) -> Path:
        """What was in the output folder, for the moment in which it is replaced."""
        return self.out.with_name(f".{self.out.name}.old")

    def restore(self) -> None:
        """Puts back what was in the output folder where a pack was killed in that moment. Raises OSError."""
        if self.old.exists() and not self.out.exists():
            self.old.rename(self.out)

    def discard(self) -> None:
        """Removes both, with all that is in them."""
        shutil.rmtree(self.shards, ignore_errors=True)
        shutil.rmtree(self.work, ignore_errors=True)

    def finish(self) -> None:
        """Puts the shards in the place of the output folder. Raises OSError."""
        for folder in (self.shards, *(inner for inner in self.shards.iterdir() if inner.is_dir())):
            sync(folder)
        if self.out.exists():
            shutil.rmtree(self.old, ignore_errors=True)
            self.out.rename(self.old)
        self.shards.rename(self.out)
        sync(self.out.parent)
        shutil.rmtree(self.old, ignore_errors=True)
        shutil.rmtree(self.work, ignore_errors=True)


@contextmanager
def opened(out: Path, digest: str) -> Iterator[WorkFolder]:
    """The folders for work of this digest: as an interrupted pack left them, or empty.

    Raises:
        DataError: another process packs into `out`; or the disk, here or within, does not take what is written.
    """
    folder = WorkFolder(out)
    try:
        folder.work.mkdir(parents=True, exist_ok=True)
        with (folder.work / "lock").open("a") as held:
            _lock(held, out)
            _make_ready(folder, digest)
            yield folder
    except OSError as error:
        reason = error.strerror or error
        raise DataError(
            f"shards not written ({reason}) · {out} · free space or mend permissions; the same command goes on"
        ) from error


def _lock(file: TextIO, out: Path) -> None:
    """Raises DataError where another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"another process writes this folder · {out} · wait for it") from None
    except OSError:
        log.debug("no locks on this file system: %s", file.name)


def _make_ready(folder: WorkFolder, digest: str) -> None:
    written = folder.work / "digest"
    known = written.read_text(encoding="utf-8", errors="replace") if written.is_file() else None
    if known != digest:
        if known is not None:
            log.warning("unfinished work with other options or of another source is thrown away: %s", folder.shards)
        shutil.rmtree(folder.shards, ignore_errors=True)
        for inner in folder.work.iterdir():
            if inner.is_dir():
                shutil.rmtree(inner)
            elif inner.name != "lock":
                inner.unlink()
    folder.shards.mkdir(exist_ok=True)
    folder.outcomes.mkdir(exist_ok=True)
    for leftover in [*folder.shards.rglob(".*.part"), *folder.work.glob("*.part")]:
        leftover.unlink()
    write_text(written, digest)
