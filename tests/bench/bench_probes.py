"""Probing with vicreg_probe.py: its linear SVM, and the whole table of a probe.

    python tests/bench/bench_probes.py --part svm|table [--pictures 50000] [--device cuda]

svm: fit_svm of 512 features, 100 classes (clusters, correlated, of unlike scales), and
scikit-learn's LinearSVC on one core. Target: 10 times. table: probe() of an untrained RES-5-64 on
drawn pictures, and its parts. Targets: under 4 GiB, on CUDA under 60 s."""
import argparse
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from unittest import mock

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent)]
from bench_views import options, peak, seconds  # noqa: E402

import vicreg_probe as V  # noqa: E402


def svm(args, device):
    from sklearn.svm import LinearSVC
    g, n, d, classes = torch.Generator().manual_seed(0), args.pictures * 6 // 5, 512, 100
    mixing = torch.randn(d, d, generator=g) * torch.linspace(0, -3, d).exp().unsqueeze(1)
    mixing *= torch.randn(d, generator=g).exp()  # so the features' scales differ
    centres, y = 0.25 * torch.randn(classes, d, generator=g), torch.randint(classes, (n,))
    x = (centres[y] + torch.randn(n, d, generator=g)) @ mixing
    (x, x_test), (y, y_test) = x.split(args.pictures), y.split(args.pictures)
    V.fit_svm(x[:1000].to(device), y[:1000].to(device), classes)  # the libraries start

    def usual():
        model = LinearSVC().fit(x.double().numpy(), y.numpy())
        return torch.from_numpy(model.coef_.T), torch.from_numpy(model.intercept_)

    def ours():
        w = V.fit_svm(x.to(device), y.to(device), classes).cpu().double()
        return w[:-1], w[-1]
    for way in (ours, usual, ours):
        taken, (w, b) = seconds(device, way)
        right = ((x_test.double() @ w + b).argmax(1) == y_test).double().mean()
        print(f"{way.__name__:6}{taken:9.2f} s, test {100 * right:.2f} %", flush=True)

def table(args, device):
    words = ["--device", args.device, "--arch", "RES-5-64", "--sample-level", "500", "100", "20"]
    a = V.settings(words)
    a = argparse.Namespace(**{**vars(a), **{name: getattr(a, name)[0] for name in V.RUNS}})
    a.dataset, spent = "shapes", defaultdict(list)
    data = [V.draw_shapes(n, n, device) for n in (args.pictures, args.pictures // 5)]
    splits = [V.Split(32, labels, images) for images, labels in data]
    targets = [(i / 5, *(s.labels.roll(i) for s in splits)) for i in range(6)]

    def timed(name, f):
        def call(*given):
            taken, value = seconds(device, f, *given)
            spent[name].append(taken)
            return value
        return call
    parts = "layer_features fit_svm clustering linear_probe weighted_knn mutual_information".split()
    parts = {name: timed(name, getattr(V, name)) for name in parts}
    classes = [*map(str, range(20))]
    with tempfile.TemporaryDirectory() as folder, mock.patch.multiple(V, **parts):
        file = Path(folder) / "encoder-0.pt"
        V.export(a, V.Net(a, 32, 20).to(device), splits[1], classes, file, {"epoch": 0})
        taken, rows = seconds(device, V.probe, file, (*splits, classes), targets, a)
    print(f"probe(): {len(rows)} rows in {taken:.1f} s; peak memory {peak(device):.2f} GiB")
    for name, times in spent.items():
        print(f"{name:20}{sum(times):9.2f} s{len(times):5} calls")

def main():
    args, device = options(__doc__, part="svm", pictures=50_000)
    {"svm": svm, "table": table}[args.part](args, device)

if __name__ == "__main__":
    main()
