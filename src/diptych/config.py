"""Typed configuration: YAML and `key=value` overrides become frozen dataclasses. The mechanism only; it knows no field.

A component's settings are a frozen dataclass beside its code, derived from `Config`; a string literal under a field
is its documentation. A closed set of alternatives is a union told apart by a `type` field (`Literal`). An open family
is a `Choice` base; each member is one file, found by `discover(package)`.

    @dataclass(frozen=True)
    class OptimConfig(Config):
        peak_lr: float = 1e-3
        \"\"\"Learning rate after warm-up.\"\"\"

    recipe = load(Recipe, Path("run.yaml"), ["optim.peak_lr=3e-4"])

Leaves are validated by pydantic, used here alone. Rules: an unknown key is refused with the nearest valid name; all
wrong keys are reported at once, each with its dotted path; `extends: other.yaml` merges maps and replaces lists; a
change of `type` drops the keys of the old type; there is no interpolation.
"""

import ast
import dataclasses
import difflib
import importlib
import inspect
import pkgutil
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar, Union, cast, get_args, get_origin

import pydantic
import yaml

from diptych.errors import ConfigError

C = TypeVar("C", bound="Config")
Tree = dict[str, Any]
_NONE = type(None)


class Config:
    """Marks a frozen dataclass as a node of the configuration tree."""


class Choice(Config):
    """Base of an open family: `class Targets(Choice)` is a family, `class CWCL(Targets, name="cwcl")` a member.

    In YAML a member is written `{type: cwcl, …its fields…}`, or `cwcl` alone for its defaults.
    """

    members: ClassVar[dict[str, type["Choice"]]]
    choice_name: ClassVar[str] = ""

    def __init_subclass__(cls, name: str | None = None) -> None:
        if Choice in cls.__bases__:
            cls.members = {}
            return
        # `dataclass(slots=True)` makes a second class object; the same definition may therefore register twice.
        if name is None:
            return
        cls.choice_name = name
        known = cls.members.get(name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise ValueError(f"{name!r} names both {known.__qualname__} and {cls.__qualname__}; rename one of them")
        cls.members[name] = cls

    @classmethod
    def named(cls, name: str) -> type[Self]:
        """The member called `name`. Raises ConfigError with the nearest name."""
        if name not in cls.members:
            raise ConfigError(f"unknown {cls.__name__.lower()} {name!r}{_nearest(name, cls.members)}")
        return cast(type[Self], cls.members[name])


def discover(package: str) -> None:
    """Imports every module of `package`, so that the members of a family declared there are known."""
    root = importlib.import_module(package)
    for module in pkgutil.iter_modules(root.__path__):
        importlib.import_module(f"{package}.{module.name}")


# --- reading -----------------------------------------------------------------------------------------------------


def load(cls: type[C], path: Path | None, overrides: Sequence[str] = ()) -> C:
    """The configuration `cls` from a YAML file (or defaults alone) with `key=value` overrides applied.

    Raises ConfigError naming every wrong key at once.
    """
    tree = read_yaml(path) if path is not None else {}
    for override in overrides:
        apply_override(tree, override)
    return from_tree(cls, tree, where=str(path) if path is not None else "defaults")


def from_tree(cls: type[C], tree: Tree, *, where: str = "configuration") -> C:
    """Builds `cls` from plain maps, lists and scalars. Raises ConfigError."""
    problems: list[str] = []
    value = _build(cls, tree, "", problems)
    if problems:
        raise ConfigError(f"{'; '.join(problems)} · {where}")
    return cast(C, value)


def read_yaml(path: Path) -> Tree:
    """A YAML map with its `extends` chain merged (paths relative to the file that names them)."""
    return _read_chain(path, ())


def _read_chain(path: Path, seen: tuple[Path, ...]) -> Tree:
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"`extends` goes in a circle · {path} · remove one of the links")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"configuration file not found · {path} · check the path") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"not readable as YAML ({' '.join(str(error).split())}) · {path}") from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"the top level is a {type(tree).__name__}, not a map of keys · {path}")
    parent = tree.pop("extends", None)
    return merge(_read_chain(path.parent / str(parent), (*seen, path)), tree) if parent else tree


