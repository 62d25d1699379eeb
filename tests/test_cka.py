"""cka.py against slow forms written from the equations, and its command on small encoders."""
import json
import re
import subprocess
import sys
import warnings
import weakref
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import cka

ROOT = Path(cka.__file__).parent

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

def close(a, b, atol, rtol=0.0):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol)

# ---- the two formulas ----

def slow_exact(X, Y):  # Grigg et al., Eq. 2, with the centring matrix
    H = torch.eye(len(X)).double() - 1 / len(X)
    K, L = X @ X.T, Y @ Y.T
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

@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_maps_equal_the_equations(dtype, atol):
    a = [[x.to(dtype) for x in related(7, [3, 9, 2], seed)] for seed in range(3)]
    b = [[x[0][:, :2] ** 2, *(y + 1 for y in x[1:]), x[0]] for x in a]
    slow = [[[x.double() for x in acts] for acts in side] for side in (a, b)]
    within, across = twice(a), cka.cka_map(zip(a, b))
    assert within.dtype == torch.float64 and within.device.type == "cpu"
    close(within, slow_map(slow[0], slow[0]), atol)
    close(across, slow_map(*slow), atol)
    layers = [[torch.cat(parts) for parts in zip(*side)] for side in (a, b)]  # [21, p] each
    close(exact(*layers), [[slow_exact(x.double(), y.double()) for y in layers[1]]
                           for x in layers[0]], 1e-5)
    close(exact(layers[0]).diagonal(), torch.ones(3), 1e-6)

@pytest.mark.parametrize("n", [4, 5, 11])
def test_grams_give_the_unbiased_hsic(n):
    X, Y = related(n, [3, 7])
    K, _ = cka.grams([X, Y])
    close(K[0] @ K[1] / (n * (n - 3)), slow_hsic1(X, Y), 1e-12, 1e-9)

def test_hsic1_of_few_pictures_is_that_of_many_on_average():
    """A U-statistic: its mean over all 5 of 9 pictures is its value for the 9."""
    X, Y = related(9, [4, 5])

    def hsic1(rows):
        K, _ = cka.grams([X[rows], Y[rows]])
        return K[0] @ K[1] / (len(rows) * (len(rows) - 3))
    close(sum(hsic1(list(c)) for c in combinations(range(9), 5)) / 126, hsic1(list(range(9))),
          0, 1e-9)

def test_independent_layers_are_alike_only_to_the_exact_form():
    pairs = [(randn(8, 30, seed=2 * s), randn(8, 30, seed=2 * s + 1)) for s in range(100)]
    values = torch.stack([twice([pair])[0, 1] for pair in pairs])
    assert abs(values.mean()) < 4 * values.std() / 10 < 0.1 and values.min() < 0  # not clipped
    assert min(exact(pair)[0, 1] for pair in pairs[:20]) > 0.5

def test_batches_agree_with_all_pictures_and_with_the_exact_form():
    acts = related(512, [10, 20, 5], seed=3)
    parts = [[x[i:i + 16] for x in acts] for i in range(0, 512, 16)]
    close(twice(parts), twice([acts]), 0.03)
    close(twice([acts]), exact(acts), 0.03)
    mean_of_ratios = sum(twice([part]) for part in parts) / 32
    assert (twice(parts) - mean_of_ratios).abs().max() > 1e-4  # the ratio is taken once

def test_rotations_scales_and_shifts_change_nothing_but_other_linear_maps_do():
    X, Y = related(32, [6, 9])
    Q = torch.linalg.qr(randn(6, 6, seed=3))[0]
    for form in (lambda acts: twice([acts]), exact):
        value = form([X, Y])
        for same in (X @ Q, 1e-3 * X, 5e4 * X, X + 100, X.reshape(32, 3, 1, 2), X.float() + 300):
            close(form([same, Y]), value, 2e-5)
        assert (form([X @ torch.arange(1.0, 7).double().diag(), Y]) - value).abs().max() > 1e-3

@pytest.mark.parametrize("n", [64, 37])
def test_constant_layers_are_like_nothing_and_weak_ones_are_not_constant(n):
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

