# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "transformers>=5.0", "numpy", "matplotlib", "tqdm", "pillow",
#                 "safetensors"]
# ///
"""Rescuing easy pairs in self-supervised pretraining, on SimCLR, MoCo v3 and DINOv2, the whole of it in one file.

Paper: Wang, Krajsek, Scharr, "Rescuing Easy Samples in Self-Supervised Pretraining" (VISAPP 2025). Definitions under
"same text in" are shared with the other scripts; equations they name are the Deep Augmentation paper's (2303.14537).

A self-supervised method makes two views y_a, y_b of every picture and learns from their embeddings z_a, z_b. Where the
two are alike already there is little left to learn. So of the N pairs of a batch take the k most similar ones, make one
*strong* view of each of those pictures (RandAugment and a cutout), and pull it towards the first view:

    L = L_SSL(z_a, z_b) + s L_topk,    L_topk = -mean over the k chosen of cos(z_a, z_s)                      (Eq. 1, 2)

That is Algorithm 1, `Rescue` in section 7. It only costs k/N of one more view (k = N/64), and needs nothing of the
method but z_a and z_b. Which z's (the paper does not say): z_b and z_s always come from the network that is trained,
z_a from the side that the method compares it with, its anchor:

    method   z_a                                      z_b and z_s                               L_topk's gradient
    simclr   projector, the same network              projector                                 through z_a and z_s
    mocov3   momentum encoder's projector             projector and predictor                   through z_s
    dinov2   teacher's head before the prototypes     student's head before the prototypes      through z_s

So "easy" is measured on a pair that L_SSL itself compares (one of its two directions), and every method is pulled the
way it pulls anyway: SimCLR both ends (its negatives keep them from meeting in one point), the others only towards a
target without gradient. DINOv2's pair is its two global crops, for only these see most of the picture (the student's
is masked in half of the cases, its strong view never). s is a weight relative to L_SSL's gradient, which grows as 1/T
in SimCLR: the paper's 0.75 goes with T = 0.1, the default here; with T = 0.5 it is far too much (docs/results.md).

--rescue asks the obvious questions: is it the easy ones that matter (topk), would random or the hardest ones do, would
all? --strong deepaug joins the two papers: the strong view is y_b once more, with Deep Augmentation at --layer.

Commands
    python topk_rescue.py                                                # SimCLR, drawn shapes: baseline, then rescue
    python topk_rescue.py --method mocov3                                # MoCo v3; with --arch vit-tiny its ViT recipe
    python topk_rescue.py --method dinov2                                # DINOv2, a tiny ViT
    python topk_rescue.py --strong deepaug --layer 4                     # strong views by Deep Augmentation
    python topk_rescue.py --sweep k 1 4 16 64 --seeds 0 1                # Fig. 6; --sweep s 0.1 1 10: Fig. 5
    python topk_rescue.py --preset cifar --method dinov2                 # ViT-S/4, CIFAR-100, for a GPU
    python topk_rescue.py --preset paper --data-dir imagenet             # the paper's setting, for many GPUs
    python topk_rescue.py --compare runs/*                               # table and figure of finished runs
    torchrun --nproc_per_node=4 topk_rescue.py --preset paper --data-dir imagenet --no-baseline

What to expect
    The default run takes under three minutes on two CPU cores. Linear probe of 20 drawn classes (three seeds):
    untrained 21.8, SimCLR 88.9 ± 1.1, with rescue 82.4 ± 2.5 %. CIFAR-100, small networks, 6 to 10 epochs: SimCLR
    26.0 ± 0.3, with rescue 24.2 ± 0.8; MoCo v3 23.4 and 22.3; DINOv2 16.7 and 11.3 %. So short trainings with 2 to 8
    rescued pictures a step do not show the paper's gain (on ImageNet +1.1, +0.6, +0.5 points, 16 to 128 pictures):
    docs/results.md has sweeps of s and k, and what goes wrong.

Deviations from the paper and the published codes, and what they leave open
    1. The chosen k are the k of the whole batch, over all processes (--batch-size is over all processes too).
    2. In the strong views' pass BatchNorm normalises by its running statistics, which it does not change then: k may
       be 1, and statistics of a few distorted pictures would be noise. The paper does not say.
    3. A strong view is of the whole picture, as Algorithm 1 has it: RandAugment as FixMatch's (kekmodel
       randaugment.py:147), strengths drawn continuously, then a grey square of half the side.
    4. With --dataset folder and pictures of different sizes, workers decode and cut the central square at 8/7 of
       --image-size; all crops are made from that, on the device.
    5. Learning rates warm up over at most a tenth of the run (moco-v3's ViT: 40 of 300 epochs) onto a cosine that
       began with the run, and end at a thousandth (moco-v3: 0; DINOv2: 1e-6); the ragged last batch of an epoch is
       dropped; colour operations come in one random order per batch.
    6. ViTs are transformers' Dinov2Model for all methods; with --layer-scale 1 it starts as the plain ViT. Its
       representation is the class token after the last LayerNorm. mocov3: fixed sine-cosine positions, patch projection
       frozen (moco-v3 vits.py:50); its initialisation is transformers'.
    7. dinov2: masks have exactly the drawn number of patches (rectangles first, then single ones); KoLeo looks for
       neighbours among all processes' rows; gradients are clipped over all parameters together. The paper's
       "square rooted scale learning rate 0.004" is read as 0.004 * sqrt(2048 / 1024), its "100 epochs (i.e. 12500
       iterations)" as 100 passes over the data.
    8. The linear probe is a logistic regression on features of unaugmented pictures (see probe_logits), --transfer's
       too; SUN397 and Caltech-101, which have no split in torchvision, get 50 + 50 and 30 + rest pictures a class.
    9. simclr's head is SupContrast's, without BatchNorm. The paper names k = 128, 64 and 16 in Section 4 (--preset
       paper; scaled with --batch-size) and k = N/64 as the rule in Section 5 (the default).
   10. On CUDA networks run in bfloat16 (losses and weights in float32). With several processes BatchNorm is
       synchronised on CUDA only, and the logged numbers are those of the first process.
"""
import argparse
import copy
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
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import transformers
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.models.resnet import BasicBlock
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

NAME = "topk_rescue"
SOURCE = Path(__file__).read_text(encoding="utf-8")                 # goes into every checkpoint

# ----------------------------------------------------------------------------------------------------------------
# 1 Settings
# ----------------------------------------------------------------------------------------------------------------

VITS = {"vit-tiny": (64, 4, 2), "vit-s": (384, 12, 6), "vit-b": (768, 12, 12), "vit-l": (1024, 24, 16)}
ARCHS = ["small", "resnet18", "resnet34", "resnet50", *VITS]         # of a ViT: width, blocks, heads

# Defaults by preset and method ("-vit": with --arch vit-*); what "cifar" and "paper" leave out is as in "default".
# s: Section 4 and Fig. 5.
RECIPES = {
    "default": {
        "simclr": dict(s=0.75, arch="small", projector=[128, 128], temperature=0.1, lr=0.5),
        "simclr-vit": dict(s=0.75, projector=[256, 128], temperature=0.1, optimizer="adamw", lr=1e-3,
                           weight_decay=0.1),
        "mocov3": dict(s=0.05, arch="small", projector=[512, 128], temperature=0.2, lr=0.5, momentum=0.99),
        "mocov3-vit": dict(s=0.025, arch="vit-tiny", projector=[512, 128], temperature=0.2, momentum=0.99,
                           optimizer="adamw", lr=1e-3, weight_decay=0.1),
        "dinov2": dict(s=1.0, arch="vit-tiny", projector=[512, 128], temperature=0.1, momentum=0.992, optimizer="adamw",
                       lr=2e-3, weight_decay=0.04, crop_min=0.32, local_crops=4, prototypes=1024, batch_size=128,
                       centering="sinkhorn")},
    # Ours: MoCo v3's projector and temperature as solo-learn's
    "cifar": {
        "simclr": dict(arch="resnet18", batch_size=1024, lr=1.0, projector=[512, 128]),
        "simclr-vit": dict(batch_size=512),
        "mocov3": dict(arch="resnet18", batch_size=512, lr=0.6, weight_decay=1e-4, projector=[4096, 256],
                       solarize=[0.0, 0.2], jitter=[0.4, 0.4, 0.2, 0.1]),
        "mocov3-vit": dict(arch="vit-s", batch_size=512, lr=1.5e-4 * 4, projector=[4096, 256], solarize=[0.0, 0.2],
                           jitter=[0.4, 0.4, 0.2, 0.1]),
        "dinov2": dict(arch="vit-s", batch_size=512, lr=1e-3, projector=[2048, 256], prototypes=8192, local_crops=8,
                       solarize=[0.0, 0.2, 0.0], jitter=[0.4, 0.4, 0.2, 0.1], drop_path=0.1)},
    # The paper's Section 4; what it does not say is from the base methods' own code
    "paper": {
        "simclr": dict(arch="resnet50", k=128, batch_size=4096, epochs=1000, lr=4.8, optimizer="lars",
                       weight_decay=1e-6, projector=[2048, 128], crop_min=0.08, blur=[0.5],
                       jitter=[0.8, 0.8, 0.8, 0.2]),
        "simclr-vit": dict(batch_size=4096, crop_min=0.08, blur=[0.5], jitter=[0.8, 0.8, 0.8, 0.2]),
        "mocov3": dict(arch="resnet50", k=64, batch_size=4096, epochs=800, lr=4.8, optimizer="lars", weight_decay=1e-6,
                       temperature=1.0, projector=[4096, 256], crop_min=0.2, blur=[1.0, 0.1], solarize=[0.0, 0.2],
                       jitter=[0.4, 0.4, 0.2, 0.1]),
        "mocov3-vit": dict(arch="vit-s", k=64, batch_size=4096, epochs=300, lr=0.0024, warmup_epochs=40,
                           projector=[4096, 256], crop_min=0.08, blur=[1.0, 0.1], solarize=[0.0, 0.2],
                           jitter=[0.4, 0.4, 0.2, 0.1]),
        "dinov2": dict(arch="vit-l", k=16, batch_size=2048, epochs=100, lr=0.004 * 2 ** 0.5, projector=[2048, 256],
                       prototypes=65536, centering="centering", local_crops=8, local_size=96,
                       blur=[1.0, 0.1, 0.5], solarize=[0.0, 0.2, 0.0], jitter=[0.4, 0.4, 0.2, 0.1], drop_path=0.3,
                       layer_scale=1e-5)}}
PRESETS = {"default": {}, "cifar": dict(dataset="cifar100", epochs=200, warmup_epochs=10),
           "paper": dict(dataset="folder", image_size=224, warmup_epochs=10)}
