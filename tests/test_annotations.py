"""What type checkers are told; `tox -e release` asks pyright itself."""

import ast
import inspect
import pathlib

import pytest

import keras_halo

pytestmark = pytest.mark.any_backend

CLIENT = pathlib.Path(__file__).with_name("typed_client.py")

MODULES = [
    keras_halo,
    keras_halo.callbacks,
    keras_halo.layers,
    keras_halo.losses,
    keras_halo.metrics,
    keras_halo.ops,
    keras_halo.plots,
    keras_halo.rejection,
    keras_halo.workflows,
]


def functions_of(thing):
    """Functions that a user calls, methods of classes among them."""
    if inspect.isfunction(thing):
        yield thing
        return
    for owner in thing.__mro__ if inspect.isclass(thing) else ():
        if not owner.__module__.startswith("keras_halo."):
            continue
        for name, member in vars(owner).items():
            if name.startswith("_") and name not in ("__init__", "__call__"):
                continue
            if isinstance(member, classmethod | staticmethod):
                member = member.__func__
            if isinstance(member, property):
                member = member.fget
            if inspect.isfunction(member):
                yield member


def public_functions():
    found = set()
    for module in MODULES:
        for name in module.__all__:
            thing = getattr(module, name)
            if module is keras_halo.ops:
                for part in vars(thing).values():
                    if getattr(part, "__module__", "") == thing.__name__:
                        found.update(functions_of(part))
            found.update(functions_of(thing))
    return {
        function
        for function in found
        if function.__module__.startswith("keras_halo.")
        and not function.__name__.startswith("_" * 3)
        # What the compiler of PyTorch leaves in a module.
        and "torch_dynamo_resume_in_" not in function.__qualname__
        and (function.__name__[0] != "_" or function.__name__[1] == "_")
    }


def test_public_functions_are_annotated():
    functions = public_functions()
    assert len(functions) > 150
    missing = {}
    for function in functions:
        signature = inspect.signature(function)
        names = [
            name
            for name, parameter in signature.parameters.items()
            if parameter.annotation is parameter.empty
            and name not in ("self", "cls")
        ]
        if signature.return_annotation is signature.empty:
            names.append("return")
        if names:
            missing.setdefault(function.__module__, {})[
                function.__qualname__
            ] = names
    assert not missing


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_the_typed_client_uses_every_public_name(module):
    source = CLIENT.read_text("utf-8")
    assert "# pyright: strict" in source
    tree = ast.parse(source)
    part = module.__name__.rpartition(".")[2]
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (
            ast.unparse(node.value) in (part, f"keras_halo.{part}")
        ):
            used.add(node.attr)
        if isinstance(node, ast.Name) and module is keras_halo:
            used.add(node.id)
    assert set(module.__all__) <= used, set(module.__all__) - used
