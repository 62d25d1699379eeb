# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "numpy", "matplotlib", "tqdm", "pillow", "safetensors"]
# ///
"""SimCLR with Deep Augmentation, the whole method in one file.

Paper: Brüel-Gabrielsson, Wang, Baradad, Solomon, "Deep Augmentation", arXiv 2303.14537.

SimCLR makes two random views of every picture and trains a network f so that the two views' outputs are alike
and differ from everybody else's. Deep Augmentation makes views *inside* the network too. Number the layers as
Figure 2 does (-1 input, 0 stem, 1-4 the four stages, 5 average pool, 6 head), cut f after layer l into
f = f_above . f_below, and put a random transformation A between the parts:

    g^l(x) = f_above( A( f_below(x) ) )                                                             (Eq. 2)

A is dropout at that one layer, on a random half of the batch (--layer, --rate, --sample). With stop-gradient the
augmented rows send no gradient into f_below: layers up to l learn from clean rows only, the layers above from all
of them. `deep_augment` in section 5 is all there is to it; the rest is SimCLR, done carefully.

Commands
    python simclr_deepaug.py                                             # drawn shapes, layer 4, stop-gradient
    python simclr_deepaug.py --layer none                                # plain SimCLR: the baseline
    python simclr_deepaug.py --dataset cifar100 --download --epochs 12   # CIFAR-100 on a laptop
    python simclr_deepaug.py --preset paper --layer 6                    # the paper's setting, for a GPU
    python simclr_deepaug.py --layer all --sample 1 --no-stop-grad --rate 0.1    # Fig. 3: dropout everywhere
    python simclr_deepaug.py --layer 3 --freeze before --init runs/OTHER         # Fig. 5
    python simclr_deepaug.py --compare runs/*                            # table and figure of finished runs
    torchrun --nproc_per_node=4 simclr_deepaug.py --preset paper         # several GPUs, the same training

What to expect
    The default run takes under 2 min on two CPU cores; its linear probe of 20 drawn classes rises from 20.1 %
    (untrained) to 81.6 ± 4.5 % (three seeds; plain SimCLR: 91.9 ± 1.2 %). CIFAR-100, 12 epochs, batch 512,
    lr 1: untrained 12.2 %, SimCLR 24.3 ± 0.6 %, layer 4 20.9 ± 0.2 %. So short a training does not show the paper's
    gain, which comes after 1,500 epochs of a ResNet-18: docs/results.md has all that was measured.

The learning rate of the paper. Its vision code is SupContrast (github.com/HobbitLong/SupContrast; "main_supcon.py:146"
below is a line of it), whose loss is NT-Xent times T/0.07: at T = 0.5 its gradients are 7.142857 times those of the
formula. Here the loss *is* the formula, so --preset paper takes lr = 0.5 * 7.142857 = 3.571429 and weight decay =
1e-4 / 7.142857 = 1.4e-5, which gives the same weights step by step up to rounding: SGD's step is
lr * (c * g + wd * w) = lr*c * (g + wd/c * w).

Deviations from the paper and its code
    1. The last, ragged batch of an epoch is dropped (SupContrast keeps it): every NT-Xent has as many negatives.
    2. The learning rate moves every step, not every epoch; same curve.
    3. The four colour operations come in one random order per batch (torchvision: one per picture).
    4. The linear probe is a logistic regression on features of unaugmented pictures, by L-BFGS, the regularisation
       chosen on a held-out part of the training set; SupContrast trains 100 epochs of SGD on augmented pictures and
       reports its best *test* epoch.
    5. "Dropout across all layers" (Fig. 3) is taken as layers 0-6; the paper does not say whether -1 counts.
    6. Rows are drawn independently with probability --sample (the BERT code's way; "50 %" in the paper).
    7. On CUDA the forward pass runs in bfloat16 (loss and weights in float32). With several processes BatchNorm is
       synchronised on CUDA only, and the logged loss and meters are those of the first process.
"""
import argparse
import csv
import hashlib
import importlib.util
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import sys
import threading
import time
import warnings
from collections import OrderedDict
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from torchvision.transforms import v2
from tqdm import tqdm

NAME = "simclr_deepaug"
SOURCE = Path(__file__).read_text(encoding="utf-8")                 # goes into every checkpoint
LAYERS = {-1: "input", 0: "stem", 1: "layer1", 2: "layer2", 3: "layer3", 4: "layer4", 5: "avgpool", 6: "head"}

# ----------------------------------------------------------------------------------------------------------------
# 1 Settings
# ----------------------------------------------------------------------------------------------------------------

PAPER = dict(dataset="cifar100", arch="resnet18", batch_size=1024, epochs=1500, warmup_epochs=10,  # App. A.1 and
             lr=0.5 * 0.5 / 0.07, weight_decay=1e-4 * 0.07 / 0.5)      # SupContrast's README; see the docstring
