"""Scores: does the image show what was asked, is the answer right, does an image survive the autoencoder?

On the synthetic world of the miniature, whose images a judge of rules reads exactly:

    python eval.py judge                                    how far the judge itself can be trusted
    python eval.py alignment --ckpt weights/nano            text -> image, six skills, GenEval's rules
    python eval.py upsampling --ckpt weights/nano           do upsampled prompts keep what was asked?
    python eval.py understanding --ckpt weights/nano        image -> text: questions and captions
    python eval.py reconstruction --ckpt weights/nano       image -> features -> image
    python eval.py editing --ckpt weights/nano              image and change -> image, by number of objects
    python eval.py chat --ckpt weights/nano                 image, change, question: who confuses what?
    python eval.py binding --ckpt weights/nano              whose colour, whose shape?
    python eval.py figure4 | figure5                        the figures in miniature (--quick: a trial)
    python eval.py ablation --what upsample                 also stage2, queries, shift, ...

What other people publish, for models of any size:

    python eval.py generate --bench geneval --prompts FILE  images as GenEval, DPG, WISE and MJHQ want them
    python eval.py score geneval --results FILE             their scorers' outputs -> the published figures
    python eval.py understanding --data FILE.tsv|.json[l]   MMBench, MME, POPE, VQAv2, TextVQA, MMMU, MM-Vet
    python eval.py reconstruction --images DIR              image -> features -> image, of your own images
    python eval.py fid --a DIR --b DIR                      how far two sets of images are apart
    python eval.py compare A B --prompts FILE               a blind page for people; --votes FILE counts
    python eval.py leakage --train SHARDS --prompts FILE    were evaluation prompts trained on?
    python eval.py emoji --data DIR                         held-out emoji: is it the right one?
    python eval.py neighbours --a DIR --train SHARDS        were images copied from training?
    python eval.py speed                                    beside transformers, diffusers and webdataset
    python eval.py gpu                                      a GPU: is it exact, how much memory, how fast?
    python eval.py scale                                    the data loader at 25 million samples, simulated
"""
import argparse
import sys
import tempfile
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np

from checkpoint import COUNT, Interval, Parser, number, run_command

NANO = str(Path(__file__).parent / "weights" / "nano")


# ---- the commands: NAME -> (module, function, flags) ----------------------------------------------------

def flag(*names, **options):
    """One argument of a command, as argparse's add_argument takes it."""
    return names, options


def whole(name, default=None, interval=COUNT, **options):
    """A flag that takes a whole number in an Interval."""
    return flag(f"--{name}", type=number(int, interval), default=default, **options)


def seed(default):
    """The flag --seed; commands on the world have 1, since 0 is the world that models are trained on. Each
    has a million seeds of images."""
    return whole("seed", default, Interval(0, 999), help="of the prompts and images")


READER = (flag("--ckpt", default=NANO, help="model folder"),
          flag("--device", default="auto", help="auto, cpu, cuda, cuda:1, ..."),
          flag("--dtype", default="auto", choices=("auto", "fp32", "bf16", "fp16", "int8")))
MODEL = (*READER,
         flag("--eva", help="folder with EVA-CLIP and the diffusion-decoder, if --ckpt has none"))
BENCH = flag("--bench", choices=("geneval", "dpg", "wise", "mjhq"), default="geneval",
             help="whose prompt file it is")
PROMPTS = flag("--prompts", help="prompt file or folder as published")
OBJECTS = Interval(1, 4)                 # the most that an image of the world has
STUDY = (seed(0), flag("--out", default="runs", help="folder of the results"),
         # None: the study's own.
         whole("steps"), whole("points", None, Interval(1, 1000)), whole("batch"),
         whole("seeds", None, Interval(1, 1000)), whole("n-prompts"),
         whole("images", None, Interval(2, 10 ** 6)), whole("n"), whole("objects", None, OBJECTS),
         flag("--init", default=NANO, help="model folder with the language model of all runs"),
         flag("--eva", default=NANO, help="model folder with EVA-CLIP and the diffusion-decoder"),
         whole("jobs", 2, help="trainings at a time, one thread each"),
         flag("--runs", default="runs", help="folder in which the trainings of a study have a folder"),
         flag("--quick", action="store_true", help="see in a minute that it runs; the numbers mean nothing"),
         flag("--bf16", action="store_true", help="train in bf16, as train.py's flag"))
ALIGNMENT = (
    seed(0), whole("n-prompts", help="prompts (553; of --prompts the first so many, or all)"),
    whole("images", 4),
    flag("--novel", action="store_true", help="pairs of colour and shape never trained on"),
    whole("objects", 4, OBJECTS, help="prompts of so many objects or fewer"),
    flag("--upsample", action=argparse.BooleanOptionalAction,
         help="let the language model upsample each prompt first (as the checkpoint says)"),
    whole("best-of", 1, Interval(1, 1000), help="of so many images score the one that the model likes best"),
    flag("--prompts", help="other prompts, as in assets/free_prompts.jsonl: images must fit exactly"))
