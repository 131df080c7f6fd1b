"""Runs the command line, a separate package, as `python -m hybridize`."""

from importlib import import_module

if __name__ == "__main__":
    import_module("hybridize.commands").main()
