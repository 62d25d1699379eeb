# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "numpy", "matplotlib", "tqdm", "safetensors"]
# ///
"""SimCLR with Deep Augmentation (Brüel-Gabrielsson et al., arXiv 2303.14537).

SimCLR makes two random views of every picture and trains a network f to give both the same output,
unlike everybody else's. Deep Augmentation makes views *inside* the network: it cuts f after layer
l and puts a random transformation A, dropout, between the parts,

    g^l(x) = f_above( A( f_below(x) ) ),    (Eq. 2)

on a random half of the batch. With stop-gradient the augmented rows send no gradient into
f_below: layers up to l learn from clean rows only, else they would learn to make A harmless. Layers
as in Figure 2: -1 input, 0 stem, 1-4 the stages, 5 average pool, 6 head.

    python simclr_deepaug.py                           the lesson: without, and with
    python simclr_deepaug.py --layer 0 --no-stop-grad  what stop-gradient is for
    python simclr_deepaug.py --data-dir MY_PICTURES --views simclr
    python simclr_deepaug.py --preset paper            the paper's setting, for a GPU

The default run shows the picture itself, twice: only dropout is left to learn from. Linear probe
of 20 classes: untrained 21.5 %, without 30.2 ± 1.4, at layer 0 46.4 ± 1.6, there without
stop-gradient 29.8 ± 5.1 (five seeds).
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
from contextlib import redirect_stdout, suppress
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
from torchvision.transforms.v2.functional import rgb_to_grayscale
from tqdm import tqdm

NAME = "simclr_deepaug"
STAGES = ["layer1", "layer2", "layer3", "layer4"]
LAYERS = range(-1, 7)  # Figure 2

# ==== 1 Settings ====

# Appendix A.1 and SupContrast's README
PAPER = dict(dataset="cifar100", views="simclr", arch="resnet18", layer=["4"], batch_size=1024,
             epochs=1500, warmup_epochs=10)
# Grigg et al. (arXiv 2110.00528), Appendix A; else SimCLR's
GRIGG = dict(dataset="cifar10", views="simclr", crop_min=0.08, arch="resnet50", head_layers=3,
             layer=["none"], optimizer="lars", weight_decay=1e-6, batch_size=4096, epochs=1300,
             warmup_epochs=10)
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

def targets_of(layer):
    """The layers that a value of --layer names: "none", "all" (0 to 6), "4" or "3+4"."""
    names = [] if layer == "none" else "0123456" if layer == "all" else layer.split("+")
    check(set(names) <= set(map(str, LAYERS)),
          f"--layer {layer}: -1 input to 6 head, several as 3+4, none, all, auto")
    return sorted(set(map(int, names)))

def settings(argv=None):
    """The flags, checked; each --layer with each --seed is a run."""
    positive, count = within(1e-9, 1e9), within(0, 10 ** 9, int)
    yes_no, cuda = argparse.BooleanOptionalAction, torch.cuda.is_available()
    p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.error = lambda message: check(False, f"{message} (see --help)")
    add = p.add_argument_group("Deep Augmentation").add_argument
    add("--layer", nargs="+", default=["none", "0"], metavar="L",
        help="-1 input to 6 head; 3+4; all; none; auto: by the CKA map of --init; several: runs")
    add("--rate", type=within(0, 0.999), default=0.5, help="dropout rate")
    add("--stop-grad", action=yes_no, default=True, help="no gradient from augmented rows to below")
    add("--sample", type=within(1e-9, 1), default=0.5, help="share of the rows to augment")
    add("--transform", choices=["dropout", "channel", "pca"], default="dropout")
    add("--pairs", choices=["any", "cross"], default="any", help="cross: one of each pair")
    add("--freeze", choices=["none", "before", "after"], default="none", help="weights <= L, > L")
    add = p.add_argument_group("data and views").add_argument
    add("--dataset", choices=["shapes", "cifar10", "cifar100", "folder"], help="shapes: drawn")
    add("--data-dir", help="your pictures; or where CIFAR lies or goes (data)")
    add("--pictures", type=count, default=0, help="to train on; 0: all")
    add("--views", choices=["simclr", "crop", "none"], default="none", help="none: the picture")
    add("--crop-min", type=within(0.01, 1), default=0.2, help="smallest crop")
    add("--image-size", type=count, default=0, help="of a view; 0: as they are")
    add = p.add_argument_group("network and training").add_argument
    add("--arch", choices=["small", "resnet18", "resnet34", "resnet50"], default="small")
    add("--head-layers", type=int, choices=[2, 3], default=2, help="of the projection head")
    add("--objective", choices=["simclr", "supervised"], default="simclr")
    add("--temperature", type=positive, default=0.5, help="of NT-Xent")
    add("--preset", choices=["paper", "grigg"], help="other defaults: this paper's, Grigg et al.'s")
    add("--epochs", type=count, default=10, help="0: untrained")
    add("--batch-size", type=within(2, 10 ** 6, int), default=256, help="of all processes")
    add("--lr", type=positive, default=0.5, help="peak")
    add("--optimizer", choices=["sgd", "lars"], default="sgd", help="momentum 0.9")
    add("--weight-decay", type=within(0, 1e9), default=1e-4)
    add("--warmup-epochs", type=count, default=1, help="at most a tenth of the run")
    add("--init", metavar="RUN", help="start from its weights")
    add("--seed", nargs="+", type=count, default=[0], help="several: a run each")
    add("--deterministic", action="store_true", help="the same bits on CUDA, too")
    add = p.add_argument_group("run").add_argument
    add("--out", help=f"folder; default: runs/{NAME}-DATE-TIME")
    add("--resume", action="store_true", help="go on from --out's checkpoint")
    add("--probe-every", type=count, default=0, help="in epochs; 0: first and last only")
    add("--transfer", choices=["shapes", "cifar10", "cifar100"], nargs="+", default=[])
    add("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    add("--compile", action=yes_no, help="default: on CUDA, where Triton is installed")
    add("--workers", type=count, default=min(8, os.cpu_count() or 1), help="to read pictures")
    add("--compare", nargs="+", metavar="RUN", help="only compare")

    a = p.parse_args(argv)
    if a.preset == "paper":
        # SupContrast's loss is c NT-Xent (losses.py:103): lr (c g + wd w) = lr c (g + wd/c w)
        c = a.temperature / 0.07 if a.objective == "simclr" else 1
        p.set_defaults(**PAPER, lr=0.5 * c, weight_decay=1e-4 / c)
    if a.preset == "grigg":
        p.set_defaults(**GRIGG)
        if a.objective == "supervised":
            p.set_defaults(views="crop", batch_size=8192, epochs=300)
        p.set_defaults(lr=0.3 * p.parse_args(argv).batch_size / 256)
    a = p.parse_args(argv)  # again: a flag beside the preset wins
    a.layer, a.seed = list(dict.fromkeys(a.layer)), list(dict.fromkeys(a.seed))
    a.dataset = a.dataset or ("shapes" if a.data_dir is None else "folder")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if a.compile is None:
        a.compile = a.device == "cuda" and bool(find_spec("triton"))
    check(cuda or a.device == "cpu", "--device cuda: there is none here")
    check(a.dataset != "shapes" or not a.data_dir, "--data-dir: shapes are drawn")
    check(a.dataset != "folder" or a.data_dir, "--dataset folder needs --data-dir")
    check("auto" not in a.layer or a.init, "--layer auto needs --init")
    check(a.out or not a.resume, "--resume needs --out")
    check(a.batch_size % world == 0, f"--batch-size: a multiple of {world} processes")
    for layer in set(a.layer) - {"auto"}:
        check(targets_of(layer) or a.freeze == "none", "--freeze needs a --layer")
    return a

# ==== 2 Method ====

def draw_rows(batch, sample, pairs, device):
    """The rows to augment, bool [2B] (first views, then second): each with probability `sample`;
    pairs "cross": exactly one of each pair."""
    if pairs == "cross":
        first = torch.rand(batch, device=device) < 0.5
        return torch.cat([first, ~first])
    return torch.rand(2 * batch, device=device) < sample

# --- the same in simclr, simcse ---
def deep_augment(h, rows, rate, stop_grad, transform="dropout"):
    """A(h) on the chosen rows, h on the others (Eq. 2 and Section 3.2). In training only.
    h: hidden states [B, ...]; rows: bool [B]; rate in [0, 1). stop_grad: the chosen rows are
    detached: no gradient from them to the layers below. transform "dropout": of elements, so that
    E[A(h)] = h; "channel": of channels of [B, C, H, W] or features over all tokens of [B, L, C];
    "pca": see remove_component."""
    x = h.detach() if stop_grad else h
    if transform == "dropout":
        x = F.dropout(x, rate)
    elif transform == "channel":  # one number each: [B, C, 1, 1], [B, 1, C] or [B, C]
        one = x[..., :1, :1] if x.ndim == 4 else x[:, :1] if x.ndim == 3 else x
        x = x * F.dropout(torch.ones_like(one), rate)
    else:
        x = remove_component(x)
    return torch.where(rows.view(-1, *[1] * (h.ndim - 1)), x, h)

def remove_component(h):
    """h [B, ...] without its share in the batch's first principal component. As in the authors'
    modeling_bert.py:531: PCA of the batch as [B, D], the axis without gradient, in float32."""
    with torch.autocast(h.device.type, enabled=False):
        flat = h.float().flatten(1)  # [B, D]
        with torch.no_grad():
            centre = flat.mean(0)
            v = torch.pca_lowrank(flat, q=min(6, *flat.shape))[2][:, :1]  # [D, 1], length 1
        return (h - ((flat - centre) @ v @ v.T).view_as(h)).to(h.dtype)
# --- end ---

def frozen_layers(a):
    """Layers whose weights stay; their BatchNorm statistics go on running."""
    targets, no_clean_row = targets_of(a.layer), a.sample == 1 and a.pairs == "any"  # Fig. 13
    before = targets and (a.freeze == "before" or (a.stop_grad and no_clean_row))
    return [l for l in LAYERS if (before and l <= max(targets)) or
            (a.freeze == "after" and l > min(targets))]

# --- the same in simclr, vicreg, topk ---
def nt_xent(z1, z2, temperature):
    """NT-Xent (Eq. 1 with the 2N-2 negatives of SimCLR's code). z1, z2: [N, d], row i of each a
    view of picture i. Each of the 2N must pick its partner among the 2N-1 others: one plain
    cross-entropy, in float32."""
    n = len(z1)
    z = F.normalize(torch.cat([z1, z2]).float(), dim=1)  # [2N, d]
    logits = (z @ z.T / temperature).fill_diagonal_(float("-inf"))  # not itself
    return F.cross_entropy(logits, torch.arange(2 * n, device=z.device).roll(n))

# ==== 3 Network: the layers of Figure 2 ====

class Normalize(nn.Module):
    """Layer -1: pictures in 0..1 -> (x - mean) / std per channel, in channels_last."""
    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", mean.view(3, 1, 1))
        self.register_buffer("std", std.view(3, 1, 1))

    def forward(self, x):
        return ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
# --- end ---
def block_outputs(block, x):
    """(residual, output) of a torchvision block, Grigg et al.'s odd and even layers; its own
    forward adds in place and loses the first."""
    odd = block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x)))))
    if hasattr(block, "conv3"):  # Bottleneck
        odd = block.bn3(block.conv3(block.relu(odd)))
    return odd, F.relu(odd + (x if block.downsample is None else block.downsample(x)))

class Net(nn.Module):
    """Encoder and head as layers -1..6, with Deep Augmentation between them.
    forward(images [B, 3, S, S] in 0..1, rows bool [B]) -> head output [B, 128] or class logits.
    mean, std: of the pictures' channels. classes: of a linear classifier as the head, or 0."""
    def __init__(self, a, size, mean, std, classes=0):
        super().__init__()
        if a.arch == "small":  # for laptops
            conv1, bn1 = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
            pool, stages, dim = nn.Identity(), [nn.Sequential(BasicBlock(16, 16))], 128
            for c in (16, 32, 64):
                shortcut = nn.Conv2d(c, 2 * c, 1, 2, bias=False), nn.BatchNorm2d(2 * c)
                stages += [nn.Sequential(BasicBlock(c, 2 * c, 2, nn.Sequential(*shortcut)))]
        else:
            r = getattr(torchvision.models, a.arch)()
            conv1, bn1, pool, dim = r.conv1, r.bn1, r.maxpool, r.fc.in_features
            stages = [r.layer1, r.layer2, r.layer3, r.layer4]
            if size < 64:  # SupContrast resnet_big.py: 3x3 stem, no maxpool
                conv1, pool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
        widths = [dim, classes] if classes else [dim] * a.head_layers + [128]
        head = [m for i, o in itertools.pairwise(widths) for m in (nn.Linear(i, o), nn.ReLU())]
        self.layers = nn.Sequential(OrderedDict(
            input=Normalize(mean, std),
            stem=nn.Sequential(OrderedDict(conv1=conv1, bn1=bn1, relu=nn.ReLU(), pool=pool)),
            **dict(zip(STAGES, stages)),
            avgpool=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            head=nn.Sequential(*head[:-1])))  # no ReLU at the end; SupContrast: no BatchNorm
        for conv in (m for m in self.modules() if isinstance(m, nn.Conv2d)):  # as torchvision
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        self.dim, self.targets = dim, targets_of(a.layer)
        self.augment = {k: getattr(a, k) for k in ("rate", "stop_grad", "transform")}

    def forward(self, images, rows=None):
        h = images
        for l, layer in enumerate(self.layers, start=-1):  # layer -1: the input
            h = layer(h)
            if self.training and l in self.targets:
                h = deep_augment(h, rows, **self.augment)
        return h

    def features(self, images):
        return self.layers[:-1](images)  # layer 5, [B, dim]: what is kept

    def activations(self, images):
        """{name: output} of stem, layerS.B.odd and .even, avgpool, head.0 ... head."""
        h = self.layers[:2](images)
        out = {"stem": h}
        for stage in STAGES:
            for b, block in enumerate(self.layers.get_submodule(stage)):
                out[f"{stage}.{b}.odd"], h = block_outputs(block, h)
                out[f"{stage}.{b}.even"] = h
        for i, m in enumerate([self.layers.avgpool, *self.layers.head]):
            h = m(h)
            out[f"head.{i - 1}" if i else "avgpool"] = h
        out["head"] = out.popitem()[1]
        return out

def build(a, split, classes):
    """The network of these flags and this seed."""
    centre, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])  # ImageNet's
    if split.images is not None:
        some = split.images[:1000].cpu() / 255
        centre, std = some.mean((0, 2, 3)), some.std((0, 2, 3)).clamp(min=1e-3)
    torch.manual_seed(a.seed)
    net = Net(a, split.size, centre, std, len(classes) * (a.objective == "supervised"))
    return net.to(a.device, memory_format=torch.channels_last)

