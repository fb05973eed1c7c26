"""Counter-images from a folder: files named by the samples' keys."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from diptych.data.images import picture_extension
from diptych.errors import DataError
from diptych_data.negatives.candidate import Negative
from diptych_data.negatives.images.family import CounterImages, Counterparts


@dataclass(frozen=True)
class FolderImages(CounterImages, name="folder"):
    """`FOLDER/KEY.jpg`, or several in `FOLDER/KEY/`, taken in the order of their names.

    Which of the negatives a picture shows is not known; a sample without a picture there has none.
    """

    path: Path = Path("counter_images")
    """The folder."""

    def open(self, shards: Sequence[str]) -> Counterparts:
        """Lists the folder."""
        if not self.path.is_dir():
            raise DataError(f"no such folder of counter-images · {self.path} · check images.path")
        found: dict[str, list[Path]] = defaultdict(list)
        for file in sorted(self.path.rglob("*")):
            place = file.relative_to(self.path)
            if file.is_file() and picture_extension((extension(file),)):
                found[place.parts[0] if len(place.parts) > 1 else file.stem].append(file)
        if not found:
            raise DataError(f"no picture in the folder of counter-images · {self.path} · name them KEY.jpg")
        return _Folder(dict(found))


def extension(file: Path) -> str:
    """A file's extension, lower case, without its dot."""
    return file.suffix.lower().removeprefix(".")


@dataclass(frozen=True)
class _Folder:
    files: dict[str, list[Path]]

    def find(self, key: str, negatives: Sequence[Negative]) -> Iterator[tuple[int | None, bytes, str]]:
        """The sample's files."""
        for file in self.files.get(key.rsplit("/", 1)[-1], ()):
            yield None, file.read_bytes(), extension(file)
