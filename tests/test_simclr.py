"""simclr_deepaug.py: its formulas against slow ones, views and network against torchvision, the
folder reader, whole runs, kills and resumes, the export, and what bad input gets."""
import contextlib
import csv
import io
import itertools
import json
import math
import multiprocessing
import random
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from conftest import Trap, same_bits
from PIL import Image
from torch import nn
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as V

import cka
import simclr_deepaug as S

SCRIPT = S
ROWS = torch.tensor([True, False, True, True, False, False, True, False])
SHORT = "--pictures 40 --batch-size 20 --epochs 1 --layer 4 --views none"  # two steps

@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Figures take half of a small run; those of `done` are drawn and looked at."""
    monkeypatch.setattr(S, "draw", lambda *_: None)
    monkeypatch.setattr(cka, "draw", lambda *_: None)

def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

def flags(data, *more):
    """Two epochs of six steps on the 240 pictures of `few`, with dropout at two layers. Texts in
    `more` are split into words, paths are not."""
    more = ("--workers 0 --device cpu --image-size 16 --batch-size 36 --epochs 2 --layer 2+4 "
            "--views simclr", *more)
    words = [w for m in more for w in (m.split() if isinstance(m, str) else [str(m)])]
    return ["--data-dir", str(data), *words]

def one_run(words):
    """The settings of a command line with one layer and one seed."""
    a = S.settings(words)
    a.layer, a.seed = a.layer[0], a.seed[0]
    return a

def state_of(run):
    return torch.load(Path(run) / "checkpoint.pt", weights_only=True)

def report_of(run):
    return json.loads((Path(run) / "report.json").read_text())

def ended(words, capsys):
    """The exit code of a command line that does not end well, and its last line on stderr."""
    with pytest.raises(SystemExit) as end:
        S.main(words)
    return end.value.code, capsys.readouterr().err.strip().splitlines()[-1]

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

def test_nt_xent_at_the_edges():
    """A zero row, hard pairs: finite. bfloat16: computed in float32."""
    z1, z2 = randn(5, 8), randn(5, 8, seed=1)
    z1[2] = 0
    hard = torch.cat([torch.ones(4, 8), -torch.ones(4, 8)]) + 1e-3 * randn(8, 8)
    for a, b, t in ((z1, z2, 0.05), (hard, hard.flip(0), 0.01)):
        assert all(v.isfinite().all() for v in value_and_gradients(S.nt_xent, a, b, t))
    z1, z2 = randn(6, 32).bfloat16(), randn(6, 32, seed=1).bfloat16()
    slow = slow_nt_xent(z1, z2, 0.1).item()
    assert S.nt_xent(z1, z2, 0.1).item() == pytest.approx(slow, rel=1e-5)

def network(*words, size=16):
    """A Net in training mode, its BatchNorms in eval mode, so that rows do not mix."""
    torch.manual_seed(0)
    a = one_run(["--device", "cpu", *words])
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

@pytest.mark.parametrize("words", ["--layer all", "--layer 4+6+-1", "--layer 3 --transform pca"])
def test_eval_mode_has_no_augmentation(words):
    images, net, plain = some_images(), network(*words.split()), network("--layer", "none")
    assert not torch.equal(net(images, ROWS), plain(images, ROWS))
    net.eval(), plain.eval()
    assert torch.equal(net(images), plain(images)) and torch.equal(net(images, ROWS), plain(images))
    assert torch.equal(net.features(images), plain.features(images))

def low_rank(n, d, rank):
    """[n, d] of this rank with well separated singular values and a mean."""
    scales = torch.tensor([20.0, 12, 6, 3, 2, 1])[:rank]
    return (randn(n, rank) * scales) @ randn(rank, d, seed=1) / d ** 0.5 + 3 * randn(d, seed=2)

@pytest.mark.parametrize("transform", ["dropout", "channel", "pca"])
def test_gradient_through_the_augmentation_without_stop_gradient(transform):
    """Augmented rows: the mask or projection itself; clean rows: the identity."""
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
    one = kept
    if transform == "channel":
        one = kept[..., :1, :1] if len(shape) == 4 else kept[:, :, :1] if len(shape) == 3 else kept
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
    got, half = S.remove_component(h), S.remove_component(h.bfloat16())
    torch.testing.assert_close(got, slow_removal(h).float(), rtol=0, atol=2e-4)
    assert half.dtype == torch.bfloat16
    expected = slow_removal(h.bfloat16().float()).float()
    torch.testing.assert_close(half.float(), expected, rtol=0.02, atol=0.05)
    for same in (h[:1], h[:1].expand(shape), torch.zeros(shape)):  # no variance: no change
        torch.testing.assert_close(S.remove_component(same), same, rtol=0, atol=1e-5)

def test_rows_have_their_share_and_cross_augments_one_view_of_each_pair():
    torch.manual_seed(0)
    for sample in (0.1, 0.5, 1.0):
        rows = S.draw_rows(50_000, sample, "any", "cpu")
        assert rows.shape == (100_000,) and rows.dtype == torch.bool
        assert abs(rows.float().mean() - sample) < 5 * (sample * (1 - sample) / 1e5) ** 0.5 + 1e-9
        first, second = rows.chunk(2)  # the views' choices are independent
        assert abs((first & second).float().mean() - sample ** 2) < 0.012
    first, second = S.draw_rows(10_000, 0.1, "cross", "cpu").chunk(2)
    assert torch.equal(first, ~second) and abs(first.float().mean() - 0.5) < 0.025

@pytest.mark.parametrize("w, scale", [(randn(4, 3), 1), (randn(2, 3, 3, 3), 1), (randn(5), 1),
                                      (randn(4, 3), 0), (torch.zeros(3, 2), 1)])
def test_lars_equals_its_formula(w, scale):
    """Matrix, kernel, vector (left alone), decay alone, zero weights (trust 1)."""
    grad, weight = scale * randn(*w.shape, seed=1), nn.Parameter(w.clone())
    weight.grad = grad.clone()
    S.lars([weight], 0.05, 0.02)
    decayed = [g + 0.05 * x for g, x in zip(grad.flatten().tolist(), w.flatten().tolist())]
    trust = 0.02 * math.hypot(*w.flatten().tolist()) / math.hypot(*decayed) or 1
    expected = grad if w.ndim == 1 else trust * torch.tensor(decayed).view_as(w)
    torch.testing.assert_close(weight.grad, expected)

def supcontrast_rate(epoch, batch, batches, lr, epochs, warm):
    """util.py of SupContrast with cosine and warm-up, epochs counted from 1."""
    floor = lr * 0.1 ** 3
    if epoch <= warm:
        target = floor + (lr - floor) * (1 + math.cos(math.pi * warm / epochs)) / 2
        return lr / 50 + (batch + (epoch - 1) * batches) / (warm * batches) * (target - lr / 50)
    return floor + (lr - floor) * (1 + math.cos(math.pi * epoch / epochs)) / 2

@pytest.mark.parametrize("epochs, warm, steps", [(100, 10, 7), (16, 1, 32), (20, 0, 3)])
def test_learning_rate_is_supcontrasts_curve(epochs, warm, steps):
    """At every step of the warm-up, then where an epoch ends; between, ours moves every step. The
    warm-up is at most a tenth of the run."""
    a = S.settings(["--epochs", str(epochs), "--warmup-epochs", str(warm), "--lr", "0.8"])
    points = [(step, step // steps + 1, step % steps) for step in range(warm * steps)]
    for step, epoch, batch in points + [(e * steps, e, 0) for e in range(warm + 1, epochs + 1)]:
        expected = supcontrast_rate(epoch, batch, steps, 0.8, epochs, warm)
        assert S.learning_rate(step, a, steps) == pytest.approx(expected, rel=1e-12)
    rates = [S.learning_rate(s, S.settings("--epochs 5".split()), 10) for s in range(50)]
    assert rates.index(max(rates)) == 5

def test_preset_paper_takes_the_papers_constants_and_a_flag_beside_it_wins():
    a = S.settings(["--preset", "paper"])
    assert a.lr == pytest.approx(3.5714286) and a.weight_decay == pytest.approx(1.4e-5)
    assert (a.dataset, a.arch, a.batch_size, a.epochs) == ("cifar100", "resnet18", 1024, 1500)
    assert (a.temperature, a.rate, a.sample, a.head_layers) == (0.5, 0.5, 0.5, 2)
    assert (a.warmup_epochs, a.layer, a.views, a.stop_grad) == (10, ["4"], "simclr", True)
    a = S.settings(["--preset", "paper", "--objective", "supervised"])
    assert (a.lr, a.weight_decay) == (0.5, 1e-4)
    a = S.settings("--preset paper --lr 1 --layer none 6 --dataset cifar10".split())
    assert (a.lr, a.layer, a.dataset) == (1, ["none", "6"], "cifar10")

def test_preset_grigg_takes_both_networks_of_the_cka_paper():
    a, b = (S.settings(["--preset", "grigg", *more]) for more in ([], ["--objective", "supervised"]))
    for x in (a, b):
        assert (x.dataset, x.arch, x.layer) == ("cifar10", "resnet50", ["none"])
        assert (x.head_layers, x.crop_min, x.warmup_epochs) == (3, 0.08, 10)
        assert (x.optimizer, x.weight_decay) == ("lars", 1e-6)
    assert (a.views, a.batch_size, a.epochs, a.lr) == ("simclr", 4096, 1300, pytest.approx(4.8))
    assert (b.views, b.batch_size, b.epochs, b.lr) == ("crop", 8192, 300, pytest.approx(9.6))
    c = S.settings("--preset grigg --batch-size 512 --epochs 20 --views none".split())
    assert (c.lr, c.epochs, c.views) == (pytest.approx(0.6), 20, "none")

def test_alignment_and_uniformity_equal_loops_gradients_too_and_meters_see_collapse():
    z1, z2 = (F.normalize(randn(9, 5, seed=s).double(), dim=1).requires_grad_() for s in (0, 1))
    slow = sum(((u - v) ** 2).sum() for u, v in zip(z1, z2)) / 9
    terms = [torch.exp(-2 * ((u - v) ** 2).sum()) for u, v in itertools.combinations(z1, 2)]
    for ours, theirs in ((S.alignment(z1, z2), slow),
                         (S.uniformity(z1), torch.log(sum(terms) / len(terms)))):
        for a, b in zip(*((x, *torch.autograd.grad(x, [z1, z2], allow_unused=True))
                          for x in (ours, theirs))):
            torch.testing.assert_close(a, b)
    point, spread = randn(1, 16).expand(40, 16), torch.cat([torch.eye(16), -torch.eye(16)])
    for z, std in ((point, 0), (spread, 1), (torch.zeros(4, 8), 0)):
        m = S.meters(z, z)
        assert m["embedding_std"] == pytest.approx(std, abs=0.03) and m["alignment"] < 1e-6
        assert math.isfinite(m["uniformity"])

def clusters(n, d, classes, spread, seed=0):
    y = torch.arange(n) % classes
    return randn(classes, d, seed=99)[y] + spread * randn(n, d, seed=seed), y

@pytest.mark.parametrize("n, k", [(60, 7), (23, 200), (5, 1)])
def test_weighted_knn_equals_loops(n, k):
    """k above the number of pictures takes all."""
    (x, y), (x_test, y_test) = clusters(n, 6, 4, 1.2), clusters(50, 6, 4, 1.2, seed=1)
    correct = 0
    for q, target in zip(x_test.double(), y_test.tolist()):
        near = sorted((F.cosine_similarity(q, v, dim=0).item(), label)
                      for v, label in zip(x.double(), y.tolist()))[::-1][:k]
        votes = [sum(math.exp(c / 0.1) for c, label in near if label == i) for i in range(4)]
        correct += votes.index(max(votes)) == target
    many = (x_test.repeat(50, 1), y_test.repeat(50))  # several chunks of queries
    assert S.weighted_knn(x, y, *many, 4, k=k) == pytest.approx(100 * correct / 50)

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
    scale = torch.logspace(-3, 2, 205)
    x, x_test = (F.pad(v * scale + 3, (0, 1), value=1000.1) for v in (x, x_test))
    got = S.linear_probe(x, y, x_test, y_test, 3)
    assert got == pytest.approx(slow[0], abs=1.5) and got > slow[1] + 2, (got, slow)
    # the test labels choose nothing: the right answers of all shifted labels add up to 100 %
    assert sum(S.linear_probe(x, y, x_test, (y_test + s) % 3, 3) for s in range(3)) \
        == pytest.approx(100)

# ==== two processes ====

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
    out.mkdir(exist_ok=True)
    state = S.train(a, net, split, out, dict, None)
    return [row["loss"] for row in state["log"]], net.state_dict()

def one_of_two(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for objective in ("simclr", "supervised"):
        torch.save(trained(objective, folder / objective), folder / f"{objective}{rank}.pt")
    dist.destroy_process_group()

@pytest.fixture(scope="module")
def processes():
    """Starts processes from a server that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["simclr_deepaug", "cka", "pytest"])
    return context.Process

