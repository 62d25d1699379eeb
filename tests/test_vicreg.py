"""vicreg_probe.py: its loss, SVM, clusters and information against slow forms, network and views
against torchvision, what probes measure, whole runs, what bad input gets."""
import csv
import itertools
import json
import math
import pickle
import re
import shutil
import statistics
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from conftest import Trap, report_of, same_bits, state_of
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional as T

import simclr_deepaug as S
import vicreg_probe as V

SCRIPT = V
ROWS = torch.tensor([True, False, True, True, False, False, True, False])  # two views of four
BASE = ("--workers 0 --device cpu --image-size 16 --batch-size 36 --epochs 2 --arch RES-2-8 "
        "--projector 16 12 --layer 1 --sample-level 6 4 2 --target-net RES-1-8 --target-epochs 2 "
        "--target-stages 3 --mine-steps 5 --probe-epochs 1")  # six steps an epoch
CHEAP = "--sample-level 0 0 0 --target-net none --mine-steps 0 --probes ncc --probe-epochs 0"
SHORT = f"--epochs 1 --batch-size 108 --layer none {CHEAP}"  # two steps

@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """Figures take most of a small run: [(path, what would be on it)]. `done` really has some."""
    pages = []
    for script, name in ((V, "draw"), (V, "draw_maps"), (S, "draw")):
        monkeypatch.setattr(script, name, lambda *page: pages.append(page))
    return pages

def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

def integers(below, *shape, seed=0):
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))

def flags(data, *more):
    """A run on the 240 pictures of `few`. Texts in `more` are split into words, paths are not."""
    words = [w for m in (BASE, *more) for w in (m.split() if isinstance(m, str) else [str(m)])]
    return ["--data-dir", str(data), *words]

def one_run(words):
    """The settings of a command line with one value of everything."""
    a = V.settings(words.split() if isinstance(words, str) else words)
    for name in V.RUNS:
        setattr(a, name, getattr(a, name)[0])
    a.views = a.views or ("none" if a.objective == "supervised" else "simclr")
    a.lr = a.lr or 0.1
    return a

def load(data, *more):
    """(settings, (training pictures, test pictures, classes))"""
    a = one_run(flags(data, *more))
    return a, V.load_data(a.dataset, a)

def by_key(rows):
    table = {(r["epoch"], r["layer"], r["target"]): r for r in rows}
    assert len(table) == len(rows), "two rows of the same epoch, layer and target"
    return table

# ==== the loss ====

def slow_vicreg(z1, z2):
    """main_vicreg.py:194-219 entry by entry, in float64."""
    (n, d), z1, z2 = z1.shape, z1.double(), z2.double()
    invariance = sum((z1[i, j] - z2[i, j]) ** 2 / (n * d) for i in range(n) for j in range(d))
    variance = covariance = 0 * invariance
    for z in (z1, z2):
        z = torch.stack([row - sum(z) / n for row in z])
        for j in range(d):
            std = (sum(z[i, j] ** 2 for i in range(n)) / (n - 1) + 1e-4) ** 0.5
            variance = variance + (1 - std).clamp(min=0) / d / 2
            for k in (k for k in range(d) if k != j):
                entry = sum(z[i, j] * z[i, k] for i in range(n)) / (n - 1)
                covariance = covariance + entry ** 2 / d
    return invariance, variance, covariance

def values_and_gradients(f, *inputs):
    """Of each number that f returns: its value, its gradients."""
    inputs, found = [x.clone().requires_grad_() for x in inputs], []
    for part in f(*inputs):
        part = part + 0 * sum(x.sum() for x in inputs)  # a single dimension has no covariance
        found += [part.detach(), *torch.autograd.grad(part, inputs, retain_graph=True)]
    return [x.double() for x in found]

@pytest.mark.parametrize("n, d, scale", [(2, 3, 1.0), (6, 4, 0.5), (9, 5, 1.0), (5, 1, 0.3)])
def test_vicreg_and_its_gradients_equal_loops(n, d, scale):
    """Variance over the views is averaged, covariance summed. Deviations below 1 and above it, a
    batch of two, a single dimension."""
    spread = scale * torch.logspace(-2, 1, d)
    z1, z2 = spread * randn(n, d) + 0.7, spread * randn(n, d, seed=1) - 0.2
    for got, expected in zip(*(values_and_gradients(f, z1, z2) for f in (V.vicreg, slow_vicreg))):
        atol = 1e-6 * max(1, expected.abs().max().item())
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=atol)

def test_vicreg_of_a_collapsed_network_is_finite_and_pushes_outwards():
    z = randn(1, 6).expand(8, 6)
    almost = torch.cat([z[:1] + 1e-3, z[1:]])
    got = values_and_gradients(V.vicreg, z, z)
    assert all(g.isfinite().all() for g in got) and got[3].item() == pytest.approx(0.99, abs=1e-6)
    assert got[0] == got[6] == 0 and (values_and_gradients(V.vicreg, almost, z)[4][0] < 0).all()

def test_losses_weigh_their_parts_and_add_up():
    """VICReg (Eq. 1); SimCLR as attraction of pairs plus repulsion; supervised: cross-entropy."""
    z, labels = randn(10, 6), integers(6, 10)
    unit = F.normalize(z.double(), dim=1)
    pull = -sum(unit[i] @ unit[i + 5] for i in range(5)) / 5 / 0.5
    push = sum(sum((unit[i] @ unit[k] / 0.5).exp() for k in range(10) if k != i).log()
               for i in range(10)) / 10
    (s, v, c), raw = slow_vicreg(*z.chunk(2)), z[:5].double().var(0).sqrt().sum() / 6
    spread = unit[:5].var(0).sqrt().sum() / 6 ** 0.5
    entropy = -sum(row.double().log_softmax(0)[y] for row, y in zip(z, labels)) / 10
    names = ["loss", "invariance", "regularisation", "embedding_std"]
    for words, parts in (
            ("--invariance 2 --variance 3 --covariance 5", (2 * s, 3 * v + 5 * c, raw)),
            ("", (25 * s, 25 * v + c, raw)), ("--objective simclr", (pull, push, spread)),
            ("--objective supervised", ())):
        expected = [sum(parts[:2]), *parts] if parts else [entropy]
        got = {k: v.item() for k, v in V.losses(one_run(words), z, labels).items()}
        assert got == pytest.approx(dict(zip(names, map(float, expected))), rel=1e-5), words

# ==== Deep Augmentation ====

