"""A state of a model as a checkpoint of compressed-tensors, as transformers and vLLM read one.

In: a snapshot, a state with schemes of compressed-tensors, and the calibration's ranges. Out: a folder with safetensors,
config, tokenizer and processor. One weight at a time is read and quantized, and a shard is written as soon as it is
full. All that the library stores in floating point is BF16, and so are the unquantized weights.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor, compress_module
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus
from compressed_tensors.quantization.lifecycle.initialize import initialize_module_for_quantization
from safetensors import safe_open
from safetensors.torch import save_file

from auto_quantize_model.files import InputError, write_json
from auto_quantize_model.models.snapshot import empty_model, snapshot_files
from auto_quantize_model.models.weights import (
    FLOATS,
    WEIGHTS,
    WEIGHTS_INDEX,
    listed,
    read_headers,
    read_object,
    stored_names,
)
from auto_quantize_model.records import Plan, Scales
from auto_quantize_model.replay.by_name import schemes_of
from auto_quantize_model.schemes.compressed import (
    QuantizationParameters,
    global_scale,
    input_parameters,
    put_parameters,
    weight_parameters,
)
from auto_quantize_model.schemes.scheme import Assignment

SHARD_BYTES = 1 << 30  # a shard is in memory until it is full
COPIED = {".json", ".jinja", ".model", ".tiktoken", ".txt"}  # tokenizer, processor, chat template, generation settings
CONFIG = "config.json"
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Source:
    """A snapshot with the schemes that its ops get.

    Attributes:
        directory: the snapshot.
        plan: of its model.
        assignment: {op_name: scheme}, with schemes of compressed-tensors alone.
        scales: of the calibration that sets the ranges of static inputs.
    """

    directory: Path
    plan: Plan
    assignment: Assignment
    scales: Scales

    @cached_property
    def headers(self) -> dict[str, Any]:
        """The tensors of the snapshot, by their names in the files."""
        return read_headers(self.directory)

    @cached_property
    def model(self) -> Any:
        """The model without weights, by whose modules the tensors are named."""
        return empty_model(self.directory)

    @cached_property
    def names(self) -> dict[str, str]:
        """{weight of the model: its name in the files}. Weights that transformers merges from several are left out."""
        return {ours: names[0] for ours, names in stored_names(self.headers, self.model).items()}

    @cached_property
    def schemes(self) -> dict[str, QuantizationScheme]:
        """{op_name: its scheme}.

        Raises:
            InputError: an op's scheme is that of a checkpoint or INC's, or its weight is no tensor of the snapshot.
        """
        known = schemes_of(self.plan.schemes, self.model)
        for name, scheme in self.assignment.items():
            if not isinstance(known.get(scheme), QuantizationScheme):
                raise InputError(f"{name}: {scheme} is no scheme that a checkpoint can be written in; use a preset")
            if f"{name}.weight" not in self.names:
                raise InputError(
                    f"{name}: {self.directory} holds no tensor with the weight of this op alone, so the op cannot be"
                    " stored quantized; keep the op unquantized with decide.fixed"
                )
        return {name: known[scheme] for name, scheme in self.assignment.items()}

    @cached_property
    def ops(self) -> dict[str, str]:
        """{name of a quantized op's weight in the files: op_name}."""
        return {self.names[f"{name}.weight"]: name for name in self.schemes}

    @cached_property
    def written(self) -> list[str]:
        """The tensors that are written, in the order of the files; a second copy of a tied weight is not."""
        tied = self.model.all_tied_weights_keys.items()
        doubles = {self.names[copy] for copy, own in tied if copy in self.names and own in self.names}
        return [name for name in self.headers if name not in doubles]

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor by its name in the files: BF16 if it is floating-point, else as it is."""
        with safe_open(self.directory / self.headers[name].file, framework="pt") as file:
            found: torch.Tensor = file.get_tensor(name)
        return found.to(DTYPE) if self.headers[name].dtype in FLOATS else found

    def weight(self, op_name: str) -> torch.Tensor:
        """The weight of an op, (rows, columns), BF16."""
        return self.tensor(self.names[f"{op_name}.weight"])

    @cached_property
    def _shared(self) -> dict[str, torch.Tensor]:
        return {}

    def parameters(self, op_name: str, weight: torch.Tensor) -> QuantizationParameters:
        """What an op's weight is quantized with; the ops of a unit share a global scale, which is found once."""
        args = self.schemes[op_name].weights
        if args.strategy != "tensor_group":
            return weight_parameters(weight, args)
        units = {op.op_name: op.unit for op in self.plan.ops}
        unit = units[op_name]
        if unit not in self._shared:
            self._shared[unit] = global_scale(self.weight(name) for name, of in units.items() if of == unit)
        return weight_parameters(weight, args, self._shared[unit])

    def compressed(self, op_name: str) -> dict[str, torch.Tensor]:
        """The tensors of a quantized op as the library stores them, by their names in the module, without the bias.

        Raises:
            InputError: the op's inputs are static, and the calibration saw none.
        """
        weight, scheme = self.weight(op_name), self.schemes[op_name].model_copy(deep=True)
        found = {"weight": self.parameters(op_name, weight)}
        inputs, seen = scheme.input_activations, self.scales.get(op_name)
        if inputs and inputs.dynamic is not True:
            if not (seen and seen.input):
                raise InputError(
                    f"{op_name}: {self.assignment[op_name]} has static inputs, and the calibration saw no input of this"
                    " op; take samples that reach the op, or a scheme with dynamic inputs"
                )
            found["input"] = input_parameters(seen.input.minimum, seen.input.maximum, inputs, DTYPE)
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=DTYPE)
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        initialize_module_for_quantization(linear, scheme)
        for side, parameters in found.items():
            put_parameters(linear, side, parameters)
        linear.quantization_status = QuantizationStatus.FROZEN
        compress_module(linear)
        return linear.state_dict()


