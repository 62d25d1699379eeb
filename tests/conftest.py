"""Shared by all tests: one thread, for the nets are tiny; no network; data and processes."""
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, for children too

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"

def same_bits(a, b) -> bool:
    """Two nested states are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return a == b

def state_of(run):
    return torch.load(Path(run) / "checkpoint.pt", weights_only=True)

def report_of(run):
    return json.loads((Path(run) / "report.json").read_text())

def clock(look=0, event=None):
    """For time.time: a minute passes between two looks, so that every step saves. At one of them
    something happens."""
    looks = itertools.count(1)
    def now():
        n = next(looks)
        if n == look:
            event()
        return 61.0 * n
    return now

class Trap:
    """Unpickled, it runs code."""
    def __reduce__(self):
        return eval, ("open('sprung', 'w')",)

@pytest.fixture(scope="session")
def background():
    """background.submit(f, ...) -> a future: what takes long, beside the tests, one at a time."""
    with ThreadPoolExecutor(1) as pool:
        yield pool

@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """No test downloads anything: what tries hears that there is no network."""
    def urlopen(*args, **kwargs):
        raise urllib.error.URLError("the tests have no network")
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)

@pytest.fixture
def refused(request, capsys):
    """refused(words): main(words) of the module's SCRIPT, or of the fixture `script`, leaves with
    code 2 and one line on stderr (a bar may have wiped itself away), which is returned. Nothing is
    written but an empty folder data, which torchvision makes."""
    own = "script" in request.fixturenames
    script = request.getfixturevalue("script") if own else request.module.SCRIPT

    def files():
        return {p: p.is_file() and (p.stat().st_mtime_ns, p.stat().st_size)
                for p in Path().rglob("*") if p != Path("data") or any(p.iterdir())}

    def call(words):
        before = files()
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            script.main([str(w) for w in words])
        err = capsys.readouterr().err.split("\n")
        lines = [line.rsplit("\r")[-1] for line in err if line.strip()]
        assert end.value.code == 2
        assert len(lines) == 1, lines
        assert lines[0].startswith(f"{script.NAME}.py: error: ")
        assert files() == before, "a refused command wrote something"
        return lines[0]
    return call

@pytest.fixture(scope="session")
def processes():
    """Starts processes from a server that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([
        "simclr_deepaug", "simcse_deepaug", "vicreg_probe", "topk_rescue", "cka", "pytest",
        "transformers.models.bert.modeling_bert", "transformers.models.bert.tokenization_bert"])
    return context.Process

@pytest.fixture(scope="session")
def few(tmp_path_factory):
    """A folder of 240 drawn pictures, 32x32 PNG in four class folders: a run takes seconds."""
    import simclr_deepaug as S
    root = tmp_path_factory.mktemp("few")
    images, labels = S.draw_shapes(1200, 0, "cpu")
    for c in range(4):
        (root / f"class{c}").mkdir()
        for i, picture in enumerate(images[labels == 5 * c][:60]):
            picture = S.Image.fromarray(picture.permute(1, 2, 0).numpy())
            picture.save(root / f"class{c}" / f"{i:02}.png")
    return root

@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A folder with text.txt, 128 sentences, and STS-B's pairs in sts/ as SentEval has them."""
    import simcse_deepaug as S
    folder, g = tmp_path_factory.mktemp("texts"), S.Grammar()
    (folder / "text.txt").write_text("\n".join(g.sentences(128)))
    (folder / "sts/STS/STSBenchmark").mkdir(parents=True)
    for name, n in (("test", 40), ("dev", 42), ("train", 128)):
        rows = enumerate(zip(*g.pairs(n, g.unseen, n)))
        (folder / f"sts/STS/STSBenchmark/sts-{name}.csv").write_text(
            "".join(f"g\tf\ty\t{i}\t{score}\t{a}\t{b}\n" for i, (a, b, score) in rows))
    return folder

@pytest.fixture(scope="session")
def real_data(tmp_path_factory):
    """The real data sets restored by ../shared/data/unpack.py; skips where it is missing."""
    if not (SHARED / "unpack.py").exists():
        pytest.skip("no ../shared/data: real data is not here")
    to = tmp_path_factory.mktemp("data")
    words = [sys.executable, SHARED / "unpack.py", "--to", to, "cifar-100"]
    subprocess.run(words, check=True, capture_output=True)
    return to
