"""cka.py against slow forms written from the equations, and its command on small encoders."""
import json
import re
import runpy
import shutil
import sys
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torch.nn import functional as F

import cka


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def related(n, dims, seed=0):
    """Layers that share something, so that their CKA is neither 0 nor 1."""
    shared = randn(n, 6, seed=seed)
    return [shared @ randn(6, p, seed=77 + i) + 0.7 * randn(n, p, seed=1000 * seed + i) + i
            for i, p in enumerate(dims)]

def twice(batches):
    return cka.cka_map((acts, acts) for acts in batches)

def exact(*sides):  # of layers [n, ...] in uneven batches
    n = len(sides[0][0])
    return cka.exact_map([lambda i, acts=acts: [x[i] for x in acts] for acts in sides],
                         torch.arange(n).split(max(1, n // 3)))

def close(a, b, atol):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    torch.testing.assert_close(a, b, atol=atol, rtol=0)

# ---- the two formulas ----

def slow_exact(X, Y):  # Grigg et al., Eq. 2, with the centring matrix
    H = torch.eye(len(X)).double() - 1 / len(X)
    K, L = (Z @ Z.T for Z in (X.flatten(1).double(), Y.flatten(1).double()))
    hsic = lambda A, B: torch.trace(A @ H @ B @ H)  # noqa: E731
    return hsic(K, L) / (hsic(K, K) * hsic(L, L)).sqrt()

def slow_hsic1(X, Y):  # Nguyen et al. 2021, Eq. 3, every sum as a loop
    n, K, L = len(X), (X @ X.T).tolist(), (Y @ Y.T).tolist()
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    trace = sum(K[i][j] * L[j][i] for i, j in pairs)
    sums = sum(K[i][j] for i, j in pairs) * sum(L[i][j] for i, j in pairs)
    mixed = sum(K[i][j] * L[j][q] for i, j in pairs for q in range(n) if j != q)
    return (trace + sums / ((n - 1) * (n - 2)) - 2 / (n - 2) * mixed) / (n * (n - 3))

def slow_map(batches_a, batches_b):
    a, b = list(zip(*batches_a)), list(zip(*batches_b))  # [layer][batch]
    total = lambda xs, ys: sum(map(slow_hsic1, xs, ys))  # noqa: E731
    return torch.tensor([[total(x, y) / (total(x, x) * total(y, y)) ** 0.5 for y in b] for x in a])

@pytest.mark.parametrize("n, dtype, atol", [
    (4, torch.float64, 1e-6), (5, torch.float64, 1e-6), (7, torch.float32, 1e-5)])
def test_maps_equal_the_equations(n, dtype, atol):
    a = [[x.to(dtype) for x in related(n, [3, 9, 2], seed)] for seed in range(3)]
    b = [[x[0][:, :2] ** 2, *(y + 1 for y in x[1:]), x[0]] for x in a]
    slow = [[[x.double() for x in acts] for acts in side] for side in (a, b)]
    within, across = twice(a), cka.cka_map(zip(a, b))
    assert within.dtype == torch.float64 and within.device.type == "cpu"
    close(within, slow_map(slow[0], slow[0]), atol)
    close(across, slow_map(*slow), atol)
    assert n == 4 or across.min() < 0  # an estimate: not clipped
    layers = [[torch.cat(parts) for parts in zip(*side)] for side in (a, b)]  # [3 n, p] each
    close(exact(*layers), [[slow_exact(x, y) for y in layers[1]] for x in layers[0]], 1e-5)

def test_a_smaller_last_batch_is_dropped():
    parts = [related(n, [4, 6], seed=n) for n in (8, 8, 4)]
    assert torch.equal(twice(parts), twice(parts[:2]))

def test_rotations_scales_and_shifts_change_nothing_but_other_linear_maps_do():
    X, Y = related(32, [6, 9])
    Q = torch.linalg.qr(randn(6, 6, seed=3))[0]
    for form in (lambda acts: twice([acts]), exact):
        value = form([X, Y])
        for same in (X @ Q, 1e-3 * X, 5e4 * X, X + 100, X.reshape(32, 3, 1, 2), X.float() + 300):
            close(form([same, Y]), value, 2e-5)
        assert (form([X @ torch.arange(1.0, 7).double().diag(), Y]) - value).abs().max() > 1e-3

def test_constant_layers_are_like_nothing_and_weak_ones_are_not_constant(n=37):
    constant = torch.full((n, 1000), 0.1) * torch.arange(1, 1001) ** 0.5  # not exact in binary
    layers = [randn(n, 5).float(), constant, torch.zeros(n, 3), torch.eye(n)]
    only_first = torch.zeros(4, 4)
    only_first[0, 0] = 1
    close(twice([layers, layers]), only_first, 1e-6)  # eye: all pictures equally far apart
    close(exact(layers[:3]), only_first[:3, :3], 1e-6)
    noise = randn(n, 20000).float()
    for weak in (noise + 50, 1e-12 * noise):
        close(twice([[weak]]), [[1.0]], 1e-6)
        close(exact([weak]), [[1.0]], 1e-6)

A8, A4, A3 = related(8, [4, 6]), related(4, [4, 6]), related(3, [4, 6])
BAD = [[x.float().index_fill(0, torch.tensor(3), v) for x, v in zip(A8, (1, bad))]
       for bad in (float("nan"), float("inf"), 1e30)]

@pytest.mark.parametrize("pairs, message", [
    ([], "no batch"), ([(A3, A3)], r"\(2, 2, 3\)"), ([(A8, A8), (A4, A4), (A8, A8)], "first"),
    ([(A8, A4)], r"\(2, 2, 4, 8\)"), ([(A8, A8), (A8, A8[:1])], r"\(2, 1, 8\), first \(2, 2, 8\)"),
    *(([(A8, acts)], r"layers \[\] of a, \[1\] of b") for acts in BAD)])
def test_what_is_no_map_is_named(pairs, message):
    with pytest.raises(ValueError, match=message):
        cka.cka_map(pairs)
    for M in (torch.ones(1, 1), torch.ones(2, 3), torch.ones(3), np.full((2, 2), np.nan),
              [[1, 0.5], [0.1, 1]]):
        with pytest.raises(ValueError, match="symmetric"):
            cka.coadapted_stretch(M)

def test_map_keeps_no_graph_no_second_batch_and_ignores_autocast():
    alive = []

    def layers(seed):
        assert not any(x() is not None for x in alive)
        acts = [x.float().requires_grad_() for x in related(8, [4, 60], seed)]
        alive.extend(map(weakref.ref, acts))
        return acts, acts
    M = cka.cka_map(map(layers, range(3)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cka.cka_map(map(layers, range(3))), M) and not M.requires_grad

# ---- the co-adapted stretch, the figure ----

def blocks(sizes, inside, outside):
    label = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    M = torch.where(label[:, None] == label, torch.tensor(inside)[label][:, None], outside)
    return M.fill_diagonal_(1)

BRIGHT = 0.75 ** (torch.arange(7)[:, None] - torch.arange(7)).abs().double()  # with distance
BRIGHT[4, 5] = BRIGHT[5, 4] = 0.95

@pytest.mark.parametrize("M, stretch", [
    (blocks([6, 3, 2, 2], [0.9] * 4, 0.2), (6, 8)),  # the longest of the deeper half
    (blocks([6, 3, 3], [0.9] * 3, 0.2), (9, 11)),  # a tie: the later
    (blocks([6, 3, 3], [0.9, 0.95, 0.8], 0.2), (6, 8)),  # the brighter
    (blocks([8, 4, 1], [0.7, 0.95, 1.0], 0.5), (8, 11)),  # as in BERT (Figure 10)
    (BRIGHT, (4, 5)),  # as in SimCLR (Figure 9)
    ([[1, 0.3], [0.3, 1]], (0, 1)), (torch.ones(5, 5), (2, 4)), (np.eye(4), (1, 3))])
def test_stretch(M, stretch):
    assert cka.coadapted_stretch(M) == stretch

def test_figure_marks_stretch_target_and_best_matches(tmp_path):
    """In black, red and white, on the map's colour."""
    marks = {"stretch": [0, 1], "targets": [2], "best": [1, 0, 1], "lines": {"a": [0, 1, None]}}
    result = {"map": [[0.5] * 3] * 3, "names_a": list("abc")}
    for i, r in enumerate((result, {**result, **marks})):
        cka.draw(tmp_path / "m.png", [r])
        pixels = np.asarray(Image.open(tmp_path / "m.png").convert("RGB"), dtype=int)
        rows, columns = (abs(pixels - (33, 145, 140)) < 9).all(-1).nonzero()
        inside = pixels[rows.min() + 9:rows.max() - 9, columns.min() + 9:columns.max() - 99]
        for colour in ((0, 0, 0), (255, 0, 0), (255, 255, 255)):
            assert (abs(inside - colour) < 40).all(-1).any() == bool(i), colour

# ---- the command ----

NAMES = "stem layer1.0.odd layer1.0.even layer2.0.odd layer2.0.even avgpool head".split()
NUMBERS = {"stem": 0, "layer1.0.even": 1, "avgpool": 5, "head": 6}
CONFIG = {"layers": NAMES, "layer_numbers": NUMBERS, "image_size": 16, "flags": {"layer": "1+5"}}

class Tiny(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.convs = nn.ModuleList(nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8, 8, 8))
        self.head = nn.Linear(8, 4)

    def activations(self, x):
        acts = [x := conv(x).relu() for conv in self.convs]
        pool = x.mean((2, 3))
        return [*acts, pool, self.head(pool)]

def export(folder, seed=0, **config):
    """A run's folder -> its encoder.pt."""
    Path(folder).mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace_module(Tiny(seed), {"activations": torch.rand(2, 3, 16, 16)})
        config = {k: v for k, v in {**CONFIG, **config}.items() if v is not None}
        torch.jit.save(traced, f"{folder}/encoder.pt", {"config.json": json.dumps(config)})
    return f"{folder}/encoder.pt"

@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Run folders a and b: 100 pictures of 4 classes that differ in brightness, 10 unlabelled. And
    others, each with something wrong."""
    root, classes = tmp_path_factory.mktemp("runs"), np.arange(100) % 4
    noise = np.random.default_rng(0).integers(0, 100, (16, 16, 3, 100))
    images = (noise + 50 * classes).astype(np.uint8).T
    labels = np.where(np.arange(100) < 10, -1, classes)

    def save(name, seed=0, images=images, labels=labels, **config):
        export(root / name, seed, **config)
        np.savez(root / name / "samples.npz", images=images, labels=labels)
    save("a")
    save("b", 1)
    save("unlabelled", labels=labels * 0 - 1)
    save("few", images=images[:3], labels=labels[:3])
    save("nan", images=images * np.float32("nan"))
    save("blocks", layers=[n.replace("odd", "x") for n in NAMES])
    save("still", flags={"views": "none"})
    export(root / "big", image_size=32)
    export(root / "sentences", image_size=None)
    torch.jit.save(torch.jit.trace(nn.ReLU(), torch.ones(1)), root / "plain.pt")
    return root

@pytest.fixture
def runs(workplace, tmp_path, monkeypatch):
    """Here. Pixels would take most of a call's time."""
    monkeypatch.chdir(shutil.copytree(workplace, tmp_path / "runs"))
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: Path(path).touch())

def call(words):
    return cka.main(words.split())

def by_hand(seed=0, labelled=False):
    """What Tiny makes of the pictures, and their labels, in the order of a call."""
    images, labels = map(torch.from_numpy, np.load("a/samples.npz").values())
    torch.manual_seed(0)
    keep = [i for i in torch.randperm(100) if not labelled or labels[i] >= 0]
    with torch.no_grad():
        return Tiny(seed).activations(images[keep] / 255), labels[keep]

def batched(acts, size):
    return zip(*(x.split(size) for x in acts))

def test_within_says_shows_and_writes_the_map(runs, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # loading is silent
        result = call("a/encoder.pt --batch-size 33")
    said, (acts, _) = capsys.readouterr(), by_hand()
    M = twice(batched([x[:99] for x in acts], 33))
    close(result["map"], M, 1e-5)
    assert result["names_a"] == NAMES and result["images"] == 99 and result["targets"] == [2, 5]
    assert tuple(result["stretch"]) == cka.coadapted_stretch(M)
    assert f"{M[0, 1]:.3f}" in said.out and "co-adapted stretch: " in said.out and not said.err
    assert Path("a/cka-all-within.png").exists()
    result = call("a/encoder.pt --exact --batch-size 33")
    close(result["map"], [[slow_exact(x, y) for y in acts] for x in acts], 1e-5)
    assert result["images"] == 100

def test_layers_can_be_chosen(runs, monkeypatch, capsys):
    full = torch.tensor(call("a/encoder.pt")["map"])
    for flag, rows in (("odd", [1, 3]), ("even", [2, 4]), ("numbered", [0, 2, 5, 6])):
        result = call(f"--{flag} a/encoder.pt")
        assert result["names_a"] == [NAMES[i] for i in rows]
        assert json.loads(Path(f"a/cka-{flag}-within.json").read_text())["map"] == result["map"]
        close(result["map"], full[rows][:, rows], 1e-6)
    told = capsys.readouterr().out.split("runs/a")[-1]
    monkeypatch.setattr(sys, "argv", ["cka.py", "a/encoder.pt", "--numbered"])
    runpy.run_path(cka.__file__, run_name="__main__")  # as a program
    assert capsys.readouterr().out.splitlines()[1:-1] == told.splitlines()[1:-1]

def test_across_names_the_best_match(runs, capsys):
    result = call("a/encoder.pt b/encoder.pt --batch-size 50")
    said = capsys.readouterr().out.splitlines()
    M = cka.cka_map(zip(batched(by_hand(0)[0], 50), batched(by_hand(1)[0], 50)))
    close(result["map"], M, 1e-5)
    close(result["lines"]["same layer"], M.diagonal(), 1e-5)
    close(result["lines"]["best match"], M.amax(1), 1e-5)
    assert result["best"] == M.argmax(1).tolist() and NAMES[result["best"][3]] in said[4]
    export("c", 1, layers=[*NAMES[:5], "avgpool2", "head"])
    same = dict(zip(NAMES, result["lines"]["same layer"]), avgpool=None)  # by name
    other = call("a/encoder.pt c/encoder.pt --batch-size 50")["lines"]["same layer"]
    assert other == [same[n] for n in NAMES]
    for name in ("v.1", "v.2.png"):
        call(f"a/encoder.pt --even b/encoder.pt --out {name}")  # flags may stand between
    assert {f.name for f in Path().glob("v.*")} == {"v.1.json", "v.1.png", "v.2.json", "v.2.png"}

def test_classes_are_one_hot_and_unlabelled_pictures_left_out(runs):
    result = call("a/encoder.pt b/encoder.pt --classes --batch-size 45")
    acts, labels = by_hand(labelled=True)
    one_hot = [F.one_hot(labels, 4).float()]
    close(result["map"], cka.cka_map(zip(batched(acts, 45), batched(one_hot, 45))), 1e-5)
    assert result["images"] == 90 and max(result["lines"]["classes"]) > 0.3
    assert result["second"][0]["run_a"].endswith("/b") and Path("a/cka-all-classes.png").exists()
    close(call("a/encoder.pt --classes --exact --batch-size 7")["map"],
          [[slow_exact(x, one_hot[0])] for x in acts], 1e-5)

def test_augment_compares_two_views_and_repeats_itself(runs):
    """Each side by its own recipe."""
    words = "a/encoder.pt --augment --images 40"
    result = call(words)
    assert result["images"] == 40 and not result["stretch"]
    assert result["map"] == call(words.replace("a/", "b/encoder.pt a/", 1))["second"][0]["map"]
    assert result["map"] != call(f"{words} --seed 1")["map"]
    diagonal = result["lines"]["other view"]
    assert 0.05 < min(diagonal) and max(diagonal) < 0.99
    for solarize in (0, [0, 1]):  # none; the second view
        export("a", flags={"crop_min": 1.0, "jitter": [0, 0, 0, 0], "solarize": solarize})
        assert (call(words)["lines"]["other view"][0] > 0.5) == (solarize == 0)

def test_views_are_those_of_the_run(runs):
    """A crop moves a ramp; jitter and greying change red, too; blur: a line."""
    red = torch.tensor([200, 60, 20]).view(3, 1, 1).expand(3, 16, 16)
    ramp, line = (torch.arange(16) * 16).expand(3, 16, 16), 100 * torch.eye(16)[[7]]
    line = (line + line.flip(1)).expand(3, 16, 16)

    def changed(picture, which=0, **flags):
        encoder = cka.Encoder(export("own", flags=flags), None)
        views = encoder.views(picture.byte().expand(50, 3, 16, 16), which)
        return ((views - picture).abs() > 2).flatten(1).any(1).float().mean()
    assert changed(red, views="crop") == 0 and changed(ramp, views="crop") > 0.8
    assert changed(ramp, views="crop", crop_min=1.0) < 0.75  # only flipped, half of them
    still = {"jitter": [0, 0, 0, 0], "crop_min": 1.0}
    assert changed(red) > 0.7 and changed(red, **still) < 0.5  # greyed
    for second in (0, 1):  # only the second view, as BYOL's
        assert changed(line + 100, second, solarize=[0, 1], **still) == second
        assert (changed(line, second, blur=[0, 1], **still) > 0.7) == second

def test_a_folder_of_pictures(runs, few):
    shutil.copytree(few, "pictures")
    Image.new("RGB", (50, 20)).save("pictures/class0/00.png")
    words = "a/encoder.pt --dataset folder --data-dir pictures"
    assert call(f"{words} --images 12")["images"] == 12
    assert call(f"{words} --classes")["images"] == 240
    Path("pictures/class0/00.png").write_text("no picture")
    with pytest.raises(SystemExit, match="2"):
        call(words)

@pytest.mark.parametrize("words, message", [
    ("none.pt", "missing"), ("a/samples.npz", "no run's encoder.pt"), ("", "encoder"),
    ("plain.pt", "no run's encoder.pt"), ("sentences/encoder.pt", "takes sentences"),
    ("a/encoder.pt big/encoder.pt", "of 16 pixels and of 32"), ("big/encoder.pt", "samples.npz"),
    ("blocks/encoder.pt --odd", "has only stem"), ("few/encoder.pt", "4 or more"),
    ("unlabelled/encoder.pt --classes", "two classes or more"),
    ("nan/encoder.pt", "not finite: layers [0, 1, 2, 3, 4, 5, 6] of a"),
    ("nan/encoder.pt a/encoder.pt --exact", "not finite: layer 0"),
    ("still/encoder.pt --augment", "still: trained without views"),
    ("a/encoder.pt --images 3", "4 at least"), ("a/encoder.pt --batch-size 2", "4 at least"),
    ("a/encoder.pt --dataset cifar10 --data-dir a", "cifar10"),
    ("a/encoder.pt --dataset folder --data-dir zz", "zz"), ("a/encoder.pt --out x/y", "x/y.png"),
    ("a/encoder.pt --odd --even", "not allowed"), ("a/encoder.pt " * 3, "two")])
def test_bad_input_gets_one_line_and_exit_code_2(runs, capsys, words, message):
    with pytest.raises(SystemExit) as end:
        call(words)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("cka.py: error: ") and said.count("\n") == 1
    assert message in said

def test_recipe_for_any_network_on_the_page(tmp_path, monkeypatch):
    """docs/cka.md's block runs. A BatchNorm's output stays, though the ReLU works in place."""
    monkeypatch.chdir(tmp_path)
    page, names = Path(cka.__file__).with_name("docs") / "cka.md", {}
    exec(re.search(r"```python\n(.*?)```", page.read_text(), re.S)[1], names)
    acts = dict(zip(names["names"], names["layers"](names["batches"][0])))
    assert acts["layer1.0.bn1"].min() < 0 and Path("map.png").exists()
    assert names["M"].shape == (len(acts),) * 2
