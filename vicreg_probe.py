# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "transformers>=5.0", "numpy", "matplotlib", "tqdm", "pillow",
#                 "safetensors"]
# ///
"""VICReg on RES-L-H networks, and probes that show what every layer has learned, the whole of it in one file.

Papers: Ben-Shaul, Shwartz-Ziv, Galanti, Dekel, LeCun, "Reverse Engineering Self-Supervised Learning" (2023): the
networks, the probes, all figures below. Bardes, Ponce, LeCun, "VICReg" (2022): the loss; its code is
github.com/facebookresearch/vicreg ("main_vicreg.py:194" is a line of it). Definitions under "same text in" are shared
with the other scripts; equations and sections that they name are the Deep Augmentation paper's (arXiv 2303.14537).

VICReg shows a network two random views of every picture and asks of its embeddings Z, Z' [B, d] that a picture's two
be alike (invariance s), every dimension vary over the batch (variance v) and no two dimensions say the same (covariance
c); the last two are the regularisation, without which all pictures would become one point:

    L = lambda s(Z, Z') + mu [v(Z) + v(Z')] + nu [c(Z) + c(Z')]                                             (Eq. 1)

No label is used. So what does each layer know, and when does it learn it? At chosen epochs the features x of every
layer are asked for labels y of three levels: which picture is this a view of (sample)? which class? which superclass?

    linear accuracy   a linear SVM on x, fitted on training pictures, its accuracy on test pictures
    NCC               nearest class centre: argmin over c of |x - mu_c|, mu_c the mean of class c's features
    CDNV              (Var_i + Var_j) / (2 |mu_i - mu_j|^2), averaged over pairs of classes: 0 if classes are points

Another kind of label is the predictions of another network at stages of its training: random at first, semantic at the
end. Also estimated, by MINE: how much information about the picture the representation holds.

Commands
    python vicreg_probe.py                                               # drawn shapes: train, probe, draw, export
    python vicreg_probe.py --dataset cifar100 --arch RES-5-32 --projector 512 512 --epochs 30      # on a laptop
    python vicreg_probe.py --preset paper                                # the paper's setting, for a GPU
    python vicreg_probe.py --objective simclr --lr 0.5                   # Fig. 11; supervised: Fig. 3, right
    python vicreg_probe.py --layer 3 --no-stop-grad                      # VICReg with Deep Augmentation at block 3
    python vicreg_probe.py --encoder runs/a/encoder.pt                   # probe any encoder.pt of these scripts
    python vicreg_probe.py --figures runs/a runs/b                       # the paper's figures, from recorded numbers
    torchrun --nproc_per_node=4 vicreg_probe.py --preset paper           # several GPUs, the same training

What to expect
    The default run takes under three minutes on two CPU cores. A linear SVM on the last block goes from 18.2 ± 2.6
    (untrained) to 70.4 ± 2.2 % for 20 drawn classes, from 31.4 ± 1.0 to 70.7 ± 1.6 % for samples (100 pictures), from
    46.0 ± 8.3 to 92.5 ± 0.8 % for 5 superclasses (three seeds). CIFAR-100, RES-5-32, 30 epochs, 45 minutes on one core:
    NCC of samples 8.6 -> 78.0 % by epoch 8 -> 84.6 %, of classes 4.6 -> 15.4 -> 18.7 %; linear probe 13.7 -> 28.8 %.
    docs/results.md says of each of the paper's statements whether that run shows it.

Deviations from the papers and their code, and what they leave open
    1. The loss is main_vicreg.py's: s averages over dimensions too, and v is halved over the two views (c is not).
    2. A layer's features are its maps averaged over places (--pool); the paper does not say. Layers are the stem and
       the blocks; the average pool is the last block's average, the head (projector) is not probed.
    3. NCC is the paper's formula on plain features; the authors' earlier code (SSL_ablation) normalises them.
    4. The SVM: LinearSVC's objective, its bias penalised too, by L-BFGS (see fit_svm).
    5. Random targets: the logits are standardised before the largest is taken (see random_targets).
    6. Projector 2048-2048 and 30 epochs for the target network are ours (--preset paper): the paper gives neither.
    7. AutoAugment's draws are shared by eight pictures each (torchvision's policies take a batch as one picture), and
       supervised training on streamed folders sees the workers' crops.
    8. The learning rate moves every step and ends at a thousandth; the ragged last batch of an epoch is dropped.
    9. MINE sees pictures averaged to 8 x 8, and its number is read on pairs that it was not trained on.
   10. The colour operations come in one random order per batch (torchvision: one per picture).
   11. Epoch 0 is the untrained network with BatchNorm's initial statistics.
   12. Superclasses are known for CIFAR-100 (its own coarse labels) and the drawn shapes only.
   13. Deep Augmentation in VICReg is in none of the papers.
   14. On CUDA the forward pass runs in bfloat16 (loss, weights and probes in float32). With several processes BatchNorm
       is synchronised on CUDA only, and the logged loss and meters are those of the first process.
"""
import argparse
import csv
import functools
import hashlib
import importlib.util
import io
import json
import math
import os
import pickle
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

import matplotlib
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

NAME = "vicreg_probe"
SOURCE = Path(__file__).read_text(encoding="utf-8")                 # goes into every checkpoint
IMAGENET = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])           # App. A.1: mean, std

# ----------------------------------------------------------------------------------------------------------------
# 1 Settings
# ----------------------------------------------------------------------------------------------------------------

PAPER = dict(dataset="cifar100", arch="RES-5-250", projector=[2048, 2048], epochs=1000, batch_size=256, lr=0.002,
             weight_decay=1e-6, warmup_epochs=0, crop_min=0.08, blur=0.5, solarize=0.1, sample_level=[500, 100, 20],
             probe_epochs=[0, 20, 40, 100, 400, 1000], target_net="resnet18", target_epochs=30)   # App. A, deviation 6