def test_two_processes_give_the_losses_and_weights_of_one(processes, tmp_path):
    children = [processes(target=one_of_two, args=(rank, tmp_path)) for rank in (0, 1)]
    for child in children:
        child.start()
    one = {name: trained(name, tmp_path / "one") for name in ("simclr", "supervised")}
    [child.join(120) for child in children]
    for (objective, (losses, weights)), rank in itertools.product(one.items(), (0, 1)):
        got = torch.load(tmp_path / f"{objective}{rank}.pt", weights_only=True)
        assert got[0] == pytest.approx(losses, rel=1e-4) and len(losses) == 6
        for k, v in weights.items():
            torch.testing.assert_close(got[1][k], v, rtol=1e-3, atol=1e-5)

def test_torchrun_trains_end_to_end_and_one_process_writes(few, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node=2", S.__file__, *flags(few, SHORT, "--out run")]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert done.stdout.count("pictures of folder") == 1
    report = report_of(tmp_path / "run")
    assert report["steps"] == 2 and "linear" in report
    assert torch.jit.load(tmp_path / "run/encoder.pt")(torch.rand(3, 3, 16, 16)).shape == (3, 128)

# ==== views and network ====

def pictures(n, height=32, width=32):
    """Drawn shapes in strong colours with grey, black, white and red pixels among them."""
    images = S.draw_shapes(n, 0, "cpu")[0].float() + 90 * randn(n, 3, 1, 1)
    images = V.resize(images, [height, width]).clamp(0, 255).round().to(torch.uint8)
    images[:, :, 0, 0], images[:, :, 0, 1], images[:, :, 1, 0] = 0, 255, 127
    images[:, 0, 1, 1], images[:, 1, 1, 1], images[:, 2, 1, 1] = 255, 0, 0
    return images

def drawn(monkeypatch, images, size, **options):
    """make_views, and what it really drew: (views, boxes, flips, [(operation, factors)])."""
    log = {"crop_boxes": [], "resize_matrix": [], "adjust": []}
    reals = {name: getattr(S, name) for name in log}
    for name, calls in log.items():
        def spy(*args, real=reals[name], calls=calls):
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
    for f in (lambda b: b[:, 2] * b[:, 3] / (height * width),  # area
              lambda b: (b[:, 3] / b[:, 2]).log(),  # shape
              lambda b: (b[:, 0] + b[:, 2] / 2) / height,
              lambda b: (b[:, 1] + b[:, 3] / 2) / width):
        assert abs(f(ours).mean() - f(theirs).mean()) < 0.015
        assert (f(ours).quantile(levels) - f(theirs).quantile(levels)).abs().max() < 0.05

def test_jitter_and_grey_are_drawn_as_often_and_as_widely_as_supcontrasts(monkeypatch):
    """p .8 and .2, independently; factors uniform in .6 to 1.4 and -.1 to .1; 24 orders."""
    torch.manual_seed(0)
    colourful = torch.tensor([200, 100, 50], dtype=torch.uint8).view(1, 3, 1, 1)
    views, _, flips, operations = drawn(monkeypatch, colourful.expand(8000, 3, 4, 4), 4)
    grey, factors = is_grey(views), dict(operations)
    jittered = factors[0] != 1
    assert abs(flips.float().mean() - 0.5) < 0.02 and abs(grey.float().mean() - 0.2) < 0.02
    assert abs(jittered.float().mean() - 0.8) < 0.02
    assert abs((jittered & grey).float().mean() - 0.16) < 0.02
    for operation, f in factors.items():
        assert torch.equal(f != (operation != 3), jittered)  # all four, or none of them
        low, high = (-0.1, 0.1) if operation == 3 else (0.6, 1.4)
        levels = torch.linspace(0.1, 0.9, 5)
        off = f[jittered].quantile(levels) - (low + levels * (high - low))
        assert off.abs().max() < 0.03 * (high - low)
    orders = {tuple(o for o, _ in drawn(monkeypatch, colourful, 4)[3]) for _ in range(250)}
    assert orders == set(itertools.permutations(range(4)))

def test_shapes_are_a_function_of_their_seed_and_balanced():
    (images, labels), (again, _), (other, _) = (S.draw_shapes(200, s, "cpu") for s in (3, 3, 4))
    assert torch.equal(images, again) and (images != other).flatten(1).any(1).all()
    assert images.dtype == torch.uint8 and labels.bincount().tolist() == [10] * 20

def test_two_views_come_as_views_says_first_views_then_second():
    """none: the picture itself, twice; crop: places change, colours not; simclr: both do."""
    torch.manual_seed(0)
    colours = torch.randint(40, 200, (32, 3, 1, 1)).to(torch.uint8).expand(32, 3, 24, 24)
    shapes = pictures(32, 24, 24)
    resized = V.resize(shapes.float() / 255, [16, 16], antialias=True).repeat(2, 1, 1, 1)
    for kind in ("none", "crop", "simclr"):
        a = S.settings(["--views", kind])
        flat, shaped = S.two_views(colours, 16, a), S.two_views(shapes, 16, a)
        unchanged = (flat - colours[:, :, :16, :16].repeat(2, 1, 1, 1) / 255).abs() < 1e-5
        assert (unchanged.all() if kind != "simclr" else unchanged.float().mean() < 0.5)
        still = shaped.shape == resized.shape and torch.allclose(shaped, resized, atol=1e-6)
        assert still == (kind == "none") == torch.equal(shaped[:32], shaped[32:])
    whole = S.two_views(shapes, 16, S.settings("--views crop --crop-min 1".split()))
    same = [(whole - x).abs().flatten(1).amax(1) < 1e-5 for x in (resized, resized.flip(3))]
    assert (same[0] | same[1]).float().mean() > 0.9 and same[0].any() and same[1].any()

@pytest.mark.parametrize("arch", ["small", "resnet18", "resnet50"])
def test_activations_are_those_of_torchvisions_blocks_and_of_the_layers(arch):
    """Even: a block's own forward; odd: its residual, not overwritten by the addition in place."""
    net = network("--arch", arch, "--head-layers", "3").eval()
    with torch.no_grad():
        images, acts = some_images(2), net.activations(some_images(2))
        h = net.layers[:2](images)
        for stage in S.STAGES:
            for b, block in enumerate(net.layers.get_submodule(stage)):
                odd, even = acts[f"{stage}.{b}.odd"], acts[f"{stage}.{b}.even"]
                shortcut = block.downsample(h) if block.downsample else h
                assert (odd < 0).any() and torch.equal(even, block(h))
                torch.testing.assert_close(F.relu(odd + shortcut), even, rtol=1e-4, atol=1e-4)
                h = even
        assert torch.equal(acts["avgpool"], net.features(images))
        assert torch.equal(acts["head"], net(images))

@pytest.mark.parametrize("size", [64, 16])
def test_features_equal_torchvisions_forward_with_the_exported_weights(size, tmp_path):
    """Only fc is missing; below 64 px the stem is 3x3 without max pooling."""
    from safetensors.torch import load_file
    net, (images, labels) = network("--arch", "resnet18", size=size), S.draw_shapes(4, 0, "cpu")
    a = S.settings(["--arch", "resnet18"])
    assert S.export(a, net.eval(), S.Split(size, labels, images), [], tmp_path, {}) <= 1e-4
    theirs = torchvision.models.resnet18(weights=None).eval()
    if size < 64:
        theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    weights = load_file(tmp_path / "weights.safetensors")
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert sorted(missing) == ["fc.bias", "fc.weight"] and unexpected == []
    theirs.fc = nn.Identity()
    images = some_images(2, size)
    with torch.no_grad():
        expected = theirs((images - 0.4) / 0.3)
        torch.testing.assert_close(net.features(images), expected, rtol=1e-3, atol=1e-3)

# ==== data ====

def save(file, width=20, height=20, seed=0, mode="RGB"):
    """A random smooth picture."""
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
    ("cat/*:25 dog/*:25", "cat dog", [23, 23], [2, 2], "2 classes,"),
    ("cat/*:20 emu/*:1 fox/*:5", "cat emu fox", [18, 1, 4], [2, 0, 1], "3 classes,"),
    ("*:20", "", [18], [2], "no classes"), ("only/*:20", "", [18], [2], "no classes"),
    ("cat/*:10 dog/*:10 *:3", "cat dog", [9, 9], [1, 1], "3 left out"),
    ("cat/*:12 dog/*:12 .x*:1 cat/._*:1 __MACOSX/cat/*:1 .git/*:1 cat/.a/*:1", "cat dog", [11, 11],
     [1, 1], "0 left out"),
    ("train/cat/*:6 train/dog/*:6 val/cat/*:3 val/dog/*:2", "cat dog", [6, 6], [3, 2], ""),
    ("Train/cat/*:6 Train/dog/*:6 Test/cat/*:3 Test/dog/*:2", "cat dog", [6, 6], [3, 2], ""),
    ("TRAIN/cat/*:6 TRAIN/dog/*:6 validation/cat/*:3 validation/owl/*:2", "cat dog", [6, 6],
     [3, 0], "2 left out"),
    ("train/*:8 valid/*:3", "", [8], [3], "no classes"),
    ("train/cat/*:10 train/dog/*:10 __MACOSX/*:1", "cat dog", [9, 9], [1, 1], ""),
    ("train/cat/*:6 train/dog/*:6 train/*:1 test/*:5 val/cat/*:3 val/dog/*:2", "cat dog", [6, 6],
     [3, 2], "1 left out"),
    ("car/*:10 plane/*:10 train/*:10", "car plane train", [9, 9, 9], [1, 1, 1], "")])