def test_a_smaller_last_batch_is_dropped():
    acts = related(20, [4, 6])
    parts = [[x[i:j] for x in acts] for i, j in ((0, 8), (8, 16), (16, 20))]
    assert torch.equal(twice(parts), twice(parts[:2]))

def broken(value):
    acts = [x.float() for x in related(8, [4, 6])]
    acts[1][3, 2] = value
    return [(related(8, [4, 6]), acts)]

A8, A4, A3 = related(8, [4, 6]), related(4, [4, 6]), related(3, [4, 6])

@pytest.mark.parametrize("pairs, message", [
    ([], "no batch"), ([(A3, A3)], r"\(2, 2, 3\)"), ([(A8, A8), (A4, A4), (A8, A8)], "first"),
    ([(A8, A4)], r"\(2, 2, 4, 8\)"), ([(A8, A8), (A8, A8[:1])], r"\(2, 1, 8\), first \(2, 2, 8\)"),
    *((broken(v), r"layers \[\] of a, \[1\] of b") for v in (float("nan"), float("inf"), 1e30))])
def test_what_is_no_map_is_named(pairs, message):
    with pytest.raises(ValueError, match=message):
        cka.cka_map(pairs)

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

FALLING = 0.75 ** (torch.arange(7)[:, None] - torch.arange(7)).abs().double()  # with distance
BRIGHT = FALLING.clone().index_put_((torch.tensor([4, 5]), torch.tensor([5, 4])),
                                    torch.tensor(0.95).double())

@pytest.mark.parametrize("M, stretch", [
    (blocks([6, 3, 2, 2], [0.9] * 4, 0.2), (6, 8)),  # the longest of the deeper half
    (blocks([6, 3, 3], [0.9] * 3, 0.2), (9, 11)),  # a tie: the later
    (blocks([6, 3, 3], [0.9, 0.95, 0.8], 0.2), (6, 8)),  # the brighter
    (blocks([8, 4, 1], [0.7, 0.95, 1.0], 0.5), (8, 11)),  # as in BERT (Figure 10)
    (BRIGHT, (4, 5)),  # as in SimCLR (Figure 9)
    ([[1, 0.3], [0.3, 1]], (0, 1)), (torch.ones(5, 5), (2, 4)), (np.eye(4), (1, 3))])
def test_stretch(M, stretch):
    assert cka.coadapted_stretch(M) == stretch

@pytest.mark.parametrize("M", [torch.ones(1, 1), torch.ones(2, 3), torch.ones(3),
                               [[1, float("nan")], [float("nan"), 1]], [[1, 0.5], [0.1, 1]]])
def test_stretch_refuses_what_is_no_map_of_one_network(M):
    with pytest.raises(ValueError, match="symmetric"):
        cka.coadapted_stretch(M)

def test_figure_marks_stretch_target_and_best_matches(tmp_path):
    marks = {"stretch": [0, 1], "targets": [2], "best": [1, 0, 1]}
    result = {"map": [[0.5] * 3] * 3, "names_a": "abc"}
    for i, r in enumerate((result, {**result, **marks})):
        cka.draw(tmp_path / "m.png", [r])
        pixels = np.asarray(Image.open(tmp_path / "m.png").convert("RGB"), dtype=int)
        rows, columns = (abs(pixels - (33, 145, 140)) < 9).all(-1).nonzero()  # the map's colour
        inside = pixels[rows.min() + 9:rows.max() - 9, columns.min() + 9:columns.max() - 99]
        found = [(abs(inside - colour) < 40).all(-1).any() for colour in
                 ((255, 0, 0), (0, 0, 0), (255, 255, 255))]
        assert found == [bool(i)] * 3, found

# ---- the command ----

NAMES = ["stem", "layer1.0.odd", "layer1.0.even", "layer2.0.odd", "layer2.0.even", "avgpool", "head"]
CONFIG = {"layers": NAMES, "layer_numbers": {"stem": 0, "layer1.0.even": 1, "avgpool": 5, "head": 6},
          "image_size": 16, "flags": {"layer": "1+5"}}

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

