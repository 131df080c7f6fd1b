"""One page of what has been measured."""
