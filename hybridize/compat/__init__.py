"""Uses of unstable interfaces of transformers and lm-eval, in one file for each.

`hybridize/modeling/`, which exports include, has its own such file, `stock.py`. `make
test-versions` runs all tests with the oldest and the newest transformers of TRIED.
"""

# The oldest and the newest release with which all tests have passed.
TRIED = {"transformers": ("5.17.0", "5.24.0"), "lm-eval": ("0.4.13", "0.4.13")}
