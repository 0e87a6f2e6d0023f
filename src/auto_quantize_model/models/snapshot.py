"""A Hugging Face snapshot directory: checked before long work, listed in a manifest, loaded as INC sees it.

In: a directory with config.json, safetensors, a tokenizer, an image processor config and a chat template.
Out: a manifest (sha256 per file), an FP32 model in eval mode, and the model's own tokenizer and image processor.
"""

import math
import mmap
import os
import re
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils.import_utils import is_torchvision_available

from auto_quantize_model.files import InputError, digest_of, sha256_file, visible
from auto_quantize_model.machine import require_memory
from auto_quantize_model.models.architecture import check_architecture
from auto_quantize_model.models.family import Parts, Processor
from auto_quantize_model.models.fx_safe import make_fx_safe
from auto_quantize_model.models.hidden_state import with_hidden_state
from auto_quantize_model.models.mapped import HALVES
from auto_quantize_model.models.mapped_files import mapped_weights
from auto_quantize_model.models.prepare import prepare
from auto_quantize_model.models.sample import Limits, Prepared, Sample
from auto_quantize_model.models.weights import (
    listed,
    read_headers,
    read_object,
    require_complete,
    require_filled,
    require_readable,
    stored_names,
)
from auto_quantize_model.records import ModelManifest, SnapshotFile, body_of

# Names of tensors of a part for images or sound.
TOWER = re.compile(r"(^|\.)(visual|vision|image|video|audio|speech)\w*\.")
# Keys of a configuration that count modules: transformers makes these one by one, before it compares any size.
COUNTS = re.compile(r"(layers?|depth|blocks|experts|labels|stages)$")
# Keys by which transformers, compressed-tensors and MLX say that the weights are quantized.
QUANTIZED_BY = {"quantization_config", "compression_config", "quantization"}
# Keys by which transformers takes other weight files, other modules, or kernels from the hub.
LOADED_BY = {"transformers_weights", "fusion_config"} | {
    f"{prefix}{part}_implementation" for prefix in ("", "_") for part in ("attn", "experts")
}
ADAPTER_CONFIG = "adapter_config.json"
GENERATION_CONFIG = "generation_config.json"
TRIAL_SIDE = 64  # pixels of a white image that tests an image processor
PREPROCESSOR_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
)
# What transformers raises on untrusted files, because it computes with their values before it checks the values.
REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
STAND_IN = "stand_in.json"  # a snapshot that holds this file has the shape of a published model and made-up weights
ROUNDED = "rounded.json"  # a snapshot that holds this file has weights that were rounded before


def check_snapshot(directory: Path) -> dict[str, Any]:
    """Refuse a snapshot that cannot be measured; only configuration and file headers are read.

    Returns:
        The parsed config.json.

    Raises:
        InputError: the directory is missing, or an entry cannot be read as a file. Or the configuration is malformed,
            of an unsupported architecture or of quantized weights, or names remote code. Or the weights are pickle
            files, or weight files are missing, malformed or truncated.
    """
    if not directory.is_dir():
        problem = "not a directory" if directory.exists() else "no such snapshot directory"
        raise InputError(f"{directory}: {problem}; check model.path, or run the rule that makes it")
    snapshot_files(directory)
    path = directory / "config.json"
    config = read_object(path)
    refuse_code(directory)
    if (directory / ADAPTER_CONFIG).exists():
        raise InputError(
            f"{directory}: holds an adapter ({ADAPTER_CONFIG}); merge it into its model (peft: merge_and_unload) and"
            " save that, or remove its files"
        )
    for key, value in items(config):
        if key in QUANTIZED_BY and value is not None:
            raise InputError(
                f"{path}: {key} says that the weights are already quantized; use the snapshot before its quantization"
            )
        if key in LOADED_BY and value not in (None, "eager", "sdpa"):
            raise InputError(f"{path}: {key} makes transformers load other files or other code; remove the key")
    if config.get("return_dict", True) is not True:
        raise InputError(f"{path}: return_dict is not true, so the model would not name its logits; remove the key")
    check_architecture(config, path)
    tensors = read_headers(directory)
    for key, value in items(config):
        if COUNTS.search(key) and type(value) is int and value > max(len(tensors), 1000):
            raise InputError(
                f"{path}: {key} is {value}, and the weight files hold {len(tensors)} tensors; correct config.json, or"
                " download the snapshot again"
            )
    return config


