"""A Hugging Face snapshot directory: checked before long work, listed in a manifest, loaded as INC sees it.

In: a directory with config.json, safetensors, a tokenizer, an image processor config and a chat template.
Out: a manifest (sha256 per file), an FP32 model in eval mode, and the model's own tokenizer and image processor.
"""

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionPatchEmbed
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchEmbed as Qwen2VLPatchEmbed
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchEmbed
from transformers.utils import is_torchvision_available

from auto_quantize_model.device import require_memory
from auto_quantize_model.files import InputError, digest_of, read_json, sha256_file

# Models that take images, with the module that each reads patches by; beside them, every causal language model.
PATCH_EMBEDS: dict[str, type[torch.nn.Module]] = {
    "Qwen2_5_VLForConditionalGeneration": Qwen2_5_VisionPatchEmbed,
    "Qwen2VLForConditionalGeneration": Qwen2VLPatchEmbed,
    "Qwen3VLForConditionalGeneration": Qwen3VLVisionPatchEmbed,
}
CAUSAL_LANGUAGE_MODELS = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
WEIGHTS_INDEX = "model.safetensors.index.json"
STAND_IN = "stand_in.json"  # a snapshot that holds this file has the shape of a published model and made-up weights


@dataclass(frozen=True)
class Processor:
    """What turns a sample into tensors: the snapshot's tokenizer, its image processor and what resizes for it.

    What belongs to images is None where the model takes none. `vocabulary` is the number of rows of the embedding,
    `positions` the number of tokens that the model has positions for; None where the config does not say.
    """

    tokenizer: Any
    image_processor: Any = None
    image_token: str | None = None
    image_token_id: int | None = None
    image_backend: str | None = None
    vocabulary: int | None = None
    positions: int | None = None


class FxSafePatchEmbed(torch.nn.Module):
    """The `forward` of a patch embedding without the cast to `self.proj.weight.dtype`, put before the class it is for.

    Once INC has quantized `proj`, its weight is no tensor any more and reading its dtype fails. Everything here runs
    in FP32, where the cast does nothing, so leaving it out changes no bit and lets INC measure this op as well.
    """

    in_channels: int
    embed_dim: int
    proj: torch.nn.Conv3d

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Patches of shape (n, channels * time * height * width), float32, to embeddings of shape (n, embed_dim)."""
        volume = hidden_states.view(-1, self.in_channels, *self.proj.kernel_size)
        return self.proj(volume).view(-1, self.embed_dim)


FX_SAFE = {module: type(f"FxSafe{module.__name__}", (FxSafePatchEmbed, module), {}) for module in PATCH_EMBEDS.values()}


def check_snapshot(directory: Path) -> dict[str, Any]:
    """Refuse a snapshot that cannot be measured, reading only configuration and file headers.

    Returns:
        The parsed config.json.

    Raises:
        InputError: no such directory, unsupported architecture, remote code, pickle weights, weights that are missing
            or truncated.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: no such snapshot directory; check model.path, or run the rule that makes it")
    config = read_json(directory / "config.json")
    if "auto_map" in config:
        raise InputError(
            f"{directory}/config.json: the model needs trust_remote_code (auto_map), and code from a snapshot is never"
            " run; use a model that transformers implements itself"
        )
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in {*PATCH_EMBEDS, *CAUSAL_LANGUAGE_MODELS}:
        raise InputError(
            f"{directory}/config.json: architecture {architecture} is not supported; supported: "
            + ", ".join(PATCH_EMBEDS)
            + ", and the causal language models of transformers (AutoModelForCausalLM)"
        )
    for shard in _weight_files(directory):
        _check_safetensors(shard)
    return config


def _weight_files(directory: Path) -> list[Path]:
    """The safetensors files that hold the weights, each of them there."""
    if (directory / WEIGHTS_INDEX).exists():
        names = sorted(set(read_json(directory / WEIGHTS_INDEX)["weight_map"].values()))
        missing = [name for name in names if not (directory / name).exists()]
        if missing:
            raise InputError(
                f"{directory}: {WEIGHTS_INDEX} names {', '.join(missing)}, not there; download the snapshot again"
            )
        return [directory / name for name in names]
    if (directory / "model.safetensors").exists():
        return [directory / "model.safetensors"]
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise InputError(
            f"{directory}: weights are pickle files ({', '.join(pickles)}), which can run code when read; convert them"
            " with model.save_pretrained(..., safe_serialization=True)"
        )
    raise InputError(f"{directory}: no model.safetensors and no {WEIGHTS_INDEX}; download the snapshot again")


def count_parameters(directory: Path) -> int:
    """Number of weights in a snapshot's safetensors, by their headers; tied weights are stored and counted once."""
    return sum(
        math.prod(entry["shape"])
        for shard in _weight_files(directory)
        for name, entry in _check_safetensors(shard).items()
        if name != "__metadata__"
    )


