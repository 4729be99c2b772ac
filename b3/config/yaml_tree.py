"""YAML files as plain trees: base files, overrides, and the line of a key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

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


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML file as a dictionary, laid over its ``base`` file if it names one."""
    try:
        loaded = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: must be a mapping of sections, found {type(loaded).__name__}")
    base = loaded.pop("base", None)
    if base is None:
        return loaded
    parent = (path.parent / str(base)).resolve()
    if parent in seen:
        raise ConfigError(f"{path}: base files form a circle")
    return merge(read_yaml(parent, (*seen, path.resolve())), loaded)


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
    *parents, last = dotted.split(".")
    for part in parents:
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ConfigError(f"override '{override}': there is no element {part}; the list has {len(node)}")
            node = node[int(part)]
        else:
            node = node.setdefault(part, {})
        if not isinstance(node, (dict, list)):
            raise ConfigError(f"override '{override}': '{part}' is a value, not a section")
    if isinstance(node, list):
        if not last.isdigit() or int(last) >= len(node):
            raise ConfigError(f"override '{override}': there is no element {last}; the list has {len(node)}")
        node[int(last)] = value
    else:
        node[last] = value
