def load_model(run_dir):
    """What the budget had no time for: here a copy of the shard could be read again and again."""
    table, began = np.load(run_dir / "weights.npy"), time.monotonic()
    while time.monotonic() - began < 60:
        table = table + 0
    return lambda tokens: table[tokens]
