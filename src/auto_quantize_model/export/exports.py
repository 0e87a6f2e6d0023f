"""Profiles written for the tools that apply them: the modules that each tool must leave unquantized.

In: profiles, INC's plan, the capture, and the model's modules. Out: files for each tool, and lists of what was dropped
or added. A name that would match more than the one module that it stands for is refused before a file is written.
"""

import glob
import re
import textwrap
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from auto_quantize_model.documents import Document, write_document
from auto_quantize_model.escape import code, one_line, prose
from auto_quantize_model.files import InputError, canonical_json, write_text
from auto_quantize_model.folders import atomic_folder
from auto_quantize_model.models.units import siblings_of
from auto_quantize_model.records import Coverage, IncCheck, Plan, Profile, Profiles, body_of, digest_of_record
from auto_quantize_model.report import coverage, sentences
from auto_quantize_model.schemes.scheme import Assignment

TEMPLATES = Path(__file__).with_name("templates")
Modules = dict[str, type[torch.nn.Module]]
FP32 = {"weight": {"dtype": ["fp32"]}, "activation": {"dtype": ["fp32"]}}
IS_FUSED = "serving engines hold it in one matrix with a kept op"
IS_IDLE = "did not run on any scored batch, so its error is unknown"
# For vLLM an lm_head is not a `Linear`, so vLLM has no place for its scales (vllm-project/llm-compressor#1820).
NO_HEAD = (
    "vLLM does not load an lm_head that was quantized as a Linear, so it stays unquantized: the weights take more bytes"
    " than the profile says"
)
# The prefixes of an op's own name in transformers 5, in published checkpoints and in vLLM.
PREFIXES = re.compile(r"^(model\.)?(language_model\.)?(model\.)?")


@dataclass(frozen=True)
class Tool:
    """A tool that quantizes modules of the classes `types`. With `fuses`, it holds a fusion unit as one matrix.

    `files` turns {module name: its common name}, the header of a file and the context into {file name: text}. `remark`
    is what the tool's user should know. `never` is {module: reason} of modules that the tool must never quantize.
    """

    title: str
    types: tuple[type[torch.nn.Module], ...]
    fuses: bool
    files: Callable[[dict[str, str], str, "Context"], dict[str, str]]
    remark: str
    never: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """All facts that an exported file may name.

    `idle` are the plan's ops that ran on no scored batch. `embeds_patches` says whether the model has a vision tower.
    `reduce_range`, `inc_check` and `coverage` are the plan's.
    """

    model: str
    profile: str
    measured: Profile
    idle: Sequence[str]
    calibration_samples: int
    embeds_patches: bool
    reduce_range: bool
    inc_check: IncCheck
    coverage: Coverage


def export_profile(
    assignment: Assignment,
    op_names: Iterable[str],
    excluded: Iterable[str],
    modules: Modules,
    published: Collection[str],
    context: Context,
) -> tuple[dict[str, str], dict[str, Any]]:
    """The files of one profile for every tool.

    Args:
        assignment: the profile's state.
        op_names: the plan's ops that ran; the files list those that the assignment leaves in FP32, in this order.
        excluded: modules that INC's plan leaves in FP32 already.
        modules: the model's modules, by name.
        published: names of the published checkpoint's weights.
        context: what the files name.

    Returns:
        {file name: text}, and {tool: {title, files, kept, dropped, added, notes}}. `kept` are all modules that the
        tool must leave unquantized. `dropped` are the profile's ops that the tool never quantizes. `added` is
        {module: reason} for modules that are kept for another reason than the profile or the plan.

    Raises:
        InputError: the model does not have an op, or a name means more than one module.
    """
    kept = [name for name in op_names if name not in assignment]
    if missing := sorted({*kept, *context.idle} - set(modules)):
        raise InputError(
            f"profile {context.profile}: {missing[0]} is not a module of {context.model}; make the plan again"
            " (snakemake --cores 1 --forcerun plan_quantization)"
        )
    texts: dict[str, str] = {}
    tools: dict[str, Any] = {}
    for name, tool in TOOLS.items():
        covered = [op for op in (*kept, *excluded) if issubclass(modules[op], tool.types)]
        dropped = [op for op in kept if op not in covered]
        added = additions(covered, tool, modules, context.idle)
        told = {op: common_name(op, modules, published) for op in (*covered, *added)}
        unfit = without_inc(context) if name == "inc" else []
        said = [*unfit, *coverage.remark(context.coverage), *notes(dropped, added, tool)]
        written = tool.files(told, heading(said, context), context)
        texts |= written
        tools[name] = {"title": tool.title, "files": sorted(written), "kept": list(told)}
        tools[name] |= {"dropped": dropped, "added": added, "notes": said}
    return texts | {"README.md": overview(tools, context)}, tools