def refuse_code(directory: Path) -> None:
    """Refuse a snapshot that names classes of its own repository: transformers would run them, or silently take others.

    Raises:
        InputError: the message names the file with the key `auto_map`.
    """
    for path in map(directory.joinpath, ("config.json", GENERATION_CONFIG, *PREPROCESSOR_FILES)):
        named = [value for key, value in items(read_object(path)) if key == "auto_map"] if path.exists() else []
        if any(named):
            raise InputError(
                f"{path}: auto_map names code of the repository, which needs trust_remote_code; code of a snapshot is"
                " never run. Use a model that transformers implements itself, or remove the key where transformers has"
                " the same class"
            )


def snapshot_files(directory: Path) -> list[Path]:
    """The files of a snapshot, without hidden ones, after a check that each is a readable file.

    Raises:
        InputError: the message names an entry that is neither a file nor a directory, or that cannot be read.
    """
    entries = visible(directory)
    for path in entries:
        if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
            raise InputError(f"{path}: this directory cannot be read; give yourself the right to, or remove it")
    files = [path for path in entries if not path.is_dir()]
    for path in files:
        require_readable(path)
    return files


def items(document: Any) -> Iterator[tuple[str, Any]]:
    """All keys and values of a JSON document, nested ones too."""
    if isinstance(document, dict):
        yield from document.items()
    for value in document.values() if isinstance(document, dict) else document if isinstance(document, list) else ():
        yield from items(value)


def count_parameters(directory: Path) -> int:
    """Number of weights in a snapshot's safetensors, by their headers; tied weights are stored and counted once."""
    return sum(math.prod(tensor.shape) for tensor in read_headers(directory).values())


def check_contents(directory: Path) -> None:
    """Refuse a snapshot that transformers cannot load completely, without reading a weight.

    Raises:
        InputError: `check_snapshot` refuses the snapshot. Or transformers refuses its configuration, generation
            settings, tokenizer or image processor. Or its tensors are not the weights of its model.
    """
    config = check_snapshot(directory)
    tensors = read_headers(directory)
    family = check_architecture(config, directory / "config.json")
    if towers := [name for name in tensors if TOWER.search(name)] if not family.takes_images else []:
        raise InputError(
            f"{directory}: the weights of a tower for images or sound ({listed(towers)}), which the architecture"
            f" {config['architectures'][0]} does not have; use the text model, or correct config.json"
        )
    with explained(directory / "config.json"):
        require_filled(directory, tensors, empty_model(directory))
    if (directory / GENERATION_CONFIG).exists():
        read_object(directory / GENERATION_CONFIG)
        with explained(directory / GENERATION_CONFIG):
            GenerationConfig.from_pretrained(directory, local_files_only=True)
    processor = load_processor(directory)
    if family.takes_images:
        _try_image(directory, processor)


def _try_image(directory: Path, processor: Processor) -> None:
    """Refuse a snapshot whose processor does not turn a white image into tokens and finite pixels."""
    area = TRIAL_SIDE**2
    white = Image.new("RGB", (TRIAL_SIDE, TRIAL_SIDE), "white")
    path = directory / "preprocessor_config.json"
    with explained(path):
        try:
            image = processor.family.fit(white, processor, Limits(area, area, area))
            placed = processor.family.places_images
            text = "a text" if placed else str(processor.image_token)
            ids, _ = processor.family.tokenize(text, None, (image,), processor, placed)
            processor.family.tensors(Prepared(Sample("white", "", (image,)), text, ids, None), processor)
        except InputError as error:
            raise InputError(
                f"{path}: refused by transformers ({error}); correct it, or download the snapshot again"
            ) from None


def note(path: Path) -> str | None:
    """The text of `stand_in.json` or `rounded.json`, which says how the weights were made; None without that file.

    Raises:
        InputError: the file holds no such text.
    """
    if not path.exists():
        return None
    text = read_object(path).get(path.stem)
    if not isinstance(text, str):
        raise InputError(f"{path}: no text under '{path.stem}'; make the snapshot again")
    return text


@contextmanager
def explained(place: object, problem: str = "refused by transformers") -> Iterator[None]:
    """Turn the errors of transformers about the files at `place` into an InputError that names place and problem."""
    try:
        yield
    except Exception as error:
        # The tokenizers library raises plain `Exception`; any other class must be one of those above.
        if type(error) is not Exception and not isinstance(error, REFUSALS):
            raise
        message = textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")
        raise InputError(f"{place}: {problem} ({message}); correct it, or download the snapshot again") from error


