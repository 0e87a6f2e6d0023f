"""The config: files and command line become one checked mapping, and every problem is one line.

In: YAML or JSON files, the values of `--config`, and the schema. Out: the config with the types that the schema names.
Snakemake imports this module while it reads the Snakefile, so nothing here may import torch.
"""

import difflib
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from auto_quantize_model.escape import redacted
from auto_quantize_model.files import InputError, no_such_key

MAX_FILE_BYTES = 1 << 20
MAX_VALUES = 10_000  # a config has about 60; a few aliases of aliases can make billions
MAX_DEPTH = 20
MAX_BYTES = 100_000  # blocks are handed to scripts as one argument, and Linux takes 128 KiB
MAX_SHOWN = 20
SHIPPED_MODEL = "resources/models/digits_vlm"  # the snapshot that is part of the repository

MAPPING, SEQUENCE, SCALAR = (f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str"))
NULLS = {"", "~", "null", "Null", "NULL"}
TRUTHS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NUMBER = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|(?:0|[1-9][0-9_]*)?\.[0-9]+|[0-9]+\.)(?:[eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")


class Bounded(yaml.BaseLoader):
    """Reads scalars as text, and stops at a size that no config has: PyYAML takes minutes for thousands of braces."""

    depth = nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        self.nodes += 1
        if self.depth > MAX_DEPTH or self.nodes > 2 * MAX_VALUES:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(problem="too many values or levels", problem_mark=mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class Plain(str):
    """A scalar without quotes, as it is written: whether it is a number or text depends on its key."""


def read_config(files: Sequence[Path], overrides: Mapping[str, Any], schema_file: Path) -> dict[str, Any]:
    """The config of a run.

    Args:
        files: YAML or JSON files; a later one overrides the keys that it names.
        overrides: the values of `--config`, which override all files; Snakemake hands most of them over as text.
        schema_file: the JSON Schema of the config, as YAML.

    Returns:
        All blocks. Integers are ints, also where the config says `2.0`, and `~` in a path is expanded.

    Raises:
        InputError: a line for each problem, with its key, what is wrong, and the next step.
    """
    schema = read_schema(schema_file)
    config: dict[str, Any] = {}
    for file in files:
        merge(config, typed(read_file(file), schema, schema))
    merge(config, typed(dict(overrides), schema, schema, terminal=True))
    found = list(dict.fromkeys(problems(config, schema)))
    if len(found) > MAX_SHOWN:
        found[MAX_SHOWN:] = [f"{len(found) - MAX_SHOWN} more problems; correct these first"]
    if found:
        raise InputError("\n".join(f"config: {problem}" for problem in found))
    for block in ("model", "calibration"):
        if config[block].get("path"):
            config[block]["path"] = os.path.expanduser(config[block]["path"])
    return config


def read_file(path: Path) -> dict[str, Any]:
    """The mapping that a YAML or JSON file holds; scalars without quotes are `Plain`.

    Raises:
        InputError: the file cannot be read, is not YAML, is no mapping, names a key twice, or unfolds without end.
    """
    name = os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{name}: not a file; name a YAML file")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(f"{name}: larger than {MAX_FILE_BYTES} bytes; name a config")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{name}: {error.strerror}; check the path and the file's mode") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    if path.suffix == ".json":
        text = text.replace("\t", " ")  # a tab is space between JSON values, never part of one, and no YAML
    try:
        node = yaml.compose(text, Loader=Bounded)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        hint = "indent with spaces" if "\\t" in str(error.problem) else "correct the line"
        raise InputError(f"{name}, line {line}: not a YAML config ({error.problem}); {hint}") from None
    except yaml.reader.ReaderError as error:
        raise InputError(f"{name}: character {error.position} is {error.character:#x}, which YAML forbids") from None
    if not isinstance(node, yaml.MappingNode):
        what = "empty" if node is None or node.value == "" else "no mapping"
        raise InputError(f"{name}: {what}; write blocks such as model: {{name: x}}")
    return Unfolding(name).value(node, ())


class Unfolding:
    """The values of a YAML document, with a limit on what its aliases unfold to."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.values = 0

    def value(self, node: yaml.Node, keys: tuple[Any, ...]) -> Any:
        """The value of `node`, which lies at `keys`."""
        self.values += 1
        where = self.line(node)
        if self.values > MAX_VALUES or len(keys) > MAX_DEPTH:
            raise InputError(
                f"{where}: more than {MAX_VALUES} values or {MAX_DEPTH} levels with all aliases; write the config out"
            )
        if node.tag not in (MAPPING, SEQUENCE, SCALAR):
            raise InputError(f"{where}: {place(keys)} has the tag {shown(node.tag)}; remove the tag")
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, keys)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*keys, number)) for number, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        return Plain(node.value) if node.style is None else joined_surrogates(node.value)

    def mapping(self, node: yaml.MappingNode, keys: tuple[Any, ...]) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key, item in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise InputError(f"{self.line(key)}: a key of {place(keys)} is no text; write a name")
            if key.value == "<<" and key.style is None:
                for base in item.value if isinstance(item, yaml.SequenceNode) else [item]:
                    if not isinstance(base, yaml.MappingNode):
                        raise InputError(f"{self.line(base)}: << merges mappings alone; name an anchor of a mapping")
                    merged = self.value(base, (*keys, "<<")) | merged  # a level: a mapping may merge itself
                continue
            if key.value in own:
                raise InputError(f"{self.line(key)}: {place((*keys, key.value))} is set twice; remove one of the two")
            own[key.value] = self.value(item, (*keys, key.value))
        return merged | own

    def line(self, node: yaml.Node) -> str:
        return f"{self.name}, line {node.start_mark.line + 1}"


def joined_surrogates(text: str) -> str:
    """`text` with each pair of surrogates as one character: JSON writes characters beyond U+FFFF as such pairs."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


def merge(config: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Set what `changes` names in `config`, block by block."""
    for key, value in changes.items():
        if isinstance(value, Mapping):
            if not isinstance(config.get(key), dict):
                config[key] = {}
            merge(config[key], value)
        else:
            config[key] = value


def typed(value: Any, part: Mapping[str, Any], schema: Mapping[str, Any], *, terminal: bool = False) -> Any:
    """`value` with scalars of the types that `part` of the schema asks for.

    A key that takes text alone keeps what is written: a prompt `5` and a commit of digits stay text.

    Args:
        value: a value of a file, or of the command line.
        part: the schema of the value.
        schema: the whole schema, for its definitions.
        terminal: the value is of the command line, where Snakemake has removed the quotes.
    """
    part = resolved(part, schema)
    if isinstance(value, Mapping):
        return {str(key): typed(inner, below(part, key), schema, terminal=terminal) for key, inner in value.items()}
    if isinstance(value, list):
        return [typed(inner, part.get("items", {}), schema, terminal=terminal) for inner in value]
    kinds = kinds_of(part)
    if isinstance(value, Plain) or (terminal and isinstance(value, str) and kinds != ["string"]):
        value = scalar(value, kinds)
    if isinstance(value, float) and value.is_integer() and "integer" in kinds:
        return int(value)
    return value


@cache
def read_schema(file: Path) -> dict[str, Any]:
    """The schema of the config."""
    return yaml.safe_load(file.read_bytes())


def resolved(part: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """A part of the schema with the definition that it refers to."""
    return {**schema["$defs"][part["$ref"].rpartition("/")[2]], **part} if "$ref" in part else part


def below(part: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The schema of a key's value; empty for a key that must not be there."""
    return part.get("properties", {}).get(key) or part.get("additionalProperties") or {}


def kinds_of(part: Mapping[str, Any]) -> list[str]:
    """JSON Schema's names of the types that a part of the schema allows; every enumeration of ours is of texts."""
    if "enum" in part or "const" in part:
        return ["string"]
    kinds = part.get("type", [])
    return [kinds] if isinstance(kinds, str) else kinds


def scalar(text: str, kinds: Sequence[str]) -> Any:
    """What a scalar without quotes means for a key that takes `kinds`."""
    if text in NULLS:
        return None
    if "string" in kinds:
        return str(text)
    if text.lower() in TRUTHS:
        return TRUTHS[text.lower()]
    if NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    if not NUMBER.fullmatch(text):
        return str(text)
    digits = text.replace("_", "")
    # Above 18 digits every integer of a config is out of range, and Python refuses to read above 4300.
    return int(digits) if re.fullmatch(r"[-+]?[0-9]{1,18}", digits) else float(digits)


def problems(config: dict[str, Any], schema: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a config, a sentence each: single keys first, and keys together once each is right."""
    ill = list(ill_values(config, ()))
    ill += [line for error in Draft202012Validator(schema).iter_errors(config) for line in sentences(error, config)]
    seen = set()
    for where, sentence in ill:
        if where not in seen:
            yield f"{where}: {sentence}"
        seen.add(where)
    if not ill:
        yield from contradictions(config)


def ill_values(value: Any, keys: tuple[Any, ...]) -> Iterator[tuple[str, str]]:
    """Numbers that are not finite and text that is no Unicode, which JSON Schema has no words for."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from ill_values(key, (*keys, key))
            yield from ill_values(inner, (*keys, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from ill_values(inner, (*keys, number))
    elif isinstance(value, float) and not math.isfinite(value):
        yield place(keys), f"{value} is not finite; write a finite number"
    elif isinstance(value, str) and value.encode(errors="replace") != value.encode(errors="surrogatepass"):
        yield place(keys), f"{shown(value)} is no valid Unicode; write the character itself"


def sentences(error: ValidationError, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """An error of JSON Schema as (place, sentence); an error may name several keys."""
    keys, rule = tuple(error.absolute_path), error.validator
    value: Any = error.instance
    part: Any = error.schema
    wanted: Any = error.validator_value
    where = place(keys)
    if rule == "additionalProperties":
        for key in sorted(value.keys() - part["properties"]):
            homes = [block for block, values in config.items() if isinstance(values, dict) and key in values]
            misplaced = f"no such key; did you mean {homes[0]}.{key}?" if homes and not keys else ""
            yield place((*keys, key)), misplaced or no_such_key(key, part["properties"])
    elif rule == "required":
        for key in sorted(set(wanted) - value.keys()):
            yield place((*keys, key)), f"not set; add the key{because(error, config)}"
    elif rule == "type":
        yield where, f"{mistyped(value, kinds_of(part))}; write {asked(part)}{because(error, config)}"
    elif rule in ("minimum", "maximum"):
        yield where, f"{shown(value)} is out of range; write {asked(part)}"
    elif rule in ("enum", "const"):
        near = difflib.get_close_matches(str(value), part.get("enum", []), 1)
        hint = f"did you mean {near[0]}? Write" if near else "write"
        yield where, f"no such value {shown(value)}; {hint} {asked(part)}"
    elif rule == "minLength":
        yield where, "empty; write text"
    elif rule == "maxLength":
        yield where, f"{len(value)} characters; write at most {wanted}"
    elif rule == "uniqueItems":
        yield where, "an entry is there twice; remove one of the two"
    elif rule == "contains":
        yield where, f"{wanted['const']} is not in the list; add {wanted['const']}"
    else:  # pattern and not, of which the schema says in words what they mean
        says = wanted["says"] if rule == "not" else part["says"]
        yield where, f"{shown(value)} is {says}"


def because(error: ValidationError, config: Mapping[str, Any]) -> str:
    """The condition of a rule that holds for one source alone, in words."""
    if "then" not in error.absolute_schema_path:
        return ""
    block = str(error.absolute_path[0])
    return f", as {block}.source is {config[block]['source']}"


def asked(part: Mapping[str, Any]) -> str:
    """What a key takes, in words."""
    if "enum" in part:
        return listed(part["enum"])
    if "const" in part:
        return str(part["const"])
    words = {
        "integer": "a whole number",
        "number": "a number",
        "string": "text",
        "boolean": "true or false",
        "null": "null",
        "array": "a list",
        "object": "a block of keys",
    }
    kinds = [words[kind] for kind in kinds_of(part)]
    if "minimum" in part:
        kinds[0] += f" from {part['minimum']} to {part['maximum']}" if "maximum" in part else ""
        kinds[0] += f" of at least {part['minimum']}" if "maximum" not in part else ""
    return listed(kinds)


def listed(words: Sequence[str]) -> str:
    """`a, b or c`."""
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]


def mistyped(value: Any, kinds: Sequence[str]) -> str:
    """A clause that says why a value has another type than those of `kinds`."""
    if value is None:
        return "null"
    if isinstance(value, str) and "object" in kinds and value.startswith("{"):
        return f"{shown(value)} is no YAML mapping (quote a text that holds ': ' or a brace)"
    if isinstance(value, str) and scalar(value, []) != value:
        return f"{shown(value)} is text because of its quotes"
    if isinstance(value, float) and "integer" in kinds:
        return f"{shown(value)} is not whole"
    names = {str: "text", bool: "a truth value", int: "a number", float: "a number", dict: "a block", list: "a list"}
    return f"{shown(value)} is {names[type(value)]}"


def shown(value: Any) -> str:
    """A value as a message shows it: short, on one line, without control characters and without passwords."""
    as_python = isinstance(value, dict | list | str)
    # Secrets first: a text that is cut may have lost the @ by which a password is known.
    text = redacted(repr(value) if as_python else json.dumps(value, default=str))
    most = 40 if isinstance(value, dict | list) else 60
    return text if len(text) <= most else f"{text[: most - 3]}..."


def place(keys: Iterable[Any]) -> str:
    """A key path as one word: `sensitivity.maps[2]`, `sensitivity.op_name_dict['a.*']`."""
    path = ""
    for key in keys:
        if isinstance(key, int):
            path += f"[{key}]"
        elif re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]{0,63}", key):
            path += f".{key}" if path else key
        else:
            path += f"[{shown(key)}]"
    return path or "the config"


def contradictions(config: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong although each key by itself is right."""
    calibration, sensitivity, tradeoff = (config[name] for name in ("calibration", "sensitivity", "tradeoff"))
    size, batches, heldout = calibration["batch_size"], sensitivity["confidence_batches"], tradeoff["heldout_batches"]
    if sensitivity["engine"] != "replay" and sensitivity["device"] == "cuda":
        yield "sensitivity.engine inc and auto run INC, on the CPU only; set sensitivity.device to cpu"
    if config["model"]["source"] == "digits" and Path(config["model"]["path"]) != Path(SHIPPED_MODEL):
        yield (
            f"model.path: {shown(config['model']['path'])} is not the shipped snapshot {SHIPPED_MODEL}, which"
            " model.source digits takes; set model.source: local to take your own"
        )
    if calibration["min_pixels"] > calibration["max_pixels"]:
        yield "calibration.min_pixels is above calibration.max_pixels; raise max_pixels"
    if batches * size > calibration["num_samples"]:
        yield (
            f"sensitivity.confidence_batches ({batches}) times calibration.batch_size ({size}) is more than"
            f" calibration.num_samples ({calibration['num_samples']}); raise num_samples"
        )
    if heldout * size > calibration["num_heldout"]:
        yield (
            f"tradeoff.heldout_batches ({heldout}) times calibration.batch_size ({size}) is more than"
            f" calibration.num_heldout ({calibration['num_heldout']}); raise num_heldout, or set heldout_batches to 0"
        )
    for pattern in sensitivity["op_name_dict"]:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            yield f"{place(('sensitivity', 'op_name_dict', pattern))}: not a regular expression ({error}); correct it"
    for block in ("model", "calibration"):
        if (config[block].get("path") or "").startswith("~") and os.path.expanduser(config[block]["path"])[0] == "~":
            yield f"{block}.path: {config[block]['path']}: no such user; write the path out"
    if len(json.dumps(config)) > MAX_BYTES:
        yield f"more than {MAX_BYTES} bytes of values; shorten calibration.prompt or sensitivity.op_name_dict"


def require_sources(config: Mapping[str, Any], model_manifest: Path, calibration_made: bool = False) -> None:
    """Refuse a shipped or local model, or a local calibration set, that is not there.

    Args:
        config: as `read_config` returns it.
        model_manifest: where the model's manifest lies; once it is there, the model itself is read by later steps only.
        calibration_made: whether the calibration set of this config is there, so that its source may be gone.

    Raises:
        InputError: a line for each that is missing.
    """
    found = []
    model, calibration = config["model"], config["calibration"]
    next_steps = {
        "local": "give a Hugging Face snapshot directory",
        "digits": f"run in the checkout, or restore the snapshot there (git checkout -- {SHIPPED_MODEL})",
    }
    step = next_steps.get(model["source"])
    if step and not model_manifest.exists() and (why := unreadable(model["path"], folder=True)):
        found.append(f"config: model.path: {why}; {step}")
    needed = calibration["source"] == "local" and not (calibration_made and not os.path.exists(calibration["path"]))
    if needed and (why := unreadable(calibration["path"])):
        found.append(f"config: calibration.path: {why}; give a JSONL, a Parquet file or an image folder")
    if found:
        raise InputError("\n".join(found))


def unreadable(path: str, *, folder: bool = False) -> str:
    """Why a file or folder cannot be read, as a clause; empty where it can."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            os.scandir(path).close()
        elif folder:
            return f"{path} is no directory"
        elif stat.S_ISREG(mode):
            open(path, "rb").close()
        else:
            return f"{path} is neither a file nor a folder"
    except FileNotFoundError:
        return f"{path} does not exist"
    except OSError as error:
        return f"{path}: {error.strerror}"
    return ""
