"""What `import medray` gives."""

import importlib
import inspect

import medray


def test_functions_stay_functions_when_their_modules_are_imported() -> None:
    for name in ("check", "evaluate", "infer", "ingest", "train", "tune"):
        importlib.import_module(f"medray.{name}")
    for name in medray.__all__:
        assert inspect.isfunction(getattr(medray, name)), name
        assert inspect.isfunction(getattr(medray, name)), name
