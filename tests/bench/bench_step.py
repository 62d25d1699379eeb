"""A whole training step, end to end: simclr_deepaug.py's way against the usual way on the same network.

    python tests/bench/bench_step.py [--arch small] [--batch-size 256] [--steps 10] [--repeats 3] [--quick]
    python tests/bench/bench_step.py --device cuda --arch resnet18 --batch-size 1024 --compile --sweep

ours      train_batches, two_views, Net in channels_last (bf16 autocast on CUDA), Deep Augmentation at layer 4, nt_xent,
          backward, fused SGD: the lines of train()'s loop
train()   the script's own function over the same number of steps, its log lines and one checkpoint included
usual     PIL pictures in DataLoader workers (bench_views.py), the same Net in NCHW without Deep Augmentation, float32
          (autocast on CUDA), the straightforward NT-Xent (bench_nt_xent.py), plain SGD, loss.item() every step

They alternate in one run. The workers of the usual way have more batches to make than are timed, and what is left is
worked off before ours is timed. On the CPU the target is 1.5 times. Milliseconds of the parts are printed on both
devices; on CUDA also the two ceilings of the machine (bf16 matrix product, copy), the share of the first that training
reaches, seconds for 50,000 pictures, the GPU's busy time, host syncs, time to the first step; --sweep: 256 to 8192.
"""
import time

BEGUN = time.perf_counter()                                             # before torch is imported

import argparse  # noqa: E402
import os  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import warnings  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench_nt_xent import straightforward  # noqa: E402
from bench_views import finish, header, usual_loader  # noqa: E402

import simclr_deepaug as S  # noqa: E402

PARTS = ("batch", "views", "forward", "loss", "backward", "optimizer")


class Clock:
    """Marks between the parts of a step: CUDA events (no waiting), or the host's clock on the CPU."""
    def __init__(self, device):
        self.cuda, self.steps = device.type == "cuda", []

    def mark(self):
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.steps[-1].append(event)
        else:
            self.steps[-1].append(time.perf_counter())

    def milliseconds(self):
        """{part: median over steps}."""
        if self.cuda:
            torch.cuda.synchronize()
        rows = [[a.elapsed_time(b) if self.cuda else 1000 * (b - a) for a, b in zip(s, s[1:])] for s in self.steps]
        return {part: statistics.median(column) for part, column in zip(PARTS, zip(*rows))}


class Ours:
    """Network, optimizer, batches as run() and train() make them; step() is the body of train()'s loop."""
    def __init__(self, split, flags, device, compiled=False, epoch_steps=0):
        self.a, self.split, self.device = S.settings(flags), split, device
        self.net = S.build(self.a, split, [], device).train()
        self.model = torch.compile(self.net) if compiled else self.net
        self.optimizer = torch.optim.SGD(self.net.parameters(), self.a.lr, momentum=0.9,
                                         weight_decay=self.a.weight_decay, fused=True)
        steps = epoch_steps or len(split) // self.a.batch_size
        self.batches, self.done = S.train_batches(split, self.a, device, 0, steps, 0, 1), 0

    def step(self, clock=None):
        def mark():
            if clock:
                clock.mark()
        if clock:
            clock.steps.append([])
        mark()
        torch.manual_seed(S.mix(self.a.seed, self.done, 0))
        images, _ = next(self.batches)
        mark()
        views = S.two_views(images, self.split, self.a)
        mark()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            z = self.model(views, S.draw_rows(len(images), self.a, self.device))
        mark()
        loss = S.nt_xent(*z.chunk(2), self.a.temperature)
        self.optimizer.zero_grad(set_to_none=True)
        mark()
        loss.backward()
        mark()
        self.optimizer.step()
        mark()
        self.done += 1
        return loss.detach()

    def rate(self, steps):
        """Images a second over so many steps."""
        finish(self.device)
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        finish(self.device)
        return steps * self.a.batch_size / (time.perf_counter() - start)


