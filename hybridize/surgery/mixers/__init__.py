"""One file a kind of mixer: how it comes out of attention, calibrated, verified and planned for. Importing this registers
ours."""

from hybridize.surgery.mixers import mamba, mamba2
from hybridize.surgery.mixers.base import DEFAULT_MIXER, KINDS, MixerKind, kind_of, register_kind

__all__ = ["DEFAULT_MIXER", "KINDS", "MixerKind", "kind_of", "mamba", "mamba2", "register_kind"]
