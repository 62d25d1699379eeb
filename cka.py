# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "numpy", "matplotlib", "tqdm"]
# ///
"""Linear CKA: how alike are two layers, and where is a network co-adapted?

X [n, p1] and Y [n, p2]: what two layers make of the same n pictures, every feature centred.
K = XX' and L = YY' say how alike the pictures are to either layer; CKA, how alike these two tables
are (Kornblith et al. 2019):

    CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)),    HSIC(K, L) = tr(KL), up to a factor

1 for a rotated or rescaled copy, near 0 for independent layers. On few pictures it comes out too
high, so a map sums the unbiased HSIC_1 (Nguyen et al. 2021, Eq. 3; K~ is K with zero diagonal)

    [tr(K~L~) + 1'K~1 1'L~1 / ((n-1)(n-2)) - 2/(n-2) 1'K~L~1] / (n(n-3))

over batches of n pictures, for each pair of layers, and divides once: one pass, a batch in memory.

    python cka.py RUN/encoder.pt               all layers, and the co-adapted stretch
    python cka.py RUN/encoder.pt --numbered    layers 0-6 (Deep Augmentation, Figure 9)
    python cka.py RUN/encoder.pt OTHER/encoder.pt --even    two networks (Grigg et al., Figure 2)

Expect a block's output ("even") to be like its neighbours', what it adds ("odd") like nothing.
"""
import json
import sys
import time
import warnings
import zipfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.nn.functional import one_hot
from torchvision import datasets
from torchvision.transforms import v2
from tqdm import tqdm

# ==== 1 Settings ====

# --- the same in simclr, simcse, vicreg, topk, cka ---
class BadInput(ValueError):
    """What a user can put right: main() prints it as one line, exit code 2."""

def check(good, message):
    if not good:
        raise BadInput(message)
# --- end ---

def settings(argv=None):
    p = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.error = lambda message: check(False, f"{message} (see --help)")
    add = p.add_argument
    add("encoder", nargs="+", help="encoder.pt of a run, or of two")
    for dest, names in ("only", ("odd", "even", "numbered")), ("kind", ("augment", "classes")):
        group = p.add_mutually_exclusive_group()
        for name in names:
            group.add_argument(f"--{name}", dest=dest, action="store_const", const=name)
    add("--exact", action="store_true", help="all pictures at once, by the formula above")
    add("--dataset", choices=["samples", "cifar10", "cifar100", "folder"], default="samples",
        help="samples.npz beside the encoder (default), CIFAR's test set, class folders")
    add("--data-dir", default="data", help="where they are (data)")
    add("--images", type=int, default=2048, help="at most, drawn at random (2048)")
    add("--batch-size", type=int, default=256, help="n of HSIC_1 (256)")
    add("--seed", type=int, default=0, help="of pictures and views (0)")
    add("--out", type=lambda name: name.removesuffix(".png"), help="OUT.png and OUT.json")
    a = p.parse_intermixed_args(argv)
    check(len(a.encoder) < 3, "one encoder, or two")
    check(min(a.images, a.batch_size) > 3, "--images, --batch-size: 4 at least")
    a.kind = a.kind or ("across" if a.encoder[1:] else "within")
    a.out = a.out or f"{Path(a.encoder[0]).parent}/cka-{a.only or 'all'}-{a.kind}"
    return a

# ==== 2 CKA ====

def grams(acts):
    """Outputs [n, ...] of L layers -> float64 [L, n * n]: Gram matrices, U-centred (zero diagonal
    and row sums; Szekely & Rizzo 2014): <K, L> = n(n-3) HSIC_1. And [L]: |K|^2 by rounding."""
    K = []
    for X in acts:
        X = X.reshape(len(X), -1).to(torch.promote_types(X.dtype, torch.float32))
        X = X - X.mean(0)  # float32 needs it, HSIC_1 does not
        with torch.autocast(X.device.type, enabled=False):
            K.append((X @ X.T).double())
    K, n = torch.stack(K), len(X)
    noise = n * 2 ** -42 * K.square().sum((1, 2))  # (4 eps)^2
    off = ~torch.eye(n, dtype=torch.bool, device=K.device)
    K = K * off
    rows = K.sum(2, keepdim=True) / (n - 2)
    K = (K - rows - rows.mT + rows.sum(1, keepdim=True) / (n - 1)) * off
    return K.flatten(1), noise