def export(path, seed=0, model=None, **config):
    path.parent.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace_module((model or Tiny(seed)).eval(),
                                        {"activations": torch.rand(2, 3, 16, 16)})
        config = {k: v for k, v in {**CONFIG, **config}.items() if v is not None}
        torch.jit.save(traced, path, {"config.json": json.dumps(config)})
    return path

@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Run folders a and b; 100 pictures of 4 classes that differ in brightness, 10 unlabelled."""
    monkeypatch.chdir(tmp_path)
    labels = np.arange(100) % 4
    images = np.random.default_rng(0).integers(0, 100, (100, 3, 16, 16)) + 50 * labels.reshape(-1, 1, 1, 1)
    for seed, name in enumerate("ab"):
        export(tmp_path / name / "encoder.pt", seed)
        np.savez(tmp_path / name / "samples.npz", images=images.astype(np.uint8),
                 labels=np.where(np.arange(100) < 10, -1, labels))
    return tmp_path

def call(words):
    return cka.main(words.split())

def by_hand(seed=0, only=slice(None)):
    samples = np.load("a/samples.npz")
    torch.manual_seed(0)
    order = torch.randperm(100)
    keep = order[torch.from_numpy(samples["labels"])[order] >= 0] if only == "labelled" else order
    with torch.no_grad():
        acts = Tiny(seed).activations(torch.from_numpy(samples["images"])[keep] / 255)
    return acts, torch.from_numpy(samples["labels"])[keep]

def batched(acts, size):
    return zip(*(x.split(size) for x in acts))

def test_within_says_shows_and_writes_the_map(runs, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # loading is silent
        result = call("a/encoder.pt --batch-size 25")
    M = twice(batched(by_hand()[0], 25))
    close(result["map"], M, 1e-5)
    assert result["names_a"] == NAMES and result["images"] == 100 and result["targets"] == [2, 5]
    assert tuple(result["stretch"]) == cka.coadapted_stretch(M)
    said = capsys.readouterr()
    assert f"{M[0, 1]:.3f}" in said.out and "co-adapted stretch: " in said.out and not said.err
    assert json.loads(Path("a/cka-all-within.json").read_text())["map"] == result["map"]
    assert Image.open("a/cka-all-within.png").size[0] > 500

def test_exact_is_of_all_pictures_and_near_the_estimate(runs):
    result = call("a/encoder.pt --exact --batch-size 33")
    close(result["map"], [[slow_exact(*(z.flatten(1).double() for z in (x, y)))
                           for y in by_hand()[0]] for x in by_hand()[0]], 1e-5)
    assert result["images"] == 100 and call("a/encoder.pt --batch-size 33")["images"] == 99

def test_layers_can_be_chosen(runs):
    full = torch.tensor(call("a/encoder.pt")["map"])
    for flag, rows in (("odd", [1, 3]), ("even", [2, 4]), ("numbered", [0, 2, 5, 6])):
        result = call(f"--{flag} a/encoder.pt")
        assert result["names_a"] == [NAMES[i] for i in rows]
        assert Path(f"a/cka-{flag}-within.json").exists()
        close(result["map"], full[rows][:, rows], 1e-6)

def test_across_names_the_best_match(runs, capsys):
    result = call("a/encoder.pt b/encoder.pt --batch-size 50")
    M = cka.cka_map(zip(batched(by_hand(0)[0], 50), batched(by_hand(1)[0], 50)))
    close(result["map"], M, 1e-5)
    close(result["lines"]["same layer"], M.diagonal(), 1e-5)
    heads = dict(zip(NAMES, result["lines"]["same layer"]))
    export(runs / "c/encoder.pt", 1, layers=[*NAMES[:5], "avgpool2", "head"])  # by name
    other = call("a/encoder.pt c/encoder.pt --batch-size 50")["lines"]["same layer"]
    assert other == [heads[n] if n != "avgpool" else None for n in NAMES]
    result = call("a/encoder.pt b/encoder.pt --batch-size 50")
    close(result["lines"]["best match"], M.amax(1), 1e-5)
    assert result["best"] == M.argmax(1).tolist() and Path("a/cka-all-across.png").exists()
    assert NAMES[result["best"][3]] in capsys.readouterr().out.splitlines()[4]
    Path("new").mkdir()
    call("a/encoder.pt --even b/encoder.pt --out new/v.1")  # flags may stand between
    call("a/encoder.pt --even b/encoder.pt --out new/v.2.png")
    assert sorted(f.name for f in Path("new").iterdir()) == [
        "v.1.json", "v.1.png", "v.2.json", "v.2.png"]
    close(call("a/encoder.pt a/encoder.pt")["map"], call("a/encoder.pt")["map"], 1e-6)

def test_classes_are_one_hot_and_unlabelled_pictures_left_out(runs):
    result = call("a/encoder.pt b/encoder.pt --classes --batch-size 45")
    acts, labels = by_hand(0, "labelled")
    one_hot = [F.one_hot(labels, 4).float()]
    close(result["map"], cka.cka_map(zip(batched(acts, 45), batched(one_hot, 45))), 1e-5)
    assert result["images"] == 90 and max(result["lines"]["classes"]) > 0.3
    assert result["second"][0]["run_a"].endswith("/b") and Path("a/cka-all-classes.png").exists()
    close(call("a/encoder.pt --classes --exact --batch-size 7")["map"],
          [[slow_exact(x.flatten(1).double(), one_hot[0].double())] for x in acts], 1e-5)

def test_augment_compares_two_views_and_repeats_itself(runs):
    result = call("a/encoder.pt b/encoder.pt --augment --images 64")
    second = call("b/encoder.pt a/encoder.pt --augment --images 64")["second"][0]
    assert result["map"] == second["map"]
    assert result["map"] == call("a/encoder.pt --augment --images 64")["map"]
    assert result["map"] != call("a/encoder.pt --augment --images 64 --seed 1")["map"]
    diagonal = torch.tensor(result["lines"]["other view"])
    assert 0.05 < diagonal.min() and diagonal.max() < 0.99 and not result["stretch"]
    assert result["images"] == 64

def test_augment_gives_each_side_its_own_recipe(runs):
    maps = []
    for solarize in (0, [0, 1]):  # for both views; for the second
        export(runs / "a/encoder.pt", flags={"crop_min": 1.0, "solarize": solarize})
        maps.append(call("a/encoder.pt --augment")["lines"]["other view"])
    assert maps[0] != maps[1]

def test_views_are_those_of_the_run(runs):
    """Told by one colour, which crops keep, and by a picture that a crop changes."""
    red = torch.tensor([200, 60, 20], dtype=torch.uint8).view(1, 3, 1, 1).expand(50, 3, 16, 16)
    ramp = (torch.arange(16) * 16).byte().view(1, 1, 1, 16).expand(50, 3, 16, 16)

    def changed(pictures, which=0, **flags):
        encoder = cka.Encoder(export(runs / "own" / "encoder.pt", flags=flags), None)
        difference = encoder.views(pictures, which).int() - pictures
        return (difference.abs() > 2).flatten(1).any(1).float().mean()
    assert changed(red, views="crop") == 0 and changed(ramp, views="crop") > 0.8
    assert changed(ramp, views="crop", crop_min=1.0) < 0.75  # only flipped, half of them
    assert changed(red) > 0.7 and changed(red, views="simclr", jitter=[0, 0, 0, 0]) < 0.5  # grey
    for which, share in ((0, 0), (1, 1)):  # only the second view, as BYOL's
        flags = {"jitter": [0, 0, 0, 0], "crop_min": 1.0, "solarize": [0.0, 1.0]}
        grey = torch.full((50, 3, 16, 16), 200, dtype=torch.uint8)
        assert changed(grey, which, **flags) == share
        assert changed(ramp[..., :1].expand(50, 3, 16, 16), which, blur=[0, 1], **flags) == 0

def test_a_folder_of_pictures(runs):
    rng = np.random.default_rng(1)
    for i in range(12):
        file = Path("pictures", "dark" if i % 2 else "light", f"{i}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 120, (20 + i, 30, 3), dtype=np.uint8)
                        + np.uint8(100 * (i % 2))).save(file)
    words = "a/encoder.pt --dataset folder --data-dir pictures"
    assert call(words)["images"] == 12 and call(f"{words} --classes")["map"][0][0] > 0.3
    Path("pictures/dark/1.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit):
        call(words)

@pytest.mark.parametrize("words, message", [
    ("none.pt", "missing"), ("text.pt", "no run's encoder.pt"), ("plain.pt", "no run's encoder.pt"),
    ("sentences/encoder.pt", "takes sentences"), ("a/encoder.pt big/encoder.pt", "of 16 pixels and of 32"),
    ("blocks/encoder.pt --odd", "has only stem"), ("big/encoder.pt", "samples.npz"),
    ("damaged/encoder.pt", "samples"), ("plain/encoder.pt --classes", "two classes or more"),
    ("few/encoder.pt", "4 or more"), ("nan/encoder.pt", "not finite: layers [6] of a"),
    ("nan/encoder.pt a/encoder.pt --exact", "not finite: layer 6"),
    ("still/encoder.pt --augment", "still: trained without views"),
    ("a/encoder.pt --out nowhere/x", "nowhere/x.png"),
    ("a/encoder.pt --images 3", "4 at least"), ("a/encoder.pt --batch-size 2", "4 at least"),
    ("a/encoder.pt --dataset cifar10 --data-dir a", "cifar10"),
    ("a/encoder.pt --dataset folder --data-dir zz", "zz"), ("a/encoder.pt --dataset mnist", "choice"),
    ("", "encoder"), ("a/encoder.pt --odd --even", "not allowed"),
    ("a/encoder.pt --augment --classes", "not allowed"), ("a/encoder.pt b/encoder.pt a/encoder.pt", "two")])
def test_bad_input_gets_one_line_and_exit_code_2(runs, capsys, words, message):
    Path("text.pt").write_text("no archive")
    torch.jit.save(torch.jit.trace(nn.ReLU(), torch.ones(1)), "plain.pt")
    samples = dict(np.load("a/samples.npz"))
    few, unlabelled = ({k: v[:3] for k, v in samples.items()},
                       {**samples, "labels": np.full(100, -1)})
    for name, data in {"sentences": {}, "big": {}, "blocks": samples, "few": few, "nan": samples,
                       "still": samples, "plain": unlabelled, "damaged": samples}.items():
        config = {"sentences": {"image_size": None}, "big": {"image_size": 32},
                  "still": {"flags": {"views": "none"}},
                  "blocks": {"layers": [n.replace("odd", "x") for n in NAMES]}}.get(name, {})
        model = Tiny(0)
        if name == "nan":
            nn.init.constant_(model.head.weight, float("nan"))
        if name not in words:
            continue
        export(Path(name, "encoder.pt"), model=model, **config)
        if data:
            np.savez(Path(name, "samples.npz"), **data)
        if name == "damaged":
            file = Path("damaged/samples.npz")
            file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(SystemExit) as end:
        call(words)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("cka.py: error: ") and said.count("\n") == 1, said
    assert message in said

def test_the_file_alone_runs_as_a_program(runs):
    Path("copied.py").write_text((ROOT / "cka.py").read_text())
    done = subprocess.run([sys.executable, "copied.py", "a/encoder.pt", "--even"], text=True,
                          capture_output=True)
    assert done.returncode == 0 and not done.stderr and "co-adapted stretch" in done.stdout

def test_recipe_for_any_network_on_the_page(tmp_path, monkeypatch):
    """docs/cka.md's block runs; its outputs are right though ReLU works in place."""
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/cka.md").read_text(), re.S)[1]
    names = {}
    exec(code, names)
    model, x = names["model"], names["batches"][0]
    acts = dict(zip(names["names"], names["layers"](x)))
    with torch.no_grad():
        stem = model.maxpool(model.relu(model.bn1(model.conv1(x))))
        block = model.layer1[0]
        close(acts["layer1.0.bn1"], block.bn1(block.conv1(stem)), 1e-5)  # negative values, too
    assert acts["layer1.0.bn1"].min() < 0 and Path("map.png").exists()
    assert names["M"].shape == (len(acts),) * 2
