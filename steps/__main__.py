"""`python -m steps ATTEMPT_DIR/request.json`: run one attempt by hand, as the spawner and the Ray actor do."""

import os
import sys
from pathlib import Path

from steps._files import read_result
from steps._host import run_isolated


def main() -> int:
    """Run the attempt, print its result as one JSON line; exit code 0 when it succeeded."""
    request_file = Path(sys.argv[1]).resolve()
    run_isolated(request_file)
    result = read_result(request_file.parent)
    sys.stdout.write(f"{result.model_dump_json() if result else '{}'}{os.linesep}")
    return 0 if result and result.outcome == "succeeded" else 1


if __name__ == "__main__":
    sys.exit(main())
