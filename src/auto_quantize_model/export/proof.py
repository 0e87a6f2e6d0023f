"""A profile as a checkpoint that transformers has loaded back, and that is the model which the profile promises.

In: a snapshot, the schemes that its ops get, the profile, and held-out batches. Out: the folder of the checkpoint, and
the comparison of its metrics with the profile's. Every weight is compared too. All is computed on the CPU in FP32.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from compressed_tensors.compressors import decompress_module
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize

from auto_quantize_model.export.card import card
from auto_quantize_model.export.checkpoint import Source, require_bytes, write_checkpoint
from auto_quantize_model.files import InputError, write_text
from auto_quantize_model.folders import atomic_folder
from auto_quantize_model.machine import with_threads
from auto_quantize_model.measure.heldout import compared, record_of, summary, totals
from auto_quantize_model.measure.metrics import Reference, output_at
from auto_quantize_model.measure.served_audit import with_samples
from auto_quantize_model.models.snapshot import explained, model_class, name_hidden_state
from auto_quantize_model.models.weights import read_object
from auto_quantize_model.records import Frontier, ModelManifest, Profile
from auto_quantize_model.replay.model import Batch
from auto_quantize_model.schemes.compressed import quantized_weight

Progress = Callable[[int, int], None]  # done and total
AGAIN = "do not use this checkpoint, and report the difference with the plan"


def quantize(
    source: Source,
    directory: Path,
    manifest: ModelManifest,
    name: str,
    profile: Profile,
    frontier: Frontier,
    heldout: Sequence[Batch],
    answers: Sequence[list[range | None]],
    beside: Collection[str] = (),
    on_progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Write the checkpoint of a profile, whole and proved or not at all.

    Args:
        source: the snapshot, with the profile's assignment.
        directory: the folder to write.
        manifest: of the snapshot.
        name: the profile's name.
        frontier: where the profile was measured, on the same held-out batches.
        heldout: the batches.
        answers: as `heldout.HeldOut` takes them.
        `beside`: as `folders.atomic_folder` takes it.
        on_progress: called after each tensor of the snapshot and after each batch, with the number done and the total.

    Returns:
        The record of `promised_and_found`, with `kind` and `bytes`: those promised, all of them, and why more.

    Raises:
        InputError: an op cannot be written, or what is loaded back is not what the profile promises.
    """
    tensors = len(source.written)
    total = tensors + len(heldout)
    with atomic_folder(directory, beside=beside) as folder:
        written = write_checkpoint(source, folder, lambda done, _: on_progress(done, total))
        require_bytes(written, profile.point.weight_bytes)
        with with_threads(frontier.threads):
            model = load_back(folder, source)
            require_weights(model, source)
            on_batch: Progress = lambda done, _: on_progress(tensors + done, total)  # noqa: E731
            found = measure_loaded(model, source, heldout, answers, on_batch)
        record = promised_and_found(name, profile, found, frontier)
        record |= {"kind": "checkpoint", "bytes": {"promised": profile.point.weight_bytes, **vars(written)}}
        write_text(folder / "README.md", card(manifest, source.plan.output, profile, record, directory))
    return record


def load_back(folder: Path, source: Source) -> Any:
    """The model of a checkpoint as transformers loads it, in FP32 and eval mode, with decompressed weights.

    transformers rounds decompressed NVFP4 weights to BF16. vLLM multiplies them in FP32, and so did the replay. So the
    library decompresses these here once more, in FP32.

    Raises:
        InputError: transformers refuses the checkpoint, or leaves an op unquantized.
    """
    with explained(folder, "transformers cannot load the written checkpoint"):
        model: Any = model_class(read_object(folder / "config.json")).from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    model.hf_quantizer.compressor.remove_decompression_hook(model)
    for name, scheme in source.schemes.items():
        module = model.get_submodule(name)
        if not hasattr(module, "quantization_scheme"):
            raise InputError(f"{folder}: transformers does not find {name} in the checkpoint's config; {AGAIN}")
        is_nvfp4 = module.quantization_scheme.format == CompressionFormat.nvfp4_pack_quantized
        exact = fp4_weight(module, scheme.weights) if is_nvfp4 else None
        decompress_module(module)
        if exact is not None:
            module.weight = torch.nn.Parameter(exact)
        with_samples(module.float())
    model.eval().requires_grad_(False)
    name_hidden_state(model, read_object(folder / "config.json"))
    return model


