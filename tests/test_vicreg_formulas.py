"""Losses, probes, network and views of vicreg_probe.py against slow, independent implementations."""
import csv
import math
import pickle

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2 import functional as V

import vicreg_probe as S

CPU = torch.device("cpu")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(below, *shape, seed=0):
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def flags(*words):
    return S.settings([str(w) for w in words])


# --- VICReg -----------------------------------------------------------------------------------------------------------

def slow_vicreg(z1, z2):
    """main_vicreg.py:194-219 entry by entry, in float64."""
    (n, d), invariance, variance, covariance = z1.shape, 0, 0, 0
    for i in range(n):
        for j in range(d):
            invariance = invariance + (z1[i, j] - z2[i, j]) ** 2 / (n * d)
    for z in (z1, z2):
        mean = [sum(z[i, j] for i in range(n)) / n for j in range(d)]
        for j in range(d):
            std = (sum((z[i, j] - mean[j]) ** 2 for i in range(n)) / (n - 1) + 1e-4) ** 0.5
            variance = variance + (1 - std).clamp(min=0) / d / 2
            for k in range(d):
                if k != j:
                    entry = sum((z[i, j] - mean[j]) * (z[i, k] - mean[k]) for i in range(n)) / (n - 1)
                    covariance = covariance + entry ** 2 / d
    return invariance, variance, covariance


def values_and_gradients(f, z1, z2):
    """Of each part: its value, its gradients on z1 and z2."""
    z1, z2 = z1.clone().requires_grad_(), z2.clone().requires_grad_()
    result = []
    for part in f(z1, z2):
        g = torch.autograd.grad(part, [z1, z2], retain_graph=True, allow_unused=True)
        result += [part.detach().double(), *(torch.zeros_like(z1) if h is None else h for h in g)]
    return [r.double() for r in result]


@pytest.mark.parametrize("n, d, scale", [(2, 3, 1.0), (6, 4, 0.5), (9, 5, 1.0), (5, 1, 0.3)])
def test_vicreg_equals_loops(n, d, scale):
    """Values and gradients of all three parts; standard deviations below 1 and above it; a batch of 2; d = 1."""
    spread = torch.logspace(-2, 1, d)                                # the hinge is active in some dimensions
    z1, z2 = scale * spread * randn(n, d) + 0.7, scale * spread * randn(n, d, seed=1) - 0.2
    expected = values_and_gradients(slow_vicreg, z1.double(), z2.double()) if d > 1 else None
    got = values_and_gradients(S.vicreg, z1, z2)
    if d == 1:                                                       # no pairs of dimensions: nothing to decorrelate
        assert not any(g.any() for g in got[6:])
        expected = values_and_gradients(lambda a, b: slow_vicreg(a, b)[:2], z1.double(), z2.double())
    for g, e in zip(got, expected):
        assert g.isfinite().all()
        torch.testing.assert_close(g, e, rtol=2e-5, atol=1e-6 * max(1, e.abs().max().item()))


def test_the_slow_vicregs_gradients_are_those_of_its_values():
    """The loops' own gradients, which the test above trusts, against finite differences."""
    z = [(0.4 * randn(4, 3, seed=s)).double().requires_grad_() for s in (0, 1)]
    assert torch.autograd.gradcheck(slow_vicreg, z)


def test_vicreg_at_zero_variance():
    """Constant rows, a collapsed network: variance 1 - sqrt(1e-4), no covariance, finite gradients."""
    z = randn(1, 6).expand(8, 6)
    got = values_and_gradients(S.vicreg, z, z)
    assert got[0] == 0 and got[6] == 0
    assert got[3].item() == pytest.approx(0.99, abs=1e-6)
    assert all(g.isfinite().all() for g in got)
    almost = z.clone()
    almost[0] += 1e-3                                                # std is then 1e-2: the gradient pushes outwards
    gradient = values_and_gradients(S.vicreg, almost, z)[4]
    assert (gradient[0] < 0).all() and gradient.isfinite().all()


def test_vicreg_sums_covariance_and_averages_variance_over_the_views():
    z1, z2 = 0.3 * randn(16, 5), randn(16, 5, seed=1) @ randn(5, 5, seed=2)
    _, v11, c11 = S.vicreg(z1, z1)
    _, v22, c22 = S.vicreg(z2, z2)
    _, v12, c12 = S.vicreg(z1, z2)
    torch.testing.assert_close(v12, (v11 + v22) / 2)
    torch.testing.assert_close(c12, (c11 + c22) / 2)
    one = (z2 - z2.mean(0)).T @ (z2 - z2.mean(0)) / 15
    torch.testing.assert_close(c22, 2 * (one.square().sum() - one.diagonal().square().sum()) / 5)


def test_vicreg_of_half_precision_is_computed_in_float32():
    z1, z2 = randn(8, 16).bfloat16(), randn(8, 16, seed=1).bfloat16()
    for got, expected in zip(S.vicreg(z1, z2), S.vicreg(z1.float(), z2.float())):
        assert got.dtype == torch.float32 and torch.equal(got, expected)


def test_losses_of_vicreg_weighs_its_parts():
    z = randn(12, 5)
    s, v, c = slow_vicreg(*z.double().chunk(2))
    got = S.losses_of(flags("--invariance", 2, "--variance", 3, "--covariance", 5), z, None)
    expected = {"loss": 2 * s + 3 * v + 5 * c, "invariance": 2 * s, "regularisation": 3 * v + 5 * c,
                "variance_term": v, "covariance_term": c}
    assert list(got) == list(expected)
    for name, value in expected.items():
        assert got[name].item() == pytest.approx(value.item(), rel=1e-5), name
    a = flags()
    assert (a.invariance, a.variance, a.covariance) == (25, 25, 1)


