def train(run):
    run.budget.start()
    for i in range(100_000):
        (run.dir / f"{i}.bin").write_bytes(bytes(1 << 20))
        time.sleep(0.005)
    sys.exit("the disk is endless")