@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("shape", [(8, 40), (8, 5, 4, 4), (8, 6, 5)])
def test_deep_augmentation_is_dropout_of_the_chosen_rows_alone(shape, stop):
    """Mean and gradient: E[A(h)] = h; clean rows pass it as it is, chosen ones by their mask."""
    torch.manual_seed(0)
    h, up, ones = randn(*shape).requires_grad_(), randn(*shape, seed=1), torch.ones(shape)
    out = V.deep_augment(h, ROWS, 0.3, stop)
    (out * up).sum().backward()
    assert torch.equal(out[~ROWS], h[~ROWS]) and torch.equal(h.grad[~ROWS], up[~ROWS])
    mask = (out / h).detach()[ROWS]
    assert (mask == 0).any() and (mask[mask != 0] - 1 / 0.7).abs().max() < 1e-5
    torch.testing.assert_close(h.grad[ROWS], torch.zeros_like(mask) if stop else up[ROWS] * mask)
    means = torch.stack([V.deep_augment(ones, ROWS, 0.3, stop) for _ in range(600)]).mean(0)
    assert abs(means[ROWS].mean() - 1) < 0.02 and (means - 1).abs().max() < 0.15

# ==== class centres and clusters ====

def slow_clustering(x, y, x_test, y_test, classes):
    """Section 2.2 picture by picture and pair by pair, in float64."""
    x, x_test = x.double(), x_test.double()
    of = {c: [p for p, label in zip(x, y.tolist()) if label == c] for c in range(classes)}
    means = {c: sum(members) / len(members) for c, members in of.items() if members}

    def squared(p, c):
        return ((p - means[c]) ** 2).sum().item()

    def accuracy(pictures, labels):
        nearest = [min(means, key=lambda c, p=p: squared(p, c)) for p in pictures]
        return 100 * statistics.mean(n == y for n, y in zip(nearest, labels.tolist()))
    several = [c for c in means if len(of[c]) > 1]
    var = {c: statistics.mean(squared(p, c) for p in of[c]) for c in several}
    gap = {(i, j): squared(means[i], j) for i, j in itertools.permutations(several, 2)}
    cdnv = statistics.mean((var[i] + var[j]) / (2 * d) for (i, j), d in gap.items())
    return {"ncc_train": accuracy(x, y), "ncc_test": accuracy(x_test, y_test), "cdnv": cdnv,
            "variance": statistics.mean(var.values()), "distance": statistics.mean(gap.values())}

def some_classes(y, seed=0):
    """Features around a mean for every class, in steps of 2^-7."""
    x = randn(int(y.max()) + 1, 6, seed=50)[y] + randn(len(y), 6, seed=seed)
    return (128 * x).round() / 128

@pytest.mark.parametrize("labels", [
    torch.arange(40) % 5, torch.arange(40) % 2,
    torch.tensor([0] * 20 + [1] * 9 + [3] * 2 + [4]),  # class 2 absent, 4 with one picture
    torch.tensor([5] * 12 + [0, 0, 0, 3, 3]), torch.arange(8500) % 3],
    ids=["even", "two", "one picture, one absent", "many absent", "several chunks"])
def test_clustering_equals_loops(labels):
    """Whatever the order of the pictures, and however far from the origin they lie."""
    classes, y_test = int(labels.max()) + 1, torch.arange(30) % (int(labels.max()) + 1)
    x, x_test = some_classes(labels), some_classes(y_test, seed=1)
    expected = slow_clustering(x, labels, x_test, y_test, classes)
    assert 0 < expected["ncc_test"] < 100
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    for far, rel in ((0, 1e-5), (2 ** 16, 1e-3)):
        got = V.clustering(x[order] + far, labels[order], x_test + far, y_test, classes)
        assert got == pytest.approx(expected, rel=rel)

def test_classes_that_coincide_and_single_ones_have_no_cdnv():
    half, y = randn(10, 4), torch.arange(30) // 10
    for value in (0.0, 0.1, -3.7):
        got = V.clustering(*[torch.full((30, 7), value), y] * 2, 3)
        assert got["cdnv"] is None and got["variance"] == got["distance"] == 0
    got = V.clustering(*[torch.cat([half, half, half + 1]), y] * 2, 3)
    assert got["cdnv"] is None and got["distance"] == pytest.approx(16 / 6, rel=1e-5)
    for y, classes in (([0] * 10, 1), ([0] * 9 + [1], 2)):  # or of one picture
        assert V.clustering(*[half, torch.tensor(y)] * 2, classes)["cdnv"] is None

# ==== the linear SVM ====

def with_one(x):
    return F.pad(x.double(), (0, 1), value=1)

def svm_value_and_slack(x, y, w, c):
    """LIBLINEAR's objective of every class (the bias is one of the weights), and how much lower it
    would be after one more step of Newton's method, all in float64."""
    x, w, found = with_one(x), w.double().requires_grad_(), []
    signs = torch.where(y.unsqueeze(1) == torch.arange(w.shape[1]), 1.0, -1.0)
    hinge = (1 - signs * (x @ w)).clamp(min=0)
    value = w.square().sum(0) / 2 + c * hinge.square().sum(0)
    gradient = torch.autograd.grad(value.sum(), w)[0]
    for k, g in enumerate(gradient.T):
        active = x[hinge[:, k] > 0]
        hessian = torch.eye(len(w)).double() + 2 * c * active.T @ active
        found.append(g @ torch.linalg.solve(hessian, g) / 2)
    return value.detach(), torch.stack(found)

def svm_problem(name):
    """(x, y, classes), overlapping classes: as most layers'."""
    x = randn(300, 12) @ randn(12, 12, seed=1)
    y = (x @ randn(12, 4, seed=2) + 4 * randn(300, 4, seed=3)).argmax(1)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    constant = torch.ones(300, 1) * torch.tensor([7.0, 0.0])
    far = randn(8300, 3) + 5 * (torch.arange(8300) > 8191).unsqueeze(1)
    return {"plain": (x, y, 4), "scales from 1e-3 to 1e3": (x * 10 ** (order / 2 - 3), y, 4),
            "absent classes": (x, 2 * y, 8),
            "classes of few pictures": (x, torch.tensor([1, 1, 1, 2] + [0] * 296), 3),
            "far from the origin": (torch.cat([0.1 * x + 50, constant], 1), y, 4),
            # as of a deep untrained layer: 8 of 30, large
            "dependent": (30 * randn(3000, 8) @ randn(8, 30, seed=1), integers(3, 3000), 3),
            "more features than pictures": (randn(40, 60), integers(3, 40), 3),
            "several chunks": (far, integers(3, 8300), 3)}[name]

