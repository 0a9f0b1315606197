"""The tool that puts faults into code: which faults it makes, and that it tells noticed ones from survivors."""

import importlib
import json

import pytest
from mutate_faults import faults_of, parses
from places import ROOT

CODE = '''"""A module of 3 words."""


def clamp(value: int, low: int = 0, high=10):
    """At most 5."""
    if value < low:
        raise ValueError(f"{value} is below {low + 1}")
    return min(value, high)


def unused(value):
    return value * 2
'''
TESTS = """import pytest
from toy import clamp


def test_clamp():
    assert [clamp(value, 0, 10) for value in (0, 5, 11)] == [0, 5, 10]
    with pytest.raises(ValueError):
        clamp(-1)
"""


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # a toy needs none, and they take most of the time
    root = tmp_path / "tree"
    (root / "tests").mkdir(parents=True)
    (root / "pyproject.toml").write_text('[tool.pytest.ini_options]\npythonpath = ["."]\n')
    (root / "toy.py").write_text(CODE)
    (root / "tests" / "test_toy.py").write_text(TESTS)
    return root


def mutate(*arguments):
    importlib.import_module("mutate").main([*map(str, arguments)])


def changes(tmp_path, code) -> list:
    """(kind, the code with the fault) of each fault in some code."""
    (tmp_path / "some.py").write_text(code)
    faults = faults_of(tmp_path, "some.py")
    assert len({fault.id for fault in faults}) == len(faults)
    return [
        (fault.kind, fault.put_into(code.encode()).decode())
        for fault in faults
        if parses(fault.put_into(code.encode()))
    ]


@pytest.mark.parametrize("code, faults", [
    ("a < b", ["a <= b"]),
    ("a.is_ is not b", ["a.is_ is b"]),
    ("x = (a) >= (b)", ["x = (a) > (b)"]),
    ("0 <= a < b", ["0 < a < b", "0 <= a <= b", "1 <= a < b"]),
    ("a + b - c", ["a - b - c", "a + b + c"]),
    ("a += b", ["a -= b", "pass"]),
    ("x = 'a' + b", []),
    ("x = 0.5", ["x = 1.0", "x = 0.0"]),
    ("x = True", ["x = False"]),
    ("x = a and b", ["x = a or b"]),
    ("x = -a", ["x = (a)"]),
    ("x = b if a else c", ["x = b if not (a) else c"]),
    ("x = b if a == c else c", ["x = b if a != c else c"]),
    ("x = [a for a in b if a]", ["x = [a for a in b if not (a)]"]),
    ("x = a.amax(b)", ["x = a.amin(b)"]),
    ("x = any(a)", ["x = all(a)"]),
    ("x = f(a, b=c, d=e)", ["x = f(a, d=e)", "x = f(a, b=c)"]),
    ("x = f(b=c, d=e)", ["x = f(d=e)", "x = f(b=c)"]),
    ("x = f(b=c)", ["x = f()"]),
    ("x = a.float()", ["x = a"]),
    ("f(a)", ["pass"]),
    ("x.y = a", ["pass"]),
    ("x = a", []),
    ("class A:\n    b = 'c'", ["class A:\n    pass"]),
    ("@torch.no_grad()\ndef f():\n    return a", ["\ndef f():\n    return a"]),
    ("def f(a: 'x < 1' = b) -> 2:\n    '''3'''", []),
    ("x: 'a' = 1", ["x: 'a' = 2"]),
    ("x = f'{a + 1}'", []),
    ("assert a < b", []),
    ("if TYPE_CHECKING:\n    f(a)", []),
    ("ü = a < b", ["ü = a <= b"]),
])  # fmt: skip
def test_faults(tmp_path, code, faults):
    assert sorted(changed for _, changed in changes(tmp_path, code)) == sorted(faults)


def test_every_code_file_holds_faults_and_is_another_with_each():
    for path in ROOT.glob("*.py"):
        source = path.read_bytes()
        faults = faults_of(ROOT, path.name)
        assert all(fault.put_into(source) != source for fault in faults), path
        assert faults or path.name == "methods_registry.py"


