# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "numpy", "matplotlib", "tqdm", "safetensors"]
# ///
"""VICReg on RES-L-H networks, and probes that show what every layer has learned.

Ben-Shaul et al., "Reverse Engineering Self-Supervised Learning" (arXiv 2305.15614): networks,
probes, figures. Bardes et al., "VICReg" (2105.04906): the loss; main_vicreg.py is its code.

VICReg shows a network two random views of every picture and asks of its embeddings Z, Z' [B, d]
that a picture's two be alike (invariance s), every dimension vary over the batch (variance v) and
no two dimensions say the same (covariance c); without the last two all would become one point.

    L = lambda s(Z, Z') + mu [v(Z) + v(Z')] + nu [c(Z) + c(Z')]    (Eq. 1)

No label is used. What does each layer know, and when? Training writes an encoder at chosen epochs;
probing reads encoders, these or anybody's, and asks every layer for labels: which picture is this a
view of (sample)? which class? superclass? what does another network say, from untrained (random) to
trained?

    svm     accuracy of a linear SVM on test pictures, in %
    ncc     of the nearest class centre, argmin_c |x - mu_c|, mu_c the mean of class c
    cdnv    (Var_i + Var_j) / (2 |mu_i - mu_j|^2), mean over pairs of classes: 0 if points
    bits    information about the picture in the last block, estimated by MINE

    python vicreg_probe.py                             the lesson: layers and epochs
    python vicreg_probe.py --preset paper              the paper's setting, for a GPU
    python vicreg_probe.py --encoder runs/a/encoder-*.pt --target-net vit   other probes, later

SVM on the last block, three seeds: 13.0 -> 60.4 ± 1.5 % of 20 classes, samples 23.7 -> 66.3.
"""
import argparse
import copy
import csv
import itertools
import json
import math
import os
import random
import re
import shlex
import sys
import time
import warnings
import zipfile
from collections import OrderedDict, defaultdict
from contextlib import suppress
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median, median_low, stdev

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from torchvision.models.resnet import BasicBlock
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import rgb_to_grayscale
from tqdm import tqdm

NAME = "vicreg_probe"
LEVELS = ["sample", "class", "superclass"]
MEASURES = "svm logistic knn ncc_train ncc_test cdnv variance distance bits".split()
# of each class: the shapes' families, CIFAR-100's coarse labels
SUPERCLASSES = {"shapes": "aaaabbbbccccddddeeee", "cifar100": "eboiaghhsddojshldjhlglfkhgnpdpalbk"
                "moqjlfftiipnorskqerecaresrkdcmmqmbjtckabqmjnpnqtcegtffitsbcpgarion"}
IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
JITTER = (0.4, 0.4, 0.2, 0.1)

# ==== 1 Settings ====

# Appendix A; projector and target_epochs are ours
PAPER = dict(dataset="cifar100", arch=["RES-5-250"], projector=[2048, 2048], epochs=1000, lr=0.002,
             clip=1e9, weight_decay=1e-6, warmup_epochs=0, crop_min=0.08, blur=0.5, solarize=0.1,
             sample_level=[500, 100, 20], probe_epochs=[0, 20, 40, 100, 400, 1000],
             target_net="resnet18", target_epochs=30, mine_steps=1000)
RUNS = ["objective", "views", "arch", "variance", "layer", "seed"]  # each value makes a run
# where and how a run computes, not what: --resume may change them
HOW = set("out resume device data_dir workers compile preset compare".split())

# --- the same in simclr, simcse, vicreg, topk, cka ---
class BadInput(ValueError):
    """What a user can put right: main() prints it as one line, exit code 2."""

def check(good, message):
    if not good:
        raise BadInput(message)
# --- end ---
# --- the same in simclr, simcse, vicreg, topk ---
def within(low, high, kind=float):  # an argparse type
    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text}: must be from {low} to {high}")
        return kind(text)
    return number
# --- end ---

def targets_of(layer, arch):
    """The layers that a value of --layer names: -1 input, 0 stem, 1 to B the blocks, B + 1 average
    pool, B + 2 head; "none", "all" (from 0), "3+4"."""
    depth = re.fullmatch(r"RES-([1-9]\d{0,2})-[1-9]\d{0,4}", arch)
    check(depth or arch == "resnet18", f"no network {arch}: resnet18, or RES-L-H, as RES-5-250")
    known = {str(l): l for l in range(-1, (int(depth[1]) if depth else 8) + 3)}
    names = {"none": [], "all": list(known)[1:]}.get(layer, layer.split("+"))
    check(set(names) <= set(known), f"--layer {layer}: {arch} has {' '.join(known)}; or 3+4, all")
    return sorted({known[name] for name in names})

