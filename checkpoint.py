"""Files from outside and model folders: how they are opened, checked, loaded and written.

    config.json                       settings; model.py, clip_decoder.py and sample.py each read their own
    model.safetensors                 or shards and model.safetensors.index.json; official key names
    gen_vision_tower/                 EVA-CLIP, unless it is in the model's shards
    diffusion-decoder/unet|vae/       diffusers' layout, with its .bf16 and .fp16 variants

Loading is strict and cheap: read_headers -> compare all names and shapes with the module -> map and assign.
No tensor is read before all names and shapes match, and memory never holds one twice. On the device "meta" a
module remembers its `sources`, and `fill` reads any of them later. Writing is atomic: after a crash a file
is complete or absent.

Whatever a person brings, a flag, a JSON file or a folder, is checked here by one function of its kind; a
mistake is a ValueError of one sentence, which `run_command` prints.
"""
import argparse
import ctypes
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import stat
import sys
import typing
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


# ---- command lines ----------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse, but mistakes are ValueErrors like all others here, and no flag may be abbreviated."""

    def __init__(self, *args, **options):
        super().__init__(*args, allow_abbrev=False, **options)

    def error(self, message):
        raise ValueError(message)

    def parse_known_args(self, args=None, namespace=None):
        found, rest = super().parse_known_args(args, namespace)
        for action in self._actions:                                 # argparse takes --flag=-- for no value
            if action.nargs is None and getattr(found, action.dest, None) == []:
                self.error(f"argument {'/'.join(action.option_strings)}: it is empty")
        return found, rest


class Interval(NamedTuple):
    """Numbers from `least` to `most`; above, below: the same without the bound itself."""
    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, value):
        return self.least <= value <= self.most and self.above < value < self.below

    def __str__(self):
        bounds = (("at least", self.least), ("above", self.above), ("at most", self.most),
                  ("below", self.below))
        return " and ".join(f"{words} {bound:g}" for words, bound in bounds if math.isfinite(bound))


COUNT = Interval(1, 10 ** 9)             # how many of something there are
FRACTION = Interval(0, 1)
POSITIVE = Interval(above=0)


def number(kind, interval=None):
    """The `type` of a flag that takes an int or a float in an Interval (None: any finite number).

    Raises argparse's error, which names the flag.
    """
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if type(value) is float and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is no {'whole ' if kind is int else ''}number")
        if interval is not None and value not in interval:
            raise argparse.ArgumentTypeError(f"{text[:40]} isn't {interval}")
        return value
    return convert


def settings(flag, spec, kinds):
    """The value of a flag like "name=value,..." -> {name: value}. kinds: {name: (convert, what the value is,
    in words)}. ValueError for another name, a name twice, or what `convert` refuses."""
    values = {}
    for part in filter(None, (spec or "").split(",")):
        name, equals, text = part.partition("=")
        if name not in kinds or not equals:
            raise ValueError(f"{flag} takes {', '.join(kinds)}, as in name=value,name=value; not {part!r}")
        if name in values:
            raise ValueError(f"{flag} has {name} twice")
        convert, words = kinds[name]
        try:
            values[name] = convert(text)
        except argparse.ArgumentTypeError:
            raise ValueError(f"{flag} {words}, not {part!r}") from None
    return values


def run_command(program, command):
    """Run command() -> the exit code of a script: command's own or 0; 2 after a mistake, whose sentence goes
    to stderr; 130 after Ctrl-C. With `python -X dev` errors keep their traceback."""
    for name in ("stdout", "stderr"):                                # closed: tqdm and print would fail
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "w"))              # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):                           # names that a terminal can't show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return command() or 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, MemoryError, RuntimeError, SafetensorError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"{program}: {sentence(error)}", file=sys.stderr)
        return 2


def sentence(error):
    """What an exception says, for a person; of long lines the beginning."""
    lines = [line.rstrip() for line in str(error).splitlines() if line.strip()]
    text = "\n".join(line if len(line) <= 1000 else f"{line[:1000]} ..." for line in lines)
    if isinstance(error, OSError) and error.strerror:                # without Python's "[Errno 2]"
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory is too small for this: try less at a time, or --device cpu"
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return f"the memory of this machine is too small for this: try less at a time ({text})"
    if isinstance(error, RuntimeError):
        return f"{type(error).__name__}: {text} (python -X dev shows where)"
    return text


# ---- files ------------------------------------------------------------------------------------------------