# Flags that say where and how a run computes, not what: they may change on --resume and are no part of its name
# (of `preset` the name stands there, and the flags that it sets count).
FREE = {"out", "resume", "device", "data_dir", "download", "workers", "compile", "log_every", "save_every", "seeds",
        "compare", "export", "transfer", "probe_every", "preset"}


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
def fail(message: str):
    """One clear line on stderr and exit code 2."""
    print(f"{NAME}.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
def mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers."""
    return random.Random(repr(numbers)).getrandbits(63)


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (see --help)")


def settings(argv=None) -> argparse.Namespace:
    """Read and check the flags. Anything wrong is told in one line before any work starts (exit code 2)."""
    p = Parser(description="SimCLR with Deep Augmentation.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    g = p.add_argument_group("deep augmentation")
    g.add_argument("--layer", nargs="+", default=["4"], metavar="L",
                   help="-1 input, 0 stem, 1-4 stages, 5 average pool, 6 head; several; all (0-6); none; auto")
    g.add_argument("--rate", type=float, default=0.5, help="dropout rate, in [0, 1)")
    g.add_argument("--stop-grad", action=argparse.BooleanOptionalAction, default=True,
                   help="no gradient from augmented rows below the layer")
    g.add_argument("--sample", type=float, default=0.5, help="share of the batch's rows to augment, in (0, 1]")
    g.add_argument("--transform", choices=["dropout", "channel", "pca"], default="dropout",
                   help="element-wise dropout, dropout of whole channels, or removal of principal components")
    g.add_argument("--components", type=int, default=1, help="pca: how many leading components are removed")
    g.add_argument("--pairs", choices=["any", "cross"], default="any",
                   help="cross: one view of each pair is augmented, the other is not (Fig. 30, 31)")
    g.add_argument("--freeze", choices=["none", "before", "after"], default="none",
                   help="keep layers <= L (before) or > L (after) as they start (Fig. 5)")
    g = p.add_argument_group("data and views")
    g.add_argument("--dataset", choices=["shapes", "cifar10", "cifar100", "folder"], default="shapes")
    g.add_argument("--data-dir", default="data", help="where CIFAR lies; with --dataset folder: your pictures")
    g.add_argument("--download", action="store_true", help="let torchvision download CIFAR")
    g.add_argument("--image-size", type=int, default=0, metavar="PX",
                   help="side of a view; 0: the pictures' own if all are one square size up to 224, else 224")
    g.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that decode pictures")
    g.add_argument("--crop-min", type=float, default=0.2, help="smallest crop, as a share of the picture's area")
    g.add_argument("--blur", type=float, default=0.0, metavar="P", help="probability of Gaussian blur")
    g.add_argument("--solarize", type=float, default=0.0, metavar="P", help="probability of solarising")
    g = p.add_argument_group("network and objective")
    g.add_argument("--arch", choices=["small", "resnet18", "resnet34", "resnet50"], default="small")
    g.add_argument("--head-layers", type=int, choices=[2, 3], default=2, help="3: the head of Grigg et al.")
    g.add_argument("--objective", choices=["simclr", "supervised"], default="simclr")
    g.add_argument("--temperature", type=float, default=0.5, help="of NT-Xent")
    g = p.add_argument_group("training")
    g.add_argument("--preset", choices=["default", "paper"], default="default", help=f"paper: {PAPER}")
    g.add_argument("--epochs", type=int, default=20)
    g.add_argument("--batch-size", type=int, default=256, help="pictures a step, two views each, over all processes")
    g.add_argument("--lr", type=float, default=0.5, help="peak learning rate")
    g.add_argument("--optimizer", choices=["sgd", "lars"], default="sgd")
    g.add_argument("--weight-decay", type=float, default=1e-4)
    g.add_argument("--warmup-epochs", type=int, default=1, help="linear warm-up from lr/50, at most a tenth of the run")
    g = p.add_argument_group("run")
    g.add_argument("--out", default="", help="run folder; empty: runs/NAME-DATASET-WHAT DIFFERS-sSEED")
    g.add_argument("--seed", type=int, default=0, help="fixes weights, order, views and dropout")
    g.add_argument("--seeds", type=int, nargs="+", help="run each of these seeds and report mean ± std")
    g.add_argument("--resume", action="store_true", help="go on from the run folder's checkpoint.pt")
    g.add_argument("--init", default="", metavar="RUN", help="start from the weights of this run folder")
    g.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    g.add_argument("--compile", action="store_true", help="torch.compile the network (a minute to start, then faster)")
    g.add_argument("--deterministic", action="store_true", help="same bits every time on CUDA too (slower)")
    g.add_argument("--log-every", type=int, default=10, metavar="STEPS")
    g.add_argument("--save-every", type=float, default=60, metavar="SECONDS", help="between checkpoints")
    g = p.add_argument_group("evaluation and export")
    g.add_argument("--probe-every", type=int, default=0, metavar="EPOCHS", help="probe during training too; 0: never")
    g.add_argument("--transfer", choices=["shapes", "cifar10", "cifar100"], nargs="+", default=[],
                   help="linear probe of the trained encoder on these data sets too (Fig. 15, 16, 20)")
    g.add_argument("--export", choices=["torchscript", "pt2"], default="torchscript", help="pt2: its format beside it")
    g.add_argument("--compare", nargs="+", metavar="RUN", help="only print and draw these finished runs")

    a = p.parse_args(argv)
    if a.preset == "paper":
        p.set_defaults(**PAPER)
        a = p.parse_args(argv)
    check_settings(a)
    differs = [f"{k.replace('_', '')}{'_'.join(map(str, v)) if isinstance(v, list) else Path(str(v)).name}"
               for k, v in config_of(a).items() if k not in ("dataset", "seed") and v != p.get_default(k)]
    a.name = "-".join([NAME, a.dataset] + ([a.preset] if a.preset != "default" else []) + differs)
    return a


# same text in: simclr_deepaug.py, vicreg_probe.py, topk_rescue.py
def config_of(a) -> dict:
    """The flags that decide what is computed. With --dataset folder the folder is one of them."""
    free = FREE - {"data_dir"} if a.dataset == "folder" else FREE
    return {k: v for k, v in vars(a).items() if k not in free | {"name", "targets"}}


def check_settings(a: argparse.Namespace) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))                   # set by torchrun
    if len(a.layer) == 1 and a.layer[0] in ("none", "all", "auto"):
        a.targets = {"none": [], "all": list(range(7)), "auto": None}[a.layer[0]]
    elif all(re.fullmatch(r"-?\d+", s) and int(s) in LAYERS for s in a.layer):
        a.targets = sorted({int(s) for s in a.layer})
        a.layer = [str(t) for t in a.targets]
    else:
        fail(f"--layer {' '.join(a.layer)}: no such layer; there are "
             + ", ".join(f"{i} {n}" for i, n in LAYERS.items()) + "; or all, none, auto")
    for ok, message in [
        (0 <= a.rate < 1, f"--rate {a.rate}: must be in [0, 1)"),
        (0 < a.sample <= 1, f"--sample {a.sample}: must be in (0, 1]"),
        (a.components >= 1, f"--components {a.components}: must be at least 1"),
        (a.pairs == "any" or a.sample == 0.5, "--pairs cross augments one view of each pair: leave --sample at 0.5"),
        (a.freeze == "none" or a.targets != [], "--freeze needs a --layer to freeze before or after"),
        (a.targets is not None or importlib.util.find_spec("cka"), "--layer auto needs cka.py beside this script"),
        (a.targets is not None or a.init, f"--layer auto reads a trained network: make one with "
                                          f"`python {NAME}.py --layer none --out runs/base`, add --init runs/base"),
        (a.batch_size >= 2 and a.epochs >= 1, "--batch-size must be at least 2 and --epochs at least 1"),
        (0 < a.lr < math.inf and 0 < a.temperature < math.inf, "--lr and --temperature must be positive"),
        (0 < a.crop_min <= 1, f"--crop-min {a.crop_min}: must be in (0, 1]"),
        (0 <= a.blur <= 1 and 0 <= a.solarize <= 1, "--blur and --solarize are probabilities"),
        (a.log_every >= 1, "--log-every must be at least 1"),
        (0 <= a.weight_decay < math.inf, f"--weight-decay {a.weight_decay}: must not be negative"),
        (a.save_every >= 0, f"--save-every {a.save_every}: must not be negative"),
        (min(a.workers, a.image_size, a.warmup_epochs, a.probe_every) >= 0,
         "--workers, --image-size, --warmup-epochs and --probe-every must not be negative"),
        (all(0 <= s < 2 ** 43 for s in [a.seed, *(a.seeds or [])]), "--seed and --seeds must be in 0 .. 2^43 - 1"),
        (len(set(a.seeds or [])) == len(a.seeds or []), "--seeds must differ from each other"),
        (not a.compile or shutil.which(os.environ.get("CXX", "g++")), "--compile needs a C++ compiler (g++)"),
        (world == 1 or not (a.seeds or a.download), "under torchrun: no --seeds, and --download beforehand"),
        (a.batch_size % world == 0, f"--batch-size {a.batch_size} must be a multiple of the {world} processes"),
        (a.device != "cuda" or torch.cuda.is_available(), "--device cuda: no CUDA device here; use --device cpu"),
    ]:
        if not ok:
            fail(message)


# ----------------------------------------------------------------------------------------------------------------
# 2 Data
# ----------------------------------------------------------------------------------------------------------------

# same text in: simclr_deepaug.py, vicreg_probe.py, topk_rescue.py
class Split:
    """Pictures of one split: `images` uint8 [N, 3, H, W] on the device; `files` to decode, if sizes differ or they
    take 4 GiB or more (then images is None).

    labels: int64 [N] on the device, or None. size: side of the squares that the network sees.
    """
    def __init__(self, labels, size, images=None, files=None):
        self.labels, self.size, self.images, self.files = labels, size, images, files
        self.broken = set()                                          # files that could not be decoded

    def __len__(self):
        return len(self.files if self.images is None else self.images)


# same text in: simclr_deepaug.py, vicreg_probe.py, topk_rescue.py
def draw_shapes(n: int, seed: int, device) -> tuple[Tensor, Tensor]:
    """Draw n pictures [n, 3, 32, 32] uint8 of 20 classes; class // 4 is the superclass (the family of the shape).

    Families: polygons with 3-6 corners; stars with 3-6 points; rings with 0-3 gaps; 2-5 dots on a circle; 1-4 bars.
    Colour, place, size, rotation, background and noise are nuisance. The same seed gives the same pictures.
    """
    g = torch.Generator().manual_seed(seed)                          # on the CPU: the same draws on every device

    def uniform(lo, hi, *shape):
        return (torch.rand(n, *shape, generator=g) * (hi - lo) + lo).to(device)

    label = (torch.arange(n) % 20)[torch.randperm(n, generator=g)].to(device)
    family, kind = (label // 4).view(n, 1, 1), (label % 4).view(n, 1, 1)
    axis = (torch.arange(32, device=device) + 0.5) / 16 - 1                                   # pixel centres in -1..1
    radius, turn = uniform(0.5, 0.85, 1, 1), uniform(0, 2 * math.pi, 1, 1)
    y = (axis.view(1, 32, 1) - uniform(-0.2, 0.2, 1, 1)) / radius                             # [n, 32, 1]
    x = (axis.view(1, 1, 32) - uniform(-0.2, 0.2, 1, 1)) / radius
    x, y = x * turn.cos() - y * turn.sin(), x * turn.sin() + y * turn.cos()                   # [n, 32, 32]
    r, angle = (x * x + y * y).sqrt(), torch.atan2(y, x) + math.pi

    def sector(m):                                                   # angle from the middle of its one of m sectors
        return angle % (2 * math.pi / m) - math.pi / m

    corners, gaps, dots, bars = kind + 3, kind, kind + 2, kind + 1
    ring = torch.maximum((r - 0.75).abs() - 0.22, torch.where(gaps > 0, 0.45 - sector(gaps.clamp(min=1)).abs(), -1.0))
    across = ((x + 0.85) / 1.7 * bars) % 1                                                    # 0..1 within a bar's lane
    distance = torch.stack([                                         # about the distance to the edge, negative inside
        r * sector(corners).cos() - 0.9 * (math.pi / corners).cos(),
        r - 0.3 - 0.7 * (sector(corners).abs() * corners / math.pi) ** 1.5,
        ring,
        ((r * sector(dots).cos() - 0.68) ** 2 + (r * sector(dots).sin()) ** 2).sqrt() - 0.28,
        torch.maximum(torch.maximum(x.abs(), y.abs()) - 0.85, ((across - 0.5).abs() - 0.27) * 1.7 / bars),
    ]).gather(0, family.expand(1, n, 32, 32))[0]
    shape = (0.5 - distance * radius * 16).clamp(0, 1).unsqueeze(1)                           # [n, 1, 32, 32], soft
    light, dark = uniform(0.7, 1, 1, 1, 1), uniform(0, 0.3, 1, 1, 1)
    swap = uniform(0, 1, 1, 1, 1) < 0.5                              # dark on light or light on dark, a little tinted:
    ink = torch.where(swap, light, dark) + uniform(-0.1, 0.1, 3, 1, 1)    # were colours free, SimCLR could tell the
    paper = torch.where(swap, dark, light) + uniform(-0.1, 0.1, 3, 1, 1)  # pictures apart without seeing their shapes
    texture = F.interpolate(uniform(-0.1, 0.1, 3, 4, 4), size=32, mode="bicubic")             # a cloudy background
    picture = torch.lerp(paper + texture, ink, shape)
    noise = torch.empty(n, 3, 32, 32).normal_(0, 0.06, generator=g).to(device)
    return ((picture + noise).clamp(0, 1) * 255).round().to(torch.uint8), label


# same text in: simclr_deepaug.py, vicreg_probe.py, topk_rescue.py
def list_pictures(root: Path) -> list:
    """[(file, name of its class folder, or "" if it lies in root itself)] of all pictures below root."""
    endings = torchvision.datasets.folder.IMG_EXTENSIONS
    files = sorted(f for f in root.rglob("*") if f.suffix.lower() in endings)
    if not files:
        fail(f"--data-dir {root}: no pictures there (looked for {', '.join(endings)})")
    pictures = [(f, f.relative_to(root).parts[0] if f.parent != root else "") for f in files]
    random.Random(0).shuffle(pictures)                               # the first n pictures are then from all classes
    return pictures


# same text in: simclr_deepaug.py, vicreg_probe.py, topk_rescue.py
class Decode(torch.utils.data.Dataset):
    """Worker side of --dataset folder: file i as uint8, made by `transform`, whose randomness is fixed by `seeds`
    and i. Returns (picture or crops, the file used, i): in place of an unreadable file the next readable one is used.
    """
    def __init__(self, files, transform, seeds):
        self.files, self.transform, self.seeds = files, transform, seeds

    def __getitem__(self, asked):
        for used in [*range(asked, len(self.files)), *range(asked)]:
            try:
                picture = torchvision.datasets.folder.pil_loader(str(self.files[used]))
                break
            except Exception:                                        # PIL raises many kinds for damaged files
                continue
        else:
            raise OSError("not one picture can be read")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix(*self.seeds, asked))
            return self.transform(v2.functional.pil_to_tensor(picture)), used, asked


# same text in: simclr_deepaug.py, vicreg_probe.py, topk_rescue.py
def leave_signals_to_parent(worker: int):
    """Ctrl-C and SIGTERM reach the workers too; the training process decides when they end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


# same text in: simclr_deepaug.py, vicreg_probe.py
class TwoCrops:
    """A picture -> two random resized crops, flipped or not, uint8 [2, 3, S, S]: the part of the views that a worker
    must make, because pictures of different sizes cannot share a batch before."""
    def __init__(self, size, crop_min):
        self.crop = v2.Compose([v2.RandomResizedCrop(size, (crop_min, 1.0), antialias=True), v2.RandomHorizontalFlip()])

    def __call__(self, picture):
        return torch.stack([self.crop(picture), self.crop(picture)])


# same text in: simclr_deepaug.py, vicreg_probe.py, topk_rescue.py
def decode(split: Split, indices, transform, a, batch_size: int, epoch: int = 0):
    """Decode these files in worker processes: yields (uint8 [B, ...], index used [B], whether readable, bool [B])."""
    batches = torch.as_tensor(indices).split(batch_size)
    loader = torch.utils.data.DataLoader(
        Decode(split.files, transform, (a.seed, epoch)), batch_sampler=[b.tolist() for b in batches],
        num_workers=a.workers, worker_init_fn=leave_signals_to_parent, pin_memory=torch.cuda.is_available(),
        generator=torch.Generator())                                 # else it draws from the training's random state
    try:
        for pictures, used, asked in loader:
            for i in asked[used != asked].tolist():
                if split.files[i] not in split.broken:
                    tqdm.write(f"skipped, cannot be read: {split.files[i]}")
                    split.broken.add(split.files[i])
            yield pictures, used, used == asked
    except OSError:
        fail(f"none of the {len(split.files)} pictures like {split.files[0]} can be read")


# same text in: simclr_deepaug.py, vicreg_probe.py, topk_rescue.py
def picture_size(file: Path):
    """(width, height) from the file's header; None if it cannot be read (decoding will name and count the file)."""
    try:
        with Image.open(file) as picture:
            return picture.size
    except Exception:
        return None


# same text in: simclr_deepaug.py, vicreg_probe.py, topk_rescue.py
def load_folder(a, device) -> tuple[Split, Split, list]:
    """A user's own pictures: DIR/CLASS/*.png or DIR/*.png, or the same below DIR/train and DIR/test (or DIR/val); or
    as Food-101: DIR/images/CLASS/*.jpg with the split in DIR/meta/train.txt and test.txt."""
    root = Path(a.data_dir)
    if not root.is_dir():
        fail(f"--data-dir {root}: no such folder")
    test_root = next((root / n for n in ("test", "val") if (root / n).is_dir()), None)
    if (root / "meta/train.txt").is_file() and (root / "meta/test.txt").is_file():
        train, test = ([(root / "images" / f"{line}.jpg", line.split("/")[0]) for line in
                        (root / f"meta/{split}.txt").read_text().splitlines() if line] for split in ("train", "test"))
        random.Random(0).shuffle(train)                              # its lists go class by class
        random.Random(0).shuffle(test)
    elif test_root:
        train, test = list_pictures(root / "train"), list_pictures(test_root)
    else:                                                            # no test folder: a tenth is held out
        pictures = list_pictures(root)
        held = math.ceil(len(pictures) / 10)
        train, test = pictures[held:], pictures[:held]
    classes = sorted({name for _, name in train})
    labelled = len(classes) > 1 and "" not in classes and {name for _, name in test} <= set(classes)
    if not labelled:
        print("no class folders (two or more, the test folder's among them): no labels, so no linear probe and kNN")

    sizes, pixels = set(), 0
    for file, _ in train + test:
        size = picture_size(file)
        if size:
            sizes.add(size)
            pixels += size[0] * size[1]
        if len(sizes) > 1:
            break                                                    # sizes differ: stream
    if not sizes:
        fail(f"--data-dir {root}: none of its {len(train + test)} pictures can be read")
    width, height = next(iter(sizes))
    own = width if len(sizes) == 1 and width == height <= 224 else 224
    splits = []
    for pictures in (train, test):
        labels = torch.tensor([classes.index(n) for _, n in pictures], device=device) if labelled else None
        split = Split(labels, a.image_size or own, files=[file for file, _ in pictures])
        if len(sizes) == 1 and 3 * pixels < 4 << 30:                 # one size and under 4 GiB: keep them all
            parts = [(x[ok], used[ok]) for x, used, ok in
                     decode(split, range(len(split)), nn.Identity(), a, 256)]
            split.images = torch.cat([x for x, _ in parts]).to(device)
            split.labels = labels[torch.cat([i for _, i in parts]).to(device)] if labelled else None
        splits.append(split)
    return splits[0], splits[1], classes


# same text in: simclr_deepaug.py, vicreg_probe.py, topk_rescue.py
def load_data(name: str, a, device) -> tuple[Split, Split, list]:
    """Data set `name` -> (train, test, class names). CIFAR is read, and checked, by torchvision's own classes."""
    if name == "folder":
        return load_folder(a, device)
    if name == "shapes":
        pairs = [draw_shapes(8192, 0, device), draw_shapes(2048, 1, device)]
        classes = [f"{f} {k}" for f in ("polygon", "star", "ring", "dots", "bars") for k in range(4)]
    else:
        cls = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
        try:
            sets = [cls(a.data_dir, train=train, download=a.download) for train in (True, False)]
        except (RuntimeError, OSError) as e:                         # not there, damaged, or no network
            fail(f"{name} is not whole in {a.data_dir}: add --download, or --data-dir ({str(e).splitlines()[0]})")
        pairs = [(torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous().to(device),
                  torch.tensor(s.targets, device=device)) for s in sets]
        classes = sets[0].classes
    return *(Split(labels, a.image_size or 32, images=images) for images, labels in pairs), classes


# same text in: simclr_deepaug.py, vicreg_probe.py, topk_rescue.py
def to_unit(images: Tensor, size: int) -> Tensor:
    """uint8 [B, 3, H, W] -> float32 [B, 3, size, size] in 0..1: short side resized, centre cropped, if need be."""
    x = images.float() / 255
    if x.shape[-2:] != (size, size):
        x = v2.functional.center_crop(v2.functional.resize(x, [size], antialias=True), [size, size])
    return x


# same text in: simclr_deepaug.py, vicreg_probe.py, topk_rescue.py
def eval_batches(split: Split, a, device, limit: int = 0, batch_size: int = 512):
    """All pictures (or the first `limit`) in order, unaugmented: yields (float32 [B, 3, S, S], index [B])."""
    n = min(limit or len(split), len(split))
    if split.images is not None:
        for i in range(0, n, batch_size):
            stop = min(i + batch_size, n)
            yield to_unit(split.images[i:stop], split.size), torch.arange(i, stop, device=device)
    else:
        square = v2.Compose([v2.Resize(split.size, antialias=True), v2.CenterCrop(split.size)])
        for x, used, ok in decode(split, range(n), square, a, batch_size):
            yield to_unit(x[ok].to(device), split.size), used[ok].to(device)


# same text in: simclr_deepaug.py, vicreg_probe.py
def train_batches(split: Split, a, device, step: int, steps: int, rank: int, world: int):
    """Endless shuffled batches from step `step` on: (pictures uint8, labels or None) on the device.

    Pictures are [B, 3, H, W], or [B, 2, 3, S, S] when workers decoded and cropped them. The order of an epoch is a
    function of (seed, epoch), so a resumed run sees what an uninterrupted one sees. steps: steps of one epoch.
    """
    while True:
        epoch, first = divmod(step, steps)
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(a.seed * 100_003 + epoch))
        order = order[:steps * a.batch_size].view(steps, world, a.batch_size // world)[first:, rank]
        if split.images is not None:
            for index in order.to(device, non_blocking=True):        # the host does not wait
                yield split.images[index], None if split.labels is None else split.labels[index]
        else:
            crops = TwoCrops(split.size, a.crop_min)
            for x, used, _ in decode(split, order.flatten(), crops, a, order.shape[1], epoch):
                x, used = x.to(device, non_blocking=True), used.to(device, non_blocking=True)
                yield x, None if split.labels is None else split.labels[used]
        step += len(order)


# ----------------------------------------------------------------------------------------------------------------
# 3 Views: the whole batch at once on the device, every picture with parameters of its own
# ----------------------------------------------------------------------------------------------------------------

# same text in: simclr_deepaug.py, vicreg_probe.py, topk_rescue.py
def crop_boxes(n: int, height: int, width: int, scale, device) -> tuple[Tensor, ...]:
    """(top, left, h, w), each float [n]: torchvision's RandomResizedCrop.get_params, ten tries drawn at once."""
    area = torch.empty(n, 10, device=device).uniform_(*scale) * height * width
    ratio = torch.empty(n, 10, device=device).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first, found = fits.int().argmax(1, keepdim=True), fits.any(1)   # the first try that fits, if one does;
    central_w, central_h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))   # else a central crop
    w = torch.where(found, w.gather(1, first)[:, 0], central_w)
    h = torch.where(found, h.gather(1, first)[:, 0], central_h)
    top = torch.where(found, (torch.rand(n, device=device) * (height - h + 1)).floor(), (height - central_h) // 2)
    left = torch.where(found, (torch.rand(n, device=device) * (width - w + 1)).floor(), (width - central_w) // 2)
    return top, left, h, w


# same text in: simclr_deepaug.py, vicreg_probe.py, topk_rescue.py
def resize_matrix(start: Tensor, length: Tensor, size: int, out: int, flip: Tensor) -> Tensor:
    """[n, out, size]: rows that resample pixels start..start+length of a line to `out` pixels, reversed where `flip`.

    A triangle filter as wide as the shrink factor: torchvision's antialiased bilinear resize of the cropped line.
    """
    scale, begin = (length / out).view(-1, 1, 1), start.view(-1, 1, 1)
    source, target = torch.arange(size, device=start.device), torch.arange(out, device=start.device)
    target = torch.where(flip.view(-1, 1), out - 1 - target, target).unsqueeze(2)             # [n, out, 1]
    distance = (source + 0.5 - begin - (target + 0.5) * scale).abs()                          # [n, out, size]
    weight = (1 - distance / scale.clamp(min=1)).clamp(min=0)
    weight = weight * ((source >= begin) & (source < begin + length.view(-1, 1, 1)))          # within the crop only
    return weight / weight.sum(-1, keepdim=True)


# same text in: simclr_deepaug.py, vicreg_probe.py, topk_rescue.py
def gray(x: Tensor) -> Tensor:
    """[n, 3, H, W] -> [n, 1, H, W], ITU-R 601 luma as torchvision."""
    return (0.2989 * x[:, 0:1]).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:3], alpha=0.114)


