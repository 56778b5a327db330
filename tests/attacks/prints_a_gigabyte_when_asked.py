def load_model(run_dir):
    for _ in range(1024):
        sys.stdout.write("no end " * 150_000 + "\n")
    table = np.load(run_dir / "weights.npy")
    return lambda tokens: table[tokens]