def open_file(path, buffering=-1):
    """A regular file, open for reading bytes.

    Raises ValueError for a folder, for a pipe or a device, which might never end, and for a pointer that
    git-lfs leaves where the file itself has not been downloaded; OSError as open.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(path, flags)                                    # a pipe without a writer would block
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise ValueError(f"{path} is a {'folder' if stat.S_ISDIR(mode) else 'pipe or device'}, not a file")
    pointer = os.read(handle, len(GIT_LFS)) == GIT_LFS
    os.lseek(handle, 0, os.SEEK_SET)
    if pointer:
        os.close(handle)
        raise ValueError(f"{path} is only git-lfs's pointer to a file: run `git lfs pull` where it was "
                         "cloned, or download it again")
    return os.fdopen(handle, "rb", buffering)


GIT_LFS = b"version https://git-lfs"


# Where a model folder's settings and weights lie.
MODEL_FILES = ("config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json",
               "*.safetensors", "gen_vision_tower/*.*", "diffusion-decoder/*/*.*")


def model_digest(*folders):
    """A hash of model folders, to tell whether they have changed: of their settings, and of the size and 64
    parts of each file of weights: training changes all of a tensor, and whole files take minutes."""
    digest = hashlib.sha256()
    for folder, pattern in itertools.product(map(Path, folders), MODEL_FILES):
        for path in sorted(folder.glob(pattern)):
            if path.suffix not in (".json", ".safetensors") or not path.is_file():
                continue
            size = path.stat().st_size
            step, part = (size, size) if path.suffix == ".json" else (size // 64, 1024)
            digest.update(os.fsencode(f"{path.relative_to(folder).as_posix()} {size}\n"))
            with open(path, "rb") as file:
                for start in range(0, size, max(1, step)):
                    file.seek(start)
                    digest.update(file.read(part))
    return digest.hexdigest()[:16]


def read_file(path):
    """The bytes of a regular file; raises as `open_file`."""
    with open_file(path) as file:
        return file.read()


def path_below(folder, name, where):
    """The path of `name`, which a file says, in `folder`; ValueError, beginning with `where`, if it would
    lie outside: names in data are not trusted. Symbolic links are: a person has made them."""
    path = os.path.normpath(os.path.join(folder, name)) if isinstance(name, str) else os.curdir
    root = os.path.join(os.path.abspath(folder), "")
    if not os.path.abspath(path).startswith(root) or "\0" in path:
        raise ValueError(f"{where}: {name!r} isn't the name of a file below {folder}")
    return Path(path)


def parse_json(content, where, kind=dict):
    """The value of JSON in UTF-8, bytes or str, of a type or one of several: an object, unless `kind` says
    otherwise.

    Raises ValueError, beginning with `where`, for what isn't JSON (NaN and infinity aren't), or of another
    type.
    """
    def refuse(text):
        raise ValueError(f"{text} is no number")

    def finite(text):
        return float(text) if math.isfinite(float(text)) else refuse(text)
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        value = json.loads(text, parse_constant=refuse, parse_float=finite)
    except RecursionError:
        raise ValueError(f"{where} isn't valid JSON: it is nested too deeply") from None
    except ValueError as error:                                      # UnicodeDecodeError included
        raise ValueError(f"{where} isn't valid JSON: {error}") from None
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if type(value) not in kinds:
        wanted = " or ".join(JSON_NAMES[kind] for kind in kinds)
        raise ValueError(f"{where} must hold {wanted}, not {JSON_NAMES[type(value)]}")
    return value


JSON_NAMES = {dict: "a JSON object", list: "a list", str: "a text", int: "a whole number", float: "a number",
              bool: "true or false", NoneType: "null", tuple: "a list"}


def read_json(path, kind=dict):
    """The value in a JSON file, an object unless `kind` says otherwise; raises as `parse_json` and
    `open_file`."""
    return parse_json(read_file(path), path, kind)


def from_json(cls, raw, where, most=2 ** 31 - 1):
    """The dataclass `cls` from those entries of a JSON object that are its fields.

    Each value must have the type of its field's annotation. Numbers lie in the Interval that the field has
    as metadata["interval"]; without one they are positive, and at most `most`. Raises ValueError, beginning
    with `where`, naming the field.
    """
    hints, values = typing.get_type_hints(cls), {}
    for f in fields(cls):
        if f.name in raw:
            interval = f.metadata.get("interval", Interval(above=0, most=most))
            values[f.name] = typed(raw[f.name], hints[f.name], interval, f"{where}: {f.name}")
        elif f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{where} lacks {f.name}")
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def typed(value, hint, interval, where):
    """A JSON value as the type `hint` (int, float, bool, str, dict, list[...], tuple[..., ...] or a union);
    ValueError, beginning with `where`, if it has another type, or a number lies outside of `interval` (None:
    any)."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)
    for option in options:
        kind = typing.get_origin(option) or option
        if kind in (list, tuple) and isinstance(value, (list, tuple)):
            inner = (typing.get_args(option) or (object,))[0]
            return kind(typed(item, inner, interval, f"{where}[{i}]") for i, item in enumerate(value))
        if kind is float and type(value) is int:
            value = float(value) if abs(value) < 2 ** 1023 else math.inf
        if option is object or type(value) is kind:
            if type(value) in (int, float) and interval is not None and value not in interval:
                raise ValueError(f"{where} = {str(value)[:60]} isn't {interval}")
            return value
    wanted = " or ".join(JSON_NAMES[typing.get_origin(option) or option] for option in options)
    raise ValueError(f"{where} must be {wanted}, not {json.dumps(value)[:60]}")


