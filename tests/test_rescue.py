"""topk_rescue.py: every formula against a slow one in float64, gradients too; strong views; whole
runs, kills and resumes, two processes, presets, and what bad input gets."""
import copy
import csv
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import socket
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import transformers
from conftest import Trap, same_bits
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torchvision.transforms.v2 import functional as T

import cka
import topk_rescue as R
import vicreg_probe as V

SCRIPT = R
SERVER = multiprocessing.get_context("forkserver")  # starts processes with all imported
SERVER.set_forkserver_preload(["topk_rescue", "cka", "vicreg_probe", "pytest"])
NORM = nn.modules.batchnorm._BatchNorm
PICTURES = R.draw_shapes(64, 0, "cpu")[0]
SPLIT = R.Split(32, torch.zeros(64), PICTURES)
BASE = ("--workers 0 --device cpu --rescue topk --k 3 --s 0.5 --projector 16 8 --prototypes 24 "
        "--local-crops 2 --batch-size 36")
RUN = f"{BASE} --image-size 16 --epochs 2"  # six steps an epoch on the 216 pictures of `few`
SHORT = "--epochs 1 --batch-size 108"  # two steps
METHODS = {"simclr": "", "dinov2": "--method dinov2 --centering centering --weight-decay 0.04",
           "mocov3": "--method mocov3 --anchor online --strong deepaug --layer 2 --optimizer lars"}

@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """Figures take most of a small run: [(path, what would be on it)]. `done` really has some."""
    pages = []
    for name in ("draw", "draw_easy"):
        monkeypatch.setattr(R, name, lambda *page: pages.append(page))
    return pages

def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

def words_of(*more):
    """Texts are split into words, lists of words and paths are not."""
    return [w for m in more for w in (m.split() if isinstance(m, str) else map(str, m) if
                                      isinstance(m, list) else [str(m)])]

def flags(data, *more):
    return ["--data-dir", str(data), *words_of(RUN, *more)]

def one_run(*more):
    """The settings of a command line with one value of everything, the last."""
    a = R.settings(words_of(*more))
    vars(a).update({name: getattr(a, name)[-1] for name in R.RUNS})
    a.k = {"none": 0, "all": a.batch_size}.get(a.rescue, a.k)
    return a

def built(*more):
    """A Rescue in training mode on pictures of 32 pixels; every weight is a little off its start:
    a target unlike the trained network, BatchNorms that scale and shift, older statistics."""
    r = R.build(one_run(BASE, *more), SPLIT).train()
    with torch.no_grad():
        for i, (name, w) in enumerate(itertools.chain(r.named_parameters(), r.named_buffers())):
            if isinstance(w, nn.Parameter) or "centre" in name or "running" in name:
                w.add_(0.05 * randn(*w.shape, seed=i))
    return r

def state_of(run):
    return torch.load(Path(run) / "checkpoint.pt", weights_only=True)

def report_of(run):
    return json.loads((Path(run) / "report.json").read_text())

def close(got, expected, floor=1e-5, rtol=1e-4):
    """Equal up to float32: relative, and to the largest entry."""
    expected = expected.double()
    atol = floor * max(expected.abs().max().item(), 1e-3)
    torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=atol)

# ==== slow forms, in float64 ====

def unit(v):
    return v / v.square().sum().sqrt()

def slow_contrast(anchors, candidates, partner, itself, temperature):
    """Mean of -log softmax of the partner among all candidates but the anchor itself."""
    total = 0
    for i, z in enumerate(anchors):
        e = [(unit(z) @ unit(c) / temperature).exp() for c in candidates]
        total = total - (e[partner[i]] / sum(x for j, x in enumerate(e) if j != itself[i])).log()
    return total / len(anchors)

def slow_sinkhorn(logits, temperature, iterations=3):
    """dinov2 dino_clstoken_loss.py, entry by entry: q[k][i] for prototype k and row i."""
    n, k, top = len(logits), len(logits[0]), max(map(max, logits))
    q = [[math.exp((row[j] - top) / temperature) for row in logits] for j in range(k)]
    for _ in range(iterations):
        q = [[x / sum(row) / k for x in row] for row in q]  # every prototype weighs 1 / K
        sums = [sum(q[j][i] for j in range(k)) for i in range(n)]
        q = [[row[i] / sums[i] / n for i in range(n)] for row in q]  # every row 1 / n
    return torch.tensor([[q[j][i] * n for j in range(k)] for i in range(n)]).double()

def slow_koleo(x):
    rows, total = [unit(v) for v in x], 0
    for i, v in enumerate(rows):
        j = max((j for j in range(len(rows)) if j != i), key=lambda j: (v @ rows[j]).item())
        total = total - ((v - rows[j]).square().sum().sqrt() + 1e-8).log()
    return total / len(rows)

def slow_entropy(t, logits, temperature):
    e = (logits / temperature - (logits / temperature).max()).exp()
    return -(t * (e / e.sum()).log()).sum()

def together(norm, x):
    """BatchNorm of a batch, the first rows, and others, by the batch's mean and variance."""
    axes = [0, *range(2, x.ndim)]
    var, mean = torch.var_mean(x[:together.batch], axes, correction=0, keepdim=True)
    x = (x - mean) / (var + 1e-5).sqrt()
    w, b = (v if v is None else v.view_as(mean) for v in (norm.weight, norm.bias))
    return x if w is None else x * w + b

def slow_copy(method):
    slow = copy.deepcopy(method).double()
    for norm in (m for m in slow.modules() if isinstance(m, NORM)):
        norm.forward = partial(together, norm)
    return slow

def slow_simclr(m, y_a, y_b, strong):
    """-> L_SSL, (target's or teacher's z_a, online z_a), z_b, z_s of all strong views."""
    n = len(y_a)
    together.batch = 2 * n  # both views in one pass
    z = m.online(torch.cat([y_a, y_b, strong]))["head"]
    pairs, partner = z[:2 * n], [*range(n, 2 * n), *range(n)]
    loss = slow_contrast(pairs, pairs, partner, range(2 * n), m.temperature)
    return loss, (z[:n], z[:n]), z[n:2 * n], z[2 * n:]

def slow_mocov3(m, y_a, y_b, strong):
    n = together.batch = len(y_a)  # each view by itself
    q_a = m.predictor(m.online(y_a)["head"])
    q_b, z_s = m.predictor(m.online(torch.cat([y_b, strong]))["head"]).chunk(2)
    k_a, k_b = (m.target(y)["head"].detach() for y in (y_a, y_b))
    loss = sum(2 * m.temperature * slow_contrast(q, k, range(n), [-1] * n, m.temperature)
               for q, k in ((q_a, k_b), (q_b, k_a)))
    return loss, (k_a, q_a), q_b, z_s

def slow_prototypes(prototypes, z):
    w = prototypes.parametrizations.weight
    return torch.stack([g[0] * unit(v) @ unit(z) for g, v in zip(w.original0, w.original1)])