# Flags that say where and how a run computes, not what: they may change on --resume and are no part of its name
# (of `preset` the name stands there, and the flags that it sets count).
FREE = {"out", "resume", "device", "data_dir", "download", "workers", "compile", "log_every", "save_every", "seeds",
        "export", "preset", "encoder", "figures"}


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
    """Read and check the flags. What is wrong with them is told in one line (exit code 2)."""
    p = Parser(description="VICReg on RES-L-H networks, and probes of what every layer has learned.",
               formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    g = p.add_argument_group("deep augmentation")
    g.add_argument("--layer", nargs="+", default=["none"], metavar="L",
                   help="-1 input, 0 stem, 1..B blocks, B+1 average pool, B+2 head; several; all (0..B+2); none; auto")
    g.add_argument("--rate", type=float, default=0.5, help="dropout rate, in [0, 1)")
    g.add_argument("--stop-grad", action=argparse.BooleanOptionalAction, default=True,
                   help="no gradient from augmented rows below the layer")
    g.add_argument("--sample", type=float, default=0.5, help="share of the batch's rows to augment, in (0, 1]")
    g.add_argument("--transform", choices=["dropout", "channel", "pca"], default="dropout",
                   help="element-wise dropout, dropout of whole channels, or removal of principal components")
    g.add_argument("--components", type=int, default=1, help="pca: how many leading components are removed")
    g = p.add_argument_group("data and views")
    g.add_argument("--dataset", choices=["shapes", "cifar10", "cifar100", "folder"], default="",
                   help="none named: shapes, or with --encoder what it was trained on")
    g.add_argument("--data-dir", default="data", help="where CIFAR lies; with --dataset folder: your pictures")
    g.add_argument("--download", action="store_true", help="let torchvision download CIFAR")
    g.add_argument("--image-size", type=int, default=0, metavar="PX",
                   help="side of a view; 0: the pictures' own if all are one square size up to 224, else 224")
    g.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that decode pictures")
    g.add_argument("--crop-min", type=float, default=0.2, help="smallest crop, as a share of the picture's area")
    g.add_argument("--blur", type=float, default=0.0, metavar="P", help="probability of Gaussian blur, window 23")
    g.add_argument("--solarize", type=float, default=0.0, metavar="P", help="probability of solarising")
    g = p.add_argument_group("network and objective")
    g.add_argument("--arch", default="RES-5-24", help="RES-L-H: L residual blocks of H channels; or resnet18")
    g.add_argument("--projector", type=int, nargs=2, default=[256, 256], metavar=("HIDDEN", "OUT"))
    g.add_argument("--objective", choices=["vicreg", "simclr", "supervised", "supervised-autoaugment"],
                   default="vicreg", help="simclr: Fig. 11; supervised, without and with augmentation: Fig. 3 right")
    g.add_argument("--invariance", type=float, default=25.0, help="lambda of Eq. 1")
    g.add_argument("--variance", type=float, default=25.0, help="mu of Eq. 1")
    g.add_argument("--covariance", type=float, default=1.0, help="nu of Eq. 1")
    g.add_argument("--temperature", type=float, default=0.5, help="of SimCLR's loss")
    g = p.add_argument_group("training")
    g.add_argument("--preset", choices=["default", "paper"], default="default", help=f"paper: {PAPER}")
    g.add_argument("--epochs", type=int, default=20)
    g.add_argument("--batch-size", type=int, default=256, help="pictures a step, two views each, over all processes")
    g.add_argument("--lr", type=float, default=0.1, help="peak learning rate")
    g.add_argument("--optimizer", choices=["sgd", "lars"], default="sgd")
    g.add_argument("--weight-decay", type=float, default=1e-4)
    g.add_argument("--warmup-epochs", type=int, default=1, help="linear warm-up from lr/50, at most a tenth of the run")
    g = p.add_argument_group("run")
    g.add_argument("--out", default="", help="folder; empty: runs/NAME-DATASET-WHAT DIFFERS-sSEED, or beside --encoder")
    g.add_argument("--seed", type=int, default=0, help="fixes weights, order, views and dropout")
    g.add_argument("--seeds", type=int, nargs="+", help="run each of these seeds and report mean ± std")
    g.add_argument("--resume", action="store_true", help="go on from the run folder's checkpoint.pt")
    g.add_argument("--init", default="", metavar="RUN", help="start from the weights of this run folder")
    g.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    g.add_argument("--compile", action="store_true", help="torch.compile the network (a minute to start, then faster)")
    g.add_argument("--deterministic", action="store_true", help="same bits every time on CUDA too (slower)")
    g.add_argument("--log-every", type=int, default=10, metavar="STEPS")
    g.add_argument("--save-every", type=float, default=60, metavar="SECONDS", help="between checkpoints")
    g = p.add_argument_group("probes and export")
    g.add_argument("--encoder", metavar="FILE", help="train nothing: probe this encoder.pt, of any of the scripts")
    g.add_argument("--figures", nargs="+", metavar="RUN", help="only draw these runs again from their recorded numbers")
    g.add_argument("--probe-epochs", type=int, nargs="+", default=[0, 2, 6, 20], metavar="E",
                   help="epochs to probe after; 0 and the last one always are")
    g.add_argument("--probes", nargs="+", choices=["svm", "logistic", "ncc"], default=["svm", "ncc"],
                   help="what is measured at every layer; ncc: with CDNV, class variance and distance")
    g.add_argument("--probe-layers", nargs="+", metavar="NAME", help="None: stem and blocks; with --encoder: all")
    g.add_argument("--probe-images", type=int, default=0, metavar="N", help="training pictures of a probe; 0: all")
    g.add_argument("--pool", choices=["avg", "flatten"], default="avg", help="of a layer's maps before a probe")
    g.add_argument("--sample-level", type=int, nargs=3, default=[100, 50, 10], metavar=("PICTURES", "TRAIN", "TEST"),
                   help="sample level: so many pictures, each with TRAIN views to fit and TEST to test; 0 0 0: none")
    g.add_argument("--target-net", default="auto",
                   help="makes random targets: RES-L-H, resnet18, vit; none; auto: RES-2-24 where there are labels")
    g.add_argument("--target-epochs", type=int, default=6, help="its training on the labels")
    g.add_argument("--target-stages", type=int, default=6, help="targets of randomness 1 (untrained) ... 0 (trained)")
    g.add_argument("--mine-steps", type=int, default=300, help="training of the information estimator; 0: none")
    g.add_argument("--export", choices=["torchscript", "pt2"], default="torchscript", help="pt2: its format beside it")

    a = p.parse_args(argv)
    dataset = a.dataset
    if a.preset == "paper":
        p.set_defaults(**PAPER)
        a = p.parse_args(argv)
    a.dataset = dataset if a.encoder else a.dataset or "shapes"
    check_settings(a)
    differs = [f"{k.replace('_', '')}{'_'.join(map(str, v)) if isinstance(v, list) else Path(str(v)).name}"
               for k, v in config_of(a).items() if k not in ("dataset", "seed") and v != p.get_default(k)]
    a.probe_epochs = sorted({0, a.epochs, *(e for e in a.probe_epochs if e < a.epochs)})
    a.name = "-".join([NAME, a.dataset] + ([a.preset] if a.preset != "default" else []) + differs)
    return a


# same text in: simclr_deepaug.py, vicreg_probe.py, topk_rescue.py
def config_of(a) -> dict:
    """The flags that decide what is computed. With --dataset folder the folder is one of them."""
    free = FREE - {"data_dir"} if a.dataset == "folder" else FREE
    return {k: v for k, v in vars(a).items() if k not in free | {"name", "targets"}}


def layer_names(arch: str) -> dict:
    """{number: name} of the layers that Deep Augmentation can act on."""
    blocks = 8 if arch == "resnet18" else int(arch.split("-")[1])
    return {-1: "input", 0: "stem", **{i: f"block{i}" for i in range(1, blocks + 1)}, blocks + 1: "avgpool",
            blocks + 2: "head"}


def is_arch(name: str) -> bool:
    return name == "resnet18" or re.fullmatch(r"RES-[1-9]\d{0,2}-[1-9]\d{0,4}", name) is not None


def check_settings(a: argparse.Namespace) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))                   # set by torchrun
    if not is_arch(a.arch):
        fail(f"--arch {a.arch}: must be resnet18 or RES-L-H, as RES-5-250: 5 residual blocks of 250 channels")
    layers = layer_names(a.arch)
    if len(a.layer) == 1 and a.layer[0] in ("none", "all", "auto"):
        a.targets = {"none": [], "all": [l for l in layers if l >= 0], "auto": None}[a.layer[0]]
    elif all(re.fullmatch(r"-?\d+", s) and int(s) in layers for s in a.layer):
        a.targets = sorted({int(s) for s in a.layer})
        a.layer = [str(t) for t in a.targets]
    else:
        fail(f"--layer {' '.join(a.layer)}: no such layer; {a.arch} has "
             + ", ".join(f"{i} {n}" for i, n in layers.items()) + "; or all, none, auto")
    probed = [n for l, n in layers.items() if l >= 0]
    unknown = [n for n in a.probe_layers or [] if n not in probed]
    for ok, message in [
        (0 <= a.rate < 1, f"--rate {a.rate}: must be in [0, 1)"),
        (0 < a.sample <= 1, f"--sample {a.sample}: must be in (0, 1]"),
        (a.components >= 1, f"--components {a.components}: must be at least 1"),
        (a.targets is not None or importlib.util.find_spec("cka"), "--layer auto needs cka.py beside this script"),
        (a.targets is not None or a.init, f"--layer auto reads a trained network: make one with "
                                          f"`python {NAME}.py --out runs/base`, add --init runs/base"),
        (a.batch_size >= 2 and a.epochs >= 1, "--batch-size must be at least 2 and --epochs at least 1"),
        (0 < a.lr < math.inf and 0 < a.temperature < math.inf, "--lr and --temperature must be positive"),
        (all(0 <= w < math.inf for w in (a.invariance, a.variance, a.covariance)),
         "--invariance, --variance and --covariance must not be negative"),
        (min(a.projector) >= 1, "--projector: two sizes, at least 1"),
        (0 < a.crop_min <= 1, f"--crop-min {a.crop_min}: must be in (0, 1]"),
        (0 <= a.blur <= 1 and 0 <= a.solarize <= 1, "--blur and --solarize are probabilities"),
        (a.image_size == 0 or a.image_size >= 4, f"--image-size {a.image_size}: must be at least 4"),
        (a.log_every >= 1, "--log-every must be at least 1"),
        (0 <= a.weight_decay < math.inf, f"--weight-decay {a.weight_decay}: must not be negative"),
        (a.save_every >= 0, f"--save-every {a.save_every}: must not be negative"),
        (min(a.workers, a.image_size, a.warmup_epochs, a.probe_images, a.mine_steps, *a.probe_epochs) >= 0,
         "--workers, --image-size, --warmup-epochs, --probe-images, --probe-epochs and --mine-steps must not be "
         "negative"),
        (a.sample_level == [0, 0, 0] or (a.sample_level[0] >= 2 and a.sample_level[1] >= 2 and a.sample_level[2] >= 1),
         "--sample-level needs at least 2 pictures, 2 views to fit and 1 to test (or 0 0 0)"),
        (a.target_net in ("none", "vit", "auto") or is_arch(a.target_net),
         f"--target-net {a.target_net}: must be RES-L-H, resnet18, vit or none"),
        (a.target_epochs >= 1 and a.target_stages >= 2, "--target-epochs must be at least 1, --target-stages 2"),
        (a.encoder or not unknown, f"--probe-layers {' '.join(unknown)}: {a.arch} has {', '.join(probed)}"),
        (all(0 <= s < 2 ** 43 for s in [a.seed, *(a.seeds or [])]), "--seed and --seeds must be in 0 .. 2^43 - 1"),
        (len(set(a.seeds or [])) == len(a.seeds or []), "--seeds must differ from each other"),
        (not a.compile or shutil.which(os.environ.get("CXX", "g++")), "--compile needs a C++ compiler (g++)"),
        (world == 1 or not (a.seeds or a.download or a.encoder),
         "under torchrun: no --seeds, no --encoder, and --download beforehand"),
        (a.batch_size % world == 0 and a.batch_size // world >= 2,
         f"--batch-size {a.batch_size} must be a multiple of the {world} processes, two pictures each at least"),
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


def superclasses(a, device) -> Tensor | None:
    """The superclass of every class, int64 [C]: the drawn families; CIFAR-100's own coarse labels; else None."""
    if a.dataset == "shapes":
        return torch.arange(20, device=device) // 4
    if a.dataset == "cifar100":                                      # torchvision has checked this file's md5
        with open(Path(a.data_dir) / torchvision.datasets.CIFAR100.base_folder / "train", "rb") as f:
            content = pickle.load(f, encoding="latin1")
        coarse = torch.zeros(100, dtype=torch.long)
        coarse[torch.tensor(content["fine_labels"])] = torch.tensor(content["coarse_labels"])
        return coarse.to(device)
    return None


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


def views_of(images: Tensor, size: int, a, crop_min: float) -> Tensor:
    """One view of every picture as App. A.1: jitter (.4, .4, .2, .1), blur with a window of 23 pixels."""
    return make_views(images, size, crop_min, a.blur, a.solarize, (0.4, 0.4, 0.2, 0.1), 23)


def train_views(images: Tensor, split: Split, a) -> Tensor:
    """A batch from train_batches -> what the network is shown: float32 [2B, 3, S, S], first views, then second views;
    with a supervised objective one picture each [B, 3, S, S], as it is or after AutoAugment's CIFAR-10 policy."""
    cropped = images.ndim == 5                                       # [B, 2, 3, S, S]: by the workers
    if a.objective.startswith("supervised"):
        images = images[:, 0] if cropped else images
        if a.objective == "supervised-autoaugment":                  # eight pictures share a draw of the policy
            policy = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
            images = torch.cat([policy(group) for group in images.split(8)])
        return to_unit(images, split.size)
    if cropped:
        return views_of(images.transpose(0, 1).flatten(0, 1), split.size, a, 0)
    return views_of(images.repeat(2, 1, 1, 1), split.size, a, a.crop_min)


# ----------------------------------------------------------------------------------------------------------------
# 4 Network: RES-L-H (App. A.2) or torchvision's ResNet-18, as numbered layers
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


def backbone(arch: str, size: int) -> tuple[nn.Module, list, int]:
    """(stem, residual blocks, channels of the last block)."""
    if arch == "resnet18":
        r = torchvision.models.resnet18(weights=None)
        conv1, pool = r.conv1, r.maxpool
        if size < 64:                                                # 3x3 stem, no maxpool, as is usual for CIFAR
            conv1, pool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
            nn.init.kaiming_normal_(conv1.weight, mode="fan_out", nonlinearity="relu")
        stem = nn.Sequential(OrderedDict(conv1=conv1, bn1=r.bn1, relu=nn.ReLU(), pool=pool))
        return stem, [*r.layer1, *r.layer2, *r.layer3, *r.layer4], 512
    blocks, width = (int(n) for n in arch.split("-")[1:])
    stem = nn.Sequential(OrderedDict(
        conv1=nn.Conv2d(3, width, 2, 2, bias=False), bn1=nn.BatchNorm2d(width), relu1=nn.ReLU(),
        conv2=nn.Conv2d(width, width, 2, 2, bias=False), bn2=nn.BatchNorm2d(width), relu2=nn.ReLU()))
    residual = [BasicBlock(width, width) for _ in range(blocks)]     # 3x3, BN, ReLU, 3x3, BN, + x, ReLU
    for m in [stem, *residual]:
        for conv in m.modules():
            if isinstance(conv, nn.Conv2d):                          # torchvision's initialisation of its ResNets
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return stem, residual, width


class Net(nn.Module):
    """Backbone and head as numbered layers -1 input, 0 stem, 1..B blocks, B+1 average pool, B+2 head.

    forward(images [V*B, 3, S, S] in 0..1, rows bool [V*B]) -> head output [V*B, out]: V = 2 views, passed one after the
    other, so that each has its own BatchNorm statistics, as in main_vicreg.py; V = 1 and class logits if supervised.
    The head is the paper's two-layer projector, the last Linear without bias as VICReg's expander.
    """
    def __init__(self, a, size: int, classes: int):
        super().__init__()
        stem, blocks, self.dim = backbone(a.arch, size)
        hidden, out = a.projector
        self.views = 1 if a.objective.startswith("supervised") else 2
        head = nn.Linear(self.dim, classes) if self.views == 1 else nn.Sequential(
            nn.Linear(self.dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out, bias=False))
        self.layers = nn.ModuleDict({
            "input": Normalize(*IMAGENET), "stem": stem, **{f"block{i}": b for i, b in enumerate(blocks, 1)},
            "avgpool": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), "head": head})
        self.targets, self.augmentation = a.targets or [], (a.rate, a.stop_grad, a.transform, a.components)

    def forward(self, images, rows):
        return torch.cat([self.one_view(h, r) for h, r in zip(images.chunk(self.views), rows.chunk(self.views))])

    def one_view(self, h, rows):
        for l, layer in enumerate(self.layers.values(), start=-1):
            h = layer(h)
            if self.training and l in self.targets:
                h = deep_augment(h, rows, *self.augmentation)
        return h

    def features(self, images):
        """The representation that is kept: the average pool's output, [B, dim]."""
        for layer in list(self.layers.values())[:-1]:
            images = layer(images)
        return images

    def activations(self, images) -> dict:
        """Every named layer's output: stem, blockN.odd (before the addition), blockN.even (after it), avgpool, head."""
        h, out = self.layers["stem"](self.layers["input"](images)), {}
        out["stem"] = h
        for name, block in list(self.layers.items())[2:-2]:
            out[f"{name}.odd"], h = block_outputs(block, h)
            out[f"{name}.even"] = h
        out["avgpool"] = h = self.layers["avgpool"](h)
        out["head"] = self.layers["head"](h)
        return out

    def numbered(self) -> dict:
        """{name in activations(): the layer's number} from 0 on."""
        names = [f"{name}.even" if "block" in name else name for name in self.layers]
        return {name: l for l, name in enumerate(names, start=-1) if l >= 0}


