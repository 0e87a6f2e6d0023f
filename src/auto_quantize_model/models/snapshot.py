"""A Hugging Face snapshot directory: checked before long work, listed in a manifest, loaded as INC sees it.

In: a directory with config.json, safetensors, a tokenizer, an image processor config and a chat template.
Out: a manifest (sha256 per file), an FP32 model in eval mode, and the model's own tokenizer and image processor.
"""

import math
import os
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionPatchEmbed
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchEmbed as Qwen2VLPatchEmbed
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchEmbed
from transformers.utils.import_utils import is_torchvision_available

from auto_quantize_model.files import InputError, digest_of, sha256_file, visible
from auto_quantize_model.machine import require_memory
from auto_quantize_model.models.prepare import prepare
from auto_quantize_model.models.weights import (
    listed,
    read_headers,
    read_object,
    require_complete,
    require_filled,
    require_readable,
)
from auto_quantize_model.records import ModelManifest, SnapshotFile, body_of

# Models that take images, each with the module that reads patches. Causal language models are supported too.
PATCH_EMBEDS: dict[str, type[torch.nn.Module]] = {
    "Qwen2_5_VLForConditionalGeneration": Qwen2_5_VisionPatchEmbed,
    "Qwen2VLForConditionalGeneration": Qwen2VLPatchEmbed,
    "Qwen3VLForConditionalGeneration": Qwen3VLVisionPatchEmbed,
}
CAUSAL_LANGUAGE_MODELS = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
TAKE_MORE_THAN_TEXT = {
    *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values(),
    *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.values(),
}
# Keys of a configuration that describe a part for images or sound, and names of tensors of such a part.
OTHER_SENSES = re.compile(r"vision|visual|image|video|audio|speech|(^|_)vq_")
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


@dataclass(frozen=True)
class Processor:
    """The parts that turn a sample into tensors: the snapshot's tokenizer, its image processor and its image backend.

    Fields for images are None where the model takes none. `vocabulary` is the number of rows of the embedding.
    `positions` is the number of tokens that the model has positions for; None where the config does not give it.
    """

    tokenizer: Any
    image_processor: Any = None
    image_token: str | None = None
    image_token_id: int | None = None
    image_backend: str | None = None
    vocabulary: int | None = None
    positions: int | None = None


