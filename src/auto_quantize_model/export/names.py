"""The names of modules in the files for tools. A name that would match more than its module is refused."""

import re
from collections.abc import Collection, Iterable, Sequence

import torch

from auto_quantize_model.files import InputError

Modules = dict[str, type[torch.nn.Module]]
# The prefixes of an op's own name in transformers 5, in published checkpoints and in vLLM.
PREFIXES = re.compile(r"^(model\.)?(language_model\.)?(model\.)?")


def common_name(name: str, modules: Modules, published: Collection[str]) -> str:
    """The part of a module's name that is the same in all tools, after the prefix that differs.

    transformers 5 says `model.visual.merger.mlp.0` where checkpoints and vLLM say `visual.merger.mlp.0`, and
    `model.language_model.layers.0` where they say `model.layers.0` and `language_model.model.layers.0`. In LLaVA that
    part is the end of a name of the tower too, which has `layers.0` as well. Then a longer part of the name in
    transformers 5 is taken, because the tools load the model with transformers.

    Args:
        name: of the module.
        modules: all modules of the model, by name.
        published: names of the published checkpoint's weights.

    Raises:
        InputError: another module's name contains this part too.
    """
    common = PREFIXES.sub("", name)
    weights = {weight.removesuffix(".weight") for weight in published if weight.endswith(".weight")}
    if not others_with(common, modules) - {name} and len(others_with(common, weights)) <= 1:
        return common
    for longer in (name.removeprefix("model."), name):
        if not (clash := others_with(longer, modules) - {name}):
            return longer
    raise InputError(
        f"{name}: the common part of its names, {common}, stands in {', '.join(sorted(clash)[:3])} as well; this"
        " model cannot be exported"
    )


def others_with(common: str, names: Iterable[str]) -> set[str]:
    """The names that contain a part as whole words between dots."""
    return {name for name in names if f"{common}." in f"{name}."}


def regular_expression(common: str) -> str:
    """A regular expression for a common name under any prefix, to be matched from the start."""
    return rf"(.*\.)?{re.escape(common)}$"


def regular_expressions(names: Iterable[str]) -> list[str]:
    """A regular expression for each common name."""
    return [regular_expression(name) for name in names]


def listed(names: Sequence[str]) -> str:
    """The names, or only the first of very many: a whole vision tower may be one of a kind."""
    more = len(names) - 12
    return ", ".join(names) if more <= 0 else f"{', '.join(names[:12])} and {more} more"
