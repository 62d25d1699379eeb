"""cka.py against slow implementations written from the equations, and its command on a tiny exported encoder."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import cka

SCRIPT = Path(cka.__file__)


@pytest.fixture(autouse=True)
def one_thread():  # the tensors are tiny, and waiting for threads on a busy machine takes longer than the work
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def related(n, dims, seed=0, dtype=torch.float64):
    """Layers that share a latent variable, so that their CKA is neither 0 nor 1."""
    latent = randn(n, 6, seed=seed)
    return [(latent @ randn(6, p, seed=77 + i) + 0.7 * randn(n, p, seed=1000 * seed + i) + i).to(dtype)
            for i, p in enumerate(dims)]


def same_map(pairs):
    return cka.cka_map((acts, acts) for acts in pairs)


# --- slow and independent ---------------------------------------------------------------------------------------------


def slow_cka(X, Y):  # eq. 2 of paper 002: traces with an explicit centring matrix
    n = len(X)
    H = torch.eye(n, dtype=X.dtype) - torch.ones(n, n, dtype=X.dtype) / n
    K, L = X @ X.T, Y @ Y.T

    def hsic(A, B):
        return torch.trace(A @ H @ B @ H)
    return hsic(K, L) / (hsic(K, K) * hsic(L, L)).sqrt()


def slow_hsic1(K, L):  # eq. 3 of Nguyen et al. 2021, every sum as a loop
    n, K, L = len(K), K.tolist(), L.tolist()
    trace = sum(K[i][j] * L[j][i] for i in range(n) for j in range(n) if i != j)
    k = sum(K[i][j] for i in range(n) for j in range(n) if i != j)
    m = sum(L[i][j] for i in range(n) for j in range(n) if i != j)
    mixed = sum(K[i][j] * L[j][q] for i in range(n) for j in range(n) for q in range(n) if i != j and j != q)
    return (trace + k * m / ((n - 1) * (n - 2)) - 2 / (n - 2) * mixed) / (n * (n - 3))


def slow_map(batches_a, batches_b):
    def mean(As, Bs):
        return sum(slow_hsic1(A @ A.T, B @ B.T) for A, B in zip(As, Bs))
    sides_a, sides_b = list(zip(*batches_a)), list(zip(*batches_b))  # [layer][batch]
    rows = [[float(mean(A, B) / (mean(A, A) * mean(B, B)) ** 0.5) for B in sides_b] for A in sides_a]
    return torch.tensor(rows, dtype=torch.float64)


# --- linear_cka -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "p1", "p2"), [(40, 3, 5), (9, 30, 17), (2, 4, 4), (12, 1, 40)])
def test_linear_cka_values_and_gradients(n, p1, p2):
    X, Y = randn(n, p1, seed=1) + 3, randn(n, p2, seed=2)
    Y[:, 0] += X[:, 0]
    mine, slow = ([t.clone().requires_grad_() for t in (X, Y)] for _ in range(2))
    a, b = cka.linear_cka(*mine), slow_cka(*slow)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    a.backward()
    b.backward()
    for x, y in zip(mine, slow):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-8, atol=1e-10)


def test_linear_cka_invariances_and_shapes():
    X, Y = randn(30, 8, seed=1), randn(30, 2, 3, 2, seed=2)
    Y[:, 0, 0] += X[:, :2]
    Q = torch.linalg.qr(randn(8, 8, seed=3))[0]
    value = cka.linear_cka(X, Y)
    assert 0.05 < value < 0.95
    for other in (X @ Q, 1e-3 * X, 5e4 * X, X + 100):
        torch.testing.assert_close(cka.linear_cka(other, Y), value, rtol=1e-8, atol=0)
    assert abs(cka.linear_cka(X @ torch.diag(torch.arange(1.0, 9).double()), Y) - value) > 1e-3  # not to any linear map
    torch.testing.assert_close(cka.linear_cka(X, X @ Q), torch.tensor(1.0).double())
    torch.testing.assert_close(cka.linear_cka(X.float() + 1000, Y.float()), value, rtol=1e-4, atol=0)


def test_linear_cka_edges():
    X = randn(10, 4).requires_grad_()
    zero = cka.linear_cka(X, torch.full((10, 3), 0.1))
    assert zero == 0
    zero.backward()
    assert X.grad.eq(0).all()
    constant = torch.full((10, 3), 0.1)
    assert cka.linear_cka(constant, constant) == 0
    with pytest.raises(ValueError, match="10 and 9"):
        cka.linear_cka(randn(10, 4), randn(9, 4))
    with pytest.raises(ValueError, match="n >= 2"):
        cka.linear_cka(randn(1, 4), randn(1, 4))
    with pytest.raises(ValueError, match="NaN"):
        cka.linear_cka(randn(10, 4) / 0, randn(10, 4))


# --- hsic1 and the map ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [4, 5, 11])
def test_hsic1_equals_the_equation(n):
    X, Y = randn(n, 3, seed=4) + 1, randn(n, 7, seed=5)
    torch.testing.assert_close(cka.hsic1(X @ X.T, Y @ Y.T).item(), slow_hsic1(X @ X.T, Y @ Y.T), rtol=1e-9, atol=1e-12)
    assert cka.hsic1(X @ X.T, X @ X.T) >= 0


def test_hsic1_needs_four_images():
    for shape in ((3, 3), (5, 4)):
        with pytest.raises(ValueError, match="n >= 4"):
            cka.hsic1(torch.ones(shape), torch.ones(shape))


def test_hsic1_is_unbiased_and_the_biased_one_is_not():
    """Mean HSIC_1 over all 5-subsets of 9 images equals HSIC_1 of the 9 (a U-statistic); tr(KHLH) has no such luck."""
    from itertools import combinations
    X, Y = related(9, [4, 5])
    K, L = X @ X.T, Y @ Y.T
    subsets = [list(c) for c in combinations(range(9), 5)]
    mean = sum(cka.hsic1(K[s][:, s], L[s][:, s]) for s in subsets) / len(subsets)
    torch.testing.assert_close(mean, cka.hsic1(K, L), rtol=1e-9, atol=0)

    def biased(s):
        K0, L0 = (Z[s] - Z[s].mean(0) for Z in (X, Y))
        return ((K0 @ K0.T) * (L0 @ L0.T)).sum() / (len(s) - 1) ** 2
    mean = sum(biased(s) for s in subsets) / len(subsets)
    assert abs(mean / biased(list(range(9))) - 1) > 0.02


def test_independent_layers_average_to_zero():
    values = torch.stack([same_map([[randn(8, 30, seed=2 * s), randn(8, 30, seed=2 * s + 1)]])[0, 1]
                          for s in range(100)])
    assert abs(values.mean()) < 4 * values.std() / 100**0.5 < 0.1
    assert values.min() < 0  # estimates are left as they are
    exact = torch.stack([cka.linear_cka(randn(8, 30, seed=2 * s), randn(8, 30, seed=2 * s + 1)) for s in range(20)])
    assert exact.mean() > 0.5  # what the biased form would have said


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_map_within_and_across_equal_the_loops(dtype):
    dims = [3, 9, 2]
    batches_a = [related(7, dims, seed=s, dtype=dtype) for s in range(3)]
    batches_b = [[x[:, :2] ** 2, *(x + 1 for x in acts[1:]), acts[0]] for acts in batches_a for x in acts[:1]]
    tolerance = {"rtol": 0, "atol": 1e-9 if dtype == torch.float64 else 1e-5}
    within = same_map(batches_a)
    assert within.dtype == torch.float64 and within.device.type == "cpu"
    slow_a, slow_b = ([[x.double() for x in acts] for acts in side] for side in (batches_a, batches_b))
    torch.testing.assert_close(within, slow_map(slow_a, slow_a), **tolerance)
    torch.testing.assert_close(within.diagonal(), torch.ones(3).double())
    torch.testing.assert_close(within, within.T)
    across = cka.cka_map(zip(batches_a, batches_b))
    assert across.shape == (3, 4)
    torch.testing.assert_close(across, slow_map(slow_a, slow_b), **tolerance)


def test_map_of_one_batch_is_the_ratio_of_hsic1():
    X, Y = related(16, [5, 40])
    K, L = ((Z - Z.mean(0)) @ (Z - Z.mean(0)).T for Z in (X, Y))
    ratio = cka.hsic1(K, L) / (cka.hsic1(K, K) * cka.hsic1(L, L)).sqrt()
    torch.testing.assert_close(same_map([[X, Y]])[0, 1], ratio, rtol=1e-10, atol=0)


def test_minibatches_agree_with_all_images_at_once():
    acts = related(512, [10, 20, 5], seed=3)
    full = same_map([acts])
    parts = same_map([[x[i:i + 16] for x in acts] for i in range(0, 512, 16)])
    torch.testing.assert_close(parts, full, rtol=0, atol=0.03)
    ratios_first = torch.stack([same_map([[x[i:i + 16] for x in acts]]) for i in range(0, 512, 16)]).mean(0)
    assert (parts - ratios_first).abs().max() > 1e-4  # the ratio is taken once, not averaged


def test_map_invariances():
    X, Y = related(32, [6, 9])
    Q = torch.linalg.qr(randn(6, 6, seed=3))[0]
    value = same_map([[X, Y]])
    for other in (X @ Q, 1e-3 * X, 5e4 * X, X + 100, X.reshape(32, 3, 1, 2)):
        torch.testing.assert_close(same_map([[other, Y]]), value, rtol=1e-8, atol=1e-9)
    far = same_map([[X.float() + 300, Y.float()]])  # float32 far from the origin: centred first
    torch.testing.assert_close(far, value, rtol=0, atol=1e-5)


def test_two_sides_may_be_the_same_tensors():
    acts = related(12, [4, 6])
    torch.testing.assert_close(cka.cka_map([(acts, list(acts))]), same_map([acts]))


@pytest.mark.parametrize("n", [64, 37])  # 37: sums and means that do not come out even
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_layers_have_cka_zero(dtype, n):
    constant = torch.full((n, 1000), 0.1, dtype=dtype) * torch.arange(1, 1001) ** 0.5  # not exact in binary
    acts = [randn(n, 5).to(dtype), constant, torch.zeros(n, 3, dtype=dtype), torch.eye(n, dtype=dtype)]
    expected = torch.zeros(4, 4).double()
    expected[0, 0] = 1  # eye: all images equally far apart, so no structure either
    torch.testing.assert_close(same_map([acts, acts]), expected)
    torch.testing.assert_close(cka.cka_map([(acts[:1], acts)]), expected[:1])


def test_weak_signal_is_not_called_constant():
    noise = randn(256, 20000, dtype=torch.float32)
    for weak in (noise + 50, 1e-12 * noise):
        assert abs(same_map([[weak]])[0, 0] - 1) < 1e-9


def test_small_ragged_and_missing_batches():
    acts = related(20, [4, 6])

    def part(i, j):
        return [x[i:j] for x in acts]
    whole = same_map([part(0, 8), part(8, 16)])
    torch.testing.assert_close(same_map([part(0, 8), part(8, 16), part(16, 20)]), whole)  # the last is dropped
    torch.testing.assert_close(same_map([part(0, 8), part(8, 16), part(16, 18)]), whole)
    for pairs, message in (([], "no batch"), ([part(0, 3)], "at least 4"), ([part(0, 3), part(3, 6)], "at least 4"),
                           ([part(0, 8), part(8, 12), part(12, 20)], "batch 1 differs in size")):
        with pytest.raises(ValueError, match=message):
            same_map(pairs)


def test_mismatched_and_not_finite_inputs_are_named():
    acts = related(8, [4, 6])
    with pytest.raises(ValueError, match=r"batch 0: .*\[7, 8\]"):
        cka.cka_map([(acts, [x[:7] for x in acts])])
    with pytest.raises(ValueError, match=r"batch 1 has 2 and 1 layers, the first had \(2, 2\)"):
        cka.cka_map([(acts, acts), (acts, acts[:1])])
    for value in (float("nan"), float("inf"), 1e30):
        broken = [x.float() for x in acts]
        broken[1][3, 2] = value
        with pytest.raises(ValueError, match="batch 0, side b, layer 1"):
            cka.cka_map([(acts, broken)])


def test_map_keeps_no_graph_and_ignores_autocast():
    acts = [x.float().requires_grad_() for x in related(8, [4, 60])]
    M = same_map([acts])
    assert not M.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(same_map([acts]), M)


def test_progress_and_only_one_batch_in_memory():
    """When the next batch is asked for, nothing holds the activations of the one before."""
    import weakref
    alive, seen = [], []

    def layers(step):
        assert not any(ref() is not None for ref in alive)
        acts = related(8, [4], seed=step)
        alive.append(weakref.ref(acts[0]))
        return acts, acts
    cka.cka_map((layers(step) for step in range(3)), progress=lambda: seen.append(1))
    assert len(seen) == len(alive) == 3


# --- any nn.Module ----------------------------------------------------------------------------------------------------


def test_in_place_relu_trap_on_resnet18():
    torch.manual_seed(0)
    model = torchvision.models.resnet18().train()
    model.layer1.eval()  # a frozen part: must stay in eval mode afterwards
    modes = [m.training for m in model.modules()]
    x = torch.randn(4, 3, 32, 32)
    names = ["fc", "layer1.0.bn1", "layer1.0"]
    model.eval()
    with torch.no_grad():
        stem = model.maxpool(model.relu(model.bn1(model.conv1(x))))
        truth = model.layer1[0].bn1(model.layer1[0].conv1(stem))
        logits = model(x)
    by_reference = []
    handle = model.layer1[0].bn1.register_forward_hook(lambda m, a, out: by_reference.append(out))
    with torch.no_grad():
        model(x)
    handle.remove()
    for m, mode in zip(model.modules(), modes):
        m.training = mode
    with cka.module_activations(model, names) as run:
        assert not any(m.training for m in model.modules())
        acts = run(x)
    assert by_reference[0].min() == 0 and truth.min() < 0  # the naive hook sees it after the ReLU
    torch.testing.assert_close(acts[1], truth)
    torch.testing.assert_close(acts[0], logits)  # the order of names, not of execution
    assert acts[2].shape == (4, 64, 8, 8) and not any(a.requires_grad or a.grad_fn for a in acts)
    assert [m.training for m in model.modules()] == modes


def test_hooks_are_removed_even_on_error():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).train()
    with pytest.raises(RuntimeError), cka.module_activations(model, ["0", "1"]) as run:
        run(torch.ones(2, 5))
    with cka.module_activations(model, ["0", "0"]) as run:
        one, two = run(torch.ones(2, 3))
    assert torch.equal(one, two)
    assert all(not m._forward_hooks for m in model.modules()) and all(m.training for m in model.modules())


def test_unknown_tuple_and_repeated_modules():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.twice, self.idle = nn.LSTM(3, 5), nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x):
            return self.twice(self.twice(self.rnn(x)[0]))

    net, x = Net(), torch.ones(2, 4, 3)
    with pytest.raises(ValueError, match="no layer nope; layers: rnn, twice, idle"), \
            cka.module_activations(net, ["nope"]):
        pass
    with cka.module_activations(net, ["twice", "rnn"]) as run:
        acts = run(x)
    torch.testing.assert_close(acts[0], net(x))  # the last call
    torch.testing.assert_close(acts[1], net.rnn(x)[0])
    with cka.module_activations(net, ["idle"]) as run, pytest.raises(ValueError, match="never calls idle"):
        run(x)


# --- the co-adapted stretch -------------------------------------------------------------------------------------------


def blocks(sizes, inside, outside):
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    M = torch.where(labels[:, None] == labels, torch.tensor(inside)[labels][:, None], outside)
    return M.fill_diagonal_(1)


def test_stretch_on_constructed_maps():
    assert cka.coadapted_stretch(blocks([6, 3, 2, 2], [0.9] * 4, 0.2)) == (6, 8)  # the longest of the deeper half
    assert cka.coadapted_stretch(blocks([6, 3, 3], [0.9] * 3, 0.2)) == (9, 11)  # a tie: the later
    assert cka.coadapted_stretch(blocks([6, 3, 3], [0.9, 0.95, 0.8], 0.2)) == (6, 8)  # the stronger
    assert cka.coadapted_stretch(blocks([8, 4, 1], [0.7, 0.95, 1.0], 0.5)) == (8, 11)  # BERT-like: 8..11 of 13
    assert cka.coadapted_stretch([[1, 0.3], [0.3, 1]]) == (0, 1)
    assert cka.coadapted_stretch(torch.ones(5, 5)) == (2, 4)  # all alike: all of the deeper half
    assert cka.coadapted_stretch(np.eye(4)) == (1, 3)  # nothing alike: a tie, the longest


def test_stretch_of_a_resnet_like_map_is_4_5():
    """Figure 9, SimCLR: neighbours moderately alike, falling with distance, and one bright pair 4-5."""
    M = 0.75 ** (torch.arange(7)[:, None] - torch.arange(7)).abs().double()
    M[4, 5] = M[5, 4] = 0.95
    assert cka.coadapted_stretch(M) == (4, 5)
    noise = 0.02 * randn(7, 7)
    assert cka.coadapted_stretch(M + (noise + noise.T) / 2) == (4, 5)


def test_stretch_refuses_what_is_no_map():
    for M in (torch.ones(1, 1), torch.ones(2, 3), torch.ones(3)):
        with pytest.raises(ValueError, match="at least 2 x 2"):
            cka.coadapted_stretch(M)
    for value in (float("nan"), 0.5):
        M = torch.ones(3, 3)
        M[0, 1] = value
        with pytest.raises(ValueError, match="symmetric"):
            cka.coadapted_stretch(M)


def test_draw_map(tmp_path):
    from PIL import Image
    M, path = torch.rand(40, 3), tmp_path / "m.png"
    cka.draw_map(M, path, [f"layer{i}" for i in range(40)], ["a", "b", "c"], stretch=(0, 1), targets=[2], title="t")
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert (pixels == (255, 0, 0)).all(-1).any() and (pixels == 0).all(-1).any()  # red and black crosses
    assert [p.name for p in tmp_path.iterdir()] == ["m.png"]


# --- the command ------------------------------------------------------------------------------------------------------

NAMES = ["stem", "layer1.0.odd", "layer1.0.even", "layer2.0.odd", "layer2.0.even", "avgpool", "head"]
CONFIG = {"layers": NAMES, "layer_numbers": {"head": 6, "stem": 0, "layer1.0.even": 1, "avgpool": 5}, "image_size": 16,
          "dataset": "shapes"}


class Tiny(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.a, self.b = (nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8))
        self.head = nn.Linear(8, 4)

    def activations(self, x):
        s = self.stem(x).relu()
        odd1 = self.a(s)
        even1 = (odd1 + s).relu()
        odd2 = self.b(even1)
        even2 = (odd2 + even1).relu()
        pool = even2.mean((2, 3))
        return [s, odd1, even1, odd2, even2, pool, self.head(pool)]

    def forward(self, x):
        return self.activations(x)[5]


class Plain(nn.Module):
    def forward(self, x):
        return x * 2


def export(path, seed=0, config=CONFIG, model=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    model, x = (model or Tiny(seed)).eval(), torch.rand(2, 3, 16, 16)
    methods = {name: x for name in ("forward", "activations") if hasattr(model, name)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace_module(model, methods)
        torch.jit.save(traced, str(path), _extra_files={"config.json": json.dumps(config)} if config else {})
    return path


@pytest.fixture
def runs(tmp_path):
    """Two run folders, a with samples: 100 images of 4 classes that differ in brightness; 10 have no label."""
    labels = np.arange(100) % 4
    images = np.random.default_rng(0).integers(0, 100, (100, 3, 16, 16)) + 50 * labels[:, None, None, None]
    export(tmp_path / "a" / "encoder.pt", 0)
    export(tmp_path / "b" / "encoder.pt", 1)
    labels[:10] = -1
    np.savez(tmp_path / "a" / "samples.npz", images=images.astype(np.uint8), labels=labels)
    return tmp_path


def call(*args):
    return cka.main([str(a) for a in args])


def test_command_within(runs, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # importing and loading are silent
        result = call(runs / "a/encoder.pt", "--batch-size", 25)
    assert result["names_a"] == result["names_b"] == NAMES and result["images"] == 100
    samples = torch.from_numpy(np.load(runs / "a/samples.npz")["images"]).float() / 255
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = same_map([Tiny(0).activations(samples[i]) for i in order.split(25)])
    torch.testing.assert_close(torch.tensor(result["map"]), expected, rtol=0, atol=1e-5, check_dtype=False)
    start, end = result["stretch"]
    assert (start, end) == cka.coadapted_stretch(expected)
    out = capsys.readouterr().out
    assert f"{result['map'][0][1]:.3f}" in out and "co-adapted stretch: " in out
    label = {"stem": "layer 0 (stem)"}
    assert f"with stop-gradient target {label.get(NAMES[start], NAMES[start])} (start)" in out or start in (2, 5, 6)
    assert (runs / "a/cka.png").stat().st_size > 5000
    saved = json.loads((runs / "a/cka.json").read_text())
    assert saved["map"] == result["map"] and saved["stretch"] == result["stretch"]
    assert not list(runs.rglob("*.tmp"))


def test_command_layers(runs):
    assert call(runs / "a/encoder.pt", "--odd")["names_a"] == ["layer1.0.odd", "layer2.0.odd"]
    assert call(runs / "a/encoder.pt", "--even")["names_a"] == ["layer1.0.even", "layer2.0.even"]
    numbered = call(runs / "a/encoder.pt", "--numbered", "--out", runs / "new/numbered.png")
    assert numbered["names_a"] == ["stem", "layer1.0.even", "avgpool", "head"]  # by number: 0 1 5 6
    assert (runs / "new/numbered.png").exists() and (runs / "new/numbered.json").exists()
    full = torch.tensor(call(runs / "a/encoder.pt")["map"])
    pick = torch.tensor([0, 2, 5, 6])
    torch.testing.assert_close(torch.tensor(numbered["map"]), full[pick][:, pick])


def test_command_across(runs, capsys):
    one, two = (call(runs / f"{x}/encoder.pt", runs / f"{y}/encoder.pt", "--batch-size", 50)
                for x, y in (("a", "b"), ("a", "a")))
    assert one["stretch"] is None and (runs / "a/cka-b.png").exists() and (runs / "a/cka-b.json").exists()
    assert one["map"][0][0] < 0.999 < two["map"][0][0] and "best of b" in capsys.readouterr().out
    torch.testing.assert_close(two["map"], call(runs / "a/encoder.pt", "--batch-size", 50)["map"])


def test_command_augment(runs):
    result = call(runs / "a/encoder.pt", "--augment", "--images", 64)
    again = call(runs / "a/encoder.pt", "--augment", "--images", 64)
    other = call(runs / "a/encoder.pt", "--augment", "--images", 64, "--seed", 1)
    assert result["map"] == again["map"] != other["map"]
    diagonal = torch.tensor(result["map"]).diagonal()
    assert len(diagonal) == 7 and 0.05 < diagonal.min() and diagonal.max() < 0.99  # two different copies
    assert (runs / "a/cka-augment.png").exists() and result["stretch"] is None
    both = call(runs / "a/encoder.pt", runs / "b/encoder.pt", "--augment", "--images", 64)
    assert both["map"] == result["map"] and both["second"]["run_a"] == "b"
    assert (runs / "a/cka-augment-b.png").exists()


def test_augmented_pictures_do_not_depend_on_the_batch():
    images, index = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8), torch.arange(6)
    state = torch.get_rng_state()
    whole = cka.augmented(images, index, 0, 0)
    assert torch.equal(cka.augmented(images[3:], index[3:], 0, 0), whole[3:])
    assert not torch.equal(cka.augmented(images, index, 1, 0), whole) and whole.dtype == torch.uint8
    assert torch.equal(torch.get_rng_state(), state)


def test_command_classes(runs):
    result = call(runs / "a/encoder.pt", runs / "b/encoder.pt", "--classes")
    assert result["images"] == 90 and result["names_b"] == ["classes"]  # the ten without a label are left out
    values = torch.tensor(result["map"])
    assert values.shape == (7, 1) and values.max() > 0.3  # brightness is the class
    assert (runs / "a/cka-classes.png").exists() and len(result["second"]["map"]) == 7


def test_command_on_a_folder_of_pictures(runs):
    from PIL import Image
    rng = np.random.default_rng(1)
    for i in range(12):
        path = runs / "pictures/val" / ("dark" if i % 2 else "light") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 120, (20 + i, 30, 3), dtype=np.uint8) + np.uint8(100 * (i % 2))).save(path)
    folder = ["--dataset", "folder", "--data-dir", runs / "pictures"]
    assert call(runs / "a/encoder.pt", *folder, "--batch-size", 6)["images"] == 12
    assert call(runs / "a/encoder.pt", *folder, "--classes")["map"][0][0] > 0.3
    flat = call(runs / "a/encoder.pt", "--dataset", "folder", "--data-dir", runs / "pictures/val/dark")
    assert flat["images"] == 6
    (runs / "pictures/val/dark/0.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit):
        call(runs / "a/encoder.pt", *folder)


def test_bad_input_gets_one_line_and_exit_code_2(runs, capsys):
    a = runs / "a/encoder.pt"
    (runs / "text.pt").write_text("no archive")
    torch.save({"model": 1}, runs / "checkpoint.pt")
    other_size = export(runs / "c/encoder.pt", config={**CONFIG, "image_size": 32})
    no_config = export(runs / "d/encoder.pt", config=None)
    plain = export(runs / "e/encoder.pt", model=Plain())
    few_names = export(runs / "a/few.pt", config={**CONFIG, "layers": NAMES[:5]})
    damaged, unlabelled, three = (export(runs / f"{name}/encoder.pt") for name in ("damaged", "unlabelled", "three"))
    (damaged.parent / "samples.npz").write_bytes((runs / "a/samples.npz").read_bytes()[:3000])
    images = np.load(runs / "a/samples.npz")["images"]
    np.savez(unlabelled.parent / "samples.npz", images=images)
    np.savez(three.parent / "samples.npz", images=images[:3])
    broken = export(runs / "a/nan.pt", model=Tiny(0).apply(lambda m: m.weight.data.fill_(float("nan"))
                                                           if isinstance(m, nn.Linear) else None))
    cases = [([runs / "none.pt"], "no file"), ([runs / "text.pt"], "not an exported encoder"),
             ([runs / "checkpoint.pt"], "not an exported encoder"), ([no_config], "not an exported encoder"),
             ([plain], "no method activations"), ([few_names], "7 outputs for 5 names"),
             ([a, other_size], "16 pixels"), ([runs / "b/encoder.pt"], "samples.npz"),
             ([damaged], "cannot be read"), ([unlabelled, "--classes"], "needs labels"), ([three], "too few"),
             ([broken], "side a, layer 6"), ([a, "--images", "3"], "at least 4"),
             ([a, "--batch-size", "2"], "at least 4"), ([a, "--dataset", "cifar10", "--data-dir", runs], "CIFAR10"),
             ([a, "--dataset", "cifar100", "--data-dir", runs / "zz"], "missing or damaged"),
             ([a, "--dataset", "folder", "--data-dir", runs / "zz"], "no pictures"),
             ([a, "--dataset", "mnist"], "invalid choice"), ([], "ENC_A"), ([a, "--odd", "--even"], "not allowed"),
             ([a, "--out", runs / "x.jpg"], ".png")]
    if not torch.cuda.is_available():
        cases.append(([a, "--device", "cuda"], "no CUDA"))
    for args, message in cases:
        with pytest.raises(SystemExit) as stop:
            call(*args)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.startswith("cka.py: error: ") and err.count("\n") == 1, (args, err)
        assert message in err, (args, err)


def test_as_a_program_from_elsewhere(runs):
    """The file alone, copied out of the project, as a student would: one run, one error."""
    copy = runs / "copied.py"
    copy.write_text(SCRIPT.read_text(encoding="utf-8"), encoding="utf-8")

    def program(*args):
        return subprocess.run([sys.executable, copy, *args], cwd=runs, capture_output=True, text=True, check=False)
    good = program("a/encoder.pt", "--even")
    assert good.returncode == 0 and good.stderr == "" and "co-adapted stretch" in good.stdout, good.stderr
    bad = program("none.pt")
    assert (bad.returncode, bad.stderr, bad.stdout) == (2, "cka.py: error: no file none.pt\n", "")


def test_one_hot_of_the_command_is_one_hot(runs):
    """--classes against a map made by hand from F.one_hot."""
    result = call(runs / "a/encoder.pt", "--classes", "--batch-size", 45)
    samples = np.load(runs / "a/samples.npz")
    images, labels = torch.from_numpy(samples["images"]).float() / 255, torch.from_numpy(samples["labels"])
    order = torch.arange(10, 100)[torch.randperm(90, generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        pairs = [(Tiny(0).activations(images[i]), [F.one_hot(labels[i], 4).float()]) for i in order.split(45)]
    torch.testing.assert_close(torch.tensor(result["map"]), cka.cka_map(pairs), rtol=0, atol=1e-5, check_dtype=False)
