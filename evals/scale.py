"""Does the data loader carry the paper's run? 25 million samples in 25,000 shards, without their pixels.

All shards are links to one of 1,000 samples, whose images are small JPEGs with a hole behind: it is as long
as real ones, and takes 8 MB. What is timed is train.py's own path from --data to a batch, each start in a
process of its own; files are in the page cache. Writes OUT/scale.json and OUT/scale.md.
"""
import io
import json
import multiprocessing
import os
import tarfile
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

import data
from checkpoint import read_json
from evals.report import save_results, write_text
from evals.speed import write_shard
from model import BLIP3o, preset
from train import MicroBatches, batches, reading

# Sizes: 25 million images of 120 kB; --quick has the same in small.
FULL = SimpleNamespace(shards=25_000, samples=1000, image=120_000, step=100_000, batch=512, ranks=64,
                       steps=50, workers=4, reads=2000, feature=(64, 1792))
QUICK = SimpleNamespace(shards=60, samples=20, image=2000, step=200, batch=8, ranks=4, steps=5, workers=2,
                        reads=20, feature=(4, 16))
MIB, SEED = 2 ** 20, 0
# What the plan takes from elsewhere. The paper's run: train.py --paper. Failures: 419 unexpected ones in 54
# days of 16,384 GPUs (The Llama 3 Herd of Models, arXiv 2407.21783, section 3.3.4).
STEPS, BATCH = 150_000, 512
FAILURES = 419 / (54 * 16_384)          # a GPU and day
GPUS_A_NODE = 8
WRITE = 2e9                             # bytes/s of a shared file system: assumed
GPU_TABLE = Path(__file__).resolve().parent.parent / "results" / "gpu.json"


# ---- measuring --------------------------------------------------------------------------------------------

class Table:
    """All rows so far, printed as they come; `folder` holds shards, index and cache of the simulation."""

    def __init__(self, args, folder):
        self.args, self.sizes, self.folder = args, QUICK if args.quick else FULL, Path(folder)
        self.spec, self.index = f"{folder}/shards/*.tar", str(self.folder / "index")
        self.n, self.rows, self.section = self.sizes.shards * self.sizes.samples, [], ""
        self.load = os.getloadavg()[0]                               # of others: it began just now

    def row(self, check, value=None, unit="", note="", ok=None):
        """One more row: a number with its unit (None: unknown here), or a verdict."""
        self.rows.append({"section": self.section, "check": check, "value": value, "unit": unit,
                          "note": note, "ok": ok})
        print("  " + "   ".join(filter(None, self.cells(self.rows[-1]))), flush=True)

    def cells(self, row):
        """The row as words."""
        verdict = {None: "", True: "yes", False: "NO"}[row["ok"]]
        number = row["value"] if row["value"] is not None else ""
        number = f"{number:,.4g}" if isinstance(number, float) else f"{number:,}" if number else number
        return [row["check"], verdict or f"{number} {row['unit']}".strip(), row["note"]]

    def apart(self, function, *args):
        """function(*args) in a fresh process, which looks for indices where this table has them."""
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, self.index, *args).result()

    def save(self):
        """Write scale.json and scale.md."""
        lines = [f"# The data loader at {self.n:,} samples\n", "`python eval.py scale`: torch "
                 f"{torch.__version__}, {os.cpu_count()} cores with a load of {self.load:.1f}\n",
                 "| | | |", "|---|---|---|"]
        for section in dict.fromkeys(row["section"] for row in self.rows):
            lines.append(f"| **{section}** | | |")
            lines += [f"| {' | '.join(self.cells(row))} |" for row in self.rows if row["section"] == section]
        write_text(Path(self.args.out) / "scale.md", "\n".join(lines) + "\n")
        save_results(self.args, {"samples": self.n, "load": self.load, "rows": self.rows})


def memory():
    """MiB that this process alone has (dirty pages); None where the system doesn't say."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1024


def peak():
    """The most MiB that this process has had in memory; None where the system doesn't say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


