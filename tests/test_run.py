"""Whole runs through main([...]) on 240 drawn pictures: the run folder, the export, seeds, comparison, every option."""
import csv
import hashlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import simclr_deepaug as S

CPU = torch.device("cpu")
PNG = (b"\x89PNG", b"IEND\xaeB`\x82")                                  # how a whole file starts and ends


def flags(data, *more):
    return ["--dataset", "folder", "--data-dir", str(data), "--workers", "0", "--batch-size", "32", "--epochs", "2",
            "--device", "cpu", *map(str, more)]


@pytest.fixture(scope="session")
def done(few, tmp_path_factory):
    """One finished default run of 12 steps; tests read its folder and change nothing in it."""
    out = tmp_path_factory.mktemp("done") / "base"
    S.main(flags(few, "--export", "pt2", "--out", out))
    return out


@pytest.fixture(scope="session")
def live(done, few):
    """The trained network of `done`, in eval mode."""
    net = build(few)[1]
    net.load_state_dict(torch.load(done / "checkpoint.pt", weights_only=True)["model"])
    return net.eval()


def build(data, *more):
    """(settings, network, train split, test split, classes)"""
    a = S.settings(flags(data, *more))
    train, test, classes = S.load_data("folder", a, CPU)
    return a, S.build(a, train, classes, CPU), train, test, classes


def train(data, out, *more, steps=2):
    """Two epochs of `steps` steps without the evaluation that follows in a run: (weights, what train() returned)."""
    a, net, split, *_ = build(data, *more)
    out.mkdir()
    report = S.train(a, net, split, out, CPU, steps, None, None)
    return {k: v.clone() for k, v in net.state_dict().items()}, report


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def model_of(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)["model"]


def report_of(run):
    return json.loads((run / "report.json").read_text())


# --- the run folder ---------------------------------------------------------------------------------------------------

def test_run_folder_holds_every_file_of_the_design_and_no_leftover(done):
    names = {p.name for p in done.iterdir()}
    assert {"config.json", "metrics.csv", "checkpoint.pt", "encoder.pt", "weights.safetensors", "report.json",
            "views.png", "curves.png", "cka.png", "samples.npz", "encoder.pt2"} <= names
    assert not [n for n in names if n.endswith(".part")]
    for picture in done.glob("*.png"):
        content = picture.read_bytes()
        assert content.startswith(PNG[0]) and content.endswith(PNG[1])
        assert min(Image.open(picture).size) > 200


def test_report_holds_the_final_measurements_flat(done):
    report = report_of(done)
    assert {"linear", "linear_untrained", "knn", "knn_untrained", "seconds", "images_per_second", "alignment_train",
            "alignment_test", "uniformity_train", "uniformity_test", "export_difference", "loss"} <= report.keys()
    numbers = {k: v for k, v in report.items() if isinstance(v, (int, float))}
    assert all(math.isfinite(v) for v in numbers.values())
    assert all(0 <= report[k] <= 100 for k in ("linear", "linear_untrained", "knn", "knn_untrained"))
    assert report["steps"] == 12 and report["epochs"] == 2 and report["layers_augmented"] == [4]


def test_config_holds_flags_versions_and_the_scripts_own_hash(done):
    config = json.loads((done / "config.json").read_text())
    assert config["torch"] == torch.__version__ and config["torchvision"] == torchvision.__version__
    assert config["python"] == sys.version and config["device"] == "cpu" and config["seed"] == 0
    assert config["script_sha256"] == hashlib.sha256(Path(S.__file__).read_bytes()).hexdigest()
    assert {"layer", "rate", "stop_grad", "sample", "transform", "epochs", "batch_size", "lr", "init", "export",
            "compile", "deterministic", "resume", "out"} <= config.keys()


def test_checkpoint_holds_the_source_text(done):
    state = torch.load(done / "checkpoint.pt", weights_only=True)
    assert state["source"] == Path(S.__file__).read_text() and state["step"] == 12
    assert {"model", "optimizer", "config", "metrics"} <= state.keys()