def build(a, size: int, classes: list, device) -> Net:
    """The network of these flags with the weights of this seed."""
    torch.manual_seed(a.seed)
    return Net(a, size, len(classes)).to(device, memory_format=torch.channels_last)


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


def vicreg(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(invariance s, variance v, covariance c) of Eq. 1, unweighted; z1, z2: the two views' embeddings [B, d], B >= 2.

    main_vicreg.py:194-219: s is the mean over rows and dimensions of (z1 - z2)^2; v = mean over dimensions of
    max(0, 1 - std), std = sqrt(var + 1e-4), halved over the two views; c = sum of the squared off-diagonal entries of
    the covariance matrix, over d, summed over the two views. The 1e-4 keeps the gradient finite at zero variance.
    With several processes s is of the own rows, v and c of everybody's: the mean over processes is the whole batch's.
    """
    z1, z2 = z1.float(), z2.float()
    invariance, variance, covariance = F.mse_loss(z1, z2), 0.0, 0.0
    for z in (gather(z1), gather(z2)):
        z = z - z.mean(0)
        std = (z.var(0) + 1e-4).sqrt()                                                        # [d]
        variance = variance + F.relu(1 - std).mean() / 2
        cov = z.T @ z / (len(z) - 1)                                                          # [d, d], symmetric
        covariance = covariance + 2 * cov.triu(1).square().sum() / z.shape[1]
    return invariance, variance, covariance


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


def losses_of(a, z: Tensor, labels: Tensor | None) -> dict:
    """{"loss", ...} of a batch's head output: for both self-supervised losses the two parts that Fig. 3 (left) follows,
    weighted as they enter the sum, so that loss = invariance + regularisation."""
    if a.objective.startswith("supervised"):
        return {"loss": F.cross_entropy(z.float(), labels)}
    z1, z2 = z.chunk(2)
    if a.objective == "vicreg":
        s, v, c = vicreg(z1, z2)
        parts = {"invariance": a.invariance * s, "regularisation": a.variance * v + a.covariance * c}
        return {"loss": sum(parts.values()), **parts, "variance_term": v, "covariance_term": c}
    loss = nt_xent(z1, z2, a.temperature)                            # Section 2.1: minus the pairs' similarity / T,
    attraction = -F.cosine_similarity(z1.float(), z2.float()).mean() / a.temperature      # and the log of the sum
    return {"loss": loss, "invariance": attraction, "regularisation": loss - attraction}


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


def save_csv(path: Path, rows: list) -> None:
    with written_whole(path) as part, open(part, "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def load_csv(path: Path) -> list:
    """The rows of save_csv; numbers become floats again, empty fields None. No file: no rows."""
    def value(text):
        try:
            return float(text) if text else None
        except ValueError:
            return text

    if not path.exists():
        return []
    with open(path, newline="") as f:
        return [{k: value(v) for k, v in row.items()} for row in csv.DictReader(f)]


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


def train(a, net: Net, split: Split, out: Path, device, steps: int, probe_after, state: dict | None) -> dict:
    """Train to the last epoch, from the start or from `state`. Every step reseeds from (seed, step, process): so no
    random state needs saving, a resumed run meets the same views and rows, and probes in between change nothing.
    steps: of one epoch; probe_after(epoch, stop): called at every epoch's start, the end included."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if a.optimizer == "lars":
        optimizer = LARS(net.parameters(), a.lr, weight_decay=a.weight_decay)
    else:
        optimizer = torch.optim.SGD(net.parameters(), a.lr, momentum=0.9, weight_decay=a.weight_decay, fused=True)

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
        save_csv(out / "metrics.csv", log)
        with written_whole(out / "checkpoint.pt") as part:
            torch.save({"script": NAME, "config": config_of(a), "data": len(split), "model": net.state_dict(),
                        "optimizer": optimizer.state_dict(), "step": step, "metrics": log, "source": SOURCE,
                        "seconds": spent + time.time() - begun - probing}, part)

    total, leave = a.epochs * steps, step == a.epochs * steps
    parts, stop, probing = [], [], 0.0                               # losses stay on the device until they are logged
    begun = saved = logged = time.time()
    bar = tqdm(total=total, initial=step, unit="step", disable=rank > 0, dynamic_ncols=True)
    batches = train_batches(split, a, device, step, steps, rank, world)
    with on_signals(stop.append):                                    # Ctrl-C and SIGTERM wait for the end of a step
        while True:
            if step % steps == 0 and rank == 0 and (step == total or not leave):    # not when interrupted
                paused = time.time()
                probe_after(step // steps, stop)
                probing += time.time() - paused
                logged += time.time() - paused                       # probing is no part of the speed,
                bar.unpause()                                        # nor of the time that is left
            if leave:
                break
            net.train()
            lr = learning_rate(step, a, steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            images, labels = next(batches)
            torch.manual_seed(mix(a.seed, step, rank))               # fixes this step's views, rows and dropout
            views = train_views(images, split, a)                                             # [V*B, 3, S, S]
            rows = torch.rand(len(views), device=device) < a.sample                           # [V*B]
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                z = model(views, rows)                                                        # [V*B, out]
            loss = losses_of(a, z, labels)
            optimizer.zero_grad(set_to_none=True)
            loss["loss"].backward()
            optimizer.step()
            parts.append(torch.stack([v.detach() for v in loss.values()]))
            step += 1
            bar.update()

            leave = step == total or stops(stop, step % a.log_every == 0, device)
            probe_next = step % steps == 0 and step // steps in a.probe_epochs
            save_now = leave or probe_next or time.time() - saved > a.save_every
            if step % a.log_every == 0 or save_now:
                values, now = torch.stack(parts).tolist(), time.time()                        # the one wait
                for i, (value, *_) in enumerate(values):
                    if not math.isfinite(value):
                        fail(f"the loss is {value} at step {step - len(values) + i + 1}; any checkpoint before it is "
                             f"kept in {out}. A smaller --lr usually helps")
                log.append({"step": step, "epoch": step / steps, "lr": lr,
                            "images_per_second": a.batch_size * len(values) / (now - logged),
                            **dict(zip(loss, map(statistics.mean, zip(*values)))),
                            **(meters(*z.detach().chunk(2)) if net.views == 2 else {})})
                bar.set_postfix_str(f"loss {log[-1]['loss']:.3f}, {log[-1]['images_per_second']:.0f} images/s")
                parts, logged = [], now
                if save_now:
                    if rank == 0 and all(p.isfinite().all() for p in net.parameters()):
                        save()
                    logged = saved = time.time()                     # nor is saving
    bar.close()
    if stop or step < total:
        raise Interrupted(stop[0] if stop else signal.SIGTERM)
    report = {"seconds": spent + time.time() - begun - probing, "steps": step, "epochs": a.epochs,
              "loss": log[-1]["loss"], "images_per_second": statistics.median(r["images_per_second"] for r in log)}
    if net.views == 2:
        report["lowest_embedding_std"] = min(r["embedding_std"] for r in log)
    return report


# ----------------------------------------------------------------------------------------------------------------
# 8 Evaluation: what has every layer learned?
# ----------------------------------------------------------------------------------------------------------------

def pooled(h: Tensor, how: str) -> Tensor:
    """A layer's output [B, C, H, W], tokens [B, T, C] or [B, D] -> features float32 [B, D]: mean over places or all."""
    if how == "flatten" or h.ndim == 2:
        return h.flatten(1).float()
    return (h.mean((2, 3)) if h.ndim == 4 else h.mean(1)).float()


@torch.no_grad()
def layer_features(activations, names: list, pool: str, batches) -> tuple[dict, Tensor]:
    """One pass of the network over `batches` of (images, index) gives all layers: ({name: [N, D]}, index [N])."""
    kept, indices = {name: [] for name in names}, []
    for images, index in batches:
        acts = activations(images)
        for name in names:
            kept[name].append(pooled(acts[name], pool))
        indices.append(index)
    return {name: torch.cat(kept.pop(name)) for name in names}, torch.cat(indices)


def fit_svm(x: Tensor, y: Tensor, classes: int, c: float = 1.0, iterations: int = 300) -> Tensor:
    """Linear SVMs, one against the rest, for all classes at once -> weights [D+1, classes], the last row is the bias.

    x [N, D], y int64 [N]. The objective of LIBLINEAR, and so of scikit-learn's LinearSVC with its defaults: every class
    minimises |w|^2/2 + c * sum over pictures of max(0, 1 - s <w, (x, 1)>)^2, s = 1 for its own pictures and -1 for the
    others; the bias is a weight like the others. Full-batch L-BFGS with the gradient written by hand, in coordinates
    v = L' w (times a constant), L L' = I + 2c X'X: were all pictures within the margin, the Hessian would be the
    identity there. So ten to a hundred steps do, whatever the scales of the features.
    """
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)                                          # [N, D+1]
    gram = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for part in x.split(8192):
        gram += part.T.double() @ part.double()                      # float32's rounding could exceed the I below
    eye = torch.eye(len(gram), dtype=torch.float64, device=x.device)
    factor = torch.linalg.cholesky(eye + 2 * c * gram)
    start = c * len(x) * classes                                     # the objective at w = 0; below, shares of it
    scale = torch.linalg.solve_triangular(factor, start ** 0.5 * eye, upper=False).T.float()
    xs = x @ scale                                                   # w = scale v, so X w = (X scale) v
    v = torch.zeros(xs.shape[1], classes, device=x.device, requires_grad=True)
    own = y.unsqueeze(1)                                             # [N, 1]
    solver = torch.optim.LBFGS([v], max_iter=iterations, history_size=10, line_search_fn="strong_wolfe",
                               tolerance_grad=0, tolerance_change=1e-9)

    @torch.no_grad()                                                 # LBFGS turns them on, and would keep every product
    def objective():
        margin = xs @ v                                                                       # [N, classes]
        mine = 1 - margin.gather(1, own)
        margin.add_(1).scatter_(1, own, mine).clamp_(min=0)          # max(0, 1 - s <w, x>)
        w = scale @ v
        value = w.square().sum() / 2 + c * margin.square().sum()
        margin.scatter_(1, own, -mine.clamp(min=0))                  # times -s: the derivative's sign
        v.grad = (scale.T @ w + 2 * c * (xs.T @ margin)) / start
        return value / start

    solver.step(objective)
    return scale @ v.detach()


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
def clustering(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, classes: int) -> dict:
    """How well do the classes form clusters? x [N, D] with targets y, and the same of test pictures. Section 2.2:

    ncc_train, ncc_test   accuracy in % of choosing the nearest class centre (the training pictures' class means)
    variance              Var(S_i), the mean squared distance of a class's features to their mean, averaged over classes
    distance              |mu_i - mu_j|^2 averaged over pairs i != j
    cdnv                  (Var(S_i) + Var(S_j)) / (2 |mu_i - mu_j|^2) averaged over pairs i != j; None where two class
                          means coincide. Variance, distance, cdnv: training pictures, classes of two or more of them
                          (None if there are no two such classes).
    """
    centre = x.mean(0)
    x, x_test = x - centre, x_test - centre                          # distances do not change, their rounding does
    count, sums = torch.bincount(y, minlength=classes), torch.zeros(classes, x.shape[1], device=x.device)
    for part, label in zip(x.split(8192), y.split(8192)):            # as a product: on CUDA, index_add_ varies; in
        sums += F.one_hot(label, classes).T.to(x.dtype) @ part       # parts: [N, classes] may be large
    mean = sums / count.clamp(min=1).unsqueeze(1)                                             # [C, D]
    bias = torch.where(count > 0, -mean.square().sum(1) / 2, -math.inf)

    def accuracy(x, y):                                              # argmin |x - mu|^2 = argmax <x, mu> - |mu|^2 / 2
        correct = [torch.addmm(bias, part, mean.T).argmax(1) == label
                   for part, label in zip(x.split(8192), y.split(8192))]
        return 100 * torch.cat(correct).float().mean().item()

    spread = torch.zeros(classes, device=x.device)
    for part, label in zip(x.split(8192), y.split(8192)):
        squares = (part - mean[label]).square().sum(1, keepdim=True)                 # [n, 1]
        spread += (F.one_hot(label, classes).T.to(x.dtype) @ squares)[:, 0]
    some = count >= 2
    variance, centres = (spread / count.clamp(min=1))[some].double(), mean[some].double()
    squared = torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist").square()    # [C, C]
    pairs = ~torch.eye(len(centres), dtype=torch.bool, device=x.device)
    cdnv = ((variance.unsqueeze(1) + variance) / (2 * squared))[pairs].mean()
    result = {"cdnv": cdnv, "variance": variance.mean(), "distance": squared[pairs].mean()}
    return {"ncc_train": accuracy(x, y), "ncc_test": accuracy(x_test, y_test),
            **{k: v.item() if v.isfinite() else None for k, v in result.items()}}


def mutual_information(x: Tensor, z: Tensor, steps: int, seed: int = 0, runs: int = 5) -> list:
    """MINE (Belghazi et al. 2018): lower bounds in bits of the information between x [N, Dx] and z [N, Dz], one for
    each of `runs` initialisations, all trained at once.

        I(X; Z) >= E over pairs of T(x, z) - log E over shuffled pairs of exp T(x, z)          (Donsker-Varadhan)

    T is a network of two hidden layers, trained on four fifths of the pairs to make the right side large; the number is
    its value on the last fifth. Known limits: (1) an estimate from n pairs can hardly be trusted beyond log2(n) bits
    (McAllester & Stratos 2020), and the information between pictures and a deterministic network's output is far more:
    what is measured is how much of it T finds; (2) it depends on T's size and training, and with few pairs T overfits:
    the number then falls, even below 0, though information never is; (3) it varies: hence five runs. So compare its
    values within a run, and do not take one as the information itself.
    """
    n, batch, hidden = len(x) - len(x) // 5, 512, 128
    x, z = ((t - t[:n].mean(0)) / t[:n].std(0).clamp(min=1e-6) for t in (x.float(), z.float()))
    g = torch.Generator().manual_seed(seed)

    def weights(*shape):
        return (torch.randn(runs, *shape, generator=g) * (2 / shape[0]) ** 0.5).to(x.device).requires_grad_()

    inputs = x.shape[1] + z.shape[1]
    w1, w2, w3 = weights(inputs, hidden), weights(hidden, hidden), weights(hidden, 1)
    b1, b2 = (torch.zeros(runs, 1, hidden, device=x.device, requires_grad=True) for _ in range(2))
    solver = torch.optim.Adam([w1, w2, w3, b1, b2], 1e-3, weight_decay=1e-4)

    def scores(rows, partners):
        """T of the pairs (x_i, z_i) and (x_i, z_partner): [runs, B] each. What x and z give to the first layer is
        computed once and added in either pairing. (A bias of the last layer would cancel.)"""
        from_x, from_z = x[rows] @ w1[:, :x.shape[1]], z[rows] @ w1[:, x.shape[1]:]           # [runs, B, hidden]
        for h in (from_z, from_z[:, partners]):
            h = F.relu(from_x + h + b1)
            yield (F.relu(h @ w2 + b2) @ w3)[..., 0]

    mean_exp = torch.zeros(runs, device=x.device)                    # log of the moving mean of exp T
    for step in range(steps):
        rows = torch.randint(n, (batch,), generator=g)
        joint, shuffled = scores(rows.to(x.device), torch.randperm(batch, generator=g).to(x.device))
        log_mean = shuffled.logsumexp(1) - math.log(batch)                                    # [runs]
        mean_exp = torch.logaddexp(mean_exp + math.log(0.9), log_mean.detach() + math.log(0.1)) if step else \
            log_mean.detach()
        # the gradient of log E exp T is E[exp T dT] / E[exp T]; dividing by a moving mean makes a batch's less biased
        loss = ((log_mean - mean_exp).exp() - joint.mean(1)).sum()
        solver.zero_grad()
        loss.backward()
        solver.step()
    with torch.no_grad():
        held = torch.arange(n, len(x), device=x.device)
        joint, shuffled = scores(held, torch.randperm(len(held), generator=g).to(x.device))
        nats = joint.mean(1) - (shuffled.logsumexp(1) - math.log(len(held)))
    return (nats / math.log(2)).tolist()


def vit_patch(size: int) -> int:
    return 4 if size < 64 else 16


def random_targets(a, arch: str, train_split: Split, test_split: Split, classes: list, device) -> list:
    """Targets from random to semantic (Section 5): a network is trained on the labels, and its predictions at stages of
    that training, evenly spaced, are targets. [{"randomness": 1 untrained .. 0 trained, "train", "test": int64 [N]}].

    App. A.3: cross-entropy, Adam, cosine; lr .05 for convolutional networks, .001 and weight decay 5e-5 for the ViT (10
    layers, 8 heads, 384 channels, class token). Pictures without augmentation, in the same order every epoch. Every
    class's logits are standardised over the training pictures before the largest is taken: an untrained network gives
    70-99 % of the pictures to one class otherwise, and predicting that would look like alignment.
    """
    torch.manual_seed(mix(a.seed, 1))
    size, vit = train_split.size, arch == "vit"
    if vit:
        from transformers import ViTConfig, ViTForImageClassification
        net = ViTForImageClassification(ViTConfig(
            hidden_size=384, num_hidden_layers=10, num_attention_heads=8, intermediate_size=1536, image_size=size,
            patch_size=vit_patch(size), num_labels=len(classes)))
    else:
        stem, blocks, dim = backbone(arch, size)
        net = nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(dim, len(classes)))
    net = nn.Sequential(Normalize(*IMAGENET), net).to(device, memory_format=torch.channels_last)
    solver = torch.optim.Adam(net.parameters(), 0.001 if vit else 0.05, weight_decay=5e-5 if vit else 0)
    total = a.target_epochs * math.ceil(len(train_split) / 256)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(solver, total)
    marks = [round(total * i / (a.target_stages - 1)) for i in range(a.target_stages)]

    def logits(images):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            result = net(images)
        return (result.logits if vit else result).float()

    @torch.no_grad()
    def all_logits(split, limit=0):
        net.eval()
        result = torch.zeros(min(limit or len(split), len(split)), len(classes), device=device)
        for images, index in eval_batches(split, a, device, limit):
            result[index] = logits(images)
        return result

    targets, step = [], 0
    with tqdm(total=total, desc="random targets", unit="step", dynamic_ncols=True) as bar:
        while True:
            for images, index in eval_batches(train_split, a, device, batch_size=256):
                if step in marks:
                    train = all_logits(train_split, a.probe_images)
                    mean, std = train.mean(0), train.std(0).clamp(min=1e-12)
                    targets.append({"randomness": 1 - step / total, "train": ((train - mean) / std).argmax(1),
                                    "test": ((all_logits(test_split) - mean) / std).argmax(1)})
                if step == total:
                    return targets
                net.train()
                solver.zero_grad()
                F.cross_entropy(logits(images), train_split.labels[index]).backward()
                solver.step()
                schedule.step()
                step += 1
                bar.update()


LEVELS = ["sample", "class", "superclass"]                           # the three hierarchies
MEASURES = ["majority", "svm", "logistic", "logistic_decay", "knn", "ncc_train", "ncc_test", "cdnv", "variance",
            "distance"]                                              # of probes.csv: one row per epoch, layer, target


class Probes:
    """The pictures and targets that networks are probed with, the same for all epochs.

    tasks: [(target, number of classes, its training pictures' labels, its test pictures')] of unaugmented pictures:
    class, superclass, random targets. samples: uint8 [n, 3, S, S], the pictures of the sample level: every one is a
    class, its members are views of it (Section 3).
    """
    def __init__(self, a, train_split: Split, test_split: Split, classes: list, device):
        self.a, self.device, self.tasks, self.samples = a, device, [], None
        self.train_split, self.test_split, self.classes = train_split, test_split, classes
        pictures, labels = min(a.probe_images or len(train_split), len(train_split)), train_split.labels
        wanted = a.sample_level[0]
        if wanted > len(train_split):
            fail(f"--sample-level {wanted}: there are {len(train_split)} training pictures")
        if labels is None and a.target_net not in ("auto", "none"):
            fail("--target-net needs labels: class folders")
        if a.target_net == "vit" and train_split.size % vit_patch(train_split.size):
            fail(f"--target-net vit: its patches of {vit_patch(train_split.size)} pixels do not divide the pictures' "
                 f"{train_split.size}: use another --image-size")
        if labels is None and not wanted:
            fail("nothing to probe: the pictures have no labels (class folders), and --sample-level asks for none")
        if pictures < len(classes):
            fail(f"a probe needs pictures of every class: {pictures} training pictures, {len(classes)} classes")
        if a.mine_steps and pictures < 10:
            fail(f"--mine-steps needs at least 10 training pictures, there are {pictures}: use --mine-steps 0")
        if labels is not None:
            count = torch.bincount(labels[:pictures], minlength=len(classes))
            if count.min() < 2:
                fail(f"class {classes[count.argmin()]} has {count.min()} of the {pictures} training pictures: a probe "
                     "needs two of every class (its variance)")
            self.tasks.append(("class", len(classes), labels[:pictures], test_split.labels))
            coarse = superclasses(a, device)
            if coarse is not None:
                self.tasks.append(("superclass", int(coarse.max()) + 1, coarse[labels[:pictures]],
                                   coarse[test_split.labels]))
        if wanted:
            chosen = torch.randperm(len(train_split), generator=torch.Generator().manual_seed(0))[:wanted]
            some = Split(None, train_split.size)
            if train_split.images is None:
                some.files = [train_split.files[i] for i in chosen]
            else:
                some.images = train_split.images[chosen.to(device)]
            images = torch.cat([images for images, _ in eval_batches(some, a, device)])
            self.samples = (images * 255).round().to(torch.uint8)

    def add_random_targets(self, folder: Path, resumed: bool) -> None:
        """Make them and keep them in `folder`; a resumed run takes those that it kept."""
        if self.train_split.labels is None or self.a.target_net == "none":
            return
        path = folder / "targets.npz"
        if not (resumed and path.exists()):
            arch = "RES-2-24" if self.a.target_net == "auto" else self.a.target_net
            targets = random_targets(self.a, arch, self.train_split, self.test_split, self.classes, self.device)
            with written_whole(path) as part, open(part, "wb") as f:
                np.savez(f, randomness=[t["randomness"] for t in targets],
                         **{k: torch.stack([t[k] for t in targets]).cpu().numpy() for k in ("train", "test")})
        with np.load(path) as kept:
            for randomness, train, test in zip(kept["randomness"], kept["train"], kept["test"]):
                self.tasks.append((f"random {randomness:.2f}", len(self.classes),
                                   *(torch.from_numpy(y).to(self.device) for y in (train, test))))

    def view_batches(self, times: int, seed: int):
        """`times` views of every sample-level picture, from training's distribution: yields (views, picture [n])."""
        a, index = self.a, torch.arange(len(self.samples), device=self.device)
        for i in range(times):
            for part in index.split(512):
                torch.manual_seed(mix(seed, i, int(part[0])))
                yield views_of(self.samples[part], self.train_split.size, a, a.crop_min), part

    def groups(self, activations, names: list) -> list:
        """names, cut so that one group's features take 2 GiB at most: one pass of the network is one group."""
        image, groups, room = next(eval_batches(self.train_split, self.a, self.device, 1))[0], [[]], 2 << 30
        rows = max((self.a.probe_images or len(self.train_split)) + len(self.test_split),
                   self.a.sample_level[0] * sum(self.a.sample_level[1:]))
        with torch.no_grad():
            acts = activations(image)
        for name in names:
            size = 4 * rows * pooled(acts[name], self.a.pool).shape[1]
            if size > 2 << 30 and self.device.type == "cpu":
                fail(f"layer {name} has {size / rows / 4:.0f} features, {size / 2 ** 30:.1f} GiB for {rows} pictures: "
                     "use --pool avg, --probe-images N or smaller --sample-level")
            if size > room and groups[-1]:
                groups.append([])
                room = 2 << 30
            groups[-1].append(name)
            room -= size
        return groups

    def measure(self, x, y, x_test, y_test, target: str, classes: int, kept: bool) -> dict:
        """Measures of probes.csv: what features x [N, D] tell about labels y [N]. kept: of the representation."""
        row = {"majority": 100 * torch.bincount(y_test).max().item() / len(y_test)}
        data = x, y, x_test, y_test, classes
        if "svm" in self.a.probes:
            w = fit_svm(x, y, classes)
            row["svm"] = 100 * (torch.addmm(w[-1], x_test, w[:-1]).argmax(1) == y_test).float().mean().item()
        if "ncc" in self.a.probes:
            row.update(clustering(*data))
        headline = kept and target == "class"
        if headline or "logistic" in self.a.probes and target in LEVELS:
            logistic = linear_probe(*data)
            row.update(logistic=logistic["linear"], logistic_decay=logistic["linear_decay"])
        if headline:
            row["knn"] = weighted_knn(*data)
        return row

    def run(self, activations, names: list, kept: str, epoch: int, last: bool, stop=()) -> tuple[list, list, dict]:
        """Probe a network, activations(images) -> {layer: output}, at the layers `names`; `kept` is the one that is its
        representation: (rows of probes.csv, bits by MINE, points for clusters.png)."""
        a, rows, points, bits = self.a, [], {}, []
        bar = tqdm(total=len(names), desc=f"probing epoch {epoch}", unit="layer", leave=False, dynamic_ncols=True)
        for group in self.groups(activations, names):
            features = functools.partial(layer_features, activations, group, a.pool)
            if self.tasks or a.mine_steps:
                x, index = features(eval_batches(self.train_split, a, self.device, a.probe_images))
                x_test, index_test = features(eval_batches(self.test_split, a, self.device))
            if self.samples is not None:
                v, picture = features(self.view_batches(a.sample_level[1], 0))
                v_test, picture_test = features(self.view_batches(a.sample_level[2], 1))
            for name in group:
                work = [(target, n, x[name], y[index], x_test[name], y_test[index_test])
                        for target, n, y, y_test in self.tasks
                        if name == kept or last or not target.startswith("random")]
                if self.samples is not None:
                    work.insert(0, ("sample", len(self.samples), v[name], picture, v_test[name], picture_test))
                for target, classes, *data in work:
                    if stop and not dist.is_initialized():           # a probe may take minutes: do not wait for its end
                        interrupt(stop[0])
                    row = {"epoch": epoch, "layer": name.removesuffix(".even"), "target": target, "classes": classes,
                           **dict.fromkeys(MEASURES)}
                    rows.append({**row, **self.measure(*data, target, classes, name == kept)})
                    if name == kept and not target.startswith("random"):   # five classes a level, for the picture
                        points_x, points_y = data[:2] if target == "sample" else data[2:]
                        five = torch.randperm(classes, generator=torch.Generator().manual_seed(0))[:5]
                        chosen = torch.isin(points_y, five.to(points_y.device)).nonzero()[:500, 0]
                        points[f"{target}_x"] = points_x[chosen].cpu().numpy()
                        points[f"{target}_y"] = points_y[chosen].cpu().numpy()
                bar.update()
            if kept in group and a.mine_steps:                       # of 10,000 pictures, each averaged to 8 x 8
                images = torch.cat([F.adaptive_avg_pool2d(images, 8).flatten(1) for images, _ in
                                    eval_batches(self.train_split, a, self.device, min(10_000, len(x[kept])))])
                bits = mutual_information(images, x[kept][:10_000], a.mine_steps)
        bar.close()
        return rows, bits, points


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


class Record:
    """What a run folder has recorded, for the figures: rows of probes.csv, metrics.csv and information.csv."""
    def __init__(self, folder: Path):
        self.folder, self.rows, self.log = folder, load_csv(folder / "probes.csv"), load_csv(folder / "metrics.csv")
        if not self.rows or not (folder / "config.json").exists():
            fail(f"--figures {folder}: no probes.csv there, so nothing is recorded yet")
        self.bits, self.config = load_csv(folder / "information.csv"), json.loads((folder / "config.json").read_text())
        self.kept = self.config["representation"].removesuffix(".even")
        self.epochs = sorted({r["epoch"] for r in self.rows})
        self.layers = list(dict.fromkeys(r["layer"] for r in self.rows))
        self.table = {(r["epoch"], r["layer"], r["target"]): r for r in self.rows}
        self.levels = [t for t in LEVELS if (self.epochs[0], self.kept, t) in self.table]
        self.random = sorted({r["target"] for r in self.rows if r["target"].startswith("random")})
        self.linear = "svm" if any(r["svm"] is not None for r in self.rows) else "logistic"

    def value(self, measure, target, epoch, layer=None) -> float:
        v = self.table.get((epoch, layer or self.kept, target), {}).get(measure)
        return math.nan if v is None else v

    def over_epochs(self, measure, target, by="") -> np.ndarray:
        """`measure` (over the measure `by`) of the representation at every probed epoch."""
        values = np.array([self.value(measure, target, e) for e in self.epochs])
        return values / np.array([self.value(by, target, e) for e in self.epochs]) if by else values

    def over_layers(self, measure, target, epoch) -> np.ndarray:
        return np.array([self.value(measure, target, epoch, layer) for layer in self.layers])


def draw_run(folder: Path) -> Path:
    """figures.png: one page with the paper's figures of one run; clusters.png: Fig. 1. From recorded numbers only."""
    r = Record(folder)
    dark_to_bright = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, max(len(r.epochs), len(r.layers))))
    figure = Figure((16, 26))
    axes = iter(figure.subplots(6, 3).flat)
    color = dict(sample="tab:blue", **{"class": "tab:orange"}, superclass="tab:green")

    def panel(title, xlabel="epoch", ylabel="%"):
        axis = next(axes)
        axis.set_title(title, fontsize=10)
        axis.set(xlabel=xlabel, ylabel=ylabel)
        return axis

    def levels(axis, measure, by="", normalise=False):
        for target in r.levels:
            y = r.over_epochs(measure, target, by)
            axis.plot(r.epochs, y / y[0] if normalise else y, "o-", color=color[target], label=target)
        axis.legend(fontsize=8)

    def by_layer(axis, value):                                       # value(epoch) -> one number per layer
        for e, c in zip(r.epochs, dark_to_bright):
            axis.plot(range(len(r.layers)), value(e), "o-", color=c, label=f"epoch {e:.0f}")
        axis.set_xticks(range(len(r.layers)), r.layers, rotation=30, fontsize=7)
        axis.legend(fontsize=7)

    for normalise, figures, unit in ((True, "Fig. 2, 6 right, over first value", "ratio"), (False, "Fig. 6 left", "%")):
        levels(panel(f"{figures}: NCC train accuracy", ylabel=unit), "ncc_train", normalise=normalise)
        levels(panel(f"{figures}: NCC / linear, test", ylabel="ratio"), "ncc_test", r.linear, normalise)
        levels(panel(f"{figures}: linear test accuracy", ylabel=unit), r.linear, normalise=normalise)

    axis = panel("Fig. 3 left, 10: parts of the loss, linear accuracy", ylabel="loss, weighted")
    for part, style in (("regularisation", "-"), ("invariance", "--")):
        if r.log and part in r.log[0]:
            axis.plot([row["epoch"] for row in r.log], [row[part] for row in r.log], style, label=part)
    twin = axis.twinx()
    twin.plot(r.epochs, r.over_epochs(r.linear, "class"), "ko-", label="linear, classes")
    twin.set_ylabel("%")
    if axis.has_data():
        axis.legend(fontsize=8, loc="center right")
    axis = panel("Fig. 3 middle: I(input; representation) by MINE", ylabel="bits")
    if r.bits:
        axis.errorbar([row["epoch"] for row in r.bits], [row["bits"] for row in r.bits],
                      [row["std"] for row in r.bits], fmt="o-", capsize=3)
    axis = panel("Fig. 3 right (one run): NCC before and after training", xlabel="")
    bars = [(f"{t}\n{m}", r.value(f"ncc_{m}", t, e), c) for t in r.levels for m in ("train", "test")
            for e, c in ((r.epochs[0], "tab:gray"), (r.epochs[-1], "tab:orange"))]
    axis.bar(range(len(bars)), [b[1] for b in bars], color=[b[2] for b in bars])
    axis.set_xticks(range(0, len(bars), 2), [b[0] for b in bars[::2]], fontsize=7)

    randomness = [float(t.split()[1]) for t in r.random]
    axis = panel("Fig. 4 left, 12: linear accuracy by randomness of the targets", "randomness (1: untrained network)")
    for e, c in zip(r.epochs, dark_to_bright):
        axis.plot(randomness, [r.value(r.linear, t, e) for t in r.random], "o-", color=c, label=f"epoch {e:.0f}")
    axis.plot(randomness, [r.value("majority", t, r.epochs[-1]) for t in r.random], "k:", label="always the commonest")
    axis.legend(fontsize=7)
    axis = panel("Fig. 4 middle, 12: the same by layer, after training", "randomness (1: untrained network)")
    for layer, c in zip(r.layers, dark_to_bright):
        axis.plot(randomness, [r.value(r.linear, t, r.epochs[-1], layer) for t in r.random], "o-", color=c, label=layer)
    axis.legend(fontsize=7)
    axis = panel("Fig. 4 right: semantic / random targets, over its first value", ylabel="ratio")
    for measure in ("ncc_train", "ncc_test", "cdnv", "variance", "distance") if r.random else ():
        y = r.over_epochs(measure, r.random[0]) / r.over_epochs(measure, r.random[-1])
        axis.plot(r.epochs, y / y[0], "o-", label=measure)
    if r.random:
        axis.legend(fontsize=7)

    def superclass_gain(e):
        return r.over_layers(r.linear, "superclass", e) / r.over_layers(r.linear, "class", e)

    by_layer(panel("Fig. 5 left, 7: linear accuracy, classes", ""), lambda e: r.over_layers(r.linear, "class", e))
    by_layer(panel("Fig. 5 middle, 7: the same, superclasses", ""), lambda e: r.over_layers(r.linear, "superclass", e))
    by_layer(panel("Fig. 5 right: superclass / class, over its first value", "", "ratio"),
             lambda e: superclass_gain(e) / superclass_gain(r.epochs[0]))
    by_layer(panel("Fig. 8 bottom: NCC test accuracy, classes", ""), lambda e: r.over_layers("ncc_test", "class", e))
    by_layer(panel("Fig. 9 right: NCC test accuracy, samples", ""), lambda e: r.over_layers("ncc_test", "sample", e))
    by_layer(panel("CDNV, classes", "", ""), lambda e: r.over_layers("cdnv", "class", e))
    figure.suptitle(f"{folder.name}\nlinear: {r.linear}; where no layer is named: {r.kept}", y=0.995)
    save_figure(figure, folder / "figures.png")
    if (folder / "clusters.npz").exists():
        draw_clusters(folder, r)
    return folder / "figures.png"