def test_losses_of_simclr_and_supervised():
    """SimCLR (Section 2.1): minus the pairs' cosine over T, and the log of the sum over the 2N - 1 candidates."""
    z, labels = randn(10, 6), integers(6, 10)
    unit = [v / v.norm() for v in z.double()]
    attraction = -sum(unit[i] @ unit[i + 5] for i in range(5)) / 5 / 0.2
    repulsion = sum(sum((unit[i] @ unit[k] / 0.2).exp() for k in range(10) if k != i).log() for i in range(10)) / 10
    got = S.losses_of(flags("--objective", "simclr", "--temperature", 0.2), z, None)
    assert list(got) == ["loss", "invariance", "regularisation"]
    assert got["invariance"].item() == pytest.approx(attraction.item(), rel=1e-5)
    assert got["regularisation"].item() == pytest.approx(repulsion.item(), rel=1e-5)
    assert got["loss"].item() == pytest.approx((attraction + repulsion).item(), rel=1e-5)
    entropy = -sum(math.log(math.exp(row[y]) / sum(map(math.exp, row)))
                   for row, y in zip(z.tolist(), labels.tolist())) / 10
    got = S.losses_of(flags("--objective", "supervised"), z, labels)
    assert list(got) == ["loss"] and got["loss"].item() == pytest.approx(entropy, rel=1e-5)


# --- NCC and CDNV -----------------------------------------------------------------------------------------------------

def slow_clustering(x, y, x_test, y_test, classes):
    """Section 2.2 picture by picture and pair by pair, in float64."""
    x, x_test = x.double(), x_test.double()
    of = {c: [p for p, label in zip(x, y.tolist()) if label == c] for c in range(classes)}
    means = {c: sum(members) / len(members) for c, members in of.items() if members}

    def accuracy(pictures, labels):
        nearest = [min(means, key=lambda c, p=p: ((p - means[c]) ** 2).sum().item()) for p in pictures]
        return 100 * sum(n == label for n, label in zip(nearest, labels.tolist())) / len(nearest)

    several = [c for c in means if len(of[c]) > 1]
    var = {c: (sum(((p - means[c]) ** 2).sum() for p in of[c]) / len(of[c])).item() for c in several}
    gap = {(i, j): ((means[i] - means[j]) ** 2).sum().item() for i in several for j in several if i != j}
    return {"ncc_train": accuracy(x, y), "ncc_test": accuracy(x_test, y_test),
            "cdnv": sum((var[i] + var[j]) / (2 * d) for (i, j), d in gap.items()) / len(gap),
            "variance": sum(var.values()) / len(var), "distance": sum(gap.values()) / len(gap)}


def some_classes(labels, d=6, spread=1.0, seed=0):
    """Features around a mean for every class."""
    return spread * randn(int(labels.max()) + 1, d, seed=seed + 50)[labels] + randn(len(labels), d, seed=seed)


@pytest.mark.parametrize("labels", [
    torch.arange(40) % 5, torch.arange(40) % 2,
    torch.tensor([0] * 20 + [1] * 9 + [3] * 2 + [4]),                # class 2 absent, class 4 with one picture
    torch.tensor([5] * 12 + [0, 0, 0, 3, 3]),
], ids=["even", "two", "one picture, one absent", "many absent"])
def test_clustering_equals_loops(labels):
    x, y_test = some_classes(labels), torch.arange(30) % (int(labels.max()) + 1)
    x_test = some_classes(y_test, seed=1)
    classes = int(labels.max()) + 1
    got, expected = (f(x, labels, x_test, y_test, classes) for f in (S.clustering, slow_clustering))
    assert got == pytest.approx(expected, rel=1e-5)
    assert 0 < got["ncc_test"] < 100
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    assert S.clustering(x[order], labels[order], x_test, y_test, classes) == pytest.approx(expected, rel=1e-5)


def test_clustering_over_several_chunks():
    """More pictures than the 8192 that it takes at a time."""
    y = integers(3, 9001)
    x = some_classes(y, 2, 2.0)
    got = S.clustering(x, y, x[:8200], y[:8200], 3)
    double = [x[y == c].double() for c in range(3)]
    means = torch.stack([m.mean(0) for m in double])
    var = [((m - m.mean(0)) ** 2).sum(1).mean().item() for m in double]
    gaps = [((means[i] - means[j]) ** 2).sum().item() for i, j in ((0, 1), (0, 2), (1, 2))]
    pairs = [(var[i] + var[j]) / 2 / g for (i, j), g in zip(((0, 1), (0, 2), (1, 2)), gaps)]
    hit = torch.cdist(x.double(), means).argmin(1) == y
    assert got == pytest.approx({"ncc_train": 100 * hit.double().mean().item(),
                                 "ncc_test": 100 * hit[:8200].double().mean().item(), "cdnv": sum(pairs) / 3,
                                 "variance": sum(var) / 3, "distance": sum(gaps) / 3}, rel=1e-4)


def test_nearest_of_two_equally_near_centres_is_the_first():
    """Centres at -1, 1 and (absent) nowhere; what lies between them goes to class 0, and nothing to the absent one."""
    x, y = torch.tensor([[-2.0], [0.0], [0.0], [2.0]]), torch.tensor([0, 0, 1, 1])
    got = S.clustering(x, y, torch.zeros(4, 1), torch.tensor([0, 1, 2, 2]), 3)
    assert got["ncc_train"] == 75 and got["ncc_test"] == 25
    assert (got["variance"], got["distance"], got["cdnv"]) == (1, 4, 0.25)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7])
def test_constant_features_have_no_cdnv(value):
    x, y = torch.full((40, 7), value), torch.tensor([0] * 7 + [1] * 11 + [2] * 22)
    got = S.clustering(x, y, x, y, 3)
    assert got["cdnv"] is None and got["variance"] == 0 and got["distance"] == 0
    assert any(got["ncc_train"] == pytest.approx(share) for share in (17.5, 27.5, 55))        # all to one class


def test_coincident_means_and_a_single_class_have_no_cdnv():
    half = randn(10, 4)
    x, y = torch.cat([half, half, half + 1]), torch.arange(30) // 10
    got = S.clustering(x, y, x, y, 3)
    assert got["cdnv"] is None and got["variance"] > 1 and got["distance"] == pytest.approx(16 / 6, rel=1e-5)
    assert S.clustering(half, torch.zeros(10, dtype=torch.long), half, torch.zeros(10, dtype=torch.long), 3)[
        "cdnv"] is None
    y = torch.tensor([0] * 9 + [1])                                  # the second class has but one picture
    assert S.clustering(half, y, half, y, 2)["cdnv"] is None


