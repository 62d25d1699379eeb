"""NT-Xent, LARS, the learning rate, the meters and the probes against slow, independent implementations."""
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import simclr_deepaug as S


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- NT-Xent ----------------------------------------------------------------------------------------------------------

def slow_nt_xent(z1, z2, t):
    """SimCLR's formula as loops, in float64: every view against its partner and the 2N - 2 negatives."""
    z = [v / v.norm() for v in torch.cat([z1, z2]).double()]
    n, total = len(z1), 0
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        negatives = [k for k in range(2 * n) if k not in (i, partner)]
        assert len(negatives) == 2 * n - 2
        terms = torch.stack([z[i] @ z[k] / t for k in [partner, *negatives]])
        total = total - (terms[0] - torch.logsumexp(terms, 0))
    return total / (2 * n)


def value_and_gradients(f, z1, z2, t):
    z1, z2 = z1.clone().requires_grad_(), z2.clone().requires_grad_()
    value = f(z1, z2, t)
    return value.detach().double(), *(g.double() for g in torch.autograd.grad(value, [z1, z2]))


@pytest.mark.parametrize("n, d, t", [(2, 3, 0.5), (7, 5, 0.5), (12, 128, 0.1), (9, 4, 0.05)])
def test_nt_xent_equals_the_formula(n, d, t):
    """Value and gradients; the rest is float32 rounding, enlarged by 1/T in the logits."""
    z1, z2 = randn(n, d), 3 * randn(n, d, seed=1)
    for got, expected in zip(value_and_gradients(S.nt_xent, z1, z2, t), value_and_gradients(slow_nt_xent, z1, z2, t)):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-7 / t)


def test_nt_xent_of_one_pair_is_zero_with_zero_gradient():
    """No negatives: nothing to tell apart."""
    value, *gradients = value_and_gradients(S.nt_xent, randn(1, 8), randn(1, 8, seed=1), 0.5)
    assert value == 0 and all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


def test_nt_xent_of_identical_embeddings_is_log_of_the_candidates():
    """A collapsed network cannot tell 2N - 1 candidates apart, and at that point no direction helps."""
    z = randn(1, 16).expand(10, 16)
    value, *gradients = value_and_gradients(S.nt_xent, z, z, 0.5)
    assert value.item() == pytest.approx(math.log(19), rel=1e-6)
    assert all(g.abs().max() < 1e-7 for g in gradients)


def test_nt_xent_of_perfect_pairs_and_its_scale():
    """Orthogonal pictures, equal views: log(1 + (2N-2) e^(-1/T)); the length of an embedding does not matter."""
    z = torch.eye(6)
    assert S.nt_xent(z, z, 0.5).item() == pytest.approx(math.log(1 + 10 * math.exp(-2)), rel=1e-6)
    z1, z2 = randn(6, 4), randn(6, 4, seed=1)
    torch.testing.assert_close(S.nt_xent(1000 * z1, 1e-4 * z2, 0.5), S.nt_xent(z1, z2, 0.5), rtol=1e-6, atol=0)
    torch.testing.assert_close(S.nt_xent(z2, z1, 0.5), S.nt_xent(z1, z2, 0.5), rtol=1e-6, atol=0)


def test_nt_xent_with_a_zero_vector_and_large_logits_stays_finite():
    z1, z2 = randn(5, 8), randn(5, 8, seed=1)
    z1[2] = 0
    for t in (0.5, 0.05):
        value, *gradients = value_and_gradients(S.nt_xent, z1, z2, t)
        assert math.isfinite(value) and all(torch.isfinite(g).all() for g in gradients)
    hard = torch.cat([torch.ones(4, 8), -torch.ones(4, 8)]) + 1e-3 * randn(8, 8)      # partners at cosine -1, T tiny
    value, *gradients = value_and_gradients(S.nt_xent, hard, hard.flip(0), 0.01)
    assert 150 < value < 250 and all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nt_xent_of_half_precision_is_computed_in_float32(dtype):
    z1, z2 = randn(6, 32).to(dtype), randn(6, 32, seed=1).to(dtype)
    value = S.nt_xent(z1, z2, 0.1)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(slow_nt_xent(z1.double(), z2.double(), 0.1).item(), rel=1e-5)


# --- the factor T/0.07 and the paper's learning rate ------------------------------------------------------------------

