"""Whole runs of topk_rescue.py on a few drawn pictures: folder, export, baseline, sweep, transfer, resume, two
processes."""
import csv
import json
import math
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchvision
import transformers
from conftest import same_bits
from PIL import Image
from safetensors.torch import load_file

import cka
import topk_rescue as R
import vicreg_probe as V

pytestmark = pytest.mark.filterwarnings("ignore:Encountering a list", "ignore:.*is_gradient_checkpointing")
CPU = torch.device("cpu")
LOADED = {}                                                          # pictures that runs without probes share
METHODS = {"simclr": ["--blur", "0.5"],
           "mocov3": ["--method", "mocov3", "--arch", "vit-tiny"],
           "dinov2": ["--method", "dinov2", "--strong", "deepaug", "--layer", "2", "--drop-path", "0.2",
                      "--centering", "centering"]}


def flags(data, *more):
    """Two epochs of four steps; every step is logged."""
    return ["--dataset", "folder", "--data-dir", str(data), "--image-size", "32", "--workers", "0", "--device", "cpu",
            "--epochs", "2", "--batch-size", "54", "--k", "3", "--projector", "32", "16", "--prototypes", "32",
            "--local-crops", "2", "--log-every", "1", *map(str, more)]


def quick(*words):
    """main with training, folders and tables alone: probes tell k + seed, no export, no figures."""
    def told(net, train, test, classes, a, device):
        return {"linear": float(a.k + a.seed), "linear_decay": 0.1, "knn": 2.0 * a.k}
    def load_once(name, a, device, load=R.load_data):
        key = a.data_dir, a.image_size
        if key not in LOADED:
            LOADED[key] = load(name, a, device)
        return LOADED[key]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(R, "probe", told)
        patch.setattr(R, "load_data", load_once)
        patch.setattr(R, "export", lambda *_: 0.0)
        patch.setattr(R, "draw_figures", lambda *_: None)
        return R.main([*map(str, words)])


def plain(data, *more):
    """One epoch of two steps, without baseline: the cheapest run."""
    return flags(data, "--epochs", 1, "--batch-size", 108, "--no-baseline", *more)


@pytest.fixture(scope="module")
def done(few, tmp_path_factory):
    """{method: the folder of a finished run}; simclr with its baseline. Tests read them and change nothing."""
    root = tmp_path_factory.mktemp("done")
    for method, words in METHODS.items():
        with pytest.MonkeyPatch.context() as patch:
            draw, export = R.draw_figures, R.export                  # they take long: not of the baseline, mocov3
            patch.setattr(R, "draw_figures", lambda a, *more, draw=draw: None if a.rescue == "none" or
                          a.method == "mocov3" else draw(a, *more))
            patch.setattr(R, "export", lambda a, *more, export=export: 0.0 if a.rescue == "none" else
                          export(a, *more))
            R.main(flags(few, *words, "--out", root / method, *(["--no-baseline"] if method != "simclr" else [])))
    return {method: root / method for method in METHODS}


def build(data, *more):
    """(settings, Rescue, train split, test split)"""
    a = R.settings(flags(data, *more))
    train, test, _ = R.load_data(a.dataset, a, CPU)
    return a, R.build(a, train, CPU), train, test


@pytest.fixture(scope="module")
def live(few, done):
    """{method: the trained network that is kept, in eval mode}."""
    nets = {}
    for method, words in METHODS.items():
        step_of = build(few, *words)[1]
        step_of.method.load_state_dict(load(done[method])["model"])
        nets[method] = step_of.method.kept.eval()
    return nets


def load(run):
    return torch.load(Path(run) / "checkpoint.pt", weights_only=True)


def report_of(run):
    return json.loads((Path(run) / "report.json").read_text())


def rows_of(run):
    with open(Path(run) / "metrics.csv") as f:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]


# --- the run folder ---------------------------------------------------------------------------------------------------

FILES = {"config.json", "metrics.csv", "similarity.npz", "checkpoint.pt", "encoder.pt", "weights.safetensors",
         "report.json", "samples.npz"}


def test_run_folder_holds_every_file_and_no_leftover(done):
    pictures = {"easy.png", "curves.png", "cka.png"}
    for method, more in (("simclr", pictures), ("mocov3", {"model"}), ("dinov2", pictures | {"model"})):
        assert {p.name for p in done[method].iterdir()} == FILES | more
    for picture in [*done["simclr"].glob("*.png"), *done["dinov2"].glob("*.png")]:
        pixels = np.asarray(Image.open(picture).convert("RGB")) @ np.array([1, 256, 65536])
        assert min(pixels.shape) > 400 and len(np.unique(pixels)) > 200, picture


