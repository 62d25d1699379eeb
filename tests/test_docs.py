"""README and docs tell the truth: every command runs in small form, every code block as it stands,
every flag, logged number and file is explained on its page."""
import functools
import math
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
from conftest import ROOT, SHARED, report_of
from torch import nn

import cka
import simclr_deepaug as S
import simcse_deepaug as T
import topk_rescue as R
import vicreg_probe as V

TAUGHT = [ROOT / "README.md", ROOT / "docs/lessons.md"]
PAGES = [*TAUGHT, *sorted({*(ROOT / "docs").glob("*.md")} - {*TAUGHT})]
SCRIPTS = {f"{script.__name__}.py": script for script in (S, T, V, R, cka)}

def expanded(shell):
    """The lines of a shell's text; `for v in a b; do ... $v ...; done` once for each value."""
    shell = re.sub(r"(?m)(^|[ \t]+)#.*", "", shell.replace("\\\n", " "))
    inner = r"((?:(?!\bfor \w+ in ).)*?)"  # has no loop in it
    loop = re.compile(r"for (\w+) in ([^;\n]+)[;\n]\s*do\s" + inner + r"[;\n]\s*done\b", re.S)
    while found := loop.search(shell):
        name, values, body = found.groups()
        variable = rf"\${name}(?![A-Za-z_])|\$\{{{name}\}}"
        bodies = [re.sub(variable, value, body) for value in values.split()]
        shell = shell[:found.start()] + "\n".join(bodies) + shell[found.end():]
    return [line.strip() for line in re.split("[;\n]", shell) if line.strip()]

def commands():
    """{command: page}, of ```bash blocks, of tables and of the scripts' docstrings."""
    found = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S)
                 for line in expanded(block)]
        for line in lines + re.findall(r"`((?:python|torchrun) [^`]*)`", text):
            found.setdefault(line, page.name)
    for name in SCRIPTS:
        docstring = (ROOT / name).read_text(encoding="utf-8")
        for line in re.findall(r"^    ((?:python|torchrun) .*)$", docstring, re.M):
            found.setdefault(re.split("#|  ", line)[0].strip(), name)
    return {c: page for c, page in found.items() if "…" not in c}

def test_a_shells_loops_and_comments_are_understood():
    shell = ("# first\npython a.py --x 1 \\\n  --y  # why\n"
             "for v in none 2; do python a.py --v $v --out r/${v}; done\n"
             "for v in 1 2; do\n  for w in 3 4; do\n    python b.py $v$w\n  done\ndone\n")
    assert expanded(shell) == [
        "python a.py --x 1    --y", "python a.py --v none --out r/none",
        "python a.py --v 2 --out r/2", *(f"python b.py {n}" for n in (13, 14, 23, 24))]

TINY = ("--device cpu --workers 0 --dataset folder --image-size 32 --epochs 1 --batch-size 64 "
        "--data-dir")
# the last flag wins in argparse
SMALL = {S: "--arch small", T: "--device cpu",
         V: "--arch RES-5-8 --projector 8 8 --sample-level 4 4 2 --mine-steps 2 --target-epochs 1 "
            "--target-stages 2",
         R: "--projector 32 16 --prototypes 16 --local-crops 2 --iterations 0"}

def small(script, words, few):
    """What makes a command small; of several values the last is taken."""
    a, more = script.settings(words), SMALL[script].split()
    more += [] if script is T else [*TINY.split(), str(few)]
    if script is V and "--target-net" not in words:
        more += ["--target-net", "RES-1-8"]
    if script is R:
        more += ["--arch", "vit-tiny" if a.arch in R.VITS else "small"]
        more += "--image-size 96 --optimizer sgd".split() if a.preset == "paper" else []
    for name in {*getattr(script, "RUNS", ("layer", "seed"))} - {"arch"}:
        if f"--{name}" in words:
            value = getattr(a, name)[-1]
            more += [f"--{name}", str(min(value, 8) if name == "k" else value)]
    return more

