"""A checkpoint of compressed-tensors: the scheme, the weight and the input's parameters of each op of the same model.

In: the checkpoint's folder, and the FP32 model. Out: each op as the checkpoint stores the op, by the library's own
classes, matching and decompression. Whatever else of the model the checkpoint changes is found by name, and refused
where no op can take the change along.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import decompress_module
from compressed_tensors.compressors.format import COMPRESSION_FORMAT_PRIORITY, infer_module_format
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus
from compressed_tensors.utils import replace_direct_state_dict
from compressed_tensors.utils.match import is_match, match_targets
from pydantic import ValidationError
from safetensors import safe_open

from auto_quantize_model.config import repository_at
from auto_quantize_model.files import InputError, sha256_file
from auto_quantize_model.models.weights import (
    WEIGHTS_INDEX,
    Tensor,
    listed,
    read_headers,
    read_object,
    stored_names,
)
from auto_quantize_model.records import SnapshotFile
from auto_quantize_model.schemes.compressed import QuantizationParameters

LINKS = Path("resources/models")  # holds a link to each checkpoint of the hub
METHOD = "compressed-tensors"
CONFIG_KEYS = ("quantization_config", "compression_config")
# The tensors of a quantized module by which the module is known, and all that it may have.
OF_QUANTIZED = {
    *("weight_packed", "weight_scale", "weight_zero_point", "weight_global_scale", "weight_shape"),
    *("input_scale", "input_zero_point", "input_global_scale"),
}
OF_MODULE = OF_QUANTIZED | {"weight", "bias"}
OF_CACHE = {"k_scale", "v_scale", "k_zero_point", "v_zero_point", "k_global_scale", "v_global_scale"}
FORMATS = [format.value for format in COMPRESSION_FORMAT_PRIORITY if format != CompressionFormat.dense]
# What the library raises on tensors that do not fit the scheme.
DAMAGED = (AssertionError, AttributeError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)
CLEAR = 0.9  # least cosine of a row or column with that of the model, for a factor between the two to mean something
FACTORS = 0.8, 1.25  # rounding gives factors between these two
SHARE = 0.1  # of the rows or columns, from which on an op counts as scaled


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of a model.

    Attributes:
        place: the checkpoint as the config names it, for messages.
        folder: of its files.
        schemes: {quantized module: its scheme, with the format of its tensors}.
        tensors: {quantized module: {name in the module: name in the files}}.
        others: {parameter of the model outside of quantized modules: name in the files}.
        headers: all tensors, by name in the files.
        groups: the config's groups, as JSON.
        unmeasured: what the checkpoint quantizes besides, in words.
        norms: {op: the norm whose output is its input, where the checkpoint changes that norm}.
        changed: {norm: {parameter: name in the files}}.
    """

    place: str
    folder: Path
    schemes: dict[str, QuantizationScheme]
    tensors: dict[str, dict[str, str]]
    others: dict[str, str]
    headers: dict[str, Tensor]
    groups: dict[str, Any]
    unmeasured: tuple[str, ...] = ()
    norms: dict[str, str] = field(default_factory=dict)
    changed: dict[str, dict[str, str]] = field(default_factory=dict)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor by its name in the files."""
        with safe_open(self.folder / self.headers[name].file, framework="pt") as file:
            found: torch.Tensor = file.get_tensor(name)
            return found

    def put_into(self, module: torch.nn.Module, name: str) -> None:
        """Give a Linear the tensors of an op as they are stored, and have the library decompress the weight.

        Raises:
            InputError: the tensors do not fit the scheme of the op.
        """
        try:
            replace_direct_state_dict(module, {own: self.tensor(theirs) for own, theirs in self.tensors[name].items()})
            module.quantization_scheme = self.schemes[name].model_copy(deep=True)
            module.quantization_status = QuantizationStatus.COMPRESSED
            decompress_module(module)
        except DAMAGED as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise InputError(
                f"{self.place}: compressed-tensors cannot decompress {name} ({first[:200]}); write the checkpoint again"
            ) from None
        if not hasattr(module, "bias"):
            module.register_parameter("bias", None)

    def weight(self, name: str) -> torch.Tensor:
        """The decompressed weight of an op, (rows, columns), as float32."""
        module: Any = torch.nn.Linear(1, 1, device="meta")
        self.put_into(module, name)
        found: torch.Tensor = module.weight.detach().float()
        return found

    def bias(self, name: str) -> torch.Tensor | None:
        """The bias of an op, (rows,), as float32; None without one."""
        stored = self.tensors[name].get("bias")
        return self.tensor(stored).float() if stored else None

    def inputs(self, name: str) -> QuantizationParameters | None:
        """The parameters of an op's input, as float32; None where they are not stored, because each input has its own.

        Raises:
            InputError: the op lacks them, or they are not finite.
        """
        args = self.schemes[name].input_activations
        if not args or args.dynamic is True:
            return None
        keys = [("input_scale", "input_zero_point"), ("input_global_scale",)][args.dynamic == "local"]
        found = {key: self.tensor(self.tensors[name][key]).float() for key in keys if key in self.tensors[name]}
        if keys[0] not in found or not all(value.isfinite().all() for value in found.values()):
            raise InputError(
                f"{self.place}: no finite {keys[0]} of {name}, whose inputs are static; calibrate again with the tool"
                " that wrote the checkpoint"
            )
        scale = found.get("input_scale", torch.empty(0))
        return QuantizationParameters(scale, found.get("input_zero_point"), found.get("input_global_scale"))

    def norm_parameters(self, norm: str) -> dict[str, torch.Tensor]:
        """The checkpoint's parameters of a norm that it changes, float32."""
        return {own: self.tensor(theirs).float() for own, theirs in self.changed[norm].items()}

    def refusal(self, op_name: str, op_type: str) -> str:
        """Why an op cannot have this scheme; empty if it can."""
        if op_type != "Linear":
            return f"the scheme of a checkpoint covers Linears, and this op is of the type {op_type}"
        return "" if op_name in self.schemes else "the checkpoint leaves the op unquantized"


