"""simclr_deepaug.py: its formulas, views and network, folders, whole runs, export, bad input."""
import csv
import functools
import itertools
import json
import math
import pickle
import re
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from conftest import report_of, same_bits, state_of
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as V

import cka
import simclr_deepaug as S

SCRIPT = S
ROWS = torch.tensor([True, False, True, True, False, False, True, False])
SHORT = "--pictures 40 --batch-size 20 --epochs 1 --layer 4 --views none"  # two steps
approx = pytest.approx

@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """They take half of a small run; those of `done` are drawn."""
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)

def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

def flags(data, *more):
    """Two epochs of six steps on `few`. Texts in `more` are split into words, paths are not."""
    more = ("--workers 0 --device cpu --image-size 16 --batch-size 36 --epochs 2 --layer 2+4 "
            "--views simclr", *more)
    words = [w for m in more for w in (m.split() if isinstance(m, str) else [str(m)])]
    return ["--data-dir", str(data), *words]

def one_run(words):
    a = S.settings(words)
    a.layer, a.seed = a.layer[0], a.seed[0]
    return a

# ==== formulas ====

def slow_nt_xent(z1, z2, t):
    """SimCLR's formula as loops in float64: each view, its partner, and 2N - 2 negatives."""
    z = [v / v.norm() for v in torch.cat([z1, z2]).double()]
    n, total = len(z1), 0
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        negatives = [k for k in range(2 * n) if k not in (i, partner)]
        terms = torch.stack([z[i] @ z[k] / t for k in [partner, *negatives]])
        total = total + torch.logsumexp(terms, 0) - terms[0]
    return total / (2 * n)

def value_and_gradients(f, z1, z2, t):
    z1, z2 = z1.clone().requires_grad_(), z2.clone().requires_grad_()
    value = f(z1, z2, t)
    return value.detach().double(), *(g.double() for g in torch.autograd.grad(value, [z1, z2]))

@pytest.mark.parametrize("n, d, t", [(2, 3, 0.5), (7, 5, 0.5), (12, 128, 0.1), (9, 4, 0.05)])
def test_nt_xent_and_its_gradients_equal_the_formula(n, d, t):
    z1, z2 = randn(n, d), 3 * randn(n, d, seed=1)
    for got, expected in zip(value_and_gradients(S.nt_xent, z1, z2, t),
                             value_and_gradients(slow_nt_xent, z1, z2, t)):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-7 / t)

def test_nt_xent_computes_in_float32_and_of_a_zero_row_and_hard_pairs_it_is_finite():
    z1, z2 = randn(2, 6, 32).bfloat16()
    assert S.nt_xent(z1, z2, 0.1).item() == approx(slow_nt_xent(z1, z2, 0.1).item(), rel=1e-5)
    hard = torch.cat([torch.ones(4, 8), -torch.ones(4, 8), torch.zeros(1, 8)])
    assert all(v.isfinite().all() for v in value_and_gradients(S.nt_xent, hard, hard.flip(0), 0.01))

def network(*words, size=16):
    """A Net in training mode, its BatchNorms in eval mode, so that rows do not mix."""
    torch.manual_seed(0)
    a = one_run(["--device", "cpu", "--layer", "all", *words])
    net = S.Net(a, size, torch.full((3,), 0.4), torch.full((3,), 0.3)).train()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.2)
            m.running_var.uniform_(0.5, 2)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0.3, 0.2)
            m.eval()
    return net

def some_images(n=8, size=16):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1))

def gradients(net, weights):
    """Gradients of sum(weights * output) on pictures and parameters, and the output."""
    images = some_images().requires_grad_()
    torch.manual_seed(7)
    out = net(images, ROWS)
    (out * weights).sum().backward()
    return images.grad, {k: p.grad for k, p in net.named_parameters()}, out.detach()

def number_of(parameter):
    """layers.stem.conv1.weight -> 0, ..."""
    return ["input", "stem", *S.STAGES, "avgpool", "head"].index(parameter.split(".")[1]) - 1

@pytest.mark.parametrize("transform", ["dropout", "channel", "pca"])
@pytest.mark.parametrize("layer", list(S.LAYERS))
def test_stop_gradient(layer, transform):
    """Exactly zero from augmented rows to what is below; from clean rows the bits of the plain
    network. Layers above learn from both, without stop-gradient all layers do."""
    words, chosen = ("--layer", str(layer), "--transform", transform), ROWS.view(-1, 1)
    weights = randn(8, 128, seed=2)
    images, params, out = gradients(network(*words), weights)
    plain_images, plain_params, plain_out = gradients(network("--layer", "none"), weights * ~chosen)
    assert not images[ROWS].any() and torch.equal(images, plain_images) and images.any()
    assert torch.equal(out[~ROWS], plain_out[~ROWS])
    assert not any(torch.equal(a, b) for a, b in zip(out[ROWS], plain_out[ROWS]))
    _, above, _ = gradients(network(*words), weights * chosen)
    images, everywhere, _ = gradients(network(*words, "--no-stop-grad"), weights * chosen)
    for name, grad in params.items():
        below = number_of(name) <= layer
        assert torch.equal(grad, plain_params[name]) == below == (not above[name].any()), name
        assert everywhere[name].any()
    assert images[ROWS].flatten(1).any(1).all()

def low_rank(n, d, rank):
    """[n, d] of this rank with well separated singular values and a mean."""
    scales = torch.tensor([20.0, 12, 6, 3, 2, 1])[:rank]
    return (randn(n, rank) * scales) @ randn(rank, d, seed=1) / d ** 0.5 + 3 * randn(d, seed=2)

