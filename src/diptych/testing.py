"""For tests, ours and users': ranks without a launcher, tiny shards, a tiny model."""

import copy
import io
import json
import pickle
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from diptych.config import from_tree
from diptych.data import index
from diptych.models import dual_encoder
from diptych.models.dual_encoder import DualEncoder, ModelConfig
from diptych.train.recipe import Recipe

TINY_MODEL: dict[str, Any] = {
    "towers": {
        "type": "open_clip",
        "embed_dim": 16,
        "vision": {"layers": 1, "width": 32, "patch_size": 8, "image_size": 16, "head_width": 16},
        "text": {"context_length": 16, "width": 32, "heads": 2, "layers": 1, "vocab_size": 49408},
    }
}
TINY_CAPTIONER: dict[str, Any] = {
    "towers": {
        "type": "open_clip",
        "embed_dim": 32,
        "vision": TINY_MODEL["towers"]["vision"] | {"attentional_pool": True, "attn_pooler_queries": 5},
        "text": TINY_MODEL["towers"]["text"] | {"embed_cls": True},
        "multimodal": {"layers": 2, "heads": 2},
    }
}


def tiny_model() -> ModelConfig:
    """A dual encoder that builds and steps in milliseconds."""
    return from_tree(ModelConfig, TINY_MODEL)


def tiny_tuned(*adapters: dict[str, Any], layers: int = 1) -> DualEncoder:
    """A tiny dual encoder with adapters, in training mode; both towers have as many layers."""
    towers = TINY_MODEL["towers"]
    towers = towers | {side: towers[side] | {"layers": layers} for side in ("vision", "text")}
    config = from_tree(ModelConfig, {"towers": towers, "adapters": list(adapters)})
    return dual_encoder.build(config, seed=0).train()


@torch.no_grad()
def feature_with_vectors(model: DualEncoder, text: str, vectors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The unit-norm float64 feature of a text in which vectors stand for words of one token each: an oracle for learned
    prompts, which writes them into the tower's own table."""
    tower = copy.deepcopy(model.text_tower).double()
    table = max(
        (part for part in tower.modules() if isinstance(part, torch.nn.Embedding)), key=lambda part: len(part.weight)
    )
    for word, vector in vectors.items():
        table.weight[int(model.tokenizer([word])[0, 1])] = vector.double()
    return torch.nn.functional.normalize(tower(model.tokenizer([text]))[0], dim=0)


def tiny_recipe(shards: Path, run: Path, **changes: Any) -> Recipe:
    """A run of ten steps over shards of `write_shards`, bit for bit the same wherever it runs; `changes` replace its
    keys."""
    tree: dict[str, Any] = {
        "run": str(run),
        "total_samples": 80,
        "global_batch": 8,
        "precision": "fp32",
        "model": TINY_MODEL,
        "data": {"shards": str(shards), "lanes": 4, "workers": 0, "captions": {"views": [{"columns": ["name"]}]}},
        "optim": {"peak_lr": 1e-2, "schedule": {"warmup_samples": 16}},
        "checkpoint": {"every_samples": 24, "keep_last": 10},
        "log": {"every_steps": 1, "tensorboard": False},
    }
    return from_tree(Recipe, tree | changes)


def forget_after(run: Path, step: int) -> None:
    """As if a run had been killed before it wrote the checkpoints behind a step."""
    for folder in (run / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 120.0) -> list[Any]:
    """Calls `function(rank, *arguments)` on `world_size` forked gloo ranks; returns what each returned (picklable).

    Raises:
        RuntimeError: a rank failed or did not end in time; the message holds its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("fork")
        results = context.SimpleQueue()
        ranks = [
            context.Process(target=_rank, args=(function, rank, world_size, f"{folder}/store", results, arguments))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            return _collect(ranks, results, timeout)
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _collect(ranks: Sequence[Any], results: Any, timeout: float) -> list[Any]:
    found: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(found) < len(ranks):
        if not results.empty():
            rank, value, problem = results.get()
            if problem:
                raise RuntimeError(f"rank {rank} failed:\n{problem}")
            found[rank] = pickle.loads(value)
        elif time.monotonic() > deadline or any(process.exitcode not in (None, 0) for process in ranks):
            codes = [process.exitcode for process in ranks]
            raise RuntimeError(f"ranks did not finish within {timeout} s; exit codes {codes}")
        else:
            time.sleep(0.005)
    return [found[rank] for rank in range(len(ranks))]


def _rank(function: Any, rank: int, world_size: int, store: str, results: Any, arguments: tuple[Any, ...]) -> None:
    import traceback

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        # As bytes: tensors would travel as handles to memory that dies with the rank.
        results.put((rank, pickle.dumps(function(rank, *arguments)), ""))
        dist.barrier()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class TinySample:
    """A sample of a test shard."""

    key: str
    members: dict[str, bytes] = field(default_factory=dict)


def tiny_sample(
    key: str, *, caption: str = "", side: int = 16, label: int | None = None, hard: Sequence[str] = ()
) -> TinySample:
    """A picture of one colour that its key decides, with a caption and, in the column `hard`, wrong ones."""
    rng = np.random.default_rng(hash_text(key))
    picture = Image.fromarray(np.broadcast_to(rng.integers(0, 256, 3, dtype=np.uint8), (side, side, 3)).copy())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    caption = caption or f"caption of {key}"
    columns: dict[str, list[str]] = {"name": [caption]} | ({"hard": list(hard)} if hard else {})
    document = {"captions": columns, "meta": {"group": "test"}}
    members = {"png": buffer.getvalue(), "json": json.dumps(document).encode(), "txt": caption.encode()}
    if label is not None:
        members["cls"] = str(label).encode()
    return TinySample(key, members)


def hash_text(text: str) -> int:
    """A hash that does not change from process to process."""
    from diptych.seeding import derive

    return derive(0, text)


def write_shard(path: Path, samples: Sequence[TinySample], *, indexed: bool = True) -> Path:
    """A shard of the samples, with its sidecar index when asked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for sample in samples:
            for extension, data in sample.members.items():
                entry = tarfile.TarInfo(f"{sample.key}.{extension}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    if indexed:
        index.write(path, index.scan(path))
    return path


def write_shards(folder: Path, sizes: Sequence[int], *, indexed: bool = True) -> Path:
    """Shards of the given sizes with keys s0000, s0001, …; returns the folder."""
    first = 0
    for number, size in enumerate(sizes):
        samples = [tiny_sample(f"s{first + i:04d}") for i in range(size)]
        write_shard(folder / f"{number:06d}.tar", samples, indexed=indexed)
        first += size
    return folder
