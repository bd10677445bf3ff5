"""Who imports whom: the rules of kernels/README.md, read from the sources.

tests, benchmarks -> gpusoftmax -> gpusoftmax.kernels.<target>.<op> -> helpers            never the other way
"""

import ast
import functools
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
BRIDGES = {"torch", "jax"}  # gpusoftmax/<name>.py may import that library
CLI = {"cli", "__main__"}
TOOLS = {"compile", "explain"}  # public, and no operations


class Import(NamedTuple):
    """`import module`, or `from module import name` as the module "module.name". `file` begins at the repository."""

    file: str
    line: int
    module: str

    @property
    def top(self):
        return self.module.partition(".")[0]

    def is_of(self, module):
        return self.module == module or self.module.startswith(module + ".")


def sources(*folders):
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


@functools.cache
def tree(path):
    return ast.parse(path.read_text(), str(path))


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def imports(*folders):
    """Every import in these folders, at the top of a file or inside a function, by statement or by importlib."""
    for path in sources(*folders):
        yield from imports_of_file(path)


@functools.cache
def imports_of_file(path):
    return tuple(imports_of(tree(path), name_of(path)))


def imports_of(parsed, file):
    for node in ast.walk(parsed):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} is a relative import"
            for alias in node.names:
                yield Import(file, node.lineno, f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Call) and called(node) in ("importlib.import_module", "import_module", "__import__"):
            yield Import(file, node.lineno, literal_start(node.args[0]))


def called(call):
    """The dotted name that is called, as in "importlib.import_module"; what it is an attribute of may be anything."""
    function, names = call.func, []
    while isinstance(function, ast.Attribute):
        names.append(function.attr)
        function = function.value
    names.append(function.id if isinstance(function, ast.Name) else "?")
    return ".".join(reversed(names))


def literal_start(node):
    """The text of a string, or what an f-string begins with; ? for anything else."""
    if isinstance(node, ast.JoinedStr):
        node = node.values[0]
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "?"


def ops():
    """The stems of the public operations: softmax, cross_entropy, ..."""
    stems = {path.stem for path in (ROOT / "gpusoftmax").glob("*.py") if not path.stem.startswith("_")}
    return stems - BRIDGES - CLI - TOOLS


def kernel_ops():
    """The stems of the kernel files: every public operation, and copy."""
    cpu, cuda = ({path.stem for path in (ROOT / "kernels" / target).glob("*.py")} for target in ("cpu", "cuda"))
    return (cpu & cuda) - {"__init__", "cache"}


def violations(found):
    return [f"{one.file}:{one.line} imports {one.module}" for one in found]


def test_the_walk_finds_imports():
    """The rules below hold because nothing breaks them, not because nothing is found."""
    found = {(one.file, one.module) for one in imports("gpusoftmax", "kernels")}
    assert ("gpusoftmax/__init__.py", "gpusoftmax.softmax.softmax") in found
    assert ("gpusoftmax/_arrays.py", "cupy") in found  # inside a function, through importlib
    assert ("gpusoftmax/_arrays.py", "gpusoftmax.kernels.") in found  # an f-string
    assert ("kernels/cuda/device/_cuda.py", "numba.cuda") in found
    assert {"softmax", "log_softmax", "logsumexp", "cross_entropy"} <= ops() & kernel_ops()
    program = "def f():\n from a import b\n import c.d as e\n importlib.import_module(f'g.{h}')\n __import__('i')"
    assert [one.module for one in imports_of(ast.parse(program), "")] == ["a.b", "c.d", "g.", "i"]


def test_the_public_package_never_imports_numba():
    found = [one for one in imports("gpusoftmax") if one.top in ("numba", "numba_cuda", "llvmlite")]
    assert not found, violations(found)