def slow_dinov2(m, y_a, y_b, strong, local, mask, temperature, how):
    """Crops go through the networks one by one; pairs, masked patches and neighbours in loops."""
    crops, b, n = torch.cat([y_a, y_b]), len(y_a), 2 * len(y_a)
    student = [m.online(x[None], mask=k[None]) for x, k in zip(crops, mask)]
    where = [(i, p) for i in range(n) for p in range(mask.shape[1]) if mask[i, p]]
    with torch.no_grad():
        teacher = [m.target(x[None]) for x in crops]  # whole crops
        heads = [[out["head"][0] for out in teacher],
                 [m.target.head(teacher[i]["norm"][0, 1 + p]) for i, p in where]]
        raw = [torch.stack([slow_prototypes(m.target_prototypes, z) for z in h]) for h in heads]
        centres = [m.cls_targets.centre, m.patch_targets.centre]
        t_cls, t_patch = (slow_sinkhorn(x.tolist(), temperature) if how == "sinkhorn" else
                          F.softmax((x - c) / temperature, 1) for x, c in zip(raw, centres))
    logits = [slow_prototypes(m.prototypes, out["head"][0]) for out in student]
    small = [slow_prototypes(m.prototypes, m.online(x[None])["head"][0]) for x in local]
    pairs = []
    for i in range(n):  # a teacher's crop
        others = [logits[(i + b) % n], *small[i % b::b]]
        pairs += [slow_entropy(t_cls[i], other, m.a.temperature) for other in others]
    ibot = sum(slow_entropy(t, slow_prototypes(m.prototypes, m.online.head(
        student[i]["norm"][0, 1 + p])), m.a.temperature) / mask[i].sum() / n
        for t, (i, p) in zip(t_patch, where))
    spread = sum(slow_koleo([out["cls"][0] for out in half]) for half in (student[:b], student[b:]))
    z_a = [torch.cat([out["head"] for out in outs[:b]]) for outs in (teacher, student)]
    z_b, z_s = torch.cat([out["head"] for out in student[b:]]), m.online(strong)["head"]
    after = [0.9 * c + 0.1 * x.mean(0) if how == "centering" else c for c, x in zip(centres, raw)]
    return sum(pairs) / len(pairs) + ibot + 0.1 * spread, z_a, z_b, z_s, after

# ==== the rescue ====

@pytest.mark.parametrize("words, progress, t", [
    *((words, 0, 0) for words in (
        "--k 1", "--rescue all", "--k 6 --arch vit-tiny", "--rescue hardest", "--method mocov3",
        "--method mocov3 --anchor online --k 1", "--method mocov3 --arch vit-tiny",
        "--method mocov3 --arch vit-tiny --anchor online --rescue hardest")),
    ("--method dinov2", 0.15, 0.055), ("--method dinov2 --rescue all", 0.8, 0.07),
    ("--method dinov2 --anchor online --centering centering --local-crops 0", 0, 0.04),
    ("--method dinov2 --centering centering --epochs 200 --k 1", 0.075, 0.055)])
def test_the_loss_is_equations_1_and_2_on_each_base_method(monkeypatch, words, progress, t):
    """All gradients, too, also through the batch's mean and variance by which strong views are
    normalised. The teacher's temperature rises in 30 epochs or .3 of the run."""
    r, images = built("--batch-size 6 --s 3 --epochs 15", words), PICTURES[:6]
    a, method = r.a, r.method
    torch.manual_seed(1)
    (y_a, y_b), strong = R.two_views(images, a), R.strong_views(images, 32)
    monkeypatch.setattr(R, "two_views", lambda *_: (y_a, y_b))
    monkeypatch.setattr(R, "strong_views", lambda some, size: strong[
        [next(i for i in range(6) if torch.equal(x, images[i])) for x in some]])
    torch.manual_seed(2)
    drawn = method.draw(images, progress)[:2] if t else ()  # small crops, mask
    more = (drawn[0].double(), drawn[1], t, a.centering) if t else ()
    slow = slow_copy(method)
    base, anchors, z_b, z_s, *after = globals()[f"slow_{a.method}"](
        slow, y_a.double(), y_b.double(), strong.double(), *more)
    z_a = anchors[a.anchor == "online"]
    cosines = [(unit(x) @ unit(y)).item() for x, y in zip(z_a.detach(), z_b.detach())]
    order = sorted(range(6), key=lambda i: cosines[i], reverse=a.rescue != "hardest")
    chosen = sorted(order[:a.k])
    rescued = sum(unit(z_a[i]) @ unit(z_s[i]) for i in chosen) / a.k
    (base - 3 * rescued).backward()
    torch.manual_seed(2)
    loss, numbers, *_, got = r(images, progress)
    loss.backward()
    assert got.tolist() == chosen and not any(v.requires_grad for v in numbers.values())
    base, rescued = base.item(), rescued.item()
    assert {k: v.item() for k, v in numbers.items()} == pytest.approx({
        "loss": base - 3 * rescued, "base_loss": base, "similarity": np.mean(cosines),
        "similarity_chosen": np.mean([cosines[i] for i in chosen]), "similarity_strong": rescued},
        rel=3e-4, abs=1e-4)
    largest = max(q.grad.abs().max().item() for q in slow.parameters() if q.grad is not None)
    for (name, p), q in zip(method.named_parameters(), slow.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) == (not p.requires_grad), name
        if p.requires_grad:
            own = max(q.grad.abs().max().item(), 0.01 * largest)
            torch.testing.assert_close(p.grad.double(), q.grad, rtol=2e-3, atol=2e-3 * own)
    for targets, centre in zip((method.cls_targets, method.patch_targets) if t else (), *after):
        close(targets.centre, centre, floor=1e-4)

def one_step(*words, control=False):
    r = built(*words)
    torch.manual_seed(5)
    loss, numbers, *_, chosen = r(PICTURES[:8], 0.2, control)
    loss.backward()
    return r, numbers, chosen, {n: p.grad for n, p in r.named_parameters() if p.grad is not None}

@pytest.mark.parametrize("words", [
    "", "--method mocov3", "--method mocov3 --arch vit-tiny", "--method dinov2",
    "--strong deepaug --no-stop-grad", "--method dinov2 --strong deepaug --anchor online"])
def test_without_weight_or_pairs_it_is_the_base_method_and_k_n_is_all_to_the_bit(words):
    """Running statistics, too; to ask whether the same view gives the same z changes nothing."""
    words = words, "--batch-size 8"
    none, base = one_step(*words, "--rescue none"), built(*words)
    torch.manual_seed(5)
    views = R.two_views(PICTURES[:8], base.a)
    more = base.method.draw(PICTURES[:8], 0.2) if base.a.method == "dinov2" else ()
    loss = base.method(*views, *more)[0]
    loss.backward()
    by_hand = base, {**none[1], "loss": loss.detach(), "base_loss": loss.detach()}, None, {
        n: p.grad for n, p in base.named_parameters() if p.grad is not None}
    zero, every, all_, one = (one_step(*words, more) for more in (
        "--s 0", "--k 8", "--rescue all", ""))
    random_state, seen = torch.get_rng_state(), one_step(*words, control=True)
    assert seen[1].pop("same_view") == pytest.approx(1, abs=1e-4)
    assert torch.equal(random_state, torch.get_rng_state())
    for a, b, parts in ((none, by_hand, (1, 2, 3)), (none, zero, (3,)), (one, seen, (1, 2, 3)),
                        (every, all_, (1, 2, 3))):
        assert same_bits(dict(a[0].state_dict()), dict(b[0].state_dict()))
        assert all(same_bits(a[i], b[i]) for i in parts)
    assert every[2].tolist() == [*range(8)] and {*none[1]} == {"loss", "base_loss", "similarity"}
    assert zero[1]["loss"] == none[1]["loss"] and not same_bits(one[3], none[3])

