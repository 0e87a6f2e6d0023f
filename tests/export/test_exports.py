"""An export names exactly the modules that a profile keeps, in every tool's own form, or nothing is written."""

import ast
import fnmatch
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from build import a_plan, a_profile, an_op, profiles_of
from markdown_it import MarkdownIt
from test_standin import write_snapshot

from auto_quantize_model.export.exports import (
    IS_FUSED,
    IS_IDLE,
    NO_HEAD,
    TOOLS,
    common_name,
    export,
    regular_expressions,
)
from auto_quantize_model.files import InputError
from auto_quantize_model.models.snapshot import load_model, module_types, tensor_names
from auto_quantize_model.schemes.scheme import assigned

PATCHES = "model.visual.patch_embed.proj"
Q_PROJ, K_PROJ, V_PROJ = (f"model.language_model.layers.0.self_attn.{name}_proj" for name in "qkv")
UP_PROJ, GATE_PROJ = (f"model.visual.blocks.0.mlp.{name}_proj" for name in ("up", "gate"))
KEPT = ["lm_head", PATCHES, Q_PROJ, UP_PROJ]


@pytest.fixture(scope="module")
def modules(tiny_snapshot: Path) -> dict[str, Any]:
    return module_types(tiny_snapshot)


@pytest.fixture
def written(tmp_path: Path, tiny_snapshot: Path, modules: Any) -> tuple[Path, dict[str, Any]]:
    """The folder of an exported profile, and its part of the index."""
    index = export_kept(tmp_path / "exports", KEPT, modules, tensor_names(tiny_snapshot))
    return tmp_path / "exports" / "recommended", index["profiles"]["recommended"]


def export_kept(
    directory: Path, kept: list[str], modules: Any, published: Any, excluded: Any = (), idle: Any = ()
) -> dict[str, Any]:
    executions = dict.fromkeys(kept, (0, 1)) | dict.fromkeys(idle, (0, 0))
    plan = a_plan([an_op(name, executions=counts) for name, counts in executions.items()], excluded=excluded)
    return export(directory, profiles_of({"recommended": a_profile(kept)}), plan, modules, published, 2)


def linears(modules: dict[str, Any]) -> list[str]:
    return [name for name, kind in modules.items() if issubclass(kind, torch.nn.Linear)]


