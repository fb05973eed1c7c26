"""What one measured process does on our side, and for what lives in our environment: bare webdataset, the floor."""

import io
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count, islice
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from diptych.bench.data_peer import (
    Answer,
    Request,
    captions_per_second,
    images_per_second,
    main,
    worker_memory,
)
from diptych.data import crop, jpeg
from diptych.data.batch import Batch, Cursors
from diptych.data.loader import Loader, build_loader
from diptych.data.order import LaneCursor
from diptych.data.reader import Feed
from diptych.data.shards import list_shards, read_shard
from diptych.data.sources import DataConfig
from diptych.data.tokens import Tokenizer
from diptych.errors import DiptychError

_SEED = 0
_LANES = 64
_TEXT = {"context_length": 77, "width": 8, "heads": 1, "layers": 1, "vocab_size": 49408}
_VISION = {"layers": 1, "width": 8, "patch_size": 8, "image_size": 8, "head_width": 8}


def _tokenizer() -> Tokenizer:
    """As a run gets it: from its model, here the smallest with ViT-B-32's text."""
    from diptych.config import from_tree
    from diptych.models import dual_encoder

    towers = {"type": "open_clip", "embed_dim": 8, "vision": _VISION, "text": _TEXT}
    return dual_encoder.build(from_tree(dual_encoder.ModelConfig, {"towers": towers}), seed=_SEED).tokenizer


def _loader(request: Request, tokenizer: Tokenizer, *, lanes: int, workers: int = 0) -> Loader:
    config = DataConfig(request.shards, lanes=lanes, workers=workers)
    return build_loader(config, Feed(request.batch, 0, 1, _SEED, request.side, tokenizer))


def _sizes(request: Request, *, lanes: int, workers: int) -> Iterator[int]:
    with _loader(request, _tokenizer(), lanes=lanes, workers=workers).batches() as batches:
        yield from (len(batch.images) for batch in batches)


def _throughput(request: Request) -> Answer:
    sizes = {"ours": _ours, "webdataset": _webdataset, "floor": _floor}[request.implementation](request)
    return images_per_second(sizes, request.batches)


def _ours(request: Request) -> Iterator[int]:
    return _sizes(request, lanes=len(list_shards(request.shards)), workers=0)


def _webdataset(request: Request) -> Iterator[int]:
    """webdataset as its manual shows it, with open_clip's transform and tokenizer."""
    import open_clip
    import webdataset

    transform = open_clip.image_transform(request.side, is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    dataset = webdataset.WebDataset(list(list_shards(request.shards)), shardshuffle=False).decode("pil")
    dataset = (
        dataset.to_tuple("jpg", "txt").map_tuple(transform, lambda text: tokenizer(text)[0]).batched(request.batch)
    )
    return (len(images) for images, _ in dataset.repeat())


def _floor(request: Request) -> Iterator[int]:
    """Nothing but decoding, of bytes that are in memory."""
    pictures = [raw.members["jpg"] for raw in read_shard(list_shards(request.shards)[0])]
    header = jpeg.read_header(pictures[0])
    if header is None:
        raise DiptychError(f"the pictures are no plain JPEG · {request.shards} · make the shards again")
    shrink = floor_shrink(header, request.side)
    for first in count(step=request.batch):
        for number in range(first, first + request.batch):
            jpeg.pixels(pictures[number % len(pictures)], header, shrink=shrink)
        yield request.batch


def floor_shrink(header: jpeg.Header, side: int) -> int:
    """The scale that the smallest crop needs: nine tenths of the area, at worst nine tenths of one side."""
    return jpeg.shrink_for(0.9 * header.width, 0.9 * header.height, at_least=side)


def _memory(request: Request) -> Answer:
    return worker_memory(_sizes(request, lanes=1, workers=1), request.batches)


def _startup(request: Request) -> Answer:
    tokenizer = _tokenizer()
    start = time.perf_counter()
    loader = _loader(request, tokenizer, lanes=_LANES)
    built = time.perf_counter()
    with loader.batches() as batches:
        next(batches)
        return {"build_seconds": built - start, "first_batch_seconds": time.perf_counter() - start}


def _resume(request: Request) -> Answer:
    """From deep in an epoch; what comes must be what the uninterrupted run was given there."""
    tokenizer = _tokenizer()
    loader = _loader(request, tokenizer, lanes=_LANES)
    with loader.batches(_deep(loader)) as batches:
        before, expected = islice(batches, 2)
    cursors = before.cursors.to_json()
    start = time.perf_counter()
    with _loader(request, tokenizer, lanes=_LANES).batches(Cursors.from_json(cursors)) as batches:
        found: Batch = next(batches)
        seconds = time.perf_counter() - start
    if found.sample_ids.tolist() != expected.sample_ids.tolist():
        raise DiptychError(f"another sample came after resuming · {request.shards} · report this")
    return {"resume_seconds": seconds}


def _deep(loader: Loader) -> Cursors:
    """Four fifths of the first epoch, in every lane in the middle of a window."""
    source = loader.sources[0]
    if loader.num_samples is None:
        raise DiptychError(f"the samples of {source.pattern} cannot be counted · bench data · use local shards")
    position = int(0.8 * loader.num_samples / source.lanes)
    lanes = {(source.name, lane): LaneCursor(0, position) for lane in range(source.lanes)}
    consumed = position * source.lanes
    return Cursors(consumed, {source.name: consumed}, lanes, {source.name: source.digest})


def _tokens(request: Request) -> Answer:
    return captions_per_second(_tokenizer(), request)


def _decoders(request: Request) -> Answer:
    """Milliseconds per picture of each way to decode, and of each way to bring a whole one to the side of a view."""
    pictures = [raw.members["jpg"] for raw in read_shard(list_shards(request.shards)[0])]
    decoded = [simplejpeg.decode_jpeg(picture) for picture in pictures]
    found = {f"simplejpeg at {n}/8": _milliseconds(partial(_at_eighths, n=n), pictures) for n in range(1, 9)}
    found |= {f"Pillow at 1/{n}": _milliseconds(partial(_by_draft, shrink=n), pictures) for n in (1, 2, 4)}
    found["to the side by torch in uint8"] = _milliseconds(partial(_by_torch, side=request.side), decoded)
    found["to the side by Pillow"] = _milliseconds(partial(_by_pillow, side=request.side), decoded)
    return found


def _milliseconds(work: Callable[[Any], object], items: Sequence[Any]) -> float:
    work(items[0])
    start = time.perf_counter()
    for item in items:
        work(item)
    return (time.perf_counter() - start) / len(items) * 1000


def _at_eighths(picture: bytes, *, n: int) -> None:
    height, width, _, _ = simplejpeg.decode_jpeg_header(picture)
    simplejpeg.decode_jpeg(picture, min_height=-(-height * n // 8), min_width=-(-width * n // 8), min_factor=8 / n)


def _by_draft(picture: bytes, *, shrink: int) -> None:
    opened = Image.open(io.BytesIO(picture))
    opened.draft("RGB", (opened.width // shrink, opened.height // shrink))
    opened.load()


def _by_torch(pixels: np.ndarray, *, side: int) -> None:
    crop.square(pixels, (0, 0, pixels.shape[1], pixels.shape[0]), side)


def _by_pillow(pixels: np.ndarray, *, side: int) -> None:
    np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC))


if __name__ == "__main__":
    main(
        {
            "throughput": _throughput,
            "memory": _memory,
            "startup": _startup,
            "resume": _resume,
            "tokens": _tokens,
            "decoders": _decoders,
        }
    )
