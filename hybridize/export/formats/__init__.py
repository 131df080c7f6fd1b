"""The export formats, one file each, and their registration."""

from hybridize.export.formats.base import FORMATS, Format, format_of, register_format
from hybridize.export.formats.gguf import GgufFormat
from hybridize.export.formats.granite import GraniteFormat
from hybridize.export.formats.hf import HfFormat

__all__ = ["FORMATS", "Format", "format_of", "register_format"]

for _form in (HfFormat(), GraniteFormat(), GgufFormat()):
    register_format(_form)
