"""An export quantizes exactly the ops of a profile in the measured schemes, or the tool gets no file and a reason."""

import ast
import fnmatch
import html
import importlib.util
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from build import a_cause, a_cure, a_plan, a_point, a_profile, a_why, an_op, profiles_of
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, apply_quantization_config
from markdown_it import MarkdownIt
from test_standin import write_snapshot

from auto_quantize_model.export import autoround, inc_int8, llm_compressor, modelopt, torchao
from auto_quantize_model.export.exports import NO_SCHEMES, ONLY_INC, TOOLS, export
from auto_quantize_model.export.names import common_name, regular_expressions
from auto_quantize_model.files import InputError
from auto_quantize_model.made.tiny_text import write_tiny_text
from auto_quantize_model.models.snapshot import load_model, module_types, tensor_names
from auto_quantize_model.records import Cured, Unit
from auto_quantize_model.report.explanations import NOT_EXPLAINED
from auto_quantize_model.schemes.compressed import PRESETS, fields_of, scheme_of
from auto_quantize_model.schemes.scheme import assigned

PATCHES = "model.visual.patch_embed.proj"
LAYER = "model.language_model.layers.0"
Q_PROJ, K_PROJ, V_PROJ = (f"{LAYER}.self_attn.{name}_proj" for name in "qkv")
O_PROJ, DOWN_PROJ = f"{LAYER}.self_attn.o_proj", f"{LAYER}.mlp.down_proj"
GATE_PROJ, UP_PROJ = (f"model.visual.blocks.0.mlp.{name}_proj" for name in ("gate", "up"))
KEPT = ["lm_head", PATCHES, Q_PROJ, UP_PROJ]
# A scheme of one's own, whose groups fit the tiny model, and presets.
G32 = scheme_of("W4A16_G32", {"weights": {"num_bits": 4, "strategy": "group", "group_size": 32}})
SCHEMES = {"W4A16_G32": G32} | {name: scheme_of(name) for name in PRESETS}
SERVED = (
    dict.fromkeys((Q_PROJ, K_PROJ, V_PROJ), "W4A16_G32")
    | dict.fromkeys((GATE_PROJ, UP_PROJ), "FP8_DYNAMIC")
    | {O_PROJ: "NVFP4", DOWN_PROJ: "MXFP8", "lm_head": "W8A8"}
)
UNITS = (Unit("qkv", (Q_PROJ, K_PROJ, V_PROJ), False, (), {}), Unit("gate_up", (GATE_PROJ, UP_PROJ), False, (), {}))


@pytest.fixture(scope="module")
def modules(tiny_snapshot: Path) -> dict[str, Any]:
    return module_types(tiny_snapshot)


def written(
    folder: Path,
    assignment: Mapping[str, str],
    modules: Any,
    published: Any = (),
    kept: Sequence[str] = (),
    why: Any = NOT_EXPLAINED,
    **plan: Any,
) -> tuple[Path, dict[str, Any]]:
    """The folder of an exported profile, and its part of the index."""
    ops = plan.pop("ops", [an_op(name, shape=(32, 32)) for name in (*assignment, *kept)])
    schemes = {"inc_int8": {}} | {name: fields_of(scheme) for name, scheme in SCHEMES.items()}
    point = a_point(divergence=0.0123, bits=4.75, weight_bytes=3_000_000, top1_agreement=0.75, sqnr_db=31.0)
    profile = a_profile(point, assignment=dict(assignment), kept=tuple(kept))
    made_for = a_plan(ops, **{"schemes": schemes, "units": UNITS, **plan})
    index = export(folder / "exports", profiles_of({"balanced": profile}), made_for, modules, published, 2, (), why)
    return folder / "exports" / "balanced", index["profiles"]["balanced"]


def in_int8(folder: Path, kept: Sequence[str], modules: Any, **more: Any) -> tuple[Path, dict[str, Any]]:
    return written(folder, assigned([K_PROJ, V_PROJ, O_PROJ]), modules, kept=kept, **more)


@pytest.fixture
def mixed(tmp_path: Path, tiny_snapshot: Path, modules: Any) -> tuple[Path, dict[str, Any]]:
    return written(tmp_path, SERVED, modules, tensor_names(tiny_snapshot), kept=[PATCHES])


