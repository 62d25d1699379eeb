"""topk_rescue.py: every formula against a slow one in float64, gradients too; strong views; whole
runs, two processes, presets, and its own bad input. test_copies.py has what all scripts share."""
import copy
import csv
import itertools
import json
import math
import re
import shutil
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
from conftest import clock, report_of, same_bits, state_of
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torchvision.transforms.v2 import functional as T

import cka
import topk_rescue as R
import vicreg_probe as V

SCRIPT = R
NORM = nn.modules.batchnorm._BatchNorm
PICTURES = R.draw_shapes(64, 0, "cpu")[0]
SPLIT = R.Split(32, torch.zeros(64), PICTURES)
BASE = ("--workers 0 --device cpu --rescue topk --k 3 --s 0.5 --projector 16 8 --prototypes 24 "
        "--local-crops 2 --batch-size 36")
RUN = f"{BASE} --image-size 16 --epochs 2"  # six steps an epoch on the 216 pictures of `few`
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

def one_step(*words, control=False, norms=True):
    """(Rescue after a step, numbers, chosen, gradients). norms False: BatchNorms are in eval mode,
    for through a batch's mean and variance all rows touch all layers."""
    r = built(*words)
    for m in (m for m in r.modules() if isinstance(m, NORM)):
        m.train(norms)
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
    none, zero, every, all_, one = (one_step(*words, more) for more in (
        "--rescue none", "--s 0", "--k 8", "--rescue all", ""))
    seen = one_step(*words, control=True)
    assert seen[1].pop("same_view") == pytest.approx(1, abs=1e-4)
    for a, b, parts in (none, zero, (3,)), (one, seen, (1, 2, 3)), (every, all_, (1, 2, 3)):
        assert same_bits(dict(a[0].state_dict()), dict(b[0].state_dict()))
        assert all(same_bits(a[i], b[i]) for i in parts)
    assert every[2].tolist() == [*range(8)] and {*none[1]} == {"loss", "base_loss", "similarity"}
    assert zero[1]["loss"] == none[1]["loss"] and not same_bits(one[3], none[3])

def test_random_pairs_are_chosen_equally_often():
    torch.manual_seed(0)
    chosen = torch.stack([R.choose(torch.ones(6), "random", 2) for _ in range(600)])
    assert (chosen[:, 0] < chosen[:, 1]).all()
    assert (chosen.flatten().bincount(minlength=6) / 600 - 1 / 3).abs().max() < 0.07

RESNET = ["input", "stem", *(f"layer{i}" for i in range(1, 5)), "avgpool", "head"]
VIT = ["input", "embed", *(f"block{i}" for i in range(1, 5)), "norm", "cls", "head"]

def number_of(parameter, names):
    """The layer of backbone.layer2.0.conv1.weight, ...; 99: of none."""
    block = re.search(r"encoder\.layer\.(\d+)|backbone\.layer(\d+)", parameter)
    if block:
        return int(block[1]) + 1 if block[1] else int(block[2])
    parts = {"stem": 0, "embeddings": 0, "layernorm": 5, "online.head": len(names) - 2}
    return next((l for part, l in parts.items() if part in parameter), 99)

@pytest.mark.parametrize("arch, names", [("small", RESNET), ("vit-tiny", VIT)])
def test_deep_augmentation_sits_where_the_numbers_say(arch, names):
    """Rows change from this layer on, others never; with stop-gradient the rescue term reaches what
    lies above, without it everything."""
    rows, base = torch.arange(8) % 3 > 0, f"--method mocov3 --s 10 --batch-size 8 --arch {arch}"
    images, none = PICTURES[:8] / 255, one_step(base, "--rescue none", norms=False)[3]
    for layer in range(-1, len(names) - 1):
        deep = f"{base} --strong deepaug --layer {layer}"
        net = built(deep).method.online.eval()
        clean = net(images)
        torch.manual_seed(0)
        got = net(images, rows)
        assert [*clean] == names
        for l, name in enumerate(names, -1):
            changed = (got[name] != clean[name]).flatten(1).any(1)
            assert torch.equal(changed, rows & (l >= layer)), name
        for stop in ("--stop-grad", "--no-stop-grad"):
            for name, grad in one_step(deep, stop, norms=False)[3].items():
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