def test_folders_are_read_as_people_lay_them_out(tmp_path, capsys, layout, names, train_counts,
                                                 test_counts, says):
    """A tenth of each class is held out, but for folders of splits in any case; small classes are
    named; strays, hidden files, helper folders, classes that train lacks are left out; of two test
    folders the labelled one counts; a class may be called train."""
    train, test, classes = load(fill(tmp_path, layout))
    assert classes == names.split() and says in capsys.readouterr().out
    assert not {*train.files} & {*test.files} and train.size == 20
    for split, counts in ((train, train_counts), (test, test_counts)):
        assert (split.labels + (not classes)).bincount(minlength=len(counts)).tolist() == counts
        for picture, label, file in zip(split.images, split.labels, split.files, strict=True):
            assert torch.equal(picture, pixels(file))
            assert classes[label] == file.parent.name if classes else label == -1
    assert not classes or train.labels.tolist() != sorted(train.labels.tolist())  # mixed

def test_links_to_class_folders_are_followed_and_circular_ones_end(tmp_path):
    root = fill(tmp_path / "root", "bird/*:12")
    (root / "cat").symlink_to(fill(tmp_path / "elsewhere", "cat/*:12") / "cat")
    (root / "bird" / "again").symlink_to(root / "bird")
    (root / "loop").symlink_to(root)
    train, test, classes = load(root)
    assert classes == ["bird", "cat"] and len(train) + len(test) == 24

