# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "transformers>=5.0", "numpy", "matplotlib",
#                 "tqdm", "safetensors"]
# ///
"""Rescuing easy pairs (Wang, Krajsek, Scharr: Rescuing Easy Samples in Self-Supervised
Pretraining, VISAPP 2025) on SimCLR, MoCo v3 and DINOv2.

All three make two views y_a, y_b of every picture and learn from their embeddings z_a, z_b. Where
these are alike already, little is left to learn. So of the N pairs of a batch take the k most
similar, make one *strong* view of each of these pictures (RandAugment and a cutout), and pull its
embedding z_s and the first view's together:

    L = L_SSL(z_a, z_b) + s L_topk,    L_topk = -mean over the k of cos(z_a, z_s)    (Eq. 1, 2)

That is Algorithm 1, `Rescue` below; it costs k/N of one more view. Whose z's:

    method   z_a                                       z_b, z_s
    simclr   projector                                 the same
    mocov3   target network's projector                projector and predictor
    dinov2   teacher's head before the prototypes      student's head before the prototypes
    Both with --anchor online: the trained network's, as Algorithm 1 stands

    python topk_rescue.py                                  SimCLR: without, and with
    python topk_rescue.py --method mocov3                  or dinov2
    python topk_rescue.py --rescue none topk random hardest all
    python topk_rescue.py --s 0.1 1 10 --seed 0 1 2        Figure 5; --k 1 4 16 64: Figure 6
    python topk_rescue.py --strong deepaug --layer 4       strong views by Deep Augmentation
    python topk_rescue.py --preset paper --data-dir imagenet --method dinov2
    python topk_rescue.py --compare runs/*                 table and figure

Linear probe of 20 drawn classes, three seeds: untrained 19.4 %, SimCLR 84.8 ± 1.9, with rescue
81.2 ± 4.5: no gain at this size.
"""
import argparse
import copy
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
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median, median_low, stdev

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import transformers
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.models.resnet import BasicBlock
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import rgb_to_grayscale
from tqdm import tqdm

NAME = "topk_rescue"
IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])  # mean, std

# ==== 1 Settings ====

VITS = {"vit-tiny": (64, 4, 2), "vit-s": (384, 12, 6), "vit-b": (768, 12, 12),
        "vit-l": (1024, 24, 16)}  # width, blocks, heads
RUNS = ["strong", "anchor", "rescue", "k", "s", "seed"]  # each value makes a run
RESCUE_FLAGS = "rescue k s anchor strong layer rate stop_grad sample".split()  # nothing to none
# where and how a run computes, not what: --resume may change them
HOW = set("out resume device data_dir workers compile probe_every transfer compare preset".split())

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
    """The layers that --layer names: "none", "4" or "3+4", from -1, the input. A ResNet: 0 stem,
    1-4 stages, 5 average pool, 6 head; a ViT of B blocks: 0 embeddings, 1-B, B+1 LayerNorm, B+2
    class token, B+3 head."""
    names = [] if layer == "none" else layer.split("+")
    head = VITS[arch][1] + 3 if arch in VITS else 6
    check(set(names) <= set(map(str, range(-1, head + 1))),
          f"--layer {layer}: -1 to {head} of {arch}, several as 3+4, or none")
    return sorted(set(map(int, names)))

