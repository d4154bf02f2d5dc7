"""The table of a speedrun: `python -m miniature.speedrun OUT` prints, as Markdown, what
miniature/speedrun.sh has got in OUT so far, and writes it to OUT/table.md.

A stage's folder OUT/STAGE is a run of train.py, an evaluation's OUT/eval/NAME has its results; each start of
them leaves a file clock-TIME: on how many cores, or "gpu", and seconds.
"""
import os
import platform
import re
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import torch

from checkpoint import Parser, from_json, read_file, read_json, run_command
from evals.report import format_cell, write_text
from miniature.studies import read_log
from train import RunState, states

RUNS = ("clip", "vae", "captions", "0", "decoder", "1", "2")     # folders in OUT, in order
NO_LOSSES = {"step", "samples", "per_s", "wait", "lr", "grad", "skipped"}         # of a line of log.jsonl


def machine():
    """In words: the GPU, if any, the processor, its cores, whether it has products in bf16, versions."""
    cpu, info = platform.processor() or platform.machine(), ""
    if os.path.exists("/proc/cpuinfo"):
        info = read_file("/proc/cpuinfo").decode("utf-8", "replace")
    name = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    bf16 = re.search(r"avx512_bf16|amx_bf16", info)
    bf16 = bf16[0] if bf16 else "no bf16"
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return (f"{gpu}{name[1].strip() if name else cpu}, {os.cpu_count()} cores, {bf16}, "
            f"torch {torch.__version__}, Python {platform.python_version()}")


def clock(folder):
    """{"1", "2" or "gpu": minutes} of all starts of what has this folder: on one core, both, a GPU. A start
    whose file a crash left empty is lost."""
    minutes = Counter()
    for file in folder.glob("clock-*"):
        if words := re.fullmatch(r"([12]|gpu) ([0-9]{1,9})\n", read_file(file).decode("ascii", "replace")):
            minutes[words[1]] += int(words[2]) / 60
    return minutes


def total(folders):
    """In words: the minutes of two cores, and of a GPU, that folders took together."""
    minutes = sum(map(clock, folders), Counter())
    gpu = f" and {minutes['gpu']:.1f} of a GPU" if minutes["gpu"] else ""
    return f"{minutes['1'] / 2 + minutes['2']:.1f} minutes of two cores{gpu}"


def outcome(rows):
    """What a log (rows: those of studies.read_log) ends at: its last probe, without those of other prompts
    and of none; the last losses where a stage has no probe."""
    probes = [row for row in rows if any(name.startswith("_") for name in row)]
    last = (probes or rows or [{}])[-1]
    numbers = {name.lstrip("_"): value for name, value in last.items() if isinstance(value, int | float)
               and (name[0] == "_" if probes else name not in NO_LOSSES)
               and not name.startswith(("_shuffled", "_null", "flow, t"))}
    return ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())


def stage_row(run):
    """A stage's cells: images; minutes on one core, on both, on a GPU; how it was computed at last; what it
    ends at."""
    rows = list(read_log(run).values())
    images = max((row["samples"] for row in rows if "samples" in row), default=0)
    minutes, how = clock(run), ""
    for folder in states(run)[-1:]:
        flags = from_json(RunState, read_json(folder / "state.json"), folder / "state.json").args
        how = ("bf16" if flags.get("bf16") else "fp32") + " and compile" * bool(flags.get("compile"))
        how += " on a GPU" * (flags.get("device", "cpu") != "cpu")
    return [f"{images:,}", *(f"{minutes[place]:.1f}" for place in ("1", "2", "gpu")), how, outcome(rows)]


def rates(content, path=()):
    """Yield (path, row) of every rate, {"score": ..., "low": ..., "high": ...}, in results of eval.py."""
    for name, value in content.items():
        if isinstance(value, dict) and {"score", "low", "high"} <= value.keys():
            yield (*path, name), value
        elif isinstance(value, dict):
            yield from rates(value, (*path, name))


def in_words(name, row):
    """A rate with its name, its interval and, where there is one, its PSNR."""
    cells = [format_cell(key, row[key], row).strip() for key in ("dB", "score") if key in row]
    return " ".join([name, *cells])


def scores(content):
    """Results of eval.py in one cell: all rates of the first table, of later ones "overall", if they have
    it."""
    tables = {}
    for path, row in rates(content):
        tables.setdefault(path[:-1], {})[path[-1]] = row
    cells = []
    for path, table in tables.items():
        shown, title = table, ""
        if cells:
            title = f"{', '.join(path)}: "
            shown = {"overall": table["overall"]} if "overall" in table else table
        cells.append(title + ", ".join(in_words(name, row) for name, row in shown.items()))
    return "; ".join(cells)


def table(out):
    """The text of the table of a speedrun's folder `out`. ValueError for a file in it that is broken."""
    runs, evaluations = [out / name for name in RUNS], sorted(out.glob("eval/*/"))
    lines = ["| stage | images | minutes, one core | both cores | GPU | computed in | ends at |",
             "|---|---|---|---|---|---|---|"]
    lines += [f"| {run.name} | {' | '.join(stage_row(run))} |" for run in runs]
    lines += ["", f"Training: {total(runs)}; with evaluations: {total(runs + evaluations)}. "
              f"On: {'; '.join(machines(out)) or 'not recorded'}."]
    lines += ["", "| evaluation | minutes | scores |", "|---|---|---|"]
    for folder in evaluations:
        results = [scores(read_json(file)) for file in sorted(folder.glob("*.json"))]
        lines.append(f"| {folder.name} | {clock(folder).total():.1f} | {' '.join(results)} |")
    return "\n".join(lines) + "\n"


def machines(out):
    """The machines that a speedrun has run on, from OUT/machines.txt."""
    file = out / "machines.txt"
    return read_file(file).decode("utf-8", "replace").splitlines() if file.exists() else []


def run(argv):
    """Print the table and write it; ValueError for a folder that isn't there."""
    parser = Parser("speedrun.py", description=__doc__.partition("\n\n")[0])
    parser.add_argument("out", type=Path, help="folder of miniature/speedrun.sh")
    parser.add_argument("--here", action="store_true", help="note that it runs on this machine")
    args = parser.parse_args(argv)
    out = args.out
    if not out.is_dir():
        raise ValueError(f"there is no folder {out}")
    if args.here and machine() not in machines(out):
        write_text(out / "machines.txt", "\n".join([*machines(out), machine()]) + "\n")
    text = table(out)
    write_text(out / "table.md", text)
    print(text)


def main(argv=None):
    """Returns the exit code: 2, and one sentence, for what can't be read."""
    return run_command("speedrun.py", partial(run, argv))


if __name__ == "__main__":
    sys.exit(main())
