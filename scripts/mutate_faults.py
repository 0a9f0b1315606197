"""Small faults in Python code, as a tired person writes them: each is one piece of the source replaced by another.

Left out is what does nothing when the code runs or only words a message: annotations, docstrings, assertions, f-strings.
"""

import ast
import difflib
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

COMPARISONS = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: (r"is\s+not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: (r"not\s+in", "in"),
}
NEGATED_BY_SWAPPING = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)
ARITHMETIC = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "*"),
    ast.BitOr: ("|", "&"),
    ast.BitAnd: ("&", "|"),
}
NAMES = {
    "max": "min",
    "amax": "amin",
    "argmax": "argmin",
    "cummax": "cummin",
    "any": "all",
    "floor": "ceil",
    "mean": "sum",
}
NAMES |= {other: name for name, other in NAMES.items()}
# Calls without arguments that may be forgotten.
CALLS = {
    "float",
    "double",
    "long",
    "bool",
    "clone",
    "detach",
    "abs",
    "sqrt",
    "log",
    "strip",
    "lower",
    "contiguous",
    "cpu",
}


@dataclass(frozen=True)
class Fault:
    """
    One replacement in a file.

    Attributes:
        file: the file, relative to its tree.
        start, end: the bytes of its source that are replaced.
        replacement: what takes their place.
        kind: what sort of fault it is.
        line: where it is, from 1.
    """

    file: str
    start: int
    end: int
    replacement: str
    kind: str
    line: int

    @property
    def id(self) -> str:
        """A name that stays as long as what stands before the fault in its file does."""
        place = f"{self.start} {self.end} {self.replacement}".encode()
        return f"{self.file}:{self.line}:{hashlib.sha256(place).hexdigest()[:6]}"

    def put_into(self, source: bytes) -> bytes:
        return source[: self.start] + self.replacement.encode() + source[self.end :]

    def diff(self, source: bytes) -> str:
        """The lines that differ, in the form of `diff -u`, without a head and with a line around them."""
        before, after = source.decode().splitlines(), self.put_into(source).decode().splitlines()
        return "\n".join(list(difflib.unified_diff(before, after, n=1, lineterm=""))[3:])


def faults_of(root: Path, file: str) -> list:
    """All faults that can be put into a file of a tree, in the order of its source. Of some, what comes out does not parse."""
    source = (root / file).read_bytes()
    finder = _Finder(file, source)
    finder.visit(ast.parse(source))
    return sorted(finder.found, key=lambda fault: (fault.start, fault.end, fault.replacement))


def parses(source: bytes) -> bool:
    try:
        ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    return True