def settings(argv=None):
    """The flags, checked; each value of those in RUNS with each other's is a run."""
    positive, count = within(1e-9, 1e9), within(0, 10 ** 9, int)
    share, yes_no, cuda = within(0, 1), argparse.BooleanOptionalAction, torch.cuda.is_available()
    p = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Defaults depend on --method, --arch and --preset: these are this command's.")
    p.error = lambda message: check(False, f"{message} (see --help)")
    add = p.add_argument_group("rescue").add_argument
    add("--rescue", nargs="+", choices=["none", "topk", "random", "hardest", "all"],
        default=["none", "topk"], help="which pairs get a strong view")
    add("--k", nargs="+", type=count, help="how many; default: N / 64 (paper: Section 4)")
    add("--s", nargs="+", type=within(0, 1e9), help="weight of the rescue term")
    add("--anchor", nargs="+", choices=["target", "online"], default=["target"],
        help="mocov3, dinov2: z_a of the target network, or of the trained one")
    add("--strong", nargs="+", choices=["randaugment", "deepaug"], default=["randaugment"],
        help="deepaug: y_b with Deep Augmentation")
    add("--layer", default="4", metavar="L", help="deepaug: 0 stem, 1-4 stages; ViT: blocks; 3+4")
    add("--rate", type=within(0, 0.999), default=0.5, help="deepaug: dropout rate")
    add("--stop-grad", action=yes_no, default=True, help="deepaug: no gradient to below")
    add("--sample", type=within(1e-9, 1), default=1.0, help="deepaug: share of rows to augment")
    add = p.add_argument_group("data and views").add_argument
    add("--dataset", choices=["shapes", "cifar10", "cifar100", "folder"], help="shapes: drawn")
    add("--data-dir", help="your pictures; or where CIFAR and --transfer's sets lie or go (data)")
    add("--image-size", type=count, default=0, help="of a view; 0: as they are")
    add("--crop-min", type=within(0.01, 1), default=0.2, help="smallest crop")
    for name in ("--blur", "--solarize"):
        add(name, type=share, nargs=3, default=[0, 0, 0], metavar="P",
            help="its probability: first view, second, small crops")
    add = p.add_argument_group("base method and network").add_argument
    add("--method", choices=list(METHODS), default="simclr", help="the base")
    add("--arch", choices=["small", "resnet18", "resnet34", "resnet50", *VITS], help="network")
    add("--projector", type=within(2, 10 ** 6, int), nargs=2, metavar="D", help="hidden, output")
    add("--temperature", type=positive, help="of the contrastive loss, or DINOv2's student")
    add("--momentum", type=share, default=0.99, help="of the target network; it ends at 1")
    add("--patch", type=count, default=0, help="side; 0: 16; up to 64 pixels 4, vit-tiny 8")
    add("--local-crops", type=count, default=4, help="dinov2: small crops")
    add("--prototypes", type=within(2, 10 ** 7, int), default=1024, help="dinov2")
    add("--centering", choices=["sinkhorn", "centering"], default="sinkhorn", help="dinov2")
    add = p.add_argument_group("training").add_argument
    add("--preset", choices=list(PRESETS), default="small", help="other defaults")
    add("--epochs", type=count, default=12, help="0: untrained")
    add("--iterations", type=count, default=0, help="of an epoch; 0: once over the pictures")
    add("--batch-size", type=within(2, 10 ** 6, int), default=256, help="of all processes")
    add("--lr", type=positive, help="peak")
    add("--optimizer", choices=["sgd", "lars", "adamw"], default="sgd", help="momentum 0.9")
    add("--weight-decay", type=within(0, 1e9), default=1e-4, help="dinov2: ends at ten times it")
    add("--warmup-epochs", type=count, default=1, help="at most a tenth of the run")
    add("--seed", nargs="+", type=count, default=[0], help="several: a run each")
    add("--deterministic", action="store_true", help="the same bits on CUDA, too")
    add = p.add_argument_group("run").add_argument
    add("--out", help=f"folder; default: runs/{NAME}-DATE-TIME")
    add("--resume", action="store_true", help="go on from --out's checkpoint")
    add("--probe-every", type=count, default=0, help="in epochs; 0: first and last only")
    add("--transfer", choices=list(TRANSFER), nargs="+", default=[], metavar="SET",
        help=f"probes on other sets (Table 1): {', '.join(TRANSFER)}")
    add("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    add("--compile", action=yes_no, help="default: on CUDA with Triton, from 2,000 steps")
    add("--workers", type=count, default=min(8, os.cpu_count() or 1), help="to read pictures")
    add("--compare", nargs="+", metavar="RUN", help="only compare")

    argv = sys.argv[1:] if argv is None else argv
    a = p.parse_args([word for word in argv if word not in ("-h", "--help")])
    for preset in ("small", a.preset):
        p.set_defaults(**{**PRESETS[preset], **RECIPES[preset][a.method]})
        if a.arch in VITS and a.method != "dinov2":
            p.set_defaults(**RECIPES[preset]["vit"])
        if a.arch == "vit-s" and a.method == "mocov3":
            p.set_defaults(s=[0.025])  # Section 5
    a = p.parse_args(argv)  # again: a flag beside the preset wins
    if a.preset == "paper" and len(a.s) > 1:
        a.share = 1 / 64  # Figure 5's k
    a.k = a.k or [max(1, round(a.batch_size * a.share))]
    for name in RUNS:
        setattr(a, name, list(dict.fromkeys(getattr(a, name))))
    a.dataset = a.dataset or ("shapes" if a.data_dir is None else "folder")
    world, targets = int(os.environ.get("WORLD_SIZE", "1")), targets_of(a.layer, a.arch)
    check(cuda or a.device == "cpu", "--device cuda: there is none here")
    check(a.dataset != "folder" or a.data_dir, "--dataset folder needs --data-dir")
    check(a.out or not a.resume, "--resume needs --out")
    check(a.method != "dinov2" or a.arch in VITS, "--method dinov2 masks patches: --arch vit-tiny")
    check(a.batch_size in range(2 * world, 10 ** 7, world) and not any(k % world for k in a.k),
          f"--batch-size, --k: multiples of {world} processes, two pictures each")
    check(max(a.k) <= a.batch_size, f"--k: at most --batch-size, {a.batch_size}")
    check("deepaug" not in a.strong or targets and (a.method != "dinov2" or
          targets[-1] < VITS[a.arch][1] + 3), "--strong deepaug: --layer, DINOv2: below the head")
    check(not (a.deterministic and a.device == "cuda" and a.method == "dinov2" and a.local_crops),
          "--deterministic: not on CUDA with small crops; add --local-crops 0")
    return a

# ==== 2 Method ====

class Rescue(nn.Module):
    """Algorithm 1, around a base method (below). forward(images uint8 [B, 3, H, W], progress: share
    of the training done, control: measure same_view?) -> (loss, {metric: value}, z_b [B, D],
    chosen [k]: row numbers in all processes' batch, or None); only loss carries a gradient."""
    def __init__(self, a, method):
        super().__init__()
        self.a, self.method, self.student = a, method, method.student  # train() compiles it

    def forward(self, images, progress, control=False):
        a, method, chosen = self.a, self.method, None
        y_a, y_b = two_views(images, a)
        more = method.draw(images, progress) if a.method == "dinov2" else ()  # crops, masks
        BatchNorm.again, BatchNorm.remembers = False, a.k > 0
        base, z_a, z_b = method(y_a, y_b, *more)
        cosines = F.cosine_similarity(z_a, z_b).detach()
        loss, metrics = base, {"base_loss": base, "similarity": gather(cosines).mean()}
        if a.k:
            chosen, rows = choose(cosines, a.rescue, a.k), None
            if a.strong == "deepaug":
                strong = own_share(y_b, chosen)
                rows = torch.rand(len(strong), device=strong.device) < a.sample
            else:
                strong = strong_views(own_share(images, chosen), a.image_size)
            BatchNorm.again = True
            cosine = F.cosine_similarity(gather(z_a)[chosen], gather(self.student(strong, rows)))
            if control:  # the same view again must give the same z, else L_topk pays for it
                mask = more[1][len(y_b):][:8] if more else None  # DINOv2's
                with torch.no_grad():
                    same = method.student(y_b[:8], mask=mask)
                metrics["same_view"] = F.cosine_similarity(same, z_b[:8]).mean()
            BatchNorm.again, loss = False, base - a.s * cosine.mean()
            metrics.update(similarity_chosen=gather(cosines)[chosen].mean(),
                           similarity_strong=cosine.mean())
        metrics = {k: v.detach() for k, v in [("loss", loss), *metrics.items()]}
        return loss, metrics, z_b.detach(), chosen

def choose(similarity, rescue, k):
    """Numbers [k], ascending, of the pairs to rescue in all processes' batch; similarity: [B]."""
    score = {"topk": similarity, "all": similarity, "hardest": -similarity,
             "random": torch.rand_like(similarity)}[rescue]
    return gather(score).topk(k).indices.sort().values

def own_share(x, chosen):
    """Of the rows `chosen` of all processes' x [B, ...], the equal part that this one works on."""
    if not dist.is_initialized():
        return x[chosen]
    here = (chosen // len(x) == dist.get_rank()).view(-1, *[1] * (x.ndim - 1))
    dist.all_reduce(rows := x[chosen % len(x)] * here)  # 0 where others have it
    return rows.chunk(dist.get_world_size())[dist.get_rank()]

class Statistics(torch.autograd.Function):
    """Means [C] of x and of x ** 2 over a batch's n places, known already, with gradient to x."""
    @staticmethod
    def forward(ctx, x, centre, square, n):
        ctx.save_for_backward(x)
        ctx.n = n
        return centre.clone(), square.clone()

    @staticmethod
    def backward(ctx, *to):
        (x,), to = ctx.saved_tensors, torch.stack(to) / ctx.n
        if ctx.n > x.numel() // x.shape[1]:  # of all processes
            dist.all_reduce(to)
        to_centre, to_square = to.view(2, -1, *[1] * (x.ndim - 2))
        return torch.addcmul(to_centre, 2 * to_square, x).to(x.dtype), None, None, None

class BatchNorm(nn.BatchNorm2d):
    """torch's, on CUDA over all processes. While `again`, it normalises more rows as the last batch
    (by their own statistics the same view would give another z), with gradient through that
    batch's statistics, too: as constants they ruin the training."""
    again = remembers = False  # set by Rescue, of all layers
    process_group, _check_input_dim = None, lambda *_: None  # SyncBatchNorm's
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, x):
        if self.again and self.training:
            centre, square, var = self.last
            moved = square - centre ** 2  # for its gradient
            weight, bias = (1, 0) if self.weight is None else (self.weight, self.bias)
            scale = weight * (var + moved - moved.detach() + self.eps).rsqrt()
            one = -1, *[1] * (x.ndim - 2)
            return (x * scale.view(one) + (bias - centre * scale).view(one)).to(x.dtype)
        running = self.running_mean, self.running_var
        remembers = self.training and self.remembers and torch.is_grad_enabled()  # no target's
        old = [t.clone() for t in running if remembers]
        y = nn.SyncBatchNorm.forward(self, x) if x.is_cuda else super().forward(x)
        if remembers:  # they moved by momentum * (the batch's - old)
            world = dist.get_world_size() if x.is_cuda and dist.is_initialized() else 1
            n = world * x.numel() // x.shape[1]
            centre, var = (o + (new - o) / self.momentum for o, new in zip(old, running))
            var = var * (n - 1) / n
            self.last = *Statistics.apply(x, centre, var + centre ** 2, n), var
        return y

# --- the same in vicreg, topk ---
def deep_augment(h, rows, rate, stop_grad):
    """Dropout of the chosen rows, h on the others (Deep Augmentation, arXiv 2303.14537, Eq. 2). In
    training only. h: hidden states [B, ...]; rows: bool [B]; rate in [0, 1). stop_grad: the chosen
    rows are detached: no gradient from them to the layers below."""
    x = F.dropout(h.detach() if stop_grad else h, rate)
    return torch.where(rows.view(-1, *[1] * (h.ndim - 1)), x, h)
# --- end ---

# Each base method: forward(y_a, y_b, DINOv2: *draw()) -> (L_SSL of the whole batch, z_a, z_b);
# student(view) -> z_s; update_target(), before a step; kept: the network to probe and export.

def low_precision(x):  # on CUDA; losses are computed outside, in float32
    return torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda)