UNDERSTANDING = (
    seed(1), whole("n", 600),
    flag("--data", help="questions: .tsv as VLMEvalKit's, .jsonl, or .json as POPE, VQAv2, TextVQA, MM-Vet"),
    flag("--annotations", help="VQAv2's second file (the one of its published name beside --data)"),
    flag("--task", choices=("choice", "mme", "pope", "vqav2", "textvqa", "mmvet"),
         help="wording and scoring (choice, or vqav2 without options)"),
    flag("--images", help="folder of the images that --data names (its own)"),
    flag("--official", action="store_true", help="JPEG and scale images as the official run"),
    flag("--write", help="write --n questions about the world to this .tsv, and stop"))
COMMANDS = {
    "judge": ("miniature.scores", "run_judge",
              (seed(1), whole("n", 1000), whole("size", 64, Interval(16, 4096)))),
    "alignment": ("miniature.scores", "run_alignment", (*ALIGNMENT, *MODEL)),
    "upsampling": ("miniature.scores", "run_upsampling", (seed(1), whole("n", 200), *READER)),
    "understanding": ("miniature.scores", "run_understanding", (*UNDERSTANDING, *READER)),
    "reconstruction": ("miniature.scores", "run_reconstruction",
                       (seed(1), whole("n", 200), *MODEL,
                        flag("--images", help="a folder of images instead of the world's"))),
    "binding": ("miniature.scores", "run_binding",
                (seed(1), whole("n", 256, Interval(2, 10 ** 9)), *MODEL,
                 flag("--upsample", action=argparse.BooleanOptionalAction,
                      help="captions with every attribute (as the checkpoint says)"))),
    "editing": ("miniature.scores", "run_editing", (seed(1), whole("n", 420), *MODEL)),
    "chat": ("miniature.scores", "run_chat", (seed(1), whole("n", 100), *MODEL)),
    "generate": ("evals.generation", "generate",
                 (seed(0), *MODEL, BENCH,
                  flag("--prompts", required=True, help="prompt file or folder as published"))),
    "score": ("evals.generation", "score",
              (flag("bench", choices=("geneval", "wise")),
               flag("--results", nargs="+", required=True, help="what the official scorer wrote (.jsonl)"))),
    "fid": ("evals.distances", "fid",
            (seed(0), *MODEL, flag("--a", required=True, help="a folder of images"),
             flag("--b", required=True, help="another"),
             flag("--inception", metavar="FILE",
                  help="FID's Inception weights (.safetensors) instead of the CLIP tower"))),
    "compare": ("evals.preference", "compare",
                (seed(0), BENCH, PROMPTS,
                 flag("folders", nargs="*", help="two folders that `generate` filled, A and B"),
                 flag("--votes", nargs="+", help="files that the page exported"))),
    "leakage": ("evals.leakage", "leakage",
                (whole("n", 20000), BENCH, PROMPTS,
                 flag("--train", help="shards as in train.py --data (the world's first --n captions)"),
                 flag("--near", type=number(float, Interval(above=0, most=1)), default=0.7,
                      help="least similarity of a near-duplicate"))),
    "neighbours": ("evals.leakage", "neighbours",
                   (whole("n", 20000, Interval(2, 10 ** 9)), *MODEL,
                    flag("--a", required=True, help="a folder of images"),
                    flag("--train", required=True,
                         help="shards as in train.py --data (their first --n images)"))),
    "emoji": ("miniature.emoji", "run_emoji",
              (seed(0), whole("n", 608), *MODEL,
               flag("--data", required=True, help="folder that python -m miniature.emoji filled"),
               flag("--judge", help="model folder whose encoder compares images (default: --ckpt's)"))),
    "figure4": ("miniature.studies", "run_study", STUDY),
    "figure5": ("miniature.studies", "run_study", STUDY),
    "ablation": ("miniature.studies", "run_study",
                 (*STUDY, flag("--what", required=True,
                               choices=("stage2", "upsample", "queries", "rope", "shift", "ema", "size",
                                        "steps", "guidance")),
                  flag("--ckpt", default=NANO,
                       help="model folder that generates or, for stage2, is trained on"))),
    "speed": ("evals.speed", "speed", (
        whole("rounds", 2), flag("--quick", action="store_true", help="tiny: see that it runs"))),
    "gpu": ("evals.gpu", "gpu", (flag("--quick", action="store_true", help="tiny: see that it runs"),)),
    "scale": ("evals.scale", "scale", (flag("--quick", action="store_true", help="1,200 samples instead"),)),
}
# Flags that have no effect: (commands, where that is so in words, a test of the arguments, the flags).
NO_EFFECT = (
    ("understanding", "with --data", lambda a: a.data, "--n --seed --write"),
    ("understanding", "without --data", lambda a: not a.data, "--task --images --official --annotations"),
    ("understanding", "with --write", lambda a: a.write, "--ckpt --device --dtype"),
    ("reconstruction", "with --images", lambda a: a.images, "--n --seed"),
    ("alignment", "with --prompts", lambda a: a.prompts, "--novel"),
    ("fid", "with --inception", lambda a: a.inception, "--ckpt --eva --dtype"),
    ("compare", "with --votes", lambda a: a.votes, "folders --prompts --bench --seed"),
    ("leakage", "without --prompts", lambda a: not a.prompts, "--bench"),
    ("leakage", "with --train", lambda a: a.train, "--n"),
    ("figure4 ablation", "in this study, which asks no questions", lambda a: True, "--n"),
    ("ablation", "in this study", lambda a: a.what not in ("stage2", "steps", "guidance"), "--ckpt"),
    ("ablation", "in a study that trains on --ckpt", lambda a: a.what == "stage2", "--init"),
    ("ablation", "in a study that trains nothing", lambda a: a.what in ("steps", "guidance"),
     "--steps --points --batch --init --eva --jobs --runs --bf16"),
)
# The same command, of files instead of the world, where one of these flags is given.
WITH_FLAG = {
    ("understanding", "data"): ("evals.understanding", "answer_file"),
    ("understanding", "write"): ("miniature.scores", "write_questions"),
    ("reconstruction", "images"): ("evals.distances", "reconstruct_files"),
    ("compare", "votes"): ("evals.preference", "votes"),
}


