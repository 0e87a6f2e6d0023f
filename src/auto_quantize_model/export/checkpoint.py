"""A state of a model as a checkpoint of compressed-tensors, as transformers and vLLM read one.

In: a snapshot, a state with schemes of compressed-tensors, and the calibration's ranges. Out: a folder with
safetensors, config, tokenizer and processor. One weight at a time is read and quantized, and a shard is written as soon
as it is full.

The checkpoint holds what was measured. Weights are quantized in FP32, scales are stored in FP32, and unquantized
weights keep the snapshot's type, so a snapshot in BF16 stays BF16. With all of this in BF16, the checkpoint would be
another model. Roundings to BF16 were tried on 16 held-out digits of `digits_vlm`: of scales, of input ranges, and of
weights before or after they are quantized. A mix of schemes has a KL divergence of 0.0012 nats as measured, and of
0.0005 to 0.0014 with one rounding or several. All ops in NVFP4 have 0.0071, and 0.0057 to 0.0109. The standard errors
over samples are 0.00005 and 0.0004. They do not cover this, because a rounding shifts all samples together.
"""

import shutil
from collections import Counter
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
    WEIGHTS,
    WEIGHTS_INDEX,
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
# Why a checkpoint takes more bytes than one in BF16.
IN_FP32 = "scales are stored in FP32"
UNROUNDED = "unquantized weights keep the snapshot's type"
NO_WEIGHT = "the snapshot holds tensors that are no weights of the model"


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
            InputError: an op has the scheme of a checkpoint or of INC, or the snapshot has no tensor for its weight. Or
                the model as it loads holds the op in no Linear.
        """
        known, modules = schemes_of(self.plan.schemes, self.model), dict(self.model.named_modules())
        for name, scheme in self.assignment.items():
            if not isinstance(known.get(scheme), QuantizationScheme):
                raise InputError(f"{name}: a checkpoint cannot be written in the scheme {scheme}; use a preset")
            if f"{name}.weight" not in self.names:
                raise InputError(
                    f"{name}: {self.directory} holds no tensor with the weight of this op alone, so the op cannot be"
                    " stored quantized; keep the op unquantized with decide.fixed"
                )
            if not isinstance(modules[name], torch.nn.Linear):  # the weight of a Conv1D is (columns, rows)
                raise InputError(
                    f"{name}: the model loads it as a {type(modules[name]).__name__}, and a checkpoint holds quantized"
                    " weights of a Linear alone; keep the op unquantized with decide.fixed"
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

    @cached_property
    def others(self) -> set[str]:
        """The tensors in the files that are no weights of the model, such as buffers."""
        weights = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        return {name for ours, name in self.names.items() if ours not in weights}

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor by its name in the files."""
        with safe_open(self.directory / self.headers[name].file, framework="pt") as file:
            found: torch.Tensor = file.get_tensor(name)
        return found

    def weight(self, op_name: str) -> torch.Tensor:
        """The weight of an op, (rows, columns), float32."""
        return self.tensor(self.names[f"{op_name}.weight"]).float()

    @cached_property
    def _shared(self) -> dict[str, torch.Tensor]:
        return {}

    def parameters(self, op_name: str, weight: torch.Tensor) -> QuantizationParameters:
        """What an op's weight is quantized with; the ops of a unit share a global scale, which is found once."""
        args = self.schemes[op_name].weights
        if args.strategy != "tensor_group":
            return weight_parameters(weight, args)
        units = {op.op_name: op.matrix for op in self.plan.ops}
        unit = units[op_name]
        if unit not in self._shared:
            self._shared[unit] = global_scale(self.weight(name) for name, of in units.items() if of == unit)
        return weight_parameters(weight, args, self._shared[unit].clone())  # a file holds no memory twice

    def inputs(self, op_name: str) -> QuantizationParameters | None:
        """What an op's inputs are quantized with, float32; None where each input has a scale of its own.

        Raises:
            InputError: the inputs are static, and the calibration saw none.
        """
        args, seen = self.schemes[op_name].input_activations, self.scales.get(op_name)
        if not args or args.dynamic is True:
            return None
        if not (seen and seen.input):
            raise InputError(
                f"{op_name}: {self.assignment[op_name]} has static inputs, and the calibration saw none; take samples"
                " that reach the op, or a scheme with dynamic inputs"
            )
        return input_parameters(seen.input.minimum, seen.input.maximum, args, torch.float32)

    def compressed(self, op_name: str) -> dict[str, torch.Tensor]:
        """The tensors of a quantized op as the library stores them, by their names in the module, without the bias."""
        weight, scheme = self.weight(op_name), self.schemes[op_name].model_copy(deep=True)
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        initialize_module_for_quantization(linear, scheme)
        put_parameters(linear, "weight", self.parameters(op_name, weight))
        if inputs := self.inputs(op_name):
            put_parameters(linear, "input", inputs)
        linear.quantization_status = QuantizationStatus.FROZEN
        compress_module(linear)
        return linear.state_dict()


