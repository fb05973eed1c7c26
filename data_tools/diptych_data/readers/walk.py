"""What lies in a folder: pictures in a fixed order, and links that lead out of it told from those that do not."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
_TEXTS = frozenset({".txt", ".json"})


@dataclass(frozen=True)
class Found:
    """Pictures below a folder."""

    names: list[str]
    """Relative paths, sorted part by part."""
    identity: str
    """Checksum of names, sizes and times of the pictures and of texts."""


def find_pictures(root: Path) -> Found:
    """All pictures below `root`; hidden files and folders are passed over, links to folders are not followed.

    A link to a folder outside is listed like a picture, so that it is refused like one. Raises OSError.
    """
    names: list[str] = []
    seen: list[str] = []
    for entry in _entries(root):
        name = os.path.relpath(entry.path, root)
        suffix = Path(name).suffix.lower()
        leads_out = entry.is_symlink() and entry.is_dir() and is_outside(Path(entry.path), root)
        if (suffix in EXTENSIONS and not entry.is_dir()) or leads_out:
            names.append(name)
        if suffix in EXTENSIONS or suffix in _TEXTS:
            status = entry.stat(follow_symlinks=False)
            seen.append(f"{name}\0{status.st_size}\0{status.st_mtime_ns}")
    names.sort(key=lambda name: Path(name).parts)
    checksum = blake2b("\n".join(sorted(seen)).encode("utf-8", "surrogateescape"), digest_size=16)
    return Found(names, checksum.hexdigest())


def _entries(root: Path) -> Iterator[os.DirEntry[str]]:
    waiting = [str(root)]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                else:
                    yield entry


def is_outside(path: Path, root: Path) -> bool:
    """Whether following `path` leads out of `root`."""
    try:
        return not path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # links in a circle
        return True


def parts_of(path: Path, suffixes: tuple[str, ...]) -> tuple[Path, ...]:
    """The file itself, or the files of a folder, that end so; sorted, without hidden ones."""
    inside = sorted(path.iterdir()) if path.is_dir() else [path]
    return tuple(p for p in inside if p.suffix.lower() in suffixes and not p.name.startswith(".") and p.is_file())
