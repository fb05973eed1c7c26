"""How features lie on the unit sphere: near their partners, spread out, apart by modality, in how many directions.

Rows are unit vectors, row i of one modality the partner of row i of the other. Sums are made in float32, of float64
features in float64; no [N, N] matrix is ever whole.
"""

import torch
from jaxtyping import Float
from torch import Tensor

_TILE = 2**24
"""Entries of the matrix of pairs that are in memory at once."""


def alignment(image_features: Float[Tensor, "N D"], text_features: Float[Tensor, "N D"]) -> Float[Tensor, ""]:
    """How far partners lie from each other, in [0, 4]; with gradient.

        mean_i ‖I_i − T_i‖²

    Source: arXiv:2005.10242, with its α = 2.
    """
    return (_accurate(image_features) - _accurate(text_features)).square().sum(1).mean()


def exponent(cosines: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """−2‖x − y‖² of unit vectors, from their cosine: what `uniformity` exponentiates; with gradient."""
    return 4 * cosines - 4


@torch.no_grad()
def uniformity(features: Float[Tensor, "N D"]) -> Float[Tensor, ""]:
    """How unevenly features fill the sphere: 0 where they coincide, towards −4 where they spread; NaN for fewer than
    two.

        log mean_{i≠j} exp(−2‖x_i − x_j‖²)

    Source: arXiv:2005.10242, with its t = 2. (With gradient, and over ranks: the regulariser `uniformity`.)
    """
    features = _accurate(features)
    count = len(features)
    size = max(1, _TILE // max(count, 1))
    total = features.new_zeros((), dtype=torch.float64)
    for start in range(0, count, size):
        nearness = exponent(features[start : start + size] @ features.T).exp()
        nearness.diagonal(start).zero_()
        total += nearness.sum(dtype=torch.float64)
    return (total / (count * (count - 1)) if count > 1 else total / 0).log().to(features.dtype)


def modality_gap(image_features: Float[Tensor, "N D"], text_features: Float[Tensor, "M D"]) -> Float[Tensor, ""]:
    """The distance between the centres of the two modalities, in [0, 2].

        ‖mean_i I_i − mean_i T_i‖

    Source: arXiv:2203.02053.
    """
    return torch.linalg.vector_norm(_accurate(image_features).mean(0) - _accurate(text_features).mean(0))


@torch.no_grad()
def effective_rank(features: Float[Tensor, "N D"]) -> Float[Tensor, ""]:
    """In how many directions features lie, between 1 and min(N, D): what collapses first. NaN where a feature is none.

        exp(−Σ_k p_k log p_k),   p_k = σ_k / Σ_l σ_l,   σ the singular values of the matrix, which is not centred

    Source: Roy and Vetterli, The effective rank, EUSIPCO 2007; for features of networks arXiv:2210.02885.
    """
    rows = features.double()
    gram = rows.T @ rows if len(rows) > rows.shape[1] else rows @ rows.T
    known = gram.isfinite().all()
    squares = torch.linalg.eigvalsh(torch.where(known, gram, 0.0))  # of NaN it raises
    # A singular value that is none comes out as the root of a rounding error, which the sum would count.
    rounding = len(gram) * torch.finfo(gram.dtype).eps * squares[-1]
    singular = torch.where(squares > rounding, squares, 0.0).sqrt()
    rank = torch.special.entr(singular / singular.sum()).sum().exp()
    return torch.where(known, rank, torch.nan).to(_accurate(features).dtype)


def _accurate(features: Tensor) -> Tensor:
    return features.to(torch.promote_types(features.dtype, torch.float32))
