"""Damage small real snapshots at random, and count how the checks of `get_model` answer.

Each case is a copy of a snapshot with one change, drawn from a seed:

- a value of a JSON file is replaced, removed or given twice
- bytes of a header are flipped
- a file is cut, emptied, renamed, or replaced by a pipe, a directory or a link to itself

A case has one of these outcomes. The last three must be 0.

- refused: InputError of `get_model`
- refused by the plan: InputError when the model runs on a sample
- accepted and runs: finite logits
- accepted wrongly: another error when the model runs
- traceback: another error of `get_model`
- hang

    python benchmarks/fuzz_snapshots.py --number 500 --seed 0
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers

from auto_quantize_model.data.digits import LIMITS, digit_samples
from auto_quantize_model.files import InputError
from auto_quantize_model.inc.plan import find_output_op
from auto_quantize_model.made import standin
from auto_quantize_model.made.digits import build_snapshot, build_tokenizer
from auto_quantize_model.made.shapes import SHAPES
from auto_quantize_model.models.encode import encode
from auto_quantize_model.models.sample import Sample
from auto_quantize_model.models.snapshot import build_manifest, load_model, load_processor

REFUSED, LATER, RUNS = "refused", "refused by the plan", "accepted and runs"
WRONG, TRACEBACK, HANG = "accepted wrongly", "traceback", "hang"
KINDS = (REFUSED, LATER, RUNS, WRONG, TRACEBACK, HANG)
VALUES: list[Any] = [None, True, False, -1, 0, 1, 3, 10**7, 10**12, 10**18, 2**64, 1.5, 1e308, "", "text", "64"]
VALUES += ["../x", "a\nb", "\ud800", [], ["a"], [1, "a"], {}, {"a": 1}]
MEMORY = 32 << 30  # bytes of address space for a case; a file that unpacks to too much ends in MemoryError


def build_snapshots(directory: Path) -> list[Path]:
    """The snapshots to damage: a vision-language model, its published layout in shards, and a text model."""
    vision, published, text = (directory / name for name in ("vision", "published", "text"))
    build_snapshot(vision, depth=1, hidden=32)
    standin.build(SHAPES["tiny"], published, shard_bytes=100_000)
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    transformers.Qwen2ForCausalLM(config).save_pretrained(text)
    tokenizer.save_pretrained(text)
    return [vision, published, text]


def damage(directory: Path, generator: random.Random) -> str:
    """Change one thing in a snapshot, and describe the change."""
    files = sorted(path for path in directory.iterdir() if path.is_file())
    documents = [path for path in files if path.suffix == ".json"]
    weights = [path for path in files if path.suffix == ".safetensors"]
    kind = generator.choices(["json", "header", "bytes", "file"], [6, 3, 2, 1])[0]
    if kind == "json":
        # config.json as often as all others together
        return change_json(generator.choice([directory / "config.json", generator.choice(documents)]), generator)
    if kind == "header":
        return change_header(generator.choice(weights), generator)
    if kind == "bytes":
        return change_bytes(generator.choice(files), generator)
    return change_file(generator.choice(files), generator)


def changed(document: Any, generator: random.Random) -> str:
    """Change one value somewhere inside of a JSON document, in place."""
    places = [(parent, key) for parent, key in walk(document)]
    parent, key = generator.choice(places)
    if generator.random() < 0.2:
        del parent[key]
        return f"{key} removed"
    parent[key] = generator.choice(VALUES)
    return f"{key} = {parent[key]!r}"


def walk(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a JSON document with each of its keys; of a long list the first entries alone."""
    keys = list(document) if isinstance(document, dict) else range(min(len(document), 3))
    for key in keys:
        yield document, key
        if isinstance(document[key], dict | list):
            yield from walk(document[key])


