"""Configs: what each key takes, what is refused, and what each message says."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from snakemake.cli import parse_config

from auto_quantize_model import config as models
from auto_quantize_model.commands.write_config import generated
from auto_quantize_model.config import (
    Block,
    CalibrationSpec,
    Config,
    DecideSpec,
    OwnScheme,
    SensitivitySpec,
    Target,
    Weights,
)
from auto_quantize_model.config_text import read_block, read_config, require_sources
from auto_quantize_model.files import InputError, require_endpoint
from auto_quantize_model.schemes import scheme

ROOT = Path(__file__).parents[1]
DEFAULT = ROOT / "config" / "config.yaml"


def read_typed(folder: Path, text: str | bytes, *arguments: str, suffix: str = "yaml") -> Config:
    """The default config, a file of `text` and arguments of --config, read as the Snakefile reads them."""
    file = folder / f"mine.{suffix}"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_config([DEFAULT, file], parse_config(arguments))


def read(folder: Path, text: str | bytes, *arguments: str, suffix: str = "yaml") -> dict[str, Any]:
    """The same as the mapping that the rules use."""
    return read_typed(folder, text, *arguments, suffix=suffix).model_dump(mode="json")


def test_the_default_config_is_read_as_yaml_reads_it() -> None:
    assert read_config([DEFAULT], {}).model_dump(mode="json") == yaml.safe_load(DEFAULT.read_bytes())


def test_reading_a_config_imports_no_torch() -> None:
    code = "import sys, auto_quantize_model.config_text; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "sensitivity: {confidense_batches: 2}",
            "sensitivity.confidense_batches: no such key; did you mean confidence_batches?",
        ),
        ("model: {zzz: 1}", "model.zzz: no such key; the keys are name, source, path, repo_id, revision"),
        ("calibratoin: {}", "calibratoin: no such key; did you mean calibration?"),
        ("num_samples: 4", "num_samples: no such key; did you mean calibration.num_samples?"),
        (
            "calibration: {columns: {picture: x}}",
            "calibration.columns.picture: no such key; the keys are id, image, prompt, answer",
        ),
        ("calibration: {seed: zero}", "calibration.seed: 'zero' is text; write a whole number from 0 to 4294967295"),
        (
            "calibration: {seed: '0'}",
            "calibration.seed: '0' is text because of its quotes; write a whole number from 0 to 4294967295",
        ),
        ("calibration: {seed: 2.5}", "calibration.seed: 2.5 is not whole; write a whole number from 0 to 4294967295"),
        (
            "calibration: {seed: true}",
            "calibration.seed: true is a truth value; write a whole number from 0 to 4294967295",
        ),
        ("calibration: {seed: -1}", "calibration.seed: -1 is out of range; write a whole number from 0 to 4294967295"),
        ("calibration: {seed: }", "calibration.seed: null; write a whole number from 0 to 4294967295"),
        ("calibration: {num_samples: 1000000000000}", "calibration.num_samples: 1000000000000 is out of range"),
        ("calibration: {num_samples: .inf}", "calibration.num_samples: inf is not finite; write a finite number"),
        ("profiles: {min_sqnr_db: .nan}", "profiles.min_sqnr_db: nan is not finite; write a finite number"),
        (
            "profiles: {max_accuracy_drop: 1e999}",
            "profiles.max_accuracy_drop: inf is not finite; write a finite number",
        ),
        ("sensitivity: {tf32: 1}", "sensitivity.tf32: 1 is a number; write true or false"),
        (
            "sensitivity: {engine: replai}",
            "sensitivity.engine: no such value 'replai'; did you mean replay? Write replay, inc or auto",
        ),
        ("sensitivity: {maps: [fallback]}", "sensitivity.maps: isolated is not in the list; add isolated"),
        (
            "sensitivity: {maps: [isolated, isolated]}",
            "sensitivity.maps: an entry is there twice; remove one of the two",
        ),
        ("sensitivity: {maps: isolated}", "sensitivity.maps: 'isolated' is text; write a list"),
        (
            "sensitivity: {op_type_dict: {Linear: int8}}",
            "sensitivity.op_type_dict.Linear: no such value 'int8'; write fp32",
        ),
        (
            "sensitivity: {op_name_dict: {'(': fp32}}",
            "sensitivity.op_name_dict['(']: not a regular expression (missing ), ",
        ),
        ("sensitivity: {device: auto}", "sensitivity.device: no such value 'auto'; write cpu or cuda"),
        (
            "sensitivity: {threads: 0}",
            "sensitivity.threads: 0 is out of range; write a whole number from 1 to 1024 or null",
        ),
        (
            "sensitivity: {engine: inc, device: cuda, schemes: [inc_int8]}",
            "sensitivity.engine inc and auto run INC, on the CPU only;",
        ),
        ("sensitivity: {engine: inc}", "sensitivity.engine inc measures inc_int8 alone; set sensitivity.schemes to"),
        (
            "sensitivity: {engine: inc, schemes: [inc_int8], exact: none}",
            "sensitivity.exact none needs sensitivity.engine replay; set one of the two to its default",
        ),
        (
            "sensitivity: {engine: auto, schemes: [inc_int8], time_budget: 20m}",
            "sensitivity.time_budget needs sensitivity.engine replay; remove time_budget",
        ),
        (
            "sensitivity: {exact: all, time_budget: 20m}",
            "sensitivity.time_budget has nothing to choose with sensitivity.exact all; set exact to auto",
        ),
        ("sensitivity: {time_budget: 20 min}", "sensitivity.time_budget: '20 min' is not a time; write a number and"),
        ("sensitivity: {exact: top:0}", "sensitivity.exact: 'top:0' is not a choice; write auto, all, none, or top:N"),
        (
            "sensitivity: {fallback_schemes: [FP8]}",
            "sensitivity.fallback_schemes: 'FP8' is not in sensitivity.schemes; add it there",
        ),
        (
            "sensitivity: {fallback_schemes: [W8A8], maps: [isolated]}",
            "sensitivity.fallback_schemes needs the map fallback; add fallback to sensitivity.maps",
        ),
        ("sensitivity: {schemes: [W8A8], engine: auto}", "sensitivity.engine auto measures inc_int8, which is not in"),
        ("sensitivity: {experts: block, engine: auto}", "sensitivity.experts block needs sensitivity.engine replay"),
        ("sensitivity: {experts: block, schemes: [inc_int8]}", "sensitivity.experts block needs a scheme of"),
        ("sensitivity: {schemes: [W8A8, W8A8]}", "sensitivity.schemes: an entry is there twice; remove one of the two"),
        (
            "sensitivity: {schemes: [inc_int8, W4A15]}",
            "sensitivity.schemes[1]: no such value 'W4A15'; did you mean W4A16? Write inc_int8, W8A8, INT8, FP8,",
        ),
        (
            "sensitivity: {schemes: [inc_int8, {name: W4A16_G64, weights: {num_bits: 4, strategy: grup}}]}",
            "sensitivity.schemes[1].weights.strategy: no such value 'grup'; did you mean group? Write tensor, channel,",
        ),
        (
            "sensitivity: {schemes: [inc_int8, {name: a, weights: {num_bits: 8, strategy: channel, observer: mse}}]}",
            "sensitivity.schemes[1].weights.observer: no such key; the keys are num_bits, type, symmetric, group_size,",
        ),
        (
            "sensitivity: {schemes: [inc_int8, {name: a, weights: {num_bits: 9, strategy: channel}}]}",
            "sensitivity.schemes[1].weights.num_bits: 9 is out of range; write a whole number from 2 to 8",
        ),
        (
            "sensitivity: {schemes: [inc_int8, {name: a, weights: {num_bits: 4, strategy: group}}]}",
            "sensitivity.schemes[1].weights: strategy group needs a group_size; correct one of the two",
        ),
        (
            "sensitivity: {schemes: [inc_int8, {name: a, weights: {num_bits: 4, type: float, strategy: channel}}]}",
            "sensitivity.schemes[1].weights: a float of 4 bits needs strategy group, group_size 32 and scale_dtype",
        ),
        (
            "sensitivity: {schemes: [inc_int8, {name: w4a16, weights: {num_bits: 4, strategy: channel}}]}",
            "sensitivity.schemes: 'w4a16' is the name of a scheme already (W4A16); choose another name",
        ),
        (
            "sensitivity: {schemes: [inc_int8, {name: a}]}",
            "sensitivity.schemes[1]: a scheme has weights or a checkpoint; write one of the two",
        ),
        (
            "sensitivity: {schemes: [inc_int8, {name: a, checkpoint: a, input_activations: {num_bits: 8,"
            " strategy: token, dynamic: true}}]}",
            "sensitivity.schemes[1]: the checkpoint says how inputs are quantized; remove input_activations",
        ),
        ("calibration:", "calibration: null; write a block of keys"),
        ("calibration: text", "calibration: 'text' is text; write a block of keys"),
        ("calibration: [a]", "calibration: ['a'] is a list; write a block of keys"),
        ("calibration: {source: local}", "calibration.path: null; write text, as calibration.source is local"),
        ("calibration: {prompt: ' '}", "calibration.prompt: ' ' is blank; write what to ask"),
        (
            'calibration: {prompt: "\\ud83d"}',
            "calibration.prompt: '\\ud83d' is not valid Unicode; write the character itself",
        ),
        (
            'model: {path: "a\\nb"}',
            "model.path: 'a\\nb' is more than a line of text; remove line breaks and control characters",
        ),
        (
            "model: {path: models/mine}",
            "model.path: 'models/mine' is not the shipped snapshot resources/models/digits_vlm, which"
            " model.source digits takes; set model.source: local to take your own",
        ),
        ("model: {training: {seed: 1}}", "model.training: no such key; the keys are name, source, path, repo_id"),
        (
            "model: {source: local, path: ~no-such-user/x}",
            "model.path: '~no-such-user/x': no such user; write the path out",
        ),
        ("calibration: {min_pixels: 6272}", "calibration.min_pixels is above calibration.max_pixels; raise max_pixels"),
        (
            "sensitivity: {confidence_batches: 17}",
            "sensitivity.confidence_batches (17) times calibration.batch_size (2)",
        ),
        ("decide: {heldout_batches: 33}", "decide.heldout_batches (33) times calibration.heldout_batch_size (64)"),
        ("decide: {candidates: [MXFP4]}", "decide.candidates: 'MXFP4' is not in sensitivity.schemes; add it there"),
        ("decide: {candidates: []}", "decide.candidates is empty; name a scheme, or set decide.heldout_batches to 0"),
        ("decide: {candidates: [inc_int8, NVFP4]}", "decide.candidates: no engine serves inc_int8 together with"),
        (
            "decide: {fixed: {head: MXFP4}}",
            "decide.fixed: 'MXFP4' is not a candidate; write one of W8A8, FP8_DYNAMIC",
        ),
        ("decide: {never: {head: [INT9]}}", "decide.never: 'INT9' is not a candidate; write one of"),
        ("decide: {at_least: {head: INT9}}", "decide.at_least: 'INT9' is not a candidate; write one of"),
        ("decide: {seconds: {head: {INT9: 1}}}", "decide.seconds: 'INT9' is not a candidate; write one of"),
        ("decide: {refine_batches: 17}", "decide.refine_batches (17) times calibration.batch_size (2) is more than"),
        (
            "decide: {refine_batches: 1, candidates: [inc_int8]}",
            "decide.refine_batches: no choice of inc_int8 can be refined; name other candidates, or set it to 0",
        ),
        (
            "decide: {refine_batches: 1}\nprofiles: {max_bits: null}",
            "decide.refine_batches: profiles has no budget to refine a choice for; set profiles.max_bits",
        ),
        ("profiles: {max_seconds: 1}", "profiles.max_seconds needs the times of the ops; write a table into decide.s"),
        ("decide: {never: {'(': [NVFP4]}}", "decide.never['(']: not a regular expression"),
    ],
)
def test_a_wrong_value_is_one_line_with_key_fault_and_next_step(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(f"config: {said}")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "name",
    [
        "logs",
        "benchmarks",
        "archives",
        "Logs",
        "model_manifest.json",
        "con",
        "NUL.txt",
        "com1",
        "digits\n",
        ".x",
        "..",
        "x.",
    ]
    + ["a/b", "a b", "", "{a}", "-a", "é", "a\0", "a" * 65],
)
@pytest.mark.parametrize("block", ["model", "calibration"])
def test_a_name_that_is_no_folder_of_ones_own_is_refused(tmp_path: Path, block: str, name: str) -> None:
    with pytest.raises(InputError, match=rf"\Aconfig: {block}\.name: .+\Z"):
        read(tmp_path, yaml.safe_dump({block: {"name": name}}))
    for good in ("logs2", "console", "a.b-c_D", "7"):
        assert read(tmp_path, f"{block}: {{name: {good}}}")[block]["name"] == good


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "empty; write blocks such as model: {name: x}"),
        (b"- a\n", "not a mapping; write blocks such as model: {name: x}"),
        (b"model: [1\n", "line 2: not a YAML config (expected ',' or ']', but got '<stream end>'); correct the line"),
        (
            b"model:\n\tname: x\n",
            "line 2: not a YAML config (found character '\\t' that cannot start any token); indent with spaces",
        ),
        (b"model:\n  name: \xff\n", "byte 15 is not UTF-8; save the file as UTF-8"),
        (b"model: {name: a,\n name: b}\n", "line 2: model.name is set twice; remove one of the two"),
        (b"model: {name: a}\nmodel: {path: b}\n", "line 2: model is set twice; remove one of the two"),
        (b"model: {? [a] : 3}\n", "line 1: a key of model is not text; write a name"),
        (
            b"model: !!python/name:os.system\n",
            "line 1: model has the tag 'tag:yaml.org,2002:python/name:os.system'; remove the tag",
        ),
        (b"model: &m {<<: *m}\n", "more than 10000 values or 20 levels with all aliases; write the config out"),
        (b"model: &m {name: *m}\n", "more than 10000 values or 20 levels with all aliases; write the config out"),
        (b"model: " + b"{" * 3000, "line 1: not a YAML config (too many values or levels); correct the line"),
    ],
)
def test_a_broken_file_is_one_line_with_file_and_line(tmp_path: Path, text: bytes, said: str) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "mine.yaml")) and str(caught.value).endswith(said)


def test_aliases_of_aliases_end_and_honest_ones_are_read(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    with pytest.raises(InputError, match="more than 10000 values"):
        read(tmp_path, bomb)
    text = "model: &t {name: x}\ncalibration: {<<: *t, seed: 3}\n"
    assert read(tmp_path, text)["calibration"]["name"] == "x"


def test_a_file_that_is_not_there_or_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gone.yaml: No such file or directory; check the path"):
        read_config([tmp_path / "gone.yaml"], {})
    with pytest.raises(InputError, match="not a file; name a YAML file"):
        read_config([tmp_path], {})


def test_a_key_without_a_value_in_any_file_is_named(tmp_path: Path) -> None:
    default = yaml.safe_load(DEFAULT.read_bytes())
    del default["calibration"]["seed"], default["quantize"]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(default))
    with pytest.raises(InputError) as caught:
        read_config([tmp_path / "mine.yaml"], {})
    assert sorted(str(caught.value).splitlines()) == [
        "config: calibration.seed: not set; add the key",
        "config: quantize: not set; add the key",
    ]


def test_whole_numbers_are_integers_however_they_are_written(tmp_path: Path) -> None:
    block = read(tmp_path, "calibration: {num_samples: 34.0, seed: 1e2, max_tokens: 1_024, batch_size: 2.}")[
        "calibration"
    ]
    values = [block[key] for key in ("num_samples", "seed", "max_tokens", "batch_size")]
    assert values == [34, 100, 1024, 2] and {type(value) for value in values} == {int}
    assert read(tmp_path, "profiles: {max_accuracy_drop: 1e-3}")["profiles"]["max_accuracy_drop"] == 0.001


@pytest.mark.parametrize("text", ["5", "007", "1e3", "true", "2024-01-01", "1:30", "no"])
def test_a_key_of_text_keeps_the_text_as_it_is(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, f"calibration: {{prompt: {text}}}")["calibration"]["prompt"] == text
    assert read(tmp_path, "model: {}", f"calibration={{prompt: {text}}}")["calibration"]["prompt"] == text


@pytest.mark.parametrize("text", ["what: {this}?", "null", "- a", "[", "# a", "it's"])
def test_a_text_of_the_command_line_is_not_read_as_yaml_again(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, "model: {}", f'calibration={{prompt: "{text}"}}')["calibration"]["prompt"] == text


def test_values_of_the_command_line_override_files_with_the_types_of_their_keys(tmp_path: Path) -> None:
    arguments = ("calibration={num_samples: 36, columns: {id: null}}", "sensitivity={tf32: true, maps: [isolated]}")
    config = read(tmp_path, "calibration: {num_samples: 34, columns: {id: x, image: 'null'}}", *arguments)
    assert config["calibration"]["num_samples"] == 36
    assert (config["calibration"]["columns"]["id"], config["calibration"]["columns"]["image"]) == (None, "null")
    assert config["sensitivity"]["tf32"] is True and config["sensitivity"]["maps"] == ["isolated"]
    for argument in ("calibration=", "calibration=5", "calibration={prompt: a: b}", "calibration={num_samples: four}"):
        with pytest.raises(InputError, match=r"\Aconfig: calibration.+\Z"):
            read(tmp_path, "model: {}", argument)


def test_a_scheme_of_ones_own_has_the_types_of_its_fields_in_a_file_and_on_the_command_line(tmp_path: Path) -> None:
    own = (
        "{schemes: [inc_int8, W8A8, {name: W4A8_G64, weights: {num_bits: 4.0, strategy: group, group_size: 64},"
        " input_activations: {num_bits: 8, strategy: token, dynamic: true, scale_dtype: null}}]}"
    )
    found = read_typed(tmp_path, f"sensitivity: {own}").sensitivity
    assert found.fields_of_schemes == {
        "inc_int8": {},
        "W8A8": {},
        "W4A8_G64": {
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        },
    }
    assert read_typed(tmp_path, "model: {}", f"sensitivity={own}").sensitivity == found
    # The rules hand the block on as JSON.
    assert read_block(SensitivitySpec, found.model_dump(mode="json"), "sensitivity") == found


def test_json_is_read_as_json(tmp_path: Path) -> None:
    text = '{\n\t"calibration": {"prompt": "\\ud83d\\ude00 a\\/b", "seed": 3}}'
    block = read(tmp_path, text, suffix="json")["calibration"]
    assert (block["prompt"], block["seed"]) == ("\U0001f600 a/b", 3)


def test_a_home_in_a_path_is_expanded_and_braces_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    config = read(tmp_path, "model: {source: local, path: ~/models/a}\ncalibration: {path: 'a{b}/~'}")
    assert (config["model"]["path"], config["calibration"]["path"]) == ("/home/someone/models/a", "a{b}/~")


def test_a_local_source_that_is_not_there_is_named_before_any_job(tmp_path: Path) -> None:
    config = read_typed(
        tmp_path, f"model: {{source: local, path: {tmp_path}/m}}\ncalibration: {{source: local, path: {tmp_path}/c}}"
    )
    with pytest.raises(InputError) as caught:
        require_sources(config, tmp_path / "manifest.json")
    assert str(caught.value).splitlines() == [
        f"config: model.path: {tmp_path}/m does not exist; give a Hugging Face snapshot directory",
        f"config: calibration.path: {tmp_path}/c does not exist; give a JSONL, a Parquet file or an image folder",
    ]
    with_checkpoint = read_typed(tmp_path, "sensitivity: {schemes: [inc_int8, {name: a, checkpoint: gone/a}]}")
    said = r"\Aconfig: sensitivity.schemes\[1\].checkpoint: gone/a does not exist; give the folder of a checkpoint, or"
    with pytest.raises(InputError, match=said):
        require_sources(with_checkpoint, tmp_path / "manifest.json")
    require_sources(with_checkpoint, tmp_path / "manifest.json", plan_made=True)
    on_hub = f"{{name: a, checkpoint: org/name@{'0' * 40}}}"
    require_sources(read_typed(tmp_path, f"sensitivity: {{schemes: [inc_int8, {on_hub}]}}"), tmp_path / "manifest.json")
    (tmp_path / "m").touch()
    (tmp_path / "c").mkdir()
    with pytest.raises(InputError, match=r"\Aconfig: model.path: .*/m is not a directory; .*\Z"):
        require_sources(config, tmp_path / "manifest.json")
    # Once the manifest is there, weights that stayed elsewhere make nothing stale.
    (tmp_path / "manifest.json").touch()
    require_sources(config, tmp_path / "manifest.json")
    # The same holds for samples that a set was drawn from.
    (tmp_path / "c").rmdir()
    require_sources(config, tmp_path / "manifest.json", calibration_made=True)
    os.mkfifo(tmp_path / "c")
    with pytest.raises(InputError, match=r"\Aconfig: calibration.path: .*/c is neither a file nor a folder; .*\Z"):
        require_sources(config, tmp_path / "manifest.json", calibration_made=True)


def test_a_shipped_snapshot_that_is_not_there_is_named_before_any_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_typed(tmp_path, "model: {path: ./resources/models/digits_vlm/}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match=r"\Aconfig: model.path: .* does not exist; restore the snapshot in the checkout"
    ):
        require_sources(config, tmp_path / "manifest.json")
    (tmp_path / "manifest.json").touch()
    require_sources(config, tmp_path / "manifest.json")


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"min_sqnr_dB": 3}, "profiles.min_sqnr_dB: no such key; did you mean min_sqnr_db?"),
        ({"min_sqnr_db": float("nan")}, "profiles.min_sqnr_db: nan is not finite; write a finite number"),
        (
            {"min_sqnr_db": "3"},
            "profiles.min_sqnr_db: '3' is text because of its quotes; write a number from -1000 to 1000 or null",
        ),
        (
            {"max_weight_bytes": True},
            "profiles.max_weight_bytes: true is a truth value; write a whole number from 1 to",
        ),
        (
            {"max_accuracy_drop": 5},
            "profiles.max_accuracy_drop: 5 is out of range; write a number from 0 to 1",
        ),
        ([1], "profiles: [1] is a list; write a block of keys"),
    ],
)
def test_a_block_that_a_script_reads_by_hand_is_checked_alike(block: Any, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        read_block(Target, block, "profiles")


def test_a_script_takes_whole_floats_as_integers_and_names_a_key_that_is_missing() -> None:
    block = Config().calibration.model_dump() | {"seed": 2.0}
    assert read_block(CalibrationSpec, block, "calibration").model_dump() == block | {"seed": 2}
    del block["seed"]
    with pytest.raises(InputError, match=r"\Acalibration.seed: not set; add the key\Z"):
        read_block(CalibrationSpec, block, "calibration")


def script(path: str) -> ModuleType:
    """A script of this checkout as a module."""
    specification = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


def keys_of(block: Block, above: str = "") -> Iterator[tuple[str, str]]:
    """Each key of a block and of the blocks in it, with its description."""
    for name, field in type(block).model_fields.items():
        value = getattr(block, name)
        if isinstance(value, Block):
            yield f"{above}{name}", type(value).__doc__ or ""
            yield from keys_of(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", field.description or ""


def test_what_is_generated_from_the_models_is_what_is_checked_in() -> None:
    for name, text in generated().items():
        assert (ROOT / name).read_text(encoding="utf-8") == text, f"{name} differs from the models; run make config"


def test_every_key_has_a_description_of_whole_sentences() -> None:
    for key, description in keys_of(Config()):
        assert description.endswith("."), f"{key}: {description}"


def test_every_key_is_read_somewhere() -> None:
    """By attribute or by name, in the library, the scripts or the rules; the modules of the config do not count."""
    own = ("config", "config_text", "write_config")
    files = [file for folder in ("src", "scripts", "workflow") for file in (ROOT / folder).rglob("*.[ps]*")]
    code = [file for file in files if file.suffix in (".py", ".smk") and file.stem not in own]
    text = "\n".join(file.read_text(encoding="utf-8") for file in code)
    for key, _ in keys_of(Config()):
        name = key.rpartition(".")[2]
        assert re.search(rf"\.{name}\b|[\"']{name}[\"']", text), f"nothing reads {key}"


def test_the_schema_for_editors_accepts_each_config_of_the_project_and_knows_each_fault() -> None:
    schema = json.loads((ROOT / "config" / "config.schema.json").read_bytes())
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    for file in (ROOT / "config").glob("*.yaml"):
        assert list(validator.iter_errors(yaml.safe_load(file.read_bytes()))) == [], file.name
    for fault in (
        {"zzz": 1},
        {"calibration": {"seed": -1}},
        {"calibration": {"source": "local", "path": None}},
        {"model": {"name": "a/b"}},
        {"sensitivity": {"maps": ["isolated", "isolated"]}},
        {"sensitivity": {"schemes": ["inc_int8", {"name": "a", "weights": {"num_bits": 9}}]}},
    ):
        assert not validator.is_valid(fault), fault


def test_mutated_configs_are_refused_in_one_line_or_mean_what_they_say() -> None:
    counts, faults = script("benchmarks/fuzz_configs.py").fuzz(160, seed=11)
    assert faults == []
    assert counts["accepted"] > 10 and counts["refused in one line"] > 100


def commands_of_the_documents() -> list[tuple[str, list[str]]]:
    """Each `snakemake` command of a document, a config, the Makefile, a script or a message, with its file."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    names = [
        name for name in listed if re.search(r"\.(md|py|yaml|smk|j2|html|rst)$|Makefile$", name) and "test_" not in name
    ]
    found = []
    for name in names:
        text = re.sub(r"='[^'\n]*'", "=''", (ROOT / name).read_text(encoding="utf-8"))
        found += [(name, command.split()) for command in re.findall(r"\bsnakemake ([^\n`#)]*)", text)]
    return found