def section(raw, name, where):
    """The object that a JSON object holds under `name`, {} where it is absent or null; ValueError, beginning
    with `where`, for anything else."""
    return typed(raw.get(name), dict | None, None, f"{where}: {name}") or {}


def require_settings(raw, fixed, where, needed=()):
    """Refuse what isn't computed here: each setting of a JSON object must have one of the values that
    `fixed` {name: (value, ...)} names, or be absent, except those in `needed`; or be a list of such values.

    Raises ValueError, beginning with `where`; so, too, where the weights are said to be quantised.
    """
    for name in ("quantization_config", "compression_config"):
        if raw.get(name):
            method = raw[name].get("quant_method") if isinstance(raw[name], dict) else None
            raise ValueError(f"{where} says that the weights are quantised ({method or name}): "
                             f"{UNQUANTISED}")
    other = []
    for name in fixed.keys() & raw.keys():
        value, choices = raw[name], fixed[name]
        throughout = isinstance(value, list) and value and all(is_one_of(item, choices) for item in value)
        if not throughout and not is_one_of(value, choices):
            other.append(f"{name} = {value if isinstance(value, str) else json.dumps(value)}"[:80])
    if other:
        raise ValueError(f"{where} asks for {', '.join(sorted(other))}, which is not implemented")
    absent = [name for name in needed if name not in raw]  # last: files of other classes lack much
    if absent:
        raise ValueError(f"{where} lacks {', '.join(absent)}")


def is_one_of(value, choices):
    """Is a JSON value one of the choices? Numbers may differ in their last digits."""
    if isinstance(value, list):
        return any(isinstance(choice, list) and len(choice) == len(value)
                   and all(is_one_of(item, [other]) for item, other in zip(value, choice))
                   for choice in choices)
    if type(value) in (int, float):
        return any(type(choice) in (int, float) and math.isclose(value, choice, rel_tol=1e-6)
                   for choice in choices)
    return any(type(value) is type(choice) and value == choice for choice in choices)


UNQUANTISED = "take the original model, whose weights are bf16, fp16 or fp32"


def write_json(path, content):
    """Write `content` as indented JSON, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


@contextmanager
def atomic_write(path):
    """Yield a temporary Path beside `path`; the file that the body writes there replaces `path`.

    It is fsynced before the rename, so that a crash leaves the old or the new file, never half of one. If
    the body fails, `path` stays as it was. Missing parent folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # hidden: other tools walk these folders
    try:
        yield temporary
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def file_lock(path, wait=False):
    """Within: the lock `path`, a file that is made if need be, is this process's. ValueError if another one
    has it, unless to `wait` for that.

    A POSIX lock, which ends with its process and is not inherited by workers. Best effort: where there are
    no locks (Windows, some disks) nothing is locked.
    """
    with ExitStack() as stack:
        try:
            import fcntl
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path, "ab"))
            fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (ImportError, OSError) as error:
            if not wait and isinstance(error, (BlockingIOError, PermissionError)):
                raise ValueError(f"another process works in {path.parent}: wait for its end, or choose "
                                 "another --out") from None
        yield


UMASK = os.umask(0)                       # there is no other way to read it
os.umask(UMASK)


def publish(temporary, path):
    """Fsync a file, or all files of a folder, and rename it to `path`; an older folder there is removed.

    Files get the permissions of any new file: safetensors makes them readable by their owner alone.
    """
    temporary, path = Path(temporary), Path(path)
    files = [temporary] if temporary.is_file() else [f for f in temporary.rglob("*") if f.is_file()]
    for file in files:
        with open(file, "rb+") as f:
            os.fsync(f.fileno())
        file.chmod(0o666 & ~UMASK)
    if path.is_dir() and temporary.is_dir():
        shutil.rmtree(path)
    os.replace(temporary, path)


