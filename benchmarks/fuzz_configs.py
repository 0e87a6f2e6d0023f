"""Try configs with one fault or one unusual value each: a fault is refused in one line, an unusual value is read.

Every mutant is the default config with one change of a kind, drawn by a seed, with the outcome that a user expects. The
function that the Snakefile calls reads all of them; `snakemake --dry-run` reads a sample as a user's config.
"""

import argparse
import copy
import json
import math
import random
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from snakemake.cli import parse_config

from auto_quantize_model.config_text import read_config
from auto_quantize_model.files import InputError

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = yaml.safe_load((ROOT / "config" / "config.yaml").read_bytes())
AS_LINK = f"model={{source: hub, repo_id: a/b, revision: '{'0' * 40}'}}"  # a source whose path need not exist
SECONDS = 10  # that reading a config may take before it counts as a hang
# Several problems of one config are a line each.
OUTCOMES = ("accepted", "refused in one line", "traceback", "hang", "accepted wrongly", "refused wrongly")
Place = tuple[str, ...]


@dataclass(frozen=True)
class Mutant:
    """A config with one fault or one unusual value.

    `text` is the file, `arguments` are those of `--config`. `expected` holds the values that must be read, by place;
    None: the config must be refused. The message must contain `named`.
    """

    kind: str
    text: bytes
    expected: dict[Place, Any] | None = None
    named: str = ""
    arguments: list[str] = field(default_factory=list)


def places(kind: type, block: dict[str, Any] = DEFAULT, above: Place = ()) -> list[Place]:
    """The keys of the default config whose value is of a type."""
    found = [(*above, key) for key, value in block.items() if type(value) is kind]
    inner = [places(kind, value, (*above, key)) for key, value in block.items() if isinstance(value, dict)]
    return found + [place for part in inner for place in part]


def changed(place: Place, value: Any) -> bytes:
    """The default config with another value at a place, as YAML."""
    config = copy.deepcopy(DEFAULT)
    block = config
    for key in place[:-1]:
        block = block[key]
    block[place[-1]] = value
    return yaml.safe_dump(config).encode()


def written(place: Place, text: str) -> bytes:
    """The default config with `text` at a place as it is, without quotes of ours."""
    return changed(place, "PUT-HERE").replace(b"PUT-HERE", text.encode(errors="surrogateescape"))


def misspelled(draw: random.Random) -> Mutant:
    place = draw.choice(places(int) + places(str) + places(bool))
    at = draw.randrange(1, len(place[-1]))
    wrong = place[-1][:at] + draw.choice("qzx") + place[-1][at:]
    return Mutant(
        "unknown key", changed((*place[:-1], wrong), 1), named=f"{'.'.join((*place[:-1], wrong))}: no such key"
    )


def missing(draw: random.Random) -> Mutant:
    config = copy.deepcopy(DEFAULT)
    block, key = draw.choice(
        [("model", "name"), ("calibration", "seed"), ("sensitivity", "maps"), ("quantize", "profile")]
    )
    del config[block][key]
    return Mutant("missing key", yaml.safe_dump(config).encode(), named=f"{block}.{key}: not set")


def wrong_type(draw: random.Random) -> Mutant:
    wrong: dict[type, list[Any]] = {
        int: ["four", 2.5, True, None, [1], {"a": 1}, "'1'", -3, 10**30],
        bool: ["maybe", 3, None, [True], {"a": True}],
        str: [["a"], {"a": "b"}, None],
        list: ["isolated", 3, None, {"isolated": True}],
        dict: ["text", 3, None, ["a"], True],
    }
    kind = draw.choice(list(wrong))
    place, value = draw.choice(places(kind)), draw.choice(wrong[kind])
    return Mutant("wrong type", changed(place, value), named=".".join(place))


def not_finite(draw: random.Random) -> Mutant:
    place = draw.choice([*places(int), ("profiles", "min_sqnr_db"), ("profiles", "max_accuracy_drop")])
    text = draw.choice([".inf", "-.inf", ".nan", ".NaN", "1e999"])
    return Mutant("not finite", written(place, text), named=f"{'.'.join(place)}: ")


