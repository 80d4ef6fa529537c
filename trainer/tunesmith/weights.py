"""The weights of a model: loaded or drawn whole, or straight into the shards of a model that was built without.

New weights are drawn module by module in one order, whichever way the model is built: the same seed gives every
engine the same weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tunesmith import quantization
from tunesmith.errors import UserError
from tunesmith.parts import EXTRAS
from tunesmith.recipe.quantization import Quantization


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model's weights come from: a folder or hub id, or with `path` None the seed alone; and into how many bits
    they go (`compute_dtype`: what quantised layers compute in where the recipe says auto)."""

    auto_class: Any
    config: Any
    path: str | None
    revision: str | None
    attn_implementation: str
    trust_remote_code: bool
    seed: int
    quantization: Quantization | None = None
    compute_dtype: torch.dtype = torch.float32

    def whole(self) -> tuple[Any, dict[str, Any]]:
        """The model in fp32 on the CPU (or partitioned, where ZeRO-3 is active), or whole with its base quantised; and
        what loading it found: its `missing_keys` and `unexpected_keys`."""
        if getattr(self.config, "quantization_config", None) is not None:
            raise UserError(
                "model.model_name_or_path: its weights are stored quantised: name the model that they were made "
                "of, and set model.quantization"
            )
        if self.quantization is not None:
            with _unpartitioned():
                return self._quantized(self.quantization)
        return self._read() if self.path is not None else (self._drawn(), {})

    def _quantized(self, settings: Quantization) -> tuple[Any, dict[str, Any]]:
        if self.path is not None:
            return quantization.load(self.empty(), settings, self.compute_dtype, self._read)
        drawn = self._drawn()

        def read(**options: Any) -> tuple[Any, dict[str, Any]]:
            # transformers quantises what it loads: it is given what was drawn as if it came from files
            return type(drawn).from_pretrained(
                None,
                config=self.config,
                state_dict=drawn.state_dict(),
                attn_implementation=self.attn_implementation,
                dtype=torch.float32,
                output_loading_info=True,
                **options,
            )

        model, found = quantization.load(drawn, settings, self.compute_dtype, read)
        assert not found["missing_keys"], found["missing_keys"]
        return model, {}

    def _read(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        with _unpartitioned() if self.has_other_labels() else nullcontext():
            model, found = self._from_pretrained(options)
        found["missing_keys"] = {*found["missing_keys"], *_other_heads(model, found["mismatched_keys"])}
        # under ZeRO-3 transformers keeps all that it knows, and would save the names of years ago
        model._weight_conversions = [one for one in model._weight_conversions if one.was_used()]
        return model, found

    def has_other_labels(self) -> bool:
        """Whether the files have a head for another number of labels, which is drawn anew. Such a model is read whole,
        and taken apart afterwards: of a shard nobody can tell whether its whole has another shape."""
        from transformers import PreTrainedConfig

        if self.path is None:
            return False
        stored, _ = PreTrainedConfig.get_config_dict(self.path, revision=self.revision)
        return "id2label" in stored and len(stored["id2label"]) != self.config.num_labels

    def _from_pretrained(self, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        torch.manual_seed(self.seed)
        return self.auto_class.from_pretrained(
            self.path,
            config=self.config,
            revision=self.revision,
            attn_implementation=self.attn_implementation,
            dtype=torch.float32,
            trust_remote_code=self.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )

    def _drawn(self) -> Any:
        from transformers import initialization
        from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

        torch.manual_seed(self.seed)
        if is_deepspeed_zero3_enabled():  # transformers partitions and draws module by module
            return self._from_config().float()
        with initialization.no_init_weights():
            model = self._from_config().float()
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
        model.initialize_weights()
        model.tie_weights()
        refuse_undrawn(model, dict(model.named_parameters()))
        return model

    def empty(self) -> Any:
        """The model on the meta device: shapes and dtypes without memory."""
        with torch.device("meta"):
            return self._from_config().float()

    def _from_config(self) -> Any:
        return self.auto_class.from_config(
            self.config,
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
        )

    def fill(self, model: Any, device: torch.device) -> dict[str, Any]:
        """Gives weights to an `empty` model whose parameters an engine has sharded as DTensors: every rank reads
        its own slices of the files. Returns what `whole` does. Buffers go to `device`."""
        from transformers.utils.loading_report import LoadStateDictInfo

        torch.manual_seed(self.seed)
        devices = {"": torch.device("cpu") if device.type == "cpu" else device}
        if self.path is None:
            info = LoadStateDictInfo(
                missing_keys=set(model.state_dict()),
                unexpected_keys=set(),
                mismatched_keys=set(),
                error_msgs=[],
                conversion_errors={},
                skipped_pp_keys=set(),
            )
        else:
            info = self._load(model, devices)
        # what is trained beside the model has its values from elsewhere
        info.missing_keys = {name for name in info.missing_keys if not name.startswith(f"{EXTRAS}.")}
        missing, unexpected = set(info.missing_keys), set(info.unexpected_keys)
        # what transformers' from_pretrained does after loading; its own drawing would give every rank other numbers
        model.mark_tied_weights_as_initialized(info)
        model._move_missing_keys_from_meta_to_device(info.missing_and_mismatched(), devices, None, None)
        for name, value in model.state_dict(keep_vars=True).items():
            if name not in missing:
                value._is_hf_initialized = True
        with torch.no_grad():
            _draw(model, model._initialize_weights)
        model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
        model._adjust_missing_and_unexpected_keys(info)
        refuse_undrawn(model, missing)
        return {
            "missing_keys": missing & set(info.missing_keys),
            "unexpected_keys": unexpected & set(info.unexpected_keys),
        }

    def _load(self, model: Any, devices: dict[str, torch.device]) -> Any:
        from transformers import modeling_utils
        from transformers.conversion_mapping import get_model_conversion_mapping

        # the functions of which from_pretrained is made, for it cannot be told to load into a module of ours
        library: Any = modeling_utils
        options = library.DownloadKwargs(revision=self.revision)
        files, index = library._get_resolved_checkpoint_files(
            pretrained_model_name_or_path=self.path,
            variant=None,
            gguf_file=None,
            use_safetensors=None,
            user_agent=None,
            is_remote_code=self.trust_remote_code,
            download_kwargs=options,
        )
        settings = library.LoadStateDictConfig(
            pretrained_model_name_or_path=self.path,
            sharded_metadata=index,
            device_map=devices,
            dtype=next(model.parameters()).dtype,
            weight_mapping=get_model_conversion_mapping(model, None, None),
        )
        info, _ = type(model)._load_pretrained_model(model, None, files, settings)
        if info.mismatched_keys:
            name, found, wanted = min(info.mismatched_keys)
            raise ValueError(f"{name} has shape {tuple(found)}, the model wants {tuple(wanted)}")
        return info


def _other_heads(model: Any, mismatched: Collection[tuple[str, Any, Any]]) -> set[str]:
    """Of the weights whose shape in the files is another, those of the head: it was trained for other labels, and is
    drawn anew. Raises ValueError for one of the backbone."""
    backbone = model.base_model
    own = "" if backbone is model else f"{model.base_model_prefix}."
    for name, found, wanted in sorted(mismatched):
        if not own or name.startswith(own):
            raise ValueError(f"{name} has shape {tuple(found)}, the model wants {tuple(wanted)}")
    return {name for name, _, _ in mismatched}


@contextmanager
def _unpartitioned() -> Generator[None]:
    """Hides ZeRO-3 from transformers, which cannot quantise what it partitions; DeepSpeed partitions the model when it
    is there."""
    from transformers.integrations import deepspeed

    reference = cast(Any, deepspeed)._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if reference is not None and (config := reference()) is not None:
            deepspeed.set_hf_deepspeed_config(config)


def _draw(module: nn.Module, initialize: Callable[..., None]) -> None:
    """`PreTrainedModel.initialize_weights`, in its order, with whole parameters in place of the shards for as long
    as their module is drawn: every rank draws the same numbers and keeps its own."""
    from transformers import PreTrainedModel

    for child in module.children():
        own = cast(Any, child)._initialize_weights if isinstance(child, PreTrainedModel) else initialize
        _draw(child, own)
    # a module may draw its direct children's parameters too
    held: list[tuple[nn.Module, str, DTensor, nn.Parameter]] = []
    for owner in (module, *module.children()):
        for name, parameter in owner.named_parameters(recurse=False):
            if isinstance(parameter, DTensor) and not getattr(parameter, "_is_hf_initialized", False):
                whole = nn.Parameter(_whole(parameter), requires_grad=parameter.requires_grad)
                owner.register_parameter(name, whole)
                held.append((owner, name, parameter, whole))
    initialize(module)
    for owner, name, parameter, whole in held:
        local = parameter.to_local()
        local.copy_(whole[box_of(parameter)].to(local.device))
        cast(Any, parameter)._drawn = True
        owner.register_parameter(name, cast(nn.Parameter, parameter))


def _whole(parameter: DTensor) -> Tensor:
    if getattr(parameter, "_drawn", False):
        return parameter.full_tensor().cpu()
    return torch.full(parameter.shape, torch.nan)


def box_of(tensor: DTensor) -> tuple[slice, ...]:
    """Where this rank's part lies in the whole tensor."""
    offsets, sizes = place_of(tensor)
    return tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))


def place_of(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(offsets, sizes) of this rank's part in the whole tensor."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(offsets), tuple(sizes)


def refuse_undrawn(model: nn.Module, drawn: Collection[str]) -> None:
    """A model class whose own initialisation leaves a weight out would train on whatever stood in the memory."""
    for name, parameter in model.named_parameters():
        if name not in drawn:
            continue
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if local.numel() and bool(torch.isnan(local.flatten()[0])):
            raise UserError(
                f"model: {type(model).__name__} has no initial value for {name}: it can only be trained from "
                "pretrained weights that have it"
            )
