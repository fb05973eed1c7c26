"""The contrastive loss: exact over any batch, any grouping of ranks, any plugs. Useful without the rest of the package.

    from diptych.losses.contrastive import contrastive_loss

    loss = contrastive_loss(image_features, text_features, logit_scale)
    loss = contrastive_loss(image_features, text_features, logit_scale, logit_bias=bias, normaliser="sigmoid")
    loss = contrastive_loss(…, targets="same_caption", known={"caption_ids": ids}, weights=["decoupled"])

Memory is O((B + G)·D) in forward and backward. In a process group every rank brings its own rows and gets the loss of
its own pairs; their mean over ranks is the batch's, which is what data-parallel training descends.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diptych.config import from_tree
from diptych.distributed.collectives import PendingGather, all_gather, merge
from diptych.distributed.groups import ALONE, Group, world_group
from diptych.errors import ConfigError
from diptych.losses.batch import Moment, Pairs, gathered, numbered
from diptych.losses.composition import Composition
from diptych.losses.grid import Grid
from diptych.losses.pairs import OPPOSITE, Modality
from diptych.losses.plugs.family import Layout
from diptych.losses.plugs.normaliser.family import AnchorLosses
from diptych.losses.settings import ContrastiveConfig
from diptych.losses.statistics import logsumexp_of_pairs, softplus_of_pairs
from diptych.losses.tiles import accumulation_dtype


class ContrastiveLoss(nn.Module):
    """A contrastive loss with its plugs built. Its state (queues, tables) and parameters are those of the plugs."""

    def __init__(self, config: ContrastiveConfig, *, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        width = config.similarity.width(embed_dim)
        self._normaliser = config.normaliser
        built = {
            "similarity": config.similarity.build(width),
            "temperature": config.temperature.build(width),
            "targets": config.targets.build(width),
            "denominator": config.denominator.build(width),
            "sample_weight": config.sample_weight.build(width),
        }
        lists = {
            "weights": tuple(plug.build(width) for plug in config.weights),
            "candidates": tuple(plug.build(width) for plug in config.candidates),
        }
        plugs = [*built.items(), *((f"{name}_{i}", plug) for name in lists for i, plug in enumerate(lists[name]))]
        # Held in a dict besides: a module attribute that is sometimes a plain dataclass suits neither torch nor types.
        self.modules_of_plugs = nn.ModuleDict({name: plug for name, plug in plugs if isinstance(plug, nn.Module)})
        self._plugs = cast(Any, Composition)(**built, **lists, label_smoothing=config.label_smoothing)

    @property
    def needs(self) -> tuple[str, ...]:
        """What the batch must know beside features: names for `Pairs.known`, `image_known`, `text_known`."""
        return self._plugs.needs

    def forward(self, pairs: Pairs, group: Group, moment: Moment = Moment()) -> Float[Tensor, ""]:  # noqa: B008 - immutable
        """This rank's share of the group's loss. Every rank must call, with as many pairs as the others of its group.

        Raises:
            ValueError: shapes do not agree.
            ConfigError: a plug needs what the batch does not bring.
        """
        pairs.check()
        with torch.autocast(pairs.image_features.device.type, enabled=False):
            losses = self._plain(pairs, group) if self.config.is_plain else self._composed(pairs, group, moment)
            return self._weighted(losses, pairs, group, moment)

    def after_step(self, pairs: Pairs) -> None:
        """Lets queues take note of a batch whose loss has been computed. Every rank of the world must call."""
        for plug in self._plugs.candidates:
            plug.after_step(pairs)

    # --- CLIP's and SigLIP's own -----------------------------------------------------------------------------------

    def _plain(self, pairs: Pairs, group: Group) -> AnchorLosses:
        if self.config.normaliser.choice_name == "sigmoid":
            return {"image": _plain_sigmoid(pairs, group)}
        if self.config.gather.form == "two_sided" and group.size > 1:
            return _plain_two_sided(pairs, group)
        image, text = _plain_one_sided(pairs, group)
        return {"image": image, "text": text}

    # --- with plugs ------------------------------------------------------------------------------------------------

    def _composed(self, pairs: Pairs, group: Group, moment: Moment) -> AnchorLosses:
        plugs = self._plugs
        layouts = self._layouts(pairs, group)
        for candidates in plugs.candidates:
            layouts = candidates.layouts(layouts, pairs, group, moment)
        found: list[AnchorLosses] = []
        for layout in layouts:
            grids = [self._prepared(head, moment) for head in plugs.similarity.heads(layout.grid)]
            found += [self._normaliser.losses(Layout(grid, layout.local), plugs) for grid in grids]
        return _mean_by_modality(found)

    def _layouts(self, pairs: Pairs, group: Group) -> list[Layout]:
        """Images against gathered texts for both directions, or each side against the gathered other one."""
        directions = self._normaliser.directions
        if self.config.gather.form == "one_sided" or group.size == 1 or directions == ("rows",):
            return [Layout(self._grid(pairs, group, "image", directions))]
        return [Layout(self._grid(pairs, group, modality, ("rows",))) for modality in ("image", "text")]

    def _grid(self, pairs: Pairs, group: Group, rows: Modality, directions: Any) -> Grid:
        needs = self._plugs.needs
        dtype = accumulation_dtype(pairs.image_features)
        columns: Modality = "text" if rows == "image" else "image"
        shared = {"logit_scale": pairs.logit_scale.to(dtype), "logit_bias": pairs.bias.to(dtype)}
        if pairs.teacher_scale is not None:
            shared["teacher_scale"] = shared["logit_scale"].new_tensor(pairs.teacher_scale)
        return Grid(
            rows=numbered(pairs.side(rows, needs), group),
            columns=gathered(pairs.side(columns, needs), group),
            shared=shared,
            group=group,
            directions=directions,
            similarity=self._plugs.similarity,
            logits=self._plugs.temperature,
            symmetric_logits=self._plugs.temperature.symmetric,
        )

    def _prepared(self, grid: Grid, moment: Moment) -> Grid:
        plugs = self._plugs
        for plug in (plugs.similarity, plugs.temperature, plugs.targets, *plugs.weights, plugs.denominator):
            grid = plug.prepare(grid, moment)
        return grid

    def _weighted(self, losses: AnchorLosses, pairs: Pairs, group: Group, moment: Moment) -> Tensor:
        means = []
        for modality, of_anchors in losses.items():
            known = pairs.info(modality, self._plugs.sample_weight.needs)
            means.append((self._plugs.sample_weight(of_anchors.detach(), known, group, moment) * of_anchors).mean())
        return torch.stack(means).mean()


def _mean_by_modality(found: list[AnchorLosses]) -> AnchorLosses:
    modalities = dict.fromkeys(modality for losses in found for modality in losses)
    parts = {modality: [losses[modality] for losses in found if modality in losses] for modality in modalities}
    return {modality: torch.stack(losses).mean(0) for modality, losses in parts.items()}


def _partners(pairs: Pairs, group: Group) -> Tensor:
    """Place of each own pair among those of the group."""
    count = len(pairs.image_features)
    return torch.arange(count, device=pairs.image_features.device) + group.rank * count


def _plain_one_sided(pairs: Pairs, group: Group) -> tuple[Tensor, Tensor]:
    """Own images against all texts; sums of columns are merged over the ranks.

    The own block of texts needs nobody else's features, so it is computed while the gather is under way.
    """
    image, text, scale = pairs.image_features, pairs.text_features, pairs.logit_scale
    if group.size == 1:
        row_sums, column_sums, own = logsumexp_of_pairs(image, text, scale, _partners(pairs, group))
        return row_sums - own, column_sums - own
    pending = PendingGather(text, group)
    own_rows, own_columns, own = logsumexp_of_pairs(image, text, scale, _partners(pairs, ALONE))
    before, after = _others(pending.wait(), group)
    nobody = torch.full_like(_partners(pairs, ALONE), -1)
    parts = [logsumexp_of_pairs(image, others, scale, nobody)[:2] for others in (before, after) if len(others)]
    parts.insert(1 if len(before) else 0, (own_rows, own_columns))
    row_sums = torch.logsumexp(torch.stack([rows for rows, _ in parts]), 0)
    column_sums = merge(torch.cat([columns for _, columns in parts]), "logsumexp", group)
    return row_sums - own, column_sums - own


def _others(everyone: Float[Tensor, "G D"], group: Group) -> tuple[Tensor, Tensor]:
    """The rows of the ranks before this one, and of those behind it."""
    count = len(everyone) // group.size
    return everyone[: group.rank * count], everyone[(group.rank + 1) * count :]


def _plain_two_sided(pairs: Pairs, group: Group) -> AnchorLosses:
    """The plain form: both sides are gathered, and each rank compares its rows of both with all of the other."""
    losses: dict[Modality, Tensor] = {}
    for modality, other in OPPOSITE:
        anchors, candidates = pairs.features(modality), all_gather(pairs.features(other), group)
        sums, _, own = logsumexp_of_pairs(anchors, candidates, pairs.logit_scale, _partners(pairs, group))
        losses[modality] = sums - own
    return losses


def _plain_sigmoid(pairs: Pairs, group: Group) -> Tensor:
    image, text, scale, bias = pairs.image_features, pairs.text_features, pairs.logit_scale, pairs.bias
    pending = PendingGather(text, group) if group.size > 1 else None
    sums, own = softplus_of_pairs(image, text, scale, bias, _partners(pairs, ALONE))
    if pending is not None:
        nobody = torch.full_like(_partners(pairs, ALONE), -1)
        for others in (part for part in _others(pending.wait(), group) if len(part)):
            sums = sums + softplus_of_pairs(image, others, scale, bias, nobody)[0]
    return sums - own


# --- the function --------------------------------------------------------------------------------------------------


def contrastive_loss(  # noqa: PLR0913 - what a batch is, and where and when
    image_features: Float[Tensor, "B D"],
    text_features: Float[Tensor, "B D"],
    logit_scale: Float[Tensor, ""] | float,
    *,
    logit_bias: Float[Tensor, ""] | float | None = None,
    known: Mapping[str, Tensor] | None = None,
    group: Group | None = None,
    moment: Moment = Moment(),  # noqa: B008 - immutable
    **options: Any,
) -> Float[Tensor, ""]:
    """The loss of a batch, over all ranks of torch's default process group if there is one.

    Args:
        image_features: unit norm; float32, bfloat16, float16 (float32 arithmetic) or float64.
        text_features: unit norm; row i belongs to picture i.
        logit_scale: multiplies cosines, already exponentiated.
        logit_bias: added to logits (sigmoid).
        known: what plugs need of each pair: caption_ids, labels, …; see `Pairs.known`.
        group: the ranks to gather over, of `diptych.distributed.groups.make_groups`; None: all.
        moment: what draws and schedules of plugs depend on.
        options: keys of `ContrastiveConfig` in the form of YAML: `normaliser="sigmoid"`,
            `targets={"type": "cwcl", "anchor": "text"}`.

    Returns:
        The loss of this rank's pairs; the mean over ranks is the batch's. Every rank brings as many pairs.

    Raises:
        ConfigError: an unknown option, a combination that has no meaning, a plug that must last from step to step, or
            something a plug needs is not known.
        ValueError: shapes do not agree.
    """
    config = from_tree(ContrastiveConfig, dict(options), where="contrastive_loss")
    device, dtype = image_features.device, accumulation_dtype(image_features)
    pairs = Pairs(
        image_features,
        text_features,
        torch.as_tensor(logit_scale, dtype=dtype, device=device),
        None if logit_bias is None else torch.as_tensor(logit_bias, dtype=dtype, device=device),
        known=known or {},
    )
    loss = ContrastiveLoss(config, embed_dim=image_features.shape[-1])
    _check_lasts_one_call(loss)
    return loss(pairs, group if group is not None else world_group(), moment)


def _check_lasts_one_call(loss: ContrastiveLoss) -> None:
    """Raises ConfigError for settings that only an `Objective` can honour."""
    config = loss.config
    if loss.state_dict():
        names = ", ".join(sorted(loss.modules_of_plugs))
        raise ConfigError(f"{names} must last from step to step · contrastive_loss · make an Objective and keep it")
    if config.weight != 1 or config.gather.scope != "all":
        raise ConfigError(
            "weight and gather.scope are no matter of one call · contrastive_loss · multiply the loss, pass `group`, "
            "or make an Objective"
        )