def fp4_weight(module: Any, args: QuantizationArgs) -> torch.Tensor:
    """The weight of a compressed NVFP4 module, (rows, columns), float32."""
    packed, scale = module.weight_packed, module.weight_scale.float()
    codes = unpack_fp4_from_uint8(packed, packed.shape[0], 2 * packed.shape[1], dtype=torch.float32)
    found: torch.Tensor = dequantize(codes, scale, args=args, global_scale=module.weight_global_scale)
    return found


def require_weights(model: Any, source: Source) -> None:
    """Refuse a loaded checkpoint whose weights are not those that were measured, bit for bit.

    An op's weight is compared with the library's fake-quantized weight of the snapshot, and its static inputs' scale
    with the calibration's.

    Raises:
        InputError: the message names the first weight or scale that differs.
    """
    found = dict(model.named_parameters(remove_duplicate=False))
    for name, stored in source.names.items():
        if stored in source.others or stored not in source.written:
            continue
        if op_name := source.ops.get(stored):
            own = source.weight(op_name)
            expected = quantized_weight(own, source.schemes[op_name].weights, source.parameters(op_name, own))
        else:
            expected = source.tensor(stored).float()
        require_same(name, found[name], expected)
    for op_name in source.schemes:
        inputs = source.inputs(op_name)
        static = {"input_scale": inputs.scale, "input_global_scale": inputs.global_scale} if inputs else {}
        for leaf, scale in static.items():
            if scale is not None and scale.numel():
                require_same(f"{op_name}.{leaf}", found[f"{op_name}.{leaf}"], scale)


def require_same(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Refuse a tensor of a loaded checkpoint that is not the expected one."""
    if not torch.equal(found, expected):
        raise InputError(f"{name} differs in the checkpoint from the one that was measured; {AGAIN}")


def measure_loaded(
    model: Any,
    source: Source,
    heldout: Sequence[Batch],
    answers: Sequence[list[range | None]],
    on_batch: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """The metrics of a loaded checkpoint on held-out batches, in the fields of a point.

    One model is in memory. For the unquantized output, each quantized op reads its weight from the snapshot.

    Args:
        model: as `load_back` returns it, after `require_weights`.
        heldout: the batches.
        answers: as `heldout.HeldOut` takes them.
        on_batch: called after each batch with the number done and the total.
    """
    records, sums = [], []
    for index, batch in enumerate(heldout):
        with unquantized(model, source):
            reference = Reference.of(output_at(model, batch, source.plan.measured_op), batch, source.plan.measured_op)
        output = output_at(model, batch, source.plan.measured_op)
        records.append(record_of(output, reference, batch, answers[index]))
        sums.append(totals(reference, index))
        on_batch(index + 1, len(heldout))
    asked = sum(span is not None for spans in answers for span in spans)
    return summary(records, sums, asked)


@contextmanager
def unquantized(model: Any, source: Source) -> Iterator[None]:
    """For as long as the context lasts, the quantized ops compute with the snapshot's weights."""

    def forward(name: str, module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: torch.nn.functional.linear(x, source.weight(name), module.bias)

    with ExitStack() as stack:
        for name in source.schemes:
            module = model.get_submodule(name)
            stack.enter_context(mock.patch.object(module, "forward", forward(name, module)))
        yield


def promised_and_found(name: str, profile: Profile, found: dict[str, Any], frontier: Frontier) -> dict[str, Any]:
    """The metrics of the loaded checkpoint, compared with those that the profile promised.

    Args:
        name: the profile's name.
        found: as `measure_loaded` returns it.

    Returns:
        As `measure.heldout.compared`.

    Raises:
        InputError: a number differs, and the profile was measured on such a CPU as this one. Or the divergence lies
            outside of the profile's 95 % interval, and the profile was measured elsewhere.
    """
    record = compared(name, profile, found, frontier)
    low, high, divergence = profile.point.divergence_low, profile.point.divergence_high, found["divergence"]
    if record["status"] != "bit_identical" and not low <= divergence <= high:
        raise InputError(
            f"profile {name}: the checkpoint has a KL divergence of {divergence:.3g} nats on the held-out samples, and"
            f" the profile's interval is {low:.3g} to {high:.3g}; {AGAIN}"
        )
    return record
