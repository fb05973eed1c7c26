"""Pictures with captions: in shards, or as an annotation file names them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from diptych.data.shards import list_shards
from diptych.errors import DataError
from diptych_eval.annotated import Captioned, read_captions
from diptych_eval.pictures import Pictures, ShardPictures
from diptych_eval.reading import Item
from diptych_eval.tasks.family import Task


@dataclass(frozen=True)
class CaptionedTask(Task):
    """A task over pictures that people described."""

    path: str
    """Folder, glob or brace pattern of shards; with `annotations`, the folder of the pictures."""
    annotations: Path | None = None
    """Karpathy's JSON of COCO or Flickr30k, also in BLIP's form, COCO's own captions, or XM3600's captions.jsonl; none:
    captions are in the shards."""
    split: str = "test"
    """Of Karpathy's JSON."""
    language: str = "en"
    """Of XM3600's captions."""
    forms: tuple[tuple[str, ...], ...] = (("txt",),)
    """Captions of a picture in shards. A form of one column gives a caption per text; a form of several gives one
    caption: all their texts joined by `, `."""

    @cached_property
    def _annotated(self) -> Captioned | None:
        if self.annotations is None:
            return None
        return read_captions(self.annotations, Path(self.path), split=self.split, language=self.language)

    def files(self) -> tuple[str, ...]:
        """See Task."""
        if self._annotated is None:
            return list_shards(self.path)
        return (str(self.annotations), *self._annotated.pictures.files)

    @property
    def pictures(self) -> Pictures:
        """The set. Raises DataError where it is not there."""
        return self._annotated.pictures if self._annotated is not None else ShardPictures(self.path)

    def captions_of(self, items: Sequence[Item]) -> list[tuple[str, ...]]:
        """The captions of each picture; equal ones of a picture in shards once. Raises DataError where one has none."""
        if self._annotated is not None:
            return [self._annotated.captions[item.number] for item in items]
        return [self._in_shard(item) for item in items]

    def _in_shard(self, item: Item) -> tuple[str, ...]:
        texts: list[str] = []
        for form in self.forms:
            if len(form) == 1:
                texts += item.captions.get(form[0], ())
            else:
                texts.append(", ".join(text for column in form for text in item.captions.get(column, ())))
        texts = [text for text in dict.fromkeys(texts) if text]
        if not texts:
            raise DataError(f"sample {item.key!r} has no caption in {self.forms} · {self.path} · correct forms")
        return tuple(texts)