def test_every_kind_of_picture_becomes_rgb_and_deep_grey_is_scaled_by_its_own_range(tmp_path):
    kinds = "png L, png RGBA, png P, png 1, JPG RGB, jpg CMYK, bmp RGB, webp RGB".split(", ")
    for i, (ending, mode) in enumerate(map(str.split, kinds)):
        save(tmp_path / f"{i}.{ending}", seed=i, mode=mode)
    train, test, _ = load(tmp_path)
    assert len(train) + len(test) == 8 and not train.broken
    assert all(torch.equal(x, pixels(f)) for x, f in zip(train.images, train.files))
    ramp = np.linspace(1000, 3000, 400).reshape(20, 20)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "16.png")
    Image.fromarray((ramp / 1e6).astype(np.float32)).save(tmp_path / "float.tiff")
    for name in ("16.png", "float.tiff"):
        expected = torch.linspace(0, 255, 400).view(20, 20).expand(3, 20, 20)
        got = S.read_square(tmp_path / name, 20).float()
        torch.testing.assert_close(got, expected, rtol=0, atol=0.7)

def test_large_pictures_are_resized_on_reading(tmp_path):
    """The short side becomes 8/7 of the view, the middle is cut out: 256 for 224."""
    for i in range(3):
        save(tmp_path / f"{i}.png", 1280, 720, seed=i)
    train, _, _ = load(tmp_path)
    assert train.size == 224 and train.images.shape == (2, 3, 256, 256)
    whole = V.center_crop(V.resize(pixels(train.files[0]), [256], antialias=True), [256, 256])
    assert (train.images[0].float() - whole.float()).abs().mean() < 2
    assert load(tmp_path, "--image-size", "28")[0].images.shape == (2, 3, 32, 32)

