"""`diptych bench caption`: the caption head beside one that makes all logits at once, and a captioner's step beside its
parts run alone.

    head    hidden states [B·L, W] → the loss of each token, forward and backward: seconds, and the peak of memory
            above what was there when the hidden states and the vocabulary's matrix were
    step    forward and backward of a captioner; of its towers with the contrastive loss; of its decoder alone on given
            tokens, with a dense head

Every measurement has a process of its own; they alternate, so that a machine's moods meet all of them.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.bench.isolated import PeakMeter, hardware, in_process
from diptych.errors import ConfigError
from diptych.vocabulary import IGNORED, TokenLoss, token_losses

HEADS = ("ours", "dense")
STEPS = ("captioner", "contrastive", "decoder")


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    device: str
    batch: int = 256
    """Captions, of the head."""
    length: int = 64
    """Tokens of a caption, none of them padding."""
    width: int = 512
    vocab: int = 49408
    model: str = "coca_ViT-B-32"
    """An open_clip captioner, of the step."""
    step_batch: int = 8
    """Pairs, of the step."""
    rounds: int = 3


@dataclass(frozen=True)
class Request:
    """One measurement."""

    what: str
    plan: Plan


@dataclass(frozen=True)
class Measurement:
    """What one process found."""

    seconds: float
    extra_bytes: int
    loss: float


@dataclass(frozen=True)
class Row:
    """One measurement over all rounds."""

    what: str
    seconds: float
    spread: tuple[float, float]
    extra_bytes: int
    loss: float


@dataclass(frozen=True)
class Report:
    """Everything that was measured."""

    plan: Plan
    rows: dict[str, Row]

    @property
    def memory_share(self) -> float:
        """Our head's extra memory, of the dense one's."""
        return self.rows["ours"].extra_bytes / self.rows["dense"].extra_bytes

    @property
    def step_share(self) -> float:
        """A captioner's step, of its parts run alone."""
        return self.rows["captioner"].seconds / (self.rows["contrastive"].seconds + self.rows["decoder"].seconds)


def measure_all(plan: Plan, *, progress: Callable[[str], None]) -> Report:
    """All measurements.

    Raises:
        ConfigError: there is no such device, or the model is no captioner.
        DiptychError: a process died, such as of too little memory.
    """
    if plan.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"there is no CUDA device for {plan.device!r} · bench caption · use --device cpu")
    from diptych.models.towers.open_clip import OpenClipTowers

    if "multimodal_cfg" not in OpenClipTowers(plan.model).resolved():
        raise ConfigError(f"{plan.model!r} is no captioner · bench caption --model · name one such as coca_ViT-B-32")
    found: dict[str, list[Measurement]] = {name: [] for name in (*HEADS, *STEPS)}
    for number in range(plan.rounds):
        for name in found:
            progress(f"round {number + 1} of {plan.rounds}: {name}")
            found[name].append(in_process(_measure, Request(name, plan)))
    return Report(plan, {name: _row(name, parts) for name, parts in found.items()})


def table(report: Report) -> str:
    """Markdown, with hardware and versions above."""
    plan, rows = report.plan, report.rows
    lines = [
        f"{hardware(plan.device)}, torch {torch.__version__}; float32; forward and backward; seconds: median (least, "
        "most)",
        "",
        f"| head: B = {plan.batch}, L = {plan.length}, W = {plan.width}, {plan.vocab:,} words | seconds | extra MiB | "
        "of the dense one's | loss |",
        "|---|--:|--:|--:|--:|",
    ]
    for name in HEADS:
        row, share = rows[name], f"{rows[name].extra_bytes / rows['dense'].extra_bytes:.1%}"
        lines.append(f"| {name} | {_times(row)} | {row.extra_bytes / 2**20:,.0f} | {share} | {row.loss:.6f} |")
    lines += ["", f"| step of {plan.model}, {plan.step_batch} pairs | seconds |", "|---|--:|"]
    lines += [f"| {name} | {_times(rows[name])} |" for name in STEPS]
    lines.append(f"| captioner / (contrastive + decoder) | {report.step_share:.2f} |")
    return "\n".join(lines)


