"""README and docs tell the truth: every command runs (at small size), every code block runs as it stands."""
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import cka
import simclr_deepaug as S
import simcse_deepaug as T
import topk_rescue as R
import vicreg_probe as V

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "tests").rglob("*.md"))]
# What makes a command small: the last flag wins in argparse.
TINY = ["--dataset", "folder", "--image-size", "32", "--epochs", "1", "--batch-size", "64",
        "--workers", "0", "--device", "cpu"]
DROPPED = {"--transfer", "--download", "--data-dir", "--dataset", "--epochs", "--probe-every"}


def commands():
    """Every `python ...`, `torchrun ...`, `pip ...` line in ```bash blocks and tables, and in the docstrings."""
    found = {}
    for page in PAGES:
        text = page.read_text()
        lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
        lines += re.findall(r"`((?:python|torchrun) [^`]*)`", text)
        for line in lines:
            found.setdefault(line.split("#")[0].strip(), page.name)
    for script in ("simclr_deepaug.py", "simcse_deepaug.py", "vicreg_probe.py", "topk_rescue.py", "cka.py"):
        for line in re.findall(r"^    ((?:python|torchrun) .*)$", (ROOT / script).read_text(), re.M):
            found.setdefault(re.split("#|  ", line)[0].strip(), script)
    return {c: page for c, page in found.items() if c and "…" not in c}


def without(words, flags):
    """words without these flags and their values."""
    kept, skip = [], False
    for w in words:
        skip = w in flags or (skip and not w.startswith("--"))
        if not skip:
            kept.append(w)
    return kept


