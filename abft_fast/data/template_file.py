"""The YAML file that says how prompts of one's own data are written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from abft_fast.data.tables import closest
from abft_fast.errors import UserError

_KEYS = ("input_prefix", "label_prefix", "labels")


@dataclass(frozen=True)
class TemplateFile:
    """What stands around texts and labels.

    Attributes:
        input_prefix: what stands before a text.
        label_prefix: what stands before a label.
        labels: the label word of each value in the label column, in the order of the labels; None
            where the values are the words.
    """

    input_prefix: str = "text: "
    label_prefix: str = "label: "
    labels: dict[str, str] | None = None


def read_template(path: Path) -> TemplateFile:
    """Read a template; every value is text as it is written, so `no` and `1` are no surprise.

    Raises:
        UserError: the file is missing, no YAML, has another key, or names a label word twice.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            node = yaml.compose(file, Loader=yaml.BaseLoader)
    except FileNotFoundError:
        raise UserError(f"--template {path} does not exist") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", row {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: {error.problem or error.context}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if node is None:
        return TemplateFile()
    found = _mapping(path, node, f"a mapping with {', '.join(_KEYS)}")
    for name, value in found.items():
        if name not in _KEYS:
            row = value.start_mark.line + 1
            raise UserError(
                f"{path}, row {row}: no key {name!r}; there are {', '.join(_KEYS)}"
                f"{closest(name, _KEYS)}"
            )
    template = TemplateFile(**{name: _read(path, name, value) for name, value in found.items()})
    if not template.label_prefix.strip():
        raise UserError(
            f"{path}: label_prefix is empty, but a query must end by asking for a label"
        )
    return template


def _read(path: Path, name: str, node: yaml.Node) -> str | dict[str, str]:
    if name != "labels":
        return _text(path, name, node)
    example = "a mapping from values of the label column to label words, such as `1: positive`"
    labels: dict[str, str] = {}
    for value, word_node in _mapping(path, node, f"labels: {example}").items():
        word = _text(path, f"label {value!r}", word_node).strip()
        where = f"{path}, row {word_node.start_mark.line + 1}"
        if not word:
            raise UserError(f"{where}: label {value!r} has no word")
        twin = next((other for other, known in labels.items() if known == word), None)
        if twin is not None:
            raise UserError(f"{where}: labels {twin!r} and {value!r} have the same word, {word!r}")
        labels[value] = word
    if len(labels) < 2:
        raise UserError(f"{path}: labels: {len(labels)}, but at least two must be told apart")
    return labels


def _mapping(path: Path, node: yaml.Node, what: str) -> dict[str, yaml.Node]:
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}, row {node.start_mark.line + 1}: must be {what}")
    found: dict[str, yaml.Node] = {}
    for key, value in node.value:
        name = _text(path, "a key", key).strip()
        if name in found:
            raise UserError(f"{path}, row {key.start_mark.line + 1}: {name!r} stands there twice")
        found[name] = value
    return found


def _text(path: Path, what: str, node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise UserError(f"{path}, row {node.start_mark.line + 1}: {what} must be text")
    return node.value
