"""Probing speed of vicreg_probe.py: its linear SVM against scikit-learn's, and the whole table of a probe.

    python tests/bench/bench_probes.py [--part svm|table|both] [--device cpu|cuda] [--sample-level 500 100 20] [--quick]

svm      fit_svm against LinearSVC() with its defaults, on 50,000 x 512 features of 100 classes: those of CIFAR-100 in a
         ResNet-18 (stem of stride 4) after 300 steps on the labels; without CIFAR-100 in --data-dir Gaussian clusters,
         features correlated and of different scales. scikit-learn works on one core, for many minutes, so it runs
         once, between two fits of ours; it gets float64, converted beforehand. Targets: 10 times, within 0.3 points.
table    Probes.run as in a run of the script, random weights: SVM and NCC of classes and superclasses at every layer of
         RES-5-250 (logistic regression and kNN at the last) on 50,000 + 10,000 pictures, CIFAR-100 or drawn shapes:
         seconds of its parts, peak memory of the process (ru_maxrss) or CUDA's allocator. Then one pass for all layers
         against a pass for each, which ends at its layer, alternating, on some pictures: seconds for all pictures are
         extrapolated from these. Targets: under 4 GiB (CPU), under 60 s (CUDA).
"""
import argparse
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from unittest import mock

os.environ.setdefault("TQDM_DISABLE", "1")                           # before the script imports tqdm

import torch  # noqa: E402
from torch import nn  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/bench"), str(ROOT)]
from bench_cka import memory  # noqa: E402
from bench_views import finish, header  # noqa: E402

import vicreg_probe as P  # noqa: E402

try:
    import sklearn
    from sklearn.svm import LinearSVC
except ImportError:
    sklearn = None


def seconds(device, f, *args):
    """(how long f(*args) takes, its result)."""
    finish(device)
    start = time.perf_counter()
    result = f(*args)
    finish(device)
    return time.perf_counter() - start, result