def whole(draw: random.Random) -> Mutant:
    place = draw.choice(places(int))
    value = 1024 if place[-1] == "max_tokens" else DEFAULT[place[0]][place[1]] if len(place) == 2 else 7
    text = draw.choice([f"{value}.0", f"{value}.", f"+{value}", f"{value}.0e0", f"{value}e0"])
    return Mutant("whole number", written(place, text), {place: value})


def bad_name(draw: random.Random) -> Mutant:
    place = (draw.choice(["model", "calibration"]), "name")
    name = draw.choice(
        [
            "digits\n",
            "logs",
            "benchmarks",
            "archives",
            "Archives",
            "model_manifest.json",
            ".x",
            "..",
            "a/b",
            "a b",
            "",
            "x.",
        ]
        + ["{a}", "con", "nul.txt", "é", "a" * 65, "a\0", "-a", "~"]
    )
    return Mutant("bad name", changed(place, name), named=f"{place[0]}.name: ")


def text_as_it_is(draw: random.Random) -> Mutant:
    place, texts = ("calibration", "prompt"), ["5", "1e3", "true", "2024-01-01", "0x10", "a{b}", "no", "1:30", "007"]
    text = draw.choice(texts)
    if draw.random() < 0.5:
        return Mutant("text", written(place, text), {place: text})
    text = draw.choice([*texts, "what: {this}?", "null", "[a", "- b", "# c", "'"])
    argument = f"calibration={{prompt: {json.dumps(text)}}}"
    return Mutant("text", yaml.safe_dump(DEFAULT).encode(), {place: text}, arguments=[argument])


def paths(draw: random.Random) -> Mutant:
    block = draw.choice(["model", "calibration"])
    place, arguments = (block, "path"), [AS_LINK] if block == "model" else []
    path = draw.choice(["a{b}/c", "{x}", "a b", "~/models", "é/ü", "'\"$HOME`"])
    expected = path.replace("~", str(Path.home()))
    return Mutant("path", changed(place, path), {place: expected}, arguments=arguments)


def wrong_choice(draw: random.Random) -> Mutant:
    place = draw.choice(
        [("sensitivity", "engine"), ("sensitivity", "device"), ("model", "source"), ("quantize", "profile")]
    )
    value = draw.choice(["replai", "", "REPLAY", "gpu", "on", 3, None, ["cpu"]])
    return Mutant("wrong choice", changed(place, value), named=f"{'.'.join(place)}: ")


def wrong_maps(draw: random.Random) -> Mutant:
    maps = draw.choice(
        [[], ["fallback"], ["isolated", "isolated"], ["isolated", "sorted"], ["isolated", None], [["isolated"]]]
    )
    return Mutant("maps", changed(("sensitivity", "maps"), maps), named="sensitivity.maps")


def own_scheme(draw: random.Random) -> Mutant:
    """A scheme of one's own, as it should be or with one fault in it."""
    own: dict[str, Any] = {"name": "W4A8_G64", "weights": {"num_bits": 4, "strategy": "group", "group_size": 64}}
    own["input_activations"] = {"num_bits": 8, "strategy": "token", "dynamic": True}
    place = ("sensitivity", "schemes")
    if draw.random() < 0.3:
        read = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 64, "scale_dtype": None}
        inputs = read | {"num_bits": 8, "group_size": None, "strategy": "token", "dynamic": True}
        weights = read | {"strategy": "group", "block_structure": None}
        both = {"weights": weights, "input_activations": inputs, "checkpoint": None}
        expected = ["inc_int8", {"name": "W4A8_G64", **both}]
        return Mutant("own scheme", changed(place, ["inc_int8", own]), {place: expected})
    key, value = draw.choice(
        [("name", "NVFP4"), ("name", "a/b"), ("name", None), ("weights", None), ("weights", []), ("output", {})]
        + [("weights", {"num_bits": 4, "strategy": "group"}), ("weights", {"num_bits": "4", "strategy": "channel"})]
        + [("weights", {"num_bits": 4, "strategy": "token"}), ("weights", {"num_bits": 8, "strategy": "block"})]
        + [("weights", {"num_bits": 5, "type": "float", "strategy": "channel"}), ("input_activations", "W8A8")]
        + [("input_activations", {"num_bits": 8, "strategy": "token"}), ("input_activations", {"dynamic": "locl"})]
        + [("checkpoint", "checkpoints/gptq"), ("checkpoint", ["a"]), ("checkpoint", "a\nb")]
    )
    return Mutant("own scheme", changed(place, ["inc_int8", own | {key: value}]), named="sensitivity.schemes")


