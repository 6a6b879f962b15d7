"""Replace a library's functions wherever the library has bound them, and restore them."""

import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Swap:
    """`module.name` of the library, and its replacement while the patch is applied."""

    module: str
    name: str
    replacement: Any


class Patch:
    """The swaps of one library, which can be applied and reverted repeatedly, in any order."""

    def __init__(self, library: str, known_version: str, swaps: tuple[Swap, ...]):
        self.library = library
        self.known_version = known_version
        self.swaps = swaps
        self.originals: dict[Swap, Any] = {}

    def apply(self) -> list[str]:
        """Replace every binding inside the library, and return the names that this call replaced.

        Raises:
            ImportError: the library is not installed, or one of its modules does not import.
            RuntimeError: a function is missing, or its parameters are not the known ones.
        """
        found = {swap: self._find(swap) for swap in self.swaps}  # check all before changing any
        replaced = []
        for swap, present in found.items():
            if present is not swap.replacement:
                self.originals[swap] = present
            replaced += self._rebind(self.originals[swap], swap.replacement)
        return replaced

    def original(self, swap: Swap) -> Any:
        """The library's own function, whether or not the patch is applied."""
        return self.originals[swap] if swap in self.originals else self._find(swap)

    def revert(self) -> list[str]:
        """Restore the library's own functions, and return the names that this call restored."""
        restored = []
        for swap, original in self.originals.items():
            restored += self._rebind(swap.replacement, original)
        self.originals.clear()
        return restored

    def _find(self, swap: Swap) -> Any:
        try:
            module = importlib.import_module(swap.module)
        except ImportError as error:
            raise ImportError(
                f"{swap.module} cannot be imported ({error}): "
                f"pip install {self.library}=={self.known_version}"
            ) from error
        present = getattr(module, swap.name, None)
        if present is None:
            raise self._unknown(swap, "it is missing")
        ours, theirs = _parameters(swap.replacement), _parameters(present)
        if ours != theirs:
            raise self._unknown(swap, f"its parameters are {theirs}, not {ours}")
        return present

    def _unknown(self, swap: Swap, difference: str) -> RuntimeError:
        version = importlib.metadata.version(self.library)
        return RuntimeError(
            f"{swap.module}.{swap.name} of {self.library} {version} is not the function that this "
            f"patch was written for: {difference}. Nothing was replaced; install "
            f"{self.library}=={self.known_version}"
        )

    def _rebind(self, old: Any, new: Any) -> list[str]:
        names = []
        for module_name, namespace in self._loaded():
            for name in [name for name, value in namespace.items() if value is old]:
                namespace[name] = new
                names.append(f"{module_name}.{name}")
        return sorted(names)

    def _loaded(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, module in list(sys.modules.items()):
            if name == self.library or name.startswith(f"{self.library}."):
                yield name, vars(module)


def _parameters(function: Callable) -> list[tuple[str, Any]]:
    """Names and defaults; for an autograd.Function or a replacement of one, those of `apply`."""
    if hasattr(function, "forward"):
        function, skipped = function.forward, 1  # ctx
    else:
        function, skipped = getattr(function, "apply", function), 0
    parameters = list(inspect.signature(function).parameters.values())[skipped:]
    return [(p.name, p.default) for p in parameters]
