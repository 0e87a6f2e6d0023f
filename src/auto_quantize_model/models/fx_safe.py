"""A model whose modules do not read the dtype of a weight, so that INC can quantize the module that holds it.

Once INC has quantized a module, its weight is not a tensor any more, and reading its dtype fails. Here all runs in
FP32, where a cast to the dtype of a weight does nothing. So leaving out the cast changes no bit.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def make_fx_safe(model: torch.nn.Module) -> list[tuple[torch.nn.Module, type[torch.nn.Module]]]:
    """Give each module that reads the dtype of a weight a class whose `forward` does not.

    Returns:
        Each changed module and its class before.
    """
    changed = []
    for module in model.modules():
        before: Any = type(module)
        if (safe := safe_class(before)) is not None:
            module.__class__ = safe
            changed.append((module, before))
    return changed


@contextmanager
def fx_safe(model: torch.nn.Module) -> Iterator[None]:
    """Make a model safe for FX, and give each module its class back at the end."""
    changed = make_fx_safe(model)
    try:
        yield
    finally:
        for module, before in changed:
            module.__class__ = before


@functools.cache
def safe_class(kind: Any) -> Any:
    """A subclass of a module's class whose `forward` has no casts to the dtype of a weight; None without such casts."""
    forward = inspect.unwrap(kind.forward)
    if not kind.__module__.startswith("transformers.models.") or getattr(forward, "__closure__", None):
        return None
    try:
        source = textwrap.dedent(inspect.getsource(forward))
    except (OSError, TypeError):  # not written in Python
        return None
    if ".weight.dtype" not in source or "torch" not in forward.__globals__:
        return None
    tree, casts = ast.parse(source), Casts()
    casts.visit(tree)
    if not casts.found:
        return None
    made: dict[str, Callable[..., Any]] = {}
    code = compile(ast.fix_missing_locations(tree), inspect.getfile(kind), "exec")
    exec(code, forward.__globals__, made)  # noqa: S102  the source is that of transformers itself
    # transformers finds what it knows of a class by the class's name, and writes that name into config.json.
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), {"forward": made["forward"], **names})


class Casts(ast.NodeTransformer):
    """Takes the dtypes of modules' weights out of a function, with the casts to them.

    The weight of the module itself stays, because INC does not quantize a module that computes with its own weight.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.found = False

    def _is_dtype(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Name):
            return node.id in self.names
        text = ast.unparse(node)
        return text.startswith("self.") and text.endswith(".weight.dtype") and text != "self.weight.dtype"

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        """Leave out the decorator that writes documentation, which reads the file of the class."""
        node.decorator_list = [one for one in node.decorator_list if "auto_docstring" not in ast.unparse(one)]
        return self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> Any:
        """Remember the name in `target_dtype = self.proj.weight.dtype`."""
        if isinstance(node.targets[0], ast.Name) and self._is_dtype(node.value):
            self.names.add(node.targets[0].id)
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> Any:
        """Put `x` in place of `x.to(target_dtype)` and `x.to(dtype=target_dtype)`."""
        given = [*node.args, *[keyword.value for keyword in node.keywords if keyword.arg == "dtype"]]
        alone = len(node.args) + len(node.keywords) == len(given) == 1
        if isinstance(node.func, ast.Attribute) and node.func.attr == "to" and alone and self._is_dtype(given[0]):
            self.found = True
            return self.visit(node.func.value)
        return self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        """Put float32 in place of a dtype that is left."""
        if self._is_dtype(node):
            self.found = True
            return ast.copy_location(ast.parse("torch.float32", mode="eval").body, node)
        return self.generic_visit(node)
