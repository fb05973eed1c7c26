"""What one measured process does: open_clip's side, and what both sides share.

This file needs the standard library, the peer's own packages and, of diptych, compat.py alone: it is run by the Python
of the peer's environment. `data_ours.py` measures with the same functions.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

_ENDLESS = 10**9


@dataclass(frozen=True)
class Request:
    """One measurement."""

    measure: str
    """throughput, memory, startup, resume, tokens or decoders."""
    implementation: str
    """ours, open_clip, webdataset or floor."""
    shards: str
    """Brace pattern; of `tokens`, a file of captions."""
    side: int
    """Of the views, pixels."""
    batch: int
    batches: int
    """How many are timed, after a first one."""
    core: int
    """The only processor core of the process and its worker."""


Answer = dict[str, float]


def main(measures: dict[str, Callable[[Request], Answer]]) -> None:
    """Takes the request from the command line, measures on one core, prints the answer and the versions as JSON."""
    import torch

    request = Request(**json.loads(sys.argv[1]))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {request.core})
    torch.set_num_threads(1)
    answer = measures[request.measure](request)
    sys.stdout.write(json.dumps({"answer": answer, "versions": _versions()}) + "\n")


def _versions() -> dict[str, str]:
    found = {}
    for package in ("torch", "pillow", "simplejpeg", "open_clip_torch", "webdataset"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


# --- both sides ----------------------------------------------------------------------------------------------------


def images_per_second(sizes: Iterator[int], batches: int) -> Answer:
    """Of `batches` batches after the first; `sizes` gives the number of pictures in each as it comes."""
    next(sizes)
    start = time.perf_counter()
    images = sum(islice(sizes, batches))
    return {"images_per_second": images / (time.perf_counter() - start)}


def worker_memory(sizes: Iterator[int], batches: int) -> Answer:
    """The most that the worker process holds while `batches` batches come, MiB.

    PSS counts what processes share in parts, USS not at all.
    """
    pss = uss = 0.0
    for _ in islice(sizes, batches):
        for worker in multiprocessing.active_children():
            text = Path(f"/proc/{worker.pid}/smaps_rollup").read_text(encoding="ascii")
            kib = {line.split()[0]: int(line.split()[1]) for line in text.splitlines()[1:]}
            pss = max(pss, kib["Pss:"] / 1024)
            uss = max(uss, (kib["Private_Clean:"] + kib["Private_Dirty:"]) / 1024)
    return {"pss_mib": pss, "uss_mib": uss}


def captions_per_second(tokenize: Callable[[list[str]], Any], request: Request) -> Answer:
    """A batch of captions at a time, none of them twice."""
    captions = Path(request.shards).read_text(encoding="utf-8").splitlines()
    tokenize(captions[: request.batch])
    start = time.perf_counter()
    for first in range(request.batch, len(captions), request.batch):
        tokenize(captions[first : first + request.batch])
    return {"captions_per_second": (len(captions) - request.batch) / (time.perf_counter() - start)}


# --- the peer ------------------------------------------------------------------------------------------------------


def _repair_torchvision() -> Any:
    """Beside a CPU build of torch its import fails. To be kept: the repair ends with what is given back."""
    compat = runpy.run_path(str(Path(__file__).parents[1] / "compat.py"))  # by path: diptych is not installed here
    compat["install"]()
    return compat


def _loader(request: Request, workers: int) -> Any:
    """open_clip's own training pipeline with its default augmentation (random crops of 0.9 to 1.0 of the area)."""
    import importlib

    import open_clip

    options = argparse.Namespace(
        train_data=request.shards,
        train_num_samples=_ENDLESS,
        dataset_resampled=False,
        train_data_upsampling_factors=None,
        seed=0,
        workers=workers,
        world_size=1,
        batch_size=request.batch,
    )
    transform = open_clip.image_transform(request.side, is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    get_wds_dataset = importlib.import_module("open_clip_train.data").get_wds_dataset
    return get_wds_dataset(options, transform, is_train=True, tokenizer=tokenizer).dataloader


def _sizes(request: Request, workers: int) -> Iterator[int]:
    return (len(images) for images, _ in _loader(request, workers))


def _startup(request: Request) -> Answer:
    import importlib

    importlib.import_module("open_clip_train.data")
    start = time.perf_counter()
    loader = _loader(request, 0)
    built = time.perf_counter()
    next(iter(loader))
    return {"build_seconds": built - start, "first_batch_seconds": time.perf_counter() - start}


def _tokens(request: Request) -> Answer:
    import open_clip

    return captions_per_second(open_clip.get_tokenizer("ViT-B-32"), request)


if __name__ == "__main__":
    _kept = _repair_torchvision()
    main(
        {
            "throughput": lambda request: images_per_second(_sizes(request, 0), request.batches),
            "memory": lambda request: worker_memory(_sizes(request, 1), request.batches),
            "startup": _startup,
            "tokens": _tokens,
        }
    )
