"""What vicreg_probe.py does differently on CUDA: no host sync in a step, bf16, probes on the device. Else skipped."""
import csv
import os
import shutil
import threading
import time

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")        # for --deterministic; torch reads it once

import pytest  # noqa: E402
import torch  # noqa: E402

import vicreg_probe as V  # noqa: E402

if not torch.cuda.is_available():
    pytest.skip("no CUDA device here", allow_module_level=True)
pytestmark = pytest.mark.gpu
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
SMALL = ["--arch", "RES-2-32", "--projector", "64", "64", "--batch-size", "64"]


@pytest.fixture(autouse=True)
def settings_of_torch():
    """Runs set these for their process; every test starts from float32 that is float32, and without them."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False


def split_of(n, device=CUDA):
    images, labels = V.draw_shapes(n, 0, device)
    return V.Split(labels, 32, images=images)


def flags_of(few, out, *more):
    return ["--dataset", "folder", "--data-dir", str(few), "--workers", "0", "--device", "cuda", *SMALL,
            "--sample-level", "6", "4", "2", "--target-net", "RES-1-8", "--target-epochs", "2", "--target-stages", "3",
            "--mine-steps", "5", "--epochs", "2", "--out", str(out), *more]


# ---- training

@pytest.mark.parametrize("flags", ["", "--layer all --transform channel --blur 0.5 --solarize 0.2",
                                   "--layer 1 --no-stop-grad --optimizer lars", "--objective simclr",
                                   "--objective supervised"])
def test_a_training_step_never_waits_for_the_gpu(flags):
    """A whole step, the first of an epoch too: batch, views, forward, loss, backward, optimizer."""
    a, split = V.settings([*SMALL, *flags.split()]), split_of(256)
    net = V.build(a, 32, list(range(20)), CUDA).train()
    optimizer = V.LARS(net.parameters(), 0.1) if a.optimizer == "lars" else \
        torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, fused=True)
    batches = V.train_batches(split, a, CUDA, 0, 4, 0, 1)

    def step(i):                                                    # the lines of train()'s loop
        torch.manual_seed(V.mix(a.seed, i, 0))
        for group in optimizer.param_groups:
            group["lr"] = V.learning_rate(i, a, 4)
        images, labels = next(batches)
        views = V.train_views(images, split, a)
        rows = torch.rand(len(views), device=CUDA) < a.sample
        with torch.autocast("cuda", torch.bfloat16):
            z = net(views, rows)
        loss = V.losses_of(a, z, labels)
        optimizer.zero_grad(set_to_none=True)
        loss["loss"].backward()
        optimizer.step()
        return torch.stack([v.detach() for v in loss.values()])

    losses = [step(i) for i in range(3)]                            # libraries start, buffers are made
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses += [step(i) for i in range(3, 10)]                   # epochs begin at steps 4 and 8
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all()


def test_trains_own_loop_waits_at_log_lines_only(tmp_path, monkeypatch):
    """train() itself: of 12 steps logged every 4, no step but the fourth, eighth and twelfth waits."""
    a, split = V.settings([*SMALL, "--epochs", "3", "--log-every", "4", "--save-every", "1e9"]), split_of(256)
    net, steps, last = V.build(a, 32, list(range(20)), CUDA), 4, [0]
    a.probe_epochs = [0, 3]
    views = V.train_views

    def guarded(*args):                                             # from a step's views to its last line but logging
        last[0] += 1
        torch.cuda.set_sync_debug_mode("default" if last[0] < 4 or last[0] % 4 == 0 else "error")
        return views(*args)
    monkeypatch.setattr(V, "train_views", guarded)
    try:
        report = V.train(a, net, split, tmp_path, CUDA, steps, lambda epoch, stop: None, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert report["steps"] == last[0] == 12


def test_the_loss_equals_the_cpu_in_float32_and_nearly_under_autocast():
    """The VICReg loss, its parts and the gradient; the loss is float32 also where the network ran in bfloat16."""
    a, images = V.settings(SMALL), V.draw_shapes(128, 0, CPU)[0]
    views, rows = V.to_unit(images, 32), torch.zeros(128, dtype=torch.bool)
    results = {}
    for name in ("cpu", "cuda", "autocast"):
        where = CPU if name == "cpu" else CUDA
        net = V.build(a, 32, list(range(20)), where).train()
        with torch.autocast("cuda", torch.bfloat16, enabled=name == "autocast"):
            z = net(views.to(where), rows.to(where))
        losses = V.losses_of(a, z, None)
        assert all(v.dtype == torch.float32 for v in losses.values())
        losses["loss"].backward()
        results[name] = {k: v.item() for k, v in losses.items()}, \
            torch.cat([p.grad.flatten().cpu() for p in net.parameters()])
    (loss, gradient), (same, same_gradient), (near, near_gradient) = results.values()
    assert same == pytest.approx(loss, rel=1e-3)
    assert near["loss"] == pytest.approx(loss["loss"], rel=2e-2)
    assert (same_gradient - gradient).norm() < 5e-3 * gradient.norm()
    assert torch.cosine_similarity(near_gradient, gradient, dim=0) > 0.9


def test_deterministic_resume_gives_the_same_bits_and_probes(few, tmp_path):
    """A checkpoint and tables copied while a run goes on, resumed in another folder: the very weights of that run."""
    whole, copy = tmp_path / "whole", tmp_path / "copy"
    copy.mkdir()
    finished = threading.Event()

    def take():
        while not (whole / "checkpoint.pt").exists() and not finished.is_set():
            time.sleep(0.001)
        for name in ("probes.csv", "information.csv", "targets.npz", "clusters.npz", "checkpoint.pt"):
            if (whole / name).exists():
                shutil.copy(whole / name, copy / name)

    flags = ["--deterministic", "--layer", "1", "--save-every", "0", "--epochs", "8", "--log-every", "1",
             "--probe-epochs", "0"]
    taker = threading.Thread(target=take)
    taker.start()
    try:
        V.main([*flags_of(few, whole), *flags])
    finally:
        finished.set()
        taker.join()
    taken = torch.load(copy / "checkpoint.pt", weights_only=True, map_location="cpu")
    V.main([*flags_of(few, copy), *flags, "--resume"])
    a, b = (torch.load(f / "checkpoint.pt", weights_only=True, map_location="cpu") for f in (whole, copy))
    assert 0 < taken["step"] < a["step"] == b["step"]
    for name, value in a["model"].items():
        assert torch.equal(value, b["model"][name]), name
    tables = [[{k: float(v) if v.replace(".", "").isdigit() else v for k, v in row.items()}
               for row in csv.DictReader(open(f / "probes.csv"))] for f in (whole, copy)]
    assert tables[0] == tables[1] and {r["epoch"] for r in tables[0]} == {0, 8}


# ---- probes

def clusters(n, dim, classes):
    """Features of n pictures that a probe gets right for the most part, and their labels."""
    g = torch.Generator().manual_seed(0)
    y = torch.randint(classes, (n,), generator=g)
    x = torch.randn(classes, dim, generator=g)[y] + 1.5 * torch.randn(n, dim, generator=g)
    return x * torch.logspace(-2, 2, dim) + 3, y                    # of unlike scales, as a network's channels


def test_svm_equals_the_cpu():
    """Nearly the same weights, and nearly every decision."""
    x, y = clusters(3000, 64, 20)
    on_cpu, on_cuda = V.fit_svm(x[:2000], y[:2000], 20), V.fit_svm(x[:2000].to(CUDA), y[:2000].to(CUDA), 20).cpu()
    assert (on_cuda - on_cpu).norm() < 5e-2 * on_cpu.norm()
    chosen = [torch.addmm(w[-1], x[2000:], w[:-1]).argmax(1) for w in (on_cpu, on_cuda)]
    assert (chosen[0] == y[2000:]).float().mean() > 0.3 and (chosen[0] == chosen[1]).float().mean() > 0.995


def test_clustering_and_nearest_neighbours_equal_the_cpu():
    x, y = clusters(3000, 64, 20)
    data = x[:2000], y[:2000], x[2000:], y[2000:]
    for measure in (V.clustering, lambda *d: {"knn": V.weighted_knn(*d)}, V.linear_probe):
        on_cpu, on_cuda = measure(*data, 20), measure(*(t.to(CUDA) for t in data), 20)
        assert on_cpu.keys() == on_cuda.keys()
        for k, v in on_cpu.items():
            if k != "linear_decay":                                  # one of six; a single picture may decide
                assert on_cuda[k] == pytest.approx(v, rel=1e-3, abs=1 if v > 1 else 0), k


def test_information_is_that_of_the_cpu_to_its_noise():
    """The draws are made on the CPU, so both devices train on the same pairs."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 4, generator=g)
    z = x + torch.randn(4000, 4, generator=g)
    on_cpu, on_cuda = V.mutual_information(x, z, 300), V.mutual_information(x.to(CUDA), z.to(CUDA), 300)
    assert on_cuda == pytest.approx(on_cpu, abs=0.1) and min(on_cpu) > 0.5


def test_a_run_on_cuda_probes_exports_and_is_probed_again(few, tmp_path):
    """The whole of it, and --encoder with the exported file: the representation's numbers are those of the run."""
    report = V.main([*flags_of(few, tmp_path / "run"), "--target-net", "vit"])
    assert report["export_difference"] <= 1e-4
    again = V.main(["--encoder", str(tmp_path / "run" / "encoder.pt"), "--device", "cuda", "--data-dir", str(few),
                    "--workers", "0", "--sample-level", "6", "4", "2", "--target-net", "none", "--mine-steps", "0"])
    for k in ("linear", "knn", "svm_class", "ncc_test_class"):
        assert again[k] == pytest.approx(report[k], abs=4.2), k      # one of 24 test pictures
