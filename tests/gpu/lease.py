"""What to do with a GPU that is lent for 30 minutes: programmes of jobs, each one command, rehearsed on the CPU.

    python tests/gpu/lease.py list                      # programmes, jobs, what data they need
    python tests/gpu/lease.py pack PROGRAMME CALL       # here, before call 1 and 2: fills lease-data/, prints the call
    python3 tests/gpu/lease.py run PROGRAMME            # there, in every call the same: goes on where the last ended
    python tests/gpu/lease.py collect FOLDER            # here: what came back into runs/lease-s0/, a row a run
    python tests/gpu/lease.py run PROGRAMME --quick     # the rehearsal: small networks, few steps, drawn data

The machine there sees this checkout and what `carry` names, at most 64 MiB a call; a command ends after 10 minutes, and
the machine is given back after 30 idle seconds, so pack for call 2 as soon as call 1 returns (later calls bring
nothing). `run` unpacks what has arrived, does the jobs whose data are there, stops at --limit seconds (a training saves
and goes on in the next call; in the last call give the device time that `status` has left) and leaves lease.tgz in
$OUT: logs, and reports, metrics and figures of every run so far.

Trainings of one group must have the same number of epochs, and how many fit is not known before the machine is: the
first call trains the group's first run for one epoch, and from its speed and its other costs computes the number.
"""
import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKED = ROOT.parent / "shared" / "data"
HERE = Path("lease-data")                                           # ignored by git, named in `carry`
THERE = Path(os.environ.get("LEASE_STATE", "/tmp/lease"))           # parts that arrived, what is done, number of epochs
RESERVE, LEAST = 40, 10                                             # seconds: for saving and packing; to begin a job


@dataclass
class Job:
    name: str                                                       # its log, and the run folder of a training
    words: str
    seconds: float = 120                                            # limit of what is no training
    needs: tuple = ()                                               # folders in data/
    group: str = ""                                                 # trainings: {E} in words is the group's epochs


@dataclass
class Programme:
    about: str
    jobs: list
    minutes: dict = field(default_factory=dict)                     # {group: minutes for all of its runs}
    overhead: dict = field(default_factory=dict)                    # {group: costs beside training, over one epoch's}


C100, C10, TEXT = "cifar-100-python", "cifar-10-png", "text"
# parts of ../shared/data by the call that brings them (a set lies in data/ once all of its parts are there)
CALLS = {C100: [["cifar-100/meta", "cifar-100/test.zip", "cifar-100/train-0.zip"], ["cifar-100/train-1.zip"]],
         C10: [["cifar-10/test.zip", "cifar-10/train-0.zip"]],
         TEXT: [["sts/SentEval.tar.xz", "text/books_500k.txt.xz", "text/wiki1m_first11914.txt.xz"]]}
PACKS = {C100: ["cifar-100"], C10: ["cifar-10"], TEXT: ["sts", "text"]}          # unpack.py's names


def bench(name, flags, seconds, needs=()):
    words = f"tests/bench/bench_{name}.py --device {{device}} {{quick-bench}} {flags}"
    return Job(f"bench-{name}", words, seconds, needs)


def simclr(group, name, flags, dataset="--dataset cifar100 --data-dir data", needs=(C100,)):
    return Job(f"{group}-{name}", f"simclr_deepaug.py {dataset} --epochs {{E}} {flags} {{quick-simclr}}",
               needs=needs, group=group)


def layer_runs(group, layers, flags):
    """Without Deep Augmentation, then at each of the layers with stop-gradient and ("w") without."""
    runs = [simclr(group, "none", f"--layer none {flags}")]
    for layer in layers:
        runs.append(simclr(group, f"{layer}", f"--layer {layer} --stop-grad {flags}"))
        runs.append(simclr(group, f"{layer}w", f"--layer {layer} --no-stop-grad {flags}"))
    return runs


def freezing_runs(group, layers, flags):
    """SimCLR; again from its weights (SimCLR*); Deep Augmentation from its weights with layers kept as they are."""
    runs, star = [simclr(group, "none", f"--layer none {flags}")], f"--init {{runs}}/{group}-none {flags}"
    runs.append(simclr(group, "star-none", f"--layer none {star}"))
    for layer in layers:
        for freeze in ("none", "before", "after"):
            runs.append(simclr(group, f"star-{layer}-{freeze}", f"--layer {layer} --freeze {freeze} {star}"))
    return runs