def train_tiny(scale, lr, decay, steps=12, warmup=0):
    """Weights after some steps of SGD on scale * NT-Xent, with the script's own learning-rate curve."""
    a = S.settings(["--lr", repr(lr), "--epochs", "4", "--warmup-epochs", str(warmup)])
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).double()
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=decay)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = S.learning_rate(step, a, 3)
        x = randn(8, 6, seed=step).double()
        noise = randn(2, 8, 6, seed=100 + step).double() / 5
        z1, z2 = net(x + noise[0]), net(x + noise[1])
        optimizer.zero_grad()
        (scale * slow_nt_xent(z1, z2, 0.5)).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("warmup", [0, 2])
def test_supcontrasts_factor_is_a_learning_rate(warmup):
    """SupContrast's loss * T/0.07 with (lr, wd) = plain NT-Xent with (lr * c, wd / c), step by step, warm-up too."""
    c = 0.5 / 0.07
    theirs, ours = train_tiny(c, 0.5, 1e-2, warmup=warmup), train_tiny(1, 0.5 * c, 1e-2 / c, warmup=warmup)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    assert (train_tiny(1, 0.5, 1e-2, warmup=warmup) - theirs).abs().max() > 1e-2
    assert (train_tiny(1, 0.5 * c, 1e-2, warmup=warmup) - theirs).abs().max() > 1e-4         # decay must be divided


def test_preset_paper_takes_the_papers_constants():
    """App. A.1 and SupContrast's README: batch 1024, lr .5, wd 1e-4, T .5, 1500 epochs, warm-up 10 from .01."""
    a = S.settings(["--preset", "paper"])
    assert a.lr == pytest.approx(0.5 * 7.142857, rel=1e-6)
    assert a.weight_decay == pytest.approx(1e-4 / 7.142857, rel=1e-6)
    assert (a.dataset, a.arch, a.batch_size, a.epochs, a.warmup_epochs) == ("cifar100", "resnet18", 1024, 1500, 10)
    assert (a.temperature, a.rate, a.sample, a.crop_min, a.head_layers) == (0.5, 0.5, 0.5, 0.2, 2)
    assert S.learning_rate(0, a, 48) == pytest.approx(0.01 * 0.5 / 0.07)
    assert S.settings(["--preset", "paper", "--lr", "1", "--epochs", "3"]).lr == 1                   # a flag wins


# --- learning rate ----------------------------------------------------------------------------------------------------

def supcontrast_rate(epoch, batch, batches, lr, epochs, warm_epochs):
    """util.py of SupContrast with cosine and warm-up, epochs counted from 1."""
    floor = lr * 0.1 ** 3
    if epoch <= warm_epochs:
        target = floor + (lr - floor) * (1 + math.cos(math.pi * warm_epochs / epochs)) / 2
        return lr / 50 + (batch + (epoch - 1) * batches) / (warm_epochs * batches) * (target - lr / 50)
    return floor + (lr - floor) * (1 + math.cos(math.pi * epoch / epochs)) / 2