def _check_safetensors(path: Path) -> dict[str, Any]:
    """A file's header, if the file has the size that it promises (format: 8-byte length, JSON header, data)."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            (header_size,) = struct.unpack("<Q", file.read(8))
            if header_size > size:
                raise ValueError("header longer than the file")
            header = json.loads(file.read(header_size))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a safetensors file ({error}); download it again") from None
    expected = 8 + header_size + max(ends, default=0)
    if size != expected:
        raise InputError(f"{path}: {size} bytes where its header promises {expected}: truncated; download it again")
    return header


def build_manifest(directory: Path, name: str, source: str, details: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a checked snapshot: the hand-off between rules that stands for the weights.

    Args:
        directory: the snapshot.
        name: the model's name in result paths.
        source: where it came from (`digits`, `local`).
        details: what that source adds (its training split, say), JSON-able.

    Returns:
        {model, source, path, architecture, stand_in, files: [{name, bytes, sha256}], digest, details}; `stand_in` is
        what a snapshot of made-up weights says of itself, null for any other; `digest` is over the files alone, so
        that the same weights have the same digest wherever they lie.
    """
    config = check_snapshot(directory)
    files = [
        {"name": str(path.relative_to(directory)), "bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    ]
    return {
        "model": name,
        "source": source,
        "path": os.fspath(directory),
        "architecture": config["architectures"][0],
        "stand_in": read_json(directory / STAND_IN)["stand_in"] if (directory / STAND_IN).exists() else None,
        "files": files,
        "digest": digest_of(files),
        "details": details,
    }


def verify_manifest(manifest: dict[str, Any]) -> Path:
    """The snapshot directory that a manifest speaks of, seen to hold those very files.

    Raises:
        InputError: the directory or a file is gone, or differs from what was recorded.
    """
    directory = Path(manifest["path"])
    again = "run the model rule again (snakemake --cores 1 --forcerun get_model), or restore the files"
    if not directory.is_dir():
        raise InputError(f"{directory}: the snapshot of model {manifest['model']} is not there; {again}")
    for entry in manifest["files"]:
        path = directory / entry["name"]
        if not path.is_file():
            raise InputError(f"{path}: listed in the model manifest but missing; {again}")
        if path.stat().st_size != entry["bytes"] or sha256_file(path) != entry["sha256"]:
            raise InputError(f"{path}: differs from the sha256 in the model manifest; {again}")
    return directory


def load_model(directory: Path) -> PreTrainedModel:
    """The model of a snapshot in FP32 and eval mode on the CPU, safe for FX, its parameters frozen.

    Raises:
        InputError: the snapshot is refused by `check_snapshot`, its weights do not fill the model, or they do not fit
            into memory.
    """
    config = check_snapshot(directory)
    require_memory(count_parameters(directory))
    architecture = config["architectures"][0]
    factory = getattr(transformers, architecture) if architecture in PATCH_EMBEDS else AutoModelForCausalLM
    loaded: Any = factory.from_pretrained(
        directory,
        dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    model, loading = loaded
    for problem in ("missing_keys", "mismatched_keys"):
        if loading[problem]:
            names = ", ".join(sorted(map(str, loading[problem]))[:3])
            raise InputError(
                f"{directory}: {len(loading[problem])} weights with {problem.replace('_', ' ')} ({names}, ...);"
                " they would be random numbers; download the snapshot again"
            )
    for module in model.modules():
        module.__class__ = FX_SAFE.get(type(module), type(module))
    return model.eval().requires_grad_(False)


def module_types(directory: Path) -> dict[str, type[torch.nn.Module]]:
    """The names and classes of a snapshot's modules, without its weights: built on torch's meta device.

    Raises:
        InputError: the snapshot is refused by `check_snapshot`.
    """
    architecture = check_snapshot(directory)["architectures"][0]
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    with torch.device("meta"):
        if architecture in PATCH_EMBEDS:
            model = getattr(transformers, architecture)(config)
        else:
            model = AutoModelForCausalLM.from_config(config)
    return {name: type(module) for name, module in model.named_modules()}


def tensor_names(directory: Path) -> set[str]:
    """The names under which a snapshot's weights were published, by the headers of its files."""
    return {name for shard in _weight_files(directory) for name in _check_safetensors(shard)} - {"__metadata__"}


def load_processor(directory: Path, backend: str | None = None) -> Processor:
    """The snapshot's tokenizer and image processor.

    Args:
        directory: the snapshot.
        backend: what resizes images, `torchvision` or `pil`; by default torchvision where it is installed. A
            calibration set names the one that it was checked with.

    Raises:
        InputError: the tokenizer or the image processor config is missing, the image processor is that of another
            model, or the backend is not installed.
    """
    config = read_json(directory / "config.json")
    takes_images = config["architectures"][0] in PATCH_EMBEDS
    backend = backend or ("torchvision" if is_torchvision_available() else "pil")
    if takes_images and backend == "torchvision" and not is_torchvision_available():
        raise InputError(
            "the calibration set was made with torchvision, which is not installed; install it, or run the calibration"
            " rule again (snakemake --cores 1 --forcerun extract_calibration)"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        text = AutoConfig.from_pretrained(directory, local_files_only=True).get_text_config()
        if takes_images:
            image_processor = AutoImageProcessor.from_pretrained(directory, local_files_only=True, backend=backend)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        problem = f"no usable tokenizer or image processor ({first_line})"
        raise InputError(f"{directory}: {problem}; complete the snapshot") from None
    # The processor's own template comes first: the tokenizer's may be that of a text model, without images.
    if (directory / "chat_template.json").exists():
        tokenizer.chat_template = read_json(directory / "chat_template.json").get("chat_template")
    sizes: dict[str, Any] = {"vocabulary": getattr(text, "vocab_size", None), "positions": _positions(text)}
    if not takes_images:
        return Processor(tokenizer, **sizes)
    _require_patches(directory, image_processor, config.get("vision_config", {}))
    image_token = str(tokenizer.convert_ids_to_tokens(config["image_token_id"]))
    return Processor(tokenizer, image_processor, image_token, config["image_token_id"], backend, **sizes)


def _positions(text: Any) -> int | None:
    """The number of positions of a text config; some families write -1 where there is no limit."""
    positions = getattr(text, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def _require_patches(directory: Path, image_processor: Any, vision: dict[str, Any]) -> None:
    """Refuse an image processor that cuts images otherwise than the model's vision tower takes them."""
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
