"""simclr_deepaug.py on a CUDA device: the CPU's numbers, no host sync in a step, whole runs, resume,
--compile, and encoder.pt. Without a device all are skipped."""
import csv
import os
from unittest import mock

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch reads it once

import pytest  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402

import simclr_deepaug as S  # noqa: E402

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


def uniform(low, high, *shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * (high - low) + low


def built(device, flags):
    """(settings, network, 128 drawn pictures) on the device; runs are eager."""
    a = S.settings(["--device", str(device), "--no-compile", "--batch-size", "32",
                    *flags.split()])
    a.layer, a.seed = a.layer[0], a.seed[0]
    images, labels = S.draw_shapes(128, 0, "cpu")
    split = S.Split(32, labels.to(device), images.to(device))
    return a, S.build(a, split, list(range(20))), split


@pytest.mark.parametrize("operation, low, high", [(0, 0.6, 1.4), (1, 0.6, 1.4), (2, 0.6, 1.4),
                                                  (3, -0.1, 0.1)])
def test_adjust_equals_the_cpu(operation, low, high):
    x, factor = uniform(0, 1, 64, 3, 32, 32), uniform(low, high, 64, 1, 1, 1, seed=1)
    got = S.adjust(x.to(CUDA), operation, factor.to(CUDA)).cpu()
    torch.testing.assert_close(got, S.adjust(x, operation, factor), rtol=0, atol=5e-6)


def test_crop_products_equal_the_cpu():
    x, start, length = uniform(0, 1, 64, 3, 40, 40), uniform(0, 15, 64).floor(), uniform(
        8, 25, 64, seed=1).floor()
    flip = uniform(0, 1, 64) < 0.5

    def crop(x, start, length, flip):
        down, across = (S.resize_matrix(start, length, 40, 32, f).unsqueeze(1)
                        for f in (flip & False, flip))
        return down @ x @ across.mT
    got = crop(*(t.to(CUDA) for t in (x, start, length, flip))).cpu()
    torch.testing.assert_close(got, crop(x, start, length, flip), rtol=0, atol=5e-6)


def test_random_views_have_the_same_statistics_as_on_the_cpu():
    images = S.draw_shapes(4096, 0, "cpu")[0]
    a, b = S.make_views(images.to(CUDA), 32).cpu(), S.make_views(images, 32)
    assert a.shape == b.shape and a.min() > -1e-6 and a.max() < 1 + 1e-6
    assert (a.mean() - b.mean()).abs() < 0.02 and (a.std() - b.std()).abs() < 0.02


def test_network_and_loss_equal_the_cpu_in_float32_and_nearly_under_autocast():
    results = []
    for device, autocast in ((CPU, False), (CUDA, False), (CUDA, True)):
        _, net, split = built(device, "--layer none")
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            z = net.train()(S.to_unit(split.images, 32))
        loss = S.nt_xent(*z.chunk(2), 0.5)
        assert loss.dtype == torch.float32
        loss.backward()
        results.append((loss.item(), torch.cat([p.grad.flatten().cpu()
                                                for p in net.parameters()])))
    (loss, gradient), (same, same_gradient), (near, near_gradient) = results
    assert same == pytest.approx(loss, rel=1e-4) and near == pytest.approx(loss, rel=1e-2)
    assert (same_gradient - gradient).norm() < 5e-3 * gradient.norm()
    assert torch.cosine_similarity(near_gradient, gradient, dim=0) > 0.9


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("transform", ["dropout", "channel", "pca"])
def test_stop_gradient_on_cuda(transform, autocast):
    """Below: exactly zero from augmented rows, unchanged from clean ones. Above: from all."""
    torch.manual_seed(0)
    below, above = nn.Conv2d(3, 8, 3, padding=1).to(CUDA), nn.Conv2d(8, 4, 3).to(CUDA)
    images, rows = torch.rand(16, 3, 8, 8, device=CUDA), torch.arange(16, device=CUDA) % 3 == 0

    def gradients(augment):
        x = images.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            h = below(x)
            h = S.deep_augment(h, rows, 0.5, True, transform) if augment else h
            h.retain_grad()
            out = above(h)
        out.float().square().sum().backward()
        return x.grad, h.grad

    clean, _ = gradients(False)
    mixed, at_layer = gradients(True)
    assert mixed[rows].count_nonzero() == 0 and clean[~rows].abs().max() > 0
    assert at_layer[rows].flatten(1).abs().amax(1).gt(0).all()
    rtol = 1e-2 if autocast else 1e-4
    torch.testing.assert_close(mixed[~rows], clean[~rows], rtol=rtol, atol=1e-4)


class Enough(Exception):
    pass


@pytest.mark.parametrize("flags", [
    "--views simclr", "--layer all --transform channel --views crop",
    "--layer 3 --optimizer lars --pairs cross", "--layer 3 --objective supervised",
    "--arch resnet18 --layer none"])
def test_a_training_step_never_waits_for_the_gpu(flags, tmp_path):
    """train() itself: steps 4 to 12, an epoch's first ones too; log steps are every 50th."""
    a, net, split = built(CUDA, f"--layer 0 --epochs 2500 {flags}")
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
        with mock.patch.object(S, "save_checkpoint"), pytest.raises(Enough):
            S.train(a, net, split, tmp_path, dict, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        hook.remove()
    assert all(w.isfinite().all() for w in net.parameters())


def test_the_sync_alarm_works():
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(1, device=CUDA).item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def flags_of(few, out, *more):
    return ["--data-dir", str(few), "--workers", "0", "--batch-size", "64", "--epochs", "2",
            "--layer", "4", "--views", "simclr", "--device", "cuda", "--out", str(out), *more]


def test_a_whole_run_and_its_encoder_on_cuda(few, tmp_path):
    report = S.main(flags_of(few, tmp_path / "run", "--no-compile"))
    assert {"linear", "linear_untrained", "knn", "seconds", "images_per_second"} <= set(report)
    torch.backends.cudnn.allow_tf32 = False
    encoder = torch.jit.load(tmp_path / "run/encoder.pt")
    moved, x = torch.jit.load(tmp_path / "run/encoder.pt").to(CUDA), uniform(0, 1, 5, 3, 32, 32)
    with torch.no_grad():
        for here, there in zip([encoder(x), *encoder.activations(x)],
                               [moved(x.to(CUDA)), *moved.activations(x.to(CUDA))]):
            assert there.is_cuda and (there.cpu() - here).abs().max() < 1e-3 * here.abs().max()
    moved(x.to(CUDA)).square().mean().backward()  # and it can be tuned further there
    assert all(p.grad is not None for n, p in moved.named_parameters() if "head" not in n)


def test_deterministic_resume_gives_the_same_bits(few, tmp_path, monkeypatch):
    """Stopped by Ctrl-C after the checkpoint of its first epoch, and resumed."""
    words = ["--deterministic", "--no-compile", "--probe-every", "1", "--epochs", "4"]
    S.main(flags_of(few, tmp_path / "whole", *words))
    calls, views = [], S.two_views

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return views(*args)
    monkeypatch.setattr(S, "two_views", interrupted)
    with pytest.raises(SystemExit):
        S.main(flags_of(few, tmp_path / "half", *words))
    monkeypatch.undo()
    S.main([*flags_of(few, tmp_path / "half", *words), "--resume"])
    a, b = (torch.load(tmp_path / f / "checkpoint.pt", weights_only=True, map_location="cpu")
            for f in ("whole", "half"))
    assert a["step"] == b["step"] == 12 and a["probes"] == b["probes"]
    for name, value in a["model"].items():
        assert torch.equal(value, b["model"][name]), name


def test_compiled_training_learns_as_eager_does(few, tmp_path):
    losses = []
    for more in ("--no-compile", "--compile"):
        S.main(flags_of(few, tmp_path / more, "--seed", "1", "--rate", "0", more))
        with open(tmp_path / more / "metrics.csv") as f:
            losses.append([float(row["loss"]) for row in csv.DictReader(f)])
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
