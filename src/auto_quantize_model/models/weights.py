"""The weights of a snapshot: which files hold them, whether the files are sound, and whether they fill the model.

In: a snapshot directory, of which only the files' headers are read, and the model that its configuration describes. The
model takes no memory for weights (it is on torch's meta device). Out: names, types and shapes; or an InputError that
names the fault.
"""

import stat
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.distributed.checkpoint import is_sharded_checkpoint
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.loading_report import LoadStateDictInfo

from auto_quantize_model.files import InputError, parse_json

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
ROWS = 4096  # rows of an embedding that are compared at a time
FLOATS = {"F64", "F32", "F16", "BF16"}  # the types that transformers turns into FP32 without scales


@dataclass(frozen=True)
class Tensor:
    """A tensor as a header describes it: its type by safetensors' name, its shape, and the file's name."""

    dtype: str
    shape: tuple[int, ...]
    file: str


def require_readable(path: Path) -> None:
    """Refuse a path that is not a readable file: reading a pipe would never end.

    Raises:
        InputError: the message names the path and what lies there.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            path.open("rb").close()
            return
    except FileNotFoundError:
        problem = "a link to nothing" if path.is_symlink() else "no such file"
        raise InputError(f"{path}: {problem}; download the snapshot again") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); correct it or download it again") from None
    kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file but a pipe, a socket or a device"
    raise InputError(f"{path}: {kind}, where a file is expected; remove it or download the snapshot again")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a snapshot.

    Raises:
        InputError: the file is missing or cannot be read, or is not one JSON object with unique keys.
    """
    require_readable(path)
    try:
        return parse_object(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); restore the file") from None


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`, UTF-8; a config of transformers may hold `Infinity`.

    Raises:
        ValueError: the data is not such an object, or repeats a key, of which two readers may see different values.
    """
    document = parse_json(data.decode("utf-8"), infinity=True)
    if not isinstance(document, dict):
        raise ValueError(f"a {type(document).__name__}, where an object is expected")
    return document


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that transformers loads, after a check that they exist.

    transformers takes model.safetensors if it exists, and the files of the index otherwise. A directory with both is
    refused, because another tool may take the other.

    Raises:
        InputError: there are no weights, or they are pickle files or shards of a distributed checkpoint. Or the index
            is malformed, names a missing file, or lies next to model.safetensors.
    """
    single, index = directory / WEIGHTS, directory / WEIGHTS_INDEX
    if is_sharded_checkpoint(directory):
        raise InputError(
            f"{directory}: holds shards of a distributed checkpoint (shard-...-model-....safetensors), which"
            f" transformers would load instead of {WEIGHTS}; remove them, or save the model with model.save_pretrained"
        )
    if index.exists() or index.is_symlink():
        names = sorted(set(read_index(index).values()))
        missing = [name for name in names if not (directory / name).exists()]
        if missing:
            raise InputError(
                f"{directory}: {WEIGHTS_INDEX} names {', '.join(missing[:3])}, not there; download the snapshot again"
            )
        if not isinstance(read_object(index).get("metadata"), dict):
            raise InputError(f"{index}: no object under 'metadata', which transformers reads; add \"metadata\": {{}}")
        if single.exists() and names != [WEIGHTS]:
            raise InputError(
                f"{directory}: holds {WEIGHTS} and {WEIGHTS_INDEX}, which names other files; transformers would load"
                f" {WEIGHTS} alone. Remove the one that is not meant"
            )
        return [directory / name for name in names]
    if single.exists() or single.is_symlink():
        return [single]
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise InputError(
            f"{directory}: weights are pickle files ({', '.join(pickles)}), which can run code when read; convert them"
            " with model.save_pretrained(..., safe_serialization=True)"
        )
    raise InputError(f"{directory}: no {WEIGHTS} and no {WEIGHTS_INDEX}; download the snapshot again")


def read_index(path: Path) -> dict[str, str]:
    """The `weight_map` of an index: tensor name to file name.

    Raises:
        InputError: the index is malformed, or names a file outside the snapshot's own folder.
    """
    names = read_object(path).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{path}: no weight_map from tensor names to file names; download the snapshot again")
    for name in names.values():
        if not name.isprintable() or "\\" in name or Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(
                f"{path}: weight_map names the file {name!r}, which is not a .safetensors file of this folder; download"
                " the snapshot again"
            )
    return names


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by its header; the library checks types, shapes, offsets and the file's size.

    Raises:
        InputError: the file cannot be read, is not a safetensors file, is truncated, or describes a tensor twice.
    """
    require_readable(path)
    try:
        with safe_open(path, framework="pt"):  # reads the header alone
            pass
        with open(path, "rb") as file:
            header = parse_object(file.read(int.from_bytes(file.read(8), "little")))
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a safetensors file, or truncated ({error}); download it again") from None
    return {
        name: Tensor(entry["dtype"], tuple(entry["shape"]), path.name)
        for name, entry in header.items()
        if name != "__metadata__"
    }


def read_headers(directory: Path) -> dict[str, Tensor]:
    """All tensors that transformers loads from a snapshot, by name.

    Raises:
        InputError: as `weight_files` and `read_header` say; or index and files disagree about the tensors.
    """
    index = directory / WEIGHTS_INDEX
    tensors: dict[str, Tensor] = {}
    for path in weight_files(directory):
        for name, tensor in read_header(path).items():
            if name in tensors:
                raise InputError(
                    f"{directory}: {tensors[name].file} and {tensor.file} both hold {name}; download the snapshot again"
                )
            tensors[name] = tensor
    if index.exists():
        where = read_index(index)
        for name in sorted({*where, *tensors}):
            file = tensors[name].file if name in tensors else None
            if where.get(name) != file:
                raise InputError(
                    f"{directory}: {WEIGHTS_INDEX} puts {name} in {where.get(name, 'no file')}, and the files' headers"
                    f" in {file or 'none'}; download the snapshot again"
                )
    if not tensors:
        raise InputError(f"{directory}: the weight files hold no tensor; download the snapshot again")
    return tensors


def require_filled(directory: Path, tensors: dict[str, Tensor], model: PreTrainedModel) -> None:
    """Refuse a snapshot whose tensors are not exactly the weights of its model.

    transformers' own loader does the comparison, on the meta device. As in a real loading, it renames weights of older
    checkpoints, merges experts, ties weights, and ignores the tensors that the model's class says.

    Args:
        directory: the snapshot, for messages.
        tensors: as `read_headers` returns them.
        model: built on the meta device; it cannot be used afterwards.

    Raises:
        InputError: a weight is missing, unexpected, of another shape, given twice, or in a quantized type.
    """
    floating = {name for name, weight in model.state_dict().items() if weight.is_floating_point()}
    quantized = {name: tensor for name, tensor in tensors.items() if tensor.dtype not in FLOATS}
    if quantized:
        loading = load_shapes(model, quantized)
        if (floating - loading.missing_keys) | set(loading.conversion_errors):
            dtypes = ", ".join(sorted({tensor.dtype for tensor in quantized.values()}))
            raise InputError(
                f"{directory}: {listed(quantized)} of type {dtypes}, where the model has floating-point weights:"
                " already quantized, and meaningless without their scales; use the snapshot before its quantization"
            )
    refuse_doubles(directory, tensors, model)
    loading = load_shapes(model, tensors)
    require_complete(directory, loading.to_dict() | {"conversion_errors": loading.conversion_errors})


def load_shapes(model: PreTrainedModel, tensors: dict[str, Tensor]) -> LoadStateDictInfo:
    """What transformers reports when it loads tensors of these names and shapes into a model on the meta device."""
    state = {name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors.items()}
    mapping: Any = get_model_conversion_mapping(model)
    for entry in mapping:
        if isinstance(entry, WeightConverter):
            entry.force_cpu = False  # true where a weight is too large for an accelerator
    options = LoadStateDictConfig(device_map={"": "meta"}, dtype=torch.float32, weight_mapping=mapping)
    loading: LoadStateDictInfo
    loading, _ = convert_and_load_state_dict_in_model(model=model, state_dict=state, load_config=options)
    model.tie_weights(missing_keys=loading.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(loading)
    return loading


def stored_names(tensors: Iterable[str], model: PreTrainedModel) -> dict[str, list[str]]:
    """{weight of the model: names of the tensors that fill it alone}; parts of a merged weight are left out."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    expected = model.state_dict()
    sources = defaultdict(list)
    for name in tensors:
        renamed, merged = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        if merged is None:
            sources[renamed].append(name)
    return sources


def refuse_doubles(directory: Path, tensors: dict[str, Tensor], model: PreTrainedModel) -> None:
    """Refuse two tensors for one weight: two names of it, or two values of weights that the model ties.

    Otherwise transformers would silently take one of the two names, and would silently leave weights untied.
    """
    sources = stored_names(tensors, model)
    for renamed, names in sources.items():
        if len(names) > 1:
            raise InputError(
                f"{directory}: {' and '.join(sorted(names))} are both the weight {renamed}; remove the one not meant"
            )
    for target, source in model.all_tied_weights_keys.items():
        if target in sources and source in sources:
            (one,), (other,) = sources[target], sources[source]
            if not same_values(directory, tensors[one], one, tensors[other], other):
                raise InputError(
                    f"{directory}: {one} and {other} differ, and config.json ties them to one weight; set"
                    " tie_word_embeddings to false, or remove the one not meant"
                )


def same_values(directory: Path, one: Tensor, name: str, other: Tensor, other_name: str) -> bool:
    """Whether two stored tensors hold the same values; some of the rows are read at a time."""
    if one.shape != other.shape:
        return False
    with (
        safe_open(directory / one.file, framework="pt") as first,
        safe_open(directory / other.file, framework="pt") as second,
    ):
        rows, others = first.get_slice(name), second.get_slice(other_name)
        return all(
            torch.equal(rows[start : start + ROWS].float(), others[start : start + ROWS].float())
            for start in range(0, one.shape[0], ROWS)
        )


WRONG = {
    "missing_keys": ("the files lack", "would be random numbers; download the snapshot again, or correct config.json"),
    "mismatched_keys": ("of another shape in the files:", "config.json and the weights are of two models; correct one"),
    "conversion_errors": ("not convertible by transformers:", "download the snapshot again, or correct config.json"),
    "unexpected_keys": (
        "unexpected in the files:",
        "the model has no place for them: leftovers of a quantization or an adapter, or config.json is of another"
        " model; remove them, or correct config.json",
    ),
}


def require_complete(directory: Path, loading: dict[str, Any]) -> None:
    """Refuse a loading that did not fill a weight or did not use a tensor.

    Args:
        directory: the snapshot, for the message.
        loading: names of weights under the keys of `WRONG`, as transformers' `output_loading_info` gives them.

    Raises:
        InputError: the message names the first of them, with the shapes where these differ.
    """
    for problem, (text, consequence) in WRONG.items():
        names = loading.get(problem) or []
        if problem == "mismatched_keys":
            names = [f"{name} {list(found)} for {list(wanted)}" for name, found, wanted in names]
        if names:
            raise InputError(f"{directory}: {problem.replace('_', ' ')}: {text} {listed(names)}; {consequence}")


def listed(names: Iterable[str]) -> str:
    """The first three names, and how many more there are."""
    found = sorted(names)
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def require_meaningful(model: torch.nn.Module) -> None:
    """Refuse a model with a weight that is NaN or infinite, or whose weights are all zero.

    Raises:
        InputError: the message names the weights.
    """
    # In parts, because a weight of a gigabyte takes as much again for the comparison.
    broken = [
        name
        for name, weight in model.named_parameters()
        if not all(part.isfinite().all() for part in weight.flatten().split(1 << 24))
    ]
    if broken:
        raise InputError(f"weights that are not finite: {listed(broken)}; download the snapshot again")
    if not any(weight.any() for weight in model.parameters()):
        raise InputError("every weight of the model is zero; download the snapshot again")
