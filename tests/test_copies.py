"""The scripts are copied alone, so what several need stands in each as the same text. Here the
texts are compared, and the budgets of size held.

`# --- the same in simclr, vicreg ---` opens a run of definitions, `# --- end ---` closes it.
"""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
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
