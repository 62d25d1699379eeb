"""What vicreg_probe.py does differently on CUDA: no wait for the card in a step, bf16, compiled,
probes on the device. Without CUDA all is skipped."""
import argparse
import os
from unittest import mock

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch reads it once

import pytest  # noqa: E402
import torch  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402

import vicreg_probe as V  # noqa: E402

if not torch.cuda.is_available():
    pytest.skip("no CUDA device here", allow_module_level=True)
pytestmark = pytest.mark.gpu
CPU, CUDA = torch.device("cpu"), torch.device("cuda")

@pytest.fixture(autouse=True)
def settings_of_torch():
    """Every test starts from float32 that is float32, and leaves no setting behind."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False

def built(device, flags):
    """(settings of one run, network, 256 drawn pictures) on the device; runs are eager."""
    a = V.settings(["--device", str(device), "--no-compile", "--batch-size", "64", *flags.split()])
    a = argparse.Namespace(**{**vars(a), **{name: getattr(a, name)[0] for name in V.RUNS}})
    a.views, a.lr = a.views or "simclr", a.lr or (0.5 if a.objective == "simclr" else 0.1)
    images, labels = V.draw_shapes(256, 0, "cpu")
    torch.manual_seed(0)
    net = V.Net(a, 32, 20).to(device, memory_format=torch.channels_last)
    return a, net, V.Split(32, labels.to(device), images.to(device))

def new_state():
    return {"step": 0, "seconds": 0.0, "log": [], "probes": []}

class Enough(Exception):
    pass

@pytest.mark.parametrize("flags", [
    "--layer 1", "--layer all --blur 0.5 --solarize 0.2", "--objective simclr --no-stop-grad",
    "--objective supervised --views none", "--arch resnet18"])
def test_a_training_step_never_waits_for_the_gpu(flags, tmp_path):
    """train() itself: steps 4 to 12, an epoch's first ones too; log steps, which wait as probes
    do, are every 50th."""
    a, net, split = built(CUDA, f"--epochs 2500 --probe-epochs 2500 {flags}")
    steps = []

    def after_step(*_):
        steps.append(1)
        if len(steps) == 3:  # libraries have started, buffers are made
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        if len(steps) == 12:
            raise Enough
    hook = register_optimizer_step_post_hook(after_step)
    try:
        with mock.patch.object(V, "save_checkpoint"), pytest.raises(Enough):
            V.train(a, net, split, tmp_path, lambda epoch: None, new_state())
    finally:
        torch.cuda.set_sync_debug_mode("default")
        hook.remove()
    assert all(w.isfinite().all() for w in net.parameters())

def test_losses_and_gradients_equal_the_cpu_in_float32_and_nearly_under_autocast():
    results = []
    for device, autocast in ((CPU, False), (CUDA, False), (CUDA, True)):
        a, net, split = built(device, "--arch RES-2-32 --projector 64 64")
        views = V.to_unit(split.images[:128], 32)
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            z = net.train()(views, torch.zeros(128, dtype=torch.bool, device=device))
        losses = V.losses(a, z.float(), None)
        losses["loss"].backward()
        results.append(({k: v.item() for k, v in losses.items()},
                        torch.cat([p.grad.flatten().cpu() for p in net.parameters()])))
    (loss, gradient), (same, same_gradient), (near, near_gradient) = results
    assert same == pytest.approx(loss, rel=1e-3) and near == pytest.approx(loss, rel=5e-2)
    assert (same_gradient - gradient).norm() < 5e-3 * gradient.norm()
    assert torch.cosine_similarity(near_gradient, gradient, dim=0) > 0.9

def clusters(n, dim, classes):
    """Features of n pictures that a probe gets right for the most part, and their labels."""
    g = torch.Generator().manual_seed(0)
    y = torch.randint(classes, (n,), generator=g)
    x = torch.randn(classes, dim, generator=g)[y] + 1.5 * torch.randn(n, dim, generator=g)
    return x * torch.logspace(-2, 2, dim) + 3, y  # scales as unlike as a network's channels

def test_probes_equal_the_cpu():
    x, y = clusters(3000, 64, 20)
    data = x[:2000], y[:2000], x[2000:], y[2000:]
    moved = [t.to(CUDA) for t in data]
    there, here = V.fit_svm(*moved[:2], 20).cpu(), V.fit_svm(*data[:2], 20)
    assert (there - here).norm() < 5e-2 * here.norm()
    assert V.linear_probe(*moved, 20) == pytest.approx(V.linear_probe(*data, 20), abs=1)
    assert V.weighted_knn(*moved, 20) == pytest.approx(V.weighted_knn(*data, 20), abs=0.5)
    for k, v in V.clustering(*data, 20).items():
        assert V.clustering(*moved, 20)[k] == pytest.approx(v, rel=1e-2), k

def test_information_is_that_of_the_cpu_to_its_noise():
    """The draws are made on the CPU, so both devices train on the same pairs."""
    x = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0))
    z = x + torch.randn(4000, 4, generator=torch.Generator().manual_seed(1))
    here, there = V.mutual_information(x, z, 300), V.mutual_information(x.cuda(), z.cuda(), 300)
    assert there == pytest.approx(here, abs=0.1) and min(here) > 0.5

def flags_of(few, out, *more):
    return ["--data-dir", str(few), "--workers", "0", "--device", "cuda", "--arch", "RES-2-32",
            "--batch-size", "64", "--sample-level", "6", "4", "2", "--target-net", "RES-1-8",
            "--target-epochs", "2", "--target-stages", "3", "--mine-steps", "5", "--epochs", "2",
            "--out", str(out), *more]

def test_a_run_on_cuda_probes_exports_and_is_probed_again(few, tmp_path):
    report = V.main(flags_of(few, tmp_path / "run", "--target-net", "vit", "--no-compile"))
    assert report["export_difference"] <= 1e-4
    again = V.main(["--encoder", f"{tmp_path}/run/encoder.pt", "--sample-level", "6", "4", "2",
                    "--target-net", "none", "--mine-steps", "0", "--out", f"{tmp_path}/again"])
    for k in ("linear", "knn", "svm_class", "ncc_test_class", "svm_sample"):
        assert again[k] == pytest.approx(report[k], abs=4.2), k  # one of 24 test pictures

def test_deterministic_resume_gives_the_same_bits(few, tmp_path, monkeypatch):
    """Stopped by Ctrl-C after the checkpoint of its first epoch, and resumed."""
    words = ["--deterministic", "--no-compile", "--probe-epochs", "1", "--epochs", "4"]
    V.main(flags_of(few, tmp_path / "whole", *words))
    calls, views = [], V.make_views

    def interrupted(*args):
        calls.append(1)
        if calls.count(1) == 12:
            raise KeyboardInterrupt
        return views(*args)
    monkeypatch.setattr(V, "make_views", interrupted)
    with pytest.raises(SystemExit):
        V.main(flags_of(few, tmp_path / "half", *words))
    monkeypatch.undo()
    V.main([*flags_of(few, tmp_path / "half", *words), "--resume"])
    a, b = (torch.load(tmp_path / f / "checkpoint.pt", weights_only=True, map_location="cpu")
            for f in ("whole", "half"))
    assert a["step"] == b["step"] == 12
    for name, value in a["model"].items():
        assert torch.equal(value, b["model"][name]), name

def test_compiled_training_learns_as_eager_does(few, tmp_path):
    losses = []
    for more in ("--no-compile", "--compile"):
        report = V.main(flags_of(few, tmp_path / more, "--lr", "0.01", more))
        losses.append([row["loss"] for row in report["log"]])
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=3e-2)

@pytest.mark.parametrize("flags", [
    f"--arch {arch} --objective {objective}" for arch in
    ("RES-5-50", "RES-5-250", "RES-10-250", "RES-5-1000", "resnet18") for objective in
    ("vicreg", "simclr", "supervised")])
def test_every_documented_network_trains_at_the_default_rate(flags, tmp_path):
    """Sixty steps of 256 pictures with the paper's projector: the loss is finite and falls."""
    a, net, _ = built(CUDA, f"{flags} --projector 2048 2048 --epochs 15 --batch-size 256")
    images, labels = V.draw_shapes(1024, 0, "cuda")
    state = new_state()
    with mock.patch.object(V, "save_checkpoint"):
        V.train(a, net, V.Split(32, labels, images), tmp_path, lambda epoch: None, state)
    losses = [row["loss"] for row in state["log"]]
    print(flags, *(f"{v:.2f}" for v in losses[::6]))
    assert all(v < float("inf") for v in losses) and losses[-1] < 0.95 * losses[0]