class _Finder(ast.NodeVisitor):
    def __init__(self, file: str, source: bytes):
        self.file, self.source, self.found = file, source, []
        lines = source.splitlines(keepends=True)
        self.line_starts = [sum(map(len, lines[:number])) for number in range(len(lines))]

    # -- places in the source

    def _start(self, node) -> int:
        return self.line_starts[node.lineno - 1] + node.col_offset

    def _end(self, node) -> int:
        return self.line_starts[node.end_lineno - 1] + node.end_col_offset

    def _text(self, node) -> str:
        return self.source[self._start(node) : self._end(node)].decode()

    def _add(self, kind: str, start: int, end: int, replacement: str) -> None:
        line = self.source.count(b"\n", 0, start) + 1
        self.found.append(Fault(self.file, start, end, replacement, kind, line))

    def _replace(self, kind: str, node, replacement: str) -> None:
        self._add(kind, self._start(node), self._end(node), replacement)

    def _between(self, kind: str, left, right, pattern: str, replacement: str) -> None:
        """Replaces an operator, which stands between two nodes."""
        start = self._end(left)
        match = re.search(pattern.encode(), self.source[start : self._start(right)])
        if match:
            self._add(kind, start + match.start(), start + match.end(), replacement)

    # -- what is left out

    def visit_JoinedStr(self, node):
        pass  # before Python 3.12 the places inside an f-string are wrong

    visit_Assert = visit_JoinedStr

    def visit_If(self, node):
        if ast.unparse(node.test) not in ("TYPE_CHECKING", "__name__ == '__main__'"):
            self._branch(node)

    def visit_AnnAssign(self, node):
        self.visit(node.target)
        if node.value is not None:
            self.visit(node.value)

    def _function(self, node):
        for decorator in node.decorator_list:
            if "no_grad" in self._text(decorator):
                start = self._start(decorator) - 1  # its @
                self._add("decorator removed", start, self._end(decorator), "")
            self.visit(decorator)
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self.visit(default)
        for statement in node.body:
            self.visit(statement)

    visit_FunctionDef = visit_AsyncFunctionDef = _function

    def visit_ClassDef(self, node):
        for statement in node.body:
            if isinstance(statement, ast.Assign):
                self._replace("statement removed", statement, "pass")
            self.visit(statement)

    # -- faults

    def visit_Compare(self, node):
        if len(node.ops) == 1:
            pattern, other = COMPARISONS[type(node.ops[0])]
            self._between("comparison", node.left, node.comparators[0], pattern, other)
        else:
            for left, operator, right in zip([node.left, *node.comparators], node.ops, node.comparators):
                pattern, other = COMPARISONS[type(operator)]
                self._between("comparison", left, right, pattern, other)
        self.generic_visit(node)

    def visit_BinOp(self, node):
        if type(node.op) in ARITHMETIC and not _is_text(node.left):
            operator, other = ARITHMETIC[type(node.op)]
            self._between("arithmetic", node.left, node.right, re.escape(operator), other)
        self.generic_visit(node)

    def visit_AugAssign(self, node):
        if type(node.op) in ARITHMETIC:
            operator, other = ARITHMETIC[type(node.op)]
            self._between("arithmetic", node.target, node.value, re.escape(operator), other)
        self._replace("statement removed", node, "pass")
        self.generic_visit(node)

    def visit_BoolOp(self, node):
        word, other = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:]):
            self._between("and, or", left, right, rf"\b{word}\b", other)
        self.generic_visit(node)

    def visit_UnaryOp(self, node):
        if isinstance(node.op, (ast.Not, ast.USub)):
            self._replace("sign or not dropped", node, f"({self._text(node.operand)})")
        self.generic_visit(node)

    def visit_Constant(self, node):
        value = node.value
        if isinstance(value, bool):
            self._replace("True, False", node, str(not value))
        elif isinstance(value, int):
            self._replace("off by one", node, str(value + 1))
        elif isinstance(value, float):
            self._replace("other number", node, repr(value * 2 if value else 1.0))
            if value:
                self._replace("other number", node, "0.0")

    def _negate(self, condition):
        swapped = isinstance(condition, ast.Compare) and isinstance(condition.ops[0], NEGATED_BY_SWAPPING)
        if not (swapped or isinstance(condition, ast.UnaryOp)):  # of which others make the same
            self._replace("condition negated", condition, f"not ({self._text(condition)})")

    def _branch(self, node):
        self._negate(node.test)
        self.generic_visit(node)

    visit_While = visit_IfExp = _branch

    def visit_comprehension(self, node):
        for condition in node.ifs:
            self._negate(condition)
        self.generic_visit(node)

    def visit_Name(self, node):
        if node.id in NAMES:
            self._replace("other function", node, NAMES[node.id])

    def visit_Attribute(self, node):
        if node.attr in NAMES:
            end = self._end(node)
            self._add("other function", end - len(node.attr), end, NAMES[node.attr])
        self.generic_visit(node)

    def visit_Call(self, node):
        called = node.func
        if isinstance(called, ast.Attribute) and called.attr in CALLS and not node.args and not node.keywords:
            self._replace("call dropped", node, self._text(called.value))
        given = sorted((*node.args, *node.keywords), key=self._start)
        for number, argument in enumerate(given):
            if not (isinstance(argument, ast.keyword) and argument.arg):
                continue
            start, end = self._start(argument), self._end(argument)
            if number:
                start = self._end(given[number - 1])
            elif len(given) > 1:
                end = self._start(given[1])
            self._add("argument dropped", start, end, "")
        self.generic_visit(node)

    def visit_Expr(self, node):
        if isinstance(node.value, ast.Call):
            self._replace("statement removed", node, "pass")
        if not isinstance(node.value, ast.Constant):
            self.generic_visit(node)

    def visit_Assign(self, node):
        if any(isinstance(target, (ast.Attribute, ast.Subscript)) for target in node.targets):
            self._replace("statement removed", node, "pass")
        self.generic_visit(node)

    def visit_Raise(self, node):
        self._replace("statement removed", node, "pass")  # what it says is not looked at

    def _jump(self, node):
        self._replace("statement removed", node, "pass")

    visit_Continue = visit_Break = _jump


def _is_text(node) -> bool:
    return isinstance(node, ast.JoinedStr) or isinstance(node, ast.Constant) and isinstance(node.value, str)
