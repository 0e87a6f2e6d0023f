"""Configs as text: files, the command line and the options of scripts become checked models.

In: YAML or JSON files, the values of `--config`, JSON on a script's command line. Out: the models of `config`, or one
line for each problem. The Snakefile imports this module, so the module must not import torch.
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
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from auto_quantize_model.config import (
    SHIPPED_MODEL,
    Block,
    Config,
    Contradiction,
    OwnScheme,
    json_schema,
    repository_at,
)
from auto_quantize_model.escape import quoted
from auto_quantize_model.files import InputError

Spec = TypeVar("Spec", bound=Block)
Schema = Mapping[str, Any]

MAX_FILE_BYTES = 1 << 20
MAX_VALUES = 10_000  # a config has about 60; nested aliases can make billions
MAX_DEPTH = 20
MAX_BYTES = 100_000  # scripts take blocks as one argument, and Linux allows 128 KiB
MAX_SHOWN = 20

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
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(problem="too many values or levels", problem_mark=mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class Plain(str):
    """A scalar without quotes, as written; its key decides whether it is a number or text."""


def read_config(files: Sequence[Path], overrides: Mapping[str, Any]) -> Config:
    """The config of a run.

    Args:
        files: YAML or JSON files; a later one overrides the keys that it names.
        overrides: the values of `--config`, which override all files; Snakemake passes most of them as text.

    Raises:
        InputError: a line for each problem, with its key, the fault, and the next step.
    """
    schema = schema_of(Config)
    values: dict[str, Any] = {}
    for file in files:
        merge(values, typed(read_file(file), schema, schema))
    merge(values, typed(dict(overrides), schema, schema, terminal=True))
    found = [f"{place(keys)}: not set; add the key" for keys in unset(Config().model_dump(), values)]
    if len(json.dumps(values)) > MAX_BYTES:
        found.append(f"more than {MAX_BYTES} bytes of values; shorten calibration.prompt or sensitivity.op_name_dict")
    config, problems = checked(Config, values)
    found = list(dict.fromkeys([*problems, *found]))
    if len(found) > MAX_SHOWN:
        found[MAX_SHOWN:] = [f"{len(found) - MAX_SHOWN} more problems; correct these first"]
    if found or config is None:
        raise InputError("\n".join(f"config: {problem}" for problem in found))
    return config


def read_block(block: type[Spec], value: Any, name: str) -> Spec:
    """A block that a script takes as JSON or as options.

    Args:
        block: the block's model.
        value: the JSON value; keys with a default in the model may be absent.
        name: the block's key in the config, for messages.

    Raises:
        InputError: a line for each problem, with its key, the fault, and the next step.
    """
    schema = schema_of(block)
    found, problems = checked(block, typed(value, schema, schema), name)
    if found is None:
        raise InputError("\n".join(problems))
    return found


def checked(block: type[Spec], values: Any, name: str = "") -> tuple[Spec | None, list[str]]:
    """The model with `values`, or None and a sentence for each problem."""
    try:
        return block.model_validate(values), []
    except ValidationError as error:
        above = tuple(name.split(".")) if name else ()
        return None, [line for detail in error.errors() for line in sentences(detail, schema_of(block), above)]


def unset(
    defaults: Mapping[str, Any], values: Mapping[str, Any], above: tuple[str, ...] = ()
) -> Iterator[tuple[str, ...]]:
    """The keys that no file sets; keys whose default is null may be absent."""
    for key, default in defaults.items():
        if key not in values and default is not None:
            yield (*above, key)
        elif isinstance(default, Mapping) and isinstance(values.get(key), Mapping):
            yield from unset(default, values[key], (*above, key))


def read_file(path: Path) -> dict[str, Any]:
    """The mapping that a YAML or JSON file holds; scalars without quotes are `Plain`.

    Raises:
        InputError: the file cannot be read, is not a YAML mapping, repeats a key, or expands without end.
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
        text = text.replace("\t", " ")  # a tab is space between JSON values, never part of one; YAML forbids tabs
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
        what = "empty" if node is None or node.value == "" else "not a mapping"
        raise InputError(f"{name}: {what}; write blocks such as model: {{name: x}}")
    blocks: dict[str, Any] = Unfolding(name).value(node, ())
    return blocks