# same text in: simclr_deepaug.py, vicreg_probe.py, topk_rescue.py
def brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp_(0, 1)


# same text in: simclr_deepaug.py, vicreg_probe.py, topk_rescue.py
def contrast(x: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(gray(x).mean((1, 2, 3), keepdim=True), x, factor).clamp_(0, 1)


# same text in: simclr_deepaug.py, vicreg_probe.py, topk_rescue.py
def saturation(x: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(gray(x), x, factor).clamp_(0, 1)


# same text in: simclr_deepaug.py, vicreg_probe.py, topk_rescue.py
def hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by shift (in turns, [n, 1, 1, 1]) in HSV. A channel's share of the chroma is clamp(2 - d, 0, 1), d
    its distance on the colour circle, in sixths of a turn, from its own hue (red 0, green 2, blue 4)."""
    r, g, b = x.unbind(1)
    value, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = value - low
    red = (value == r).float()                                       # masks as numbers: on the CPU a product takes a
    green = (value == g).float().mul_(1 - red)                       # tenth of the time of torch.where
    h = torch.addcmul(red * (g - b), green, (b - r).add_(chroma, alpha=2))
    h.addcmul_(1 - red - green, (r - g).add_(chroma, alpha=4)).div_(chroma + 1e-20).add_(6 * shift[:, 0])
    d = h.unsqueeze(1) - 2 * torch.arange(3, device=x.device).view(1, 3, 1, 1)                # [n, 3, H, W]
    d.sub_((d / 6).round_(), alpha=6).abs_()                         # the shorter way around the circle, 0..3
    return torch.addcmul(low.unsqueeze(1), chroma.unsqueeze(1), d.neg_().add_(2).clamp_(0, 1))


# same text in: simclr_deepaug.py, vicreg_probe.py, topk_rescue.py
def blur_matrix(sigma: Tensor, size: int, kernel: int) -> Tensor:
    """[n, size, size]: Gaussian blur of a line with reflected borders; sigma [n]; sigma = 0 gives the identity."""
    offset = torch.arange(kernel, device=sigma.device) - kernel // 2
    weight = torch.exp(-0.5 * (offset / sigma.clamp(min=1e-3).unsqueeze(1)) ** 2)             # [n, kernel]
    weight = weight / weight.sum(1, keepdim=True)
    reach = (torch.arange(size, device=sigma.device).view(-1, 1) + offset).abs()              # [size, kernel]
    reach = (size - 1) - ((size - 1) - reach).abs()                  # reflect without repeating the border pixel
    return torch.einsum("nk,ikj->nij", weight, F.one_hot(reach, size).float())


# same text in: simclr_deepaug.py, vicreg_probe.py, topk_rescue.py
def make_views(images: Tensor, size: int, crop_min=0.2, blur=0.0, solarize=0.0, strength=(0.4, 0.4, 0.4, 0.1),
               kernel=0, crop_max=1.0) -> Tensor:
    """One random SimCLR view of every picture: uint8 [n, 3, H, W] -> float32 [n, 3, size, size] in 0..1.

    SupContrast main_supcon.py:146: random resized crop (scale crop_min..crop_max), flip, colour jitter (strength: of
    brightness, contrast, saturation, hue) with probability .8, grayscale .2, no blur. crop_min = 0: the pictures are
    crops already, so neither crop nor flip. kernel: side of the blur's window in pixels; 0: a tenth of the picture.
    """
    n, _, height, width = images.shape
    device = images.device

    def chance(p):
        return torch.rand(n, 1, 1, 1, device=device) < p

    x = images.float() / 255
    if crop_min > 0:
        top, left, h, w = crop_boxes(n, height, width, (crop_min, crop_max), device)
        never = torch.zeros(n, dtype=torch.bool, device=device)
        down = resize_matrix(top, h, height, size, never)                                     # [n, size, H]
        across = resize_matrix(left, w, width, size, torch.rand(n, device=device) < 0.5)      # [n, size, W]
        x = down.unsqueeze(1) @ x @ across.unsqueeze(1).mT           # crop, resize and flip: two matrix products
    jitter = chance(0.8)

    def factor(reach, neutral):                                      # a factor per picture; neutral = leave it alone
        drawn = torch.empty(n, 1, 1, 1, device=device).uniform_(neutral - reach, neutral + reach)
        return torch.where(jitter, drawn, neutral)

    for op in torch.randperm(4).tolist():                            # one order a batch, drawn on the host
        x = (brightness, contrast, saturation, hue)[op](x, factor(strength[op], float(op < 3)))
    x = torch.lerp(x, gray(x), chance(0.2).float())
    if blur > 0:                                                     # SimCLR App. A: sigma .1-2, kernel side/10
        sigma = torch.empty(n, 1, 1, 1, device=device).uniform_(0.1, 2.0)
        window = min(kernel or max(3, size // 10 | 1), 2 * size - 1)
        m = blur_matrix(torch.where(chance(blur), sigma, 0.0).flatten(), size, window).unsqueeze(1)
        x = m @ x @ m.mT
    if solarize > 0:
        x = torch.where(chance(solarize) & (x >= 0.5), 1 - x, x)
    return x


def two_views(images: Tensor, split: Split, a) -> Tensor:
    """A batch from train_batches -> both views, float32 [2B, 3, S, S]: first views, then second views."""
    if images.ndim == 5:                                             # [B, 2, 3, S, S]: cropped by the workers
        return make_views(images.transpose(0, 1).flatten(0, 1), split.size, 0, a.blur, a.solarize)
    return make_views(images.repeat(2, 1, 1, 1), split.size, a.crop_min, a.blur, a.solarize)


# ----------------------------------------------------------------------------------------------------------------
# 4 Network: torchvision's ResNets, cut into the layers of Figure 2
# ----------------------------------------------------------------------------------------------------------------

# same text in: simclr_deepaug.py, vicreg_probe.py, topk_rescue.py
class Normalize(nn.Module):
    """Layer -1: pictures in 0..1 -> (x - mean) / std per channel, in channels_last."""
    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", mean.view(3, 1, 1))
        self.register_buffer("std", std.view(3, 1, 1))

    def forward(self, x):
        return ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)


# same text in: simclr_deepaug.py, vicreg_probe.py, topk_rescue.py
def block_outputs(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """A torchvision residual block, opened: (residual before the addition, output after it and the ReLU).

    Grigg et al. call them the odd and the even representation (App. A.1). The block's own forward adds in place.
    """
    odd = block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x)))))
    if hasattr(block, "conv3"):                                      # Bottleneck
        odd = block.bn3(block.conv3(block.relu(odd)))
    return odd, F.relu(odd + (x if block.downsample is None else block.downsample(x)))


class Net(nn.Module):
    """Encoder and head as the numbered layers -1..6 of Figure 2, with Deep Augmentation between them.

    forward(images [B, 3, S, S] in 0..1, rows bool [B] or None) -> head output [B, 128] (or class logits).
    classes > 0 puts a linear classifier in place of the projection head (--objective supervised).
    """
    def __init__(self, a, size: int, mean: Tensor, std: Tensor, classes: int = 0):
        super().__init__()
        if a.arch == "small":                                        # one block a stage, 16-128 channels, for laptops
            conv1, bn1, pool = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.Identity()
            stages = [nn.Sequential(BasicBlock(16, 16))]
            for c in (16, 32, 64):
                shortcut = nn.Sequential(nn.Conv2d(c, 2 * c, 1, 2, bias=False), nn.BatchNorm2d(2 * c))
                stages.append(nn.Sequential(BasicBlock(c, 2 * c, 2, shortcut)))
            dim = 128
        else:
            r = getattr(torchvision.models, a.arch)(weights=None)
            conv1, bn1, pool, dim = r.conv1, r.bn1, r.maxpool, r.fc.in_features
            stages = [r.layer1, r.layer2, r.layer3, r.layer4]
            if size < 64:                                            # SupContrast resnet_big.py: 3x3 stem, no maxpool
                conv1, pool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
        for m in [conv1] + stages:
            for conv in m.modules():
                if isinstance(conv, nn.Conv2d):                      # torchvision's initialisation
                    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        if classes:
            head = nn.Sequential(nn.Linear(dim, classes))
        else:                                                        # SupContrast resnet_big.py:174: ReLU, no BN
            hidden = [m for _ in range(a.head_layers - 1) for m in (nn.Linear(dim, dim), nn.ReLU())]
            head = nn.Sequential(*hidden, nn.Linear(dim, 128))
        self.layers = nn.ModuleDict({
            "input": Normalize(mean, std),                                                    # layer -1
            "stem": nn.Sequential(OrderedDict(conv1=conv1, bn1=bn1, relu=nn.ReLU(), pool=pool)),    # 0
            "layer1": stages[0], "layer2": stages[1], "layer3": stages[2], "layer4": stages[3],     # 1-4
            "avgpool": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),                  # 5, [B, dim]
            "head": head})                                                                    # 6, [B, 128]
        self.targets, self.augmentation = a.targets or [], (a.rate, a.stop_grad, a.transform, a.components)
        self.dim = dim

    def forward(self, images, rows=None):
        h = images
        for l, layer in enumerate(self.layers.values(), start=-1):
            h = layer(h)
            if self.training and l in self.targets:
                h = deep_augment(h, rows, *self.augmentation)
        return h

    def features(self, images):
        """The representation that is kept: layer 5, [B, dim]."""
        for layer in list(self.layers.values())[:-1]:
            images = layer(images)
        return images

    def activations(self, images) -> dict:
        """Every named layer's output: stem, layerS.B.odd and .even, avgpool, head.0 ... head."""
        h, out = self.layers["stem"](self.layers["input"](images)), {}
        out["stem"] = h
        for s in (1, 2, 3, 4):
            for b, block in enumerate(self.layers[f"layer{s}"]):
                out[f"layer{s}.{b}.odd"], h = block_outputs(block, h)
                out[f"layer{s}.{b}.even"] = h
        out["avgpool"] = h = self.layers["avgpool"](h)
        for i, m in enumerate(self.layers["head"]):
            h = m(h)
            out["head" if i == len(self.layers["head"]) - 1 else f"head.{i}"] = h
        return out

    def numbered(self) -> dict:
        """{name in activations(): the layer's number in Figure 2} for layers 0-6."""
        last = {f"layer{s}.{len(self.layers[f'layer{s}']) - 1}.even": s for s in (1, 2, 3, 4)}
        return {"stem": 0, **last, "avgpool": 5, "head": 6}


# same text in: simclr_deepaug.py, topk_rescue.py
def pixel_statistics(split: Split) -> tuple[Tensor, Tensor]:
    """(mean, std) of each channel over the training pictures, in 0..1."""
    if split.images is None:                                         # ImageNet's, as torchvision's pretrained networks
        return torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    sums = torch.zeros(2, 3, dtype=torch.float64, device=split.images.device)
    for x in split.images.split(1024):
        x = x.double() / 255
        sums += torch.stack([x.mean((2, 3)), x.square().mean((2, 3))]).sum(1)
    mean, square = (sums / len(split)).float().cpu()
    return mean, (square - mean ** 2).clamp(min=1e-6).sqrt()         # a channel may be constant


def build(a, split: Split, classes: list, device) -> Net:
    """The network of these flags with the weights of this seed."""
    mean, std = pixel_statistics(split)
    torch.manual_seed(a.seed)
    net = Net(a, split.size, mean, std, len(classes) if a.objective == "supervised" else 0)
    return net.to(device, memory_format=torch.channels_last)


# ----------------------------------------------------------------------------------------------------------------
# 5 Deep Augmentation
# ----------------------------------------------------------------------------------------------------------------

# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
def deep_augment(h: Tensor, rows: Tensor, rate: float, stop_grad: bool, transform: str = "dropout",
                 components: int = 1) -> Tensor:
    """A(h) on the chosen rows, h on the others (Eq. 2; Section 3.2 of the paper). Call it in training only.

    h: hidden states [B, ...]; rows: bool [B]; rate in [0, 1).
    stop_grad: the chosen rows are detached, so they send no gradient to the layers below; those above get it all.
    transform "dropout": inverted dropout of single elements, E[A(h)] = h. "channel": of whole channels ([B, C, H, W])
    or features over all tokens ([B, L, C]). "pca": see remove_components; `rate` is not used.
    No indexing and no host sync (but pca): it costs one pass over h and compiles.
    """
    x = h.detach() if stop_grad else h
    if transform == "dropout":
        x = F.dropout(x, rate)
    elif transform == "channel":
        one = x[..., :1, :1] if x.ndim == 4 else x[:, :1] if x.ndim == 3 else x    # [B, C, 1, 1], [B, 1, C], [B, C]
        x = x * F.dropout(torch.ones_like(one), rate)
    else:
        x = remove_components(x, components)
    return torch.where(rows.view(-1, *[1] * (h.ndim - 1)), x, h)


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
def remove_components(h: Tensor, components: int) -> Tensor:
    """h [B, ...] without its projection on the batch's `components` leading principal directions; the mean stays.

    The authors' PCA variant (their transformers fork, modeling_bert.py:531): the whole batch, flattened to [B, D]
    and centred, gets a randomised PCA of 6 components, fitted without gradient in float32. Cost: six products of
    [B, D] with [D, 6] (two power iterations) and small factorisations, for which CUDA makes the host wait.
    """
    with torch.autocast(h.device.type, enabled=False):
        flat = h.float().flatten(1)                                                           # [B, D]
        with torch.no_grad():
            mean = flat.mean(0)
            _, _, v = torch.pca_lowrank(flat, q=min(max(6, components), *flat.shape))
            v = v[:, :components]                                                             # [D, K], orthonormal
        return (h - ((flat - mean) @ v @ v.T).view_as(h)).to(h.dtype)


def draw_rows(batch: int, a, device) -> Tensor:
    """Which of the 2B rows are augmented, bool [2B]: each with probability --sample, once a batch over both views.

    --pairs cross: exactly one of each pair, so every pair is one clean and one augmented view (Fig. 30, 31).
    """
    if a.pairs == "cross":
        first = torch.rand(batch, device=device) < 0.5
        return torch.cat([first, ~first])
    return torch.rand(2 * batch, device=device) < a.sample


def frozen_layers(a) -> tuple[list, list]:
    """(layers whose weights stay, those of them whose BatchNorm statistics stay too), by number."""
    if a.freeze == "before":
        layers = [l for l in LAYERS if l <= max(a.targets)]
    elif a.freeze == "after":
        layers = [l for l in LAYERS if l > min(a.targets)]
    elif a.targets and a.stop_grad and a.sample == 1:                # Fig. 13: nothing reaches the layers below, not
        return [l for l in LAYERS if l <= max(a.targets)], []        # even weight decay; their statistics still run
    else:
        layers = []
    return layers, layers


# ----------------------------------------------------------------------------------------------------------------
# 6 Loss
# ----------------------------------------------------------------------------------------------------------------

# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
class Gather(torch.autograd.Function):
    """The rows of all processes [B, d] -> [world * B, d]; a row's gradient is the sum of what all processes send it."""
    @staticmethod
    def forward(ctx, z):
        parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, z.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
def gather(z: Tensor) -> Tensor:
    return Gather.apply(z) if dist.is_initialized() else z


# same text in: simclr_deepaug.py, vicreg_probe.py, topk_rescue.py
def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """NT-Xent (SimCLR; Eq. 1 with the 2N-2 negatives of SimCLR's code) as one plain cross-entropy.

    z1, z2: [B, d], row i of each a view of picture i; normalised here, in float32. Each of the 2N views must pick its
    partner among the 2N-1 others. With several processes every one takes its own 2B rows as anchors and everybody's
    rows as candidates, so the mean over processes (DistributedDataParallel takes it) is the loss of the whole batch.
    """
    z1, z2 = F.normalize(z1.float(), dim=1), F.normalize(z2.float(), dim=1)
    candidates = torch.cat([gather(z1), gather(z2)])                                          # [2N, d]
    n, b = len(candidates) // 2, len(z1)
    logits = torch.cat([z1, z2]) @ candidates.T / temperature                                 # [2B, 2N]
    i = torch.arange(b, device=z1.device) + (dist.get_rank() * b if dist.is_initialized() else 0)
    itself, partner = torch.cat([i, i + n]), torch.cat([i + n, i])
    return F.cross_entropy(logits.scatter(1, itself.unsqueeze(1), float("-inf")), partner)


# ----------------------------------------------------------------------------------------------------------------
# 7 Training
# ----------------------------------------------------------------------------------------------------------------

# same text in: simclr_deepaug.py, vicreg_probe.py, topk_rescue.py
class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling, as facebookresearch/vicreg main_vicreg.py: every weight matrix's step is
    scaled by eta * |w| / |g + wd * w|; vectors (biases, BatchNorm) take plain SGD without weight decay."""
    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, eta=0.001):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, eta=eta))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = p.grad
                if p.ndim > 1:
                    g = g.add(p, alpha=group["weight_decay"])
                    w_norm, g_norm = p.norm(), g.norm()
                    trust = group["eta"] * w_norm / g_norm           # kept on the device: no host sync
                    g = g * torch.where((w_norm > 0) & (g_norm > 0), trust, 1.0)
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffer = self.state[p]["momentum_buffer"]
                buffer.mul_(group["momentum"]).add_(g)
                p.sub_(buffer, alpha=group["lr"])


# same text in: simclr_deepaug.py, vicreg_probe.py, topk_rescue.py
def learning_rate(step: int, a, steps: int) -> float:
    """Warm-up from lr/50 onto a cosine that ends at lr * .1^3 (SupContrast util.py). steps: steps of one epoch."""
    total = a.epochs * steps
    warm = min(a.warmup_epochs * steps, total // 10)
    floor = a.lr * 0.1 ** 3

    def cosine(t):
        return floor + (a.lr - floor) * (1 + math.cos(math.pi * t / total)) / 2

    if step < warm:
        return a.lr / 50 + (cosine(warm) - a.lr / 50) * step / warm
    return cosine(step)


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
def alignment(z1: Tensor, z2: Tensor) -> Tensor:
    """Mean squared distance of pairs, 0..4; z1 and z2 normalised [n, d] (Wang & Isola 2020, alpha = 2)."""
    return (z1 - z2).square().sum(1).mean()


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
def uniformity(z: Tensor) -> Tensor:
    """log of the mean of exp(-2 |zi - zj|^2) over pairs i < j, z normalised [n, d] (Wang & Isola 2020, t = 2): 0 if
    all are one point, about -4 if many points spread evenly over the sphere."""
    return torch.pdist(z).square().mul(-2).exp().mean().log()


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
@torch.no_grad()
def meters(z1: Tensor, z2: Tensor) -> dict:
    """Is it collapsing? From the two views' embeddings [B, d]:

    embedding_std   std over the batch of the normalised embedding times sqrt(d): 1 spread evenly, 0 collapsed
    effective_rank  exp of the entropy of the singular values (Roy & Vetterli 2007): 1 .. min(B - 1, d)
    alignment, uniformity   as above, of this batch; for both lower is better
    """
    z1, z2 = F.normalize(z1.float(), dim=1), F.normalize(z2.float(), dim=1)
    x = (z1 - z1.mean(0)).double()
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x               # eigenvalues s²: cheaper than an SVD
    s = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    s = s / s.sum().clamp(min=1e-12)
    return {"embedding_std": z1.std(0).mean().item() * z1.shape[1] ** 0.5,
            "effective_rank": torch.exp(-torch.xlogy(s, s).sum()).item(),
            "alignment": alignment(z1, z2).item(), "uniformity": uniformity(z1).item()}


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
@contextmanager
def written_whole(path: Path):
    """Write beside the target, then rename: a kill at any moment leaves the old file or the new one, whole."""
    beside = path.with_name(path.name + ".part")
    yield beside
    os.replace(beside, path)


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
def save_json(path: Path, content: dict) -> None:
    with written_whole(path) as part:
        part.write_text(json.dumps(content, indent=1, default=str))


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
def load_checkpoint(path: Path, device="cpu") -> dict:
    if not path.exists():
        fail(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        script, parts = state["script"], set(state) >= {"config", "data", "model", "optimizer", "step"}
    except Exception:                                                # a damaged file raises many kinds of errors
        fail(f"{path} is damaged or no checkpoint: remove it, or take another")
    if script != NAME:
        fail(f"{path} was written by {script}.py, not by this script")
    if not parts:
        fail(f"{path} is damaged: it lacks parts of a checkpoint")
    return state


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
class Interrupted(BaseException):
    """Ctrl-C or SIGTERM arrived; args[0] is the signal's number."""


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
def interrupt(number: int):
    raise Interrupted(number)


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
@contextmanager
def on_signals(handler):
    """Call handler(signal number) on Ctrl-C and SIGTERM; a second one ends the program at once."""
    if threading.current_thread() is not threading.main_thread():    # some notebooks: signals stay as they are
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)

    def first_time(number, frame):
        for n in numbers:
            signal.signal(n, signal.SIG_DFL)
        handler(number)

    before = [signal.signal(n, first_time) for n in numbers]
    try:
        yield
    finally:
        for n, old in zip(numbers, before):
            signal.signal(n, old)


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
def stops(stop: list, ask: bool, device) -> bool:
    """Has a signal arrived? Several processes must leave at the same step: they agree on it, only when `ask`ed."""
    if not dist.is_initialized():
        return bool(stop)
    if not ask:
        return False
    flag = torch.tensor(len(stop), device=device)
    dist.all_reduce(flag)
    return flag.item() > 0


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
def checkpoint_to_resume(a, out: Path, device) -> dict | None:
    """The run folder's checkpoint if it is this script's and was made with the same flags."""
    if not (out / "checkpoint.pt").exists():
        print(f"--resume: no checkpoint in {out} yet, so this run starts at the beginning")
        return None
    state = load_checkpoint(out / "checkpoint.pt", device)
    was = state["config"]
    changed = [f"--{k.replace('_', '-')} is {v}, was {was.get(k)}" for k, v in config_of(a).items() if v != was.get(k)]
    if changed:
        fail(f"--resume with other flags than the checkpoint's: {'; '.join(changed)}")
    return state


def train(a, net: Net, split: Split, out: Path, device, steps: int, after_epoch, state: dict | None) -> dict:
    """Train to the last epoch, from the start or from `state`. Every step reseeds from (seed, step, process): so no
    random state needs saving, a resumed run meets the same views and rows, and probes in between change nothing.
    steps: of one epoch; after_epoch(epoch): called every --probe-every epochs. Returns what was measured."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    no_gradient, no_statistics = frozen_layers(a)
    for l, layer in zip(LAYERS, net.layers.values()):
        layer.requires_grad_(l not in no_gradient)
    trained = [p for p in net.parameters() if p.requires_grad]
    if a.optimizer == "lars":
        optimizer = LARS(trained, a.lr, weight_decay=a.weight_decay)
    else:
        optimizer = torch.optim.SGD(trained, a.lr, momentum=0.9, weight_decay=a.weight_decay, fused=True)

    step, log, spent = 0, [], 0.0                                    # log: the rows of metrics.csv
    if state:
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, log, spent = state["step"], state["metrics"], state["seconds"]

    model = net
    if world > 1:
        if device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model = nn.parallel.DistributedDataParallel(model)
    if a.compile:
        model = torch.compile(model)

    def save():
        with written_whole(out / "metrics.csv") as part, open(part, "w", newline="") as f:
            writer = csv.DictWriter(f, log[0])
            writer.writeheader()
            writer.writerows(log)
        with written_whole(out / "checkpoint.pt") as part:
            torch.save({"script": NAME, "config": config_of(a), "data": len(split), "model": net.state_dict(),
                        "optimizer": optimizer.state_dict(), "step": step, "metrics": log, "source": SOURCE,
                        "seconds": spent + time.time() - begun}, part)

    def set_mode():
        net.train()
        for l, layer in zip(LAYERS, net.layers.values()):
            if l in no_statistics:
                layer.eval()

    total, last = a.epochs * steps, False
    losses, stop = [], []                                            # losses stay on the device until they are logged
    begun = saved = logged = time.time()
    bar = tqdm(total=total, initial=step, unit="step", disable=rank > 0, dynamic_ncols=True)
    batches = train_batches(split, a, device, step, steps, rank, world)
    set_mode()
    with on_signals(stop.append):                                    # Ctrl-C and SIGTERM wait for the end of a step
        while step < total and not last:
            lr = learning_rate(step, a, steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            images, labels = next(batches)
            torch.manual_seed(mix(a.seed, step, rank))               # fixes this step's views, rows and dropout
            views = two_views(images, split, a)                                               # [2B, 3, S, S]
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                z = model(views, draw_rows(len(images), a, device))                           # [2B, 128]
            if a.objective == "simclr":
                loss = nt_xent(*z.chunk(2), a.temperature)
            else:
                loss = F.cross_entropy(z.float(), labels.repeat(2))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            step += 1
            bar.update()

            probe_now = a.probe_every and step % (steps * a.probe_every) == 0
            last = step == total or stops(stop, step % a.log_every == 0, device)
            save_now = last or probe_now or time.time() - saved > a.save_every
            if step % a.log_every == 0 or save_now:
                values, now = torch.stack(losses).tolist(), time.time()                       # the one wait
                for i, value in enumerate(values):
                    if not math.isfinite(value):
                        fail(f"the loss is {value} at step {step - len(values) + i + 1}; any checkpoint before it is "
                             f"kept in {out}. A smaller --lr usually helps")
                log.append({"step": step, "epoch": step / steps, "loss": statistics.mean(values), "lr": lr,
                            "images_per_second": a.batch_size * len(values) / (now - logged),
                            **meters(*z.detach().chunk(2))})
                bar.set_postfix_str(f"loss {log[-1]['loss']:.3f}, {log[-1]['images_per_second']:.0f} images/s")
                losses, logged = [], now
                if probe_now and rank == 0:
                    after_epoch(step // steps)
                    set_mode()
                if save_now:
                    if rank == 0 and all(p.isfinite().all() for p in net.parameters()):
                        save()
                    logged = saved = time.time()                     # probing and saving are no part of the speed
    bar.close()
    if stop or step < total:
        raise Interrupted(stop[0] if stop else signal.SIGTERM)
    return {"seconds": spent + time.time() - begun, "steps": step, "epochs": a.epochs, "loss": log[-1]["loss"],
            "images_per_second": statistics.median(r["images_per_second"] for r in log),
            "lowest_embedding_std": min(r["embedding_std"] for r in log)}


# ----------------------------------------------------------------------------------------------------------------
# 8 Evaluation
# ----------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def encode(net: Net, split: Split, a, device) -> tuple[Tensor, Tensor | None]:
    """Frozen features of layer 5 on unaugmented pictures: (float32 [N, dim], labels [N] or None)."""
    net.eval()
    x, index = zip(*((net.features(images).float(), i) for images, i in eval_batches(split, a, device)))
    return torch.cat(x), None if split.labels is None else split.labels[torch.cat(index)]


# same text in: simclr_deepaug.py, vicreg_probe.py, topk_rescue.py
def fit_logistic(x: Tensor, y: Tensor, classes: int, decay: float, start=None, iterations=200) -> Tensor:
    """Minimise cross-entropy + decay/2 |W|^2 over W [D+1, C] by full-batch L-BFGS; x [n, D], last row is the bias."""
    w = torch.zeros(x.shape[1] + 1, classes, device=x.device) if start is None else start.clone()
    w.requires_grad_()
    solver = torch.optim.LBFGS([w], max_iter=iterations, history_size=10, line_search_fn="strong_wolfe")

    def objective():
        solver.zero_grad()
        value = F.cross_entropy(torch.addmm(w[-1], x, w[:-1]), y) + decay / 2 * w[:-1].square().sum()
        value.backward()
        return value

    solver.step(objective)
    return w.detach()


# same text in: simclr_deepaug.py, vicreg_probe.py, topk_rescue.py
def probe_logits(x: Tensor, y: Tensor, x_test: Tensor, classes: int) -> tuple[Tensor, float]:
    """Logistic regression on frozen features: (logits of the test pictures [N_test, classes], the decay chosen).

    Features are standardised by the training set. The decay is chosen on a tenth of (at most 10,000) training
    pictures that the fit does not see.
    """
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    x, x_test = (x - mean) / std, (x_test - mean) / std
    some = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:10_000].to(x.device)
    held, rest = some[:max(1, len(some) // 10)], some[max(1, len(some) // 10):]
    w, best = None, (-1.0, 0.0)
    for decay in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):                     # strong to weak, each starts from the last
        w = fit_logistic(x[rest], y[rest], classes, decay, w, 60)
        correct = (torch.addmm(w[-1], x[held], w[:-1]).argmax(1) == y[held]).float().mean().item()
        best = max(best, (correct, decay))
    w = fit_logistic(x, y, classes, best[1])
    return torch.addmm(w[-1], x_test, w[:-1]), best[1]


# same text in: simclr_deepaug.py, vicreg_probe.py, topk_rescue.py
def linear_probe(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, classes: int) -> dict:
    """{"linear": test accuracy in % of a logistic regression on frozen features, "linear_decay": what was chosen}.
    The test set is used once."""
    logits, decay = probe_logits(x, y, x_test, classes)
    return {"linear": 100 * (logits.argmax(1) == y_test).float().mean().item(), "linear_decay": decay}


# same text in: simclr_deepaug.py, vicreg_probe.py, topk_rescue.py
def weighted_knn(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, classes: int, k=200, t=0.1) -> float:
    """Test accuracy in %: the k nearest training features by cosine vote with weight exp(cosine / t) (Wu et al. 2018;
    k and t as lightly's published table)."""
    x, x_test = F.normalize(x, dim=1), F.normalize(x_test, dim=1)
    correct = torch.zeros((), device=x.device)
    for q, target in zip(x_test.split(1024), y_test.split(1024)):
        cosine, index = (q @ x.T).topk(min(k, len(x)), dim=1)                                 # [q, k]
        votes = torch.zeros(len(q), classes, device=x.device).scatter_add_(1, y[index], (cosine / t).exp())
        correct += (votes.argmax(1) == target).sum()
    return 100 * correct.item() / len(x_test)


@torch.no_grad()
def view_quality(net: Net, split: Split, a, device, limit=2048) -> tuple[float, float]:
    """(alignment, uniformity) of the head's normalised output under SimCLR's views, without Deep Augmentation, in
    eval mode (Section 6.2, Fig. 11), over the first `limit` pictures. Every call draws the same views."""
    net.eval()
    torch.manual_seed(0)
    z = []
    for images, _ in eval_batches(split, a, device, limit):
        z.append(net(two_views((images * 255).round().to(torch.uint8), split, a)).float().view(2, len(images), -1))
    z1, z2 = F.normalize(torch.cat(z, dim=1), dim=2)
    return alignment(z1, z2).item(), uniformity(z1).item()


def probe(net: Net, train_split: Split, test_split: Split, classes: list, a, device) -> dict:
    """Everything measured on a frozen network, as flat numbers: linear and kNN in %, alignment, uniformity."""
    result = {}
    if train_split.labels is not None:
        data = *encode(net, train_split, a, device), *encode(net, test_split, a, device), len(classes)
        result = {**linear_probe(*data), "knn": weighted_knn(*data)}
    if a.objective == "simclr":
        for name, split in (("train", train_split), ("test", test_split)):
            result[f"alignment_{name}"], result[f"uniformity_{name}"] = view_quality(net, split, a, device)
    return result


# same text in: simclr_deepaug.py, vicreg_probe.py, topk_rescue.py
def some_pictures(split: Split, a, device) -> tuple[Tensor, Tensor]:
    """(float32 [n, 3, S, S], index [n]): the first pictures, at most 2,048 and at most 64 MiB as bytes."""
    limit = max(4, min(2048, (64 << 20) // (3 * split.size ** 2)))
    images, index = zip(*eval_batches(split, a, device, limit))
    return torch.cat(images), torch.cat(index)


# same text in: simclr_deepaug.py, vicreg_probe.py, topk_rescue.py
@torch.no_grad()
def layer_map(net: Net, split: Split, a, device) -> Tensor:
    """Linear CKA between the numbered layers from 0 on, on unaugmented pictures, float64 [L, L] (Section 6.1 of the
    Deep Augmentation paper). ValueError: fewer than 4 pictures."""
    from cka import cka_map
    net.eval()
    acts = ([net.activations(x)[n] for n in net.numbered()] for x in some_pictures(split, a, device)[0].split(256))
    return cka_map((h, h) for h in acts)                             # the network beside itself


# same text in: simclr_deepaug.py, vicreg_probe.py, topk_rescue.py
def auto_layer(net: Net, split: Split, a, device) -> int:
    """Where the co-adapted stretch of layers starts (with stop-gradient) or ends (without): Section 6.1."""
    from cka import coadapted_stretch
    try:
        start, end = coadapted_stretch(layer_map(net, split, a, device))
    except ValueError as e:
        fail(f"--layer auto: {e}")
    print(f"--layer auto: layers {start}-{end} are co-adapted, so layer {start if a.stop_grad else end}")
    return start if a.stop_grad else end


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
def save_figure(figure, path: Path) -> None:
    figure.tight_layout()
    with written_whole(path) as part:
        figure.savefig(part, format="png", dpi=110)


def draw_figures(a, net: Net, split: Split, out: Path, device, report: dict, probes: dict) -> None:
    """views.png: pictures and what the network is shown of them; curves.png: the run; cka.png: the map of layers."""
    torch.manual_seed(0)
    images = next(eval_batches(split, a, device, 12))[0]
    views = two_views((images * 255).round().to(torch.uint8), split, a)
    grid = torchvision.utils.make_grid(torch.cat([images, views]).cpu(), nrow=len(images), padding=2)
    figure = Figure((11, 3.2))
    axis = figure.subplots()
    axis.imshow(grid.permute(1, 2, 0).clamp(0, 1).numpy())           # rounding can leave 0..1 by 1e-7
    axis.set(title="pictures, and two views of each", xticks=[], yticks=[])
    save_figure(figure, out / "views.png")

    with open(out / "metrics.csv") as f:
        log = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]
    figure = Figure((12, 6))
    *axes, last = figure.subplots(2, 3).flat
    for axis, key in zip(axes, ["loss", "alignment", "uniformity", "effective_rank", "embedding_std"]):
        axis.plot([row["epoch"] for row in log], [row[key] for row in log])
        axis.set(title=key.replace("_", " "), xlabel="epoch")
    if probes and "linear" in report:
        last.plot([int(epoch) for epoch in probes], [r["linear"] for r in probes.values()], "o-")
        last.set(title="linear probe, test %", xlabel="epoch")
    else:
        keys = [k for k in ("linear_untrained", "linear", "knn_untrained", "knn") if k in report]
        last.bar([k.replace("_", "\n") for k in keys], [report[k] for k in keys],
                 color=["tab:blue" if "un" in k else "tab:orange" for k in keys])
        last.set(title="probes of the frozen features, test %")
    figure.suptitle(out.name)
    save_figure(figure, out / "curves.png")

    try:
        from cka import coadapted_stretch, draw_map
        layers = layer_map(net, split, a, device)
        draw_map(layers, out / "cka.png", [f"{i} {LAYERS[i]}" for i in range(7)], stretch=coadapted_stretch(layers),
                 targets=[t for t in a.targets if t >= 0], title=out.name)
    except (ImportError, ValueError) as e:                           # no cka.py beside this script; too few pictures
        print(f"no map of the layers: {e}")


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
def mean_std(values: list) -> tuple[float, float | None]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
def pm(value: tuple[float, float | None]) -> str:
    return f"{value[0]:.2f}" + ("" if value[1] is None else f" ± {value[1]:.2f}")


def compare(runs: list) -> dict:
    """One table of finished runs, seeds pooled, and compare.png: accuracy by layer as in Figure 4."""
    groups = {}                                                      # {flags but the seed: {seed: report}}
    for folder in runs:
        path = Path(folder) / "report.json"
        r = json.loads(path.read_text()) if path.exists() else {}
        if r.get("script") != NAME or "linear" not in r:
            print(f"{folder}: left out, no finished and probed run of this script")
            continue
        r["run"] = re.sub(r"[-/]s\d+$", "", str(folder))
        key = tuple(sorted((k, str(v)) for k, v in r["flags"].items() if k != "seed"))
        if groups.setdefault(key, {}).setdefault(r["flags"]["seed"], r) is not r:
            print(f"{folder}: left out, this seed of the same flags is counted already")
    if not groups:
        fail("--compare: none of these folders holds a finished, probed run of this script")
    values = {k: {v for key in groups for kk, v in key if kk == k} for k, _ in next(iter(groups))}
    varying = [k for k, v in values.items() if len(v) > 1 and k not in ("layer", "stop_grad")]
    print(f"{'layer':>6} {'stop':>5} {'rate':>5} {'epochs':>6} {'seeds':>5} {'linear %':>14} {'kNN %':>14} "
          f"{'untrained %':>12}  run")
    table, lines = {}, {}                                            # lines: {label: [(layer, mean, std)]}
    for by_seed in groups.values():
        rs = list(by_seed.values())
        f, name, targets = rs[0]["flags"], rs[0]["run"], rs[0]["layers_augmented"]
        linear, knn = mean_std([r["linear"] for r in rs]), mean_std([r["knn"] for r in rs])
        untrained = statistics.mean(r["linear_untrained"] for r in rs)
        table[name] = {"linear": linear, "knn": knn, "linear_untrained": untrained, "seeds": len(rs)}
        print(f"{','.join(map(str, targets)) or 'none':>6} {'yes' if f['stop_grad'] else 'no':>5} {f['rate']:5} "
              f"{f['epochs']:6} {len(rs):5} {pm(linear):>14} {pm(knn):>14} {untrained:12.2f}  {name}")
        if len(targets) < 2:
            label = f"{'with' if f['stop_grad'] else 'without'} stop-gradient" if targets else "no Deep Augmentation"
            label = ", ".join([label, *(f"{k} {f.get(k)}" for k in varying)])
            lines.setdefault(label, []).append(((targets or [None])[0], *linear))
    figure = Figure((7, 4.5))
    axis = figure.subplots()
    for i, (label, points) in enumerate(sorted(lines.items())):
        layer, mean, std = zip(*sorted(points))
        if layer[0] is None:                                         # the baseline: a line across
            axis.axhline(mean[0], color=f"C{i}", linestyle="--", label=label)
        else:
            axis.errorbar(layer, mean, [s or 0 for s in std], color=f"C{i}", fmt="o-", capsize=3, label=label)
    axis.set(xlabel="layer of Deep Augmentation", ylabel="linear probe, test accuracy %", xticks=list(LAYERS))
    axis.legend()
    path = Path(runs[0]).parent / "compare.png"
    save_figure(figure, path)
    print(f"drawn: {path}")
    return table


# ----------------------------------------------------------------------------------------------------------------
# 9 Export
# ----------------------------------------------------------------------------------------------------------------

# same text in: simclr_deepaug.py, vicreg_probe.py, topk_rescue.py
class Encoder(nn.Module):
    """What leaves this script: pictures float32 [B, 3, H, W] in 0..1 -> features [B, dim]; no Deep Augmentation."""
    def __init__(self, net: Net):
        super().__init__()
        self.net = net

    def forward(self, images):
        return self.net.features(images)

    def activations(self, images):
        return list(self.net.activations(images).values())


def export(a, net: Net, split: Split, classes: list, out: Path, report: dict) -> float:
    """Write encoder.pt (TorchScript), weights.safetensors (torchvision's keys) and samples.npz; read the encoder back.

    Returns the largest difference between the file's encoder and the live one, relative to the largest activation,
    over forward and activations at batches 1, 7 and 64. Above 1e-4 it is an error.
    """
    live = Net(a, split.size, torch.zeros(3), torch.ones(3), len(classes) if a.objective == "supervised" else 0)
    live.load_state_dict(net.state_dict())                           # a copy on the CPU: traces bake the device in
    live.eval()
    encoder, example = Encoder(live).eval(), torch.rand(2, 3, split.size, split.size)
    config = {"script": NAME, "layers": list(live.activations(example)), "layer_numbers": live.numbered(),
              "image_size": split.size, "dim": live.dim, "dataset": a.dataset, "classes": classes,
              "flags": config_of(a), "measurements": report}
    with torch.no_grad(), warnings.catch_warnings(), written_whole(out / "encoder.pt") as part:
        warnings.filterwarnings("ignore", message=".*torch.jit|Encountering a list", category=Warning)
        traced = torch.jit.trace_module(encoder, {"forward": example, "activations": example})
        torch.jit.save(traced, str(part), _extra_files={"config.json": json.dumps(config, default=str)})
        loaded = torch.jit.load(str(part))
        worst = 0.0
        for batch in (1, 7, 64):
            x = torch.rand(batch, 3, split.size, split.size)
            for ours, theirs in zip([encoder(x), *encoder.activations(x)], [loaded(x), *loaded.activations(x)]):
                worst = max(worst, ((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-6)).item())
        if not worst <= 1e-4:
            raise RuntimeError(f"the exported encoder differs from the live one by {worst:.2g}")
    if a.export == "pt2":
        with written_whole(out / "encoder.pt2") as part:
            batch = torch.export.Dim("batch", min=1)
            program = torch.export.export(encoder, (example,), dynamic_shapes={"images": {0: batch}})
            buffer = io.BytesIO()
            torch.export.save(program, buffer)
            part.write_bytes(buffer.getvalue())
    weights = {k.removeprefix("layers.").removeprefix("stem."): v.contiguous() for k, v in live.state_dict().items()
               if not k.startswith(("layers.head", "layers.input"))}
    with written_whole(out / "weights.safetensors") as part:
        save_file(weights, part)
    images, index = some_pictures(split, a, next(net.parameters()).device)                    # for cka.py
    labels = torch.full((len(index),), -1) if split.labels is None else split.labels[index].cpu()
    with written_whole(out / "samples.npz") as part, open(part, "wb") as f:
        np.savez(f, images=(images * 255).round().to(torch.uint8).cpu().numpy(), labels=labels.numpy())
    return worst


# ----------------------------------------------------------------------------------------------------------------
# main
# ----------------------------------------------------------------------------------------------------------------

def run(a) -> dict:
    """One seed from data to report. Returns the report (report.json)."""
    if a.device == "auto":
        a.device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(a.device, int(os.environ.get("LOCAL_RANK", 0)) if a.device == "cuda" else None)
    chief = not dist.is_initialized() or dist.get_rank() == 0
    world = dist.get_world_size() if dist.is_initialized() else 1
    if a.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not a.deterministic
    torch.backends.cudnn.allow_tf32 = False                          # what is not under autocast is float32
    out = Path(a.out or f"runs/{a.name}-s{a.seed}")
    state = checkpoint_to_resume(a, out, device) if a.resume else None

    train_split, test_split, classes = load_data(a.dataset, a, device)
    if a.batch_size > len(train_split):
        fail(f"--batch-size {a.batch_size} is more than the {len(train_split)} training pictures")
    if state and state["data"] != len(train_split):
        fail(f"--resume with other pictures: the run had {state['data']}, {a.data_dir} has {len(train_split)}")
    if a.objective == "supervised" and train_split.labels is None:
        fail("--objective supervised needs labels: class folders")
    others = {name: load_data(name, a, device) for name in a.transfer}
    steps = len(train_split) // a.batch_size                         # of one epoch; the ragged rest is dropped
    net = build(a, train_split, classes, device)
    untrained = {k: v.cpu().clone() for k, v in net.state_dict().items()}
    if a.init:
        path = Path(a.init) / "checkpoint.pt" if Path(a.init).is_dir() else Path(a.init)
        try:
            net.load_state_dict(load_checkpoint(path)["model"])
        except RuntimeError:
            fail(f"--init {a.init}: its network has other sizes; give the flags it was trained with (--arch, ...)")
    if a.targets is None:
        a.targets = net.targets = [auto_layer(net, train_split, a, device)]
    if set(frozen_layers(a)[0]) >= set(range(7)):
        fail(f"--layer {' '.join(a.layer)} with these flags freezes every layer: nothing is left to train")

    if chief and not a.resume:
        if out.exists():                                             # nothing is lost: the older run moves aside
            older = next(p for i in range(1, 10**6) if not (p := out.with_name(f"{out.name}.{i}")).exists())
            out.rename(older)
            print(f"{out} was there: moved to {older}")
    if chief:
        out.mkdir(parents=True, exist_ok=True)
        save_json(out / "config.json", {
            **vars(a), "python": sys.version, "torch": torch.__version__, "torchvision": torchvision.__version__,
            "device_name": torch.cuda.get_device_name() if a.device == "cuda" else f"{torch.get_num_threads()} threads",
            "processes": world, "script_sha256": hashlib.sha256(SOURCE.encode()).hexdigest()})
        print(f"{out}: {len(train_split)} pictures, {steps} steps an epoch, augmented layers {a.targets or 'none'}")

    data = train_split, test_split, classes, a, device
    probes = json.loads((out / "probes.json").read_text()) if a.resume and (out / "probes.json").exists() else {}

    def after_epoch(epoch):
        probes[str(epoch)] = probe(net, *data)
        save_json(out / "probes.json", probes)

    report = train(a, net, train_split, out, device, steps, after_epoch, state)
    if not chief:
        return {}

    print("probing the trained network, then the same network untrained")
    report.update(probe(net, *data))
    for name, (other_train, other_test, other_classes) in others.items():
        other_train.size = other_test.size = train_split.size
        result = probe(net, other_train, other_test, other_classes, a, device)
        report.update({f"transfer_{name}_{k}": result[k] for k in ("linear", "knn")})
    trained = {k: v.clone() for k, v in net.state_dict().items()}
    net.load_state_dict(untrained)
    report.update({f"{k}_untrained": v for k, v in probe(net, *data).items()})
    net.load_state_dict(trained)
    report.update({"broken_pictures": len(train_split.broken | test_split.broken), "script": NAME, "run": out.name,
                   "layers_augmented": a.targets, "flags": config_of(a)})
    save_json(out / "report.json", report)                           # now: whatever export and figures may meet
    report["export_difference"] = export(a, net, test_split, classes, out, report)
    draw_figures(a, net, test_split, out, device, report, probes)
    save_json(out / "report.json", report)
    show(report, out)
    return report


def show(report: dict, out: Path) -> None:
    """The summary at the end of a run."""
    print(f"\n{'':24}{'untrained':>10}{'trained':>10}")
    for key, label in {"linear": "linear probe, test %", "knn": "kNN, test %", "alignment_test": "alignment, test",
                       "uniformity_test": "uniformity, test"}.items():
        if key in report:
            print(f"{label:24}{report[key + '_untrained']:10.2f}{report[key]:10.2f}")
    for key, value in report.items():
        if key.startswith("transfer"):
            print(f"{key:34}{value:10.2f}")
    print(f"{report['steps']} steps in {report['seconds']:.0f} s, {report['images_per_second']:.0f} images/s, two "
          f"views each; the exported encoder differs from the live one by {report['export_difference']:.1g}")
    if report["broken_pictures"]:
        print(f"{report['broken_pictures']} pictures could not be read and were skipped")
    print(f"in {out}: encoder.pt, weights.safetensors, report.json, views.png, curves.png")


def main(argv=None) -> dict:
    """Run the command line `argv` (default: the program's own). Returns the report; with --seeds the means and
    standard deviations; with --compare the table."""
    a = settings(argv)
    if a.compare:
        return compare(a.compare)
    words = sys.argv[1:] if argv is None else list(argv)
    if "RANK" in os.environ and not dist.is_initialized():           # started by torchrun
        if a.device != "cpu" and torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if a.device != "cpu" and torch.cuda.is_available() else "gloo",
                                timeout=timedelta(hours=2))          # the others wait while the first one probes
    try:
        with on_signals(interrupt):
            reports = [run(argparse.Namespace(**{**vars(a), "seed": seed, "out": f"{a.out}/s{seed}" if a.out else ""}))
                       for seed in a.seeds or []]
            if not reports:
                return run(a)
        numbers = [k for k, v in reports[0].items() if isinstance(v, (int, float))]
        table = {k: mean_std([r[k] for r in reports]) for k in numbers}
        for k in ("linear_untrained", "linear", "knn"):
            if k in table:
                print(f"{k:18} {pm(table[k])}  over seeds {a.seeds}")
        return table
    except Interrupted as stopped:
        go_on = shlex.join([w for w in words if w != "--resume"] + ["--resume"])
        python = f"torchrun --nproc_per_node={dist.get_world_size()}" if dist.is_initialized() else "python"
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"\nstopped; nothing is lost. To go on:\n{python} {shlex.quote(os.path.relpath(__file__))} {go_on}")
        raise SystemExit(128 + stopped.args[0]) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
