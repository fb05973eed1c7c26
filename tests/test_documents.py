"""What the documents say is so: shipped YAML loads, commands parse, links lead somewhere, the reference is fresh."""

import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from diptych.cli.program import parse
from diptych.config import dump, from_tree, load, to_tree
from diptych.losses.objective import ObjectiveConfig
from diptych.train.recipe import Recipe
from diptych_eval.suite import EvalConfig

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path for folder in ("pretrain", "tune") for path in (ROOT / "configs" / folder).glob("*.yaml"))
EVALUATIONS = sorted((ROOT / "configs" / "eval").glob("*.yaml"))
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]


def fenced(page: Path) -> list[str]:
    """The command lines of a page, continuations joined."""
    blocks = re.findall(r"```(?:console|bash|sh)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ").split(" # ")[0].strip() for line in lines if line.strip()]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_load_to_what_they_did(path: Path, golden: Callable[[str, str], None]) -> None:
    recipe = load(Recipe, path)
    golden(f"tests/golden/{path.parent.name}-{path.stem}.yaml", dump(recipe))
    assert from_tree(Recipe, to_tree(recipe)) == recipe


@pytest.mark.parametrize("path", EVALUATIONS, ids=lambda path: path.stem)
def test_shipped_evaluations_load_to_what_they_did(path: Path, golden: Callable[[str, str], None]) -> None:
    golden(f"tests/golden/eval-{path.stem}.yaml", dump(load(EvalConfig, path)))


@pytest.mark.parametrize("path", [*RECIPES, *EVALUATIONS], ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_each_shipped_yaml_opens_with_its_command(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# diptych ")
    parse(shlex.split(first.removeprefix("# diptych ")))
    assert str(path.relative_to(ROOT)) in first


def tool(name: str) -> ModuleType:
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_key_reference_is_fresh(golden: Callable[[str, str], None]) -> None:
    golden("docs/config.md", tool("reference").reference())


def test_the_loss_catalogue_is_fresh(golden: Callable[[str, str], None]) -> None:
    golden("docs/losses.md", tool("catalogue").catalogue())


def test_every_plug_names_its_paper() -> None:
    module = tool("catalogue")
    for _, base, _ in module.FAMILIES:
        for name, plug in base.members.items():
            page = module.parse(plug)
            assert page.formula, f"{name} shows no formula"
            assert "arXiv:" in page.labels["Source"], name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page: Path) -> None:
    targets = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split()
    for line in fenced(page):
        words = shlex.split(line)
        words = words[1:] if words and re.fullmatch(r"[A-Z_]+=\S*", words[0]) else words
        if "diptych" in words[:1]:
            parse(words[1:])
        elif words[:1] == ["make"]:
            assert {word for word in words[1:] if "=" not in word} <= set(targets), line
        elif words[:2] == ["accelerate", "launch"]:
            start = words.index("diptych.train")
            parse(["train", *words[start + 1 :]])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_yaml_loads(page: Path) -> None:
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        tree = yaml.safe_load(block)
        if "tasks" in tree:
            from_tree(EvalConfig, tree, where=page.name)
        else:
            from_tree(Recipe, {"data": {"shards": "shards"}, "total_samples": 10**6} | tree, where=page.name)


def test_python_of_the_loss_pages_runs() -> None:
    """The snippets of a page in order, in one namespace, with features to run them on."""
    features = torch.nn.functional.normalize(torch.randn(4, 8), dim=1)
    given = {
        "image_features": features,
        "text_features": features,
        "logit_scale": 10.0,
        "ids": torch.arange(4),
        "step": 0,
    }
    for page in ("README.md", "docs/losses.md"):
        namespace = given | {"config": from_tree(ObjectiveConfig, {})}
        for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL):
            namespace["logit_scale"] = torch.tensor(10.0)
            exec(block.replace("embed_dim=512", "embed_dim=8"), namespace)
        assert namespace["loss"].isfinite()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_the_repository_names_no_machine() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    wrong = re.compile(r"/(?:home|root|Users|work)/|(?:^|\W)(?:10|192\.168)\.\d+\.\d+\.\d+")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in (".md", ".py", ".toml", ".yaml", ".txt", ".sh", ".j2") and path.name != Path(__file__).name:
            assert not wrong.search(path.read_text(encoding="utf-8")), name
