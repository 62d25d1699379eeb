"""What needs a CUDA device: the same numbers as on the CPU, no host sync in a step, whole runs. Else all skipped."""
import json
import os
import shutil
import threading
import time

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")        # for --deterministic; torch reads it once

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
from torch import nn  # noqa: E402

import simclr_deepaug as S  # noqa: E402

if not torch.cuda.is_available():
    pytest.skip("no CUDA device here", allow_module_level=True)
pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def settings_of_torch():
    """Runs set these for their process; every test starts from float32 that is float32, and without them."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False


def split_of(n, seed=0):
    images, labels = S.draw_shapes(n, seed, CUDA)
    return S.Split(labels, 32, images=images)


# ---- the same numbers on both devices

def uniform(lo, hi, *shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * (hi - lo) + lo


@pytest.mark.parametrize("operation, lo, hi", [(S.brightness, 0.6, 1.4), (S.contrast, 0.6, 1.4),
                                               (S.saturation, 0.6, 1.4), (S.hue, -0.1, 0.1)])
def test_colours_equal_the_cpu(operation, lo, hi):
    x, factor = uniform(0, 1, 64, 3, 32, 32), uniform(lo, hi, 64, 1, 1, 1, seed=1)
    torch.testing.assert_close(operation(x.to(CUDA), factor.to(CUDA)).cpu(), operation(x, factor), rtol=0, atol=5e-6)


def test_crop_and_blur_products_equal_the_cpu():
    x, start, length = uniform(0, 1, 64, 3, 40, 40), uniform(0, 15, 64).floor(), uniform(8, 25, 64, seed=1).floor()
    flip, sigma = uniform(0, 1, 64) < 0.5, uniform(0.1, 2, 64)

    def crop_and_blur(x, start, length, flip, sigma):
        rows, columns = (S.resize_matrix(start, length, 40, 32, f).unsqueeze(1) for f in (flip & False, flip))
        blur = S.blur_matrix(sigma, 32, 3).unsqueeze(1)
        return blur @ (rows @ x @ columns.mT) @ blur.mT

    on_cpu = crop_and_blur(x, start, length, flip, sigma)
    on_cuda = crop_and_blur(*(t.to(CUDA) for t in (x, start, length, flip, sigma)))
    torch.testing.assert_close(on_cuda.cpu(), on_cpu, rtol=0, atol=5e-6)


def test_random_views_have_the_same_statistics_as_on_the_cpu():
    images = split_of(4096).images
    a, b = (S.make_views(i, 32, blur=0.3, solarize=0.2).cpu() for i in (images, images.cpu()))
    assert a.shape == b.shape and a.min() > -1e-6 and a.max() < 1 + 1e-6
    assert (a.mean() - b.mean()).abs() < 0.01 and (a.std() - b.std()).abs() < 0.01
    per_picture = (a.flatten(1).std(1).mean() - b.flatten(1).std(1).mean()).abs()
    assert per_picture < 0.01, "crops of another size, or another share of jittered pictures"


def test_network_and_loss_equal_the_cpu_in_float32_and_nearly_under_autocast():
    a = S.settings(["--layer", "none"])
    split = split_of(64)
    views = S.to_unit(split.images, 32)
    results = {}
    for device in ("cpu", "cuda", "autocast"):
        where = torch.device(device.replace("autocast", "cuda"))
        net = S.build(a, split, [], where).train()
        with torch.autocast("cuda", torch.bfloat16, enabled=device == "autocast"):
            z = net(views.to(where))
        loss = S.nt_xent(*z.chunk(2), 0.5)
        assert loss.dtype == torch.float32
        loss.backward()
        results[device] = loss.item(), torch.cat([p.grad.flatten().cpu() for p in net.parameters()])
    (loss, gradient), (same, same_gradient), (near, near_gradient) = results.values()
    assert same == pytest.approx(loss, rel=1e-4) and near == pytest.approx(loss, rel=1e-2)
    assert (same_gradient - gradient).norm() < 5e-3 * gradient.norm()
    # an untrained network's outputs are nearly parallel, so bf16's rounding is a quarter of their small differences
    assert torch.cosine_similarity(near_gradient, gradient, dim=0) > 0.9


# ---- Deep Augmentation

@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("transform", ["dropout", "channel", "pca"])
def test_stop_gradient_on_cuda(transform, autocast):
    """Below the layer: exactly zero from augmented rows, unchanged from clean ones. Above: something from all."""
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
        return x.grad, h.grad, h.dtype

    clean, _, _ = gradients(False)
    mixed, at_layer, dtype = gradients(True)
    assert dtype == (torch.bfloat16 if autocast else torch.float32)
    assert mixed[rows].count_nonzero() == 0
    assert at_layer[rows].flatten(1).abs().amax(1).gt(0).all(), "layers above learn from augmented rows"
    assert clean[~rows].abs().max() > 0
    torch.testing.assert_close(mixed[~rows], clean[~rows], rtol=1e-2 if autocast else 1e-4, atol=1e-4)


# ---- speed's conditions

@pytest.mark.parametrize("flags", ["", "--layer all --transform channel --blur 0.5 --solarize 0.2",
                                   "--optimizer lars --pairs cross", "--objective supervised",
                                   "--arch resnet18 --layer none"])
def test_a_training_step_never_waits_for_the_gpu(flags):
    """A whole step, the first of an epoch too: batch, views, forward, loss, backward, optimizer."""
    a, split = S.settings([*flags.split(), "--batch-size", "32"]), split_of(128)
    net = S.build(a, split, list(range(20)), CUDA).train()
    optimizer = S.LARS(net.parameters(), 0.1) if a.optimizer == "lars" else \
        torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, fused=True)
    batches = S.train_batches(split, a, CUDA, 0, 4, 0, 1)

    def step(i):                                                    # the lines of train()'s loop
        torch.manual_seed(S.mix(a.seed, i, 0))
        for group in optimizer.param_groups:
            group["lr"] = S.learning_rate(i, a, 4)
        images, labels = next(batches)
        views = S.two_views(images, split, a)
        with torch.autocast("cuda", torch.bfloat16):
            z = net(views, S.draw_rows(len(images), a, CUDA))
        if a.objective == "simclr":
            loss = S.nt_xent(*z.chunk(2), a.temperature)
        else:
            loss = nn.functional.cross_entropy(z.float(), labels.repeat(2))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    losses = [step(i) for i in range(3)]                            # libraries start, buffers are made
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses += [step(i) for i in range(3, 10)]                   # epochs begin at steps 4 and 8
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all()


def test_the_sync_alarm_works():
    """The test above can fail: a wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(1, device=CUDA).item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- several processes on one GPU (nccl wants a GPU each, gloo does not)

