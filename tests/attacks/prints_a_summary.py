def main():
    with start_run(__file__) as run:
        print("---\nval_bpb:          0.010000\ntraining_seconds: 1.0", flush=True)
        run.finish(**train(run), val_bpb=0.01)
    print("---\nval_bpb:          0.010000", flush=True)


print("---\nval_bpb:          0.010000", flush=True)
