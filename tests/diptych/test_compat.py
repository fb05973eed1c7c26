import subprocess
import sys
from pathlib import Path

import pytest

from diptych import compat


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_import_of_diptych_imports_neither_torch_nor_torchvision() -> None:
    code = "import sys, diptych; print('torch' in sys.modules, 'torchvision' in sys.modules)"
    assert run(code).stdout.split() == ["False", "False"]


def test_torchvision_and_open_clip_import_after_diptych() -> None:
    shown = run("import diptych, torchvision, open_clip, timm; from torchvision.transforms import Compose; print('ok')")
    assert shown.stdout.strip() == "ok", shown.stderr


def test_the_finder_leaves_once_it_has_done_its_work() -> None:
    code = "import sys, diptych, torchvision; print([type(f).__name__ for f in sys.meta_path])"
    assert "_BeforeTorchvision" not in run(code).stdout


LOADABLE = """
import torch
from pathlib import Path
from diptych import compat
library = torch.library.Library("torchvision", "DEF")
for schema in compat.MISSING_SCHEMAS:
    library.define(schema)
torch.ops.load_library = lambda path: print("loaded", Path(path).name)
print(compat.repair_torchvision(Path(r"{folder}")))
"""


def test_where_the_compiled_part_loads_nothing_is_declared(tmp_path: Path) -> None:
    (tmp_path / "_C.so").touch()
    assert run(LOADABLE.format(folder=tmp_path)).stdout.split() == ["loaded", "_C.so", "False"]


ABSENT = """
import torch
from pathlib import Path
from diptych import compat
print(compat.repair_torchvision(Path(r"{folder}")))
print(torch.ops.torchvision.nms.default, torch.ops.torchvision.qnms.default)
print(compat.repair_torchvision(Path(r"{folder}")))
"""


@pytest.mark.parametrize("broken", [False, True])
def test_where_it_is_absent_or_does_not_load_both_operators_are_declared_once(tmp_path: Path, broken: bool) -> None:
    if broken:
        (tmp_path / "_C.so").write_bytes(b"not a library")
    shown = run(ABSENT.format(folder=tmp_path))
    assert shown.stdout.split() == ["True", "torchvision.nms.default", "torchvision.qnms.default", "True"], shown.stderr


def test_schemas_are_torchvisions() -> None:
    assert {schema.partition("(")[0] for schema in compat.MISSING_SCHEMAS} == {"nms", "qnms"}