def draw_clusters(folder: Path, r: Record) -> None:
    """Fig. 1: five samples' views, five classes, five superclasses in two dimensions, before and after training."""
    with np.load(folder / "clusters.npz") as f:
        points = dict(f)
    maps = {"PCA": lambda x: np.linalg.svd(x - x.mean(0), full_matrices=False)[0][:, :2]}
    if importlib.util.find_spec("umap"):
        maps["UMAP"] = lambda x: __import__("umap").UMAP(random_state=0).fit_transform(x)
    else:
        print("clusters.png is drawn by PCA; for UMAP beside it: pip install umap-learn")
    columns = [(name, when) for name in maps for when in ("before", "after") if f"{when}.{r.levels[0]}_x" in points]
    figure = Figure((4 * len(columns), 4 * len(r.levels)))
    for axis, (target, (name, when)) in zip(figure.subplots(len(r.levels), len(columns), squeeze=False).flat,
                                            [(t, c) for t in r.levels for c in columns]):
        x, y = points[f"{when}.{target}_x"], points[f"{when}.{target}_y"]
        place = maps[name](x.astype(np.float64))
        axis.scatter(place[:, 0], place[:, 1], c=np.unique(y, return_inverse=True)[1], cmap="tab10", vmax=9, s=8)
        axis.set(title=f"five of level {target}, {when} training, {name}", xticks=[], yticks=[])
    save_figure(figure, folder / "clusters.png")