def build_manifest(directory: Path, name: str, source: str, details: dict[str, Any]) -> ModelManifest:
    """The manifest of a snapshot, after `check_contents`.

    Args:
        directory: the snapshot.
        name: the model's name in result paths.
        source: where it came from, as in the config's `model.source`.
        details: facts that the source adds (such as its training split), JSON-able.
    """
    check_contents(directory)
    config = read_object(directory / "config.json")
    files = tuple(
        SnapshotFile(str(path.relative_to(directory)), path.stat().st_size, sha256_file(path))
        for path in snapshot_files(directory)
    )
    return ModelManifest(
        model=name,
        source=source,
        path=os.fspath(directory),
        architecture=config["architectures"][0],
        stand_in=note(directory / STAND_IN),
        rounded=note(directory / ROUNDED),
        files=files,
        digest=digest_of([body_of(file) for file in files]),
        details=details,
    )


@dataclass(frozen=True)
class StoredWeights:
    """What the weights of a snapshot take where they stay in their files.

    Attributes:
        count: of all; tied weights are stored and counted once.
        merged: bytes of those that are made when the model is loaded. The files have them in other shapes, or in 64
            bits.
        largest: count of the largest matrix.
    """

    count: int
    merged: int
    largest: int


def stored_weights(directory: Path) -> StoredWeights:
    """What the weights take, by the headers of the files and the model on torch's meta device.

    Raises:
        InputError: as `empty_model` says.
    """
    tensors = read_headers(directory)
    alone = {name for names in stored_names(tensors, empty_model(directory)).values() for name in names}
    sizes = {name: math.prod(tensor.shape) for name, tensor in tensors.items()}
    made = [name for name, tensor in tensors.items() if name not in alone or tensor.dtype not in (*HALVES, "F32")]
    merged = sum(sizes[name] * (2 if tensors[name].dtype in HALVES else 4) for name in made)
    return StoredWeights(sum(sizes.values()), merged, max(sizes.values()))


def verify_manifest(manifest: ModelManifest) -> Path:
    """The snapshot directory that a manifest names, after a check that its files are those of the manifest.

    Raises:
        InputError: the directory or a file is missing, or differs from the manifest.
    """
    directory = Path(manifest.path)
    again = "run the model rule again (snakemake --cores 1 --forcerun get_model), or restore the files"
    if not directory.is_dir():
        raise InputError(f"{directory}: the snapshot of model {manifest.model} is not there; {again}")
    for entry in manifest.files:
        path = directory / entry.name
        if not path.is_file():
            raise InputError(f"{path}: listed in the model manifest but missing; {again}")
        if path.stat().st_size != entry.bytes or sha256_file(path) != entry.sha256:
            raise InputError(f"{path}: differs from the sha256 in the model manifest; {again}")
    return directory


def load_model(directory: Path, experts: str = "each", mapped: bool = False) -> PreTrainedModel:
    """The model of a snapshot in FP32 and eval mode on the CPU, its parameters frozen, prepared for FX and the replay.

    Args:
        directory: the snapshot.
        experts: as `models.prepare.prepare` takes it.
        mapped: leave matrices that are stored in BF16 or F16 in the files until they are used (`models.mapped`). Such a
            model stays on the CPU, and its weights cannot be changed.

    Raises:
        InputError: `check_snapshot` refuses the snapshot, its weights do not fill the model, or they do not fit into
            memory.
    """
    config = check_snapshot(directory)
    if not mapped:
        require_memory(count_parameters(directory))
    with explained(directory), mapped_weights() if mapped else nullcontext():
        loaded: Any = model_class(config).from_pretrained(
            directory,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            experts_implementation="eager",
            ignore_mismatched_sizes=True,  # reported by name below
        )
    model: PreTrainedModel
    model, loading = loaded
    require_complete(directory, loading)
    make_fx_safe(model)
    model.eval().requires_grad_(False)
    prepare(model, experts)
    name_hidden_state(model, config)
    return model


def model_class(config: dict[str, Any]) -> Any:
    """The class of transformers that loads the model of a checked config.json."""
    return getattr(transformers, config["architectures"][0])


def empty_model(directory: Path) -> PreTrainedModel:
    """The model of a snapshot without its weights, built on torch's meta device.

    Raises:
        InputError: `check_snapshot` refuses the snapshot, or transformers refuses its config.json.
    """
    with torch.device("meta"):
        return _of_config(directory)


