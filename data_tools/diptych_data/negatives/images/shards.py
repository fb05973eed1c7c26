"""Counter-images from the set itself: a picture whose own caption is the negative."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from diptych.data import captions
from diptych.data.faults import UnusableSample
from diptych.data.images import picture_extension
from diptych.seeding import derive
from diptych_data import entries
from diptych_data.entries import Part
from diptych_data.negatives.candidate import Negative
from diptych_data.negatives.images.family import CounterImages, Counterparts
from diptych_data.negatives.words import normal


@dataclass(frozen=True)
class ShardImages(CounterImages, name="shards"):
    """For “woman cook”, made false as “man cook”: a picture of the set that is called “man cook”."""

    columns: tuple[str, ...] = ("txt",)
    """Columns whose texts a negative must equal, capitals and marks aside."""
    per_picture: int = 1
    """Counter-images that a sample gets at most."""

    def __post_init__(self) -> None:
        if not self.columns or self.per_picture < 1:
            raise ValueError("columns must name at least one column, and per_picture be at least 1")

    def open(self, shards: Sequence[str]) -> Counterparts:
        """Reads all captions once; some hundred bytes of memory for each picture."""
        places: dict[str, list[tuple[str, int]]] = {}
        for shard in shards:
            for entry in entries.read(Part(shard)):
                try:
                    said = captions.parse(entry.members)
                except UnusableSample:
                    continue
                if entry.fault or picture_extension(entry.members) is None:
                    continue
                for text in dict.fromkeys(normal(text) for name in self.columns for text in said.texts(name)):
                    places.setdefault(text, []).append((shard, entry.number))
        return _Set(places, self.per_picture)


@dataclass(frozen=True)
class _Set:
    places: dict[str, list[tuple[str, int]]]
    per_picture: int

    def find(self, key: str, negatives: Sequence[Negative]) -> Iterator[tuple[int | None, bytes, str]]:
        """For each negative that is somebody's caption a picture, drawn by the sample's key."""
        given = 0
        for number, one in enumerate(negatives):
            places = self.places.get(normal(one.text), [])
            if not places or given == self.per_picture:
                continue
            shard, place = places[derive(0, "counter-image", key, one.text) % len(places)]
            (entry,) = entries.read(Part(shard, (place,)))
            extension = picture_extension(entry.members)
            if extension is not None:
                given += 1
                yield number, entry.members[extension], extension