# Flags that say where and how a run computes, not what: they may change on --resume and are no part of its name.
# (`preset` only sets defaults of other flags, and those count.)
FREE = {"out", "resume", "device", "data_dir", "download", "workers", "compile", "log_every", "save_every", "seeds",
        "compare", "export", "transfer", "probe_every", "preset", "baseline", "sweep", "defaults"}


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
    p = Parser(description="Rescuing easy pairs on SimCLR, MoCo v3 and DINOv2. Defaults of many flags depend on "
               "--method and --preset; they are those of this command line.",
               formatter_class=argparse.ArgumentDefaultsHelpFormatter, add_help=False)
    p.add_argument("-h", "--help", action="store_true", help="show this and leave")
    g = p.add_argument_group("rescue")
    g.add_argument("--rescue", choices=["topk", "random", "hardest", "all", "none"], default="topk",
                   help="which pairs get a strong view: the k most similar, any k, the k least similar, all, none")
    g.add_argument("--k", type=int, help="pairs a batch, over all processes; the paper's rule: N / 64")
    g.add_argument("--s", type=float, help="weight of the rescue term, >= 0")
    g.add_argument("--strong", choices=["randaugment", "deepaug"], default="randaugment",
                   help="the strong view: RandAugment and cutout; or the second view with Deep Augmentation at --layer")
    g.add_argument("--baseline", action=argparse.BooleanOptionalAction, default=True,
                   help="train --rescue none too, for comparison; a finished one is not trained again")
    g = p.add_argument_group("deep augmentation (--strong deepaug)")
    g.add_argument("--layer", nargs="+", default=["4"], metavar="L",
                   help="ResNet: -1 input, 0 stem, 1-4 stages, 5 average pool, 6 head. ViT of B blocks: 0 embeddings, "
                        "1-B blocks, B+1 class token, B+2 head. Several; all (from 0 on); none; auto")
    g.add_argument("--rate", type=float, default=0.5, help="dropout rate, in [0, 1)")
    g.add_argument("--stop-grad", action=argparse.BooleanOptionalAction, default=True,
                   help="no gradient from augmented rows below the layer")
    g.add_argument("--sample", type=float, default=1.0, help="share of the strong views' rows to augment, in (0, 1]")
    g.add_argument("--transform", choices=["dropout", "channel", "pca"], default="dropout",
                   help="element-wise dropout, dropout of whole channels, or removal of principal components")
    g.add_argument("--components", type=int, default=1, help="pca: how many leading components are removed")
    g = p.add_argument_group("data and views")
    g.add_argument("--dataset", choices=["shapes", "cifar10", "cifar100", "folder"], default="shapes")
    g.add_argument("--data-dir", default="data", help="where CIFAR and the --transfer sets lie; with --dataset folder: "
                                                      "your pictures")
    g.add_argument("--download", action="store_true", help="let torchvision download CIFAR")
    g.add_argument("--image-size", type=int, default=0, metavar="PX",
                   help="side of a view; 0: the pictures' own if all are one square size up to 224, else 224")
    g.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that decode pictures")
    g.add_argument("--crop-min", type=float, default=0.2, help="smallest crop, as a share of the picture's area")
    g.add_argument("--jitter", type=float, nargs=4, default=[0.4, 0.4, 0.4, 0.1], metavar=("B", "C", "S", "H"),
                   help="strength of brightness, contrast, saturation, hue")
    g.add_argument("--blur", type=float, nargs="+", default=[0.0], metavar="P",
                   help="probability of Gaussian blur: first view, second, local crops; the last one given goes on")
    g.add_argument("--solarize", type=float, nargs="+", default=[0.0], metavar="P", help="of solarising, likewise")
    g = p.add_argument_group("base method and network")
    g.add_argument("--method", choices=["simclr", "mocov3", "dinov2"], default="simclr")
    g.add_argument("--arch", choices=ARCHS)
    g.add_argument("--patch", type=int, default=0, metavar="PX",
                   help="ViT: side of a patch; 0: 16, for views up to 64 pixels 4, vit-tiny 8")
    g.add_argument("--projector", type=int, nargs=2, metavar=("HIDDEN", "OUT"), help="sizes of the head")
    g.add_argument("--temperature", type=float, default=0.5, help="of the contrastive loss, or of DINOv2's student")
    g.add_argument("--momentum", type=float, default=0.99, help="of the target network at the start; it ends at 1")
    g.add_argument("--local-crops", type=int, default=8, help="dinov2: small crops a picture; 0: none")
    g.add_argument("--local-size", type=int, default=0, metavar="PX", help="dinov2: their side; 0: half a view")
    g.add_argument("--prototypes", type=int, default=65536, help="dinov2: outputs of the head")
    g.add_argument("--centering", choices=["centering", "sinkhorn"], default="centering",
                   help="dinov2: what keeps the teacher's outputs spread over the prototypes")
    g.add_argument("--drop-path", type=float, default=0.0, help="dinov2: rate of stochastic depth, in [0, 1)")
    g.add_argument("--layer-scale", type=float, default=1.0, help="ViT: start of LayerScale")
    g = p.add_argument_group("training")
    g.add_argument("--preset", choices=list(PRESETS), default="default", help="for drawn shapes; CIFAR; ImageNet")
    g.add_argument("--epochs", type=int, default=15)
    g.add_argument("--batch-size", type=int, default=256, help="pictures a step, over all processes")
    g.add_argument("--lr", type=float, help="peak learning rate")
    g.add_argument("--optimizer", choices=["sgd", "lars", "adamw"], default="sgd")
    g.add_argument("--weight-decay", type=float, default=1e-4, help="dinov2: at the start; it ends at ten times that")
    g.add_argument("--warmup-epochs", type=int, default=1, help="linear warm-up from lr/50, at most a tenth of the run")
    g = p.add_argument_group("run")
    g.add_argument("--out", default="", help="run folder; empty: runs/NAME-DATASET-WHAT DIFFERS-sSEED")
    g.add_argument("--seed", type=int, default=0, help="fixes weights, order, views and dropout")
    g.add_argument("--seeds", type=int, nargs="+", help="run each of these seeds and report mean ± std")
    g.add_argument("--sweep", nargs="+", metavar=("k|s", "VALUE"), help="run each of these values (Fig. 5, 6)")
    g.add_argument("--resume", action="store_true", help="go on from the run folder's checkpoint.pt")
    g.add_argument("--init", default="", metavar="RUN", help="start from the weights of this run folder")
    g.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    g.add_argument("--compile", action="store_true", help="torch.compile the networks (a minute to start, then faster)")
    g.add_argument("--deterministic", action="store_true", help="same bits every time on CUDA too (slower)")
    g.add_argument("--log-every", type=int, default=10, metavar="STEPS")
    g.add_argument("--save-every", type=float, default=60, metavar="SECONDS", help="between checkpoints")
    g = p.add_argument_group("evaluation and export")
    g.add_argument("--probe-every", type=int, default=0, metavar="EPOCHS", help="probe during training too; 0: never")
    g.add_argument("--transfer", choices=list(TRANSFER), nargs="+", default=[], metavar="SET",
                   help=f"linear probes on these too, if they lie in --data-dir (Table 1): {', '.join(TRANSFER)}")
    g.add_argument("--export", choices=["torchscript", "pt2"], default="torchscript", help="pt2: its format beside it")
    g.add_argument("--compare", nargs="+", metavar="RUN", help="only print and draw these finished runs")

    a = p.parse_args(argv)
    recipe = f"{a.method}-vit" if a.method != "dinov2" and a.arch in VITS else a.method
    p.set_defaults(**{**RECIPES["default"][recipe], **PRESETS[a.preset], **RECIPES[a.preset][recipe]})
    if recipe == "mocov3-vit" and a.arch == "vit-b":
        p.set_defaults(s=0.05)                                       # Section 5
    share = (p.get_default("k") or 0) / p.get_default("batch_size") or 1 / 64
    p.set_defaults(k=max(1, round(share * p.parse_args(argv).batch_size)))       # --batch-size as given
    a = p.parse_args(argv)                                           # now with the defaults of method and preset
    if a.help:
        p.print_help()
        raise SystemExit(0)
    a.defaults = {k: p.get_default(k) for k in vars(a)}
    del a.help
    check_settings(a)
    a.name = run_name(a)
    return a


# same text in: simclr_deepaug.py, vicreg_probe.py, topk_rescue.py
def config_of(a) -> dict:
    """The flags that decide what is computed. With --dataset folder the folder is one of them."""
    free = FREE - {"data_dir"} if a.dataset == "folder" else FREE
    return {k: v for k, v in vars(a).items() if k not in free | {"name", "targets"}}


def run_name(a) -> str:
    """NAME-DATASET-METHOD-WHAT DIFFERS from the defaults of this method and preset."""
    differs = [f"{k.replace('_', '')}{'_'.join(map(str, v)) if isinstance(v, list) else Path(str(v)).name}"
               for k, v in config_of(a).items() if k not in ("dataset", "method", "seed") and v != a.defaults[k]]
    return "-".join([NAME, a.dataset, a.method] + ([a.preset] if a.preset != "default" else []) + differs)


def layer_names(a) -> dict:
    """{number: name} of the layers of --arch."""
    if a.arch in VITS:
        blocks = VITS[a.arch][1]
        return {-1: "input", 0: "embed", **{l: f"block{l}" for l in range(1, blocks + 1)},
                blocks + 1: "cls", blocks + 2: "head"}
    return {-1: "input", 0: "stem", 1: "layer1", 2: "layer2", 3: "layer3", 4: "layer4", 5: "avgpool", 6: "head"}