@pytest.mark.parametrize("name, c", [
    ("plain", 1), ("plain", 0.01), ("plain", 100), ("scales from 1e-3 to 1e3", 1),
    ("absent classes", 1), ("classes of few pictures", 1), ("far from the origin", 1),
    ("dependent", 1), ("more features than pictures", 1), ("several chunks", 1)])
def test_svm_finds_the_minimum(name, c):
    """The gradient of every class, by autograd in float64, is as good as zero."""
    x, y, classes = svm_problem(name)
    value, slack = svm_value_and_slack(x, y, V.fit_svm(x, y, classes, c), c)
    worse = 5e-3 if name == "more features than pictures" else 1e-4  # separable: nearly zero
    assert (slack <= worse * value).all(), slack / value
    start = svm_value_and_slack(x, y, torch.zeros(x.shape[1] + 1, classes), c)[0]
    assert (value < start).all()

# ==== mutual information ====

def gaussians(n, d, rho, seed=0):
    """x, z [n, d], correlation rho in every dimension: I = -d/2 log2(1 - rho^2) bits."""
    x = randn(n, d, seed=seed)
    return 5 * x + 3, 0.01 * (rho * x + (1 - rho ** 2) ** 0.5 * randn(n, d, seed=seed + 1))

@pytest.mark.parametrize("d, rho", [(1, 0.9), (2, 0.8)])
def test_information_of_correlated_gaussians(d, rho):
    """A lower bound, but for the noise of 700 held-out pairs, and not far below. Of five
    initialisations that the seed alone decides."""
    exact, pairs = -d / 2 * math.log2(1 - rho ** 2), gaussians(3500, d, rho)
    bits, before = V.mutual_information(*pairs, 100), torch.get_rng_state()
    assert len(bits) == len(set(bits)) == 5
    assert all(0.75 * exact < b < 1.15 * exact for b in bits), (bits, exact)
    few = [V.mutual_information(*pairs, 2, seed=seed) for seed in (0, 0, 1)]
    assert few[0] == few[1] != few[2] and torch.equal(torch.get_rng_state(), before)

def test_information_of_independent_variables_is_near_zero():
    """Even where they could be learned by heart: it is read on pairs not trained on."""
    assert all(b < 0.1 for b in V.mutual_information(*gaussians(250, 20, 0.0), 60))
    x, z = gaussians(2000, 1, 0.0)  # a constant feature, as of a dead channel, does not matter
    assert all(-0.3 < b < 0.06 for b in V.mutual_information(x, F.pad(z, (0, 1), value=2), 30))
    x, z = gaussians(1000, 1, 0.95)
    z[800:] = z[800:].flip(0)  # the held-out pairs alone are wrong
    assert all(b < 0 for b in V.mutual_information(x, z, 40))

# ==== network ====

def network(words, size=16, classes=4):
    """A Net whose BatchNorms have statistics, scales and shifts of their own."""
    torch.manual_seed(0)
    net = V.Net(one_run(words), size, classes)
    for m in net.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            m.running_mean.normal_(0, 0.2)
            m.running_var.uniform_(0.5, 2)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0.3, 0.2)
    return net

def some_images(n=6, size=16):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1))

def normal(images):
    return T.normalize(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]).double()