def linears(modules: dict[str, Any]) -> list[str]:
    return [name for name, kind in modules.items() if issubclass(kind, torch.nn.Linear)]


def imported(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recipe_in(folder: Path) -> dict[str, Any]:
    recipe = yaml.safe_load((folder / "llm_compressor_recipe.yaml").read_text())
    modifier: dict[str, Any] = recipe["quant_stage"]["quant_modifiers"]["QuantizationModifier"]
    return modifier


def test_a_skeleton_has_the_modules_of_the_model(tiny_snapshot: Path, modules: Any) -> None:
    loaded = {name: module for name, module in load_model(tiny_snapshot).named_modules()}
    assert list(modules) == list(loaded)
    assert all(isinstance(loaded[name], kind) for name, kind in modules.items())


def test_every_file_is_in_the_index(mixed: Any) -> None:
    directory, index = mixed
    assert list(index) == list(TOOLS)
    listed = sorted(name for tool in index.values() for name in tool["files"])
    files = {path.name for path in directory.iterdir()} - {"README.md"}
    assert listed == sorted(f"exports/balanced/{name}" for name in files)


def test_llm_compressor_gives_each_module_the_scheme_of_the_assignment(mixed: Any, tiny_snapshot: Path) -> None:
    model = load_model(tiny_snapshot)
    apply_quantization_config(model, QuantizationConfig(**recipe_in(mixed[0])))
    given = {
        name: module.quantization_scheme
        for name, module in model.named_modules()
        if hasattr(module, "quantization_scheme")
    }
    assert set(given) == set(SERVED)
    for name, scheme in given.items():
        given_fields, measured = (
            {side: fields and fields | {"observer": None} for side, fields in fields_of(of).items()}
            for of in (scheme, SCHEMES[SERVED[name]])
        )
        assert given_fields == measured, name
    assert mixed[1]["llm_compressor"]["quantized"] == SERVED


NORM = f"{LAYER}.input_layernorm"
ALL_CURED = Cured(("qkv", "gate_up", "lm_head"), ("qkv", "gate_up", "lm_head"), 0.04, 0.012, 0.028, 0.02, 0.03)


def causes_of(cured: Cured) -> Any:
    """The query, key and value are smoothed with other ranges; two more units have one cure each."""
    together = {"smoothing": "0.8", "mse_weight": ""}
    smoothed = (a_cure("together", settings=together, folds_into=NORM),)
    members = {"profiles": ("balanced",)}
    return a_why(
        a_cause((Q_PROJ, K_PROJ, V_PROJ), "W4A16_G32", unit="qkv", cures=smoothed, chosen="together", **members),
        a_cause(
            (GATE_PROJ, UP_PROJ),
            "FP8_DYNAMIC",
            unit="gate_up",
            cures=(a_cure("mse_weight"),),
            chosen="mse_weight",
            **members,
        ),
        a_cause(
            ("lm_head",),
            "W8A8",
            unit="lm_head",
            cures=(a_cure("asymmetric_inputs"),),
            chosen="asymmetric_inputs",
            **members,
        ),
        balanced=cured,
    )


def test_cures_that_help_the_whole_profile_have_a_recipe_of_their_own(
    tmp_path: Path, tiny_snapshot: Path, modules: Any
) -> None:
    folder, index = written(tmp_path, SERVED, modules, tensor_names(tiny_snapshot), [PATCHES], causes_of(ALL_CURED))
    plain, text = (
        (folder / "llm_compressor_recipe.yaml").read_text(),
        (folder / "llm_compressor_with_cures.yaml").read_text(),
    )
    assert "memoryless_mse" not in plain and "SmoothQuant" not in plain
    assert "exports/balanced/llm_compressor_with_cures.yaml" in index["llm_compressor"]["files"]
    head = " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    assert "the cures of qkv, gate_up and lm_head regain 0.028 of 0.04 nats" in head
    assert "qkv in W4A16_G32, alone: Smoothing 0.8 and MSE ranges of the weight regain 0.03 of 0.04 nats" in head
    assert 'Before that, use oneshot(model=model, recipe="llm_compressor_smoothing.yaml"' in head
    before_that = yaml.safe_load((folder / "llm_compressor_smoothing.yaml").read_text())
    smoothing = before_that["smoothing_stage"]["smoothing_0_modifiers"]["SmoothQuantModifier"]
    ((balanced, before),) = smoothing["mappings"]
    assert smoothing["smoothing_strength"] == 0.8
    named = [name for name in modules if re.match(before.removeprefix("re:"), name)]
    assert named == [NORM] and len(balanced) == 3
    assert [name for name in modules if any(re.match(one.removeprefix("re:"), name) for one in balanced)] == [
        Q_PROJ,
        K_PROJ,
        V_PROJ,
    ]
    modifier = yaml.safe_load(text)["quant_stage"]["quant_modifiers"]["QuantizationModifier"]
    model = load_model(tiny_snapshot)
    apply_quantization_config(model, QuantizationConfig(**modifier))
    given = {
        name: module.quantization_scheme
        for name, module in model.named_modules()
        if hasattr(module, "quantization_scheme")
    }
    assert set(given) == set(SERVED)
    observers = {name: scheme.weights.observer for name, scheme in given.items()}
    assert {name for name, own in observers.items() if own == "memoryless_mse"} == {
        Q_PROJ,
        K_PROJ,
        V_PROJ,
        GATE_PROJ,
        UP_PROJ,
    }
    assert given[Q_PROJ].weights.observer_kwargs == {"maxshrink": 0.8, "grid": 25, "patience": 20, "norm": 2.0}
    assert given["lm_head"].input_activations.symmetric is False and given["lm_head"].weights.symmetric
    plain_weights = fields_of(SCHEMES["NVFP4"])["weights"] | {"observer": "memoryless_minmax"}
    assert fields_of(given[O_PROJ])["weights"] == plain_weights


def test_cures_that_do_not_help_the_whole_profile_have_no_recipe(tmp_path: Path, modules: Any) -> None:
    folder, index = written(tmp_path, SERVED, modules, kept=[PATCHES], why=causes_of(Cured(("qkv",), (), 0.04)))
    assert not (folder / "llm_compressor_with_cures.yaml").exists()
    assert any(note.startswith("Cures help qkv alone.") for note in index["llm_compressor"]["notes"])


def test_llm_compressor_is_asked_for_the_ranges_that_were_measured() -> None:
    own = {"weights": {"num_bits": 8}, "input_activations": {"num_bits": 8, "strategy": "tensor", "observer": "minmax"}}
    for name, scheme in {**SCHEMES, "own": scheme_of("own", own)}.items():
        for side, fields in fields_of(scheme).items():
            if fields:
                observer = None if fields["dynamic"] is True else llm_compressor.OBSERVERS[side]
                assert llm_compressor.stated(side, fields).get("observer") == observer, name


@pytest.mark.parametrize("preset", PRESETS)
def test_a_recipe_holds_every_preset(preset: str, tmp_path: Path, modules: Any) -> None:
    (group,) = recipe_in(written(tmp_path, {"lm_head": preset}, modules)[0])["config_groups"].values()
    wanted = fields_of(scheme_of(preset))
    for side, fields in wanted.items():
        if fields and fields["dynamic"] is not True:
            fields["observer"] = llm_compressor.OBSERVERS[side]
    assert fields_of(QuantizationScheme(**group)) == wanted


def in_vllm(name: str) -> str:
    """vLLM's name of a Qwen2.5-VL module."""
    for before, after in (("model.visual.", "visual."), ("model.language_model.", "language_model.model.")):
        name = name.replace(before, after)
    return "language_model.lm_head" if name == "lm_head" else name


def test_the_recipe_names_each_linear_once_under_every_prefix(mixed: Any, modules: Any) -> None:
    recipe = recipe_in(mixed[0])
    groups = {scheme: group["targets"] for scheme, group in recipe["config_groups"].items()}
    groups["ignored"] = recipe["ignore"]
    for naming in (str, in_vllm, lambda name: name.replace("model.visual", "visual")):
        for name in linears(modules):
            own = [
                scheme
                for scheme, patterns in groups.items()
                for pattern in patterns
                if re.match(pattern.removeprefix("re:"), naming(name))
            ]
            assert own == [SERVED.get(name, "ignored")]


def test_lm_head_in_vllm_is_explained_where_a_profile_quantizes_it(tmp_path: Path, mixed: Any, modules: Any) -> None:
    assert "0.20.0" in llm_compressor.LM_HEAD and llm_compressor.LM_HEAD in mixed[1]["llm_compressor"]["notes"]
    without = written(tmp_path / "without", {O_PROJ: "NVFP4"}, modules)[1]["llm_compressor"]["notes"]
    assert without == [llm_compressor.REMARK]


def test_a_tool_that_cannot_hold_a_scheme_gets_no_file_and_the_reason(mixed: Any) -> None:
    directory, index = mixed
    assert index["modelopt"]["files"] == [] and index["modelopt"]["quantized"] == {}
    assert index["modelopt"]["refused"] == dict.fromkeys(
        ("W4A16_G32", "W8A8"), f"{modelopt.INTEGERS}, so the values differ"
    )
    assert index["torchao"]["refused"] == {} and index["autoround"]["refused"] == {}
    for tool in ("inc", "nncf"):
        assert index[tool]["files"] == []
        assert index[tool]["refused"] == dict.fromkeys(dict.fromkeys(SERVED.values()), NO_SCHEMES)
    readme = " ".join((directory / "README.md").read_text().split())
    for tool in index.values():
        assert all(note in html.unescape(readme).replace("\\", "") for note in tool["notes"])
    assert "No file, because the tool cannot hold W4A16_G32, W8A8: ModelOpt maps" in index["modelopt"]["notes"][0]


FORMS = {
    "mixtral": (
        "model.layers.0.mlp.experts.down_proj.3",
        "model.layers.0.mlp.experts.down_proj.3 lies in model.layers.0.mlp.experts, which is a MixtralExperts",
    ),
    "gpt2": ("transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_attn is a Conv1D"),
    "opt": (
        "model.decoder.embed_positions.plain",
        "model.decoder.embed_positions.plain lies in model.decoder.embed_positions, which is a"
        " OPTLearnedPositionalEmbedding",
    ),
}


@pytest.mark.parametrize("model_type", FORMS)
@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "inc_int8"])
def test_a_profile_with_a_matrix_that_is_no_module_is_refused_for_every_tool_by_name(
    model_type: str, scheme: str, tmp_path: Path
) -> None:
    op_name, what = FORMS[model_type]
    kind = "Embedding" if op_name.endswith(".plain") else "Linear"
    if kind == "Embedding" and scheme != "inc_int8":
        pytest.skip("compressed-tensors quantizes no Embedding")
    snapshot = write_tiny_text(model_type, tmp_path / "snapshot")
    is_expert = ".experts." in op_name
    ops = [an_op(op_name, kind, shape=(32, 32), expert=is_expert), an_op("lm_head", shape=(32, 32))]
    modules = module_types(snapshot)
    assert op_name not in modules or modules[op_name].__name__ == "Conv1D"
    folder, tools = written(tmp_path, {op_name: scheme, "lm_head": "W8A8"}, modules, ops=ops)
    assert {*tools} == {*TOOLS} and sorted(path.name for path in folder.iterdir()) == ["README.md"]
    reason = f"{what}, and no tool has a name for its matrix alone"
    for tool in tools.values():
        assert tool["files"] == [] and tool["quantized"] == {} and tool["refused"] == {scheme: reason}
        assert tool["notes"] == [f"No file, because the tool cannot hold {scheme}: {reason}."]
    # The same profile without that op is for all tools that can hold its scheme.
    _, tools = written(tmp_path / "without", {"lm_head": "W8A8"}, modules, ops=ops, kept=[op_name])
    assert tools["llm_compressor"]["files"] and tools["autoround"]["files"]