class Timer:
    """Within: seconds of the clock as `wall`, of this process on a core as `cpu`."""

    def __enter__(self):
        self.began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_):
        now = time.perf_counter(), time.process_time()
        self.wall, self.cpu = (b - a for a, b in zip(self.began, now))


# ---- the shards, and their index --------------------------------------------------------------------------

def write_sparse_shard(path, samples, size):
    """A tar of so many captioned images of `size` bytes each: a JPEG of 64 px, then a hole."""
    jpeg = io.BytesIO()
    noise = np.random.default_rng(SEED).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(jpeg, "JPEG", quality=50)
    with open(path, "wb") as file:
        at = 0
        for i in range(samples):
            for suffix, content in ("jpg", jpeg.getvalue()), ("txt", b"caption %d" % i):
                member = tarfile.TarInfo(f"{i:09d}.{suffix}")
                member.size = max(size, len(content)) if suffix == "jpg" else len(content)
                file.seek(at)
                file.write(member.tobuf() + content)
                at += 512 + -(-member.size // 512) * 512
        file.truncate(at + 1024)


def build_index(folder, spec, shard):
    """Index all shards of a spec as if each had been scanned: (seconds, peak MiB)."""
    data.INDEX_FOLDER = Path(folder)
    rows, left_out = data.scan_shard(Path(shard))
    data.scan_shards = lambda paths: [(rows.copy(), left_out) for _ in paths]
    with Timer() as timer:
        data.open_source(spec)
    return timer.wall, peak()


def index(table):
    """Shards on disk, and what scanning them costs."""
    s, shards = table.sizes, table.folder / "shards"
    shards.mkdir()
    shard = table.folder / "shard"
    write_sparse_shard(shard, s.samples, s.image)
    for i in range(s.shards):
        (shards / f"{i:05d}.tar").hardlink_to(shard)
    table.row("samples", table.n, note=f"{s.shards:,} shards of {s.samples:,}; they would take "
              f"{shard.stat().st_size * s.shards / 1e12:.2g} TB")
    data.scan_shard(shard)
    rounds = min(10, s.shards)
    with Timer() as timer:
        for _ in range(rounds):
            data.scan_shard(shard)
    each = timer.cpu / rounds
    table.row("scanning a shard", each * 1000, "ms of a core", f"mean of {rounds}, headers in memory")
    table.row("first start, without an index: scanning all", each * s.shards / 60, "core-minutes",
              f"by the line above; up to 16 processes divide them: {each * s.shards / 60 / 16:.2g} minutes")
    wall, most = table.apart(build_index, table.spec, str(shard))
    table.row("first start: all but the scanning", wall, "s", "lists paths, joins and writes the index")
    table.row("peak memory of the process that does it", most, "MiB", "Python and torch included")
    size = sum(file.stat().st_size for file in Path(table.index).glob("*.safetensors"))
    table.row("the index", size / MIB, "MiB", "a file that all processes of a machine map")


# ---- how a run begins -------------------------------------------------------------------------------------

def worker_state(examples):
    """In place of a stage's collate: what the worker that made a batch has in memory."""
    return {"pid": os.getpid(), "memory": memory(), "images": sum(e.image is not None for e in examples)}


def begin(folder, spec, step, sizes):
    """What train.py does up to its first batch at a step, as the last of its ranks."""
    warnings.simplefilter("ignore")                                  # torch's, of more workers than cores
    multiprocessing.set_start_method(None, force=True)               # workers start as those of train.py
    data.INDEX_FOLDER, alone = Path(folder), memory()
    began = time.perf_counter()
    with Timer() as opening:
        source, _ = (data.open_source(spec) for _ in range(2))       # as train.open_samples
    args = SimpleNamespace(batch=sizes.batch, accumulate=1, steps=step + 2 * sizes.workers,
                           workers=sizes.workers)
    stage, samples = SimpleNamespace(collate=worker_state), data.Samples(source, data.CaptionTask(), SEED)
    loader = batches(samples, stage, step, args, torch.device("cpu"))
    loader.dataset.ranks = sizes.batch // min(16, sizes.batch // 2)
    loader.dataset.rank = loader.dataset.ranks - 1
    with reading(loader) as iterator:
        made = [next(iterator)]
        first = time.perf_counter() - began
        made += iterator
    workers = {batch["pid"]: batch["memory"] for batch in made}
    return {"opened": opening.wall, "cpu": opening.cpu, "first": first, "images": made[0]["images"],
            "workers": list(workers.values()), "rank": None if alone is None else memory() - alone}


def start(table):
    """From the command line to the first batch, at the first step and at a later one."""
    s = table.sizes
    for name, step in ("a start", 0), (f"a restart at step {s.step:,}", s.step):
        found = table.apart(begin, table.spec, step, s)
        table.row(f"{name}: --data is open", found["opened"], "s",
                  f"twice, for training and for probes; {found['cpu']:.2g} s of a core")
        table.row(f"{name}: the first batch", found["first"], "s",
                  f"{found['images']} images, by one of {s.workers} workers; all make the epoch's order")
    if found["rank"] is not None:
        table.row("memory of a rank", found["rank"], "MiB", "its own, beside Python and torch")
        table.row("memory of a loader's worker", max(found["workers"]), "MiB", "its own: the epoch's order")


# ---- the order of samples ---------------------------------------------------------------------------------

class Numbered:
    """Samples that are only their item's number."""

    def __init__(self, source):
        self.source = source

    def __getitem__(self, position):
        return SimpleNamespace(item=self.source.index(position, 0, SEED), skipped=[])


def items_of(examples):
    """In place of a stage's collate: the numbers of Numbered's items."""
    return {"items": [example.item for example in examples]}


def ranks_agree(source, ranks, steps, batch):
    """Do so many ranks meet, in each of these steps, what one rank meets, by position, and nothing twice in
    an epoch?"""
    def items(rank, ranks):
        part = MicroBatches(Numbered(source), items_of, batch)
        part.rank, part.ranks = rank, ranks
        return [part[step * batch]["items"] for step in steps]
    alone, parts = sum(items(0, 1), []), [items(rank, ranks) for rank in range(ranks)]
    joined = [parts[p % ranks][i][p // ranks] for i in range(len(steps)) for p in range(batch)]
    end = -steps[0] * batch % (source.parts[0].length - len(source.parts[0].held_out))   # of an epoch
    return joined == alone and all(len(set(epoch)) == len(epoch) for epoch in (joined[:end], joined[end:]))


def epoch_is_whole(source, n, epoch):
    """(does an epoch hold each of n items once but for those held out; is its order that of numpy's
    permutation?), by its whole order at once; a few places of it by Shards.index, too."""
    part = source.parts[0]
    length = part.length - len(part.held_out)
    source.index(epoch * length, 0, SEED)
    order = source.orders[0][1]
    items = order + np.searchsorted(part.held_out - np.arange(len(part.held_out)), order, "right")
    places = np.random.default_rng(SEED).integers(0, length, 1000)
    alike = all(source.index(epoch * length + int(k), 0, SEED) == items[k] for k in places)
    counts = np.ones(n, int)
    counts[source.held_out] = 0
    whole = alike and np.array_equal(np.bincount(items, minlength=n), counts)
    return bool(whole), bool((order == np.random.default_rng((SEED, epoch, 0)).permutation(length)).all())


def order(table):
    """What 64 ranks meet, beside what one does."""
    s = table.sizes
    data.INDEX_FOLDER = Path(table.index)
    source = data.open_source(table.spec)
    before = memory()
    with Timer() as timer:
        source.index(0, 0, SEED)
    length = table.n - len(source.held_out)
    table.row("an epoch's permutation", timer.cpu, "s of a core", f"of {length:,} samples")
    if before is not None:
        table.row("memory of it", memory() - before, "MiB")
    with Timer() as timer:
        for p in range(10_000):
            source.index(p, 0, SEED)
    table.row("from a position to an item", timer.cpu * 100, "us of a core", "mean of 10,000")
    batch = s.ranks * min(16, s.batch // 2)
    epochs = (0, s.step * s.batch // length)
    # Around an epoch's end each rank makes two orders: a few ranks will do.
    for name, step, ranks in (("first steps", 0, s.ranks), (f"steps from {s.step:,} on", s.step, s.ranks),
                              ("steps around an epoch's end", length // batch - s.steps // 2, 2)):
        ok = ranks_agree(source, ranks, range(step, step + s.steps), batch)
        table.row(f"{ranks} ranks, {name}: disjoint, by position what one rank meets",
                  note=f"{s.steps} steps of {batch}", ok=ok)
    for epoch in epochs:
        whole, alike = epoch_is_whole(source, table.n, epoch)
        table.row(f"epoch {epoch}: each sample once, none that is held out", note=f"{length:,}", ok=whole)
        table.row(f"epoch {epoch}: the order is that of numpy's permutation", ok=alike)


# ---- the cache of features --------------------------------------------------------------------------------

def write_sparse_features(path, shape):
    """A cache file of bf16 features of this shape, all zero and a hole."""
    size = 2 * int(np.prod(shape))
    header = {"__metadata__": {"bad": "{}"},
              "features": {"dtype": "BF16", "shape": list(shape), "data_offsets": [0, size]}}
    head = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + size)


def read_cache(_, folder, n, reads):
    """What a start and random reads of a FeatureCache of n items cost a process."""
    cache, before = data.FeatureCache(Path(folder).parent, Path(folder).name), memory()
    with Timer() as checked:
        cache.fill(range(n), None, 1, quiet=True)                    # finds all files whole, encodes nothing
    items = np.random.default_rng(SEED).integers(0, n, reads).tolist()
    with Timer() as read:
        for i in items:
            cache[i]
    has_proc = Path("/proc/self/fd").exists()
    return {"checked": checked.wall, "read": read.wall / reads, "files": len(cache.opened),
            "memory": None if before is None else memory() - before,
            "handles": len(os.listdir("/proc/self/fd")) if has_proc else None}


def cache(table):
    """The features of all images on disk."""
    s, folder, per = table.sizes, table.folder / "cache", data.FeatureCache.items_per_file
    folder.mkdir()
    write_sparse_features(table.folder / "features", (per, *s.feature))
    files = -(-table.n // per)
    for i in range(files):
        (folder / f"{i:06d}.safetensors").symlink_to(table.folder / "features")
    last = folder / f"{files - 1:06d}.safetensors"
    last.unlink()
    write_sparse_features(last, (table.n - (files - 1) * per, *s.feature))
    sample = 2 * int(np.prod(s.feature))
    table.row("features of all images, bf16", sample * table.n / 1e12, "TB",
              f"{table.n:,} x {' x '.join(map(str, s.feature))} x 2 bytes in {files:,} files")
    found = table.apart(read_cache, str(folder), table.n, s.reads)
    table.row("a start: each file's header", found["checked"], "s", "by one process; ranks divide the files")
    table.row("reading one sample's features", found["read"] * 1000, "ms",
              f"{sample / 1000:.0f} kB, mean of {s.reads:,} at random, with each file's first opening")
    if found["handles"] is not None:
        table.row("open files after that", found["handles"], note=f"{found['files']:,} of the cache in use")
        table.row("memory of that", found["memory"], "MiB", "of each worker of a loader")


# ---- the plan ---------------------------------------------------------------------------------------------

def measured(rows, check):
    """The value of a row of results/gpu.json."""
    return next(row["value"] for row in rows if row["check"] == check)


def plan(table):
    """The paper's run on 32 and on 256 GPUs, from what was measured on one."""
    rows = read_json(GPU_TABLE)["rows"]
    with torch.device("meta"):
        model = BLIP3o(preset("4b"))
    trained = model.latent_queries.numel() + sum(p.numel() for p in model.dit.parameters())
    encoder, samples = measured(rows, "EVA-CLIP features, bf16, batch 8"), STEPS * BATCH
    cached_sample = 2 * FULL.feature[0] * FULL.feature[1]
    n, some = FULL.shards * FULL.samples, 16
    write_shard(table.folder / "jpeg.tar", some, (480, 640))
    jpeg = (table.folder / "jpeg.tar").stat().st_size / some
    table.row("JPEGs of 640 x 480", jpeg * n / 1e12, "TB", f"{jpeg / 1000:.0f} kB each: quality 90, "
              f"grain as in eval.py speed; as features {cached_sample / 1000:.0f} kB each")
    table.row("samples of the run", samples / 1e6, "million", f"{STEPS:,} steps of {BATCH}: "
              f"{samples / n:.2f} epochs of {n / 1e6:.0f} million")
    table.row("the encoder's features of one epoch", n / encoder / 3600, "GPU-hours",
              f"at {encoder:.1f} images/s: what filling the cache costs, and each epoch without it")
    table.row("a checkpoint of the run", 16 * trained / 1e9, "GB",
              f"{trained / 1e6:.0f} M weights, their averages and two moments in fp32; two are kept")
    for gpus, batch in (32, 16), (256, 32):
        each = measured(rows, f"stage 1 of the 4B, eager, batch {batch}")
        step, live, name = batch / each, batch / each + batch / encoder, f"{gpus} GPUs, {batch} images each"
        days = [samples / (gpus * batch) * seconds / 86400 for seconds in (step, live)]
        table.row(f"{name}: days with the cache", days[0], note=f"{samples / (gpus * batch):,.0f} steps of "
                  f"{gpus * batch} at {step:.3f} s; and {n / encoder / gpus / 3600:.2g} hours to fill it")
        table.row(f"{name}: days without", days[1], note=f"{live:.3f} s a step")
        table.row(f"{name}: reading the cache", gpus * batch / step * cached_sample / 1e9, "GB/s",
                  f"all GPUs; {GPUS_A_NODE * batch / step * cached_sample / 1e9:.2g} GB/s a node")
        table.row(f"{name}: images to decode without it", GPUS_A_NODE * batch / live, "images/s a node")
        gradient = 2 * 4 * trained * (gpus - 1) / gpus
        table.row(f"{name}: gradients", gradient / 1e9, "GB a step and GPU",
                  f"fp32, by a ring: {8 * gradient / step / 1e9:.0f} Gbit/s between nodes take a whole step")
        failures, save = FAILURES * gpus, 16 * trained / WRITE
        best = (2 * save * 86400 / failures) ** 0.5                  # Young 1974
        table.row(f"{name}: failures", failures, "a day", f"one in {1 / failures:.0f} days")
        table.row(f"{name}: best time between checkpoints", best / 3600, "h",
                  f"{best / step:,.0f} steps; one takes {save:.0f} s at {WRITE / 1e9:.0f} GB/s")


SECTIONS = {"index": index, "start": start, "order": order, "cache": cache, "plan": plan}


def scale(args):
    """Simulate 25 million samples in 25,000 shards: seconds to the first batch, memory, the order of samples
    on 64 ranks, the cache; and plan the paper's run from that and results/gpu.json. About three minutes and
    1.5 GB of disk. Exit code 1 if an order is wrong.

    --quick: 1,200 samples.
    """
    before = data.INDEX_FOLDER
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        table = Table(args, Path(folder).resolve())
        try:
            for table.section, measure in SECTIONS.items():
                print(table.section, flush=True)
                measure(table)
        finally:
            data.INDEX_FOLDER = before
    table.save()
    return int(any(row["ok"] is False for row in table.rows))
