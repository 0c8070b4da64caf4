"""Read the YAML file that says how prompts of the user's own data are written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from abft_fast.data.reading import again
from abft_fast.errors import UserError, closest

_KEYS = ("input_prefix", "label_prefix", "labels")
_NO_VALUE = ("null", "Null", "NULL", "~")


@dataclass(frozen=True)
class TemplateFile:
    """The text around texts and labels, and the words of the labels.

    Attributes:
        input_prefix: the text before an input.
        label_prefix: the text before a label.
        labels: the label word of each value in the label column, in the order of the labels; None
            if the values themselves are the words.
    """

    input_prefix: str = "text: "
    label_prefix: str = "label: "
    labels: dict[str, str] | None = None


def read_template(path: Path) -> TemplateFile:
    """Read a template; take every value as the text that is written, also `no` and `1`.

    Raises:
        UserError: the file is missing, no YAML, has another key, or names a label word twice.
    """
    try:
        with again(path).open(encoding="utf-8-sig") as file:
            node = yaml.compose(file, Loader=yaml.BaseLoader)
    except FileNotFoundError:
        raise UserError(f"--template {path} does not exist") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", row {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: {error.problem or error.context}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise UserError(f"{path} cannot be read: it is nested too deeply") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if node is None:
        return TemplateFile()
    nodes = _mapping(path, node, f"the file must be a mapping with {', '.join(_KEYS)}")
    for name, value in nodes.items():
        if name not in _KEYS:
            row = value.start_mark.line + 1
            raise UserError(
                f"{path}, row {row}: there is no key {name!r}; the keys are {', '.join(_KEYS)}"
                f"{closest(name, _KEYS)}"
            )
    labels = nodes.pop("labels", None)
    template = TemplateFile(
        **{name: _written(path, name, value) for name, value in nodes.items()},
        labels=None if labels is None else _labels(path, labels),
    )
    if not template.label_prefix.strip():
        raise UserError(
            f"{path}: label_prefix is empty, but a query must end by asking for a label"
        )
    return template


def _labels(path: Path, node: yaml.Node) -> dict[str, str]:
    example = (
        "labels must be a mapping from values of the label column to label words, such as "
        "`1: positive`"
    )
    labels: dict[str, str] = {}
    for value, word_node in _mapping(path, node, example).items():
        word = _written(path, f"label {value!r}", word_node).strip()
        where = f"{path}, row {word_node.start_mark.line + 1}"
        if not word:
            raise UserError(f"{where}: label {value!r} has no word")
        twin = next((other for other, known in labels.items() if known == word), None)
        if twin is not None:
            raise UserError(f"{where}: labels {twin!r} and {value!r} have the same word, {word!r}")
        labels[value] = word
    if len(labels) < 2:
        raise UserError(f"{path}: labels must have at least two entries, not {len(labels)}")
    return labels


def _mapping(path: Path, node: yaml.Node, wanted: str) -> dict[str, yaml.Node]:
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}, row {node.start_mark.line + 1}: {wanted}")
    nodes: dict[str, yaml.Node] = {}
    for key, value in node.value:
        name = _text(path, "a key", key).strip()
        if name in nodes:
            raise UserError(f"{path}, row {key.start_mark.line + 1}: {name!r} is given twice")
        nodes[name] = value
    return nodes


def _written(path: Path, place: str, node: yaml.Node) -> str:
    """Return the text of a value; refuse YAML's words for no value, which are seldom meant."""
    text = _text(path, place, node)
    if node.style is None and text in _NO_VALUE:
        raise UserError(
            f"{path}, row {node.start_mark.line + 1}: {place} is {text}, which is no text in YAML: "
            f'write "" for an empty text, or "{text}" for the word'
        )
    return text


def _text(path: Path, place: str, node: yaml.Node) -> str:
    where = f"{path}, row {node.start_mark.line + 1}: {place}"
    if not isinstance(node, yaml.ScalarNode):
        raise UserError(f"{where} must be text")
    try:
        node.value.encode()
    except UnicodeEncodeError as error:
        half = node.value[error.start].encode("unicode-escape").decode()
        raise UserError(f"{where}: {half} is half a character") from None
    return node.value