class FxSafePatchEmbed(torch.nn.Module):
    """The `forward` of a patch embedding without the cast to `self.proj.weight.dtype`, put before the original class.

    Once INC has quantized `proj`, its weight is not a tensor any more, and reading its dtype fails. Here all runs in
    FP32, where the cast does nothing. So leaving out the cast changes no bit, and INC can measure this op as well.
    """

    in_channels: int
    embed_dim: int
    proj: torch.nn.Conv3d

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Patches of shape (n, channels * time * height * width), float32, to embeddings of shape (n, embed_dim)."""
        volume = hidden_states.view(-1, self.in_channels, *self.proj.kernel_size)
        embeddings: torch.Tensor = self.proj(volume)
        return embeddings.view(-1, self.embed_dim)


FX_SAFE = {module: type(f"FxSafe{module.__name__}", (FxSafePatchEmbed, module), {}) for module in PATCH_EMBEDS.values()}


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


def check_architecture(config: dict[str, Any], path: Path) -> None:
    """Refuse a configuration whose model cannot be measured as a whole.

    Raises:
        InputError: `architectures` does not name one class, or names one that is unsupported or does not fit the
            model_type. Or a text model also has a tower for images or sound, which no sample would reach.
    """
    names, model_type = config.get("architectures"), config.get("model_type")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise InputError(f"{path}: architectures is {names!r}; give a list of one class of transformers")
    architecture = names[0]
    if architecture not in {*PATCH_EMBEDS, *CAUSAL_LANGUAGE_MODELS}:
        raise InputError(
            f"{path}: architecture {architecture} is not supported; supported: "
            + ", ".join(PATCH_EMBEDS)
            + ", and the causal language models of transformers (AutoModelForCausalLM)"
        )
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise InputError(
            f"{path}: model_type {model_type!r} is unknown to transformers {transformers.__version__}; correct the file"
        )
    class_of_type = {getattr(transformers, name).config_class.model_type: name for name in PATCH_EMBEDS}
    expected = class_of_type.get(model_type) or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if architecture != expected:
        raise InputError(
            f"{path}: architectures names {architecture}, and model_type {model_type!r} is that of"
            f" {expected or 'no causal language model'}; correct config.json"
        )
    if architecture in PATCH_EMBEDS:
        return
    blocks = {key for key, value in config.items() if isinstance(value, dict)}
    senses = sorted(key for key in blocks | set(CONFIG_MAPPING[model_type].sub_configs) if OTHER_SENSES.search(key))
    if senses or architecture in TAKE_MORE_THAN_TEXT:
        raise InputError(
            f"{path}: architecture {architecture} of model_type {model_type!r} takes images or sound"
            f"{' (' + ', '.join(senses) + ')' if senses else ''}, and is not supported; its tower would never run."
            f" Models with images: {', '.join(PATCH_EMBEDS)}"
        )


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
    takes_images = config["architectures"][0] in PATCH_EMBEDS
    if towers := [name for name in tensors if TOWER.search(name)] if not takes_images else []:
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
    if takes_images:
        size = {"shortest_edge": TRIAL_SIDE**2, "longest_edge": TRIAL_SIDE**2}
        with explained(directory / "preprocessor_config.json"):
            trial = [Image.new("RGB", (TRIAL_SIDE, TRIAL_SIDE), "white")]
            pixels = processor.image_processor(images=trial, size=size, return_tensors="pt")["pixel_values"]
            if not pixels.isfinite().all():
                raise ValueError("pixels that are not finite")


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


def load_model(directory: Path) -> PreTrainedModel:
    """The model of a snapshot in FP32 and eval mode on the CPU, safe for FX, its parameters frozen.

    Raises:
        InputError: `check_snapshot` refuses the snapshot, its weights do not fill the model, or they do not fit into
            memory.
    """
    config = check_snapshot(directory)
    require_memory(count_parameters(directory))
    with explained(directory):
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
    prepare(model)
    return model


def make_fx_safe(model: torch.nn.Module) -> list[tuple[torch.nn.Module, type[torch.nn.Module]]]:
    """Give each patch embedding the forward of `FxSafePatchEmbed`.

    Returns:
        Each changed module and its class before.
    """
    changed = [(module, type(module)) for module in model.modules() if type(module) in FX_SAFE]
    for module, before in changed:
        module.__class__ = FX_SAFE[before]
    return changed


@contextmanager
def fx_safe(model: torch.nn.Module) -> Iterator[None]:
    """Make a model safe for FX, and give each module its class back at the end."""
    changed = make_fx_safe(model)
    try:
        yield
    finally:
        for module, before in changed:
            module.__class__ = before


def model_class(config: dict[str, Any]) -> Any:
    """The class of transformers that loads the model of a checked config.json."""
    architecture = config["architectures"][0]
    return getattr(transformers, architecture) if architecture in PATCH_EMBEDS else AutoModelForCausalLM


def empty_model(directory: Path) -> PreTrainedModel:
    """The model of a snapshot without its weights, built on torch's meta device.

    Raises:
        InputError: `check_snapshot` refuses the snapshot, or transformers refuses its config.json.
    """
    with torch.device("meta"):
        return _of_config(directory)


def zero_model(directory: Path) -> PreTrainedModel:
    """The model as `load_model` returns it, with zeros for weights.

    The operating system gives memory to a page of zeros when the page is written. So this model takes next to none.

    Raises:
        InputError: as `empty_model` says.
    """
    with no_init_weights():
        model = _of_config(directory)
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter)
    make_fx_safe(model)
    model.eval().requires_grad_(False)
    return model


def _of_config(directory: Path) -> PreTrainedModel:
    """The model that a snapshot's config.json describes, in FP32."""
    factory = model_class(check_snapshot(directory))
    with explained(directory / "config.json"):
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        build = factory.from_config if factory is AutoModelForCausalLM else factory._from_config
        made: PreTrainedModel = build(config, dtype=torch.float32)
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
    takes_images = config["architectures"][0] in PATCH_EMBEDS
    backend = backend or ("torchvision" if is_torchvision_available() else "pil")
    if takes_images and backend == "torchvision" and not is_torchvision_available():
        raise InputError(
            "the calibration set was made with torchvision, which is not installed; install it, or run the calibration"
            " rule again (snakemake --cores 1 --forcerun extract_calibration)"
        )
    for name in PREPROCESSOR_FILES:
        if (directory / name).exists():
            read_object(directory / name)
    with explained(directory, "no usable tokenizer or image processor"):
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        words = tokenizer("a text", add_special_tokens=False)["input_ids"]  # some values are read only here
        text = AutoConfig.from_pretrained(directory, local_files_only=True).get_text_config()
        if takes_images:
            image_processor = AutoImageProcessor.from_pretrained(directory, local_files_only=True, backend=backend)
    if not words:  # transformers makes an empty tokenizer if the tokenizer's file is missing
        raise InputError(
            f"{directory}: the tokenizer makes no tokens of a text; complete the snapshot with its tokenizer.json"
        )
    # The processor's own template comes first: the tokenizer's may be that of a text model, without images.
    if (directory / "chat_template.json").exists():
        template = read_object(directory / "chat_template.json").get("chat_template")
        if not isinstance(template, str | None):
            raise InputError(f"{directory}/chat_template.json: the chat template is not text; complete the snapshot")
        tokenizer.chat_template = template
    sizes: dict[str, Any] = {"vocabulary": getattr(text, "vocab_size", None), "positions": _positions(text)}
    if not takes_images:
        return Processor(tokenizer, **sizes)
    _require_patches(directory, image_processor, config.get("vision_config", {}))
    image_token_id = config.get("image_token_id")
    image_token: Any = None
    if type(image_token_id) is int and 0 <= image_token_id < len(tokenizer):
        image_token = tokenizer.convert_ids_to_tokens(image_token_id)
    if image_token is None:
        raise InputError(
            f"{directory}/config.json: image_token_id {image_token_id!r} is not in the tokenizer; correct config.json"
        )
    return Processor(tokenizer, image_processor, image_token, image_token_id, backend, **sizes)


def _positions(text: Any) -> int | None:
    """The number of positions of a text config; some families write -1 for no limit."""
    positions = getattr(text, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def _require_patches(directory: Path, image_processor: Any, vision: dict[str, Any]) -> None:
    """Refuse an image processor that cuts images into other patches than the model's vision tower takes."""
    names = {
        "patch_size": "patch_size",
        "temporal_patch_size": "temporal_patch_size",
        "merge_size": "spatial_merge_size",
    }
    for ours, theirs in names.items():
        cut = getattr(image_processor, ours, None)
        if cut is None or cut != vision.get(theirs, cut):
            raise InputError(
                f"{directory}: {ours} of the image processor is {cut}, and config.json asks for {vision.get(theirs)};"
                " complete the snapshot with its own preprocessor_config.json"
            )
