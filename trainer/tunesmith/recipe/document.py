"""A YAML 1.2 text as plain values, and the line that each of them was written on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from tunesmith.recipe.faults import Fault, Path

_TAG = "tag:yaml.org,2002:"
_SYNTAX = {
    "found character '\\t' that cannot start any token": "a tab stands here: indent with spaces",
    "mapping values are not allowed here": (
        "a ':' is not allowed here: check the indentation, or put a text that holds ': ' in quotes"
    ),
    "found unexpected end of stream": "the text ends inside a quotation: a closing quote is missing",
}


def line_of(node: Node) -> int:
    return node.start_mark.line + 1


@dataclass(frozen=True, slots=True)
class Document:
    """`values` are plain dicts, lists and scalars; dates stay text. `faults` are what kept parts of the text
    from being read (syntax, duplicate keys, unknown tags)."""

    values: Any
    root: Node | None
    faults: list[Fault]

    def find(self, path: Path) -> tuple[int, int]:
        """(line, depth): the line of the deepest key on the way along `path` that the text holds, and how
        many steps of the way it holds. An index into what is written as a single mapping stays at that
        mapping."""
        if self.root is None:
            return 1, 0
        node, line = self.root, line_of(self.root)
        for depth, step in enumerate(path):
            if isinstance(node, MappingNode) and isinstance(step, int):
                continue
            if isinstance(node, SequenceNode) and isinstance(step, int) and step < len(node.value):
                node = node.value[step]
                line = line_of(node)
                continue
            pair = next((p for p in _pairs(node) if p[0].value == str(step)), None)
            if pair is None:
                return line, depth
            line, node = line_of(pair[0]), pair[1]
        return line, len(path)


def read(text: str) -> Document:
    """The one document of a YAML 1.2 text. Nothing is raised: see `faults`."""
    if re.match(r"\ufeff?%YAML\s+1\.1\b", text):
        return Document(None, None, [Fault(1, "", "recipes are YAML 1.2: remove the %YAML 1.1 line")])
    try:
        root = YAML(typ="safe", pure=True).compose(text)
    except YAMLError as error:
        return Document(None, None, [_syntax_fault(error, text)])
    reader = _Reader()
    values = None if root is None else reader.value(root, ())
    return Document(values, root, reader.faults)


def _syntax_fault(error: YAMLError, text: str) -> Fault:
    if isinstance(error, ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return Fault(line, "", f"the character U+{error.character:04X} is not allowed in YAML")
    assert isinstance(error, MarkedYAMLError), error
    mark, problem = error.problem_mark, str(error.problem)
    if problem == "found unexpected end of stream":
        mark = error.context_mark or mark
    if problem.startswith("but found another document"):
        return Fault(mark.line + 1, "", "a second document begins here: a recipe is one document")
    if problem.startswith("expected ',' or"):
        assert error.context_mark is not None
        plain = f"{problem}: is the bracket of line {error.context_mark.line + 1} closed?"
    elif problem.startswith("expected <block end>"):
        plain = "the indentation fits no key above"
    else:
        plain = _SYNTAX.get(problem, problem)
    return Fault(mark.line + 1, "", f"not valid YAML: {plain}")


def _is_merge(key: Node) -> bool:
    return key.tag == f"{_TAG}merge"


def _pairs(node: Node) -> Iterator[tuple[Node, Node]]:
    """The keys and values of a mapping, its own first, then what `<<` brings in."""
    if not isinstance(node, MappingNode):
        return
    yield from (pair for pair in node.value if not _is_merge(pair[0]))
    for key, value in node.value:
        if _is_merge(key):
            for source in value.value if isinstance(value, SequenceNode) else [value]:
                yield from _pairs(source)


@dataclass(slots=True)
class _Reader:
    """Builds plain values from nodes, and collects what is wrong on the way."""

    faults: list[Fault] = field(default_factory=list[Fault])
    open: list[Node] = field(default_factory=list[Node])

    def fault(self, node: Node, path: Path, message: str) -> None:
        self.faults.append(Fault(line_of(node), ".".join(map(str, path)), message))

    def value(self, node: Node, path: Path) -> Any:
        if isinstance(node, ScalarNode):
            return self.scalar(node, path)
        if node in self.open:
            self.fault(node, path, f"the alias *{node.anchor} stands inside what it names")
            return None
        if not node.tag.startswith(_TAG):
            self.fault(node, path, f"the tag {node.tag} has no meaning in a recipe")
            return None
        self.open.append(node)
        if isinstance(node, SequenceNode):
            result: Any = [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        else:
            assert isinstance(node, MappingNode)
            result = self.mapping(node, path)
        self.open.pop()
        return result

    def mapping(self, node: MappingNode, path: Path) -> dict[Any, Any]:
        result: dict[Any, Any] = {}
        lines: dict[Any, int] = {}
        for key_node, value_node in node.value:
            if _is_merge(key_node):
                continue
            if not isinstance(key_node, ScalarNode):
                self.fault(key_node, path, "a key must be a word, not a list or a mapping")
                continue
            key = self.scalar(key_node, path)
            if key in lines:
                self.fault(key_node, (*path, key), f"is given twice (first on line {lines[key]})")
                continue
            lines[key] = line_of(key_node)
            result[key] = self.value(value_node, (*path, key))
        for key_node, value_node in node.value:
            if _is_merge(key_node):
                self.merge(value_node, path, result)
        return result

    def merge(self, node: Node, path: Path, into: dict[Any, Any]) -> None:
        for source in node.value if isinstance(node, SequenceNode) else [node]:
            if isinstance(source, MappingNode):
                for key, value in self.value(source, path).items():
                    into.setdefault(key, value)
            else:
                self.fault(source, path, "<< takes a mapping or a list of mappings")

    def scalar(self, node: ScalarNode, path: Path) -> Any:
        tag = node.tag.removeprefix(_TAG)
        try:
            match tag:
                case "null":
                    return None
                case "bool":
                    return {"true": True, "false": False}[node.value.lower()]
                case "int":
                    return int(node.value.replace("_", ""), 10 if node.value.lstrip("+-").isdigit() else 0)
                case "float":
                    text = node.value.replace("_", "").lower()
                    return float(re.sub(r"\.(inf|nan)$", r"\1", text))
                case "str" | "timestamp" | "value":
                    return node.value
                case _:
                    self.fault(node, path, f"the tag {node.tag} has no meaning in a recipe")
        except (ValueError, KeyError):
            self.fault(node, path, f"'{node.value}' is no {tag}")
        return None