def test_metrics_are_one_row_a_logged_step(done, few):
    with open(done / "metrics.csv") as f:
        rows = [{k: float(v) for k, v in r.items()} for r in csv.DictReader(f)]
    assert set(rows[0]) == {"step", "epoch", "loss", "lr", "images_per_second", "embedding_std", "effective_rank",
                            "alignment", "uniformity"}
    assert [r["step"] for r in rows] == [10, 12] and [r["epoch"] for r in rows] == [10 / 6, 2]
    a = S.settings(flags(few))
    for r in rows:
        assert all(math.isfinite(v) for v in r.values())
        assert r["lr"] == pytest.approx(S.learning_rate(int(r["step"]) - 1, a, 6))
        assert 1 <= r["effective_rank"] <= 128 and 0 <= r["alignment"] <= 4 and -8 <= r["uniformity"] <= 0


# --- the export -------------------------------------------------------------------------------------------------------

def batches():
    g = torch.Generator().manual_seed(3)
    return [torch.rand(n, 3, 32, 32, generator=g) for n in (1, 2, 7, 64)] + [torch.zeros(3, 3, 32, 32),
                                                                             torch.ones(3, 3, 32, 32)]


def test_encoder_needs_torch_alone_and_equals_the_live_network(done, live, tmp_path):
    """A process that knows nothing of the script loads the file; forward and activations are those of the network."""
    inputs = batches()
    torch.save(inputs, tmp_path / "inputs.pt")
    code = ("import sys, torch; m = torch.jit.load(sys.argv[1]); "
            "torch.save([[m(x), m(x), m.activations(x)] for x in torch.load('inputs.pt')], 'outputs.pt')")
    subprocess.run([sys.executable, "-I", "-W", "ignore", "-c", code, done / "encoder.pt"], cwd=tmp_path, check=True)
    for x, (y, again, acts) in zip(inputs, torch.load(tmp_path / "outputs.pt")):
        assert torch.equal(y, again), "two calls differ: dropout is in the export"
        with torch.no_grad():
            torch.testing.assert_close(y, live.features(x), rtol=1e-4, atol=1e-5)
            expected = live.activations(x)
        assert len(acts) == len(expected)
        for ours, theirs in zip(acts, expected.values()):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_encoder_normalises_inside(done, live):
    """What forward wants is pictures in 0..1; the mean and deviation of the training set are in the file."""
    encoder = torch.jit.load(done / "encoder.pt")
    buffers = {k.split(".")[-1]: v for k, v in encoder.named_buffers() if "input" in k}
    assert torch.equal(buffers["mean"], live.layers["input"].mean) and 0.2 < buffers["mean"].mean() < 0.8
    assert torch.equal(buffers["std"], live.layers["input"].std) and 0.05 < buffers["std"].mean() < 0.5