@dataclass(frozen=True)
class Written:
    """What a checkpoint takes.

    Attributes:
        bytes: of all tensors.
        more: {reason: bytes that the tensors take more than the profile's count, which is of a checkpoint in BF16}.
    """

    bytes: int
    more: dict[str, int]


def write_checkpoint(
    source: Source, folder: Path, on_tensor: Callable[[int, int], None] = lambda done, total: None
) -> Written:
    """Write a checkpoint into an empty folder.

    Args:
        source: the snapshot and its schemes.
        folder: where to write.
        on_tensor: called after each tensor of the snapshot with the number done and the total.

    Raises:
        InputError: as `Source.schemes` and `Source.inputs` say.
    """
    for op_name in source.schemes:
        source.inputs(op_name)  # refuses an op before the long work
    ops, names, shards = source.ops, source.written, Shards(folder)
    more: Counter[str] = Counter()
    for done, name in enumerate(names, 1):
        if name in ops:
            for leaf, tensor in source.compressed(ops[name]).items():
                shards.add(f"{name.removesuffix('weight')}{leaf}", tensor)
                if leaf in ("weight_scale", "input_scale") and tensor.dtype == torch.float32:
                    more[IN_FP32] += 2 * tensor.numel()
        else:
            tensor = source.tensor(name)
            shards.add(name, tensor)
            if name in source.others:
                more[NO_WEIGHT] += tensor.nbytes
            else:
                more[UNROUNDED] += tensor.nbytes - 2 * tensor.numel()
        on_tensor(done, len(names))
    shards.close()
    write_json(folder / CONFIG, in_bf16({"dtype": None, **read_object(source.directory / CONFIG)}))
    ModelCompressor(quantization_config=quantization_config(source)).update_config(str(folder))
    copy_others(source.directory, folder)
    return Written(shards.bytes, {reason: size for reason, size in more.items() if size})


def require_bytes(written: Written, promised: int) -> None:
    """Refuse a checkpoint that takes other bytes than a profile says, apart from those that have a reason.

    Raises:
        InputError: the message says both numbers.
    """
    found = written.bytes - sum(written.more.values())
    if found != promised:
        raise InputError(
            f"the checkpoint's tensors take {found} bytes in BF16, and the profile says {promised}; do not use this"
            " profile, and report the difference with the plan"
        )


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
    """A config.json by which each part of the model computes in BF16, as vLLM does.

    transformers cannot compute an NVFP4 op in FP32, because it decompresses the weight to BF16.
    """
    changed = {key: in_bf16(value) if isinstance(value, dict) else value for key, value in config.items()}
    return changed | {key: "bfloat16" for key in ("dtype", "torch_dtype") if key in config}


def quantization_config(source: Source) -> QuantizationConfig:
    """The library's config: a group for each scheme with its ops by name, and all other Linears ignored by name.

    vLLM refuses a Linear that is neither in a group nor ignored. Modules have the names of transformers 5, which vLLM
    translates for the models with images. The ignored ones have the names of the published files as well; for a group
    these would each cause a warning of transformers.
    """
    linears = [name for name, module in source.model.named_modules() if isinstance(module, torch.nn.Linear)]
    groups: dict[str, QuantizationScheme | list[str]] = {}
    for name in dict.fromkeys(source.assignment.values()):
        ops = [op for op, scheme in source.assignment.items() if scheme == name]
        scheme = source.schemes[ops[0]]
        update = {"targets": ops, "format": infer_module_format(torch.nn.Linear, scheme)}
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
