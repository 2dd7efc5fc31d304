"""What `import medray` gives."""

import importlib
import inspect
import pkgutil

import pytest

import medray


def test_functions_stay_functions_when_their_modules_are_imported() -> None:
    for module in pkgutil.walk_packages(medray.__path__, "medray."):
        room = module.name.split(".")[1]
        if room in ("slides", "storage", "datasets", "inference", "evaluation"):
            importlib.import_module(module.name)
    for name in medray.__all__:
        assert inspect.isfunction(getattr(medray, name)), name
    with pytest.raises(AttributeError, match="attribute infers"):
        _ = medray.infers
