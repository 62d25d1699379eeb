# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "numpy", "matplotlib", "tqdm"]
# ///
"""Linear CKA: how alike are two layers, and where does a network's co-adapted stretch start and end?

Papers: Kornblith et al. 2019 (CKA); Nguyen et al. 2021 (the minibatch estimator, eq. 3); Grigg et al. 2021
(SimCLR against supervised, odd/even layers, augmentations, classes: Fig. 1-5); Bruel-Gabrielsson et al., Deep
Augmentation, Section 6.1 (the map says at which layer to augment: Fig. 9, 10).

The idea. X [n, p1] and Y [n, p2] are two layers' (flattened) outputs for the same n images, features centred.
K = X X' and L = Y Y' hold how alike the images are to each other in either layer; CKA compares those two tables:
    CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))       exact: HSIC = tr(K L) = |X' Y|^2 (biased; `linear_cka`)
It is 1 for a rotated or rescaled copy and falls to 0 for independent layers. A network's maps need many images, and
exact HSIC on small batches is biased upwards, so a map adds up, over batches of n images, the unbiased
    HSIC_1 = [tr(K~L~) + (1'K~1)(1'L~1) / ((n-1)(n-2)) - 2/(n-2) 1'K~L~1] / (n(n-3)),   K~ = K with zero diagonal
for every pair of layers and divides once at the end (`cka_map`): one pass, memory independent of the number of images.

    python cka.py runs/a/encoder.pt                              # all layers x all layers, marks the co-adapted stretch
    python cka.py runs/a/encoder.pt --numbered                   # the paper's layers 0-6 only (Fig. 9)
    python cka.py runs/a/encoder.pt runs/b/encoder.pt --even     # two networks (paper 002, Fig. 1 and 2)
    python cka.py runs/a/encoder.pt --augment                    # invariance to augmentation (Fig. 3 middle, Fig. 5)
    python cka.py runs/a/encoder.pt --classes --dataset cifar10  # layers against one-hot classes (Fig. 3 right)

Expect: neighbouring post-residual ("even") layers alike, residual ("odd") ones alike only to themselves.
From Python, for any nn.Module:
    with module_activations(model, names) as run:
        M = cka_map(twice(run(images)) for images in batches)      # twice = lambda acts: (acts, acts)
Values: a constant layer has CKA 0 with everything, itself too; estimates may leave [0, 1] a little (docs/cka.md).
"""

import argparse
import json
import os
import sys
import time
import warnings
import zipfile
import zlib
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

# --- 1 Settings -------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without argparse's usage text
        print("cka.py: error: " + " ".join(str(message).split()), file=sys.stderr)
        raise SystemExit(2)