def stub(monkeypatch, *scripts):
    """Other tests are about these, which take longer than all the rest of a small run."""
    for script in scripts:
        for name in ("draw", "draw_easy", "draw_maps"):
            monkeypatch.setattr(script, name, lambda *_: None, raising=False)
        for name in ("linear_probe", *["export"] * (script is not V)):
            monkeypatch.setattr(script, name, lambda *_: 0.0, raising=False)

def fewer(monkeypatch):
    """Sentences and pairs of the grammar; a smaller ViT."""
    sentences, pairs = T.Grammar.sentences, T.Grammar.pairs
    vit = torchvision.models.VisionTransformer
    monkeypatch.setattr(T.Grammar, "sentences", lambda self, n: sentences(self, min(n, 128)))
    monkeypatch.setattr(T.Grammar, "pairs", lambda self, n, *a: pairs(self, min(n, 128), *a))
    monkeypatch.setattr(torchvision.models, "VisionTransformer", lambda size, patch, *_, **more:
                        vit(size, patch, 1, 2, 16, 32, **more))

@pytest.fixture(scope="module")
def place_of(few, texts, tmp_path_factory):
    """place_of(script): a folder with a run in runs/a and the texts that commands name."""
    @functools.cache
    def make(script):
        here = tmp_path_factory.mktemp(script.__name__)
        own = {S: ["--views", "simclr"], R: ["--rescue", "topk"]}.get(script, [])
        words = ["--layer", "none", *own, *small(script, [], few)]
        if script is T:
            for name in ("lines", "MY_LINES", "text20k", "text60k", "data/wiki1m_for_simcse"):
                (here / name).parent.mkdir(exist_ok=True)
                shutil.copy(texts / "text.txt", here / f"{name}.txt")
            shutil.copytree(texts / "sts", here / "data/SentEval/data/downstream")
        with pytest.MonkeyPatch.context() as patch:
            fewer(patch)
            script.main([*words, "--out", str(here / "runs/a")])
        if script is T:
            shutil.copytree(here / "runs/a/model", here / "FOLDER")
            config = T.transformers.AutoConfig.from_pretrained(here / "FOLDER")
            network = T.transformers.AutoModelForMaskedLM.from_config(config)
            shutil.copytree(here / "runs/a/tokenizer", here / "bert-base-uncased")
            network.save_pretrained(here / "bert-base-uncased")
        return here
    return make

def as_a_shell_gives(words):
    """Every * is expanded; a run that a command starts from is there, a copy of runs/a."""
    for before, word in zip(["", *words], words):
        run, there = re.sub("/encoder.*", "", word).replace("*", "0"), any(Path().glob(word))
        if re.match("runs/|RUN|OTHER", run) and before != "--out" and not there:
            shutil.copytree("runs/a", run, dirs_exist_ok=True)
            if word.endswith(".pt") and "*" not in word and not Path(word).exists():
                shutil.copy("runs/a/encoder.pt", word)
    return [w for word in words for w in sorted(map(str, Path().glob(word))) or [word]]

RUNS = re.compile(r"(?:python|torchrun --nproc_per_node=\d) (\w+\.py)\b(.*)")

@pytest.mark.parametrize("command", sorted(filter(RUNS.fullmatch, commands())))
def test_every_command_has_flags_that_the_script_takes_together(command, monkeypatch):
    """As it stands. That each kind of experiment runs is for the tests of its script."""
    name, words = RUNS.fullmatch(command).groups()
    monkeypatch.setenv("WORLD_SIZE", "4" if command.startswith("torchrun") else "1")
    if "--help" not in words:
        SCRIPTS[name].settings(shlex.split(words))

@pytest.mark.parametrize("command", sorted(
    c for c, page in commands().items() if RUNS.fullmatch(c)
    and page in ("README.md", "lessons.md", *SCRIPTS)))