def check_settings(a: argparse.Namespace) -> None:
    world, names = int(os.environ.get("WORLD_SIZE", "1")), layer_names(a)        # WORLD_SIZE is set by torchrun
    if len(a.layer) == 1 and a.layer[0] in ("none", "all", "auto"):
        a.targets = {"none": [], "all": list(range(len(names) - 1)), "auto": None}[a.layer[0]]
    elif all(re.fullmatch(r"-?\d+", l) and int(l) in names for l in a.layer):
        a.targets = sorted({int(l) for l in a.layer})
        a.layer = [str(t) for t in a.targets]
    else:
        fail(f"--layer {' '.join(a.layer)}: no such layer of {a.arch}; there are "
             + ", ".join(f"{i} {n}" for i, n in names.items()) + "; or all, none, auto")
    deep, vit = a.strong == "deepaug" and a.rescue != "none", a.arch in VITS
    for ok, message in [
        (0 <= a.k <= a.batch_size, f"--k {a.k}: must be between 0 and the batch size, {a.batch_size}"),
        (0 <= a.s < math.inf, f"--s {a.s}: must not be negative"),
        (0 <= a.rate < 1, f"--rate {a.rate}: must be in [0, 1)"),
        (0 < a.sample <= 1, f"--sample {a.sample}: must be in (0, 1]"),
        (a.components >= 1, f"--components {a.components}: must be at least 1"),
        (not deep or a.targets != [], "--strong deepaug needs a --layer"),
        (not deep or a.transform != "pca" or a.k // world > a.components + 1,
         f"--transform pca finds its components among the strong views: --k {a.k} is too few for {a.components}"),
        (not deep or a.method != "dinov2" or not a.stop_grad or a.sample < 1 or max(names) not in (a.targets or []),
         "--layer: stop-gradient at the head leaves the rescue term no gradient at all"),
        (a.targets is not None or importlib.util.find_spec("cka"), "--layer auto needs cka.py beside this script"),
        (a.targets is not None or a.init, f"--layer auto reads a trained network: make one with `python {NAME}.py "
                                          f"--rescue none --out runs/base`, add --init runs/base"),
        (a.batch_size >= 2 and a.epochs >= 1, "--batch-size must be at least 2 and --epochs at least 1"),
        (0 < a.lr < math.inf and 0 < a.temperature < math.inf, "--lr and --temperature must be positive"),
        (0 < a.crop_min <= 1, f"--crop-min {a.crop_min}: must be in (0, 1]"),
        (all(0 <= p <= 1 for p in a.blur + a.solarize) and max(len(a.blur), len(a.solarize)) <= 3,
         "--blur and --solarize are one to three probabilities"),
        (all(0 <= j <= 1 for j in a.jitter[:3]) and 0 <= a.jitter[3] <= 0.5,
         "--jitter: brightness, contrast and saturation in [0, 1], hue in [0, 0.5]"),
        (a.method != "dinov2" or vit, f"--method dinov2 masks patches: it needs a ViT, --arch {' or '.join(VITS)}"),
        (min(a.patch, a.local_crops, a.local_size) >= 0,
         "--patch, --local-crops and --local-size must not be negative"),
        (min(a.projector) >= 2 and a.prototypes >= 2, "--projector and --prototypes must be at least 2"),
        (0 <= a.momentum <= 1, f"--momentum {a.momentum}: must be in [0, 1]"),
        (0 <= a.drop_path < 1 and 0 < a.layer_scale < math.inf, "--drop-path: in [0, 1); --layer-scale: positive"),
        (a.log_every >= 1, "--log-every must be at least 1"),
        (0 <= a.weight_decay < math.inf, f"--weight-decay {a.weight_decay}: must not be negative"),
        (a.save_every >= 0, f"--save-every {a.save_every}: must not be negative"),
        (min(a.workers, a.image_size, a.warmup_epochs, a.probe_every) >= 0,
         "--workers, --image-size, --warmup-epochs and --probe-every must not be negative"),
        (all(0 <= s < 2 ** 43 for s in [a.seed, *(a.seeds or [])]), "--seed and --seeds must be in 0 .. 2^43 - 1"),
        (len(set(a.seeds or [])) == len(a.seeds or []), "--seeds must differ from each other"),
        (not a.compile or shutil.which(os.environ.get("CXX", "g++")), "--compile needs a C++ compiler (g++)"),
        (not a.deterministic or a.device == "cpu" or not torch.cuda.is_available()
         or a.method != "dinov2" or a.local_crops == 0,
         "--deterministic: a ViT's bicubic positions for local crops have no such form on CUDA; add --local-crops 0"),
        (world == 1 or not (a.seeds or a.sweep or a.download or (a.baseline and a.rescue != "none")),
         "under torchrun: one run at a time (--no-baseline, no --seeds, no --sweep), and --download beforehand"),
        (a.batch_size % world == 0 and (a.k % world == 0 or a.rescue in ("all", "none")),
         f"--batch-size {a.batch_size} and --k {a.k} must be multiples of the {world} processes"),
        (a.device != "cuda" or torch.cuda.is_available(), "--device cuda: no CUDA device here; use --device cpu"),
    ]:
        if not ok:
            fail(message)
    if a.sweep:
        name, *values = a.sweep
        if (name not in ("k", "s") or not values or len(set(values)) < len(values) or a.rescue == "none"
                or (name == "k" and a.rescue == "all")):
            fail("--sweep: k or s, then its different values, with a --rescue that uses it")
        for value in values:
            try:
                value = {"k": int, "s": float}[name](value)
            except ValueError:
                fail(f"--sweep {name} {value}: not a number")
            if not 0 <= value <= (a.batch_size if name == "k" else 1e9):
                fail(f"--sweep {name} {value}: out of range")


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