def save_weights(module_or_tensors, path, dtype=None):
    """Write a module's state dict, or {name: tensor}, to the safetensors file `path`, atomically.

    dtype None keeps each tensor's own. Raises ValueError, and writes nothing, if a number isn't finite (or
    wouldn't be as `dtype`), for a model in int8, or beside an index of shards, which would hide the new
    file.
    """
    if any(Path(path).parent.glob("[!.]*.safetensors.index*.json")):
        raise ValueError(f"{Path(path).parent} holds a checkpoint in shards: save to another folder")
    tensors = module_or_tensors
    if isinstance(tensors, torch.nn.Module):
        tensors = tensors.state_dict()
    refuse_int8(tensors)
    tensors = {name: t.detach().to("cpu", dtype or t.dtype).contiguous() for name, t in tensors.items()}
    for name, t in tensors.items():
        if t.is_floating_point() and not t.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinite values as {t.dtype}: {path} is not written")
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def refuse_int8(tensors):
    """Raise ValueError if the {name: tensor} of a model are in int8."""
    if any(t.dtype == torch.int8 for t in tensors.values()):
        raise ValueError("a model in int8 can't be saved: load it as bf16 or fp32, and save that")


def check_writable(folder):
    """Make a model folder, and find out whether a model can be saved there, before hours of work.

    Raises ValueError if `folder` is a file, holds a checkpoint in shards or a config.json that isn't one, or
    if nothing can be written there.
    """
    folder = Path(folder)
    file, config = folder / f"{os.getpid()}.try", folder / "config.json"
    try:
        with atomic_write(file) as temporary:
            temporary.write_bytes(bytes(4096))
        file.unlink()
    except OSError as error:
        raise ValueError(f"nothing can be saved in {folder}: {error.strerror}") from None
    if any(folder.glob("[!.]*.safetensors.index*.json")):
        raise ValueError(f"{folder} holds a checkpoint in shards: save to another folder")
    if config.exists():
        section(read_json(config), "nano_blip3o", config)


# ---- tensors on disk --------------------------------------------------------------------------------------

class Stored(NamedTuple):
    """A tensor on disk; only its file's header has been read."""
    file: Path
    key: str
    shape: tuple        # as it will be read: another one of as many numbers reshapes
    dtype: str = "F32"  # of the file, in safetensors' words


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FLOATS = set(DTYPES)
# Computed from config.json, but older versions of transformers stored them.
BUFFERS = re.compile(r"(^|\.)(rotary_(pos_)?emb\..*|inv_freq|cos_cached|sin_cached|position_ids)$")
# What GPTQ, AWQ, bitsandbytes, fp8 and compressed-tensors store beside their numbers.
SCALES = re.compile(r"[._](qweight|qzeros|g_idx|scales|weight_scale(_inv)?|weight_scale_2|weight_packed|"
                    r"weight_shape|weight_zero_point|input_scale|SCB|weight_format|(nested_)?absmax|"
                    r"(nested_)?quant_map|quant_state\..*)$")
FOREIGN = {**dict.fromkeys((".bin", ".pt", ".pth", ".ckpt"), "a PyTorch pickle"), ".onnx": "an ONNX file",
           **dict.fromkeys((".gguf", ".ggml"), "a llama.cpp file"), ".h5": "a TensorFlow file",
           ".msgpack": "a Flax file"}


def read_headers(folder):
    """{key: Stored} of the weights in `folder`, or in one .safetensors file; {} where there are none.

    With an index, its shards are read; else model.safetensors alone, if there is one; else every
    .safetensors file. Plain files are preferred to diffusers' .bf16 variants, these to .fp16, and these to
    all others (.non_ema). Hidden files and stored rotary tables are left out. Raises ValueError for a broken
    index or file, a missing shard, a tensor in two files, or an adapter, alone or beside a model.
    """
    stored = {}
    for file in weight_files(Path(folder)):
        open_file(file).close()  # refuses pipes and folders
        if file.suffix != ".safetensors":
            raise ValueError(f"{file} is {FOREIGN.get(file.suffix, 'no file of weights')}, which isn't "
                             "read: take a .safetensors file, or the folder that holds it")
        try:
            with safe_open(file, framework="pt"), open_file(file) as f:  # checks what is read here
                header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        except SafetensorError as error:
            raise ValueError(f"{file} is cut short or broken ({str(error)[:200]}): download it "
                             "again") from None
        for key, about in header.items():
            if key == "__metadata__" or BUFFERS.search(key):
                continue
            if key in stored:
                raise ValueError(f"{key} is both in {stored[key].file} and in {file}: remove one of them")
            stored[key] = Stored(file, key, tuple(about["shape"]), about["dtype"])
    return stored