@pytest.mark.parametrize("transform", ["dropout", "channel", "pca"])
def test_gradient_through_the_augmentation_without_stop_gradient(transform):
    h, up = low_rank(8, 108, 6).view(8, 12, 3, 3).requires_grad_(), randn(8, 12, 3, 3, seed=1)
    torch.manual_seed(0)
    out = S.deep_augment(h, ROWS, 0.5, False, transform)
    (out * up).sum().backward()
    assert torch.equal(h.grad[~ROWS], up[~ROWS]) and torch.equal(out[~ROWS], h[~ROWS])
    if transform == "pca":  # flat - (flat - mean) v v^T, mean and v held fixed
        v = slow_direction(h)
        expected = up.flatten(1).double().numpy() @ (np.eye(108) - v @ v.T)
        np.testing.assert_allclose(h.grad[ROWS].flatten(1), expected[ROWS], atol=1e-4)
    else:
        torch.testing.assert_close(h.grad[ROWS], up[ROWS] * (out / h).detach()[ROWS])

@pytest.mark.parametrize("transform", ["dropout", "channel"])
@pytest.mark.parametrize("shape", [(16, 40), (16, 8, 4, 4), (16, 5, 8)])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_expectation_is_preserved(transform, shape, rate):
    """Kept with probability 1 - rate, scaled by 1 / (1 - rate). channel: one choice for all places
    of a channel of [B, C, H, W], for all tokens of a feature of [B, L, C]."""
    torch.manual_seed(0)
    h, rows = torch.ones(shape), torch.ones(16, dtype=torch.bool)
    draws = torch.stack([S.deep_augment(h, rows, rate, True, transform) for _ in range(400)])
    kept = draws > 0
    torch.testing.assert_close(draws[kept], torch.full_like(draws[kept], 1 / (1 - rate)))
    together = {(16, 8, 4, 4): kept[..., :1, :1], (16, 5, 8): kept[:, :, :1]}
    one = together.get(shape, kept) if transform == "channel" else kept
    assert torch.equal(kept, one.expand_as(kept)) and (kept[:, 0] != kept[:, 1]).any()
    off, spread = one.float().mean(0) - (1 - rate), (rate * (1 - rate)) ** 0.5
    assert abs(off.mean()) < 4.5 * spread / one.numel() ** 0.5 and off.abs().max() < spread / 3.6

def slow_direction(h):
    """The leading direction [D, 1] of the centred rows, float64, by an exact SVD."""
    flat = h.detach().double().flatten(1).numpy()
    return np.linalg.svd(flat - flat.mean(0))[2][:1].T

def slow_removal(h):
    flat, v = h.double().flatten(1).numpy(), slow_direction(h)
    return torch.from_numpy(flat - (flat - flat.mean(0)) @ v @ v.T).view(h.shape)

@pytest.mark.parametrize("shape", [(60, 48), (60, 3, 4, 4), (60, 6, 8), (5, 48)])
def test_pca_equals_an_exact_svd_when_the_rank_is_at_most_six(shape):
    h = low_rank(shape[0], 48, min(6, shape[0] - 1)).view(shape)
    for x, rtol, atol in ((h, 0, 2e-4), (h.bfloat16(), 0.02, 0.05)):
        expected = slow_removal(x.float()).to(x.dtype)
        torch.testing.assert_close(S.remove_component(x), expected, rtol=rtol, atol=atol)
    for same in (h[:1], h[:1].expand(shape), torch.zeros(shape)):  # no variance: no change
        torch.testing.assert_close(S.remove_component(same), same, rtol=0, atol=1e-5)

def test_rows_have_their_share_and_cross_augments_one_view_of_each_pair():
    torch.manual_seed(0)
    for sample in (0.1, 0.5, 1.0):
        rows = S.draw_rows(50_000, sample, "any", "cpu")
        first, second = rows.view(2, 50_000)  # the views' choices are independent
        for chosen, p in ((rows, sample), (first & second, sample ** 2)):
            assert abs(chosen.float().mean() - p) < 5 * (p * (1 - p) / len(chosen)) ** 0.5 + 1e-9
    first, second = S.draw_rows(10_000, 0.1, "cross", "cpu").chunk(2)
    assert torch.equal(first, ~second) and abs(first.float().mean() - 0.5) < 0.025

@pytest.mark.parametrize("w, scale", [(randn(2, 3, 3, 3), 1), (randn(5), 1), (randn(4, 3), 0),
                                      (torch.zeros(3, 2), 1)])
def test_lars_equals_its_formula(w, scale):
    """Kernel, vector (left alone), decay alone, zero weights (trust 1)."""
    grad, weight = scale * randn(*w.shape, seed=1), nn.Parameter(w.clone())
    weight.grad = grad.clone()
    S.lars([weight], 0.05, 0.02)
    decayed = [g + 0.05 * x for g, x in zip(grad.flatten().tolist(), w.flatten().tolist())]
    trust = 0.02 * math.hypot(*w.flatten().tolist()) / math.hypot(*decayed) or 1
    expected = grad if w.ndim == 1 else trust * torch.tensor(decayed).view_as(w)
    torch.testing.assert_close(weight.grad, expected)

def supcontrast_rate(epoch, batch, batches, lr, epochs, warm):
    """Its util.py, with cosine and warm-up, epochs counted from 1."""
    floor = lr * 0.1 ** 3
    if epoch <= warm:
        target = floor + (lr - floor) * (1 + math.cos(math.pi * warm / epochs)) / 2
        return lr / 50 + (batch + (epoch - 1) * batches) / (warm * batches) * (target - lr / 50)
    return floor + (lr - floor) * (1 + math.cos(math.pi * epoch / epochs)) / 2

@pytest.mark.parametrize("epochs, warm, steps", [(100, 10, 7), (16, 1, 32), (20, 0, 3)])
def test_learning_rate_is_supcontrasts_curve(epochs, warm, steps):
    """At every step of the warm-up, then where an epoch ends. The warm-up is at most a tenth."""
    a = S.settings(["--epochs", str(epochs), "--warmup-epochs", str(warm), "--lr", "0.8"])
    for step in [*range(warm * steps), *range((warm + 1) * steps, epochs * steps + 1, steps)]:
        epoch = step // steps + (step < warm * steps)
        expected = supcontrast_rate(epoch, step % steps, steps, 0.8, epochs, warm)
        assert S.learning_rate(step, a, steps) == approx(expected, rel=1e-12)
    rates = [S.learning_rate(s, S.settings("--epochs 5".split()), 10) for s in range(50)]
    assert rates.index(max(rates)) == 5

