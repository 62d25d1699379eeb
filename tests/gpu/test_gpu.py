"""What the four scripts do differently on CUDA: no wait for the card in a step, bf16, compiled
steps, the same bits when asked for, encoders that move. Without CUDA all is skipped."""
import argparse
import copy
import itertools
import os
import time

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch reads it once

import pytest  # noqa: E402
import torch  # noqa: E402

import simclr_deepaug as S  # noqa: E402
import simcse_deepaug as E  # noqa: E402
import topk_rescue as R  # noqa: E402
import vicreg_probe as V  # noqa: E402

if not torch.cuda.is_available():
    pytest.skip("no CUDA device here", allow_module_level=True)
pytestmark = pytest.mark.gpu
CPU, CUDA = torch.device("cpu"), torch.device("cuda")

# Of the pictures of `few` 54 make four steps an epoch, of 512 sentences 64 make eight.
IMAGES = "--workers 0 --batch-size 54"
WORDS = {
    S: f"{IMAGES} --views simclr",
    E: "--vocab-size 400 --depth 4 --eval-every 0 --warmup 0",
    V: f"{IMAGES} --arch RES-2-32 --sample-level 6 4 2 --target-net none --mine-steps 5 "
       "--probe-epochs 250",
    R: f"{IMAGES} --projector 64 32 --prototypes 128 --rescue topk --k 8"}
DINO = "--method dinov2 --local-crops 0"  # small crops are not deterministic on CUDA

@pytest.fixture(autouse=True)
def settings_of_torch():
    """Every test starts from float32 that is float32, and leaves no setting behind."""
    def reset():
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.benchmark = False
        torch.cuda.set_sync_debug_mode("default")
    reset()
    yield
    reset()

@pytest.fixture(scope="module")
def words(few, texts, tmp_path_factory):
    """words(script, more, out): a command line on 216 pictures or 512 sentences."""
    lines = tmp_path_factory.mktemp("lines") / "lines.txt"
    lines.write_text("\n".join(E.Grammar().sentences(512)))
    sentences = ["--train-file", str(lines), "--sts-dir", str(texts / "sts")]

    def command(script, more, out):
        data = sentences if script is E else ["--data-dir", str(few)]
        return [*data, *WORDS[script].split(), *more.split(), "--device", "cuda",
                "--out", str(out)]
    return command

# ==== steps ====

class Enough(Exception):
    pass

@pytest.fixture
def losses_of_steps(words, tmp_path, monkeypatch):
    """losses_of_steps(script, more, first, last): main() without its probes, left in step `last`
    of 1,000; from `first` on any wait for the card is an error. Returns the loss of every ten."""
    def losses_of_steps(script, more, first, last):
        states, clock = [], itertools.count()
        learning_rate = script.learning_rate  # which is asked once a step

        def alarmed(step, *how):
            if step == first:  # by now libraries have started, buffers are made, graphs captured
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            if step == last:
                raise Enough
            return learning_rate(step, *how)
        with monkeypatch.context() as patch:
            patch.setattr(script, "learning_rate", alarmed)
            patch.setattr(script, "save_checkpoint", lambda path, state: states.append(state))
            patch.setattr(time, "time", lambda: next(clock) / 100)  # no minute passes: no saving
            patch.setattr(script, "measure" if script is E else "probe", lambda *_: {})
            epochs = f"--epochs {125 if script is E else 250} "  # a line of the log: ten steps
            out = tmp_path / f"run{len([*tmp_path.iterdir()])}"
            try:
                with pytest.raises(Enough):
                    script.main(words(script, epochs + more, out))
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert all(w.isfinite().all() for w in states[-1]["model"].values())
        return [row.get("base_loss", row["loss"]) for row in states[-1]["log"]]
    return losses_of_steps

def test_the_sync_alarm_works():
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device=CUDA).item()