def test_clustering_does_not_change_with_a_shift():
    """Features in steps of 2^-7, so that adding 2^16 in float32 is exact: only the measure's own rounding is left."""
    y = torch.arange(200) % 8
    x = (some_classes(y, 10) * 128).round() / 128
    got = S.clustering(x, y, x, y, 8)
    moved = S.clustering(x + 2 ** 16, y, x - 2 ** 16 + 2 ** 17, y, 8)
    assert torch.equal((x + 2 ** 16) - 2 ** 16, x) and moved == pytest.approx(got, rel=1e-3)
    assert moved["ncc_train"] == got["ncc_train"] and 20 < got["ncc_train"] < 100


def test_clustering_builds_nothing_of_classes_times_classes_times_features():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor):
                    self.numel = max(self.numel, t.numel())
            return out

    n, classes, d = 240, 80, 90
    x, y = randn(n, d), torch.arange(n) % classes
    with Largest() as seen:
        S.clustering(x, y, x, y, classes)
    assert n * classes <= seen.numel <= n * d < classes * classes * d


# --- the linear SVM ---------------------------------------------------------------------------------------------------

def with_one(x):
    return torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], 1)


def svm_objective(x, y, w, c=1.0):
    """LIBLINEAR's, of every class: |w|^2/2 + c sum max(0, 1 - s <w, (x, 1)>)^2, the bias within w. x, w float64."""
    signs = torch.where(y.unsqueeze(1) == torch.arange(w.shape[1]), 1.0, -1.0)
    return w.square().sum(0) / 2 + c * (1 - signs * (with_one(x) @ w)).clamp(min=0).square().sum(0)


def newton_svm(x, y, classes, c=1.0):
    """Each class by Newton's method with halved steps, float64, to a gradient of nothing."""
    x, weights = with_one(x), []
    for k in range(classes):
        s, w = torch.where(y == k, 1.0, -1.0).double(), torch.zeros(x.shape[1], dtype=torch.float64)

        def value(w, s=s):
            return w @ w / 2 + c * (1 - s * (x @ w)).clamp(min=0).square().sum()

        for _ in range(100):
            margin = 1 - s * (x @ w)
            xa, sa, ma = x[margin > 0], s[margin > 0], margin[margin > 0]
            gradient = w - 2 * c * xa.T @ (sa * ma)
            step = torch.linalg.solve(torch.eye(len(w)).double() + 2 * c * xa.T @ xa, gradient)
            if step @ gradient <= 1e-13 * value(w):
                break
            t = 1.0
            while value(w - t * step) > value(w) - 1e-4 * t * (gradient @ step) and t > 1e-8:
                t /= 2
            w = w - t * step
        weights.append(w)
    return torch.stack(weights, 1)


def svm_problem(name):
    """(x, y, classes), overlapping classes: as most layers'."""
    n, d, classes = 300, 12, 4
    x = randn(n, d) @ randn(d, d, seed=1)
    y = (x @ randn(d, classes, seed=2) + 4 * randn(n, classes, seed=3)).argmax(1)
    if name == "scales 1e-3 .. 1e3":
        x = x * torch.logspace(-3, 3, d)[torch.randperm(d, generator=torch.Generator().manual_seed(0))]
    elif name == "two classes":
        y, classes = (y > 1).long(), 2
    elif name == "absent classes":
        y, classes = 2 * y, 8
    elif name == "classes of few pictures":
        y = torch.zeros_like(y)
        y[:3], y[3], classes = 1, 2, 3
    elif name == "far from the origin":
        x = 0.1 * x + 50
    elif name == "constant and zero features":
        x[:, 3], x[:, 5] = 7.0, 0.0
    elif name == "dependent features":                               # as of a deep untrained layer: 8 of 30, large
        n, classes = 3000, 3
        x, y = 30 * randn(n, 8) @ randn(8, 30, seed=1), integers(3, n)
    elif name == "more features than pictures":
        n, classes = 40, 3
        x, y = randn(n, 60), integers(3, n)
    elif name == "more pictures than one chunk":
        n, classes = 8300, 3
        x, y = randn(n, 3), integers(3, n)
        x[8192:] += 5
    return x, y, classes


@pytest.mark.parametrize("name", ["plain", "scales 1e-3 .. 1e3", "two classes", "absent classes",
                                  "classes of few pictures", "far from the origin", "constant and zero features",
                                  "dependent features", "more features than pictures", "more pictures than one chunk"])
def test_svm_finds_the_minimum(name):
    """Objective of every class, decisions, and the condition at a minimum: the gradient, which Newton's method would
    still turn into an improvement of <g, H^-1 g>/2, is as good as zero."""
    x, y, classes = svm_problem(name)
    got, expected = S.fit_svm(x, y, classes), newton_svm(x, y, classes)
    assert got.shape == (x.shape[1] + 1, classes) and got.dtype == torch.float32 and not got.requires_grad
    worse = 5e-3 if name == "more features than pictures" else 1e-4  # separable: the minimum is near zero
    w = got.double().requires_grad_()
    value = svm_objective(x, y, w)
    assert (value <= (1 + worse) * svm_objective(x, y, expected)).all()
    gradient = torch.autograd.grad(value.sum(), w)[0]
    for k in range(classes):
        active = with_one(x)[(1 - torch.where(y == k, 1, -1) * (with_one(x) @ w[:, k])) > 0]
        hessian = torch.eye(len(w)).double() + 2 * active.T @ active
        assert gradient[:, k] @ torch.linalg.solve(hessian, gradient[:, k]) / 2 <= worse * value[k]
    scores, exact = with_one(x) @ got.double(), with_one(x) @ expected
    torch.testing.assert_close(scores, exact, rtol=0, atol=0.15 if worse > 1e-3 else 0.03)
    assert (scores.argmax(1) == exact.argmax(1)).double().mean() > 0.99


@pytest.mark.parametrize("c", [0.01, 100.0])
def test_svm_cost(c):
    x, y, classes = svm_problem("plain")
    got, expected = S.fit_svm(x, y, classes, c, 200), newton_svm(x, y, classes, c)
    torch.testing.assert_close(with_one(x) @ got.double(), with_one(x) @ expected, rtol=0, atol=0.03)
    assert (expected - newton_svm(x, y, classes)).abs().max() > 0.01


