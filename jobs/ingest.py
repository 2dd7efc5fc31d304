"""`medray ingest` as a job: ray job submit -- python jobs/ingest.py ..."""

import sys

from medray.cli import script

if __name__ == "__main__":
    script(["ingest", *sys.argv[1:]])
