"""The rules of `trainable` and `model.quantization`: what excludes or needs each other, and what would have no
effect. What can only be told from the model itself is checked where the model is built."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from tunesmith.recipe.adapters import Lora, PrefixTuning, PromptTuning, PTuning
from tunesmith.recipe.faults import Problem, problem_at
from tunesmith.recipe.selectors import Layers, Pattern, parse
from tunesmith.recipe.trainable import Gradual

if TYPE_CHECKING:
    from tunesmith.recipe.root import Recipe

_HEADED = {"classification", "token_classification", "question_answering"}
_ON_EVERY_TOKEN = {"token_classification", "question_answering"}
_VIRTUAL_TOKENS = (PromptTuning, PrefixTuning, PTuning)


def _freezes_backbone(recipe: Recipe) -> bool:
    return bool({"backbone", "all"} & set(recipe.trainable.freeze))


def _quantization(recipe: Recipe) -> Iterator[Problem]:
    trainable, precision, parallel = recipe.trainable, recipe.training.precision, recipe.parallel
    quantization = recipe.model.quantization
    if quantization is None:
        return
    if not trainable.adapters and not _freezes_backbone(recipe):
        yield problem_at(
            "model.quantization",
            "weights in few bits cannot be trained: set trainable.adapters (such as [{type: lora}]), or "
            "trainable.freeze: [backbone]",
        )
    elif not trainable.adapters and parallel.strategy in {"zero3", "fsdp2"}:
        yield problem_at(
            "parallel.strategy",
            f"{parallel.strategy} has no rank with the whole model, which final/ would be unpacked from: use zero2 or "
            "ddp, or train adapters",
        )
    if parallel.strategy == "fsdp2" and any(isinstance(a, Lora) and a.use_dora for a in trainable.adapters):
        yield problem_at(
            "parallel.strategy", "fsdp2 and use_dora on a base in few bits exclude each other: use ddp"
        )
    names_layers = any(n in {"all", "backbone"} or isinstance(parse(n), Layers) for n in _thawed(recipe))
    if names_layers and not quantization.skip_modules:  # which the model may have in all that is named
        yield problem_at(
            "trainable.unfreeze",
            "weights in few bits (model.quantization) cannot be trained: name norms, biases, embeddings or the head",
        )
    if recipe.training.torch_compile:
        yield problem_at(
            "training.torch_compile", "and model.quantization exclude each other: no graph holds its products"
        )
    if precision.startswith("bf16_"):
        yield problem_at(
            "training.precision",
            f"{precision} is for parameters in bf16, not for a base in few bits: use bf16",
        )
    if parallel.strategy == "fsdp2" and parallel.tensor_parallel_size > 1:
        yield problem_at(
            "parallel.tensor_parallel_size",
            "cuts matrices into rows and columns, and model.quantization into blocks across them: set it to 1",
        )


def _thawed(recipe: Recipe) -> list[str]:
    """All that `unfreeze` names, whenever; `backbone` where it names layers."""
    unfreeze = recipe.trainable.unfreeze
    if isinstance(unfreeze, Gradual):
        return ["backbone"]
    names = list(recipe.trainable.exceptions)
    for entry in recipe.trainable.later:
        names += ["backbone"] if entry.parameters is None else entry.parameters
    return names


def _cache_features(recipe: Recipe) -> Iterator[Problem]:
    trainable = recipe.trainable
    if not trainable.cache_features:
        return
    key = "trainable.cache_features"
    if trainable.adapters:
        yield problem_at(key, "and adapters exclude each other: they change the features at every step")
    elif not _freezes_backbone(recipe):
        yield problem_at(key, "needs a backbone that never changes: add freeze: [backbone]")
    if trainable.later or isinstance(trainable.unfreeze, Gradual):
        yield problem_at(key, "and unfreezing over time exclude each other: the features would change")
    elif any(parse(name) != "head" and not isinstance(parse(name), Pattern) for name in trainable.exceptions):
        yield problem_at(key, "needs a backbone that never changes: unfreeze the head only")
    if recipe.objective.type not in _HEADED:
        yield problem_at(
            key, f"is for {', '.join(sorted(_HEADED))}; the objective is {recipe.objective.type}"
        )
    for name in ("neftune_noise_alpha", "drop_path"):
        if getattr(recipe.model, name):
            yield problem_at(f"model.{name}", "and trainable.cache_features exclude each other")


def _new_tokens(recipe: Recipe) -> Iterator[Problem]:
    trainable = recipe.trainable
    frozen = _freezes_backbone(recipe) or "embeddings" in trainable.freeze
    if recipe.model.add_tokens and frozen and not trainable.adapters and not trainable.unfreeze:
        yield problem_at(
            "model.add_tokens",
            "the rows of new tokens would stay as they were drawn: trainable.freeze names them",
        )


def _neftune(recipe: Recipe) -> Iterator[Problem]:
    key, trainable = "model.neftune_noise_alpha", recipe.trainable
    if recipe.model.neftune_noise_alpha is None:
        return
    if _freezes_backbone(recipe) and not trainable.adapters and not trainable.unfreeze:
        yield problem_at(key, "has no effect: a backbone that is frozen computes as in evaluation")
    if getattr(recipe.parallel, "sequence_parallel_size", 1) > 1:
        yield problem_at(key, "is scaled by a row's length, which sequence_parallel_size cuts: leave one out")
    for index, adapter in enumerate(trainable.adapters):
        if isinstance(adapter, _VIRTUAL_TOKENS):
            yield problem_at(
                f"trainable.adapters.{index}.type",
                f"{adapter.type} and model.neftune_noise_alpha exclude each other: both act on the embeddings",
            )


def _head(recipe: Recipe) -> Iterator[Problem]:
    head, objective = recipe.trainable.head, recipe.objective.type
    if head is None:
        return
    if objective not in _HEADED:
        yield problem_at(
            "trainable.head",
            f"is for {', '.join(sorted(_HEADED))}; {objective} keeps the model's own head over the vocabulary",
        )
    elif head.pooling is not None and objective in _ON_EVERY_TOKEN:
        yield problem_at(
            "trainable.head.pooling",
            f"has no effect: {objective} reads every token's vector, not one per row",
        )


def _adapters(recipe: Recipe) -> Iterator[Problem]:
    trainable = recipe.trainable
    adapters = trainable.adapters
    names = [adapter.name for adapter in adapters]
    first = next((adapter.type for adapter in adapters if adapter.type != "existing"), "")
    for index, adapter in enumerate(adapters):
        key = f"trainable.adapters.{index}"
        if adapter.name in names[:index]:
            yield problem_at(
                f"{key}.name" if "name" in adapter.model_fields_set else key,
                f"'{adapter.name}' is the name of another adapter: give each its own name",
            )
        if isinstance(adapter, Lora) and adapter.target_modules in ("all", "all_linear", "linear"):
            yield problem_at(f"{key}.target_modules", f"here '{adapter.target_modules}' is all-linear")
        if isinstance(adapter, _VIRTUAL_TOKENS) and recipe.data.packing:
            yield problem_at(
                f"{key}.type",
                f"{adapter.type} puts virtual tokens before a row, and data.packing rows behind one another: set "
                "packing: false",
            )
        if adapter.type not in {"existing", first}:
            yield problem_at(
                f"{key}.type", f"several adapters must be of one type: {first} and {adapter.type} do not mix"
            )
    if adapters and trainable.unfreeze and not isinstance(trainable.unfreeze, Gradual):
        yield problem_at(
            "trainable.unfreeze",
            "and adapters exclude each other, for an adapter's folder holds no weights of the model: name the modules "
            "that are trained whole in the adapter's modules_to_save",
        )


def _rates(recipe: Recipe) -> Iterator[Problem]:
    if recipe.optim.learning_rate != 0:
        return
    trainable = recipe.trainable
    said = "is a factor on optim.learning_rate, which is 0"
    if trainable.layer_lr_decay is not None:
        yield problem_at("trainable.layer_lr_decay", said)
    if trainable.learning_rates:
        yield problem_at(
            "trainable.learning_rates",
            "follow the schedule of optim.learning_rate, which is 0: give it the highest",
        )
    for index, adapter in enumerate(trainable.adapters):
        if isinstance(adapter, Lora) and adapter.loraplus_lr_ratio is not None:
            yield problem_at(f"trainable.adapters.{index}.loraplus_lr_ratio", said)


RULES: tuple[tuple[set[str], Callable[[Recipe], Iterator[Problem]]], ...] = (
    ({"model", "trainable", "training", "parallel"}, _quantization),
    ({"model", "trainable", "objective"}, _cache_features),
    ({"model", "trainable"}, _new_tokens),
    ({"model", "trainable", "parallel"}, _neftune),
    ({"trainable", "objective"}, _head),
    ({"trainable", "data"}, _adapters),
    ({"trainable", "optim"}, _rates),
)
"""Each rule with the sections that it reads."""