def test_the_public_package_names_kernels_by_operation():
    """Above the operations only their hand-over types are known, whatever the target."""
    for one in imports("gpusoftmax"):
        if one.is_of("gpusoftmax.kernels"):
            for target in ("cpu", "cuda"):
                assert not one.is_of(f"gpusoftmax.kernels.{target}") or one.file.startswith("gpusoftmax/_"), one


def test_one_file_names_cupy():
    found = [one for one in imports("gpusoftmax", "kernels") if one.top in ("cupy", "cupyx")]
    assert {one.file for one in found} == {"gpusoftmax/_arrays.py"}, violations(found)


@pytest.mark.parametrize("library", sorted(BRIDGES))
def test_other_libraries_stay_in_their_bridges(library):
    allowed = "gpusoftmax/_arrays.py", f"gpusoftmax/{library}.py", f"gpusoftmax/_{library}_"
    found = [one for one in imports("gpusoftmax", "kernels") if one.top == library]
    assert found
    assert not [one for one in found if not one.file.startswith(allowed)], violations(found)
    # _arrays.py imports it inside functions, where an array of that library has been passed.
    top = ast.Module([node for node in tree(ROOT / "gpusoftmax/_arrays.py").body if not _is_definition(node)], [])
    assert not [one for one in imports_of(top, "") if one.top in (library, "cupy")]


def _is_definition(node):
    return isinstance(node, ast.FunctionDef | ast.ClassDef)


def test_one_file_imports_numba_cuda():
    def is_numba_cuda(one):
        return one.is_of("numba.cuda") or one.top == "numba_cuda"

    found = [one for one in imports("gpusoftmax", "kernels") if is_numba_cuda(one)]
    assert {one.file for one in found} == {"kernels/cuda/device/_cuda.py"}, violations(found)


def test_the_host_half_of_the_gpu_kernels_imports_no_numba():
    """At the top of no file; compile.py reaches kernels/cuda/device inside a function, when a cubin is missing."""
    of_numba = ROOT / "kernels/numba_passes.py"  # for kernels/cpu and kernels/cuda/device, which import it anyway
    for path in {*(ROOT / "kernels/cuda").glob("*.py"), *(ROOT / "kernels").glob("*.py")} - {of_numba}:
        for one in imports_of_file(path):
            assert one.top != "numba" and not one.is_of("numba_cuda"), one
            assert not one.is_of("gpusoftmax.kernels.numba_passes"), one
            if one.is_of("gpusoftmax.kernels.cuda.device"):
                assert one.file == "kernels/cuda/compile.py", one
        top = ast.Module([node for node in tree(path).body if not _is_definition(node)], [])
        for one in imports_of(top, name_of(path)):
            assert not one.is_of("gpusoftmax.kernels.cuda.device"), one


def test_the_driver_is_reached_from_few_files():
    found = [one for one in imports("gpusoftmax", "kernels") if one.is_of("cuda.core") or one.is_of("cuda.bindings")]
    allowed = {f"kernels/cuda/{name}.py" for name in ("driver", "compile", "cache")}
    assert {one.file for one in found} <= allowed, violations(found)


def test_kernels_know_nothing_of_users():
    found = [one for one in imports("kernels") if one.top == "gpusoftmax" and not one.is_of("gpusoftmax.kernels")]
    assert not found, violations(found)
    found = [one for one in imports("gpusoftmax", "kernels") if one.top in ("tests", "benchmarks", "examples")]
    assert not found, violations(found)


def test_the_targets_know_nothing_of_each_other():
    for one in imports("kernels/cpu"):
        assert not one.is_of("gpusoftmax.kernels.cuda"), one
    for one in imports("kernels/cuda"):
        assert not one.is_of("gpusoftmax.kernels.cpu"), one
    for one in imports("kernels"):
        if one.file.count("/") == 1:  # what both share
            assert not one.is_of("gpusoftmax.kernels.cpu") and not one.is_of("gpusoftmax.kernels.cuda"), one


