"""The scripts are copied alone, so what several need stands in each as the same text. Here the
texts are compared, the budgets of size held, and what all four promise is tried on each.

`# --- the same in simclr, vicreg ---` opens a run of definitions, `# --- end ---` closes it.
"""
import ast
import importlib
import os
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Trap, clock, report_of, same_bits, state_of
from matplotlib.figure import Figure

# script: (lines, KB, top-level definitions) at most
BUDGETS = {"simclr_deepaug.py": (1000, 52, 48), "simcse_deepaug.py": (1100, 58, 52),
           "vicreg_probe.py": (1350, 74, 60), "topk_rescue.py": (1450, 78, 68),
           "cka.py": (300, 16, 16)}
START, END = re.compile(r"# --- the same in (.+) ---"), "# --- end ---"

def short(script: str) -> str:
    return script.removesuffix(".py").split("_")[0]

def statements(text: str) -> list:
    """[(name, text with decorators, first line, is it a def or class)], imports left out."""
    found, lines = [], text.splitlines()
    for node in ast.parse(text).body:
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            name = getattr(node, "name", lines[first - 1].split("=")[0].strip())
            body = "\n".join(lines[first - 1:node.end_lineno])
            found.append((name, body, first, hasattr(node, "name")))
    return found

def runs(script: str, text: str) -> tuple[dict, list]:
    """({line: the names of the run that it lies in}, what is wrong with the markers)."""
    inside, wrong, names = {}, [], None
    for number, line in enumerate([*text.splitlines(), None], 1):
        opened = START.fullmatch(line or "")
        like = line and line != END and re.match(r"\s*# ?-+ ?(the same in|end\b)", line)
        if (opened or line is None) and names or line == END and not names:
            wrong.append(f"{script}:{number}: a run is not closed, or not open")
        if like and not opened:
            wrong.append(f"{script}:{number}: no marker: {line}")
        if opened:
            names = opened[1].split(", ")
            if not {short(script)} < set(names) <= {short(s) for s in BUDGETS}:
                wrong.append(f"{script}:{number}: names of this script and others: {names}")
        names = None if line == END else names
        inside[number] = names
    return inside, wrong

def check(texts: dict) -> list:
    """What is wrong with the copies in {script: its text}, a line each."""
    wrong, have = [], {}  # {script: {name: (text, names of its marker or None)}}
    for script, text in texts.items():
        marked, wrong_markers = runs(script, text)
        wrong += wrong_markers
        have[script] = {name: (body, marked.get(first), defined)
                        for name, body, first, defined in statements(text)}
    group = {short(s): s for s in have}
    for script, names in have.items():
        for name, (body, marker, defined) in names.items():
            for other in [group[s] for s in marker or [] if s in group]:
                if have[other].get(name, ())[:2] != (body, marker):
                    wrong.append(f"{script}: {name}: another text or marker in {other}, or none")
            unmarked = {s for m, s in group.items() if s != script and m not in (marker or [])}
            wrong += [f"{script}: {name}: the same in {s}, without a marker" for s in unmarked
                      if defined and body.count("\n") > 1 and have[s].get(name, [""])[0] == body]
    return wrong

F, G = "@property\ndef f(x):\n    y = x + 1\n    return y\n", "K = 200\n"
RUN = f"# --- the same in simclr, topk ---\n{F}# ==== banner ====\n{G}# --- end ---\n"

@pytest.mark.parametrize("a, b, complaint", [
    (RUN, RUN.replace("# ==== banner ====\n", ""), None), (RUN, F, "f: another text or marker"),
    (RUN, RUN + "def own():\n    a = 1\n    return a\n", None),
    (RUN, RUN.replace("+ 1", "+ 2"), "f: another text"),
    (RUN, RUN.replace("@property\n", ""), "f: another text"),
    (RUN, RUN.replace("200", "100"), "K: another"), (RUN, RUN.replace("def f", "def g"), "f: ano"),
    (RUN, RUN.replace("simclr, ", "simclr, vicreg, "), "f: another text or marker"),
    (RUN, RUN.replace(F, "") + F, "f: another text or marker"),
    (RUN.replace(F, "") + F, RUN.replace(F, "") + F, "f: the same in topk_rescue.py, without"),
    (RUN, RUN + RUN.splitlines()[0], "not closed"), (RUN, RUN + END, "not open"),
    (RUN + "    # --- end ---", RUN, "no marker"),
    (RUN + "# -- the same in topk --", RUN, "no marker"),
    (RUN.replace("topk", "vicreg"), RUN, "f: the same in topk_rescue.py, without"),
    (RUN.replace("simclr, ", ""), RUN, "names of this script"),
    (RUN.replace("topk", "tops"), RUN, "names of this script")])
