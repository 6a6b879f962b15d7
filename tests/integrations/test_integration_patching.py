"""The patch mechanism, on a library made for the test."""

import sys
import types

import pytest
from iris_kernels.integrations._patching import Patch, Swap


def ours(x, scale=1.0):
    return ("ours", x, scale)


@pytest.fixture
def library(monkeypatch):
    """`fakelib.home.compute`, also bound in `fakelib.user` and outside of fakelib."""

    def compute(x, scale=1.0):
        return ("theirs", x, scale)

    modules = {}
    for name in ("fakelib", "fakelib.home", "fakelib.user", "fakelib_extra"):
        modules[name] = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, modules[name])
    modules["fakelib.home"].compute = compute
    modules["fakelib.user"].renamed = compute
    modules["fakelib_extra"].compute = compute  # another library whose name begins the same
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.9")
    return types.SimpleNamespace(**{name.replace(".", "_"): m for name, m in modules.items()})


@pytest.fixture
def patch():
    return Patch("fakelib", "1.0", (Swap("fakelib.home", "compute", ours),))


def test_every_binding_inside_the_library_is_replaced_and_restored(library, patch):
    theirs = library.fakelib_home.compute
    assert patch.apply() == ["fakelib.home.compute", "fakelib.user.renamed"]
    assert library.fakelib_home.compute is ours
    assert library.fakelib_user.renamed is ours
    assert library.fakelib_extra.compute is theirs
    assert patch.revert() == ["fakelib.home.compute", "fakelib.user.renamed"]
    assert library.fakelib_home.compute is theirs
    assert library.fakelib_user.renamed is theirs


def test_applying_twice_is_applying_once(library, patch):
    theirs = library.fakelib_home.compute
    patch.apply()
    assert patch.apply() == []
    patch.revert()
    assert library.fakelib_home.compute is theirs
    assert patch.revert() == []


def test_modules_loaded_later_are_patched_by_the_second_apply(library, patch):
    theirs = library.fakelib_home.compute
    patch.apply()
    library.fakelib_user.late = theirs
    assert patch.apply() == ["fakelib.user.late"]
    patch.revert()
    assert library.fakelib_user.late is theirs


def test_apply_again_after_revert(library, patch):
    patch.apply()
    patch.revert()
    assert patch.apply() == ["fakelib.home.compute", "fakelib.user.renamed"]


@pytest.mark.parametrize(
    "other", [lambda x: 0, lambda x, scale=2.0: 0, lambda x, scale=1.0, extra=None: 0, None]
)
def test_other_parameters_are_refused(library, patch, other):
    library.fakelib_home.compute = other
    bound = library.fakelib_user.renamed
    with pytest.raises(
        RuntimeError, match=r"fakelib\.home\.compute of fakelib 9\.9 .*fakelib==1\.0"
    ):
        patch.apply()
    assert library.fakelib_home.compute is other
    assert library.fakelib_user.renamed is bound


def test_nothing_is_replaced_if_one_of_several_is_unknown(library):
    patch = Patch(
        "fakelib",
        "1.0",
        (Swap("fakelib.home", "compute", ours), Swap("fakelib.home", "missing", ours)),
    )
    theirs = library.fakelib_home.compute
    with pytest.raises(RuntimeError, match="missing"):
        patch.apply()
    assert library.fakelib_home.compute is theirs


def test_a_missing_library_is_named_with_the_install_command():
    patch = Patch("no_such_lib", "1.0", (Swap("no_such_lib.home", "compute", ours),))
    with pytest.raises(ImportError, match=r"pip install no_such_lib==1\.0"):
        patch.apply()