@torch.no_grad()
def move(target, trained, start, progress):
    """Moving average; its momentum goes on a cosine from `start` to 1 (main_moco.py)."""
    momentum = 1 - (1 - start) * (1 + math.cos(math.pi * progress)) / 2
    get_ema_multi_avg_fn(momentum)([*target.parameters()], [*trained.parameters()], None)

# ---- SimCLR: a picture's views attract each other and repel everybody else's

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

class SimCLR(nn.Module):
    def __init__(self, a, net):
        super().__init__()
        self.online = self.kept = net
        self.temperature = a.temperature

    def student(self, view, rows=None, mask=None):
        with low_precision(view):
            return self.online(view, rows)["head"].float()

    def forward(self, y_a, y_b):
        z_a, z_b = self.student(torch.cat([y_a, y_b])).chunk(2)
        return nt_xent(gather(z_a), gather(z_b), self.temperature), z_a, z_b

# ---- MoCo v3: predict what a slowly moving copy says of the other view

def moco_loss(q, k, temperature):
    """One direction of MoCo v3 (builder.py:73): query i must pick key i among all N keys, [N, d];
    times 2T, so that the gradient does not grow as T falls. Keys carry no gradient."""
    logits = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / temperature
    return F.cross_entropy(logits, torch.arange(len(q), device=q.device)) * 2 * temperature

class MoCoV3(nn.Module):
    def __init__(self, a, net):
        super().__init__()
        hidden, out = a.projector
        self.online = self.kept = net
        self.target = copy.deepcopy(net).requires_grad_(False)
        self.predictor = mlp([out, hidden, out], last_norm=a.arch in VITS)
        self.temperature, self.momentum, self.anchor = a.temperature, a.momentum, a.anchor

    def update_target(self, progress):
        move(self.target, self.online, self.momentum, progress)

    def student(self, view, rows=None, mask=None):
        with low_precision(view):
            return self.predictor(self.online(view, rows)["head"]).float()

    def forward(self, y_a, y_b):
        q_a, q_b = self.student(y_a), self.student(y_b)  # one by one: BatchNorm, as builder.py
        with torch.no_grad(), low_precision(y_a):
            k_a, k_b = (self.target(y)["head"].float() for y in (y_a, y_b))
        loss = sum(moco_loss(gather(q), gather(k), self.temperature)
                   for q, k in ((q_a, k_b), (q_b, k_a)))
        return loss, q_a if self.anchor == "online" else k_a, q_b

# ---- DINOv2: predict a teacher's distribution over prototypes, from other crops and patches

def block_masks(counts, side):
    """Masks of exactly counts[i] of the patches, bool [n, side * side]. dinov2 masking.py: blocks
    of 4 patches or more, aspect .3 to 3.3, while they fit (here ten tries); then single ones."""
    n, device = len(counts), counts.device
    mask = torch.zeros(n, side, side, dtype=torch.bool, device=device)
    axis = torch.arange(side, device=device)
    for _ in range(10):
        before = mask.sum((1, 2))
        left = (counts - before).float()
        area = left.clamp(max=4) + torch.rand(n, device=device) * (left - 4).clamp(min=0)
        aspect = torch.empty(n, device=device).uniform_(math.log(0.3), -math.log(0.3)).exp()
        lengths = torch.stack([area * aspect, area / aspect]).sqrt().round()  # [2, n]: down, across
        start = (torch.rand(2, n, device=device) * (side - lengths + 1)).floor().unsqueeze(2)
        down, across = (axis >= start) & (axis < start + lengths.unsqueeze(2))  # [n, side]
        tried = mask | (down.unsqueeze(2) & across.unsqueeze(1))
        fits = (lengths < side).all(0) & (tried.sum((1, 2)) - before <= left)
        mask = torch.where(fits.view(n, 1, 1), tried, mask)
    order = (mask.flatten(1) + torch.rand(n, side ** 2, device=device)).argsort(1, descending=True)
    return order.argsort(1) < counts.view(n, 1)  # masked ones first, then at random

