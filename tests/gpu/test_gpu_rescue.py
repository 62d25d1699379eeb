"""What topk_rescue.py does differently on CUDA: no host sync in a step, bf16, float32 losses. Else skipped."""
import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")        # for --deterministic; torch reads it once

import pytest  # noqa: E402
import torch  # noqa: E402

import topk_rescue as R  # noqa: E402

if not torch.cuda.is_available():
    pytest.skip("no CUDA device here", allow_module_level=True)
pytestmark = pytest.mark.gpu
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
SMALL = ["--batch-size", "64", "--projector", "64", "32", "--prototypes", "128", "--no-baseline"]


@pytest.fixture(autouse=True)
def settings_of_torch():
    """Runs set these for their process; every test starts from float32 that is float32, and without them."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False


def split_of(n, device=CUDA):
    images, labels = R.draw_shapes(n, 0, device)
    return R.Split(labels, 32, images=images)


@pytest.mark.parametrize("flags", ["--method simclr --rescue none", "--method simclr",
                                   "--method simclr --strong deepaug --layer 3",
                                   "--method mocov3 --blur 0.5 --solarize 0.2 --rescue random",
                                   "--method dinov2 --rescue hardest",
                                   "--method dinov2 --rescue none --centering sinkhorn --drop-path 0.1"])
def test_trains_own_loop_waits_at_log_lines_only(flags, tmp_path, monkeypatch):
    """train() itself: of 12 steps logged every 4, no step but the first four, the eighth and the twelfth waits."""
    a, split = R.settings([*SMALL, *flags.split(), "--epochs", "3", "--log-every", "4", "--save-every", "1e9"]), \
        split_of(256)
    step_of, last = R.build(a, split, CUDA), [0]
    forward = step_of.forward

    def guarded(*args):                                             # from a step's views to its last line but logging
        last[0] += 1
        torch.cuda.set_sync_debug_mode("default" if last[0] < 4 or last[0] % 4 == 0 else "error")
        return forward(*args)
    monkeypatch.setattr(step_of, "forward", guarded)
    try:
        report = R.train(a, step_of, split, tmp_path, CUDA, 4, lambda epoch: None, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert report["steps"] == last[0] == 12


@pytest.mark.parametrize("method", ["simclr", "mocov3", "dinov2"])
def test_the_loss_equals_the_cpu_in_float32_and_nearly_under_autocast(method, monkeypatch):
    """Same weights, views and masks: base loss and gradient; losses are float32 where networks ran in bfloat16."""
    a, split = R.settings([*SMALL, "--method", method]), split_of(64, CPU)
    view_a, view_b = R.to_unit(split.images, 32), R.to_unit(split.images, 32).flip(3)
    local = view_a[:, :, 8:24, 8:24].repeat(a.local_crops, 1, 1, 1) if method == "dinov2" else None
    torch.manual_seed(0)
    masks = R.draw_masks(128, 4, CPU)
    results = {}
    for name in ("cpu", "cuda", "autocast"):
        where = CPU if name == "cpu" else CUDA
        monkeypatch.setattr(R, "draw_masks", lambda *_, to=where: tuple(m.to(to) for m in masks))
        monkeypatch.setattr(R, "low_precision", lambda x, low=name == "autocast": torch.autocast(
            "cuda", torch.bfloat16, enabled=low))
        net = R.build(a, split, where).method.train()
        loss, z_a, z_b = net(view_a.to(where), view_b.to(where), None if local is None else local.to(where), 0.5)
        assert loss.dtype == torch.float32
        loss.backward()
        results[name] = loss.item(), torch.cat([p.grad.flatten().cpu() for p in net.parameters() if p.requires_grad])
    (loss, gradient), (same, same_gradient), (near, near_gradient) = results.values()
    assert same == pytest.approx(loss, rel=1e-3)
    assert near == pytest.approx(loss, rel=3e-2)
    assert (same_gradient - gradient).norm() < 1e-2 * gradient.norm()
    assert torch.cosine_similarity(near_gradient, gradient, dim=0) > 0.9


def test_strong_views_equal_the_cpu():
    """The same draws (made on the host) on both devices; a rounding of the geometric operations may move a pixel."""
    images = split_of(64, CPU).images
    results = []
    for where in (CPU, CUDA):
        torch.manual_seed(0)
        results.append(R.strong_views(images.to(where), 32).cpu())
    assert ((results[0] - results[1]).abs() > 2 / 255).float().mean() < 0.01


@pytest.mark.parametrize("method", ["simclr", "mocov3", "dinov2"])
def test_a_deterministic_run_gives_the_same_bits_twice_and_exports(method, few, tmp_path):
    reports, weights = [], []
    for name in ("one", "two"):
        reports.append(R.main(["--dataset", "folder", "--data-dir", str(few), "--workers", "0", "--device", "cuda",
                               *SMALL, "--method", method, "--epochs", "2", "--deterministic", "--local-crops", "0",
                               "--out", str(tmp_path / name)]))
        weights.append(torch.load(tmp_path / name / "checkpoint.pt", weights_only=True, map_location="cpu")["model"])
    assert reports[0]["loss"] == reports[1]["loss"] and reports[0]["export_difference"] <= 1e-4
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_a_compiled_step_gives_nearly_the_same_loss(tmp_path):
    split, losses = split_of(256), []
    for compiled in ([], ["--compile"]):
        a = R.settings([*SMALL, "--method", "dinov2", "--epochs", "1", *compiled])
        losses.append(R.train(a, R.build(a, split, CUDA), split, tmp_path, CUDA, 4, lambda epoch: None, None)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
