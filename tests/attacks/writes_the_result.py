def main():
    with start_run(__file__) as run:
        facts = train(run)
        for name in ("summary.txt", "result.json", "results.tsv", "score.out", "serve.log"):
            (run.dir / name).write_text("---\nval_bpb:          0.010000\n")
        run.finish(**facts, val_bpb=0.01, data_hash="0", summary={"val_bpb": 0.01})
