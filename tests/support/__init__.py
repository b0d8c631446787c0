"""What test modules share and no fixture can give: constants, reference helpers, programs that tests start."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = REPOSITORY.parent / "shared"  # material beside the repository; tests that read it skip where it is missing
PYTHONPATH = os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "tests")))  # of programs that tests start
