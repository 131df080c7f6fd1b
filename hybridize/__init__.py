"""Converts a transformer into a hybrid: chosen attention layers are replaced by linear mixers such
as Mamba, and the result is distilled from the original model."""

__version__ = "0.1.0"
