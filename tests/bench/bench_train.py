"""How near to the hardware's limit the four scripts train: their own train(), measured from outside.

    python tests/bench/bench_train.py [--device cuda] [--rows simclr dinov2 ...] [--compile] [--profile] [--quick]
    python tests/bench/bench_train.py --sweep                     # SimCLR, batches of 256 to 8192: time and memory
    python tests/bench/bench_train.py --start-up                  # seconds from `python SCRIPT` to its first step
    python tests/bench/bench_train.py --count --ceilings 788 4300 # no GPU: operations, bytes, the floor they set

Every row is a script's main(), at the papers' sizes (on the CPU, but for --count, the default run's network), up to
train(), which then runs with those very arguments a few times: once alone for the speed; once with marks before and
after views, forward, backward, optimizer (CUDA events, no waiting; "loss" is what Rescue.forward or the loss functions
do, "rest" what lies between); on CUDA once more for the host syncs of the steps that don't log (must be none) and the
profiler's sum of kernels. First the two ceilings of the machine: a large matrix product (bf16 on CUDA, float32 on the
CPU) and a large copy. "of rate": the operations of all matrix products and convolutions of a step, over its time, over
the first ceiling.

"floor": the sum over all operators of a step, as dispatched eagerly, of the longer of operations / matrix rate and
bytes / copy rate, each input read once and each output written once. Eager code can hardly be faster (only what stays
in the L2 cache moves at another rate), fused code can.
--compile adds a row compiled and on CUDA one compiled with CUDA graphs (mode "reduce-overhead": worth it where kernels
fill much less than the step). --count takes operations, bytes and the number of operators, each at least one launch,
from a run on the CPU under bf16 autocast at two small batches and extrapolates them to the row's batch.
"""
import argparse
import contextlib
import functools
import importlib
import inspect
import io
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
import torch._dynamo.eval_frame
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(ROOT))
from bench_views import finish, header  # noqa: E402

# Real sentences where they lie, else the grammar's
TEXT = next((["--train-file", str(f)] for f in [ROOT / "data/text/wiki1m_first11914.txt"] if f.exists()), [])
# row: (script, flags: the papers' sizes on drawn pictures, flags on the CPU)
ROWS = {
    "simclr": ("simclr_deepaug", "--views simclr --layer 4 --arch resnet18 --batch-size 1024",
               "--views simclr --layer 4 --batch-size 64"),
    "simcse": ("simcse_deepaug", "--width 768 --vocab-size 30522 --layer 8 --stop-grad --eval-every 0",
               "--layer 8 --eval-every 0"),
    "simcse+mlm": ("simcse_deepaug", "--width 768 --vocab-size 30522 --layer 8 --stop-grad --mlm --eval-every 0",
                   "--layer 8 --mlm --eval-every 0"),
    "vicreg": ("vicreg_probe", "--arch RES-5-250 --projector 2048 2048 --batch-size 256 --target-net none",
               "--batch-size 64 --target-net none"),
    "rescue": ("topk_rescue", "--preset cifar --dataset shapes --rescue topk", "--rescue topk"),
    "mocov3": ("topk_rescue", "--preset cifar --dataset shapes --rescue topk --method mocov3",
               "--method mocov3 --rescue topk"),
    "dinov2": ("topk_rescue", "--preset cifar --dataset shapes --rescue topk --method dinov2",
               "--method dinov2 --rescue topk --batch-size 32"),
}
# the functions whose time is counted under these names, where a script has them
SPANS = {"views": ("two_views", "views_of", "draw_masks", "strong_views", "mask_tokens"),
         "loss": ("nt_xent", "losses", "simcse_loss", "mlm_loss")}
PARTS = ("batch", "views", "forward", "loss", "backward", "optimizer", "rest")
SMALL = 32, 64                                                      # batches of --count


# ---------------------------------------------------------------------------------------------------- what is measured

