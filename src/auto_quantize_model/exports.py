"""A profile in the words of the tools that apply it: what each of them has to leave unquantized.

In: a profile's ops, INC's plan, and the model's modules. Out: files per tool, and what was dropped or merged for it. A
name that would match anything but the module that it stands for is refused before a file is written.
"""

import re
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from auto_quantize_model.files import InputError, canonical_json, digest_of, write_json, write_text

Modules = dict[str, type[torch.nn.Module]]
FP32 = {"weight": {"dtype": ["fp32"]}, "activation": {"dtype": ["fp32"]}}
# Serving engines hold these as one matrix, which has one scheme: keeping one of them keeps all.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# What stands before an op's own name in transformers 5, in published checkpoints and in vLLM.
PREFIXES = re.compile(r"^(model\.)?(language_model\.)?(model\.)?")


@dataclass(frozen=True)
class Tool:
    """A tool that quantizes modules of the classes `types`, holding those of `FUSED` as one where `fuses` says so.

    `files` turns {module name: its common name} into {file name: text}.
    """

    title: str
    types: tuple[type[torch.nn.Module], ...]
    fuses: bool
    files: Callable[[dict[str, str], "Context"], dict[str, str]]


@dataclass(frozen=True)
class Context:
    """What every file of an export may name: the model, the profile, its numbers, and the templates' folder."""

    model: str
    profile: str
    measured: dict[str, Any]
    batch_size: int
    templates: Path


def export_profile(
    kept: Sequence[str], excluded: Iterable[str], modules: Modules, published: Collection[str], context: Context
) -> tuple[dict[str, str], dict[str, Any]]:
    """The files of one profile for every tool.

    Args:
        kept: names of the ops that the profile keeps in FP32.
        excluded: modules that INC's plan leaves in FP32 already.
        modules: the model's modules, by name.
        published: names of the published checkpoint's weights.
        context: what the files name.

    Returns:
        {file name: text}, and {tool: {title, files, kept, dropped, merged, notes}}: `kept` are the modules that the
        tool is told to leave alone, `dropped` those that it never quantizes, `merged` those that a fused one brings in.

    Raises:
        InputError: an op that the model does not have, or a name that means more than one module.
    """
    if missing := sorted(set(kept) - set(modules)):
        raise InputError(
            f"profile {context.profile}: {missing[0]} is no module of {context.model}; make the plan again"
            " (snakemake --cores 1 --forcerun plan_quantization)"
        )
    texts: dict[str, str] = {}
    tools: dict[str, Any] = {}
    for name, tool in TOOLS.items():
        wanted = [*kept, *(op for op in excluded if issubclass(modules[op], tool.types))]
        covered = [op for op in wanted if issubclass(modules[op], tool.types)]
        dropped = [op for op in kept if op not in covered]
        merged = siblings(covered, modules) if tool.fuses else []
        told = [*covered, *merged]
        written = tool.files({op: common_name(op, modules, published) for op in told}, context)
        texts |= written
        tools[name] = {
            "title": tool.title,
            "files": sorted(written),
            "kept": told,
            "dropped": dropped,
            "merged": merged,
            "notes": notes(dropped, merged, tool),
        }
    return texts, tools


def notes(dropped: Sequence[str], merged: Sequence[str], tool: Tool) -> list[str]:
    """What a reader has to know of a tool's export, in words."""
    types = ", ".join(kind.__name__ for kind in tool.types)
    found = []
    if dropped:
        found.append(f"Left out, as nothing but {types} is quantized there: {', '.join(dropped)}.")
    if merged:
        found.append(f"Kept too, as serving engines hold them in one matrix with a kept op: {', '.join(merged)}.")
    return found


def siblings(kept: Sequence[str], modules: Modules) -> list[str]:
    """The modules that are fused with a kept one and not kept themselves, in the order of the kept ones."""
    found = []
    for name in kept:
        parent, _, own = name.rpartition(".")
        for group in FUSED:
            if own in group:
                found += [f"{parent}.{other}" for other in group if f"{parent}.{other}" in modules]
    return [name for name in dict.fromkeys(found) if name not in kept]


def common_name(name: str, modules: Modules, published: Collection[str]) -> str:
    """What a module is called everywhere, after the prefix that differs.

    transformers 5 says `model.visual.merger.mlp.0` where checkpoints and vLLM say `visual.merger.mlp.0`, and
    `model.language_model.layers.0` where they say `model.layers.0` and `language_model.model.layers.0`.

    Raises:
        InputError: another module's name, in transformers or in the checkpoint, holds it too.
    """
    common = PREFIXES.sub("", name)
    weights = {weight.removesuffix(".weight") for weight in published if weight.endswith(".weight")}
    here = {other for other in modules if f"{common}." in f"{other}."} - {name}
    there = {other for other in weights if f"{common}." in f"{other}."}
    if here or len(there) > 1:
        raise InputError(
            f"{name}: what is common to its names, {common}, stands in {', '.join(sorted(here | there)[:3])} as well;"
            " this model cannot be exported"
        )
    return common


def regular_expressions(names: Iterable[str]) -> list[str]:
    """One for each common name, to be matched from the start."""
    return [rf"(.*\.)?{re.escape(name)}$" for name in names]