def by_hand(net, images, blocks):
    """App. A.2 from the weights alone: {layer: output}."""
    w, out = {k.removeprefix("layers."): v.double() for k, v in net.state_dict().items()}, {}

    def norm(h, name):
        parts = (w[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(h, *parts)

    def conv(h, layer, i, stride, padding):
        h = F.conv2d(h, w[f"{layer}.conv{i}.weight"], None, stride, padding)
        return norm(h, f"{layer}.bn{i}")
    h = out["stem"] = conv(conv(normal(images), "stem", 1, 2, 0).relu(), "stem", 2, 2, 0).relu()
    for name in (f"block{i}" for i in range(1, blocks + 1)):
        h = out[name] = (h + conv(conv(h, name, 1, 1, 1).relu(), name, 2, 1, 1)).relu()
    h = out["avgpool"] = h.mean((2, 3))
    hidden = norm(h @ w["head.0.weight"].T + w["head.0.bias"], "head.1").relu()
    return {**out, "head": hidden @ w["head.3.weight"].T}

@pytest.mark.parametrize("size", [16, 18])
def test_res_l_h_is_the_papers(size):
    """relu(x + B2 C2 relu(B1 C1 x)), L times, behind two 2x2 convolutions of stride 2."""
    net, images = network("--arch RES-3-10 --projector 7 5").eval(), some_images(6, size)
    with torch.no_grad():
        got, expected = net.activations(images), by_hand(net, images, 3)
        assert list(got) == list(expected) and got["stem"].shape == (6, 10, 4, 4)
        for name in expected:
            torch.testing.assert_close(got[name].double(), expected[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(net(images, torch.ones(6, dtype=torch.bool)), got["head"])
    wide = V.Net(one_run("--arch RES-1-64"), 16, 4).layers.block1.conv1.weight  # He's, fan out
    assert wide.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.03)

def test_each_view_has_its_own_batch_statistics_and_supervised_is_one_view():
    """The first view, then the second, as if each were alone; the running ones see both."""
    words, rows = "--arch RES-2-8 --projector 7 5", torch.zeros(5, dtype=torch.bool)
    net, alone = network(words).train(), network(words).train()
    alone.views, views = 1, (some_images(5), 0.3 * some_images(10)[5:] + 0.5)
    got, expected = net(torch.cat(views), rows.repeat(2)), [alone(v, rows) for v in views]
    torch.testing.assert_close(got, torch.cat(expected))
    assert same_bits(net.state_dict(), alone.state_dict())
    net = network("--arch RES-1-4 --objective supervised", classes=7).train()
    assert net(some_images(5), rows).shape == (5, 7)
    assert net.layers.stem.bn1.num_batches_tracked == 1

@pytest.mark.parametrize("size", [64, 16])
def test_resnet18s_features_equal_torchvisions_with_the_exported_weights(size, tmp_path):
    """Only fc is missing; below 64 px the stem is 3x3 without max pooling."""
    from safetensors.torch import load_file
    a, net = one_run("--arch resnet18"), network("--arch resnet18", size).eval()
    split = V.Split(size, torch.zeros(2), (255 * some_images(2, size)).byte())
    assert V.export(a, net, split, [], tmp_path / "encoder.pt", {}) <= 1e-4
    theirs = torchvision.models.resnet18(weights=None).eval()
    if size < 64:
        theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    weights = load_file(tmp_path / "weights.safetensors")
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert sorted(missing) == ["fc.bias", "fc.weight"] and unexpected == []
    theirs.fc, images = nn.Identity(), some_images(3, size)
    with torch.no_grad():
        ours, expected = net.activations(images), theirs(normal(images).float())
        assert list(ours) == ["stem", *(f"block{i}" for i in range(1, 9)), "avgpool", "head"]
        torch.testing.assert_close(ours["avgpool"], expected, rtol=1e-3, atol=1e-3)

@pytest.mark.parametrize("layer, top", [
    *((str(l), l) for l in range(-1, 5)), ("0+2", 2), ("all", 4)])
def test_stop_gradient(layer, top):
    """--layer of RES-2-6: -1 input, 0 stem, 1 and 2 blocks, 3 average pool, 4 head. From augmented
    rows no gradient to what is below, from clean rows the plain network's; layers above learn from
    both; without stop-gradient all do; in eval mode nothing is augmented."""
    weights, chosen = randn(8, 5, seed=2), ROWS.view(-1, 1)

    def gradients(more, weights):
        net = network(f"--arch RES-2-6 --projector 9 5 {more}").train()
        for m in net.modules():  # BatchNorm must not mix the rows
            m.training &= not isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))
        images = some_images(8).requires_grad_()
        torch.manual_seed(7)
        (net(images, ROWS) * weights).sum().backward()
        grads = {k: p.grad for k, p in net.named_parameters()}
        return images.grad, grads, net.eval()(images, ROWS)
    images, params, calm = gradients(f"--layer {layer}", weights)
    plain_images, plain, plain_calm = gradients("", weights * ~chosen)
    assert not images[ROWS].any() and torch.equal(calm, plain_calm)
    torch.testing.assert_close(images[~ROWS], plain_images[~ROWS])
    _, above, _ = gradients(f"--layer {layer}", weights * chosen)
    images, everywhere, _ = gradients(f"--layer {layer} --no-stop-grad", weights * chosen)
    assert images.flatten(1).any(1).tolist() == ROWS.tolist()
    for name, grad in params.items():
        below = ["stem", "block1", "block2", "avgpool", "head"].index(name.split(".")[1]) <= top
        assert above[name].any() != below and everywhere[name].any(), name
        if below:
            torch.testing.assert_close(grad, plain[name], msg=name)

# ==== views ====

@pytest.mark.parametrize("size, n", [(16, 60), (24, 4000), (64, 60)])
def test_blur_and_solarization_equal_torchvisions(size, n):
    """Of about as many pictures as asked, the others are untouched; sigma is uniform from .1 to 2:
    the red channel is one bright pixel, so it shows the kernel."""
    torch.manual_seed(0)
    x, c, off = some_images(n, size), size // 2, 3 * (0.25 / n) ** 0.5
    x[:, 0] = 0
    x[:, 0, c, c] = 1
    blurred = V.blur_and_solarize(x, 0.5, 0)
    changed = (blurred != x).flatten(1).any(1)
    assert abs(changed.float().mean() - 0.5) < off
    centre, beside = blurred[changed, 0, c, c].double(), blurred[changed, 0, c, c + 1].double()
    sigmas = (0.5 / (centre / beside).log()).sqrt()
    levels = torch.linspace(0.1, 0.9, 5).double()
    assert (sigmas.quantile(levels) - (0.1 + 1.9 * levels)).abs().max() < 5 * off
    for view, picture, sigma in [*zip(blurred[changed], x[changed], sigmas.tolist())][:30]:
        expected = T.gaussian_blur(picture, [2 * min(11, size - 1) + 1] * 2, [sigma] * 2)
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-5)
    solarized, whole = V.blur_and_solarize(x, 0, 0.2), T.solarize(x, 0.5)
    changed = (solarized != x).flatten(1).any(1)
    assert abs(changed.float().mean() - 0.2) < off
    assert torch.equal(solarized, torch.where(changed.view(-1, 1, 1, 1), whole, x))
    tiny = torch.full((4, 3, 5, 5), 0.3)  # smaller than the window
    torch.testing.assert_close(V.blur_and_solarize(tiny, 1, 0), tiny)

def test_views_are_first_ones_then_second_ones_none_are_the_pictures_as_they_are():
    """With App. A.1's crops and colours; the two views of a picture differ."""
    images, a = V.draw_shapes(20, 0, "cpu")[0], one_run("")
    twice = torch.cat([images, images])
    assert torch.equal(V.views_of(images, 32, a, "none", 2), twice / 255)
    torch.manual_seed(1)
    expected = V.make_views(twice, 32, (0.2, 1), (0.4, 0.4, 0.2, 0.1))
    torch.manual_seed(1)
    views = V.views_of(images, 32, a, "simclr", 2)
    assert torch.equal(views, expected) and (views[:20] != views[20:]).flatten(1).any(1).all()

def test_autoaugment_changes_pictures_within_their_range():
    """Eight pictures share a draw, groups differ."""
    images = V.draw_shapes(8, 0, "cpu")[0][:1].repeat(160, 1, 1, 1)
    torch.manual_seed(0)
    got = V.views_of(images, 32, one_run(""), "autoaugment")
    assert got.shape == (160, 3, 32, 32) and 0 <= got.min() and got.max() <= 1
    assert 10 <= len({view.numpy().tobytes() for view in got}) <= 20

# ==== random targets, superclasses, presets ====

