"""The README of a written checkpoint: what it is, what it costs, and the commands that serve and evaluate it.

In: the model's manifest, the profile, and the comparison of the loaded checkpoint with the profile. Out: Markdown.
"""

import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from auto_quantize_model.escape import code, prose
from auto_quantize_model.export.llm_compressor import LM_HEAD
from auto_quantize_model.models.architecture import continues_text, takes_images
from auto_quantize_model.records import ModelManifest, Output, Profile
from auto_quantize_model.report.coverage import in_bytes
from auto_quantize_model.report.sentences import counted, number, percent

# By the documentation of lm-evaluation-harness 0.4.11 and lmms-eval 0.4, whose vLLM backends take these options.
TEXT = """pip install "lm_eval[vllm]"
lm_eval --model vllm --model_args pretrained={folder},dtype=auto --tasks arc_easy,hellaswag --batch_size auto"""
IMAGES = """pip install lmms_eval vllm
python -m lmms_eval --model vllm --model_args model={folder} --tasks mme,mmmu_val --batch_size 16"""


def card(manifest: ModelManifest, output: Output, profile: Profile, record: Mapping[str, Any], folder: Path) -> str:
    """The text of README.md.

    Args:
        output: of the plan.
        record: as `proof.promised_and_found` returns it, with the `bytes` of the checkpoint.
        folder: where the checkpoint will lie.
    """
    title = f"# {code(manifest.model)} by the profile {code(record['profile'])}"
    notes = [prose(note) for note in (manifest.stand_in, manifest.rounded) if note]
    about = (
        f"A checkpoint of compressed-tensors {version('compressed-tensors')}, for transformers and vLLM. It holds the"
        f" weights of {code(manifest.architecture)} in the schemes below."
    )
    parts = [title, *notes, about, *facts(profile, record, output), *commands(manifest, profile, folder)]
    return "\n\n".join(parts) + "\n"


def facts(profile: Profile, record: Mapping[str, Any], output: Output) -> list[str]:
    """The tables of schemes and of metrics, and sentences about the bytes and the comparison."""
    point, found, size = profile.point, record["found"], record["bytes"]
    schemes = Counter(profile.assignment.values()).most_common()
    ops = "\n".join(["| scheme | ops |", "|---|---:|", *(f"| {code(name)} | {count} |" for name, count in schemes)])
    ops += f"\n| unquantized | {len(profile.kept)} |"
    metrics: list[tuple[str, str, Callable[[float | None], str]]] = [
        (output.heading, "divergence", number),
        ("top-1 agreement", "top1_agreement", percent),
        ("perplexity", "perplexity", number),
        ("accuracy", "accuracy", percent),
    ]
    lines = ["| on held-out samples | promised | found |", "|---|---:|---:|"]
    lines += [
        f"| {label} | {form(getattr(point, field))} | {form(found[field])} |"
        for label, field, form in metrics
        if found[field] is not None
    ]
    return [ops, "\n".join(lines), compared(record), bytes_of(point.bits, size)]


def compared(record: Mapping[str, Any]) -> str:
    """How the loaded checkpoint compares with the profile."""
    if record["status"] == "bit_identical":
        return "transformers loaded this folder in FP32, and each metric was bit for bit the promised one."
    return (
        "transformers loaded this folder in FP32. The profile was measured on another device or CPU, so the last bits"
        " differ. The divergence lies in the profile's 95 % interval."
    )


def bytes_of(bits: float, size: Mapping[str, Any]) -> str:
    """The bits of a weight, and the bytes of the checkpoint."""
    text = (
        f"The ops take {number(bits)} bits a weight with scales, on average. In BF16, the weights of the whole model"
        f" take {in_bytes(size['promised'], 4)}."
    )
    if not size["more"]:
        return text
    more = "; ".join(f"{reason}: {counted(count, 'byte')}" for reason, count in size["more"].items())
    return f"{text} The files take more, because the weights are as they were measured ({more})."


def commands(manifest: ModelManifest, profile: Profile, folder: Path) -> list[str]:
    """How to serve and to evaluate the checkpoint; for a model that writes no text, how to load it."""
    place, kind = shlex.quote(str(folder)), manifest.architecture
    if not takes_images(kind) and not continues_text(kind):
        load = f"model = transformers.{kind}.from_pretrained({str(folder)!r})"
        return ["## Load", f"```python\nimport transformers\n\n{load}\n```"]
    evaluate = (IMAGES if takes_images(kind) else TEXT).format(folder=place)
    head = any(name.rpartition(".")[2] == "lm_head" for name in profile.assignment)
    return [
        "## Serve and evaluate",
        "vLLM and the tools below were not run when this checkpoint was made. vLLM computes in BF16 with its own"
        " kernels, so its divergence is another number of the same size. Not every GPU runs every scheme.",
        *([LM_HEAD] if head else []),
        f"```bash\nvllm serve {place}\n```",
        f"```bash\n{evaluate}\n```",
    ]