def inc_files(kept: dict[str, str], context: Context) -> dict[str, str]:
    """INC 2.6 matches its own name of an op whole; it calls a lone Linear `NAME.module`."""
    op_name_dict = {rf"{re.escape(name)}(\.module)?": FP32 for name in kept}
    return {
        "inc_op_name_dict.json": canonical_json(op_name_dict),
        "inc_quantize.py": rendered("inc_quantize.py.j2", kept, context),
    }


def llm_compressor_files(kept: dict[str, str], context: Context) -> dict[str, str]:
    """A recipe; what its `ignore` matches, llm-compressor writes into the checkpoint, where vLLM reads it."""
    modifier = {
        "targets": ["Linear"],
        "scheme": "W8A8",
        "ignore": [f"re:{pattern}" for pattern in regular_expressions(kept.values())],
    }
    recipe = {"quant_stage": {"quant_modifiers": {"QuantizationModifier": modifier}}}
    text = yaml.safe_dump(recipe, sort_keys=False, width=1000)
    return {"llm_compressor_recipe.yaml": f"# {heading(context)}\n{text}"}


def modelopt_files(kept: dict[str, str], context: Context) -> dict[str, str]:
    """A quantization config: entries by wildcard, of which a later one overrides those before it.

    It is not built on ModelOpt's own INT8 default, which leaves out lm_head and every vision tower unmeasured.
    """
    int8 = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}},
        {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8, "axis": None}},
        {"quantizer_name": "*", "parent_class": "nn.Embedding", "enable": False},
    ]
    off = [{"quantizer_name": f"*{name}.*", "enable": False} for name in kept.values()]
    return {"modelopt_quant_cfg.json": canonical_json({"quant_cfg": int8 + off, "algorithm": "max"})}


def nncf_files(kept: dict[str, str], context: Context) -> dict[str, str]:
    """A function: NNCF's names of the nodes are known once it has traced the model."""
    return {"nncf_ignored_scope.py": rendered("nncf_ignored_scope.py.j2", kept, context)}


def torchao_files(kept: dict[str, str], context: Context) -> dict[str, str]:
    """The `filter_fn` of `quantize_`, which says what is quantized."""
    return {"torchao_quantize.py": rendered("torchao_quantize.py.j2", kept, context)}


def heading(context: Context) -> str:
    """One line that says what a file is."""
    measured = context.measured
    sqnr = "no error" if measured["sqnr_db"] is None else f"{measured['sqnr_db']:.2f} dB"
    return (
        f"Profile {context.profile} of {context.model}: {measured['keep']} ops in FP32,"
        f" {sqnr} SQNR on held-out samples as measured with INC's INT8."
    )


def rendered(template: str, kept: dict[str, str], context: Context) -> str:
    """A Python file from its template; names reach it as Python's own literals."""
    environment = Environment(  # noqa: S701  Python, not HTML
        loader=FileSystemLoader(context.templates),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["pyrepr"] = repr
    return environment.get_template(template).render(
        heading=heading(context), batch_size=context.batch_size, patterns=regular_expressions(kept.values())
    )


LINEAR, CONV, EMBEDDING = torch.nn.Linear, torch.nn.Conv3d, torch.nn.Embedding
TOOLS = {
    "inc": Tool("Intel Neural Compressor", (LINEAR, CONV, EMBEDDING), False, inc_files),
    "llm_compressor": Tool("llm-compressor and vLLM", (LINEAR,), True, llm_compressor_files),
    "modelopt": Tool("NVIDIA ModelOpt", (LINEAR, CONV), True, modelopt_files),
    "nncf": Tool("NNCF", (LINEAR, CONV, EMBEDDING), False, nncf_files),
    "torchao": Tool("torchao", (LINEAR,), False, torchao_files),
}


def export(
    directory: Path,
    profiles: dict[str, Any],
    plan: dict[str, Any],
    modules: Modules,
    published: Collection[str],
    batch_size: int,
    templates: Path,
) -> dict[str, Any]:
    """Write every profile for every tool, DIRECTORY/PROFILE/FILE, and DIRECTORY/index.json, which lists them.

    Args:
        directory: written anew; what it held is gone.
        profiles: as `profiles.build_profiles` returns it.
        plan: what the profiles are of.
        modules: as `snapshot.module_types` returns it.
        published: as `snapshot.tensor_names` returns it.
        batch_size: samples of the calibration batch.
        templates: the folder of the files' templates.

    Returns:
        {model, plan_digest, profiles: {profile: {tool: ...}}, missed}; files are named from the directory's parent.

    Raises:
        InputError: as `export_profile` says; nothing is written then.
    """
    left_out = [op["op_name"] for op in plan["excluded"]]
    texts: dict[str, str] = {}
    index: dict[str, Any] = {}
    for name, profile in profiles["profiles"].items():
        context = Context(plan["model"], name, profile, batch_size, templates)
        files, index[name] = export_profile(profile["kept"], left_out, modules, published, context)
        texts |= {f"{name}/{file}": text for file, text in files.items()}
        for tool in index[name].values():
            tool["files"] = [f"{directory.name}/{name}/{file}" for file in tool["files"]]
    document = {
        "model": plan["model"],
        "plan_digest": digest_of(plan),
        "profiles": index,
        "missed": profiles["missed"],
    }
    shutil.rmtree(directory, ignore_errors=True)
    for file, text in texts.items():
        write_text(directory / file, text)
    write_json(directory / "index.json", document)
    return document
