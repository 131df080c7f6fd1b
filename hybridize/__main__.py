"""`python -m hybridize` is the command line, which stands in a package of its own."""

from importlib import import_module

if __name__ == "__main__":
    import_module("hybridize.commands").main()