def settings(argv=None):
    """The flags, checked; each combination of the values of RUNS is a run."""
    positive, count = within(1e-9, 1e9), within(0, 10 ** 9, int)
    yes_no, cuda = argparse.BooleanOptionalAction, torch.cuda.is_available()
    p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.error = lambda message: check(False, f"{message} (see --help)")
    add = p.add_argument_group("Deep Augmentation").add_argument
    add("--layer", nargs="+", default=["none"], help="-1 input, 0 stem, blocks from 1; 3+4; all")
    add("--rate", type=within(0, 0.999), default=0.5, help="dropout rate")
    add("--stop-grad", action=yes_no, default=True, help="no gradient from augmented rows to below")
    add("--sample", type=within(1e-9, 1), default=0.5, help="share of the rows to augment")
    add = p.add_argument_group("data and views").add_argument
    add("--dataset", help="shapes (drawn), cifar10, cifar100, folder; torchvision's: Food101, ...")
    add("--data-dir", help="your pictures; or where the data set lies or goes (data)")
    add("--views", nargs="+", choices=["simclr", "autoaugment", "none"], default=[None],
        help="default: simclr, supervised none")
    add("--crop-min", type=within(0.01, 1), default=0.2, help="smallest crop")
    add("--blur", type=within(0, 1), default=0.0, help="probability")
    add("--solarize", type=within(0, 1), default=0.0, help="probability")
    add("--image-size", type=count, default=0, help="of a view; 0: their own; Food101: 32")
    add = p.add_argument_group("network and objective").add_argument
    add("--arch", nargs="+", default=["RES-5-16"], help="RES-L-H: L blocks, width H; resnet18")
    add("--projector", type=within(1, 10 ** 6, int), nargs=2, default=[256, 256], help="its sizes")
    add("--objective", nargs="+", choices=["vicreg", "simclr", "supervised"], default=["vicreg"])
    add("--invariance", type=within(0, 1e9), default=25.0, help="lambda of Eq. 1")
    add("--variance", type=within(0, 1e9), nargs="+", default=[25.0], help="mu; v is halved")
    add("--covariance", type=within(0, 1e9), default=1.0, help="nu")
    add = p.add_argument_group("training").add_argument
    add("--preset", choices=["paper"], help="other defaults: the paper's")
    add("--epochs", type=count, default=20, help="0: untrained")
    add("--batch-size", type=within(2, 10 ** 6, int), default=256, help="of all processes")
    add("--lr", type=positive, help="peak; default: .1, SimCLR .5")
    add("--clip", type=positive, default=5.0, help="largest norm of the gradient")
    add("--weight-decay", type=within(0, 1e9), default=1e-4)
    add("--warmup-epochs", type=count, default=1, help="at most a tenth of the run")
    add("--seed", nargs="+", type=count, default=[0], help="several: a run each")
    add("--deterministic", action="store_true", help="the same bits on CUDA, too")
    add = p.add_argument_group("probes").add_argument
    add("--encoder", nargs="+", default=[], help="encoder.pt of any script: probed, not trained")
    add("--probe-epochs", type=count, nargs="+", default=[2, 6], help="beside first and last")
    add("--probes", nargs="+", choices=["svm", "logistic", "knn", "ncc"], default=["svm", "ncc"])
    add("--all-layers", action="store_true", help="else the numbered ones before the average pool")
    add("--probe-images", type=within(10, 10 ** 9, int), help="training pictures of a probe; all")
    add("--sample-level", type=count, nargs=3, default=[100, 50, 10],
        metavar=("PICTURES", "TRAIN", "TEST"), help="views of each; 0 0 0: none")
    add("--target-net", default="RES-2-16", help="makes targets: RES-L-H, resnet18, vit; none")
    add("--target-epochs", type=within(1, 10 ** 6, int), default=6, help="its training")
    add("--target-stages", type=within(2, 1000, int), default=6, help="from untrained to trained")
    add("--balance-targets", action="store_true", help="of standardised logits")
    add("--mine-steps", type=count, default=200, help="training of MINE; 0: no bits")
    add("--mine-side", type=within(1, 1000, int), default=8, help="of the pictures it sees")
    add = p.add_argument_group("run").add_argument
    add("--out", help=f"folder; default: runs/{NAME}-DATE-TIME")
    add("--resume", action="store_true", help="go on from --out's checkpoint")
    add("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    add("--compile", action=yes_no, help="default: on CUDA with Triton, from 2,000 steps")
    add("--workers", type=count, default=min(8, os.cpu_count() or 1), help="to read pictures")
    add("--compare", nargs="+", metavar="RUN", help="only compare")
    a = p.parse_args(argv)
    if a.preset == "paper":
        p.set_defaults(**PAPER)
        a = p.parse_args(argv)  # again: a flag beside the preset wins
    for name in RUNS:
        setattr(a, name, list(dict.fromkeys(getattr(a, name))))
    for pair in itertools.product(a.layer, a.arch):
        targets_of(*pair)
    a.dataset = a.dataset or ("folder" if a.data_dir is not None else "" if a.encoder else "shapes")
    world, (pictures, *views) = int(os.environ.get("WORLD_SIZE", "1")), a.sample_level
    check(cuda or a.device == "cpu", "--device cuda: there is none here")
    check(a.dataset != "folder" or a.data_dir, "--dataset folder needs --data-dir")
    check(a.out or not a.resume, "--resume needs --out")
    check(not (a.encoder and (a.resume or world > 1)), "--encoder: no --resume, no torchrun")
    check(a.batch_size in range(2 * world, 10 ** 7, world), f"--batch-size: 2 for each of {world}")
    check(not pictures or pictures > 1 and min(views) > 0, "--sample-level: 2 pictures, 1 view")
    a.target_net in ("none", "vit") or targets_of("none", a.target_net)
    return a

# ==== 2 Method: the loss, and what is asked of every layer ====

def vicreg(z1, z2):
    """(invariance s, variance v, covariance c) of Eq. 1, unweighted; z1, z2: the two views'
    embeddings, float32 [B, d], B > 1. main_vicreg.py:194-219: s is a mean over dimensions too, v
    is halved over the views, c is not; 1e-4 keeps the gradient finite at zero variance."""
    variance = covariance = 0.0
    for z in (z1, z2):
        z = z - z.mean(0)
        variance = variance + F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() / 2
        cov = z.T @ z / (len(z) - 1)  # [d, d], symmetric
        covariance = covariance + 2 * cov.triu(1).square().sum() / z.shape[1]
    return F.mse_loss(z1, z2), variance, covariance

# --- the same in vicreg, topk ---
def deep_augment(h, rows, rate, stop_grad):
    """Dropout of the chosen rows, h on the others (Deep Augmentation, arXiv 2303.14537, Eq. 2). In
    training only. h: hidden states [B, ...]; rows: bool [B]; rate in [0, 1). stop_grad: the chosen
    rows are detached: no gradient from them to the layers below."""
    x = F.dropout(h.detach() if stop_grad else h, rate)
    return torch.where(rows.view(-1, *[1] * (h.ndim - 1)), x, h)
# --- end ---

# --- the same in simclr, vicreg, topk ---
def nt_xent(z1, z2, temperature):
    """NT-Xent (Eq. 1 with the 2N-2 negatives of SimCLR's code). z1, z2: [N, d], row i of each a
    view of picture i. Each of the 2N must pick its partner among the 2N-1 others: one plain
    cross-entropy, in float32."""
    n = len(z1)
    z = F.normalize(torch.cat([z1, z2]).float(), dim=1)  # [2N, d]
    logits = (z @ z.T / temperature).fill_diagonal_(float("-inf"))  # not itself
    return F.cross_entropy(logits, torch.arange(2 * n, device=z.device).roll(n))
# --- end ---

def fit_svm(x, y, classes, c=1.0, iterations=300):
    """Linear SVMs, one against the rest, for all classes at once: weights [D + 1, classes], the
    last row is the bias. x: features [N, D]; y: int64 [N], or [N, T]: T labels of each picture, no
    class in two columns. As scikit-learn's LinearSVC, every class minimises

        |w|^2 / 2 + c sum_i max(0, 1 - s_i <w, (x_i, 1)>)^2,    s_i = 1: its own, -1: others

    by accelerated gradient descent with restarts (O'Donoghue & Candes 2015), in coordinates in
    which the Hessian is at most the identity: so the step is 1, whatever the features' scales."""
    x, own = F.pad(x, (0, 1), value=1), y.view(len(y), -1)
    gram = sum(part.T.double() @ part.double() for part in x.split(8192))  # float32 rounds too much
    eye = torch.eye(len(gram), dtype=gram.dtype, device=x.device)
    factor = torch.linalg.cholesky((1 + 1e-14 * gram.trace()) * eye + 2 * c * gram)
    scale = torch.linalg.solve_triangular(factor, eye, upper=False).T.float()
    xs = x @ scale  # w = scale v, so x w = xs v
    v = u = torch.zeros(xs.shape[1], classes, device=x.device)
    t, first = torch.ones(classes, device=x.device), None
    for i in range(iterations):
        score = xs @ u  # [N, classes]
        hinge = (score.gather(1, own) - 1).clamp_(max=0)  # -s max(0, 1 - s <w, x>):
        slack = score.add_(1).clamp_(min=0).scatter_(1, own, hinge)
        gradient = scale.T @ (scale @ u) + 2 * c * (xs.T @ slack)
        new = u - gradient
        t = torch.where((gradient * (new - v)).sum(0) > 0, 1.0, t)
        following = (1 + (1 + 4 * t * t).sqrt()) / 2
        u, v, t = new + (t - 1) / following * (new - v), new, following
        first = gradient.norm() if first is None else first
        if i % 10 == 9 and gradient.norm() <= 1e-6 * first:  # asking makes the GPU wait
            break
    return scale @ v

def percent(equal):
    return 100 * equal.float().mean().item()

@torch.no_grad()
def clustering(x, y, x_test, y_test, classes):
    """Do the classes form clusters (Section 2.2)? Features x [N, D], labels y [N]. ncc_train,
    ncc_test: accuracy in % of the nearest class centre. Of training pictures, means over classes
    with two or more: variance, Var_i = mean |x - mu_i|^2; over pairs i != j of them: distance,
    |mu_i - mu_j|^2, and cdnv, (Var_i + Var_j) / (2 |mu_i - mu_j|^2). None: not finite."""
    centre = x.mean(0)
    x, x_test = x - centre, x_test - centre  # distances stay, rounding shrinks
    def sums(values):  # over each class, [N, k] -> [classes, k]; index_add_ varies on CUDA
        parts = zip(y.split(8192), values.split(8192))  # [N, classes] may be large
        return sum(F.one_hot(label, classes).T.to(values.dtype) @ v for label, v in parts)
    count = torch.bincount(y, minlength=classes)
    mu = sums(x) / count.clamp(min=1).unsqueeze(1)  # [classes, D]
    offset = torch.where(count > 0, mu.square().sum(1) / 2, math.inf)

    def accuracy(x, y):  # argmin |x - mu|^2 = argmax <x, mu> - |mu|^2 / 2
        return percent((x @ mu.T - offset).argmax(1) == y)

    some = count > 1
    var = sums((x - mu[y]).square().sum(1, keepdim=True))[some, 0].double() / count[some]
    squared = torch.cdist(mu[some].double(), mu[some].double(),
                          compute_mode="donot_use_mm_for_euclid_dist").square()
    pairs = ~torch.eye(len(var), dtype=torch.bool, device=x.device)
    cdnv = (var.unsqueeze(1) + var) / (2 * squared)  # [classes, classes]
    spread = {"cdnv": cdnv[pairs], "variance": var, "distance": squared[pairs]}
    spread = {k: v.mean().item() for k, v in spread.items()}
    return {"ncc_train": accuracy(x, y), "ncc_test": accuracy(x_test, y_test),
            **{k: v if math.isfinite(v) else None for k, v in spread.items()}}

def mutual_information(x, z, steps, seed=0, runs=5):
    """MINE (Belghazi et al. 2018): estimates, in bits, of a lower bound of the information between
    x [N, Dx] and z [N, Dz], one for each of `runs` initialisations of a network T,

        I(X; Z) >= E over pairs of T(x, z) - log E over shuffled pairs of exp T(x, z),

    trained on four fifths of the pairs, read on the last. Compare values within a run only: it is
    what T finds, hardly more than log2(N / 5) bits, and falls, even below 0, where T overfits."""
    n, batch, hidden = len(x) - len(x) // 5, 512, 128
    x, z = ((t - t[:n].mean(0)) / t[:n].std(0).clamp(min=1e-6) for t in (x.float(), z.float()))
    g = torch.Generator().manual_seed(seed)  # on the CPU: the same on every device
    sizes = x.shape[1] + z.shape[1], hidden, hidden, 1
    w1, w2, w3 = ((torch.randn(runs, i, o, generator=g) * (2 / i) ** 0.5).to(x.device)
                  .requires_grad_() for i, o in itertools.pairwise(sizes))
    b1, b2 = (torch.zeros(runs, 1, hidden, device=x.device, requires_grad=True) for _ in range(2))
    solver = torch.optim.Adam([w1, w2, w3, b1, b2], 1e-3, weight_decay=1e-4, fused=True)

    def bound(rows, partners):  # E T of the pairs, log E exp T of the shuffled: [runs] each
        from_x, from_z = x[rows] @ w1[:, :x.shape[1]] + b1, z[rows] @ w1[:, x.shape[1]:]
        h = F.relu(torch.cat([from_x + from_z, from_x + from_z[:, partners]], 1))
        joint, shuffled = (F.relu(h @ w2 + b2) @ w3)[..., 0].chunk(2, 1)
        return joint.mean(1), shuffled.logsumexp(1) - math.log(len(rows))

    rows = torch.randint(n, (steps, batch), generator=g).to(x.device)
    partners = torch.rand(steps, batch, generator=g).argsort(1).to(x.device)
    moving = None  # log of a moving mean of exp T: a batch's own would bias the gradient
    for pair in zip(rows, partners):
        joint, log_mean = bound(*pair)
        now = log_mean.detach()
        moving = now if moving is None else torch.logaddexp(moving + math.log(0.9),
                                                            now + math.log(0.1))
        loss = ((log_mean - moving).exp() - joint).sum()
        solver.zero_grad()
        loss.backward()
        solver.step()
    with torch.no_grad():
        held = torch.arange(n, len(x), device=x.device)
        joint, log_mean = bound(held, torch.randperm(len(held), generator=g).to(x.device))
    return ((joint - log_mean) / math.log(2)).tolist()

# ==== 3 Network: RES-L-H (Appendix A.2) or torchvision's ResNet-18, as numbered layers ====

# --- the same in simclr, vicreg, topk ---
class Normalize(nn.Module):
    """Layer -1: pictures in 0..1 -> (x - mean) / std per channel, in channels_last."""
    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", mean.view(3, 1, 1))
        self.register_buffer("std", std.view(3, 1, 1))

    def forward(self, x):
        return ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
# --- end ---

def backbone(arch, size):
    """(stem, residual blocks, channels of the last)."""
    if arch == "resnet18":
        r = torchvision.models.resnet18()
        conv1, pool = r.conv1, r.maxpool
        if size < 64:
            conv1, pool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
        stem = nn.Sequential(OrderedDict(conv1=conv1, bn1=r.bn1, relu=nn.ReLU(), pool=pool))
        blocks, width = [*r.layer1, *r.layer2, *r.layer3, *r.layer4], 512
    else:
        depth, width = (int(n) for n in arch.split("-")[1:])
        stem = nn.Sequential(OrderedDict(
            conv1=nn.Conv2d(3, width, 2, 2, bias=False), bn1=nn.BatchNorm2d(width),
            relu1=nn.ReLU(), conv2=nn.Conv2d(width, width, 2, 2, bias=False),
            bn2=nn.BatchNorm2d(width), relu2=nn.ReLU()))
        blocks = [BasicBlock(width, width) for _ in range(depth)]
    for conv in (m for part in (stem, *blocks) for m in part.modules()):
        if isinstance(conv, nn.Conv2d):  # as torchvision
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return stem, blocks, width

class Net(nn.Module):
    """The layers of targets_of, with Deep Augmentation between. forward(images [V * B, 3, S, S] in
    0..1, rows bool [V * B]) -> [V * B, d]: V = 2 views pass one after the other, each with its own
    BatchNorm statistics (main_vicreg.py), d of the projector; supervised: V = 1, class logits."""
    def __init__(self, a, size, classes):
        super().__init__()
        stem, blocks, self.dim = backbone(a.arch, size)
        hidden, out = a.projector
        self.views = 1 if a.objective == "supervised" else 2
        head = nn.Linear(self.dim, classes) if self.views == 1 else nn.Sequential(
            nn.Linear(self.dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU(),
            nn.Linear(hidden, out, bias=False))
        self.layers = nn.Sequential(OrderedDict(
            input=Normalize(*IMAGENET), stem=stem,
            **{f"block{i}": block for i, block in enumerate(blocks, 1)},
            avgpool=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), head=head))
        self.targets, self.augment = targets_of(a.layer, a.arch), (a.rate, a.stop_grad)

    def forward(self, images, rows):
        found = []
        for h, r in zip(images.chunk(self.views), rows.chunk(self.views)):
            for l, layer in enumerate(self.layers, start=-1):  # layer -1: the input
                h = layer(h)
                if self.training and l in self.targets:
                    h = deep_augment(h, r, *self.augment)
            found.append(h)
        return torch.cat(found)

    def activations(self, images):
        """{name: output} of stem, block1 to blockB, avgpool, head."""
        h, out = self.layers.input(images), {}
        for name, layer in list(self.layers.named_children())[1:]:
            out[name] = h = layer(h)
        return out

# ==== 4 Views: a batch at once, each picture with its own parameters ====

def views_of(images, size, a, kind, times=1):
    """`times` views of each picture: uint8 [B, 3, H, H] -> [times * B, 3, size, size] in 0..1,
    first views first. kind: none, autoaugment or simclr, that is Appendix A.1."""
    images = images.repeat(times, 1, 1, 1)
    if kind == "simclr":
        x = make_views(images, size, (a.crop_min, 1), JITTER)
        return blur_and_solarize(x, a.blur, a.solarize)
    if kind == "autoaugment":  # eight pictures share a draw
        policy = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
        images = torch.cat([policy(group) for group in images.split(8)])
    return to_unit(images, size)

# --- the same in vicreg, topk ---
def blur_and_solarize(x, blur, solarize, window=23):
    """Each picture of x [n, 3, S, S] in 0..1 with these probabilities blurred (Gaussian, sigma .1
    to 2, reflected borders; two matrix products), and its pixels from 0.5 up inverted."""
    n, size = len(x), x.shape[-1]
    if blur:
        sigma = torch.empty(n, 1, device=x.device).uniform_(0.1, 2)
        sigma = torch.where(torch.rand_like(sigma) < blur, sigma, 1e-3)  # that: left alone
        reach = min(window // 2, size - 1)
        offset = torch.arange(-reach, reach + 1, device=x.device)
        weight = torch.softmax(-0.5 * (offset / sigma) ** 2, 1)  # [n, window]
        source = (torch.arange(size, device=x.device).unsqueeze(1) + offset).abs()
        source = size - 1 - (size - 1 - source).abs()  # the border pixel is not repeated
        m = torch.einsum("nk,ikj->nij", weight, F.one_hot(source, size).float()).unsqueeze(1)
        x = m @ x @ m.mT
    chosen = torch.rand(n, 1, 1, 1, device=x.device) < solarize
    return torch.where(chosen & (x >= 0.5), 1 - x, x) if solarize else x
# --- end ---

# --- the same in simclr, vicreg, topk ---
def make_views(images, size, crop=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1)):
    """A random view of each picture: uint8 [n, 3, H, W] -> float32 [n, 3, size, size] in 0..1.
    SupContrast main_supcon.py:146: crop (share of the area), flip and, unless jitter is None,
    brightness, contrast, saturation, hue (reach) with probability .8, grayscale .2."""
    n, _, height, width = images.shape
    device = images.device

    def chance(p):
        return torch.rand(n, 1, 1, 1, device=device) < p

    top, left, h, w = crop_boxes(n, height, width, crop, device)
    flip = chance(0.5).flatten()
    down = resize_matrix(top, h, height, size, torch.zeros_like(flip)).unsqueeze(1)
    across = resize_matrix(left, w, width, size, flip).unsqueeze(1)
    x = down @ (images.float() / 255) @ across.mT  # crop, resize, flip: two matrix products
    if jitter is None:
        return x
    jittered = chance(0.8)
    for operation in torch.randperm(4).tolist():  # one order a batch
        neutral, reach = float(operation != 3), jitter[operation]
        factor = torch.empty(n, 1, 1, 1, device=device).uniform_(neutral - reach, neutral + reach)
        x = adjust(x, operation, torch.where(jittered, factor, neutral))
    return torch.lerp(x, rgb_to_grayscale(x), chance(0.2).float())

def crop_boxes(n, height, width, scale, device):
    """(top, left, h, w), each float [n]: torchvision's RandomResizedCrop, ten tries at once."""
    area = torch.empty(n, 10, device=device).uniform_(*scale) * height * width
    ratio = torch.empty(n, 10, device=device).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first, found = fits.int().argmax(1, keepdim=True), fits.any(1)
    w = torch.where(found, w.gather(1, first)[:, 0], width)  # else the whole picture
    h = torch.where(found, h.gather(1, first)[:, 0], height)
    top = (torch.rand(n, device=device) * (height - h + 1)).floor()
    left = (torch.rand(n, device=device) * (width - w + 1)).floor()
    return top, left, h, w

def resize_matrix(start, length, size, out, flip):
    """[n, out, size]: torchvision's antialiased resize of a line's pixels start..start+length, by
    a triangle as wide as the shrink factor; reversed where `flip`."""
    scale, begin = (length / out).view(-1, 1, 1), start.view(-1, 1, 1)
    source = torch.arange(size, device=start.device)
    target = torch.arange(out, device=start.device)
    target = torch.where(flip.view(-1, 1), out - 1 - target, target).unsqueeze(2)  # [n, out, 1]
    distance = (source + 0.5 - begin - (target + 0.5) * scale).abs()
    weight = (1 - distance / scale.clamp(min=1)).clamp(min=0)
    weight = weight * ((source >= begin) & (source < begin + length.view(-1, 1, 1)))
    return weight / weight.sum(-1, keepdim=True)

def adjust(x, operation, factor):
    """torchvision's 0 brightness, 1 contrast, 2 saturation, 3 hue; factor [n, 1, 1, 1]."""
    if operation == 0:
        return (x * factor).clamp_(0, 1)
    if operation < 3:
        luma = rgb_to_grayscale(x)
        toward = luma if operation == 2 else luma.mean((1, 2, 3), keepdim=True)
        return torch.lerp(toward, x, factor).clamp_(0, 1)
    # HSV: a channel's share of the chroma is clamp(2 - d, 0, 1), d: sixths of a turn to its hue
    r, g, b = x.unbind(1)
    value, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma, red = value - low, (value == r).float()
    green = (value == g).float().mul_(1 - red)
    h = torch.addcmul(red * (g - b), green, (b - r).add_(chroma, alpha=2))
    h.addcmul_(1 - red - green, (r - g).add_(chroma, alpha=4))
    h.div_(chroma + 1e-20).add_(6 * factor[:, 0])
    d = h.unsqueeze(1) - 2 * torch.arange(3, device=x.device).view(1, 3, 1, 1)
    d.sub_((d / 6).round_(), alpha=6).abs_()  # the shorter way around, 0..3
    return torch.addcmul(low.unsqueeze(1), chroma.unsqueeze(1), d.neg_().add_(2).clamp_(0, 1))

def to_unit(images, size):
    """Unaugmented: uint8 [B, 3, H, H] -> float32 [B, 3, size, size] in 0..1."""
    x = images.float() / 255
    same = x.shape[-1] == size
    return x if same else F.interpolate(x, (size, size), mode="bilinear", antialias=True)

# ==== 5 Data ====

class Split(torch.utils.data.Dataset):
    """Square pictures: `images` uint8 [N, 3, side, side], or `files`, read anew each time. labels:
    int64 [N], -1: none. size: of the views."""
    def __init__(self, size, labels, images=None, files=(), side=0, a=None):
        self.size, self.labels, self.images = size, labels, images
        self.files, self.side, self.a, self.broken = files, side, a, set()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, asked):
        for i in range(len(self)):
            used = (asked + i) % len(self)
            with suppress(Exception):  # PIL raises many kinds
                return read_square(self.files[used], self.side), self.labels[used], used, asked
        raise BadInput(f"not one picture like {self.files[0]} can be read")

    def batches(self, order, batch_size):
        """Yields (uint8 [B, 3, side, side], labels [B]) in this order; in place of a file that
        cannot be read, which is named, the next one."""
        if self.images is not None:
            for i in order.to(self.images.device, non_blocking=True).split(batch_size):
                yield self.images[i], self.labels[i]
            return
        loader = torch.utils.data.DataLoader(
            self, batch_sampler=[i.tolist() for i in order.split(batch_size)],
            num_workers=self.a.workers, pin_memory=self.a.device == "cuda",
            generator=torch.Generator())
        for images, labels, used, asked in loader:
            for i in set(asked[used != asked].tolist()) - self.broken:
                tqdm.write(f"skipped, cannot be read: {self.files[i]}")
                self.broken.add(i)
            yield [t.to(self.a.device, non_blocking=True) for t in (images, labels)]

