"""The floor of an evaluation: the model alone, each picture and each text once, nothing read and nothing decoded."""

import json
import sys
import time
from pathlib import Path

import torch

from diptych.bench.eval_data import CLASS_FILE, TEMPLATE_FILE
from diptych.data.shards import list_shards, read_shard
from diptych.encoder import load

_TEXT_BATCH = 512


def main(model: str, data: Path, *, batch: int, precision: str) -> None:
    """Prints seconds and what there was to do, as JSON."""
    encoder = load(model)
    shards = list_shards(str(data / "test"))
    captions = [sample.members["txt"].decode() for shard in shards for sample in read_shard(shard)]
    names, templates = ((data / name).read_text(encoding="utf-8").splitlines() for name in (CLASS_FILE, TEMPLATE_FILE))
    prompts = [template.replace("{c}", name) for name in names for template in templates]
    lines = [line for text in captions for line in text.splitlines()]
    texts = sorted({*prompts, *lines}, key=len)
    images = torch.randint(0, 256, (batch, 3, encoder.image_size, encoder.image_size), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        encoder.encode_image(images[:1])
        start, used = time.perf_counter(), time.process_time()
        for first in range(0, len(captions), batch):
            encoder.encode_image(images[: len(captions) - first])
        for first in range(0, len(texts), _TEXT_BATCH):
            encoder.encode_text(texts[first : first + _TEXT_BATCH])
    spent = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - used}
    sizes = {"pictures": len(captions), "prompts": len(prompts), "captions": len(lines)}
    sys.stdout.write(json.dumps(spent | {"sizes": sizes}) + "\n")


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    main(asked["model"], Path(asked["data"]), batch=asked["batch"], precision=asked["precision"])
