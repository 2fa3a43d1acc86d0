"""The reading order holds: a file imports only what a reader has met before it, other packages are
asked for only where they are used, and functions, lines and files stay short."""
import ast
import pathlib
import sys

ROOT = pathlib.Path(__file__).parent.parent
CORE = ("folora", "model", "calibrate", "train", "eval")  # the five files of the method
FIRST = ("folora", "model", "tasks")                      # these import nothing of this project
# {file or package: what of this project it may import}
MAY_IMPORT = {**dict.fromkeys(FIRST, ()),
              "extras": (*FIRST, "extras"), "calibrate": (*FIRST, "extras"),
              "train": (*FIRST, "extras"), "eval": (*FIRST, "extras", "calibrate", "train"),
              "study": (*FIRST, "extras", "calibrate", "train", "eval", "study")}
# requirements.txt, and what tiktoken needs
REQUIRED = {"torch", "numpy", "tiktoken", "pytest", "hypothesis", "regex"}


def modules(*packages):
    """{dotted name: path} of the files at the root and in these packages."""
    paths = [*ROOT.glob("*.py"), *(p for name in packages for p in (ROOT / name).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


def parsed(path):
    return ast.parse(path.read_text(encoding="utf8"))


def imports(tree):
    """Dotted names that a syntax tree imports; `from a import b` may be a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def outside_functions(tree):
    """The tree without the bodies of its functions, which run only when they are called."""
    class Without(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return None
    return Without().visit(tree)


OURS = modules("extras", "study")


def test_a_file_imports_only_what_is_read_before_it():
    """folora, model and tasks nothing of ours; extras these and each other; calibrate and train these
    too; eval all of them; nothing but the study itself the study."""
    wrong = {}
    for name, path in OURS.items():
        place = name.split(".")[0]
        assert place in MAY_IMPORT, f"{name} has no place in the reading order"
        ours = {n.split(".")[0] for n in imports(parsed(path))} & MAY_IMPORT.keys()
        wrong[name] = ours - set(MAY_IMPORT[place])
    wrong = {name: found for name, found in wrong.items() if found}
    assert not wrong, wrong


def test_no_file_imports_itself_by_way_of_others():
    edges = {name: imports(outside_functions(parsed(path))) & OURS.keys() - {name}
             for name, path in OURS.items()}

    def visit(name, path):
        assert name not in path, f"a cycle: {' -> '.join([*path, name])}"
        for other in sorted(edges[name]):
            visit(other, [*path, name])
    for name in OURS:
        visit(name, [])


def test_packages_that_are_not_required_are_imported_where_they_are_used():
    """Inside a function: without matplotlib, for example, all but the figures works."""
    of_tests = {path.stem for path in (ROOT / "tests").rglob("*.py")}
    known = REQUIRED | MAY_IMPORT.keys() | of_tests | sys.stdlib_module_names
    found = {name: {n.split(".")[0] for n in imports(outside_functions(parsed(path)))} - known
             for name, path in modules("extras", "study", "tests").items()}
    found = {name: packages for name, packages in found.items() if packages}
    assert not found, found


def test_the_method_and_the_model_need_torch_alone():
    for name in "folora", "model":
        packages = {imported.split(".")[0] for imported in imports(parsed(OURS[name]))}
        assert packages - sys.stdlib_module_names == {"torch"}


# ------------------------------------------------------------------------------------------------
# Sizes

def test_functions_fit_on_a_screen():
    """45 lines at most, docstring included."""
    sizes = {f"{name}.{node.name}": node.end_lineno - node.lineno + 1
             for name, path in OURS.items() for node in ast.walk(parsed(path))
             if isinstance(node, ast.FunctionDef)}
    long = {function: size for function, size in sizes.items() if size > 45}
    assert not long, long


def test_lines_have_100_columns_at_most():
    long = [f"{path.relative_to(ROOT)}:{number}" for path in OURS.values()
            for number, line in enumerate(path.read_text(encoding="utf8").splitlines(), 1)
            if len(line) > 100]
    assert not long, ", ".join(long)


def test_the_five_files_of_the_method_can_be_read_in_one_sitting():
    sizes = {name: len(OURS[name].read_text(encoding="utf8").splitlines()) for name in CORE}
    assert sum(sizes.values()) <= 1380, sizes
