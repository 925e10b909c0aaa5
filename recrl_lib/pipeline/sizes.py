"""The size rules of the library, checked by ``make lint``: it is to stay thin."""

import ast
import sys
from pathlib import Path

from recrl_lib import paths

LIBRARY, TESTS, MODULE, FUNCTION = 8500, 0.8, 400, 60  # lines; tests are a share of the library


def faults(library: Path = paths.LIBRARY) -> list[str]:
    """A line for each rule that is broken, naming file, size and limit."""
    found = []
    total = {"library": 0, "tests": 0}
    for path in sorted(library.rglob("*.py")):
        name, text = path.relative_to(library), path.read_text(encoding="utf-8")
        kind = "tests" if name.parts[0] == "tests" else "library"
        lines = len(text.splitlines())
        total[kind] += lines
        if kind == "library" and lines > MODULE:
            found.append(f"{name}: {lines} lines, at most {MODULE}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > FUNCTION:
                    found.append(f"{name}: {node.name} has {lines} lines, at most {FUNCTION}")
    limits = {"library": LIBRARY, "tests": int(TESTS * total["library"])}
    found += [
        f"{kind}: {total[kind]} lines, at most {limit}"
        for kind, limit in limits.items()
        if total[kind] > limit
    ]
    return found


if __name__ == "__main__":
    sys.exit("\n".join(faults()) or None)