def draw_comparison(folders: list) -> Path:
    """comparison.png: what the paper shows across runs (Fig. 3 right, 7, 8, 10, 11, 12), beside the first run."""
    runs = [Record(Path(f)) for f in folders]
    names = [r.folder.name.removeprefix(f"{NAME}-") for r in runs]
    figure = Figure((16, 11))
    axes = figure.subplots(2, 3).flat
    for axis, target, title in ((axes[0], "class", "Fig. 7, 11 top: linear accuracy by layer, classes"),
                                (axes[1], "superclass", "the same, superclasses")):
        for r, name in zip(runs, names):
            axis.plot(r.layers, r.over_layers(r.linear, target, r.epochs[-1]), "o-", label=name)
        axis.set(title=title, ylabel="%")
    for r, name in zip(runs, names):
        axes[2].plot(r.epochs, r.over_epochs(r.linear, "class"), "o-", label=name)
    axes[2].set(title="Fig. 7 bottom left: linear accuracy over training", xlabel="epoch", ylabel="%")
    for i, r in enumerate(runs):                                     # Fig. 10 normalises both parts by mu
        scale = r.config["variance"] if r.config["objective"] == "vicreg" else 1.0
        for part, style in (("regularisation", "-"), ("invariance", "--")):
            if r.log and part in r.log[0]:
                axes[3].plot([row["epoch"] for row in r.log], [row[part] / scale for row in r.log], style,
                             color=f"C{i}")
    axes[3].set(title="Fig. 10: regularisation (line), invariance (dashes), over mu", xlabel="epoch")
    for i, (r, name) in enumerate(zip(runs, names)):
        axes[4].bar([i - 0.2, i + 0.2], [r.value(m, "class", r.epochs[-1]) for m in ("ncc_train", "ncc_test")], 0.4,
                    color=[f"C{i}"], alpha=0.7, hatch=["", "//"], label=name)
    axes[4].set(title="Fig. 3 right: NCC accuracy, train and test (hatched)", ylabel="%", xticks=[])
    for r, name in zip(runs, names):
        axes[5].plot([float(t.split()[1]) for t in r.random], [r.value(r.linear, t, r.epochs[-1]) for t in r.random],
                     "o-", label=f"{name}, targets of {r.config['target_net']}")
    axes[5].set(title="Fig. 11, 12: linear accuracy by randomness of targets", xlabel="randomness", ylabel="%")
    for axis in axes:
        axis.title.set_fontsize(10)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=6)
    path = runs[0].folder.parent / "comparison.png"
    save_figure(figure, path)
    return path


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
def mean_std(values: list) -> tuple[float, float | None]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
def pm(value: tuple[float, float | None]) -> str:
    return f"{value[0]:.2f}" + ("" if value[1] is None else f" ± {value[1]:.2f}")


