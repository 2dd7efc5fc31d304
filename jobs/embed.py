"""`medray embed` as a job: ray job submit -- python jobs/embed.py ..."""

import sys

from medray.cli import script

if __name__ == "__main__":
    script(["embed", *sys.argv[1:]])
