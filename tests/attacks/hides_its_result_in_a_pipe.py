def main():
    with start_run(__file__) as run:
        train(run)
        os.mkfifo(run.dir / "train.json")
