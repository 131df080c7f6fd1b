"""Kinds of mixers, one file each: how a kind is created from attention, calibrated, verified and
planned for. Importing this package registers the built-in kinds."""

from hybridize.surgery.mixers.base import DEFAULT_MIXER, KINDS, MixerKind, kind_of, register_kind
from hybridize.surgery.mixers.mamba import MambaKind
from hybridize.surgery.mixers.mamba2 import Mamba2Kind

__all__ = ["DEFAULT_MIXER", "KINDS", "MixerKind", "kind_of", "register_kind"]

for _kind in (MambaKind(), Mamba2Kind()):
    register_kind(_kind)