def test_checker_finds_each_kind_of_fault(a, b, complaint):
    wrong = check({"simclr_deepaug.py": a, "topk_rescue.py": b})
    assert any(complaint in w for w in wrong) if complaint else wrong == []

def test_copies_in_the_scripts_are_the_same_text():
    assert check({s: (ROOT / s).read_text(encoding="utf-8") for s in BUDGETS}) == []

@pytest.mark.parametrize("script", BUDGETS)
def test_budget(script):
    text = (ROOT / script).read_text(encoding="utf-8")
    lines, kb, definitions = BUDGETS[script]
    defs = {name: first + body.count("\n") for name, body, first, d in statements(text) if d}
    assert text.count("\n") <= lines and len(text.encode()) <= 1024 * kb
    assert len(defs) <= definitions and max(map(len, text.splitlines())) <= 100
    assert ast.get_docstring(ast.parse(text), clean=False).count("\n") < 45
    method = {"topk_rescue.py": ["Rescue"], "cka.py": []}.get(script, ["deep_augment", "nt_xent"])
    assert all(defs.get(name, 0) <= 250 for name in method)

def test_scripts_import_none_of_each_other_and_cka_only_inside_functions():
    ours = {s.removesuffix(".py") for s in BUDGETS} - {"cka"}
    for script in BUDGETS:
        tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [node.module] if isinstance(node, ast.ImportFrom) else \
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not ours & set(names), f"{script}:{node.lineno}"
            assert "cka" not in names or node not in tree.body, f"{script}:{node.lineno}"

# ==== what all four scripts promise ====

PICTURES = "--workers 0 --image-size 16 --batch-size 36"
TINY = {  # twelve steps on the 216 training pictures of `few`, the 128 sentences of `texts`
    "simclr_deepaug": f"{PICTURES} --layer 2+4 --views simclr",
    "simcse_deepaug": "--depth 1 --vocab-size 300 --batch-size 20 --layer 1 --stop-grad --mlm "
                      "--select dev --eval-every 4",
    "vicreg_probe": f"{PICTURES} --arch RES-1-8 --projector 200 200 --layer 1 --sample-level 6 4 2 "
                    "--target-net RES-1-8 --target-epochs 1 --mine-steps 5 --probe-epochs 1",
    "topk_rescue": f"{PICTURES} --method mocov3 --rescue topk --k 4 --projector 16 8"}

@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """They take half of a small run, and other tests look at them."""
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)

@pytest.fixture(scope="module", params=TINY)
def script(request):
    return importlib.import_module(request.param)

@pytest.fixture(scope="module")
def words(script, few, texts):
    """The command line of a run of twelve steps, but for --out."""
    data = ["--data-dir", few]
    if script.NAME == "simcse_deepaug":
        data = ["--train-file", texts / "text.txt", "--sts-dir", texts / "sts"]
    return [*map(str, data), *"--device cpu --epochs 2".split(), *TINY[script.NAME].split()]

@pytest.fixture(scope="module")
def under_torchrun(script, words, tmp_path_factory, background):
    """(folder, future of the finished process) of a copy of the script and its run there."""
    here = tmp_path_factory.mktemp("alone")
    command = "-m torch.distributed.run --standalone --nproc_per_node=2"
    run = [sys.executable, *command.split(), shutil.copy(script.__file__, here), *words]
    return here, background.submit(subprocess.run, [*run, "--out", "run"], cwd=here,
                                   capture_output=True, text=True, timeout=400)

@pytest.fixture(scope="module")
def done(script, words, tmp_path_factory, under_torchrun):
    """A finished run, beside the one under torchrun; tests change nothing in its folder."""
    out = tmp_path_factory.mktemp("done") / "run"
    script.main([*words, "--out", str(out)])
    return out

def measured(x):
    """Without times and what --resume may change."""
    if isinstance(x, dict):
        other = {"seconds", "images_per_second", "sentences_per_second", "out", "resume",
                 "export_difference"}
        return {k: measured(v) for k, v in x.items() if k not in other}
    return [*map(measured, x)] if isinstance(x, list) else x

def assert_same_run(run, other):
    """Weights, optimizer, losses and all measurements are equal to the last bit."""
    for read in (state_of, report_of):
        assert same_bits(measured(read(run)), measured(read(other)))