def merge(base: Tree, changes: Tree) -> Tree:
    """`base` with `changes` laid over it: maps merge, everything else replaces, a new `type` starts afresh."""
    if "type" in changes and "type" in base and changes["type"] != base["type"]:
        return dict(changes)
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def apply_override(tree: Tree, override: str) -> None:
    """Sets `a.b.c=value` in `tree`; a number in the path is the position in a list. Values are YAML."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"value of {dotted} is not YAML: {text!r}") from error
    *parents, last = dotted.split(".")
    node: Any = tree
    for depth, key in enumerate(parents):
        node = _descend(node, key, ".".join(parents[: depth + 1]))
    if isinstance(node, list):
        node[_position(node, last, dotted)] = value
    elif last == "type" and node.get("type") != value:
        node.clear()
        node["type"] = value
    else:
        node[last] = value


def _descend(node: Any, key: str, dotted: str) -> Any:
    child = node[_position(node, key, dotted)] if isinstance(node, list) else node.setdefault(key, {})
    if isinstance(child, str) or child is None:  # the short form of a choice: `targets: cwcl`
        child = {"type": child} if child else {}
        node[key] = child
    if not isinstance(child, dict | list):
        raise ConfigError(f"{dotted} is {child!r}, not a section")
    return child


def _position(node: list[Any], key: str, dotted: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise ConfigError(f"{dotted} is no position in a list of {len(node)}")
    return int(key)


# --- building ----------------------------------------------------------------------------------------------------


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _nearest(name: str, valid: Iterable[str]) -> str:
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(names)}"


def _fields(cls: type) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(cls) if field.init and field.name != "type"]


def _build(cls: type, tree: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(tree, dict):
        problems.append(f"{path or 'top level'}: expected a section of keys, got {tree!r}")
        return None
    before = len(problems)
    fields = {field.name: field for field in _fields(cls)}
    unknown = [key for key in tree if key not in fields and key != "type"]
    problems += [f"unknown key {_join(path, key)!r}{_nearest(str(key), fields)}" for key in unknown]
    values = {}
    for name, field in fields.items():
        if name in tree:
            values[name] = _convert(_hints(cls)[name], tree[name], _join(path, name), problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"missing key {_join(path, name)!r}")
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except ValueError as error:
        problems.append(f"{path}: {error}" if path else str(error))
        return None


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _convert(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and _NONE in options:
        return None
    nodes = [option for option in options if isinstance(option, type) and issubclass(option, Config)]
    if nodes:
        chosen, value = _choose(nodes, value, path, problems)
        return _build(chosen, value, path, problems) if chosen is not None else None
    for option in options:
        if get_origin(option) in (tuple, list) and isinstance(value, list) and _holds_nodes(option):
            items = [_convert(get_args(option)[0], item, f"{path}.{i}", problems) for i, item in enumerate(value)]
            return tuple(items) if get_origin(option) is tuple else items
        if get_origin(option) is dict and isinstance(value, dict) and _holds_nodes(option):
            inner = get_args(option)[1]
            return {key: _convert(inner, item, _join(path, key), problems) for key, item in value.items()}
    return _leaf(hint, options, value, path, problems)


def _holds_nodes(hint: Any) -> bool:
    return any(
        (isinstance(inner, type) and issubclass(inner, Config)) or _holds_nodes(inner) for inner in get_args(hint)
    )


def _choose(nodes: list[type], value: Any, path: str, problems: list[str]) -> tuple[type | None, Any]:
    """Which dataclass a map describes: the only one, or the one that its `type` names."""
    named: dict[str, type] = {}
    for node in nodes:
        if issubclass(node, Choice) and not node.choice_name:
            named.update(node.members)
        elif (literal := _hints(node).get("type")) is not None and get_origin(literal) is Literal:
            named[get_args(literal)[0]] = node
    if not named:
        return nodes[0], value
    if isinstance(value, str):
        value = {"type": value}
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in named:
        problems.append(f"{path}: unknown type {kind!r}{_nearest(str(kind), named)}")
        return None, value
    return named[kind], value


def _leaf(hint: Any, options: tuple[Any, ...], value: Any, path: str, problems: list[str]) -> Any:
    if isinstance(value, bool) and bool not in options and not any(get_origin(option) is Literal for option in options):
        problems.append(f"{path}: {str(value).lower()} is not {type_name(hint)}")
        return None
    try:
        return pydantic.TypeAdapter(hint).validate_python(value)
    except pydantic.ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        problems.append(f"{path}: {value!r} is not {type_name(hint)} ({reason.lower()})")
        return None


# --- writing -----------------------------------------------------------------------------------------------------


def to_tree(value: Any) -> Any:
    """Plain maps, lists and scalars from which `from_tree` builds an equal value."""
    if isinstance(value, Config):
        if not dataclasses.is_dataclass(value):
            raise TypeError(f"{type(value).__name__} is a Config but no dataclass")
        name = value.choice_name if isinstance(value, Choice) else getattr(value, "type", None)
        tree: Tree = {"type": name} if name else {}
        return tree | {field.name: to_tree(getattr(value, field.name)) for field in _fields(type(value))}
    if isinstance(value, dict):
        return {key: to_tree(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_tree(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def dump(value: Config) -> str:
    """The resolved tree as YAML text."""
    return yaml.safe_dump(to_tree(value), sort_keys=False, allow_unicode=True, width=100)


# --- documentation -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One documented key."""

    key: str
    type: str
    default: str
    doc: str