def regular_expression(draw: random.Random) -> Mutant:
    pattern = draw.choice(["(", "[", "*", "a{99999999999}", "(?P<a>x)(?P<a>y)", "(" * 500, "\\", "(?i"])
    return Mutant(
        "regular expression", changed(("sensitivity", "op_name_dict"), {pattern: "fp32"}), named="op_name_dict"
    )


def contradiction(draw: random.Random) -> Mutant:
    place, value, named = draw.choice(
        [
            (("calibration", "min_pixels"), 6272, "min_pixels is above"),
            (("sensitivity", "confidence_batches"), 17, "confidence_batches (17) times"),
            (("decide", "heldout_batches"), 33, "heldout_batches (33) times"),
            (("model", "source"), "hub", "model.repo_id"),
            (("model", "path"), "models/mine", "set model.source: local"),
            (("calibration", "source"), "local", "calibration.path"),
        ]
    )
    return Mutant("contradiction", changed(place, value), named=named)


def set_twice(draw: random.Random) -> Mutant:
    block = draw.choice(list(DEFAULT))
    key = draw.choice(list(DEFAULT[block]))
    again = f"\n{block}: {{{key}: 1, {key}: 2}}\n" if draw.random() < 0.5 else f"\n{block}: {{}}\n"
    return Mutant("set twice", yaml.safe_dump(DEFAULT).encode() + again.encode(), named="is set twice")


def broken_file(draw: random.Random) -> Mutant:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    deep = "[" * 3000
    text = draw.choice(
        [
            b"",
            b"# nothing\n",
            b"null",
            b"- a\n- b\n",
            b"text",
            b"model: [1\n",
            b"model:\n\tname: x\n",
            b"model: \xff\xfe\n",
        ]
        + [
            b"model: {? [a, b] : 3}\n",
            b"? {a: b}\n: 3\n",
            b"model: &m {name: *m}\n",
            b"a: *b\n",
            b"a: b: c\n",
            b"%YAML 9\n",
        ]
        + [b"model: !!python/name:os.system\n", b"model: !!int five\n", b"<<: 3\n", b"--- a\n--- b\n", b"model: \x01\n"]
        + [bomb.encode(), deep.encode(), b"{" * 3000, b"\xef\xbb\xbf", b"model: @x\n", b'"a\n', b"\0"]
    )
    return Mutant("broken file", text)


def odd_key(draw: random.Random) -> Mutant:
    key = draw.choice([5, True, None, 1.5, "", "a.b", "a\nb", "\x1b[31m", "x" * 5000, "__use_yte__"])
    place: Place = draw.choice([(), ("model",), ("calibration", "columns")])
    return Mutant("odd key", changed((*place, key), 1), named="no such key")


def command_line(draw: random.Random) -> Mutant:
    whole_default = yaml.safe_dump(DEFAULT).encode()
    good = draw.choice([("calibration", "num_samples", "34", 34), ("sensitivity", "tf32", "true", True)])
    if draw.random() < 0.5:
        argument = f"{good[0]}={{{good[1]}: {good[2]}}}"
        return Mutant("command line", whole_default, {(good[0], good[1]): good[3]}, arguments=[argument])
    bad = draw.choice(
        [
            "calibration={num_samples: four}",
            "calibration=",
            "calibration=5",
            "calibration=[a]",
            "calibration={prompt: a: b}",
        ]
        + ["num_samples=4", "model={nam: x}", "profiles={min_sqnr_db: .nan}", "sensitivity={maps: isolated}", "model={"]
    )
    return Mutant("command line", whole_default, arguments=[bad])


KINDS: tuple[Callable[[random.Random], Mutant], ...] = (
    *(misspelled, missing, wrong_type, not_finite, whole, bad_name, text_as_it_is, paths, wrong_choice, wrong_maps),
    *(regular_expression, contradiction, set_twice, broken_file, odd_key, command_line, own_scheme),
)