@torch.no_grad()
def cka_map(pairs):
    """CKA of each layer of a with each of b, estimated in one pass: float64 [La, Lb] on the CPU.
    pairs: for each batch two lists of outputs [n, ...] of the same n >= 4 pictures, or the same
    list twice, for a network with itself. A last batch of another size is dropped. Constant
    layers have CKA 0. Raises BadInput, a ValueError: no batch, other sizes, NaN, infinity."""
    first, ragged, sums = None, False, None
    for acts_a, acts_b in pairs:
        shape = len(acts_a), len(acts_b), *sorted({len(x) for x in (*acts_a, *acts_b)})
        first = first or shape
        check(len(shape) == 3 and first[2] > 3 and shape[:2] == first[:2] and not ragged,
              "all layers need the same pictures, 4 or more, as many in every batch; "
              f"layers of a, b, pictures: {shape}, first {first}")
        if not (ragged := shape != first):
            A, noise_a = grams(acts_a)
            B, noise_b = (A, noise_a) if acts_a is acts_b else grams(acts_b)
            now = A @ B.T, A.square().sum(1), B.square().sum(1), noise_a, noise_b
            sums = [s + x for s, x in zip(sums, now)] if sums else now  # n(n-3) cancels
        del acts_a, acts_b  # one batch in memory
    check(sums, "no batch at all")
    ab, aa, bb, noise_a, noise_b = sums
    bad = [(~x.isfinite()).nonzero().flatten().tolist() for x in (aa, bb)]
    check(bad == [[], []], "not finite: layers {} of a, {} of b".format(*bad))
    scale = (aa.where(aa > noise_a, 0)[:, None] * bb.where(bb > noise_b, 0)).sqrt()
    return torch.where(scale > 0, ab / scale, 0.0).cpu()

@torch.no_grad()
def exact_map(sides, batches):
    """The same of all N pictures at once (Grigg et al., Eq. 2; biased). sides: [f] or [f, g], from
    a batch to the outputs. A pass for each layer; memory: its outputs, twice, 4 N^2 bytes each."""
    tables = [[] for _ in sides]
    for table, side in zip(tables, sides):
        for l in tqdm(range(len(side(batches[0]))), leave=False, disable=None):
            X = torch.cat([side(batch)[l].flatten(1).float() for batch in batches])
            X -= X[0].clone()  # constant features are then exactly 0
            X -= X.mean(0)
            K, X = X @ X.T, None  # HKH
            size = torch.linalg.vector_norm(K, dtype=torch.float64)
            check(size.isfinite(), f"not finite: layer {l}")
            table.append(K / size.clamp(min=1e-30))
    return torch.tensor([[torch.linalg.vecdot(K, L).double().sum() for L in tables[-1]]
                         for K in tables[0]])