class Usual:
    def __init__(self, split, flags, device, steps, workers):
        self.device, self.batch = device, S.settings(flags).batch_size
        self.steps = max(steps, 4 * workers)                        # workers deliver in waves: time several of them
        self.net = S.build(S.settings([*flags, "--layer", "none"]), split, [], device)
        self.net.layers["input"] = nn.Identity()                    # the transforms normalise
        self.net = self.net.to(memory_format=torch.contiguous_format).train()
        self.optimizer = torch.optim.SGD(self.net.parameters(), 0.5, momentum=0.9, weight_decay=1e-4)
        self.warm = max(2, workers)                                 # steps before the clock starts
        total = self.warm + self.steps + 2 * workers + 1            # the last ones are in the making when it stops
        self.loader = usual_loader(split.images, total * self.batch, self.batch, workers)

    def rate(self):
        start = end = None
        for i, (first, second) in enumerate(self.loader):
            if i == self.warm:
                finish(self.device)
                start = time.perf_counter()
            if i == self.warm + self.steps:
                finish(self.device)
                end = time.perf_counter()
            if end is not None:
                continue                                            # only to let the workers come to rest
            x = torch.cat([first, second]).to(self.device, non_blocking=True)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                z = self.net(x)
            loss = straightforward(*z.float().chunk(2), 0.5)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss.item()                                             # for the progress line
        return self.steps * self.batch / (end - start)


def train_rate(split, flags, device, steps):
    """Images a second of the script's train(): from its first line to the checkpoint at its end."""
    a = S.settings([*flags, "--epochs", "1", "--warmup-epochs", "0"])
    net = S.build(a, split, [], device)
    finish(device)
    with tempfile.TemporaryDirectory() as out:
        report = S.train(a, net, split, Path(out), device, steps, None, None)
    return steps * a.batch_size / report["seconds"]