def load(module, name):
    """A function by its module, which is imported now."""
    return getattr(import_module(module), name)


def world_captions(n):
    """Yield the captions of the world's first n training images."""
    from miniature.world import caption, make_scene
    for i in range(n):
        yield caption(make_scene(0, i), np.random.default_rng((0, i, 1)))


def choose(args):
    """The function of a command that parsed arguments ask for."""
    for (command, name), function in WITH_FLAG.items():
        if args.command == command and getattr(args, name):
            return load(*function)
    function = load(*COMMANDS[args.command][:2])
    if args.command == "leakage" and not (args.prompts and args.train):
        from miniature.world import skill_prompts
        prompts = [entry["prompt"] for entry in skill_prompts()]
        return partial(function, prompts=prompts, captions=world_captions(args.n))
    return function


# ---- the command line -----------------------------------------------------------------------------------

def parse(argv):
    """The command line; ValueError if it makes no sense."""
    parser = Parser("eval.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    words = sys.argv[1:] if argv is None else argv
    for command, (module, function, flags) in COMMANDS.items():
        asks_help = command in words and {"-h", "--help"} & set(words)         # else no module is imported
        about = load(module, function).__doc__ if asks_help else None
        add = commands.add_parser(command, description=about).add_argument
        for names, options in flags:
            add(*names, **options)
        if module != "miniature.studies":
            add("--out", default="runs/eval", help="folder of the results")
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args):
    """Raise ValueError for flags that don't go together. One at its default changes nothing."""
    given, values = set(), vars(args)
    for (name, *_), options in COMMANDS[args.command][2]:
        value = values[name.lstrip("-").replace("-", "_")]
        if value not in (None, [], options.get("default", False)):
            given.add(name)
    for commands, where, holds, useless in NO_EFFECT:
        if args.command in commands.split() and holds(args):
            for name in useless.split():
                if name in given:
                    raise ValueError(f"{name} has no effect {where}")
    if empty := [name for name, value in values.items() if value in ("", [""], []) and name != "folders"]:
        raise ValueError(f"--{empty[0].replace('_', '-')} is empty")
    last = values.get("seed", 0) + (values.get("seeds") or 1)        # each has a million seeds of images
    if last * values.get("best_of", 1) > 1000:
        raise ValueError("--seed is too large: with --seeds added, times --best-of, it must be below 1000")
    unseen = ("understanding", "upsampling", "reconstruction", "binding", "editing", "chat")
    if args.command in unseen and args.seed == 0:
        raise ValueError("--seed 0 is the world that models are trained on: take another for unseen images")
    if (file := values.get("write")) and (not file.lower().endswith(".tsv") or Path(file).is_dir()):
        raise ValueError(f"--write takes the name of a .tsv file, not {file!r}")


def main(argv=None):
    """Run one command; returns the exit code: 0, 1 if `gpu` or `scale` found a failure, 2 after a mistake
    (one sentence on stderr), 130 after Ctrl-C."""
    return run_command("eval.py", partial(run, argv))


def run(argv):
    """What the command line asks for -> the command's exit code, or None; raises ValueError for what can't
    be meant."""
    args = parse(argv)
    command = choose(args)
    for folder in {Path(args.out), Path(getattr(args, "write", None) or args.out).parent}:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):                     # what can't be written is found now
            pass
    return command(args)


if __name__ == "__main__":
    sys.exit(main())
