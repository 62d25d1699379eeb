"""Probing speed of vicreg_probe.py: its linear SVM, and the whole table of a probe.

    python tests/bench/bench_probes.py [--part svm|table|both] [--device cpu|cuda] [--quick]

svm    fit_svm on 50,000 x 512 features of 100 classes (Gaussian clusters, correlated, of unlike
       scales) against scikit-learn's LinearSVC with its defaults, which works on one core: once,
       between two fits of ours; and seven label sets at once against one after the other, on 64 of
       the features. Targets: 10 times, within 0.3 points.
table  probe() of an untrained RES-5-64 on 50,000 + 10,000 drawn pictures: the seconds of its parts,
       and the peak memory. Targets: under 4 GiB (CPU), under 60 s (CUDA).
"""
import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from unittest import mock

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/bench"), str(ROOT)]
from bench_views import finish, header  # noqa: E402

import vicreg_probe as V  # noqa: E402


def seconds(device, f, *args):
    """(how long f(*args) takes, its result)."""
    finish(device)
    start = time.perf_counter()
    result = f(*args)
    finish(device)
    return time.perf_counter() - start, result

def clusters(n, d, classes):
    """[(features, labels)] to fit and, a fifth, to test."""
    g = torch.Generator().manual_seed(0)
    mixing = torch.randn(d, d, generator=g) * torch.linspace(0, -3, d).exp().unsqueeze(1)
    mixing *= torch.randn(d, generator=g).exp()  # so the features' scales differ
    centres, sets = 0.25 * torch.randn(classes, d, generator=g), []
    for y in torch.randint(classes, (n * 6 // 5,), generator=g).split(n):
        sets.append(((centres[y] + torch.randn(len(y), d, generator=g)) @ mixing, y))
    return sets

def svm(args, device):
    classes = 10 if args.quick else 100
    sets = clusters(args.pictures, 64 if args.quick else 512, classes)
    (x, y), (x_test, y_test) = ([t.to(device) for t in pair] for pair in sets)
    V.fit_svm(x[:1000], y[:1000], classes)  # the libraries start
    ways = {"ours": lambda: V.fit_svm(x, y, classes).cpu().double()}
    try:
        from sklearn.svm import LinearSVC

        def usual():
            model = LinearSVC().fit(inputs, y.cpu().numpy())
            weights = torch.from_numpy(model.coef_.T), torch.from_numpy(model.intercept_)
            return torch.cat([weights[0], weights[1].unsqueeze(0)])
        inputs = x.double().cpu().numpy()
        ways = {"ours": ways["ours"], "scikit-learn": usual, "ours again": ways["ours"]}
    except ImportError:
        print("scikit-learn is missing: ours only")
    print(f"\nlinear SVM on {len(x)} x {x.shape[1]} x {classes}\n{'':14}{'seconds':>9}{'test %':>9}"
          f"{'objective':>16}")
    sign, took = 2 * nn.functional.one_hot(y.cpu(), classes) - 1, {}
    for name, way in ways.items():
        took[name], w = seconds(device, way)
        right = ((x_test.cpu().double() @ w[:-1] + w[-1]).argmax(1) == y_test.cpu()).double()
        loss = (1 - sign * (x.cpu().double() @ w[:-1] + w[-1])).clamp(min=0).square().sum()
        print(f"{name:14}{took[name]:9.2f}{100 * right.mean():9.2f}"
              f"{w.square().sum() / 2 + loss:16.4f}", flush=True)
    many = torch.stack([y.roll(i) % classes + i * classes for i in range(7)], 1)
    x, some = x[:, :64].contiguous(), many - many.min(0).values
    pairs = [(seconds(device, V.fit_svm, x, many, 7 * classes)[0],
              sum(seconds(device, V.fit_svm, x, t, classes)[0] for t in some.T)) for _ in range(3)]
    print("seven label sets at once %.2f s, one after the other %.2f s: %.2f times" % (
        *(statistics.median(t) for t in zip(*pairs)), statistics.median(b / a for a, b in pairs)))

PARTS = ("layer_features", "fit_svm", "clustering", "linear_probe", "weighted_knn",
         "mutual_information")

def table(args, device):
    a = V.settings(["--device", args.device, "--arch", "RES-1-8" if args.quick else "RES-5-64",
                    "--sample-level", *("5 4 2" if args.quick else "500 100 20").split()])
    a = argparse.Namespace(**{**vars(a), **{name: getattr(a, name)[0] for name in V.RUNS}})
    a.dataset = "shapes"
    data = [V.draw_shapes(n, n, device) for n in (args.pictures, args.pictures // 5)]
    splits = [V.Split(32, labels, images) for images, labels in data]
    targets = [(i / 5, *(s.labels.roll(i) for s in splits)) for i in range(6)]
    net, spent = V.Net(a, 32, 20).to(device), {name: [] for name in PARTS}
    classes = [str(c) for c in range(20)]

    def timed(name, f):
        def call(*given):
            took, value = seconds(device, f, *given)
            spent[name].append(took)
            return value
        return call
    with tempfile.TemporaryDirectory() as folder, mock.patch.multiple(
            V, **{name: timed(name, getattr(V, name)) for name in PARTS}):
        file = Path(folder) / "encoder-0.pt"
        V.export(a, net, splits[1], classes, file, {"epoch": 0})
        whole, rows = seconds(device, V.probe, file, (*splits, classes), targets, a)
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else \
        1024 * getrusage(RUSAGE_SELF).ru_maxrss
    print(f"\nprobe() of {a.arch} on {args.pictures} + {args.pictures // 5} pictures: {len(rows)} "
          f"rows in {whole:.1f} s; peak memory {peak / 2**30:.2f} GiB")
    for name, times in spent.items():
        print(f"{name:20}{sum(times):9.2f} s{len(times):5} calls")

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--part", choices=["svm", "table", "both"], default="both")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--pictures", type=int, default=50_000, help="to fit; a fifth of it to test")
    p.add_argument("--quick", action="store_true", help="seconds: does it run?")
    args = p.parse_args(argv)
    args.pictures = 2000 if args.quick else args.pictures
    header(device := torch.device(args.device))
    for part in (table, svm):  # first the table: the peak is the process's
        if args.part in (part.__name__, "both"):
            part(args, device)

if __name__ == "__main__":
    main()
