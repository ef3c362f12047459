"""The training job: `python train.py --run ID`, inside a Ray cluster that `cloister train submit` started.

It holds no secret and takes none: the run's folder, below `$CLOISTER_HOME/runs`, has the run's own key.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cloister.stores.home import Home
from cloister.training.driver import run_job


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True, metavar="ID", help="the run, as `cloister train submit` printed it")
    return run_job(Home.find().runs / parser.parse_args().run, jobs=Path(__file__).parent.resolve())


if __name__ == "__main__":
    sys.exit(main())