@pytest.mark.parametrize("script, more", [
    (S, "--layer 0"), (S, "--layer all --transform channel --views crop"),
    (S, "--layer 3 --optimizer lars --pairs cross --objective supervised"),
    (S, "--layer none --arch resnet18"),
    (E, "--layer 3 --stop-grad --mlm"), (E, "--layer all --transform channel"),
    (V, "--layer all --blur 0.5 --solarize 0.2"), (V, "--objective simclr --no-stop-grad"),
    (V, "--objective supervised --views none"), (V, "--arch resnet18 --layer 1"),
    (R, "--rescue none --blur 0.5 0.5 0"), (R, "--strong deepaug --layer 3"),
    (R, "--method mocov3 --strong deepaug --anchor online"),
    (R, "--method dinov2 --rescue none"),
    (R, "--method dinov2 --strong deepaug --layer 2 --centering centering")],
    ids=lambda x: getattr(x, "NAME", x))
def test_a_training_step_never_waits_for_the_gpu(script, more, losses_of_steps):
    """Steps 5 to 7: of pictures an epoch's first one, too. Not with RandAugment: torchvision's
    geometric operations copy a small matrix to the device."""
    losses_of_steps(script, f"--no-compile {more}", 3, 7)

@pytest.mark.parametrize("script, more", [
    (S, "--layer 4 --rate 0 --lr 0.1"),
    (E, "--layer 2 --rate 0 --stop-grad --dropout 0 --mlm --lr 1e-4 --bucket 1"),
    (V, "--layer 1 --rate 0 --views none"),
    (R, "--method mocov3 --strong deepaug --layer 3 --rate 0")],
    ids=lambda x: getattr(x, "NAME", x))
def test_compiled_steps_never_wait_and_learn_what_eager_ones_do(script, more, losses_of_steps):
    """With rate 0 nothing is drawn in the compiled part, but its stop-gradient acts."""
    eager, compiled = (losses_of_steps(script, f"{more} {how}", 51, 55)
                       for how in ("--no-compile", "--compile"))
    assert len(eager) == 5 and eager[-1] < 0.94 * eager[0], eager
    assert compiled == pytest.approx(eager, rel=4e-2)

# ==== whole runs ====

@pytest.fixture(scope="module", params=[
    (S, "--layer 4"), (E, "--layer 3 --mlm --stop-grad"), (R, ""), (R, DINO),
    (V, "--layer 1 --target-net RES-1-8 --target-epochs 2 --target-stages 3")],
    ids=["simclr", "simcse", "rescue", "dinov2", "vicreg"])
def finished(request, words, tmp_path_factory):
    """(script, its flags, folder, report) of a run of eight steps."""
    (script, more), out = request.param, tmp_path_factory.mktemp("whole") / "run"
    more += f" --deterministic --no-compile --epochs {1 if script is E else 2}"
    return script, more, out, script.main(words(script, more, out))

def test_a_whole_run_measures_and_its_encoder_moves_to_cuda_and_trains_there(finished):
    script, _, out, report = finished
    speed = "sentences_per_second" if script is E else "images_per_second"
    keys = ("sts", "sts_untrained") if script is E else ("linear", "linear_untrained", "knn")
    assert {*keys, speed, "seconds"} <= {*report} and report["export_difference"] <= 1e-4
    assert report.get("same_view", 1) > 0.99  # the rescue's control
    if script is V:
        assert {"svm_class", "svm_sample", "bits_information"} <= {*report}
    x = [torch.rand(7, 3, 32, 32)]
    if script is E:
        lengths = torch.tensor([[32], [3], [8], [31], [2], [16], [20]])
        x = [torch.randint(5, 100, (7, 32)), (torch.arange(32) < lengths).long()]
    encoder, moved = (torch.jit.load(out / "encoder.pt") for _ in range(2))
    moved.to(CUDA)
    there = [t.to(CUDA) for t in x]
    with torch.no_grad():
        for ours, theirs in zip([moved(*there), *moved.activations(*there)],
                                [encoder(*x), *encoder.activations(*x)], strict=True):
            assert ours.is_cuda and (ours.cpu() - theirs).abs().max() < 1e-3 * theirs.abs().max()
    moved(*there).square().mean().backward()
    unused = {"head", "projector", "cls", "mask_token"}  # cls: predicts masked words
    assert not [name for name, weight in moved.named_parameters()
                if weight.grad is None and not unused & {*name.split(".")}]