GRIGG = [f"{name}/layer-none-seed-{seed}" for name in ("simclr", "supervised") for seed in (0, 1)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, few):
    """A folder with the runs that documented commands start from, and the pictures for CKA."""
    here = tmp_path_factory.mktemp("workplace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        for name, views in (("base", "none"), ("a", "simclr")):
            S.main([*TINY, "--data-dir", str(few), "--layer", "none", "--views", views, "--out",
                    f"runs/{name}"])
    for name in ("b", "OTHER", "untrained", "dropout20", *GRIGG):
        shutil.copytree(here / "runs" / ("base" if name == "dropout20" else "a"),
                        here / "runs" / name)
    return here


def test_there_are_commands():
    assert len(commands()) > 30


@pytest.mark.parametrize("command", sorted(
    c for c in commands() if c.startswith("python simclr_deepaug.py") and "--help" not in c))
def test_simclr_command(command, workplace, few, monkeypatch, capsys, tmp_path):
    words = shlex.split(command)[2:]
    a = S.settings(words)  # as written: every flag exists, nothing is refused
    monkeypatch.chdir(workplace)
    if a.compare:
        assert S.main(["--compare", *map(str, sorted(workplace.glob("runs/*")))])
        return
    # other tests are about these, which take longer than all the rest of a small run
    monkeypatch.setattr(S, "draw", lambda *_: None)
    monkeypatch.setattr(S, "export", lambda *_: 0.0)
    monkeypatch.setattr(S, "linear_probe", lambda *_: 0.0)
    monkeypatch.setattr(cka, "draw", lambda *_: None)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *_: None)  # it would stay on
    words = without(words, DROPPED) + TINY + ["--arch", "small", "--data-dir", str(few)]
    layers = a.layer[:2]
    seeds = a.seed[:3 - len(layers)]
    words += ["--layer", *layers, "--seed", *map(str, seeds)]
    words += ["--init", "runs/base"] * bool(a.init)
    if not a.resume:
        words += ["--out", str(tmp_path / "run")]  # the documented folder may be there
    runs = len(layers) * len(seeds)
    found = S.main(words)
    assert found["steps"] if runs == 1 else len(found) > 1
    assert a.resume or capsys.readouterr().out.count("pictures of folder") == runs


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """What the documented commands name: texts, STS-B, FOLDER and bert-base-uncased (tiny), runs/base."""
    here = tmp_path_factory.mktemp("sentences")
    grammar, sts = T.Grammar(), "data/SentEval/data/downstream/"
    (here / sts / "STS/STSBenchmark").mkdir(parents=True)
    for name in ("lines.txt", "MY_LINES.txt", "text20k.txt", "text60k.txt", "data/wiki1m_for_simcse.txt"):
        (here / name).write_text("\n".join(grammar.sentences(128)))
    for name in ("test", "dev", "train"):
        rows = enumerate(zip(*grammar.pairs(128 if name == "train" else 40, grammar.unseen, 9)))
        (here / sts / f"STS/STSBenchmark/sts-{name}.csv").write_text(
            "".join(f"g\tf\ty\t{i}\t{score}\t{a}\t{b}\n" for i, (a, b, score) in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setattr(T.Grammar, "sentences", lambda self, n: Path("lines.txt").read_text().split("\n"))
        T.main(["--layer", "none", "--device", "cpu", "--out", "runs/base"])
        config = T.transformers.AutoConfig.from_pretrained("runs/base/model")
        T.transformers.AutoModelForMaskedLM.from_config(config).save_pretrained("bert-base-uncased")
        T.AutoTokenizer.from_pretrained("runs/base/tokenizer").save_pretrained("bert-base-uncased")
    shutil.copytree(here / "runs/base/model", here / "FOLDER")
    return here


@pytest.mark.parametrize("command", sorted(c for c in commands() if c.startswith("python simcse_deepaug.py")))
def test_simcse_command(command, sentences, monkeypatch, capsys, tmp_path):
    """As it stands, presets included; of several layers or seeds two runs at most."""
    words = shlex.split(command)[2:]
    monkeypatch.chdir(sentences)
    a = T.settings(words)
    said = capsys.readouterr().out
    assert not a.preset or f"--preset {a.preset}: " in said
    if a.compare:
        assert T.main(["--compare", *map(str, sorted(sentences.glob("runs/*")))])
        return
    # other tests are about these, which take longer than all the rest of a small run
    monkeypatch.setattr(T, "draw", lambda *_: None)
    monkeypatch.setattr(cka, "draw", lambda *_: None)
    monkeypatch.setattr(T, "export", lambda *_: 0.0)
    monkeypatch.setattr(T.Grammar, "sentences", lambda self, n: Path("lines.txt").read_text().split("\n"))
    layers = a.layer[-2:]
    words += ["--layer", *layers, "--seed", *map(str, a.seed[:3 - len(layers)]), "--device", "cpu"]
    if not a.resume:
        words += ["--out", str(tmp_path / "run")]  # the documented folder may be there
    found = T.main(words)
    assert any("sts" in row for row in (found, *found.values()) if isinstance(row, dict))
    for file in tmp_path.rglob("config.json"):  # what the row is about is what was run
        flags = json.loads(file.read_text())
        for flag in [w for w in words if w in ("--mlm", "--stop-grad", "--no-stop-grad")]:
            assert flags[flag.removeprefix("--no-").lstrip("-").replace("-", "_")] == ("--no-" not in flag)


PROBED = [*TINY, *"--projector 8 8 --sample-level 4 4 2 --mine-steps 2 --target-epochs 1 --target-stages 2".split()]


@pytest.fixture(scope="module")
def probed(tmp_path_factory, few):
    """A folder with the runs of vicreg_probe.py that documented commands start from."""
    here = tmp_path_factory.mktemp("probed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        V.main([*PROBED, "--data-dir", str(few), "--arch", "RES-5-8", "--target-net", "RES-1-8", "--out", "runs/a"])
    for name in ("b", GRIGG[0]):
        shutil.copytree(here / "runs/a", here / "runs" / name)
    return here


@pytest.mark.parametrize("command", sorted(c for c in commands() if c.startswith("python vicreg_probe.py")))
def test_vicreg_command(command, probed, few, monkeypatch, capsys, tmp_path):
    """As it stands, but small; of several values two runs at most."""
    monkeypatch.chdir(probed)
    words = [w for word in shlex.split(command)[2:] for w in sorted(map(str, Path().glob(word))) or [word]]
    a = V.settings(words)
    if a.compare:
        assert V.main(words)
        return
    monkeypatch.setattr(V, "draw", lambda *_: None)
    monkeypatch.setattr(V, "linear_probe", lambda *_: 0.0)
    vit = torchvision.models.VisionTransformer
    monkeypatch.setattr(torchvision.models, "VisionTransformer", lambda size, patch, *_, num_classes:
                        vit(size, patch, 1, 2, 16, 32, num_classes=num_classes))
    small = [*PROBED, "--data-dir", str(few), "--arch", *["RES-5-8", "RES-5-9"][:len(a.arch)]]
    small += ["--target-net", "RES-1-8"] * ("--target-net" not in words)
    for name in set(V.RUNS) - {"arch"}:
        small += [f"--{name}", *map(str, getattr(a, name)[:2])] * (f"--{name}" in words)
    if not a.resume:
        small += ["--out", str(tmp_path / "run")]  # the documented folder may be there
    found = V.main([*words, *small])
    runs = [r for r in (found, *found.values()) if isinstance(r, dict) and "linear" in r]
    assert len(runs) == max(len(getattr(a, name)[:2]) for name in set(V.RUNS) - {"seed"})
    assert "class: linear" in capsys.readouterr().out


RESCUE = ["--projector", "32", "16", "--prototypes", "16", "--local-crops", "2"]


@pytest.fixture(scope="module")
def rescued(tmp_path_factory, few):
    """A folder with the runs of topk_rescue.py that documented commands start from."""
    here = tmp_path_factory.mktemp("rescued")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        R.main([*TINY, "--data-dir", str(few), *RESCUE, "--rescue", "topk", "--out", "runs/a"])
    shutil.copytree(here / "runs/a", here / "runs/b")
    return here


@pytest.mark.parametrize("command", sorted(
    c for c in commands() if c.startswith("python topk_rescue.py") and "--help" not in c))
def test_rescue_command(command, rescued, few, monkeypatch, capsys, tmp_path):
    """As it stands, presets included; of several values two at most."""
    words = shlex.split(command)[2:]
    a = R.settings(words)  # every flag exists, nothing is refused
    monkeypatch.chdir(rescued)
    if a.compare:
        assert R.main(["--compare", *map(str, sorted(rescued.glob("runs/*")))])
        return
    for name, nothing in (("draw", None), ("draw_easy", None), ("export", 0.0), ("linear_probe", 0.0)):
        monkeypatch.setattr(R, name, lambda *_, nothing=nothing: nothing)
    small = [*TINY, *RESCUE, "--data-dir", str(few), "--iterations", "0"]
    small += ["--arch", "vit-tiny" if a.arch in R.VITS else "small"]
    small += ["--image-size", "96", "--optimizer", "sgd"] * (a.preset == "paper")
    for name in R.RUNS:
        if f"--{name}" in words:
            values = [min(v, 8) if name == "k" else v for v in getattr(a, name)[:2]]
            small += [f"--{name}", *map(str, values)]
    # the documented folder may be there
    small += ["--rescue", "topk"] if a.resume else ["--out", str(tmp_path / "run")]
    assert R.main(without(words, DROPPED) + small)
    assert capsys.readouterr().out.count("untrained") == 1  # the table


@pytest.mark.parametrize("command", sorted(c for c in commands() if c.startswith("python cka.py") and "RUN" not in c))
def test_cka_command(command, workplace, few, real_data_or_none, monkeypatch):
    words = shlex.split(command)[2:]
    monkeypatch.chdir(workplace)
    dataset = words[words.index("--dataset") + 1] if "--dataset" in words else "samples"
    words = without(words, {"--dataset", "--data-dir"})
    if dataset in ("folder", "cifar10"):
        words += ["--dataset", "folder", "--data-dir", str(few)]
    elif dataset == "cifar100" and real_data_or_none:
        words += ["--dataset", "cifar100", "--data-dir", str(real_data_or_none)]
    assert cka.main([*words, "--images", "16", "--batch-size", "8"])["map"]


@pytest.mark.parametrize("command", sorted(c for c in commands() if "tests/bench/" in c))
def test_bench_command(command, monkeypatch, capsys):
    script = shlex.split(command)[1]
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.setattr(sys, "path", sys.path[:])                    # benches put their own folders there
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    shown = capsys.readouterr().out
    assert end.value.code == 0
    for flag in re.findall(r"--[a-z-]+", command):
        assert flag in shown


@pytest.mark.parametrize("command", sorted(c for c in commands() if c.startswith("torchrun")))
def test_torchrun_command(command):
    """The flags are right; tests/test_distributed.py runs two processes for real."""
    words = shlex.split(command)
    [i] = [i for i, word in enumerate(words) if word.endswith(".py")]
    {"simclr_deepaug.py": S, "simcse_deepaug.py": T, "vicreg_probe.py": V,
     "topk_rescue.py": R}[words[i]].settings(words[i + 1:])


def test_no_other_kind_of_command():
    known = r"python (sim\w+_deepaug|vicreg_probe|topk_rescue|cka|tests/bench/\w+)\.py|torchrun "
    other = [c for c in commands() if not re.match(known, c)]
    install = "pip install -r requirements.txt && "
    assert set(other) <= {install + "python simclr_deepaug.py", install + "pytest",
                          "python ../shared/data/unpack.py --to data"} | {c for c in other if "tests/gpu/" in c}
    assert install + "pytest" in (ROOT / ".ci/run").read_text()
    for c in other:
        for path in re.findall(r"tests/gpu/\S*\.\w+", c):
            assert (ROOT / path).exists()


# ------------------------------------------------------------------------------------------- code blocks of README

def block(marker):
    return re.search(rf"<!-- {marker}.*?-->\n```\w+\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)


class MessagePassing(nn.Module):
    """h_i <- ReLU(W h_i + U * mean of the neighbours' h): graphs as [B, nodes, features] and [B, nodes, nodes]."""
    def __init__(self, width):
        super().__init__()
        self.own, self.others = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h, adjacency):
        degree = adjacency.sum(-1, keepdim=True).clamp(min=1)
        return torch.relu(self.own(h) + self.others(adjacency @ h / degree))


class GraphNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.steps, self.out = nn.ModuleList(MessagePassing(8) for _ in range(3)), nn.Linear(8, 4)

    def forward(self, h, adjacency):
        for step in self.steps:
            h = step(h, adjacency)
        return self.out(h.mean(1))


def networks():
    from torchvision.models import VisionTransformer
    mlp = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    vit = VisionTransformer(image_size=16, patch_size=4, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32)
    nn.init.normal_(vit.heads.head.weight)                           # torchvision starts it at zero
    adjacency = (torch.rand(32, 5, 5) < 0.5).float()
    return {"mlp": (mlp, mlp[2], mlp[0].weight, (torch.randn(32, 6),)),
            "vit": (vit, vit.encoder.layers[1], vit.conv_proj.weight, (torch.randn(32, 3, 16, 16),)),
            "graph": (net := GraphNet(), net.steps[1], net.steps[0].own.weight, (torch.randn(32, 5, 8), adjacency))}


@pytest.mark.parametrize("kind", ["mlp", "vit", "graph"])
def test_own_network_block(kind):
    """README's ten lines on three kinds of networks: they augment in training, do nothing in eval, and with
    stop-gradient the augmented rows send no gradient below the layer."""
    code = block("own-network")
    assert len([line for line in code.split("def ")[1].splitlines() if line.strip()]) <= 10
    names = {}
    exec(code, names)
    torch.manual_seed(0)
    net, layer, weight_below, inputs = networks()[kind]
    clean = net.eval()(*inputs)
    handle = names["augment_after"](layer)
    assert torch.equal(net(*inputs), clean)
    out = net.train()(*inputs)
    changed = (out - clean).abs().flatten(1).amax(1) > 1e-6
    assert 4 <= changed.sum() <= 28                                  # about half of the 32 rows
    below = torch.autograd.grad(out[changed].square().sum(), weight_below, retain_graph=True, allow_unused=True)[0]
    assert below is None or not below.any()
    assert torch.autograd.grad(out[~changed].square().sum(), weight_below)[0].any()
    handle.remove()
    assert torch.equal(net(*inputs), clean)


def test_load_python_block(workplace, monkeypatch):
    monkeypatch.chdir(workplace / "runs/base")
    names = {}
    exec(block("load-python"), names)
    assert names["features"].shape == (8, names["config"]["dim"]) and "layer4.0.even" in names["layers"]


def test_load_sentences_block(sentences, monkeypatch):
    monkeypatch.chdir(sentences / "runs/base")
    names = {}
    exec(block("load-sentences"), names)
    assert -1 <= names["similarity"] <= 1 and names["a"].shape == (32,)


def test_cka_says_that_it_reads_pictures(sentences, capsys):
    with pytest.raises(SystemExit):
        cka.main([str(sentences / "runs/base/encoder.pt")])
    assert "takes sentences, not pictures" in capsys.readouterr().err


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_load_cpp_block(workplace, tmp_path):
    """README's program, compiled as README says, prints the same number as Python."""
    (tmp_path / "load.cpp").write_text(block("load-cpp"))
    shutil.copy(workplace / "runs/base/encoder.pt", tmp_path)
    shell = re.search(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    done = subprocess.run(["bash", "-c", shell.replace("$(python ", f"$({sys.executable} ")], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    features = torch.jit.load(str(tmp_path / "encoder.pt"))(torch.ones(2, 3, 32, 32))
    assert done.stdout.startswith(str(list(features.shape)))
    assert abs(float(done.stdout.split()[-1]) / features.abs().sum().item() - 1) < 1e-4


@pytest.mark.parametrize("script", [S, T, V, R, cka], ids=lambda s: s.__name__)
def test_every_flag_is_explained(script, capsys):
    """Every script's page names every flag."""
    text = (ROOT / f"docs/{script.__name__}.md").read_text()
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    assert end.value.code == 0
    for flag in set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out)) - {"--help"}:
        assert flag in text, flag


@pytest.mark.parametrize("page, place, run", [("simclr_deepaug", "workplace", "dropout20"),
                                              ("simcse_deepaug", "sentences", "base"), ("vicreg_probe", "probed", "a"),
                                              ("topk_rescue", "rescued", "a")])
def test_every_logged_number_is_explained(page, place, run, request):
    """Every logged column, reported key and written file stands in the script's page."""
    text = (ROOT / f"docs/{page}.md").read_text()
    folder = request.getfixturevalue(place) / "runs" / run
    report = json.loads((folder / "report.json").read_text())
    columns = [column for table in folder.glob("*.csv") for column in table.read_text().splitlines()[0].split(",")]
    for key in [*columns, *report]:
        base = key.removesuffix("_untrained")
        base = re.sub(r"_(train|test)$", "", base)
        base = re.sub(r"_(class|superclass)$", "_sample", base)      # explained once for the three levels
        assert f"`{base}" in text, key
    for file in folder.iterdir():
        assert f"`{file.name}`" in text, file.name