def test_choose_takes_ascending_numbers_of_ties_too_and_random_ones_equally_often():
    s = torch.tensor([0.1, 0.9, -0.5, 0.8, 0.3, 0.95])
    assert R.choose(s, "topk", 3).tolist() == [1, 3, 5] and R.choose(s, "topk", 1).tolist() == [5]
    for rescue in ("topk", "hardest", "random", "all"):
        assert R.choose(s, rescue, 6).tolist() == [*range(6)]
        assert len({*R.choose(torch.ones(6), rescue, 3).tolist()}) == 3
    torch.manual_seed(0)
    often = torch.cat([R.choose(s, "random", 2) for _ in range(600)]).bincount(minlength=6) / 600
    assert (often - 1 / 3).abs().max() < 0.07

RESNET = ["input", "stem", *(f"layer{i}" for i in range(1, 5)), "avgpool", "head"]
VIT = ["input", "embed", *(f"block{i}" for i in range(1, 5)), "norm", "cls", "head"]

def number_of(parameter, names):
    """The layer of backbone.layer2.0.conv1.weight, ...; 99: of none."""
    block = re.search(r"encoder\.layer\.(\d+)|backbone\.layer(\d+)", parameter)
    if block:
        return int(block[1]) + 1 if block[1] else int(block[2])
    parts = {"stem": 0, "embeddings": 0, "layernorm": 5, "online.head": len(names) - 2}
    return next((l for part, l in parts.items() if part in parameter), 99)

def one_step_of(r):
    """Gradients of a step with BatchNorms in eval mode: through a batch's mean and variance all
    rows would touch all layers."""
    for m in r.modules():
        if isinstance(m, NORM):
            m.eval()
    torch.manual_seed(5)
    r(PICTURES[:8], 0.2)[0].backward()
    return {n: p.grad for n, p in r.named_parameters() if p.grad is not None}

@pytest.mark.parametrize("arch, names", [("small", RESNET), ("vit-tiny", VIT)])
def test_deep_augmentation_sits_where_the_numbers_say(arch, names):
    """Rows change from this layer on, others never; with stop-gradient the rescue term reaches what
    lies above, without it everything."""
    rows, base = torch.arange(8) % 3 > 0, f"--method mocov3 --s 10 --batch-size 8 --arch {arch}"
    images, none = PICTURES[:8] / 255, one_step_of(built(base, "--rescue none"))
    assert R.targets_of("3+-1+3", arch) == [-1, 3] and R.targets_of("none", arch) == []
    for layer in range(-1, len(names) - 1):
        deep = f"{base} --rate 0.75 --strong deepaug --layer {layer}"
        net = built(deep).method.online.eval()
        clean = net(images)
        torch.manual_seed(0)
        got = net(images, rows)
        assert [*clean] == names
        for l, name in enumerate(names, -1):
            changed = (got[name] != clean[name]).flatten(1).any(1)
            assert torch.equal(changed, rows & (l >= layer)), name
        h, x = got[names[layer + 1]][rows], clean[names[layer + 1]][rows]
        share = (h != 0)[x != 0].float()
        torch.testing.assert_close(h, 4 * x * (h != 0))
        assert abs(share.mean() - 0.25) < 2.2 / len(share) ** 0.5  # five deviations
        for stop in ("--stop-grad", "--no-stop-grad"):
            for name, grad in one_step_of(built(deep, stop)).items():
                if "k_proj.bias" not in name:  # of no effect in attention
                    same = torch.allclose(grad, none[name], rtol=1e-4, atol=1e-8)
                    below = number_of(name, names) <= layer
                    assert same == (stop == "--stop-grad" and below), (layer, name)

def test_sample_is_the_share_of_strong_rows_that_are_augmented(monkeypatch):
    """Of equal views only those with nearly everything dropped in the head are not alike."""
    monkeypatch.setattr(R, "two_views", lambda images, a: [images / 255] * 2)
    for sample in (0.25, 1):
        r = built("--batch-size 64 --rescue all --strong deepaug --layer 6 --rate 0.999 --sample",
                  [sample])
        torch.manual_seed(0)
        shares = [1 - r(PICTURES, 0)[1]["similarity_strong"].item() for _ in range(6)]
        assert np.mean(shares) == pytest.approx(sample, abs=0.08)
        assert sample == 1 or np.std(shares) > 0.01  # drawn, row by row

# ==== parts of the base methods ====

KEYS, TARGETS = 3 * randn(7, 5, seed=1), F.softmax(randn(3, 4, 5), -1)

@pytest.mark.parametrize("fast, slow, x", [
    *((lambda q, n=n, t=t: R.moco_loss(q, KEYS[:n], t), lambda q, n=n, t=t: 2 * t * slow_contrast(
        q, KEYS[:n].double(), range(n), [-1] * n, t), 3 * randn(n, 5)) for n, t in (
            (7, 0.2), (7, 1.0), (2, 0.5), (1, 0.2), (5, 0.01))),
    (lambda x: R.cross_entropy_to(TARGETS, x, 0.1), lambda x: torch.stack([torch.stack([
        slow_entropy(t, v, 0.1) for t, v in zip(*two)]) for two in zip(TARGETS.double(), x)]),
     2 * randn(3, 4, 5, seed=1)),
    *((R.koleo, slow_koleo, 3 * randn(n, d, seed=n)) for n, d in ((9, 4), (2, 6), (30, 3)))])
def test_parts_and_their_gradients_equal_loops(fast, slow, x):
    """MoCo: query i picks key i among n, n - 1 negatives. KoLeo: neighbours are pushed, too."""
    x, y = x.requires_grad_(), x.detach().double().requires_grad_()
    values = fast(x), slow(y)
    close(*values, floor=2e-5)
    up = 1 + torch.arange(values[0].numel()).view_as(values[0])
    close(*(torch.autograd.grad((v * up).sum(), z)[0] for v, z in zip(values, (x, y))), 1e-4, 1e-3)

def test_duplicates_zeros_and_large_numbers_are_finite():
    x = torch.cat([randn(3, 5), randn(2, 5), torch.zeros(1, 5)]).requires_grad_()
    R.koleo(x).backward()
    assert x.grad.isfinite().all() and R.koleo(torch.zeros(3, 4)).isfinite()
    assert R.cross_entropy_to(TARGETS, 1e4 * randn(3, 4, 5), 0.04).isfinite().all()

@pytest.mark.parametrize("n, k, t", [(6, 4, 0.07), (3, 8, 0.3), (1, 5, 0.1), (5, 2, 0.04)])
def test_sinkhorn_knopp_equals_loops(n, k, t):
    """Large logits do not overflow, rows far below the others do not vanish; no gradient."""
    logits = 0.3 * randn(n, k, seed=n)
    low = logits - 5 * (torch.arange(n) == 0).view(n, 1)  # e^-125 is zero in float32
    for x, rtol in ((logits, 1e-4), (logits + 100, 1e-3), (logits - 100, 1e-3), (low, 1e-3)):
        got = R.sinkhorn_knopp(x.requires_grad_(), t)
        close(got, slow_sinkhorn(x.tolist(), t), rtol=rtol)
        assert not got.requires_grad

