"""How a YAML file fills the typed tree of a recipe.

    config = load_config("configs/demo.yaml", ["train.steps=20", "batch.policy=random"])

A file may start from another one with ``base: other.yaml``. An unknown key, a wrong type or values that contradict each
other raise `ConfigError`: one line with the file, the line, the key and the nearest known key. Nothing heavy is
imported here, so a mistake shows at once.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from b3.config.checks import check
from b3.config.schema import Config, Section
from b3.errors import ConfigError


def locate(node: yaml.Node | None, path: tuple[Any, ...]) -> int | None:
    """Line (from 1) of the key at `path` in a composed YAML file, or of its nearest known parent."""
    line = None
    for part in path:
        if isinstance(node, yaml.MappingNode):
            pairs = [(k, v) for k, v in node.value if k.value == str(part)]
            if not pairs:
                return line
            line, node = pairs[0][0].start_mark.line + 1, pairs[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            return line
    return line


def read_yaml(path: Path, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML file as a dictionary, laid over its ``base`` file if it names one."""
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping of sections, found {type(tree).__name__}")
    base = tree.pop("base", None)
    if base is None:
        return tree
    try:
        parent = (path.parent / str(base)).resolve()
    except ValueError:  # UnicodeEncodeError included
        raise ConfigError(f"{path}: base {str(base)!r} is not the name of a file") from None
    if parent in children:
        raise ConfigError(f"{path}: base files form a circle")
    return merge(read_yaml(parent, (*children, path.resolve())), tree)


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, section by section; lists and values are replaced whole."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one ``section.key=value`` in place; the value is read as YAML. Raises `ConfigError` on a malformed one."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"override '{override}' is not of the form section.key=value")
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        raise ConfigError(f"override '{override}': the value is not valid YAML") from None
    node: Any = tree
    parts = dotted.split(".")
    for number, part in enumerate(parts, 1):
        key: Any = part
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ConfigError(f"override '{override}': there is no element {part}; the list has {len(node)}")
            key = int(part)
        if number == len(parts):
            node[key] = value
            return
        node = node[key] if isinstance(node, list) else node.setdefault(key, {})
        if not isinstance(node, (dict, list)):
            raise ConfigError(f"override '{override}': '{part}' is a value, not a section")


def _section_of(annotation: Any) -> Any:
    """The section class inside an annotation such as `list[DatasetConfig]` or `EvalConfig | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        section = _section_of(argument)
        if section is not None:
            return section
    return None


def _resolve(location: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any]:
    """(pydantic's location without the names of union members that it appends to a leaf, the section of its key)."""
    section: Any = Config
    for index, part in enumerate(location):
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part)
        inner = None if field is None else _section_of(field.annotation)
        if inner is None:
            return location[: index + 1], section
        section = inner
    return location, section


def _explain(error: ValidationError, path: Path, overrides: list[str]) -> str:
    """One line for the first problem that pydantic found."""
    first = error.errors()[0]
    location, section = _resolve(first["loc"])
    key, where = ".".join(str(part) for part in location), str(path)
    override = next((o for o in overrides if key and o.partition("=")[0] == key), None)
    if override:
        where = f"override '{override}'"
    else:
        line = locate(yaml.compose(path.read_text()), location)
        where += f":{line}" if line else ""
    if first["type"] == "extra_forbidden":
        keys = sorted(section.model_fields)
        near = difflib.get_close_matches(str(location[-1]), keys, n=1, cutoff=0.5)
        parents = "".join(f"{part}." for part in location[:-1])
        hint = f"did you mean '{parents}{near[0]}'?" if near else f"known keys: {', '.join(keys)}"
        return f"{where}: unknown key '{key}'; {hint}"
    if first["type"] == "missing":
        return f"{where}: key '{key}' is required"
    message = first["msg"].removeprefix("Value error, ")
    if not key or first["type"] == "value_error":
        return f"{where}: {message}"
    return f"{where}: '{key}' = {first['input']!r}: {message[0].lower()}{message[1:]}"


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a recipe. Raises `ConfigError` with one line on the first problem."""
    path, overrides = Path(path), list(overrides or [])
    tree = read_yaml(path)
    for override in overrides:
        apply_override(tree, override)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, path, overrides)) from None
    try:
        check(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return config


def describe_keys() -> str:
    """All keys with type, default and meaning, one per line; shown by ``train.py --help``."""
    lines: list[str] = []

    def walk(section: type[Section], prefix: str) -> None:
        for name, field in section.model_fields.items():
            inner = _section_of(field.annotation)
            if inner is not None:
                element = "N." if "list[" in str(field.annotation).lower() else ""
                walk(inner, f"{prefix}{name}.{element}")
                continue
            kind = getattr(field.annotation, "__name__", None) if "[" not in str(field.annotation) else None
            text = kind or str(field.annotation).replace("typing.", "").replace("NoneType", "null")
            default = "required" if field.is_required() else f"default {field.default}"
            note = f"  {field.description}" if field.description else ""
            lines.append(f"  {prefix}{name} ({text}; {default}){note}")

    walk(Config, "")
    return "\n".join(lines)


def dump_config(config: Config) -> str:
    """The resolved tree as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