def test_svms_gradient_written_by_hand_is_autograds(monkeypatch):
    """At random points v, of the whole objective in w = scale v (with as many classes as weights, v = 1 shows scale).
    And its start is at zero, where the objective is one."""
    x, y = randn(40, 4) * torch.tensor([1.0, 10, 0.1, 3]), integers(5, 40)
    seen = []

    class Spy(torch.optim.LBFGS):
        def step(self, objective):
            v = self.param_groups[0]["params"][0]
            with torch.no_grad():
                assert not v.any() and objective().item() == pytest.approx(1, rel=1e-5)
                v.copy_(point)
                seen.append((objective().item(), v.grad.clone()))

    monkeypatch.setattr(S.torch.optim, "LBFGS", Spy)
    point = torch.eye(5)
    scale = S.fit_svm(x, y, 5, 0.7).double()
    for seed in range(3):
        point = 0.5 * randn(5, 5, seed=seed)
        S.fit_svm(x, y, 5, 0.7)
        v = point.double().requires_grad_()
        value = svm_objective(x, y, scale @ v, 0.7).sum() / (0.7 * 40 * 5)
        expected = torch.autograd.grad(value, v)[0]
        assert seen[-1][0] == pytest.approx(value.item(), rel=1e-5)
        torch.testing.assert_close(seen[-1][1].double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


# --- mutual information -----------------------------------------------------------------------------------------------

def gaussians(n, d, rho, seed=0):
    """x, z [n, d] with correlation rho in every dimension: I = -d/2 log2(1 - rho^2) bits."""
    x = randn(n, d, seed=seed)
    return 5 * x + 3, 0.01 * (rho * x + (1 - rho ** 2) ** 0.5 * randn(n, d, seed=seed + 1))


@pytest.mark.parametrize("d, rho", [(1, 0.9), (2, 0.8)])
def test_mine_on_correlated_gaussians(d, rho):
    """A lower bound: below the information, but for the noise of 700 held-out pairs, and not far below."""
    exact = -d / 2 * math.log2(1 - rho ** 2)
    bits = S.mutual_information(*gaussians(3500, d, rho), 100)
    assert len(bits) == 5 and len(set(bits)) == 5                    # five initialisations
    assert all(0.75 * exact < b < 1.15 * exact for b in bits), (bits, exact)


def test_mine_of_independent_variables_is_near_zero_even_if_it_could_learn_them_by_heart():
    """200 pairs in 20 dimensions: on the pairs it was trained on, the bound would be bits above zero."""
    x, z = gaussians(250, 20, 0.0)
    assert all(b < 0.1 for b in S.mutual_information(x, z, 60))
    x, z = gaussians(2000, 1, 0.0)
    assert all(-0.3 < b < 0.06 for b in S.mutual_information(x, z, 30))


def test_mine_is_measured_on_the_last_fifth():
    """Dependent pairs to train on, independent ones to measure on: nothing is found; the reverse cannot be learned."""
    x, z = gaussians(1000, 1, 0.95)
    broken = z.clone()
    broken[800:] = z[800:].flip(0)
    assert all(b > 0.5 for b in S.mutual_information(x, z, 40))
    assert all(b < 0 for b in S.mutual_information(x, broken, 40))


def test_mine_is_a_function_of_its_seed_alone():
    x, z = gaussians(60, 3, 0.5)
    z[:, 1] = 2.0                                                    # a constant feature, as a dead channel
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = S.mutual_information(x, z, 3)
    assert torch.equal(torch.get_rng_state(), before) and all(map(math.isfinite, first))
    torch.manual_seed(6)
    assert S.mutual_information(x, z, 3) == first != S.mutual_information(x, z, 3, seed=1)
    assert len(S.mutual_information(x, z, 1, runs=2)) == 2


# --- network ----------------------------------------------------------------------------------------------------------

def network(*words, size=16, classes=4, seed=0):
    """A Net whose BatchNorms have statistics, scales and shifts of their own."""
    torch.manual_seed(seed)
    net = S.Net(flags(*words), size, classes)
    for m in net.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            m.running_mean.normal_(0, 0.2)
            m.running_var.uniform_(0.5, 2)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0.3, 0.2)
    return net


def some_images(n=6, size=16):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1))