@pytest.mark.slow
def test_survivors_are_told_from_what_is_noticed(monkeypatch, tree, tmp_path, capsys):
    output, arguments = tmp_path / "found", ["--root", tree, "--tests", "tests/test_toy.py", "--number", 99]
    before = {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()}
    mutate(*arguments, "--output", output)
    report = json.loads(output.with_suffix(".json").read_text())
    outcomes = {
        result["diff"].split("\n+")[1].partition("\n")[0].strip(): result["outcome"] for result in report["faults"]
    }
    assert outcomes == {
        "if value <= low:": "noticed",
        "if not (value < low):": "noticed",
        "pass": "noticed",
        "return max(value, high)": "noticed",
        "def clamp(value: int, low: int = 1, high=10):": "SURVIVED",
        "def clamp(value: int, low: int = 0, high=11):": "SURVIVED",
        "return value / 2": "SURVIVED",
        "return value * 3": "SURVIVED",
    }
    assert report["noticed"] == 4 and len(report["survivors"]) == 4 and report["hung"] == 0
    assert all(
        result["noticed_by"] == "tests/test_toy.py::test_clamp"
        for result in report["faults"][:8]
        if result["noticed_by"]
    )
    assert "**4 of 8 noticed (50.0%)**" in output.with_suffix(".md").read_text()
    assert {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()} == before

    # What is known is not tried again, and the survivors alone are where asked for.
    module = importlib.import_module("mutate")
    tried, real = [], module.Bench.try_fault
    monkeypatch.setattr(
        module.Bench, "try_fault", lambda self, fault, **kw: tried.append(fault) or real(self, fault, **kw)
    )
    log = tmp_path / "found.faults.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:30])  # killed
    mutate(*arguments, "--output", output)
    again = json.loads(output.with_suffix(".json").read_text())
    assert len(tried) == 1 and [result["outcome"] for result in again["faults"]] == [
        r["outcome"] for r in report["faults"]
    ]
    (tree / "tests" / "test_toy.py").write_text(TESTS + "    assert clamp(0) == 0 and clamp(11) == 10\n")
    mutate(*arguments, "--output", tmp_path / "again", "--again", f"{output}.json")
    again = json.loads((tmp_path / "again.json").read_text())
    assert (len(again["faults"]), again["noticed"]) == (4, 2)
    with pytest.raises(SystemExit, match="belongs to another run"):
        mutate(*arguments, "--output", output)


@pytest.mark.slow
def test_a_fault_that_hangs_is_noticed(tree, tmp_path, capsys):
    (tree / "toy.py").write_text("def count(left):\n    while left:\n        left -= 1\n    return left\n")
    (tree / "tests" / "test_toy.py").write_text(
        "from toy import count\n\n\ndef test_count():\n    assert count(3) == 0\n"
    )
    (hang,) = (fault for fault in faults_of(tree, "toy.py") if fault.replacement == "+")
    mutate("--root", tree, "--tests", "tests/test_toy.py", "--only", hang.id, "--timeout", 3)
    assert f"{hang.id}: noticed: ran too long" in capsys.readouterr().out


def test_tests_that_fail_without_a_fault_say_nothing(tree, tmp_path):
    (tree / "tests" / "test_toy.py").write_text("def test_no():\n    assert False\n")
    with pytest.raises(SystemExit, match="without any fault tests/test_toy.py does not pass"):
        mutate("--root", tree, "--tests", "tests/test_toy.py", "--output", tmp_path / "found")


def test_the_draw_is_that_of_its_seed_and_grows(tree):
    draw = importlib.import_module("mutate").draw
    few, many, other = draw(tree, ["toy.py"], 3, 0), draw(tree, ["toy.py"], 6, 0), draw(tree, ["toy.py"], 6, 1)
    assert many[:3] == few and set(other) != set(many)


@pytest.mark.parametrize("arguments, message", [
    ([], "--output says where results go"),
    (["--output", "runs/a", "--files", "missing.py"], "--files missing.py: there is no such file"),
    (["--output", "runs/a", "--tests", "tests/missing.py"], "--tests tests/missing.py: there is no such file"),
    (["--only", "toy.py:1:000000"], "has no fault toy.py:1:000000; faults get other names where"),
    (["--list", "--again", "missing.json"], "--again missing.json cannot be read"),
])  # fmt: skip
def test_mutate_says_what_is_wrong(tree, arguments, message):
    with pytest.raises(SystemExit, match=message):
        mutate("--root", tree, *arguments)


def test_the_map_of_tests_names_files_that_exist():
    for file, tests in importlib.import_module("mutate").TESTS.items():
        assert (ROOT / file).is_file(), file
        assert set(tests) <= {path.name for path in (ROOT / "tests").rglob("test_*.py")}, file
