def train(run):
    run.budget.start()
    time.sleep(3600)