def test_encoder_can_be_moved_and_fine_tuned(done, live):
    """Not frozen: parameters move to another dtype, take the live network's gradients, and change with a step."""
    encoder, x = torch.jit.load(done / "encoder.pt"), batches()[2]
    encoder.train()
    encoder(x).square().sum().backward()
    live.zero_grad()
    live.features(x).square().sum().backward()
    used = {k: p for k, p in encoder.named_parameters() if ".head." not in k}
    assert len(used) == len([k for k, _ in live.named_parameters() if ".head." not in k])
    expected = dict(live.named_parameters())
    for k, p in used.items():
        theirs = expected[k.removeprefix("net.")].grad
        torch.testing.assert_close(p.grad, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())
    before = encoder(x).detach()
    torch.optim.SGD(encoder.parameters(), 0.01).step()
    assert not torch.equal(encoder(x), before)
    moved = torch.jit.load(done / "encoder.pt").to(torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(moved(x.double()).float(), live.features(x), rtol=1e-4, atol=1e-5)


def test_encoder_carries_its_config(done, live):
    extra = {"config.json": ""}
    encoder = torch.jit.load(done / "encoder.pt", _extra_files=extra)
    config = json.loads(extra["config.json"])
    acts = encoder.activations(batches()[2])
    assert config["layers"] == list(live.activations(batches()[0])) and len(acts) == len(config["layers"])
    assert config["classes"] == [f"class{c}" for c in range(4)] and config["image_size"] == 32
    assert config["dim"] == encoder(batches()[2]).shape[1] == 128
    assert config["layer_numbers"]["stem"] == 0 and config["layer_numbers"]["head"] == 6
    assert config["flags"]["layer"] == ["4"] and config["measurements"]["linear"] == report_of(done)["linear"]


def test_pt2_reloads_to_the_same_numbers_at_other_batch_sizes(done, live):
    program = torch.export.load(done / "encoder.pt2").module()
    for x in batches():
        with torch.no_grad():
            torch.testing.assert_close(program(x), live.features(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch, size", [("resnet18", 16), ("resnet18", 64)])
def test_weights_load_into_torchvision_and_give_the_same_features(few, tmp_path, arch, size):
    """Only fc is missing; below 64 px the stem is 3x3 without max pooling, from 64 px on torchvision's own."""
    from safetensors.torch import load_file
    a, net, split, test, classes = build(few, "--arch", arch, "--image-size", size)
    net.eval()
    test.images = test.images[:8]
    for m in net.modules():                                          # as after training: statistics of its own
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    assert S.export(a, net, test, classes, tmp_path, {}) <= 1e-4
    theirs = getattr(torchvision.models, arch)(weights=None).eval()
    if size < 64:
        theirs.conv1, theirs.maxpool = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False), torch.nn.Identity()
    missing, unexpected = theirs.load_state_dict(load_file(tmp_path / "weights.safetensors"), strict=False)
    assert sorted(missing) == ["fc.bias", "fc.weight"] and unexpected == []
    theirs.fc = torch.nn.Identity()
    x = torch.rand(3, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(theirs(net.layers["input"](x)), net.features(x), rtol=1e-4, atol=1e-5)


def test_samples_are_the_test_pictures(done, few):
    _, _, _, test, _ = build(few)
    samples = np.load(done / "samples.npz")
    assert (samples["images"] == test.images.numpy()).all() and (samples["labels"] == test.labels.numpy()).all()


# --- same seed, same bits ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("more", [[], ["--transform", "pca"], ["--objective", "supervised"]], ids=str)
def test_same_seed_same_bits_other_seed_others(few, tmp_path, more):
    first, again, other = (train(few, tmp_path / str(i), "--seed", seed, *more)[0] for i, seed in enumerate((5, 5, 6)))
    assert equal(first, again) and not equal(first, other)


def test_probing_during_training_changes_no_bit(few, done, tmp_path):
    """--probe-every 1 probes after each epoch into probes.json; the final weights are those of the run without."""
    report = S.main(flags(few, "--probe-every", 1, "--out", tmp_path / "run"))
    assert equal(model_of(tmp_path / "run"), model_of(done))
    probes = json.loads((tmp_path / "run" / "probes.json").read_text())
    assert list(probes) == ["1", "2"] and probes["2"]["linear"] == report["linear"]
    assert {k: v for k, v in report_of(done).items() if "linear" in k or "knn" in k} == \
        {k: v for k, v in report.items() if "linear" in k or "knn" in k}


# --- seeds, comparison ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def seeds(few, tmp_path_factory):
    """--seeds 0 1 of the baseline: (folder, the table that main returned)."""
    out = tmp_path_factory.mktemp("seeds") / "none"
    return out, S.main(flags(few, "--layer", "none", "--seeds", 0, 1, "--out", out))


def test_seeds_give_mean_and_deviation_over_run_folders(seeds, done):
    out, table = seeds
    runs = sorted(p.parent for p in out.parent.rglob("report.json"))
    assert len(runs) == 2 and not equal(*map(model_of, runs))
    assert [json.loads((r / "config.json").read_text())["seed"] for r in runs] == [0, 1]
    for key in ("linear", "knn", "linear_untrained", "alignment_test"):
        values = [report_of(r)[key] for r in runs]
        assert table[key] == pytest.approx((statistics.mean(values), statistics.stdev(values)))
    assert report_of(runs[0])["linear_untrained"] == report_of(done)["linear_untrained"]    # the same start


def test_compare_prints_one_table_and_draws_it(seeds, done, few, tmp_path, capsys):
    """Seeds are pooled, each kind of run is one row, unfinished and foreign folders are left out and named."""
    runs = [shutil.copytree(p.parent, tmp_path / f"none-s{i}")
            for i, p in enumerate(sorted(seeds[0].parent.rglob("report.json")))]
    for run in runs:
        report = report_of(run)
        (run / "report.json").write_text(json.dumps({**report, "run": run.name}))
    runs.append(shutil.copytree(done, tmp_path / "base"))
    unfinished = shutil.copytree(done, tmp_path / "unfinished")
    (unfinished / "report.json").unlink()
    table = S.main(["--compare", *map(str, runs), str(unfinished), str(tmp_path / "nowhere")])
    text = capsys.readouterr().out
    table = {Path(name).name: row for name, row in table.items()}
    assert set(table) == {"none", "base"} and table["none"]["seeds"] == 2 and table["base"]["seeds"] == 1
    values = [report_of(r)["linear"] for r in runs[:2]]
    assert table["none"]["linear"] == pytest.approx((statistics.mean(values), statistics.stdev(values)))
    row = next(line for line in text.splitlines() if line.endswith("none"))
    assert f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}" in row
    assert "unfinished: left out" in text and "nowhere: left out" in text
    drawn = next(tmp_path.glob("*.png")).read_bytes()
    assert drawn.startswith(PNG[0]) and drawn.endswith(PNG[1])


def test_compare_keeps_experiments_with_seed_folders_apart(seeds, done, tmp_path):
    """`--seeds 0 1 --out a` and `--seeds 0 1 --out b` are two rows, though their run folders are called alike."""
    for experiment, layer in (("a", []), ("b", [4])):
        for seed in (0, 1):
            run = shutil.copytree(sorted(seeds[0].parent.rglob("report.json"))[seed].parent,
                                  tmp_path / experiment / f"s{seed}")
            report = report_of(run)
            report.update(layers_augmented=layer, flags={**report["flags"], "layer": list(map(str, layer)) or ["none"]})
            (run / "report.json").write_text(json.dumps(report))
    table = S.main(["--compare", *map(str, sorted(tmp_path.glob("*/s*")))])
    assert len(table) == 2 and all(row["seeds"] == 2 for row in table.values())


# --- every option -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def plain(few, tmp_path_factory):
    return train(few, tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize("more", [
    "--layer none", "--layer -1", "--layer 0", "--layer 5", "--layer 6", "--layer 1 3 6", "--layer all",
    "--layer all --sample 1 --no-stop-grad --rate 0.1", "--no-stop-grad", "--sample 1", "--rate 0.1",
    "--transform channel", "--transform channel --layer 6", "--transform pca", "--transform pca --components 3",
    "--pairs cross", "--freeze before", "--freeze after", "--optimizer lars", "--blur 1", "--solarize 1",
    "--crop-min 0.9", "--head-layers 3", "--objective supervised", "--temperature 0.1", "--weight-decay 0.1",
    "--lr 0.1", "--image-size 24", "--batch-size 16"])
def test_every_option_trains_and_changes_the_result(few, tmp_path, plain, more):
    """Four steps: finite loss and weights, and other weights than without the option."""
    weights, report = train(few, tmp_path / "run", *more.split())
    assert math.isfinite(report["loss"]) and all(v.isfinite().all() for v in weights.values())
    assert not equal(weights, plain[0])


def test_freeze_and_init_keep_what_they_name(few, done, tmp_path):
    """--init starts from the run's weights; --freeze before 2 keeps layers -1..2, their BatchNorm statistics too;
    after 2 keeps the others."""
    start = model_of(done)
    for which in ("before", "after"):
        out = tmp_path / which
        report = S.main(flags(few, "--layer", 2, "--freeze", which, "--init", done, "--epochs", 1, "--out", out))
        for k, v in model_of(out).items():
            below = k.split(".")[1] in ("input", "stem", "layer1", "layer2")
            kept = below == (which == "before") or ".input." in k
            assert torch.equal(v, start[k]) == kept, k
        assert report["linear_untrained"] == report_of(done)["linear_untrained"]     # untrained is not the init


def test_layer_auto_is_where_the_co_adapted_stretch_starts_or_ends(few, done, live, tmp_path, capsys):
    """--layer auto --init: the start of the stretch with stop-gradient, its end without, read off exact CKA."""
    from cka import coadapted_stretch, linear_cka
    _, _, _, test, _ = build(few)
    with torch.no_grad():
        acts = live.activations(S.to_unit(test.images, 32))
    acts = [acts[name].flatten(1) for name in live.numbered()]
    exact = torch.tensor([[float(linear_cka(x, y)) for y in acts] for x in acts])
    torch.testing.assert_close(S.layer_map(live, test, S.settings(flags(few)), CPU).float(), exact, atol=0.3, rtol=0)
    a = S.settings(flags(few, "--layer", "auto", "--init", done))
    start, end = coadapted_stretch(S.layer_map(live, test, a, CPU))
    assert S.auto_layer(live, test, a, CPU) == start
    a.stop_grad = False
    assert S.auto_layer(live, test, a, CPU) == end
    report = S.main(flags(few, "--layer", "auto", "--init", done, "--epochs", 1, "--out", tmp_path / "run"))
    assert report["layers_augmented"] == [start] and f"layer {start}" in capsys.readouterr().out


def test_supervised_run(few, tmp_path):
    """A classifier instead of the head; no alignment is reported; the export is an encoder like the others."""
    report = S.main(flags(few, "--objective", "supervised", "--out", tmp_path / "run"))
    assert "linear" in report and "alignment_test" not in report
    encoder = torch.jit.load(tmp_path / "run" / "encoder.pt")
    assert encoder(batches()[2]).shape == (7, 128) and encoder.activations(batches()[2])[-1].shape == (7, 4)


def test_transfer_probes_the_trained_encoder_elsewhere(few, tmp_path, monkeypatch):
    """--transfer shapes (here a sixteenth of it) reports both probes; the run's own numbers are those without."""
    draw = S.draw_shapes
    monkeypatch.setattr(S, "draw_shapes", lambda n, seed, device: draw(n // 16, seed, device))
    report = S.main(flags(few, "--transfer", "shapes", "--epochs", 1, "--out", tmp_path / "run"))
    assert 0 < report["transfer_shapes_linear"] <= 100 and 0 <= report["transfer_shapes_knn"] <= 100


def test_transfer_shows_the_network_pictures_of_its_own_size(few, tmp_path, monkeypatch):
    """A network trained at 48 px is probed on 32-px shapes at 48 px, as it was trained."""
    seen, features, draw = set(), S.Net.features, S.draw_shapes
    monkeypatch.setattr(S, "draw_shapes", lambda n, seed, device: draw(n // 16, seed, device))
    for i, f in enumerate(sorted(few.rglob("*.png"))[::4]):
        (tmp_path / "big" / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.open(f).resize((48, 48)).save(tmp_path / "big" / f"class{i % 2}" / f"{i}.png")

    def spy(net, images):
        if not torch.jit.is_tracing():
            seen.add(tuple(images.shape[2:]))
        return features(net, images)
    monkeypatch.setattr(S.Net, "features", spy)
    S.main(flags(tmp_path / "big", "--transfer", "shapes", "--epochs", 1, "--out", tmp_path / "run"))
    assert seen == {(48, 48)}


def test_pictures_of_several_sizes_without_labels_and_a_broken_one(few, tmp_path, capsys):
    """No class folders: trains without probes and says so; a broken picture is named once, skipped and counted."""
    (tmp_path / "flat").mkdir()
    for i, f in enumerate(sorted(few.rglob("*.png"))[::3]):
        Image.open(f).resize((32 + i % 3, 40)).save(tmp_path / "flat" / f"{i:03}.png")
    (tmp_path / "flat" / "031.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    report = S.main(flags(tmp_path / "flat", "--workers", 1, "--image-size", 32, "--out", tmp_path / "run"))
    text = capsys.readouterr().out
    assert "linear" not in report and math.isfinite(report["loss"]) and "alignment_test" in report
    assert "no class folders" in text and text.count("031.png") == 1 and report["broken_pictures"] == 1
    assert (tmp_path / "run" / "encoder.pt").exists() and (tmp_path / "run" / "curves.png").exists()


def test_an_older_run_moves_aside(few, tmp_path):
    """The same --out again: what was there is kept whole under another name, twice too."""
    out = tmp_path / "run"
    for name, text in (("run", "newer"), ("run.1", "oldest")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "note.txt").write_text(text)
    S.main(flags(few, "--epochs", 1, "--out", out))
    assert {p.parent.name: p.read_text() for p in tmp_path.rglob("note.txt")} == {"run.1": "oldest", "run.2": "newer"}
    assert (out / "report.json").exists() and not (out / "note.txt").exists()


def test_run_name_says_what_differs_from_the_defaults():
    assert S.settings([]).name == "simclr_deepaug-shapes"
    assert S.settings(["--layer", "none"]).name == "simclr_deepaug-shapes-layernone"
    name = S.settings(["--layer", "3", "5", "--rate", "0.1", "--no-stop-grad", "--dataset", "cifar10"]).name
    assert name == "simclr_deepaug-cifar10-layer3_5-rate0.1-stopgradFalse"
    assert S.settings(["--device", "cpu", "--workers", "3", "--seed", "4"]).name == "simclr_deepaug-shapes"


def test_preset_paper_sets_the_papers_values_and_flags_win():
    a = S.settings(["--preset", "paper"])
    assert (a.dataset, a.arch, a.batch_size, a.epochs) == ("cifar100", "resnet18", 1024, 1500)
    assert a.lr == pytest.approx(3.571429, rel=1e-6) and a.weight_decay == pytest.approx(1.4e-5)
    a = S.settings(["--preset", "paper", "--epochs", "3", "--dataset", "cifar10"])
    assert (a.dataset, a.epochs, a.arch) == ("cifar10", 3, "resnet18")


def test_help_names_every_flag_of_the_design(capsys):
    with pytest.raises(SystemExit) as end:
        S.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    for flag in ("epochs", "batch-size", "lr", "seed", "seeds", "device", "out", "resume", "init", "export", "compile",
                 "deterministic", "layer", "rate", "stop-grad", "sample", "transform"):
        assert f"--{flag}" in text


# --- it learns --------------------------------------------------------------------------------------------------------

def test_the_default_method_learns_drawn_shapes(tmp_path):
    """Slow (15 s on one core): 6 epochs of the default method on 3,000 drawn shapes; the probe of the frozen features
    rises by more than 12 points over the untrained network's (measured: 19 to 38)."""
    a = S.settings(["--epochs", "6", "--batch-size", "128", "--device", "cpu"])
    splits = [S.Split(y, 32, images=x) for x, y in (S.draw_shapes(3000, 0, CPU), S.draw_shapes(1000, 1, CPU))]
    net = S.build(a, splits[0], list(range(20)), CPU)

    def linear():
        return S.linear_probe(*S.encode(net, splits[0], a, CPU), *S.encode(net, splits[1], a, CPU), 20)["linear"]
    before = linear()
    S.train(a, net, splits[0], tmp_path, CPU, 3000 // 128, None, None)
    after = linear()
    assert before < 30 and after > before + 12, (before, after)


@pytest.mark.skipif(not (shutil.which("g++") and os.environ.get("SLOW")), reason="compiling takes a minute: SLOW=1 g++")
def test_compile_trains_as_eager_does(few, tmp_path):
    """--compile on the CPU: after two steps the weights are those of the eager run, to rounding (SLOW=1 to run)."""
    eager, _ = train(few, tmp_path / "eager", "--layer", "none", "--lr", "0.01", steps=1)
    begun = time.time()
    compiled, _ = train(few, tmp_path / "compiled", "--layer", "none", "--lr", "0.01", "--compile", steps=1)
    print(f"{time.time() - begun:.0f} s")
    for k in eager:
        torch.testing.assert_close(F.normalize(compiled[k].float().flatten(), dim=0),
                                   F.normalize(eager[k].float().flatten(), dim=0), atol=1e-3, rtol=0)
