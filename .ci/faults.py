"""Is the test suite as strong as it says? Plant one-line faults in a copy of the repository, one at a time.

    python .ci/faults.py [--jobs 2] [--only TEXT] [--slow]

Each fault is a sign, an index, a dropped call, a wrong axis or a default that somebody might get wrong. A
fault is noticed if some test fails; the fast tests are tried first, with --slow the others, too. Prints a
line for each fault and exits with 1 if one goes unnoticed. Not part of CI: it takes most of an hour on
two cores.
"""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# (file, the line's text, the fault); the text must occur exactly once in the file.
FAULTS = [
    ("flow.py", "return t / (t + shift * (1 - t))", "return t / (t + (1 - t) / shift)"),
    ("flow.py", "return t * x1 + (1 - t) * x0", "return t * x0 + (1 - t) * x1"),
    ("flow.py", "(predicted.float() - (x1 - x0))", "(predicted.float() - (x0 - x1))"),
    ("flow.py", "return v_null + scale * (v_cond - v_null)", "return v_cond + scale * (v_cond - v_null)"),
    ("flow.py", "prepare(torch.cat([null, cond]))", "prepare(torch.cat([cond, null]))"),
    ("flow.py", "low <= float(t[0]) <= high", "low < float(t[0]) <= high"),
    ("flow.py", "dt, slope = times[i + 1] - times[i], v", "dt, slope = 1 / steps, v"),
    ("flow.py", "slope = v + dt / (times[i] - times[i - 1]) / 2 * (v - last)", "slope = v + (v - last) / 2"),
    ("flow.py", "kept = ~dropped.to(", "kept = dropped.to("),
    ("flow.py", "(torch.rand, (n,), generator, device) < p", "(torch.rand, (n,), generator, device) > p"),
    ("dit.py", "return torch.stack([a * cos - b * sin, a * sin + b * cos]",
     "return torch.stack([a * cos + b * sin, a * sin - b * cos]"),
    ("dit.py", "return cells // width, cells % width", "return cells // height, cells % height"),
    ("dit.py", "side = head_dim // 6 * 2", "side = head_dim // 3"),
    ("dit.py", "torch.floor(1000 * (1 - t.float()) + 1e-3)", "torch.floor(1000 * (1 - t.float()))"),
    ("dit.py", "return -out.to(x.dtype)", "return out.to(x.dtype)"),
    ("dit.py", "return torch.cat([angles.cos(), angles.sin()], dim=-1)",
     "return torch.cat([angles.sin(), angles.cos()], dim=-1)"),
    ("dit.py", "h = h + gate_msa * self.norm2(o)", "h = h + self.norm2(o)"),
    ("dit.py", "self.feed_forward(self.ffn_norm1(h) * scale_mlp)", "self.feed_forward(self.ffn_norm1(h))"),
    ("dit.py", "self.attn2.query(x[len(uniform):], rope)",
     "self.attn2.query(x[:len(x) - len(uniform)], rope)"),
    ("dit.py", "o = o + self.gate.tanh()", "o = o + self.gate"),
    ("clip_decoder.py", 'x = x + self.norm1(self.attn["proj"](y))',
     'x = self.norm1(x + self.attn["proj"](y))'),
    ("clip_decoder.py", "return tokens.view(B, out, k, out, k, C).mean(dim=(2, 4))",
     "return tokens.view(B, k, out, k, out, C).mean(dim=(1, 3))"),
    ("clip_decoder.py", "torch.cat([q, torch.zeros_like(q), v])", "torch.cat([q, v, torch.zeros_like(q)])"),
    ("clip_decoder.py", "F.pad(x, (0, 1, 0, 1))", "F.pad(x, (1, 0, 1, 0))"),
    ("clip_decoder.py", "return x + down(value * F.gelu(gate))", "return x + down(F.gelu(value) * gate)"),
    ("clip_decoder.py", "eps = eps_uncond + guidance * (eps - eps_uncond)",
     "eps = eps + guidance * (eps - eps_uncond)"),
    ("clip_decoder.py", "x + (sigma_next - sigma) * eps", "x = x - (sigma_next - sigma) * eps"),
    ("clip_decoder.py", "math.log(sigmas[i - 1] / sigma) / 2", "math.log(sigmas[i - 1] / sigma)"),
    ("clip_decoder.py", "division = steps + (sampler", "division = steps + 0 * (sampler"),
    ("clip_decoder.py", "(levels[i] ** (1 / 7) for i in (0, -1))", "(levels[i] ** (1 / 7) for i in (1, -1))"),
    ("clip_decoder.py", "mean * self.config.scaling_factor", "mean / self.config.scaling_factor"),
    ("checkpoint.py", "os.fsync(f.fileno())", "pass"),
    ("checkpoint.py", "elif shape != expected[name]:", "elif False:"),
    ("checkpoint.py", "temporary.unlink(missing_ok=True)", "pass"),
    ("checkpoint.py", "if key in stored:", "if False:"),
    ("model.py", "i in config.fullatt_block_indexes", "i not in config.fullatt_block_indexes"),
    ("model.py", "return positions, step.sum(1) - mask.sum(1)",
     "return positions, mask.sum(1) - step.sum(1)"),
    ("model.py", "positions[2, spots] += index % w[image]", "positions[2, spots] += index // w[image]"),
    ("model.py", "visible = (j <= i)[None, None]", "visible = (j < i + 2)[None, None]"),
    ("model.py", "torch.where(scores < 0, scores * penalty, scores / penalty)",
     "torch.where(scores > 0, scores * penalty, scores / penalty)"),
    ("model.py", "probs[probs.cumsum(-1) - probs > top_p] = 0", "probs[probs.cumsum(-1) > top_p] = 0"),
    ("model.py", "F.pad(labels[:, 1:], (0, 1), value=-100)", "F.pad(labels[:, 1:], (1, 0), value=-100)"),
    ("data.py", "held_out_items(n):",
     "held_out_items(n, _=None):\n    return np.zeros(0, int)\n\n\ndef _unused(n):"),
    ("data.py", 'return self.first + k + int(np.searchsorted(before, k, "right"))',
     'return self.first + k + int(np.searchsorted(before, k, "left"))'),
    ("data.py", "k = position * share.numerator // share.denominator",
     "k = int(position * float(share) + 0.5)"),
    ("data.py", "np.random.default_rng((seed, epoch, number)).shuffle(order)",
     "np.random.default_rng((seed, number)).shuffle(order)"),
    ("data.py", "rng = np.random.default_rng((self.seed, position, 1))",
     "rng = np.random.default_rng((self.seed, 1))"),
    ("data.py", "ImageOps.exif_transpose(image, in_place=True)", "pass"),
    ("data.py", "self.bpe.encode_special_tokens = True", "pass"),
    ("data.py", "x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)", "x = x.permute(0, 2, 5, 3, 6, 1, 7, 4)"),
    ("data.py", "targets += [True] * (len(ids) - len(targets))",
     "targets += [False] * (len(ids) - len(targets))"),
    ("data.py", "left, top = (w - size) // 2, (h - size) // 2", "left, top = 0, 0"),
    ("data.py", 'return {**self.__dict__, "opened": {}}', "return self.__dict__"),
    ("train.py", "ema.update()", "pass"),
    ("train.py", "norm = nn.utils.clip_grad_norm_(list(ema.params.values()), args.clip)",
     "norm = nn.utils.get_total_norm([p.grad for p in ema.params.values() if p.grad is not None])"),
    ("train.py", "found_inf = local_optimizer(optimizer).found_inf = (~norm.isfinite()).float()",
     "found_inf = (~norm.isfinite()).float()"),
    ("train.py", "nullcontext() if last or not dist.is_initialized()", "nullcontext() if True"),
    ("train.py", '(sum(value for name, value in losses.items() if name[0] != "_") / args.accumulate)',
     '(sum(value for name, value in losses.items() if name[0] != "_"))'),
    ("train.py", "optimizer.zero_grad(set_to_none=True)", "pass"),
    ("train.py", "return last + (args.lr - last) * (1 + math.cos(math.pi * min(1, progress))) / 2",
     "return last + (args.lr - last) * (1 + math.cos(math.pi * min(1, progress)))"),
    ("train.py", "torch._foreach_lerp_(momenta, grads, 0.05)", "torch._foreach_lerp_(momenta, grads, 0.5)"),
    ("train.py", "count /= dist.get_world_size()", "pass"),
    ("train.py", "if any(gather_objects(problem is not None)):", "if problem is not None and False:"),
    ("train.py", "if int(folder.name[5:]) < step][:-1]", "if int(folder.name[5:]) < step]"),
    ("checkpoint.py", "if not stat.S_ISREG(mode):", "if False:"),
    ("checkpoint.py", "parse_constant=refuse, ", ""),
    ("checkpoint.py", "        if interval is not None and value not in interval:", "        if False:"),
    ("data.py", "if not 0 <= size <= (", "if size > ("),
    ("data.py", "formats=FORMATS", "formats=None"),
    ("data.py", "self.bpe.no_truncation()", "pass"),
    ("train.py", "ema.average[n].copy_(average[n])", "ema.average[n].copy_(model[n])"),
    ("train.py", 'return {"x0": x0, "t": flow.shift_time(t, self.shift), "dropped": dropped}',
     'return {"x0": x0, "t": t, "dropped": dropped}'),
    ("train.py", "held_out=True)", "held_out=False)"),
    ("sample.py", "FEATURES, DECODER, NEGATIVE, TEXT = 0, 1, 2, 3",
     "FEATURES, DECODER, NEGATIVE, TEXT = 0, 0, 2, 3"),
    ("sample.py", "logits[:, yes].logsumexp(1) - logits[:, no].logsumexp(1)",
     "logits[:, no].logsumexp(1) - logits[:, yes].logsumexp(1)"),
    ("sample.py", "longest = max(map(len, rows)) + more", "longest = max(map(len, rows))"),
    ("miniature/world.py", "dx + (obj.y - other.y) * dy > 0.12", "dx + (obj.y - other.y) * dy > -0.12"),
    ("miniature/world.py", "(reversed(phrases) if starts_with_second else phrases)", "phrases"),
    ("miniature/world.py", '"yes" if asked == truth else "no"', '"yes" if asked != truth else "no"'),
    ("miniature/tasks.py", "kind, shown = rng.random(), None", "kind = rng.random()"),
]


