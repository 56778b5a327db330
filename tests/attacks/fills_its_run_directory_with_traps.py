def main():
    """What the scorer copies and reads: a pipe without a writer, a link to another file, folders without end."""
    with start_run(__file__) as run:
        facts = train(run)
        os.mkfifo(run.dir / "pipe")
        (run.dir / "link").symlink_to("/etc/passwd")
        run.finish(**facts)


def load_model(run_dir):
    assert not (run_dir / "pipe").exists()
    assert not (run_dir / "link").exists()
    table = np.load(run_dir / "weights.npy")
    return lambda tokens: table[tokens]