def test_deterministic_runs_resume_to_the_same_bits(finished, words, tmp_path, monkeypatch):
    """Stopped by Ctrl-C in step 6. Its clock makes every step a minute: a checkpoint each."""
    script, more, whole, _ = finished
    command, clock = words(script, more, tmp_path / "half"), itertools.count(0, 61)

    def interrupted(step, *how, learning_rate=script.learning_rate):
        if step == 5:
            raise KeyboardInterrupt
        return learning_rate(step, *how)
    with monkeypatch.context() as patch:
        patch.setattr(script, "learning_rate", interrupted)
        patch.setattr(time, "time", lambda: next(clock))
        with pytest.raises(SystemExit):
            script.main(command)

    def state(out):
        return torch.load(out / "checkpoint.pt", weights_only=True, map_location="cpu")
    assert state(tmp_path / "half")["step"] == 5
    script.main([*command, "--resume"])
    a, b = state(whole), state(tmp_path / "half")
    assert a["step"] == b["step"] == 8
    for name, value in a["model"].items():
        assert torch.equal(value, b["model"][name]), name

# ==== numbers ====

def one(script, more):
    """The settings of one run, as main() makes them."""
    a = script.settings(more.split())
    one_of = {name: getattr(a, name)[0] for name in getattr(script, "RUNS", ["layer", "seed"])}
    return argparse.Namespace(**{**vars(a), **one_of})

def pictures(device, n=128):
    images, labels = S.draw_shapes(n, 0, "cpu")
    return S.Split(32, labels.to(device), images.to(device))

def simclr(device, low):
    split = pictures(device)
    net = S.build(one(S, f"--device {device} --layer none"), split, [*range(20)]).train()
    with low:
        z = net(S.to_unit(split.images, 32))
    return {"loss": S.nt_xent(*z.chunk(2), 0.5)}, net

def simcse(device, low):
    a = one(E, f"--device {device} --layer none --dropout 0 {WORDS[E]}")
    sentences = E.Grammar().sentences(512)
    tokenizer = E.learn_tokenizer(sentences, 400)
    both = tokenizer(sentences[:16] * 2, padding=True, return_tensors="pt").to(device)
    net = E.build(a, tokenizer).train()
    with low:
        z = net(both["input_ids"], both["attention_mask"])
    return {"loss": E.simcse_loss(*z.float().chunk(2), a.temperature)}, net

def vicreg(device, low):
    a = one(V, f"--device {device} --arch RES-2-32 --projector 64 64")
    torch.manual_seed(0)
    net, views = V.Net(a, 32, 20).to(device).train(), V.to_unit(pictures(device).images, 32)
    with low:
        z = net(views, torch.zeros(128, dtype=torch.bool, device=device))
    return V.losses(a, z.float(), None), net

def rescue(method, device, low, monkeypatch):
    """The rescue's, too: a picture upside down stands for the strong view."""
    a = one(R, f"--device {device} --method {method} {WORDS[R]}")
    net = R.build(a, pictures(device)).train()
    monkeypatch.setattr(R, "low_precision", lambda x: copy.copy(low))
    x, more = R.to_unit(pictures(device, 64).images, 32), ()
    if method == "dinov2":
        torch.manual_seed(0)
        masks = [t.to(device) for t in R.draw_masks(128, 4, CPU)]
        local = x[:, :, 8:24, 8:24].repeat(4, 1, 1, 1)
        more = local, *masks, torch.tensor(0.05, device=device)
    monkeypatch.setattr(R.BatchNorm, "again", False)
    monkeypatch.setattr(R.BatchNorm, "remembers", True)
    base, z_a, _ = net.method(x, x.flip(3), *more)
    R.BatchNorm.again = True
    z_s = net.method.student(x[:8].flip(2))
    assert z_a.dtype == torch.float32
    return {"loss": base - torch.cosine_similarity(z_a[:8], z_s).mean()}, net

