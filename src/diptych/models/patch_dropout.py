"""Patch dropout (FLIP, arXiv:2212.00794) that ends before the run does: the last samples are seen whole."""

from torch import nn

_BUILT = "probability_as_built"


def keep_all_patches(model: nn.Module, *, whole: bool) -> None:
    """Lets every patch through, or drops them again as the model was built to.

    The layers are open_clip's and timm's, told by their name.
    """
    for layer in model.modules():
        if type(layer).__name__ == "PatchDropout" and hasattr(layer, "prob"):
            if not hasattr(layer, _BUILT):
                setattr(layer, _BUILT, layer.prob)
            layer.prob = 0.0 if whole else getattr(layer, _BUILT)  # type: ignore[assignment]