def copy_repository(target):
    """What the tests need, without runs and history."""
    ignore = shutil.ignore_patterns("runs", ".git", "__pycache__", ".venv", "*.pyc", ".pytest_cache")
    shutil.copytree(ROOT, target, ignore=ignore)
    return target


def tests_of(folder, file):
    """The tests in the section of test_all.py that is about this file: they are tried first."""
    section, names = "", []
    for line in (folder / "test_all.py").read_text("utf-8").splitlines():
        if line.startswith("# ==== "):
            section = line
        if line.startswith("def test_") and Path(file).stem in section:
            names.append("test_all.py::" + line[4:line.index("(")])
    return names


def noticed(folder, file, slow):
    """Does some test fail in this copy? The name of the first that does, or None."""
    runs = [["-m", "not slow", *tests_of(folder, file)], ["-m", "not slow"], *[["-m", "slow"]] * slow]
    for selection in runs:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *selection]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})
        if run.returncode:
            failed = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
            return failed[0] if failed else run.stdout[-300:]
    return None


def try_fault(fault, slow):
    """Plant one fault in a fresh copy: (fault, what noticed it or None)."""
    file, before, after = fault
    with tempfile.TemporaryDirectory() as temporary:
        folder = copy_repository(Path(temporary) / "copy")
        text = (folder / file).read_text("utf-8")
        if text.count(before) != 1:
            return fault, f"MISPLACED: the text occurs {text.count(before)} times"
        (folder / file).write_text(text.replace(before, after), "utf-8")
        return fault, noticed(folder, file, slow)


def main():
    """Try all faults; returns the exit code."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", default="", help="faults whose file or text contains this")
    parser.add_argument("--slow", action="store_true", help="try the slow tests, too")
    args = parser.parse_args()
    chosen = [fault for fault in FAULTS if any(args.only in part for part in fault)]
    missed = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for (file, before, _), by in pool.map(lambda fault: try_fault(fault, args.slow), chosen):
            missed += by is None or by.startswith("MISPLACED")
            print(f"{file}: {before}\n    {by or 'UNNOTICED'}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults noticed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