def test_an_op_of_a_module_that_the_model_does_not_have_is_refused(tmp_path: Path, modules: Any) -> None:
    with pytest.raises(InputError, match="nowhere.0 is not a module of tiny; make the plan again"):
        written(tmp_path, {"nowhere.0": "W8A8"}, {name: kind for name, kind in modules.items() if name})


def test_a_profile_of_incs_int8_is_for_inc_and_nncf_alone(tmp_path: Path, modules: Any) -> None:
    index = in_int8(tmp_path, [Q_PROJ], modules)[1]
    assert [tool for tool, entry in index.items() if entry["files"]] == ["inc", "nncf"]
    assert [entry["refused"] for entry in index.values() if not entry["files"]] == [{"inc_int8": ONLY_INC}] * 4


def test_every_file_that_takes_a_comment_says_what_its_user_has_to_know(mixed: Any) -> None:
    for tool in mixed[1].values():
        for file in tool["files"]:
            lines = (mixed[0] / Path(file).name).read_text().splitlines()
            opening = " ".join(line.lstrip("# ") for line in lines)
            assert all(note in opening for note in tool["notes"])
            assert "Profile balanced of tiny: 3 ops in W4A16_G32, 2 ops in FP8_DYNAMIC" in opening
            assert "A weight takes 4.75 bits on average, and all weights take 3 MB." in opening
            assert "KL divergence is 0.0123 nats (95 % interval 0.00615 to 0.0246 nats)" in opening
            assert "an SQNR of 31.00 dB" in opening and "75.00 % of the positions" in opening