def test_every_command_that_is_taught_runs_in_small_form(command, place_of, few, request, monkeypatch, tmp_path):
    name, words = RUNS.fullmatch(command).groups()
    script = SCRIPTS[name]
    monkeypatch.chdir(place_of(S if script is cka else script))
    words = as_a_shell_gives(shlex.split(words))
    if "--help" in words:
        with pytest.raises(SystemExit, match="0"):
            script.main(words)
        return
    stub(monkeypatch, script, cka)
    if script is cka:
        if "cifar100" in words and (SHARED / "unpack.py").exists():
            words += ["--data-dir", str(request.getfixturevalue("real_data"))]
        elif "--dataset" in words:
            words += ["--dataset", "folder", "--data-dir", str(few)]
        assert cka.main([*words, "--images", "16", "--batch-size", "8"])["map"]
        return
    a = script.settings(words)  # as written
    if a.compare:
        assert script.main(words)
        return
    fewer(monkeypatch)
    if getattr(a, "transfer", None) and script is S:  # 10,000 pictures
        words = [w for w in words if w not in ("--transfer", *a.transfer)]
    out = tmp_path / "run"
    words = [w for w in words if w != "--resume"] + small(script, words, few) + ["--out", str(out)]
    found, a = script.main(words), script.settings(words)
    runs = math.prod(len(getattr(a, name)) for name in getattr(script, "RUNS", ("layer", "seed")))
    assert found if getattr(a, "eval_only", 0) else len([*out.rglob("report.json")]) == runs
    if "--resume" in command:
        assert script.main([*words, "--resume"]) == found

@pytest.mark.parametrize("command", sorted(c for c in commands() if "tests/bench/" in c))
def test_every_bench_has_the_flags_of_its_command(command, monkeypatch, capsys):
    script = shlex.split(command)[1]
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.setattr(sys, "path", sys.path[:])  # benches put their own folders there
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in re.findall(r"--[a-z-]+", command))

def test_there_are_commands_of_every_script_and_no_others():
    ours = [match for match in map(RUNS.fullmatch, commands()) if match]
    assert len(ours) > 30 and {match[1] for match in ours} == {*SCRIPTS}
    install = "pip install -r requirements.txt && "
    assert install + "pytest" in (ROOT / ".ci/run").read_text()
    for c in commands():
        if not RUNS.fullmatch(c):
            [path] = re.findall(r"tests/(?:gpu|bench)/\S*\.\w+", c) or [""]
            assert path and (ROOT / path).exists() or c in (
                install + "python simclr_deepaug.py", install + "pytest",
                "python ../shared/data/unpack.py --to data"), c

# ==== code blocks of README ====

def block(marker, page="README.md"):
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.search(rf"<!-- {marker}.*?-->\n```\w+\n(.*?)```", text, re.S)[1]

class MessagePassing(nn.Module):
    """h_i <- ReLU(W h_i + U * mean of the neighbours' h): graphs as [B, nodes, features] and
    [B, nodes, nodes]."""
    def __init__(self, width):
        super().__init__()
        self.own, self.others = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h, adjacency):
        degree = adjacency.sum(-1, keepdim=True).clamp(min=1)
        return torch.relu(self.own(h) + self.others(adjacency @ h / degree))

class GraphNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.steps = nn.ModuleList(MessagePassing(8) for _ in range(3))
        self.out = nn.Linear(8, 4)

    def forward(self, h, adjacency):
        for step in self.steps:
            h = step(h, adjacency)
        return self.out(h.mean(1))

def own_network(kind):
    """(network, one of its layers, a weight below it, inputs)"""
    if kind == "mlp":
        net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(),
                            nn.Linear(16, 4))
        return net, net[2], net[0].weight, (torch.randn(32, 6),)
    if kind == "vit":
        net = torchvision.models.VisionTransformer(
            image_size=16, patch_size=4, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32)
        nn.init.normal_(net.heads.head.weight)  # torchvision starts it at zero
        return net, net.encoder.layers[1], net.conv_proj.weight, (torch.randn(32, 3, 16, 16),)
    net, adjacency = GraphNet(), (torch.rand(32, 5, 5) < 0.5).float()
    return net, net.steps[1], net.steps[0].own.weight, (torch.randn(32, 5, 8), adjacency)