# ==== 4 Views: a batch at once, each picture with its own parameters ====

def two_views(images, size, a):
    """uint8 [B, 3, H, H] -> [2B, 3, size, size] in 0..1: first views, then second views."""
    if a.views == "none":
        return to_unit(images, size).repeat(2, 1, 1, 1)
    jitter = (0.4, 0.4, 0.4, 0.1) if a.views == "simclr" else None
    return make_views(images.repeat(2, 1, 1, 1), size, (a.crop_min, 1), jitter)

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
# --- the same in simclr, simcse ---
def alignment(z1, z2):
    """Mean squared distance of pairs, 0..4; z1, z2 normalised [n, d] (Wang & Isola 2020)."""
    return (z1 - z2).square().sum(1).mean()

def uniformity(z):
    """log mean exp(-2 |zi - zj|^2), i < j, z normalised [n, d]: 0 one point, -4 well spread."""
    return torch.pdist(z).square().mul(-2).exp().mean().log()

@torch.no_grad()
def meters(z1, z2):
    """Of embeddings [B, d]: alignment, uniformity, and embedding_std, of the normalised ones times
    sqrt(d): 1 spread evenly, 0 collapsed."""
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    return {"alignment": alignment(z1, z2).item(), "uniformity": uniformity(z1).item(),
            "embedding_std": z1.std(0).mean().item() * z1.shape[1] ** 0.5}
