"""The classes that a zero-shot set chooses among, their prompts, and which picture is of which.

A folder in clip-benchmark's layout brings all of it. A folder per class brings the labels; names and templates come
from files, or are ImageNet's as open_clip publishes them.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diptych.errors import DataError
from diptych_eval.pictures import FilePictures, Pictures, ShardPictures, class_folders

CLASS_FILE, TEMPLATE_FILE = "classnames.txt", "zeroshot_classification_templates.txt"
_BARE = ("{c}",)


@dataclass(frozen=True)
class ClassSet:
    """Pictures with labels, and what the labels mean."""

    pictures: Pictures
    names: tuple[str, ...]
    """Label → class name."""
    templates: tuple[str, ...]
    """Prompts, with `{c}` where the name stands."""


def open_class_set(root: str, classes: str | None, templates: str | None, split: str) -> ClassSet:
    """What a folder holds.

    Args:
        root: a folder in clip-benchmark's layout, a folder per class, or a pattern of shards with `.cls` members.
        classes: `imagenet`, or a file with a name per line; none: `classnames.txt` of the folder, or folder names.
        templates: `imagenet`, `imagenet_simple`, `name` for bare names, or a file; none: that of the folder.
        split: which part of a folder in clip-benchmark's layout.

    Raises:
        DataError: something is missing, or does not fit together.
    """
    folder = Path(root)
    prompts = _templates(folder, templates)
    if (folder / split).is_dir() and any((folder / split).glob("*.tar")):
        _check_shards(folder / split)
        return ClassSet(ShardPictures(str(folder / split)), _names(folder, classes), prompts)
    if not folder.is_dir() or any(folder.glob("*.tar")):
        return ClassSet(ShardPictures(root), _names(folder, classes), prompts)
    found = class_folders(folder)
    if classes == "imagenet":
        pictures, names = _as_imagenet(folder, found.pictures, found.names)
        return ClassSet(pictures, names, prompts)
    return ClassSet(found.pictures, _names(folder, classes, found.names), prompts)


def lines(path: Path) -> tuple[str, ...]:
    """A file's lines that are not blank. Raises DataError where there are none."""
    try:
        found = tuple(line for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"not readable ({error}) · {path} · one entry per line") from error
    if not found:
        raise DataError(f"file is empty · {path} · write one entry per line")
    return found


def _check_shards(folder: Path) -> None:
    """Raises DataError where clip-benchmark's `nshards.txt` counts others than are there."""
    counted = folder / "nshards.txt"
    if not counted.is_file():
        return
    there = len(list(folder.glob("*.tar")))
    if lines(counted)[0].strip() != str(there):
        raise DataError(f"{there} shards, and nshards.txt says {lines(counted)[0]} · {folder} · copy the whole set")


def _names(folder: Path, classes: str | None, of_folders: tuple[str, ...] = ()) -> tuple[str, ...]:
    if classes == "imagenet":
        return _imagenet_names()
    if classes is not None:
        return lines(Path(classes))
    if (folder / CLASS_FILE).is_file() or not of_folders:
        return lines(folder / CLASS_FILE)
    return tuple(name.replace("_", " ") for name in of_folders)


def _templates(folder: Path, templates: str | None) -> tuple[str, ...]:
    if templates in ("imagenet", "imagenet_simple"):
        return _imagenet_templates(simple=templates == "imagenet_simple")
    bare = templates is None and not any((folder / name).is_file() for name in (CLASS_FILE, TEMPLATE_FILE))
    if bare or templates == "name":
        return _BARE
    found = lines(Path(templates) if templates is not None else folder / TEMPLATE_FILE)
    if bad := [line for line in found if "{c}" not in line]:
        raise DataError(f"template without {{c}} ({bad[0]!r}) · {templates or folder / TEMPLATE_FILE} · write it in")
    return found


# --- ImageNet ----------------------------------------------------------------------------------------------------


def _imagenet_names() -> tuple[str, ...]:
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    return tuple(IMAGENET_CLASSNAMES)


def _imagenet_templates(*, simple: bool) -> tuple[str, ...]:
    """The 80 of arXiv:2103.00020, or the 7 that its authors found to suffice."""
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

    return tuple(template("{c}") for template in (SIMPLE_IMAGENET_TEMPLATES if simple else OPENAI_IMAGENET_TEMPLATES))


def _synsets() -> list[str]:
    """ImageNet-1k's WordNet ids in the order of its labels."""
    from timm.data.imagenet_info import ImageNetInfo

    return list(ImageNetInfo().label_names())


def _as_imagenet(root: Path, pictures: FilePictures, folders: tuple[str, ...]) -> tuple[FilePictures, tuple[str, ...]]:
    """Folders of ImageNet and of the sets beside it, each with the classes that its paper chooses among:

    n01440764, …     ImageNet, Sketch; A and R: the classes that have a folder
    0, 1, …, 999     V2: the numbers of all classes
    Air freshener…   ObjectNet: the classes that ImageNet knows, by the maps in its folder `mappings`
    """
    names, synsets = _imagenet_names(), _synsets()
    if all(re.fullmatch(r"n\d{8}", folder) for folder in folders):
        strange = sorted(set(folders) - set(synsets))
        if strange:
            raise DataError(f"{len(strange)} folders are no classes of ImageNet-1k ({strange[0]}) · {root}")
        return pictures, tuple(names[synsets.index(folder)] for folder in folders)
    if all(folder.isdigit() and int(folder) < len(names) for folder in folders):
        return pictures.relabelled({number: int(folder) for number, folder in enumerate(folders)}), names
    return _as_objectnet(root, pictures, folders)


def _as_objectnet(root: Path, pictures: FilePictures, folders: tuple[str, ...]) -> tuple[FilePictures, tuple[str, ...]]:
    """ObjectNet (Barbu et al., NeurIPS 2019): 113 of its classes overlap with ImageNet's."""
    maps = next((path for path in (root / "mappings", root.parent / "mappings") if path.is_dir()), None)
    if maps is None:
        raise DataError(
            f"folders are neither WordNet ids nor class numbers ({folders[0]!r}), and there are no `mappings` of "
            f"ObjectNet · {root} · leave out classes: imagenet, or correct the path"
        )
    label_of: dict[str, str] = _json(maps / "folder_to_objectnet_label.json")
    overlap: dict[str, str] = _json(maps / "objectnet_to_imagenet_1k.json")
    kept = [number for number, folder in enumerate(folders) if label_of.get(folder) in overlap]
    names = tuple(label_of[folders[number]] for number in kept)
    return pictures.relabelled({number: place for place, number in enumerate(kept)}), names


def _json(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"not readable ({error}) · {path} · it comes with ObjectNet") from error


def check_labels(where: str, keys: Sequence[str], labels: Sequence[tuple[int, ...]], num_classes: int) -> None:
    """Raises DataError for a label that is no class, and for a picture without label."""
    for key, found in zip(keys, labels, strict=True):
        if not found or min(found) < 0 or max(found) >= num_classes:
            said = f"label {found[0]}" if found else "no label"
            raise DataError(f"{said} of sample {key!r} is not among the {num_classes} class names · {where}")