def zero_model(directory: Path) -> PreTrainedModel:
    """The model as `load_model` returns it, with zeros for weights.

    This model takes next to no memory.

    Raises:
        InputError: as `empty_model` says.
    """
    with no_init_weights():
        model = _of_config(directory)
    for parameter in model.parameters():
        parameter.data = untouched_zeros(parameter.shape)
    make_fx_safe(model)
    model.eval().requires_grad_(False)
    name_hidden_state(model, read_object(directory / "config.json"))
    return model


def untouched_zeros(shape: torch.Size) -> torch.Tensor:
    """Zeros in float32 whose pages get memory when they are written. torch.zeros writes them."""
    size = 4 * shape.numel()
    if size < 1 << 20:  # the system allows a limited number of maps
        return torch.zeros(shape)
    # Private, because a page of shared memory gets memory when it is read, too.
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.float32).view(shape)


def name_hidden_state(model: torch.nn.Module, config: Mapping[str, Any]) -> None:
    """Give the last hidden state of a model without a head its module, at which the model is measured."""
    if check_architecture(config, Path("config.json")).hidden_state:
        with_hidden_state(model)


def _of_config(directory: Path) -> PreTrainedModel:
    """The model that a snapshot's config.json describes, in FP32."""
    factory = model_class(check_snapshot(directory))
    with explained(directory / "config.json"):
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        made: PreTrainedModel = factory._from_config(config, dtype=torch.float32)
        return made


def module_types(directory: Path) -> dict[str, type[torch.nn.Module]]:
    """The names and classes of a snapshot's modules.

    Raises:
        InputError: as `empty_model` says.
    """
    return {name: type(module) for name, module in empty_model(directory).named_modules()}


def tensor_names(directory: Path) -> set[str]:
    """The names under which a snapshot's weights were published, by the headers of its files."""
    return set(read_headers(directory))


def load_processor(directory: Path, backend: str | None = None) -> Processor:
    """The snapshot's tokenizer and image processor.

    Args:
        directory: the snapshot.
        backend: the library that resizes images, `torchvision` or `pil`; by default torchvision if it is installed. A
            calibration set names the library that it was checked with.

    Raises:
        InputError: the tokenizer or the image processor config is missing, or transformers refuses it. Or the image
            processor is that of another model, or the backend is not installed.
    """
    config = read_object(directory / "config.json")
    family = check_architecture(config, directory / "config.json")
    backend = backend or ("torchvision" if is_torchvision_available() else "pil")
    if family.takes_images and backend == "torchvision" and not is_torchvision_available():
        raise InputError(
            "the calibration set was made with torchvision, which is not installed; install it, or run the calibration"
            " rule again (snakemake --cores 1 --forcerun extract_calibration)"
        )
    for name in PREPROCESSOR_FILES:
        if (directory / name).exists():
            read_object(directory / name)
    tokenizer = _tokenizer(directory) if family.takes_words else None
    with explained(directory, "no usable tokenizer or image processor"):
        for_images = family.load(Parts(directory, config, tokenizer, backend))
    if tokenizer is None:
        return Processor(family, None, **for_images)
    with explained(directory / "config.json"):
        text = AutoConfig.from_pretrained(directory, local_files_only=True).get_text_config()
    # The processor's own template comes first: the tokenizer's may be that of a text model, without images.
    if (directory / "chat_template.json").exists():
        template = read_object(directory / "chat_template.json").get("chat_template")
        if not isinstance(template, str | None):
            raise InputError(f"{directory}/chat_template.json: the chat template is not text; complete the snapshot")
        tokenizer.chat_template = template
    vocabulary = getattr(text, "vocab_size", None)
    return Processor(family, tokenizer, vocabulary=vocabulary, positions=_positions(text), **for_images)


def _tokenizer(directory: Path) -> Any:
    """The snapshot's tokenizer.

    Raises:
        InputError: transformers refuses its files, or it makes no tokens.
    """
    with explained(directory, "no usable tokenizer or image processor"):
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        words = tokenizer("a text", add_special_tokens=False)["input_ids"]  # some values are read only here
    if not words:  # transformers makes an empty tokenizer if the tokenizer's file is missing
        raise InputError(
            f"{directory}: the tokenizer makes no tokens of a text; complete the snapshot with its tokenizer.json"
        )
    return tokenizer


def _positions(text: Any) -> int | None:
    """The number of positions of a text config; some families write -1 for no limit."""
    positions = getattr(text, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None
