"""How work is run: actors and their loss, GPU workers, the scheduler, commits."""