def describe(cls: type[Config]) -> Iterator[Entry]:
    """Every key of `cls` in order, with type, default and the text under the field.

    Sections are expanded where they first occur; where the same kind occurs again, its text refers to that place.
    """
    yield from _describe(cls, "", {})


def _describe(cls: type[Config], prefix: str, seen: dict[type[Config], str]) -> Iterator[Entry]:
    docs = _field_docs(cls)
    for field in _fields(cls):
        hint = _hints(cls)[field.name]
        default = _default_text(field)
        key = f"{prefix}{field.name}"
        options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        inner = [(option, "") for option in options if _is_node(option)]
        lists = [option for option in options if get_origin(option) in (tuple, list)]
        inner += [(get_args(option)[0], "0.") for option in lists if _is_node(get_args(option)[0])]
        known = [seen[node] for node, _ in inner if node in seen]
        reference = f" Keys as under `{known[0]}`." if known else ""
        yield Entry(key, type_name(hint), "" if inner else default, docs.get(field.name, "") + reference)
        for node, position in inner:
            if node not in seen:
                seen[node] = key
                for member in _members(node):
                    yield from _describe(member, f"{key}.{position}{_tag(member)}", seen)


def _is_node(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Config)


def _members(node: type[Config]) -> list[type[Config]]:
    if not issubclass(node, Choice) or node.choice_name:
        return [node]
    return [member for _, member in sorted(node.members.items())]  # whoever was imported first


def _tag(node: type[Config]) -> str:
    if issubclass(node, Choice):
        return f"<{node.choice_name}>."
    literal = _hints(node).get("type")
    return f"<{get_args(literal)[0]}>." if literal is not None and get_origin(literal) is Literal else ""


def _field_docs(cls: type) -> dict[str, str]:
    """Field name → string literal written under it, base classes included."""
    docs: dict[str, str] = {}
    for base in cls.__mro__[1:]:
        if dataclasses.is_dataclass(base):
            docs = _field_docs(base) | docs
    try:
        body = cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]).body
    except (OSError, TypeError, SyntaxError):
        return docs
    for statement, following in pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            match following:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    docs[statement.target.id] = " ".join(text.split())
    return docs


def _default_text(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        value = to_tree(field.default)
    elif field.default_factory is not dataclasses.MISSING:
        value = to_tree(field.default_factory())
    else:
        return "(required)"
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")


def type_name(hint: Any) -> str:
    """How a type is written for people: `int | None`, `one of a, b`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is _NONE:
        return "null"
    if origin in (Union, types.UnionType):
        return " | ".join(type_name(argument) for argument in arguments)
    if origin is Literal:
        return "one of " + ", ".join(str(argument) for argument in arguments)
    if origin in (tuple, list):
        return f"list of {type_name(arguments[0])}"
    if origin is dict:
        return f"map of {type_name(arguments[0])} to {type_name(arguments[1])}"
    if _is_node(hint):
        return "section"
    return {"str": "text", "float": "number", "int": "integer", "bool": "true/false"}.get(hint.__name__, hint.__name__)