def median_seconds(work, device, repeats=10):
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        finish(device)
        start = time.perf_counter()
        work()
        finish(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def ceilings(device, quick=False):
    """(FLOP/s of a matrix product, bytes/s read and written by a copy), both large and on random data."""
    cuda = device.type == "cuda"
    n, dtype = (8192, torch.bfloat16) if cuda else (512 if quick else 2048, torch.float32)
    x, y = torch.randn(2, n, n, device=device, dtype=dtype)
    rate = 2 * n ** 3 / median_seconds(lambda: x @ y, device)
    source = torch.randint(0, 2 ** 31, (2 ** 29 if cuda else 2 ** 22 if quick else 2 ** 26,), device=device,
                           dtype=torch.int32)                                                 # 2 GiB, 256 MiB
    target = torch.empty_like(source)
    return rate, 2 * source.numel() * 4 / median_seconds(lambda: target.copy_(source), device)


class Work(TorchDispatchMode):
    """rows: (operator, FLOPs, bytes) of every operator that computes or copies, forward and backward."""
    NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._overloadpacket.__name__
        if not func.is_view and name not in self.NOTHING:
            tensors = {id(t): t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)}
            moved = sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors.values())
            count = flop_registry.get(func._overloadpacket)
            self.rows.append((name, count(*args, **kwargs, out_val=out) if count else 0, moved))
        return out


def floor_seconds(rows, matrix_rate, copy_rate):
    return sum(max(flops / matrix_rate, moved / copy_rate) for _, flops, moved in rows)


class Marks:
    """Time by part: every stretch between two marks belongs to the innermost open span."""
    def __init__(self, device):
        self.cuda, self.marks = device.type == "cuda", []

    def mark(self, name):                                           # None: the innermost span ends
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        else:
            event = time.perf_counter()
        self.marks.append((name, event))

    def around(self, name, function):
        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            self.mark(name)
            try:
                return function(*args, **kwargs)
            finally:
                self.mark(None)
        return wrapped

    def batches(self, function):
        """train_batches with a span around every next()."""
        def wrapped(*args, **kwargs):
            batches = function(*args, **kwargs)
            return (batch for batch in iter(self.around("batch", functools.partial(next, batches, None)), None))
        return wrapped

    def milliseconds(self, steps):
        """{part: a step's mean}."""
        if self.cuda:
            torch.cuda.synchronize()
        total, open_spans = dict.fromkeys(PARTS, 0.0), []
        for (name, start), (_, end) in itertools.pairwise(self.marks):
            open_spans.append(name) if name else open_spans and open_spans.pop()
            inner = open_spans[-1] if open_spans else "rest"
            total[inner] += (start.elapsed_time(end) if self.cuda else 1000 * (end - start)) / steps
        return total


# ------------------------------------------------------------------------------------------------- a script's train()

