"""What one measured process of training does on our side, and for what lives in our environment: the bare step,
open_clip's step, and what is known of the model before anything is timed."""

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.bench import train_flops
from diptych.bench.train_peer import Answer, Mark, Request, main, peak_bytes, run_steps, timed
from diptych.bench.train_plan import SKIPPED_STEPS, TRACE
from diptych.bench.train_split import split
from diptych.config import load
from diptych.data.batch import Batch
from diptych.data.loader import build_loader
from diptych.distributed.runtime import Ranks, resolve_precision
from diptych.errors import DiptychError
from diptych.log import read_metrics
from diptych.losses.contrastive import contrastive_loss
from diptych.models import dual_encoder, speed
from diptych.models.dual_encoder import DualEncoder
from diptych.train import loop, stages
from diptych.train.recipe import EvaluateConfig, LogConfig, Recipe

_LOOKED_AT = 5
_LR, _BETAS, _EPS, _DECAY = 1e-4, (0.9, 0.98), 1e-6, 0.2


def _recipe(request: Request, *, save_at: int | None = None) -> Recipe:
    """The recipe as this process runs it; what is called an evaluation comes at the last step, to read the memory."""
    recipe = load(Recipe, Path(request.recipe))
    every_samples = None if save_at is None else save_at * request.batch
    total_samples = request.steps * request.batch
    return replace(
        recipe,
        run=Path(request.folder) / "run",
        total_samples=total_samples,
        checkpoint=replace(recipe.checkpoint, every_samples=every_samples, keep_last=1),
        evaluate=EvaluateConfig(every_samples=total_samples),
        log=LogConfig(every_steps=request.every, tensorboard=False),
    )


# --- the loop ------------------------------------------------------------------------------------------------------


def _ours(request: Request) -> Answer:
    return _train(request)


def _ours_saving(request: Request) -> Answer:
    """With one checkpoint on the way."""
    return _train(request, save_at=request.save_at)


def _train(request: Request, *, save_at: int | None = None) -> Answer:
    """Rates are those that the run logs; memory is read at the last step, before the checkpoint at the end."""
    recipe = _recipe(request, save_at=save_at)
    answer: Answer = {}

    def at_the_end(model: DualEncoder, ranks: Ranks) -> dict[str, float]:
        answer["peak_bytes"] = peak_bytes(request.device)
        if save_at is not None:
            answer["written_before_end"] = time.time() - _written(recipe)
        return {}

    run = loop.train(recipe, at_the_end)
    rows = [row for row in read_metrics(run.metrics) if "train/samples_per_second" in row]
    seconds = {int(row["step"]): request.batch * request.every / row["train/samples_per_second"] for row in rows}
    windows = [(step - request.every, request.every, seconds[step]) for step in seconds if step % request.every == 0]
    return answer | {"windows": windows}


def _written(recipe: Recipe) -> float:
    """When the checkpoint was complete: the manifest is its last file. Raises DiptychError if it is not."""
    manifests = list((recipe.run / "checkpoints").glob("step-*/manifest.json"))  # until then the folder's name differs
    if not manifests:
        raise DiptychError("the checkpoint was not complete before the last step · bench train --steps · give more")
    return manifests[0].stat().st_mtime


