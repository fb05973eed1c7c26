"""Captions and their foils as the published composition tests name them; which form it is, the file itself tells.

SugarCrepe      {"0": {"filename", "caption", "negative_caption"}, …}          a file per kind of change
VALSE           {"…": {"image_file", "caption", "foil", "mturk": {"caption": 3, …}}, …}
ARO             [{"image_path", "true_caption", "false_caption", "bbox_x", …, "relation_name" or "attributes"}, …]
ARO's order     [{"image", "caption_options": [true, foil, foil, …]}, …], what its code makes of COCO and Flickr30k
What'sUp        [{"image_path", "caption_options": [true, foil, …]}, …] or [[id, true, foil], …]
Winoground      a line per example: {"id", "image_0", "image_1", "caption_0", "caption_1", "collapsed_tag"}
MMVP-VLM        Question ID,Type,Statement: two lines are an example; pictures in Type/ID.jpg
"""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diptych.errors import DataError, one_line
from diptych_eval.annotated import find
from diptych_eval.pictures import Box, FilePictures, PictureFile

_AGREEING_READERS = 2


@dataclass(frozen=True)
class Example:
    """Pictures and captions that belong to each other in one way only."""

    key: str
    pictures: tuple[PictureFile, ...]
    """One, or two."""
    captions: tuple[str, ...]
    """With one picture: the true one, then its foils. With two: the caption of each."""
    group: str
    """Kind of change, relation, attributes, or tag; accuracy is also given for each."""


def read_examples(annotations: Path, images: Path) -> list[Example]:
    """All examples of a file.

    Raises:
        DataError: the file is of no known form, damaged or empty.
    """
    try:
        found = _found(annotations, images)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"not a composition test that can be read ({type(error).__name__}: {one_line(error, 120)}) · "
            f"{annotations} · SugarCrepe's, VALSE's, ARO's, What'sUp's, Winoground's or MMVP-VLM's form, complete?"
        ) from error
    if not found:
        raise DataError(f"no examples · {annotations} · is the file complete?")
    if empty := [one.key for one in found if not all(text.strip() for text in one.captions)]:
        raise DataError(f"{len(empty):,} examples have an empty caption ({empty[0]}) · {annotations}")
    return found


def pictures_of(annotations: Path, examples: list[Example]) -> tuple[FilePictures, list[list[int]]]:
    """The set of all pictures, each once, and for each example the places of its own. Raises DataError."""
    place: dict[PictureFile, int] = {}
    places = [[place.setdefault(picture, len(place)) for picture in one.pictures] for one in examples]
    return FilePictures(str(annotations), list(place)), places


def _found(annotations: Path, images: Path) -> list[Example]:
    text = annotations.read_text(encoding="utf-8-sig")
    if annotations.suffix == ".csv":
        return _mmvp(text, images)
    if annotations.suffix == ".jsonl":
        return [_winoground(json.loads(line), images) for line in text.splitlines() if line.strip()]
    tree = json.loads(text)
    if isinstance(tree, list):
        return [_listed(str(number), row, images) for number, row in enumerate(tree)]
    rows = [(key, row) for key, row in tree.items() if _agreed(row)]
    return [_one_picture(key, row, images, annotations.stem) for key, row in rows]


def _agreed(row: Mapping[str, Any]) -> bool:
    """VALSE keeps an example where two of three readers chose the caption."""
    return "mturk" not in row or int(row["mturk"]["caption"]) >= _AGREEING_READERS


def _one_picture(key: str, row: Mapping[str, Any], images: Path, kind: str) -> Example:
    """SugarCrepe or VALSE."""
    name = row["filename"] if "filename" in row else row["image_file"]
    foil = row["negative_caption"] if "negative_caption" in row else row["foil"]
    foils = [foil] if isinstance(foil, str) else list(foil)
    return Example(key, (_picture(images, name),), (row["caption"], *foils), str(row.get("linguistic_phenomena", kind)))


def _listed(key: str, row: Any, images: Path) -> Example:
    """ARO or What'sUp."""
    if isinstance(row, list):
        number, true, foil = row
        coco = f"{number:0>12}.jpg"  # Visual Genome's names have no zeros
        name = coco if find(images, coco).is_file() else f"{number}.jpg"
        return Example(key, (_picture(images, name),), (true, foil), "")
    if "caption_options" in row:
        name = row["image"] if "image" in row else row["image_path"]
        return Example(key, (_picture(images, name),), tuple(row["caption_options"]), "")
    return _aro(key, row, images)


def _aro(key: str, row: Mapping[str, Any], images: Path) -> Example:
    corner, size = (row["bbox_x"], row["bbox_y"]), (row["bbox_w"], row["bbox_h"])
    box = (int(corner[0]), int(corner[1]), int(corner[0] + size[0]), int(corner[1] + size[1]))
    group = row["relation_name"] if "relation_name" in row else "_".join(row["attributes"])
    picture = _picture(images, row["image_path"], box)
    return Example(key, (picture,), (row["true_caption"], row["false_caption"]), group)


def _winoground(row: Mapping[str, Any], images: Path) -> Example:
    names = [str(row[f"image_{i}"]) for i in (0, 1)]
    pictures = tuple(_picture(images, name if Path(name).suffix else f"{name}.png") for name in names)
    return Example(str(row["id"]), pictures, (row["caption_0"], row["caption_1"]), str(row.get("collapsed_tag", "")))


def _mmvp(text: str, images: Path) -> list[Example]:
    """The statements are completed to "a photo of …", as its authors do."""
    rows = [row for row in csv.reader(io.StringIO(text)) if row][1:]
    if len(rows) % 2:
        raise ValueError("an odd number of lines")
    found = []
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        pictures = tuple(_picture(images, f"{kind}/{number}.jpg") for number, kind, _ in (first, second))
        captions = (f"a photo of {first[2]}", f"a photo of {second[2]}")
        found.append(Example(f"{first[0]}-{second[0]}", pictures, captions, first[1]))
    return found


def _picture(images: Path, name: str, box: Box | None = None) -> PictureFile:
    return PictureFile(find(images, name), name, box=box)
