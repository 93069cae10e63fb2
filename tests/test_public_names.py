import subprocess
import sys

import peerlora


def test_every_public_name_is_importable_and_documented():
    for name in peerlora.__all__:
        thing = getattr(peerlora, name)
        assert isinstance(thing, dict) or thing.__doc__, name


def test_ray_is_imported_for_clusters_only():
    """Not even by the modules that would connect to one."""
    modules = "peerlora.cli.train, peerlora.cli.compare, peerlora.runtime.cluster.ray_engine"
    code = f"import {modules}, peerlora.experiments.trial_pool, sys; print('ray' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert told.stdout.strip() == "False", told.stderr


def test_unknown_name_is_an_attribute_error():
    assert not hasattr(peerlora, "no_such_name")


def test_importing_the_package_imports_nothing_heavy():
    code = "import peerlora, sys; print([m for m in ('torch', 'transformers', 'pydantic') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_what_is_uploaded_is_found_without_torch():
    code = "import peerlora.runtime.hub, sys; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