def test_ctrl_c_prints_the_command_that_goes_on_to_the_same_bits(
        script, words, done, tmp_path, monkeypatch, capsys):
    """In the middle of an epoch; the folder's name has a space."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    out, ctrl_c = tmp_path / "a run", clock(33, lambda: signal.raise_signal(signal.SIGINT))
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(time, "time", ctrl_c)
        script.main([*words, "--out", str(out)])
    python, _, *again = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert end.value.code == 130 and python == "python"
    assert 6 < state_of(out)["step"] < 12 and not (out / "report.json").exists()
    script.main(again)
    assert_same_run(out, done)

def alone(name, words, folder, look=0, file_size=0):
    """python NAME.py WORDS, in a process of its own, killed a random moment after a look at the
    clock, or with a disk that is full after so many bytes of a file."""
    os.chdir(folder)
    sys.stdout, sys.stderr = open("out.txt", "w"), open("err.txt", "w")
    moment = signal.ITIMER_REAL, random.uniform(0.001, 0.2)
    time.time = clock(look, lambda: signal.setitimer(*moment))  # an alarm ends a process at once
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    sys.argv[:] = [f"{name}.py", *words]
    runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")

@pytest.fixture
def in_a_process(script, processes, tmp_path):
    """in_a_process(words, ...) -> exit code, stdout, lines of stderr without bars."""
    def call(words, **how):
        child = processes(target=alone, args=(script.NAME, words, tmp_path), kwargs=how)
        child.start()
        child.join(300)
        out, err = ((tmp_path / f"{name}.txt").read_text() for name in ("out", "err"))
        return child.exitcode, out, [line for line in err.splitlines() if "error" in line]
    return call

def test_killed_at_random_moments_it_ends_with_the_same_bits(
        script, words, done, tmp_path, in_a_process):
    steps, codes = [-1], [None]
    while codes[-1] != 0 and len(codes) < 9:
        codes.append(in_a_process([*words, "--resume", "--out", "run"], look=9)[0])
        steps.append(state_of(tmp_path / "run")["step"])  # whole, whenever the kill came
        assert codes[-1] in (0, -signal.SIGALRM)
    assert steps == sorted(steps) and len({*steps}) >= 3, steps
    assert_same_run(tmp_path / "run", done)

def test_resuming_a_finished_run_gives_its_report(script, words, done, tmp_path):
    """Changing nothing; cut short by a kill it is written again."""
    out, report = shutil.copytree(done, tmp_path / "run"), report_of(done)
    words, before = [*words, "--resume", "--out", str(out)], (out / "checkpoint.pt").read_bytes()
    assert script.main(words) == report
    (out / "report.json").write_text((out / "report.json").read_text()[:300])
    assert measured(script.main(words)) == measured(report) == measured(report_of(out))
    assert (out / "checkpoint.pt").read_bytes() == before

def test_resume_with_other_flags_is_refused_naming_them(
        script, words, done, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(shutil.copytree(done, tmp_path / "run").parent)
    changes = "--lr 0.01 --seed 5 --epochs 9 --rate 0.4 --sample 0.4 --layer 0 --batch-size 18"
    line = refused([*words, "--resume", "--out", "run", *changes.split(), "--no-stop-grad"])
    for name in [*re.findall("--([a-z-]+)", changes), "stop-grad"]:
        assert f"{name.replace('-', '_')} is " in line, name

def test_damaged_foreign_and_dangerous_checkpoints_are_refused(
        script, words, done, tmp_path, monkeypatch, refused):
    """The file is kept, none of its code runs: it would write a file. --init is as careful."""
    monkeypatch.chdir(tmp_path)
    file = shutil.copytree(done, Path("run")) / "checkpoint.pt"
    whole, state = file.read_bytes(), state_of("run")
    other = "topk_rescue" if script.NAME != "topk_rescue" else "simclr_deepaug"
    ways = [["--resume", "--out", "run"], ["--init", "run", "--out", "new"]]
    for content in (whole[:len(whole) // 2], b"", bytes(len(whole)), [1, 2], Trap(),
                    {**state, "model": Trap()}, {**state, "script": other}, None):
        file.unlink()
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif content:
            torch.save(content, file)
        for way in ways[:2 if hasattr(script.settings([]), "init") else 1]:
            line = refused([*words, *way])
            assert "checkpoint.pt" in line and ("damaged" in line or f"{other}.py" in line)

@pytest.mark.parametrize("file", ["checkpoint.pt", "encoder.pt"])
def test_a_full_disk_is_one_line_and_when_there_is_room_resume_goes_on(
        script, words, done, tmp_path, in_a_process, file):
    """The last checkpoint is the largest: it lists all steps. The older one is kept."""
    out, words = tmp_path / "run", [*words, "--resume", "--out", "run"]
    if file == "encoder.pt":
        shutil.copytree(done, out)
        (out / "report.json").unlink()
    size = (done / file).stat().st_size
    room = size // 2 if file == "encoder.pt" else size - 400
    code, _, errors = in_a_process(words, file_size=room)
    assert code == 2 and len(errors) == 1, errors
    assert (file in errors[0] or file == "encoder.pt") and not list(out.glob("*.part"))
    assert state_of(out)["step"] >= 0 and not (out / "report.json").exists()
    assert in_a_process(words)[0] == 0
    assert_same_run(out, done)

def test_a_loss_that_is_not_finite_stops_the_run(script, words, tmp_path, monkeypatch, capsys):
    """The step is named; the checkpoint from before it is kept."""
    monkeypatch.setattr(time, "time", clock())
    with pytest.raises(SystemExit, match="2"):
        script.main([*words, "--lr", "1e9", "--out", str(tmp_path / "run")])
    error, state = capsys.readouterr().err, state_of(tmp_path / "run")
    assert re.search(rf"error: .*not finite at about step {state['step'] + 1};.*--lr", error)
    assert all(v.isfinite().all() for v in state["model"].values())

def test_a_script_copied_alone_trains_under_torchrun_and_one_process_writes(
        script, done, under_torchrun):
    here, end = under_torchrun[0], under_torchrun[1].result()
    assert end.returncode == 0, end.stderr
    assert {p.name for p in here.iterdir()} == {f"{script.NAME}.py", "run"}
    assert end.stdout.count("run: ") == 1 and state_of(here / "run")["step"] == 12
    assert report_of(here / "run").keys() == report_of(done).keys()
    assert torch.jit.load(here / "run/encoder.pt")

def test_command_lines_as_a_user_types_them(script, words, done, tmp_path, in_a_process):
    """No epochs: the untrained network is measured. --out: by date and time."""
    code, out, errors = in_a_process([*words, "--epochs", "0"])
    [run] = (tmp_path / "runs").iterdir()
    assert code == 0 and not errors and f"{run.relative_to(tmp_path)}: " in out
    assert re.fullmatch(rf"{script.NAME}-\d{{8}}-\d{{6}}", run.name)
    kind = "sts" if script.NAME == "simcse_deepaug" else "linear"
    assert report_of(run)[kind] == report_of(done)[f"{kind}_untrained"]
    code, out, errors = in_a_process(["--layer", "999"])
    assert code == 2 and out == "" and len(errors) == 1

@pytest.mark.parametrize("bad, says", [
    ("--layer 99", "--layer 99"), ("--layer none+1", "none+1"), ("--rate 1", "--rate 0.999"),
    ("--rate half", "half"), ("--sample 0", "--sample"), ("--lr nan", "--lr"), ("--lr 0", "--lr"),
    ("--epochs -1", "--epochs"), ("--batch-size 1", "--batch-size"),
    ("--batch-size 217", "--batch-size"), ("--seed 99999999999999999999", "--seed"),
    ("--seed 1.5", "--seed"), ("--learning-speed 3", "--learning-speed --help"),
    ("--resume", "--resume --out"), ("--out full", "full --resume"), ("--out .", "--out ."),
    ("--out full --resume", "full --resume"), ("--out full/a.txt", "a.txt"),
    ("--compare nowhere", "no finished run"), ("DATA nowhere", "nowhere"), ("DATA full", "full"),
    ("torchrun --batch-size 33", "--batch-size 2"),
    *[("--device cuda", "--device cuda")] * (not torch.cuda.is_available())])
def test_bad_input_is_one_line_and_nothing_is_written(script, words, tmp_path, monkeypatch, refused,
                                                      bad, says):
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/a.txt").write_text("neither pictures nor a run")
    if bad.startswith("torchrun"):
        monkeypatch.setenv("WORLD_SIZE", "2")
    bad = bad.removeprefix("torchrun ").replace("DATA", words[0])  # --data-dir, --train-file
    line = refused([*words, *bad.split()])
    assert all(part in line for part in says.split()), line