def families(n=1280, n_test=300, step=1):
    """Drawn shapes, labelled with their five families, every step-th pixel of them."""
    drawn = V.draw_shapes(n, 0, "cpu"), V.draw_shapes(n_test, 1, "cpu")
    return *(V.Split(32 // step, labels // 4, images[..., ::step, ::step])
             for images, labels in drawn), list("abcde")

def test_random_targets_go_from_an_untrained_network_to_a_trained_one():
    """Evenly spaced stages, of the pictures that are probed. An untrained network gives nearly all
    pictures to one class or two; --balance-targets spreads them. The seed decides."""
    data = families()

    def targets(words=""):
        return V.random_targets(one_run("--device cpu --target-net RES-1-8 --target-epochs 6 "
                                        f"--target-stages 4 --probe-images 700 {words}"), data)
    found, balanced, commonest = targets(), targets("--balance-targets"), []
    for stages in (found, balanced):
        assert [r for r, *_ in stages] == pytest.approx([1, 2 / 3, 1 / 3, 0], abs=1e-9)
        assert {(len(y), len(y_test)) for _, y, y_test in stages} == {(700, 300)}
        right = [(y == data[0].labels[:700]).float().mean().item() for _, y, _ in stages]
        assert max(right) == right[-1] > 0.35 and right[0] < 0.3, right
        assert (stages[-1][2] == data[1].labels).float().mean() > 0.33
        commonest.append(stages[0][1].bincount().max().item() / 700)
    assert commonest[0] > 0.5 > 0.4 > commonest[1]
    for seed, same in ((0, True), (1, False)):
        ends = targets(f"--target-epochs 1 --target-stages 2 --seed {seed}")
        assert [r for r, *_ in ends] == [1, 0] and torch.equal(ends[0][1], found[0][1]) == same

def test_superclasses_of_shapes_are_the_families(monkeypatch):
    monkeypatch.setattr(V, "draw_shapes", lambda n, *_, draw=V.draw_shapes: draw(20, 0, "cpu"))
    names = [name.split()[0] for name in V.load_data("shapes", one_run(""))[2]]
    pairs = {*zip(names, V.SUPERCLASSES["shapes"], strict=True)}
    assert len(pairs) == len({*names}) == len({*V.SUPERCLASSES["shapes"]}) == 5

def test_superclasses_of_cifar100_are_its_coarse_labels(real_data):
    with open(real_data / "cifar-100-python/train", "rb") as f:
        train = pickle.load(f, encoding="latin1")
    coarse = dict(zip(train["fine_labels"], train["coarse_labels"]))
    ours = [ord(c) - ord("a") for c in V.SUPERCLASSES["cifar100"]]
    assert ours == [coarse[i] for i in range(100)]

def test_preset_paper_sets_the_papers_values_and_a_flag_beside_it_wins():
    a, b = V.settings(["--preset", "paper"]), V.settings("--preset paper --epochs 30".split())
    assert (a.dataset, a.arch, a.batch_size, a.lr) == ("cifar100", ["RES-5-250"], 256, 0.002)
    assert (a.weight_decay, a.sample_level) == (1e-6, [500, 100, 20])
    assert (a.crop_min, a.blur, a.solarize, a.target_net) == (0.08, 0.5, 0.1, "resnet18")
    assert (a.invariance, a.variance, a.covariance, a.epochs) == (25, [25], 1, 1000)
    assert {**vars(a), "epochs": 30} == vars(b)

# ==== what probes measure ====

class Encoder(nn.Module):
    """Layers as a user's own encoder might have."""
    def forward(self, images):
        return images.mean((2, 3))

    def activations(self, images):
        return [images, images.mean((2, 3))]

CONFIG = {"script": "mine", "layers": ["stem", "avgpool"], "image_size": 16, "dataset": "folder",
          "layer_numbers": {"stem": 0, "avgpool": 1}, "flags": {"data_dir": "few"},
          "measurements": {}}

def write_encoder(path, config=CONFIG):
    example = torch.rand(2, 3, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace_module(Encoder(), {"forward": example, "activations": example})
        torch.jit.save(traced, str(path), {"config.json": json.dumps(config)})

def test_sample_level_asks_of_which_picture_something_is_a_view(tmp_path):
    """Black or white survives the augmentations, so every view is told."""
    images = torch.tensor([0, 255]).byte().view(2, 1, 1, 1).expand(2, 3, 16, 16)
    split = V.Split(16, torch.tensor([0, 1]), images)
    write_encoder(tmp_path / "encoder.pt")
    a = one_run("--device cpu --sample-level 2 9 7 --mine-steps 0 --probes svm ncc knn logistic")
    [row] = V.probe(tmp_path / "encoder.pt", (split, split, []), [], a)
    assert (row["layer"], row["target"], row["classes"]) == ("stem", "sample", 2)
    measures = ("majority", "svm", "ncc_train", "ncc_test", "knn", "logistic")
    assert [row[k] for k in measures] == [50, 100, 100, 100, 100, 100]

def test_probes_see_views_of_the_samples_and_the_pictures_and_every_layer_for_itself(monkeypatch):
    """A layer that knows the label of a plain picture and one that sees nothing; every view is
    another, of test too; at another epoch they are the same."""
    splits = [V.Split(32, labels, images) for images, labels in
              (V.draw_shapes(160, 0, "cpu"), V.draw_shapes(100, 1, "cpu"))]
    answer, shown = {x.numpy().tobytes(): y for s in splits
                     for x, y in zip(s.images / 255, s.labels.tolist())}, []

    def activations(images):
        names = [x.numpy().tobytes() for x in images]
        shown.extend(names)
        known = torch.tensor([answer.get(x, -1) for x in names])
        return {"blind": torch.ones(len(images), 2, 3, 3), "block1": F.one_hot(known + 1, 21)}
    config = {"layers": ["blind", "block1", "avgpool"], "image_size": 32,
              "measurements": {"epoch": 7},
              "layer_numbers": {"blind": 0, "block1": 1, "avgpool": 2}}
    monkeypatch.setattr(V, "load_encoder", lambda *_: (activations, config))
    a = one_run("--device cpu --sample-level 20 3 3 --mine-steps 0 --probe-images 140")
    rows = by_key(V.probe("", (*splits, [*range(20)]), [], a))
    views = [x for x in shown if x not in answer]
    assert len(views) == len({*views}) == 6 * 20 and len({*shown}) == 6 * 20 + 140 + 100
    V.probe("", (*splits, [*range(20)]), [], a)
    assert [x for x in shown if x not in answer] == views * 2
    assert len(rows) == 6 and rows[7, "block1", "sample"]["ncc_test"] == pytest.approx(5)
    for target, chance, classes in (("class", 5, 20), ("superclass", 20, 5)):
        good, blind = rows[7, "block1", target], rows[7, "blind", target]
        assert good["svm"] == good["ncc_test"] == good["ncc_train"] == 100
        assert good["classes"] == classes and blind["majority"] == pytest.approx(chance, abs=1e-4)
        assert blind["svm"] <= 2 * chance and blind["cdnv"] is None and blind["variance"] == 0
    assert rows[7, "block1", "class"]["cdnv"] < 1e-9 < rows[7, "block1", "superclass"]["cdnv"]
    assert rows[7, "block1", "class"]["knn"] == rows[7, "block1", "class"]["logistic"] == 100

# ==== whole runs ====

@pytest.fixture(scope="module")
def done(few, tmp_path_factory):
    """A finished run of 12 steps, everything probed; tests change nothing in its folder."""
    out = tmp_path_factory.mktemp("done") / "run"
    V.main(flags(few, "--out", out))
    return out

@pytest.fixture(scope="module")
def live(done, few):
    """The trained network of `done` in eval mode, {split: its activations}, labels, targets."""
    a, (train, test, classes) = load(few)
    net = V.Net(a, 16, 4)
    net.load_state_dict(state_of(done)["model"])
    with torch.no_grad():
        acts = [net.eval().activations(V.to_unit(s.images, 16)) for s in (train, test)]
    return net, acts, {"class": (train.labels, test.labels), **{
        f"random {r:.2f}": labels for r, *labels in state_of(done)["targets"]}}

def test_the_run_folder_holds_what_the_design_says(done):
    assert {p.name for p in done.iterdir()} == {
        "config.json", "metrics.csv", "probes.csv", "report.json", "checkpoint.pt", "encoder-0.pt",
        "encoder-1.pt", "encoder-2.pt", "encoder.pt", "weights.safetensors", "samples.npz",
        "clusters.png", "figures.png"}
    for picture in map(Image.open, done.glob("*.png")):
        assert picture.width > 400 and np.array(picture.convert("L")).std() > 10
    config = json.loads((done / "config.json").read_text())
    assert config["torch"] == torch.__version__ and config["layer"] == "1"
    log, probes = (list(csv.DictReader((done / f"{name}.csv").read_text().splitlines()))
                   for name in ("metrics", "probes"))
    for step, r in enumerate({k: float(v) for k, v in row.items()} for row in log):
        assert r["loss"] == pytest.approx(r["invariance"] + r["regularisation"], rel=1e-5)
        assert r["lr"] == V.learning_rate(step, one_run(BASE), 6) and 0 < r["embedding_std"] < 2
    random = ["random 1.00", "random 0.50", "random 0.00"]
    assert len(log) == 12 and {*by_key(probes)} == {
        *itertools.product("012", ("stem", "block1", "block2"), ["sample", "class", *random]),
        *itertools.product("012", ["block2"], ["information"])}
    for r in probes:
        assert (r["agreement"] != "") == (r["target"] in random) == (r["randomness"] != "")
        assert (r["bits"] != "") == (r["target"] == "information") == (r["svm"] == "")
        assert r["classes"] == {"sample": "6", "information": ""}.get(r["target"], "4")

def test_the_report_says_what_the_representation_knew_before_and_after(done):
    report = report_of(done)
    assert report["step"] == 12 and report["seconds"] > 0 and report["images_per_second"] > 0
    assert report["export_difference"] <= 1e-4 and report["broken"] == 0
    for end, epoch in (("_untrained", 0), ("", 2)):
        for level in ("sample", "class", "information"):
            row = by_key(report["probes"])[epoch, "block2", level]
            for k in V.MEASURES:
                assert report.get(f"{k}_{level}{end}") == row.get(k)
        row = by_key(report["probes"])[epoch, "block2", "class"]
        assert (report[f"linear{end}"], report[f"knn{end}"]) == (row["logistic"], row["knn"])
        assert math.isfinite(report[f"bits_information{end}"] + report[f"svm_class{end}"])

@pytest.mark.parametrize("layer", ["stem", "block1", "block2"])
def test_probes_measure_the_layers_and_targets_that_they_name(done, live, layer):
    """Features taken here from the network, centres by a loop over classes, an SVM for each."""
    _, acts, labels = live
    x, x_test = (layers[layer].mean((2, 3)) for layers in acts)
    for target, (y, y_test) in labels.items():
        row, present = by_key(report_of(done)["probes"])[2, layer, target], y.unique()
        means = torch.stack([x[y == c].mean(0) for c in present])
        nearest, nearest_test = (present[torch.cdist(f, means).argmin(1)] for f in (x, x_test))
        svm = (with_one(x_test) @ V.fit_svm(x, y, 4).double()).argmax(1)
        for k, got, truth in (("ncc_train", nearest, y), ("ncc_test", nearest_test, y_test),
                              ("svm", svm, y_test), ("majority", y_test.mode()[0], y_test),
                              ("agreement", y_test, labels["class"][1])):
            right = 100 * (got == truth).double().mean().item()
            one = 100 / len(truth) + 1e-4 if k in ("svm", "ncc_train", "ncc_test") else 1e-4
            assert row.get(k, 100) == pytest.approx(right, abs=one), (target, k)  # one picture

def test_encoders_equal_the_live_network_and_say_what_they_are(done, live):
    """encoder-2.pt and encoder.pt, written at the end, are the trained network."""
    net, x, outputs = live[0], torch.rand(5, 3, 16, 16), {}
    with torch.no_grad():
        expected = net.activations(x)
    for name in ("-0", "-1", "-2", ""):
        extra = {"config.json": ""}
        encoder = torch.jit.load(done / f"encoder{name}.pt", _extra_files=extra)
        config, outputs[name] = json.loads(extra["config.json"]), encoder(x)
        assert config["measurements"]["epoch"] == int(name[1:] or 2)
    assert config["layers"] == ["stem", "block1", "block2", "avgpool", "head"]
    assert config["layer_numbers"] == {n: l for l, n in enumerate(config["layers"])}
    assert config["classes"] == [f"class{i}" for i in range(4)] and config["image_size"] == 16
    assert config["measurements"]["linear"] == report_of(done)["linear"]
    for ours, theirs in zip([*encoder.activations(x), outputs["-2"], outputs[""]],
                            [*expected.values(), *[expected["avgpool"]] * 2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert (outputs["-0"] != outputs["-1"]).any() and (outputs["-1"] != outputs["-2"]).any()
    samples = np.load(done / "samples.npz")
    assert samples["images"].shape == (24, 3, 16, 16) and samples["images"].dtype == np.uint8

def test_encoder_files_give_the_numbers_that_the_run_recorded(done, few, tmp_path):
    """Data set, its folder and size come from the file; --all-layers adds the last ones. A shell
    lists encoder-20.pt before encoder-6.pt: the order of the files does not matter."""
    files = [str(done / f"encoder-{epoch}.pt") for epoch in (0, 2, 1)]
    words = re.sub(r"--image-size 16", "", BASE).split()
    report = V.main([*words, "--out", str(tmp_path / "run"), "--encoder", *files])
    for ours, theirs in zip(report["probes"], report_of(done)["probes"], strict=True):
        assert [*by_key([ours])] == [*by_key([theirs])]
        for k in {*V.MEASURES, "bits", "agreement", "majority"} & {*theirs}:
            assert ours[k] == pytest.approx(theirs[k], rel=1e-3), (theirs, k)
    for k in ("linear", "knn", "svm_class", "linear_untrained", "cdnv_sample", "bits_information"):
        assert report[k] == pytest.approx(report_of(done)[k], rel=1e-3), k
    assert not list((tmp_path / "run").glob("*.pt"))
    report = V.main([*words, *CHEAP.split(), "--all-layers", "--out", str(tmp_path / "all"),
                     "--encoder", str(done / "encoder.pt")])
    assert [r["layer"] for r in report["probes"]] == ["stem", "block1", "block2", "avgpool", "head"]

def test_an_encoder_of_simclr_is_probed_with_nothing_else_given(few, tmp_path):
    S.main(["--data-dir", str(few), *"--workers 0 --batch-size 36 --epochs 1 --device cpu "
            "--image-size 16 --layer 4 --out".split(), str(tmp_path / "run")])
    report = V.main(["--encoder", str(tmp_path / "run/encoder.pt"), *"--workers 0 --device cpu "
                     "--sample-level 4 3 2 --target-net none --mine-steps 5 --out".split(),
                     str(tmp_path / "probes")])
    assert {"linear", "knn", "svm_class", "svm_sample", "bits_information"} <= {*report}
    assert report["flags"]["image_size"] == 16 and report["flags"]["data_dir"] == str(few)

def test_probing_changes_no_bit_of_training(few, done, tmp_path):
    """The cheapest probe before and after training; every probe, between epochs too."""
    V.main(flags(few, CHEAP, "--out", tmp_path / "run"))
    ours, theirs = state_of(tmp_path / "run"), state_of(done)
    assert len(ours["probes"]) == 6 and len(theirs["probes"]) == 48
    assert same_bits(ours["model"], theirs["model"])
    assert same_bits(ours["optimizer"], theirs["optimizer"])

OPTIONS = [
    "", "--layer -1", "--layer 0", "--layer 1", "--layer 1 --no-stop-grad", "--layer 1+3",
    "--layer all", "--layer 1 --rate 0.1", "--layer 1 --sample 1", "--crop-min 0.9", "--blur 1",
    "--solarize 1", "--views none", "--views autoaugment", "--objective simclr", "--seed 3",
    "--objective supervised", "--objective supervised --views autoaugment", "--invariance 1",
    "--variance 1", "--covariance 25", "--lr 0.037", "--weight-decay 0.1", "--clip 0.1",
    "--image-size 24", "--batch-size 54", "--arch RES-1-8", "--projector 8 8"]

def test_every_option_changes_the_training(few, tmp_path):
    """After two steps other weights than without it, and than with any other option."""
    stems, data = {}, {size: load(few, f"--image-size {size}")[1] for size in (16, 24)}
    for text in OPTIONS:
        a = one_run(flags(few, SHORT, text))
        torch.manual_seed(a.seed)
        net = V.Net(a, a.image_size, 4)
        state = {"step": 0, "seconds": 0.0, "log": []}
        V.train(a, net, data[a.image_size][0], tmp_path, lambda epoch: None, state)
        assert all(v.isfinite().all() for v in net.state_dict().values()), text
        stems[text] = net.layers.stem.conv1.weight.detach().numpy().tobytes()
    assert len({*stems.values()}) == len(OPTIONS)

def test_several_values_make_runs_and_compare_pools_their_seeds(few, tmp_path, capsys, drawn,
                                                                 monkeypatch):
    """Runs of a seed share their random targets: on CUDA a second training would give others."""
    out, random_targets, seeds = tmp_path / "out", V.random_targets, []
    monkeypatch.setattr(V, "random_targets",
                        lambda a, data: seeds.append(a.seed) or random_targets(a, data))
    words = flags(few, SHORT, "--lr 0.1 --objective vicreg simclr --seed 0 1 --target-net RES-1-8 "
                              "--target-epochs 1 --target-stages 2 --out", out)
    table, runs = V.main(words), {p.name: p for p in out.iterdir() if p.is_dir()}
    assert seeds == [0, 1]
    assert {*runs} == {f"objective-{o}-seed-{s}" for o in ("simclr", "vicreg") for s in (0, 1)}
    assert {*table} == {"objective vicreg", "objective simclr"}
    for name, key in itertools.product(table, ("linear", "knn", "cdnv_class_untrained")):
        values = [report_of(runs[f"{name.replace(' ', '-')}-seed-{seed}"])[key] for seed in (0, 1)]
        expected = statistics.mean(values), statistics.stdev(values)
        assert table[name][key] == pytest.approx(expected)
    for i, content in enumerate(("{", "[]", '{"script": "simclr_deepaug"}')):
        (out / f"bad{i}").mkdir()
        (out / f"bad{i}" / "report.json").write_text(content)
    copied = shutil.copytree(runs["objective-vicreg-seed-1"], tmp_path / "copied")
    assert V.main(["--compare", str(out), str(copied)]) == table  # each run once
    printed, (page, panels) = capsys.readouterr().out, drawn[-1]
    assert all(f"bad{i}/report.json: left out" in printed for i in range(3))
    lines = panels["Fig. 8: NCC, test %, classes by layer"]
    assert page.name == "figures.png" and {*lines} == {*table}
    assert [x for x, *_ in lines["objective vicreg"]] == ["stem", "block1", "block2"]

# ==== two processes ====

OBJECTIVES = ["vicreg", "simclr", "supervised"]

def trained(objective, out):
    """Losses and weights of six steps on views that the pictures decide. BatchNorm's statistics
    are a process's own on the CPU: taken out."""
    a = one_run("--batch-size 12 --epochs 2 --lr 0.05 --arch RES-1-8 --projector 16 12 "
                f"--device cpu --objective {objective}")
    torch.manual_seed(0)
    net, (images, labels) = V.Net(a, 32, 20), V.draw_shapes(40, 0, "cpu")
    for module in list(net.modules()):
        for name, m in module.named_children():
            if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
                setattr(module, name, nn.Identity())
    views, V.views_of = V.views_of, lambda x, size, a, kind, times: torch.cat(
        [x / 255, 1 - x.flip(3) / 255][:times])
    out.mkdir(exist_ok=True)
    start = {"step": 0, "seconds": 0.0, "log": []}
    state = V.train(a, net, V.Split(32, labels, images), out, lambda epoch: None, start)
    V.views_of = views
    return [[v for k, v in row.items() if k in ("loss", "invariance", "regularisation")]
            for row in state["log"]], net.state_dict()

def one_of_two(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for objective in OBJECTIVES:
        torch.save(trained(objective, folder / objective), folder / f"{objective}{rank}.pt")
    dist.destroy_process_group()

def test_two_processes_give_the_losses_and_weights_of_one(processes, tmp_path):
    children = [processes(target=one_of_two, args=(rank, tmp_path)) for rank in (0, 1)]
    for child in children:
        child.start()
    one = {name: trained(name, tmp_path / "one") for name in OBJECTIVES}
    [child.join(120) for child in children]
    for (objective, (losses, weights)), rank in itertools.product(one.items(), (0, 1)):
        got = torch.load(tmp_path / f"{objective}{rank}.pt", weights_only=True)
        assert len(losses) == 6 and losses[-1] != losses[0]
        for ours, theirs in zip(got[0], losses, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5), objective
        for k, v in weights.items():
            torch.testing.assert_close(got[1][k], v, rtol=1e-3, atol=1e-5)

# ==== other data ====

def flat_folder(few, to):
    to.mkdir()
    for i, file in enumerate(sorted(few.rglob("*.png"))[::5]):
        shutil.copy(file, to / f"{i}.png")
    return to

def test_a_folder_without_labels_is_probed_for_samples_and_information(few, tmp_path):
    words = flags(flat_folder(few, tmp_path / "flat"), "--batch-size 16 --out", tmp_path / "run")
    report = V.main(words)
    assert {r["target"] for r in report["probes"]} == {"sample", "information"}
    assert {"svm_sample", "ncc_test_sample_untrained", "bits_information"} <= {*report}
    assert "linear" not in report and "svm_class" not in report and report["step"] == 4

def test_a_data_set_of_torchvision_is_read_by_its_name(few, tmp_path):
    """A small Food-101 as torchvision lays it out, pictures wider than high."""
    root = tmp_path / "food-101"
    (root / "meta").mkdir(parents=True)
    for part, first, last in (("train", 0, 16), ("test", 16, 24)):
        names = {f"class{c}": [f"class{c}/{i:02}" for i in range(first, last)] for c in range(3)}
        (root / f"meta/{part}.json").write_text(json.dumps(names))
        for name in itertools.chain(*names.values()):
            (root / f"images/{name}").parent.mkdir(parents=True, exist_ok=True)
            picture = Image.open(few / f"{name}.png").convert("RGB").resize((60, 40))
            picture.save(root / f"images/{name}.jpg")
    words = flags(tmp_path, "--dataset Food101 --batch-size 16 --out", tmp_path / "run")
    train, test, classes = V.load_torchvision("Food101", one_run(words))
    assert classes == ["class0", "class1", "class2"] and train.size == 16 and len(test) == 24
    assert sorted(train.labels.tolist()) == [c for c in range(3) for _ in range(16)]
    assert len(train.labels[:16].unique()) == 3  # the first n are of all classes
    picture, side = Image.open(root / "images/class1/00.jpg"), train.images.shape[-1]
    whole = T.resize(torch.from_numpy(np.array(picture)).permute(2, 0, 1), [side])
    same = (train.images == T.center_crop(whole, [side, side])).flatten(1).all(1)
    assert train.labels[same].tolist() == [1]
    report = V.main(words)
    assert report["step"] == 6 and math.isfinite(report["linear"])

# ==== bad input ====

@pytest.mark.parametrize("words, says", [
    ("--layer 5", "--layer RES-2-8 -1 4 all"), ("--layer 1 none+2", "none+2"),
    ("--layer 4 --arch RES-1-8", "--layer RES-1-8"), ("--arch RES-0-8", "RES-0-8 RES-5-250"),
    ("--layer 11 --arch resnet18", "--layer resnet18 10"), ("--arch RES-1", "RES-1"),
    ("--arch resnet50", "resnet50 resnet18"), ("--target-net resnet50", "resnet50"),
    ("--target-net vit --image-size 18", "--target-net vit 18 --image-size"),
    ("--target-stages 1", "--target-stages"), ("--sample-level 1 5 5", "--sample-level"),
    ("--sample-level 5 0 5", "--sample-level"), ("--sample-level 217 2 1", "216 --sample-level"),
    ("--probe-epochs 0 -1", "--probe-epochs"), ("--probes tree", "--probes logistic"),
    ("--variance -1", "--variance"), ("--image-size 3", "--image-size"),
    ("--data-dir flat --objective supervised --batch-size 8", "--objective labels"),
    ("--data-dir flat --sample-level 0 0 0 --batch-size 8", "labels --sample-level"),
    ("--dataset cifar100 --data-dir files", "cifar100 files cannot be downloaded"),
    ("--dataset Food101 --data-dir empty", "Food101 empty"), ("--dataset Mood101", "Mood101"),
    ("--encoder nowhere.pt", "nowhere.pt missing"), ("--encoder files/cut.pt", "cut.pt"),
    ("--encoder files/trap.pt", "trap.pt"), ("--encoder files/sentences.pt", "pictures"),
    ("--encoder files/mine.pt files/mine.pt", "--encoder one run's epochs"),
    ("--encoder files/mine.pt --resume --out run", "--encoder --resume"),
    ("--encoder files/mine.pt --sample-level 217 1 1", "216 --sample-level"),
    ("torchrun --batch-size 2", "--batch-size 2"), ("torchrun --encoder x.pt", "torchrun")])
def test_bad_input_is_one_line_and_nothing_is_written(refused, tmp_path, monkeypatch, few, words,
                                                      says):
    """Exit code 2, no new file, no change to what is there: refused() looks. No code of a trap
    runs."""
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("files/cifar-100-python").mkdir(parents=True)
    Path("files/cifar-100-python/train").write_bytes(b"\x80\x04half")
    Path("few").symlink_to(few)
    if "flat" in words:
        flat_folder(few, Path("flat"))
    if "files/" in words:
        torch.save({"model": Trap()}, "files/trap.pt")
        write_encoder("files/mine.pt")
        write_encoder("files/sentences.pt", {k: v for k, v in CONFIG.items() if k != "image_size"})
        Path("files/cut.pt").write_bytes(Path("files/mine.pt").read_bytes()[:-200])
    if "torchrun" in words:
        monkeypatch.setenv("WORLD_SIZE", "2")
    line = refused([*flags("few", SHORT, "--batch-size 36 --sample-level 6 4 2"),
                    *words.removeprefix("torchrun ").split()])
    assert all(part in line for part in says.split()), line