def rescue(method, name, flags):
    return Job(f"rescue-{method}-{name}", f"topk_rescue.py --preset cifar --data-dir data --no-baseline --epochs {{E}} "
               f"--method {method} {flags} {{quick-rescue}} {{quick-vit}}", needs=(C100,), group=f"rescue-{method}")


def probes(objective, lr):
    return Job(f"probes-{objective}", "vicreg_probe.py --preset paper --epochs {E} --weight-decay 1e-4 "
               f"--warmup-epochs 10 --mine-steps 1000 --probe-epochs 0 1 3 8 20 50 --objective {objective} --lr {lr} "
               "--data-dir data {quick-vicreg}", needs=(C100,), group=f"probes-{objective}")


def text(name, flags):
    return Job(f"text-{name}", "simcse_deepaug.py --train-file data/text/books_500k.txt --width 256 --batch-size 256 "
               f"--sts-dir data/SentEval/data/downstream --epochs {{E}} --lr 1e-3 {flags} {{quick-text}}",
               needs=(TEXT,), group="text")


def compare(script, group):
    return Job(f"{group}-compare", f"{script} --compare {{runs}}/{group}-*", 60)


def cka(name, words, dataset="--dataset cifar100 --data-dir data", needs=(C100,)):
    return Job(f"cka-{name}", f"cka.py {words} {dataset} --out {{runs}}/cka-{name}.png {{quick-cka}}", 90, needs)


PNG = f"--dataset folder --data-dir data/{C10}", (C10,)
SMALL = "--arch small --batch-size 512 --lr 1 --warmup-epochs 5"    # the laptop's CIFAR-100 runs, for more epochs
PLAIN = "--weight-decay 1e-4"                                       # as SupContrast writes it: lr .5 with this
RESNET50 = "--preset paper --arch resnet50 --batch-size 512 --layer none --head-layers 3"
TRAIN = "tests/bench/bench_train.py --device {device} {quick-bench}"
BOTH = "{runs}/resnet50-simclr/encoder.pt {runs}/resnet50-supervised/encoder.pt"