# --- end ---

def train(a, net, split, out, measure, state):
    """Train from the start, or on from a checkpoint's `state`; returns the last one. Every step
    reseeds, so no random state is saved, and measure(), which probes `net`, changes nothing."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    steps, frozen = len(split) // a.batch_size, frozen_layers(a)
    total = a.epochs * steps
    for l, layer in zip(LAYERS, net.layers):
        layer.requires_grad_(l not in frozen)
    weights = [w for w in net.parameters() if w.requires_grad]
    decay = a.weight_decay * (a.optimizer == "sgd")  # else lars() adds it
    optimizer = torch.optim.SGD(weights, a.lr, 0.9, weight_decay=decay, fused=True)

    def keep(step):
        state.update(step=step, model=net.state_dict(), optimizer=optimizer.state_dict())
        if rank == 0:
            save_checkpoint(out / "checkpoint.pt", state)

    if state:
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    else:
        state = {"script": NAME, "flags": {**vars(a), "images": len(split)}, "seconds": 0.0,
                 "log": [], "probes": [{"epoch": 0, **measure()}] if rank == 0 else []}
        keep(0)
    model = net
    if world > 1:
        if a.device == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model = nn.parallel.DistributedDataParallel(model)
    if a.compile:
        torch.compiler.reset()
        model = torch.compile(model)
    bar = {} if sys.stderr.isatty() else {"mininterval": 10, "bar_format": "{l_bar}{r_bar}\n"}
    bar = tqdm(total=total * a.batch_size, initial=state["step"] * a.batch_size, unit="images",
               unit_scale=True, disable=rank > 0, **bar)
    batches = train_batches(split, a, state["step"], steps, rank, world)
    losses, saved, begun = [], time.time(), time.time()
    net.train()
    for step in range(state["step"] + 1, total + 1):
        images, labels = next(batches)
        torch.manual_seed(hash((a.seed, step, rank)))  # this step's views, rows, dropout
        views = two_views(images, split.size, a)  # [2B, 3, S, S]
        rows = draw_rows(len(images), a.sample, a.pairs, a.device)
        with torch.autocast(a.device, torch.bfloat16, enabled=a.device == "cuda"):
            z = model(views, rows)  # [2B, 128]
        # the whole batch's loss, with the gradient for these rows; `world`: DDP takes the mean
        z1, z2 = (gather(half) for half in z.float().chunk(2))
        if a.objective == "simclr":
            loss = nt_xent(z1, z2, a.temperature)
        else:
            loss = F.cross_entropy(torch.cat([z1, z2]), gather(labels).repeat(2))
        optimizer.zero_grad()
        (world * loss).backward()
        if a.optimizer == "lars":
            lars(weights, a.weight_decay)
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step - 1, a, steps)
        optimizer.step()
        losses.append(loss.detach())
        bar.update(a.batch_size)

        probing = step == total or (a.probe_every and step % (steps * a.probe_every) == 0)
        saving = probing or time.time() - saved > 60
        if not saving and step % max(1, min(50, total // 100)):
            continue
        *values, weight = torch.stack([*losses, sum(w.sum() for w in weights)]).tolist()
        check(math.isfinite(sum(values) + weight), f"the loss is not finite at about step {step}; "
              f"{out} keeps its checkpoint; try a smaller --lr in a new --out")
        seconds = time.time() - begun
        state["seconds"] += seconds
        row = {"step": step, "epoch": step / steps, "loss": mean(values), "lr": lr,
               "images_per_second": a.batch_size * len(values) / seconds, **meters(z1, z2)}
        state["log"].append(row)
        bar.set_postfix(loss=row["loss"], refresh=False)
        if probing and rank == 0:
            state["probes"].append({"epoch": step // steps, **measure()})
            net.train()
        if saving:
            keep(step)
            saved = time.time()
        losses, begun = [], time.time()
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

def probe(net, data, a):
    """Measures the frozen network; data: {name: (train, test, classes)}. linear, knn: of layer 5,
    test accuracy in %. alignment, uniformity: of the head under SimCLR's views (Section 6.2)."""
    def features(x):
        return net.features(to_unit(x, size)).float()

    def views(x):  # [B, 2, d]
        z = net(make_views(x.repeat(2, 1, 1, 1), size)).float()
        return F.normalize(z, dim=1).view(2, len(x), -1).transpose(0, 1)

    net.eval()
    result = {}
    for name, (*splits, classes) in data.items():
        size, prefix = splits[0].size, "" if name == a.dataset else f"{name}_"
        if classes:
            tables = [t for s in splits for t in outputs(features, s)]
            result[f"{prefix}linear"] = linear_probe(*tables, len(classes))
            result[f"{prefix}knn"] = weighted_knn(*tables, len(classes))
        if a.objective == "simclr" and not prefix and len(splits[1]) > 1:
            for part, split in zip(("train", "test"), splits):
                torch.manual_seed(0)
                z1, z2 = outputs(views, split, 2048)[0].unbind(1)
                result[f"alignment_{part}"] = alignment(z1, z2).item()
                result[f"uniformity_{part}"] = uniformity(z1).item()
    return result

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