@pytest.mark.parametrize("epochs, warm, steps", [(100, 10, 7), (16, 1, 32), (20, 0, 3)])
def test_learning_rate_is_supcontrasts_curve(epochs, warm, steps):
    """In the warm-up at every step; on the cosine ours moves every step, and meets theirs where an epoch ends."""
    a = S.settings(["--epochs", str(epochs), "--warmup-epochs", str(warm), "--lr", "0.8"])
    for step in range(warm * steps):
        expected = supcontrast_rate(step // steps + 1, step % steps, steps, 0.8, epochs, warm)
        assert S.learning_rate(step, a, steps) == pytest.approx(expected, rel=1e-12)
    for epoch in range(warm + 1, epochs + 1):
        expected = supcontrast_rate(epoch, 0, steps, 0.8, epochs, warm)
        assert S.learning_rate(epoch * steps, a, steps) == pytest.approx(expected, rel=1e-12)


def test_learning_rate_endpoints_and_continuity():
    a, steps = S.settings(["--epochs", "50", "--warmup-epochs", "5", "--lr", "2"]), 100
    rates = [S.learning_rate(s, a, steps) for s in range(50 * steps + 1)]
    assert rates[0] == pytest.approx(2 / 50) and rates[-1] == pytest.approx(2 * 0.1 ** 3)
    assert max(rates) == rates[500] == pytest.approx(0.002 + 1.998 * (1 + math.cos(math.pi / 10)) / 2)
    assert rates[:501] == sorted(rates[:501]) and rates[500:] == sorted(rates[500:], reverse=True)
    assert max(abs(x - y) for x, y in zip(rates, rates[1:])) < 2 / 400                       # no jump anywhere
    assert S.learning_rate(0, S.settings(["--warmup-epochs", "0", "--lr", "2"]), 10) == pytest.approx(2)


# --- LARS -------------------------------------------------------------------------------------------------------------

def slow_lars(weights, gradients, lr, momentum, decay, eta):
    """One parameter over several steps, in Python numbers; returns every step's (weights, momentum)."""
    w, shape = weights.double().flatten().tolist(), weights.shape
    buffer, history = [0.0] * len(w), []
    for step, gradient in enumerate(gradients):
        g = gradient.double().flatten().tolist()
        if len(shape) > 1:
            g = [gi + decay * wi for gi, wi in zip(g, w)]
            w_norm, g_norm = math.sqrt(sum(x * x for x in w)), math.sqrt(sum(x * x for x in g))
            trust = eta * w_norm / g_norm if w_norm > 0 and g_norm > 0 else 1.0
            g = [trust * x for x in g]
        buffer = [momentum * b + x for b, x in zip(buffer, g)]
        w = [x - lr[step] * b for x, b in zip(w, buffer)]
        history.append((torch.tensor(w).view(shape), torch.tensor(buffer).view(shape)))
    return history


def test_lars_equals_a_slow_one_over_steps():
    """Matrices and kernels scaled, vectors plain and without decay, zero weights and zero gradients not divided by."""
    starts = {"matrix": randn(4, 3), "kernel": randn(2, 3, 3, 3, seed=1), "vector": randn(5, seed=2),
              "zero weights": torch.zeros(3, 2), "zero everything": torch.zeros(2, 2)}
    params = {k: nn.Parameter(v.clone()) for k, v in starts.items()}
    unused = nn.Parameter(torch.ones(2, 2))
    optimizer = S.LARS([*params.values(), unused], 0.2, momentum=0.9, weight_decay=0.05, eta=0.02)
    gradients = {k: [randn(*v.shape, seed=10 * i + len(k)) for i in range(6)] for k, v in starts.items()}
    gradients["zero everything"] = [torch.zeros(2, 2)] * 6
    gradients["matrix"][3] = torch.zeros(4, 3)                              # decay alone drives this step
    rates = [0.2, 0.2, 0.1, 0.4, 0.05, 0.2]
    expected = {k: slow_lars(starts[k], gradients[k], rates, 0.9, 0.05, 0.02) for k in starts}
    for step in range(6):
        optimizer.param_groups[0]["lr"] = rates[step]
        for k, p in params.items():
            p.grad = gradients[k][step].clone()
        optimizer.step()
        for k, p in params.items():
            w, buffer = expected[k][step]
            torch.testing.assert_close(p.detach().float(), w.float(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], buffer.float(), rtol=1e-5, atol=1e-6)
            assert torch.equal(p.grad, gradients[k][step])                  # the gradient is not touched
    assert torch.equal(unused, torch.ones(2, 2)) and not params["zero everything"].any()


def test_lars_step_does_not_depend_on_the_gradients_scale():
    for scale in (1e-4, 1.0, 1e4):
        p = nn.Parameter(randn(3, 3))
        p.grad = scale * randn(3, 3, seed=1)
        S.LARS([p], 1.0, eta=0.001).step()
        assert (p - randn(3, 3)).norm().item() == pytest.approx(0.001 * randn(3, 3).norm().item(), rel=1e-3)


# --- alignment, uniformity, meters ------------------------------------------------------------------------------------

def slow_alignment(z1, z2):
    return sum(sum((x - y) ** 2 for x, y in zip(u, v)) for u, v in zip(z1, z2)) / len(z1)


def slow_uniformity(z):
    pairs = [(i, j) for i in range(len(z)) for j in range(len(z)) if i < j]
    return torch.log(sum(torch.exp(-2 * ((z[i] - z[j]) ** 2).sum()) for i, j in pairs) / len(pairs))


def test_alignment_and_uniformity_equal_loops():
    """Values and gradients."""
    def normal(seed):
        return F.normalize(randn(9, 5, seed=seed).double(), dim=1).requires_grad_()
    z1, z2, y1, y2 = normal(0), normal(1), normal(0), normal(1)
    for ours, theirs in ((S.alignment(z1, z2), slow_alignment(y1, y2)), (S.uniformity(z1), slow_uniformity(y1))):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        ours.backward()
        theirs.backward()
    torch.testing.assert_close(z1.grad, y1.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(z2.grad, y2.grad, rtol=1e-9, atol=1e-12)


def test_alignment_and_uniformity_at_known_points():
    z = F.normalize(randn(6, 4), dim=1)
    assert S.alignment(z, z) == 0 and S.alignment(z, -z).item() == pytest.approx(4, rel=1e-5)
    same = z[:1].expand(6, 4).clone().requires_grad_()
    assert S.uniformity(same).item() == pytest.approx(0, abs=1e-6)
    assert torch.isfinite(torch.autograd.grad(S.uniformity(same), same)[0]).all()
    assert S.uniformity(torch.eye(5)).item() == pytest.approx(-4, rel=1e-5)        # orthogonal: |zi - zj|^2 = 2


def test_meters_see_collapse_and_its_absence():
    """Collapsed to a point: std 0, rank 1. Orthogonal: all directions but the mean's. Never NaN."""
    point = randn(1, 16).expand(40, 16)
    m = S.meters(point, point)
    assert m["embedding_std"] < 1e-5 and m["effective_rank"] == pytest.approx(1, abs=0.05)
    assert m["alignment"] < 1e-6 and m["uniformity"] == pytest.approx(0, abs=1e-5)
    line = torch.where(torch.arange(40).view(-1, 1) % 2 == 0, 1.0, -1.0) * randn(1, 16)
    assert S.meters(line, line)["effective_rank"] == pytest.approx(1, abs=0.01)
    spread = torch.cat([torch.eye(16), -torch.eye(16)]).repeat(3, 1)
    m = S.meters(spread, spread.roll(1, 0))
    assert m["effective_rank"] == pytest.approx(16, rel=1e-4) and m["embedding_std"] == pytest.approx(1, abs=0.02)
    assert m["alignment"] == pytest.approx(62 / 32, abs=0.2) or m["alignment"] == pytest.approx(2, abs=0.1)
    random = S.meters(randn(2000, 16), randn(2000, 16, seed=1))
    assert random["embedding_std"] == pytest.approx(1, abs=0.01) and 15.5 < random["effective_rank"] <= 16
    for z in (torch.zeros(4, 8), randn(2, 8), randn(6, 8).bfloat16(), 1e-20 * randn(6, 8)):
        assert all(math.isfinite(v) for v in S.meters(z, z).values())


def test_effective_rank_is_the_exponential_of_the_entropy():
    z = randn(30, 6) * torch.tensor([5.0, 3, 2, 1, 0.5, 0.1])
    unit = F.normalize(z, dim=1).double()
    s = torch.linalg.eigvalsh((unit - unit.mean(0)).T @ (unit - unit.mean(0))).clamp(min=0).sqrt()
    p = (s / s.sum()).tolist()
    assert S.meters(z, z)["effective_rank"] == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)), rel=1e-4)


