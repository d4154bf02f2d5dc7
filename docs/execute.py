"""Run a notebook without Jupyter, and write its outputs into it: `python docs/execute.py [NOTEBOOK]`.

The code cells run in one namespace, in the notebook's folder, and after them the ```python blocks of the
markdown cells: the folded answers. Outputs are what a cell prints and its last expression, as text or as an
image. --check writes nothing. A cell that raises ends the run with its traceback and exit code 1.
"""
import argparse
import ast
import base64
import io
import json
import os
import re
import sys
import traceback
from contextlib import redirect_stdout
from pathlib import Path

ANSWER = re.compile(r"(?ms)^```python\n(.*?)^```")


def run(code, name, namespace):
    """Execute code; returns what it printed, and the value of its last expression (None: there is none)."""
    body, printed = ast.parse(code), io.StringIO()
    ends_in_value = body.body and isinstance(body.body[-1], ast.Expr)
    last = ast.Expression(body.body.pop().value) if ends_in_value else None
    with redirect_stdout(printed):
        exec(compile(body, name, "exec"), namespace)
        value = None if last is None else eval(compile(last, name, "eval"), namespace)
    return printed.getvalue(), value


def outputs(printed, value, count):
    """The outputs of a code cell, as nbformat 4 has them."""
    found = []
    if printed:
        found.append({"name": "stdout", "output_type": "stream", "text": printed.splitlines(True)})
    if value is not None:
        content = {"text/plain": [repr(value)]}
        if hasattr(value, "_repr_png_"):
            png = base64.b64encode(value._repr_png_()).decode()
            content = {"image/png": png, "text/plain": ["an image"]}
        found.append({"data": content, "execution_count": count, "metadata": {},
                      "output_type": "execute_result"})
    return found


def main():
    """Run the notebook of the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).with_name("walkthrough.ipynb")
    parser.add_argument("notebook", nargs="?", type=Path, default=default)
    parser.add_argument("--check", action="store_true", help="run it, and write nothing")
    args = parser.parse_args()
    path, namespace = args.notebook.resolve(), {"__name__": "__main__"}
    notebook = json.loads(path.read_text("utf-8"))
    os.chdir(path.parent)                                # as Jupyter
    cells = [(f"cell {i}", cell, "".join(cell["source"])) for i, cell in enumerate(notebook["cells"], 1)]
    blocks = [(name, cell, source) for name, cell, source in cells if cell["cell_type"] == "code"]
    blocks += [(name, None, answer) for name, _, source in cells for answer in ANSWER.findall(source)]
    for count, (name, cell, source) in enumerate(blocks, 1):
        try:
            result = run(source, name, namespace)
        except Exception:
            traceback.print_exc()
            print(f"{path.name}: {name} raises", file=sys.stderr)
            return 1
        if cell is not None:
            cell |= {"execution_count": count, "outputs": outputs(*result, count)}
    if not args.check:
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print(f"{path.name}: {len(blocks)} blocks of code run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
