"""That all nodes run the same: recipe, data, model, code, versions, environment, devices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tunesmith.preflight.facts import Facts
from tunesmith.preflight.findings import Finding, error, warning

_ABSENT = "not there"
_NAMED = 3  # of many differing things on a node

# what may differ without another result or a hang, and is worth a line
_LOOSE = ("numpy", "datasets", "wandb", "NVIDIA driver", "psutil")
_LOOSE_VARIABLES = ("OMP_NUM_THREADS",)

Named = Mapping[str, Facts]


@dataclass(frozen=True, slots=True)
class Odd:
    """One node's value of one thing, where most nodes (of as many: rank 0's) have another. None: it lacks it."""

    node: str
    key: str
    own: str | None
    usual: str | None


def odd_ones(values: Mapping[str, Mapping[str, str]]) -> Iterator[Odd]:
    """By node, then by key; `values` (node → key → value) are in the order of ranks."""
    keys = sorted({key for own in values.values() for key in own})
    usual = {key: Counter(own.get(key) for own in values.values()).most_common(1)[0][0] for key in keys}
    for node, own in values.items():
        for key in keys:
            if own.get(key) != usual[key]:
                yield Odd(node, key, own.get(key), usual[key])


def agreement_findings(named: Named) -> Iterator[Finding]:
    yield from _recipe(named)
    yield from _contents(named)
    yield from _versions(named)
    yield from _code(named)
    yield from _variables(named)
    yield from _devices(named)


def _recipe(named: Named) -> Iterator[Finding]:
    for odd in odd_ones({node: facts.recipe for node, facts in named.items()}):
        what = f"the recipe says {odd.key}: {odd.own or _ABSENT}, elsewhere {odd.usual or _ABSENT}"
        yield error(odd.node, what, "copy the recipe to every node, and give the same overrides", 2)


def _contents(named: Named) -> Iterator[Finding]:
    """Files of data and model, by name; a node that lacks most of a folder gets a few lines, not thousands."""
    data = "copy the data to every node again, or put them on a shared file system"
    model = "copy the model's folder to every node again"
    data_values = {node: facts.data for node, facts in named.items()}
    model_values = {node: facts.model for node, facts in named.items()}
    for values, fix in ((data_values, data), (model_values, model)):
        by_node: dict[str, list[Odd]] = {}
        for odd in odd_ones(values):
            by_node.setdefault(odd.node, []).append(odd)
        for node, odds in by_node.items():
            for odd in odds[:_NAMED]:
                yield error(node, f"{odd.key} {_difference(odd)}", fix, 2)
            if len(odds) > _NAMED:
                yield error(node, f"{len(odds) - _NAMED} more of its files differ", fix, 2)


def _difference(odd: Odd) -> str:
    """Digests are `size:hash`."""
    if odd.own is None:
        return "is not there, elsewhere it is"
    if odd.usual is None:
        return "is there, elsewhere it is not"
    if odd.own.startswith("cannot"):
        return f"{odd.own}, elsewhere it can"
    own, usual = odd.own.partition(":")[0], odd.usual.partition(":")[0]
    if own == usual:
        return f"has another content than elsewhere (both {own} bytes)"
    return f"has {own} bytes, elsewhere {usual}" if usual.isdigit() else f"differs: elsewhere it {odd.usual}"


def _versions(named: Named) -> Iterator[Finding]:
    for odd in odd_ones({node: facts.versions for node, facts in named.items()}):
        what = f"{odd.key} is {odd.own or 'not installed'}, elsewhere {odd.usual or 'not installed'}"
        fix = _install(odd)
        loose = odd.key in _LOOSE or (odd.key == "python" and _minor(odd.own) == _minor(odd.usual))
        yield warning(odd.node, what, fix) if loose else error(odd.node, what, fix)


def _minor(version: str | None) -> str:
    return (version or "").rpartition(".")[0]


def _install(odd: Odd) -> str:
    if odd.key in ("python", "CUDA", "HIP", "NCCL", "NVIDIA driver"):
        return "use the same image or environment on every node"
    if odd.usual is None:
        return f"pip uninstall {odd.key} there, or install it everywhere"
    return f"pip install {odd.key}=={odd.usual} there"


def _code(named: Named) -> Iterator[Finding]:
    by_node: dict[str, list[str]] = {}
    for odd in odd_ones({node: facts.code for node, facts in named.items()}):
        by_node.setdefault(odd.node, []).append(odd.key)
    for node, files in by_node.items():
        few = ", ".join(files[:_NAMED]) + (f" and {len(files) - _NAMED} more" if len(files) > _NAMED else "")
        yield error(
            node, f"another code of tunesmith than elsewhere: {few}", "install the same tunesmith everywhere"
        )


def _variables(named: Named) -> Iterator[Finding]:
    for odd in odd_ones({node: facts.environ for node, facts in named.items()}):
        what = f"{odd.key} is {odd.own or 'not set'}, elsewhere {odd.usual or 'not set'}"
        fix = f"export {odd.key}={odd.usual} there" if odd.usual is not None else f"unset {odd.key} there"
        loose = odd.key in _LOOSE_VARIABLES
        yield warning(odd.node, what, fix) if loose else error(odd.node, what, fix)


def _devices(named: Named) -> Iterator[Finding]:
    for odd in odd_ones({node: {"kind": facts.device.kind} for node, facts in named.items()}):
        what = f"computes on {odd.own}, elsewhere on {odd.usual}"
        fix = f"make its {odd.usual} visible (driver, container flags, CUDA_VISIBLE_DEVICES), or set TUNESMITH_DEVICE"
        yield error(odd.node, what, fix)
    accelerated = {node: facts for node, facts in named.items() if facts.device.kind != "cpu"}
    for odd in odd_ones({node: {"name": facts.device.name} for node, facts in accelerated.items()}):
        what = f"has {odd.own}, elsewhere {odd.usual}"
        yield warning(odd.node, what, "the slowest device sets the pace of all: take nodes of one kind")
    largest = max((facts.device.total_bytes for facts in accelerated.values()), default=0)
    for node, facts in accelerated.items():
        if facts.device.total_bytes < 0.95 * largest:
            gib = [f"{count / 2**30:.1f}" for count in (facts.device.total_bytes, largest)]
            what = f"its device has {gib[0]} GiB, another {gib[1]}"
            yield warning(node, what, "the batch must fit the smallest: take nodes of one kind (or see MIG)")