def settings(argv):
    parser = Parser(prog="cka.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("enc_a", metavar="ENC_A", help="exported encoder (encoder.pt in a run folder)")
    parser.add_argument("enc_b", metavar="ENC_B", nargs="?", help="a second one: across instead of within")
    data = parser.add_argument_group("images")
    data.add_argument("--dataset", choices=["samples", "cifar10", "cifar100", "folder"], default="samples",
                      help="samples: samples.npz beside ENC_A (default); CIFAR: the test split; folder: your pictures")
    data.add_argument("--data-dir", default="data", help="where CIFAR or the folder of pictures is (default: data)")
    data.add_argument("--images", type=int, default=2048, help="how many, drawn at random (default: 2048, or all)")
    data.add_argument("--batch-size", type=int, default=256, help="images in one HSIC_1, at least 4 (default: 256)")
    which = parser.add_argument_group("layers").add_mutually_exclusive_group()
    which.add_argument("--odd", action="store_true", help="only residuals, before the addition (paper 002, A.1)")
    which.add_argument("--even", action="store_true", help="only post-residual layers, after addition and ReLU")
    which.add_argument("--numbered", action="store_true", help="only the paper's numbered layers (paper 000, Fig. 9)")
    what = parser.add_argument_group("what to compare").add_mutually_exclusive_group()
    what.add_argument("--augment", action="store_true", help="each network on two augmented copies of the images")
    what.add_argument("--classes", action="store_true", help="layers against the one-hot classes")
    run = parser.add_argument_group("run")
    run.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is one")
    run.add_argument("--seed", type=int, default=0, help="draws the images and the augmentations (default: 0)")
    run.add_argument("--out", metavar="FILE.png", help="default: beside ENC_A, cka.png, cka-<run of ENC_B>.png, "
                     "cka-augment.png or cka-classes.png; the numbers go into a .json of the same name")
    return parser, parser.parse_args(argv)


# --- 2 CKA ------------------------------------------------------------------------------------------------------------


def linear_cka(X, Y):
    """Exact (biased) linear CKA of X [n, ...] and Y [n, ...], n >= 2: a float64 scalar, differentiable."""
    if len(X) != len(Y) or len(X) < 2:
        raise ValueError(f"linear_cka needs the same n >= 2 images on both sides, got {len(X)} and {len(Y)}")
    X, Y = X.reshape(len(X), -1).double(), Y.reshape(len(Y), -1).double()
    if not (X.isfinite().all() and Y.isfinite().all()):
        raise ValueError("linear_cka: activations hold NaN or infinity")
    constant = (X == X[0]).all() or (Y == Y[0]).all()
    X, Y = X - X.mean(0), Y - Y.mean(0)
    (n, p1), p2 = X.shape, Y.shape[1]
    if p1 * p2 + p1 * p1 + p2 * p2 < n * (p1 + p2):  # feature form, |X'Y|^2: cheaper with many images
        xy, xx, yy = (X.T @ Y).square().sum(), (X.T @ X).norm(), (Y.T @ Y).norm()
    else:  # Gram form, tr(K L), the same number: cheaper with many features
        K, L = X @ X.T, Y @ Y.T  # [n, n]
        xy, xx, yy = (K * L).sum(), K.norm(), L.norm()
    return xy * 0 if constant or xx * yy == 0 else xy / (xx * yy)  # constant features: 0 (not 0/0), with gradient 0


def u_centre(K):
    """Gram matrices [..., n, n] -> float64 with zero diagonal and zero row sums (Szekely & Rizzo 2014)."""
    n = K.shape[-1]
    off = ~torch.eye(n, dtype=torch.bool, device=K.device)
    K = K.double() * off
    rows = K.sum(-1, keepdim=True) / (n - 2)  # [..., n, 1]; K is symmetric, so these are the columns' too
    total = rows.sum(-2, keepdim=True) / (n - 1)
    return (K - rows - rows.mT + total) * off


def hsic1(K, L):
    """Unbiased HSIC_1 (Song et al. 2012; Nguyen et al. 2021, eq. 3) of two Gram matrices [n, n], n >= 4.

    The three terms of the equation are one inner product of U-centred matrices: HSIC_1 = <K*, L*> / (n(n-3)), so
    HSIC_1(K, K) is never negative, HSIC_1(K, L) may be. Make K and L from centred features: HSIC_1 does not need it
    but float32 does (uncentred it was off by .006-.012, centred by less than 5e-7).
    """
    n = len(K)
    if n < 4 or K.shape != (n, n) or L.shape != (n, n):
        raise ValueError(f"hsic1 needs two [n, n] Gram matrices with n >= 4, got {tuple(K.shape)} and {tuple(L.shape)}")
    return (u_centre(K) * u_centre(L)).sum() / (n * (n - 3))


def gram_rows(acts, where):
    """A list of L layers' outputs [B, ...] -> vec(K*) of every layer [L, B*B], and how much of |K*|^2 is rounding [L].

    Gram form throughout: it costs B*B*p once per layer and then only B*B per pair of layers, while the feature form
    |X'Y|^2 costs B*p1*p2 for every pair and is cheaper only if p1*p2 < B, that is, for layers of a dozen features.
    """
    grams, eps = [], []
    for X in acts:
        X = X.reshape(len(X), -1)
        X = X if X.dtype == torch.float64 else X.float()
        X = X - X.mean(0)  # centred before the product: see hsic1
        with torch.autocast(X.device.type, enabled=False):  # a generator of pairs may leave autocast on around us
            grams.append((X @ X.T).double())
        eps.append(torch.finfo(X.dtype).eps)
    K = torch.stack(grams)  # [L, B, B]
    power = K.square().sum((1, 2))  # [L]
    bad = (~power.isfinite()).nonzero()
    if len(bad):
        raise ValueError(f"{where}, layer {int(bad[0])}: activations hold NaN, infinity or values too large to square")
    # B*B entries, each off by about eps |K_ii|, against B diagonal ones: (4 eps)^2 B |K|^2 is no signal
    return u_centre(K).flatten(1), 16 * len(K[0]) * torch.tensor(eps, device=K.device).double().square() * power


@torch.no_grad()
def cka_map(pairs, progress=None):
    """Unbiased minibatch CKA of all layers of a with all layers of b: float64 [La, Lb] on the CPU, in one pass.

    `pairs` yields (acts_a, acts_b), two lists of tensors [B, ...] of the same B >= 4 images; yield one list twice for
    a map within a network (`acts_a is acts_b`: the work is done once). A last batch of another size is dropped.
    `progress` is called after each batch, e.g. tqdm(...).update. A layer whose HSIC_1 with itself is zero (constant
    features), or so near it that it is float rounding, has CKA 0 with everything including itself. Other values are
    estimates and stay as they are: a little below 0 or above 1 means few images. ValueError: no batch, sizes that
    differ, NaN or infinity.
    """
    n = ragged = sums = None
    steps = count()  # not enumerate, which holds on to a batch's activations while the next one is computed
    for acts_a, acts_b in pairs:
        batch = f"batch {next(steps)}"
        sizes = sorted({len(x) for x in (*acts_a, *acts_b)})
        if len(sizes) != 1:
            raise ValueError(f"{batch}: layers of a and b must hold the same images, got batch sizes {sizes}")
        if n is None:
            n, layers = sizes[0], (len(acts_a), len(acts_b))
            if n < 4 or 0 in layers:
                raise ValueError(f"HSIC_1 needs batches of at least 4 images and at least one layer, got {n}, {layers}")
        if (len(acts_a), len(acts_b)) != layers:
            raise ValueError(f"{batch} has {len(acts_a)} and {len(acts_b)} layers, the first had {layers}")
        if ragged is not None:
            raise ValueError(f"{ragged} differs in size from the first ({n}) and is not the last")
        if sizes[0] != n:  # HSIC_1 of fewer images is noisier and weighs differently: drop it
            ragged = batch
        else:
            A, noise_a = gram_rows(acts_a, f"{batch}, side a")  # [La, B*B], [La]
            B, noise_b = (A, noise_a) if acts_a is acts_b else gram_rows(acts_b, f"{batch}, side b")
            now = (A @ B.T, A.square().sum(1), B.square().sum(1), noise_a, noise_b)  # n(n-3) cancels in the ratio
            sums = [s + x for s, x in zip(sums, now)] if sums else now  # the sum over batches first, the ratio once
        del acts_a, acts_b  # before the next batch is computed: one batch of activations in memory, not two
        if progress:
            progress()
    if sums is None:
        raise ValueError("cka_map got no batch at all")
    ab, aa, bb, noise_a, noise_b = sums
    aa, bb = aa.where(aa > noise_a, 0), bb.where(bb > noise_b, 0)
    scale = aa.sqrt()[:, None] * bb.sqrt()  # [La, Lb]
    return torch.where(scale > 0, ab / scale, 0.0).cpu()


# --- 3 Any nn.Module --------------------------------------------------------------------------------------------------


@contextmanager
def module_activations(model, names):
    """`with module_activations(model, ["layer1", "layer4"]) as run: acts = run(images)` for any nn.Module.

    run passes its arguments to the model in eval mode without gradients and returns clones of the outputs of the named
    modules (names as in model.named_modules()) in the order of `names`; of a tuple the first tensor, of a module that
    is called several times the last call. On leaving, hooks are removed and every module's training mode is restored.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise ValueError(f"no layer {', '.join(unknown)}; layers: {', '.join(name for name in modules if name)}")
    outputs = {}

    def keep(name):
        def hook(module, args, output):
            while not torch.is_tensor(output):  # a tuple, or a dict as Hugging Face models return
                output = next(iter(output.values() if isinstance(output, dict) else output))
            outputs[name] = output.detach().clone()  # clone: torchvision's next ReLU overwrites it in place

        return hook

    def run(*args, **kwargs):
        outputs.clear()
        with torch.no_grad():
            model(*args, **kwargs)
        missing = [name for name in names if name not in outputs]
        if missing:
            raise ValueError(f"the forward pass never calls {', '.join(missing)}")
        return [outputs[name] for name in names]  # `outputs` lets go of them at the next call, before its forward pass

    training = {module: module.training for module in modules.values()}
    hooks = [modules[name].register_forward_hook(keep(name)) for name in dict.fromkeys(names)]
    try:
        model.eval()
        yield run
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
        outputs.clear()


# --- 4 The co-adapted stretch -----------------------------------------------------------------------------------------


def coadapted_stretch(M):
    """Symmetric map [L, L] of consecutive layers -> (start, end), the first and last layer of the co-adapted stretch.

    The rule is ours: paper 000 marks "start and end of co-adaptation region" by eye (Fig. 10: BERT 8-11; Fig. 9: 4-5),
    and means "the later co-adaptation region" (App. C): early layers are alike in most networks. So the stretch starts
    in the deeper half. With t the mean CKA of neighbouring layers, a stretch s..e of two or more layers scores
        sum over its pairs i < j of (M[i, j] - t)
    so that pairs more alike than neighbours usually are speak for it, and others against: a compact bright square on
    the diagonal wins, however long. Ties go to the longer stretch, then to the later. Some stretch always wins: look.
    """
    M = torch.as_tensor(M, dtype=torch.float64)
    if M.dim() != 2 or M.shape[0] != M.shape[1] or len(M) < 2:
        raise ValueError(f"a co-adapted stretch needs a map of at least 2 x 2 layers, got {tuple(M.shape)}")
    if not torch.allclose(M, M.T, atol=1e-6):  # NaN fails here too
        raise ValueError("a co-adapted stretch needs a symmetric map (one network with itself) without NaN")
    gain = torch.triu(M - M.diagonal(1).mean(), 1)
    stretches = [(s, e) for s in range((len(M) - 1) // 2, len(M)) for e in range(s + 1, len(M))]
    return max(stretches, key=lambda c: (round(float(gain[c[0]:c[1] + 1, c[0]:c[1] + 1].sum()), 9), c[1] - c[0], c[1]))


# --- 5 Figures --------------------------------------------------------------------------------------------------------


def write(path, save):
    """save(temporary path), then rename: a kill at any moment leaves a whole file."""
    beside = Path(f"{path}.tmp")
    save(beside)
    os.replace(beside, path)


def new_axes(height, title=""):
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: a notebook keeps its own backend
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=7)  # names of run folders are long
    return figure, axes


def draw_map(M, path, names_a, names_b=None, stretch=None, targets=(), title=None):
    """Heatmap PNG of M [La, Lb], a upwards, b to the right: black crosses at the stretch, red ones at the targets."""
    figure, axes = new_axes(5.6, title or "")
    figure.colorbar(axes.imshow(np.asarray(M), origin="lower", cmap="viridis", vmin=0, vmax=1), label="CKA")
    for axis, names in ((axes.yaxis, names_a), (axes.xaxis, names_b or names_a)):
        ticks = range(0, len(names), -(-len(names) // 32))  # thinned to 32 at most
        axis.set_ticks(ticks, [names[i] for i in ticks], fontsize=7)
    axes.tick_params(axis="x", rotation=90)
    for cells, colour, size in ((targets, "red", 150), (stretch or (), "black", 50)):  # both show on one cell
        axes.scatter(cells, cells, marker="x", s=size, linewidths=2, color=colour)
    write(path, lambda beside: figure.savefig(beside, format="png", dpi=150))


def draw_lines(lines, path, names, ylabel):
    """Line plot PNG (paper 002, Fig. 3): `lines` is a list of (label, one value per layer)."""
    figure, axes = new_axes(4)
    for label, values in lines:
        axes.plot(values, marker="o", markersize=3, label=label)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_ylabel(ylabel)
    axes.legend()
    write(path, lambda beside: figure.savefig(beside, format="png", dpi=150))


# --- 6 Exported encoders and images -----------------------------------------------------------------------------------


class Encoder:
    """encoder.pt of a run folder: names of the layers kept, and run(images [B, 3, H, W] in 0..1) -> their outputs."""

    def __init__(self, path, device, args):
        if not Path(path).is_file():
            raise ValueError(f"no file {path}")
        extra = {"config.json": ""}
        try:
            with warnings.catch_warnings():  # deprecated since torch 2.11 but working: silence that
                warnings.filterwarnings("ignore", message=r".*torch\.jit\.load")
                self.model = torch.jit.load(path, map_location=device, _extra_files=extra).eval()
            config = json.loads(extra["config.json"])
            self.all, numbers, self.size = config["layers"], config["layer_numbers"], int(config["image_size"])
        except (RuntimeError, ValueError, KeyError, TypeError):
            if '"script": "simcse_deepaug"' in str(extra["config.json"]):
                raise ValueError(f"{path} takes sentences, not pictures; the map of its layers is the cka.png that "
                                 "simcse_deepaug.py drew beside it") from None
            raise ValueError(f"{path} is not an exported encoder (TorchScript with a config.json that names its "
                             "layers); the training scripts write one, encoder.pt, into the run folder") from None
        if not hasattr(self.model, "activations"):
            raise ValueError(f"{path} has no method activations(images), so its layers cannot be read")
        ending = ".odd" if args.odd else ".even" if args.even else ""
        self.names = [name for name in self.all if name.endswith(ending)]
        if args.numbered:
            self.names = sorted((name for name in self.all if name in numbers), key=numbers.get)
        if not self.names:
            raise ValueError(f"{path} has no such layer; its layers: {', '.join(self.all)}")
        self.labels = [f"layer {numbers[name]} ({name})" if name in numbers else name for name in self.names]
        augmented = str(config.get("flags", {}).get("layer", "none")).split("+")  # red crosses on the numbered map
        self.targets = [i for i, name in enumerate(self.names) if str(numbers.get(name)) in augmented]
        self.folder = Path(path).resolve().parent.name

    @torch.no_grad()
    def run(self, images):
        outputs = self.model.activations(images)
        if len(outputs) != len(self.all):
            raise ValueError(f"activations() gave {len(outputs)} outputs for {len(self.all)} names in config.json")
        outputs = dict(zip(self.all, outputs))
        return [outputs[name] for name in self.names]


def load_images(args, size):
    """-> (fetch: indices -> uint8 [B, 3, H, W], labels int64 [N] with -1 = none)."""
    root, labels = Path(args.data_dir), None
    if args.dataset == "samples":
        path = Path(args.enc_a).parent / "samples.npz"
        if not path.is_file():
            raise ValueError(f"no {path}; a run folder holds one, else choose --dataset cifar10, cifar100 or folder")
        try:
            with np.load(path) as file:
                images, labels = torch.from_numpy(file["images"]), file.get("labels")
            if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
                raise ValueError(f"images are {images.dtype} {list(images.shape)}, not uint8 [N, 3, H, W]")
        except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as problem:
            raise ValueError(f"{path} cannot be read: {problem}") from None
    elif args.dataset in ("cifar10", "cifar100"):
        from torchvision import datasets

        name = args.dataset.upper()
        try:
            data = getattr(datasets, name)(root, train=False)  # checks md5, downloads nothing
        except RuntimeError:
            raise ValueError(f"{name} is missing or damaged in {root}; to get it: python -c \"import torchvision; "
                             f"torchvision.datasets.{name}('{root}', download=True)\"") from None
        images, labels = torch.from_numpy(data.data).permute(0, 3, 1, 2), data.targets
    else:  # pictures stay on disk; the first folder below the root is the class, pictures right in the root have none
        from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader
        from torchvision.transforms import v2

        root = next((root / part for part in ("test", "val") if (root / part).is_dir()), root)
        files = sorted(file for file in root.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS)
        if not files:
            raise ValueError(f"no pictures in {root} (--data-dir), with or without class folders")
        classes = [file.relative_to(root).parts[0] if file.parent != root else "" for file in files]
        known = sorted({*classes} - {""})
        fit = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])

        def decode(i):
            try:
                return fit(default_loader(files[i]))
            except (OSError, SyntaxError) as problem:  # PIL raises either for a broken picture
                raise ValueError(f"{files[i]} cannot be read: {problem}") from None

        order = {name: i for i, name in enumerate(known)}
        labels = torch.tensor([order.get(name, -1) for name in classes])
        return lambda index: torch.stack([decode(i) for i in index.tolist()]), labels
    labels = torch.full([len(images)], -1) if labels is None else torch.as_tensor(labels).long()
    if len(labels) != len(images):
        raise ValueError(f"{len(images)} images but {len(labels)} labels in {args.dataset}")
    return lambda index: images[index], labels


def augmented(images, index, copy, seed):
    """SimCLR's recipe (SupContrast main_supcon.py:146) on each picture by itself, seeded by picture and copy."""
    from torchvision.transforms import v2

    recipe = v2.Compose([
        v2.RandomResizedCrop(images.shape[-1], scale=(0.2, 1)), v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8), v2.RandomGrayscale(0.2)])
    views = []
    with torch.random.fork_rng(devices=[]):
        for picture, i in zip(images, index.tolist()):
            torch.default_generator.manual_seed(seed * 2**32 + 2 * i + copy)  # so the batch size changes nothing
            views.append(recipe(picture))
    return torch.stack(views)


