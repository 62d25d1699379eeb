"""A run that is killed, interrupted or broken loses nothing: resumed, it reaches the bits of an uninterrupted one."""
import csv
import json
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import same_bits
from PIL import Image

import simclr_deepaug as S

ROOT = Path(S.__file__).parent


def flags(few, *more):
    """What all runs here share: 60 steps with dropout at two layers, so views, rows and masks all must come back."""
    return ["--dataset", "folder", "--data-dir", str(few), "--workers", "0", "--batch-size", "36", "--epochs", "10",
            "--layer", "2", "4", "--blur", "0.5", "--device", "cpu", *map(str, more)]


def load(out):
    return torch.load(Path(out) / "checkpoint.pt", weights_only=True)


def assert_same_run(out, straight):
    """Model, optimizer and position are equal bit for bit; report.json holds the same measurements."""
    ours, theirs = load(out), load(straight)
    assert same_bits(ours["model"], theirs["model"])
    assert same_bits(ours["optimizer"], theirs["optimizer"])
    assert ours["step"] == theirs["step"]
    ours, theirs = (json.loads((Path(p) / "report.json").read_text()) for p in (out, straight))
    for key in ("linear", "knn", "linear_untrained", "alignment_test", "uniformity_train"):
        assert ours[key] == theirs[key]


@pytest.fixture(scope="module")
def straight(few, tmp_path_factory):
    """The uninterrupted run, a checkpoint at every step."""
    out = tmp_path_factory.mktemp("straight") / "run"
    S.main(flags(few, "--save-every", 0, "--out", out))
    return out


@pytest.fixture(scope="module")
def halfway(few, tmp_path_factory):
    """A run stopped by SIGTERM in its 25th step: a folder to copy and go on from."""
    out = tmp_path_factory.mktemp("halfway") / "run"
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, "two_views", 25, signal.SIGTERM)
        with pytest.raises(SystemExit) as end:
            S.main(flags(few, "--out", out))
    assert end.value.code == 143 and load(out)["step"] == 25
    return out


@pytest.fixture
def half(halfway, tmp_path):
    return shutil.copytree(halfway, tmp_path / "run")


def signal_at(patch, name, call, number):
    """Send this process the signal when the script's function `name` is called for the call-th time."""
    calls, function = [0], getattr(S, name)

    def wrapped(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)
    patch.setattr(S, name, wrapped)


# --- SIGKILL ----------------------------------------------------------------------------------------------------------

def child_main(words):
    """main(words), its DataLoader workers forked as they are when Python runs the script on Linux up to 3.13."""
    multiprocessing.set_start_method("fork", force=True)
    S.main(words)