def test_modelopt_turns_on_the_quantizers_of_the_assignment_alone(tmp_path: Path, modules: Any) -> None:
    assignment = {Q_PROJ: "FP8_DYNAMIC", O_PROJ: "NVFP4", DOWN_PROJ: "MXFP8", "lm_head": "FP8", GATE_PROJ: "NVFP4A16"}
    directory, index = written(tmp_path, assignment, modules)
    assert index["modelopt"]["quantized"] == assignment
    config = imported(directory / "modelopt_quantize.py").QUANT_CFG
    entries = config["quant_cfg"]
    assert entries[0] == {"quantizer_name": "*", "enable": False} and config["algorithm"] == "max"
    for name in modules:
        for side, args in (("weight", "weights"), ("input", "input_activations")):
            quantizer = f"{name}.{side}_quantizer"
            # As ModelOpt reads the list: the last entry that matches decides.
            last = [entry for entry in entries if fnmatch.fnmatch(quantizer, entry["quantizer_name"])][-1]
            own = getattr(SCHEMES[assignment[name]], args) if name in assignment else None
            assert last.get("cfg") == (modelopt.attributes(own) if own else None), quantizer


def test_modelopt_holds_floats_whose_values_are_the_same() -> None:
    able = [name for name in PRESETS if not modelopt.refusal(scheme_of(name), an_op("a"), False)]
    assert able == ["FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4", "NVFP4A16", "MXFP8", "MXFP8A16"]
    assert modelopt.attributes(scheme_of("FP8_BLOCK").weights)["block_sizes"] == {-1: 128, -2: 128}
    assert modelopt.refusal(scheme_of("MXFP4"), an_op("a"), False) == (
        f"{modelopt.ROUNDED_UP}, so the values of MXFP4 differ"
    )