def coadapted_stretch(M):
    """First and last layer of the co-adapted stretch in a map [L, L] of consecutive layers, L > 1.
    Deep Augmentation marks by eye "the later co-adaptation region" (Appendix C). Our rule: from the
    middle on, the stretch with the largest sum, over its pairs of layers, of CKA less the mean CKA
    of neighbours: a bright square on the diagonal. Some stretch always wins: look."""
    M = torch.as_tensor(M, dtype=torch.float64)
    check(M.ndim == 2 and len(M) == M.shape[1] > 1 and torch.allclose(M, M.T, atol=1e-6),
          f"a stretch needs a symmetric map [L, L], L > 1, without NaN; got {list(M.shape)}")
    gain = torch.triu(M - M.diagonal(1).mean(), 1)
    return max(((s, e) for s in range((len(M) - 1) // 2, len(M)) for e in range(s + 1, len(M))),
               key=lambda c: (round(gain[c[0]:c[1] + 1, c[0]:c[1] + 1].sum().item(), 9),
                              c[1] - c[0], c[1]))

# ==== 3 Figure ====

def draw(path, results):
    """PNG of results as in the .json ("map" and "names_a" are enough): the maps, with black crosses
    at the stretch, red ones where training augmented, white dots at best matches; and the lines."""
    empty = {"run_a": "", "run_b": "", "stretch": [], "targets": [], "best": [], "lines": {}}
    results = [{"names_b": r["names_a"], **empty, **r} for r in results]
    maps = [r for r in results if len(r["map"][0]) > 1]
    lines = [(r, *line) for r in results for line in r["lines"].items()]
    panels = len(maps) + bool(lines)
    figure = Figure((6 * panels, 5), layout="constrained")
    for i, r in enumerate(maps, 1):
        axes = figure.add_subplot(1, panels, i, xlabel=r["run_b"], ylabel=r["run_a"])
        figure.colorbar(axes.imshow(r["map"], origin="lower", vmin=0, vmax=1), label="CKA")
        axes.set_xticks(range(len(r["names_b"])), r["names_b"], fontsize=7, rotation=90)
        axes.set_yticks(range(len(r["names_a"])), r["names_a"], fontsize=7)
        for key, colour, size in (("targets", "red", 150), ("stretch", "black", 50)):
            axes.scatter(r[key], r[key], size, colour, marker="x")
        axes.scatter(r["best"], range(len(r["best"])), 12, "white", edgecolors="black")
    if lines:
        axes = figure.add_subplot(1, panels, panels, ylabel="CKA")
        for r, label, values in sorted(lines, key=lambda line: -len(line[2])):
            axes.plot(r["names_a"], values, ".-", label=f"{r['run_a']}: {label}")
        axes.tick_params("x", rotation=90, labelsize=7)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)

# ==== 4 Encoders and pictures ====

class Encoder:
    """encoder.pt of a run, its layers `names`."""
    def __init__(self, path, only):
        extra, self.device = {"config.json": ""}, "cuda" if torch.cuda.is_available() else "cpu"
        try:
            assert not zipfile.ZipFile(path).testzip()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*torch.jit.load")
                self.layers = torch.jit.load(path, self.device, extra).eval().activations
            config = json.loads(extra["config.json"])
            self.all, self.number = config["layers"], config["layer_numbers"]
        except Exception:
            raise BadInput(f"{path} is missing, or no run's encoder.pt") from None
        check("image_size" in config, f"{path} takes sentences, not pictures: see its cka.png")
        self.size, self.flags = config["image_size"], config.get("flags", {})
        self.names = [name for name in self.all if not only or name.endswith(f".{only}")
                      or only == "numbered" and name in self.number]
        check(self.names, f"{path} has only {', '.join(self.all)}")
        self.run = "/".join(Path(path).resolve().parts[-3:-1])

    def on(self, images):
        """The function from indices of these pictures, uint8 [N, 3, size, size], to the outputs."""
        def outputs(batch):
            found = self.layers(images[batch].to(self.device) / 255)
            return [x for name, x in zip(self.all, found) if name in self.names]
        return outputs

    def views(self, images, which):
        """Of each picture a view as this run drew the first (0) or second (1) to train on."""
        f = {"views": "simclr", "crop_min": 0.2, "jitter": [0.4, 0.4, 0.4, 0.1], "blur": 0,
             "solarize": 0, **self.flags}
        check(f["views"] in "simclr crop", f"{self.run}: trained without views")
        recipe = [v2.RandomResizedCrop(self.size, (f["crop_min"], 1)), v2.RandomHorizontalFlip()]
        if f["views"] == "simclr":
            blur, solarize = (np.resize(f[k], 2)[which] for k in ("blur", "solarize"))
            recipe += [v2.RandomApply([v2.ColorJitter(*f["jitter"])], 0.8), v2.RandomGrayscale(0.2),
                       v2.RandomApply([v2.GaussianBlur(23, (0.1, 2))], blur),
                       v2.RandomSolarize(128, solarize)]
        return torch.stack([v2.Compose(recipe)(x) for x in images])

def load_images(a, size):
    """At most a.images, drawn at random: uint8 [N, 3, size, size], labels [N], -1: none."""
    fit = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])
    try:
        torch.manual_seed(a.seed)
        if a.dataset == "samples":
            with np.load(Path(a.encoder[0]).with_name("samples.npz")) as file:
                data = list(zip(torch.from_numpy(file["images"]), file["labels"], strict=True))
        elif a.dataset == "folder":
            data = datasets.ImageFolder(a.data_dir, fit)
        else:
            data = getattr(datasets, a.dataset.upper())(a.data_dir, False, fit, download=True)
        images, labels = zip(*(data[i] for i in torch.randperm(len(data))[:a.images].tolist()))
        check(images[0].shape == (3, size, size), f"no pictures of {size} pixels")
        return torch.stack(images), torch.tensor(labels)
    except Exception as e:
        raise BadInput(f"--dataset {a.dataset}: {type(e).__name__} {e}") from None

