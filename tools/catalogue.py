"""The text of docs/losses.md: every plug of the losses, from its own docstring and the docstrings of its fields."""

import inspect
import re
from dataclasses import dataclass

from diptych.config import Choice, describe
from diptych.losses.objective import ObjectiveConfig
from diptych.losses.plugs.family import (
    Candidates,
    Denominator,
    Regulariser,
    SampleWeight,
    Similarity,
    Targets,
    Temperature,
    Weights,
)
from diptych.losses.plugs.normaliser.family import Normaliser

FAMILIES: tuple[tuple[str, type[Choice], str], ...] = (
    ("normaliser", Normaliser, "How an anchor's logits become its loss."),
    ("targets", Targets, "Which candidates are right for an anchor, π."),
    ("weights", Weights, "How much a candidate counts in the denominator, w. A list; several multiply."),
    ("candidates", Candidates, "Candidates beside the batch's, C. A list."),
    ("similarity", Similarity, "How alike two features are, x."),
    ("temperature", Temperature, "From similarities to logits, z."),
    ("denominator", Denominator, "What stands for the sum over candidates."),
    ("sample_weight", SampleWeight, "How much an anchor counts, α."),
    ("regularisers", Regulariser, "Terms beside the contrastive one. A list."),
)
LABELS = ("Source", "Cost", "Use", "Verified")

HEAD = """# The loss catalogue

<!-- Generated from the plugs' docstrings; `pytest tests/test_documents.py --update-golden` writes it anew. -->

One contrastive loss, composed from plugs. For each direction (images as anchors, texts as anchors; the total is the
mean of both):

    loss_i = α_i · [ log Σ_{k ∈ C_i} w_ik exp(z_ik) − Σ_j π_ij z_ij ]

It is exact over any batch and any number of ranks in memory O((B + G)·D): tiles of the matrix of pairs are made, folded
and dropped, and made again in backward. Every plug below works on tiles, so all of this holds for every combination,
with [grouped gathers and exact batch accumulation](large_batches.md) alike.

In a run's YAML:

```yaml
objective:
  contrastive:
    targets: same_caption
    weights: [decoupled, {type: repulsion, t: 1.0}]
    gather: {scope: group, group_size: 8}
  regularisers: [{type: uniformity, weight: 0.1}]
```

On tensors, without the rest of the package:

```python
from diptych.losses import contrastive_loss

loss = contrastive_loss(image_features, text_features, logit_scale)
loss = contrastive_loss(image_features, text_features, logit_scale, targets="same_caption", known={"caption_ids": ids})
```

Plugs with a memory or parameters (`queue`, `sogclr`, `isogclr`, `adaptive`, terms with a `teacher_dim`) want an object
that lasts:

```python
from diptych.losses import Moment, Objective, ObjectiveConfig, Pairs

objective = Objective(config, embed_dim=512)  # an nn.Module: train and save it with the model
pairs = Pairs(image_features, text_features, logit_scale, known={"sample_ids": ids})
terms = objective(pairs, Moment(step=step))  # terms.total, terms.scalars
objective.after_step(pairs)
```

What a plug **needs** travels in `Pairs`: `known` (of pairs), `image_known`, `text_known`, `hard_captions`. In training
the stream brings caption_ids, sample_ids (hashes of the keys), surface_features, and hard captions where
`data.captions.hard` names their column; teacher_features are the `teacher`'s, or those of the model's average
(`ema_decay`). What is not there is refused before the first step. Combinations that have no meaning are refused with
the reason.

**Verified** says what the tests compare a plug with; all of it in float64, values and gradients with respect to images,
texts, scale, bias and the plug's own parameters, at scales from 1 to 400 and on 1, 2 and 4 ranks.
"""


@dataclass(frozen=True)
class Page:
    """What a docstring says."""

    summary: str
    formula: str
    remarks: str
    labels: dict[str, str]


def parse(plug: type[Choice]) -> Page:
    """A plug's docstring: a sentence, an indented formula, remarks, and four labelled lines."""
    text = inspect.cleandoc(plug.__doc__ or "")
    labels: dict[str, str] = {}
    for label in reversed(LABELS):
        text, found, content = text.rpartition(f"\n{label}: ")
        if not found:
            raise SystemExit(f"catalogue: no line `{label}:` in the docstring of {plug.__module__}.{plug.__name__}")
        labels[label] = " ".join(content.split())
    formula = "\n".join(re.findall(r"^    .*$", text, re.MULTILINE))
    prose = re.split(r"(?:^    .*\n?)+", text, maxsplit=1, flags=re.MULTILINE)
    remarks = " ".join(prose[1].split()) if len(prose) > 1 else ""
    return Page(" ".join(prose[0].split()), formula, remarks, {label: labels[label] for label in LABELS})


def catalogue() -> str:
    """The whole page."""
    parts = [HEAD, _contents()]
    for family, base, meaning in FAMILIES:
        parts.append(f"\n## {family}\n\n{meaning}\n")
        parts += [_entry(name, plug) for name, plug in sorted(base.members.items())]
    return "".join(parts)


def _contents() -> str:
    lines = ["\n| | |\n|---|---|\n"]
    for family, base, _ in FAMILIES:
        lines.append(
            f"| [{family}](#{family}) | {', '.join(f'[{name}](#{name})' for name in sorted(base.members))} |\n"
        )
    return "".join(lines)


def _entry(name: str, plug: type[Choice]) -> str:
    page = parse(plug)
    needs = ", ".join(getattr(plug, "needs", ()))
    rows = "".join(f"| {label.lower()} | {_cell(page.labels[label])} |\n" for label in LABELS)
    needed = f"| needs | {needs} |\n" if needs else ""
    remarks = f"\n{page.remarks}\n" if page.remarks else ""
    fields = "".join(
        f"- `{entry.key}` = {entry.default}: {entry.doc}\n" for entry in describe(plug) if entry.default or entry.doc
    )
    parameters = f"\n{fields}" if fields else ""
    return f"\n### {name}\n\n{page.summary}\n\n{page.formula}\n{remarks}\n| | |\n|---|---|\n{rows}{needed}{parameters}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


assert ObjectiveConfig, "importing it discovers every plug"