@pytest.mark.parametrize("method, same, near, gradients", [
    ("simclr", 1e-4, 1e-2, 5e-3), ("simcse", 1e-3, 5e-2, 1e-2), ("vicreg", 1e-3, 5e-2, 5e-3),
    ("rescue simclr", 1e-3, 5e-2, 1e-2), ("rescue mocov3", 1e-3, 5e-2, 1e-2),
    ("rescue dinov2", 1e-3, 5e-2, 1e-2)])
def test_losses_and_gradients_equal_the_cpus_in_float32_and_nearly_in_bf16(
        method, same, near, gradients, monkeypatch):
    found = []
    for device, autocast in ((CPU, False), (CUDA, False), (CUDA, True)):
        low = torch.autocast(device.type, torch.bfloat16, enabled=autocast)
        if method.startswith("rescue"):
            losses, net = rescue(method.split()[1], device, low, monkeypatch)
        else:
            losses, net = globals()[method](device, low)
        assert losses["loss"].dtype == torch.float32
        losses["loss"].backward()
        weights = [p for p in net.parameters() if p.grad is not None]
        found.append(({k: v.item() for k, v in losses.items()},
                      torch.cat([p.grad.flatten().cpu() for p in weights])))
    (cpu, gradient), (cuda, cuda_gradient), (low, low_gradient) = found
    assert cuda == pytest.approx(cpu, rel=same) and low == pytest.approx(cpu, rel=near)
    assert (cuda_gradient - gradient).norm() < gradients * gradient.norm()
    assert torch.cosine_similarity(low_gradient, gradient, dim=0) > 0.9

# ==== views ====

def uniform(low, high, *shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * (high - low) + low

def test_colours_and_crops_equal_the_cpus():
    x, seeds = uniform(0, 1, 64, 3, 40, 40), range(1, 5)
    for operation, reach, seed in zip(range(4), (0.4, 0.4, 0.4, 0.1), seeds):
        neutral = float(operation != 3)
        factor = uniform(neutral - reach, neutral + reach, 64, 1, 1, 1, seed=seed)
        got = S.adjust(x.to(CUDA), operation, factor.to(CUDA)).cpu()
        torch.testing.assert_close(got, S.adjust(x, operation, factor), rtol=0, atol=5e-6)
    start, length = uniform(0, 15, 64).floor(), uniform(8, 25, 64, seed=1).floor()

    def crop(x, start, length, flip):
        down, across = (S.resize_matrix(start, length, 40, 32, f).unsqueeze(1)
                        for f in (flip & False, flip))
        return down @ x @ across.mT
    parts = x, start, length, uniform(0, 1, 64) < 0.5
    got = crop(*(t.to(CUDA) for t in parts)).cpu()
    torch.testing.assert_close(got, crop(*parts), rtol=0, atol=5e-6)

def test_strong_views_equal_the_cpus():
    """The same draws, made on the host; rounding may move a pixel of a geometric operation."""
    images, views = S.draw_shapes(64, 0, "cpu")[0], []
    for device in (CPU, CUDA):
        torch.manual_seed(0)
        views.append(R.strong_views(images.to(device), 32).cpu())
    assert ((views[0] - views[1]).abs() > 2 / 255).float().mean() < 0.01

# ==== probes ====

def test_probes_equal_the_cpus():
    """Of features that a probe gets right for the most part, with scales as unlike as a network's
    channels."""
    g = torch.Generator().manual_seed(0)
    y = torch.randint(20, (3000,), generator=g)
    x = torch.randn(20, 64, generator=g)[y] + 1.5 * torch.randn(3000, 64, generator=g)
    x = x * torch.logspace(-2, 2, 64) + 3
    data = x[:2000], y[:2000], x[2000:], y[2000:]
    moved = [t.to(CUDA) for t in data]
    there, here = V.fit_svm(*moved[:2], 20).cpu(), V.fit_svm(*data[:2], 20)
    assert (there - here).norm() < 5e-2 * here.norm()
    assert V.linear_probe(*moved, 20) == pytest.approx(V.linear_probe(*data, 20), abs=1)
    assert V.weighted_knn(*moved, 20) == pytest.approx(V.weighted_knn(*data, 20), abs=0.5)
    for k, v in V.clustering(*data, 20).items():
        assert V.clustering(*moved, 20)[k] == pytest.approx(v, rel=1e-2), k