# ==== 8 Export ====

def export(a, net, split, classes, out, report):
    """Writes encoder.pt (TorchScript), weights.safetensors (torchvision's keys), samples.npz (for
    cka.py). Returns the largest relative difference of encoder.pt, read back, from `net`."""
    live, size = copy.deepcopy(net).cpu().eval().requires_grad_(), split.size  # to fine-tune
    example, activations, worst = torch.rand(2, 3, size, size), live.activations, 0.0
    live.forward, live.activations = live.features, lambda x: [*activations(x).values()]
    names = list(activations(example))
    last = {name.split(".")[0]: name for name in names}.values()  # of each numbered layer
    config = {"script": NAME, "layers": names, "layer_numbers": {n: l for l, n in enumerate(last)},
              "image_size": size, "dim": net.dim, "dataset": a.dataset, "classes": classes,
              "flags": vars(a), "measurements": report}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit")
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
    save_file({re.sub("layers.(stem.)?", "", k): v.contiguous() for k, v in
               live.state_dict().items() if not re.match("layers.(head|input)", k)},
              out / "weights.safetensors")
    limit = min(2048, (64 << 20) // (3 * size ** 2))  # 64 MiB
    images, labels = outputs(lambda x: (to_unit(x, size) * 255).round().byte(), split, limit)
    np.savez(out / "samples.npz", images=images.cpu().numpy(), labels=labels.cpu().numpy())
    return worst

# ==== 9 Runs ====

def compare(folders):
    """Table and picture (Fig. 4, 11) of the finished runs in these folders, seeds pooled:
    {what tells runs apart: {measurement: (mean, std; 0 of one seed)}}."""
    runs, groups = {}, {}
    for file in (f for folder in folders for f in sorted(folder.glob("**/report.json"))):
        try:
            r = json.loads(file.read_text())
            flags = {k: v for k, v in r["flags"].items() if k not in HOW - {"data_dir"}}
            check(r["script"] == NAME and r["probes"], "another script's")
            runs[str(flags)] = targets_of(flags["layer"]), flags, r["probes"]  # each run once
        except Exception:
            print(f"{file}: left out, no finished run of this script")
    check(runs, "no finished run there")
    for _, flags, probes in sorted(runs.values(), key=lambda run: run[0]):
        name = ", ".join(f"{k} {v}" for k, v in flags.items() if k == "layer" or k != "seed" and
                         any(other.get(k) != v for _, other, _ in runs.values()))
        groups.setdefault(name, []).append(probes)

    def pooled(rows):  # over seeds
        values = {k: [row[k] for row in rows if k in row] for k in rows[0]}
        return {k: (mean(v), stdev(v) if v[1:] else 0.0) for k, v in values.items()}

    table = {"untrained": pooled([probes[0] for seeds in groups.values() for probes in seeds])}
    panels = defaultdict(dict)
    for name, seeds in groups.items():
        layer, _, others = name.removeprefix("layer ").partition(", ")
        along = [pooled(rows) for rows in zip(*seeds)]
        row = table[name] = pooled([probes[-1] for probes in seeds])
        if "linear" in row:
            panels["linear by layer, test %"].setdefault(others, []).append((layer, *row["linear"]))
        for k in ("test", "train") if "alignment_test" in row else ():
            panels[f"alignment by uniformity, {k}"][name] = [  # not the untrained
                (r[f"uniformity_{k}"][0], r[f"alignment_{k}"][0], 0) for r in along[1:] or along]
    shown = [k for k in table["untrained"] if k.endswith(("linear", "knn", "_test"))]
    width = max(map(len, table))
    print(" " * width + "".join(f"{k:>17}" for k in shown))
    for name, row in table.items():
        cells = ["%.2f ± %.2f" % row[k] if k in row else "" for k in shown]
        print(f"{name:{width}}" + "".join(f"{c.removesuffix(' ± 0.00'):>17}" for c in cells))
    target = (folders[0] if len(folders) == 1 else folders[0].parent) / "compare.png"
    draw(target, panels)
    print(target)
    return table

def run(a, out, data):
    """One run, from data to report."""
    train_split, test_split, classes = data[a.dataset]
    if a.layer == "auto":  # Section 6.1: where the co-adapted stretch starts, or ends
        import cka
        try:
            stretch = cka.run(cka.settings([f"{a.init}/encoder.pt", "--numbered"]))["stretch"]
        except ValueError as e:
            raise BadInput(e) from None
        a.layer = str(stretch[not a.stop_grad])
    net = build(a, train_split, classes)
    if a.init:
        try:
            net.load_state_dict(load_checkpoint(Path(a.init) / "checkpoint.pt", {})["model"])
        except RuntimeError:
            raise BadInput(f"--init {a.init}: give its network's flags (--arch, ...)") from None
    check(set(range(7)) - set(frozen_layers(a)), "no layer is left to train")
    state, report_file = None, out / "report.json"
    if report_file.exists() or (out / "checkpoint.pt").exists():  # with --resume only
        state = load_checkpoint(out / "checkpoint.pt", {**vars(a), "images": len(train_split)})
        with suppress(OSError, ValueError):
            return json.loads(report_file.read_text())
    chief = not dist.is_initialized() or dist.get_rank() == 0
    if chief:
        out.mkdir(parents=True, exist_ok=bool(a.out))
        versions = {m.__name__: m.__version__ for m in (torch, torchvision, np)}
        (out / "config.json").write_text(json.dumps({"script": NAME, **vars(a), **versions}))
        print(f"{out}: {len(train_split)} pictures of {a.dataset}, layer {a.layer}")
    state = train(a, net, train_split, out, lambda: probe(net, data, a), state)
    if not chief:
        return {}
    log, probes = state["log"], state["probes"]
    report = {"script": NAME, "flags": vars(a), "broken": len(train_split.broken), **probes[-1],
              **{f"{k}_untrained": v for k, v in probes[0].items()}, "probes": probes,
              "steps": state["step"], "seconds": state["seconds"],
              "images_per_second": median([r["images_per_second"] for r in log] or [0])}
    report["export_difference"] = export(a, net, test_split, classes, out, report)
    rows = [*log[:1], *(row.values() for row in log)]
    (out / "metrics.csv").write_text("\n".join(",".join(map(str, row)) for row in rows))
    draw(out / "curves.png", {
        f"{k} by epoch": {"": [(row["epoch"], row[k], 0) for row in rows]}
        for rows in (probes, log) for k in (rows or [{}])[0] if k not in ("step", "epoch")})
    images, _ = next(test_split.batches(torch.arange(len(test_split))[:12], 12))
    torch.manual_seed(0)
    shown = [to_unit(images, test_split.size), two_views(images, test_split.size, a)]
    torchvision.utils.save_image(torch.cat(shown), out / "views.png", nrow=len(images))
    with suppress(ImportError, SystemExit), redirect_stdout(None):  # no cka.py
        import cka
        if len(test_split) > 3:  # what its estimate needs
            cka.main([f"{out}/encoder.pt", "--numbered", f"--out={out}/cka"])
    report_file.write_text(json.dumps(report, indent=1))
    return report

def main(argv=None):
    """Run a command line: one run's report, or several's table."""
    words, out = list(sys.argv[1:] if argv is None else argv), None
    try:
        a = settings(words)
        if a.compare:
            return compare([Path(f) for f in a.compare])
        if "RANK" in os.environ:  # started by torchrun
            if a.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group(timeout=timedelta(hours=2))
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(a.deterministic)
        torch.backends.cudnn.benchmark = not a.deterministic
        torch.backends.cudnn.allow_tf32 = False  # what is not under autocast is float32
        runs = [argparse.Namespace(**{**vars(a), "layer": layer, "seed": seed})
                for layer, seed in itertools.product(a.layer, a.seed)]
        out = Path(a.out or f"runs/{NAME}-{time.strftime('%Y%m%d-%H%M%S')}")
        places = [out / f"layer-{r.layer}-seed-{r.seed}" if runs[1:] else out for r in runs]
        own = a.resume and any(NAME in str(f.read_bytes()) for f in out.rglob("config.json"))
        chief = os.environ.get("RANK", "0") == "0"
        check(own or not (chief and out.exists() and any(out.iterdir())),
              f"--out {out} is not empty; --resume goes on with its own run")
        data = {name: load_data(name, a) for name in [a.dataset, *a.transfer]}
        split = data[a.dataset][0]
        split.labels = split.labels[:a.pictures or None]  # which are its length
        check(a.batch_size <= len(split), f"--batch-size: there are only {len(split)} pictures")
        check(a.objective == "simclr" or data[a.dataset][2], "--objective supervised needs labels")
        reports = [run(r, place, data) for r, place in zip(runs, places)]
        table = compare([out]) if chief else {}
        return table if runs[1:] else reports[0]
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