def test_no_operation_imports_another():
    """Neither its public file nor its kernels; what two of them need lies in a helper."""
    packages = {
        "gpusoftmax": "gpusoftmax",
        "kernels/cpu": "gpusoftmax.kernels.cpu",
        "kernels/cuda": "gpusoftmax.kernels.cuda",
        "kernels/cuda/device": "gpusoftmax.kernels.cuda.device",
    }
    checked, operations = set(), ops() | kernel_ops()
    for one in imports("gpusoftmax", "kernels"):
        folder, stem = Path(one.file).parent.as_posix(), Path(one.file).stem
        if folder in packages and stem in operations:
            checked.add(folder)
            for other in operations - {stem}:
                assert not any(one.is_of(f"{package}.{other}") for package in packages.values()), one
    assert checked == packages.keys()


def test_every_operation_has_the_same_functions_on_both_targets():
    for op in kernel_ops():
        hosts = []
        for target in ("cpu", "cuda"):
            functions = [node for node in tree(ROOT / f"kernels/{target}/{op}.py").body if _is_public_function(node)]
            hosts.append({node.name: [argument.arg for argument in _arguments(node)] for node in functions})
        assert hosts[0] and hosts[0] == hosts[1], op


def _is_public_function(node):
    return isinstance(node, ast.FunctionDef) and not node.decorator_list and not node.name.startswith("_")


def _arguments(function):
    return [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]


def test_nobody_imports_a_second_copy_of_the_kernels():
    folders = ["gpusoftmax", "kernels", "tests", "benchmarks", "examples"]
    found = [one for one in imports(*folders) if one.top == "kernels"]
    assert not found, violations(found)


# ---------------------------------------------------------------- what may not be written anywhere


def calls(*folders):
    for path in sources(*folders):
        yield from ((name_of(path), node) for node in ast.walk(tree(path)) if isinstance(node, ast.Call))


def keywords(call):
    return {keyword.arg: keyword.value for keyword in call.keywords}


def is_off(value):
    return isinstance(value, ast.Constant) and value.value is False


def test_no_fastmath():
    """It makes isnan(nan) False and lets sums be reordered."""
    found = [
        f"{file}:{call.lineno}"
        for file, call in calls("gpusoftmax", "kernels")
        if "fastmath" in keywords(call) and not is_off(keywords(call)["fastmath"])
    ]
    assert not found, found
    mentions = [name_of(path) for path in sources("gpusoftmax", "kernels") if "fastmath=True" in path.read_text()]
    assert not mentions, mentions
    for name in ("NUMBA_FASTMATH", "enable_fast_math"):
        assert not [name_of(path) for path in sources("gpusoftmax", "kernels") if name in path.read_text()]


# The CPU cache stores Numba's own compiled form, which is a pickle. It is signed by its name and content, and unpickled
# only from a directory that nobody else can write.
MAY_PICKLE = {"kernels/cpu/cache.py"}
PICKLES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}
EXECUTES = {"eval", "exec", "compile", "builtins.eval", "builtins.exec", "os.system", "os.popen", "__import__"}


def test_one_file_unpickles():
    found = [
        one
        for one in imports("gpusoftmax", "kernels")
        if one.top in PICKLES or one.is_of("numba.core.serialize") or one.is_of("numba.cloudpickle")
    ]
    assert {one.file for one in found} == MAY_PICKLE, violations(found)


def test_nothing_executes_text():
    found = []
    for file, call in calls("gpusoftmax", "kernels"):
        given = keywords(call)
        if called(call) in EXECUTES:
            found.append(f"{file}:{call.lineno} {called(call)}")
        if "allow_pickle" in given and not is_off(given["allow_pickle"]):
            found.append(f"{file}:{call.lineno} allow_pickle")
        if "shell" in given and not is_off(given["shell"]):
            found.append(f"{file}:{call.lineno} shell")
        if "cache" in given and not is_off(given["cache"]):
            found.append(f"{file}:{call.lineno} cache=True: Numba's own cache unpickles whatever it finds")
    assert not found, found