# --- main -------------------------------------------------------------------------------------------------------------


def measure(args):
    """What the command does: encoders and images -> map, table, PNG and JSON; returns what it measured."""
    start = time.time()
    if args.images < 4 or args.batch_size < 4:
        raise ValueError("--images and --batch-size must be at least 4: HSIC_1 is undefined for fewer images")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch finds no CUDA device; leave it out or take --device cpu")
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    encoders = [Encoder(path, device, args) for path in (args.enc_a, args.enc_b) if path]
    first, second = encoders[0], encoders[-1]
    if first.size != second.size:
        raise ValueError(f"ENC_A takes images of {first.size} pixels, ENC_B of {second.size}")
    kind = "augment" if args.augment else "classes" if args.classes else "across" if args.enc_b else "within"
    ending = {"within": "", "across": f"-{second.folder}"}.get(kind, f"-{kind}")
    out = Path(args.out) if args.out else Path(args.enc_a).parent / f"cka{ending}.png"
    if out.suffix != ".png":
        raise ValueError(f"--out {out} must end in .png (the numbers go into the .json of the same name)")
    out.parent.mkdir(parents=True, exist_ok=True)

    fetch, labels = load_images(args, first.size)
    usable = torch.arange(len(labels))
    if kind == "classes":
        usable, values = usable[labels >= 0], labels[labels >= 0].unique()
        if len(values) < 2:
            raise ValueError(f"--classes needs labels of at least two classes, the images of {args.dataset} have none")
    if len(usable) < 4:
        raise ValueError(f"{args.dataset} has {len(usable)} images to use, too few: HSIC_1 needs at least 4")
    order = usable[torch.randperm(len(usable), generator=torch.Generator().manual_seed(args.seed))[:args.images]]
    B = min(args.batch_size, len(order))
    batches = [index for index in order.split(B) if len(index) == B]
    print(f"{kind}: {B * len(batches)} images of {args.dataset} in {len(batches)} batches of {B}, on {device}")

    def images(index, copy=None):  # -> float32 [B, 3, size, size] in 0..1; copy 0 or 1: augmented
        x = fetch(index) if copy is None else augmented(fetch(index), index, copy, args.seed)
        x, shape = x.to(device).float() / 255, (first.size, first.size)
        return x if x.shape[-2:] == shape else F.interpolate(x, shape, mode="bilinear", antialias=True)

    def layers(a, b, index):  # -> the two sides of one batch
        if kind == "augment":
            return a.run(images(index, 0)), a.run(images(index, 1))
        x = images(index)
        acts = a.run(x)
        if kind == "classes":
            return acts, [(labels[index, None] == values).float().to(device)]  # one-hot [B, classes]
        return acts, acts if a is b else b.run(x)

    results = []
    for a, b in [(first, second)] if kind == "across" else [(encoder, encoder) for encoder in encoders]:
        with tqdm(total=len(batches), desc=kind, leave=False, disable=None) as bar:  # None: silent unless a terminal
            M = cka_map((layers(a, b, index) for index in batches), bar.update)
        stretch = list(coadapted_stretch(M)) if kind == "within" and len(M) > 1 else None
        results.append({"kind": kind, "run_a": a.folder, "run_b": b.folder, "map": M.tolist(), "names_a": a.names,
                        "names_b": ["classes"] if kind == "classes" else b.names, "stretch": stretch})
        summary(M, a, b, kind)
        if kind != "classes":
            path = out if a is first else out.with_name(f"{out.stem}-{a.folder}.png")
            draw_map(M, path, a.names, b.names, stretch, a.targets if args.numbered else (), title=f"{a.folder}\n{kind if a is b else b.folder}")
    if kind == "classes":
        draw_lines([(r["run_a"], np.ravel(r["map"])) for r in results], out, first.names, "CKA with the classes")
    if stretch:
        s, e = (first.labels[i] for i in stretch)
        print(f"co-adapted stretch: {s} to {e}\nwith stop-gradient target {s} (start), without {e} (end)")
    result = {**results[0], "images": B * len(batches), "seconds": round(time.time() - start, 2)}
    if len(results) == 2:
        result["second"] = results[1]
    write(out.with_suffix(".json"), lambda beside: beside.write_text(json.dumps(result, indent=1)))
    print(f"{result['seconds']} s; wrote {out} and {out.with_suffix('.json')}")
    return result


def summary(M, a, b, kind):
    """A line per layer. next: CKA with the layer after it; same, best: with the layer at the same place in b, with the
    most similar one (white dots of paper 002, Fig. 2); augment: with itself on the other copy; classes: with those."""
    width = max(map(len, [a.folder, *a.labels]))
    print(f"{a.folder:<{width}}  " + {"within": "next", "across": f"same   best of {b.folder}"}.get(kind, kind))
    for i, label in enumerate(a.labels):
        j = {"within": i + 1, "classes": 0}.get(kind, i)
        value = f"{M[i, j]:6.3f}" if j < M.shape[1] else "     -"
        best = f" {M[i].max():6.3f} {b.labels[int(M[i].argmax())]}" if kind == "across" else ""
        print(f"{label:<{width}} {value}{best}")


def main(argv=None):
    parser, args = settings(argv)
    try:
        return measure(args)
    except (ValueError, OSError) as problem:  # bad input: one line, exit code 2
        parser.error(problem)


if __name__ == "__main__":
    main()
