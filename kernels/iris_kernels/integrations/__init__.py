"""The kernels inside TRL and verl.

    patch_trl(), unpatch_trl()      log-prob and entropy functions of TRL 1.16, and its fused head
    patch_verl(), unpatch_verl()    those of verl 0.9.1
    SelfCertaintyReward             KL(uniform || p) of completions, for `reward_funcs` of TRL

Importing this imports neither library; a patch imports the one it is for. A patch may be put on
before or after the library's trainers are imported, twice, and taken off again. The functions that
stand in are public too: `iris_kernels.integrations.trl`, `iris_kernels.integrations.verl`.
"""

from ._patching import Patch
from .self_certainty import SelfCertaintyReward
from .trl import PATCH as _TRL
from .verl import PATCH as _VERL

__all__ = ["SelfCertaintyReward", "patch_trl", "patch_verl", "unpatch_trl", "unpatch_verl"]


def patch_trl(*, quiet: bool = False) -> list[str]:
    """Let TRL compute log-probabilities and entropies with these kernels.

    Args:
        quiet: print nothing.

    Returns:
        What was replaced by this call, as "module.name"; also printed, in one line.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: this TRL's functions take other parameters than those of TRL 1.16; nothing
            was replaced then.
    """
    return _report(_TRL, "replaced", _TRL.on(), quiet)


def unpatch_trl(*, quiet: bool = False) -> list[str]:
    """Give TRL its own functions back; returns and prints what was restored."""
    return _report(_TRL, "restored", _TRL.off(), quiet)


def patch_verl(*, quiet: bool = False) -> list[str]:
    """Let verl compute log-probabilities and entropies with these kernels.

    Arguments, result and errors as of `patch_trl`. Each process needs it: put it in the module that
    the environment variable VERL_USE_EXTERNAL_MODULES names, and every worker imports that.
    """
    return _report(_VERL, "replaced", _VERL.on(), quiet)


def unpatch_verl(*, quiet: bool = False) -> list[str]:
    """Give verl its own functions back; returns and prints what was restored."""
    return _report(_VERL, "restored", _VERL.off(), quiet)


def _report(patch: Patch, done: str, names: list[str], quiet: bool) -> list[str]:
    if not quiet:
        print(f"iris_kernels: {done} in {patch.library}: {', '.join(names) or 'nothing more'}")
    return names