def train_batches(split: Split, a, device, step: int, steps: int, rank: int, world: int):
    """Endless shuffled batches from step `step` on: (whole pictures uint8 [B, 3, H, W], their numbers [B]), on the
    device. The order of an epoch is a function of (seed, epoch), so a resumed run sees what an uninterrupted one sees.
    Streamed pictures are central squares of 8/7 of a view's side (256 for 224). steps: steps of one epoch.
    """
    side = split.size * 8 // 7
    square = v2.Compose([v2.Resize(side, antialias=True), v2.CenterCrop(side)])
    while True:
        epoch, first = divmod(step, steps)
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(a.seed * 100_003 + epoch))
        order = order[:steps * a.batch_size].view(steps, world, a.batch_size // world)[first:, rank]
        if split.images is not None:
            for index in order.to(device, non_blocking=True):        # the host does not wait
                yield split.images[index], index
        else:
            for x, used, _ in decode(split, order.flatten(), square, a, order.shape[1], epoch):
                yield x.to(device, non_blocking=True), used.to(device, non_blocking=True)
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


def blur_and_solarize(a, which: int) -> list:
    """Their probabilities for the first (which = 0) and second (1) view and local crops (2)."""
    return [[*p, p[-1], p[-1]][which] for p in (a.blur, a.solarize)]


def common_view(images: Tensor, size: int, a, which: int) -> Tensor:
    """The first (which = 0) or second (1) view of every picture, float32 [B, 3, size, size]."""
    return make_views(images, size, a.crop_min, *blur_and_solarize(a, which), tuple(a.jitter))


def local_crops(images: Tensor, a) -> Tensor:
    """DINOv2's small crops, .05 of the picture up to --crop-min: float32 [L * B, 3, s, s], crop by crop."""
    return make_views(images.repeat(a.local_crops, 1, 1, 1), a.local_size, 0.05, *blur_and_solarize(a, 2),
                      tuple(a.jitter), crop_max=max(a.crop_min, 0.05))


def warp(x: Tensor, a, b, c, d, e, f) -> Tensor:
    """PIL's transform(AFFINE), nearest neighbour: what stands at column u, row v of the result is x's pixel at column
    a u + b v + c, row d u + e v + f, black outside; x uint8 [3, H, W]. (torchvision's, like its sharpness below, copies
    a small tensor to the GPU, for which the host waits.)"""
    height, width = x.shape[1:]
    u, v = torch.arange(width, device=x.device) + 0.5, torch.arange(height, device=x.device).unsqueeze(1) + 0.5
    column, row = (a * u + b * v + c).floor().long(), (d * u + e * v + f).floor().long()      # [H, W]
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    return x[:, row.clamp(0, height - 1), column.clamp(0, width - 1)] * inside


def rotate(x: Tensor, degrees: float) -> Tensor:
    """About the centre, counterclockwise."""
    sin, cos = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    v, u = x.shape[1] / 2, x.shape[2] / 2
    return warp(x, cos, -sin, u - cos * u + sin * v, sin, cos, v - sin * u - cos * v)


def sharpness(x: Tensor, factor: float) -> Tensor:
    """PIL's: from its 3x3 filter SMOOTH (centre 5/13, neighbours 1/13; the border stays) to the picture itself."""
    x = x.float()
    smooth = x.clone()
    smooth[:, 1:-1, 1:-1] = ((9 * F.avg_pool2d(x, 3, 1) + 4 * x[:, 1:-1, 1:-1]) / 13).round()
    return smooth.lerp(x, factor).to(torch.uint8)


# FixMatch's RandAugment (kekmodel randaugment.py:147): 14 operations on x, uint8 [3, H, W], and the range of strength v
OPERATIONS = {
    "AutoContrast": (0, 0, lambda x, v: TF.autocontrast(x)),
    "Brightness": (0.05, 0.95, TF.adjust_brightness),                # an enhancer's factor: 1 would change nothing
    "Color": (0.05, 0.95, TF.adjust_saturation),
    "Contrast": (0.05, 0.95, TF.adjust_contrast),
    "Equalize": (0, 0, lambda x, v: TF.equalize(x)),
    "Identity": (0, 0, lambda x, v: x),
    "Posterize": (4, 9, lambda x, v: TF.posterize(x, int(v))),       # 4 to 8 bits stay
    "Rotate": (-30, 30, rotate),
    "Sharpness": (0.05, 0.95, sharpness),
    "ShearX": (-0.3, 0.3, lambda x, v: warp(x, 1, v, 0, 0, 1, 0)),
    "ShearY": (-0.3, 0.3, lambda x, v: warp(x, 1, 0, 0, v, 1, 0)),
    "Solarize": (0, 256, lambda x, v: TF.solarize(x, min(v, 255.0))),
    "TranslateX": (-0.3, 0.3, lambda x, v: warp(x, 1, 0, round(v * x.shape[2]), 0, 1, 0)),
    "TranslateY": (-0.3, 0.3, lambda x, v: warp(x, 1, 0, 0, 0, 1, round(v * x.shape[1])))}


def strong_views(images: Tensor, size: int) -> Tensor:
    """RandAugment and cutout: uint8 [k, 3, H, W] -> float32 [k, 3, size, size] in 0..1, every picture its own.

    Two of the 14 operations, each with probability .5, then always a grey square of half the side, cut at the border.
    Parameters are drawn on the host; a loop, for k is small.
    """
    k = len(images)
    whole = (to_unit(images, size) * 255).round().to(torch.uint8)
    which, strength, use = torch.randint(len(OPERATIONS), (k, 2)), torch.rand(k, 2), torch.rand(k, 2) < 0.5
    operations, out = list(OPERATIONS.values()), []
    for x, *drawn in zip(whole, which.tolist(), strength.tolist(), use.tolist()):
        for i, t, yes in zip(*drawn):
            if yes:
                low, high, operation = operations[i]
                x = operation(x, low + (high - low) * t)
        out.append(x)
    side, axis = size // 2, torch.arange(size, device=images.device)
    start = (torch.rand(2, k, 1) * size - side / 2).clamp(min=0).floor().to(images.device, non_blocking=True)  # y, x
    down, across = (axis >= start) & (axis < start + side)                                    # each [k, size]
    cut = (down.unsqueeze(2) & across.unsqueeze(1)).unsqueeze(1)                              # [k, 1, size, size]
    return torch.where(cut, 127 / 255, torch.stack(out).float() / 255)


# ----------------------------------------------------------------------------------------------------------------
# 4 Network: torchvision's ResNets and transformers' ViT, cut into numbered layers
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


def resnet(a, size: int) -> tuple[nn.Module, int]:
    """torchvision's ResNet of this --arch without its classifier, and its width."""
    r = torchvision.models.get_model("resnet18" if a.arch == "small" else a.arch, weights=None)
    dim = r.fc.in_features
    if a.arch == "small":                                            # one block a stage, 16-128 channels, for laptops
        r.conv1, r.bn1, r.maxpool = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.Identity()
        r.layer1, dim = nn.Sequential(BasicBlock(16, 16)), 128
        for c, stage in ((16, "layer2"), (32, "layer3"), (64, "layer4")):
            shortcut = nn.Sequential(nn.Conv2d(c, 2 * c, 1, 2, bias=False), nn.BatchNorm2d(2 * c))
            setattr(r, stage, nn.Sequential(BasicBlock(c, 2 * c, 2, shortcut)))
    elif size < 64:                                                  # SupContrast resnet_big.py: 3x3 stem, no maxpool
        r.conv1, r.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    for conv in r.modules():
        if isinstance(conv, nn.Conv2d):                              # torchvision's initialisation
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    r.fc = nn.Identity()
    return r, dim


def vit(a, size: int) -> tuple[nn.Module, int]:
    """transformers' ViT with mask token, LayerScale and stochastic depth (Dinov2Model), and its width."""
    dim, blocks, heads = VITS[a.arch]
    config = transformers.Dinov2Config(
        hidden_size=dim, num_hidden_layers=blocks, num_attention_heads=heads, image_size=size, patch_size=a.patch,
        layerscale_value=a.layer_scale, drop_path_rate=a.drop_path if a.method == "dinov2" else 0.0,
        use_mask_token=a.method == "dinov2")
    v = transformers.Dinov2Model(config)
    if a.method == "mocov3":                                         # moco-v3 vits.py:50
        v.embeddings.position_embeddings.data.copy_(sine_positions(size // a.patch, dim))
        v.embeddings.position_embeddings.requires_grad_(False)
        v.embeddings.patch_embeddings.projection.requires_grad_(False)
    return v, dim


def sine_positions(side: int, dim: int) -> Tensor:
    """[1, 1 + side * side, dim]: a quarter of the dimensions each sin and cos of column and row, zeros for the class
    token (moco-v3 vits.py:53)."""
    omega = 10_000 ** -(torch.arange(dim // 4) / (dim // 4))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [place.reshape(-1, 1) * omega for place in (columns, rows)]                      # each [side^2, dim / 4]
    patches = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
    return torch.cat([torch.zeros(1, dim), patches]).unsqueeze(0)


def mlp(sizes: list, last_norm: bool) -> nn.Sequential:
    """MoCo v3's heads (moco-v3 builder.py:35): Linear, BatchNorm, ReLU ...; the last BatchNorm is without weights."""
    layers = []
    for i, (n, m) in enumerate(zip(sizes, sizes[1:])):
        layers.append(nn.Linear(n, m, bias=False))
        if i < len(sizes) - 2:
            layers += [nn.BatchNorm1d(m), nn.ReLU()]
        elif last_norm:
            layers.append(nn.BatchNorm1d(m, affine=False))
    return nn.Sequential(*layers)


def projector(a, dim: int) -> nn.Sequential:
    """The head of each base method: [B, dim] -> [B, OUT]."""
    hidden, out = a.projector
    if a.method == "simclr":                                         # SupContrast resnet_big.py:174: ReLU, no BN
        return nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, out))
    if a.method == "mocov3":                                         # two layers on a ResNet, three on a ViT
        return mlp([dim, hidden, hidden, out] if a.arch in VITS else [dim, hidden, out], last_norm=True)
    head = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
                         nn.Linear(hidden, out))
    for linear in head[::2]:                                         # dinov2 dino_head.py: up to the prototypes
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
    return head


class Net(nn.Module):
    """Backbone and projector as numbered layers from -1 on (see layer_names), with Deep Augmentation between them."""
    def __init__(self, a, size: int, mean: Tensor, std: Tensor):
        super().__init__()
        self.is_vit = a.arch in VITS
        self.normalize = Normalize(mean, std)
        self.backbone, self.dim = (vit if self.is_vit else resnet)(a, size)
        self.projector = projector(a, self.dim)
        self.targets, self.augmentation = a.targets or [], (a.rate, a.stop_grad, a.transform, a.components)

    def body(self, images, mask=None, rows=None, seen=None):
        """Images [B, 3, S, S] in 0..1 -> (representation [B, dim], patch tokens [B, P, dim] of a ViT or None).

        mask: bool [B, P], patches that the mask token replaces; rows: bool [B], which get Deep Augmentation at the
        target layers; seen: a dict that is given every named layer's output.
        """
        names = []

        def done(h, name):                                           # after every layer
            if rows is not None and len(names) - 1 in self.targets:  # its number: the first is -1
                h = deep_augment(h, rows, *self.augmentation)
            names.append(name)
            if seen is not None and name != "input":
                seen[name] = h
            return h

        h, b, patches = done(self.normalize(images), "input"), self.backbone, None
        if self.is_vit:
            h = done(b.embeddings(h, bool_masked_pos=mask), "embed")                          # [B, 1 + P, dim]
            for i, block in enumerate(b.encoder.layer):
                h = block(h)
                h = done(h[0] if isinstance(h, tuple) else h, f"block{i + 1}")
            tokens = b.layernorm(h)
            h, patches = tokens[:, 0], tokens[:, 1:]
            return done(h, "cls"), patches
        h = done(b.maxpool(b.relu(b.bn1(b.conv1(h)))), "stem")
        for name in ("layer1", "layer2", "layer3", "layer4"):
            if seen is None:
                h = getattr(b, name)(h)
            else:                                                    # opened, block by block
                for i, block in enumerate(getattr(b, name)):
                    seen[f"{name}.{i}.odd"], h = block_outputs(block, h)
                    seen[f"{name}.{i}.even"] = h
            h = done(h, name)
            if seen is not None:
                del seen[name]                                       # it is the last block's .even
        return done(b.avgpool(h).flatten(1), "avgpool"), None

    def forward(self, images, mask=None, rows=None):
        """-> (representation [B, dim], z [B, OUT], patch tokens or None)."""
        h, patches = self.body(images, mask, rows)
        z = self.projector(h)
        if rows is not None and self.head_number() in self.targets:
            z = deep_augment(z, rows, *self.augmentation)
        return h, z, patches

    def head_number(self) -> int:
        return len(self.backbone.encoder.layer) + 2 if self.is_vit else 6

    def features(self, images):
        """The representation that is kept, [B, dim]."""
        return self.body(images)[0]

    def activations(self, images) -> dict:
        """Every named layer's output: stem, layerS.B.odd and .even, avgpool, or embed, block1 ..., cls; then head.0 ...
        head."""
        seen = {}
        h = self.body(images, seen=seen)[0]
        for i, m in enumerate(self.projector):
            h = m(h)
            seen["head" if i == len(self.projector) - 1 else f"head.{i}"] = h
        return seen

    def numbered(self) -> dict:
        """{name in activations(): the layer's number}, from 0 on."""
        if self.is_vit:
            blocks = {f"block{i + 1}": i + 1 for i in range(len(self.backbone.encoder.layer))}
            return {"embed": 0, **blocks, "cls": len(blocks) + 1, "head": len(blocks) + 2}
        last = {f"layer{s}.{len(getattr(self.backbone, f'layer{s}')) - 1}.even": s for s in (1, 2, 3, 4)}
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
# 6 Loss: the three base methods
# ----------------------------------------------------------------------------------------------------------------
# Each is a module with the network(s) and
#   forward(view_a, view_b, local, progress) -> (L_SSL, z_a, z_b)    progress: share of the training done, 0..1
#   anchor(view) -> z_a, student(view, rows) -> z_b and z_s          rows: which get Deep Augmentation
#   update_target(progress)                                          called "before" or "after" the step: `updates`
#   kept                                                             the Net that is probed and exported

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


def low_precision(x: Tensor):
    """bfloat16 on CUDA; losses are computed outside of it, in float32."""
    return torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda)


def processes() -> tuple[int, int]:
    """(number of this process, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_sum(x: Tensor) -> Tensor:
    """x, summed over the processes in place. Without gradient."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def cosine_to_one(start: float, progress: float) -> float:
    """Momentum of the target network: from start to 1 (moco-v3 main_moco.py, DINOv2 train.py)."""
    return 1 - (1 - start) * (1 + math.cos(math.pi * progress)) / 2


# ---- SimCLR: one network; a picture's two views attract each other and repel everybody else's

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


class SimCLR(nn.Module):
    updates = None

    def __init__(self, a, net: Net):
        super().__init__()
        self.online, self.temperature = net, a.temperature

    @property
    def kept(self):
        return self.online

    def student(self, view, rows=None):
        with low_precision(view):
            return self.online(view, rows=rows)[1]

    anchor = student

    def forward(self, view_a, view_b, local, progress):
        z_a, z_b = self.student(torch.cat([view_a, view_b])).chunk(2)                         # each [B, d]
        return nt_xent(z_a, z_b, self.temperature), z_a, z_b


# ---- MoCo v3: the network's prediction of what its slowly moving copy says of the other view

def moco_loss(q: Tensor, k: Tensor, temperature: float) -> Tensor:
    """One direction of MoCo v3 (moco-v3 builder.py:73): query i must pick key i among all N keys; times 2T, so that the
    gradient does not grow as T falls. q, k: [B, d], normalised here, in float32; keys come without gradient, of all
    processes."""
    q, k = F.normalize(q.float(), dim=1), gather(F.normalize(k.float(), dim=1))
    label = torch.arange(len(q), device=q.device) + processes()[0] * len(q)
    return F.cross_entropy(q @ k.T / temperature, label) * 2 * temperature


class MoCoV3(nn.Module):
    updates = "before"                                               # builder.py: before the keys are computed

    def __init__(self, a, net: Net):
        super().__init__()
        hidden, out = a.projector
        self.online, self.target = net, copy.deepcopy(net).requires_grad_(False)
        self.predictor = mlp([out, hidden, out], last_norm=a.arch in VITS)
        self.temperature, self.momentum = a.temperature, a.momentum

    @property
    def kept(self):
        return self.online

    @torch.no_grad()
    def update_target(self, progress):
        """Parameters only: the target has BatchNorm statistics of its own."""
        average = get_ema_multi_avg_fn(cosine_to_one(self.momentum, progress))
        average(list(self.target.parameters()), list(self.online.parameters()), None)

    def student(self, view, rows=None):
        with low_precision(view):
            return self.predictor(self.online(view, rows=rows)[1])

    @torch.no_grad()
    def anchor(self, view):
        with low_precision(view):
            return self.target(view)[1]

    def forward(self, view_a, view_b, local, progress):
        q_a, q_b = self.student(view_a), self.student(view_b)        # each view by itself, as builder.py: BatchNorm
        k_a, k_b = self.anchor(view_a), self.anchor(view_b)
        loss = moco_loss(q_a, k_b, self.temperature) + moco_loss(q_b, k_a, self.temperature)
        return loss, k_a, q_b


# ---- DINOv2: the student predicts the teacher's distribution over prototypes, from other crops and from masked patches

def block_masks(counts: Tensor, side: int) -> Tensor:
    """Masks of exactly counts[i] of the side * side patches, bool [n, side * side], mostly in blocks, all at once.

    dinov2 masking.py: rectangles of at least 4 patches and aspect .3 to 3.3 are laid down while they fit into what is
    left of the count (here ten tries); the rest are single patches.
    """
    n, device = len(counts), counts.device
    mask, axis = torch.zeros(n, side, side, dtype=torch.bool, device=device), torch.arange(side, device=device)
    for _ in range(10):
        before = mask.sum((1, 2))
        left = (counts - before).float()
        area = left.clamp(max=4) + torch.rand(n, device=device) * (left - 4).clamp(min=0)
        aspect = torch.empty(n, device=device).uniform_(math.log(0.3), -math.log(0.3)).exp()
        h, w = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        top = (torch.rand(n, device=device) * (side - h + 1)).floor().view(n, 1)
        start = (torch.rand(n, device=device) * (side - w + 1)).floor().view(n, 1)
        down, across = (axis >= top) & (axis < top + h.view(n, 1)), (axis >= start) & (axis < start + w.view(n, 1))
        tried = mask | (down.unsqueeze(2) & across.unsqueeze(1))
        fits = (h < side) & (w < side) & (tried.sum((1, 2)) - before <= left)
        mask = torch.where(fits.view(n, 1, 1), tried, mask)
    order = (mask.flatten(1) + torch.rand(n, side * side, device=device)).argsort(1, descending=True)
    return order.argsort(1) < counts.view(n, 1)                      # a patch's rank: masked ones first, then at random


def draw_masks(crops: int, side: int, device) -> tuple[Tensor, Tensor, Tensor]:
    """Half of the crops are masked, by .1 to .5 of their patches (DINOv2's ibot.mask_ratio_min_max).

    -> (mask bool [crops, P], the masked patches' places in the flattened [crops * P], their weights 1 / masked patches
    of the crop). Counts are drawn on the host, one in each of equal strata of .1-.5, so the shapes are known there.
    """
    n = crops // 2
    ratio = 0.1 + 0.4 * (torch.arange(n) + torch.rand(n)) / n
    counts = torch.zeros(crops, dtype=torch.long)
    counts[torch.randperm(crops)[:n]] = (ratio * side * side).long().clamp(min=1)
    total, counts = int(counts.sum()), counts.to(device, non_blocking=True)
    mask = block_masks(counts, side)
    places = mask.flatten().int().argsort(descending=True, stable=True)[:total]               # nonzero without a wait
    return mask, places, 1 / counts[places // side ** 2]


def cross_entropy_to(targets: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """-sum_k t_k log softmax(logits / temperature)_k for each row: [..., K] -> [...]."""
    return -(targets * F.log_softmax(logits.float() / temperature, dim=-1)).sum(-1)


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float, iterations=3) -> Tensor:
    """The teacher's probabilities [n, K], pushed towards every prototype being used equally often over the batch of all
    processes: rows of exp(logits / T) as [K, n] are normalised to 1/K, then columns to 1/n, three times (SwAV; dinov2
    dino_clstoken_loss.py). Every row of the result sums to 1."""
    q = logits.float() / temperature                                 # logarithms: nothing overflows or vanishes
    for _ in range(iterations):
        top = q.amax(0)
        if dist.is_initialized():
            dist.all_reduce(top, dist.ReduceOp.MAX)
        q = q - top - all_sum((q - top).exp().sum(0)).log()          # prototypes; the factors 1/K and 1/n cancel
        q = q.log_softmax(1)                                         # pictures
    return q.exp()


class TeacherTargets(nn.Module):
    """Teacher's logits [n, K] -> probabilities without gradient: softmax of the centred logits, or Sinkhorn-Knopp.

    The centre is the running mean of the logits (momentum .9), of earlier steps only. Without it one prototype could
    win everywhere; with a sharp softmax it cannot become uniform either.
    """
    def __init__(self, a):
        super().__init__()
        self.how = a.centering
        self.register_buffer("centre", torch.zeros(1, a.prototypes))

    @torch.no_grad()
    def forward(self, logits, temperature):
        if self.how == "sinkhorn":
            return sinkhorn_knopp(logits, temperature)
        logits = logits.float()
        targets = F.softmax((logits - self.centre) / temperature, dim=1)
        n = all_sum(torch.full((), float(len(logits)), device=logits.device))
        mean = all_sum(logits.sum(0, keepdim=True)) / n
        self.centre.lerp_(mean, 0.1)
        return targets


def koleo(x: Tensor) -> Tensor:
    """-mean log of the distance to the nearest neighbour among all rows, x [B, D] normalised here: spreads them evenly
    (Sablayrolles et al. 2019; dinov2 koleo_loss.py). Over all processes' rows."""
    x = F.normalize(x.float(), dim=1, eps=1e-8)
    everyone, b = gather(x), len(x)
    with torch.no_grad():
        dots = x @ everyone.T
        i = torch.arange(b, device=x.device) + processes()[0] * b
        nearest = dots.scatter(1, i.unsqueeze(1), -2.0).argmax(1)
    return -(F.pairwise_distance(x, everyone[nearest], eps=1e-8) + 1e-8).log().mean()


class DINOv2(nn.Module):
    updates = "after"

    def __init__(self, a, net: Net):
        super().__init__()
        self.online, self.target = net, copy.deepcopy(net).requires_grad_(False)
        self.prototypes = nn.utils.parametrizations.weight_norm(nn.Linear(a.projector[1], a.prototypes, bias=False))
        self.prototypes.parametrizations.weight.original0.data.fill_(1)                       # g of weight norm
        self.target_prototypes = copy.deepcopy(self.prototypes).requires_grad_(False)
        self.cls_targets, self.patch_targets = TeacherTargets(a), TeacherTargets(a)
        self.temperature, self.momentum, self.local_crops = a.temperature, a.momentum, a.local_crops
        self.warm = min(30 / a.epochs, 0.3)                          # share of the training with a rising temperature

    @property
    def kept(self):
        return self.target                                           # as DINOv2: the teacher is better

    def train(self, mode=True):
        super().train(mode)
        self.target.eval()                                           # no stochastic depth in the teacher
        return self

    @torch.no_grad()
    def update_target(self, progress):
        average = get_ema_multi_avg_fn(cosine_to_one(self.momentum, progress))
        average([*self.target.parameters(), *self.target_prototypes.parameters()],
                [*self.online.parameters(), *self.prototypes.parameters()], None)

    def student(self, view, rows=None):
        with low_precision(view):
            return self.online(view, rows=rows)[1]

    @torch.no_grad()
    def anchor(self, view):
        with low_precision(view):
            return self.target(view)[1]

    def forward(self, view_a, view_b, local, progress):
        crops, b = torch.cat([view_a, view_b]), len(view_a)
        side = view_a.shape[-1] // self.online.backbone.config.patch_size
        mask, places, weights = draw_masks(2 * b, side, crops.device)
        temperature = 0.04 + 0.03 * min(1.0, progress / self.warm)
        with low_precision(crops):
            with torch.no_grad():                                    # the teacher sees whole crops
                _, z_t, patches = self.target(crops)
                masked = self.target.projector(patches.flatten(0, 1)[places])                 # [M, d]
                cls_logits, patch_logits = (self.target_prototypes(F.normalize(v, dim=1)) for v in (z_t, masked))
            h, z, patches = self.online(crops, mask)
            masked = self.online.projector(patches.flatten(0, 1)[places])
            logits, masked_logits = (self.prototypes(F.normalize(v, dim=1)) for v in (z, masked))
            if local is not None:
                local_logits = self.prototypes(F.normalize(self.online(local)[1], dim=1))     # [L * B, K]
        t_a, t_b = self.cls_targets(cls_logits, temperature).chunk(2)
        l_a, l_b = logits.chunk(2)
        # DINO: every pair of a teacher's crop and another crop of the student; 2 + 2 L pairs
        dino = (cross_entropy_to(t_a, l_b, self.temperature) + cross_entropy_to(t_b, l_a, self.temperature)).mean()
        if local is not None:
            terms = cross_entropy_to(t_a + t_b, local_logits.view(-1, b, logits.shape[1]), self.temperature)  # [L, B]
            dino = dino + terms.sum(0).mean()
        dino = dino / (2 + 2 * self.local_crops)
        # iBOT: the student's masked patches against what the teacher sees there; every masked crop counts the same
        targets = self.patch_targets(patch_logits, temperature)
        ibot = (cross_entropy_to(targets, masked_logits, self.temperature) * weights).sum() / (2 * b)
        spread = koleo(h[:b]) + koleo(h[b:])
        return dino + ibot + 0.1 * spread, z_t[:b], z[b:]


METHODS = {"simclr": SimCLR, "mocov3": MoCoV3, "dinov2": DINOv2}

# ----------------------------------------------------------------------------------------------------------------
# 7 Training: the rescue, and the loop
# ----------------------------------------------------------------------------------------------------------------

def choose(similarity: Tensor, rescue: str, k: int) -> Tensor:
    """Numbers of the pairs to rescue, int64 [k], ascending, among the rows of all processes (row i of process r is
    r * B + i). similarity: [B]."""
    score = {"topk": similarity, "all": similarity, "hardest": -similarity,
             "random": torch.rand_like(similarity)}[rescue]
    return gather(score).topk(k).indices.sort().values


def own_share(x: Tensor, chosen: Tensor) -> Tensor:
    """The rows `chosen` (counted over all processes) of x [B, ...]; with several processes each gets its equal part."""
    b, (rank, world) = len(x), processes()
    if world == 1:
        return x[chosen]
    rows = x[(chosen - rank * b).clamp(0, b - 1)]
    rows = rows * (chosen // b == rank).view(-1, *[1] * (x.ndim - 1))                         # zeros where not ours
    dist.all_reduce(rows)
    return rows.chunk(world)[rank]


@contextmanager
def running_statistics(module: nn.Module):
    """Inside, BatchNorm normalises by its running statistics and leaves them as they are."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    for m in norms:
        m.eval()
    yield
    for m in norms:
        m.train()


class Rescue(nn.Module):
    """Algorithm 1: one step from pictures to the loss.

    forward(images uint8 [B, 3, H, W], progress in 0..1) -> (loss, numbers of the chosen pairs [k], z_a, z_b, similarity
    [B], [base loss, mean similarity, mean similarity of the chosen, mean cos(z_a, z_s)] as one tensor).
    """
    def __init__(self, a, method: nn.Module, size: int):
        super().__init__()
        self.a, self.method, self.size = a, method, size
        self.k = {"none": 0, "all": a.batch_size}.get(a.rescue, a.k)

    def forward(self, images, progress):
        a = self.a
        view_a, view_b = (common_view(images, self.size, a, i) for i in (0, 1))               # y_a, y_b
        local = local_crops(images, a) if a.method == "dinov2" and a.local_crops else None
        base, z_a, z_b = self.method(view_a, view_b, local, progress)
        similarity = F.cosine_similarity(z_a.float(), z_b.float()).detach()                   # [B]
        pair = z_a.detach(), z_b.detach(), similarity
        if self.k == 0:
            nothing = torch.full((), math.nan, device=images.device)
            return base, None, *pair, torch.stack([base.detach(), similarity.mean(), nothing, nothing])
        chosen = choose(similarity, a.rescue, self.k)
        with running_statistics(self.method):
            if a.strong == "deepaug":
                strong = own_share(view_b, chosen)
                z_s = self.method.student(strong, torch.rand(len(strong), device=strong.device) < a.sample)
            else:
                z_s = self.method.student(strong_views(own_share(images, chosen), self.size))
        rank, world = processes()
        anchor = gather(z_a.float())[chosen].chunk(world)[rank]
        cosine = F.cosine_similarity(anchor, z_s.float())                                     # [k / world]
        measured = [base, similarity.mean(), gather(similarity)[chosen].mean(), cosine.mean()]
        return base - a.s * cosine.mean(), chosen, *pair, torch.stack(measured).detach()


def build(a, split: Split, device) -> Rescue:
    """The whole method with the weights of this seed; its `a` has patch and local_size filled in."""
    a = argparse.Namespace(**vars(a))
    if a.arch in VITS:
        a.patch = a.patch or (16 if split.size > 64 else 8 if a.arch == "vit-tiny" else 4)
        a.local_size = a.local_size or max(1, round(split.size / 2 / a.patch)) * a.patch
        sides = [split.size] + ([a.local_size] if a.method == "dinov2" and a.local_crops else [])
        for side in sides:
            if side % a.patch or side < a.patch:
                fail(f"--patch {a.patch} does not divide a crop of {side} pixels: see --image-size and --local-size")
        if a.local_size > split.size:
            fail(f"--local-size {a.local_size}: larger than a view, {split.size}")
    mean, std = pixel_statistics(split)
    torch.manual_seed(a.seed)
    method = METHODS[a.method](a, Net(a, split.size, mean, std))
    return Rescue(a, method, split.size).to(device, memory_format=torch.channels_last)


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


def parameter_groups(a, method: nn.Module) -> list:
    """One group; dinov2: groups by learning rate (`scale`), weight decay (`decay`) and `last`, the prototypes.

    Layer-wise decay .9 a block from the head down, patch projection times .2; no weight decay on biases, norms and
    LayerScale (dinov2 param_groups.py).
    """
    trained = [(n, p) for n, p in method.named_parameters() if p.requires_grad]
    if a.method != "dinov2":
        return [{"params": [p for _, p in trained]}]
    blocks, groups = VITS[a.arch][1], {}
    for name, p in trained:
        block = re.search(r"encoder\.layer\.(\d+)\.", name)
        depth = int(block[1]) + 1 if block else 0 if "embeddings" in name else blocks + 1
        scale = 0.9 ** (blocks + 1 - depth) * (0.2 if "patch_embeddings" in name else 1)
        key = scale, p.ndim > 1, name.startswith("prototypes")
        groups.setdefault(key, dict(zip(("scale", "decay", "last"), key), params=[]))["params"].append(p)
    return list(groups.values())


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


class Diverged(ArithmeticError):
    """The loss is not finite; args[0] says when."""


def train(a, step_of: Rescue, split: Split, out: Path, device, steps: int, after_epoch, state: dict | None) -> dict:
    """Train to the last epoch, from the start or from `state`. Every step reseeds from (seed, step, process): so no
    random state needs saving, a resumed run meets the same views and rows, and probes in between change nothing.
    steps: of one epoch; after_epoch(epoch): called every --probe-every epochs. Returns what was measured."""
    rank, world = processes()
    method, total = step_of.method, a.epochs * steps
    groups = parameter_groups(a, method)
    if a.optimizer == "lars":
        optimizer = LARS(groups, a.lr, weight_decay=a.weight_decay)
    elif a.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, a.lr, weight_decay=a.weight_decay, fused=True)
    else:
        optimizer = torch.optim.SGD(groups, a.lr, momentum=0.9, weight_decay=a.weight_decay, fused=True)

    step, log, spent, last = 0, [], 0.0, False                       # log: the rows of metrics.csv
    rescued = torch.zeros(len(split), dtype=torch.long, device=device)        # how often each picture was
    histogram, histograms = torch.zeros(40, dtype=torch.long, device=device), []              # of similarity, -1..1
    if state:
        method.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, log, spent = state["step"], state["metrics"], state["seconds"]
        rescued, histograms = state["rescued"].to(device), [row.cpu() for row in state["histograms"]]

    model = step_of
    if a.compile:
        for name in ("online", "target"):
            if hasattr(method, name):
                getattr(method, name).compile()
    if world > 1:
        if device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model = nn.parallel.DistributedDataParallel(model)

    def save():
        with written_whole(out / "metrics.csv") as part, open(part, "w", newline="") as f:
            writer = csv.DictWriter(f, log[0])
            writer.writeheader()
            writer.writerows(log)
        with written_whole(out / "similarity.npz") as part, open(part, "wb") as f:
            np.savez(f, steps=[row["step"] for row in log], counts=torch.stack(histograms).numpy(),
                     rescued=rescued.cpu().numpy())
        with written_whole(out / "checkpoint.pt") as part:
            torch.save({"script": NAME, "config": config_of(a), "data": len(split), "model": method.state_dict(),
                        "optimizer": optimizer.state_dict(), "step": step, "metrics": log, "source": SOURCE,
                        "rescued": rescued, "histograms": histograms, "seconds": spent + time.time() - begun}, part)

    losses, stop = [], []                                            # losses stay on the device until they are logged
    begun = saved = logged = time.time()
    bar = tqdm(total=total, initial=step, unit="step", disable=rank > 0, dynamic_ncols=True)
    batches = train_batches(split, a, device, step, steps, rank, world)
    step_of.train()
    with on_signals(stop.append):                                    # Ctrl-C and SIGTERM wait for the end of a step
        while step < total and not last:
            lr, progress = learning_rate(step, a, steps), step / total
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("scale", 1)
                if group.get("last") and step < min(steps, total // 10):      # prototypes rest in the first epoch
                    group["lr"] = 0.0
                if a.method == "dinov2":                             # weight decay: a cosine to ten times its start
                    now = a.weight_decay * (1 + 9 * (1 - math.cos(math.pi * progress)) / 2)
                    group["weight_decay"] = now if group["decay"] else 0.0
            images, index = next(batches)
            torch.manual_seed(mix(a.seed, step, rank))               # fixes this step's views, masks and dropout
            if method.updates == "before":
                method.update_target(progress)
            loss, chosen, z_a, z_b, similarity, measured = model(images, progress)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if a.method == "dinov2":
                nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 3.0)
            optimizer.step()
            if method.updates == "after":
                method.update_target(progress)
            losses.append(torch.cat([loss.detach().view(1), measured]))
            histogram += F.one_hot(((similarity + 1) * 20).long().clamp(0, 39), 40).sum(0)
            if step_of.k:
                rescued[gather(index)[chosen]] += 1
            step += 1
            bar.update()

            probe_now = a.probe_every and step % (steps * a.probe_every) == 0
            last = step == total or stops(stop, step % a.log_every == 0, device)
            save_now = last or probe_now or time.time() - saved > a.save_every
            if step % a.log_every == 0 or save_now:
                values, now = torch.stack(losses).tolist(), time.time()                       # the one wait
                for i, row in enumerate(values):
                    if not math.isfinite(row[0]):
                        raise Diverged(f"the loss is {row[0]} at step {step - len(values) + i + 1}; any checkpoint "
                                       f"before it is kept in {out}. A smaller --lr or --s usually helps")
                loss_, base, mean, of_chosen, of_strong = map(statistics.mean, zip(*values))
                log.append({"step": step, "epoch": step / steps, "loss": loss_, "base_loss": base, "lr": lr,
                            "images_per_second": a.batch_size * len(values) / (now - logged), "similarity": mean,
                            "similarity_chosen": of_chosen, "similarity_strong": of_strong,
                            "ever_rescued": 100 * (rescued > 0).float().mean().item(), **meters(z_a, z_b)})
                histograms.append(histogram.cpu())
                histogram = torch.zeros_like(histogram)
                bar.set_postfix_str(f"loss {log[-1]['loss']:.3f}, {log[-1]['images_per_second']:.0f} images/s")
                losses, logged = [], now
                if probe_now and rank == 0:
                    after_epoch(step // steps)
                    step_of.train()
                if save_now:
                    if rank == 0 and all(p.isfinite().all() for p in method.parameters()):
                        save()
                    logged = saved = time.time()                     # probing and saving are no part of the speed
    bar.close()
    if stop or step < total:
        raise Interrupted(stop[0] if stop else signal.SIGTERM)
    return {"seconds": spent + time.time() - begun, "steps": step, "epochs": a.epochs, "loss": log[-1]["loss"],
            "images_per_second": statistics.median(r["images_per_second"] for r in log),
            "lowest_embedding_std": min(r["embedding_std"] for r in log),
            "collapsed": int(log[-1]["embedding_std"] < 0.1),        # spread evenly over the sphere it is 1
            **{k: v for k, v in log[-1].items() if k.startswith(("similarity", "ever")) and not math.isnan(v)}}


# ----------------------------------------------------------------------------------------------------------------
# 8 Evaluation
# ----------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def encode(net: Net, split: Split, a, device) -> tuple[Tensor, Tensor | None]:
    """Frozen representations of unaugmented pictures: (float32 [N, dim], labels [N] or None)."""
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


def probe(net: Net, train_split: Split, test_split: Split, classes: list, a, device) -> dict:
    """Linear probe and kNN on a frozen network, test accuracy in %; nothing without labels."""
    if train_split.labels is None:
        return {}
    data = *encode(net, train_split, a, device), *encode(net, test_split, a, device), len(classes)
    return {**linear_probe(*data), "knn": weighted_knn(*data)}


# ---- Transfer: Table 1's data sets

VOC = ["aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
       "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"]


def voc_labels(annotation: dict) -> Tensor:
    """Is a class in the picture? int64 [20]: 1 yes, 0 no, -1 only as objects marked difficult, which do not count."""
    labels = torch.zeros(len(VOC), dtype=torch.long)
    for thing in annotation["annotation"]["object"]:
        c = VOC.index(thing["name"])
        labels[c] = 1 if thing["difficult"] == "0" or labels[c] == 1 else -1
    return labels


D = torchvision.datasets
# name: (class, arguments of the training part(s), of the test part, measure as in SimCLR's Table 8); a number instead
# of a part: so many training pictures a class, drawn with seed 0, and at most so many test pictures
TRANSFER = {
    "cifar10": (D.CIFAR10, [{"train": True}], {"train": False}, "accuracy"),
    "cifar100": (D.CIFAR100, [{"train": True}], {"train": False}, "accuracy"),
    "food101": (D.Food101, [{"split": "train"}], {"split": "test"}, "accuracy"),
    "sun397": (D.SUN397, 50, 50, "accuracy"),
    "dtd": (D.DTD, [{"split": "train"}, {"split": "val"}], {"split": "test"}, "accuracy"),
    "pets": (D.OxfordIIITPet, [{"split": "trainval"}], {"split": "test"}, "mean per class"),
    "aircraft": (D.FGVCAircraft, [{"split": "trainval"}], {"split": "test"}, "mean per class"),
    "voc2007": (D.VOCDetection, [{"year": "2007", "image_set": "trainval", "target_transform": voc_labels}],
                {"year": "2007", "image_set": "test", "target_transform": voc_labels}, "mAP"),
    "flowers102": (D.Flowers102, [{"split": "train"}, {"split": "val"}], {"split": "test"}, "mean per class"),
    "caltech101": (D.Caltech101, 30, 10 ** 9, "mean per class")}


@torch.no_grad()
def encode_dataset(net: Net, dataset, size: int, a, device) -> tuple[Tensor, Tensor]:
    """Representations float32 [N, dim] and labels of a torchvision data set, decoded in workers."""
    net.eval()
    loader = torch.utils.data.DataLoader(dataset, batch_size=256, num_workers=a.workers,
                                         worker_init_fn=leave_signals_to_parent, generator=torch.Generator())
    x, y = zip(*((net.features(images.to(device).float() / 255).float(), labels.to(device))
                 for images, labels in loader))
    return torch.cat(x), torch.cat(y)


def split_by_class(y: Tensor, train: int, test: int) -> tuple[Tensor, Tensor]:
    """Numbers of `train` random pictures of every class, and of at most `test` others. y: [N]."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).to(y.device)
    place = torch.zeros_like(y)                                      # a picture's place among its class
    for c in y.unique():
        mine = order[y[order] == c]
        place[mine] = torch.arange(len(mine), device=y.device)
    return (place < train).nonzero()[:, 0], ((place >= train) & (place < train + test)).nonzero()[:, 0]


def mean_per_class(predicted: Tensor, y: Tensor) -> float:
    """Accuracy in % of each class that occurs, averaged over the classes."""
    right, all_ = torch.bincount(y[predicted == y], minlength=int(y.max()) + 1), torch.bincount(y)
    return 100 * (right[all_ > 0] / all_[all_ > 0]).mean().item()


def average_precision_11(score: Tensor, y: Tensor) -> float:
    """VOC 2007's average precision in %: mean of the best precisions at recall >= 0, .1 ... 1. score, y (0, 1): [n]."""
    y = y[score.argsort(descending=True, stable=True)].double()
    recall, precision = y.cumsum(0) / y.sum(), y.cumsum(0) / torch.arange(1, len(y) + 1, device=y.device)
    best = [precision[recall >= t / 10 - 1e-9].max().item() if (recall >= t / 10 - 1e-9).any() else 0.0
            for t in range(11)]
    return 100 * statistics.mean(best)


def transfer(net: Net, size: int, a, device) -> dict:
    """{"transfer_NAME": linear probe in % on that data set}. Those that are not in --data-dir are named and skipped."""
    square = v2.Compose([v2.RGB(), v2.PILToTensor(), v2.Resize(size, antialias=True), v2.CenterCrop(size)])
    results = {}
    for name in a.transfer:
        cls, train, test, measure = TRANSFER[name]
        try:
            parts = [{}] if isinstance(train, int) else [*train, test]
            sets = [cls(a.data_dir, transform=square, **arguments) for arguments in parts]
            sets[0][0]                                               # Caltech101 and Flowers102 need scipy
        except (RuntimeError, OSError, ValueError, ImportError) as e:            # not there, or not whole
            print(f"--transfer {name}: skipped, {str(e).splitlines()[0]}")
            continue
        if isinstance(train, int):
            x, y = encode_dataset(net, sets[0], size, a, device)
            fit, held = split_by_class(y, train, test)
            x, y, x_test, y_test = x[fit], y[fit], x[held], y[held]
        else:
            x, y = encode_dataset(net, torch.utils.data.ConcatDataset(sets[:-1]), size, a, device)
            x_test, y_test = encode_dataset(net, sets[-1], size, a, device)
        if measure == "mAP":                                         # one classifier a class
            values = []
            for c in range(len(VOC)):
                known, known_test = y[:, c] >= 0, y_test[:, c] >= 0
                logits = probe_logits(x[known], y[known, c], x_test[known_test], 2)[0]
                values.append(average_precision_11(logits[:, 1] - logits[:, 0], y_test[known_test, c]))
            results[f"transfer_{name}"] = statistics.mean(values)
        else:
            predicted = probe_logits(x, y, x_test, int(max(y.max(), y_test.max())) + 1)[0].argmax(1)
            results[f"transfer_{name}"] = mean_per_class(predicted, y_test) if measure == "mean per class" else \
                100 * (predicted == y_test).float().mean().item()
    return results


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


@torch.no_grad()
def draw_easy(a, step_of: Rescue, split: Split, out: Path, device) -> None:
    """easy.png: the most and the least similar pairs among the first 1,024 pictures, with a strong view of each."""
    step_of.eval()
    torch.manual_seed(0)
    method, rows = step_of.method, []
    for images, _ in eval_batches(split, a, device, 1024, 256):
        pixels = (images * 255).round().to(torch.uint8)
        views = [common_view(pixels, step_of.size, a, i) for i in (0, 1)]
        z_a, z_b = method.anchor(views[0]).float(), method.student(views[1]).float()
        rows.append((images, *views, z_a, F.cosine_similarity(z_a, z_b)))
    images, view_a, view_b, z_a, similarity = (torch.cat(parts) for parts in zip(*rows))
    order, n = similarity.argsort(descending=True), min(10, len(images) // 2)
    figure = Figure((1.1 * n, 9.6))
    axes = figure.subplots(2, 1)
    for axis, which, title in ((axes[0], order[:n], "the easiest pairs"), (axes[1], order[-n:].flip(0), "the hardest")):
        strong = strong_views((images[which] * 255).round().to(torch.uint8), step_of.size)
        if a.strong == "deepaug" and a.rescue != "none":             # made inside the network: cannot be shown
            step_of.train()
            with running_statistics(step_of):
                z_s = method.student(view_b[which], torch.ones(n, dtype=torch.bool, device=device))
            step_of.eval()
            pictures, names = [images[which], view_a[which], view_b[which]], "picture, view a, view b"
        else:
            z_s = method.student(strong)
            pictures = [images[which], view_a[which], view_b[which], strong]
            names = "picture, view a, view b, strong view"
        grid = torchvision.utils.make_grid(torch.cat(pictures).cpu(), nrow=n, padding=2)
        axis.imshow(grid.permute(1, 2, 0).clamp(0, 1).numpy())       # rounding can leave 0..1 by 1e-7
        cosine = F.cosine_similarity(z_a[which], z_s.float())
        width = grid.shape[2] / n
        axis.set_xticks([width * (i + 0.5) for i in range(n)],
                        [f"ab {v:.2f}\nas {w:.2f}" for v, w in zip(similarity[which].tolist(), cosine.tolist())])
        axis.set(title=f"{title}: rows are {names}; ab = cos(z_a, z_b), as = cos(z_a, z_s)", yticks=[])
        axis.title.set_fontsize(9)
    save_figure(figure, out / "easy.png")


def draw_figures(a, step_of: Rescue, split: Split, out: Path, device, report: dict, probes: dict) -> None:
    """easy.png: pairs; curves.png: the run and what was easy in it; cka.png: the map of layers."""
    draw_easy(a, step_of, split, out, device)
    with open(out / "metrics.csv") as f:
        log = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]
    figure = Figure((12, 6))
    loss, easy, spread, ever, collapse, last = figure.subplots(2, 3).flat
    epochs = [row["epoch"] for row in log]

    def lines(axis, keys, title):
        for key in keys:
            axis.plot(epochs, [row[key] for row in log], label=key.replace("_", " "))
        axis.set(title=title, xlabel="epoch")
        axis.legend(fontsize=8)

    lines(loss, ["loss", "base_loss"], "loss")
    lines(easy, ["similarity", "similarity_chosen", "similarity_strong"], "mean cosine similarity")
    counts = np.load(out / "similarity.npz")["counts"]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    spread.imshow(shares.T, origin="lower", aspect="auto", extent=(0, epochs[-1], -1, 1), cmap="magma")
    spread.set(title="histogram of cos(z_a, z_b)", xlabel="epoch", ylabel="similarity")
    lines(ever, ["ever_rescued"], "pictures rescued so far, %")
    lines(collapse, ["embedding_std"], "spread of the embeddings; 0: collapsed")
    if probes and "linear" in report:
        last.plot([int(epoch) for epoch in probes], [r["linear"] for r in probes.values()], "o-")
        last.set(title="linear probe, test %", xlabel="epoch")
    else:
        for key in ("linear", "knn"):
            for suffix, color in {"_untrained": "tab:blue", "_baseline": "tab:gray", "": "tab:orange"}.items():
                if key + suffix in report:
                    last.bar((key + suffix).replace("_", "\n"), report[key + suffix], color=color)
        last.tick_params(axis="x", labelsize=7)
        last.set(title="probes of the frozen features, test %")
    figure.suptitle(out.name)
    save_figure(figure, out / "curves.png")

    try:
        from cka import coadapted_stretch, draw
        layers = layer_map(step_of.method.kept, split, a, device)
        names = [f"{i} {name}" for i, name in list(layer_names(a).items())[1:]]
        draw(out / "cka.png", [{"map": layers.tolist(), "names_a": names, "run_a": out.name,
                                "stretch": coadapted_stretch(layers),
                                "targets": [t for t in a.targets if t >= 0] if a.strong == "deepaug" else []}])
    except (ImportError, ValueError) as e:                           # no cka.py beside this script; too few pictures
        print(f"no map of the layers: {e}")


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
def mean_std(values: list) -> tuple[float, float | None]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


# same text in: simclr_deepaug.py, simcse_deepaug.py, vicreg_probe.py, topk_rescue.py
def pm(value: tuple[float, float | None]) -> str:
    return f"{value[0]:.2f}" + ("" if value[1] is None else f" ± {value[1]:.2f}")


RESCUE_FLAGS = ("rescue", "k", "s", "strong", "layer", "rate", "stop_grad", "sample", "transform", "components")


def compare(runs: list) -> dict:
    """One table of finished runs, seeds pooled, each beside the baseline of its other flags, and compare.png: Fig. 5 or
    6 where s or k varies, else bars."""
    groups = {}                                                      # {flags but the seed: {seed: report}}
    for folder in map(Path, runs):
        r = json.loads((folder / "report.json").read_text()) if (folder / "report.json").exists() else {}
        if r.get("script") != NAME:
            print(f"{folder}: left out, no finished run of this script")
            continue
        r["run"] = re.sub(r"[-/]s\d+$", "", str(folder))
        key = tuple(sorted((k, str(v)) for k, v in r["flags"].items() if k != "seed"))
        if groups.setdefault(key, {}).setdefault(r["flags"]["seed"], r) is not r:
            print(f"{folder}: left out, this seed of the same flags is counted already")
    if not groups:
        fail("--compare: none of these folders holds a finished run of this script")

    def summary(values):
        return mean_std(values) if values else (math.nan, None)

    def without_rescue(key):
        return tuple((k, v) for k, v in key if k not in RESCUE_FLAGS)

    baselines = {without_rescue(key): rs for key, rs in groups.items() if ("rescue", "none") in key}
    print(f"{'method':>7} {'rescue':>8} {'strong':>11} {'k':>5} {'s':>7} {'seeds':>5} {'linear %':>14} "
          f"{'- baseline':>14} {'kNN %':>14} {'untrained %':>12}  run")
    table, lines = {}, {}                                            # lines: {other flags: (label, baseline, points)}
    for key, rs in sorted(groups.items(), key=lambda g: g[1][min(g[1])]["run"]):
        f, name = rs[min(rs)]["flags"], rs[min(rs)]["run"]
        linear, knn, untrained = (summary([r[k] for r in rs.values() if k in r])
                                  for k in ("linear", "knn", "linear_untrained"))
        base = baselines.get(without_rescue(key), {})                # the same seeds, pair by pair
        gain = summary([r["linear"] - base[seed]["linear"] for seed, r in rs.items()
                        if "linear" in r and "linear" in base.get(seed, {})])
        collapsed, none = any(r["collapsed"] for r in rs.values()), f["rescue"] == "none"
        table[name] = {"linear": linear, "knn": knn, "linear_untrained": untrained, "gain": gain, "seeds": len(rs),
                       "collapsed": collapsed}
        k, s, strong = ("", "", "") if none else (f["k"], f["s"], f["strong"])
        print(f"{f['method']:>7} {f['rescue']:>8} {strong:>11} {k:>5} {s:>7} {len(rs):5} {pm(linear):>14} "
              f"{'' if none else pm(gain):>14} {pm(knn):>14} {untrained[0]:12.2f}  {name}", "collapsed" * collapsed)
        if not none:
            other = tuple((k, v) for k, v in key if k not in ("k", "s"))
            label = f"{f['method']} {f['rescue']} {f['strong']}"
            lines.setdefault(other, (label, base, []))[2].append((f["k"], f["s"], *linear, collapsed))
    varying = [i for i in (0, 1) if any(len({p[i] for p in points}) > 1 for *_, points in lines.values())]
    figure = Figure((7 * max(1, len(varying)), 4.5))
    axes = figure.subplots(1, max(1, len(varying)), squeeze=False)[0]
    for i, axis in zip(varying, axes):                              # 0: over k, 1: over s, the other at its usual value
        reach = [p[i] for *_, points in lines.values() for p in points]
        for n, (label, _, points) in enumerate(lines.values()):
            usual = statistics.mode(p[1 - i] for p in points)
            x, y, std, gone = zip(*sorted((p[i], p[2], p[3] or 0, p[4]) for p in points if p[1 - i] == usual))
            axis.errorbar(x, y, std, color=f"C{n}", fmt="o-", capsize=3, label=label)
            for left, right, lost in zip(x, [*x[1:], x[-1] * 1.5], gone):
                if lost:
                    axis.axvspan(left, right, color="0.85", zorder=0)
        for method, mean in {(label.split()[0], summary([r["linear"] for r in base.values() if "linear" in r])[0])
                             for label, base, _ in lines.values() if base}:
            axis.axhline(mean, color="0.4", linestyle="--", label=f"{method}, baseline")
        axis.set_xscale("symlog", linthresh=min(v for v in reach if v > 0))
        axis.set_xlim(0 if min(reach) == 0 else min(reach) / 1.5, max(reach) * 1.5)
        axis.set(xlabel=f"{'ks'[i]}; grey: collapsed", ylabel="linear probe, test accuracy %")
        axis.legend(fontsize=8)
    if not varying:
        names = [Path(name).name.removeprefix(NAME + "-") for name in table]
        axes[0].barh(names[::-1], [t["linear"][0] for t in table.values()][::-1],
                     xerr=[t["linear"][1] or 0 for t in table.values()][::-1], capsize=3)
        axes[0].tick_params(axis="y", labelsize=6)
        axes[0].set_xlabel("linear probe, test accuracy %")
    path = Path(os.path.commonpath([Path(r).absolute().parent for r in runs])) / "compare.png"
    save_figure(figure, path)
    print(f"drawn: {os.path.relpath(path)}")
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
    """Write encoder.pt (TorchScript), weights.safetensors (torchvision's keys, or transformers'; then the folder model/
    too, for AutoModel) and samples.npz; read the encoder back.

    Returns the largest difference between the file's encoder and the live one, relative to the largest activation,
    over forward and activations at batches 1, 7 and 64. Above 1e-4 it is an error.
    """
    live = Net(a, split.size, torch.zeros(3), torch.ones(3))
    live.load_state_dict(net.state_dict())                           # a copy on the CPU: traces bake the device in
    live.eval().requires_grad_(False)
    encoder, example = Encoder(live).eval(), torch.rand(2, 3, split.size, split.size)
    transformers.logging.set_verbosity_error()                       # tracing reads every attribute, and some warn
    config = {"script": NAME, "layers": list(live.activations(example)), "layer_numbers": live.numbered(),
              "image_size": split.size, "dim": live.dim, "dataset": a.dataset, "classes": classes,
              "flags": config_of(a), "measurements": report}
    with torch.no_grad(), warnings.catch_warnings(), written_whole(out / "encoder.pt") as part:
        warnings.filterwarnings("ignore", message=".*torch.jit|Encountering a list|Converting a tensor|`is_grad")
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
    files = [out / "weights.safetensors"]
    if live.is_vit:
        live.backbone.config.save_pretrained(out / "model")
        files.append(out / "model/model.safetensors")
    for file in files:
        with written_whole(file) as part:
            save_file({k: v.contiguous() for k, v in live.backbone.state_dict().items()}, part, {"format": "pt"})
    images, index = some_pictures(split, a, next(net.parameters()).device)                    # for cka.py
    labels = torch.full((len(index),), -1) if split.labels is None else split.labels[index].cpu()
    with written_whole(out / "samples.npz") as part, open(part, "wb") as f:
        np.savez(f, images=(images * 255).round().to(torch.uint8).cpu().numpy(), labels=labels.numpy())
    return worst


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


def finished(out: Path, a) -> dict | None:
    """The report of a run of these flags and this very script that stands complete in `out`, or None."""
    try:
        report, config = (json.loads((out / f"{name}.json").read_text()) for name in ("report", "config"))
    except (OSError, ValueError):
        return None
    same = report.get("flags") == json.loads(json.dumps(config_of(a), default=str)) and "export_difference" in report
    return report if same and config.get("script_sha256") == hashlib.sha256(SOURCE.encode()).hexdigest() else None


def run(a, baseline: dict | None = None) -> dict:
    """One training, from data to report. baseline: the report to show beside. Returns the report (report.json)."""
    if a.device == "auto":
        a.device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(a.device, int(os.environ.get("LOCAL_RANK", 0)) if a.device == "cuda" else None)
    rank, world = processes()
    chief = rank == 0
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
    steps = len(train_split) // a.batch_size                         # of one epoch; the ragged rest is dropped
    step_of = build(a, train_split, device)
    method = step_of.method
    untrained = {k: v.cpu().clone() for k, v in method.kept.state_dict().items()}
    if a.init:
        path = Path(a.init) / "checkpoint.pt" if Path(a.init).is_dir() else Path(a.init)
        try:
            method.load_state_dict(load_checkpoint(path)["model"])
        except RuntimeError:
            fail(f"--init {a.init}: its network has other sizes; give the flags it was trained with (--method ...)")
    if a.targets is None:
        a.targets = method.online.targets = [auto_layer(method.kept, train_split, a, device)]

    if chief and not a.resume:
        new_folder(out)
    if chief:
        out.mkdir(parents=True, exist_ok=True)
        mean, std = method.online.normalize.mean, method.online.normalize.std
        save_json(out / "config.json", {
            **vars(step_of.a), "pixel_mean": mean.flatten().tolist(), "pixel_std": std.flatten().tolist(),
            "python": sys.version, "torch": torch.__version__, "torchvision": torchvision.__version__,
            "transformers": transformers.__version__, "processes": world,
            "device_name": torch.cuda.get_device_name() if a.device == "cuda" else f"{torch.get_num_threads()} threads",
            "script_sha256": hashlib.sha256(SOURCE.encode()).hexdigest()})
        what = "no rescue" if a.rescue == "none" else f"rescue {a.rescue}, k = {step_of.k}, s = {a.s}"
        print(f"{out}: {len(train_split)} pictures, {steps} steps an epoch, {what}")

    data = train_split, test_split, classes, a, device
    probes = json.loads((out / "probes.json").read_text()) if a.resume and (out / "probes.json").exists() else {}

    def after_epoch(epoch):
        probes[str(epoch)] = probe(method.kept, *data)
        save_json(out / "probes.json", probes)

    common = {"script": NAME, "run": out.name, "layers_augmented": a.targets if a.strong == "deepaug" else [],
              "flags": config_of(a)}
    try:
        report = train(a, step_of, train_split, out, device, steps, after_epoch, state)
    except Diverged:
        if chief:
            save_json(out / "report.json", {**common, "collapsed": 1})
        raise
    if not chief:
        return {}

    print("probing the trained network, then the same network untrained")
    report.update(probe(method.kept, *data))
    report.update(transfer(method.kept, train_split.size, a, device))
    trained = {k: v.clone() for k, v in method.kept.state_dict().items()}
    method.kept.load_state_dict(untrained)
    report.update({f"{k}_untrained": v for k, v in probe(method.kept, *data).items()})
    method.kept.load_state_dict(trained)
    report.update({f"{k}_baseline": baseline[k] for k in ("linear", "knn") if k in (baseline or {})})
    report.update({"broken_pictures": len(train_split.broken | test_split.broken), **common})
    save_json(out / "report.json", report)                           # now: whatever export and figures may meet
    report["export_difference"] = export(step_of.a, method.kept, test_split, classes, out, report)
    draw_figures(a, step_of, train_split, out, device, report, probes)
    save_json(out / "report.json", report)
    show(report, out)
    return report


def show(report: dict, out: Path) -> None:
    """The summary at the end of a run."""
    print(f"\n{'':24}{'untrained':>10}{'baseline':>10}{'this run':>10}")
    for key, label in {"linear": "linear probe, test %", "knn": "kNN, test %"}.items():
        if key in report:
            before = f"{report[key + '_baseline']:10.2f}" if key + "_baseline" in report else " " * 10
            print(f"{label:24}{report[key + '_untrained']:10.2f}{before}{report[key]:10.2f}")
    for key, value in report.items():
        if key.startswith("transfer"):
            print(f"{key:44}{value:10.2f}")
    if report["ever_rescued"]:
        print(f"similarity of pairs {report['similarity']:.2f}, of those chosen {report['similarity_chosen']:.2f}, to "
              f"their strong view {report['similarity_strong']:.2f}; {report['ever_rescued']:.0f} % of the pictures "
              "were rescued at least once")
    if report["collapsed"]:
        print("COLLAPSED: all embeddings are nearly one point")
    print(f"{report['steps']} steps in {report['seconds']:.0f} s, {report['images_per_second']:.0f} images/s; the "
          f"exported encoder differs from the live one by {report['export_difference']:.1g}")
    if report["broken_pictures"]:
        print(f"{report['broken_pictures']} pictures could not be read and were skipped")
    print(f"in {out}: encoder.pt, weights.safetensors, report.json, easy.png, curves.png")


def planned(a) -> list:
    """The runs of this command line, baselines first: one for every seed and every value of --sweep."""
    variants = [{}]
    if a.sweep:
        name, *values = a.sweep
        variants = [{name: {"k": int, "s": float}[name](v)} for v in values]
    plain = {k: a.defaults[k] for k in RESCUE_FLAGS}
    if a.baseline and a.rescue != "none":
        variants = [{**plain, "rescue": "none", "targets": []}] + variants
    runs = []
    for seed in a.seeds or [a.seed]:
        for changed in variants:
            r = argparse.Namespace(**{**vars(a), **changed, "seed": seed})
            r.name = run_name(r)
            if a.out and (a.seeds or a.sweep):
                label = r.rescue if len(changed) != 1 else "".join(map(str, *changed.items()))
                r.out = f"{a.out}/{label}/s{seed}"
            elif a.out and "rescue" in changed:
                r.out = f"{a.out}-baseline"
            runs.append(r)
    return runs


def main(argv=None) -> dict:
    """Run the command line `argv` (default: the program's own). Returns the report, with linear_baseline and
    knn_baseline beside; with --seeds, --sweep or --compare the table of runs."""
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
            baselines, folders = {}, []
            for r in planned(a):
                folder = Path(r.out or f"runs/{r.name}-s{r.seed}")
                is_baseline = r.rescue == "none" and a.rescue != "none"
                report = finished(folder, r) if is_baseline or a.resume else None
                more = a.transfer or (a.export == "pt2" and not (folder / "encoder.pt2").exists())
                if report and (is_baseline or not more):
                    print(f"{folder}: is finished, its report is taken")
                else:
                    try:
                        report = run(r, baselines.get(r.seed))
                    except Diverged as e:
                        if not a.sweep:
                            fail(str(e))
                        print(f"{folder}: {e}")                      # the other values of --sweep are still of interest
                if r.rescue == "none":
                    baselines[r.seed] = report
                folders.append(folder)
        return compare(folders) if a.seeds or a.sweep else report
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