# ==== 5 Command ====

def run(a):
    """Measures and prints; returns what stands in the .json."""
    start, encoders, results = time.time(), [Encoder(path, a.only) for path in a.encoder], []
    size, last = encoders[0].size, encoders[-1]
    check(size == last.size, f"pictures of {size} pixels and of {last.size}")
    images, labels = load_images(a, size)
    if a.kind == "classes":
        images, labels = images[labels >= 0], labels[labels >= 0]
        check(len(labels.unique()) > 1, "--classes needs labels of two classes or more")
        classes = one_hot(labels).to(last.device)
    n = min(a.batch_size, len(images))
    batches = [b for b in torch.arange(len(images)).split(n) if a.exact or len(b) == n]
    for one, two in [encoders] if a.kind == "across" else zip(encoders, encoders):
        if a.kind == "augment":
            torch.manual_seed(a.seed)
            sides = [one.on(one.views(images, which)) for which in (0, 1)]
        elif a.kind == "classes":
            sides = [one.on(images), lambda batch: [classes[batch]]]
        else:
            sides = [net.on(images) for net in dict.fromkeys((one, two))]
        def pair(batch, sides=sides):
            acts = [side(batch) for side in sides]
            return acts[0], acts[-1]
        M = exact_map(sides, batches) if a.exact else cka_map(
            map(pair, tqdm(batches, leave=False, disable=None)))
        same = [dict(zip(two.names, row)).get(n) for n, row in zip(one.names, M.tolist())]
        lines = {"within": {"next layer": [*M.diagonal(1).tolist(), None]},
                 "across": {"same layer": same, "best match": M.amax(1).tolist()},
                 "augment": {"other view": same}, "classes": {"classes": M[:, 0].tolist()}}[a.kind]
        augmented = str(one.flags.get("layer", "")).split("+") if a.kind == "within" else []
        r = {"kind": a.kind, "run_a": one.run, "run_b": two.run, "map": M.tolist(), "lines": lines,
             "names_a": one.names, "names_b": ["all"] if a.kind == "classes" else two.names,
             "stretch": coadapted_stretch(M) if a.kind == "within" and len(M) > 1 else [],
             "best": M.argmax(1).tolist() if a.kind == "across" else [],
             "targets": [i for i, n in enumerate(one.names) if str(one.number.get(n)) in augmented]}
        results.append(r)
        print(f"{one.run:30}", *(f"{label:>10}" for label in lines))
        for i, name in enumerate(one.names):
            print(f"{one.number.get(name, ''):>2} {name:27}",
                  *(" " * 10 if v[i] is None else f"{v[i]:10.3f}" for v in lines.values()),
                  *(two.names[j] for j in r["best"][i:i + 1]))
        if r["stretch"]:
            print("co-adapted stretch:", " to ".join(one.names[i] for i in r["stretch"]))
    return {**results[0], "second": results[1:], "exact": a.exact,
            "images": sum(map(len, batches)), "seconds": round(time.time() - start, 2)}

def main(argv=None):
    try:
        a = settings(argv)
        result = run(a)
        draw(f"{a.out}.png", [result, *result["second"]])
        Path(f"{a.out}.json").write_text(json.dumps(result))
        print(f"{result['images']} pictures, {result['seconds']} s; {a.out}.png and .json")
        return result
    except (BadInput, OSError) as e:
        print(f"cka.py: error: {str(e).splitlines()[0]}", file=sys.stderr)
        raise SystemExit(2) from None

if __name__ == "__main__":
    main()
