"""Captioned pictures as the published annotation files name them; which form it is, the file itself tells.

Karpathy's splits       {"images": [{"filepath"?, "filename", "split", "sentences": [{"raw"}]}]}
in BLIP's form          [{"image", "caption": [...]}], a file per split
COCO's own              {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
XM3600                  a line per picture: {"image/key", "de": {"caption": [...]}, "en": …}
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diptych.errors import DataError, one_line
from diptych_eval.pictures import FilePictures, PictureFile


@dataclass(frozen=True)
class Captioned:
    """Pictures with their captions."""

    pictures: FilePictures
    captions: tuple[tuple[str, ...], ...]


def read_captions(annotations: Path, images: Path, *, split: str, language: str) -> Captioned:
    """The pictures of a split that have captions.

    Raises:
        DataError: the file is of no known form or damaged, the split is not there, or pictures are missing.
    """
    try:
        found = _found(annotations, split, language)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"not an annotation file that can be read ({type(error).__name__}: {one_line(error, 120)}) · "
            f"{annotations} · Karpathy's, BLIP's, COCO's or XM3600's form, complete?"
        ) from error
    if not found:
        raise DataError(f"no captions of split {split!r} in {language!r} · {annotations} · correct split or language")
    empty = [name for name, texts in found if not texts or not all(text.strip() for text in texts)]
    if empty:
        raise DataError(f"{len(empty):,} pictures have an empty caption ({empty[0]}) · {annotations}")
    pictures = [PictureFile(find(images, name), name) for name, _ in found]
    return Captioned(FilePictures(str(annotations), pictures), tuple(texts for _, texts in found))


def _found(annotations: Path, split: str, language: str) -> list[tuple[str, tuple[str, ...]]]:
    """Picture names with their captions."""
    text = annotations.read_text(encoding="utf-8")
    first = text[: text.find("\n")] if "\n" in text else text
    if '"image/key"' in first:
        return _xm3600([json.loads(line) for line in text.splitlines() if line.strip()], language)
    tree = json.loads(text)
    if isinstance(tree, list):
        return [(str(row["image"]), _several(row["caption"])) for row in tree]
    return _coco(tree) if "annotations" in tree else _karpathy(tree, split)


def _karpathy(tree: Any, split: str) -> list[tuple[str, tuple[str, ...]]]:
    return [
        (str(Path(image.get("filepath", "")) / image["filename"]), tuple(one["raw"] for one in image["sentences"]))
        for image in tree["images"]
        if image["split"] == split
    ]


def _coco(tree: Any) -> list[tuple[str, tuple[str, ...]]]:
    texts: dict[Any, list[str]] = defaultdict(list)
    for one in tree["annotations"]:
        texts[one["image_id"]].append(str(one["caption"]))
    return [(str(one["file_name"]), tuple(texts[one["id"]])) for one in tree["images"] if one["id"] in texts]


def _xm3600(rows: list[Any], language: str) -> list[tuple[str, tuple[str, ...]]]:
    return [(f"{row['image/key']}.jpg", tuple(row[language]["caption"])) for row in rows if language in row]


def _several(texts: str | list[str]) -> tuple[str, ...]:
    return (texts,) if isinstance(texts, str) else tuple(texts)


def find(images: Path, name: str) -> Path:
    """Below the folder, with or without the subfolder that the annotation names."""
    whole = images / name
    return whole if whole.is_file() else images / Path(name).name