class Unfolding:
    """The values of a YAML document, with a limit on the size that its aliases expand to."""

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
            raise InputError(f"{where}: {place(keys)} has the tag {quoted(node.tag)}; remove the tag")
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
                raise InputError(f"{self.line(key)}: a key of {place(keys)} is not text; write a name")
            if key.value == "<<" and key.style is None:
                for base in item.value if isinstance(item, yaml.SequenceNode) else [item]:
                    if not isinstance(base, yaml.MappingNode):
                        raise InputError(f"{self.line(base)}: << merges mappings alone; name an anchor of a mapping")
                    merged = self.value(base, (*keys, "<<")) | merged  # one level deeper: a mapping may merge itself
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


def typed(value: Any, part: Schema, schema: Schema, *, terminal: bool = False) -> Any:
    """`value` with scalars of the types that `part` of the schema asks for.

    A key that takes only text keeps the text as written, so a prompt `5` and a commit of digits stay text. Integers
    become ints, even if the config says `2.0`.

    Args:
        value: a value of a file, or of the command line.
        part: the schema of this value.
        schema: the whole schema, for its definitions.
        terminal: the value comes from the command line, where Snakemake has removed the quotes.
    """
    part = resolved(part, schema)
    if isinstance(value, Mapping):
        return {str(key): typed(inner, below(part, key), schema, terminal=terminal) for key, inner in value.items()}
    if isinstance(value, list):
        return [typed(inner, below(part, 0), schema, terminal=terminal) for inner in value]
    kinds = kinds_of(part)
    if isinstance(value, Plain) or (terminal and isinstance(value, str) and set(kinds) != {"string"}):
        value = scalar(value, kinds)
    if isinstance(value, float) and value.is_integer() and "integer" in kinds:
        return int(value)
    return value


@cache
def schema_of(block: type[Block]) -> Schema:
    """The JSON Schema of a block, made once."""
    return json_schema(block)


def resolved(part: Schema, schema: Schema) -> Schema:
    """A part of the schema with the definition that it refers to; so are its choices and its items."""
    found = schema["$defs"][part["$ref"].rpartition("/")[2]] | part if "$ref" in part else dict(part)
    if "anyOf" in found:
        found["anyOf"] = [resolved(choice, schema) for choice in found["anyOf"]]
    if "items" in found:
        found["items"] = resolved(found["items"], schema)
    return found


def below(part: Schema, key: str | int) -> Schema:
    """The schema of the value at a key or an index; empty for a key that must not be there."""
    for choice in [part, *part.get("anyOf", [])]:
        if isinstance(key, int):
            found: Schema = choice.get("items", {})
        else:
            found = choice.get("properties", {}).get(key) or choice.get("additionalProperties") or {}
        if found:
            return found
    return {}


def kinds_of(part: Schema) -> list[str]:
    """JSON Schema's names of the types that a part of the schema allows."""
    choices = part.get("anyOf", [part])
    return [choice["type"] for choice in choices if "type" in choice]


def scalar(text: str, kinds: Sequence[str]) -> Any:
    """The value of a scalar without quotes, for a key that takes `kinds`."""
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
    # Above 18 digits every integer of a config is out of range, and Python refuses to read more than 4300 digits.
    return int(digits) if re.fullmatch(r"[-+]?[0-9]{1,18}", digits) else float(digits)