@pytest.mark.parametrize("words, expected", [
    ("paper", dict(
        lr=approx(3.5714286), weight_decay=approx(1.4e-5), dataset="cifar100", arch="resnet18",
        batch_size=1024, epochs=1500, temperature=0.5, rate=0.5, sample=0.5, head_layers=2,
        warmup_epochs=10, layer=["4"], views="simclr", stop_grad=True, optimizer="sgd")),
    ("paper --objective supervised", dict(lr=0.5, weight_decay=1e-4)),
    ("paper --lr 1 --layer none 6", dict(lr=1, layer=["none", "6"], arch="resnet18")),
    ("grigg", dict(
        lr=approx(4.8), weight_decay=1e-6, dataset="cifar10", arch="resnet50", batch_size=4096,
        epochs=1300, head_layers=3, crop_min=0.08, warmup_epochs=10, layer=["none"],
        views="simclr", optimizer="lars")),
    ("grigg --objective supervised", dict(lr=approx(9.6), views="crop", batch_size=8192)),
    ("grigg --batch-size 512 --views none", dict(lr=approx(0.6), views="none"))])
def test_presets_take_the_papers_constants_and_a_flag_beside_them_wins(words, expected):
    a = S.settings(["--preset", *words.split()])
    assert {k: getattr(a, k) for k in expected} == expected

def test_alignment_and_uniformity_equal_loops_gradients_too_and_meters_see_collapse():
    z1, z2 = (F.normalize(randn(9, 5, seed=s).double(), dim=1).requires_grad_() for s in (0, 1))
    slow = sum(((u - v) ** 2).sum() for u, v in zip(z1, z2)) / 9
    terms = [torch.exp(-2 * ((u - v) ** 2).sum()) for u, v in itertools.combinations(z1, 2)]
    pairs = (S.alignment(z1, z2), slow), (S.uniformity(z1), torch.log(sum(terms) / len(terms)))
    for pair in pairs:
        ours, theirs = ([x, *torch.autograd.grad(x, [z1, z2], allow_unused=True)] for x in pair)
        torch.testing.assert_close(ours, theirs)
    point, spread = randn(1, 16).expand(40, 16), torch.cat([torch.eye(16), -torch.eye(16)])
    for z, std in ((point, 0), (spread, 1), (torch.zeros(4, 8), 0)):
        m = S.meters(z, z)
        assert m["embedding_std"] == approx(std, abs=0.03) and m["alignment"] < 1e-6
        assert math.isfinite(m["uniformity"])

def clusters(n, d, classes, spread, seed=0):
    y = torch.arange(n) % classes
    return randn(classes, d, seed=99)[y] + spread * randn(n, d, seed=seed), y

@pytest.mark.parametrize("n, k", [(60, 7), (23, 200), (5, 1)])
def test_weighted_knn_equals_loops(n, k):
    (x, y), (x_test, y_test) = clusters(n, 6, 4, 1.2), clusters(50, 6, 4, 1.2, seed=1)
    correct = 0
    for q, target in zip(x_test.double(), y_test.tolist()):
        near = sorted((F.cosine_similarity(q, v, dim=0).item(), label)
                      for v, label in zip(x.double(), y.tolist()))[::-1][:k]
        votes = [sum(math.exp(c / 0.1) for c, label in near if label == i) for i in range(4)]
        correct += votes.index(max(votes)) == target
    got = S.weighted_knn(x, y, x_test.repeat(50, 1), y_test.repeat(50), 4, k=k)  # in chunks
    assert got == approx(100 * correct / 50)

def slow_logistic(x, y, classes, decay):
    """Long plain gradient descent in float64 on cross-entropy + decay/2 |W|^2; the bias is free."""
    w, b = torch.zeros(x.shape[1], classes).double(), torch.zeros(classes).double()
    for _ in range(1500):
        g = ((x @ w + b).softmax(1) - F.one_hot(y, classes)) / len(x)
        w, b = w - 0.3 * (x.T @ g + decay * w), b - 0.3 * g.sum(0)
    return lambda x_test: (x_test @ w + b).argmax(1)

def test_linear_probe_is_a_logistic_regression_with_a_well_chosen_decay():
    """Much noise, few pictures: it is as good as the best decay, and clearly above the worst. A
    feature's scale or a constant feature do not matter."""
    (x, y), (x_test, y_test) = clusters(600, 5, 3, 1), clusters(900, 5, 3, 1, seed=1)
    x, x_test = torch.cat([x, randn(600, 200, seed=7)], 1), torch.cat([x_test, randn(900, 200)], 1)
    unit, unit_test = ((v - x.mean(0)).double() / x.double().std(0) for v in (x, x_test))
    slow = [100 * (slow_logistic(unit, y, 3, decay)(unit_test) == y_test).double().mean().item()
            for decay in (1e-1, 1e-5)]
    x, x_test = (F.pad(v * torch.logspace(-3, 2, 205) + 3, (0, 1), value=9) for v in (x, x_test))
    got, *others = [S.linear_probe(x, y, x_test, (y_test + s) % 3, 3) for s in range(3)]
    assert got == approx(slow[0], abs=1.5) and got > slow[1] + 2, (got, slow)
    assert got + sum(others) == approx(100)  # the test labels choose nothing

