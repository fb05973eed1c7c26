"""The folder of an export: it appears when it is complete and its features were compared, or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diptych.errors import DataError, one_line

_MARKS = frozenset({"open_clip_config.json", "config.json", "image.onnx", "adapter_config.json"})


@contextmanager
def building(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `folder` to write into; it takes its place when the block ends well.

    Raises:
        DataError: there is something at that place, and `overwrite` is off or it is no export; nothing can be written.
    """
    folder = folder.resolve()
    _refuse_other_things(folder, overwrite=overwrite)
    unfinished = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
    except OSError as error:
        raise DataError(f"export not written ({one_line(error)}) · {folder} · choose another folder") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _refuse_other_things(folder: Path, *, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise DataError(f"output is a file · {folder} · name a folder")
    if not overwrite:
        raise DataError(f"output folder is not empty · {folder} · choose another, or add --overwrite")
    names = {path.name for path in folder.iterdir()}
    if not names & _MARKS or any(path.is_dir() for path in folder.iterdir()):
        raise DataError(f"not an export, so it is not replaced · {folder} · choose another, or remove it yourself")