def change_json(path: Path, generator: random.Random) -> str:
    text = path.read_text()
    if generator.random() < 0.05:
        path.write_text('{"model_type": "x",' + text.lstrip()[1:])
        return f"{path.name}: a key twice"
    if generator.random() < 0.05:
        path.write_text(generator.choice(["[]", "3", "null", "", "{", "{}", "[" * 100_000, "\x00", f"[{text}]"]))
        return f"{path.name}: other text"
    document = json.loads(text)
    said = changed(document, generator)
    path.write_text(json.dumps(document))
    return f"{path.name}: {said}"


def change_header(path: Path, generator: random.Random) -> str:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    said = changed(header, generator)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    return f"{path.name}: header, {said}"


def change_bytes(path: Path, generator: random.Random) -> str:
    data = bytearray(path.read_bytes())
    place = generator.randrange(min(len(data), 4000))
    data[place] ^= 1 << generator.randrange(8)
    path.write_bytes(data)
    return f"{path.name}: a bit of byte {place}"


def change_file(path: Path, generator: random.Random) -> str:
    kind = generator.choice(["removed", "emptied", "cut", "renamed", "pipe", "directory", "loop", "twice"])
    data = path.read_bytes()
    path.unlink()
    if kind == "emptied":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(data[: generator.randrange(len(data))])
    elif kind == "renamed":
        path.with_name(f"{path.stem}-x{path.suffix}").write_bytes(data)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "twice":
        path.write_bytes(data + data)
    return f"{path.name}: {kind}"


def answer(directory: Path) -> tuple[str, str]:
    """The outcome of the checks on a snapshot, and the message or the traceback."""
    try:
        build_manifest(directory, "fuzz", "local", {})
    except InputError as error:
        return REFUSED, str(error)
    except Exception:  # what the benchmark counts
        return TRACEBACK, traceback.format_exc()
    try:
        processor = load_processor(directory)
        model = load_model(directory)
        sample = digit_samples([0])[0] if processor.image_token else Sample("text", "Which digit is this?")
        find_output_op(model, encode(sample, processor, LIMITS))
    except InputError as error:
        return LATER, str(error)
    except Exception:
        return WRONG, traceback.format_exc()
    return RUNS, ""


def in_child(directory: Path, sender: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sys.stdout = sys.stderr = open(os.devnull, "w")
    sender.send(answer(directory))


def judged(directory: Path, seconds: float) -> tuple[str, str]:
    """The outcome, from a process of its own, which is ended after `seconds`."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=in_child, args=(directory, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(seconds) else (HANG, f"no answer in {seconds:g} s")
    except EOFError:
        return TRACEBACK, f"the process died with {process.exitcode}"
    finally:
        process.kill()
        process.join()


def fuzz(snapshots: list[Path], seed: int, number: int, seconds: float) -> Iterator[tuple[str, str, str]]:
    """The cases of a seed: the change, the outcome, and its message."""
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        for case in range(number):
            original = generator.choice(snapshots)
            directory = Path(shutil.copytree(original, Path(temporary) / f"case-{case}"))
            said = f"{original.name}/{damage(directory, generator)}"
            yield said, *judged(directory, seconds)
            shutil.rmtree(directory)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=500, help="cases (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the cases (default: 0)")
    parser.add_argument("--seconds", type=float, default=60, help="after which a case is a hang (default: 60)")
    parser.add_argument("--all", action="store_true", help="print every case, not only those that must be 0")
    args = parser.parse_args()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        snapshots = build_snapshots(Path(temporary))
        for said, kind, message in fuzz(snapshots, args.seed, args.number, args.seconds):
            counts[kind] += 1
            if args.all or kind in (WRONG, TRACEBACK, HANG):
                print(f"{kind}: {said}\n{message}", flush=True)
    print(f"{args.number} cases of seed {args.seed}: " + ", ".join(f"{kind} {counts[kind]}" for kind in KINDS))
    return int(any(counts[kind] for kind in (WRONG, TRACEBACK, HANG)))


if __name__ == "__main__":
    raise SystemExit(main())