@contextlib.contextmanager
def progress_hidden():
    """No progress bars; but what a script says before it leaves with code 2 is shown."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit:
        print(said.getvalue().replace("\r", "\n").strip().splitlines()[-1])
        raise


class Enough(Exception):
    """main() has come to train(), or train() to the last step that is asked for."""


class Training:
    """The train() of a script, with the arguments that main(flags) calls it with."""
    def __init__(self, row, device, more=(), small=False):
        script, large_flags, small_flags = ROWS[row]
        words = (small_flags if small else large_flags).split()
        words += TEXT if script == "simcse_deepaug" and not small else []
        self.module, self.device = importlib.import_module(script), device
        self.train, self.folder = self.module.train, tempfile.TemporaryDirectory()

        def caught(*args):
            self.bound = inspect.signature(self.train).bind(*args)
            raise Enough
        with progress_hidden(), mock.patch.object(self.module, "train", caught), \
                contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Enough):
            self.module.main([*words, *more, "--device", device.type, "--out", f"{self.folder.name}/run"])
        arguments = self.bound.arguments
        self.a = arguments["a"]
        self.a.epochs = 10 ** 6                                     # on_step says when it is enough
        self.a.probe_epochs = []
        arguments["measure"] = lambda *_: {}  # training alone is measured

    def run(self, on_step, compiled=""):
        """Train until on_step(number of steps done) raises Enough."""
        done = itertools.count(1)
        hook = register_optimizer_step_post_hook(lambda *_: on_step(next(done)))
        self.a.compile = bool(compiled)
        compile_, module_compile = torch.compile, nn.Module.compile
        mode = {"mode": "reduce-overhead"} if compiled == "graphs" else {}
        try:
            with progress_hidden(), contextlib.suppress(Enough), \
                    mock.patch.object(torch, "compile", lambda *a, **k: compile_(*a, **{**k, **mode})), \
                    mock.patch.object(nn.Module, "compile", lambda *a, **k: module_compile(*a, **{**k, **mode})):
                self.train(*self.bound.args, **self.bound.kwargs)
        finally:
            hook.remove()

    def speed(self, steps, repeats, compiled=""):
        """Pictures (sentences) a second in each of `repeats` stretches of so many steps, log lines included."""
        times = []

        def on_step(done):
            if done % steps == 0:
                finish(self.device)
                times.append(time.perf_counter())
            if done == steps * (repeats + 1):                       # the first stretch warms up
                raise Enough
        self.run(on_step, compiled)
        return [self.a.batch_size * steps / (end - start) for start, end in itertools.pairwise(times)]

    @contextlib.contextmanager
    def marked(self, marks, compiled):
        """The script's functions with marks around them."""
        module, rescue = self.module, getattr(self.module, "Rescue", None)
        # what is called in a step: the network; compiled as a whole, its wrapper (torch.compile must not see the marks)
        network = module.Net if rescue or not compiled else torch._dynamo.eval_frame.OptimizedModule
        spans = [(module, f, name) for name, functions in SPANS.items() for f in functions if hasattr(module, f)]
        spans += [(network, "__call__", "forward"), (torch.Tensor, "backward", "backward")]
        spans += [(rescue, "forward", "loss")] if rescue else []    # views and networks inside have their own
        with contextlib.ExitStack() as stack:
            stack.callback(register_optimizer_step_pre_hook(lambda *_: marks.mark("optimizer")).remove)
            stack.callback(register_optimizer_step_post_hook(lambda *_: marks.mark(None)).remove)
            for owner, function, name in spans:
                stack.enter_context(mock.patch.object(owner, function, marks.around(name, getattr(owner, function))))
            stack.enter_context(mock.patch.object(module, "train_batches", marks.batches(module.train_batches)))
            yield

    def parts(self, steps, compiled=""):
        """{part: milliseconds of a step}, after as many to warm up."""
        marks = Marks(self.device)

        def on_step(done):
            if done == steps:
                marks.marks.clear()
                marks.mark(None)
            if done == 2 * steps:
                raise Enough
        with self.marked(marks, compiled):
            self.run(on_step, compiled)
        return marks.milliseconds(steps)

    def syncs_and_kernels(self, warm, compiled="", steps=5):
        """([(file, line) of every wait for the GPU in so many steps without a log line], milliseconds a step in which
        kernels run, [(kernel, milliseconds a step)], the longest first)."""
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        profile = torch.profiler.profile(activities=activities)

        def on_step(done):
            if done == warm:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("warn")
            elif done == warm + steps:
                torch.cuda.set_sync_debug_mode("default")
                torch.cuda.synchronize()
                profile.start()
            elif done == warm + 2 * steps:
                torch.cuda.synchronize()
                profile.stop()
                raise Enough
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.run(on_step, compiled)
        syncs = [(Path(w.filename).name, w.lineno) for w in caught if "called a synchroniz" in str(w.message)]
        kernels = {}
        for event in profile.events():
            if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
                kernels[event.name] = kernels.get(event.name, 0) + event.time_range.elapsed_us() / 1000 / steps
        return syncs, sum(kernels.values()), sorted(kernels.items(), key=lambda k: -k[1])

    def work(self):
        """[(operator, FLOPs, bytes)] of one step, the second."""
        work = Work()

        def on_step(done):
            if done == 2:
                raise Enough
            work.rows.clear()
        with work:
            self.run(on_step)
        return work.rows


