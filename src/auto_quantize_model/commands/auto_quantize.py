"""Find the layers of a vision-language model that break under INT8, step by step.

`auto-quantize COMMAND --help` lists the options of a command. Snakemake runs the commands in order.
"""

import argparse
import ast
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

# In the order of the workflow, then the commands that a person runs.
COMMANDS = (
    "get_model",
    "extract_calibration",
    "plan_quantization",
    "calibrate_scales",
    "capture_sensitivity",
    "audit_capture",
    "measure_frontier",
    "build_profiles",
    "explain_units",
    "export_profiles",
    "render_report",
    "draw_figures",
    "render_page",
    "publish_summary",
    "archive_results",
    "quantize_model",
    "measure_part",
    "join_parts",
    "join_audits",
    "measure_heldout",
    "compare_sensitivity",
    "compare_models",
    "inc_qwen2_5_vl_3b_sensitivity",
    "make_standin",
    "train_digits",
    "clean_results",
    "draw_rule_graph",
    "write_config",
)


def command(name: str) -> ModuleType:
    """The module of a command, by its name with dashes or underscores."""
    return import_module(f"auto_quantize_model.commands.{name.replace('-', '_')}")


def purpose(name: str) -> str:
    """The first line of a command's docstring, read without an import: the list of all commands is there at once."""
    text = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


def parser() -> argparse.ArgumentParser:
    names = {name.replace("_", "-"): purpose(name) for name in COMMANDS}
    width = max(map(len, names))
    told = "\n".join(f"  {name:{width}}  {line}" for name, line in names.items())
    made = argparse.ArgumentParser(
        prog="auto-quantize",
        description=__doc__,
        epilog=f"commands:\n{told}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("command", metavar="COMMAND", choices=list(names), help="one of the commands below")
    made.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="its options")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    given = parser().parse_args(argv)
    sys.argv[0] = f"auto-quantize {given.command}"  # the name that the command's own usage shows
    ended: int = command(given.command).main(given.arguments)
    return ended