def test_a_picture_of_a_million_is_read_as_fast_as_one_of_a_thousand(tmp_path):
    file, seconds = save(tmp_path / "a.png"), []
    for n in (1000, 1_000_000):
        files = [file] * (n - 3) + [tmp_path / "missing.png"] * 3
        split = S.Split(8, torch.zeros(n), None, files, 8)
        begun = time.perf_counter()
        for i in (0, n // 2, n - 2) * 10:
            assert split[i][2] == (i if i < n - 3 else 0)  # after the last the first
        seconds.append(time.perf_counter() - begun)
    assert seconds[1] < 3 * seconds[0] + 0.05

@pytest.mark.parametrize("workers", [0, 1])
def test_streamed_pictures_are_those_in_memory_and_broken_ones_are_named_once(tmp_path, capsys,
                                                                              workers):
    """For a broken one the next is taken, with its own label."""
    fill(tmp_path, "train/cat/*:12 train/dog/*:12 test/cat/*:3 test/dog/*:3")
    files = [tmp_path / f"train/cat/{i:02}.png" for i in range(6)]
    for file in files:
        file.write_bytes(file.read_bytes()[:-30])
    files[1].write_text("not a picture")
    train, _, classes = load(tmp_path)
    labels = torch.tensor([classes.index(f.parent.name) for f in train.files])
    a = S.settings(["--workers", str(workers), "--device", "cpu"])
    streamed = S.Split(train.size, labels, None, train.files, 20, a)
    order = torch.arange(24).roll(5)
    for _ in range(2):
        pairs = list(zip(train.batches(order, 7), streamed.batches(order, 7), strict=True))
        assert all(torch.equal(a, b) for ours, theirs in pairs for a, b in zip(ours, theirs))
    told = capsys.readouterr().out
    assert all(told.count(f"cat/{f.name}") == 2 for f in files)  # once each split
    assert len(train.broken) == len(streamed.broken) == 6
    for i, file in enumerate(train.files):
        used = next(f for f in [*train.files[i:], *train.files] if f not in files)
        assert torch.equal(train.images[i], pixels(used)) and (file in files) == (file != used)
        assert classes[train.labels[i]] == used.parent.name

# ==== whole runs ====

@pytest.fixture(scope="module")
def done(few, tmp_path_factory):
    """A finished run of 12 steps; tests change nothing in its folder."""
    out = tmp_path_factory.mktemp("done") / "run"
    S.main(flags(few, "--out", out))
    return out

@pytest.fixture(scope="module")
def short(few, tmp_path_factory):
    """A finished run of two steps."""
    out = tmp_path_factory.mktemp("short") / "run"
    S.main(flags(few, SHORT, "--out", out))
    return out

@pytest.fixture(scope="module")
def stopped(few, tmp_path_factory):
    """(folder of the run of `done`, stopped by Ctrl-C in step 9, in the middle of an epoch; the
    command that it printed). Its clock makes every step a minute: a checkpoint each."""
    out, stdout, views = tmp_path_factory.mktemp("a space") / "run", io.StringIO(), S.two_views
    calls, clock = itertools.count(1), itertools.count(0, 61)

    def interrupted(*args):
        if next(calls) == 9:
            raise KeyboardInterrupt
        return views(*args)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout):
        patch.setattr(S, "two_views", interrupted)
        patch.setattr(time, "time", lambda: next(clock))
        with pytest.raises(SystemExit) as end:
            S.main(flags(few, "--out", out))
    assert end.value.code == 130 and state_of(out)["step"] == 8
    return out, stdout.getvalue().splitlines()[-1]

def assert_same_run(out, other):
    """Weights, optimizer, losses and measurements are equal to the last bit."""
    a, b = state_of(out), state_of(other)
    assert a["step"] == b["step"] and same_bits(a["model"], b["model"])
    assert same_bits(a["optimizer"], b["optimizer"]) and a["probes"][-1] == b["probes"][-1]
    for x, y in zip(a["log"], b["log"], strict=True):
        assert [x[k] for k in ("step", "loss", "lr")] == [y[k] for k in ("step", "loss", "lr")]

