"""The kernels inside TRL and verl.

    patch_trl(), unpatch_trl()      log-prob and entropy functions of TRL 1.16, and its fused head
    patch_verl(), unpatch_verl()    log-prob and entropy functions of verl 0.9.1
    SelfCertaintyReward             KL(uniform || p) of completions, for `reward_funcs` of TRL

Importing this module imports neither library; a patch imports the one that it patches. A patch may
be applied before or after the library's trainers are imported, and repeatedly. The replacement
functions are public too: `iris_kernels.integrations.trl`, `iris_kernels.integrations.verl`.
"""

from ._patching import Patch
from .self_certainty import SelfCertaintyReward
from .trl import PATCH as _TRL
from .verl import PATCH as _VERL

__all__ = ["SelfCertaintyReward", "patch_trl", "patch_verl", "unpatch_trl", "unpatch_verl"]


def patch_trl(*, quiet: bool = False) -> list[str]:
    """Make TRL compute log-probabilities and entropies with these kernels.

    Args:
        quiet: print nothing.

    Returns:
        What this call replaced, as "module.name"; also printed, in one line.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: this TRL's functions take other parameters than those of TRL 1.16; then
            nothing is replaced.
    """
    return _report(_TRL, "replaced", _TRL.apply(), quiet)


def unpatch_trl(*, quiet: bool = False) -> list[str]:
    """Restore TRL's own functions; returns and prints what was restored."""
    return _report(_TRL, "restored", _TRL.revert(), quiet)


def patch_verl(*, quiet: bool = False) -> list[str]:
    """Make verl compute log-probabilities and entropies with these kernels.

    Arguments, result and errors as in `patch_trl`. Every process needs the patch: call it in a
    module, and set VERL_USE_EXTERNAL_MODULES to its name, so that every worker imports it.
    """
    return _report(_VERL, "replaced", _VERL.apply(), quiet)


def unpatch_verl(*, quiet: bool = False) -> list[str]:
    """Restore verl's own functions; returns and prints what was restored."""
    return _report(_VERL, "restored", _VERL.revert(), quiet)


def _report(patch: Patch, action: str, names: list[str], quiet: bool) -> list[str]:
    if not quiet:
        print(f"iris_kernels: {action} in {patch.library}: {', '.join(names) or 'nothing more'}")
    return names