@pytest.mark.parametrize("method", ["mocov3", "dinov2"])
def test_targets_move_by_their_parameters_with_a_momentum_on_a_cosine_to_1(method):
    """Not BatchNorm's statistics, centres ... DINOv2's teacher stays in eval mode."""
    m = built(f"--method {method} --momentum 0.9").train().method
    moved = {n: m.get_parameter(n.replace("target_", "").replace("target", "online"))
             for n, _ in m.named_parameters() if n.startswith("target")}
    for progress in (0.0, 0.25, 1.0):
        before = copy.deepcopy(m.state_dict())
        m.update_target(progress)
        momentum = 1 - 0.1 * (math.cos(math.pi * progress) + 1) / 2
        for name, now in m.state_dict().items():
            old = before[name.replace("kept", "target") if method == "dinov2" else name].double()
            new = moved.get(name.replace("kept.", "target."), old).double()
            close(now, momentum * old + (1 - momentum) * new, floor=1e-6 * (new is not old))
    assert {x.training for x in m.target.modules()} == {method == "mocov3"}

def test_heads_are_those_of_the_published_codes():
    """N: BatchNorm, R: ReLU, G: GELU. A ViT's MoCo v3 has a layer more, its predictor ends in N."""
    def text(head):
        return " ".join("{}>{}".format(*m.weight.shape[::-1]) if isinstance(m, nn.Linear) else
                        {R.BatchNorm: "N", nn.ReLU: "R", nn.GELU: "G"}[type(m)] for m in head)
    m, v = (built("--method mocov3", arch).method for arch in ("", "--arch vit-tiny"))
    d = R.build(one_run(BASE, "--method dinov2 --projector 256 64"), SPLIT).method
    assert [*map(text, (built().method.online.head, m.predictor, m.online.head, v.predictor,
                        v.online.head, d.online.head))] == [
        "128>16 R 16>8", "8>16 N R 16>8", "128>16 N R 16>8 N", "8>16 N R 16>8 N",
        "64>16 N R 16>16 N R 16>8 N", "64>256 G 256>256 G 256>64"]
    for head in (m.online.head, v.online.head, v.predictor):
        assert head[1].affine and head[0].bias is None and not head[-1].affine
    for linear in d.online.head[::2]:
        assert 0.018 < linear.weight.std() < 0.022 and not linear.bias.any()
    close(d.prototypes.weight.norm(dim=1), torch.ones(24))  # weight-normed, of length 1 at first

@pytest.mark.parametrize("side, least", [(1, 0), (2, 0), (7, 0.9), (4, 0.8), (16, 0.35)])
def test_masks_have_exactly_the_asked_number_mostly_in_blocks(side, least):
    """Their border is far shorter than that of patches strewn at random; no side is preferred."""
    torch.manual_seed(0)
    counts = torch.arange(300) % (side * side + 1)  # from none to all
    assert torch.equal(R.block_masks(counts, side).sum(1), counts)
    if least:
        mask, half = R.draw_masks(400, side, "cpu")[0], side // 2
        strewn = torch.rand(mask.shape).argsort(1).argsort(1) < mask.sum(1, keepdim=True)
        mask, strewn = (m.view(-1, side, side) for m in (mask, strewn))
        mine, other = (sum(m.int().diff(dim=d).abs().sum() for d in (1, 2)) for m in (mask, strewn))
        assert mine < least * other
        for part in (mask[:, :half], mask[:, side - half:], mask.mT[:, :half]):
            assert 0.88 < part.float().mean() / mask.float().mean() < 1.12

