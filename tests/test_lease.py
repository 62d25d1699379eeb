"""tests/gpu/lease.py: every job's flags are right, calls are small enough, and a run goes on where it was stopped."""
import json
import shlex
import sys
import tarfile
from pathlib import Path

import pytest

import cka
import simclr_deepaug
import simcse_deepaug
import topk_rescue
import vicreg_probe

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests/gpu"))
import lease  # noqa: E402

JOBS = [(name, job) for name, programme in lease.PROGRAMMES.items() for job in programme.jobs]
SCRIPTS = {f"{m.__name__}.py": m for m in (simclr_deepaug, simcse_deepaug, vicreg_probe, topk_rescue)}


@pytest.mark.parametrize("programme, job", JOBS, ids=lambda x: getattr(x, "name", x))
@pytest.mark.parametrize("quick", [True, False])
def test_every_jobs_flags_are_right(programme, job, quick, monkeypatch):
    script, *words = lease.words_of(job, quick, 40)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert not any("{" in w for w in words)
    if job.group:
        a = SCRIPTS[script].settings(words)
        assert a.out.endswith(job.name) and a.epochs == 40 and a.resume and a.seed == 0
        assert (a.device == "cpu" and getattr(a, "dataset", "shapes") == "shapes") if quick else a.device == "cuda"
        assert job.group in lease.PROGRAMMES[programme].minutes
    elif script in SCRIPTS:
        assert "--compare" in words or SCRIPTS[script].settings(words).device == ("cpu" if quick else "cuda")
    elif script == "cka.py":
        cka.settings(words)
    elif script.startswith("tests/bench"):
        source = (ROOT / script).read_text()
        for flag in [w for w in words[:words.index("--flags") if "--flags" in words else None] if w.startswith("--")]:
            assert f'"{flag}"' in source, flag
        if "--flags" in words:
            topk_rescue.settings(words[words.index("--flags") + 1:])
    else:
        assert script == "-m" and (ROOT / words[1]).exists()


def test_a_programme_fits_the_lease_and_its_names_are_its_own():
    names = [job.name for _, job in JOBS]
    assert len(set(names)) == len(names)
    for name, programme in lease.PROGRAMMES.items():
        groups = {job.group for job in programme.jobs} - {""}
        assert set(programme.minutes) == groups and sum(programme.minutes.values()) <= 22, name
        assert set(programme.overhead) <= groups


def test_what_a_call_carries_is_small_enough(tmp_path, monkeypatch):
    if not lease.PACKED.exists():
        pytest.skip("no ../shared/data: nothing to pack")
    monkeypatch.setattr(lease, "HERE", tmp_path / "lease-data")
    for name, programme in lease.PROGRAMMES.items():
        brought = set()
        for call in (1, 2):
            brought |= set(lease.pack(programme, call))
            size = sum(f.stat().st_size for f in lease.HERE.rglob("*") if f.is_file())
            assert size < 60 * 2 ** 20, (name, call)                # the checkout itself has some
        assert brought == {p for job in programme.jobs for n in job.needs for c in lease.CALLS[n] for p in c}, name


@pytest.fixture
def there(tmp_path, monkeypatch):
    """An empty machine: everything that lease.py writes is below tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lease, "THERE", tmp_path / "state")
    monkeypatch.setattr(lease, "RESERVE", 0)
    monkeypatch.setattr(lease, "LEAST", 1)
    return tmp_path


TRAINING = """
import json, pathlib, sys, time
out, epochs = pathlib.Path(sys.argv[sys.argv.index("--out") + 1]), int(sys.argv[1])
out.mkdir(parents=True, exist_ok=True)
begun = out / "checkpoint.pt"
if "slow" in out.name and not begun.exists():
    begun.write_text("half")
    time.sleep(60)
(out / "config.json").write_text(json.dumps({"batch_size": 10}))
(out / "report.json").write_text(json.dumps({"steps": 5, "images_per_second": 10.0, "seconds": 1.0, "epochs": epochs,
                                             "linear": 50.0, "resumed": begun.exists()}))
"""


def test_a_run_goes_on_where_it_was_stopped(there, capsys, monkeypatch):
    (there / "train.py").write_text(TRAINING)
    programme = lease.Programme("", [
        lease.Job("plain", "-c print('hello')"), lease.Job("bad", "-c 1/0"),
        lease.Job("fast", "train.py {E}", group="g"), lease.Job("slow", "train.py {E}", group="g"),
        lease.Job("later", "-c print('later')")], {"g": 2})
    assert lease.run(programme, False, 0, 5, there / "out") == 1      # bad failed; slow was stopped
    shown = capsys.readouterr().out
    state = json.loads((there / "state/state.json").read_text())
    assert state["done"] == {"plain": 0, "bad": 1, "fast": 0}
    epochs = state["epochs"]["g"]                                   # 5 s an epoch, two runs in two minutes
    assert 11 <= epochs <= 12
    assert "slow: goes on in the next call" in shown and "later: after the trainings" in shown
    assert lease.run(programme, False, 0, 5, there / "out") == 0
    state = json.loads((there / "state/state.json").read_text())
    assert state["done"] == {"plain": 0, "bad": 1, "fast": 0, "slow": 0, "later": 0} and state["epochs"]["g"] == epochs
    with tarfile.open(there / "out/lease.tgz") as tar:
        names = tar.getnames()
    assert {"logs/plain.log", "logs/bad.log", "slow/report.json", "fast/config.json"} <= set(names)
    assert not any("checkpoint" in n for n in names)
    rows = lease.collect(there / "out", there / "collected")
    assert {r["run"]: r["epochs"] for r in rows} == {"fast": epochs, "slow": epochs, "fit-g": 1}
    assert json.loads((there / "collected/slow/report.json").read_text())["resumed"]


def test_jobs_wait_for_their_data(there, capsys):
    programme = lease.Programme("", [lease.Job("needy", "train.py {E}", needs=(lease.C10,), group="g"),
                                     lease.Job("map", "-c 1/0")], {"g": 1})
    (there / "lease-data/cifar-10").mkdir(parents=True)
    (there / "lease-data/cifar-10/test.zip").write_text("one of two parts")
    lease.PACKED, kept = there / "nowhere", lease.PACKED
    try:
        assert lease.run(programme, False, 0, 20, there / "out") == 0
    finally:
        lease.PACKED = kept
    shown = capsys.readouterr().out
    assert "needy: waits for cifar-10-png" in shown and "map: after the trainings" in shown
    assert (there / "state/parts/cifar-10/test.zip").exists()


def test_list_and_an_unknown_name(capsys):
    lease.main(["list"])
    shown = capsys.readouterr().out
    for name in lease.PROGRAMMES:
        assert shlex.split(shown.split(f"\n{name} ")[-1] if f"\n{name} " in shown else shown)
    with pytest.raises(SystemExit) as end:
        lease.main(["run", "everything"])
    assert end.value.code == 2 and "no programme everything" in capsys.readouterr().err