# --- probes -----------------------------------------------------------------------------------------------------------

def clusters(n, d, classes, spread, seed=0):
    centres = randn(classes, d, seed=99)
    y = torch.arange(n) % classes
    return centres[y] + spread * randn(n, d, seed=seed), y


@pytest.mark.parametrize("n, k", [(60, 7), (60, 60), (23, 200), (5, 1)])
def test_weighted_knn_equals_loops(n, k):
    """Votes weighted by exp(cosine / t); k above the number of pictures takes all."""
    x, y = clusters(n, 6, 4, 1.2)
    x_test, y_test = clusters(50, 6, 4, 1.2, seed=1)
    correct = 0
    for q, target in zip(x_test.double(), y_test.tolist()):
        cosines = sorted(((q @ v / q.norm() / v.norm()).item(), label) for v, label in zip(x.double(), y.tolist()))
        votes = [0.0] * 4
        for cosine, label in cosines[::-1][:k]:
            votes[label] += math.exp(cosine / 0.1)
        correct += votes.index(max(votes)) == target
    assert S.weighted_knn(x, y, x_test, y_test, 4, k=k) == pytest.approx(100 * correct / 50)


def test_weighted_knn_over_several_chunks_of_queries():
    x, y = clusters(40, 5, 3, 0.8)
    x_test, y_test = clusters(2500, 5, 3, 0.8, seed=1)
    parts = [S.weighted_knn(x, y, x_test[i:i + 500], y_test[i:i + 500], 3) for i in range(0, 2500, 500)]
    assert S.weighted_knn(x, y, x_test, y_test, 3) == pytest.approx(sum(parts) / 5)