@pytest.mark.parametrize("method", METHODS)
def test_metrics_and_histograms_hold_what_was_easy(done, method):
    rows, report = rows_of(done[method]), report_of(done[method])
    assert list(rows[0]) == ["step", "epoch", "loss", "base_loss", "lr", "images_per_second", "similarity",
                             "similarity_chosen", "similarity_strong", "ever_rescued", "embedding_std",
                             "effective_rank", "alignment", "uniformity"]
    assert [r["step"] for r in rows] == list(range(1, 9)) and rows[-1]["epoch"] == 2
    for r in rows:
        assert all(math.isfinite(v) for v in r.values())
        assert r["loss"] == pytest.approx(r["base_loss"] - report["flags"]["s"] * r["similarity_strong"], abs=1e-4)
        assert -1 <= r["similarity"] < r["similarity_chosen"] <= 1 + 1e-6
    with np.load(done[method] / "similarity.npz") as f:
        assert f["steps"].tolist() == list(range(1, 9)) and f["counts"].shape == (8, 40)
        assert (f["counts"].sum(1) == 54).all() and len(f["rescued"]) == 216 and f["rescued"].sum() == 8 * 3
        centres = (np.arange(40) + 0.5) / 20 - 1
        for row, counts in zip(rows, f["counts"]):                   # the histogram is of these very similarities
            assert (counts * centres).sum() / 54 == pytest.approx(row["similarity"], abs=0.0251)
        assert report["ever_rescued"] == pytest.approx(100 * (f["rescued"] > 0).mean())


@pytest.mark.parametrize("method", METHODS)
def test_report_holds_the_measurements_flat(done, method):
    report, config = (json.loads((done[method] / f"{n}.json").read_text()) for n in ("report", "config"))
    assert {"script", "run", "flags", "layers_augmented", "seconds", "images_per_second", "linear", "linear_decay",
            "knn", "linear_untrained", "knn_untrained", "similarity", "similarity_chosen", "similarity_strong",
            "ever_rescued", "lowest_embedding_std", "collapsed", "loss", "broken_pictures"} <= report.keys()
    assert report["steps"] == 8 and report["epochs"] == 2 and report["export_difference"] <= 1e-4
    assert report["layers_augmented"] == ([2] if method == "dinov2" else []) and report["run"] == method
    drawn = ("patch", "local_size")                                  # config.json tells those that 0 stood for
    assert all(config[k] == v for k, v in report["flags"].items() if k not in drawn)
    assert config["patch"] == (0 if method == "simclr" else 8)
    assert report["loss"] == rows_of(done[method])[-1]["loss"] and config["processes"] == 1
    assert ("linear_baseline" in report) == (method == "simclr")