def sentences(error: ErrorDetails, schema: Schema, above: tuple[str, ...]) -> Iterator[str]:
    """An error of pydantic in words; a contradiction can have one line for each of several keys."""
    keys = tuple(key for key in error["loc"] if key != "[key]")  # pydantic marks an error in the key itself so
    part, value, kind = part_at(keys, schema), error["input"], error["type"]
    where = place((*above, *keys))
    if kind == "value_error" and isinstance(cause := error["ctx"]["error"], Contradiction):
        yield from str(cause).splitlines()
    elif kind == "value_error":
        yield f"{where}: {cause}"
    elif kind == "missing":
        yield f"{where}: not set; add the key"
    elif kind == "extra_forbidden":
        yield f"{where}: {no_such_key(keys, properties(part_at(keys[:-1], schema)), schema)}"
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{where}: {value} is not finite; write a finite number"
    elif kind == "string_unicode":
        yield f"{where}: {quoted(value)} is not valid Unicode; write the character itself"
    elif kind in ("greater_than_equal", "less_than_equal"):
        yield f"{where}: {quoted(value)} is out of range; write {asked(part)}"
    elif kind == "literal_error":
        near = difflib.get_close_matches(str(value), [word for word in listed_values(part) if isinstance(word, str)], 1)
        hint = f"did you mean {near[0]}? Write" if near else "write"
        yield f"{where}: no such value {quoted(value)}; {hint} {asked(part)}"
    elif kind == "string_too_short":
        yield f"{where}: empty; write text"
    elif kind == "string_too_long":
        yield f"{where}: {len(value)} characters; write at most {error['ctx']['max_length']}"
    else:  # the value has another type
        yield f"{where}: {mistyped(value, kinds_of(part))}; write {asked(part)}"


def part_at(keys: Iterable[str | int], schema: Schema) -> Schema:
    """The part of a schema that describes the value at a key path."""
    part = schema
    for key in keys:
        part = resolved(below(part, key), schema)
    return part


def properties(part: Schema) -> dict[str, Schema]:
    """The keys of a block, also where the block is one of several choices."""
    blocks = [part, *part.get("anyOf", [])]
    return next((block["properties"] for block in blocks if "properties" in block), {})


def listed_values(part: Schema) -> list[Any]:
    """The values that a key takes by value, also where they are one of several choices."""
    return [value for choice in [part, *part.get("anyOf", [])] for value in choice.get("enum", [])]


def no_such_key(keys: tuple[Any, ...], known: Iterable[str], schema: Schema) -> str:
    """The message for a key that its block does not have: the nearest of the block's keys, or all of them."""
    key, known = keys[-1], list(known)
    homes = [name for name in known if len(keys) == 1 and key in part_at([name], schema).get("properties", {})]
    near = [f"{homes[0]}.{key}"] if homes else difflib.get_close_matches(key, known, 1)
    return f"no such key; did you mean {near[0]}?" if near else f"no such key; the keys are {', '.join(known)}"


def asked(part: Schema) -> str:
    """The values that a key takes, in words."""
    return listed(choices(part))


SHOWN = 8  # values of a long list that are written out


def choices(part: Schema) -> list[str]:
    """The values that a key takes, by value or by type; of a long list the first ones."""
    if "anyOf" in part:
        return [words for inner in part["anyOf"] for words in choices(inner)]
    if "const" in part or "enum" in part:
        found = [part["const"]] if "const" in part else part["enum"]
        values = [str(value).lower() if isinstance(value, bool) else value for value in found]
        more = len(values) - SHOWN
        return values if more <= 1 else [*values[:SHOWN], f"{more} more (config/config.schema.json)"]
    if part["type"] == "array":
        return [f"a list of {asked(part['items'])}"]
    words = {
        "integer": ["a whole number"],
        "number": ["a number"],
        "string": ["text"],
        "boolean": ["true", "false"],
        "null": ["null"],
        "object": ["a block of keys"],
    }[part["type"]]
    if "minimum" not in part:
        return words
    least, most = part["minimum"], part.get("maximum")
    return [f"{words[0]} of at least {least}" if most is None else f"{words[0]} from {least} to {most}"]


def listed(words: Sequence[str]) -> str:
    """`a, b or c`."""
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]