def folder_of(checkpoint: str, bar: Any = None) -> Path:
    """The folder of a checkpoint; one of the hub is fetched, unless it is there already.

    Args:
        checkpoint: a folder, or owner/name@commit.
        bar: a tqdm class for the progress bars of a download.

    Raises:
        InputError: there is no such folder, or the hub does not give the files.
    """
    place = repository_at(checkpoint)
    if not place:
        if not os.path.isdir(checkpoint):
            raise InputError(f"{checkpoint}: no such folder; name the folder of a checkpoint, or owner/name@commit")
        return Path(checkpoint)
    from auto_quantize_model.models import hub

    link = LINKS / f"{place[0].replace('/', '--')}--{place[1]}"
    if not link.is_dir():
        if os.path.lexists(link) and not link.is_symlink():
            raise InputError(f"{link}: not the link that {checkpoint} needs there; move the file away")
        hub.link_snapshot(hub.fetch_snapshot(*place, bar), link)
    return link


def read_checkpoint(place: str, folder: Path, model: Any) -> Checkpoint:
    """A checkpoint by its config and the headers of its files, after a check that it is one of the model.

    Args:
        place: the checkpoint as the config names it, for messages.
        folder: of its files.
        model: of transformers, FP32.

    Raises:
        InputError: the files are damaged, no checkpoint of compressed-tensors, or of another model. Or the checkpoint
            holds something that is not covered, such as rotations.
    """
    config = read_object(folder / "config.json")
    if config.get("architectures") != [type(model).__name__]:
        raise InputError(
            f"{place}: the checkpoint is of the architecture {config.get('architectures')}, and the model is a"
            f" {type(model).__name__}; name a checkpoint of this model"
        )
    quantization = read_quantization(place, config)
    headers = read_headers(folder)
    unmeasured: tuple[str, ...] = ()
    if quantization.kv_cache_scheme is not None:
        headers = {name: tensor for name, tensor in headers.items() if name.rpartition(".")[2] not in OF_CACHE}
        unmeasured = ("the checkpoint quantizes the KV cache too, which is not measured",)
    of_modules: dict[str, dict[str, str]] = defaultdict(dict)
    for stored in headers:
        module, _, leaf = stored.rpartition(".")
        of_modules[module][leaf] = stored
    quantized = {module: leaves for module, leaves in of_modules.items() if OF_QUANTIZED & leaves.keys()}
    require_known(place, quantized)
    others = [name for name in headers if name.rpartition(".")[0] not in quantized]
    ours = our_names(place, [*others, *(f"{module}.weight" for module in quantized)], model)
    modules, schemes, tensors = dict(model.named_modules()), {}, {}
    for module, leaves in sorted(quantized.items()):
        name = ours[f"{module}.weight"].removesuffix(".weight")
        if name not in modules:
            raise InputError(f"{place}: the model has no module {name}; name a checkpoint of this model")
        schemes[name] = scheme_of_module(place, quantization, (module, name), modules[name])
        tensors[name] = leaves
    return Checkpoint(
        place,
        folder,
        schemes,
        tensors,
        {ours[name]: name for name in others},
        headers,
        {name: group.model_dump(mode="json") for name, group in groups_of(quantization).items()},
        unmeasured,
    )