def logistic_objective(w, x, y, decay):
    """Cross-entropy + decay/2 |W|^2, the last row of w being the bias, which is not decayed."""
    scores = x @ w[:-1] + w[-1]
    return (torch.logsumexp(scores, 1) - scores[torch.arange(len(y)), y]).mean() + decay / 2 * (w[:-1] ** 2).sum()


@pytest.mark.parametrize("decay", [1e-1, 1e-2, 1e-3])
def test_fit_logistic_finds_the_minimum(decay):
    """Zero gradient, and the value that a long plain gradient descent in float64 arrives at."""
    x, y = clusters(80, 5, 3, 1.5)
    w = S.fit_logistic(x, y, 3, decay).double().requires_grad_()
    assert w.shape == (6, 3)
    found = logistic_objective(w, x.double(), y, decay)
    assert torch.autograd.grad(found, w)[0].abs().max() < 2e-5
    slow = torch.zeros(6, 3, dtype=torch.double, requires_grad=True)
    for _ in range(4000):
        slope, = torch.autograd.grad(logistic_objective(slow, x.double(), y, decay), slow)
        slow = (slow - 0.4 * slope).detach().requires_grad_()
    assert found.item() == pytest.approx(logistic_objective(slow, x.double(), y, decay).item(), abs=1e-6)
    warm = S.fit_logistic(x, y, 3, decay, start=randn(6, 3, seed=5)).double()       # the start does not matter
    warm[-1] -= warm[-1].mean() - w[-1].mean().item()                               # (the biases' mean is free)
    torch.testing.assert_close(warm, w.detach(), rtol=1e-2, atol=5e-3)


def test_linear_probe_of_separable_and_of_random_features():
    data = *clusters(400, 8, 5, 0.05), *clusters(200, 8, 5, 0.05, seed=1)
    assert S.linear_probe(*data, 5)["linear"] == 100
    y, y_test = torch.arange(2000) % 5, torch.arange(1000) % 5
    random = S.linear_probe(randn(2000, 8), y, randn(1000, 8, seed=1), y_test, 5)["linear"]
    assert 15 < random < 25                                                                  # nothing to learn: 1 in 5


@pytest.mark.parametrize("constant", [0.0, 0.1, 1000.1])
def test_linear_probe_ignores_a_constant_feature_and_the_features_scale(constant):
    x, y = clusters(600, 6, 4, 1)
    x_test, y_test = clusters(400, 6, 4, 1, seed=1)
    plain = S.linear_probe(x, y, x_test, y_test, 4)
    more, more_test = (F.pad(v, (0, 1), value=constant) for v in (x, x_test))
    assert S.linear_probe(more, y, more_test, y_test, 4)["linear"] == pytest.approx(plain["linear"], abs=2)
    scale, shift = torch.tensor([1e-3, 1, 10, 100, 1, 5]), torch.arange(6) * 3.0
    moved = S.linear_probe(x * scale + shift, y, x_test * scale + shift, y_test, 4)
    assert moved["linear"] == pytest.approx(plain["linear"], abs=0.5)


def test_linear_probe_chooses_its_decay_without_the_test_set():
    """Many noisy features, few pictures: a strong decay; clean ones: the test labels make no difference either way."""
    x, y = clusters(120, 5, 3, 0.8)
    noisy = torch.cat([x, 3 * randn(120, 200, seed=7)], 1)
    x_test, y_test = clusters(60, 5, 3, 0.8, seed=1)
    noisy_test = torch.cat([x_test, 3 * randn(60, 200, seed=8)], 1)
    first = S.linear_probe(noisy, y, noisy_test, y_test, 3)
    other = S.linear_probe(noisy, y, noisy_test, (y_test + 1) % 3, 3)
    assert first["linear_decay"] == other["linear_decay"] >= 1e-2
    assert first["linear"] > 45 > other["linear"]


def test_mean_std():
    assert S.mean_std([3.0]) == (3.0, None) and S.mean_std([1, 2, 6]) == (3, pytest.approx(7 ** 0.5))