def draw_masks(crops, side, device):
    """Half of the crops, drawn, are masked, by .1 to .5 of their patches in equal steps: shapes
    stay. -> (mask bool [crops, P], places in the flattened mask, weights 1 / crop's count)"""
    n = crops // 2
    ratio = 0.1 + 0.4 * (torch.arange(n) + 0.5) / n
    counts = F.pad((ratio * side ** 2).long().clamp(min=1), (0, crops - n))
    total, counts = int(counts.sum()), counts.to(device, non_blocking=True)
    counts = counts[torch.rand(crops, device=device).argsort()]
    mask = block_masks(counts, side)
    places = mask.flatten().int().argsort(descending=True, stable=True)[:total]  # nonzero, no wait
    return mask, places, 1 / counts[places // side ** 2]

def cross_entropy_to(targets, logits, temperature):  # [..., K] -> [...]
    return -(targets * F.log_softmax(logits.float() / temperature, dim=-1)).sum(-1)

@torch.no_grad()
def sinkhorn_knopp(logits, temperature, iterations=3):
    """The teacher's probabilities [n, K], such that all processes' batch uses every prototype about
    equally: exp(logits / T), normalised by prototypes, then rows (dino_clstoken_loss.py)."""
    q = logits.float() / temperature  # logarithms: nothing overflows or vanishes
    for _ in range(iterations):
        top = gather(q.amax(0, keepdim=True)).amax(0)
        q = q - top - gather((q - top).exp().sum(0, keepdim=True)).sum(0).log()
        q = q.log_softmax(1)
    return q.exp()

class TeacherTargets(nn.Module):
    """Teacher's logits [n, K] -> probabilities: Sinkhorn-Knopp, or softmax of the centred logits.
    The centre, the mean of earlier steps' logits (momentum .9), keeps one from winning always."""
    def __init__(self, a):
        super().__init__()
        self.how = a.centering
        self.register_buffer("centre", torch.zeros(1, a.prototypes))

    @torch.no_grad()
    def forward(self, logits, temperature):
        if self.how == "sinkhorn":
            return sinkhorn_knopp(logits, temperature)
        targets = F.softmax((logits.float() - self.centre) / temperature, dim=1)
        self.centre.lerp_(gather(logits.float().mean(0, keepdim=True)).mean(0, keepdim=True), 0.1)
        return targets

def koleo(x):
    """-mean log distance of x [N, D], normalised, to the nearest neighbours (koleo_loss.py)."""
    x = F.normalize(x.float(), dim=1, eps=1e-8)
    nearest = (x @ x.T).fill_diagonal_(-2).argmax(1)
    return -(F.pairwise_distance(x, x[nearest], eps=1e-8) + 1e-8).log().mean()

class DINOv2(nn.Module):
    def __init__(self, a, net):
        super().__init__()
        self.online, self.a = net, a
        self.target = self.kept = copy.deepcopy(net).requires_grad_(False)  # the teacher
        linear = nn.Linear(a.projector[1], a.prototypes, bias=False)
        self.prototypes = nn.utils.parametrizations.weight_norm(linear)
        self.prototypes.parametrizations.weight.original0.data.fill_(1)  # their lengths
        self.target_prototypes = copy.deepcopy(self.prototypes).requires_grad_(False)
        self.cls_targets, self.patch_targets = TeacherTargets(a), TeacherTargets(a)

    def train(self, mode=True):
        super().train(mode)
        self.target.eval()  # no stochastic depth in the teacher
        return self

    def draw(self, images, progress):
        """(small crops [L * B, 3, s, s], crop by crop; draw_masks' three; teacher's temperature)"""
        a, side = self.a, self.a.image_size // self.a.patch
        local = torch.zeros(0, device=images.device)
        if a.local_crops:  # .05 of the picture up to the views' smallest
            local = make_views(images.repeat(a.local_crops, 1, 1, 1), a.local_size,
                               (0.05, max(0.05, a.crop_min)), a.jitter)
            local = blur_and_solarize(local, a.blur[2], a.solarize[2])
        warm = min(1, progress / min(30 / max(a.epochs, 1), 0.3))  # 30 epochs, here at most .3
        temperature = torch.full((), 0.04 + 0.03 * warm, device=images.device)
        return local, *draw_masks(2 * len(images), side, images.device), temperature

    def update_target(self, progress):
        move(self.target, self.online, self.a.momentum, progress)
        move(self.target_prototypes, self.prototypes, self.a.momentum, progress)

    def student(self, view, rows=None, mask=None):
        with low_precision(view):
            return self.online(view, rows, mask)["head"].float()

    def forward(self, y_a, y_b, local, mask, places, weights, temperature):
        crops, b, t = torch.cat([y_a, y_b]), len(y_a), self.a.temperature

        def look(net, prototypes, mask):  # -> layers' outputs, logits of crops, of masked patches
            out = net(crops, mask=mask)
            patches = net.head(out["norm"][:, 1:].flatten(0, 1)[places])
            return out, *(prototypes(F.normalize(z, dim=1)) for z in (out["head"], patches))

        with low_precision(crops):
            with torch.no_grad():  # the teacher sees whole crops
                seen, cls, patches = look(self.target, self.target_prototypes, None)
            out, logits, masked = look(self.online, self.prototypes, mask)
            if len(local):
                z = F.normalize(self.online(local)["head"], dim=1)
                small = self.prototypes(z).view(-1, b, logits.shape[1])  # [L, B, K]
        # DINO: every pair of a teacher's crop and another crop of the student, 2 + 2 L pairs
        t_a, t_b = self.cls_targets(cls, temperature).chunk(2)
        l_a, l_b = logits.chunk(2)
        pairs = cross_entropy_to(t_a, l_b, t) + cross_entropy_to(t_b, l_a, t)
        if len(local):
            pairs = pairs + cross_entropy_to(t_a + t_b, small, t).sum(0)
        dino = pairs.mean() / (2 + 2 * self.a.local_crops)
        # iBOT: masked patches against what the teacher sees there; masked crops weigh the same
        targets = self.patch_targets(patches, temperature)
        ibot = (cross_entropy_to(targets, masked, t) * weights).sum() / (2 * b)
        spread = sum(koleo(gather(h)) for h in out["cls"].chunk(2))
        z_a = (out if self.a.anchor == "online" else seen)["head"][:b].float()
        loss = gather((dino + ibot).view(1)).mean() + 0.1 * spread
        return loss, z_a, out["head"][b:].float()

METHODS = {"simclr": SimCLR, "mocov3": MoCoV3, "dinov2": DINOv2}
# Defaults by preset and method; vit: on top, for SimCLR and MoCo v3 with a ViT. s: Section 4
ASYMMETRIC = dict(solarize=[0, 0.2, 0], jitter=[0.4, 0.4, 0.2, 0.1])  # moco-v3, dinov2
RECIPES = {
    "small": {
        "simclr": dict(s=[0.75], arch="small", projector=[128, 128], temperature=0.1, lr=0.5),
        "mocov3": dict(s=[0.05], arch="small", projector=[512, 128], temperature=0.2, lr=0.5),
        "vit": dict(optimizer="adamw", lr=1e-3, weight_decay=0.1),
        "dinov2": dict(s=[1.0], arch="vit-tiny", projector=[512, 128], temperature=0.1, lr=1e-3,
                       momentum=0.992, optimizer="adamw", weight_decay=0.04, crop_min=0.32,
                       batch_size=128, epochs=8)},
    "cifar": {  # ours; MoCo v3's projector and temperature as solo-learn's
        "simclr": dict(arch="resnet18", batch_size=1024, lr=1.0, projector=[512, 128]),
        "mocov3": dict(arch="resnet18", batch_size=512, lr=0.6, projector=[4096, 256],
                       **ASYMMETRIC),
        "vit": dict(batch_size=512, lr=6e-4),
        "dinov2": dict(arch="vit-s", batch_size=512, lr=1e-3, projector=[2048, 256],
                       prototypes=8192, local_crops=8, drop_path=0.1, **ASYMMETRIC)},
    "paper": {  # Section 4; what it does not say is from the base methods' own code
        "simclr": dict(share=1 / 32, arch="resnet50", batch_size=4096, epochs=1000,
                       lr=4.8, optimizer="lars", weight_decay=1e-6, projector=[2048, 128],
                       crop_min=0.08, blur=[0.5, 0.5, 0], jitter=[0.8, 0.8, 0.8, 0.2]),
        "mocov3": dict(arch="resnet50", batch_size=4096, epochs=800, lr=4.8, optimizer="lars",
                       weight_decay=1e-6, temperature=1.0, projector=[4096, 256],
                       blur=[1, 0.1, 0], **ASYMMETRIC),
        "vit": dict(epochs=300, warmup_epochs=40, optimizer="adamw", lr=0.0024, weight_decay=0.1,
                    temperature=0.2, crop_min=0.08),
        "dinov2": dict(arch="vit-l", share=1 / 128, batch_size=2048, epochs=100, iterations=125,
                       lr=0.004 * 2 ** 0.5, projector=[2048, 256], prototypes=65536,
                       centering="centering", local_crops=8, local_size=96, drop_path=0.3,
                       layer_scale=1e-5, blur=[1, 0.1, 0.5], **ASYMMETRIC)}}
PRESETS = {"small": dict(share=1 / 64, local_size=0, drop_path=0.0, layer_scale=1.0,  # no flags
                         jitter=[0.4, 0.4, 0.4, 0.1]),  # share: k / N; local_size 0: half a view
           "cifar": dict(dataset="cifar100", epochs=200, warmup_epochs=10),
           "paper": dict(dataset="folder", image_size=224, warmup_epochs=10)}

# ==== 3 Network: torchvision's ResNets and transformers' ViT, as numbered layers ====

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

def resnet(a, size):
    """(torchvision's ResNet up to the average pool, its width)."""
    if a.arch == "small":  # for laptops
        conv1, bn1 = nn.Conv2d(3, 16, 3, 2, 1, bias=False), BatchNorm(16)
        block, pool, dim = partial(BasicBlock, norm_layer=BatchNorm), nn.Identity(), 128
        stages = [nn.Sequential(block(16, 16))]
        for c in (16, 32, 64):
            shortcut = nn.Conv2d(c, 2 * c, 1, 2, bias=False), BatchNorm(2 * c)
            stages += [nn.Sequential(block(c, 2 * c, 2, nn.Sequential(*shortcut)))]
    else:
        r = getattr(torchvision.models, a.arch)(norm_layer=BatchNorm)
        conv1, bn1, pool, dim = r.conv1, r.bn1, r.maxpool, r.fc.in_features
        stages = [r.layer1, r.layer2, r.layer3, r.layer4]
        if size < 64:  # SupContrast resnet_big.py: 3x3 stem, no maxpool
            conv1, pool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    net = nn.Sequential(OrderedDict(
        stem=nn.Sequential(OrderedDict(conv1=conv1, bn1=bn1, relu=nn.ReLU(), pool=pool)),
        **{f"layer{i}": stage for i, stage in enumerate(stages, 1)},
        avgpool=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())))
    for conv in (m for m in net.modules() if isinstance(m, nn.Conv2d)):  # as torchvision
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return net, dim