def load(args, device, classes, *flags):
    """(settings, train and test split, class names): --pictures of the first classes of CIFAR-100 or drawn shapes."""
    a = P.settings(["--dataset", "cifar100" if args.real else "shapes", "--data-dir", args.data_dir, "--device",
                    args.device, "--target-net", "none", "--mine-steps", "0", *map(str, flags)])
    if args.real:
        *pairs, names = P.load_data("cifar100", a, device)
        pairs = [(s.images[s.labels < classes], s.labels[s.labels < classes]) for s in pairs]
    else:                                                            # in parts: the peak of drawing them would show
        parts, names = [P.draw_shapes(2000, seed, device) for seed in range(-(-args.pictures * 6 // 10_000))], range(20)
        images, labels = (torch.cat(column) for column in zip(*parts))
        pairs = [(images, labels), (images[args.pictures:], labels[args.pictures:])]
    splits = (P.Split(y[:n], 32, images=x[:n]) for (x, y), n in zip(pairs, (args.pictures, args.pictures // 5)))
    return a, *splits, names[:classes]


# ---- the linear SVM
def cifar_features(args, device):
    """Features of a network that was trained briefly: (x [N, D], y [N]) of train and test, what they are."""
    a, train, test, _ = load(args, device, args.classes)
    torch.manual_seed(0)
    arch = "resnet18" if args.features == 512 else f"RES-2-{args.features}"
    stem, blocks, dim = P.backbone(arch, 64)                         # ResNet-18: the stem of larger pictures, stride 4
    body = nn.Sequential(P.Normalize(*P.IMAGENET), stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = nn.Sequential(body, nn.Linear(dim, args.classes)).to(device, memory_format=torch.channels_last)
    solver = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    for _ in range(args.train_steps):
        rows = torch.randint(len(train), (128,)).to(device)
        solver.zero_grad()
        nn.functional.cross_entropy(net(P.to_unit(train.images[rows], 32)), train.labels[rows]).backward()
        solver.step()
    body.eval()
    x, x_test = (P.layer_features(lambda x: {0: body(x)}, [0], "avg", P.eval_batches(s, a, device))[0][0]
                 for s in (train, test))
    return (x, train.labels), (x_test, test.labels), f"CIFAR-100 through {arch}, {args.train_steps} steps on the labels"


def clusters(args, device):
    g, d, sets = torch.Generator().manual_seed(0), args.features, []
    mixing = torch.randn(d, d, generator=g) * torch.linspace(0, -3, d).exp().unsqueeze(1)
    mixing *= torch.randn(d, generator=g).exp()                      # so the features' scales differ
    centres = 0.25 * torch.randn(args.classes, d, generator=g)
    for y in torch.randint(args.classes, (args.pictures * 6 // 5,), generator=g).split(args.pictures):
        sets.append((((centres[y] + torch.randn(len(y), d, generator=g)) @ mixing).to(device), y.to(device)))
    return *sets, "Gaussian clusters"


def svm(args, device):
    (x, y), (x_test, y_test), source = (cifar_features if args.real else clusters)(args, device)
    print(f"\nLinear SVM on {len(x)} x {x.shape[1]} x {args.classes} ({source}), {len(x_test)} to test")
    inputs, labels = x.double().cpu().numpy(), y.cpu().numpy()

    def usual():
        model = LinearSVC().fit(inputs, labels)
        return torch.cat([torch.from_numpy(model.coef_.T), torch.from_numpy(model.intercept_).unsqueeze(0)])

    ways = {"ours": lambda: P.fit_svm(x, y, args.classes), "scikit-learn": usual}
    took, weights, result, right = {name: [] for name in ways}, {}, {}, {}
    P.fit_svm(x[:1000], y[:1000], args.classes)                      # the libraries start
    for name in ("ours", "scikit-learn", "ours") if sklearn else ("ours",):
        t, w = seconds(device, ways[name])
        took[name], weights[name] = [*took[name], t], w.to(device).double()
    sign = 2 * nn.functional.one_hot(y, args.classes) - 1
    print(f"{'':14}{'seconds':>10}{'test %':>9}{'objective':>16}")
    for name, w in weights.items():
        right[name] = (x_test.double() @ w[:-1] + w[-1]).argmax(1) == y_test
        loss = (1 - sign * (x.double() @ w[:-1] + w[-1])).clamp(min=0).square().sum()
        r = result[name] = {"seconds": statistics.mean(took[name]), "test": 100 * right[name].double().mean().item(),
                            "objective": (w.square().sum() / 2 + loss).item()}
        print(f"{name:14}{r['seconds']:10.2f}{r['test']:9.2f}{r['objective']:16.4f}")
    if not sklearn:
        return result
    (a, b), (v, w) = result.values(), weights.values()
    ratio, points, apart = b["seconds"] / a["seconds"], a["test"] - b["test"], ((v - w).norm() / w.norm()).item()
    print(f"scikit-learn (one core) / ours: {ratio:.1f} (target: at least 10)\n"
          f"accuracy, ours over scikit-learn's: {points:+.2f} points (target: within 0.3); right in one way "
          f"only: {(right['ours'] != right['scikit-learn']).sum().item()} of {len(x_test)} pictures\n"
          f"objective: {a['objective'] / b['objective'] - 1:+.1e}; weights, |difference| / |weights|: {apart:.1e}")
    return {**result, "ratio": ratio, "points": points, "weights": apart}


# ---- the whole table
PARTS = {"layer_features": "features, one pass each split", "fit_svm": "SVM", "clustering": "NCC, CDNV",
         "linear_probe": "logistic, last layer", "weighted_knn": "kNN, last layer"}


def table(args, device):
    a, train, test, classes = load(args, device, 100, "--arch", args.arch, "--sample-level", *args.sample_level)
    probes, net = P.Probes(a, train, test, classes, device), P.build(a, 32, classes, device).eval()
    names, spent = [n for n in net.numbered() if n not in ("avgpool", "head")], {name: [] for name in PARTS}
    print(f"\nProbes.run: {len(names)} layers of {args.arch}, {len(train)} + {len(test)} pictures ({a.dataset}), "
          f"{', '.join(target for target, *_ in probes.tasks)}, sample level {args.sample_level}")
    P.layer_features(net.activations, names, "avg", P.eval_batches(train, a, device, 8))      # the libraries start

    def timed(name, f, *given):
        t, value = seconds(device, f, *given)
        spent[name].append(t)
        return value

    before = memory(args.device)
    with mock.patch.multiple(P, **{name: partial(timed, name, getattr(P, name)) for name in PARTS}):
        whole, (rows, _, _) = seconds(device, probes.run, net.activations, names, names[-1], 0, True)
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else 1024 * getrusage(RUSAGE_SELF).ru_maxrss
    print(f"{'':32}{'seconds':>9}{'calls':>7}")
    for name, what in PARTS.items():
        print(f"{what:32}{sum(spent[name]):9.2f}{len(spent[name]):7}")
    print(f"{'the whole table':32}{whole:9.2f} (target on CUDA: under 60)\npeak memory {peak / 2**30:.2f} GiB "
          f"(target on the CPU: under 4), {(peak - before) / 2**30:.2f} over the start\n"
          "SVM of the classes by layer, test %:", *(f"{r['svm']:.1f}" for r in rows if r["target"] == "class"))

    some = P.Split(None, 32, images=train.images[:512 if args.quick else 1024 if args.device == "cpu" else 16_384])
    end = {n: nn.Sequential(*list(net.layers.values())[:l + 2]) for n, l in net.numbered().items()}   # -1 is the input

    def features(activations, names):
        return P.layer_features(activations, names, "avg", P.eval_batches(some, a, device))[0]

    ways = (lambda: features(net.activations, names),
            lambda: {n: features(lambda images, n=n: {n: end[n](images)}, [n])[n] for n in names})
    took = [[seconds(device, way) for way in ways] for _ in range(3)]
    saved = statistics.median(each / one for (one, _), (each, _) in took)
    apart = max(((x - took[0][1][1][n]).abs().max() / x.abs().max()).item() for n, x in took[0][0][1].items())
    one, each = (statistics.median(t for t, _ in way) * (len(train) + len(test)) / len(some) for way in zip(*took))
    print(f"features of all layers, measured on {len(some)} pictures, extrapolated to {len(train) + len(test)}: one "
          f"pass {one:.1f} s, a pass for each layer {each:.1f} s: {saved:.1f} times; they differ by {apart:.0e}")
    return {"whole": whole, "peak_gib": peak / 2**30, "saved": saved, **{n: sum(t) for n, t in spent.items()}}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--part", choices=["svm", "table", "both"], default="both")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--pictures", type=int, default=50_000, help="to fit; a fifth of it to test")
    p.add_argument("--sample-level", type=int, nargs=3, default=[0, 0, 0], help="table: sample level, too")
    p.add_argument("--data-dir", default=str(ROOT / "data"))
    p.add_argument("--quick", action="store_true", help="seconds: does it run?")
    args = p.parse_args(argv)
    args.features, args.classes, args.train_steps, args.arch = 512, 100, 300, "RES-5-250"
    if args.quick:
        args.pictures, args.features, args.classes, args.train_steps, args.arch = 2000, 64, 10, 20, "RES-2-16"
    args.real = (Path(args.data_dir) / "cifar-100-python").is_dir()
    torch.backends.cudnn.benchmark = True                            # as the script
    header(device := torch.device(args.device), sklearn=sklearn.__version__ if sklearn else "missing, so ours only")
    return {part.__name__: part(args, device) for part in (table, svm)    # first the table: the peak is the process's
            if args.part in (part.__name__, "both")}


if __name__ == "__main__":
    main()