def test_targets_stand_before_options_that_would_swallow_them() -> None:
    """`--resources gpu=1 TARGET` is a traceback of Snakemake's, and `--configfile FILE TARGET` a missing file."""
    takes = {
        "--resources": r"\w+=\S+",
        "--config": r"\w+=\S*",
        "--configfile": r"\S+\.(yaml|json)\S*",
    }
    commands = commands_of_the_documents()
    assert len(commands) > 15
    for name, words in commands:
        for option, pattern in takes.items():
            for word in words[words.index(option) + 1 :] if option in words else []:
                if word.startswith("-"):
                    break
                assert re.fullmatch(pattern, word), f"{name}: snakemake {' '.join(words)}"


NO_URLS = ["http://user:pass/word@host", "http://host:port", "http://host:99999", "http://[::1", "", "foo", "host:80"]
NO_URLS += ["ftp://user:pass@host", "http://user:pass@", "https:/host", "http://ho st", "http://us\x01er:pass@host"]
NO_URLS += ["http://host?token=pass", "http://host#pass", "http://host\\pass", "http://host\n"]


@pytest.mark.parametrize("url", NO_URLS)
def test_an_endpoint_that_is_no_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(InputError, match=r"^HF_ENDPOINT: no valid URL; write http://host:port") as refused:
        require_endpoint(url)
    assert "pass" not in str(refused.value).replace("password", "")


