"""Everything here reaches into what transformers and lm-eval do not promise to keep: one file for
each of them.

`hybridize/modeling/`, which exports carry, has a file of its own for the same: `stock.py`. `make
test-versions` runs all tests on the oldest and the newest transformers of TRIED.
"""

# The oldest and the newest release that all tests have passed on.
TRIED = {"transformers": ("5.17.0", "5.24.0"), "lm-eval": ("0.4.13", "0.4.13")}
