"""One profile of one model, as the files for tools describe it.

In: the plan, the profile, and the model's modules. Out: the schemes with their ops, the names of modules, the sentences
that describe the profile, and a Python file from a template.
"""

import textwrap
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from compressed_tensors.quantization import QuantizationScheme
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from auto_quantize_model.escape import one_line
from auto_quantize_model.export.names import Modules, common_name
from auto_quantize_model.models.prepare import INNER
from auto_quantize_model.records import Cause, Cured, Op, Plan, Profile
from auto_quantize_model.report import coverage, sentences
from auto_quantize_model.schemes.compressed import scheme_of
from auto_quantize_model.schemes.scheme import INC_INT8

TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class Subject:
    """A profile to export.

    Attributes:
        plan: for which the profile was made.
        name: of the profile.
        profile: with its assignment.
        modules: the model's, by name.
        published: names of the published checkpoint's weights.
        calibration_samples: number of samples that set the profile's scales.
        causes: why units break, with their cures.
        cured: the profile with cures; None where no cure helps a unit of it.
    """

    plan: Plan
    name: str
    profile: Profile
    modules: Modules
    published: Collection[str]
    calibration_samples: int
    causes: tuple[Cause, ...] = ()
    cured: Cured | None = None

    @cached_property
    def groups(self) -> dict[str, list[str]]:
        """{scheme: its ops}, in the order of the plan."""
        given = [(name, self.profile.assignment[name]) for name in self.ops if name in self.profile.assignment]
        return {scheme: [name for name, own in given if own == scheme] for scheme in dict.fromkeys(s for _, s in given)}

    @cached_property
    def schemes(self) -> dict[str, QuantizationScheme]:
        """The profile's schemes of compressed-tensors, by name, made from the plan's fields."""
        return {name: scheme_of(name, self.plan.schemes[name]) for name in self.groups if name != INC_INT8}

    @cached_property
    def ops(self) -> dict[str, Op]:
        """The plan's ops, by name."""
        return {op.op_name: op for op in self.plan.ops}

    @cached_property
    def shared(self) -> set[str]:
        """The ops that a serving engine holds in one matrix with other ops."""
        return {name for unit in self.plan.units if len(unit.ops) > 1 for name in unit.ops}

    def holder(self, name: str) -> str | None:
        """The module of the model as transformers loads it that holds an op: the op itself, or one above it.

        None where the model has neither.
        """
        is_inside = name in self.ops and (self.ops[name].expert or name.endswith(f".{INNER}"))
        if not is_inside:
            return name if name in self.modules else None
        parts = name.split(".")
        above = (".".join(parts[:depth]) for depth in range(len(parts), 0, -1))
        return next((module for module in above if module in self.modules), None)

    def common(self, names: Iterable[str]) -> dict[str, str]:
        """{module: its common name}.

        Raises:
            InputError: as `common_name` says.
        """
        return {name: common_name(name, self.modules, self.published) for name in names}

    def described(self) -> list[str]:
        """What the profile quantizes, what that costs, and its error on held-out samples, in sentences."""
        what = self.plan.output
        point, kept = self.profile.point, len(self.ops) - len(self.profile.assignment)
        parts = [f"{sentences.counted(len(ops), 'op')} in {scheme}" for scheme, ops in self.groups.items()]
        low, high = sentences.number(point.divergence_low), sentences.number(point.divergence_high, what.unit)
        return [
            f"Profile {self.name} of {self.plan.model}: {', '.join(parts)}, and {kept} unquantized."
            f" A weight takes {point.bits:.2f} bits on average, and all weights take"
            f" {coverage.in_bytes(point.weight_bytes, 4)}.",
            f"On held-out samples the {what.divergence} is {sentences.number(point.divergence, what.unit)} (95 %"
            f" interval {low} to {high}).",
            *sentences.same_choice(what, point.top1_agreement),
            f"The output has {sentences.sqnr(point.sqnr_db)}.",
        ]


def header(notes: Iterable[str]) -> str:
    """Sentences as a text for a comment; untrusted names neither begin nor end a line."""
    return "\n\n".join(textwrap.fill(one_line(note), 118, break_on_hyphens=False) for note in notes)


def python_file(name: str, above: str, **values: Any) -> dict[str, str]:
    """{name: text} of a Python file from its template; a template puts names in as Python literals.

    Args:
        name: of the file; its template has the suffix `.j2`.
        above: as `header` returns it.
        values: what the template names.
    """
    environment = Environment(  # noqa: S701  Python, not HTML
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["pyrepr"] = repr
    text = environment.get_template(f"{name}.j2").render(
        header=above.replace("\\", "\\\\").replace('"', '\\"'), **values
    )
    return {name: text}