def write_checkpoint(
    source: Source, folder: Path, on_tensor: Callable[[int, int], None] = lambda done, total: None
) -> int:
    """Write a checkpoint into an empty folder.

    Args:
        source: the snapshot and its schemes.
        folder: where to write.
        on_tensor: called after each tensor of the snapshot with the number done and the total.

    Returns:
        The bytes of all tensors.

    Raises:
        InputError: as `Source.schemes` and `Source.compressed` say.
    """
    shards, names = Shards(folder), source.written
    ops = source.ops
    for done, name in enumerate(names, 1):
        if op_name := ops.get(name):
            for leaf, tensor in source.compressed(op_name).items():
                shards.add(f"{name.removesuffix('weight')}{leaf}", tensor)
        else:
            shards.add(name, source.tensor(name))
        on_tensor(done, len(names))
    shards.close()
    config = in_bf16(read_object(source.directory / CONFIG))
    write_json(folder / CONFIG, config)
    ModelCompressor(quantization_config=quantization_config(source)).update_config(str(folder))
    copy_others(source.directory, folder)
    return shards.bytes


class Shards:
    """The safetensors files of a checkpoint: one file, or several with an index.

    Args:
        folder: where to write.
        limit: a shard is written as soon as its tensors would take more bytes.
    """

    def __init__(self, folder: Path, limit: int = SHARD_BYTES) -> None:
        self.folder, self.limit = folder, limit
        self.tensors: dict[str, torch.Tensor] = {}
        self.files: list[list[str]] = []  # the names of the tensors in each file
        self.bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add a tensor."""
        if self.tensors and sum(other.nbytes for other in self.tensors.values()) + tensor.nbytes > self.limit:
            self._write()
        self.tensors[name] = tensor.contiguous()
        self.bytes += tensor.nbytes

    def _write(self) -> None:
        save_file(self.tensors, self.folder / f"{len(self.files)}.safetensors", metadata={"format": "pt"})
        self.files.append(list(self.tensors))
        self.tensors = {}

    def close(self) -> None:
        """Write the last shard, and give the files the names that transformers expects."""
        self._write()
        count = len(self.files)
        names = [f"model-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1)]
        names = names if count > 1 else [WEIGHTS]
        for index, name in enumerate(names):
            (self.folder / f"{index}.safetensors").rename(self.folder / name)
        if count > 1:
            places = {tensor: name for name, of_file in zip(names, self.files, strict=True) for tensor in of_file}
            write_json(self.folder / WEIGHTS_INDEX, {"metadata": {"total_size": self.bytes}, "weight_map": places})


def in_bf16(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that says of each part that its weights are BF16."""
    changed = {key: in_bf16(value) if isinstance(value, dict) else value for key, value in config.items()}
    return changed | {key: "bfloat16" for key in ("dtype", "torch_dtype") if key in config}


def quantization_config(source: Source) -> QuantizationConfig:
    """The library's config: a group for each scheme with its ops by name, and all other Linears ignored by name.

    vLLM refuses a Linear that is neither in a group nor ignored. A module has a name in transformers, and may have
    another in the published files, from which vLLM makes its own. Where the two differ, both are written.
    """
    linears = [name for name, module in source.model.named_modules() if isinstance(module, torch.nn.Linear)]
    groups: dict[str, QuantizationScheme | list[str]] = {}
    for name in dict.fromkeys(source.assignment.values()):
        ops = [op for op, scheme in source.assignment.items() if scheme == name]
        scheme = source.schemes[ops[0]]
        update = {"targets": both_names(source, ops), "format": infer_module_format(torch.nn.Linear, scheme)}
        groups[f"group_{len(groups)}"] = scheme.model_copy(deep=True, update=update)
    formats = {group.format.value for group in groups.values() if isinstance(group, QuantizationScheme)}
    return QuantizationConfig(
        config_groups=groups,
        format=formats.pop() if len(formats) == 1 else CompressionFormat.mixed_precision.value,
        ignore=both_names(source, [name for name in linears if name not in source.assignment]),
        quantization_status=QuantizationStatus.COMPRESSED,
    )


def both_names(source: Source, modules: list[str]) -> list[str]:
    """The names of modules in transformers, and their other names in the files."""
    stored = [source.names.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight") for name in modules]
    return list(dict.fromkeys([*modules, *stored]))


def copy_others(snapshot: Path, folder: Path) -> None:
    """Copy the files of a snapshot that are neither weights nor the model's config."""
    for path in snapshot_files(snapshot):
        name = path.relative_to(snapshot)
        if path.suffix in COPIED and str(name) not in (CONFIG, WEIGHTS_INDEX):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)


def why_other_bytes(source: Source, written: int, promised: int) -> str:
    """Why a checkpoint takes other bytes than the profile says; empty if it takes the same.

    Raises:
        InputError: nothing explains the difference.
    """
    if written == promised:
        return ""
    parameters = {name for name, _ in source.model.named_parameters(remove_duplicate=False)}
    beside = [name for ours, name in source.names.items() if ours not in parameters and name in source.written]
    more = sum(source.tensor(name).nbytes for name in beside)
    if written - promised != more:
        raise InputError(
            f"the checkpoint's tensors take {written} bytes, and the profile says {promised}; do not use this profile,"
            " and report the difference with the plan"
        )
    return f"the snapshot holds {listed(beside)}, which are not weights of the model: {more} bytes"