def mutants(count: int, seed: int) -> Iterator[Mutant]:
    """`count` mutants, the kinds in turn; the same ones for the same seed."""
    draw = random.Random(seed)
    return (KINDS[number % len(KINDS)](draw) for number in range(count))


def judged(mutant: Mutant, config: dict[str, Any] | None, message: str) -> str:
    """The outcome of a mutant that was read as `config`, or refused with `message`."""
    if config is None:
        lines = message.splitlines()
        each = all(line.startswith("config: ") or "config.yaml" in line for line in lines) and len(lines) <= 3
        return (
            "refused in one line" if mutant.expected is None and mutant.named in message and each else "refused wrongly"
        )
    if mutant.expected is None or not sound(config):
        return "accepted wrongly"
    for place, value in mutant.expected.items():
        found: Any = config
        for key in place:
            found = found[key]
        if type(found) is not type(value) or found != value:
            return "accepted wrongly"
    return "accepted"


def sound(config: dict[str, Any]) -> bool:
    """Whether every number of the default config is still a finite number of the same type."""
    for kind in (int, bool, str):
        for place in places(kind):
            value: Any = config
            for key in place:
                value = value[key]
            if type(value) is not kind:
                return False
    return all(value is None or math.isfinite(value) for value in config["profiles"].values())


def read(mutant: Mutant, folder: Path) -> str:
    """The outcome of a mutant that the function of the Snakefile reads."""
    file = folder / "config.yaml"
    file.write_bytes(mutant.text)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return judged(mutant, read_config([file], parse_config(mutant.arguments)).model_dump(mode="json"), "")
    except InputError as error:
        return judged(mutant, None, str(error))
    except TimeoutError:
        return "hang"
    except Exception:  # this script counts them
        return "traceback"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def dry_run(mutant: Mutant, folder: Path) -> str:
    """The outcome of a mutant that Snakemake reads as config/config.yaml; the values are not compared."""
    (folder / "config").mkdir(exist_ok=True)
    if not (folder / "resources").exists():  # the default config takes the shipped snapshot
        (folder / "resources").symlink_to(ROOT / "resources", target_is_directory=True)
    (folder / "config" / "config.yaml").write_bytes(mutant.text)
    snakefile = str(ROOT / "workflow" / "Snakefile")
    command = [sys.executable, "-m", "snakemake", "--snakefile", snakefile, "--directory", str(folder), "--dry-run"]
    command += ["--quiet", "all", *(["--config", *mutant.arguments] if mutant.arguments else [])]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60 + SECONDS)
    except subprocess.TimeoutExpired:
        return "hang"
    said = ended.stdout + ended.stderr
    if "Traceback" in said or '  File "' in said:
        return "traceback"
    if ended.returncode:
        start = ("config: ", str(folder), "config/config.yaml")
        return judged(mutant, None, "\n".join(line for line in said.splitlines() if line.startswith(start)))
    return "accepted" if mutant.expected is not None else "accepted wrongly"


def fuzz(count: int, seed: int, dry_runs: int = 0) -> tuple[dict[str, int], list[str]]:
    """Try `count` mutants in this process, and the first `dry_runs` of another seed by Snakemake.

    Returns:
        The number of each outcome, and a line for each mutant whose outcome is a fault of ours.
    """

    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    counts, faults = Counter(dict.fromkeys(OUTCOMES, 0)), []
    try:
        with tempfile.TemporaryDirectory() as folder:
            tried = [(mutant, read) for mutant in mutants(count, seed)]
            tried += [(mutant, dry_run) for mutant in mutants(dry_runs, seed + 1)]
            for mutant, way in tried:
                outcome = way(mutant, Path(folder))
                counts[outcome] += 1
                if outcome not in OUTCOMES[:2]:
                    faults.append(
                        f"{outcome} ({way.__name__}): {mutant.kind}: {mutant.arguments or mutant.text[:2000]!r}"
                    )
    finally:
        signal.signal(signal.SIGALRM, before)
    return dict(counts), faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configs", type=int, default=1000, help="configs to try in this process")
    parser.add_argument("--dry-runs", type=int, default=32, help="configs to try by snakemake --dry-run, 3 s each")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw")
    args = parser.parse_args()
    counts, faults = fuzz(args.configs, args.seed, args.dry_runs)
    print("\n".join([json.dumps(counts, indent=2), *faults]))
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
