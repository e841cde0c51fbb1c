"""`pagestitch.pyi` describes the module as it is, and each name has a text for `help()`."""

import ast
import inspect
import pathlib

import pagestitch

STUBS = ast.parse((pathlib.Path(__file__).parents[1] / "pagestitch.pyi").read_text())
CLASSES = {node.name: node for node in STUBS.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")}


def names(kind):
    """The public names of a class that it defines itself."""
    return {name for name in vars(kind) if not name.startswith("_")}


def test_the_stubs_name_what_the_module_has():
    public = {name for name, value in vars(pagestitch).items() if isinstance(value, type) and not name.startswith("_")}
    assert set(CLASSES) == public
    for name, stub in CLASSES.items():
        described = {node.name for node in stub.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")}
        assert described == names(getattr(pagestitch, name)), name


def test_the_stubs_have_the_arguments_of_the_module():
    """Their types are checked by `python -m mypy.stubtest pagestitch`."""
    for name, stub in CLASSES.items():
        for node in (node for node in stub.body if isinstance(node, ast.FunctionDef) and not node.decorator_list):
            if node.name == "__new__" or not node.name.startswith("_"):
                thing = getattr(pagestitch, name) if node.name == "__new__" else getattr(getattr(pagestitch, name), node.name)
                described = [argument.arg for argument in node.args.args[1:] + node.args.kwonlyargs]
                existing = [name for name in inspect.signature(thing).parameters if name != "self"]
                assert described == existing, (name, node.name)


def test_each_public_name_has_a_text():
    assert pagestitch.__doc__
    for name in CLASSES:
        kind = getattr(pagestitch, name)
        assert kind.__doc__, name
        assert all(getattr(kind, method).__doc__ for method in names(kind)), name


def test_the_programs_of_the_guide_run(capsys):
    guide = (pathlib.Path(__file__).parents[3] / "docs" / "python.md").read_text()
    programs = [rest.split("```")[0] for rest in guide.split("```python\n")[1:]]
    assert len(programs) == 2
    for program in programs:
        exec(compile(program, "docs/python.md", "exec"), {})