@pytest.mark.parametrize("side, crops", [(2, 2), (2, 16), (4, 6), (16, 40)])
def test_half_of_the_crops_are_masked_by_a_tenth_to_a_half(side, crops):
    """In equal steps, so that the number of all patches is always the same; which crops: drawn."""
    torch.manual_seed(0)
    often, n, seen = torch.zeros(crops), crops // 2, set()
    for _ in range(100):
        mask, places, weights = R.draw_masks(crops, side, "cpu")
        counts = mask.sum(1).tolist()
        seen.add(tuple(sorted(counts)))
        assert places.tolist() == mask.flatten().nonzero()[:, 0].tolist()
        assert weights.tolist() == pytest.approx([1 / counts[i // side ** 2] for i in places])
        often += mask.any(1)
    [counts] = seen
    assert not any(counts[:n]) and 20 < often.min() and often.max() < 80
    for i, c in enumerate(counts[n:]):  # one in each of equal strata
        low, high = (int((0.1 + 0.4 * j / n) * side ** 2 + 1e-4) for j in (i, i + 1))
        assert max(1, low) <= c <= max(1, high)

def test_mocov3s_vit_has_sine_positions_and_a_frozen_patch_projection():
    expected = [0.0] * 64  # the class token
    for row, column in itertools.product(range(4), repeat=2):
        expected += [f(place / 10_000 ** (i / 16)) for place, f in (
            (column, math.sin), (column, math.cos), (row, math.sin), (row, math.cos))
            for i in range(16)]
    for method in R.METHODS:
        net = R.build(one_run(BASE, f"--method {method} --arch vit-tiny"), SPLIT).method.online
        fixed = {n.split("embeddings.", 1)[1] for n, p in net.named_parameters() if
                 not p.requires_grad}
        positions = net.backbone.embeddings.position_embeddings.flatten().tolist()
        assert (positions == pytest.approx(expected, abs=1e-6)) == (method == "mocov3")
        assert fixed == ({"position_embeddings", "patch_embeddings.projection.weight",
                          "patch_embeddings.projection.bias"} if method == "mocov3" else set())

def test_parameter_groups_hold_every_trained_parameter_once():
    """DINOv2: .9 a block from the head down, .2 of that for the patch projection, no decay of
    vectors. Others: one group."""
    for words in ("", "--method mocov3 --arch vit-tiny"):
        r = built(words)
        [group] = R.parameter_groups(r.a, r.method)
        assert [*map(id, group["params"])] == [id(p) for p in r.parameters() if p.requires_grad]
    r = built("--method dinov2")
    of = [(id(p), g) for g in R.parameter_groups(r.a, r.method) for p in g["params"]]
    trained = {n: p for n, p in r.method.named_parameters() if p.requires_grad}
    assert sorted(i for i, _ in of) == sorted(map(id, trained.values())) and len(of) > 50
    for name, p in trained.items():
        group, depth = dict(of)[id(p)], min(5, number_of(name, VIT))
        patch = 0.2 if "patch_embeddings" in name else 1
        assert group["scale"] == pytest.approx(0.9 ** (5 - depth) * patch), name
        vector = name.endswith("bias") or "norm" in name.split("param")[0] or "lambda1" in name
        assert (group["decay"], group["last"]) == (not vector, name.startswith("proto")), name

# ==== views ====

@pytest.mark.parametrize("side, size", [(32, 32), (33, 33), (40, 32), (20, 7)])
def test_strong_views_are_grey_squares_on_randaugmented_pictures(monkeypatch, side, size):
    """Two operations, strengths 0 to 30; then half the side is grey, in any place. Pictures of
    other sizes are resized. (Here the operations leave the pictures as they are.)"""
    asked = []
    monkeypatch.setattr(R.v2, "RandAugment", lambda *how: asked.append(how) or nn.Identity())
    torch.manual_seed(0)
    images = T.resize(PICTURES.repeat(8, 1, 1, 1), [side, side])
    before, got = images.clone(), R.strong_views(images, size)
    assert got.shape == (512, 3, size, size) and torch.equal(images, before)
    cut = (got == 0.5).all(1)  # no byte / 255
    rows, columns = cut.any(2), cut.any(1)
    assert torch.equal(cut, rows.unsqueeze(2) & columns.unsqueeze(1))
    for line in (rows, columns):
        start, [length] = line.int().argmax(1), line.sum(1).unique().tolist()
        assert length in {size // 2, (size + 1) // 2}
        assert all(line[i, s:s + length].all() for i, s in enumerate(start.tolist()))
        assert start.unique().tolist() == [*range(size - length + 1)]
    error = (got - T.resize(images / 255, [size, size], antialias=True)).abs().amax(1)[~cut]
    assert error.max() <= 0.51 / 255 and (side != size or error.max() < 1e-6)
    counts = torch.tensor([strength for _, strength in asked]).bincount()
    assert {n for n, _ in asked} == {2} and len(counts) == 31 and counts.min() > 3

@pytest.mark.parametrize("size", [32, 31, 5])
def test_strong_views_are_drawn_for_each_picture_and_the_seed_decides(size):
    def draw():
        torch.manual_seed(0)
        return R.strong_views(PICTURES[:1].repeat(40, 1, 1, 1), size)
    got = draw()
    assert got.dtype == torch.float32 and 0 <= got.min() and got.max() <= 1
    assert torch.equal(draw(), got) and len(got.unique(dim=0)) == 40 or size == 5

def test_blur_and_solarising_are_of_first_views_second_and_small_crops():
    noise = torch.randint(256, (60, 3, 64, 64), generator=torch.Generator().manual_seed(0)).byte()
    grey = torch.tensor([10, 120, 250])

    def three(images, **chances):
        r = built("--method dinov2 --crop-min 0.4")
        vars(r.a).update(chances, jitter=[0, 0, 0, 0])
        torch.manual_seed(0)
        return [*R.two_views(images, r.a), r.method.draw(images, 0)[0]]
    plain = three(noise)
    assert [v.shape for v in plain] == [(60, 3, 32, 32)] * 2 + [(120, 3, 16, 16)]
    for name, place in itertools.product(("blur", "solarize"), range(3)):
        for i, v in enumerate(three(noise, **{name: [float(j == place) for j in range(3)]})):
            smoother = v.diff(dim=-1).abs().mean() < 0.5 * plain[i].diff(dim=-1).abs().mean()
            assert smoother == (name == "blur" and i == place)
            assert (v.max() < 0.51) == (name == "solarize" and i == place)
    close(three(grey.byte().view(3, 1, 1, 1).expand(3, 3, 40, 40))[2].mean((1, 2, 3)) * 255,
          grey.repeat(2))

# ==== two processes ====

CASES = {"simclr": "--arch vit-tiny", "deepaug": "--arch vit-tiny --strong deepaug --rate 0",
         "mocov3": "--method mocov3", "online": "--method mocov3 --anchor online --rescue hardest",
         "dinov2": "--method dinov2 --centering centering", "sinkhorn": "--method dinov2"}

def alone(self, images, progress):
    """DINOv2.draw by the pictures alone: corners as small crops, the darker half masked."""
    x, patch = images / 255, self.a.patch
    dark = F.avg_pool2d(x.mean(1, keepdim=True), patch).flatten(1)
    mask = (dark < dark.median(1, keepdim=True).values + 1e-6).repeat(2, 1)
    places = mask.flatten().nonzero()[:, 0]
    local = torch.cat([x[:, :, :16, :16], x[:, :, 16:, 16:]])
    return local, mask, places, 1 / mask.sum(1)[places // mask.shape[1]], torch.tensor(0.05)

def trained(name, out):
    """The last state of six steps on views that depend on the pictures alone. BatchNorms' means are
    a process's own on the CPU: taken out."""
    def two_views(images, a):
        x = images / 255
        return x, torch.lerp(x, x.flip(3), x.mean((1, 2, 3), keepdim=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(R, "two_views", two_views)
        patch.setattr(R, "strong_views", lambda images, size: 1 - images / 255)
        patch.setattr(R.DINOv2, "draw", alone)
        a = one_run(BASE, "--batch-size 12 --k 4 --epochs 3 --optimizer sgd --lr 0.01", CASES[name])
        split = R.Split(32, torch.zeros(28), PICTURES[:28])
        r = R.build(a, split)
        for module in list(r.modules()):
            for child, m in module.named_children():
                if isinstance(m, NORM):
                    setattr(module, child, nn.Identity())
        out.mkdir(exist_ok=True)
        state = R.train(a, r, split, out, dict, None)
        return {k: state[k] for k in ("log", "model", "rescued")}

def one_of_two(rank, folder, words, port):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name in CASES:
        torch.save(trained(name, folder / name), folder / f"{name}{rank}.pt")
    dist.destroy_process_group()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_PORT=str(port),
                      MASTER_ADDR="127.0.0.1")  # as torchrun
    R.draw = lambda *_: None
    R.main(words)

def test_two_processes_give_the_losses_choices_and_weights_of_one(few, tmp_path):
    """Teacher and centres among them. Then a whole command line: one process writes."""
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    words = flags(few, SHORT, "--method mocov3 --k 4 --out", tmp_path / "run")
    children = [SERVER.Process(target=one_of_two, args=(r, tmp_path, words, port)) for r in (0, 1)]
    [child.start() for child in children]
    one = {name: trained(name, tmp_path / "one") for name in CASES}
    [child.join(120) for child in children]
    for (name, whole), rank in itertools.product(one.items(), (0, 1)):
        got = torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True)
        assert torch.equal(got["rescued"], whole["rescued"]) and whole["rescued"].sum() == 24, name
        for row, expected in zip(got["log"], whole["log"], strict=True):
            for k in ("loss", "base_loss", "similarity", "similarity_chosen", "similarity_strong"):
                assert row[k] == pytest.approx(expected[k], rel=1e-3, abs=1e-4), (name, k)
        for k, v in whole["model"].items():
            torch.testing.assert_close(got["model"][k], v, rtol=1e-4, atol=2e-6)
    assert [child.exitcode for child in children] == [0, 0]
    assert np.load(tmp_path / "run/rescued.npy").sum() == 8

# ==== whole runs ====

@pytest.fixture(scope="module")
def done(few, tmp_path_factory):
    """{method: a finished run of 12 steps}; tests change nothing in their folders."""
    root = tmp_path_factory.mktemp("done")
    for method, words in METHODS.items():
        R.main(flags(few, words, "--out", root / method))
    return {method: root / method for method in METHODS}

def live(run, data):
    """(the trained method of a run, in eval mode, weights at the start)"""
    a = one_run(flags(data, METHODS[run.name]))
    m = R.build(a, R.load_folder(a)[0]).method.requires_grad_(False).eval()
    start = copy.deepcopy(m.state_dict())
    m.load_state_dict(state_of(run)["model"])
    return m, start

@pytest.mark.parametrize("method", METHODS)
def test_the_run_folder_holds_what_the_design_says(done, method):
    run, report = done[method], report_of(done[method])
    assert {p.name for p in run.iterdir()} - {"compare.png"} == {
        "config.json", "checkpoint.pt", "metrics.csv", "encoder.pt", "weights.safetensors",
        "report.json", "samples.npz", "rescued.npy", "curves.png", "easy.png",
        *["model"] * (method == "dinov2")}
    assert all(np.array(Image.open(picture)).shape[1] > 150 for picture in run.glob("*.png"))
    assert json.loads((run / "config.json").read_text())["torch"] == torch.__version__
    lines = (run / "metrics.csv").read_text().splitlines()
    rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(lines)]
    assert [row["step"] for row in rows] == [*range(1, 13)] and rows[-1]["epoch"] == 2
    for step, row in enumerate(rows):
        assert row["lr"] == R.learning_rate(step, one_run(RUN, METHODS[method]), 6)
        gain = row["base_loss"] - row["loss"]
        assert gain == pytest.approx(0.5 * row["similarity_strong"], abs=1e-4)
        assert row["similarity"] < row["similarity_chosen"] <= 1 + 1e-6
        assert row["same_view"] == pytest.approx(1, abs=1e-4) and row["embedding_std"] > 0
    for group in state_of(run)["optimizer"]["param_groups"] if method == "dinov2" else ():
        assert group["lr"] == pytest.approx(rows[-1]["lr"] * group["scale"])
        rise = 1 + 9 * (1 - math.cos(math.pi * 11 / 12)) / 2  # tenfold in the end
        assert group["weight_decay"] == pytest.approx(0.04 * rise * group["decay"])
    rescued = np.load(run / "rescued.npy")
    assert len(rescued) == 216 and rescued.sum() == 12 * 3 and rescued.max() <= 2
    assert report["ever_rescued"] == pytest.approx(100 * (rescued > 0).mean())
    assert {"linear", "knn", "linear_untrained", "knn_untrained", "same_view", "similarity",
            "similarity_chosen", "similarity_strong", "seconds", "images_per_second"} <= {*report}
    assert report["steps"] == 12 and report["export_difference"] <= 1e-4
    assert [(p["epoch"], p["linear"]) for p in report["probes"]] == [
        (0, report["linear_untrained"]), (2, report["linear"])]

@pytest.mark.parametrize("method", METHODS)
def test_encoder_equals_the_live_network_and_names_its_layers(done, few, method):
    """At other batch sizes. All weights learnt, targets followed."""
    (m, start), extra = live(done[method], few), {"config.json": ""}
    net, names = m.kept, (VIT if method == "dinov2" else RESNET)[1:]
    assert net is (m.target if method == "dinov2" else m.online)
    encoder = torch.jit.load(done[method] / "encoder.pt", _extra_files=extra)
    config = json.loads(extra["config.json"])
    assert config["layers"] == names and config["image_size"] == 16
    assert config["layer_numbers"] == {name: l for l, name in enumerate(names)}
    assert config["measurements"]["linear"] == report_of(done[method])["linear"]
    for x in (torch.rand(n, 3, 16, 16) for n in (1, 2, 7, 64)):
        torch.testing.assert_close(encoder(x), net.features(x), rtol=1e-4, atol=1e-5)
        for got, name in zip(encoder.activations(x), names, strict=True):
            torch.testing.assert_close(got, net(x)[name], rtol=1e-4, atol=1e-5)
    for name, w in m.named_parameters():
        assert name == "target.backbone.embeddings.mask_token" or not torch.equal(w, start[name])
        if name.startswith("target."):
            assert not torch.equal(w, m.online.get_parameter(name.removeprefix("target.")))

@torch.no_grad()
def test_vit_weights_load_into_transformers_and_give_the_same_features_and_layers(done, few):
    run, x, (mean, std) = done["dinov2"], torch.rand(3, 3, 16, 16), R.IMAGENET
    net, encoder = transformers.AutoModel.from_pretrained(run / "model"), torch.jit.load(
        run / "encoder.pt")
    for weights in (net.state_dict(), load_file(run / "weights.safetensors")):
        net.load_state_dict(weights)
        out = net.eval()((x - mean.view(3, 1, 1)) / std.view(3, 1, 1), output_hidden_states=True)
        last = out.last_hidden_state
        expected = [*out.hidden_states, last, last[:, 0], last[:, 0]]
        for a, b in zip([*encoder.activations(x)[:7], encoder(x)], expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize("arch, size", [("resnet18", 32), ("resnet50", 64)])
def test_resnet_weights_load_into_torchvision_and_give_the_same_features(tmp_path, arch, size):
    """Only fc is missing; below 64 pixels the stem is 3x3 without max pooling. The backbone of a
    detection model takes those of a ResNet-50 whole."""
    a = one_run(BASE, f"--arch {arch}")
    net = R.Net(a, size).eval().requires_grad_(False)
    for m in net.modules():
        if isinstance(m, NORM):  # as after training
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    split = R.Split(size, torch.arange(2), PICTURES[:2])
    assert R.export(a, net, split, ["a", "b"], tmp_path, {}) <= 1e-4
    weights = load_file(tmp_path / "weights.safetensors")
    theirs = torchvision.models.get_model(arch)
    theirs.fc, x, (mean, std) = nn.Identity(), torch.rand(2, 3, size, size), R.IMAGENET
    if size < 64:
        theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    theirs.load_state_dict(weights)
    expected = theirs.eval()((x - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    torch.testing.assert_close(net.features(x), expected.detach(), rtol=1e-3, atol=1e-3)
    if arch == "resnet50":
        detector = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights_backbone=None)
        missing, unexpected = detector.backbone.body.load_state_dict(weights, strict=False)
        assert missing == unexpected == []

@pytest.mark.parametrize("method, layers", [("simclr", 7), ("dinov2", 8)])
def test_cka_and_vicreg_probe_read_the_encoders(done, tmp_path, monkeypatch, method, layers):
    [monkeypatch.setattr(script, "draw", lambda *_: None) for script in (cka, V)]
    encoder = str(done[method] / "encoder.pt")
    result = cka.main([encoder, "--numbered", "--out", str(tmp_path / "map.png")])
    assert np.shape(result["map"]) == (layers, layers)
    report = V.main(words_of("--device cpu --workers 0 --target-net none --sample-level 0 0 0 "
                             "--mine-steps 0 --probes ncc --probe-images 60 --encoder",
                             [encoder, "--out", tmp_path / "probes"]))
    assert 0 < report["ncc_test_class"] <= 100

def test_several_values_make_runs_and_a_table(few, tmp_path, capsys, monkeypatch, drawn):
    """Each once, none once for all k, all with k N; gain: over none of the same seed; the figure is
    by k. --compare gives the same table, counts a run once, and names what is no run."""
    out, ks = tmp_path / "out", {0: "none", 2: "topk", 4: "topk", 108: "all"}
    monkeypatch.setattr(R, "export", lambda *_: 0.0)
    last = itertools.cycle([0, 1])  # the first probe of a run is of the untrained network
    monkeypatch.setattr(R, "probe", lambda rescue, data, a: {
        "linear": float((k := a.k * next(last)) + a.seed), "knn": 2.0 * k})
    words = flags(few, SHORT, "--rescue none topk all --k 0 2 4 2 --seed 0 1 --out", out)
    table, printed = R.main(words), capsys.readouterr().out
    runs = [p for p in out.iterdir() if p.is_dir()]
    assert {p.name for p in runs} == {f"rescue-{ks[k]}-k-{k}-seed-{s}" for s in (0, 1) for k in ks}
    assert len(table) == 5 and table["untrained"]["linear"] == (0.5, pytest.approx(0.5 ** 0.5))
    for k in ks:
        [name] = [name for name in table if f"rescue {ks[k]}, k {k}," in name]
        gains = {"gain_linear": (k, 0), "gain_knn": (2 * k, 0)} if k else {}
        assert {g: v for g, v in table[name].items() if "gain" in g} == gains
        assert table[name]["linear"] == pytest.approx((k + 0.5, 0.5 ** 0.5))
        assert table[name]["knn"] == (2 * k, 0) and f"{k + 0.5:.2f} ± 0.71" in printed
    lines = drawn[-1][1]["linear by k, test %"].values()
    assert {p[:2] for line in lines for p in line} == {(str(k), k + 0.5) for k in ks}
    (out / "bad").mkdir()
    (out / "bad/report.json").write_text('{"script": "simclr_deepaug"}')
    assert R.main(["--compare", str(out), shutil.copytree(runs[0], f"{out}/again")]) == table
    assert "bad/report.json: left out" in capsys.readouterr().out
    monkeypatch.setattr(R, "train", None)  # finished: nothing is trained again
    assert R.main([*words, "--resume"]) == table

def test_a_streamed_folder_without_labels_gives_the_same_bits(few, tmp_path, monkeypatch, capsys):
    """--iterations are the steps of an epoch. A broken picture is named; probing changes no bit."""
    flat, load, states = tmp_path / "flat", R.load_folder, []
    flat.mkdir()
    for file in few.rglob("*0.png"):
        shutil.copy(file, flat / f"{file.parent.name}{file.name}")
    (flat / "broken.png").write_text("no picture")
    for name, every, epochs in (("memory", 0, [0, 2]), ("streamed", 1, [0, 1, 2])):
        report = R.main(flags(flat, "--method mocov3 --batch-size 6 --iterations 2 --out",
                              tmp_path / name, "--probe-every", [every]))
        assert report["steps"] == 4 and report["broken"] == 1
        assert report["probes"] == [{"epoch": e} for e in epochs]
        assert "broken.png" in capsys.readouterr().out
        states.append(state_of(report["flags"]["out"]))
        monkeypatch.setattr(R, "load_folder", lambda a: [
            vars(part).update(images=None) or part for part in load(a)[:2]] + [[]])
    assert all(same_bits(*(state[k] for state in states)) for k in ("model", "rescued"))
    assert [row["epoch"] for row in states[0]["log"]] == [0.5, 1, 1.5, 2]
    assert [*R.main(["--compare", str(tmp_path / "memory")])] == ["untrained", "rescue topk"]

class Colours(torch.utils.data.Dataset):
    """In place of torchvision's: black and white, some training pictures with a wrong label."""
    def __init__(self, root, part, transform, download):
        self.training, self.transform = part not in (False, "test"), transform
        self.classes = {"train": [0], "val": [1]}.get(part, [0, 1]) * 20

    def __len__(self):
        return len(self.classes)

    def __getitem__(self, i):
        x = Image.new("RGB" if i % 2 else "L", (40, 30), ["black", "white"][self.classes[i]])
        return self.transform(x), self.classes[i] ^ (self.training and i % 9 == 0)

def test_transfer_probes_what_is_there_and_names_what_is_not(few, tmp_path, monkeypatch, capsys):
    """All training parts are learnt from, the last one is measured."""
    monkeypatch.chdir(tmp_path)
    for name in ("CIFAR10", "DTD"):
        monkeypatch.setattr(torchvision.datasets, name, Colours)
    report = R.main(flags(few, SHORT, "--out run --transfer CIFAR10 DTD OxfordIIITPet CIFAR100"))
    found, out = {k: v for k, v in report.items() if "transfer_" in k}, capsys.readouterr().out
    assert found == {"transfer_CIFAR10": 100, "transfer_DTD": 100} and out.count("skipped") == 2
    assert all(f"--transfer {n}: skipped" in out for n in ("CIFAR100", "OxfordIIITPet"))

def assert_same_run(out, other):
    """Weights, centres, optimizer, counts and all measurements are equal to the last bit."""
    a, b = state_of(out), state_of(other)
    for part in ("step", "model", "optimizer", "rescued", "probes"):
        assert same_bits(a[part], b[part]), part
    for x, y in zip(a["log"], b["log"], strict=True):
        assert {**x, "images_per_second": 0} == {**y, "images_per_second": 0}

@pytest.mark.parametrize("method, step", [("simclr", 9), ("dinov2", 2)])
def test_ctrl_c_prints_what_goes_on_to_the_same_bits(few, done, tmp_path, monkeypatch, capsys,
                                                     method, step):
    """The clock makes every step a minute: a checkpoint each."""
    out, calls, clock = tmp_path / "a run", itertools.count(1), itertools.count(0, 61)
    def interrupted(*args, views=R.two_views):
        if next(calls) == step:
            raise KeyboardInterrupt
        return views(*args)
    with monkeypatch.context() as patch:
        patch.setattr(R, "two_views", interrupted)
        patch.setattr(time, "time", lambda: next(clock))
        with pytest.raises(SystemExit) as end:
            R.main(flags(few, METHODS[method], "--out", out))
    half, words = state_of(out), shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert end.value.code == 130 and half["step"] == step - 1 and words[0] == "python"
    R.main(words[2:])
    assert_same_run(out, done[method])
    if method == "dinov2":  # its prototypes rest at first
        start = live(done[method], few)[1]
        for k in ("prototypes.parametrizations.weight.original1", "online.head.4.weight"):
            assert torch.equal(half["model"][k], start[k]) == k.startswith("prototypes")

def killed(words):
    clock = itertools.count(0, 61)
    time.time = lambda: next(clock)
    R.main(words)

def test_killed_it_ends_with_the_same_bits(few, done, tmp_path, monkeypatch):
    """And a finished run is not trained again."""
    words, out = flags(few, METHODS["mocov3"], "--resume --out", tmp_path / "run"), tmp_path / "run"
    for least in (1, 5):
        child = SERVER.Process(target=killed, args=(words,))
        child.start()
        while child.is_alive() and not ((out / "checkpoint.pt").exists()
                                        and state_of(out)["step"] >= least):
            time.sleep(0.005)
        child.kill()
        child.join()
    assert state_of(out)["step"] >= 5 and not (out / "report.json").exists()
    R.main(words)
    assert_same_run(out, done["mocov3"])
    monkeypatch.setattr(R, "train", None)
    assert R.main(words) == report_of(out)

@pytest.mark.parametrize("fails_at", [1, 9])
def test_a_loss_that_is_not_finite_stops_the_run(few, tmp_path, capsys, monkeypatch, fails_at):
    """The step is named; the checkpoint from before it is kept."""
    factors, views = itertools.chain([1] * (fails_at - 1), itertools.repeat(math.nan)), R.two_views
    monkeypatch.setattr(R, "two_views", lambda *a: torch.stack(views(*a)) * next(factors))
    with pytest.raises(SystemExit, match="2"):
        R.main(flags(few, "--probe-every 1 --out", tmp_path / "run"))
    state = state_of(tmp_path / "run")
    assert re.search(rf"error: .*step {fails_at}\b.*--lr", capsys.readouterr().err)
    assert state["step"] == fails_at // 6 * 6
    assert all(v.isfinite().all() for v in state["model"].values())

@pytest.mark.parametrize("words, epochs, batch, lr, k, k_by_s", [
    ("", 1000, 4096, 4.8, 128, 64), ("--method mocov3", 800, 4096, 4.8, 64, 64),
    ("--method mocov3 --arch vit-s", 300, 4096, 0.0024, 64, 64),
    ("--method dinov2", 100, 2048, 0.004 * 2 ** 0.5, 16, 32)])
def test_preset_paper_is_section_4_and_a_flag_beside_it_wins(words, epochs, batch, lr, k, k_by_s):
    words = ["--preset", "paper", "--data-dir", "x", *words.split()]
    a = R.settings(words)
    assert (a.epochs, a.batch_size, a.k, a.image_size) == (epochs, batch, [k], 224)
    assert a.lr == pytest.approx(lr) and a.dataset == "folder"
    assert a.optimizer == ("lars" if a.arch == "resnet50" else "adamw")
    assert a.iterations == (125 if a.method == "dinov2" else 0)
    for more, expected in (("--s 0.1 1", k_by_s), ("--batch-size 2", 1),
                           ("--batch-size 512", k * 512 // batch)):
        assert R.settings([*words, *more.split()]).k == [expected]
    b = R.settings([*words, *"--lr 1 --k 7 --epochs 3 --blur 0 0 0.3".split()])
    assert (b.lr, b.k, b.epochs, b.blur) == (1, [7], 3, [0, 0, 0.3]) and b.arch == a.arch

@pytest.mark.parametrize("words", ["", "--method dinov2", "--method mocov3 --preset cifar"])
def test_help_shows_the_defaults_of_this_command_line(capsys, monkeypatch, words):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit, match="0"):
        R.main([*words.split(), "--help"])
    text, a = capsys.readouterr().out, R.settings(words.split())
    for name in ("lr", "arch", "temperature", "optimizer", "projector", "s", "prototypes"):
        line = re.search(rf"^  --{name} .*(\n {{3,}}.*)*", text, re.M)[0]
        assert f"(default: {getattr(a, name)})" in line, name

@pytest.mark.parametrize("words, says", [
    ("--layer 7", "--layer 7 -1 6 small"), ("--layer 4 none", "none"), ("--layer x", "--layer x"),
    ("--method dinov2 --layer 8", "--layer 8 7 vit-tiny"), ("--k 33", "--k 32"), ("--k 1.5", "--k"),
    ("--strong deepaug --layer none", "deepaug --layer"), ("--k -1", "--k"), ("--s nan", "--s"),
    ("--method dinov2 --strong deepaug --layer 1+7", "DINOv2 head"), ("--data-dir=", "--data-dir"),
    ("--rescue easiest", "--rescue hardest"), ("--rate 1", "--rate"), ("--sample 0", "--sample"),
    ("--method dinov2 --arch small", "dinov2 vit-tiny"), ("--batch-size 1", "--batch-size"),
    ("--method dinov2 --patch 32", "--patch 32"), ("--transfer imagenet", "--transfer"),
    ("--method mocov3 --arch vit-tiny --patch 5", "--patch 5 16"), ("--lr 0", "--lr"),
    ("--batch-size 217", "--batch-size 216"), ("--iterations 7", "--iterations 216"),
    ("--learning-speed 3", "--learning-speed --help"), ("--resume", "--resume --out"),
    ("--data-dir nowhere", "nowhere no such folder"), ("--data-dir empty", "empty"),
    ("--data-dir text", "text"), ("--data-dir broken", "broken"), ("--out run", "run --resume"),
    ("--dataset cifar100 --data-dir empty", "cifar100 empty cannot be downloaded"),
    ("--compare nowhere", "no finished run"), ("--out text", "text --resume"),
    ("--out text --resume", "text"), ("--out text/a.txt", "a.txt"),
    *((f"--batch-size 36 --out run --resume {change}", f"other flags {change.split()[0][2:]}") for
      change in ("--k 4", "--s 2", "--rescue random", "--seed 5", "--anchor online", "--lr 0.3",
                 "--strong deepaug", "--layer 3", "--epochs 9"))])
def test_bad_input_is_one_line_and_nothing_is_written(refused, few, done, tmp_path, monkeypatch,
                                                      words, says):
    """Exit code 2, no new file, no change to what is there; refused() looks."""
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "text", "broken"):
        Path(name).mkdir()
    Path("text/a.txt").write_text("no picture")
    Path("broken/1.png").write_bytes(b"\x89PNG\r\n\x1a\nnot much more")
    Path("few").symlink_to(few)
    Path("run").symlink_to(done["simclr"])
    line = refused(flags("few", "--batch-size 32", words))
    assert all(part in line for part in says.split())

def test_a_preset_without_pictures_and_an_uneven_share_of_processes(refused, monkeypatch):
    assert "--data-dir" in refused(["--preset", "paper"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    for words in ("--k 3 --batch-size 32", "--k 2 --batch-size 33", "--k 2 --batch-size 2"):
        assert "--batch-size, --k: multiples of 2" in refused(words.split())

def test_damaged_foreign_and_dangerous_checkpoints(refused, few, done, tmp_path, monkeypatch):
    """The file is kept, none of its code runs: it would write a file."""
    monkeypatch.chdir(tmp_path)
    file = shutil.copytree(done["simclr"], Path("half")) / "checkpoint.pt"
    whole, state = file.read_bytes(), state_of("half")
    for content in (whole[:len(whole) // 2], b"", bytes(len(whole)), [1, 2], Trap(),
                    {**state, "model": Trap()}, {**state, "script": "simclr_deepaug"}):
        file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
        before = file.read_bytes()
        line = refused(flags(few, "--resume --out half"))
        assert "checkpoint.pt" in line and ("damaged" in line or "simclr_deepaug" in line)
        assert file.read_bytes() == before

def test_without_epochs_the_untrained_network_is_probed(few, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = R.main(flags(few, "--epochs 0"))
    [out] = Path("runs").iterdir()
    assert re.fullmatch(r"topk_rescue-\d{8}-\d{6}", out.name) and report["steps"] == 0
    assert report["linear"] == report["linear_untrained"] and (out / "encoder.pt").exists()

def test_a_compiled_step_is_the_plain_one():
    _, numbers, chosen, gradients = one_step("--method mocov3", control=True)
    r = built("--method mocov3")
    r.method.compile(backend="eager")
    r.student = torch.compile(r.student, backend="eager")
    torch.manual_seed(5)
    loss, got, *_, got_chosen = r(PICTURES[:8], 0.2, True)
    loss.backward()
    assert torch.equal(got_chosen, chosen)
    [close(got[k], v) for k, v in numbers.items()]
    [close(r.get_parameter(name).grad, grad, floor=1e-4) for name, grad in gradients.items()]