class Written:
    """App. A.2 by hand, from the network's weights alone: name -> output. With `batch` as BatchNorm in training."""
    def __init__(self, net, batch):
        self.weights, self.batch = {k: v.detach().double() for k, v in net.state_dict().items()}, batch

    def norm(self, h, name):
        w, axes = {k: self.weights[f"layers.{name}.{k}"] for k in
                   ("weight", "bias", "running_mean", "running_var")}, [0, *range(2, h.ndim)]
        if self.batch:
            mean, var = h.mean(axes), h.var(axes, correction=0)
        else:
            mean, var = w["running_mean"], w["running_var"]
        def column(t):
            return t.view(-1, *[1] * (h.ndim - 2))
        return column(w["weight"]) * (h - column(mean)) / column(var + 1e-5).sqrt() + column(w["bias"])

    def conv(self, h, name, stride, padding):
        return F.conv2d(h, self.weights[f"layers.{name}.weight"], None, stride, padding)

    def __call__(self, images, blocks):
        out, h = {}, (images.double() - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / \
            torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        for i in (1, 2):
            h = self.norm(self.conv(h, f"stem.conv{i}", 2, 0), f"stem.bn{i}").relu()
        out["stem"] = h
        for i in range(1, blocks + 1):
            g = self.norm(self.conv(h, f"block{i}.conv1", 1, 1), f"block{i}.bn1").relu()
            g = self.norm(self.conv(g, f"block{i}.conv2", 1, 1), f"block{i}.bn2")
            h = (h + g).relu()
            out[f"block{i}.odd"], out[f"block{i}.even"] = g, h
        out["avgpool"] = h = h.mean((2, 3))
        w = self.weights
        h = h @ w["layers.head.0.weight"].T + w["layers.head.0.bias"]
        out["head"] = self.norm(h, "head.1").relu() @ w["layers.head.3.weight"].T
        return out


def test_res_l_h_is_the_papers():
    """relu(x + B2 C2 relu(B1 C1 x)) behind two 2x2 convolutions of stride 2, every activation; 18 px: two are lost."""
    net = network("--arch", "RES-3-10", "--projector", 7, 5).eval()
    for size in (16, 18):
        images = some_images(6, size)
        with torch.no_grad():
            got, expected = net.activations(images), Written(net, False)(images, 3)
            assert list(got) == list(expected)
            for name in expected:
                torch.testing.assert_close(got[name].double(), expected[name], rtol=1e-4, atol=1e-5)
            assert torch.equal(net.features(images), got["avgpool"]) and got["stem"].shape == (6, 10, 4, 4)
            torch.testing.assert_close(net(images, torch.zeros(6, dtype=torch.bool)), got["head"])
    assert (got["block1.odd"] < 0).any() and all((got[n] >= 0).all() for n in ("stem", "block1.even", "block3.even"))


def test_each_view_has_its_own_batch_statistics():
    """In training: the output of one view does not depend on the other; running statistics move twice, in order."""
    net, before = network("--arch", "RES-2-8", "--projector", 7, 5), network("--arch", "RES-2-8", "--projector", 7, 5)
    first, second = some_images(5), 0.3 * some_images(10)[5:] + 0.5
    got = net.train()(torch.cat([first, second]), torch.zeros(10, dtype=torch.bool))
    slow = Written(before, True)
    expected = torch.cat([slow(view, 2)["head"] for view in (first, second)])
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-4)
    assert (expected - slow(torch.cat([first, second]), 2)["head"]).abs().max() > 0.1
    w, mean = before.layers["stem"].conv1.weight.double(), before.layers["stem"].bn1.running_mean.double()
    for view in (first, second):
        normal = (view.double() - S.IMAGENET[0].view(3, 1, 1)) / S.IMAGENET[1].view(3, 1, 1)
        mean = 0.9 * mean + 0.1 * F.conv2d(normal, w, None, 2).mean((0, 2, 3))
    torch.testing.assert_close(net.layers["stem"].bn1.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    assert net.layers["stem"].bn1.num_batches_tracked == 2


def test_supervised_network_is_one_view_and_class_logits():
    net = network("--arch", "RES-1-4", "--objective", "supervised", classes=7).train()
    out = net(some_images(5), torch.zeros(5, dtype=torch.bool))
    assert out.shape == (5, 7) and net.layers["stem"].bn1.num_batches_tracked == 1


def test_parameter_counts_by_hand():
    """RES-5-50: (3*50 + 50*50) weights of 2x2, 5 * 2 convolutions of 50*50 weights of 3x3, scale and shift of 12
    BatchNorms; the projector 50 -> 256 -> 256, its last Linear without bias."""
    stem, blocks, width = S.backbone("RES-5-50", 32)
    count = sum(p.numel() for m in [stem, *blocks] for p in m.parameters())
    assert (len(blocks), width) == (5, 50)
    assert count == (150 + 2500) * 4 + 5 * 2 * 2500 * 9 + 12 * 100 == 236_800
    net = S.Net(flags("--arch", "RES-5-50"), 32, 4)
    assert sum(p.numel() for p in net.parameters()) == count + 50 * 256 + 256 + 512 + 256 * 256
    for arch, blocks in (("RES-5-250", 5), ("RES-10-250", 10)):
        with torch.device("meta"):
            stem, residual, width = S.backbone(arch, 32)
        assert (len(residual), width) == (blocks, 250)


def test_resnet18_equals_torchvisions():
    """The same weights under torchvision's keys: normalise, forward without the last layer, at 64 px."""
    net, theirs = network("--arch", "resnet18", size=64).eval(), torchvision.models.resnet18(weights=None).eval()
    theirs.fc = nn.Identity()
    state = net.state_dict()
    keys = [k for k in state if not k.startswith(("layers.input", "layers.head"))]
    assert len(keys) == len(theirs.state_dict())
    theirs.load_state_dict(dict(zip(theirs.state_dict(), (state[k] for k in keys))))          # both in order
    images = some_images(2, 64)
    with torch.no_grad():
        expected = theirs(V.normalize(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        torch.testing.assert_close(net.features(images), expected, rtol=1e-4, atol=1e-4)
        assert net.layers["stem"](images).shape == (2, 64, 16, 16)
    small = S.backbone("resnet18", 32)[0]
    with torch.no_grad():
        assert small(some_images(2, 32)).shape == (2, 64, 32, 32)    # CIFAR: 3x3, stride 1, no pool


@pytest.mark.parametrize("arch", ["RES-3-4", "resnet18"])
def test_layer_names_numbers_and_activations_agree(arch):
    net, names = network("--arch", arch, size=32).eval(), S.layer_names(arch)
    assert list(names.values()) == list(net.layers) and list(names) == list(range(-1, len(names) - 1))
    with torch.no_grad():
        h, acts, numbered = some_images(2, 32), net.activations(some_images(2, 32)), net.numbered()
        assert list(numbered.values()) == list(range(len(names) - 1))
        by_number = {l: name for name, l in numbered.items()}
        for l, layer in zip(names, net.layers.values()):
            h = layer(h)
            if l >= 0:
                assert torch.equal(acts[by_number[l]], h) and by_number[l].removesuffix(".even") == names[l]
    assert flags("--arch", arch, "--layer", "all").targets == list(range(len(names) - 1))


ROWS = torch.tensor([True, False, True, False, False, False, True, True])      # of two views of four pictures


@pytest.mark.parametrize("layer", [-1, 0, 1, 2, 3, 4])
def test_stop_gradient_at_a_layer(layer):
    """Augmented rows send nothing below the layer; clean rows what they send without augmentation. RES-2-6: -1 input,
    0 stem, 1-2 blocks, 3 average pool, 4 head."""
    def gradients(layer, stop, weights):
        net = network("--arch", "RES-2-6", "--projector", 9, 5, "--layer", layer, stop)
        net.train()
        for m in net.modules():                                      # BatchNorm must not mix the rows
            if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
                m.eval()
        images = some_images(8).requires_grad_()
        torch.manual_seed(7)
        out = net(images, ROWS)
        (out * weights).sum().backward()
        number = {name: l for l, name in S.layer_names("RES-2-6").items()}
        return images.grad, {k: (number[k.split(".")[1]], p.grad) for k, p in net.named_parameters()}, out.detach()

    weights = randn(8, 5, seed=2)
    images, params, out = gradients(layer, "--stop-grad", weights)
    plain_images, plain_params, plain = gradients("none", "--stop-grad", weights * ~ROWS.view(-1, 1))
    assert not images[ROWS].any() and torch.equal(out[~ROWS], plain[~ROWS])
    assert (out != plain).any(1).tolist() == ROWS.tolist()
    torch.testing.assert_close(images[~ROWS], plain_images[~ROWS])
    for name, (l, grad) in params.items():
        if l <= layer:
            torch.testing.assert_close(grad, plain_params[name][1], msg=name)
    augmented_only = weights * ROWS.view(-1, 1)
    for name, (l, grad) in gradients(layer, "--stop-grad", augmented_only)[1].items():
        assert grad.any() == (l > layer), name
    images, params, _ = gradients(layer, "--no-stop-grad", augmented_only)
    assert images.flatten(1).any(1).tolist() == ROWS.tolist() and all(grad.any() for _, grad in params.values())


# --- features ---------------------------------------------------------------------------------------------------------

def test_pooled():
    maps, tokens, flat = randn(2, 3, 4, 5), randn(2, 4, 3), randn(2, 3)
    expected = torch.tensor([[sum(maps[b, c].flatten().tolist()) / 20 for c in range(3)] for b in range(2)])
    torch.testing.assert_close(S.pooled(maps, "avg"), expected)
    expected = torch.tensor([[sum(tokens[b, :, c].tolist()) / 4 for c in range(3)] for b in range(2)])
    torch.testing.assert_close(S.pooled(tokens, "avg"), expected)
    for h in (maps, tokens, flat):
        assert torch.equal(S.pooled(h, "flatten"), h.reshape(2, -1))
    assert torch.equal(S.pooled(flat, "avg"), flat)
    assert S.pooled(maps.bfloat16(), "avg").dtype == S.pooled(flat.bfloat16(), "flatten").dtype == torch.float32


def test_layer_features_of_several_batches_keep_the_order():
    """One pass for all the layers asked for, no others, without gradient."""
    passes = []

    def activations(images):
        passes.append(len(images))
        return {"maps": images * weight, "mean": images.mean((2, 3)), "other": None}

    weight = torch.ones(1, requires_grad=True)
    images, index = randn(7, 3, 2, 2), torch.tensor([4, 2, 0, 9, 8, 7, 1])
    batches = ((images[i:i + 3], index[i:i + 3]) for i in (0, 3, 6))
    features, got = S.layer_features(activations, ["mean", "maps"], "flatten", batches)
    assert passes == [3, 3, 1] and torch.equal(got, index) and set(features) == {"mean", "maps"}
    assert torch.equal(features["maps"], images.flatten(1)) and not features["maps"].requires_grad
    assert torch.equal(features["mean"], images.mean((2, 3)))


# --- views ------------------------------------------------------------------------------------------------------------

def test_supervised_pictures_are_one_each_and_unchanged_without_augmentation():
    images = S.draw_shapes(20, 0, "cpu")[0]
    got = S.train_views(images, S.Split(None, 32, images=images), flags("--objective", "supervised"))
    assert torch.equal(got, images.float() / 255)


def test_autoaugment_changes_pictures_within_shape_and_range():
    """CIFAR-10's policy; eight pictures share a draw, groups differ; the random state decides; the input stays."""
    images = S.draw_shapes(8, 0, "cpu")[0][:1].repeat(160, 1, 1, 1)
    copy, a = images.clone(), flags("--objective", "supervised-autoaugment")
    torch.manual_seed(0)
    got = S.train_views(images, S.Split(None, 32, images=images), a)
    assert got.shape == (160, 3, 32, 32) and got.dtype == torch.float32 and torch.equal(images, copy)
    assert got.min() >= 0 and got.max() <= 1 and ((got * 255).round() / 255 - got).abs().max() < 1e-6
    groups = got.split(8)
    assert all(torch.equal(g, g[:1].expand_as(g)) for g in groups)   # the same picture, the same draw
    changed = sum(not torch.equal(g[0], images[0] / 255) for g in groups)
    assert 10 <= changed and len({g[0].numpy().tobytes() for g in groups}) >= 10
    torch.manual_seed(0)
    assert torch.equal(S.train_views(images, S.Split(None, 32, images=images), a), got)


def test_self_supervised_views_are_first_ones_then_second_ones(monkeypatch):
    """Of pictures in memory, cropped here; of streamed ones, whose two crops the workers have made."""
    images, a, asked = S.draw_shapes(20, 0, "cpu")[0][:6], flags("--blur", 0.3, "--solarize", 0.2), []
    split = S.Split(None, 32, images=images)
    torch.manual_seed(0)
    views = S.train_views(images, split, a)
    assert views.shape == (12, 3, 32, 32) and not any(torch.equal(x, y) for x, y in zip(*views.chunk(2)))

    def same(pictures, size, *rest):
        asked.append(rest)
        return pictures / 255

    monkeypatch.setattr(S, "make_views", same)
    assert torch.equal(S.train_views(images, split, a), torch.cat([images, images]) / 255)
    crops = torch.stack([images, 255 - images], 1)                                            # [B, 2, 3, S, S]
    assert torch.equal(S.train_views(crops, split, a), torch.cat([images, 255 - images]) / 255)
    assert asked == [(crop_min, 0.3, 0.2, (0.4, 0.4, 0.2, 0.1), 23) for crop_min in (0.2, 0)]


def test_strength_of_the_colour_operations(monkeypatch):
    """Factors are uniform within 1 -+ strength (hue: 0 -+ strength) in four of five pictures; saturation's is .2."""
    seen = {}
    for name in ("brightness", "contrast", "saturation", "hue"):
        def spy(x, factor, name=name):
            seen[name] = factor.flatten()
            return x
        monkeypatch.setattr(S, name, spy)
    torch.manual_seed(0)
    S.views_of(torch.zeros(4000, 3, 4, 4, dtype=torch.uint8), 4, flags(), 0)
    jittered = seen["hue"] != 0
    assert 0.77 < jittered.float().mean() < 0.83
    for name, strength, neutral in (("brightness", 0.4, 1), ("contrast", 0.4, 1), ("saturation", 0.2, 1),
                                    ("hue", 0.1, 0)):
        factor = (seen[name] - neutral) / strength
        assert not factor[~jittered].any() and 0.99 < factor.abs().max() <= 1 + 1e-5, name
        assert abs(factor[jittered].abs().mean() - 0.5) < 0.03 and abs(factor[jittered].mean()) < 0.05, name


@pytest.mark.parametrize("size, kernel, window", [(32, 23, 23), (64, 23, 23), (64, 0, 7), (8, 23, 15)])
def test_window_of_the_blur_in_a_view_equals_torchvisions(monkeypatch, size, kernel, window):
    """A view that is nothing but blurred (and gray in a fifth of the cases). The window ends where reflection does."""
    sigmas, real = [], S.blur_matrix

    def spy(sigma, *rest):
        sigmas.append(sigma)
        return real(sigma, *rest)

    monkeypatch.setattr(S, "blur_matrix", spy)
    images = V.resize(S.draw_shapes(10, 0, "cpu")[0], [size, size])
    torch.manual_seed(0)
    got = S.make_views(images, size, 0, 1.0, 0.0, (0, 0, 0, 0), kernel)
    assert len(sigmas[0].unique()) == 10 and 0.1 <= sigmas[0].min() and sigmas[0].max() <= 2
    for view, picture, sigma in zip(got, images / 255, sigmas[0].tolist()):
        colour = picture if (view[0] - view[1]).abs().max() > 1e-5 else V.rgb_to_grayscale(picture, 3)
        if window < size:                                            # torchvision refuses more reflection than that
            expected = V.gaussian_blur(colour, [window, window], [sigma, sigma])
        else:
            line = torch.exp(-0.5 * ((torch.arange(window) - window // 2) / sigma) ** 2)
            padded = F.pad(colour.unsqueeze(1), [window // 2] * 4, mode="reflect")
            expected = F.conv2d(padded, torch.outer(line, line)[None, None] / line.sum() ** 2)[:, 0]
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-5)


# --- random targets and superclasses ----------------------------------------------------------------------------------

def test_random_targets_go_from_random_to_semantic(capsys):
    """Drawn shapes by family, RES-1-8: evenly spaced stages, for the pictures that are probed; an untrained network's
    are no one-class answer; the trained one's agree with the labels more. The same settings give the same targets."""
    (images, labels), (images_test, labels_test) = S.draw_shapes(1280, 0, "cpu"), S.draw_shapes(300, 1, "cpu")
    a = flags("--target-epochs", 6, "--target-stages", 4, "--probe-images", 700)
    splits = S.Split(labels // 4, 32, images=images), S.Split(labels_test // 4, 32, images=images_test)
    targets = S.random_targets(a, "RES-1-8", *splits, list("abcde"), CPU)
    assert [t["randomness"] for t in targets] == pytest.approx([1, 2 / 3, 1 / 3, 0], abs=1e-9)
    for t in targets:
        assert t["train"].shape == (700,) and t["test"].shape == (300,)
        assert t["train"].dtype == t["test"].dtype == torch.int64 and 0 <= t["train"].min() and t["train"].max() <= 4
        assert t["train"].bincount().max() < 0.5 * 700
    right = [[(t["train"] == labels[:700] // 4).float().mean().item(),
              (t["test"] == labels_test // 4).float().mean().item()] for t in targets]
    assert all(r < 0.3 for r in right[0]) and all(r > 0.35 for r in right[-1]), right
    for seed in (0, 1):
        a = flags("--target-epochs", 1, "--target-stages", 2, "--probe-images", 700, "--seed", seed)
        first, last = S.random_targets(a, "RES-1-8", *splits, list("abcde"), CPU)
        assert (first["randomness"], last["randomness"]) == (1, 0)
        assert all(torch.equal(first[k], targets[0][k]) == (seed == 0) for k in ("train", "test"))


def test_superclasses_of_shapes_are_the_families(monkeypatch):
    draw = S.draw_shapes
    monkeypatch.setattr(S, "draw_shapes", lambda n, *rest: draw(20, *rest))                   # only names are wanted
    _, _, classes = S.load_data("shapes", flags(), CPU)
    coarse = S.superclasses(flags(), CPU).tolist()
    families = {}
    for name, c in zip(classes, coarse):
        families.setdefault(c, set()).add(name.split()[0])
    assert sorted(families) == [0, 1, 2, 3, 4] and [len(f) for f in families.values()] == [1] * 5
    assert len(coarse) == 20 and S.superclasses(flags("--dataset", "cifar10"), CPU) is None


def test_superclasses_of_cifar100_are_its_coarse_labels(real_data):
    """Twenty of five classes each; named groups of the paper; and every test picture's own coarse label agrees."""
    a = flags("--dataset", "cifar100", "--data-dir", real_data)
    coarse = S.superclasses(a, CPU)
    assert coarse.bincount().tolist() == [5] * 20
    with open(real_data / "cifar-100-python" / "meta", "rb") as f:
        classes = pickle.load(f)["fine_label_names"]
    for group in ("aquarium_fish flatfish ray shark trout", "beaver dolphin otter seal whale",
                  "baby boy girl man woman", "maple_tree oak_tree palm_tree pine_tree willow_tree"):
        first = classes.index(group.split()[0])
        assert [classes[i] for i in (coarse == coarse[first]).nonzero()[:, 0]] == group.split()
    with open(real_data / "cifar-100-python" / "test", "rb") as f:
        test = pickle.load(f, encoding="latin1")
    assert coarse[torch.tensor(test["fine_labels"])].tolist() == test["coarse_labels"]


# --- probes -----------------------------------------------------------------------------------------------------------

def shapes_probes(*words, n=200):
    splits = [S.Split(labels, 32, images=images) for images, labels in (S.draw_shapes(n, s, "cpu") for s in (0, 1))]
    classes = [str(i) for i in range(20)]
    return S.Probes(flags("--target-net", "none", "--mine-steps", 0, *words), *splits, classes, CPU), splits


def test_sample_level_views_are_other_draws_of_the_same_pictures(monkeypatch):
    probes, (train, _) = shapes_probes("--sample-level", 30, 3, 2)
    assert probes.samples.shape == (30, 3, 32, 32) and probes.samples.dtype == torch.uint8
    known = {p.numpy().tobytes() for p in train.images}
    chosen = {p.numpy().tobytes() for p in probes.samples}
    assert len(chosen) == 30 and chosen <= known
    assert {p.numpy().tobytes() for p in shapes_probes("--sample-level", 30, 3, 2, "--seed", 1)[0].samples} == chosen
    fit, test = list(probes.view_batches(3, 0)), list(probes.view_batches(2, 1))
    assert all(index.tolist() == list(range(30)) for _, index in fit + test) and (len(fit), len(test)) == (3, 2)
    views = [v for batch, _ in fit + test for v in batch]
    assert all(v.shape == (3, 32, 32) for v in views) and len({v.numpy().tobytes() for v in views}) == 5 * 30
    torch.manual_seed(99)                                            # at another epoch, the same views
    assert all(torch.equal(x, y) for (x, _), (y, _) in zip(fit, probes.view_batches(3, 0)))
    shown = set()                                                    # what a network is shown when it is probed

    def activations(images):
        shown.update(p.numpy().tobytes() for p in images)
        return {"colour": images.mean((2, 3))}

    probes.run(activations, ["colour"], "colour", 0, False)
    assert {v.numpy().tobytes() for v in views} <= shown and len(shown) == 5 * 30 + 2 * 200
    monkeypatch.setattr(S, "views_of", lambda images, size, a, crop_min: images)
    assert all(torch.equal(batch, probes.samples) for batch, _ in probes.view_batches(2, 1))


def test_sample_level_of_more_pictures_than_a_batch(monkeypatch):
    """513 pictures: two batches a time, each with draws of its own."""
    probes, _ = shapes_probes("--sample-level", 513, 2, 1, n=520)
    monkeypatch.setattr(S, "views_of", lambda images, size, a, crop_min: torch.rand(len(images), 1))
    (x, i), (y, j), (z, _), _ = probes.view_batches(2, 0)
    assert torch.cat([i, j]).tolist() == list(range(513)) and (len(x), len(y)) == (512, 1)
    assert y[0] not in (x[0], z[0]) and x[0] != z[0]


def test_tasks_are_class_and_superclass_of_the_probed_pictures():
    probes, (train, test) = shapes_probes("--sample-level", 0, 0, 0, "--probe-images", 160)
    (name, n, y, y_test), (coarse, m, s, s_test) = probes.tasks
    assert (name, n, coarse, m) == ("class", 20, "superclass", 5) and probes.samples is None
    assert torch.equal(y, train.labels[:160]) and torch.equal(y_test, test.labels)
    assert torch.equal(s, train.labels[:160] // 4) and torch.equal(s_test, test.labels // 4)


def test_probing_gives_every_layer_its_own_features_and_labels():
    """Two layers, one that knows the label of a plain picture (not of a view) and one that sees nothing."""
    probes, (train, _) = shapes_probes("--sample-level", 20, 3, 2, "--probe-images", 160, "--probes", "svm", "ncc")
    answer = {}
    for pictures, labels in ((probes.train_split.images, probes.train_split.labels),
                             (probes.test_split.images, probes.test_split.labels)):
        answer.update({p.numpy().tobytes(): y for p, y in zip((pictures / 255), labels.tolist())})

    def activations(images):
        known = torch.tensor([answer.get(p.numpy().tobytes(), -1) for p in images])
        return {"blind": torch.ones(len(images), 2, 3, 3), "block1.even": F.one_hot(known + 1, 21).float()}

    rows, bits, points = probes.run(activations, ["blind", "block1.even"], "block1.even", 7, False)
    table = {(r["layer"], r["target"]): r for r in rows}
    assert list(table) == [(layer, t) for layer in ("blind", "block1") for t in ("sample", "class", "superclass")]
    assert all(r["epoch"] == 7 for r in rows) and bits == []
    for target, chance in (("class", 5), ("superclass", 20)):
        good, blind = table["block1", target], table["blind", target]
        assert good["svm"] == good["ncc_test"] == good["ncc_train"] == 100 and blind["majority"] == chance
        assert blind["svm"] <= 2 * chance and blind["cdnv"] is None and blind["variance"] == 0
    assert table["block1", "class"]["cdnv"] < 1e-9 and table["block1", "superclass"]["cdnv"] > 0.1
    assert table["block1", "class"]["knn"] == table["block1", "class"]["logistic"] == 100
    assert table["block1", "sample"]["ncc_test"] == pytest.approx(5)      # no view is known: one of 20 pictures
    assert set(points) == {f"{t}_{k}" for t in ("sample", "class", "superclass") for k in "xy"}


def test_probing_leaves_weights_and_statistics_alone(few, tmp_path, monkeypatch, capsys):
    """During a real run: before training, after an epoch and at the end."""
    seen, real = [], S.Probes.run

    def spy(self, activations, *rest, **options):
        net = activations.__self__
        before = {k: v.clone() for k, v in net.state_dict().items()}
        result = real(self, activations, *rest, **options)
        after = net.state_dict()
        seen.append(before)
        assert list(before) == list(after) and all(torch.equal(before[k], after[k]) for k in before)
        return result

    monkeypatch.setattr(S.Probes, "run", spy)
    S.main([str(w) for w in (
        "--dataset", "folder", "--data-dir", few, "--workers", 0, "--arch", "RES-1-8", "--projector", 16, 16,
        "--batch-size", 64, "--epochs", 2, "--probe-epochs", 1, "--sample-level", 8, 2, 2, "--mine-steps", 2,
        "--target-net", "none", "--out", tmp_path / "run")])
    assert len(seen) == 3
    assert not torch.equal(*(s["layers.stem.conv1.weight"] for s in seen[:2]))                # it did train


# --- csv --------------------------------------------------------------------------------------------------------------

def test_csv_round_trip(tmp_path):
    """Floats to the last bit, None, text with commas and quotes; integers become floats of the same value."""
    rows = [{"epoch": 0, "layer": "block1", "target": "random 0.25", "svm": 100 / 3, "knn": None, "cdnv": 1e-300},
            {"epoch": 20, "layer": 'a, "b"', "target": "class", "svm": None, "knn": -0.1, "cdnv": 123456789.123}]
    S.save_csv(tmp_path / "x.csv", rows)
    assert S.load_csv(tmp_path / "x.csv") == rows and S.load_csv(tmp_path / "none.csv") == []
    assert isinstance(S.load_csv(tmp_path / "x.csv")[0]["epoch"], float)
    with open(tmp_path / "x.csv", newline="") as f:
        assert next(csv.reader(f)) == list(rows[0])
    assert list(tmp_path.iterdir()) == [tmp_path / "x.csv"]