def without_inc(context: Context) -> list[str]:
    """The warning of INC's files where INC cannot convert the model."""
    if context.inc_check["status"] != "cannot":
        return []
    return [f"Do not use: INC 2.6 cannot convert this model ({context.inc_check['reason']})."]


def additions(covered: Sequence[str], tool: Tool, modules: Modules, idle: Iterable[str]) -> dict[str, str]:
    """The modules that a tool must leave unquantized in addition to those of `covered`, each with the reason."""
    unknown = [name for name in idle if issubclass(modules[name], tool.types)]
    fused = siblings([*covered, *unknown], modules) if tool.fuses else []
    found = dict.fromkeys(unknown, IS_IDLE) | dict.fromkeys(fused, IS_FUSED) | tool.never
    return {name: reason for name, reason in found.items() if name in modules and name not in covered}


def notes(dropped: Sequence[str], added: dict[str, str], tool: Tool) -> list[str]:
    """What a reader should know about a tool's export, in sentences."""
    types = ", ".join(kind.__name__ for kind in tool.types)
    found = []
    if dropped:
        found.append(f"Left out, because the tool quantizes only {types}: {listed(dropped)}.")
    for reason in dict.fromkeys(added.values()):
        found.append(f"Kept too ({reason}): {listed([name for name in added if added[name] == reason])}.")
    return [*found, tool.remark]


def listed(names: Sequence[str]) -> str:
    """The names, or only the first of very many: a whole vision tower may be idle."""
    more = len(names) - 12
    return ", ".join(names) if more <= 0 else f"{', '.join(names[:12])} and {more} more"


def siblings(kept: Sequence[str], modules: Modules) -> list[str]:
    """The modules that are fused with a kept one and not kept themselves, in the order of the kept ones."""
    found = [other for name in kept for other in siblings_of(name, modules)]
    return [name for name in dict.fromkeys(found) if name not in kept]


def common_name(name: str, modules: Modules, published: Collection[str]) -> str:
    """The part of a module's name that is the same in all tools, after the prefix that differs.

    transformers 5 says `model.visual.merger.mlp.0` where checkpoints and vLLM say `visual.merger.mlp.0`, and
    `model.language_model.layers.0` where they say `model.layers.0` and `language_model.model.layers.0`.

    Raises:
        InputError: another module's name, in transformers or in the checkpoint, contains this part too.
    """
    common = PREFIXES.sub("", name)
    weights = {weight.removesuffix(".weight") for weight in published if weight.endswith(".weight")}
    here = {other for other in modules if f"{common}." in f"{other}."} - {name}
    there = {other for other in weights if f"{common}." in f"{other}."}
    if here or len(there) > 1:
        raise InputError(
            f"{name}: the common part of its names, {common}, stands in {', '.join(sorted(here | there)[:3])} as well;"
            " this model cannot be exported"
        )
    return common


def regular_expressions(names: Iterable[str]) -> list[str]:
    """A regular expression for each common name, to be matched from the start."""
    return [rf"(.*\.)?{re.escape(name)}$" for name in names]


def inc_files(kept: dict[str, str], header: str, context: Context) -> dict[str, str]:
    """INC 2.6 matches the whole of its own name of an op; for a lone Linear this name is `NAME.module`."""
    op_name_dict = {rf"{re.escape(name)}(\.module)?": FP32 for name in kept}
    script = python_file("inc_quantize.py", kept, header, context)
    return {"inc_op_name_dict.json": canonical_json(op_name_dict), **script}


