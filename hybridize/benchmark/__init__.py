"""How fast checkpoints generate."""