def test_torchao_finds_each_module_of_the_assignment_and_no_other(mixed: Any, modules: Any) -> None:
    found = imported(mixed[0] / "torchao_quantize.py")
    # As torchao's FqnToConfig matches: the whole name.
    given = {
        name: scheme
        for scheme, patterns in found.MODULES.items()
        for name in modules
        for pattern in patterns
        if re.fullmatch(pattern, name)
    }
    assert given == SERVED
    assert found.CALIBRATED == ["NVFP4"]


def test_torchao_holds_the_schemes_that_it_computes_with_the_same_values() -> None:
    op = an_op("a", shape=(128, 128))
    able = {name: torchao.expression(scheme_of(name)) for name in PRESETS}
    able = {name: text for name, text in able.items() if text}
    assert [name for name in able if not name.startswith("W")] == (
        ["INT8", "FP8", "FP8_DYNAMIC", "NVFP4", "NVFP4A16", "MXFP4", "MXFP8"]
    )
    assert [name for name in able if name.startswith("W")] == (
        ["W8A8", "W4A16", "W4A16_ASYM", "W2A16", "W3A16", "W5A16", "W6A16", "W7A16", "W8A16"]
    )
    assert able["W4A16_ASYM"] == (
        "quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=quantization.PerGroup(128),"
        " mapping_type=quantization.MappingType.ASYMMETRIC)"
    )
    assert "ScaleCalculationMode.EVEN" in able["MXFP4"] and "ScaleCalculationMode.RCEIL" in able["MXFP8"]
    assert torchao.refusal(scheme_of("W4A8"), op, False) == (
        "torchao has no int4 in groups of 128 for weights with int8 per token, dynamic for inputs"
    )


