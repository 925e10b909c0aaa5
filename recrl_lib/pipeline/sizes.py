"""The size rules of the library, checked by ``make lint``: it is to stay thin."""

import ast
import sys
from pathlib import Path

from recrl_lib import paths

# Lines; tests are a share of the library, whose limit is to reach 8,500.
LIBRARY, TESTS, MODULE, FUNCTION = 10_081, 0.8, 400, 60


def faults(library: Path = paths.LIBRARY) -> list[str]:
    """A line for each rule that is broken, naming file, size and limit."""
    sizes, total = [], {"library": 0, "tests": 0}  # (what, lines, limit)
    for path in sorted(library.rglob("*.py")):
        name, text = path.relative_to(library), path.read_text(encoding="utf-8")
        kind, lines = "tests" if name.parts[0] == "tests" else "library", len(text.splitlines())
        total[kind] += lines
        sizes += [(name, lines, MODULE)] if kind == "library" else []
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                sizes.append((f"{name}: {node.name}", lines, FUNCTION))
    sizes += [("library", total["library"], LIBRARY)]
    sizes += [("tests", total["tests"], int(TESTS * total["library"]))]
    return [
        f"{what}: {lines} lines, at most {limit}" for what, lines, limit in sizes if lines > limit
    ]


if __name__ == "__main__":
    sys.exit("\n".join(faults()) or None)
