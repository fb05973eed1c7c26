"""Repairs for known broken combinations of dependencies, each as narrow as it can be, each with a test.

torchvision is published for CUDA only. Beside a CPU build of torch its compiled part cannot be loaded, and its import
then fails on two operators that the compiled part would have declared ("operator torchvision::nms does not exist", then
`qnms`). open_clip and timm import torchvision for its transforms, which need neither. So: before torchvision is first
imported, and only where its compiled part cannot be loaded, the two missing schemas are declared. Where it loads (any
GPU machine) nothing is declared and nothing changes.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

# As torchvision's compiled part declares them (torchvision/csrc/ops/nms.cpp and quantized/cpu/qnms_kernel.cpp).
MISSING_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

_kept_alive: list[object] = []  # a torch.library.Library withdraws its operators when it is collected


def repair_torchvision(package: Path) -> bool:
    """Declares the operators that torchvision's import needs if its compiled part cannot be loaded.

    Args:
        package: the folder of the installed torchvision.

    Returns:
        Whether anything was declared.
    """
    import torch

    compiled = next(package.glob("_C*.so"), None) or next(package.glob("_C*.pyd"), None)
    if compiled is not None:
        try:
            torch.ops.load_library(str(compiled))
        except OSError:  # linked against libraries that this build of torch does not have
            pass
        else:
            return False
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in MISSING_SCHEMAS:
        if not _declared(schema):
            library.define(schema)
    _kept_alive.append(library)
    return True


def _declared(schema: str) -> bool:
    import torch

    name = schema.partition("(")[0]
    return bool(torch._C._jit_get_schemas_for_operator(f"torchvision::{name}"))


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Sees the first import of torchvision coming, repairs, and leaves the import itself to the ordinary finders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            spec = importlib.machinery.PathFinder.find_spec(fullname)
            if spec is not None and spec.origin is not None:
                repair_torchvision(Path(spec.origin).parent)
        return None


def install() -> None:
    """Arms the repair for the first import of torchvision; costs nothing until then, and does not import torch."""
    if "torchvision" not in sys.modules and not any(isinstance(finder, _BeforeTorchvision) for finder in sys.meta_path):
        sys.meta_path.insert(0, _BeforeTorchvision())
