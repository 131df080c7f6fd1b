"""One file a kind of mixer: how it comes out of attention, calibrated, verified and planned for.
And the list of ours."""

from hybridize.surgery.mixers.base import DEFAULT_MIXER, KINDS, MixerKind, kind_of, register_kind
from hybridize.surgery.mixers.mamba import MambaKind
from hybridize.surgery.mixers.mamba2 import Mamba2Kind

__all__ = ["DEFAULT_MIXER", "KINDS", "MixerKind", "kind_of", "register_kind"]

for _kind in (MambaKind(), Mamba2Kind()):
    register_kind(_kind)