def _split(request: Request) -> Answer:
    """Where the time of a step goes, in a run of its own, for a profiler takes time itself."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if request.device == "cuda" else []
    with torch.profiler.profile(activities=activities) as profiler:
        loop.train(_recipe(request))
    trace = Path(request.folder) / TRACE
    profiler.export_chrome_trace(str(trace))
    found = split(json.loads(trace.read_text(encoding="utf-8"))["traceEvents"], skip=SKIPPED_STEPS)
    return {"split": vars(found)}


# --- a step alone --------------------------------------------------------------------------------------------------


def _model_and_batch(request: Request) -> tuple[Recipe, DualEncoder, Batch]:
    """Our model, and of the first batches of the run the one whose longest caption is the median."""
    recipe = _recipe(request)
    model = dual_encoder.build(recipe.model, seed=recipe.seed)
    stages.prepare(model, recipe.stages)
    feed = loop.feed_of(recipe, model, Ranks(0, 1))
    with build_loader(recipe.data, feed).batches() as batches:
        first = sorted(islice(batches, _LOOKED_AT), key=lambda batch: batch.tokens.shape[1])
    return recipe, model.train(), first[len(first) // 2]


def _bare(request: Request) -> Answer:
    """Model, loss, AdamW, and one batch that is in memory: what the loop is measured against."""
    recipe, model, batch = _model_and_batch(request)
    model.to(request.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    speed.prepare(model, recipe.speed)
    optimizer = torch.optim.AdamW(_trained(model), lr=_LR, betas=_BETAS, eps=_EPS, weight_decay=_DECAY, fused=True)
    images, tokens = batch.images.to(request.device), batch.tokens.to(request.device)

    def step() -> None:
        with _autocast(request):
            found = model(images, tokens)
        contrastive_loss(found.image_features, found.text_features, found.logit_scale).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return _timed_steps(step, request)


def _open_clip_step(request: Request) -> Answer:
    """open_clip's model and loss in the order of its trainer, with one batch that is in memory, padded as its own."""
    import open_clip

    _, ours, batch = _model_and_batch(request)
    padding = (0, ours.tokenizer.context_length - batch.tokens.shape[1])
    images = (batch.images.float() / 127.5 - 1).to(request.device)
    tokens = F.pad(batch.tokens, padding).to(request.device)
    open_clip.add_model_config(request.model)
    model = open_clip.create_model(Path(request.model).stem, device=request.device, output_dict=True).train()
    if request.checkpoint_activations:
        model.set_grad_checkpointing()
    forward = torch.compile(model) if request.compile else model
    loss = open_clip.ClipLoss(cache_labels=True)
    optimizer = torch.optim.AdamW(_trained(model), lr=_LR, betas=_BETAS, eps=_EPS, weight_decay=_DECAY)

    def step() -> None:
        optimizer.zero_grad()
        with _autocast(request):
            total = loss(**forward(images, tokens))
        total.backward()
        if request.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), request.clip)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, dual_encoder.MAX_LOGIT_SCALE)

    return _timed_steps(step, request)


def _timed_steps(step: Callable[[], None], request: Request) -> Answer:
    marks: list[Mark] = list(run_steps(step, request))
    return timed(marks, request)


def _trained(model: torch.nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _autocast(request: Request) -> AbstractContextManager[Any]:
    return torch.autocast(request.device, torch.bfloat16) if request.precision == "bf16" else nullcontext()


# --- what is known beforehand ----------------------------------------------------------------------------------------


def _facts(request: Request) -> Answer:
    """Operations of the model, and of the device at most."""
    recipe, model, batch = _model_and_batch(request)
    images, tokens = batch.images[:2], batch.tokens[:2]
    context_length = model.tokenizer.context_length
    padded = F.pad(tokens, (0, context_length - tokens.shape[1]))
    precision = resolve_precision(recipe.precision)
    name = torch.cuda.get_device_name() if request.device == "cuda" else ""
    published = train_flops.published_peak(name) if precision == "bf16" else None
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return {
        "precision": precision,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "image_size": images.shape[-1],
        "tokens": tokens.shape[1],
        "flops_per_sample": train_flops.per_sample(model, images, tokens),
        "padded_tokens": context_length,
        "padded_flops_per_sample": train_flops.per_sample(model, images, padded),
        "peak_flops": published or train_flops.measured_peak(request.device, dtype),
        "peak_is_published": published is not None,
        "open_clip_config": model.open_clip_config,
    }


def _said(measure: Callable[[Request], Answer]) -> Callable[[Request], Answer]:
    """What is wrong with the input is an answer too."""

    def answer(request: Request) -> Answer:
        try:
            return measure(request)
        except DiptychError as error:
            return {"problem": str(error)}

    return answer


MEASURES: dict[str, Callable[[Request], Answer]] = {
    "ours": _ours,
    "ours-saving": _ours_saving,
    "bare": _bare,
    "open_clip-step": _open_clip_step,
    "facts": _facts,
    "split": _split,
}

if __name__ == "__main__":
    main({name: _said(measure) for name, measure in MEASURES.items()})