def read_quantization(place: str, config: Mapping[str, Any]) -> QuantizationConfig:
    """The quantization that a config.json of a checkpoint describes.

    Raises:
        InputError: compressed-tensors did not quantize the checkpoint, or something in it is not covered.
    """
    found = next((config[key] for key in CONFIG_KEYS if isinstance(config.get(key), dict)), None)
    if found is None:
        raise InputError(f"{place}: config.json has no {CONFIG_KEYS[0]}; name a checkpoint that is quantized")
    if found.get("quant_method") != METHOD:
        raise InputError(
            f"{place}: quantized by {found.get('quant_method')!r}, and only {METHOD} is covered; convert the checkpoint"
        )
    for key in ("transform_config", "sparsity_config", "moe_sparsity_config"):
        value = found.get(key)
        if value and not (isinstance(value, dict) and value.get("format") == "dense"):
            raise InputError(f"{place}: the checkpoint has a {key}, which is not covered; name one without it")
    try:
        quantization = QuantizationConfig.model_validate(found)
    except (ValidationError, KeyError, NotImplementedError, TypeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(str(part) for part in (CONFIG_KEYS[0], *first["loc"]))
        raise InputError(f"{place}: {where}: {first['msg']}; compressed-tensors cannot read this checkpoint") from None
    if quantization.quantization_status != QuantizationStatus.COMPRESSED:
        raise InputError(
            f"{place}: the checkpoint's quantization_status is {quantization.quantization_status.value}, so its weights"
            " are not compressed; save it compressed"
        )
    for name, group in groups_of(quantization).items():
        if group.output_activations is not None or group.weights is None:
            side = "outputs" if group.weights is not None else "inputs alone"
            raise InputError(f"{place}: {name} quantizes {side}, which is not covered; name a checkpoint without that")
    return quantization


def groups_of(quantization: QuantizationConfig) -> dict[str, QuantizationScheme]:
    """The groups of a config; the library has made schemes of the presets among them."""
    groups: Any = quantization.config_groups
    found: dict[str, QuantizationScheme] = groups
    return found


def require_known(place: str, quantized: Mapping[str, Mapping[str, str]]) -> None:
    """Refuse a quantized module with a tensor that decompression would not read, such as `weight_g_idx`.

    Raises:
        InputError: the message names the tensors.
    """
    unknown = [name for leaves in quantized.values() for leaf, name in leaves.items() if leaf not in OF_MODULE]
    if unknown:
        raise InputError(
            f"{place}: {listed(unknown)}: tensors that compressed-tensors does not read from a quantized Linear; name a"
            " checkpoint without them"
        )


def our_names(place: str, stored: Iterable[str], model: Any) -> dict[str, str]:
    """{name in the files: name in the model}, as transformers renames weights.

    Raises:
        InputError: transformers merges tensors into one weight, or two tensors fill one weight.
    """
    stored = list(stored)
    found = stored_names(stored, model)
    if doubles := [name for name, names in found.items() if len(names) > 1]:
        raise InputError(f"{place}: two tensors for one weight: {listed(doubles)}; name a checkpoint of this model")
    ours = {names[0]: name for name, names in found.items()}
    if merged := [name for name in stored if name not in ours]:
        raise InputError(
            f"{place}: {listed(merged)}: weights that transformers merges into one are not covered; name a checkpoint"
            " without them"
        )
    return ours


def scheme_of_module(
    place: str, quantization: QuantizationConfig, names: Sequence[str], module: torch.nn.Module
) -> QuantizationScheme:
    """The scheme of a quantized module, by the library's matching, with the format of its tensors.

    Args:
        names: of the module, in the files and in the model; the config may hold either.

    Raises:
        InputError: no group of the config matches the module, or the library does not read its format.
    """
    targets = {target: group for group in groups_of(quantization).values() for target in group.targets}
    for name in names:
        if is_match(name, module, targets, quantization.ignore or ()):
            scheme: QuantizationScheme = targets[match_targets(name, module, targets)[0]].model_copy(deep=True)
            of_all = quantization.format if quantization.format != CompressionFormat.mixed_precision.value else None
            stored = scheme.format or of_all or infer_module_format(type(module), scheme)
            if stored not in FORMATS:
                raise InputError(
                    f"{place}: {names[0]} is stored in the format {stored}, and compressed-tensors reads"
                    f" {', '.join(FORMATS)}; name a checkpoint in one of these"
                )
            scheme.format = CompressionFormat(stored)
            return scheme
    raise InputError(
        f"{place}: {names[0]} has quantized tensors, and no group of the checkpoint's config matches it; correct"
        " config.json"
    )


def described(checkpoint: Checkpoint, ops: Sequence[str], model: Any, batches: Sequence[Any]) -> dict[str, Any]:
    """The fields of a plan's scheme: what the checkpoint is, which norms go with ops, and warnings.

    Args:
        ops: the planned Linears.
        batches: those that are scored; they show which norm feeds which op.

    Raises:
        InputError: the checkpoint changes the model outside of its quantized ops, or holds other shapes.
    """
    changed = changed_parameters(checkpoint, model)
    feeding = require_fed(checkpoint, changed, ops, model, batches)
    warnings = [*checkpoint.unmeasured]
    if other := sorted(checkpoint.schemes.keys() - set(ops)):
        warnings.append(f"the checkpoint quantizes {listed(other)}, which the plan does not measure")
    scaled = scaled_ops(checkpoint, [name for name in ops if name in checkpoint.schemes], feeding, changed, model)
    if scaled:
        warnings.append(
            f"the weights of {listed(scaled)} are scaled against the model's own. Smoothing from one op into another"
            " leaves that, and such ops belong together: the score of one alone counts the missing half"
        )
    return {
        "checkpoint": checkpoint.place,
        "folder": os.fspath(checkpoint.folder),
        "files": [vars(file) for file in files_of(checkpoint)],
        "groups": checkpoint.groups,
        "norms": {norm: sorted(fed) for norm, (fed, _) in feeding.items()},
        "scaled": scaled,
        "warnings": warnings,
    }


def files_of(checkpoint: Checkpoint) -> list[SnapshotFile]:
    """The files that a checkpoint is read from, with their content's sha256.

    Raises:
        InputError: a file of the hub's cache is not the hub's.
    """
    names = ["config.json", *sorted({tensor.file for tensor in checkpoint.headers.values()})]
    names += [WEIGHTS_INDEX] if (checkpoint.folder / WEIGHTS_INDEX).exists() else []
    paths = {name: checkpoint.folder / name for name in names}
    found = [SnapshotFile(name, path.stat().st_size, sha256_file(path)) for name, path in paths.items()]
    if repository_at(checkpoint.place):
        from auto_quantize_model.models import hub

        hub.check_against_hub(checkpoint.folder, {file.name: file.sha256 for file in found})
    return found


def open_checkpoint(fields: Mapping[str, Any], model: Any) -> Checkpoint:
    """The checkpoint of a plan's scheme, after a check that its files are those of the plan.

    Raises:
        InputError: a file is missing or changed, or as `read_checkpoint` says.
    """
    folder = Path(fields["folder"])
    again = "restore the file, or make the plan again (snakemake --cores 1 --forcerun plan_quantization)"
    for file in fields["files"]:
        path = folder / file["name"]
        if not path.is_file():
            raise InputError(f"{path}: listed in the plan but missing; {again}")
        if path.stat().st_size != file["bytes"] or sha256_file(path) != file["sha256"]:
            raise InputError(f"{path}: differs from the sha256 in the plan; {again}")
    checkpoint = read_checkpoint(fields["checkpoint"], folder, model)
    for norm, ops in fields["norms"].items():
        prefix = f"{norm}."
        parameters = {name: theirs for name, theirs in checkpoint.others.items() if name.startswith(prefix)}
        checkpoint.changed[norm] = {name.removeprefix(prefix): theirs for name, theirs in parameters.items()}
        checkpoint.norms.update(dict.fromkeys(ops, norm))
    return checkpoint


def changed_parameters(checkpoint: Checkpoint, model: Any) -> dict[str, list[str]]:
    """{module: its parameters whose values differ from the model's}, outside of quantized modules.

    A value that is the model's after rounding to the stored type does not differ.

    Raises:
        InputError: the checkpoint lacks a parameter, has one that the model lacks, or has another shape.
    """
    place, own = checkpoint.place, model.state_dict()
    there = set(checkpoint.others) | {
        f"{module}.{leaf}"
        for module, stored in checkpoint.tensors.items()
        for leaf in {*stored, "weight"} - OF_QUANTIZED
    }
    tied = model.all_tied_weights_keys
    if missing := [name for name in own if name not in there and tied.get(name) not in there]:
        raise InputError(f"{place}: the files lack {listed(missing)}; name a checkpoint of this model")
    if unexpected := sorted(there - set(own)):
        raise InputError(f"{place}: the model has no {listed(unexpected)}; name a checkpoint of this model")
    changed = defaultdict(list)
    for name, stored in checkpoint.others.items():
        if checkpoint.headers[stored].shape != tuple(own[name].shape):
            raise InputError(
                f"{place}: {name} is {list(checkpoint.headers[stored].shape)}, and the model's is"
                f" {list(own[name].shape)}; name a checkpoint of this model"
            )
        found = checkpoint.tensor(stored)
        if not torch.equal(found, own[name].to(found.dtype)) and not torch.equal(found.to(own[name].dtype), own[name]):
            module, _, leaf = name.rpartition(".")
            changed[module].append(leaf)
    return dict(changed)


Feeding = dict[str, tuple[set[str], tuple[Any, ...]]]  # {norm: (the ops that it feeds, its last input)}


def require_fed(
    checkpoint: Checkpoint, changed: Mapping[str, list[str]], ops: Sequence[str], model: Any, batches: Sequence[Any]
) -> Feeding:
    """The ops that take a changed norm along: its output is their input.

    Raises:
        InputError: another parameter than those of such a norm differs, or such a norm feeds a module that the
            checkpoint leaves unquantized. The message names the parameters.
    """
    modules = dict(model.named_modules())
    norms = [
        name
        for name in changed
        if not list(modules[name].children()) and all(p.ndim == 1 for p in modules[name].parameters())
    ]
    found = fed_by(model, norms, batches)
    refused: dict[str, str] = {}
    for name, leaves in changed.items():
        fed = found.get(name, (set(), ()))[0]
        stay = sorted(other for other in fed if other not in checkpoint.schemes or other not in ops)
        if not fed or stay:
            why = f", and its output goes to {listed(stay)}, which is not a quantized op" if stay else ""
            refused |= {f"{name}.{leaf}": why for leaf in leaves}
    if refused:
        raise InputError(
            f"{checkpoint.place}: the checkpoint changes {listed(refused)}{next(iter(refused.values()))}. No op can"
            " take this change along, so the scores would be those of another model; name a checkpoint without it"
        )
    return found


def fed_by(model: Any, norms: Sequence[str], batches: Sequence[Any]) -> Feeding:
    """The modules whose input is the output of each norm, the same tensor, and the norm's last input.

    A norm that runs more than once in a forward is left out, because its last input would not be that of each op.
    """
    found: Feeding = {}
    outputs: dict[str, torch.Tensor] = {}
    repeated: set[str] = set()
    other: dict[str, set[str]] = defaultdict(set)  # modules that had another input at least once

    def remember(name: str) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            repeated.update({name} & outputs.keys())
            outputs[name] = output
            found[name] = (found.get(name, (set(), ()))[0], args)

        return hook

    def compare(name: str) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for norm, output in outputs.items():
                if any(is_same(value, output) for value in (*args, *kwargs.values())):
                    found[norm][0].add(name)
                else:
                    other[norm].add(name)

        return hook

    if not norms:
        return found
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name in norms:
                stack.callback(module.register_forward_hook(remember(name)).remove)
            elif not list(module.children()) and not isinstance(module, torch.nn.Dropout | torch.nn.Identity):
                stack.callback(module.register_forward_pre_hook(compare(name), with_kwargs=True).remove)
        with torch.no_grad():
            for batch in batches:
                model(**batch)
                outputs.clear()
    return {norm: (fed - other[norm], args) for norm, (fed, args) in found.items() if norm not in repeated}


def is_same(value: Any, output: torch.Tensor) -> bool:
    """Whether a value is `output`, or a view of all its values, such as a slice of all positions."""
    return (
        isinstance(value, torch.Tensor)
        and value.data_ptr() == output.data_ptr()
        and (value.shape, value.stride(), value.dtype) == (output.shape, output.stride(), output.dtype)
    )


def scaled_ops(
    checkpoint: Checkpoint,
    ops: Iterable[str],
    feeding: Feeding,
    changed: Mapping[str, list[str]],
    model: Any,
) -> list[str]:
    """The ops whose weight has rows or columns that are multiples of the model's own, as folded smoothing leaves.

    Every op is decompressed once here, so a damaged op is refused in the plan.

    Raises:
        InputError: a weight has another shape than the model's, or is not finite, or cannot be decompressed.
    """
    modules = dict(model.named_modules())
    norm_of = {op: norm for norm, (fed, _) in feeding.items() for op in fed}
    found = []
    for name in ops:
        checkpoint.inputs(name)
        weight, own = checkpoint.weight(name), modules[name].weight.detach()
        if weight.shape != own.shape:
            raise InputError(
                f"{checkpoint.place}: the weight of {name} is {list(weight.shape)}, and the model's is"
                f" {list(own.shape)}; name a checkpoint of this model"
            )
        if not weight.isfinite().all():
            raise InputError(f"{checkpoint.place}: the weight of {name} is not finite; write the checkpoint again")
        if norm := norm_of.get(name):
            own = own * ratio_of(checkpoint, norm, feeding[norm][1], changed[norm], modules[norm])
        if any(is_scaled(weight, own, axis) for axis in (0, 1)):
            found.append(name)
    return found


def ratio_of(
    checkpoint: Checkpoint, norm: str, args: tuple[Any, ...], leaves: Sequence[str], module: torch.nn.Module
) -> torch.Tensor:
    """How much smaller each column of a changed norm's output is: the factor that makes up for it in a weight."""
    parameters = {leaf: checkpoint.tensor(checkpoint.others[f"{norm}.{leaf}"]).float() for leaf in leaves}
    with torch.no_grad():
        before = module(*args).flatten(0, -2)
        after = torch.func.functional_call(module, parameters, args).flatten(0, -2)
    found: torch.Tensor = (before * after).sum(0) / after.square().sum(0)
    return found


def is_scaled(weight: torch.Tensor, own: torch.Tensor, axis: int) -> bool:
    """Whether the rows (axis 1) or columns (axis 0) of a weight are multiples of those of another weight."""
    products, squares = (weight * own).sum(axis), own.square().sum(axis)
    factors = products / squares
    clear = products / (squares * weight.square().sum(axis)).sqrt() > CLEAR
    low, high = FACTORS
    return bool((clear & ((factors < low) | (factors > high))).float().mean() > SHARE)