def read_square(file, side):
    """uint8 [3, side, side], cut from the middle; 16-bit or float grey scaled by its own range."""
    with Image.open(file) as picture:
        if picture.mode[0] in "IF":
            x = np.asarray(picture, dtype=np.float64)
            x = 255 * (x - x.min()) / max(x.max() - x.min(), 1e-12)
            check(np.isfinite(x).all(), "not finite")
            picture = Image.fromarray(x.round().astype(np.uint8))
        picture = ImageOps.exif_transpose(picture).convert("RGB")
        picture = ImageOps.fit(picture, (side, side), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

def list_pictures(root):
    """[(file, name of its class folder or "")] below root, but for helper files (., __)."""
    found = []
    for folder, inside, files in os.walk(root, followlinks=True):
        here = Path(folder)
        if here.resolve() in [p.resolve() for p in here.parents]:  # a link in a circle
            inside.clear()
            continue
        inside[:] = [f for f in inside if not f.startswith((".", "__"))]
        name = "" if here == root else here.relative_to(root).parts[0]
        found += [(here / f, name) for f in files if not f.startswith((".", "__"))
                  and f.lower().endswith(torchvision.datasets.folder.IMG_EXTENSIONS)]
    return sorted(found)

def load_folder(a):
    """DIR/CLASS/*.png, DIR/*.png (no labels), or these below DIR/train and DIR/test (val, valid,
    validation); else a tenth of each class is held out. -> (train, test, class names)"""
    root = Path(a.data_dir).resolve()
    check(root.is_dir(), f"--data-dir {root}: no such folder")
    check(root not in Path(a.out or "runs/a").resolve().parents, "--out lies in --data-dir")
    train, test = list_pictures(root), []
    tops = {name.lower(): name for _, name in train}
    tests = [list_pictures(root / tops[name]) for name in ("test", "val", "valid", "validation")
             if name in tops]
    if "train" in tops and (tests or set(tops) <= {"train", ""}):
        train = list_pictures(root / tops["train"])
        known = {name for _, name in train} - {""} or {""}
        test = next((t for t in tests if known & {name for _, name in t}), [])  # with labels
    classes = sorted({name for _, name in train} - {""})
    classes = classes if len(classes) > 1 else []  # one class is none
    groups = {name: ([], []) for name in classes or [""]}  # {class: (train, test)}
    for part, pictures in enumerate((train, test)):
        for file, name in pictures:
            if not classes or name in groups:
                groups[name if classes else ""][part].append(file)
    for files, held in groups.values():
        random.Random(0).shuffle(files)
        if not test:
            held += [files.pop() for _ in range(len(files) // 10 or len(files) > 1)]
    splits = [[(f, label) for label, group in enumerate(groups.values()) for f in group[part]]
              for part in (0, 1)]
    print(f"{root}: {len(classes) or 'no'} classes, {len(splits[0])} pictures to train on, "
          f"{len(splits[1])} to test with, {len(train + test) - sum(map(len, splits))} left out")
    sizes = []
    for file, _ in random.Random(0).sample(splits[0], min(100, len(splits[0]))):
        with suppress(Exception), Image.open(file) as picture:
            sizes.append(min(picture.size))
    check(sizes and splits[1], f"--data-dir {root}: too few pictures")
    usual = median_low(sizes)
    size = a.image_size or min(224, usual)
    side = max(size, min(round(size * 8 / 7), usual))  # a margin for crops
    fit = 3 * side ** 2 * sum(map(len, splits)) < 4 << 30
    for part, pictures in enumerate(splits):
        random.Random(0).shuffle(pictures)  # the first n are then of all classes
        files, labels = zip(*pictures)
        labels = torch.tensor(labels) if classes else torch.full((len(files),), -1)
        split = splits[part] = Split(size, labels, None, files, side, a)
        if fit:
            read = split.batches(torch.arange(len(split)), 256)
            split.images, split.labels = map(torch.cat, zip(*read))
    return *splits, classes

def draw_shapes(n, seed, device):
    """uint8 [n, 3, 32, 32] and labels: polygons with 3-6 corners, stars with 3-6 points, rings with
    0-3 gaps, 2-5 dots on a circle, 1-4 bars; all else is nuisance."""
    g = torch.Generator().manual_seed(seed)  # on the CPU: the same on every device

    def uniform(low, high, channels=1, side=1):
        return (torch.rand(n, channels, side, side, generator=g) * (high - low) + low).to(device)

    label = (torch.arange(n) % 20)[torch.randperm(n, generator=g)].to(device)
    family, kind = (label // 4).view(n, 1, 1, 1), (label % 4).view(n, 1, 1, 1)
    axis = (torch.arange(32, device=device) + 0.5) / 16 - 1  # pixel centres in -1..1
    radius, turn = uniform(0.5, 0.85), uniform(0, 2 * math.pi)
    y = (axis.view(32, 1) - uniform(-0.2, 0.2)) / radius
    x = (axis - uniform(-0.2, 0.2)) / radius
    x, y = x * turn.cos() - y * turn.sin(), x * turn.sin() + y * turn.cos()  # [n, 1, 32, 32]
    r, angle = torch.hypot(x, y), torch.atan2(y, x) + math.pi

    def sector(m):  # angle from the middle of a 1/m sector
        return angle % (2 * math.pi / m) - math.pi / m

    corners, gaps, dots, bars = kind + 3, kind, kind + 2, kind + 1
    gap = torch.where(gaps > 0, 0.45 - sector(gaps.clamp(min=1)).abs(), -1.0)
    bar = ((((x + 0.85) / 1.7 * bars) % 1 - 0.5).abs() - 0.27) * 1.7 / bars
    distance = torch.stack([  # about, to the edge; negative inside
        r * sector(corners).cos() - 0.9 * (math.pi / corners).cos(),
        r - 0.3 - 0.7 * (sector(corners).abs() * corners / math.pi) ** 1.5,
        torch.maximum((r - 0.75).abs() - 0.22, gap),
        torch.hypot(r * sector(dots).cos() - 0.68, r * sector(dots).sin()) - 0.28,
        torch.maximum(torch.maximum(x.abs(), y.abs()) - 0.85, bar),
    ]).gather(0, family.expand(1, n, 1, 32, 32))[0]
    shape = (0.5 - distance * radius * 16).clamp(0, 1)
    # hardly any colour, by which SimCLR could tell pictures apart
    light, dark, swap = uniform(0.7, 1), uniform(0, 0.3), uniform(0, 1) < 0.5
    ink = torch.where(swap, light, dark) + uniform(-0.1, 0.1, 3)
    paper = torch.where(swap, dark, light) + uniform(-0.1, 0.1, 3)
    clouds = F.interpolate(uniform(-0.1, 0.1, 3, 4), size=32, mode="bicubic")
    noise = torch.empty(n, 3, 32, 32).normal_(0, 0.06, generator=g).to(device)
    picture = torch.lerp(paper + clouds, ink, shape) + noise
    return (picture.clamp(0, 1) * 255).round().byte(), label

def load_data(name, a):
    """Data set `name` -> (train, test, class names). CIFAR is downloaded where it is missing."""
    if name == "folder":
        return load_folder(a)
    if name == "shapes":
        pairs = [draw_shapes(8192, 0, a.device), draw_shapes(2048, 1, a.device)]
        families = "polygon", "star", "ring", "dots", "bars"
        classes = [f"{family} {kind}" for family in families for kind in range(4)]
    else:
        cifar = getattr(torchvision.datasets, name.upper())
        root = a.data_dir if a.data_dir and a.dataset != "folder" else "data"
        try:  # torchvision checks the files; several processes must find them there
            sets = [cifar(root, train, download=not dist.is_initialized())
                    for train in (True, False)]
        except (RuntimeError, OSError) as e:
            raise BadInput(f"{name} is not whole in {root} and cannot be downloaded: "
                           f"{str(e).splitlines()[0]}") from None
        pairs = [(torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous().to(a.device),
                  torch.tensor(s.targets, device=a.device)) for s in sets]
        classes = sets[0].classes
    return *(Split(a.image_size or 32, labels, images) for images, labels in pairs), classes

def train_batches(split, a, step, steps, rank, world):
    """Endless batches of this process from `step` on, in an order that (seed, epoch) decides."""
    while True:
        epoch, first = divmod(step, steps)
        g = torch.Generator().manual_seed(a.seed * 100_003 + epoch)
        order = torch.randperm(len(split), generator=g)[:steps * a.batch_size]
        order = order.view(steps, world, -1)[first:, rank]  # [steps left, B]
        yield from split.batches(order.flatten(), order.shape[1])
        step += len(order)

def learning_rate(step, a, steps):
    """Warm-up from lr/50 onto a cosine that ends at lr * .1^3 (SupContrast util.py)."""
    total, end = a.epochs * steps, a.lr * 0.1 ** 3
    warm = min(a.warmup_epochs * steps, total // 10)
    cosine = end + (a.lr - end) * (1 + math.cos(math.pi * max(step, warm) / total)) / 2
    return cosine if step >= warm else a.lr / 50 + (cosine - a.lr / 50) * step / warm
# --- end ---

def load_torchvision(name, a):
    """As load_data: any data set of torchvision with split="train" and "test" (Food101, Flowers102,
    SVHN, ...), read once and cut to squares as load_folder's."""
    size, root, splits = a.image_size or 32, a.data_dir or "data", []
    side = round(size * 8 / 7)
    square = v2.Compose([v2.RGB(), v2.PILToTensor(), v2.Resize(side), v2.CenterCrop(side)])
    for split in ("train", "test"):
        try:
            pictures = getattr(torchvision.datasets, name)(
                root, split=split, transform=square, download=not dist.is_initialized())
        except Exception as e:
            raise BadInput(f"--dataset {name}: none of torchvision's, or not in {root} and no "
                           f"download: {str(e).splitlines()[-1]}") from None
        loader = torch.utils.data.DataLoader(pictures, 256, num_workers=a.workers)
        images, labels = map(torch.cat, zip(*tqdm(loader, f"reading {split}", leave=False)))
        i = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        splits.append(Split(size, labels[i].to(a.device), images[i].to(a.device)))
    names = map(str, range(int(splits[0].labels.max()) + 1))
    return *splits, list(getattr(pictures, "classes", names))

# ==== 6 Training ====

# --- the same in simclr, simcse, vicreg, topk ---
def gather(z):
    """The rows [B, ...] of all processes as [W * B, ...]; only this one's carry a gradient."""
    if not dist.is_initialized():
        return z
    parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, z.detach().contiguous())
    parts[dist.get_rank()] = z
    return torch.cat(parts)

def save_checkpoint(path, state):
    """Written beside, then renamed: a kill leaves the old file or the new one, whole."""
    part = path.with_suffix(".part")
    try:
        torch.save(state, part)
    except (OSError, RuntimeError) as e:
        part.unlink(missing_ok=True)
        raise BadInput(f"{path} cannot be written (full disk?): {e}") from None
    os.replace(part, path)

def load_checkpoint(path, flags):
    """A checkpoint of this script and these flags; code in the file is not run."""
    try:
        assert not zipfile.ZipFile(path).testzip()
        state = torch.load(path, map_location="cpu", weights_only=True)
        script, was, _ = state["script"], state["flags"], dict(state["model"])
    except Exception:  # many kinds
        raise BadInput(f"{path} is missing, damaged, or no checkpoint") from None
    other = [f"{k} is {v}, was {was.get(k)}" for k, v in flags.items()
             if v != was.get(k) and k not in HOW]
    check(script == NAME, f"{path} was written by {script}.py")
    check(not other, f"--resume with other flags: {'; '.join(other)}")
    return state
# --- end ---

def losses(a, z, labels):
    """{"loss"} of the head's output for the whole batch; of two views also its parts as Figure 3
    (left) follows them, loss = invariance + regularisation, and embedding_std, 0 where all is one
    point: of VICReg's embeddings as they are, of SimCLR's normalised ones times sqrt(d)."""
    if a.objective == "supervised":
        return {"loss": F.cross_entropy(gather(z), gather(labels))}
    z1, z2 = map(gather, z.chunk(2))
    if a.objective == "vicreg":
        s, v, c = vicreg(z1, z2)
        first, second = a.invariance * s, a.variance * v + a.covariance * c
        loss = first + second
    else:  # Section 2.1: minus the pairs' similarity over T = .5, log of sum
        loss = nt_xent(z1, z2, 0.5)
        first = -F.cosine_similarity(z1, z2).mean() / 0.5
        second = loss - first
        z1 = F.normalize(z1) * z.shape[1] ** 0.5
    std = z1.detach().std(0).mean()
    return {"loss": loss, "invariance": first, "regularisation": second, "embedding_std": std}

def train(a, net, split, out, measure, state):
    """Train from the start, or on from a checkpoint's `state`; returns the last one. Every step
    reseeds: no random state is saved, and measure(epoch), which probes, changes nothing."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    steps = len(split) // a.batch_size
    total, weights = a.epochs * steps, list(net.parameters())
    if a.compile is None:
        a.compile = a.device == "cuda" and total >= 2000 and bool(find_spec("triton"))
    optimizer = torch.optim.SGD(weights, a.lr, 0.9, weight_decay=a.weight_decay, fused=True)

    def keep(step):
        state.update(step=step, model=net.state_dict(), optimizer=optimizer.state_dict())
        if rank == 0:
            save_checkpoint(out / "checkpoint.pt", state)
    if "model" in state:
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    else:
        if rank == 0:
            measure(0)
        keep(0)
    model = net
    if world > 1:
        if a.device == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model = nn.parallel.DistributedDataParallel(model)
    def forward(views, rows, labels):
        with torch.autocast(a.device, torch.bfloat16, enabled=a.device == "cuda"):
            z = model(views, rows)  # [V * B, d]
        return losses(a, z.float(), labels)
    if a.compile and world == 1:  # CUDA graphs: launches cost more than work
        torch.compiler.reset()
        forward = torch.compile(forward, mode="reduce-overhead")
    bar = {} if sys.stderr.isatty() else {"mininterval": 10, "bar_format": "{l_bar}{r_bar}\n"}
    bar = tqdm(total=total * a.batch_size, initial=state["step"] * a.batch_size, unit="images",
               unit_scale=True, disable=rank > 0, **bar)
    batches = train_batches(split, a, state["step"], steps, rank, world)
    terms, saved, begun = [], time.time(), time.time()
    net.train()
    for step in range(state["step"] + 1, total + 1):
        images, labels = next(batches)
        torch.manual_seed(hash((a.seed, step, rank)))  # this step's views, rows, dropout
        views = views_of(images, split.size, a, a.views, net.views)  # [V * B, 3, S, S]
        rows = torch.rand(len(views), device=a.device) < a.sample
        # the whole batch's loss, with the gradient for these rows; `world`: DDP takes the mean
        loss = forward(views, rows, labels)
        optimizer.zero_grad()
        (world * loss["loss"]).backward()
        nn.utils.clip_grad_norm_(weights, a.clip)  # else lr .1 diverges
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step - 1, a, steps)
        optimizer.step()
        terms.append(torch.stack([v.detach() for v in loss.values()]))
        bar.update(a.batch_size)
        probing = step == total or step % steps == 0 and step // steps in a.probe_epochs
        saving = probing or time.time() - saved > 60
        if not saving and step % max(1, min(50, total // 100)):
            continue
        values = torch.stack(terms).mean(0).tolist()
        weight = sum(w.sum() for w in weights).item()
        check(math.isfinite(sum(values) + weight), f"the loss is not finite at about step {step}; "
              f"{out} keeps its checkpoint; try a smaller --lr in a new --out")
        seconds = time.time() - begun
        state["seconds"] += seconds
        row = {"step": step, "epoch": step / steps, **dict(zip(loss, values)), "lr": lr,
               "images_per_second": a.batch_size * len(terms) / seconds}
        state["log"].append(row)
        bar.set_postfix(loss=row["loss"], refresh=False)
        if probing and rank == 0:
            measure(step // steps)
            net.train()
        if saving:
            keep(step)
            saved = time.time()
        terms, begun = [], time.time()
    bar.close()
    return state

# ==== 7 Evaluation: what has every layer learned? ====

# --- the same in simclr, vicreg, topk ---
def linear_probe(x, y, x_test, y_test, classes):
    """Test accuracy in % of a logistic regression on features [n, D], labels [n]; its weight decay
    is chosen on a tenth of at most 10,000 of them."""
    centre, std = x.mean(0), x.std(0).clamp(min=1e-6)
    x, x_test = (F.pad((x - centre) / std, (0, 1), value=1) for x in (x, x_test))  # 1: for the bias

    def fit(x, y, decay, iterations):  # full-batch L-BFGS
        w = torch.zeros(x.shape[1], classes, device=x.device, requires_grad=True)
        solver = torch.optim.LBFGS([w], max_iter=iterations, history_size=10,
                                   line_search_fn="strong_wolfe")

        def objective():
            solver.zero_grad()
            loss = F.cross_entropy(x @ w, y) + decay / 2 * w[:-1].square().sum()
            loss.backward()
            return loss
        solver.step(objective)
        return w.detach()

    def accuracy(w, x, y):
        return 100 * ((x @ w).argmax(1) == y).float().mean().item()

    some = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:10_000]
    held, rest = some.to(x.device).tensor_split([len(some) // 10 + 1])
    _, decay = max((accuracy(fit(x[rest], y[rest], decay, 60), x[held], y[held]), decay)
                   for decay in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5))
    return accuracy(fit(x, y, decay, 200), x_test, y_test)

def weighted_knn(x, y, x_test, y_test, classes, k=200, t=0.1):
    """Test accuracy in %: the k nearest vote with weight exp(cosine / t) (Wu et al. 2018)."""
    x, x_test = F.normalize(x, dim=1), F.normalize(x_test, dim=1)
    winners = []
    for q in x_test.split(1024):
        cosine, i = (q @ x.T).topk(min(k, len(x)), dim=1)
        votes = torch.zeros(len(q), classes, device=x.device)
        winners.append(votes.scatter_add_(1, y[i], (cosine / t).exp()).argmax(1))
    return 100 * (torch.cat(winners) == y_test).float().mean().item()

@torch.no_grad()
def outputs(f, split, limit=None):
    """f(uint8 [B, 3, side, side]) of the first `limit` pictures, and their labels."""
    batches = split.batches(torch.arange(len(split))[:limit], 512)
    x, y = zip(*((f(x), y) for x, y in batches))
    return torch.cat(x), torch.cat(y)
# --- end ---

def random_targets(a, data):
    """Targets from random to semantic (Section 5, A.3): a network's class predictions at stages of
    its training on the labels, on unaugmented pictures: [(randomness 1 untrained to 0 trained,
    int64 [N] of training pictures, of test pictures)]."""
    train_split, test_split, classes = data
    size, count, vit = train_split.size, len(classes), a.target_net == "vit"
    if not classes or a.target_net == "none":
        return []
    torch.manual_seed(a.seed)
    if vit:
        patch = 4 if size < 64 else 16
        check(size % patch == 0, f"--target-net vit: its patches of {patch} pixels do not divide "
              f"{size}: another --image-size")
        net = torchvision.models.VisionTransformer(size, patch, 10, 8, 384, 1536, num_classes=count)
        nn.init.normal_(net.heads.head.weight, std=0.02)  # torchvision has zeros: no argmax
    else:
        stem, blocks, dim = backbone(a.target_net, size)
        pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        net = nn.Sequential(stem, *blocks, *pool, nn.Linear(dim, count))
    net = nn.Sequential(Normalize(*IMAGENET), net).to(a.device, memory_format=torch.channels_last)
    lr, decay = (0.001, 5e-5) if vit else (0.05, 0)
    solver = torch.optim.Adam(net.parameters(), lr, weight_decay=decay, fused=True)
    b = argparse.Namespace(seed=a.seed, batch_size=min(256, len(train_split)))
    steps = len(train_split) // b.batch_size
    total, stages, targets = a.target_epochs * steps, a.target_stages - 1, []
    marks = {round(total * i / stages) for i in range(stages + 1)}
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(solver, total)
    batches = train_batches(train_split, b, 0, steps, 0, 1)
    def logits(images):
        with torch.autocast(a.device, torch.bfloat16, enabled=a.device == "cuda"):
            return net(to_unit(images, size)).float()
    for step in tqdm(range(total + 1), "random targets", leave=False, disable=None):
        if step in marks:
            net.eval()
            scores = [outputs(logits, train_split, a.probe_images)[0],
                      outputs(logits, test_split)[0]]
            if a.balance_targets:  # an untrained network gives most pictures to one class
                centre, std = scores[0].mean(0), scores[0].std(0).clamp(min=1e-12)
                scores = [(s - centre) / std for s in scores]
            targets.append((1 - step / total, *(s.argmax(1) for s in scores)))
            net.train()
        if step < total:
            images, labels = next(batches)
            solver.zero_grad()
            F.cross_entropy(logits(images), labels).backward()
            solver.step()
            schedule.step()
    return targets

def load_encoder(path, device):
    """encoder.pt of any script -> (f: images -> {layer: output}, its config.json)."""
    extra = {"config.json": ""}
    try:
        assert not zipfile.ZipFile(path).testzip()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.jit.load")
            layers = torch.jit.load(path, device, extra).eval().activations
        config = json.loads(extra["config.json"])
        names, *_ = (config[k] for k in ("layers", "layer_numbers", "image_size", "dataset",
                                         "flags", "measurements"))
    except Exception:  # of many kinds
        raise BadInput(f"{path} is missing, or no run's encoder.pt of pictures") from None
    def activations(images):
        with torch.jit.optimized_execution(False):  # no recompiling for a few batches
            return dict(zip(names, layers(images)))
    return activations, config

@torch.no_grad()
def layer_features(activations, names, batches):
    """({layer: features float32 [N, D]}, labels [N]) in one pass over batches (images, labels).
    Features: maps [B, C, H, W] averaged over places, tokens [B, T, C] over tokens."""
    found, labels = {name: [] for name in names}, []
    for images, y in batches:
        layers = activations(images)
        for name in names:
            h = layers[name].float()
            found[name].append(h.mean((2, 3)) if h.ndim == 4 else h.mean(1) if h.ndim == 3 else h)
        labels.append(y)
    return {name: torch.cat(parts) for name, parts in found.items()}, torch.cat(labels)

def measures(x, x_test, tasks, a, kept):
    """A row for each task ({"target", "classes", ...}, labels [N], test labels) from one layer's
    features x [N, D] and those of test pictures. kept: it is the representation."""
    sizes = [row["classes"] for row, *_ in tasks]
    if "svm" in a.probes:  # one fit for all tasks, their classes side by side
        starts = itertools.accumulate([0, *sizes])
        y = torch.stack([y + start for (_, y, _), start in zip(tasks, starts)], 1)
        scores = (F.pad(x_test, (0, 1), value=1) @ fit_svm(x, y, sum(sizes))).split(sizes, 1)
    for i, (row, y, y_test) in enumerate(tasks):
        row, data = {**row, "majority": percent(y_test == y_test.mode()[0])}, (x, y, x_test, y_test)
        wanted = a.probes + (["logistic", "knn"] if kept and row["target"] == "class" else [])
        if "svm" in wanted:
            row["svm"] = percent(scores[i].argmax(1) == y_test)
        if "logistic" in wanted:
            row["logistic"] = linear_probe(*data, row["classes"])
        if "knn" in wanted:
            row["knn"] = weighted_knn(*data, row["classes"])
        if "ncc" in wanted:
            row.update(clustering(*data, row["classes"]))
        if kept and row["target"] in LEVELS:
            row["map"] = plane(x, y)
        yield row

def plane(x, y):
    """Figure 1: five classes' features [n, D] on their two principal axes."""
    five = torch.randperm(len(y.unique()), generator=torch.Generator().manual_seed(0))[:5]
    chosen = torch.isin(y, y.unique()[five.to(y.device)]).nonzero()[:500, 0]
    x, y = x[chosen].double(), y[chosen]
    x = (x - x.mean(0)) @ torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:2].T
    return {"x": x[:, 0].tolist(), "y": x[:, -1].tolist(), "label": y.tolist()}

def probe(file, data, targets, a):
    """What every layer of an encoder.pt knows: rows of probes.csv."""
    train_split, test_split, classes = data
    activations, config = load_encoder(file, a.device)
    number, size = config["layer_numbers"], train_split.size
    end = number.get("avgpool", number.get("cls", max(number.values())))  # cls: a ViT's
    names = [n for n in config["layers"] if a.all_layers or number.get(n, end) < end]
    kept, epoch = names[-1], config["measurements"].get("epoch", 0)  # the representation
    groups, rows = [], []  # groups: features {layer: [N, D]} of training, of test pictures; tasks
    def pictures(split, limit):
        batches = split.batches(torch.arange(len(split))[:limit], 512)
        return layer_features(activations, names, ((to_unit(x, size), y) for x, y in batches))
    def sample_views(seed, times):  # of every sample; SimCLR's, whatever --views
        torch.manual_seed(seed)
        for part in torch.arange(len(samples), device=a.device).repeat(times).split(512):
            yield views_of(samples[part], size, a, "simclr"), part
    if a.sample_level[0]:  # Section 3: each picture is a class of its views
        g = torch.Generator().manual_seed(0)
        chosen = torch.randperm(len(train_split), generator=g)[:a.sample_level[0]]
        samples = torch.cat([x for x, _ in train_split.batches(chosen, 512)])
        (x, y), (x_test, y_test) = (layer_features(activations, names, sample_views(*part))
                                    for part in enumerate(a.sample_level[1:]))
        groups.append((x, x_test, [({"target": "sample", "classes": len(samples)}, y, y_test)]))
    if classes or a.mine_steps:
        x, y = pictures(train_split, a.probe_images)
        x_test, y_test = pictures(test_split, None)
    if classes:
        tasks = [({"target": "class", "classes": len(classes)}, y, y_test)]
        if a.dataset in SUPERCLASSES:
            coarse = torch.tensor([ord(c) - ord("a") for c in SUPERCLASSES[a.dataset]]).to(a.device)
            row = {"target": "superclass", "classes": len(coarse.unique())}
            tasks.append((row, coarse[y], coarse[y_test]))
        for randomness, *labels in targets:
            given, given_test = (t.to(a.device) for t in labels)
            row = {"target": f"random {randomness:.2f}", "classes": len(classes),
                   "randomness": randomness, "agreement": percent(given_test == y_test)}
            tasks.append((row, given, given_test))
        groups.append((x, x_test, tasks))
    for tables, tables_test, tasks in groups:
        for name in tqdm(names, f"probing epoch {epoch}", leave=False, disable=None):
            found = measures(tables[name], tables_test[name], tasks, a, name == kept)
            rows += [{"epoch": epoch, "layer": name, **row} for row in found]
    if a.mine_steps:
        images, _ = outputs(lambda x: F.adaptive_avg_pool2d(to_unit(x, size), a.mine_side),
                            train_split, min(10_000, len(x[kept])))
        bits = mutual_information(images.flatten(1), x[kept][:10_000], a.mine_steps)
        rows.append({"epoch": epoch, "layer": kept, "target": "information",
                     "bits": mean(bits), "bits_std": stdev(bits)})
    return rows

# ==== 8 Export ====

def export(a, net, split, classes, file, measurements):
    """Writes `file` (TorchScript), beside it weights.safetensors (torchvision's keys) and
    samples.npz (for cka.py). Returns the file's largest relative difference from `net`."""
    live, size = copy.deepcopy(net).cpu().eval(), split.size
    example, activations, worst = torch.rand(2, 3, size, size), live.activations, 0.0
    live.forward = lambda x: live.layers[:-1](x)  # average pool, [B, dim]: what is kept
    live.activations = lambda x: [*activations(x).values()]
    names = list(activations(example))
    config = {"script": NAME, "layers": names, "layer_numbers": {n: l for l, n in enumerate(names)},
              "image_size": size, "dim": net.dim, "dataset": a.dataset, "classes": classes,
              "flags": {**vars(a), "jitter": JITTER}, "measurements": measurements}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit")
        methods = {"forward": example, "activations": example}
        traced = torch.jit.trace_module(live, methods, check_trace=False, strict=False)
        saved = traced.save_to_buffer({"config.json": json.dumps(config)})
        file.write_bytes(saved)
        loaded = torch.jit.load(file)
        for x in (torch.rand(1, 3, size, size), torch.rand(7, 3, size, size)):
            for ours, theirs in zip([live(x), *live.activations(x)],
                                    [loaded(x), *loaded.activations(x)]):
                worst = max(worst, ((ours - theirs).norm() / ours.norm().clamp(min=1e-6)).item())
    assert worst <= 1e-4, f"the exported encoder differs from the live one by {worst:.2g}"

    def library_key(block):  # layers.block3 -> layer2.0 of ResNet-18, layer1.2 of RES-L-H
        stage, place = divmod(int(block[1]) - 1, 2 if a.arch == "resnet18" else 1000)
        return f"layer{stage + 1}.{place}"
    save_file({re.sub(r"layers\.stem\.", "", re.sub(r"layers\.block(\d+)", library_key, k)):
               v.contiguous() for k, v in live.state_dict().items()
               if not re.match("layers.(head|input)", k)}, file.with_name("weights.safetensors"))
    limit = min(2048, (64 << 20) // (3 * size ** 2))  # 64 MiB
    images, labels = outputs(lambda x: (to_unit(x, size) * 255).round().byte(), split, limit)
    np.savez(file.with_name("samples"), images=images.cpu().numpy(), labels=labels.cpu().numpy())
    return worst

# ==== 9 Figures and tables, from recorded numbers ====

# --- the same in simclr, simcse, vicreg, topk ---
def draw(path, panels):
    """PNG of panels {title: {label of a line: [(x, y, std of y)]}}."""
    columns, rows = min(3, len(panels) or 1), math.ceil(len(panels) / 3) or 1
    figure = Figure((4.5 * columns, 3.5 * rows), layout="constrained")
    for i, (title, lines) in enumerate(panels.items()):
        axis = figure.add_subplot(rows, columns, i + 1, title=title)
        for label, points in lines.items():
            axis.errorbar(*zip(*points), fmt=".-", capsize=3, label=label)
        if 1 < len(lines) < 9:
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
# --- end ---

def derived(report):
    """The rows of one run with what figures draw: SVM, ratios, growth (over the first epoch's
    value), last and kept: of the last epoch, of the representation."""
    rows, flags = report["probes"], report["flags"]
    at = {(r["epoch"], r["layer"], r["target"]): r for r in rows}
    probed = [r for r in rows if r["target"] in LEVELS]
    first, last, kept = probed[0]["epoch"], probed[-1]["epoch"], probed[-1]["layer"]
    def ratio(name, row, k, over, l):
        if row.get(k) is not None and over.get(l):
            row[name] = row[k] / over[l]
    for (epoch, layer, target), r in at.items():  # SVM: without one the logistic
        r.update(SVM=r.get("svm", r.get("logistic")), last=epoch == last, kept=layer == kept)
        ratio("NCC / SVM", r, "ncc_test", r, "SVM")
        if target == "superclass":
            ratio("super / class", r, "SVM", at[epoch, layer, "class"], "SVM")
        for k in MEASURES if target == "random 0.00" else ():
            ratio(f"{k} ratio", r, k, at[epoch, layer, "random 1.00"], k)
        for k in [k for k, v in r.items() if type(v) is float]:
            ratio(f"{k} growth", r, k, at.get((first, layer, target), {}), k)
    mu = flags["objective"] == "vicreg" and flags["variance"] or 1
    return rows + [{**r, "kept": True, "target": "loss", **{
        f"{k} / mu": r[k] / mu for k in ("invariance", "regularisation") if k in r}}
        for r in report["log"]]

def panel(rows, x, ys, lines, where):
    """{label of a line: [(x, mean over seeds, std)]} of the rows that have all values `where` (a
    list: one of them); a line for each of the columns ys and each value of the columns `lines`."""
    points, found = defaultdict(list), defaultdict(list)
    for r in rows:
        if all(r.get(k) in (v if isinstance(v, list) else [v]) for k, v in where.items()):
            for y in ys:
                if r.get(y) is not None and x in r:
                    label = [y] * (len(ys) > 1) + [f"epoch {r[k]}" if k == "epoch" else r[k]
                                                   for k in lines]
                    points[" ".join(label), r[x]].append(r[y])
    for (label, place), values in points.items():
        found[label].append((place, mean(values), stdev(values) if values[1:] else 0.0))
    return dict(sorted(found.items(), key=lambda line: -len(line[1])))

RATIOS = [f"{k} ratio growth" for k in MEASURES[3:8]]  # from NCC on
FIGURES = [  # title, x, ys, what lines are, which target
    *((f"Fig. {i}: {y}{end}", "epoch", [f"{y}{end}"], ["target"], "") for i, end in
      ((6, ""), (2, " growth")) for y in ("ncc_train", "NCC / SVM", "SVM")),
    ("Fig. 3, left: the loss", "epoch", ["invariance", "regularisation"], [], "loss"),
    ("Fig. 10: over mu", "epoch", ["invariance / mu", "regularisation / mu"], [], "loss"),
    ("Fig. 3, middle: bits", "epoch", ["bits"], [], "information"),
    ("Fig. 3, right: NCC %, classes", "epoch", ["ncc_train", "ncc_test"], [], "class"),
    ("Fig. 4, left, 11, 12: SVM %", "randomness", ["SVM"], ["epoch"], ""),
    ("Fig. 4, middle, 11, 12: SVM %", "randomness", ["SVM"], ["layer"], ""),
    ("Fig. 4, right: trained / random", "epoch", RATIOS, [], "random 0.00"),
    ("targets: true %, commonest %", "randomness", ["agreement", "majority"], [], ""),
    ("Fig. 5, 7, 11: SVM %, classes", "layer", ["SVM"], ["epoch"], "class"),
    ("Fig. 5, 7, 11: SVM %, superclasses", "layer", ["SVM"], ["epoch"], "superclass"),
    ("Fig. 5: super / class, grown", "layer", ["super / class growth"], ["epoch"], "superclass"),
    ("Fig. 8: NCC, test %, classes", "layer", ["ncc_test"], ["epoch"], "class"),
    ("Fig. 9: NCC, test %, samples", "layer", ["ncc_test"], ["epoch"], "sample")]

def figures(path, rows, runs):
    """Figures 2 to 12 as one PNG. Of one run, lines are levels, epochs or layers; of
    several, runs: classes, last epoch, the representation."""
    panels, one = {}, len(runs) == 1
    for title, x, ys, lines, target in FIGURES:
        free = [x, *lines] if one else [x]
        where = {k: True for k, of in (("last", "epoch"), ("kept", "layer")) if of not in free}
        if x != "randomness":
            where["target"] = target or (LEVELS if "target" in free else "class")
        panels[f"{title} by {x}"] = panel(rows, x, ys, lines if one else ["run"], where)
    draw(path, {title: lines for title, lines in panels.items() if lines})

def draw_maps(path, rows):
    """Figure 1: five samples' views, classes, superclasses in two dimensions, before and after."""
    rows = [r for r in rows if "map" in r]
    epochs = len({r["epoch"] for r in rows})
    figure = Figure((4 * len(rows) // epochs, 4 * epochs), layout="constrained")
    for i, r in enumerate(rows, 1):
        axis = figure.add_subplot(epochs, len(rows) // epochs, i, xticks=[], yticks=[],
                                  title=f"{r['target']}, epoch {r['epoch']}")
        colours = np.unique(r["map"]["label"], return_inverse=True)[1]
        axis.scatter(r["map"]["x"], r["map"]["y"], 8, colours, cmap="tab10", vmax=9)
    figure.savefig(path, dpi=110)

def compare(folders):
    """Tables and figures.png of the finished runs in these folders, seeds pooled: {what tells runs
    apart: {measurement: (mean, std; 0 of one seed)}}."""
    runs, groups, rows = {}, {}, []
    for file in (f for folder in folders for f in sorted(folder.glob("**/report.json"))):
        try:
            r = json.loads(file.read_text())
            flags = {k: v for k, v in r["flags"].items() if k not in HOW - {"data_dir"}}
            check(r["script"] == NAME and r["probes"], "")
            runs[str(flags)] = flags, r, derived(r)
        except Exception:
            print(f"{file}: left out, no finished run of this script")
    check(runs, "no finished run there")
    for flags, r, found in runs.values():
        name = ", ".join(f"{k} {v}" for k, v in flags.items() if k != "seed" and
                         any(other.get(k) != v for other, *_ in runs.values()))
        groups.setdefault(name, []).append(r)
        rows += [{**row, "run": name} for row in found]
    table = {}
    for name, reports in groups.items():
        values = {k: [r.get(k) for r in reports] for k in reports[0]}
        table[name] = {k: (mean(v), stdev(v) if v[1:] else 0.0) for k, v in values.items()
                       if {*map(type, v)} == {float}}
    for target, measure in itertools.product(LEVELS, ("SVM", "ncc_test")):
        lines = panel(rows, "layer", [measure], ["run", "epoch"], {"target": target})
        layers = [x for x, *_ in next(iter(lines.values()), [])]
        title, width = f"{target}: {measure}, test %", max(map(len, lines), default=0)
        if lines:
            print(f"\n{title:{width}}", *(f"{x:>12}" for x in layers))
        for label, points in lines.items():
            cells = {x: "%.1f ± %.1f" % (m, s) for x, m, s in points}
            print(f"{label:{width}}", *(f"{cells.get(x, '').removesuffix(' ± 0.0'):>12}"
                                        for x in layers))
    target = (folders[0] if len(folders) == 1 else folders[0].parent) / "figures.png"
    figures(target, rows, groups)
    print(f"\n{target}")
    return table

# ==== 10 Runs ====

def run(a, out, data, made):
    """One run, from data to report. made: {seed: random targets} so far."""
    train_split, test_split, classes = data
    report_file, file = out / "report.json", out / "checkpoint.pt"
    chief = not dist.is_initialized() or dist.get_rank() == 0
    state = {"script": NAME, "flags": {**vars(a), "images": len(train_split)}, "step": 0,
             "seconds": 0.0, "export_difference": 0.0, "log": [], "probes": []}
    if report_file.exists() or file.exists():
        state = load_checkpoint(file, state["flags"])
        with suppress(OSError, ValueError):
            return json.loads(report_file.read_text())
    if chief:
        if "targets" not in state:
            state["targets"] = made[a.seed] = made.get(a.seed) or random_targets(a, data)
        out.mkdir(parents=True, exist_ok=bool(a.out))
        versions = {m.__name__: m.__version__ for m in (torch, torchvision, np)}
        (out / "config.json").write_text(json.dumps({"script": NAME, **vars(a), **versions}))
        print(f"{out}: {len(train_split)} pictures of {a.dataset}")
    def measure(epoch):
        encoder = out / f"encoder-{epoch}.pt"
        state["export_difference"] = export(a, net, test_split, classes, encoder, {"epoch": epoch})
        state["probes"] += probe(encoder, data, state["targets"], a)
    for encoder in a.encoder:
        state["probes"] += probe(encoder, data, state["targets"], a)
    state["probes"].sort(key=lambda row: row["epoch"])  # a shell sorts 20 before 6
    if not a.encoder:
        torch.manual_seed(a.seed)
        net = Net(a, train_split.size, len(classes)).to(a.device, memory_format=torch.channels_last)
        state = train(a, net, train_split, out, measure, state)
    if not chief:
        return {}
    log, probes = state["log"], state["probes"]
    levels = [r for r in probes if r["target"] in LEVELS]
    first, last, kept = levels[0]["epoch"], levels[-1]["epoch"], levels[-1]["layer"]
    report = {**{k: state[k] for k in ("script", "step", "seconds", "export_difference")},
              "flags": vars(a), "broken": len(train_split.broken) + len(test_split.broken),
              "images_per_second": median([r["images_per_second"] for r in log] or [0])}
    for row in probes:  # the representation, before and after
        if row["layer"] == kept and row["epoch"] in (first, last) and "randomness" not in row:
            end = "" if row["epoch"] == last else "_untrained"
            report.update({f"{k}_{row['target']}{end}": row[k] for k in MEASURES if k in row})
            if row["target"] == "class":
                report.update({f"linear{end}": row["logistic"], f"knn{end}": row["knn"]})
    if not a.encoder:
        export(a, net, test_split, classes, out / "encoder.pt", {"epoch": last, **report})
    for name, rows in (("metrics", log), ("probes", probes)):
        with open(out / f"{name}.csv", "w", newline="") as f:
            columns = dict.fromkeys(k for row in rows for k in row if k != "map")
            writer = csv.DictWriter(f, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    draw_maps(out / "clusters.png", [r for r in levels if r["epoch"] in (first, last)])
    report_file.write_text(json.dumps({**report, "probes": probes, "log": log}))
    return json.loads(report_file.read_text())

def main(argv=None):
    """Run a command line: one run's report, or several's table."""
    words, out = list(sys.argv[1:] if argv is None else argv), None
    try:
        a = settings(words)
        if a.compare:
            return compare([Path(f) for f in a.compare])
        if "RANK" in os.environ:
            if a.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group(timeout=timedelta(hours=12))
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(a.deterministic)
        torch.backends.cudnn.benchmark = not a.deterministic
        torch.backends.cudnn.allow_tf32 = False
        if a.encoder:
            configs = [load_encoder(file, "cpu")[1] for file in a.encoder]
            kinds = {str([c[k] for k in ("layers", "image_size", "dataset")]) for c in configs}
            epochs = {c["measurements"].get("epoch", 0) for c in configs}
            check(len(kinds) == 1 and len(epochs) == len(configs), "--encoder: one run's epochs")
            if not a.dataset:
                a.dataset, a.data_dir = configs[0]["dataset"], configs[0]["flags"].get("data_dir")
            a.image_size = configs[0]["image_size"]
        several = [name for name in RUNS if len(getattr(a, name)) > 1]
        runs = [argparse.Namespace(**{**vars(a), **dict(zip(RUNS, values))})
                for values in itertools.product(*(getattr(a, name) for name in RUNS))]
        out = Path(a.out or f"runs/{NAME}-{time.strftime('%Y%m%d-%H%M%S')}")
        places = [out / "-".join(f"{n}-{getattr(r, n)}" for n in several) for r in runs]
        for r in runs:
            r.views = r.views or ("none" if r.objective == "supervised" else "simclr")
            r.lr = r.lr or (0.5 if r.objective == "simclr" else 0.1)
        own = a.resume and any(NAME in str(f.read_bytes()) for f in out.rglob("config.json"))
        chief = os.environ.get("RANK", "0") == "0"
        check(own or not (chief and out.exists() and any(out.iterdir())),
              f"--out {out} is not empty; --resume goes on with its own run")
        ours = a.dataset in ("shapes", "cifar10", "cifar100", "folder")
        data = (load_data if ours else load_torchvision)(a.dataset, a)
        count, classes = len(data[0]), data[2]
        check(count >= max(a.sample_level[0], 10, 0 if a.encoder else a.batch_size),
              f"{count} pictures are too few: see --batch-size, --sample-level")
        check(data[0].size > 3, "--image-size: 4 at least")
        check(classes or a.sample_level[0], "no labels, no --sample-level: nothing to probe")
        check(classes or "supervised" not in a.objective, "--objective supervised needs labels")
        made = {}
        reports = [run(r, place, data, made) for r, place in zip(runs, places)]
        table = compare([out]) if chief else {}
        return table if runs[1:] else reports[0]
    except (BadInput, OSError, SafetensorError) as e:
        print(f"{NAME}.py: error: {str(e).splitlines()[-1]}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        more = ["--out", str(out), "--resume"] if out and "--encoder" not in words else []
        again = shlex.join([sys.argv[0], *words, *more])
        print(f"\nstopped; to go on:\npython {again}")
        raise SystemExit(130) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

if __name__ == "__main__":
    main()