def flops_per_image(ours):
    """Floating-point operations of training on one picture: two views, forward counted, backward twice that."""
    x = torch.rand(2, 3, ours.split.size, ours.split.size, device=ours.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ours.net.features(x.contiguous(memory_format=torch.channels_last))
    return 3 * counter.get_total_flops()                            # the two rows of x are the two views


def median_ms(work, repeats=10):
    """Milliseconds of work() on the GPU, median."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def ceilings():
    """(bf16 matrix rate in FLOP/s, copy rate in bytes/s read and written) on random data."""
    x, y = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    rate = 2 * 8192**3 / median_ms(lambda: x @ y) * 1000
    source = torch.randint(0, 2**31, (2**29,), device="cuda", dtype=torch.int32)              # 2 GiB
    target = torch.empty_like(source)
    return rate, 2 * source.numel() * 4 / median_ms(lambda: target.copy_(source)) * 1000


def host_syncs(ours, steps):
    """[(file, line)] of every wait for the GPU in so many steps; epochs end among them."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(steps):
                ours.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [(Path(w.filename).name, w.lineno) for w in caught if "called a synchroniz" in str(w.message)]


def busy(ours, steps=5):
    """(milliseconds a step that kernels and copies run, the ten longest by name), from the profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            ours.step()
        torch.cuda.synchronize()
    kernels = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            kernels[event.name] = kernels.get(event.name, 0) + event.time_range.elapsed_us() / 1000 / steps
    return sum(kernels.values()), sorted(kernels.items(), key=lambda k: -k[1])[:10]


def report_parts(name, ours, steps):
    clock = Clock(ours.device)
    for _ in range(steps):
        ours.step(clock)
    parts = clock.milliseconds()
    print(f"{name}: ms a step " + ", ".join(f"{k} {v:.2f}" for k, v in parts.items())
          + f"; sum {sum(parts.values()):.2f}")
    return parts


def report_cuda(name, ours, rate, matrix_rate, profile):
    flops = flops_per_image(ours)
    share, step_ms = rate * flops / matrix_rate, 1000 * ours.a.batch_size / rate
    print(f"{name}: {flops / 1e9:.2f} GFLOP a picture (2 views, forward and backward), {rate * flops / 1e12:.0f} "
          f"TFLOP/s = {100 * share:.1f} % of the matrix rate; {50_000 / rate:.2f} s for 50,000 pictures")
    syncs = host_syncs(ours, 10)
    print(f"{name}: host syncs in 10 steps, epochs of 4: {len(syncs)}" + (f" at {sorted(set(syncs))}" if syncs else ""))
    busy_ms, longest = busy(ours)
    print(f"{name}: kernels run {busy_ms:.2f} of {step_ms:.2f} ms a step ({100 * busy_ms / step_ms:.0f} %)")
    z = torch.randn(2, ours.a.batch_size, 128, device=ours.device)
    print(f"one log line (every {ours.a.log_every} steps): meters {median_ms(lambda: S.meters(*z)):.2f} ms")
    if profile:
        for kernel, ms in longest:
            print(f"    {ms:8.3f} ms  {kernel[:100]}")
    return {"share": share, "syncs": len(syncs), "busy": busy_ms / step_ms}


def sweep(split, flags, device):
    """Time and memory (the data set's included) as the batch grows, eager; NT-Xent's part of it."""
    print(f"\n{'batch':>6}{'ms a step':>11}{'images/s':>10}{'loss ms':>9}{'peak GiB':>10}")
    for batch in (256, 512, 1024, 2048, 4096, 8192):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        ours = Ours(split, [*flags, "--batch-size", str(batch)], device)
        ours.rate(4)
        rate = statistics.median(ours.rate(max(4, 20_480 // batch)) for _ in range(3))
        z = torch.randn(2, batch, 128, device=device, requires_grad=True)
        loss_ms = median_ms(lambda z=z: S.nt_xent(z[0], z[1], 0.5).backward())
        print(f"{batch:6}{1000 * batch / rate:11.2f}{rate:10.0f}{loss_ms:9.3f}"
              f"{torch.cuda.max_memory_allocated() / 2**30:10.2f}")
        del ours


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--arch", choices=["small", "resnet18", "resnet34", "resnet50"], default="small")
    p.add_argument("--batch-size", type=int, default=256)
    p.add_argument("--steps", type=int, default=10, help="of one timed segment")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--workers", type=int, default=0, help="of the usual way; 0: 2 on the CPU, all cores beside a GPU")
    p.add_argument("--compile", action="store_true", help="ours compiled, too")
    p.add_argument("--sweep", action="store_true", help="CUDA: batch sizes from 256 to 8192, time and memory, eager")
    p.add_argument("--profile", action="store_true", help="CUDA: name the longest kernels")
    p.add_argument("--quick", action="store_true", help="a few seconds: does it run?")
    args = p.parse_args(argv)
    if args.quick:
        args.batch_size, args.steps, args.repeats, args.workers = 32, 2, 1, 1
    device, cuda = torch.device(args.device), args.device == "cuda"
    torch.backends.cudnn.benchmark = True                           # as run() sets it
    workers = args.workers or (os.cpu_count() if cuda else 2)
    images, labels = S.draw_shapes(50_000 if cuda else max(2048, (args.steps + 4) * args.batch_size), 0, device)
    split = S.Split(labels, 32, images=images)
    flags = ["--arch", args.arch, "--device", args.device]
    sized = [*flags, "--batch-size", str(args.batch_size)]
    header(device, arch=args.arch, batch=args.batch_size, steps=args.steps, repeats=args.repeats, workers=workers)

    ways = {"ours, eager": Ours(split, sized, device, epoch_steps=4)}
    ways["ours, eager"].step()
    finish(device)
    print(f"start-up to the end of the first step: {time.perf_counter() - BEGUN:.1f} s")
    if args.compile:
        ways["ours, compiled"] = Ours(split, sized, device, True, epoch_steps=4)
        start = time.perf_counter()
        ways["ours, compiled"].step()
        finish(device)
        print(f"the first compiled step took {time.perf_counter() - start:.1f} s")
    usual = Usual(split, sized, device, args.steps, workers)
    rates = {name: [] for name in [*ways, "train(), eager", "usual"]}
    for way in ways.values():
        way.rate(2)
    for _ in range(args.repeats):
        for name, way in ways.items():
            rates[name].append(way.rate(args.steps * (5 if cuda else 1)))
        rates["train(), eager"].append(train_rate(split, sized, device, args.steps * (5 if cuda else 1)))
        rates["usual"].append(usual.rate())

    print(f"\n{'images/s, two views each':28}{'median':>9}{'lowest':>9}{'highest':>9}{'/ usual':>9}")
    medians = {name: statistics.median(r) for name, r in rates.items()}
    ratios = {name: statistics.median(x / u for x, u in zip(r, rates["usual"])) for name, r in rates.items()}
    for name, r in rates.items():
        print(f"{name:28}{medians[name]:9.0f}{min(r):9.0f}{max(r):9.0f}{ratios[name]:9.2f}")
    print(f"target on the CPU: ours at least 1.5 times the usual way{'; beside a GPU 8 times' if cuda else ''}\n")
    result = {"rates": medians, "ratios": ratios}
    for name, way in ways.items():
        result[name] = report_parts(name, way, max(args.steps, 5))
    if cuda:
        matrix_rate, copy_rate = ceilings()
        print(f"ceilings: bf16 matrix product {matrix_rate / 1e12:.0f} TFLOP/s, "
              f"copy {copy_rate / 1e9:.0f} GB/s read + written")
        for name, way in ways.items():
            result[name].update(report_cuda(name, way, medians[name], matrix_rate, args.profile))
        if args.sweep:
            sweep(split, flags, device)
    return result


if __name__ == "__main__":
    main()