def counted(row, args):
    """(batch, FLOPs, bytes, {operator: seconds of the floor}, operators) of a step under bf16 autocast, from two small
    batches on the CPU: each is a + b * batch, but for NT-Xent's small square and the number of operators, which is
    that of the larger batch."""
    real, sums, rates = torch.autocast, [], (1e12 * args.ceilings[0], 1e9 * args.ceilings[1])

    def always(device_type, dtype=None, enabled=True):              # train() asks for it on CUDA alone
        return real(device_type, dtype=dtype, enabled=enabled or dtype is torch.bfloat16)
    with mock.patch.object(torch, "autocast", always):
        for batch in SMALL:
            rows = Training(row, torch.device("cpu"), ["--batch-size", str(batch)], args.quick).work()
            floor = Counter()
            for r in rows:
                floor[r[0]] += floor_seconds([r], *rates)
            sums.append((sum(r[1] for r in rows), sum(r[2] for r in rows), floor))
    batch = Training(row, torch.device("cpu"), small=args.quick).a.batch_size

    def grown(x, y):
        return x + (y - x) * (batch - SMALL[0]) / (SMALL[1] - SMALL[0])
    (flops, moved, floor), (flops2, moved2, floor2) = sums
    return batch, grown(flops, flops2), grown(moved, moved2), {k: grown(floor[k], floor2[k]) for k in floor2}, len(rows)


def first_step(row, device, small):
    """Seconds from `python SCRIPT FLAGS` to the end of its first step, where it is ended."""
    script, large_flags, small_flags = ROWS[row]
    with tempfile.TemporaryDirectory() as folder:
        flags = (small_flags if small else large_flags).split()
        if script == "vicreg_probe":                                # it probes before the first step: here a little
            flags += "--sample-level 0 0 0 --mine-steps 0 --probes ncc --probe-images 500".split()
        end = f"""if 1:
            import os, sys, torch, {script}
            from torch.optim.optimizer import register_optimizer_step_post_hook
            def leave(*_):
                if torch.cuda.is_initialized():
                    torch.cuda.synchronize()
                os._exit(0)
            register_optimizer_step_post_hook(leave)
            {script}.main(sys.argv[1:])"""
        words = [sys.executable, "-c", end, *flags, "--device", device.type]
        start = time.perf_counter()
        subprocess.run([*words, "--out", f"{folder}/run"], cwd=ROOT, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL, check=True)
        return time.perf_counter() - start


# ---------------------------------------------------------------------------------------------------------- the tables

def report(row, training, limits, args, compiled=""):
    """Measure one row, print it, return it."""
    cuda = training.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch._dynamo.reset()
    rates = training.speed(args.steps, args.repeats, compiled)
    rate, batch = statistics.median(rates), training.a.batch_size
    r = {"rate": rate, "ms": 1000 * batch / rate, "parts": training.parts(args.steps, compiled)}
    if cuda:
        r["GiB"] = torch.cuda.max_memory_allocated() / 2 ** 30
        warm = min(args.steps, 30)  # simclr logs, which waits, at step 50
        r["syncs"], r["kernels"], longest = training.syncs_and_kernels(warm, compiled)
    if not compiled:
        rows = training.work()
        training.flops, training.floor = sum(x[1] for x in rows), 1000 * floor_seconds(rows, *limits)
    r["share"] = training.flops / (r["ms"] / 1000) / limits[0]
    print(f"{row:12}{compiled or 'eager':9}{batch:6}{rate:10.0f}{min(rates):9.0f}{max(rates):9.0f}{r['ms']:9.2f}"
          + "".join(f"{r['parts'][p]:8.2f}" for p in PARTS)
          + f"{training.flops / 1e9:9.0f}{100 * r['share']:7.1f}%{training.floor:8.2f}"
          + (f"{r['kernels']:9.2f}{len(r['syncs']):6}{r['GiB']:7.2f}" if cuda else ""), flush=True)
    if cuda and r["syncs"]:
        print(f"    waits for the GPU at {sorted(set(r['syncs']))}")
    if cuda and args.profile:
        for kernel, ms in longest[:12]:
            print(f"    {ms:8.3f} ms  {kernel[:100]}")
    return r


