"""The mechanism of the patches, on a library made for the test."""

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
    assert patch.on() == ["fakelib.home.compute", "fakelib.user.renamed"]
    assert library.fakelib_home.compute is ours
    assert library.fakelib_user.renamed is ours
    assert library.fakelib_extra.compute is theirs
    assert patch.off() == ["fakelib.home.compute", "fakelib.user.renamed"]
    assert library.fakelib_home.compute is theirs
    assert library.fakelib_user.renamed is theirs


def test_twice_on_is_once_on(library, patch):
    theirs = library.fakelib_home.compute
    patch.on()
    assert patch.on() == []
    patch.off()
    assert library.fakelib_home.compute is theirs
    assert patch.off() == []


def test_what_was_loaded_since_is_found_by_the_second_on(library, patch):
    theirs = library.fakelib_home.compute
    patch.on()
    library.fakelib_user.late = theirs
    assert patch.on() == ["fakelib.user.late"]
    patch.off()
    assert library.fakelib_user.late is theirs


def test_on_again_after_off(library, patch):
    patch.on()
    patch.off()
    assert patch.on() == ["fakelib.home.compute", "fakelib.user.renamed"]


@pytest.mark.parametrize(
    "other", [lambda x: 0, lambda x, scale=2.0: 0, lambda x, scale=1.0, extra=None: 0, None]
)
def test_a_surface_that_is_not_the_known_one_is_refused(library, patch, other):
    library.fakelib_home.compute = other
    bound = library.fakelib_user.renamed
    with pytest.raises(RuntimeError, match=r"fakelib\.home\.compute of fakelib 9\.9 .*fakelib 1"):
        patch.on()
    assert library.fakelib_home.compute is other
    assert library.fakelib_user.renamed is bound


def test_nothing_is_replaced_where_one_of_several_is_unknown(library):
    patch = Patch(
        "fakelib",
        "1.0",
        (Swap("fakelib.home", "compute", ours), Swap("fakelib.home", "missing", ours)),
    )
    theirs = library.fakelib_home.compute
    with pytest.raises(RuntimeError, match="missing"):
        patch.on()
    assert library.fakelib_home.compute is theirs


def test_an_absent_library_is_named_with_its_remedy():
    patch = Patch("no_such_lib", "1.0", (Swap("no_such_lib.home", "compute", ours),))
    with pytest.raises(ImportError, match=r"pip install no_such_lib==1\.0"):
        patch.on()