PROGRAMMES = {
    "speed": Programme("tests/gpu, then every bench on CUDA: the speed table", [
        Job("train", f"{TRAIN} --profile", 240),
        *(Job(f"tests{name}", f"-m pytest tests/gpu/test_gpu{name}.py -q -rs -p no:cacheprovider --durations=5", 150)
          for name in ("", "_simcse", "_vicreg", "_rescue")),
        bench("step", "--arch resnet18 --batch-size 1024", 150),
        Job("sweep", f"{TRAIN} --sweep", 120),
        Job("compiled", f"{TRAIN} --compile --rows simclr vicreg", 240),
        Job("start-up", f"{TRAIN} --start-up --rows simclr simcse vicreg dinov2", 120),
        bench("nt_xent", "--pictures 512 2048 8192", 60),
        bench("views", "", 60),
        bench("simcse_step", "--steps 30 --repeats 5", 90),
        Job("compiled-text", f"{TRAIN} --compile --rows simcse --steps 100 --repeats 3", 180),    # a graph a length
        Job("bench-cka", "tests/bench/bench_cka.py --device {device} --images 4096 {quick-bench-cka}", 60),
        bench("sts", "", 90, (TEXT,)),
        bench("rescue", "--batch-size 512 --flags --preset cifar {quick-vit}", 150),
        bench("probes", "--part table", 150)]),
    "figure4": Programme("paper 000, Figures 4, 9, 11: ResNet-18, CIFAR-100; does stop-gradient help at 3, 4, 6?", [
        *layer_runs("figure4", [4, 6, 3], "--preset paper --probe-every {fifth}"),
        compare("simclr_deepaug.py", "figure4"),
        Job("untrained", "simclr_deepaug.py --dataset cifar100 --data-dir data --preset paper --layer none "
            "{quick-simclr} --epochs 1 --lr 1e-12 --device {device} --out {runs}/untrained", 60, (C100,)),
        *(cka(f"figure9-{run}", f"{{runs}}/{run}/encoder.pt --numbered")
          for run in ("untrained", "figure4-none", "figure4-4", "figure4-4w"))],
        {"figure4": 22}),
    "all-layers": Programme("paper 000, Figure 4, all layers, with the small network for more epochs", [
        *layer_runs("all-layers", [4, 6, 3, 5, 0, 1, 2, -1], SMALL),
        compare("simclr_deepaug.py", "all-layers")],
        {"all-layers": 22}),
    "figure5": Programme("paper 000, Figure 5 and SimCLR*: from a trained SimCLR, freezing before or after the layer", [
        *freezing_runs("figure5", [4, 3, 1, 5], SMALL)],
        {"figure5": 22}),
    "cifar10": Programme("CIFAR-10: learning rates of SimCLR; paper 002, Figures 1 to 3 with ResNet-50", [
        simclr("rates", "paper", "--preset paper --layer none", *PNG),
        simclr("rates", "plain-0.5", f"--preset paper --layer none --lr 0.5 {PLAIN}", *PNG),
        simclr("rates", "plain-1.5", f"--preset paper --layer none --lr 1.5 {PLAIN}", *PNG),
        simclr("resnet50", "simclr", RESNET50, *PNG),
        simclr("resnet50", "supervised", f"{RESNET50} --objective supervised --lr 0.5 {PLAIN}", *PNG),
        *(cka(f"across-{which}", f"{BOTH} --{which}", *PNG) for which in ("odd", "even")),
        *(cka(f"{run}-{what or 'inside'}", f"{{runs}}/resnet50-{run}/encoder.pt {what and '--' + what}", *PNG)
          for run in ("simclr", "supervised") for what in ("", "augment", "classes"))],
        {"rates": 11, "resnet50": 11}),
    "rescue": Programme("paper 003: SimCLR with a sweep of k, MoCo v3, DINOv2 ViT-S/4, without and with rescue", [
        *(rescue(method, *what) for method in ("simclr", "mocov3", "dinov2")
          for what in (("none", "--rescue none"), ("topk", ""))),
        *(rescue("simclr", f"k{k}", f"--k {k}") for k in (64, 4, 256)),
        compare("topk_rescue.py", "rescue")],
        {"rescue-simclr": 9, "rescue-mocov3": 6, "rescue-dinov2": 7}),
    "probes": Programme("paper 004: VICReg and SimCLR, RES-5-250, all probes over the epochs", [
        probes("vicreg", 0.1), probes("simclr", 0.5)],
        {"probes-vicreg": 12, "probes-simclr": 10},
        {"probes-vicreg": 3.5, "probes-simclr": 3.5}),             # seven times probed, not twice as in one epoch
    "text": Programme("paper 000, Section 5.2: BERT, 12 layers of width 256, from scratch with MLM, seven STS tasks", [
        text("none", "--layer none"),
        *(text(f"{layer}{'' if stop else 'w'}", f"--layer {layer} --{'' if stop else 'no-'}stop-grad")
          for layer in (8, 4, 12) for stop in (True, False)),
        compare("simcse_deepaug.py", "text")],
        {"text": 22})}

# what {quick-...} becomes in a rehearsal: the last of two flags counts
QUICK = {
    "quick-bench": "--quick", "quick-bench-cka": "--images 32 --batch-size 16",
    "quick-simclr": "--dataset shapes --image-size 0 --arch small --batch-size 1024 --lr 0.5 --probe-every 0",
    "quick-cka": "--dataset samples --images 64 --batch-size 32",
    "quick-rescue": "--dataset shapes --batch-size 512",
    "quick-vit": "--arch vit-tiny --patch 8 --prototypes 64 --projector 32 16",
    "quick-vicreg": "--dataset shapes --arch RES-1-16 --projector 32 32 --sample-level 20 10 5 --target-net none "
                    "--mine-steps 20",
    "quick-text": "--width 32 --train-file data/text/wiki1m_first11914.txt"}


# ---------------------------------------------------------------------------------------------- here, before a call

def pack(programme: Programme, call: int) -> list:
    """Fill lease-data/ with the parts that this call brings. Returns them."""
    if not (PACKED / "unpack.py").exists():
        raise SystemExit(f"lease.py: {PACKED} is not here")
    needs = sorted({n for job in programme.jobs for n in job.needs})
    parts = [part for n in needs for part in CALLS[n][call - 1:call] for part in part]
    shutil.rmtree(HERE, ignore_errors=True)
    for part in ["unpack.py", *parts]:
        (HERE / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PACKED / part, HERE / part)
    size = sum(f.stat().st_size for f in HERE.rglob("*") if f.is_file()) / 2 ** 20
    print(f"{HERE}/: {', '.join(parts) or 'nothing new'}, {size:.0f} MiB (64 at most, the checkout included)")
    return parts


# ------------------------------------------------------------------------------------------------------- there

def read_state() -> dict:
    file = THERE / "state.json"
    return json.loads(file.read_text()) if file.exists() else {"done": {}, "epochs": {}}


