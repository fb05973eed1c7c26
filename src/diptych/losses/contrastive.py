"""The symmetric contrastive losses, as pure functions of features. Useful without the rest of the package.

from diptych.losses.contrastive import clip_loss
loss = clip_loss(image_features, text_features, logit_scale)
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def clip_loss(
    image_features: Float[Tensor, "B D"],
    text_features: Float[Tensor, "B D"],
    logit_scale: Float[Tensor, ""] | float,
    *,
    caption_ids: Int[Tensor, " B"] | None = None,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Mean over both directions of the softmax cross-entropy between an anchor and the batch.

        loss = ½ Σ_i [ CE(s·x_i·, π_i·) + CE(s·x_·i, π_i·) ] / B,   x_ij = image_i · text_j

    Source: arXiv:2103.00020, figure 3, where π is the identity. With `caption_ids` (equal id = equal caption, as when
    two artists drew one concept) π_ij is uniform over the j with i's caption: the targets of arXiv:2004.11362, eq. 2.

    Args:
        image_features: unit norm.
        text_features: unit norm; row i belongs to picture i.
        logit_scale: multiplies the cosines (already exponentiated).
        caption_ids: see above; None: every caption counts as different.
        label_smoothing: share of the target spread evenly over all candidates.
    """
    check_pair(image_features, text_features)
    rows = torch.arange(image_features.shape[0], device=image_features.device)
    targets = positives(rows, caption_ids, caption_ids) if caption_ids is not None else None
    to_text = direction_loss(image_features, text_features, logit_scale, rows, targets, label_smoothing)
    to_image = direction_loss(text_features, image_features, logit_scale, rows, targets, label_smoothing)
    return (to_text + to_image) / 2


def direction_loss(
    anchors: Float[Tensor, "B D"],
    candidates: Float[Tensor, "G D"],
    logit_scale: Float[Tensor, ""] | float,
    rows: Int[Tensor, " B"],
    targets: Bool[Tensor, "B G"] | None,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """One direction: cross-entropy of each anchor over all candidates, in float32.

    Args:
        anchors: this rank's rows.
        candidates: everything they are compared with.
        logit_scale: multiplies the cosines.
        rows: position of each anchor's own partner among the candidates.
        targets: which candidates count as right, shared equally; None: the own partner alone.
        label_smoothing: share of the target spread evenly over all candidates.
    """
    logits = logit_scale * (anchors.float() @ candidates.float().T)
    if targets is None:
        return F.cross_entropy(logits, rows, label_smoothing=label_smoothing)
    wanted = targets.to(logits.dtype)
    return F.cross_entropy(logits, wanted / wanted.sum(1, keepdim=True), label_smoothing=label_smoothing)


def siglip_loss(
    image_features: Float[Tensor, "B D"],
    text_features: Float[Tensor, "G D"],
    logit_scale: Float[Tensor, ""] | float,
    logit_bias: Float[Tensor, ""] | float,
    targets: Bool[Tensor, "B G"],
) -> Float[Tensor, ""]:
    """Every pair is a yes-or-no question of its own:  −(1/B) Σ_i Σ_j log σ(z_ij (s·x_ij + b)),  z = ±1.

    Source: arXiv:2303.15343, eq. 1 and algorithm 1.
    """
    logits = logit_scale * (image_features.float() @ text_features.float().T) + logit_bias
    return -F.logsigmoid(torch.where(targets, logits, -logits)).sum() / image_features.shape[0]


def positives(
    rows: Int[Tensor, " B"], own_ids: Int[Tensor, " B"] | None, all_ids: Int[Tensor, " G"] | None
) -> Bool[Tensor, "B G"]:
    """Which candidates carry the same caption as each anchor; the own partner always does."""
    if own_ids is None or all_ids is None:
        raise ValueError("same-caption targets need caption ids")
    same = own_ids[:, None] == all_ids[None, :]
    return same.scatter(1, rows[:, None], value=True)


def check_pair(image_features: Tensor, text_features: Tensor) -> None:
    """Raises ValueError unless both are [B, D] of one shape."""
    if image_features.ndim != 2 or image_features.shape != text_features.shape:
        raise ValueError(
            f"image_features {list(image_features.shape)} and text_features {list(text_features.shape)} "
            "must both be [B, D] of one shape"
        )