@pytest.mark.parametrize("side, crops", [(1, 2), (2, 4), (4, 6), (16, 40)])
def test_half_of_the_crops_are_masked_by_a_tenth_to_a_half_in_blocks(side, crops):
    """In equal steps, so that the number of all patches is always the same; which crops: drawn.
    Borders are far shorter than those of patches strewn at random; no side is preferred."""
    torch.manual_seed(0)
    masks, n = [], crops // 2
    steps = [int((0.1 + 0.4 * (i + 0.5) / n) * side ** 2) for i in range(n)]
    for _ in range(100):
        mask, places, weights = R.draw_masks(crops, side, "cpu")
        counts = mask.sum(1).tolist()
        assert sorted(counts) == [0] * n + [max(1, c) for c in steps]
        assert places.tolist() == mask.flatten().nonzero()[:, 0].tolist()
        assert weights.tolist() == pytest.approx([1 / counts[i // side ** 2] for i in places])
        masks.append(mask)
    often, mask = sum(m.any(1).int() for m in masks), torch.cat(masks)
    assert 20 < often.min() and often.max() < 80
    if side == 16:
        strewn = torch.rand(mask.shape).argsort(1).argsort(1) < mask.sum(1, keepdim=True)
        mask, strewn = (m.view(-1, 16, 16) for m in (mask, strewn))
        mine, other = (sum(m.int().diff(dim=d).abs().sum() for d in (1, 2)) for m in (mask, strewn))
        assert mine < 0.35 * other
        for part in (mask[:, :8], mask[:, 8:], mask.mT[:, :8]):
            assert part.float().mean() / mask.float().mean() == pytest.approx(1, abs=0.05)

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

def test_dinov2s_learning_rates_fall_from_the_head_down_and_vectors_do_not_decay():
    """By .9 a block, .2 of that for the patch projection."""
    r = built("--method dinov2")
    of = {id(p): g for g in R.parameter_groups(r.a, r.method) for p in g["params"]}
    for name, p in r.method.named_parameters():
        if p.requires_grad:
            group, depth = of[id(p)], min(5, number_of(name, VIT))
            patch = 0.2 if "patch_embeddings" in name else 1
            assert group["scale"] == pytest.approx(0.9 ** (5 - depth) * patch), name
            vector = name.endswith("bias") or "norm" in name.split("param")[0] or "lambda1" in name
            assert (group["decay"], group["last"]) == (not vector, name.startswith("proto")), name

# ==== views ====

@pytest.mark.parametrize("side, size", [(33, 33), (40, 32), (20, 7)])
def test_strong_views_are_grey_squares_on_randaugmented_pictures(monkeypatch, side, size):
    """Two operations, strengths 0 to 30; then half the side is grey, in any place. Pictures of
    other sizes are resized. (Here the operations leave the pictures as they are.)"""
    views, asked = R.strong_views(PICTURES[:1].expand(40, 3, 32, 32), 32), []
    assert len(views.unique(dim=0)) == 40 and 0 <= views.min() and views.max() <= 1
    monkeypatch.setattr(R.v2, "RandAugment", lambda *how: asked.append(how) or nn.Identity())
    torch.manual_seed(0)
    images = T.resize(PICTURES.repeat(8, 1, 1, 1), [side, side])
    got = R.strong_views(images, size)
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

@pytest.mark.parametrize("place", range(3))
def test_blur_and_solarising_are_of_first_views_second_and_small_crops(place):
    noise = torch.randint(256, (60, 3, 64, 64), generator=torch.Generator().manual_seed(0)).byte()
    r, one = built("--method dinov2 --crop-min 0.4"), [float(i == place) for i in range(3)]

    def three(**chances):
        vars(r.a).update({"blur": [0] * 3, "solarize": [0] * 3, "jitter": [0] * 4, **chances})
        torch.manual_seed(0)
        return [*R.two_views(noise, r.a), r.method.draw(noise, 0)[0]]
    plain, blurred, inverted = three(), three(blur=one), three(solarize=one)
    assert [v.shape for v in plain] == [(60, 3, 32, 32)] * 2 + [(120, 3, 16, 16)]
    for i in range(3):
        rough = [views[i].diff(dim=-1).abs().mean() for views in (plain, blurred)]
        assert (rough[1] < 0.5 * rough[0]) == (inverted[i].max() < 0.51) == (i == place)

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
    """Four steps on views that depend on the pictures alone. BatchNorms' means are a process's own
    on the CPU: taken out."""
    def two_views(images, a):
        x = images / 255
        return x, torch.lerp(x, x.flip(3), x.mean((1, 2, 3), keepdim=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(R, "two_views", two_views)
        patch.setattr(R, "strong_views", lambda images, size: 1 - images / 255)
        patch.setattr(R.DINOv2, "draw", alone)
        a = one_run(BASE, "--batch-size 12 --k 4 --epochs 2 --optimizer sgd --lr 0.01", CASES[name])
        split = R.Split(32, torch.zeros(28), PICTURES[:28])
        r = R.build(a, split)
        for module in list(r.modules()):
            for child, m in module.named_children():
                if isinstance(m, NORM):
                    setattr(module, child, nn.Identity())
        out.mkdir(exist_ok=True)
        state = R.train(a, r, split, out, dict, None)
        return {k: state[k] for k in ("log", "model", "rescued")}

def one_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name in CASES:
        torch.save(trained(name, folder / name), folder / f"{name}{rank}.pt")
    dist.destroy_process_group()

def test_two_processes_give_the_losses_choices_and_weights_of_one(processes, tmp_path):
    """Teacher and centres among them."""
    children = [processes(target=one_of_two, args=(rank, tmp_path), daemon=True)
                for rank in (0, 1)]
    [child.start() for child in children]
    one = {name: trained(name, tmp_path / "one") for name in CASES}
    [child.join(120) for child in children]
    for (name, whole), rank in itertools.product(one.items(), (0, 1)):
        got = torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True)
        assert torch.equal(got["rescued"], whole["rescued"]) and whole["rescued"].sum() == 16, name
        for row, expected in zip(got["log"], whole["log"], strict=True):
            for k in ("loss", "base_loss", "similarity", "similarity_chosen", "similarity_strong"):
                assert row[k] == pytest.approx(expected[k], rel=1e-3, abs=1e-4), (name, k)
        for k, v in whole["model"].items():
            torch.testing.assert_close(got["model"][k], v, rtol=1e-4, atol=2e-6)

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
    assert report["same_view"] == min(row["same_view"] for row in rows)
    assert {k: report[k] for k in ("steps", "similarity", "knn_untrained", "linear")} == {
        "steps": 12, "similarity": rows[-1]["similarity"],
        "knn_untrained": report["probes"][0]["knn"], "linear": report["probes"][1]["linear"]}

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

@pytest.mark.parametrize("arch, size", [("resnet18", 32), ("resnet50", 64), ("vit-tiny", 32)])
@torch.no_grad()
def test_weights_load_into_torchvision_or_transformers_and_give_the_same_features(
        tmp_path, arch, size):
    """Of a ResNet only fc is missing; below 64 pixels its stem is 3x3 without max pooling. The
    backbone of a detection model takes a ResNet-50's whole."""
    net = R.Net(one_run(BASE, f"--arch {arch} --patch 8"), size).eval()
    for m in net.modules():
        if isinstance(m, NORM):  # as after training
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    R.export(one_run(BASE), net, R.Split(size, torch.zeros(2), PICTURES[:2]), [], tmp_path, {})
    weights, (mean, std) = load_file(tmp_path / "weights.safetensors"), R.IMAGENET
    x = torch.rand(2, 3, size, size)
    normal, got = (x - mean.view(3, 1, 1)) / std.view(3, 1, 1), [net.features(x)]
    if net.vit:
        theirs = transformers.AutoModel.from_pretrained(tmp_path / "model").eval()
        assert same_bits(dict(theirs.state_dict()), weights)
        out = theirs(normal, output_hidden_states=True)
        got += [v for name, v in net(x).items() if name not in ("input", "cls", "head")]
        expected = out.last_hidden_state[:, 0], *out.hidden_states, out.last_hidden_state
    else:
        theirs = torchvision.models.get_model(arch)
        theirs.fc = nn.Identity()
        if size < 64:
            theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
        theirs.load_state_dict(weights)
        expected = [theirs.eval()(normal)]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    if arch == "resnet50":
        detector = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights_backbone=None)
        missing, unexpected = detector.backbone.body.load_state_dict(weights, strict=False)
        assert missing == unexpected == []

@pytest.mark.parametrize("method", ["simclr", "dinov2"])
def test_cka_and_vicreg_probe_read_the_encoders(done, tmp_path, monkeypatch, method):
    [monkeypatch.setattr(script, "draw", lambda *_: None) for script in (cka, V)]
    words = [done[method] / "encoder.pt", "--out", tmp_path / "x"]
    layers = (VIT if method == "dinov2" else RESNET)[1:]
    assert cka.main(words_of(words, "--numbered"))["names_a"] == layers
    assert 0 < V.main(words_of("--encoder", words, "--device cpu --workers 0 --target-net none "
                               "--sample-level 0 0 0 --mine-steps 0 --probes ncc "
                               "--probe-images 60"))["ncc_test_class"] <= 100

def test_several_values_make_runs_and_a_table(few, tmp_path, capsys, monkeypatch, drawn):
    """Each once, none once for all k, all with k N; gain: over none of the same seed; the figure is
    by k. --compare gives the same table, counts a run once, and names what is no run."""
    out, ks = tmp_path / "out", {0: "none", 2: "topk", 4: "topk", 108: "all"}
    monkeypatch.setattr(R, "export", lambda *_: 0.0)
    last = itertools.cycle([0, 1])  # the first probe of a run is of the untrained network
    monkeypatch.setattr(R, "probe", lambda rescue, data, a: {
        "linear": float((k := a.k * next(last)) + a.seed), "knn": 2.0 * k})
    words = flags(few, "--epochs 1 --batch-size 108 --k 0 2 4 2 --seed 0 1",
                  "--rescue none topk all --out", out)
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

def test_a_streamed_folder_without_labels_gives_the_same_bits(few, tmp_path, monkeypatch, capsys):
    """--iterations are the steps of an epoch. A broken picture is named; probing changes no bit."""
    flat, load, states = tmp_path / "flat", R.load_folder, []
    flat.mkdir()
    [shutil.copy(file, flat / f"{file.parent.name}{file.name}") for file in few.rglob("*0.png")]
    (flat / "broken.png").write_text("no picture")
    for name, every, epochs in (("memory", 0, [0, 2]), ("streamed", 1, [0, 1, 2])):
        report = R.main(flags(flat, "--method mocov3 --batch-size 6 --iterations 2 --out",
                              tmp_path / name, f"--probe-every {every}"))
        assert report["steps"] == 4 and report["broken"] == 1
        assert report["probes"] == [{"epoch": e} for e in epochs]
        assert "broken.png" in capsys.readouterr().out
        states.append(state_of(tmp_path / name))
        monkeypatch.setattr(R, "load_folder", lambda a: [
            vars(part).update(images=None) or part for part in load(a)[:2]] + [[]])
    assert all(same_bits(*(state[k] for state in states)) for k in ("model", "rescued"))
    assert [row["epoch"] for row in states[0]["log"]] == [0.5, 1, 1.5, 2]
    assert [*R.main(["--compare", str(tmp_path / "memory")])] == ["untrained", "rescue topk"]

def colours(root, part, transform, download):
    """In place of torchvision's: black and white, some training pictures with a wrong label."""
    classes, training = {"train": [0], "val": [1]}.get(part, [0, 1]) * 20, part not in (0, "test")
    pictures = [Image.new("RGB" if i % 2 else "L", (40, 30), ["black", "white"][c])
                for i, c in enumerate(classes)]
    return [(transform(x), c ^ (training and i % 9 == 0))
            for i, (x, c) in enumerate(zip(pictures, classes))]

def test_transfer_probes_what_is_there_and_names_what_is_not(few, tmp_path, monkeypatch, capsys):
    """All training parts are learnt from, the last one is measured."""
    monkeypatch.chdir(tmp_path)
    for name in ("CIFAR10", "DTD"):
        monkeypatch.setattr(torchvision.datasets, name, colours)
    sets = "--transfer CIFAR10 DTD OxfordIIITPet CIFAR100"
    report = R.main(flags(few, "--epochs 0 --out run", sets))
    found, out = {k: v for k, v in report.items() if "transfer_" in k}, capsys.readouterr().out
    assert found == {"transfer_CIFAR10": 100, "transfer_DTD": 100} and out.count("skipped") == 2
    assert all(f"--transfer {n}: skipped" in out for n in ("CIFAR100", "OxfordIIITPet"))

def test_dinov2_goes_on_with_the_same_bits(few, done, tmp_path, monkeypatch):
    """Teacher, centres and optimizer. Stopped after the first step, in which prototypes rest."""
    def ctrl_c():
        raise KeyboardInterrupt
    words = METHODS["dinov2"], "--out", [tmp_path]
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(time, "time", clock(7, ctrl_c))
        R.main(flags(few, *words))
    half, start = state_of(tmp_path), live(done["dinov2"], few)[1]
    assert half["step"] == 1
    for name in ("prototypes.parametrizations.weight.original1", "online.head.4.weight"):
        assert torch.equal(half["model"][name], start[name]) == name.startswith("prototypes")
    R.main(flags(few, *words, "--resume"))
    a, b = state_of(tmp_path), state_of(done["dinov2"])
    for part in ("step", "model", "optimizer", "rescued", "probes"):
        assert same_bits(a[part], b[part]), part
    assert [row["loss"] for row in a["log"]] == [row["loss"] for row in b["log"]]

@pytest.mark.parametrize("words, epochs, batch, lr, k, k_by_s", [
    ("", 1000, 4096, 4.8, 128, 64), ("--method mocov3", 800, 4096, 4.8, 64, 64),
    ("--method mocov3 --arch vit-s", 300, 4096, 0.0024, 64, 64),
    ("--method dinov2", 100, 2048, 0.004 * 2 ** 0.5, 16, 32)])
def test_preset_paper_is_section_4_and_a_flag_beside_it_wins(
        words, epochs, batch, lr, k, k_by_s, monkeypatch, capsys):
    """--help shows these defaults."""
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
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit, match="0"):
        R.main([*words, "--help"])
    helps = capsys.readouterr().out.split("\n  --")
    for name in ("lr", "temperature", "optimizer", "projector", "s", "prototypes"):
        [text] = [text for text in helps if text.startswith(f"{name} ")]
        assert f"(default: {getattr(a, name)})" in text

@pytest.mark.parametrize("words, says", [
    ("--layer 7", "--layer 7 -1 6 small"), ("--method dinov2 --layer 8", "--layer 8 7 vit-tiny"),
    ("--k 33", "--k 32"), ("--k -1", "--k"), ("--s nan", "--s"), ("torchrun --k 3", "--k 2"),
    ("--strong deepaug --layer none", "deepaug --layer"), ("--rescue easiest", "--rescue hardest"),
    ("--method dinov2 --strong deepaug --layer 1+7", "DINOv2 head"), ("--data-dir=", "--data-dir"),
    ("--method dinov2 --arch small", "dinov2 vit-tiny"), ("--iterations 7", "--iterations 216"),
    ("--method dinov2 --patch 32", "--patch 32"), ("--transfer imagenet", "--transfer"),
    ("--method mocov3 --arch vit-tiny --patch 5", "--patch 5 16"), ("--data-dir broken", "broken"),
    ("--dataset cifar100 --data-dir .", "cifar100 cannot be downloaded"),
    ("--batch-size 36 --out run --resume --k 4 --s 2 --rescue random --anchor online --layer 3 "
     "--strong deepaug", "other flags k is s is rescue is anchor is layer is strong is")])
def test_bad_input_is_one_line_and_nothing_is_written(refused, few, done, tmp_path, monkeypatch,
                                                      words, says):
    """Exit code 2, no new file; refused() looks."""
    monkeypatch.chdir(tmp_path)
    Path("broken").mkdir()
    Path("broken/1.png").write_bytes(b"\x89PNG\r\n\x1a\nnot much more")
    Path("run").symlink_to(done["simclr"])
    if words.startswith("torchrun"):
        monkeypatch.setenv("WORLD_SIZE", "2")
    line = refused(flags(few, "--batch-size 32", words.removeprefix("torchrun")))
    assert all(part in line for part in says.split())