def mistyped(value: Any, kinds: Sequence[str]) -> str:
    """A clause that says which other type than `kinds` the value has."""
    if value is None:
        return "null"
    if isinstance(value, str) and "object" in kinds and value.startswith("{"):
        return f"{quoted(value)} is not a YAML mapping (quote a text that holds ': ' or a brace)"
    if isinstance(value, str) and scalar(value, []) != value:
        return f"{quoted(value)} is text because of its quotes"
    if isinstance(value, float) and "integer" in kinds:
        return f"{quoted(value)} is not whole"
    names = {str: "text", bool: "a truth value", int: "a number", float: "a number", dict: "a block", list: "a list"}
    return f"{quoted(value)} is {names[type(value)]}"


def place(keys: Iterable[Any]) -> str:
    """A key path as one word, such as `sensitivity.maps[2]` or `sensitivity.op_name_dict['a.*']`."""
    path = ""
    for key in keys:
        if isinstance(key, int):
            path += f"[{key}]"
        elif re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]{0,63}", key):
            path += f".{key}" if path else key
        else:
            path += f"[{quoted(key)}]"
    return path or "the config"


def with_shipped_files(config: Config, checkout: Path) -> Config:
    """The config, with the checkout's files where relative paths lead to nothing from the working directory.

    So a run elsewhere finds the model and the texts that are part of the repository. A path that the pipeline itself
    makes stays, because it is made in the working directory.
    """
    found: dict[str, Block] = {}
    for name, block in (("model", config.model), ("calibration", config.calibration)):
        if block.path and block.source in ("digits", "local") and not os.path.exists(block.path):
            if (shipped := checkout / block.path).exists():
                found[name] = block.model_copy(update={"path": str(shipped)})
    return config.model_copy(update=found)


def require_sources(
    config: Config, model_manifest: Path, calibration_made: bool = False, plan_made: bool = False
) -> None:
    """Refuse a config whose shipped or local model, local calibration set, or local checkpoint is missing.

    Args:
        config: the config of the run.
        model_manifest: the path of the model's manifest. Where the manifest exists, only later steps read the model.
        calibration_made: whether the calibration set of this config exists. Then its source may be absent.
        plan_made: whether the plan of this config exists. Then its checkpoints may be absent.

    Raises:
        InputError: one line for each missing source.
    """
    found = []
    model, calibration = config.model, config.calibration
    next_steps = {
        "local": "give a Hugging Face snapshot directory",
        "digits": f"restore the snapshot in the checkout (git checkout -- {SHIPPED_MODEL})",
    }
    step = next_steps.get(model.source)
    if step and not model_manifest.exists() and (why := unreadable(model.path, folder=True)):
        found.append(f"config: model.path: {why}; {step}")
    samples = calibration.path if calibration.source == "local" else None
    if samples and not (calibration_made and not os.path.exists(samples)) and (why := unreadable(samples)):
        found.append(f"config: calibration.path: {why}; give a JSONL, a Parquet file or an image folder")
    for number, scheme in enumerate(config.sensitivity.schemes):
        folder = scheme.checkpoint if isinstance(scheme, OwnScheme) else None
        if folder and not repository_at(folder) and not plan_made and (why := unreadable(folder, folder=True)):
            where = place(("sensitivity", "schemes", number, "checkpoint"))
            found.append(f"config: {where}: {why}; give the folder of a checkpoint, or owner/name@commit")
    if found:
        raise InputError("\n".join(found))


def unreadable(path: str, *, folder: bool = False) -> str:
    """Why a file or folder cannot be read, as a clause; empty if it can be read."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            os.scandir(path).close()
        elif folder:
            return f"{path} is not a directory"
        elif stat.S_ISREG(mode):
            open(path, "rb").close()
        else:
            return f"{path} is neither a file nor a folder"
    except FileNotFoundError:
        return f"{path} does not exist"
    except OSError as error:
        return f"{path}: {error.strerror}"
    return ""