def as_json(report: Report) -> dict[str, Any]:
    """Plain values."""
    shares = {"memory_share": report.memory_share, "step_share": report.step_share}
    return {"plan": asdict(report.plan), "rows": [asdict(row) for row in report.rows.values()]} | shares


def _times(row: Row) -> str:
    return f"{row.seconds:.2f} ({row.spread[0]:.2f}, {row.spread[1]:.2f})"


def _row(name: str, found: Sequence[Measurement]) -> Row:
    seconds = [measurement.seconds for measurement in found]
    extra = int(statistics.median(measurement.extra_bytes for measurement in found))
    return Row(name, statistics.median(seconds), (min(seconds), max(seconds)), extra, found[0].loss)


# --- one process -----------------------------------------------------------------------------------------------------


def _measure(request: Request) -> Measurement:
    plan = request.plan
    if request.what in HEADS:
        return _measure_head(request.what, plan)
    run = _step(request.what, plan)
    run()  # what is loaded once
    meter, start = PeakMeter(plan.device), time.perf_counter()
    loss = run()
    return Measurement(time.perf_counter() - start, meter.extra_bytes(), loss)


def _measure_head(name: str, plan: Plan) -> Measurement:
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int, scale: float) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(plan.device).requires_grad_()

    tokens = plan.batch * plan.length
    hidden, matrix = leaf(tokens, plan.width, scale=1.0), leaf(plan.width, plan.vocab, scale=plan.width**-0.5)
    targets = torch.randint(0, plan.vocab, (tokens,), generator=generator).to(plan.device)
    head = _ours if name == "ours" else _dense
    _descend(head(hidden[:8], matrix, targets[:8]))  # what is loaded once
    hidden.grad = matrix.grad = None
    meter, start = PeakMeter(plan.device), time.perf_counter()
    loss = _descend(head(hidden, matrix, targets))
    return Measurement(time.perf_counter() - start, meter.extra_bytes(), loss)


def _descend(loss: Tensor) -> float:
    loss.backward()
    return loss.item()  # waits for the device


def _ours(hidden: Tensor, matrix: Tensor, targets: Tensor) -> Tensor:
    return token_losses(hidden, matrix, targets, TokenLoss()).mean()


def _dense(hidden: Tensor, matrix: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ matrix, targets, ignore_index=IGNORED)


def _step(what: str, plan: Plan) -> Callable[[], float]:
    """Forward and backward of one of the `STEPS`, ready to be called."""
    from diptych.losses import contrastive_loss  # heads need none of these, and they take seconds to import
    from diptych.models import dual_encoder
    from diptych.models.dual_encoder import ModelConfig
    from diptych.models.towers.open_clip import OpenClipTowers

    config = ModelConfig(towers=OpenClipTowers(plan.model))
    model = dual_encoder.build(config, seed=0).to(plan.device).train()
    generator = torch.Generator().manual_seed(0)
    shape = (plan.step_batch, 3, model.image_size, model.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(plan.device)
    length = min(plan.length, model.tokenizer.context_length)
    tokens = torch.randint(1, 40000, (plan.step_batch, length), generator=generator).to(plan.device)
    if what == "decoder":
        return _decoder_alone(model, images, tokens)
    caption = TokenLoss() if what == "captioner" else None

    def run() -> float:
        found = model(images, tokens, None, caption)
        loss = contrastive_loss(found.image_features, found.text_features, found.logit_scale)
        if found.caption_losses is not None and found.caption_lengths is not None:
            loss = loss + 2 * found.caption_losses.sum() / found.caption_lengths.sum()
        return _descend(loss)

    return run


def _decoder_alone(model: Any, images: Tensor, tokens: Tensor) -> Callable[[], float]:
    """The decoder on tokens that are given, their gradients included, as in a model; all logits at once."""
    from diptych.models.captions import next_words

    with torch.no_grad():
        _, pictures = model.see(images)
        _, words = model.read(tokens)
    pictures, words, targets = (
        pictures.clone().requires_grad_(),
        words[:, :-1].clone().requires_grad_(),
        next_words(tokens),
    )

    def run() -> float:
        logits = model.text_decoder(pictures, words)
        return _descend(2 * F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED))

    return run