def test_torchao_refuses_an_op_and_not_the_scheme_where_only_the_op_does_not_fit(tmp_path: Path, modules: Any) -> None:
    assignment = {Q_PROJ: "NVFP4", K_PROJ: "NVFP4", V_PROJ: "NVFP4", O_PROJ: "NVFP4", "lm_head": "FP8_DYNAMIC"}
    ops = [*(an_op(name, shape=(32, 32)) for name in list(assignment)[:-1]), an_op("lm_head", shape=(30, 32))]
    refused = written(tmp_path, assignment, modules, ops=ops)[1]["torchao"]["refused"]
    assert refused == {
        "NVFP4": f"{torchao.OWN_SCALE} (3 ops, such as {Q_PROJ})",
        "FP8_DYNAMIC": "torchao asks for rows and columns in multiples of 16",
    }


def test_autoround_gets_the_fields_of_its_own_schemes_by_the_names_of_the_model(mixed: Any) -> None:
    layer_config = imported(mixed[0] / "autoround_layer_config.py").LAYER_CONFIG
    assert set(layer_config) == set(SERVED)
    # These are AutoRound 0.16's presets W4A16 (with groups of 32), NVFP4, MXFP8 and INT8.
    assert layer_config[Q_PROJ] == {"bits": 4, "sym": True, "data_type": "int", "group_size": 32, "act_bits": 16}
    weights = {"bits": 4, "sym": True, "data_type": "nv_fp", "group_size": 16}
    inputs = {"act_bits": 4, "act_sym": True, "act_data_type": "nv_fp4_with_static_gs", "act_group_size": 16}
    assert layer_config[O_PROJ] == weights | inputs | {"act_dynamic": True}
    weights = {"bits": 8, "sym": True, "data_type": "mx_fp", "group_size": 32}
    inputs = {"act_bits": 8, "act_sym": True, "act_data_type": "mx_fp", "act_group_size": 32, "act_dynamic": True}
    assert layer_config[DOWN_PROJ] == weights | inputs
    weights = {"bits": 8, "sym": True, "data_type": "int", "group_size": -1}
    inputs = {"act_bits": 8, "act_sym": True, "act_data_type": "int", "act_group_size": -1, "act_dynamic": True}
    assert layer_config["lm_head"] == weights | inputs