def test_the_run_folder_holds_what_the_design_says(done, few):
    assert {p.name for p in done.iterdir()} == {
        "config.json", "metrics.csv", "checkpoint.pt", "encoder.pt", "weights.safetensors",
        "report.json", "views.png", "curves.png", "cka.png", "cka.json", "samples.npz",
        "compare.png"}
    for picture in done.glob("*.png"):
        assert np.array(Image.open(picture)).shape[1] > 150
    report, config = report_of(done), json.loads((done / "config.json").read_text())
    assert report["steps"] == 12 and report["export_difference"] < 1e-4
    assert {"linear", "linear_untrained", "knn", "seconds", "images_per_second", "alignment_train",
            "alignment_test", "uniformity_train", "uniformity_test"} <= {*report}
    assert config["torch"] == torch.__version__ and config["layer"] == "2+4"
    rows = list(csv.DictReader((done / "metrics.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(1, 13))
    for step, row in enumerate(rows):
        assert float(row["lr"]) == S.learning_rate(step, S.settings(flags(few)), 6)
        assert 0 <= float(row["alignment"]) <= 4 and float(row["embedding_std"]) > 0

def test_probing_changes_no_bit_steps_and_epochs_differ_a_log_gets_whole_lines(
        few, done, tmp_path, monkeypatch, capsys):
    seen, rows, two_views, draw_rows = [], [], S.two_views, S.draw_rows
    monkeypatch.setattr(S, "two_views", lambda x, *a: seen.append(x) or two_views(x, *a))
    monkeypatch.setattr(S, "draw_rows", lambda *a: rows.append(draw_rows(*a)) or rows[-1])
    S.tqdm._instances.clear()  # bars of runs that other tests broke off
    S.main(flags(few, "--probe-every 1 --out", tmp_path / "run"))
    assert_same_run(tmp_path / "run", done)
    assert len(state_of(tmp_path / "run")["probes"]) == 3 and len(state_of(done)["probes"]) == 2
    assert len({tuple(r.tolist()) for r in rows}) == 12
    first, second = torch.cat(seen[:6]), torch.cat(seen[6:12])  # an epoch: no picture twice
    assert len(first.unique(dim=0)) == len(second.unique(dim=0)) == 216
    assert not torch.equal(first, second)
    lines = [line for line in capsys.readouterr().err.split("\n") if line.strip("\r")]
    assert "\r" not in "".join(line.strip("\r") for line in lines)
    assert re.fullmatch(r"\r?100%.* 432/432 .*images/s, loss=\d\.\d+\]\r?", lines[-1])

def test_ctrl_c_prints_the_command_that_goes_on_to_the_same_bits(stopped, done, tmp_path):
    half = shutil.copytree(stopped[0], tmp_path / "half")
    words = [str(half) if w == str(stopped[0]) else w for w in shlex.split(stopped[1])]
    assert words[0] == "python"
    S.main(words[2:])
    assert_same_run(half, done)

def test_killed_at_random_moments_it_ends_with_the_same_bits(few, processes, tmp_path):
    words, out, steps = flags(few, SHORT, "--epochs 8 --probe-every 1"), tmp_path / "run", [-1]
    S.main([*words, "--out", str(tmp_path / "straight")])
    words += ["--resume", "--out", str(out)]
    for kills in range(9):
        child = processes(target=S.main, args=(words,))
        child.start()
        while kills < 4 and child.is_alive():  # until there is a new checkpoint, and a little on
            if (out / "checkpoint.pt").exists() and state_of(out)["step"] > steps[-1]:
                time.sleep(random.uniform(0, 0.3))
                child.kill()
                break
            time.sleep(0.02)
        child.join(120)
        steps.append(state_of(out)["step"])  # whole, whenever the kill came
        if child.exitcode == 0:
            break
    assert child.exitcode == 0 and steps == sorted(steps) and len({*steps}) >= 4, steps
    assert_same_run(out, tmp_path / "straight")

def test_resuming_a_finished_run_gives_its_report(done, few, tmp_path, capsys):
    """Changing nothing; cut short by a kill it is written again; without a checkpoint: refused."""
    out, report = shutil.copytree(done, tmp_path / "run"), report_of(done)
    words, before = flags(few, "--resume --out", out), state_of(out)
    assert S.main(words) == report and same_bits(state_of(out), before)
    (out / "report.json").write_text((out / "report.json").read_text()[:300])
    assert S.main(words)["linear"] == report["linear"] == report_of(out)["linear"]
    (out / "checkpoint.pt").unlink()
    code, line = ended(words, capsys)
    assert code == 2 and "checkpoint.pt is missing" in line

@pytest.mark.parametrize("change", ["--lr 0.1", "--layer 3", "--seed 5", "--epochs 20",
                                    "--no-stop-grad", "--optimizer lars", "--pictures 100"])
def test_resume_with_other_flags_is_refused_naming_them(few, stopped, capsys, change):
    half = stopped[0]
    before = (half / "checkpoint.pt").read_bytes()
    code, line = ended(flags(few, "--resume --out", half, change), capsys)
    name = change.split()[0].replace("--no-", "").lstrip("-").replace("-", "_")
    assert code == 2 and name in line and (half / "checkpoint.pt").read_bytes() == before

def test_damaged_foreign_and_dangerous_checkpoints_are_refused(few, stopped, tmp_path, capsys,
                                                                monkeypatch):
    """One line, the file is kept, none of its code runs; the same for --init."""
    monkeypatch.chdir(tmp_path)
    half = shutil.copytree(stopped[0], Path("half"))
    file, state = half / "checkpoint.pt", state_of(half)
    whole = file.read_bytes()
    for content in (whole[:len(whole) // 2], b"", bytes(len(whole)), [1, 2], Trap(),
                    {**state, "model": Trap()}, {**state, "script": "topk_rescue"}):
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            torch.save(content, file)
        before = file.read_bytes()
        for words in (["--resume --out", half], ["--out new --init", half]):
            code, line = ended(flags(few, *words), capsys)
            assert code == 2 and "checkpoint.pt" in line
            assert "damaged" in line or "topk_rescue" in line
        assert file.read_bytes() == before
    assert not Path("sprung").exists() and not Path("new").exists()

def test_a_full_disk_keeps_the_older_checkpoint(few, tmp_path, capsys, monkeypatch):
    def full(state, path, save=torch.save):
        save(state, path)
        if state["step"] > 0:
            raise OSError(28, "No space left")
    monkeypatch.setattr(torch, "save", full)
    code, line = ended(flags(few, "--out", tmp_path / "run"), capsys)
    assert code == 2 and "checkpoint.pt" in line and "older" in line and "kept" in line
    assert state_of(tmp_path / "run")["step"] == 0 and not list(tmp_path.rglob("*.part"))

@pytest.mark.parametrize("fails_at", [1, 9])
def test_a_loss_that_is_not_finite_stops_the_run(few, tmp_path, capsys, monkeypatch, fails_at):
    """The step is named; the checkpoint from before it is kept."""
    factors, views = itertools.chain([1] * (fails_at - 1), itertools.repeat(math.nan)), S.two_views
    monkeypatch.setattr(S, "two_views", lambda *a: views(*a) * next(factors))
    code, line = ended(flags(few, "--probe-every 1 --out", tmp_path / "run"), capsys)
    state = state_of(tmp_path / "run")
    assert code == 2 and f"step {fails_at};" in line and "--lr" in line
    assert state["step"] == fails_at // 6 * 6
    assert all(v.isfinite().all() for v in state["model"].values())

def test_command_lines_as_a_user_types_them(few, cli, tmp_path, done):
    """No epochs: the untrained network is probed and exported. --out: by date and time."""
    end = cli("simclr_deepaug.py", *flags(few, "--epochs 0"))
    assert end.returncode == 0 and "untrained" in end.stdout, end.stderr
    [out] = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"simclr_deepaug-\d{8}-\d{6}", out.name)
    report = report_of(out)
    assert report["steps"] == 0 and report["linear"] == report_of(done)["linear_untrained"]
    end = cli("simclr_deepaug.py", "--layer", 9)
    assert end.returncode == 2 and end.stdout == "" and end.stderr.count("\n") == 1

@pytest.mark.parametrize("text, kept", [
    ("--layer 2 --freeze before", [-1, 0, 1, 2]), ("--layer 2 --freeze after", [3, 4, 5, 6]),
    ("--layer 1+3 --freeze after", [2, 3, 4, 5, 6]), ("--layer 3 --sample 1", [-1, 0, 1, 2, 3]),
    ("--layer 3 --sample 1 --no-stop-grad", []), ("--layer 3 --sample 1 --pairs cross", []),
    ("--layer 3", [])])
def test_frozen_layers_and_init_keep_the_weights_they_name(few, tmp_path, short, text, kept):
    """BatchNorm's statistics go on running everywhere. (cross: half of the rows are clean.)"""
    report = S.main(flags(few, SHORT, text, "--init", short, "--out", tmp_path / "run"))
    assert report["linear_untrained"] == report_of(short)["linear"]
    start = state_of(short)["model"]
    for k, v in state_of(tmp_path / "run")["model"].items():
        stays = number_of(k) in kept and "running" not in k and "tracked" not in k
        assert torch.equal(v, start[k]) == (stays or ".input." in k), k

def test_layer_auto_is_where_the_co_adapted_stretch_starts_or_ends(few, tmp_path, done):
    words = [str(done / "encoder.pt"), "--numbered", "--out", str(tmp_path / "map.png")]
    start, end = cka.main(words)["stretch"]
    for flag, layer in (("--stop-grad", start), ("--no-stop-grad", end)):
        report = S.main(flags(few, "--epochs 1 --layer auto", flag, "--init", done, "--out",
                              tmp_path / flag))
        assert report["flags"]["layer"] == str(layer)

def test_transfer_measures_at_every_probe_elsewhere(few, tmp_path, monkeypatch, short):
    draw = S.draw_shapes
    monkeypatch.setattr(S, "draw_shapes", lambda n, seed, device: draw(n // 128, seed, device))
    words = flags(few, SHORT, "--transfer shapes --probe-every 1 --out", tmp_path / "run")
    report = S.main(words)
    assert [{"shapes_linear", "shapes_knn"} <= {*row} for row in report["probes"]] == [True] * 2
    assert report["linear"] == report_of(short)["linear"]

def test_several_values_make_runs_and_compare_names_damaged_reports(few, tmp_path, capsys):
    """A table of means and deviations; each run counts once; supervised runs, which measure less,
    stand in the same table, first or last."""
    out = tmp_path / "out"
    table = S.main(flags(few, SHORT, "--layer none 4 --seed 0 1 --out", out))
    printed, runs = capsys.readouterr().out, [p for p in out.iterdir() if p.is_dir()]
    assert {p.name for p in runs} == {f"layer-{l}-seed-{s}" for l in ("none", 4) for s in (0, 1)}
    assert list(table) == ["untrained", "layer none", "layer 4"]
    for layer in ("none", 4):
        values = [report_of(out / f"layer-{layer}-seed-{seed}")["linear"] for seed in (0, 1)]
        mean, std = statistics.mean(values), statistics.stdev(values)
        assert table[f"layer {layer}"]["linear"] == pytest.approx((mean, std))
        assert f"{mean:.2f}" + (f" ± {std:.2f}" if std > 0.005 else "") in printed
    bad = ["{", "[]", "3", "", '{"script": "x"}',
           json.dumps({**report_of(runs[0]), "script": "vicreg_probe"})]
    for i, text in enumerate(bad):
        (out / f"bad{i}").mkdir()
        (out / f"bad{i}" / "report.json").write_text(text)
    assert S.main(["--compare", str(out), *map(str, runs)]) == table
    told, other = capsys.readouterr().out, tmp_path / "other"
    assert all(f"bad{i}/report.json: left out" in told for i in range(len(bad)))
    S.main(flags(few, SHORT, "--objective supervised --epochs 0 --out", other))
    for folders in ([other, out], [out, other]):
        assert len(S.main(["--compare", *map(str, folders)])) == 4

def test_a_flat_folder_trains_without_labels(tmp_path):
    """A deep grey and a broken picture among them, in worker processes."""
    flat = fill(tmp_path / "flat", "*:48")
    Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20)).save(flat / "deep.png")
    (flat / "broken.png").write_text("no picture")
    report = S.main(flags(flat, "--workers 1 --batch-size 16 --out", tmp_path / "run"))
    assert report["flags"]["dataset"] == "folder" and report["steps"] == 4
    assert "linear" not in report and math.isfinite(report["alignment_test"])

# ==== the export ====

@pytest.fixture
def live(done, few):
    """The trained network of `done`, in eval mode, its train and test pictures."""
    a = one_run(flags(few))
    *splits, classes = S.load_folder(a)
    net = S.build(a, splits[0], classes)
    net.load_state_dict(state_of(done)["model"])
    return net.eval(), *splits

def test_encoder_needs_torch_alone_and_equals_the_live_network_gradients_too(done, live, tmp_path):
    """At other batch sizes, in a fresh process; it normalises inside."""
    inputs = [torch.rand(n, 3, 16, 16) for n in (1, 2, 7, 64)] + [torch.ones(3, 3, 16, 16)]
    torch.save(inputs, tmp_path / "inputs.pt")
    code = ("import sys, torch; m = torch.jit.load(sys.argv[1]); torch.save([[m(x), m(x), "
            "m.activations(x)] for x in torch.load('inputs.pt')], 'outputs.pt')")
    subprocess.run([sys.executable, "-I", "-W", "ignore", "-c", code, done / "encoder.pt"],
                   cwd=tmp_path, check=True)
    for x, (y, again, acts) in zip(inputs, torch.load(tmp_path / "outputs.pt")):
        assert torch.equal(y, again), "two calls differ: dropout is in the export"
        with torch.no_grad():
            torch.testing.assert_close(y, live[0].features(x), rtol=1e-4, atol=1e-5)
            for ours, theirs in zip(acts, live[0].activations(x).values(), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    moved = torch.jit.load(done / "encoder.pt").to(torch.float64)  # it can be moved and fine-tuned
    moved(x.double()).square().sum().backward()
    live[0].features(x).square().sum().backward()
    for (name, p), q in zip(live[0].named_parameters(), moved.parameters(), strict=True):
        if "head" not in name:
            torch.testing.assert_close(q.grad.float(), p.grad, rtol=1e-3, atol=1e-3)
    mean = live[0].layers.input.mean.flatten()
    torch.testing.assert_close(mean, live[1].images.float().mean((0, 2, 3)) / 255)

def test_encoder_carries_its_config_samples_are_test_pictures_probes_read_layer_5(done, live):
    extra, (net, *splits), report = {"config.json": ""}, live, report_of(done)
    encoder = torch.jit.load(done / "encoder.pt", _extra_files=extra)
    config, x = json.loads(extra["config.json"]), torch.rand(2, 3, 16, 16)
    assert config["layers"] == [*net.activations(x)]
    assert len(config["layers"]) == len(encoder.activations(x))
    assert config["classes"] == [f"class{c}" for c in range(4)] and config["image_size"] == 16
    assert config["layer_numbers"]["stem"] == 0 and config["layer_numbers"]["head"] == 6
    samples, test = np.load(done / "samples.npz"), splits[1]
    expected = (S.to_unit(test.images, 16) * 255).round().byte().numpy()
    assert samples["images"].dtype == np.uint8 and (samples["images"] == expected).all()
    assert (samples["labels"] == test.labels.numpy()).all()
    with torch.no_grad():
        tables = [t for s in splits for t in (net.features(S.to_unit(s.images, 16)), s.labels)]
    for name, f in (("linear", S.linear_probe), ("knn", S.weighted_knn)):
        assert f(*tables, 4) == pytest.approx(report[name], abs=4.2)  # one picture

# ==== every experiment of the paper as a command line, and bad ones ====

@pytest.mark.parametrize("text", [
    "--layer none", "--layer -1", "--layer 1+3+6", "--layer all", "--no-stop-grad", "--sample 1",
    "--rate 0.1", "--layer 2 --transform channel", "--transform pca", "--pairs cross",
    "--freeze before", "--freeze after", "--optimizer lars", "--views crop", "--views simclr",
    "--head-layers 3", "--objective supervised", "--temperature 0.1", "--weight-decay 0.1",
    "--arch resnet18 --image-size 8", "--seed 3", "--pictures 21", "--warmup-epochs 0"])
def test_every_experiment_runs_and_changes_the_result(few, short, tmp_path, text):
    report = S.main(flags(few, SHORT, text, "--out", tmp_path / "run"))
    weights = state_of(tmp_path / "run")["model"]
    assert report["steps"] == (1 if "pictures" in text else 2) and math.isfinite(report["linear"])
    same = text == "--warmup-epochs 0"  # no tenth of two steps is a whole step
    assert same_bits(weights, state_of(short)["model"]) == same
    assert torch.jit.load(tmp_path / "run/encoder.pt")(torch.rand(2, 3, 16, 16)).isfinite().all()

@pytest.mark.parametrize("words, says", [
    ("--layer 9", "--layer 9 -1 input 6 head auto"), ("--layer 4 none+3", "none+3"),
    ("--layer auto", "--layer auto --init"), ("--rate 1", "--rate from 0 to 0.999"),
    ("--rate half", "half"), ("--sample 0", "--sample from 1"), ("--lr nan", "--lr"),
    ("--transform mixup", "--transform channel"), ("--epochs -1", "--epochs"),
    ("--batch-size 1", "--batch-size"), ("--batch-size 217", "--batch-size 216"),
    ("--seed 99999999999999999999", "--seed"),
    ("--freeze before --layer none", "--freeze --layer"),
    ("--freeze before --layer 6", "no layer is left"),
    ("--layer 6 --sample 1", "no layer is left"),
    ("--learning-speed 3", "--learning-speed --help"), ("--dataset shapes", "--data-dir"),
    ("--data-dir nowhere", "nowhere no such folder"), ("--data-dir empty", "empty"),
    ("--data-dir text", "text"), ("--data-dir half", "half"),
    ("--data-dir flat --objective supervised --batch-size 2", "--objective labels"),
    ("--data-dir broken --workers 0", "broken can be read"),
    ("--data-dir broken --workers 1", "broken can be read"),
    ("--dataset cifar100 --data-dir half", "cifar100 half cannot be downloaded"),
    ("--transfer cifar10", "cifar10 cannot be downloaded"),
    ("--init nowhere", "nowhere"), ("--init run --arch resnet18", "--init run --arch"),
    ("--layer auto --init empty", "empty/encoder.pt is missing"),
    ("--init run --head-layers 3", "--init run flags"), ("--resume", "--resume --out"),
    ("--compare nowhere", "no finished run"), ("--out text", "text --resume"),
    ("--out text --resume", "text"), ("--out .", "--out ."), ("--out text/a.txt", "a.txt")])
def test_bad_input_is_one_line_and_nothing_is_written(refused, tmp_path, monkeypatch, few, short,
                                                      words, says):
    """Exit code 2, no new file, no change to what is there; refused() looks."""
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "text", "half/test", "half/cifar-100-python"):
        Path(name).mkdir(parents=True)
    Path("text/a.txt").write_text("no picture")
    for name in ("train", "test", "meta"):
        Path(f"half/cifar-100-python/{name}").write_bytes(b"\x80\x04half")
    fill(tmp_path, "flat/*:4 broken/cat/*:20 broken/dog/*:20")
    for i, file in enumerate(Path("broken").rglob("*.png")):
        file.write_bytes(file.read_bytes()[:-60] if i % 2 else b"text")
    Path("few").symlink_to(few)
    Path("run").symlink_to(short)
    line = refused(["--data-dir", "few", "--workers", "0", "--device", "cpu", "--batch-size", "32",
                    "--image-size", "16", *words.split()])
    for part in says.split():
        assert part in line


def test_cifar100_is_read_by_torchvision(real_data):
    a = S.settings(["--dataset", "cifar100", "--data-dir", str(real_data), "--device", "cpu"])
    train, test, classes = S.load_data("cifar100", a)
    assert train.images.shape == (50_000, 3, 32, 32) and test.images.shape == (10_000, 3, 32, 32)
    assert train.labels.bincount().tolist() == [500] * 100 and classes[0] == "apple"
