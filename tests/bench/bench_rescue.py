"""topk_rescue.py: what the rescue costs over its base step, and each base step against the usual loop.

    python tests/bench/bench_rescue.py [--device cpu|cuda] [--methods simclr mocov3 dinov2] [--repeats 5] [--quick]

base     a step of `Rescue` with k = 0, backward and optimizer; rescue: the same with k = N / 64 (target: at most 1.1
         times base; k / N of one more view would be 1.01)
usual    the published style, as in lightly's examples: torchvision's transforms on one PIL picture at a time in
         DataLoader workers (two on a CPU), then the plain modules on the very same networks: every view or crop in a
         pass of its own, the momentum update as a loop over parameters, the mask-and-log-softmax NT-Xent,
         loss.item() every step (target: ours at least 1.5 times)

They alternate in one run, at equal batch. How near a step is to the hardware's limit: bench_train.py.
"""
import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms as T

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench_nt_xent import straightforward  # noqa: E402
from bench_views import MEAN, STD, finish, header, pictures  # noqa: E402

import topk_rescue as R  # noqa: E402


class Ours:
    """One step as train() makes it, with rescue or without."""
    def __init__(self, a, split, device):
        self.a, self.device = a, device
        self.model = R.build(a, split, device).train()
        self.method = self.model.method
        groups = R.parameter_groups(a, self.method)
        self.optimizer = torch.optim.AdamW(groups, a.lr, fused=True) if a.optimizer == "adamw" else \
            torch.optim.SGD(groups, a.lr, momentum=0.9, fused=True)
        self.batches = R.train_batches(split, a, device, 0, len(split) // a.batch_size, 0, 1)

    def step(self):
        images, _ = next(self.batches)
        if self.method.updates == "before":
            self.method.update_target(0.1)
        loss = self.model(images, 0.1)[0]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.a.method == "dinov2":
            torch.nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], 3.0)
        self.optimizer.step()
        if self.method.updates == "after":
            self.method.update_target(0.1)


class Crops(torch.utils.data.Dataset):
    """Picture i of uint8 [N, 3, 32, 32] as a list of crops, each transformed by itself."""
    def __init__(self, images, n, a, local_size):
        self.array, self.n = images.cpu().permute(0, 2, 3, 1).contiguous().numpy(), n
        jitter, end = T.RandomApply([T.ColorJitter(*a.jitter)], p=0.8), [T.RandomGrayscale(p=0.2), T.ToTensor(),
                                                                         T.Normalize(MEAN, STD)]
        common = T.Compose([T.RandomResizedCrop(32, (a.crop_min, 1.0)), T.RandomHorizontalFlip(), jitter, *end])
        local = T.Compose([T.RandomResizedCrop(local_size, (0.05, a.crop_min)), T.RandomHorizontalFlip(), jitter, *end])
        self.transforms = [common] * 2 + [local] * (a.local_crops if a.method == "dinov2" else 0)

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        picture = Image.fromarray(self.array[i % len(self.array)])
        return [transform(picture) for transform in self.transforms]