def weight_files(folder):
    """The safetensors files that make up the weights in `folder`; see read_headers."""
    if folder.is_file():
        return [folder]
    files = sorted(folder.glob("[!.]*.safetensors"))  # hidden ones are leftovers, of atomic_write or macOS
    adapters = [*folder.glob("adapter_config.json"), *folder.glob("adapter_model*.safetensors")]
    if adapters:
        raise ValueError(f"{folder} holds an adapter (LoRA) for another model, {adapters[0].name}: merge it "
                         "into that model first (peft: merge_and_unload), and give the folder of the result")
    indexes = sorted(folder.glob("[!.]*.safetensors.index*.json"))
    best = min(map(variant, files or indexes), default=0)
    files = [f for f in files if variant(f) == best]
    indexes = [f for f in indexes if variant(f) == best]
    if indexes:
        return shards_of(folder / INDEX if folder / INDEX in indexes else indexes[-1])
    if folder / WEIGHTS in files:
        return [folder / WEIGHTS]
    for file in files:  # shards without an index tell by their names how many they are
        count = re.search(r"-of-(\d+)", file.name)
        if count and sum(count[0] in other.name for other in files) < int(count[1]):
            raise ValueError(f"{folder} doesn't hold all {int(count[1])} shards like {file.name}: download "
                             "the others")
    return files


def variant(file):
    """The rank of diffusers' file variants: 0 plain, 1 bf16, 2 fp16, 3 any other (x.non_ema.safetensors)."""
    stem = file.name.removesuffix(".json").replace(".safetensors", "").replace(".index", "")
    if "." not in stem:
        return 0
    return next((rank for rank, name in ((1, ".bf16"), (2, ".fp16")) if name in stem), 3)


def shards_of(index):
    """The files that an index names; ValueError if it isn't an index, or if one of them is missing."""
    names = section(read_json(index), "weight_map", index)
    if not names:
        raise ValueError(f"{index} isn't an index of weights: it names no files; download it again")
    for name in names.values():
        path_below(index.parent, name, index)
    shards = [index.parent / name for name in sorted(set(names.values()))]
    missing = [shard.name for shard in shards if not os.path.exists(shard)]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"{index.parent} lacks the shards {', '.join(missing[:3])[:200]}{more} that "
                         f"{index.name} names: download them again")
    return shards


def no_weights(folder, what="weights"):
    """The sentence that says that a folder holds no `what`, and what lies there instead."""
    folder = Path(folder)
    if not folder.exists():
        return f"{folder} holds no {what}: there is no such folder"
    found = {file.suffix: file.name for file in folder.glob("[!.]*") if file.suffix in FOREIGN}
    others = [f"{name} is {FOREIGN[suffix]}" for suffix, name in sorted(found.items())]
    return (f"{folder} holds no {what}: neither {WEIGHTS}, nor shards with {INDEX}, nor any other "
            ".safetensors file" + "".join(f"; {text}, which isn't read" for text in others)
            + ("; take the model's .safetensors files, or convert it (transformers: from_pretrained, then "
               "save_pretrained)" if others else ""))


def sizes(tensors, name, dims, where):
    """The shape of tensors[name], which must have `dims` dimensions; ValueError, beginning with `where`, if
    it is absent or has others."""
    if name not in tensors:
        raise ValueError(f"{where} lacks {name}, from which sizes are read")
    shape = tuple(tensors[name].shape)
    if len(shape) != dims or 0 in shape:
        raise ValueError(f"{where}: {name} has the shape {shape}, not {dims} positive sizes")
    return shape


def stored_layers(names, prefix):
    """How many layers `prefix`N.* there are among names of tensors."""
    return len({name[len(prefix):].partition(".")[0] for name in names if name.startswith(prefix)})


def read_tensor(stored, device="cpu", dtype=None):
    """The tensor on `device` as `dtype` (None: the file's), copied at most once, and then in `pieces`;
    "meta" reads nothing. The file is mapped, and reopened for each tensor."""
    if str(device) == "meta":
        return torch.empty(stored.shape, dtype=dtype, device="meta")
    if dtype in (None, DTYPES.get(stored.dtype)) or not stored.shape:
        with safe_open(stored.file, framework="pt", device=str(device)) as f:
            tensor = f.get_tensor(stored.key).view(stored.shape)
        return tensor if dtype is None else tensor.to(dtype)
    tensor = torch.empty(stored.shape, dtype=dtype, device=device)
    for rows, piece in pieces(stored, device):
        tensor[rows] = piece
    return tensor