@contextlib.contextmanager
def survived(row, compiled):
    """One row must not cost the others: what ends it is told, and lies in the list given."""
    ended = []
    try:
        yield ended
    except (Exception, SystemExit) as e:
        ended.append(e)
        print(f"{row:12}{compiled:9} failed: {type(e).__name__}: {' '.join(str(e).split())[:300]}", flush=True)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    p.add_argument("--steps", type=int, default=20, help="of one timed stretch")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--compile", action="store_true", help="compiled, too, and on CUDA compiled with CUDA graphs")
    p.add_argument("--profile", action="store_true", help="name the longest kernels; with --count: operators")
    p.add_argument("--sweep", action="store_true", help="only SimCLR, batches of 256 to 8192")
    p.add_argument("--start-up", action="store_true", help="only the seconds to the first step")
    p.add_argument("--count", action="store_true", help="only operations, bytes and floor, counted on the CPU")
    p.add_argument("--ceilings", type=float, nargs=2, default=[788, 4300], metavar=("TFLOP/s", "GB/s"),
                   help="for --count: those measured on an H200")
    p.add_argument("--quick", action="store_true", help="few steps, for --count small networks: does it run?")
    args = p.parse_args(argv)
    if args.quick:
        args.steps, args.repeats = 2, 1
    device, results, failed = torch.device(args.device), {}, False
    args.small = args.quick or args.device == "cpu"
    torch.manual_seed(0)

    if args.start_up:
        header(device)
        for row in args.rows:
            with survived(row, "") as ended:
                results[row] = first_step(row, device, args.small)
                print(f"{row:12} first step after {results[row]:5.1f} s (target 20)", flush=True)
            failed |= ended != []
        if failed:
            raise SystemExit(1)
        return results
    if args.count:
        header(device, matrix_rate=f"{args.ceilings[0]:.0f} TFLOP/s", copy=f"{args.ceilings[1]:.0f} GB/s")
        print(f"{'row':12}{'batch':>6}{'GFLOP':>9}{'GB':>8}{'floor ms':>10}{'images/s':>10}{'of rate':>9} at most"
              f"{'operators':>11}")
        for row in args.rows:
            batch, flops, moved, by_operator, operators = results[row] = counted(row, args)
            floor = sum(by_operator.values())
            print(f"{row:12}{batch:6}{flops / 1e9:9.0f}{moved / 1e9:8.2f}{1000 * floor:10.2f}{batch / floor:10.0f}"
                  f"{100 * flops / floor / args.ceilings[0] / 1e12:8.1f}%{operators:19}", flush=True)
            if args.profile:
                longest = sorted(by_operator.items(), key=lambda k: -k[1])[:10]
                print("    ms of the floor: " + ", ".join(f"{name} {1000 * t:.2f}" for name, t in longest))
        return results

    limits = ceilings(device, args.quick)
    header(device, steps=args.steps, repeats=args.repeats)
    print(f"ceilings: matrix product {limits[0] / 1e12:.2f} TFLOP/s, copy {limits[1] / 1e9:.1f} GB/s read + written\n")
    print(f"{'row':12}{'':9}{'batch':>6}{'images/s':>10}{'lowest':>9}{'highest':>9}{'ms':>9}"
          + "".join(f"{p[:7]:>8}" for p in PARTS) + f"{'GFLOP':>9}{'of rate':>8}{'floor':>8}"
          + (f"{'kernels':>9}{'syncs':>6}{'GiB':>7}" if device.type == "cuda" else ""))
    sizes = [["--batch-size", str(b)] for b in ((32, 64) if args.quick else (256, 512, 1024, 2048, 4096, 8192))]
    ways = ["", "compiled", "graphs"][:3 if device.type == "cuda" else 2] if args.compile else [""]
    for row, more in itertools.product(["simclr"], sizes) if args.sweep else itertools.product(args.rows, [[]]):
        training = None
        for compiled in ways:
            with survived(row, compiled) as ended:
                training = training or Training(row, device, more, args.small)
                results[(row, *more[1:], compiled)] = report(row, training, limits, args, compiled)
            failed |= ended != []
    if device.type == "cuda":
        print("\nkernels: ms of a step in which kernels run; far less than ms: launches cost, see the graphs' row.\n"
              "simclr: at least 35 % of the rate, or the profile (--profile) and the floor that forbid it")
    if failed:
        raise SystemExit(1)
    return results


if __name__ == "__main__":
    main()