# --- the export -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", METHODS)
def test_encoder_equals_the_live_network_and_names_its_layers(done, live, method):
    extra, net = {"config.json": ""}, live[method]
    encoder = torch.jit.load(done[method] / "encoder.pt", _extra_files=extra)
    config, x = json.loads(extra["config.json"]), torch.rand(5, 3, 32, 32)
    head = {"simclr": 2, "mocov3": 7, "dinov2": 4}[method]           # modules before the last
    body = [f"layer{s}.0.{kind}" for s in (1, 2, 3, 4) for kind in ("odd", "even")]
    body = ["stem", *body, "avgpool"] if method == "simclr" else ["embed", *[f"block{i}" for i in (1, 2, 3, 4)], "cls"]
    assert config["layers"] == [*body, *[f"head.{i}" for i in range(head)], "head"]
    numbered = [n for n in config["layers"] if not n.endswith("odd") and not n.startswith("head.")]
    assert config["layer_numbers"] == {n: i for i, n in enumerate(numbered)}
    assert config["image_size"] == 32 and config["dim"] == net.dim and config["script"] == "topk_rescue"
    assert config["measurements"]["linear"] == report_of(done[method])["linear"]
    with torch.no_grad():
        acts = dict(zip(config["layers"], encoder.activations(x)))
        assert len(acts) == len(config["layers"])
        torch.testing.assert_close(encoder(x), net.features(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(acts[body[-1]], net.features(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(acts["head"], net(x)[1], rtol=1e-4, atol=1e-5)
        if method == "simclr":
            b = net.backbone
            h = b.maxpool(b.relu(b.bn1(b.conv1(net.normalize(x)))))
            torch.testing.assert_close(acts["stem"], h, rtol=1e-4, atol=1e-5)
            for s in (1, 2, 3, 4):
                h = getattr(b, f"layer{s}")(h)
                torch.testing.assert_close(acts[f"layer{s}.0.even"], h, rtol=1e-4, atol=1e-5)
        else:
            hidden = net.backbone(net.normalize(x), output_hidden_states=True).hidden_states
            for name, expected in zip(body[:-1], hidden):
                torch.testing.assert_close(acts[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["mocov3", "dinov2"])
def test_vit_weights_load_into_transformers_and_give_the_same_features(done, live, method):
    encoder, x = torch.jit.load(done[method] / "encoder.pt"), torch.rand(3, 3, 32, 32)
    whole = transformers.Dinov2Model.from_pretrained(done[method] / "model").eval()
    bare = transformers.Dinov2Model(whole.config).eval()
    bare.load_state_dict(load_file(done[method] / "weights.safetensors"))
    with torch.no_grad():
        for theirs in (whole, bare):
            seen = theirs(live[method].normalize(x)).last_hidden_state[:, 0]
            torch.testing.assert_close(seen, encoder(x), rtol=1e-4, atol=1e-5)


def test_resnet50_weights_load_into_torchvisions_detection_model(few, tmp_path, monkeypatch):
    """No backbone key is missing, none is left over, and the features are the same."""
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", lambda t, *_, **__: t)    # 25 M weights, drawn many times
    monkeypatch.setattr(torch.nn.init, "kaiming_normal_", lambda t, *_, **__: t.data.uniform_(-0.05, 0.05))
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda n, *shape: rand(min(n, 2), *shape))    # export's check on 64 pictures
    monkeypatch.setattr(R.Net, "activations", lambda net, x: {"avgpool": net.features(x)})    # other tests' concern
    a, step_of, _, test = build(few, "--arch", "resnet50", "--image-size", 64)
    net = step_of.method.kept.eval()
    for m in net.modules():                                          # as after training: statistics of its own
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    assert R.export(step_of.a, net, test, ["a", "b"], tmp_path, {}) <= 1e-4
    weights, x = load_file(tmp_path / "weights.safetensors"), torch.rand(2, 3, 64, 64)
    detector = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).eval()
    body = detector.backbone.body
    missing, unexpected = body.load_state_dict(weights, strict=False)
    assert missing == [] and unexpected == []
    with torch.no_grad():
        expected, x = net.features(x), net.normalize(x)
        torch.testing.assert_close(list(body(x).values())[-1].mean((2, 3)), expected, rtol=1e-4, atol=1e-5)


def test_resnet18_of_small_pictures_is_torchvisions_with_another_stem():
    """Below 64 pixels: 3x3, stride 1, no max pooling; every other key and shape is torchvision's."""
    ours = R.resnet(R.settings(["--arch", "resnet18"]), 32)[0].eval()
    theirs = torchvision.models.resnet18(weights=None).eval()
    theirs.conv1, theirs.maxpool = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False), torch.nn.Identity()
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert sorted(missing) == ["fc.bias", "fc.weight"] and unexpected == []
    theirs.fc, x = torch.nn.Identity(), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), ours(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method, layers", [("simclr", 7), ("dinov2", 7)])
def test_cka_and_vicreg_probe_read_the_encoders(done, tmp_path, method, layers):
    encoder = done[method] / "encoder.pt"
    measured = cka.main([str(encoder), "--images", "16", "--batch-size", "8", "--numbered", "--out",
                         str(tmp_path / "map.png")])
    assert (tmp_path / "map.png").exists() and np.asarray(measured["map"]).shape == (layers, layers)
    report = V.main(["--encoder", str(encoder), "--device", "cpu", "--workers", "0", "--sample-level", "0", "0", "0",
                     "--target-net", "none", "--mine-steps", "0", "--probes", "ncc", "--probe-images", "60", "--out",
                     str(tmp_path / "probes")])
    assert 0 < report["ncc_test_class"] <= 100


# --- baseline, seeds, sweep -------------------------------------------------------------------------------------------

def test_baseline_stands_beside(done):
    """Trained without rescue into OUT-baseline; its numbers are the run's *_baseline."""
    out = done["simclr"]
    report, baseline = report_of(out), report_of(f"{out}-baseline")
    assert baseline["flags"]["rescue"] == "none" and baseline["ever_rescued"] == 0
    assert report["linear_baseline"] == baseline["linear"] and report["knn_baseline"] == baseline["knn"]
    assert report["linear_untrained"] == baseline["linear_untrained"]
    assert all(math.isnan(r["similarity_chosen"]) and r["loss"] == r["base_loss"] for r in rows_of(f"{out}-baseline"))


@pytest.mark.parametrize("change, trained", [
    ("", 1), ("--k 5", 1), ("--s 3 --rescue hardest", 1), ("--strong deepaug --layer 2", 1), ("--workers 1", 1),
    ("--resume", 0), ("--lr 0.1", 2), ("--seed 1", 2), ("--arch resnet18", 2), ("--no-baseline", 1)])
def test_a_finished_baseline_is_not_trained_again(few, done, monkeypatch, change, trained):
    """Only flags of the rescue may differ. (Nothing is trained here at all.)"""
    runs = []
    monkeypatch.setattr(R, "run", lambda r, baseline=None: runs.append((r.rescue, baseline)) or {"linear": -1.0})
    R.main(flags(few, *METHODS["simclr"], *change.split(), "--out", done["simclr"]))
    assert len(runs) == trained
    if trained == 1 and change != "--no-baseline":
        assert runs[0][1]["linear"] == report_of(f"{done['simclr']}-baseline")["linear"]
    if trained == 2:
        assert runs[0][0] == "none" and runs[1][1] == {"linear": -1.0}


def test_an_unfinished_or_older_scripts_baseline_is_trained_again(few, done, monkeypatch):
    a = R.settings(flags(few, *METHODS["simclr"], "--rescue", "none", "--k", 1))
    a.k = 54 // 64 or 1                                              # the default, which a baseline has
    baseline = Path(f"{done['simclr']}-baseline")
    assert R.finished(baseline, a)["linear"] == report_of(baseline)["linear"]
    assert R.finished(baseline.parent / "nowhere", a) is None
    with monkeypatch.context() as patch:
        patch.setattr(R, "SOURCE", R.SOURCE + " ")
        assert R.finished(baseline, a) is None
    load_json = json.loads
    monkeypatch.setattr(json, "loads", lambda text: {k: v for k, v in load_json(text).items()
                                                     if k != "export_difference"})
    assert R.finished(baseline, a) is None                           # killed during the export


def test_k_0_is_the_baseline_bit_for_bit(few, done, tmp_path):
    report = quick(*flags(few, *METHODS["simclr"], "--k", 0, "--no-baseline", "--out", tmp_path / "run"))
    ours, theirs, rescued = load(tmp_path / "run"), load(f"{done['simclr']}-baseline"), load(done["simclr"])
    assert report["flags"]["rescue"] == "topk" and report["ever_rescued"] == 0
    assert same_bits(ours["model"], theirs["model"]) and same_bits(ours["optimizer"], theirs["optimizer"])
    assert not same_bits(ours["model"], rescued["model"])


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is saved."""
    kept, save = [], R.save_figure

    def spy(figure, path):
        kept.append(figure)
        save(figure, path)
    monkeypatch.setattr(R, "save_figure", spy)
    return kept


def test_sweep_of_k_with_seeds_is_pooled_and_drawn_beside_the_baseline(few, tmp_path, figures):
    """Probes tell k + seed: a mean of k + .5 and the deviation of 0 and 1; the baseline has the default k, 2."""
    words = plain(few, "--sweep", "k", 2, 4, "--seeds", 0, 1, "--out", tmp_path / "run", "--baseline")
    table = quick(*words)
    deviation = pytest.approx(math.sqrt(0.5))
    for name, k in (("none", 2), ("k2", 2), ("k4", 4)):
        row = table[str(tmp_path / "run" / name)]
        assert row["gain"] == (k - 2, 0) or name == "none"           # over the baseline of the same seed
        assert row["linear"] == (k + 0.5, deviation) and row["knn"] == (2 * k, 0) and row["seeds"] == 2
        assert report_of(tmp_path / "run" / name / "s1")["flags"]["seed"] == 1
    assert len(table) == 3 and list(tmp_path.rglob("compare.png")) == [tmp_path / "run" / "compare.png"]
    axis = figures[-1].axes[0]
    labels = {line.get_label(): line for line in axis.get_lines()}
    assert set(labels["simclr, baseline"].get_ydata()) == {2.5}
    assert "k" in axis.get_xlabel() and axis.containers[0].lines[0].get_xdata().tolist() == [2, 4]
    assert axis.containers[0].lines[0].get_ydata().tolist() == [2.5, 4.5]
    again = R.main(["--compare", *map(str, sorted((tmp_path / "run").glob("*/s*")))])
    assert again == table
    with pytest.MonkeyPatch.context() as patch:                      # all are finished: nothing is trained
        patch.setattr(R, "run", None)
        assert quick(*words, "--resume") == table


def test_a_value_of_the_sweep_that_diverges_is_shown_as_collapsed(few, tmp_path, figures, capsys):
    """s = 1e9 at a huge learning rate: told, greyed in the figure; the values after it are trained."""
    words = plain(few, "--sweep", "s", 1e9, 1, "--lr", 1e3, "--epochs", 2, "--batch-size", 54, "--out", tmp_path / "r")
    table = quick(*words)
    lost, kept = (row for name, row in sorted(table.items(), reverse=True, key=lambda item: "1000000" in item[0]))
    assert lost["collapsed"] and math.isnan(lost["linear"][0]) and kept["linear"] == (3, None)
    text = capsys.readouterr()
    assert "the loss is" in text.out and [line for line in text.out.splitlines() if line.endswith("collapsed")]
    assert any(p.get_x() == 1e9 for p in figures[-1].axes[0].patches)


def test_without_sweep_a_diverging_run_ends_with_code_2(few, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        quick(*plain(few, "--s", 1e9, "--lr", 1e3, "--epochs", 2, "--batch-size", 54, "--out", tmp_path / "run"))
    assert end.value.code == 2 and "step" in capsys.readouterr().err.splitlines()[-1]
    assert report_of(tmp_path / "run")["collapsed"] == 1


# --- which pairs, which strong view -----------------------------------------------------------------------------------

@pytest.mark.parametrize("rescue, most, k", [("all", "every", 108), ("random", "any", 3), ("hardest", "least", 3),
                                             ("none", "no", 0)])
def test_rescue_chooses_the_pairs_it_names(few, tmp_path, rescue, most, k):
    report = quick(*plain(few, "--rescue", rescue, "--out", tmp_path / "run"))
    with np.load(tmp_path / "run" / "similarity.npz") as f:
        assert f["rescued"].sum() == 2 * k and f["rescued"].max() == (k > 0)
    for r in rows_of(tmp_path / "run"):
        if rescue == "all":
            assert r["similarity_chosen"] == pytest.approx(r["similarity"], abs=1e-5)
        elif rescue == "hardest":
            assert r["similarity_chosen"] < r["similarity"]
        else:
            assert math.isnan(r["similarity_chosen"]) == (rescue == "none")
    assert report["ever_rescued"] == pytest.approx({"all": 100, "none": 0}.get(rescue, report["ever_rescued"]))


def gradients(few_batch, *words):
    """(loss, {parameter: gradient}) of the first step of MoCo v3, where z_a sends no gradient."""
    a = R.settings(["--method", "mocov3", "--device", "cpu", "--projector", "32", "16", "--batch-size", "24", "--k",
                    "6", "--image-size", "32", *words])
    split = R.Split(None, 32, images=few_batch)
    step_of = R.build(a, split, CPU).train()
    torch.manual_seed(0)
    loss = step_of(few_batch, 0.0)[0]
    loss.backward()
    return loss.item(), {k: p.grad for k, p in step_of.method.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("arch, layer, below, above", [
    ("small", "-1", (), ("backbone.conv1", "layer1")),
    ("small", "0", ("backbone.conv1", "backbone.bn1"), ("layer1", "layer4")),
    ("small", "2", ("backbone.conv1", "layer1", "layer2"), ("layer3", "layer4")),
    ("small", "5", ("backbone.conv1", "layer4"), ("online.projector",)),
    ("small", "6", ("backbone.conv1", "layer4", "online.projector"), ("predictor",)),
    ("vit-tiny", "0", ("cls_token",), ("layer.0.", "layer.3.")),
    ("vit-tiny", "2", ("cls_token", "layer.0.", "layer.1."), ("layer.2.", "layer.3.")),
    ("vit-tiny", "5", ("layer.3.", "backbone.layernorm"), ("online.projector",)),
    ("vit-tiny", "6", ("layer.3.", "online.projector"), ("predictor",))])
def test_deep_augmentation_sits_at_the_layer_that_is_named(arch, layer, below, above):
    """With stop-gradient the rescue term reaches what is above the layer, and nothing below it."""
    images = torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    deep = ["--arch", arch, "--strong", "deepaug", "--layer", layer]
    base_loss, base = gradients(images, "--arch", arch, "--rescue", "none")
    loss, ours = gradients(images, *deep, "--s", "10")
    _, free = gradients(images, *deep, "--s", "10", "--no-stop-grad")
    assert math.isfinite(loss) and loss != base_loss
    for parts, same in ((below, True), (above, False)):
        for part in parts:
            names = [k for k in base if part in k]
            assert names, part
            assert all(torch.allclose(ours[k], base[k], rtol=1e-4, atol=1e-7) for k in names) == same, part
            assert not all(torch.allclose(free[k], base[k], rtol=1e-4, atol=1e-7) for k in names), part


def test_layer_auto_reads_the_run_that_init_names(few, done, tmp_path, monkeypatch):
    words = [*METHODS["simclr"], "--strong", "deepaug", "--layer", "auto", "--init", done["simclr"], "--epochs", 1]
    a, step_of, train, _ = build(few, *words)
    step_of.method.load_state_dict(load(done["simclr"])["model"])
    expected, start, run = R.auto_layer(step_of.method.kept, train, a, CPU), [], R.train

    def spy(a, step_of, *more):
        start.append({k: v.clone() for k, v in step_of.method.state_dict().items()})
        return run(a, step_of, *more)
    monkeypatch.setattr(R, "train", spy)
    report = quick(*flags(few, *words, "--out", tmp_path / "run"))
    assert report["layers_augmented"] == [expected]
    assert report_of(tmp_path / "run-baseline")["layers_augmented"] == []
    trained = load(done["simclr"])["model"]
    assert len(start) == 2 and all(same_bits(dict(s), dict(trained)) for s in start)


# --- other data -------------------------------------------------------------------------------------------------------

def test_pictures_of_several_sizes_are_streamed(few, tmp_path, capsys):
    """--dataset folder: decoded in each epoch; a broken picture is named once, skipped and counted."""
    for i, f in enumerate(sorted(few.rglob("*.png"))[::3]):
        (tmp_path / "mixed" / f.parent.name).mkdir(parents=True, exist_ok=True)
        Image.open(f).resize((40 + i % 3, 60)).save(tmp_path / "mixed" / f.parent.name / f.name)
    broken = tmp_path / "mixed" / "class1" / "03.png"
    assert broken.exists()
    broken.write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    seen, view = set(), R.common_view
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(R, "common_view", lambda x, *more: seen.add(tuple(x.shape)) or view(x, *more))
        patch.setattr(R, "draw_figures", lambda *_: None)
        patch.setattr(R, "export", lambda *_: 0.0)
        report = R.main(plain(tmp_path / "mixed", "--batch-size", 36, "--out", tmp_path / "run"))
    assert seen == {(36, 3, 36, 36)}                                 # 8/7 of a view: room for the crops
    assert report["broken_pictures"] == 1 and capsys.readouterr().out.count("03.png") == 1
    assert report["steps"] == 2 and "linear" in report and math.isfinite(report["loss"])


def picture(path, colour, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), colour).convert(mode).save(path, quality=95)


COLOURS = ["red", "blue", "white"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """DTD, VOC2007 and Caltech101 in torchvision's layouts; a class is a colour, so its probe is always right."""
    root = tmp_path_factory.mktemp("sets")
    for split, n in (("train", 8), ("val", 2), ("test", 3)):
        (root / "dtd/dtd/labels").mkdir(parents=True, exist_ok=True)
        names = [f"{c}/{split}{i}.jpg" for c in COLOURS for i in range(n)]
        (root / f"dtd/dtd/labels/{split}1.txt").write_text("\n".join(names))
        for name in names:
            picture(root / "dtd/dtd/images" / name, name.split("/")[0], "L" if "white" in name else "RGB")
    voc = root / "VOCdevkit/VOC2007"
    for folder in ("ImageSets/Main", "Annotations"):
        (voc / folder).mkdir(parents=True)
    for split, n in (("trainval", 8), ("test", 3)):
        names = []
        for c, thing in zip(COLOURS, ("cat", "dog", "person")):
            for i in range(n):
                names.append(f"{split}{c}{i}")
                picture(voc / f"JPEGImages/{names[-1]}.jpg", c)
                # every cat has a dog behind it that is marked difficult: for dogs these pictures do not count
                things = [(thing, 0)] + ([("dog", 1)] if thing == "cat" else [])
                objects = "".join(f"<object><name>{t}</name><difficult>{d}</difficult></object>" for t, d in things)
                (voc / f"Annotations/{names[-1]}.xml").write_text(f"<annotation>{objects}</annotation>")
        (voc / f"ImageSets/Main/{split}.txt").write_text("\n".join(names))
    for c, n in zip([*COLOURS, "BACKGROUND_Google"], (33, 32, 31, 2)):
        for i in range(n):
            picture(root / f"caltech101/101_ObjectCategories/{c}/image_{i + 1:04}.jpg", c if n > 2 else "green")
    return root


@pytest.fixture
def scipy(monkeypatch):
    """Caltech101 imports it for annotations that are not used here; it is no requirement of this project."""
    package = types.ModuleType("scipy")
    package.io = types.ModuleType("scipy.io")
    monkeypatch.setitem(sys.modules, "scipy", package)
    monkeypatch.setitem(sys.modules, "scipy.io", package.io)


def test_transfer_probes_what_is_there_and_names_what_is_not(few, sets, live, scipy, monkeypatch, capsys):
    monkeypatch.setattr(R, "VOC", ["cat", "dog", "person"])
    shown, probe = [], R.probe_logits

    def spy(x, y, x_test, classes):
        shown.append((len(x), sorted(y.bincount().tolist()), len(x_test), classes))
        return probe(x, y, x_test, classes)
    monkeypatch.setattr(R, "probe_logits", spy)
    a = R.settings(flags(few, "--transfer", "dtd", "pets", "voc2007", "sun397", "caltech101", "cifar10"))
    a.data_dir = str(sets)
    results = R.transfer(live["simclr"], 32, a, CPU)
    assert results == {f"transfer_{name}": pytest.approx(100) for name in ("dtd", "voc2007", "caltech101")}
    text = capsys.readouterr().out
    assert all(f"--transfer {name}: skipped" in text for name in ("pets", "sun397", "cifar10"))
    assert text.count("skipped") == 3
    assert shown == [(30, [10, 10, 10], 9, 3),                       # DTD: train and val
                     (24, [8, 16], 9, 2), (16, [8, 8], 6, 2), (24, [8, 16], 9, 2),    # VOC: cat, dog, person
                     (90, [30, 30, 30], 6, 3)]                       # Caltech: 30 a class, the rest is the test


def test_transfer_of_a_main_run_is_in_its_report(sets, tmp_path, monkeypatch):
    """--data-dir holds the pictures to train on (here DTD's own, as a folder) and the sets beside them."""
    report = quick(*plain(sets, "--batch-size", 30, "--transfer", "dtd", "food101", "--out", tmp_path / "run"))
    assert report["transfer_dtd"] > 30 and "transfer_food101" not in report
    assert report_of(tmp_path / "run")["transfer_dtd"] == report["transfer_dtd"]


def test_transfer_without_scipy_skips_caltech(few, sets, live, monkeypatch, capsys):
    """torchvision imports it at the first picture only, when the training is long done."""
    monkeypatch.setitem(sys.modules, "scipy", None)
    a = R.settings(flags(few, "--transfer", "caltech101", "dtd"))
    a.data_dir = str(sets)
    assert set(R.transfer(live["simclr"], 32, a, CPU)) == {"transfer_dtd"}
    assert "--transfer caltech101: skipped" in capsys.readouterr().out


# --- stopped and resumed ----------------------------------------------------------------------------------------------

def at_call(patch, name, call, do):
    """do() when the script's function `name` is called for the call-th time."""
    calls, function = [0], getattr(R, name)

    def wrapped(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            do()
        return function(*args, **kwargs)
    patch.setattr(R, name, wrapped)


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("method, call, step", [("dinov2", 9, 5), ("mocov3", 5, 3)])
def test_stopped_and_resumed_reaches_the_same_bits(few, done, tmp_path, monkeypatch, capsys, method, call, step):
    """SIGTERM in a step: 143 and the command that goes on, which ends as the uninterrupted run did: teacher, centres,
    optimizer, counts of rescued pictures, histograms and every logged number."""
    words = flags(few, *METHODS[method], "--no-baseline", "--save-every", 1e9, "--out", tmp_path / "a run")
    with monkeypatch.context() as patch:
        at_call(patch, "common_view", call, sigterm)                 # two calls a step
        with pytest.raises(SystemExit) as end:
            quick(*words)
    assert end.value.code == 143 and load(tmp_path / "a run")["step"] == step
    last = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert last[0] == "python" and last[1].endswith("topk_rescue.py") and last[2:] == [*words, "--resume"]
    with pytest.raises(SystemExit) as end:
        quick(*words, "--resume", "--s", 9)
    assert end.value.code == 2 and "--s is 9.0" in capsys.readouterr().err
    quick(*last[2:])
    ours, theirs = load(tmp_path / "a run"), load(done[method])
    kinds = {"dinov2": ["target.", "target_prototypes.", "cls_targets.centre", "patch_targets.centre"],
             "mocov3": ["target.", "predictor."]}[method]
    assert all(any(k.startswith(kind) for k in ours["model"]) for kind in kinds)
    for part in ("model", "optimizer", "step", "rescued", "histograms"):
        assert same_bits(ours[part], theirs[part]), part
    ours, theirs = ([{k: v for k, v in r.items() if k != "images_per_second"} for r in rows_of(p)]
                    for p in (tmp_path / "a run", done[method]))
    assert ours == theirs
    ours, theirs = (dict(np.load(p / "similarity.npz")) for p in (tmp_path / "a run", done[method]))
    assert ours.keys() == theirs.keys() and all((ours[k] == theirs[k]).all() for k in ours)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_stopped_in_the_baseline_goes_on_to_both(few, tmp_path, monkeypatch, capsys):
    words = plain(few, "--baseline", "--out", tmp_path / "run")
    with monkeypatch.context() as patch:
        at_call(patch, "common_view", 1, sigterm)
        with pytest.raises(SystemExit) as end:
            quick(*words)
    assert end.value.code == 143 and load(tmp_path / "run-baseline")["step"] == 1
    assert not (tmp_path / "run").exists()
    report = quick(*shlex.split(capsys.readouterr().out.splitlines()[-1])[2:])
    assert report["linear_baseline"] == 2 and report["linear"] == 3 and report["steps"] == 2
    assert load(tmp_path / "run-baseline")["step"] == 2


def test_an_older_run_moves_aside(few, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "note.txt").write_text("older")
    quick(*plain(few, "--out", out))
    assert (tmp_path / "run.1" / "note.txt").read_text() == "older" and not (out / "note.txt").exists()


# --- two processes ----------------------------------------------------------------------------------------------------

WORLD, B = 2, 6                                                      # processes, pictures in each
STEPS = {"simclr": ["--k", "4"],
         "simclr-deepaug": ["--k", "4", "--strong", "deepaug", "--layer", "2", "--rate", "0"],
         "simclr-all": ["--rescue", "all", "--k", "4"],
         "mocov3": ["--method", "mocov3", "--k", "4", "--s", "2"],
         "dinov2": ["--method", "dinov2", "--k", "4", "--local-crops", "2", "--prototypes", "32",
                    "--centering", "centering"],
         "dinov2-sinkhorn": ["--method", "dinov2", "--k", "4", "--local-crops", "2", "--prototypes", "32",
                             "--centering", "sinkhorn"]}


def whole_batch():
    """Pictures of every difficulty: the second view of picture i is the further from the first the larger i is."""
    return torch.randint(0, 256, (WORLD * B, 3, 32, 32), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(5))


def certain(patch, first):
    """Views, crops and masks that depend on the picture alone, so that halves see what the whole batch sees.
    first: the number of the first picture of this process."""
    def view(images, size, a, which):
        x, i = images.float() / 255, torch.arange(first, first + len(images)).view(-1, 1, 1, 1)
        return x if which == 0 else torch.lerp(x, x.flip(3), 0.08 * i)

    def masks(crops, side, device):
        mask = torch.zeros(crops, side * side, dtype=torch.bool)
        for i in range(crops // 2):                                  # the first crops: 2 or 3 patches, by picture
            picture = first + i
            mask[i, [picture % 16, (picture + 5) % 16] + ([(picture + 9) % 16] if picture % 3 else [])] = True
        places = mask.flatten().nonzero()[:, 0]
        return mask, places, 1 / mask.sum(1)[places // side ** 2]
    patch.setattr(R, "common_view", view)
    patch.setattr(R, "local_crops", lambda images, a: torch.cat([images[:, :, :16, :16], images[:, :, 16:, 16:]]) / 255)
    patch.setattr(R, "strong_views", lambda images, size: 1 - images.float() / 255)
    patch.setattr(R, "draw_masks", masks)


def method_step(words, images, seed=0, wrap=lambda model: model):
    """(loss, {parameter: gradient}, chosen, buffers that the step changed) of one step on these pictures."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    a = R.settings(["--device", "cpu", "--no-baseline", "--projector", "32", "16", "--image-size", "32",
                    "--batch-size", str(WORLD * B), *words])
    a.seed = seed
    step_of = R.build(a, R.Split(None, 32, images=whole_batch()), CPU).train()
    assert len(images) * world == WORLD * B
    for name, module in step_of.named_modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()                                            # the whole batch's: SyncBatchNorm, so CUDA
        if name.endswith("_targets"):
            module.centre.normal_(generator=torch.Generator().manual_seed(3))
    model = wrap(step_of)                                            # held: it averages gradients while it lives
    loss, chosen, *_ = model(images, 0.1)
    loss.backward()
    centres = {k: v for k, v in step_of.method.named_buffers() if k.endswith("centre")}
    return loss.detach(), {k: p.grad for k, p in step_of.method.named_parameters() if p.requires_grad}, chosen, centres


def bare(half):
    """Values and gradients of the pieces that several processes share. half(x): this process's rows of x."""
    g = torch.Generator().manual_seed(1)
    q, k, x = (torch.randn(WORLD * B, 8, generator=g) for _ in range(3))
    logits, results = torch.randn(WORLD * B, 5, generator=g), {}
    q, x = half(q).clone().requires_grad_(), half(x).clone().requires_grad_()
    for name, loss, leaf in (("moco_loss", R.moco_loss(q, half(k), 0.2), q), ("koleo", R.koleo(x), x)):
        results[name] = loss.detach(), torch.autograd.grad(loss, leaf)[0]
    results["sinkhorn_knopp"] = R.sinkhorn_knopp(half(logits) * 3, 0.3)
    for how in ("centering", "sinkhorn"):
        targets = R.TeacherTargets(types.SimpleNamespace(centering=how, prototypes=5))
        for _ in range(2):
            results[f"targets {how}"] = targets(half(logits), 0.5)
        results[f"centre {how}"] = targets.centre
    similarity = torch.tensor([.1, .9, .8, .2, .7, .3, .0, .4, .5, .95, -.5, .6])
    for how in ("topk", "hardest", "all"):
        results[f"choose {how}"] = R.choose(half(similarity), how, 4 if how != "all" else 12)
    chosen = results["choose topk"]
    results["own_share"] = R.own_share(half(torch.arange(24.0).view(12, 2)), chosen)
    results["own_share of bytes"] = R.own_share(half(torch.arange(12, dtype=torch.uint8).view(12, 1) + 200), chosen)
    return results


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    try:
        own = slice(rank * B, rank * B + B)
        results = {"bare": bare(lambda x: x[own])}
        torch.manual_seed(rank)
        results["random"] = R.choose(torch.zeros(B), "random", 4)
        with pytest.MonkeyPatch.context() as patch:
            certain(patch, rank * B)
            patch.setenv("WORLD_SIZE", str(WORLD))
            for name, words in STEPS.items():                        # DistributedDataParallel sends rank 0's weights
                results[name] = method_step(words, whole_batch()[own], rank, torch.nn.parallel.DistributedDataParallel)
        torch.save(results, f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes saved."""
    folder = str(tmp_path_factory.mktemp("two"))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["topk_rescue", "cka", "vicreg_probe"])
    children = [context.Process(target=worker, args=(rank, folder)) for rank in range(WORLD)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    return [torch.load(f"{folder}/rank{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("name", STEPS)
def test_two_processes_give_the_step_of_one(two, monkeypatch, name):
    """The whole step under DistributedDataParallel: the mean loss, averaged gradients, chosen pairs, centres."""
    certain(monkeypatch, 0)
    loss, grads, chosen, centres = method_step(STEPS[name], whole_batch())
    results = [r[name] for r in two]
    assert sum(r[0] for r in results).item() / WORLD == pytest.approx(loss.item(), rel=1e-5, abs=1e-5)
    assert any(g.abs().max() > 1e-3 for g in grads.values())
    for r in results:
        assert r[2].tolist() == chosen.tolist()
        for k, expected in grads.items():
            torch.testing.assert_close(r[1][k], expected, rtol=1e-3, atol=2e-5, msg=lambda m, k=k: f"{k}: {m}")
        assert r[3].keys() == centres.keys()
        for k, expected in centres.items():
            torch.testing.assert_close(r[3][k], expected, rtol=1e-5, atol=1e-6)
    if name == "simclr":                                             # more of one process than its share of the work
        assert (chosen < B).sum() != (chosen >= B).sum()


def test_two_processes_share_losses_targets_and_choices(two):
    whole, halves = bare(lambda x: x), [r["bare"] for r in two]
    for name in ("moco_loss", "koleo"):
        value, grad = whole[name]
        assert sum(h[name][0] for h in halves).item() / WORLD == pytest.approx(value.item(), abs=1e-6)
        torch.testing.assert_close(torch.cat([h[name][1] for h in halves]) / WORLD, grad, rtol=1e-5, atol=1e-6)
    for name in ("sinkhorn_knopp", "targets centering", "targets sinkhorn"):
        torch.testing.assert_close(torch.cat([h[name] for h in halves]), whole[name], rtol=1e-5, atol=1e-6)
    for name in ("centre centering", "centre sinkhorn", "choose topk", "choose hardest", "choose all"):
        for h in halves:
            torch.testing.assert_close(h[name], whole[name], rtol=1e-5, atol=1e-6)
    assert whole["choose topk"].tolist() == [1, 2, 4, 9] and whole["choose hardest"].tolist() == [0, 3, 6, 10]
    assert whole["centre centering"].abs().max() > 0.01
    for name in ("own_share", "own_share of bytes"):
        assert [len(h[name]) for h in halves] == [2, 2]
        assert torch.equal(torch.cat([h[name] for h in halves]), whole[name]) and halves[0][name].dtype == \
            whole[name].dtype
    first, second = (r["random"].tolist() for r in two)              # drawn by both, the same for both
    assert first == second == sorted(set(first)) and len(first) == 4


@pytest.mark.skipif(not os.environ.get("SLOW"), reason="two processes are tested above; SLOW=1 for a whole run")
def test_torchrun_trains_end_to_end_and_one_process_writes(few, tmp_path):
    """Real torchrun: it ends well, the folder is written once, every picture is counted, the encoder loads."""
    words = plain(few, "--method", "mocov3", "--k", 4, "--out", "run")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           R.__file__, *words], cwd=tmp_path, text=True, capture_output=True, timeout=240,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["run"]           # no second run moved the first one aside
    assert done.stdout.count("steps an epoch") == 1 and done.stdout.count("encoder.pt") == 1
    assert report_of(tmp_path / "run")["steps"] == 2 and "linear" in report_of(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["processes"] == 2
    with np.load(tmp_path / "run" / "similarity.npz") as f:
        assert f["rescued"].sum() == 2 * 4 and f["rescued"].max() == 1
    assert torch.jit.load(tmp_path / "run" / "encoder.pt")(torch.rand(3, 3, 32, 32)).shape == (3, 128)