@pytest.mark.parametrize("url", [None, "https://huggingface.co", "http://user:pass%2Fword@host:80/mirror"])
def test_an_endpoint_that_is_a_url_is_taken(url: str | None) -> None:
    require_endpoint(url)


REPOSITORY = "is not a repository of the hub; write owner/name, without an address"


@pytest.mark.parametrize(
    "repo_id", ["https://user:pass-word@hub/a/b", "a/b/c", "/a", "a/", "a b", "a--b/c", "a/..", "a.git"]
)
@pytest.mark.parametrize("block", ["model", "calibration"])
def test_a_repository_is_no_address_and_its_password_is_not_shown(tmp_path: Path, block: str, repo_id: str) -> None:
    with pytest.raises(InputError) as refused:
        read(tmp_path, yaml.safe_dump({block: {"repo_id": repo_id}}))
    shown = repr(repo_id).replace("user:pass-word", "***")
    assert str(refused.value) == f"config: {block}.repo_id: {shown} {REPOSITORY}"


@pytest.mark.parametrize("repo_id", ["gpt2", "Qwen/Qwen2.5-VL-3B-Instruct", "a_b/c.d-e", "HuggingFaceTB/SmolLM2-135M"])
def test_a_repository_is_owner_and_name_or_a_name(tmp_path: Path, repo_id: str) -> None:
    assert read(tmp_path, yaml.safe_dump({"model": {"repo_id": repo_id}}))["model"]["repo_id"] == repo_id


