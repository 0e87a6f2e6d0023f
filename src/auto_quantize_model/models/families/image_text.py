"""Models of images and text in general: transformers' own processor turns text and images into tensors."""

import copy
import importlib
import sys
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig
from transformers.models.auto.auto_mappings import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_MAPPING_NAMES
from transformers.models.auto.processing_auto import processor_class_from_name
from transformers.processing_utils import MODALITY_TO_AUTOPROCESSOR_MAPPING
from transformers.utils.import_utils import DummyObject, is_timm_available

from auto_quantize_model.files import InputError
from auto_quantize_model.models.families.causal import LISTED_ELSEWHERE
from auto_quantize_model.models.family import Family, Parts, Processor, Tokenized
from auto_quantize_model.models.pixels import fit, image_processor_of, made_by, refuse_backend, require_same
from auto_quantize_model.models.sample import Batch, Prepared
from auto_quantize_model.models.weights import read_object
from auto_quantize_model.models.words import tokenized

# Models that the same mapping of transformers holds, and that a conversation with images cannot measure.
UNFIT = {
    "blip": "its images have no tokens",
    "diffusion_gemma": "it writes by diffusion and does not predict the next token",
    "evolla": "it takes proteins",
    "florence2": "it is an encoder-decoder",
    "fuyu": "its image processor fails with PIL in this release of transformers",
    "git": "its images have no tokens",
    "got_ocr2": "its processor writes the prompt itself",
    "idefics": "its processor puts images behind the text",
    "instructblipvideo": "it takes videos alone",
    "kosmos-2": "its processor names no token for images",
    "kosmos-2.5": "its processor names no token for images",
    "pi0": "it predicts the motions of a robot",
    "pix2struct": "it is an encoder-decoder",
    "pp_formulanet": "it is an encoder-decoder",
    "t5gemma2": "it is an encoder-decoder",
    "udop": "it is an encoder-decoder, and takes the places of words",
    "vision-encoder-decoder": "it is an encoder-decoder",
}
# The files that may name the processor's class, in the order in which transformers reads them.
NAMING_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


class NoVideos(dict[str, Any]):
    """Stands in for the video processor, which needs torchvision. No sample has a video.

    It is an empty dictionary, because a processor writes its parts as JSON.
    """

    merge_size = temporal_patch_size = 1


class Unchecked:
    """Put before the class of a processor, which would refuse the stand-in."""

    def check_argument_for_proper_class(self, name: str, value: Any) -> Any:
        """The class of a part, whatever it is."""
        return type(value)


class Listening:
    """A tokenizer that keeps the texts that a processor gives to it, which hold all tokens of images."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.heard: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __len__(self) -> int:
        return len(self.tokenizer)

    def __call__(self, text: Any = None, *others: Any, **options: Any) -> Any:
        self.heard.append(text)
        return self.tokenizer(text, *others, **options)


def matches(config: Mapping[str, Any]) -> bool:
    """Whether the class is that of AutoModelForImageTextToText for its model_type."""
    known = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config["model_type"])
    return bool(known == config["architectures"][0]) and config["model_type"] not in LISTED_ELSEWHERE


def refuse(config: Mapping[str, Any]) -> str:
    """Why such a model cannot be measured, or not here, in words; empty if it can."""
    if reason := UNFIT.get(config["model_type"]):
        return f"is not supported: {reason}"
    return _refuse_timm(config) or refuse_backend(config)


def _refuse_timm(config: Mapping[str, Any]) -> str:
    """Why a tower for images cannot be built here, in words; empty if it can."""
    of_type = getattr(CONFIG_MAPPING[config["model_type"]](), "vision_config", None)
    model_type = (config.get("vision_config") or {}).get("model_type") or getattr(of_type, "model_type", "")
    if MODEL_MAPPING_NAMES.get(str(model_type)) != "TimmWrapperModel" or is_timm_available():
        return ""
    return "has a tower of timm, which is not installed; install timm (pip install timm), or use another model"


def load(parts: Parts) -> dict[str, Any]:
    """The snapshot's own processor, its image processor, and the tokens of images.

    Raises:
        InputError: no file names a processor that transformers has, a library is missing, or the processor names no
            token for images.
    """
    kind = _processor_class(parts)
    whole = _assembled(kind, parts)
    if (template := getattr(whole, "chat_template", None)) is not None:
        parts.tokenizer.chat_template = template
    config = AutoConfig.from_pretrained(parts.directory, local_files_only=True)
    own = [*getattr(whole, "image_token_ids", []), getattr(config, "image_token_id", None)]
    known = tuple(sorted({found for found in own if type(found) is int and found >= 0}))
    if not known:
        raise InputError(
            f"{parts.directory}: {kind.__name__} names no token for images, and config.json has no image_token_id;"
            " complete the snapshot"
        )
    return {
        "image_processor": whole.image_processor,
        "whole": whole,
        "image_token": None if (token := getattr(whole, "image_token", None)) is None else str(token),
        "image_token_ids": known,
        "image_backend": parts.backend,
    }


def _processor_class(parts: Parts) -> Any:
    """The class of the snapshot's processor."""
    paths = [parts.directory / name for name in NAMING_FILES]
    named = [read_object(path).get("processor_class") for path in paths if path.exists()]
    name = next((name for name in named if name), None) or PROCESSOR_MAPPING_NAMES.get(parts.config["model_type"])
    kind = processor_class_from_name(name) if isinstance(name, str) else None
    if isinstance(kind, DummyObject):
        kind = _shown(kind)
    if kind is None or not hasattr(kind, "get_attributes"):
        raise InputError(
            f"{parts.directory}: the processor class is {name!r}, which transformers does not have; complete the"
            " snapshot with its processor_config.json"
        )
    return kind