@pytest.fixture(scope="module")
def process():
    """process(words) -> a started child that runs main(words): forked from a server that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["simclr_deepaug", "cka"])

    def start(words):
        child = context.Process(target=child_main, args=([str(w) for w in words],))
        child.start()
        return child
    return start


def kill_after(child, checkpoint: Path, writes: int, delay: float):
    """SIGKILL `delay` seconds after the checkpoint has been rewritten `writes` times (by then it may have ended)."""
    def stamp():
        return checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    last, deadline = stamp(), time.time() + 120
    while writes and child.is_alive() and time.time() < deadline:
        now = stamp()
        writes, last = writes - (now != last), now
        time.sleep(0.0005)
    time.sleep(delay)
    child.kill()
    child.join()


def test_killed_ten_times_ends_with_the_same_bits(few, straight, process, tmp_path):
    """SIGKILL at ten random moments (two while starting, seven while training, one after it), resumed each time."""
    out, rng, steps = tmp_path / "run", random.Random(0), []
    words = flags(few, "--save-every", 0, "--out", out, "--resume")
    moments = [(0, rng.uniform(0, 1)) for _ in range(2)] + \
        [(rng.randint(2, 8), rng.uniform(0, 0.05)) for _ in range(7)]
    rng.shuffle(moments)
    for writes, delay in [*moments, (60, rng.uniform(0, 0.5))]:
        child = process(words)
        kill_after(child, out / "checkpoint.pt", writes, delay)
        if (out / "checkpoint.pt").exists():
            steps.append(load(out)["step"])                          # whole, whenever the kill came
        assert child.exitcode in (-9, 0)
    assert steps == sorted(steps) and len({s for s in steps if 0 < s < 60}) >= 5, steps
    child = process(words)
    child.join(120)
    assert child.exitcode == 0
    assert_same_run(out, straight)
    rows, expected = ([{k: v for k, v in r.items() if k != "images_per_second"}
                       for r in csv.DictReader(open(p / "metrics.csv"))] for p in (out, straight))
    assert len(rows) == 60 and rows == expected                      # every loss, once


@pytest.fixture(scope="module")
def streamed(few, process, tmp_path_factory):
    """(flags, folder) of an uninterrupted run of 36 steps on pictures of several sizes, decoded in a worker process."""
    pictures = shutil.copytree(few, tmp_path_factory.mktemp("streamed") / "pictures")
    for i, file in enumerate(sorted(pictures.rglob("*.png"))):
        if i % 2:
            Image.open(file).resize((40, 36)).save(file)
    words = ["--dataset", "folder", "--data-dir", str(pictures), "--workers", "1", "--batch-size", "36", "--epochs",
             "6", "--image-size", "32", "--device", "cpu"]
    child = process([*words, "--out", pictures.parent / "run"])
    child.join(120)
    assert child.exitcode == 0
    return words, pictures.parent / "run"


def test_killed_while_streaming_ends_with_the_same_bits(streamed, process, tmp_path):
    """The same when worker processes decode and crop the pictures: their randomness comes back too."""
    words = [*streamed[0], "--save-every", 0, "--out", tmp_path / "run", "--resume"]
    for writes in (8, 8):                                            # 6 steps an epoch: in the middle of one
        kill_after(process(words), tmp_path / "run" / "checkpoint.pt", writes, 0)
        assert 0 < load(tmp_path / "run")["step"] < 36
    child = process(words)
    child.join(120)
    assert child.exitcode == 0
    assert_same_run(tmp_path / "run", streamed[1])


def test_killed_while_writing_leaves_the_old_file_whole(few, half, straight):
    """What a kill in the middle of a write leaves is a .part file beside the whole one; it is not read."""
    for name in ("checkpoint.pt", "metrics.csv", "report.json", "encoder.pt"):
        (half / f"{name}.part").write_bytes(b"half a fi")
    S.main(flags(few, "--out", half, "--resume"))
    assert_same_run(half, straight)


def test_written_whole_keeps_the_old_file_when_writing_fails(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(OSError), S.written_whole(tmp_path / "x") as part:
        part.write_text("ne")
        raise OSError("disk full")
    assert (tmp_path / "x").read_text() == "old"
    with S.written_whole(tmp_path / "x") as part:
        part.write_text("new")
        assert (tmp_path / "x").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == "new"


# --- SIGINT, SIGTERM --------------------------------------------------------------------------------------------------

def test_the_printed_command_goes_on(few, straight, streamed, tmp_path):
    """Real processes: Ctrl-C (sent to the loader's workers too, as a terminal does) ends with 130, SIGTERM with 143;
    the last line, run as it stands, ends with the bits of an uninterrupted run, and prints no warning."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    script, runs = os.path.relpath(ROOT / "simclr_deepaug.py", tmp_path), []
    for words, expected, number, send in ((streamed[0], streamed[1], signal.SIGINT, os.killpg),
                                          (flags(few), straight, signal.SIGTERM, os.kill)):
        out = tmp_path / f"a run by {number.name}"                   # the space must survive too
        log = open(tmp_path / f"{number.name}.txt", "w+")
        child = subprocess.Popen([sys.executable, script, *words, "--out", out, "--save-every", "0.1"], cwd=tmp_path,
                                 stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        runs.append((out, expected, number, send, log, child))
    for out, _, number, send, _, child in runs:
        deadline = time.time() + 60
        while not (out / "checkpoint.pt").exists() and child.poll() is None and time.time() < deadline:
            time.sleep(0.002)
        send(child.pid, number)
    again = []
    for out, expected, number, _, log, child in runs:
        code = child.wait(60)
        log.seek(0)
        text = log.read()
        assert code == 128 + number and "Traceback" not in text, text
        last = text.splitlines()[-1]
        assert last.startswith("python ") and 0 < load(out)["step"] < load(expected)["step"]
        again.append((out, expected, subprocess.Popen(shlex.split(last), cwd=tmp_path, env=env, text=True,
                                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT)))
    for out, expected, child in again:
        text = child.communicate(timeout=120)[0]
        assert child.returncode == 0, text
        assert "arning" not in text and "lipping" not in text, text
        assert_same_run(out, expected)


@pytest.mark.parametrize("where, call", [
    ("two_views", 1),                                                # in the first step
    ("meters", 1),                                                   # while the tenth step is being logged
    ("probe", 1),                                                    # after training
    ("export", 1),
])
def test_a_signal_at_any_place_loses_no_step(few, tmp_path, monkeypatch, capsys, where, call):
    """Whatever the script is doing, SIGTERM saves the last step taken and prints the command that goes on."""
    words = flags(few, "--epochs", 2, "--out", tmp_path / "run", "--save-every", 1e9)
    signal_at(monkeypatch, where, call, signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        S.main(words)
    assert end.value.code == 143
    last = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert last[0] == "python" and last[1].endswith("simclr_deepaug.py") and last[2:] == [*words, "--resume"]
    assert load(tmp_path / "run")["step"] in {"two_views": [1], "meters": [10, 11]}.get(where, [12])
    monkeypatch.undo()
    if where == "meters":
        assert "linear" in S.main(last[2:])
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL        # the handlers are put back


def test_seeds_stopped_in_the_second_go_on(few, tmp_path, monkeypatch, capsys):
    """--seeds: the printed command finishes what is left, and the numbers are those of both seeds."""
    words = flags(few, "--epochs", 1, "--seeds", 0, 1, "--out", tmp_path / "run")
    signal_at(monkeypatch, "two_views", 6 + 2 * 2 + 1 + 2 * 2 + 2, signal.SIGTERM)
    with pytest.raises(SystemExit):
        S.main(words)
    monkeypatch.undo()
    table = S.main(shlex.split(capsys.readouterr().out.splitlines()[-1])[2:])
    reports = [json.loads(p.read_text()) for p in sorted((tmp_path / "run").glob("*/report.json"))]
    assert len(reports) == 2 and table["loss"][0] == pytest.approx(sum(r["loss"] for r in reports) / 2)


# --- refusals and freedoms --------------------------------------------------------------------------------------------

def refused(capsys, words) -> str:
    with pytest.raises(SystemExit) as end:
        S.main([str(w) for w in words])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert end.value.code == 2 and len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("change", ["--lr 0.1", "--layer 3", "--batch-size 30", "--seed 5", "--rate 0.3", "--epochs 20",
                                    "--no-stop-grad", "--optimizer lars", "--arch resnet18", "--deterministic"])
def test_resume_with_other_flags_is_refused_naming_them(few, half, capsys, change):
    before = {p.name: p.stat().st_mtime_ns for p in half.iterdir()}
    line = refused(capsys, [*flags(few, "--out", half, "--resume"), *change.split()])
    assert change.split()[0].replace("--no-", "--") in line
    assert {p.name: p.stat().st_mtime_ns for p in half.iterdir()} == before


def test_resume_with_other_data_is_refused(few, capsys, tmp_path, monkeypatch):
    """Half of the pictures gone: the epochs would be others, so the run cannot go on to the same bits."""
    pictures = shutil.copytree(few, tmp_path / "pictures")
    words = flags(pictures, "--out", tmp_path / "run")
    signal_at(monkeypatch, "two_views", 3, signal.SIGTERM)
    with pytest.raises(SystemExit):
        S.main(words)
    monkeypatch.undo()
    for file in sorted(pictures.rglob("*.png"))[::2]:
        file.unlink()
    capsys.readouterr()                                              # the first run's progress bar
    assert "picture" in refused(capsys, [*words, "--resume"])


def test_flags_that_change_nothing_may_change(few, half, straight):
    """--workers, --log-every, --save-every, --probe-every, --export may differ on --resume: the bits stay."""
    S.main(flags(few, "--out", half, "--resume", "--workers", 1, "--log-every", 3, "--save-every", 7, "--probe-every",
                 5, "--export", "pt2", "--device", "auto" if not torch.cuda.is_available() else "cpu"))
    assert_same_run(half, straight)
    assert (half / "encoder.pt2").exists()


def test_a_finished_run_may_be_resumed(few, straight, tmp_path):
    """Nothing is left to train: the measurements and the export are made again, and are the same."""
    out = shutil.copytree(straight, tmp_path / "run")
    (out / "report.json").unlink()
    (out / "encoder.pt").unlink()
    S.main(flags(few, "--out", out, "--resume"))
    assert_same_run(out, straight)
    assert (out / "encoder.pt").exists()


def test_resume_without_a_checkpoint_starts_at_the_beginning(few, tmp_path, capsys):
    report = S.main(flags(few, "--epochs", 1, "--out", tmp_path / "run", "--resume"))
    assert "no checkpoint" in capsys.readouterr().out
    assert report["steps"] == 6 and load(tmp_path / "run")["step"] == 6


def test_damaged_and_foreign_checkpoints_are_refused(few, half, capsys):
    """Truncated, empty, not a checkpoint, without its parts, or of another script: one line, and the file is kept."""
    file, words = half / "checkpoint.pt", flags(few, "--out", half, "--resume")
    whole, state = file.read_bytes(), load(half)
    for content in (whole[:len(whole) // 2], whole[:-100], b"", b"hello", bytes(len(whole))):
        file.write_bytes(content)
        line = refused(capsys, words)
        assert "damaged" in line and "checkpoint.pt" in line
        assert file.read_bytes() == content
    torch.save({**state, "script": "topk_rescue"}, file)
    assert "topk_rescue" in refused(capsys, words)
    for part in ("config", "model", "optimizer", "step"):
        torch.save({k: v for k, v in state.items() if k != part}, file)
        assert "damaged" in refused(capsys, words)


@pytest.mark.parametrize("more", ["--lr 1e30", "--lr 3e38", "--lr 3e38 --temperature 1e-4"])
def test_a_loss_that_is_not_finite_stops_the_run(few, tmp_path, capsys, more):
    """Code 2, the step is named, and what is in the folder is the last checkpoint with finite weights, or none."""
    with pytest.raises(SystemExit) as end:
        S.main(flags(few, *more.split(), "--warmup-epochs", 0, "--save-every", 0, "--out", tmp_path / "run"))
    last = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and "step" in last and "--lr" in last
    if (tmp_path / "run" / "checkpoint.pt").exists():
        state = load(tmp_path / "run")
        assert all(v.isfinite().all() for v in state["model"].values())
        assert f"step {state['step'] + 1}" in last                   # the checkpoint is that of the step before


def test_a_later_loss_that_is_not_finite_leaves_the_checkpoint_before_it(few, half, capsys, monkeypatch):
    """The 30th step breaks: the checkpoint of step 25 stays as it was."""
    calls, views = [0], S.two_views

    def broken(*args):
        calls[0] += 1
        return views(*args) * (float("nan") if calls[0] == 5 else 1)
    monkeypatch.setattr(S, "two_views", broken)
    before = (half / "checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit) as end:
        S.main(flags(few, "--out", half, "--resume", "--save-every", 1e9))
    assert end.value.code == 2 and "step 30" in capsys.readouterr().err.splitlines()[-1]
    assert (half / "checkpoint.pt").read_bytes() == before
