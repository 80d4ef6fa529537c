"""The results files of `make gpu-check`: what they hold, whether they are stale, and where documents quote them.

A document quotes a file in a block that is written by `python bench/gpu_check.py --write-docs`, never by hand:

    <!-- gpu-results:begin nvidia-h100-80gb-hbm3 cross_entropy,adamw -->
    …
    <!-- gpu-results:end -->

at the beginning of lines (elsewhere it is an example). The first word is the file's name in kernels/results, the second
its parts, in their order. A test fails where such a block has no file, a stale one, or other figures than the file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "kernels" / "results"
FORMAT = 1

_SOURCES = ("*.py", "*.cpp", "*.h")
_DOCUMENTS = ("README.md", "docs/**/*.md", "kernels/**/README.md")
_BLOCK = re.compile(
    r"^<!-- gpu-results:begin (?P<device>\S+) (?P<parts>\S+) -->\n(?P<body>.*?)^<!-- gpu-results:end -->",
    re.DOTALL | re.MULTILINE,
)
_MARKER = re.compile(r"^<!-- *gpu-results:", re.MULTILINE)
_KEYS = {
    "format": int,
    "device": dict,
    "versions": dict,
    "commit": str,
    "source_hash": str,
    "parts": dict,
}
_PART_KEYS = {"date": str, "seconds": (int, float), "rows": list, "failures": list, "notes": list}
_ROW_KEYS = {
    "case": str,
    "name": str,
    "value": (int, float),
    "least": (int, float, type(None)),
    "unit": str,
    "limit": (str, type(None)),
}


def source_hash(root: Path = ROOT) -> str:
    """sha256 over the names and bytes of the package's sources, sorted by name: of what was measured."""
    package = root / "kernels" / "tunesmith_kernels"
    digest = hashlib.sha256()
    for path in sorted(path for pattern in _SOURCES for path in package.rglob(pattern)):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def stale(path: Path) -> bool:
    """Whether the sources are not those that the file's figures were measured with; True for no file."""
    return not path.is_file() or load(path).get("source_hash") != source_hash()


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def save(path: Path, result: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)


def files(folder: Path = FOLDER) -> list[Path]:
    return sorted(folder.glob("*.json"))


def faults(result: Any) -> list[str]:
    """What is wrong with the structure of a results file, in words."""
    if not isinstance(result, dict):
        return ["it is not an object"]
    found = _missing(result, _KEYS, "")
    if found:
        return found
    if result["format"] != FORMAT:
        return [f"format is {result['format']}, not {FORMAT}"]
    for name, part in result["parts"].items():
        wrong = _missing(part, _PART_KEYS, f"{name}.")
        found += wrong
        for number, row in enumerate([] if wrong else part["rows"]):
            wrong = _missing(row, _ROW_KEYS, f"{name}.rows[{number}].")
            if not wrong and row["limit"] is not None and not _LIMIT.fullmatch(row["limit"]):
                wrong = [f"{name}.rows[{number}].limit is {row['limit']!r}"]
            found += wrong
    return found


def _missing(value: Mapping[str, Any], keys: Mapping[str, Any], where: str) -> list[str]:
    return [
        f"{where}{name} is not there or of another type"
        for name, kind in keys.items()
        if name not in value or not isinstance(value[name], kind)
    ]


_LIMIT = re.compile(r"(<=|>=) (\S+)")


def met(row: Mapping[str, Any]) -> bool | None:
    """Whether a row's value keeps its limit; None where it has none."""
    if row["limit"] is None:
        return None
    sense, bound = row["limit"].split()
    return row["value"] <= float(bound) if sense == "<=" else row["value"] >= float(bound)


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def missed(result: Mapping[str, Any]) -> list[str]:
    """The rows that miss their limits, and the failures, as lines."""
    lines: list[str] = []
    for name, part in result["parts"].items():
        lines += [
            f"{name}: {row['case']}: {row['name']}: {number(row['value'])} {row['unit']}, limit {row['limit']}"
            for row in part["rows"]
            if met(row) is False
        ]
        lines += [f"{name}: {failure}" for failure in part["failures"]]
    return lines


def table(part: Mapping[str, Any]) -> str:
    """A part's rows as a Markdown table; its notes after it."""
    lines = ["| case | what | median | least | unit | limit |", "|---|---|---:|---:|---|---|"]
    for row in part["rows"]:
        least = "" if row["least"] is None else number(row["least"])
        limit = "" if row["limit"] is None else row["limit"] + ("" if met(row) else " **missed**")
        cells = (row["case"], row["name"], number(row["value"]), least, row["unit"], limit)
        lines.append("| " + " | ".join(cells) + " |")
    notes = [f"- {note}" for note in part["notes"]]
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def block(result: Mapping[str, Any], parts: str) -> str:
    """What stands between the markers. Raises KeyError for a part that the file lacks."""
    device, versions = result["device"], result["versions"]
    head = (
        f"{device['name']}, driver {device['driver']}, torch {versions['torch']}, triton {versions['triton']}; "
        f"`kernels/results/{device['slug']}.json`."
    )
    bodies = [table(result["parts"][name]) for name in parts.split(",")]
    return "\n\n".join([head, *bodies]) + "\n"


@dataclass(frozen=True)
class Quote:
    """A block in a document."""

    document: Path
    device: str
    parts: str
    body: str


def documents(root: Path = ROOT) -> list[Path]:
    return sorted({path for pattern in _DOCUMENTS for path in root.glob(pattern)})


def quotes(root: Path = ROOT) -> Iterator[Quote]:
    """Every block of every document. Raises ValueError for a marker that is not part of a whole block."""
    for document in documents(root):
        text = document.read_text(encoding="utf-8")
        blocks = list(_BLOCK.finditer(text))
        if len(_MARKER.findall(text)) != 2 * len(blocks):
            raise ValueError(f"{document}: a gpu-results marker without its other half, device or parts")
        for found in blocks:
            yield Quote(document, found["device"], found["parts"], found["body"])


def quote_faults(root: Path = ROOT) -> list[str]:
    """The blocks that quote what is absent, stale, or not in their file."""
    found: list[str] = []
    for quote in quotes(root):
        path = root / "kernels" / "results" / f"{quote.device}.json"
        where = f"{quote.document.relative_to(root)}: {quote.device}"
        if not path.is_file():
            found.append(f"{where}: there is no {path.name}")
        elif load(path).get("source_hash") != source_hash(root):
            found.append(f"{where}: {path.name} is stale")
        elif not set(quote.parts.split(",")) <= load(path)["parts"].keys():
            found.append(f"{where}: {path.name} has not all of {quote.parts}")
        elif quote.body != block(load(path), quote.parts):
            found.append(f"{where}: not what {path.name} says")
    return found


def write_docs(root: Path = ROOT) -> list[Path]:
    """Fills every block from its file; the documents that changed. Raises ValueError for an absent or stale file."""
    changed: list[Path] = []
    for document in sorted({quote.document for quote in quotes(root)}):

        def filled(found: re.Match[str]) -> str:
            path = root / "kernels" / "results" / f"{found['device']}.json"
            if not path.is_file() or load(path).get("source_hash") != source_hash(root):
                raise ValueError(f"{path.name} is stale or not there: measure before quoting")
            start = found[0][: found.start("body") - found.start()]
            return start + block(load(path), found["parts"]) + "<!-- gpu-results:end -->"

        text = document.read_text(encoding="utf-8")
        new = _BLOCK.sub(filled, text)
        if new != text:
            document.write_text(new, encoding="utf-8")
            changed.append(document)
    return changed
