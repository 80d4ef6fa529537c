"""Small generated data files whose rows have uneven numbers of labelled units."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROWS = 41  # windows of 16, 16 and 9 rows: the last one deals unevenly
_WORDS = re.findall(
    r"\w+",
    "amber river stone quiet garden lamp winter bridge copper field harbor meadow north ocean paper road silver table"
    " under velvet water yellow island jacket kettle letter market night orange pencil",
)
Row = dict[str, Any]


def _sentence(dice: random.Random, shortest: int, longest: int) -> str:
    return " ".join(dice.choices(_WORDS, k=dice.randint(shortest, longest))) + "."


def _text(dice: random.Random) -> str:
    return " ".join(_sentence(dice, 2, 9) for _ in range(dice.choice([1, 2, 3, 8])))


def text(dice: random.Random) -> Row:
    return {"text": _text(dice)}


def chat(dice: random.Random) -> Row:
    messages = [{"role": "system", "content": _sentence(dice, 1, 4)}] if dice.random() < 0.3 else []
    for _ in range(dice.choice([1, 1, 2, 3])):
        messages.append({"role": "user", "content": _sentence(dice, 1, 6)})
        messages.append({"role": "assistant", "content": _sentence(dice, 1, dice.choice([1, 4, 12]))})
    return {"messages": messages}


def single(dice: random.Random) -> Row:
    label = dice.choices(["a", "b", "c", "d"], weights=[6, 3, 2, 1])[0]
    return {"text": f"{_sentence(dice, 1, 12)} {label}", "label": label}


def pair(dice: random.Random) -> Row:
    return {
        "text": _sentence(dice, 1, 8),
        "text_pair": _sentence(dice, 1, 12),
        "label": dice.choice(["no", "yes"]),
    }


def multi(dice: random.Random) -> Row:
    labels = [name for name in ("x", "y", "z") if dice.random() < 0.4]
    return {"text": _sentence(dice, 1, 12), "label": labels}


def number(dice: random.Random) -> Row:
    return {"text": _sentence(dice, 1, 12), "label": round(dice.uniform(-2, 2), 3)}


def tags(dice: random.Random) -> Row:
    words, names = [], []
    for _ in range(dice.choice([1, 2, 3, 9])):
        kind = dice.choice(["O", "PER", "LOC"])
        length = dice.randint(1, 3)
        words += dice.choices(_WORDS, k=length)
        names += ["O"] * length if kind == "O" else [f"B-{kind}", *[f"I-{kind}"] * (length - 1)]
    return {"tokens": words, "tags": names}


def question(dice: random.Random) -> Row:
    """Some contexts give one window, some several, some questions have no answer."""
    words = dice.choices(_WORDS, k=dice.choice([6, 20, 70]))
    context = " ".join(words)
    start = dice.randrange(len(words) - 2)
    answer = " ".join(words[start : start + 2])
    at = len(" ".join(words[:start])) + (start > 0)
    answers = [] if dice.random() < 0.2 else [{"text": answer, "answer_start": at}]
    return {"question": _sentence(dice, 1, 4), "context": context, "answers": answers}


def translation(dice: random.Random) -> Row:
    source = _sentence(dice, 1, 10)
    return {
        "source": source,
        "target": " ".join(reversed(source.split()))[: dice.choice([8, 30, 90])].strip(),
    }


_KINDS: dict[str, Callable[[random.Random], Row]] = {
    "text": text,
    "chat": chat,
    "single": single,
    "pair": pair,
    "multi": multi,
    "number": number,
    "tags": tags,
    "question": question,
    "translation": translation,
}


def write(path: Path, rows: Iterable[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def build_data(root: Path) -> list[str]:
    """`KIND.jsonl` under `root` for every kind, and the texts that tokenizers learn from."""
    root.mkdir(parents=True, exist_ok=True)
    for seed, (kind, make) in enumerate(_KINDS.items()):
        dice = random.Random(seed)
        made = [make(dice) for _ in range(ROWS)]
        for i, row in enumerate(made):
            if kind == "question":
                row["id"] = str(i)
        write(root / f"{kind}.jsonl", made)
    dice = random.Random(99)
    return [*(_text(dice) for _ in range(200)), "a b c d"]