def test_no_password_of_a_config_is_shown_also_where_the_value_is_cut(tmp_path: Path) -> None:
    address = f"https://user:{'pass-word-' * 20}@hub/a"
    for config in ({"sensitivity": {"engine": address}}, {"model": {"source": [address]}}):
        with pytest.raises(InputError) as refused:
            read(tmp_path, yaml.safe_dump(config))
        assert "://***@" in str(refused.value) and "pass-word" not in str(refused.value)


def test_candidates_are_the_schemes_that_can_be_written_or_incs_int8_alone() -> None:
    own = OwnScheme(name="mine", weights=Weights(num_bits=4, strategy="channel"))
    stored = OwnScheme(name="stored", checkpoint="owner/name@" + "0" * 40)
    for schemes, candidates in (
        (("inc_int8",), ("inc_int8",)),
        (("inc_int8", "W8A8", own, stored), ("W8A8", "mine")),
    ):
        config = Config(sensitivity=SensitivitySpec(schemes=schemes))
        assert config.candidates == candidates
    assert Config(decide=DecideSpec(candidates=("NVFP4",))).candidates == ("NVFP4",)


def test_the_words_of_the_config_are_those_of_the_schemes() -> None:
    assert (models.INC_INT8, models.UNQUANTIZED) == (scheme.INC_INT8, scheme.UNQUANTIZED)