def _shown(hidden: Any) -> Any:
    """A processor's class that transformers hides, because its file imports one that needs torchvision.

    Of that file, which has the image processor of the torchvision backend, the file of the PIL backend has the same
    functions. So it takes the other's place during the import.

    Raises:
        InputError: the class needs something else.
    """
    file = hidden.__module__.rpartition(".")[2]
    folder = f"transformers.models.{file.removeprefix('processing_')}"
    place = f"{folder}.{file.replace('processing_', 'image_processing_')}"
    try:
        sys.modules[place] = importlib.import_module(place.replace("image_processing_", "image_processing_pil_"))
        return getattr(importlib.import_module(f"{folder}.{file}"), hidden.__name__)
    except ImportError as error:
        raise InputError(f"{hidden.__name__} needs a library that is not installed ({error}); install it") from None
    finally:
        sys.modules.pop(place, None)


def _assembled(kind: Any, parts: Parts) -> Any:
    """The processor, from its parts: with the given image backend, and without a video processor.

    AutoProcessor makes the same, but it loads the video processor too, which needs torchvision.
    """
    module = sys.modules[kind.__module__]
    if getattr(module, "num2words", True) is None:  # SmolVLM writes numbers of frames of a video in words
        module.__dict__["num2words"] = str
    known, _ = kind.get_processor_dict(parts.directory, local_files_only=True)
    made = {"tokenizer": parts.tokenizer, "video_processor": NoVideos()}
    arguments = []
    for name in kind.get_attributes():
        if name == "image_processor":
            made[name] = image_processor_of(parts)
        elif "tokenizer" in name and name not in made:
            made[name] = kind._load_tokenizer_from_pretrained(name, parts.directory, local_files_only=True)
        elif name not in made:
            made[name] = MODALITY_TO_AUTOPROCESSOR_MAPPING[name].from_pretrained(parts.directory, local_files_only=True)
        arguments.append(made[name])
    unchecked: Any = type(kind.__name__, (Unchecked, kind), {})
    return unchecked.from_args_and_dict(arguments, known)


def tokenize(
    text: str, answer: range | None, images: tuple[Image.Image, ...], processor: Processor, special: bool
) -> Tokenized:
    """The tokens that the processor makes of a text with images, and the positions of the answer's tokens.

    The answer stands behind all images. So the end of the given text is in the processor's own text, which holds all
    tokens of images. That text is tokenized again with the positions of its characters. Other tokens than those of the
    processor locate no answer.
    """
    made, heard = _made(text, images, processor)
    ids = tuple(made["input_ids"][0].tolist())
    if special and images and answer is not None:
        return ids, _behind_images(text, answer, ids, processor)
    expanded = heard[0] if len(heard) == 1 and isinstance(heard[0], str) else None
    end = text[answer.start :] if answer is not None else ""
    if answer is None or expanded is None or end not in expanded:
        return ids, None
    shift = expanded.rindex(end) - answer.start  # Chameleon's processor writes a token of its own behind the text
    place = range(answer.start + shift, answer.stop + shift)
    again, span = tokenized(expanded, place, processor, _adds(text, processor))
    return ids, span if again == ids else None


def _behind_images(text: str, answer: range, ids: tuple[int, ...], processor: Processor) -> range | None:
    """The positions of the answer's tokens where the tokens of the text alone follow those of the images."""
    alone, span = tokenized(text, answer, processor, True)
    shift = len(ids) - len(alone)
    return range(span.start + shift, span.stop + shift) if span and ids[shift:] == alone else None


def _adds(text: str, processor: Processor) -> bool:
    """Whether the tokenizer adds its special tokens, as in transformers: where the text does not begin with them.

    Without a chat template the text never does, because words with special tokens are refused.
    """
    first = processor.tokenizer.bos_token
    return first is None or not text.startswith(first)


def _made(
    text: str, images: tuple[Image.Image, ...], processor: Processor
) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """The tensors that the processor makes, and the texts that it gave to its tokenizer."""
    whole = copy.copy(processor.whole)
    whole.tokenizer = listening = Listening(processor.tokenizer)
    shown = [list(images)] if images else None
    made = made_by(whole, text=[text], images=shown, add_special_tokens=_adds(text, processor))
    heard = [text for texts in listening.heard for text in (texts if isinstance(texts, list) else [texts])]
    return made, heard


def tensors(prepared: Prepared, processor: Processor) -> Batch:
    """All tensors that the processor makes of one prepared sample.

    Returns:
        `input_ids` and `attention_mask`, int64 (1, tokens), and what the processor adds under its own names.

    Raises:
        InputError: the tokens are not those of the prepared sample, pixels are not finite, or images have no tokens.
    """
    images = prepared.sample.images
    made, _ = _made(prepared.text, images, processor)
    require_same(made, prepared)
    positions = torch.isin(made["input_ids"], torch.tensor(processor.image_token_ids))
    if images and not bool(positions.any()):
        raise InputError("the model's processor makes no image tokens of its images; complete the chat template")
    return Batch(made, positions)


# Their processors place the images themselves, before the text.
PLACING = {"blip-2", "instructblip"}
PLACED = Family(
    "model of images before a text",
    lambda config: config["model_type"] in PLACING and matches(config),
    refuse,
    True,
    load,
    fit,
    tokenize,
    tensors,
    places_images=True,
)
IMAGE_TEXT = Family("model of images and text", matches, refuse, True, load, fit, tokenize, tensors)