# ----------------------------------------------------------------------------------------------------------------
# 9 Export, and encoders that were exported
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
    """Write encoder.pt (TorchScript), weights.safetensors (torchvision's keys: a RES-L-H's blocks are its layer1) and
    samples.npz; read the encoder back.

    Returns the largest difference between the file's encoder and the live one, relative to the largest activation,
    over forward and activations at batches 1, 7 and 64. Above 1e-4 it is an error.
    """
    live = Net(a, split.size, len(classes))
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

    def library_key(key):                                            # layers.stem.conv1 -> conv1, layers.block3 ->
        block = re.match(r"layers\.block(\d+)", key)                 # layer2.0 of a ResNet-18, layer1.2 of a RES-L-H
        if not block:
            return key.removeprefix("layers.stem.")
        i = int(block[1]) - 1
        stage, place = (i // 2 + 1, i % 2) if a.arch == "resnet18" else (1, i)
        return key.replace(block[0], f"layer{stage}.{place}")

    weights = {library_key(k): v.contiguous() for k, v in live.state_dict().items()
               if not k.startswith(("layers.head", "layers.input"))}
    with written_whole(out / "weights.safetensors") as part:
        save_file(weights, part)
    images, index = some_pictures(split, a, next(net.parameters()).device)                    # for cka.py
    labels = torch.full((len(index),), -1) if split.labels is None else split.labels[index].cpu()
    with written_whole(out / "samples.npz") as part, open(part, "wb") as f:
        np.savez(f, images=(images * 255).round().to(torch.uint8).cpu().numpy(), labels=labels.numpy())
    return worst


def load_encoder(path: Path, device) -> tuple:
    """encoder.pt of any script -> (activations: images -> {layer: output}, its config.json)."""
    if not path.is_file():
        fail(f"--encoder {path}: no such file; a run writes RUN/encoder.pt")
    extra = {"config.json": ""}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.jit", category=Warning)
            model = torch.jit.load(str(path), map_location=device, _extra_files=extra).eval()
        config = json.loads(extra["config.json"] or "{}")
    except (RuntimeError, ValueError):
        fail(f"--encoder {path} is damaged or no exported encoder (TorchScript)")
    if config.get("script") == "simcse_deepaug":
        fail(f"--encoder {path} takes sentences, not pictures: simcse_deepaug.py scores it")
    if not hasattr(model, "activations") or not set(config) >= {"layers", "image_size"}:
        fail(f"--encoder {path} has no activations(images), or no config.json with its layers and image_size: export "
             "it with one of these scripts")
    return lambda images: dict(zip(config["layers"], model.activations(images))), config


# ----------------------------------------------------------------------------------------------------------------
# main
# ----------------------------------------------------------------------------------------------------------------

# same text in: vicreg_probe.py, topk_rescue.py
def new_folder(out: Path) -> None:
    """Make the run folder; nothing is lost: an older one of this name moves aside."""
    if out.exists():
        older = next(p for i in range(1, 10**6) if not (p := out.with_name(f"{out.name}.{i}")).exists())
        out.rename(older)
        print(f"{out} was there: moved to {older}")
    out.mkdir(parents=True, exist_ok=True)


def summary_of(rows: list, kept: str, bits: list, suffix: str = "") -> dict:
    """The flat numbers of report.json: what was measured at the representation, by level; and, as all scripts report
    them, linear (logistic regression) and knn of the classes."""
    result = {}
    for row in rows:
        if row["layer"] == kept.removesuffix(".even") and not row["target"].startswith("random"):
            for measure in ("svm", "ncc_train", "ncc_test", "cdnv", "variance", "distance"):
                if row[measure] is not None:
                    result[f"{measure}_{row['target']}{suffix}"] = row[measure]
            if row["knn"] is not None:
                result.update({f"linear{suffix}": row["logistic"], f"knn{suffix}": row["knn"]})
    if bits:
        result[f"information_bits{suffix}"] = statistics.mean(bits)
    return result


def show(rows: list) -> None:
    """Accuracy of every layer at the probed epochs: one table each for the levels."""
    epochs, layers = sorted({r["epoch"] for r in rows}), list(dict.fromkeys(r["layer"] for r in rows))
    table = {(r["epoch"], r["layer"], r["target"]): r for r in rows}
    for target in [t for t in LEVELS if (epochs[0], layers[-1], t) in table]:
        for measure, what in (("svm", "linear SVM, test %"), ("ncc_test", "nearest class centre, test %")):
            if table[epochs[0], layers[-1], target][measure] is not None:
                row = table[epochs[0], layers[-1], target]
                print(f"\n{target}, {row['classes']:.0f} classes (the commonest is {row['majority']:.1f} %): {what}")
                print(f"{'epoch':>8}" + "".join(f"{layer[-10:]:>11}" for layer in layers))
                for e in epochs:
                    print(f"{e:8.0f}" + "".join(f"{table[e, layer, target][measure]:11.2f}" for layer in layers))


def probe_encoder(a, device) -> dict:
    """--encoder: every layer of an exported encoder, on the data set that it was trained on, or on --dataset."""
    path = Path(a.encoder)
    activations, config = load_encoder(path, device)
    if not a.dataset:
        a.dataset = config.get("dataset")
        if a.dataset not in ("shapes", "cifar10", "cifar100", "folder"):
            fail(f"--encoder {path} does not say what it was trained on: add --dataset")
        if a.dataset == "folder" and a.data_dir == "data":
            a.data_dir = config["flags"]["data_dir"]
    a.image_size = config["image_size"]
    names = list(config["layers"])
    if a.probe_layers:
        names = [n for n in names if n in a.probe_layers or n.removesuffix(".even") in a.probe_layers]
        if len(names) < len(set(a.probe_layers)):
            fail(f"--probe-layers {' '.join(a.probe_layers)}: {path} has {', '.join(config['layers'])}")
    train_split, test_split, classes = load_data(a.dataset, a, device)
    probes = Probes(a, train_split, test_split, classes, device)
    probes.groups(activations, names)                                # refuses what does not fit, before anything else
    out = Path(a.out or path.parent / "probes")
    new_folder(out)
    probes.add_random_targets(out, False)
    kept = "avgpool" if "avgpool" in names else names[-1]            # what is called the representation
    save_json(out / "config.json", {**vars(a), "representation": kept, "encoder_config": config})
    rows, bits, _ = probes.run(activations, names, kept, 0, True)
    report = {**summary_of(rows, kept, bits), "script": NAME, "encoder": str(path), "dataset": a.dataset}
    save_csv(out / "probes.csv", rows)
    save_json(out / "report.json", report)
    draw_run(out)
    show(rows)
    print(f"\nin {out}: probes.csv, report.json, figures.png")
    return report


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
    if a.encoder:
        return probe_encoder(a, device)
    out = Path(a.out or f"runs/{a.name}-s{a.seed}")
    state = checkpoint_to_resume(a, out, device) if a.resume else None

    train_split, test_split, classes = load_data(a.dataset, a, device)
    if a.batch_size > len(train_split):
        fail(f"--batch-size {a.batch_size} is more than the {len(train_split)} training pictures")
    if state and state["data"] != len(train_split):
        fail(f"--resume with other pictures: the run had {state['data']}, {a.data_dir} has {len(train_split)}")
    if a.objective.startswith("supervised") and train_split.labels is None:
        fail(f"--objective {a.objective} needs labels: class folders")
    probes = Probes(a, train_split, test_split, classes, device)
    steps = len(train_split) // a.batch_size                         # of one epoch; the ragged rest is dropped
    net = build(a, train_split.size, classes, device)
    if a.init:
        path = Path(a.init) / "checkpoint.pt" if Path(a.init).is_dir() else Path(a.init)
        try:
            net.load_state_dict(load_checkpoint(path)["model"])
        except RuntimeError:
            fail(f"--init {a.init}: its network has other sizes; give the flags it was trained with (--arch, ...)")
    if a.targets is None:
        a.targets = net.targets = [auto_layer(net, train_split, a, device)]
    names = [n for n in net.numbered() if (n.removesuffix(".even") in a.probe_layers if a.probe_layers
                                           else n not in ("avgpool", "head"))]

    probes.groups(net.eval().activations, names)                     # refuses what does not fit, before anything else
    if chief and not a.resume:
        new_folder(out)
    if chief:
        out.mkdir(parents=True, exist_ok=True)
        save_json(out / "config.json", {
            **vars(a), "python": sys.version, "torch": torch.__version__, "torchvision": torchvision.__version__,
            "device_name": torch.cuda.get_device_name() if a.device == "cuda" else f"{torch.get_num_threads()} threads",
            "processes": world, "representation": names[-1],
            "script_sha256": hashlib.sha256(SOURCE.encode()).hexdigest()})
        print(f"{out}: {len(train_split)} pictures, {steps} steps an epoch, augmented layers {a.targets or 'none'}")
        probes.add_random_targets(out, state is not None)
    rows, information = [load_csv(out / f"{name}.csv") if state else [] for name in ("probes", "information")]

    def probe_after(epoch, stop):
        """Probe if this epoch is one to probe after and was not probed before an interruption."""
        if epoch not in a.probe_epochs or any(r["epoch"] == epoch for r in rows):
            return
        net.eval()
        new, bits, points = probes.run(net.activations, names, names[-1], epoch, epoch == a.epochs, stop)
        rows.extend(new)
        if bits:
            information[:] = [i for i in information if i["epoch"] != epoch] + [
                {"epoch": epoch, "bits": statistics.mean(bits), "std": statistics.stdev(bits)}]
            save_csv(out / "information.csv", information)
        if epoch in (0, a.epochs):
            kept = dict(np.load(out / "clusters.npz")) if epoch else {}
            kept.update({f"{'after' if epoch else 'before'}.{k}": v for k, v in points.items()})
            with written_whole(out / "clusters.npz") as part, open(part, "wb") as f:
                np.savez(f, **kept)
        save_csv(out / "probes.csv", rows)

    report = train(a, net, train_split, out, device, steps, probe_after, state)
    if not chief:
        return {}
    for suffix, epoch in (("_untrained", 0), ("", a.epochs)):
        bits = [i["bits"] for i in information if i["epoch"] == epoch]
        report.update(summary_of([r for r in rows if r["epoch"] == epoch], names[-1], bits, suffix))
    report.update({"broken_pictures": len(train_split.broken | test_split.broken), "script": NAME, "run": out.name,
                   "layers_augmented": a.targets, "flags": config_of(a)})
    save_json(out / "report.json", report)                           # now: whatever export and figures may meet
    report["export_difference"] = export(a, net, test_split, classes, out, report)
    draw_run(out)
    save_json(out / "report.json", report)
    show(rows)
    print(f"\n{report['steps']} steps in {report['seconds']:.0f} s, {report['images_per_second']:.0f} images/s; the "
          f"exported encoder differs from the live one by {report['export_difference']:.1g}")
    if report["broken_pictures"]:
        print(f"{report['broken_pictures']} pictures could not be read and were skipped")
    print(f"in {out}: encoder.pt, weights.safetensors, report.json, probes.csv, figures.png, clusters.png")
    return report


def main(argv=None) -> dict:
    """Run the command line `argv` (default: the program's own). Returns the report; with --seeds the means and
    standard deviations; with --figures the pictures' paths."""
    a = settings(argv)
    if a.figures:
        paths = {folder: str(draw_run(Path(folder))) for folder in a.figures}
        if len(paths) > 1:
            paths["comparison"] = str(draw_comparison(a.figures))
        print("drawn:", *paths.values(), sep="\n")
        return paths
    words = sys.argv[1:] if argv is None else list(argv)
    if "RANK" in os.environ and not dist.is_initialized():           # started by torchrun
        if a.device != "cpu" and torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if a.device != "cpu" and torch.cuda.is_available() else "gloo",
                                timeout=timedelta(hours=12))         # the others wait while the first one probes
    try:
        with on_signals(interrupt):
            reports = [run(argparse.Namespace(**{**vars(a), "seed": seed, "out": f"{a.out}/s{seed}" if a.out else ""}))
                       for seed in a.seeds or []]
            if not reports:
                return run(a)
        numbers = [k for k, v in reports[0].items() if isinstance(v, (int, float))]
        table = {k: mean_std([r[k] for r in reports]) for k in numbers}
        for k in ("linear_untrained", "linear", "knn", "svm_class", "ncc_test_class"):
            if k in table:
                print(f"{k:18} {pm(table[k])}  over seeds {a.seeds}")
        return table
    except Interrupted as stopped:
        go_on = shlex.join([w for w in words if w != "--resume"] + ([] if a.encoder else ["--resume"]))
        python = f"torchrun --nproc_per_node={dist.get_world_size()}" if dist.is_initialized() else "python"
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"\nstopped{'' if a.encoder else '; nothing is lost'}. To go on:\n"
                  f"{python} {shlex.quote(os.path.relpath(__file__))} {go_on}")
        raise SystemExit(128 + stopped.args[0]) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