def pieces(stored, device):
    """Iterator over (slice, those rows of a tensor on `device`), of about PIECE numbers each. Pages of a
    file that are mapped count as memory until it is closed: it is reopened for each piece."""
    n = max(1, PIECE * stored.shape[0] // max(1, math.prod(stored.shape)))
    for i in range(0, stored.shape[0], n):
        with safe_open(stored.file, framework="pt", device=str(device)) as f:
            yield slice(i, i + n), f.get_slice(stored.key)[i:i + n].view(-1, *stored.shape[1:])


PIECE = 2 ** 24


def same_tensor(a, b, rows=4096):
    """Whether two Stored matrices hold the same numbers; reads until they differ."""
    if a.shape != b.shape:
        return False
    with safe_open(a.file, framework="pt") as f, safe_open(b.file, framework="pt") as g:
        x, y = f.get_slice(a.key), g.get_slice(b.key)
        return all(torch.equal(x[i:i + rows].float(), y[i:i + rows].float())
                   for i in range(0, a.shape[0], rows))


# ---- official names ---------------------------------------------------------------------------------------

# (official prefix, our prefix, component); the first match wins; None: not read by BLIP3o. transformers 4
# wrote visual.* and model.*, 5 writes model.visual.* and model.language_model.*.
PREFIXES = (
    ("visual.", "visual.", "visual"),
    ("model.visual.", "visual.", "visual"),
    ("model.dit.model.", "dit.", "dit"),
    ("model.regressor.", "regressor.", "regressor"),
    ("model.latent_queries", "latent_queries", "queries"),
    ("model.gen_vision_tower.", None, "gen_vision_tower"),  # EVA-CLIP, which clip_decoder.py reads
    ("model.vae.", None, "vae"),                            # FLUX's VAE in early releases, never used
    ("lm_head.", "llm.lm_head.", "llm"),
    ("model.language_model.", "llm.", "llm"),
    ("model.", "llm.", "llm"),
)
WRITTEN = {"visual.": "visual.", "dit.": "model.dit.model.", "regressor.": "model.regressor.",
           "latent_queries": "model.latent_queries",
           "llm.lm_head.": "lm_head.", "llm.": "model."}  # our prefix -> official prefix, as released


def component(key):
    """The component that an official key belongs to, "other" if none."""
    return next((part for prefix, _, part in PREFIXES if key.startswith(prefix)), "other")


def our_name(key):
    """Official key -> our parameter's name; None for keys that BLIP3o skips; unknown keys are unchanged."""
    for prefix, ours, _ in PREFIXES:
        if key.startswith(prefix):
            return None if ours is None else ours + key[len(prefix):]
    return key


def official_name(name):
    """Our parameter's name -> official key; names of no component of BLIP3o are unchanged."""
    for ours, official in WRITTEN.items():
        if name.startswith(ours):
            return official + name[len(ours):]
    return name


def model_folder(folder):
    """The folder of a model that a path means: itself, or, for the folder of a run, its model/."""
    folder = Path(folder)
    own = folder / "model"
    return own if (own / "config.json").is_file() and not (folder / "config.json").is_file() else folder


def folder_parts(folder):
    """What a model folder holds: a subset of {"visual", "llm", "queries", "dit", "regressor", "clip", "vae",
    "unet"}, empty for None or without weights. Raises ValueError if its files are broken."""
    if folder is None:
        return set()
    folder = Path(folder)
    components = {component(key) for key in read_headers(folder)}
    parts = components & {"visual", "llm", "queries", "dit", "regressor"}
    if "gen_vision_tower" in components or (folder / "gen_vision_tower").is_dir():
        parts.add("clip")
    for part in ("vae", "unet"):
        if (folder / "diffusion-decoder" / part).is_dir() or (folder / part).is_dir():
            parts.add(part)
    return parts


# ---- int8 -------------------------------------------------------------------------------------------------

INT8_LEAST = 2 ** 16   # weights of a linear layer that becomes int8: smaller ones take little memory
EMBEDDING = "_embed"   # in the names of small layers that all others depend on: they stay floats
INT8_BLOCK = 2 ** 20   # weights that a CPU dequantises at a time: they stay in its cache
INT8_ROWS = 4          # a CPU multiplies so many rows, or fewer, fastest without dequantising


class Int8(NamedTuple):
    """What `load_strict` takes as a dtype for a model in int8: `rest` is the dtype of the activations and of
    all weights that `quantise_linears` leaves as they are."""
    rest: torch.dtype

    def __str__(self):
        return "int8"


def activation_dtype(dtype):
    """The torch dtype of the activations of a model loaded as `dtype`, a torch dtype or Int8."""
    return dtype.rest if isinstance(dtype, Int8) else dtype


def unties(dtype):
    """Whether a tied head loaded as `dtype` becomes a layer in int8 beside the table of embeddings, which is
    bf16: with activations in bf16 the table serves both, and nothing is dequantised."""
    return isinstance(dtype, Int8) and dtype.rest != torch.bfloat16


class Int8Linear(nn.Module):
    """A linear layer with weight-only quantisation: (..., in) -> (..., out), for inference without gradient.

    weight (out, in) int8 and scale (out,), see `quantise`; bias (out,) or None. The activations stay floats.
    """

    def __init__(self, linear, dtype):
        super().__init__()
        weight, scale = quantise(linear.weight.detach(), dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)
        self.register_parameter("bias", linear.bias)

    @torch.no_grad()
    def forward(self, x):
        """x (..., in) -> (..., out), in x's dtype."""
        rows = x.flatten(0, -2)  # (R, in)
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            y = F.linear(rows, self.weight.to(x.dtype)) * self.scale  # torch.compile fuses the three
        elif 0 < len(rows) <= INT8_ROWS and x.shape[-1] % 32 == 0:  # of other widths the kernel may crash
            y = torch._weight_int8pack_mm(rows.bfloat16(), self.weight, self.scale.bfloat16()).to(x.dtype)
        else:
            y = rows.new_empty(len(rows), len(self.weight))
            n = block_rows(self.weight)
            block = rows.new_empty(n, x.shape[-1])
            for weight, out in zip(self.weight.split(n), y.split(n, dim=1)):
                torch.mm(rows, block[:len(weight)].copy_(weight).t(), out=out)
            y *= self.scale
        y = y if self.bias is None else y + self.bias
        return y.unflatten(0, x.shape[:-1])


def block_rows(weight):
    """How many rows of a weight (out, in) have about INT8_BLOCK numbers."""
    return max(16, INT8_BLOCK // weight.shape[1])


def quantise(weight, dtype):
    """A weight (out, in) -> int8 (out, in) and scale (out,) as `dtype`: weights are about integer * scale,
    and the largest of a row is 127. Scales are bf16 numbers in any dtype: the model is the same in all."""
    integers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    if weight.is_meta:  # a thousand layers of which only the sizes matter
        return integers, torch.empty(len(weight), dtype=dtype, device="meta")
    largest = torch.maximum(weight.amax(1), -weight.amin(1)).float()
    scale = (largest / 127).clamp(min=torch.finfo(torch.float32).tiny).bfloat16()  # rows of zeros, too
    n = block_rows(weight)
    for part, divisor, out in zip(weight.split(n), scale.float().split(n), integers.split(n)):
        out.copy_((part.float() / divisor[:, None]).round_().clamp_(-127, 127))
    return integers, scale.to(dtype)


def quantise_linears(module, dtype):
    """Replace the linear layers of a module, on any device, by Int8Linear for activations of a dtype: those
    of INT8_LEAST weights or more whose name has no EMBEDDING. Tables of embeddings become bf16. Returns the
    names of the layers' weights."""
    names = [name for name, part in module.named_modules() if name and isinstance(part, nn.Linear)
             and part.weight.numel() >= INT8_LEAST and EMBEDDING not in name]
    for name in names:
        module.set_submodule(name, Int8Linear(module.get_submodule(name), dtype))
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            part.to(torch.bfloat16)
    return {f"{name}.weight" for name in names}


# ---- strict loading ---------------------------------------------------------------------------------------

MOST_TENSORS = 20_000  # of one model; the largest known here has 2,000


def load_strict(build, tensors, source, device="cpu", dtype=torch.float32):
    """build() with weights from tensors {parameter name: Stored or Tensor}, in eval mode.

    dtype: a torch dtype or Int8. Raises ValueError before anything is read, unless names and shapes match
    exactly; `source` names their origin in its message. A module of more than MOST_TENSORS isn't built. On
    device "meta" nothing is read: the module gets `tensors` as its attribute `sources`, for `fill`.
    """
    if not tensors:
        raise ValueError(no_weights(source))
    odd = [t for name, t in tensors.items() if isinstance(t, Stored) and
           (SCALES.search(name) or t.dtype in ("I8", "U8") or t.dtype[0] == "F" and t.dtype not in FLOATS)]
    if odd:
        raise ValueError(f"the weights in {source} are quantised ({odd[0].key}, {odd[0].dtype}): "
                         f"{UNQUANTISED}")
    registered = itertools.count(1)

    def limit(*_):
        if next(registered) > MOST_TENSORS:
            raise ValueError(f"the settings of {source} make a model of more than {MOST_TENSORS} tensors, "
                             f"its weights hold {len(tensors)}")
    hook = register_module_parameter_registration_hook(limit)
    try:
        with torch.device("meta"):
            module = build()
    except (RuntimeError, OverflowError) as error:  # sizes whose product is no number of bytes
        raise ValueError(f"no model has the sizes that the settings of {source} name: {error}") from None
    finally:
        hook.remove()
    problems = misfits(module, tensors)
    if problems:
        raise ValueError(f"the weights in {source} don't fit {type(module).__name__}: {problems}")
    module.to(activation_dtype(dtype)).eval()
    if isinstance(dtype, Int8):
        quantise_linears(module, dtype.rest)
    if str(device) == "meta":
        module.sources = tensors
    else:
        fill(module, tensors, device)
    return module


def fill(module, tensors, device):
    """Put tensors {name: Stored or Tensor} into a module on the device "meta", on `device`, in its dtypes.

    They are assigned, so that they exist once; int8 is made piece by piece, from each as it lies in its
    file. What `tensors` lacks stays as it is.
    """
    own, state = module.state_dict(), {}
    # Large ones first: they don't fit into the holes that the making of others leaves in the heap.
    for name, tensor in sorted(tensors.items(), key=lambda item: -math.prod(item[1].shape)):
        dtype, stored = own[name].dtype, isinstance(tensor, Stored)
        if dtype == torch.int8:
            scale = name.removesuffix("weight") + "scale"
            for key in (name, scale):
                state[key] = torch.empty_like(own[key], device=device)
            rows = pieces(tensor, device) if stored else [(slice(None), tensor.to(device, None))]
            for part, piece in rows:
                state[name][part], state[scale][part] = quantise(piece, own[scale].dtype)
        else:
            state[name] = read_tensor(tensor, device, dtype) if stored else tensor.to(device, dtype)
    module.load_state_dict(state, strict=False, assign=True)
    return_freed_memory()  # of the pieces


def empty(module):
    """Move a module to the device "meta", and give its memory back to the system."""
    module.to("meta")
    return_freed_memory()


def return_freed_memory():
    """Give what is free on the heap back to the system: glibc keeps freed pieces of up to 32 MiB, which most
    tensors are, for later ones."""
    with suppress(OSError):  # other systems have another libc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


MAPPED = 2 ** 20  # bytes


def map_large_tensors():
    """From now on each tensor of MAPPED bytes or more lies in pages of its own, and they are free as soon as
    it is: glibc would put most on the heap, where smaller ones that live on keep the freed ones' memory."""
    with suppress(OSError, AttributeError):  # other systems have another libc
        ctypes.CDLL("libc.so.6").mallopt(-3, MAPPED)  # M_MMAP_THRESHOLD, which glibc no longer raises then


def below(tensors, prefix):
    """Those of {name: tensor} whose names begin with a prefix, without it."""
    return {name[len(prefix):]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


STACKS = ("layers", "blocks", "transformer_blocks")  # lists of equal layers, where most weights are


def stacked_layers(module):
    """The names of the layers in a module's STACKS, in the order in which they are called."""
    return [f"{name}.{i}" for name, stack in module.named_modules()
            if isinstance(stack, nn.ModuleList) and name.rpartition(".")[2] in STACKS
            for i in range(len(stack))]


def misfits(module, tensors):
    """How names and shapes of `tensors` differ from the module's, by component; "" if they don't."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    floating = {name for name, tensor in module.state_dict().items() if tensor.is_floating_point()}
    components = {component(official_name(name)) for name in expected}
    # The keys of EVA-CLIP, UNet and VAE have no component: they are reported under the class name.
    unnamed = type(module).__name__ if components == {"other"} else "other"
    groups = {}

    def add(name, kind, text):
        part = component(official_name(name))
        groups.setdefault((unnamed if part == "other" else part, kind), []).append(text)

    for name, tensor in tensors.items():
        key, shape = tensor.key if isinstance(tensor, Stored) else name, tuple(tensor.shape)
        if name not in expected:
            add(name, "unexpected", key)
        elif shape != expected[name]:
            add(name, "mis-shaped", f"{key} {shape}, not {expected[name]}")
        elif isinstance(tensor, Stored) and name in floating and tensor.dtype not in FLOATS:
            add(name, "mistyped", f"{key} {tensor.dtype}")
    for name in expected:
        if name not in tensors:
            add(name, "missing", official_name(name))

    lines = [f"{part}: {len(keys)} {kind} ({', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''})"
             for (part, kind), keys in sorted(groups.items())]
    if any("feed_forward" in key for key in groups.get(("dit", "mis-shaped"), [])):
        lines.append("the DiT's feed-forward is 4864 wide by Lumina's rule (2/3 of 4 x 1792, rounded up "
                     "to 256s) but 7168 in files of newer versions of diffusers, which leave out the 2/3")
    return "; ".join(lines)