def vit(a, size):
    """(transformers' ViT with mask token, LayerScale and stochastic depth, its width)."""
    dim, blocks, heads = VITS[a.arch]
    dinov2 = a.method == "dinov2"
    net = transformers.Dinov2Model(transformers.Dinov2Config(
        hidden_size=dim, num_hidden_layers=blocks, num_attention_heads=heads, image_size=size,
        patch_size=a.patch, layerscale_value=a.layer_scale, use_mask_token=dinov2,
        drop_path_rate=a.drop_path * dinov2))
    if a.method == "mocov3":  # vits.py:50
        e = net.embeddings
        e.position_embeddings.data.copy_(sine_positions(size // a.patch, dim))
        e.position_embeddings.requires_grad_(False)
        e.patch_embeddings.projection.requires_grad_(False)
    return net, dim

def sine_positions(side, dim):
    """[1, 1 + side ** 2, dim]: sin and cos of column and of row (moco-v3 vits.py:53)."""
    omega = 10_000 ** -(torch.arange(dim // 4) / (dim // 4))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [place.reshape(-1, 1) * omega for place in (columns, rows)]
    patches = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
    return torch.cat([torch.zeros(1, dim), patches]).unsqueeze(0)

def mlp(sizes, last_norm):
    """MoCo v3's heads (builder.py:35); a last BatchNorm is without weights."""
    layers = []
    for i, o in itertools.pairwise(sizes):
        layers += [nn.Linear(i, o, bias=False), BatchNorm(o), nn.ReLU()]
    return nn.Sequential(*layers[:-2], *[BatchNorm(sizes[-1], affine=False)] * last_norm)

def projector(a, dim):
    """The head of each base method: [B, dim] -> [B, OUT]."""
    hidden, out = a.projector
    if a.method == "simclr":  # SupContrast resnet_big.py:174: no BatchNorm
        return nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, out))
    if a.method == "mocov3":  # one layer more on a ViT
        return mlp([dim, hidden, *[hidden] * (a.arch in VITS), out], last_norm=True)
    head = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
                         nn.Linear(hidden, out))
    for linear in head[::2]:  # dinov2 dino_head.py: up to the prototypes
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
    return head

class Net(nn.Module):
    """The layers of targets_of. forward(images [B, 3, S, S] in 0..1; rows bool [B]: which get Deep
    Augmentation; mask bool [B, P]: patches that a mask token replaces) -> {layer: output}."""
    def __init__(self, a, size):
        super().__init__()
        self.vit, self.normalize = a.arch in VITS, Normalize(*IMAGENET)
        self.backbone, self.dim = (vit if self.vit else resnet)(a, size)
        self.head = projector(a, self.dim)
        self.targets, self.augment = targets_of(a.layer, a.arch), (a.rate, a.stop_grad)

    def layers(self, images, rows=None, mask=None):
        b, h, out = self.backbone, images, {}
        inner = b.named_children() if not self.vit else [
            ("embed", lambda x: b.embeddings(x, mask)),
            *((f"block{i}", block) for i, block in enumerate(b.encoder.layer, 1)),
            ("norm", b.layernorm), ("cls", lambda tokens: tokens[:, 0])]
        for l, (name, layer) in enumerate([("input", self.normalize), *inner,
                                           ("head", self.head)], start=-1):
            h = layer(h)
            if rows is not None and l in self.targets:
                h = deep_augment(h, rows, *self.augment)
            out[name] = h
        return out

    forward = layers

    def features(self, images):
        return self.layers(images)["cls" if self.vit else "avgpool"]  # [B, dim]: what is kept

    def activations(self, images):
        """{name: output} of every layer from 0 on."""
        return {k: v for k, v in self.layers(images).items() if k != "input"}

def build(a, split):
    """The method with the weights of this seed; fills in the sizes of views and patches."""
    a.image_size = split.size
    if a.arch in VITS:
        a.patch = a.patch or (16 if split.size > 64 else 8 if a.arch == "vit-tiny" else 4)
        a.local_size = a.local_size or max(1, round(split.size / 2 / a.patch)) * a.patch
        sides = split.size, a.local_size
        check(sides[1] <= sides[0] and not any(side % a.patch for side in sides),
              f"--patch {a.patch}: views and small crops have {sides} pixels")
    torch.manual_seed(a.seed)
    method = METHODS[a.method](a, Net(a, split.size))
    method.to(a.device, memory_format=torch.channels_last)
    return Rescue(a, method)

# ==== 4 Views: a batch at once, each picture with its own parameters ====

def two_views(images, a):
    """uint8 [B, 3, H, H] -> y_a, y_b, float32 [B, 3, S, S] in 0..1."""
    x = make_views(images.repeat(2, 1, 1, 1), a.image_size, (a.crop_min, 1), a.jitter)
    return [blur_and_solarize(half, *p) for half, *p in zip(x.chunk(2), a.blur, a.solarize)]

def strong_views(images, size):
    """uint8 [k, 3, H, H] -> float32 [k, 3, size, size] in 0..1: of every whole picture RandAugment
    (two of torchvision's 14 operations, strength 0 to 30), then a grey square half as wide."""
    images = (to_unit(images, size) * 255).round().byte()
    cutout = v2.RandomErasing(1, scale=(0.25, 0.25), ratio=(1, 1), value=0.5)
    strengths = torch.randint(31, (len(images),)).tolist()  # on the host
    return torch.stack([cutout(v2.RandAugment(2, strength)(x) / 255)
                        for x, strength in zip(images, strengths)])

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
# --- the same in simclr, topk ---
@torch.no_grad()
def lars(weights, decay, eta=0.001):
    """Makes SGD's step that of LARS (vicreg's main_vicreg.py): scales a matrix's g + decay * w by
    eta * |w| / |g + decay * w|; vectors keep their gradient g."""
    for w in (w for w in weights if w.ndim > 1):
        g = w.grad + decay * w
        trust = eta * w.norm() / g.norm()  # no host sync
        w.grad = g * torch.where((trust > 0) & trust.isfinite(), trust, 1.0)
# --- end ---

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

def parameter_groups(a, method):
    """One group; dinov2 (param_groups.py): learning rates fall by .9 a block from the head down,
    the patch projection's by .2; no decay of vectors; `last`, the prototypes."""
    trained = [(n, w) for n, w in method.named_parameters() if w.requires_grad]
    if a.method != "dinov2":
        return [{"params": [w for _, w in trained]}]
    blocks, groups = VITS[a.arch][1], {}
    for name, w in trained:
        block = re.search(r"encoder\.layer\.(\d+)\.", name)
        depth = int(block[1]) + 1 if block else 0 if "embeddings" in name else blocks + 1
        scale = 0.9 ** (blocks + 1 - depth) * (0.2 if "patch_embeddings" in name else 1)
        key = {"scale": scale, "decay": w.ndim > 1, "last": name.startswith("prototypes")}
        groups.setdefault(str(key), {**key, "params": []})["params"].append(w)
    return list(groups.values())

def train(a, rescue, split, out, measure, state):
    """Train from the start, or on from a checkpoint's `state`; returns the last one. Every step
    reseeds, so no random state is saved, and measure(), which probes, changes nothing."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    steps, method = a.iterations or len(split) // a.batch_size, rescue.method
    total, groups = a.epochs * steps, parameter_groups(a, method)
    weights = [w for group in groups for w in group["params"]]
    if a.compile is None:
        a.compile = a.device == "cuda" and total >= 2000 and bool(find_spec("triton"))
    sgd, decay = partial(torch.optim.SGD, momentum=0.9), a.weight_decay * (a.optimizer != "lars")
    optimizer = (torch.optim.AdamW if a.optimizer == "adamw" else sgd)(
        groups, a.lr, weight_decay=decay, fused=True)  # lars() adds its own
    rescued = torch.zeros(len(split), dtype=torch.long, device=a.device)

    def keep(step):
        state.update(step=step, model=method.state_dict(), optimizer=optimizer.state_dict(),
                     rescued=rescued)
        if rank == 0:
            save_checkpoint(out / "checkpoint.pt", state)

    if state:
        method.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        rescued.copy_(state["rescued"])
    else:
        state = {"script": NAME, "flags": {**vars(a), "images": len(split)}, "seconds": 0.0,
                 "log": [], "probes": [{"epoch": 0, **measure()}] if rank == 0 else []}
        keep(0)
    model = rescue
    if world > 1:
        model = nn.parallel.DistributedDataParallel(model)
    elif a.compile:  # CUDA graphs: launches cost more than work
        torch.compiler.reset()
        method.compile(mode="reduce-overhead")
        rescue.student = torch.compile(rescue.student, mode="reduce-overhead")
    bar = {} if sys.stderr.isatty() else {"mininterval": 10, "bar_format": "{l_bar}{r_bar}\n"}
    bar = tqdm(total=total * a.batch_size, initial=state["step"] * a.batch_size, unit="images",
               unit_scale=True, disable=rank > 0, **bar)
    numbered = copy.copy(split)
    numbered.labels = torch.arange(len(split), device=split.labels.device)  # which picture is it?
    batches = train_batches(numbered, a, state["step"], steps, rank, world)
    terms, saved, begun = [], time.time(), time.time()
    rescue.train()
    for step in range(state["step"] + 1, total + 1):
        images, index = next(batches)
        torch.manual_seed(hash((a.seed, step, rank)))  # this step's views, masks, dropout
        progress, lr = (step - 1) / total, learning_rate(step - 1, a, steps)
        probing = step == total or (a.probe_every and step % (steps * a.probe_every) == 0)
        saving = probing or time.time() - saved > 60
        logging = saving or step % max(1, min(50, total // 100)) == 0
        if a.method != "simclr":  # MoCo v3: before the keys; DINOv2: after the last step
            method.update_target(progress)
        loss, metrics, z_b, chosen = model(images, progress, logging)
        optimizer.zero_grad()
        # the whole batch's loss, with the gradient for these rows; `world`: DDP takes the mean
        (world * loss).backward()
        if a.optimizer == "lars":
            lars(weights, a.weight_decay)
        if a.method == "dinov2":
            nn.utils.clip_grad_norm_(weights, 3.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("scale", 1)
            if a.method == "dinov2":  # decay rises tenfold; prototypes rest in the first epoch
                rise = 1 + 9 * (1 - math.cos(math.pi * progress)) / 2
                group["weight_decay"] = a.weight_decay * rise * group["decay"]
                group["lr"] *= not (group["last"] and step <= min(steps, total // 10))
        optimizer.step()
        if a.k:
            rescued[gather(index)[chosen]] += 1
        same_view = metrics.pop("same_view", None)
        terms.append(torch.stack([*metrics.values()]))
        bar.update(a.batch_size)
        if not logging:
            continue
        values = torch.stack(terms).mean(0).tolist()  # the one wait
        weight = sum(w.sum() for w in weights).item()
        check(math.isfinite(sum(values) + weight), f"the loss is not finite at about step {step}; "
              f"{out} keeps its checkpoint; try a smaller --lr or --s in a new --out")
        seconds = time.time() - begun
        state["seconds"] += seconds
        row = {"step": step, "epoch": step / steps, "lr": lr, **dict(zip(metrics, values)),
               "ever_rescued": 100 * (rescued > 0).float().mean().item(),
               "images_per_second": a.batch_size * len(terms) / seconds,
               # 1 if spread evenly, 0 if collapsed
               "embedding_std": F.normalize(z_b).std(0).mean().item() * z_b.shape[1] ** 0.5,
               **({"same_view": same_view.item()} if a.k else {})}
        state["log"].append(row)
        bar.set_postfix(loss=row["loss"], refresh=False)
        if probing and rank == 0:
            state["probes"].append({"epoch": step // steps, **measure()})
            rescue.train()
        if saving:
            keep(step)
            saved = time.time()
        terms, begun = [], time.time()
    bar.close()
    return state

# ==== 7 Evaluation ====

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

def probe(rescue, data, a):
    """Linear probe and kNN on frozen representations, test accuracy in %; needs labels."""
    *splits, classes = data
    net = rescue.method.kept.eval()
    if not classes:
        return {}
    tables = [t for s in splits for t in
              outputs(lambda x: net.features(to_unit(x, a.image_size)).float(), s)]
    return {"linear": linear_probe(*tables, len(classes)),
            "knn": weighted_knn(*tables, len(classes))}

# Table 1's sets with one label and a split: training parts and, last, the test part
TRANSFER = {"CIFAR10": (True, False), "CIFAR100": (True, False), "Food101": ("train", "test"),
            "DTD": ("train", "val", "test"), "OxfordIIITPet": ("trainval", "test"),
            "FGVCAircraft": ("trainval", "test"), "Flowers102": ("train", "val", "test")}

@torch.no_grad()
def transfer(net, a):
    """{"transfer_NAME": linear probe, test accuracy in %}; what cannot be had is skipped."""
    square = v2.Compose([v2.RGB(), v2.PILToTensor(), v2.Resize(a.image_size, antialias=True),
                         v2.CenterCrop(a.image_size)])
    results, root = {}, a.data_dir if a.data_dir and a.dataset != "folder" else "data"

    def encode(pictures):
        loader = torch.utils.data.DataLoader(pictures, 256, num_workers=a.workers)
        x, y = zip(*((net.features(x.to(a.device) / 255).float(), y) for x, y in loader))
        return torch.cat(x), torch.cat(y).to(a.device)

    for name in a.transfer:
        try:
            *train, test = [getattr(torchvision.datasets, name)(
                root, part, transform=square, download=True) for part in TRANSFER[name]]
            tables = *encode(torch.utils.data.ConcatDataset(train)), *encode(test)
        except Exception as e:  # not there, damaged, no network, no scipy
            print(f"--transfer {name}: skipped, {str(e).splitlines()[0]}")
        else:
            results[f"transfer_{name}"] = linear_probe(*tables, int(tables[1].max()) + 1)
    return results

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

@torch.no_grad()
def draw_easy(path, rescue, split, a):
    """PNG: the easiest and hardest of 1,024 pairs, in columns; cosines are those in eval mode."""
    rescue.eval()
    torch.manual_seed(0)
    parts, method = [], rescue.method
    for images, _ in split.batches(torch.arange(len(split))[:1024], 256):
        y_a, y_b = two_views(images, a)
        own = a.method == "simclr" or a.anchor == "online"
        z_a = method.student(y_a) if own else method.target(y_a)["head"]
        parts.append((images, y_a, y_b, z_a, F.cosine_similarity(z_a, method.student(y_b))))
    images, y_a, y_b, z_a, similarity = map(torch.cat, zip(*parts))
    n, order = min(10, len(images) // 2), similarity.argsort(descending=True)
    figure = Figure((1.1 * n, 9.6), layout="constrained")
    for axis, i, title in zip(figure.subplots(2, 1), (order[:n], order[-n:].flip(0)),
                              ("easiest pairs", "hardest pairs")):
        strong, rows = strong_views(images[i], a.image_size), None
        if a.strong == "deepaug":  # made inside the network, not to be seen
            strong, rows = y_b[i], torch.ones_like(similarity[i], dtype=torch.bool)
        shown = torch.cat([to_unit(images[i], a.image_size), y_a[i], y_b[i], strong]).cpu()
        grid = torchvision.utils.make_grid(shown, nrow=n)
        axis.imshow(grid.permute(1, 2, 0).clamp(0, 1).numpy())
        cosine = F.cosine_similarity(z_a[i], method.student(strong, rows))
        axis.set_xticks([grid.shape[2] / n * (column + 0.5) for column in range(n)],
                        ["%.2f\n%.2f" % pair for pair in zip(similarity[i], cosine)])
        axis.set(title=f"{title}: picture, two views, strong view; their cosines", yticks=[])
    figure.savefig(path, dpi=110)

# ==== 8 Export ====

def export(a, net, split, classes, out, report):
    """Writes encoder.pt (TorchScript), weights.safetensors (torchvision's keys), of a ViT
    model/, and samples.npz (for cka.py). Returns the file's largest relative difference."""
    for m in net.modules():
        m.last = None  # cannot be copied
    live, size = copy.deepcopy(net).cpu().eval().requires_grad_(), split.size  # to fine-tune
    example, activations, worst = torch.rand(2, 3, size, size), live.activations, 0.0
    live.forward, live.activations = live.features, lambda x: [*activations(x).values()]
    names = list(activations(example))
    config = {"script": NAME, "layers": names, "layer_numbers": {n: l for l, n in enumerate(names)},
              "image_size": size, "dim": net.dim, "dataset": a.dataset, "classes": classes,
              "flags": vars(a), "measurements": report}
    transformers.logging.set_verbosity_error()  # tracing reads every attribute
    transformers.logging.disable_progress_bar()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        methods = {"forward": example, "activations": example}
        traced = torch.jit.trace_module(live, methods, check_trace=False, strict=False)
        saved = traced.save_to_buffer({"config.json": json.dumps(config)})
        (out / "encoder.pt").write_bytes(saved)
        loaded = torch.jit.load(out / "encoder.pt")
        for x in (torch.rand(1, 3, size, size), torch.rand(7, 3, size, size)):
            for ours, theirs in zip([live(x), *live.activations(x)],
                                    [loaded(x), *loaded.activations(x)]):
                worst = max(worst, ((ours - theirs).norm() / ours.norm().clamp(min=1e-6)).item())
    assert worst <= 1e-4, f"the exported encoder differs from the live one by {worst:.2g}"
    weights = {k.removeprefix("stem."): v.contiguous()
               for k, v in live.backbone.state_dict().items()}
    save_file(weights, out / "weights.safetensors")
    if net.vit:
        live.backbone.save_pretrained(out / "model")
    limit = min(2048, (64 << 20) // (3 * size ** 2))  # 64 MiB
    images, labels = outputs(lambda x: (to_unit(x, size) * 255).round().byte(), split, limit)
    np.savez(out / "samples.npz", images=images.cpu().numpy(), labels=labels.cpu().numpy())
    return worst

# ==== 9 Runs ====

def compare(folders):
    """Table and picture (Fig. 5, 6) of the finished runs in these folders, seeds pooled: {what
    tells runs apart: {measurement: (mean, std; 0 of one seed)}}; gain: over `none`, by seed."""
    runs, groups = {}, {}
    for file in (f for folder in folders for f in sorted(folder.glob("**/report.json"))):
        try:
            r = json.loads(file.read_text())
            flags = {k: v for k, v in r["flags"].items() if k not in HOW - {"data_dir"}}
            check(r["script"] == NAME and r["probes"] and flags["rescue"], "another's")
            runs[str(flags)] = flags, r  # each run once
        except Exception:
            print(f"{file}: left out, no finished run of this script")
    check(runs, "no finished run there")

    def named(flags, without=("seed",)):
        return ", ".join(f"{k} {v}" for k, v in flags.items() if k not in without and (
            k == "rescue" or any(other.get(k) != v for other, _ in runs.values())))

    base = {named(f, RESCUE_FLAGS): r for f, r in runs.values() if f["rescue"] == "none"}
    for flags, r in runs.values():
        bare = base.get(named(flags, RESCUE_FLAGS), {})
        if "linear" in bare and flags["rescue"] != "none":
            r.update({f"gain_{k}": r[k] - bare[k] for k in ("linear", "knn")})
        groups.setdefault(named(flags), []).append((flags, r))

    def pooled(rows):  # over seeds
        values = {k: [r[k] for r in rows if k in r] for k in rows[0]}
        return {k: (mean(v), stdev(v) if v[1:] else 0.0) for k, v in values.items()
                if {*map(type, v)} == {float}}

    starts = {named(f, RESCUE_FLAGS): r for f, r in runs.values()}  # each network once
    table = {"untrained": pooled([{k.removesuffix("_untrained"): v for k, v in r.items()
                                   if k.endswith("_untrained")} for r in starts.values()])}
    table.update({name: pooled([r for _, r in seeds]) for name, seeds in groups.items()})
    panels = defaultdict(lambda: defaultdict(list))
    axes = [x for x in ("k", "s") if len({f[x] for f, _ in runs.values() if f["rescue"] not in
                                          ("none", "all")}) > 1]
    for x, measure in itertools.product(axes or ["rescue"], ("linear", "knn")):
        panel = panels[f"{measure} by {x}, test %"]  # without rescue k and s are 0
        for name, ((flags, _), *_) in sorted(groups.items(), key=lambda g: g[1][0][0][x]):
            if measure in table[name]:
                line = named(flags, ("seed", x) if axes else ("seed", "rescue", "k", "s"))
                panel[line].append((str(flags[x]), *table[name][measure]))
    shown = [k for k in ("linear", "gain_linear", "knn", "gain_knn", "similarity", "ever_rescued",
                         "embedding_std") if any(k in row for row in table.values())]
    width = max(map(len, table))
    print(" " * width + "".join(f"{k:>16}" for k in shown))
    for name, row in table.items():
        cells = ["%.2f ± %.2f" % row[k] if k in row else "" for k in shown]
        print(f"{name:{width}}" + "".join(f"{c.removesuffix(' ± 0.00'):>16}" for c in cells))
    target = (folders[0] if len(folders) == 1 else folders[0].parent) / "compare.png"
    draw(target, panels)
    print(target)
    return table

def run(a, out, data):
    """One run, from data to report."""
    train_split, test_split, classes = data
    rescue = build(a, train_split)
    state, report_file = None, out / "report.json"
    if report_file.exists() or (out / "checkpoint.pt").exists():  # with --resume only
        state = load_checkpoint(out / "checkpoint.pt", {**vars(a), "images": len(train_split)})
        with suppress(OSError, ValueError):
            return json.loads(report_file.read_text())
    chief = not dist.is_initialized() or dist.get_rank() == 0
    if chief:
        out.mkdir(parents=True, exist_ok=bool(a.out))
        versions = {m.__name__: m.__version__ for m in (torch, torchvision, transformers, np)}
        (out / "config.json").write_text(json.dumps({"script": NAME, **vars(a), **versions}))
        print(f"{out}: {len(train_split)} pictures, {a.method}, {a.rescue}, k {a.k}, s {a.s}")
    state = train(a, rescue, train_split, out, lambda: probe(rescue, data, a), state)
    if not chief:
        return {}
    log, probes, net = state["log"], state["probes"], rescue.method.kept.eval()
    report = {"script": NAME, "flags": vars(a), "broken": len(train_split.broken), **probes[-1],
              **{f"{k}_untrained": v for k, v in probes[0].items()}, "probes": probes,
              "steps": state["step"], "seconds": state["seconds"], **(log or [{}])[-1],
              **({"same_view": min(r["same_view"] for r in log)} if a.k and log else {}),
              "images_per_second": median([r["images_per_second"] for r in log] or [0])}
    report.update(transfer(net, a))
    report["export_difference"] = export(a, net, test_split, classes, out, report)
    rows = [*log[:1], *(row.values() for row in log)]
    (out / "metrics.csv").write_text("\n".join(",".join(map(str, row)) for row in rows))
    np.save(out / "rescued.npy", state["rescued"].cpu().numpy())
    panels = {"loss": ["loss", "base_loss"], "rescued so far, %": ["ever_rescued"],
              "cosine of pairs": ["similarity", "similarity_chosen", "similarity_strong",
                                  "same_view"],
              "spread of embeddings": ["embedding_std"], "probes, test %": ["linear", "knn"]}
    draw(out / "curves.png", {
        f"{title} by epoch": {k: points for k in keys if (points := [
            (r["epoch"], r[k], 0) for r in [*log, *probes] if k in r])}
        for title, keys in panels.items()})
    draw_easy(out / "easy.png", rescue, train_split, a)
    report_file.write_text(json.dumps(report, indent=1))
    return report

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
            dist.init_process_group(timeout=timedelta(hours=2))
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(a.deterministic)
        torch.backends.cudnn.benchmark = not a.deterministic
        torch.backends.cudnn.allow_tf32 = False  # what is not under autocast is float32
        several, runs = [name for name in RUNS if len(getattr(a, name)) > 1], {}
        for values in itertools.product(*(getattr(a, name) for name in RUNS)):
            r = argparse.Namespace(**{**vars(a), **dict(zip(RUNS, values))})
            if r.rescue == "all":
                r.k = r.batch_size
            if r.rescue == "none" or r.k == 0:  # once for all k, s ...
                r.rescue, r.k, r.s, r.strong, r.anchor = "none", 0, 0.0, a.strong[0], a.anchor[0]
            runs["-".join(f"{n}-{getattr(r, n)}" for n in several)] = r
        out = Path(a.out or f"runs/{NAME}-{time.strftime('%Y%m%d-%H%M%S')}")
        own = a.resume and any(NAME in str(f.read_bytes()) for f in out.rglob("config.json"))
        chief = os.environ.get("RANK", "0") == "0"
        check(own or not (chief and out.exists() and any(out.iterdir())),
              f"--out {out} is not empty; --resume goes on with its own run")
        data = load_data(a.dataset, a)
        check(a.batch_size * max(1, a.iterations) <= len(data[0]),
              f"--batch-size, --iterations: there are {len(data[0])} pictures")
        reports = [run(r, out / place, data) for place, r in runs.items()]
        table = compare([out]) if chief else {}
        return table if reports[1:] else reports[0]
    except (BadInput, OSError, SafetensorError) as e:
        print(f"{NAME}.py: error: {str(e).splitlines()[-1]}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        again = shlex.join([sys.argv[0], *words, *["--out", str(out)] * bool(out), "--resume"])
        print(f"\nstopped; to go on:\npython {again}")
        raise SystemExit(130) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

if __name__ == "__main__":
    main()
