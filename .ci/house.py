"""The house rules, checked: `python .ci/house.py` prints every file's size beside design's sketch and each
breach.

    lines of at most 109 columns, functions of at most 60 lines, no six lines written twice within the
    library, imports in one direction: top level <- evals <- miniature <- eval.py, without cycles

Exit code 1 if a rule is broken. The sizes are where the weight should lie, not limits.
"""
import ast
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLUMNS, FUNCTION, REPEAT = 109, 60, 6
SKETCH = {"flow": 150, "dit": 340, "clip_decoder": 720, "model": 720, "checkpoint": 300, "data": 550,
          "train": 750, "sample": 550, "miniature.world": 500, "miniature.tasks": 250,
          "miniature.pretrain": 350, "miniature.judge": 350, "miniature.studies": 250}
TOP = ("flow", "dit", "clip_decoder", "checkpoint", "model", "data", "train", "sample")


def module_name(path):
    """miniature/world.py -> miniature.world"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def sources():
    """{module: path} of all Python files, tests included."""
    files = [*ROOT.glob("*.py"), *(ROOT / "miniature").glob("*.py"), *(ROOT / "evals").glob("*.py")]
    return {module_name(path): path for path in sorted(files) if path.name != "__init__.py"}


def is_test(module):
    """Tests may repeat themselves and import everything."""
    return module.rpartition(".")[2].startswith(("test_", "conftest"))


def wide_lines(module, text):
    """Lines over COLUMNS."""
    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > COLUMNS:
            yield f"{module}:{number} has {len(line)} columns"


def long_functions(module, tree):
    """Functions over FUNCTION lines, docstring included."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            if length > FUNCTION:
                yield f"{module}:{node.lineno} {node.name} has {length} lines"


def repeated_lines(texts):
    """Places that share REPEAT lines of code; blank lines, comments and closing brackets alone don't
    count."""
    places = defaultdict(list)
    for module, text in texts.items():
        lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
        lines = [(number, line) for number, line in lines
                 if len(line) > 3 and not line.startswith(("#", "import ", "from "))]
        for i in range(len(lines) - REPEAT + 1):
            window = tuple(line for _, line in lines[i:i + REPEAT])
            places[window].append(f"{module}:{lines[i][0]}")
    for where in places.values():
        if len(where) > 1:
            yield f"{' and '.join(where)} share {REPEAT} lines"


def imports(tree, modules, inside_functions):
    """The project's modules that a tree imports, at module level or also inside functions."""
    found = set()
    for node in ast.walk(tree) if inside_functions else tree.body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found |= {name for name in names if name in modules}
    return found


def wrong_imports(trees):
    """Imports against the direction, and cycles."""
    graph = {module: imports(tree, trees, False) for module, tree in trees.items() if not is_test(module)}
    for module, targets in graph.items():
        wings = {target.split(".")[0] for target in targets} & {"miniature", "evals", "eval"}
        if module in TOP and wings:
            yield f"{module} imports {', '.join(sorted(wings))} at module level"
    for module, tree in trees.items():
        if module.startswith("evals.") and not is_test(module):
            wrong = {name for name in imports(tree, trees, True) if name.startswith("miniature")}
            if wrong:
                yield f"{module} imports {', '.join(sorted(wrong))}"
    finished, path = set(), []

    def visit(module):
        if module in path:
            yield "cycle: " + " -> ".join(path[path.index(module):] + [module])
            return
        if module not in finished:
            path.append(module)
            for target in sorted(graph.get(module, ())):
                yield from visit(target)
            path.pop()
            finished.add(module)
    for module in graph:
        yield from visit(module)


def main():
    """Print sizes and breaches; returns the exit code."""
    paths = sources()
    texts = {module: path.read_text("utf-8") for module, path in paths.items()}
    trees = {module: ast.parse(text) for module, text in texts.items()}
    sizes = {module: len(text.splitlines()) for module, text in texts.items()}
    for module, size in sizes.items():
        sketch = f"  (sketch: {SKETCH[module]})" if module in SKETCH else ""
        print(f"{size:6}  {module}{sketch}")
    library = {module: text for module, text in texts.items() if not is_test(module)}
    of_library = sum(sizes[module] for module in library)
    print(f"{of_library:6}  library, {sum(sizes.values()) - of_library} tests")
    breaches = [breach for module, text in texts.items() for breach in wide_lines(module, text)]
    breaches += [breach for module, tree in trees.items() for breach in long_functions(module, tree)]
    breaches += [*repeated_lines(library), *wrong_imports(trees)]
    print("\n".join(breaches) or "no rule is broken")
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main())
