"""Profiles written for the tools that apply them. A tool gets files only if it can hold the whole profile as measured.

In: profiles, the plan, and the model's modules. Out: files for each tool, and what each tool cannot hold. Every name
is checked against the model's modules before a file is written.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationScheme

from auto_quantize_model.documents import Document, write_document
from auto_quantize_model.escape import code, prose
from auto_quantize_model.export import autoround, inc_int8, llm_compressor, modelopt, torchao
from auto_quantize_model.export.names import Modules, listed
from auto_quantize_model.export.subject import Subject, header
from auto_quantize_model.files import InputError, write_text
from auto_quantize_model.folders import atomic_folder
from auto_quantize_model.records import NotMeasured, Op, Plan, Profiles, Why, digest_of_record
from auto_quantize_model.report import coverage
from auto_quantize_model.report.explanations import NOT_EXPLAINED
from auto_quantize_model.report.sentences import counted
from auto_quantize_model.schemes.scheme import INC_INT8

PLAIN = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
ONLY_INC = (
    "INC's INT8 is the arithmetic of INC; choose from schemes of compressed-tensors (decide.candidates) for this tool"
)
NO_SCHEMES = "the tool has an INT8 of its own and no scheme of compressed-tensors"


@dataclass(frozen=True)
class Tool:
    """A tool that quantizes a model.

    Attributes:
        title: its name for people.
        remark: what its user should know.
        files: {file name: text} of a profile, below a header.
        refusal: why the tool cannot hold a scheme in an op, which shares its matrix with others or not; empty if it
            can. None for a tool that takes profiles of INC's INT8 alone.
        notes: what its user should know of one profile, besides the remark.
    """

    title: str
    remark: str
    files: Callable[[Subject, str], dict[str, str]]
    refusal: Callable[[QuantizationScheme, Op, bool], str] | None = None
    notes: Callable[[Subject], list[str]] = lambda subject: []


TOOLS = {
    "llm_compressor": Tool(
        llm_compressor.TITLE,
        llm_compressor.REMARK,
        llm_compressor.files,
        llm_compressor.refusal,
        llm_compressor.notes,
    ),
    "modelopt": Tool(modelopt.TITLE, modelopt.REMARK, modelopt.files, modelopt.refusal),
    "torchao": Tool(torchao.TITLE, torchao.REMARK, torchao.files, torchao.refusal),
    "autoround": Tool(autoround.TITLE, autoround.REMARK, autoround.files, autoround.refusal),
    "inc": Tool("Intel Neural Compressor", inc_int8.FOR_INC, inc_int8.inc_files, notes=inc_int8.inc_notes),
    "nncf": Tool("NNCF", inc_int8.FOR_NNCF, inc_int8.nncf_files, notes=inc_int8.notes),
}


def export_profile(subject: Subject) -> tuple[dict[str, str], dict[str, Any]]:
    """The files of one profile for every tool that can hold it.

    Returns:
        {file name: text}, and {tool: {title, files, quantized, kept, refused, notes}}. `quantized` is {op: scheme} as
        the tool quantizes it, and empty without files. `kept` is {module: reason} of the modules that the files name
        to be left alone. `refused` is {scheme: why the tool cannot hold it}.

    Raises:
        InputError: the model does not have an op, or a name means more than one module.
    """
    require_modules(subject)
    texts: dict[str, str] = {}
    tools: dict[str, Any] = {}
    for name, tool in TOOLS.items():
        refused = refusals(tool, subject)
        written: dict[str, str] = {}
        if refused:
            notes = [without_file(refused, reason) for reason in dict.fromkeys(refused.values())]
        else:
            notes = [*coverage.remark(subject.plan.coverage), *tool.notes(subject), tool.remark]
            written = tool.files(subject, header([*subject.described(), *notes]))
        texts |= written
        tools[name] = {
            "title": tool.title,
            "files": sorted(written),
            "quantized": subject.profile.assignment if written else {},
            "kept": inc_int8.kept(subject) if written and tool.refusal is None else {},
            "refused": refused,
            "notes": notes,
        }
    return texts | {"README.md": overview(tools, subject)}, tools


def require_modules(subject: Subject) -> None:
    """Refuse a profile whose ops are not the model's.

    Raises:
        InputError: a module does not exist, or cannot have its scheme.
    """
    for name in (*subject.profile.assignment, *subject.ops):
        if subject.holder(name) is None or name not in subject.ops:
            raise InputError(
                f"profile {subject.name}: {name} is not a module of {subject.plan.model}; make the plan again"
                " (snakemake --cores 1 --forcerun plan_quantization)"
            )
    for scheme, names in subject.groups.items():
        for name in names:
            kind = subject.modules.get(name, torch.nn.Linear)
            if scheme != INC_INT8 and issubclass(kind, PLAIN) and not issubclass(kind, torch.nn.Linear):
                raise InputError(
                    f"profile {subject.name}: {name} is a {kind.__name__}, and {scheme} is for a"
                    " Linear; build the profiles again (snakemake --cores 1 --forcerun build_profiles)"
                )


def unnamed_ops(subject: Subject) -> dict[str, str]:
    """{scheme: why no tool can hold it}, for schemes of ops that are no Linear or Embedding of the model as it loads.

    Such ops are matrices of experts, the Conv1D of GPT-2, and the plain modules inside of others.
    """
    found = {}
    for scheme, names in subject.groups.items():
        for name in names:
            holder = subject.holder(name)
            kind = subject.modules[holder] if holder else torch.nn.Module
            if holder != name or not issubclass(kind, PLAIN):
                what = name if holder == name else f"{name} lies in {holder}, which"
                found[scheme] = f"{what} is a {kind.__name__}, and no tool has a name for its matrix alone"
                break
    return found


def refusals(tool: Tool, subject: Subject) -> dict[str, str]:
    """{scheme: why the tool cannot hold it} of a profile's schemes that the tool cannot hold in every op."""
    if unnamed := unnamed_ops(subject):
        return unnamed
    if tool.refusal is None:
        return dict.fromkeys((scheme for scheme in subject.groups if scheme != INC_INT8), NO_SCHEMES)
    found = dict.fromkeys((scheme for scheme in subject.groups if scheme == INC_INT8), ONLY_INC)
    for name, scheme in subject.schemes.items():
        reasons: dict[str, list[str]] = {}
        for op in subject.groups[name]:
            if reason := tool.refusal(scheme, subject.ops[op], op in subject.shared):
                reasons.setdefault(reason, []).append(op)
        if reasons:
            found[name] = "; ".join(
                reason if ops == subject.groups[name] else f"{reason} ({counted(len(ops), 'op')}, such as {ops[0]})"
                for reason, ops in reasons.items()
            )
    return found