def trained(objective, out):
    """Losses and weights of six steps. BatchNorm's statistics are a process's own on the CPU:
    taken out."""
    a = one_run(f"--batch-size 12 --epochs 2 --lr 0.1 --layer none --objective {objective}".split())
    images, labels = S.draw_shapes(40, 0, "cpu")
    split = S.Split(32, labels, images)
    net = S.build(a, split, list(range(20)))
    for module in list(net.modules()):
        for name, m in module.named_children():
            if isinstance(m, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    state = S.train(a, net, split, out, dict, None)
    return [row["loss"] for row in state["log"]], net.state_dict()

def one_of_two(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = {objective: trained(objective, folder) for objective in ("simclr", "supervised")}
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()

def test_two_processes_give_the_losses_and_weights_of_one(processes, tmp_path):
    children = [processes(target=one_of_two, args=(rank, tmp_path)) for rank in (0, 1)]
    for child in children:
        child.start()
    (tmp_path / "one").mkdir()
    one = {name: trained(name, tmp_path / "one") for name in ("simclr", "supervised")}
    for rank, child in enumerate(children):
        child.join(120)
        for objective, got in torch.load(tmp_path / f"{rank}.pt").items():
            (losses, weights), (expected, others) = got, one[objective]
            assert losses == approx(expected, rel=1e-4) and len(losses) == 6
            torch.testing.assert_close(weights, others, rtol=1e-3, atol=1e-5)

# ==== views and network ====

def pictures(n, height=32, width=32):
    """Shapes in strong colours with grey, black, white and red pixels among them."""
    images = S.draw_shapes(n, 0, "cpu")[0].float() + 90 * randn(n, 3, 1, 1)
    images = V.resize(images, [height, width]).clamp(0, 255).round().to(torch.uint8)
    images[:, :, 0, 0], images[:, :, 0, 1], images[:, :, 1, 0] = 0, 255, 127
    images[:, 0, 1, 1], images[:, 1, 1, 1], images[:, 2, 1, 1] = 255, 0, 0
    return images

def drawn(monkeypatch, images, size, **options):
    """make_views, and what it really drew: (views, boxes, flips, [(operation, factors)])."""
    log = {"crop_boxes": [], "resize_matrix": [], "adjust": []}
    for name, calls in log.items():
        def spy(*args, real=S.__dict__[name], calls=calls):
            calls.append((args, real(*args)))
            return calls[-1][1]
        monkeypatch.setattr(S, name, spy)
    views = S.make_views(images, size, **options)
    monkeypatch.undo()
    boxes = torch.stack(log["crop_boxes"][0][1], 1).int().tolist()
    flips = log["resize_matrix"][1][0][4]
    return views, boxes, flips, [(args[1], args[2].flatten()) for args, _ in log["adjust"]]

def is_grey(views):
    return (views - views[:, :1]).abs().amax((1, 2, 3)) < 1e-5

@pytest.mark.parametrize("height, width, size, options", [
    (32, 32, 32, {}), (40, 28, 24, {"jitter": (1, 1, 1, 0.5)}), (7, 5, 32, {}),
    (20, 120, 16, {}), (2, 50, 8, {}), (64, 40, 16, {"jitter": (0.8, 0.8, 0.8, 0.2),
    "crop": (0.001, 1)}), (24, 48, 32, {"jitter": None, "crop": (0.001, 0.1)})])
def test_views_equal_torchvision_with_the_same_parameters(monkeypatch, height, width, size,
                                                          options):
    torch.manual_seed(3)
    images = pictures(60, height, width)
    views, boxes, flips, operations = drawn(monkeypatch, images, size, **options)
    adjust = [V.adjust_brightness, V.adjust_contrast, V.adjust_saturation, V.adjust_hue]
    assert views.dtype == torch.float32 and 15 < flips.sum() < 45
    assert len(operations) == (0 if options.get("jitter", 1) is None else 4)
    for i, (view, grey) in enumerate(zip(views, is_grey(views))):
        x = V.resized_crop(images[i].float() / 255, *boxes[i], [size, size], antialias=True)
        x = V.hflip(x) if flips[i] else x
        for operation, factors in operations:
            x = adjust[operation](x, factors[i].item())
        x = V.rgb_to_grayscale(x, num_output_channels=3) if grey else x
        # hue of a nearly grey pixel enlarges its rounding by 1 / chroma
        torch.testing.assert_close(view, x, rtol=0, atol=1e-4)

@pytest.mark.parametrize("height, width", [(32, 32), (48, 24), (24, 40)])
def test_crop_boxes_are_distributed_as_torchvisions(height, width):
    torch.manual_seed(0)
    picture = torch.zeros(3, height, width)
    theirs = torch.tensor([RandomResizedCrop.get_params(picture, [0.2, 1.0], [3 / 4, 4 / 3])
                           for _ in range(3000)]).double()
    ours = torch.stack(S.crop_boxes(12_000, height, width, (0.2, 1.0), "cpu"), 1).double()
    assert torch.equal(ours, ours.round())
    levels = torch.linspace(0.05, 0.95, 10).double()

    def areas_shapes_and_middles(b):
        top, left, h, w = b.unbind(1)
        return h * w / height / width, (w / h).log(), (top + h / 2) / height, (left + w / 2) / width
    for a, b in zip(*map(areas_shapes_and_middles, (ours, theirs))):
        assert abs(a.mean() - b.mean()) < 0.015
        assert (a.quantile(levels) - b.quantile(levels)).abs().max() < 0.05

def test_jitter_and_grey_are_drawn_as_often_and_as_widely_as_supcontrasts(monkeypatch):
    """p .8 and .2, independently; factors uniform in .6 to 1.4 and -.1 to .1; 24 orders."""
    torch.manual_seed(0)
    colourful = torch.tensor([200, 100, 50], dtype=torch.uint8).view(1, 3, 1, 1)
    views, _, flips, operations = drawn(monkeypatch, colourful.expand(8000, 3, 4, 4), 4)
    grey, factors = is_grey(views), dict(operations)
    jittered = factors[0] != 1
    for chosen, p in ((flips, 0.5), (grey, 0.2), (jittered, 0.8), (jittered & grey, 0.16)):
        assert abs(chosen.float().mean() - p) < 0.02
    for operation, f in factors.items():
        assert torch.equal(f != (operation != 3), jittered)  # all four, or none of them
        low, high = (-0.1, 0.1) if operation == 3 else (0.6, 1.4)
        levels = torch.linspace(0.1, 0.9, 5)
        off = f[jittered].quantile(levels) - (low + levels * (high - low))
        assert off.abs().max() < 0.03 * (high - low)
    orders = {tuple(o for o, _ in drawn(monkeypatch, colourful, 4)[3]) for _ in range(250)}
    assert orders == set(itertools.permutations(range(4)))

def test_shapes_are_a_function_of_their_seed_and_balanced():
    one, again, (other, labels) = (S.draw_shapes(200, s, "cpu") for s in (3, 3, 4))
    assert same_bits(one, again) and (one[0] != other).flatten(1).any(1).all()
    assert labels.bincount().tolist() == [10] * 20

def test_two_views_come_as_views_says_first_views_then_second():
    """none: the picture itself, twice; crop: places change, colours not; simclr: both do."""
    torch.manual_seed(0)
    shapes = pictures(32, 24, 24)
    colours = shapes[:, :, 12:13, 12:13].clamp(40, 200).expand(32, 3, 24, 24)
    resized = V.resize(shapes.float() / 255, [16, 16], antialias=True).repeat(2, 1, 1, 1)
    for kind in ("none", "crop", "simclr"):
        a = S.settings(["--views", kind])
        flat, shaped = S.two_views(colours, 16, a), S.two_views(shapes, 16, a)
        off = (flat - colours[:, :, :16, :16].repeat(2, 1, 1, 1) / 255).abs()
        assert off.max() < 1e-5 if kind != "simclr" else off.median() > 1e-5
        still = torch.allclose(shaped, resized, atol=1e-6)
        assert still == (kind == "none") == torch.equal(*shaped.chunk(2))
    whole = S.two_views(shapes, 16, S.settings("--views crop --crop-min 1".split()))
    same = [(whole - x).abs().flatten(1).amax(1) < 1e-5 for x in (resized, resized.flip(3))]
    assert (same[0] | same[1]).float().mean() > 0.9 and same[0].any() and same[1].any()

@pytest.mark.parametrize("arch, size", [("resnet18", 64), ("resnet50", 16)])
def test_features_and_activations_are_torchvisions_with_the_exported_weights(arch, size, tmp_path):
    """Only fc is missing; below 64 px the stem is 3x3 without max pooling. Even: a block's output;
    odd: its residual, not overwritten by the addition in place."""
    net, (images, labels) = network("--arch", arch, size=size).eval(), S.draw_shapes(4, 0, "cpu")
    split = S.Split(size, labels, images)
    assert S.export(S.settings(["--arch", arch]), net, split, [], tmp_path, {}) <= 1e-4
    theirs, seen, images = getattr(torchvision.models, arch)().eval(), {}, some_images(2, size)
    if size < 64:
        theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    weights = load_file(tmp_path / "weights.safetensors")
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert sorted(missing) == ["fc.bias", "fc.weight"] and unexpected == []
    theirs.fc = nn.Identity()
    for name, block in theirs.named_modules():
        if hasattr(block, "conv2"):
            block.register_forward_hook(lambda *call, name=name: seen.update({name: call}))
    features, acts = theirs((images - 0.4) / 0.3), net.activations(images)
    close = functools.partial(torch.testing.assert_close, rtol=1e-3, atol=1e-3)
    close([net.features(images), acts["avgpool"]], [features] * 2)
    assert torch.equal(acts["head"], net(images, ROWS[:2])) and len(acts) == 2 * len(seen) + 5
    for name, (block, [x], out) in seen.items():
        odd, shortcut = acts[f"{name}.odd"], block.downsample(x) if block.downsample else x
        close([acts[f"{name}.even"], F.relu(odd + shortcut)], [out] * 2)
        assert (odd < 0).any()

# ==== data ====

def save(file, width=20, height=20, seed=0, mode="RGB"):
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    picture.convert(mode).save(file)
    return file

def fill(root, layout):
    """fill(root, "cat/*:12 dog/*:9") -> root with cat/00.png to cat/11.png, ..., all different."""
    for name, count in (entry.split(":") for entry in layout.split()):
        for i in range(int(count)):
            save(root / f"{name.replace('*', f'{i:02}')}.png", seed=[i, *name.encode()])
    return root

def load(root, *more):
    a = S.settings(["--data-dir", str(root), "--workers", "0", "--device", "cpu", *more])
    return S.load_folder(a)

def pixels(file):
    return torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)

@pytest.mark.parametrize("layout, names, train_counts, test_counts, says", [
    ("cat/*:20 emu/*:1 fox/*:5", "cat emu fox", [18, 1, 4], [2, 0, 1], "3 classes,"),
    ("*:20", "", [18], [2], "no classes"), ("only/*:20", "", [18], [2], "no classes"),
    ("cat/*:25 dog/*:10 *:3", "cat dog", [23, 9], [2, 1], "2 classes|3 left out"),
    ("cat/*:9 dog/*:9 .x*:1 cat/._*:1 __MACOSX/cat/*:1 .git/*:1 cat/.a/*:1", "cat dog", [8, 8],
     [1, 1], "0 left out"),
    ("TRAIN/cat/*:6 TRAIN/dog/*:6 Validation/cat/*:3 Validation/owl/*:2", "cat dog", [6, 6],
     [3, 0], "2 left out"),
    ("train/*:8 valid/*:3", "", [8], [3], "no classes"),
    ("train/cat/*:10 train/dog/*:10 __MACOSX/*:1", "cat dog", [9, 9], [1, 1], ""),
    ("train/cat/*:6 train/dog/*:6 train/*:1 test/*:5 val/cat/*:3 val/dog/*:2", "cat dog", [6, 6],
     [3, 2], "1 left out"),
    ("car/*:10 plane/*:10 train/*:10", "car plane train", [9, 9, 9], [1, 1, 1], "")])
def test_folders_are_read_as_people_lay_them_out(tmp_path, capsys, layout, names, train_counts,
                                                 test_counts, says):
    """A tenth of each class is held out, but for folders of splits in any case; strays, hidden
    files, helper folders, classes that train lacks are left out; of two test folders the labelled
    one counts; a class may be called train."""
    train, test, classes = load(fill(tmp_path, layout))
    told = capsys.readouterr().out
    assert classes == names.split() and all(part in told for part in says.split("|"))
    assert not {*train.files} & {*test.files} and train.size == 20
    for split, counts in ((train, train_counts), (test, test_counts)):
        assert (split.labels + (not classes)).bincount(minlength=len(counts)).tolist() == counts
        for picture, label, file in zip(split.images, split.labels, split.files, strict=True):
            assert torch.equal(picture, pixels(file))
            assert classes[label] == file.parent.name if classes else label == -1
    assert not classes or train.labels.tolist() != sorted(train.labels.tolist())  # mixed

def test_links_to_class_folders_are_followed_and_circular_ones_end(tmp_path):
    root = fill(tmp_path / "root", "bird/*:12")
    (root / "cat").symlink_to(fill(tmp_path / "elsewhere", "*:12"))
    (root / "bird" / "again").symlink_to(root / "bird")
    (root / "loop").symlink_to(root)
    assert [*map(len, load(root))] == [22, 2, 2]

def test_every_kind_of_picture_becomes_rgb_and_deep_grey_is_scaled_by_its_own_range(tmp_path):
    kinds = "png L, png RGBA, png P, png 1, JPG RGB, jpg CMYK, bmp RGB, webp RGB".split(", ")
    for i, (ending, mode) in enumerate(map(str.split, kinds)):
        save(tmp_path / f"{i}.{ending}", seed=i, mode=mode)
    train, test, _ = load(tmp_path)
    assert len(train) + len(test) == 8
    assert all(torch.equal(x, pixels(f)) for x, f in zip(train.images, train.files))
    ramp = np.linspace(1000, 3000, 400).reshape(20, 20)
    expected = torch.linspace(0, 255, 400).view(20, 20).expand(3, 20, 20)
    for name, deep in (("16.png", ramp.astype(np.uint16)), ("a.tiff", ramp.astype(np.float32))):
        Image.fromarray(deep).save(tmp_path / name)
        got = S.read_square(tmp_path / name, 20).float()
        torch.testing.assert_close(got, expected, rtol=0, atol=0.7)

def test_of_large_pictures_the_middle_becomes_8_7_of_the_view_wide(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", 1280, 720, seed=i)
    train = load(tmp_path)[0]
    assert train.size == 224 and train.images.shape == (2, 3, 256, 256)
    whole = V.center_crop(V.resize(pixels(train.files[0]), [256], antialias=True), [256, 256])
    assert (train.images[0].float() - whole.float()).abs().mean() < 2
    assert load(tmp_path, "--image-size", "28")[0].images.shape == (2, 3, 32, 32)

@pytest.mark.parametrize("workers", [0, 1])
def test_streamed_pictures_are_those_in_memory_and_broken_ones_are_named_once(tmp_path, capsys,
                                                                              workers):
    """For a broken one the next is taken, after the last the first, and its label."""
    train = load(fill(tmp_path, "train/cat/*:12 train/dog/*:12 test/cat/*:3 test/dog/*:3"))[0]
    broken = train.files[5:9] + train.files[-2:]
    for file in broken:
        file.write_bytes(file.read_bytes()[:-30])
    broken[1].write_text("not a picture")
    capsys.readouterr()
    train, _, classes = load(tmp_path)
    labels = torch.tensor([classes.index(f.parent.name) for f in train.files])
    a = S.settings(["--workers", str(workers), "--device", "cpu"])
    streamed = S.Split(train.size, labels, None, train.files, 20, a)
    order = torch.arange(24).roll(5)
    for _ in range(2):
        for pair in zip(train.batches(order, 7), streamed.batches(order, 7), strict=True):
            assert same_bits(*map(list, pair))
    told = capsys.readouterr().out
    assert all(told.count(str(file)) == 2 for file in broken)  # once each split
    assert len(train.broken) == len(streamed.broken) == 6
    for i, file in enumerate(train.files):
        used = next(f for f in [*train.files[i:], *train.files] if f not in broken)
        assert torch.equal(train.images[i], pixels(used)) and (file in broken) == (file != used)
        assert classes[train.labels[i]] == used.parent.name

def test_cifar_is_read_by_torchvision(tmp_path, monkeypatch):
    """The files' form is the real one; so few pictures have other checksums."""
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    images = torch.randint(256, (13, 3, 32, 32), dtype=torch.uint8)
    entries = {"meta": {"fine_label_names": ["apple", "bear"]},
               "train": {"data": images[:9].flatten(1).numpy(), "fine_labels": [0, 1, 1] * 3},
               "test": {"data": images[9:].flatten(1).numpy(), "fine_labels": [1, 1, 0, 0]}}
    (tmp_path / "cifar-100-python").mkdir()
    for name, entry in entries.items():
        (tmp_path / "cifar-100-python" / name).write_bytes(pickle.dumps(entry))
    a = S.settings(["--dataset", "cifar100", "--data-dir", str(tmp_path), "--device", "cpu"])
    train, test, classes = S.load_data("cifar100", a)
    assert classes == ["apple", "bear"] and torch.equal(train.images, images[:9])
    assert torch.equal(test.images, images[9:])
    assert [train.labels.tolist(), test.labels.tolist()] == [[0, 1, 1] * 3, [1, 1, 0, 0]]

# ==== whole runs ====

@pytest.fixture(scope="module")
def flat(few):
    """60 pictures without labels: no linear probe, so a run on them takes half a second."""
    return few / "class0"

@pytest.fixture(scope="module")
def done(few, tmp_path_factory):
    """A finished run of 12 steps; tests change nothing in its folder."""
    out = tmp_path_factory.mktemp("done") / "run"
    S.main(flags(few, "--out", out))
    return out

@pytest.fixture(scope="module")
def short(flat, tmp_path_factory):
    out = tmp_path_factory.mktemp("short") / "run"
    S.main(flags(flat, SHORT, "--out", out))
    return out

def test_the_run_folder_holds_what_the_design_says(done, few):
    assert {p.name for p in done.iterdir()} == {
        "config.json", "metrics.csv", "checkpoint.pt", "encoder.pt", "weights.safetensors",
        "report.json", "views.png", "curves.png", "cka.png", "cka.json", "samples.npz",
        "compare.png"}
    assert all(Image.open(picture).width > 150 for picture in done.glob("*.png"))
    report, config = report_of(done), json.loads((done / "config.json").read_text())
    assert {"linear", "linear_untrained", "knn", "seconds", "images_per_second", "alignment_train",
            "alignment_test", "uniformity_train", "uniformity_test"} <= {*report}
    assert report["export_difference"] < 1e-4 and config["torch"] == torch.__version__
    rows = list(csv.DictReader((done / "metrics.csv").read_text().splitlines()))
    for step, row in enumerate(rows):
        assert float(row["lr"]) == S.learning_rate(step, S.settings(flags(few)), 6)
        assert 0 <= float(row["alignment"]) <= 4 and float(row["embedding_std"]) > 0
    assert int(row["step"]) == len(rows) == 12

def test_probing_also_elsewhere_changes_no_bit_and_steps_and_epochs_differ(
        few, done, tmp_path, monkeypatch, capsys):
    seen, rows, two_views, draw_rows, shapes = [], [], S.two_views, S.draw_rows, S.draw_shapes
    monkeypatch.setattr(S, "two_views", lambda x, *a: seen.append(x) or two_views(x, *a))
    monkeypatch.setattr(S, "draw_rows", lambda *a: rows.append(draw_rows(*a)) or rows[-1])
    monkeypatch.setattr(S, "draw_shapes", lambda n, *a: shapes(n // 128, *a))  # runs in no time
    S.main(flags(few, "--probe-every 1 --transfer shapes --out", tmp_path / "run"))
    state, other = state_of(tmp_path / "run"), state_of(done)
    assert all(same_bits(state[k], other[k]) for k in ("model", "optimizer"))
    first, middle, last = state["probes"]
    assert {"linear", "shapes_linear", "shapes_knn"} <= {*first} & {*middle} & {*last}
    assert [{k: row[k] for k in other["probes"][0]} for row in (first, last)] == other["probes"]
    assert len({tuple(r.tolist()) for r in rows}) == 12
    first, second = torch.cat(seen[:6]), torch.cat(seen[6:12])  # an epoch: no picture twice
    assert len(first.unique(dim=0)) == len(second.unique(dim=0)) == 216
    assert not torch.equal(first, second)
    shown = capsys.readouterr().err
    assert re.search(r"\n\r?100%.* 432/432 .*images/s, loss=\d\.\d+\]\r?\n", shown)

@pytest.mark.parametrize("text, kept", [
    ("--layer 2 --freeze before", [-1, 0, 1, 2]), ("--layer 2 --freeze after", [3, 4, 5, 6]),
    ("--layer 1+3 --freeze after", [2, 3, 4, 5, 6]), ("--layer 3 --sample 1", [-1, 0, 1, 2, 3]),
    ("--layer 3 --sample 1 --no-stop-grad", []), ("--layer 3 --sample 1 --pairs cross", [])])
def test_frozen_layers_and_init_keep_the_weights_they_name(flat, tmp_path, short, text, kept):
    """BatchNorm's statistics go on running everywhere. (cross: half of the rows are clean.)"""
    report = S.main(flags(flat, SHORT, text, "--init", short, "--out", tmp_path / "run"))
    assert report["alignment_test_untrained"] == report_of(short)["alignment_test"]
    start = state_of(short)["model"]
    for k, v in state_of(tmp_path / "run")["model"].items():
        stays = number_of(k) in kept and "running" not in k and "tracked" not in k
        assert torch.equal(v, start[k]) == (stays or ".input." in k), k

def test_layer_auto_is_where_the_co_adapted_stretch_starts_or_ends(flat, tmp_path, done):
    start, end = cka.main([f"{done}/encoder.pt", "--numbered", f"--out={tmp_path}"])["stretch"]
    auto = flags(flat, SHORT, "--layer auto --init", done)
    for flag, layer in (("--stop-grad", start), ("--no-stop-grad", end)):
        report = S.main([*auto, flag, "--out", str(tmp_path / flag)])
        assert report["flags"]["layer"] == str(layer)

def test_supervised_training_learns_the_labels_of_both_views(few, tmp_path):
    """Chance, with labels that are not the pictures' own, is log 4 = 1.39."""
    S.main(flags(few, SHORT, "--objective supervised --layer none --epochs 20 --lr 0.1 --out",
                 tmp_path / "run"))
    assert statistics.mean(r["loss"] for r in state_of(tmp_path / "run")["log"][-4:]) < 0.5

def test_several_values_make_runs_and_compare_names_damaged_reports(flat, tmp_path, capsys):
    """A table of means and deviations; each run counts once; runs that measure other things stand
    in the same table, first or last."""
    out, name = tmp_path / "out", "alignment_test"
    table = S.main(flags(flat, SHORT, "--layer none 4 --seed 0 1 --out", out))
    runs = [out / f"layer-{layer}-seed-{seed}" for layer in ("none", 4) for seed in (0, 1)]
    assert {p for p in out.iterdir() if p.is_dir()} == {*runs}
    assert list(table) == ["untrained", "layer none", "layer 4"]
    printed, report = capsys.readouterr().out, report_of(runs[0])
    for layer, two in (("none", runs[:2]), (4, runs[2:])):
        mean, std = (f([report_of(r)[name] for r in two]) for f in (np.mean, statistics.stdev))
        assert table[f"layer {layer}"][name] == approx((mean, std))
        assert f"{mean:.2f}" + (f" ± {std:.2f}" if std > 0.005 else "") in printed
    other = {**report, "flags": {**report["flags"], "lr": 9}, "probes": [{"knn": 5}]}
    for i, bad in enumerate(([], {"script": "x"}, {**report, "script": "vicreg_probe"}, other)):
        (tmp_path / f"out{i}").mkdir()
        (tmp_path / f"out{i}/report.json").write_text(json.dumps(bad)[:10 ** (i + 1)])
    for folders in ([tmp_path, *runs], [*runs, tmp_path]):
        assert list(S.main(["--compare", *map(str, folders)])) == [
            "untrained", "layer none, lr 0.5", "layer none, lr 9", "layer 4, lr 0.5"]
        assert capsys.readouterr().out.count("/report.json: left out") == 3

def test_encoder_is_the_trained_network_needs_torch_alone_and_can_be_fine_tuned(
        done, few, tmp_path):
    """At other batch sizes, in a fresh process; it normalises inside and says what it is. The
    probes in the report read layer 5; the samples beside it are test pictures."""
    *splits, classes = S.load_folder(one_run(flags(few)))
    train, test = ((S.to_unit(s.images, 16), s.labels) for s in splits)
    net = S.build(one_run(flags(few)), splits[0], classes).eval()
    net.load_state_dict(state_of(done)["model"])
    mean = splits[0].images.float().mean((0, 2, 3)) / 255
    torch.testing.assert_close(net.layers.input.mean.flatten(), mean)
    torch.save([train[0], test[0][:1]], tmp_path / "inputs.pt")
    code = ("import sys, torch; m = torch.jit.load(sys.argv[1]); torch.save([m(x).detach() "
            "for x in torch.load('inputs.pt')], 'outputs.pt')")
    subprocess.run([sys.executable, "-I", "-W", "ignore", "-c", code, done / "encoder.pt"],
                   cwd=tmp_path, check=True)
    got, expected = torch.load(tmp_path / "outputs.pt"), net.features(train[0])
    for y, ours in zip(got, (expected, net.features(test[0][:1]))):
        torch.testing.assert_close(y, ours.detach(), rtol=1e-4, atol=1e-5)
    extra, report, x = {"config.json": ""}, report_of(done), test[0]
    encoder, acts = torch.jit.load(done / "encoder.pt", _extra_files=extra), net.activations(x)
    torch.testing.assert_close(encoder.activations(x), [*acts.values()], rtol=1e-4, atol=1e-4)
    config = json.loads(extra["config.json"])
    assert config["layers"] == [*acts] and config["image_size"] == 16
    assert config["classes"] == classes and config["layer_numbers"]["layer1.0.even"] == 1
    tables = [got[0], train[1], net.features(x).detach(), test[1]]
    for name, f in (("linear", S.linear_probe), ("knn", S.weighted_knn)):
        assert f(*tables, 4) == approx(report[name], abs=4.2)  # one picture
    samples = {k: torch.from_numpy(v) for k, v in np.load(done / "samples.npz").items()}
    assert same_bits(samples, {"images": (x * 255).round().byte(), "labels": test[1]})
    encoder.to(torch.float64)(train[0].double()).square().sum().backward()
    expected.square().sum().backward()
    for (name, p), q in zip(net.named_parameters(), encoder.parameters(), strict=True):
        if "head" not in name:
            torch.testing.assert_close(q.grad.float(), p.grad, rtol=1e-3, atol=1e-3)

# ==== every experiment of the paper as a command line, and bad ones ====

@pytest.mark.parametrize("text", [
    "--layer none", "--layer 1+3+6", "--no-stop-grad", "--sample 1", "--rate 0.1",
    "--layer 2 --transform channel", "--transform pca", "--pairs cross", "--optimizer lars",
    "--views crop", "--views simclr", "--head-layers 3", "--temperature 0.1",
    "--weight-decay 0.1", "--seed 3", "--pictures 21"])
def test_every_experiment_runs_and_changes_the_result(flat, short, tmp_path, text):
    """Also without labels: then there is no linear probe."""
    report = S.main(flags(flat, SHORT, text, "--out", tmp_path / "run"))
    assert report["steps"] == (1 if "pictures" in text else 2)
    assert "linear" not in report and math.isfinite(report["alignment_test"])
    assert not same_bits(state_of(tmp_path / "run")["model"], state_of(short)["model"])
    assert torch.jit.load(tmp_path / "run/encoder.pt")(torch.rand(2, 3, 16, 16)).isfinite().all()

@pytest.mark.parametrize("words, says", [
    ("--layer auto", "--layer auto --init"),
    ("--layer auto --init empty", "empty/encoder.pt is missing"),
    ("--freeze before --layer none", "--freeze --layer"),
    ("--freeze before --layer 6", "no layer is left"),
    ("--layer 6 --sample 1", "no layer is left"),
    ("--dataset shapes", "--data-dir"), ("--objective supervised", "--objective labels"),
    ("--data-dir broken --workers 0", "broken can be read"),
    ("--data-dir broken --workers 1", "broken can be read"),
    ("--dataset cifar100 --data-dir empty", "cifar100 empty cannot be downloaded"),
    ("--transfer cifar10", "cifar10 cannot be downloaded"),
    ("--init run --head-layers 3", "--init run flags")])
def test_bad_input_is_one_line_and_nothing_is_written(refused, tmp_path, monkeypatch, flat, short,
                                                      words, says):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    for i, file in enumerate(fill(tmp_path / "broken", "cat/*:20 dog/*:20").rglob("*.png")):
        file.write_bytes(file.read_bytes()[:-60] if i % 2 else b"text")
    Path("run").symlink_to(short)
    line = refused(flags(flat, "--batch-size 32", words))
    assert all(part in line for part in says.split()), line