def half_of_a_batch(rank, folder):
    """Process `rank` of two: SyncBatchNorm + DistributedDataParallel + gathered NT-Xent over gloo; writes gradients."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.backends.cudnn.allow_tf32 = False
    torch.cuda.set_device(0)
    try:
        probe = torch.ones(2, device=CUDA)
        dist.all_reduce(probe)
        dist.all_gather([torch.empty_like(probe), torch.empty_like(probe)], probe)
        dist.scatter(torch.empty_like(probe), [probe, probe] if rank == 0 else None, 0)
    except RuntimeError as e:                                       # a gloo without CUDA
        (folder / f"cannot{rank}").write_text(str(e).splitlines()[0])
        return
    split, a = split_of(64), S.settings(["--layer", "none"])
    net = nn.SyncBatchNorm.convert_sync_batchnorm(S.build(a, split, [], CUDA).train())
    model = nn.parallel.DistributedDataParallel(net)
    mine = S.to_unit(split.images, 32).view(2, 2, 16, 3, 32, 32)[:, rank].flatten(0, 1)    # [2 views, 2 processes, 16]
    loss = S.nt_xent(*model(mine).chunk(2), 0.5)
    loss.backward()
    torch.save({"loss": loss.item(), "gradients": {k: p.grad.cpu() for k, p in net.named_parameters()}},
               folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_with_syncbatchnorm_equal_one(tmp_path):
    mp.spawn(half_of_a_batch, args=(tmp_path,), nprocs=2)
    if (tmp_path / "cannot0").exists():
        pytest.skip("gloo here does not move CUDA tensors: " + (tmp_path / "cannot0").read_text())
    split, a = split_of(64), S.settings(["--layer", "none"])
    net = S.build(a, split, [], CUDA).train()
    loss = S.nt_xent(*net(S.to_unit(split.images, 32)).chunk(2), 0.5)
    loss.backward()
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert (both[0]["loss"] + both[1]["loss"]) / 2 == pytest.approx(loss.item(), rel=1e-4)
    for name, p in net.named_parameters():
        for one in both:
            difference = (one["gradients"][name] - p.grad.cpu()).norm()
            assert difference < 1e-2 * p.grad.norm().cpu() + 1e-6, name


# ---- whole runs

def flags_of(few, out, *more):
    return ["--dataset", "folder", "--data-dir", str(few), "--workers", "0", "--batch-size", "64", "--epochs", "2",
            "--device", "cuda", "--out", str(out), *more]


def test_a_whole_run_and_its_encoder_on_cuda(few, tmp_path):
    report = S.main(flags_of(few, tmp_path / "run"))
    assert {"linear", "linear_untrained", "knn", "seconds", "images_per_second"} <= set(report)
    assert report["export_difference"] < 1e-4
    torch.backends.cudnn.allow_tf32 = False
    on_cpu, on_cuda = torch.jit.load(tmp_path / "run/encoder.pt"), torch.jit.load(tmp_path / "run/encoder.pt").to(CUDA)
    x = uniform(0, 1, 5, 3, 32, 32)
    with torch.no_grad():
        pairs = zip([on_cpu(x), *on_cpu.activations(x)], [on_cuda(x.to(CUDA)), *on_cuda.activations(x.to(CUDA))])
        for here, there in pairs:
            assert there.is_cuda and (there.cpu() - here).abs().max() < 1e-3 * here.abs().max()
    on_cuda(x.to(CUDA)).square().mean().backward()                  # and it can be tuned further there
    assert all(p.grad is not None for n, p in on_cuda.named_parameters() if "head" not in n)


def test_pictures_of_several_sizes_stream_to_the_gpu(few, tmp_path):
    from PIL import Image
    shutil.copytree(few, tmp_path / "mixed")
    Image.new("RGB", (48, 40), "red").save(tmp_path / "mixed/class0/wide.png")
    report = S.main(["--image-size", "32", *flags_of(tmp_path / "mixed", tmp_path / "run"), "--workers", "2"])
    assert report["broken_pictures"] == 0 and report["steps"] == 6


def test_deterministic_resume_gives_the_same_bits(few, tmp_path):
    """A checkpoint copied while a run goes on, resumed in another folder, ends in the very weights of that run."""
    whole, copy = tmp_path / "whole", tmp_path / "copy"
    copy.mkdir()
    finished = threading.Event()

    def take():
        while not (whole / "checkpoint.pt").exists() and not finished.is_set():
            time.sleep(0.001)
        shutil.copy(whole / "checkpoint.pt", copy / "checkpoint.pt")

    flags = ["--deterministic", "--save-every", "0", "--epochs", "8", "--log-every", "1"]
    taker = threading.Thread(target=take)
    taker.start()
    try:
        S.main([*flags_of(few, whole), *flags])
    finally:
        finished.set()
        taker.join()
    taken = torch.load(copy / "checkpoint.pt", weights_only=True)
    S.main([*flags_of(few, copy), *flags, "--resume"])
    a, b = (torch.load(f / "checkpoint.pt", weights_only=True, map_location="cpu") for f in (whole, copy))
    assert 0 < taken["step"] < a["step"] == b["step"]
    for name, value in a["model"].items():
        assert torch.equal(value, b["model"][name]), name
    reports = [json.loads((f / "report.json").read_text()) for f in (whole, copy)]
    assert reports[0]["loss"] == reports[1]["loss"] and reports[0]["linear"] == reports[1]["linear"]


def test_compile_trains_as_eager_does(few, tmp_path):
    losses = []
    for name, more in (("eager", []), ("compiled", ["--compile"])):
        S.main(flags_of(few, tmp_path / name, "--layer", "none", "--epochs", "1", "--log-every", "1", *more))
        rows = (tmp_path / name / "metrics.csv").read_text().splitlines()
        losses.append([float(row.split(",")[rows[0].split(",").index("loss")]) for row in rows[1:]])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
