"""One file a kind of mixer: how it is made from attention, calibrated and proven."""
