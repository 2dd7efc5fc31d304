"""`medray ingest` as a job: ray job submit -- python jobs/ingest.py ..."""

import sys

from medray.cli import main

if __name__ == "__main__":
    sys.exit(main(["ingest", *sys.argv[1:]]))