@pytest.mark.parametrize("kind", ["mlp", "vit", "graph"])
def test_own_network_block(kind):
    """README's ten lines on three kinds of networks: they augment in training, do nothing in eval,
    and with stop-gradient the augmented rows send no gradient below the layer."""
    code, names = block("own-network"), {}
    assert len([line for line in code.split("def ")[1].splitlines() if line.strip()]) <= 10
    exec(code, names)
    torch.manual_seed(0)
    net, layer, below, inputs = own_network(kind)
    clean = net.eval()(*inputs)
    handle = names["augment_after"](layer)
    assert torch.equal(net(*inputs), clean)
    out = net.train()(*inputs)
    changed = (out - clean).abs().flatten(1).amax(1) > 1e-6
    assert 4 <= changed.sum() <= 28  # about half of the 32 rows
    [grad] = torch.autograd.grad(out[changed].square().sum(), below, retain_graph=True,
                                 allow_unused=True)
    assert grad is None or not grad.any()
    assert torch.autograd.grad(out[~changed].square().sum(), below)[0].any()
    handle.remove()
    assert torch.equal(net(*inputs), clean)

def test_load_python_block(place_of, monkeypatch):
    monkeypatch.chdir(place_of(S) / "runs/a")
    names = {}
    exec(block("load-python"), names)
    assert names["features"].shape == (8, names["config"]["dim"])
    assert "layer4.0.even" in names["layers"]

def test_fine_tuning_block_trains_the_encoder_itself(place_of, monkeypatch):
    monkeypatch.chdir(place_of(S) / "runs/a")
    names = {}
    exec(block("finetune", "docs/lessons.md"), names)
    before = torch.jit.load("encoder.pt").state_dict()
    moved = [k for k, v in names["encoder"].state_dict().items() if not torch.equal(v, before[k])]
    assert any("layer1" in k or "stem" in k for k in moved) and names["loss"].isfinite()

def test_load_sentences_block(place_of, monkeypatch):
    monkeypatch.chdir(place_of(T) / "runs/a")
    names = {}
    exec(block("load-sentences"), names)
    assert -1 <= names["similarity"] <= 1 and names["a"].shape == (32,)

@pytest.fixture(scope="module", autouse=True)
def compiled(place_of, tmp_path_factory, background):
    """(folder, future of the finished process) of README's program, which takes a minute."""
    here = tmp_path_factory.mktemp("cpp")
    (here / "load.cpp").write_text(block("load-cpp"))
    shutil.copy(place_of(S) / "runs/a/encoder.pt", here)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shell = re.search(r"```sh\n(.*?)```", readme, re.S)[1]
    shell = shell.replace("$(python ", f"$({sys.executable} ")
    return here, background.submit(subprocess.run, ["bash", "-c", shell], cwd=here,
                                   capture_output=True, text=True)

@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_load_cpp_block(compiled):
    """README's program, compiled as README says, prints the same number as Python."""
    here, done = compiled[0], compiled[1].result()
    assert done.returncode == 0, done.stderr[-2000:]
    features = torch.jit.load(here / "encoder.pt")(torch.ones(2, 3, 32, 32))
    assert done.stdout.startswith(str(list(features.shape)))
    total = features.abs().sum().item()
    assert float(done.stdout.split()[-1]) == pytest.approx(total, rel=1e-4)

# ==== pages ====

def page_of(script):
    return (ROOT / f"docs/{script.__name__}.md").read_text(encoding="utf-8")

@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_every_flag_is_explained(script, capsys):
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    for flag in {*re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out)} - {"--help"}:
        assert flag in page_of(script), flag

@pytest.mark.parametrize("script", [S, T, V, R], ids=lambda script: script.__name__)
def test_every_logged_number_and_file_is_explained(script, place_of):
    run, text = place_of(script) / "runs/a", page_of(script)
    columns = [column for table in run.glob("*.csv")
               for column in table.read_text().splitlines()[0].split(",")]
    for key in [*columns, *report_of(run)]:
        base = re.sub(r"_(train|test)$", "", key.removesuffix("_untrained"))
        base = re.sub(r"_(class|superclass)$", "_sample", base)  # one row for the three levels
        assert f"`{base}" in text, key
    for file in run.iterdir():
        assert f"`{file.name}`" in text, file.name