def test_autoround_holds_the_format_of_every_preset_and_refuses_others() -> None:
    op = an_op("a")
    assert [name for name in PRESETS if autoround.refusal(scheme_of(name), op, False)] == []
    side = {"num_bits": 8, "strategy": "channel", "symmetric": False}
    assert autoround.refusal(scheme_of("mine", {"weights": side}), op, False) == (
        "AutoRound refuses asymmetric 8-bit weights"
    )
    inputs = {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": False}
    mine = scheme_of("mine", {"weights": {"num_bits": 4, "strategy": "channel"}, "input_activations": inputs})
    assert autoround.refusal(mine, op, False) == "AutoRound has no asymmetric int8 per token, dynamic for inputs"
    assert autoround.of_weights(scheme_of("FP8_BLOCK").weights)["group_size"] == (128, 128)


def test_inc_matches_its_own_names_whole(tmp_path: Path, modules: Any) -> None:
    directory, index = in_int8(tmp_path, KEPT, modules)
    op_name_dict = json.loads((directory / "inc_op_name_dict.json").read_text())
    names = [name + wrapper for name in modules for wrapper in ("", ".module")]
    matched = {name for name in names for pattern in op_name_dict if re.fullmatch(pattern, name)}
    assert matched == {name + wrapper for name in KEPT for wrapper in ("", ".module")}
    script = imported(directory / "inc_quantize.py")
    assert (script.OP_NAME_DICT, script.REDUCE_RANGE) == (op_name_dict, True)
    for tool in ("inc", "nncf"):
        assert index[tool]["kept"] == dict.fromkeys(KEPT, inc_int8.BY_PROFILE)
        assert index[tool]["quantized"] == assigned([K_PROJ, V_PROJ, O_PROJ])


def test_an_op_that_never_ran_is_kept(tmp_path: Path, modules: Any) -> None:
    ops = [*(an_op(name) for name in (K_PROJ, V_PROJ, O_PROJ)), an_op(PATCHES, executions=(0,))]
    index = in_int8(tmp_path, [], modules, ops=[*ops, an_op(UP_PROJ, executions=(0,))])[1]
    for tool in ("inc", "nncf"):
        assert index[tool]["kept"] == dict.fromkeys([PATCHES, UP_PROJ], inc_int8.IS_IDLE)
        assert index[tool]["notes"][0] == f"Kept too ({inc_int8.IS_IDLE}): {PATCHES}, {UP_PROJ}."


@pytest.mark.parametrize("kind", [torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d])
def test_a_convolution_that_the_profile_keeps_is_kept(kind: Any, tmp_path: Path) -> None:
    index = in_int8(tmp_path, [PATCHES], dict.fromkeys([K_PROJ, V_PROJ, O_PROJ], torch.nn.Linear) | {PATCHES: kind})[1]
    for tool in ("inc", "nncf"):
        assert index[tool]["kept"] == {PATCHES: inc_int8.BY_PROFILE}


def test_a_whole_vision_tower_is_counted_in_the_note_and_named_in_the_index(tmp_path: Path) -> None:
    tower = [f"model.visual.blocks.{number}.mlp.fc1" for number in range(40)]
    modules = dict.fromkeys([K_PROJ, V_PROJ, O_PROJ, *tower], torch.nn.Linear)
    ops = [*(an_op(name) for name in (K_PROJ, V_PROJ, O_PROJ)), *(an_op(name, executions=(0,)) for name in tower)]
    entry = in_int8(tmp_path, [], modules, ops=ops)[1]["nncf"]
    assert list(entry["kept"]) == tower
    assert entry["notes"][0].endswith("model.visual.blocks.11.mlp.fc1 and 28 more.")


def test_what_the_plan_keeps_is_kept(tmp_path: Path, modules: Any) -> None:
    norm = "model.language_model.norm"
    index = in_int8(tmp_path, [], modules, excluded=[Q_PROJ, norm])[1]
    assert index["nncf"]["kept"] == {Q_PROJ: inc_int8.BY_PLAN}


def test_files_for_inc_say_so_where_inc_cannot_convert_the_model(tmp_path: Path, modules: Any) -> None:
    check: Any = {"status": "cannot", "reason": "its model differs"}
    directory, index = in_int8(tmp_path, ["lm_head"], modules, inc_check=check)
    assert index["inc"]["notes"][0] == "Do not use: INC 2.6 cannot convert this model (its model differs)."
    assert "Do not use: INC 2.6" in (directory / "inc_quantize.py").read_text()
    assert "Do not use" not in " ".join(index["nncf"]["notes"])


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
    ops = [*(an_op(name) for name in (Q_PROJ, K_PROJ, V_PROJ, O_PROJ)), an_op(UP_PROJ, executions=(0,))]
    directory = in_int8(tmp_path, [Q_PROJ], modules, ops=ops)[0]
    ignored_scope = imported(directory / "nncf_ignored_scope.py").ignored_scope
    model = load_model(tiny_snapshot)
    for ran in ([Q_PROJ], [Q_PROJ, UP_PROJ]):
        monkeypatch.setitem(sys.modules, "nncf", nncf_that_traces(ran))
        assert ignored_scope(model, {}) == [f"{name}.weight/linear/0" for name in ran]
    monkeypatch.setitem(sys.modules, "nncf", nncf_that_traces([UP_PROJ]))
    with pytest.raises(ValueError, match=f"{re.escape(Q_PROJ)}: NNCF's graph has no node of it"):
        ignored_scope(model, {})


@pytest.mark.parametrize(
    ("assignment", "why"),
    [
        ({"model.gone": "W8A8"}, "model.gone is not a module of tiny; make the plan again"),
        ({PATCHES: "W8A8"}, f"{PATCHES} is a Conv3d, and W8A8 is for a Linear; build the profiles again"),
    ],
)
def test_a_profile_that_is_not_of_the_model_is_refused_and_nothing_written(
    assignment: dict[str, str], why: str, tmp_path: Path, modules: Any
) -> None:
    (tmp_path / "exports").mkdir()
    (tmp_path / "exports" / "before").touch()
    with pytest.raises(InputError, match=re.escape(why)):
        written(tmp_path, assignment, modules)
    assert [path.name for path in (tmp_path / "exports").iterdir()] == ["before"]


def test_a_profile_of_ops_that_the_plan_does_not_have_is_refused(tmp_path: Path, modules: Any) -> None:
    with pytest.raises(InputError, match=f"{re.escape(Q_PROJ)} is not a module of tiny; make the plan again"):
        written(tmp_path, {Q_PROJ: "W8A8"}, modules, ops=[O_PROJ])


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
    kinds: dict[str, type[torch.nn.Module]] = {"proj": torch.nn.Linear, "other.proj": torch.nn.Linear}
    with pytest.raises(InputError, match=r"proj: the common part of its names, proj, stands in other.proj as well"):
        common_name("proj", kinds, [])
    assert common_name("other.proj", kinds, []) == "other.proj"
    # A longer part of the name is enough here.
    both: dict[str, type[torch.nn.Module]] = {"model.proj": torch.nn.Linear, "other.proj": torch.nn.Linear}
    assert common_name("model.proj", both, []) == "model.proj"


def test_a_neighbour_with_a_longer_number_is_another_module() -> None:
    kinds: dict[str, type[torch.nn.Module]] = {f"model.layers.{n}.proj": torch.nn.Linear for n in (1, 11, 21)}
    name = common_name("model.layers.1.proj", kinds, [])
    assert [other for other in kinds if re.match(regular_expressions([name])[0], other)] == ["model.layers.1.proj"]


HOSTILE = 'x"""\nimport os\nos.abort()\n"""\\ \u2028- evil: [*.weight]\x1b\r`|<script>'


@pytest.mark.parametrize("scheme", ["inc_int8", HOSTILE])
def test_a_strangers_name_is_a_literal_in_every_file_and_no_code(scheme: str, tmp_path: Path) -> None:
    ops = [f"model.{HOSTILE}", "model.x*[0]?"]
    kept, quantized = (ops, ["model.x10"]) if scheme == "inc_int8" else (["model.x10"], ops)
    modules: dict[str, type[torch.nn.Module]] = dict.fromkeys([*ops, "model.x10"], torch.nn.Linear)
    schemes = {"inc_int8": {}, HOSTILE: fields_of(scheme_of("FP8"))}
    directory, index = written(
        tmp_path, dict.fromkeys(quantized, scheme), modules, kept=kept, model=HOSTILE, schemes=schemes
    )
    for path in directory.iterdir():
        assert path.suffix == ".json" or not set(path.read_text()) & set("\x1b\r\u2028")
    scripts = [path for path in directory.iterdir() if path.suffix == ".py"]
    assert len(scripts) == (2 if scheme == "inc_int8" else 3)
    for path in scripts:
        tree = ast.parse(path.read_text())
        assert "import os os.abort()" in (ast.get_docstring(tree) or "")
        assert not any(
            alias.name == "os" for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        )
    if scheme == HOSTILE:
        assert list(yaml.safe_load((directory / "llm_compressor_recipe.yaml").read_text())) == ["quant_stage"]
        entries = imported(directory / "modelopt_quantize.py").QUANT_CFG["quant_cfg"][1:]
        patterns = {entry["quantizer_name"] for entry in entries}
        assert sum(fnmatch.fnmatchcase("model.x*[0]?.weight_quantizer", pattern) for pattern in patterns) == 1
        assert not any(fnmatch.fnmatchcase("model.x*0y.weight_quantizer", pattern) for pattern in patterns)
        assert set(imported(directory / "autoround_layer_config.py").LAYER_CONFIG) == set(ops)
    readme = MarkdownIt("commonmark").render((directory / "README.md").read_text())
    assert "<script" not in readme and readme.count("<h2>") == len(TOOLS)