class Usual:
    """The published-style loop over the same networks. Ours to write: only its cost matters, tests compare losses."""
    def __init__(self, a, split, device, batches, workers):
        model = R.build(a, split, device).train()
        self.a, self.device, self.model, self.method = a, device, model, model.method
        self.method.online.normalize = torch.nn.Identity()           # the loader has normalised
        if hasattr(self.method, "target"):
            self.method.target.normalize = torch.nn.Identity()
        trained = [p for p in self.method.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, a.lr) if a.optimizer == "adamw" else \
            torch.optim.SGD(trained, a.lr, momentum=0.9)
        loader = torch.utils.data.DataLoader(
            Crops(split.images, (batches + 2 * workers + 2) * a.batch_size, a, model.a.local_size), a.batch_size,
            shuffle=True, num_workers=workers, drop_last=True, pin_memory=device.type == "cuda")
        self.batches = iter(loader)

    @torch.no_grad()
    def momentum_update(self):
        for old, new in zip(self.method.target.parameters(), self.method.online.parameters()):
            old.data = old.data * 0.99 + new.data * 0.01

    def loss(self, a, b, local):
        m, t = self.method, self.a.temperature
        if self.a.method == "simclr":
            return straightforward(m.online(a)[1], m.online(b)[1], t)
        self.momentum_update()
        if self.a.method == "mocov3":
            queries = [m.predictor(m.online(x)[1]) for x in (a, b)]
            with torch.no_grad():
                keys = [m.target(x)[1] for x in (a, b)]
            total = 0
            for q, k in zip(queries, reversed(keys)):
                logits = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / t
                total = total + F.cross_entropy(logits, torch.arange(len(q), device=self.device)) * 2 * t
            return total
        n, side = len(a), a.shape[-1] // self.model.a.patch
        mask, places, weights = R.draw_masks(2 * n, side, self.device)
        with torch.no_grad():
            seen = [m.target(x) for x in (a, b)]
            targets = [m.cls_targets(m.target_prototypes(F.normalize(z, dim=1)), 0.05) for _, z, _ in seen]
            patches = m.target.projector(torch.cat([p for *_, p in seen]).flatten(0, 1)[places])
            patch_targets = m.patch_targets(m.target_prototypes(F.normalize(patches, dim=1)), 0.05)
        out = [m.online(x, part) for x, part in zip((a, b), mask.chunk(2))] + [m.online(x) for x in local]
        logits = [m.prototypes(F.normalize(z, dim=1)) for _, z, _ in out]
        total, pairs = 0, 0
        for i, target in enumerate(targets):
            for j, logit in enumerate(logits):
                if i != j:
                    total, pairs = total - (target * F.log_softmax(logit / t, 1)).sum(1).mean(), pairs + 1
        masked = m.online.projector(torch.cat([p for *_, p in out[:2]]).flatten(0, 1)[places])
        masked = F.log_softmax(m.prototypes(F.normalize(masked, dim=1)) / t, 1)
        ibot = -((patch_targets * masked).sum(1) * weights).sum() / (2 * n)
        return total / pairs + ibot + 0.1 * sum(R.koleo(h) for h, *_ in out[:2])

    def step(self):
        a, b, *local = [x.to(self.device, non_blocking=True) for x in next(self.batches)]
        with R.low_precision(a):                                     # bf16 autocast on CUDA, as ours
            loss = self.loss(a, b, local)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        loss.item()


def seconds(runner, steps, device):
    finish(device)
    start = time.perf_counter()
    for _ in range(steps):
        runner.step()
    finish(device)
    return (time.perf_counter() - start) / steps


def bench(method, split, args, device):
    words = ["--method", method, "--no-baseline", "--batch-size", str(args.batch_size), *args.flags]
    base = Ours(R.settings([*words, "--rescue", "none"]), split, device)
    rescue = Ours(R.settings(words), split, device)
    deep = Ours(R.settings([*words, "--strong", "deepaug"]), split, device)
    for runner in (base, rescue, deep):
        seconds(runner, 2, device)
    times = [[seconds(r, args.steps, device) for r in (base, rescue, deep)] for _ in range(args.repeats)]
    mid = [statistics.median(column) for column in zip(*times)]
    ratio = [statistics.median(row[i] / row[0] for row in times) for i in (1, 2)]
    print(f"{method:7} base step {1000 * mid[0]:7.1f} ms, {args.batch_size / mid[0]:7.0f} images/s; with rescue, "
          f"k = {rescue.a.k}: {1000 * mid[1]:7.1f} ms, {ratio[0]:.3f} x (target 1.1); deepaug {ratio[1]:.3f} x")
    workers = 2 if device.type == "cpu" else args.workers
    usual = Usual(copy.copy(base.a), split, device, args.steps * args.repeats, workers)
    for _ in range(workers + 1):
        usual.step()                                                 # all workers are at work
    ours, theirs = [], []
    for _ in range(args.repeats):
        theirs.append(seconds(usual, args.steps, device))
    del usual
    for _ in range(args.repeats):
        ours.append(seconds(base, args.steps, device))
    print(f"        usual loop {1000 * statistics.median(theirs):7.1f} ms, "
          f"{args.batch_size / statistics.median(theirs):7.0f} images/s: "
          f"ours {statistics.median(theirs) / statistics.median(ours):.2f} x (target 1.5)")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cpu")
    p.add_argument("--data-dir", default="data")
    p.add_argument("--methods", nargs="+", default=["simclr", "mocov3", "dinov2"])
    p.add_argument("--batch-size", type=int, default=256)
    p.add_argument("--steps", type=int, default=8)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--workers", type=int, default=16, help="of the usual loop, beside a GPU")
    p.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="more flags of topk_rescue.py, at the end")
    p.add_argument("--quick", action="store_true", help="seconds, only to see that it runs")
    args = p.parse_args()
    if args.quick:
        args.batch_size, args.steps, args.repeats = 64, 1, 2
    device = torch.device(args.device)
    images, name = pictures(args, device)
    header(device, data=name, batch=args.batch_size, steps=args.steps, repeats=args.repeats)
    for method in args.methods:
        bench(method, R.Split(None, 32, images=images), args, device)