def imported(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_skeleton_has_the_modules_of_the_model(tiny_snapshot: Path, modules: Any) -> None:
    loaded = {name: module for name, module in load_model(tiny_snapshot).named_modules()}
    assert list(modules) == list(loaded)
    assert all(isinstance(loaded[name], kind) for name, kind in modules.items())


def test_every_file_is_in_the_index(written: Any) -> None:
    directory, index = written
    assert set(index) == set(TOOLS)
    listed = sorted(name for tool in index.values() for name in tool["files"])
    files = {path.name for path in directory.iterdir()} - {"README.md"}
    assert listed == sorted(f"exports/recommended/{name}" for name in files)


def test_inc_matches_its_own_names_whole(written: Any, modules: Any) -> None:
    op_name_dict = json.loads((written[0] / "inc_op_name_dict.json").read_text())
    names = [name + wrapper for name in modules for wrapper in ("", ".module")]
    matched = {name for name in names for pattern in op_name_dict if re.fullmatch(pattern, name)}
    assert matched == {name + wrapper for name in KEPT for wrapper in ("", ".module")}
    script = imported(written[0] / "inc_quantize.py")
    assert (script.OP_NAME_DICT, script.REDUCE_RANGE) == (op_name_dict, True)


def in_vllm(name: str) -> str:
    """vLLM's name of a Qwen2.5-VL module."""
    for before, after in (("model.visual.", "visual."), ("model.language_model.", "language_model.model.")):
        name = name.replace(before, after)
    return "language_model.lm_head" if name == "lm_head" else name


def test_the_recipe_means_the_same_modules_under_every_prefix(written: Any, modules: Any, tiny_snapshot: Path) -> None:
    recipe = yaml.safe_load((written[0] / "llm_compressor_recipe.yaml").read_text())
    modifier = recipe["quant_stage"]["quant_modifiers"]["QuantizationModifier"]
    patterns = [entry.removeprefix("re:") for entry in modifier["ignore"]]
    expected = {"lm_head", Q_PROJ, K_PROJ, V_PROJ, UP_PROJ, GATE_PROJ}
    for naming in (str, in_vllm, lambda name: name.replace("model.visual", "visual")):
        ignored = {name for name in linears(modules) if any(re.match(pattern, naming(name)) for pattern in patterns)}
        assert ignored == expected


def test_what_a_tool_drops_or_adds_is_named_with_the_reason(written: Any) -> None:
    recipe, torchao, nncf = (written[1][tool] for tool in ("llm_compressor", "torchao", "nncf"))
    assert recipe["dropped"] == [PATCHES]
    assert recipe["added"] == dict.fromkeys([K_PROJ, V_PROJ, GATE_PROJ], IS_FUSED)
    assert recipe["notes"] == [
        f"Left out, because the tool quantizes only Linear: {PATCHES}.",
        f"Kept too ({IS_FUSED}): {K_PROJ}, {V_PROJ}, {GATE_PROJ}.",
        TOOLS["llm_compressor"].remark,
    ]
    assert torchao["dropped"] == [PATCHES] and torchao["added"] == {}
    assert nncf["dropped"] == [] and nncf["added"] == {} and nncf["notes"] == [TOOLS["nncf"].remark]


def test_every_file_that_takes_a_comment_says_what_its_user_has_to_know(written: Any) -> None:
    for name, tool in written[1].items():
        opening = " ".join(
            line.lstrip("# ")
            for file in tool["files"]
            if not file.endswith(".json")
            for line in (written[0] / Path(file).name).read_text().splitlines()
        )
        assert TOOLS[name].remark in opening or name == "modelopt"
        assert all(note in opening for note in tool["notes"]) or name == "modelopt"
        assert all(note in (written[0] / "README.md").read_text() for note in tool["notes"])


def test_llm_compressor_never_quantizes_lm_head(tmp_path: Path, modules: Any) -> None:
    tools = export_kept(tmp_path / "exports", [Q_PROJ], modules, [])["profiles"]["recommended"]
    assert [tool for tool in tools if "lm_head" in tools[tool]["kept"]] == ["llm_compressor"]
    assert tools["llm_compressor"]["added"] == dict.fromkeys([K_PROJ, V_PROJ], IS_FUSED) | {"lm_head": NO_HEAD}
    assert r"re:(.*\.)?lm_head$" in (tmp_path / "exports/recommended/llm_compressor_recipe.yaml").read_text()


def test_a_model_without_lm_head_needs_none_to_be_kept(tmp_path: Path) -> None:
    modules = {Q_PROJ: torch.nn.Linear}
    tools = export_kept(tmp_path / "exports", [Q_PROJ], modules, [])["profiles"]["recommended"]
    assert tools["llm_compressor"]["kept"] == [Q_PROJ]


def test_an_op_that_never_ran_is_kept_by_every_tool_that_could_quantize_it(tmp_path: Path, modules: Any) -> None:
    index = export_kept(tmp_path / "exports", [], modules, [], idle=[PATCHES, UP_PROJ])
    for tool, entry in index["profiles"]["recommended"].items():
        unknown = [PATCHES, UP_PROJ] if torch.nn.Conv3d in TOOLS[tool].types else [UP_PROJ]
        assert [name for name, reason in entry["added"].items() if reason == IS_IDLE] == unknown
        assert set(unknown) <= set(entry["kept"]) and entry["dropped"] == []
        assert f"Kept too ({IS_IDLE}): {', '.join(unknown)}." in entry["notes"]
        assert (entry["added"].get(GATE_PROJ) == IS_FUSED) == TOOLS[tool].fuses


def test_a_whole_vision_tower_is_counted_in_the_note_and_named_in_the_index(tmp_path: Path) -> None:
    tower = [f"model.visual.blocks.{number}.mlp.fc1" for number in range(40)]
    modules = dict.fromkeys(tower, torch.nn.Linear)
    entry = export_kept(tmp_path / "exports", [], modules, [], idle=tower)["profiles"]["recommended"]["torchao"]
    assert list(entry["added"]) == tower
    assert entry["notes"][0].endswith("model.visual.blocks.11.mlp.fc1 and 28 more.")


def test_modelopt_turns_the_kept_off_after_linears_and_convolutions_were_turned_on(written: Any, modules: Any) -> None:
    entries = json.loads((written[0] / "modelopt_quant_cfg.json").read_text())["quant_cfg"]

    def enabled(module: str, kind: type, quantizer: str) -> bool:
        """As ModelOpt reads the list: the last entry that matches a quantizer and its module's class decides."""
        name = f"{module}.{quantizer}"
        found = [entry for entry in entries if fnmatch.fnmatch(name, entry["quantizer_name"])]
        mine = [entry for entry in found if entry.get("parent_class") in (None, f"nn.{kind.__name__}")]
        return bool(mine[-1].get("enable", True))

    assert entries[0] == {"quantizer_name": "*", "enable": False}
    everything = modules | {"model.visual.blocks.0.norm1": torch.nn.LayerNorm}
    for quantizer in ("weight_quantizer", "input_quantizer"):
        on = {name for name, kind in everything.items() if enabled(name, kind, quantizer)}
        assert on == set(linears(modules)) - {"lm_head", Q_PROJ, K_PROJ, V_PROJ, UP_PROJ, GATE_PROJ}
        assert enabled("model.other.proj", torch.nn.Conv3d, quantizer)
    assert not enabled("model.language_model.layers.0.self_attn", torch.nn.Module, "q_bmm_quantizer")


def nncf_that_traces(ran: list[str]) -> ModuleType:
    """What the exported function calls of NNCF, for a trace in which the modules of `ran` are all that ran."""
    weights = [SimpleNamespace(node_name=f"{name}.weight", node_type="nncf_model_const") for name in ran]
    graph = SimpleNamespace(
        get_all_nodes=lambda: weights,
        get_next_nodes=lambda node: [SimpleNamespace(node_name=f"{node.node_name}/linear/0", node_type="linear")],
    )
    nncf: Any = ModuleType("nncf")
    nncf.build_graph = lambda traced, example_input: graph
    nncf.IgnoredScope = lambda names, validate: names
    return nncf


def test_nncf_passes_over_what_does_not_run_if_it_never_ran(
    tmp_path: Path, tiny_snapshot: Path, modules: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_kept(tmp_path / "exports", [Q_PROJ], modules, [], idle=[UP_PROJ])
    ignored_scope = imported(tmp_path / "exports" / "recommended" / "nncf_ignored_scope.py").ignored_scope
    model = load_model(tiny_snapshot)
    for ran in ([Q_PROJ], [Q_PROJ, UP_PROJ]):
        monkeypatch.setitem(sys.modules, "nncf", nncf_that_traces(ran))
        assert ignored_scope(model, {}) == [f"{name}.weight/linear/0" for name in ran]
    monkeypatch.setitem(sys.modules, "nncf", nncf_that_traces([UP_PROJ]))
    with pytest.raises(ValueError, match=f"{re.escape(Q_PROJ)}: NNCF's graph has no node of it"):
        ignored_scope(model, {})


def test_torchao_filters_the_kept_out(written: Any, tiny_snapshot: Path, modules: Any) -> None:
    filter_fn = imported(written[0] / "torchao_quantize.py").filter_fn
    model = load_model(tiny_snapshot)
    quantized = {name for name, module in model.named_modules() if filter_fn(module, name)}
    assert quantized == set(linears(modules)) - set(KEPT)


def test_what_the_plan_keeps_is_kept_by_every_tool(tmp_path: Path, modules: Any) -> None:
    norm = "model.language_model.norm"
    index = export_kept(tmp_path / "exports", [], modules, [], excluded=[Q_PROJ, norm])
    assert index["profiles"]["recommended"]["torchao"]["kept"] == [Q_PROJ]


def test_an_op_that_the_profile_quantizes_is_in_no_list(tmp_path: Path, modules: Any) -> None:
    profile = a_profile([Q_PROJ], assignment=assigned([GATE_PROJ]))
    index = export(tmp_path / "e", profiles_of({"one": profile}), a_plan([GATE_PROJ, Q_PROJ]), modules, [], 2)
    assert index["profiles"]["one"]["torchao"]["kept"] == [Q_PROJ]


def test_an_op_that_the_model_does_not_have_is_refused_and_nothing_written(tmp_path: Path, modules: Any) -> None:
    (tmp_path / "exports").mkdir()
    (tmp_path / "exports" / "before").touch()
    with pytest.raises(InputError, match="model.gone is not a module of tiny; make the plan again"):
        export_kept(tmp_path / "exports", ["model.gone"], modules, [])
    assert [path.name for path in (tmp_path / "exports").iterdir()] == ["before"]


@pytest.mark.parametrize(
    "architecture",
    [
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2VLForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
        "Qwen2ForCausalLM",
        "LlamaForCausalLM",
    ],
)
def test_every_op_of_every_family_can_be_exported(architecture: str, tmp_path: Path) -> None:
    directory = write_snapshot(architecture, tmp_path / "snapshot")
    modules, weights = module_types(directory), tensor_names(directory)
    ops = [name for name, kind in modules.items() if issubclass(kind, (torch.nn.Linear, torch.nn.Conv3d))]
    published = [weight.removesuffix(".weight") for weight in weights]
    assert ops
    for op in ops:
        (pattern,) = regular_expressions([common_name(op, modules, weights)])
        assert [name for name in modules if re.match(pattern, name)] == [op]
        tied = op == "lm_head" and "lm_head.weight" not in weights
        assert len([name for name in published if re.match(pattern, name)]) == (0 if tied else 1)


def test_a_name_that_means_two_modules_is_refused() -> None:
    kinds: dict[str, type[torch.nn.Module]] = {"model.proj": torch.nn.Linear, "other.proj": torch.nn.Linear}
    with pytest.raises(
        InputError, match=r"model.proj: the common part of its names, proj, stands in other.proj as well"
    ):
        common_name("model.proj", kinds, [])
    assert common_name("other.proj", kinds, []) == "other.proj"


def test_a_neighbour_with_a_longer_number_is_another_module() -> None:
    kinds: dict[str, type[torch.nn.Module]] = {f"model.layers.{n}.proj": torch.nn.Linear for n in (1, 11, 21)}
    name = common_name("model.layers.1.proj", kinds, [])
    assert [other for other in kinds if re.match(regular_expressions([name])[0], other)] == ["model.layers.1.proj"]


HOSTILE = 'x"""\nimport os\nos.abort()\n"""\\ \u2028- evil: [*.weight]\x1b\r`|<script>'


def test_a_strangers_name_is_a_literal_in_every_file_and_no_code(tmp_path: Path) -> None:
    kept = [f"model.{HOSTILE}", "model.x*[0]?"]
    modules: dict[str, type[torch.nn.Module]] = dict.fromkeys([*kept, "model.x10"], torch.nn.Linear)
    modules["model.conv"] = torch.nn.Conv3d
    ops = [*(an_op(name) for name in kept), an_op("model.x10", executions=(0,))]
    profiles = profiles_of({"recommended": a_profile([*kept, "model.conv"])})
    export(tmp_path / "exports", profiles, a_plan(ops, model=HOSTILE), modules, [], 2)
    directory = tmp_path / "exports" / "recommended"
    for path in directory.iterdir():
        assert path.suffix == ".json" or not set(path.read_text()) & set("\x1b\r\u2028")
    for name in ("inc_quantize", "nncf_ignored_scope", "torchao_quantize"):
        tree = ast.parse((directory / f"{name}.py").read_text())
        assert "import os os.abort()" in (ast.get_docstring(tree) or "")
        assert not any(
            alias.name == "os" for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        )
    module = imported(directory / "torchao_quantize.py")
    quantized = {name for name in modules if module.filter_fn(torch.nn.Linear(1, 1), name)}
    assert quantized == {"model.conv"}  # by its name; its class is none that torchao quantizes
    recipe = yaml.safe_load((directory / "llm_compressor_recipe.yaml").read_text())
    assert list(recipe) == ["quant_stage"]
    entries = json.loads((directory / "modelopt_quant_cfg.json").read_text())["quant_cfg"]
    matching = [
        entry for entry in entries[5:] if fnmatch.fnmatch("model.x*[0]?.weight_quantizer", entry["quantizer_name"])
    ]
    assert len(matching) == 1 and not fnmatch.fnmatch("model.x*0y.weight_quantizer", matching[0]["quantizer_name"])
    readme = MarkdownIt("commonmark").render((directory / "README.md").read_text())
    assert "<script" not in readme and readme.count("<h2>") == len(TOOLS)


def test_a_profile_that_is_worse_than_all_int8_says_so_in_its_files(tmp_path: Path, modules: Any) -> None:
    profile = a_profile([Q_PROJ], None, top1_agreement=0.5, worse={"top1_agreement": 0.75})
    export(tmp_path / "exports", profiles_of({"minimal": profile}), a_plan([Q_PROJ]), modules, [], 2)
    for file in ("README.md", "inc_quantize.py", "llm_compressor_recipe.yaml"):
        text = (tmp_path / "exports" / "minimal" / file).read_text()
        assert "Profile minimal of tiny: 1 op in FP32, no error on held-out samples" in text
        assert "minimal is worse than all-INT8 in top-1 (0.5, all-INT8 0.75)." in text


def test_files_for_inc_say_so_where_inc_cannot_convert_the_model(tmp_path: Path, modules: Any) -> None:
    plan = a_plan(reduce_range=False, inc_check={"status": "cannot", "reason": "its model differs"})
    index = export(tmp_path / "exports", profiles_of({"one": a_profile(["lm_head"])}), plan, modules, [], 2)
    assert index["profiles"]["one"]["inc"]["notes"][0] == (
        "Do not use: INC 2.6 cannot convert this model (its model differs)."
    )
    assert "Do not use: INC 2.6" in (tmp_path / "exports" / "one" / "inc_quantize.py").read_text()
    assert "Do not use" not in " ".join(index["profiles"]["one"]["nncf"]["notes"])
