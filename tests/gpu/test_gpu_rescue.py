"""What topk_rescue.py does differently on CUDA: no wait for the card in a step, bf16, compiled.
Without CUDA all is skipped."""
import argparse
import os
from unittest import mock

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch reads it once

import pytest  # noqa: E402
import torch  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402

import topk_rescue as R  # noqa: E402

if not torch.cuda.is_available():
    pytest.skip("no CUDA device here", allow_module_level=True)
pytestmark = pytest.mark.gpu
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
METHODS = ["simclr", "mocov3", "dinov2"]

@pytest.fixture(autouse=True)
def settings_of_torch():
    """Every test starts from float32 that is float32, and leaves no setting behind."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False

def built(device, flags):
    """(settings of one run, Rescue, 256 drawn pictures) on the device; runs are eager."""
    a = R.settings(["--device", str(device), "--no-compile", "--batch-size", "64", "--projector",
                    "64", "32", "--prototypes", "128", "--rescue", "topk", *flags.split()])
    a = argparse.Namespace(**{**vars(a), **{name: getattr(a, name)[0] for name in R.RUNS}})
    a.k = 0 if a.rescue == "none" else a.k
    images, labels = R.draw_shapes(256, 0, "cpu")
    split = R.Split(32, labels.to(device), images.to(device))
    return a, R.build(a, split), split

class Enough(Exception):
    pass

@pytest.mark.parametrize("flags", [
    "--rescue none", "--strong deepaug --layer 3", "--method mocov3 --rescue none --blur 0.5 0.5 0",
    "--method mocov3 --strong deepaug --anchor online", "--method dinov2 --rescue none",
    "--method dinov2 --strong deepaug --layer 2 --centering centering"])
def test_a_training_step_never_waits_for_the_gpu(flags, tmp_path):
    """train() itself, steps 4 to 12. Not with RandAugment: torchvision's geometric operations copy
    a small matrix to the device."""
    a, rescue, split = built(CUDA, f"--epochs 2500 {flags}")
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
        with mock.patch.object(R, "save_checkpoint"), pytest.raises(Enough):
            R.train(a, rescue, split, tmp_path, dict, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        hook.remove()
    assert all(w.isfinite().all() for w in rescue.parameters())

@pytest.mark.parametrize("method", METHODS)
def test_losses_and_gradients_equal_the_cpu_in_float32_and_nearly_under_autocast(method,
                                                                                 monkeypatch):
    """The rescue's, too: the second view stands for the strong one."""
    results = []
    for device, autocast in ((CPU, False), (CUDA, False), (CUDA, True)):
        a, rescue, split = built(device, f"--method {method} --k 8")
        monkeypatch.setattr(R, "low_precision", lambda x, low=autocast: torch.autocast(
            x.device.type, torch.bfloat16, enabled=low))
        x = R.to_unit(split.images[:64], 32)
        torch.manual_seed(0)
        masks = [t.to(device) for t in R.draw_masks(128, 4, CPU)]
        more = () if method != "dinov2" else (x[:, :, 8:24, 8:24].repeat(4, 1, 1, 1), *masks,
                                              torch.tensor(0.05, device=device))
        R.BatchNorm.again, R.BatchNorm.remembers = False, True
        rescue.train()
        base, z_a, z_b = rescue.method(x, x.flip(3), *more)
        assert base.dtype == z_a.dtype == torch.float32
        R.BatchNorm.again = True
        z_s = rescue.method.student(x[:8].flip(2))
        loss = base - torch.cosine_similarity(z_a[:8], z_s).mean()
        loss.backward()
        results.append((loss.item(), torch.cat([p.grad.flatten().cpu() for p in
                                                rescue.parameters() if p.requires_grad])))
    (loss, gradient), (same, same_gradient), (near, near_gradient) = results
    assert same == pytest.approx(loss, rel=1e-3) and near == pytest.approx(loss, rel=5e-2)
    assert (same_gradient - gradient).norm() < 1e-2 * gradient.norm()
    assert torch.cosine_similarity(near_gradient, gradient, dim=0) > 0.9

def test_strong_views_equal_the_cpu():
    """The same draws, made on the host; rounding may move a pixel of a geometric operation."""
    images, results = R.draw_shapes(64, 0, "cpu")[0], []
    for device in (CPU, CUDA):
        torch.manual_seed(0)
        results.append(R.strong_views(images.to(device), 32).cpu())
    assert ((results[0] - results[1]).abs() > 2 / 255).float().mean() < 0.01

def flags_of(few, out, *more):
    return ["--data-dir", str(few), "--workers", "0", "--device", "cuda", "--batch-size", "64",
            "--projector", "64", "32", "--prototypes", "128", "--rescue", "topk", "--k", "8",
            "--epochs", "4", "--out", str(out), *more]

@pytest.mark.parametrize("method", METHODS)
def test_deterministic_resume_gives_the_same_bits_and_exports(method, few, tmp_path, monkeypatch):
    """Stopped by Ctrl-C after the checkpoint of its first epochs, and resumed."""
    words = ["--method", method, "--deterministic", "--no-compile", "--probe-every", "1",
             "--local-crops", "0"]
    report = R.main(flags_of(few, tmp_path / "whole", *words))
    assert report["export_difference"] <= 1e-4 and report["same_view"] > 0.99
    calls, views = [], R.two_views

    def interrupted(*args):
        calls.append(1)
        if calls.count(1) == 8:
            raise KeyboardInterrupt
        return views(*args)
    monkeypatch.setattr(R, "two_views", interrupted)
    with pytest.raises(SystemExit):
        R.main(flags_of(few, tmp_path / "half", *words))
    monkeypatch.undo()
    R.main([*flags_of(few, tmp_path / "half", *words), "--resume"])
    a, b = (torch.load(tmp_path / f / "checkpoint.pt", weights_only=True, map_location="cpu")
            for f in ("whole", "half"))
    assert a["step"] == b["step"] == 12
    for name, value in a["model"].items():
        assert torch.equal(value, b["model"][name]), name

@pytest.mark.parametrize("flags", ["", "--method mocov3", "--method dinov2",
                                   "--strong deepaug --layer 3"])
def test_compiled_training_learns_as_eager_does(flags, few, tmp_path):
    """With CUDA graphs: base method and strong views are a graph each."""
    losses = []
    for more in ("--no-compile", "--compile"):
        R.main(flags_of(few, tmp_path / more, *flags.split(), more))
        log = torch.load(tmp_path / more / "checkpoint.pt", weights_only=True)["log"]
        losses.append([row["base_loss"] for row in log])
    assert len(losses[0]) == 12
    assert losses[1][:4] == pytest.approx(losses[0][:4], rel=3e-2)