def without_file(refused: dict[str, str], reason: str) -> str:
    """That a tool gets no file, for one of the reasons."""
    schemes = listed([scheme for scheme, own in refused.items() if own == reason])
    return f"No file, because the tool cannot hold {schemes}: {reason}."


def overview(tools: dict[str, Any], subject: Subject) -> str:
    """The notes of every tool in one file, because JSON has no comments."""
    lines = [f"# {code(subject.name)}", *(line for text in subject.described() for line in ("", prose(text)))]
    for tool in tools.values():
        lines += ["", f"## {tool['title']}", ""]
        lines += [f"Files: {', '.join(code(file) for file in tool['files'])}", ""] if tool["files"] else []
        lines += [line for note in tool["notes"] for line in (prose(note), "")][:-1]
    return "\n".join(lines) + "\n"


def export(
    directory: Path,
    profiles: Profiles,
    plan: Plan,
    modules: Modules,
    published: Collection[str],
    calibration_samples: int,
    made_from: Iterable[Document] = (),
    why: Why | NotMeasured = NOT_EXPLAINED,
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
        why: the causes of losses, with cures.

    Returns:
        {model, plan_digest, profiles: {profile: {tool: ...}}, missed}; paths are relative to the directory's parent.

    Raises:
        InputError: as `export_profile` says, or `directory` holds other files than exports. Then nothing is written.
    """
    texts: dict[str, str] = {}
    index: dict[str, Any] = {}
    for name, profile in profiles.profiles.items():
        cured = (
            (tuple(c for c in why.causes if name in c.profiles), why.cured.get(name)) if isinstance(why, Why) else ()
        )
        subject = Subject(plan, name, profile, modules, published, calibration_samples, *cured)
        files, index[name] = export_profile(subject)
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
