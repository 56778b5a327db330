def main():
    with start_run(__file__) as run:
        facts = train(run)
        run.finish(**facts)
        place = run.dir
        os.chdir(place)
        for _ in range(500):
            os.mkdir("deeper")
            os.chdir("deeper")