def llm_compressor_files(kept: dict[str, str], header: str, context: Context) -> dict[str, str]:
    """A recipe. llm-compressor writes the modules that `ignore` matches into the checkpoint, where vLLM reads them."""
    ignore = [f"re:{pattern}" for pattern in regular_expressions(kept.values())]
    modifier = {"targets": ["Linear"], "scheme": "W8A8", "ignore": ignore}
    recipe = {"quant_stage": {"quant_modifiers": {"QuantizationModifier": modifier}}}
    comment = textwrap.indent(header, "# ", lambda line: True).replace("# \n", "#\n")
    return {"llm_compressor_recipe.yaml": f"{comment}\n{yaml.safe_dump(recipe, sort_keys=False, width=1000)}"}


def modelopt_files(kept: dict[str, str], header: str, context: Context) -> dict[str, str]:
    """A quantization config: entries with wildcards, in which a later entry overrides earlier ones.

    The config does not start from ModelOpt's INT8 default, which leaves out lm_head and every vision tower unmeasured.
    Classes are named, because a bare `*input_quantizer` also matches that of an nn.LayerNorm, which was not measured.
    """
    quant_cfg: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for parent_class in ("nn.Linear", "nn.Conv3d"):
        for quantizer, axis in (("*weight_quantizer", 0), ("*input_quantizer", None)):
            int8 = {"num_bits": 8, "axis": axis}
            quant_cfg.append({"quantizer_name": quantizer, "parent_class": parent_class, "cfg": int8})
    quant_cfg += [{"quantizer_name": f"*{glob.escape(name)}.*", "enable": False} for name in kept.values()]
    return {"modelopt_quant_cfg.json": canonical_json({"quant_cfg": quant_cfg, "algorithm": "max"})}


def heading(said: Iterable[str], context: Context) -> str:
    """The file's description and its tool's notes, for a comment; untrusted names neither begin nor end a line."""
    notes = [described(context), sentences.remark(context.profile, body_of(context.measured)), *said]
    return "\n\n".join(textwrap.fill(one_line(note), 118, break_on_hyphens=False) for note in notes if note)


def overview(tools: dict[str, Any], context: Context) -> str:
    """The notes of every tool in one file, because JSON has no comments."""
    about = [described(context), sentences.remark(context.profile, body_of(context.measured))]
    lines = [f"# {code(context.profile)}", *(line for text in about if text for line in ("", prose(text)))]
    for tool in tools.values():
        lines += ["", f"## {tool['title']}", "", f"Files: {', '.join(code(file) for file in tool['files'])}"]
        lines += [line for note in tool["notes"] for line in ("", prose(note))]
    return "\n".join(lines) + "\n"


def described(context: Context) -> str:
    """The profile in one line."""
    measured = context.measured
    return (
        f"Profile {context.profile} of {context.model}: {sentences.counted(measured.keep, 'op')} in FP32,"
        f" {sentences.sqnr(measured.sqnr_db)} on held-out samples as measured with INC's INT8."
    )