def write_state(state: dict) -> None:
    THERE.mkdir(parents=True, exist_ok=True)
    (THERE / "state.json").write_text(json.dumps(state, indent=1))


def unpack(needs: set) -> None:
    """What arrived beside what earlier calls brought; a set whose parts are all there goes into data/."""
    if HERE.exists():
        shutil.copytree(HERE, THERE / "parts", dirs_exist_ok=True)
    source = PACKED if (PACKED / "unpack.py").exists() else THERE / "parts"
    for need in needs:
        if not Path("data", need).exists() and all((source / p).exists() for call in CALLS[need] for p in call):
            subprocess.run([sys.executable, source / "unpack.py", *PACKS[need], "--parts", source, "--to", "data"],
                           check=True)


def folder_of(quick: bool, seed: int) -> Path:
    return Path(f"runs/lease-{'quick' if quick else f's{seed}'}")


def words_of(job: Job, quick: bool, epochs: int, seed: int = 0) -> list:
    runs = folder_of(quick, seed)
    values = {"E": str(epochs or "E"), "fifth": str(max(1, epochs // 5)), "device": "cpu" if quick else "cuda",
              "runs": str(runs), **{k: v if quick else "" for k, v in QUICK.items()}}
    words = []
    for word in re.sub(r"{([\w-]+)}", lambda m: values[m[1]], job.words).split():
        words += sorted(str(f) for f in Path().glob(word) if (f / "report.json").exists()) if "*" in word else [word]
    if job.group:
        words += ["--device", values["device"], "--seed", str(seed), "--log-every", "10", "--out", str(runs / job.name),
                  "--resume"]
    elif words[0] == "cka.py":
        words += ["--device", values["device"]]
    return words


def execute(name: str, words: list, seconds: float) -> int:
    """Run it, its output in a log; at the limit SIGTERM, then SIGKILL. Returns its status (124: limit)."""
    print(f"\n$ python {' '.join(words)}", flush=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "20"}
    log = THERE / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as f:
        start = log.stat().st_size
        process = subprocess.Popen([sys.executable, *words], stdout=f, stderr=subprocess.STDOUT, env=environment,
                                   start_new_session=True)
        try:
            code = process.wait(max(1, seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT if "pytest" in words else signal.SIGTERM)       # pytest: its failures
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            code = 124
        with suppress(ProcessLookupError):                          # what it started must not run on beside the next
            os.killpg(process.pid, signal.SIGKILL)
    with open(log, "rb") as f:
        f.seek(start)
        lines = f.read().decode(errors="replace").replace("\r", "\n").splitlines()
    print("\n".join([line for line in lines if line.strip() and "/s]" not in line and "/s," not in line][-40:]))
    return code


def fit_epochs(job: Job, programme: Programme, quick: bool, seed: int, seconds: float) -> int:
    """How many epochs each of the group's runs may have, from one epoch of its first run; 0 if that failed."""
    begun, trial = time.time(), Job(f"fit-{job.group}", job.words, group=job.group)
    folder = folder_of(quick, seed) / trial.name
    shutil.rmtree(folder, ignore_errors=True)
    if execute(trial.name, words_of(trial, quick, 1, seed), seconds):
        return 0
    report, config = (json.loads((folder / name).read_text()) for name in ("report.json", "config.json"))
    spent, runs = time.time() - begun, sum(j.group == job.group for j in programme.jobs)
    rate = report.get("images_per_second") or report["sentences_per_second"]
    epoch = report["steps"] * config["batch_size"] / rate
    other = (spent - epoch) * programme.overhead.get(job.group, 1)
    epochs = max(1, int(((60 * programme.minutes[job.group] - spent) / runs - other) / epoch))
    print(f"{job.group}: an epoch {epoch:.1f} s, the rest of a run {other:.1f} s, {runs} runs in "
          f"{programme.minutes[job.group]} minutes: {epochs} epochs each")
    return 1 if quick else min(epochs, 200)


def run(programme: Programme, quick: bool, seed: int, limit: float, out: Path) -> int:
    """Do what is not done yet and can be done. Returns 1 if a job failed, else 0."""
    deadline, state = time.time() + limit - RESERVE, read_state()
    runs = folder_of(quick, seed)
    for folder in (out, runs):
        folder.mkdir(parents=True, exist_ok=True)
    unpack({n for job in programme.jobs for n in job.needs})
    failed = []
    for i, job in enumerate(programme.jobs):
        if job.name in state["done"]:
            continue
        if not job.group and any(j.group and j.name not in state["done"] for j in programme.jobs[:i]):
            print(f"{job.name}: after the trainings")
            continue
        if missing := [n for n in job.needs if not Path("data", n).exists() and not (quick and n != TEXT)]:
            print(f"{job.name}: waits for {', '.join(missing)}")
            continue
        if time.time() > deadline - LEAST:
            print(f"{job.name}: in the next call")
            continue
        if f"fit-{job.group}" in failed:
            continue
        if job.group and not state["epochs"].get(job.group):
            state["epochs"][job.group] = fit_epochs(job, programme, quick, seed, deadline - time.time())
            write_state(state)
            if not state["epochs"][job.group]:
                failed.append(f"fit-{job.group}")
                continue
        words = words_of(job, quick, state["epochs"].get(job.group, 0), seed)
        begun = time.time()
        code = execute(job.name, words, deadline - begun if job.group else min(job.seconds, deadline - begun))
        if quick and "pytest" in words and code == 5:               # no GPU: every test was skipped
            code = 0
        goes_on = code == 124 and (job.group or begun + job.seconds > deadline)
        print(f"{job.name}: {'goes on in the next call' if goes_on else f'status {code}'}, {time.time() - begun:.0f} s")
        if not goes_on:
            state["done"][job.name] = code
            failed += [job.name] if code else []
        write_state(state)
    with tarfile.open(out / "lease.tgz", "w:gz") as tar:
        for file in sorted([*(THERE / "logs").glob("*.log"), *runs.rglob("*")]):
            if (file.suffix in (".log", ".json", ".csv", ".png") and file.name != "views.png") \
                    or file.name in ("similarity.npz", "clusters.npz"):
                tar.add(file, file.relative_to(runs) if file.is_relative_to(runs) else Path("logs", file.name))
    left = [job.name for job in programme.jobs if job.name not in state["done"]]
    print(f"\nepochs {state['epochs']}; failed: {failed or 'none'}; left: {left or 'nothing'}")
    return int(bool(failed))


# ---------------------------------------------------------------------------------------------- here, afterwards

def collect(folder: Path, to: Path) -> list:
    """Unpack lease.tgz into `to` and print a row for every finished run. Returns the rows."""
    with tarfile.open(folder / "lease.tgz") as tar:
        tar.extractall(to, filter="data")
    rows = []
    for file in sorted(to.glob("*/report.json")):
        r = json.loads(file.read_text())
        rows.append({"run": file.parent.name, "epochs": r.get("epochs"), "seconds": r.get("seconds"),
                     "a second": r.get("images_per_second") or r.get("sentences_per_second"),
                     **{k: r[k] for k in ("linear", "linear_untrained", "knn", "sts", "sts_untrained") if k in r}})
        cells = (f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items())
        print(f"| {' | '.join(cells)} |")
    return rows


def main(argv=None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["list", "pack", "run", "collect"])
    p.add_argument("name", nargs="?", help="of the programme; with collect: the folder that holds lease.tgz")
    p.add_argument("call", nargs="?", type=int, choices=[1, 2], default=1)
    p.add_argument("--quick", action="store_true", help="rehearse on the CPU")
    p.add_argument("--seed", type=int, default=0, help="of all trainings; runs/lease-sSEED is their folder")
    p.add_argument("--limit", type=float, default=580, help="seconds of this call")
    a = p.parse_args(argv)
    os.chdir(ROOT)
    if a.what == "list":
        for name, programme in PROGRAMMES.items():
            print(f"{name:12} {programme.about}; {programme.minutes or ''}")
            for job in programme.jobs:
                print(f"    {job.name:24} {' '.join(words_of(job, a.quick, 0, a.seed))}")
        return 0
    if a.what == "collect":
        collect(Path(a.name), folder_of(a.quick, a.seed))
        return 0
    if a.name not in PROGRAMMES:
        p.error(f"no programme {a.name}; there are {', '.join(PROGRAMMES)}")
    if a.what == "pack":
        pack(PROGRAMMES[a.name], a.call)
        print(f'run(command="python3 tests/gpu/lease.py run {a.name}", carry=["{HERE}"], timeout_s=600)')
        return 0
    return run(PROGRAMMES[a.name], a.quick, a.seed, a.limit, Path(os.environ.get("OUT", "runs/lease-out")))


if __name__ == "__main__":
    sys.exit(main())