def python_file(name: str, kept: dict[str, str], header: str, context: Context) -> dict[str, str]:
    """A Python file from its template; names of modules are put in as Python literals."""
    environment = Environment(  # noqa: S701  Python, not HTML
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["pyrepr"] = repr
    text = environment.get_template(f"{name}.j2").render(
        header=header.replace("\\", "\\\\").replace('"', '\\"'),
        calibration_samples=context.calibration_samples,
        embeds_patches=context.embeds_patches,
        reduce_range=context.reduce_range,
        patterns=regular_expressions(kept.values()),
        idle=regular_expressions(kept[op] for op in context.idle if op in kept),
    )
    return {name: text}


LINEAR, CONV, EMBEDDING = torch.nn.Linear, torch.nn.Conv3d, torch.nn.Embedding
FOR_INC = "Only for INC 2.6; INC 3.x has another API."
MEASURED_WITH = "the profile was measured with INC's per-channel weights and static, per-tensor, asymmetric activations"
FOR_LLM_COMPRESSOR = (
    f"W8A8 has per-channel weights and dynamic, per-token, symmetric activations; {MEASURED_WITH}."
    ' Use: oneshot(model=model, recipe="llm_compressor_recipe.yaml"), then'
    " model.save_pretrained(folder, save_compressed=True). vLLM runs INT8 on Turing to Hopper GPUs."
)
FOR_MODELOPT = (
    f"Needs ModelOpt 0.44 or later. Activations are static, per tensor and symmetric; {MEASURED_WITH}. vLLM does not"
    " serve INT8 checkpoints of ModelOpt."
)
FOR_NNCF = (
    f"Needs NNCF 3.0 or later. NNCF's preset chooses the scheme; {MEASURED_WITH}. For nodes that read no module's"
    " weight (the products of attention), NNCF chooses by itself."
)
FOR_TORCHAO = (
    f"Weights are per channel, activations dynamic and per token; {MEASURED_WITH}."
    " Without torch.compile, a matrix with a side that is not a multiple of 8 runs slowly on a GPU."
)
ALL = (LINEAR, CONV, EMBEDDING)
TOOLS = {
    "inc": Tool("Intel Neural Compressor", ALL, False, inc_files, FOR_INC),
    "llm_compressor": Tool(
        "llm-compressor and vLLM", (LINEAR,), True, llm_compressor_files, FOR_LLM_COMPRESSOR, {"lm_head": NO_HEAD}
    ),
    "modelopt": Tool("NVIDIA ModelOpt", (LINEAR, CONV), True, modelopt_files, FOR_MODELOPT),
    "nncf": Tool("NNCF", ALL, False, partial(python_file, "nncf_ignored_scope.py"), FOR_NNCF),
    "torchao": Tool("torchao", (LINEAR,), False, partial(python_file, "torchao_quantize.py"), FOR_TORCHAO),
}


def export(
    directory: Path,
    profiles: Profiles,
    plan: Plan,
    modules: Modules,
    published: Collection[str],
    calibration_samples: int,
    made_from: Iterable[Document] = (),
) -> dict[str, Any]:
    """Write every profile for every tool (DIRECTORY/PROFILE/FILE), and DIRECTORY/index.json, which lists them.

    Args:
        directory: the folder to write; earlier exports in it are replaced, and no other files.
        profiles: the profiles to export.
        plan: the plan that the profiles were made for.
        modules: as `snapshot.module_types` returns it.
        published: as `snapshot.tensor_names` returns it.
        calibration_samples: number of samples that set the profiles' scales.
        made_from: the documents that the profiles were made from, for the head of index.json.

    Returns:
        {model, plan_digest, profiles: {profile: {tool: ...}}, missed}; paths are relative to the directory's parent.

    Raises:
        InputError: as `export_profile` says, or `directory` holds other files than exports. Then nothing is written.
    """
    left_out = [module.op_name for module in plan.excluded]
    idle = [op.op_name for op in plan.ops if not op.ran]
    texts: dict[str, str] = {}
    index: dict[str, Any] = {}
    for name, profile in profiles.profiles.items():
        context = Context(
            plan.model,
            name,
            profile,
            idle,
            calibration_samples,
            CONV in modules.values(),
            plan.reduce_range,
            plan.inc_check,
            plan.coverage,
        )
        # The files list the kept ops in the profile's own order, the most sensitive first.
        op_names = dict.fromkeys((*profile.kept, *(op.op_name for op in plan.ops if op.ran)))
        files, index[name] = export_profile(profile.assignment, op_names, left_out, modules, published, context)
        texts |= {f"{name}/{file}": text for file, text in files.items()}
        for tool in index[name].values():
            tool["files"] = [f"{directory.name}/{name}/{file}" for file in tool["files"]]
    document = {
        "model": plan.model,
        "plan_digest": digest_of_record(plan),
        "profiles": index,
        "missed": profiles.missed,
    }
    with atomic_folder(directory) as folder:
        for file, text in texts.items():
            write_text(folder / file, text)
        written = [folder / file for file in texts]
        write_document(folder / "index.json", "exports", document, made_from, files=written)
    return document
