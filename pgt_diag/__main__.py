"""The entry point of `pgt-diag` and of `python -m pgt_diag`."""

import sys
import traceback
from pathlib import Path

import pgt_diag
from pgt_diag.parent import is_launched, leave


def main() -> int:
    """Run the command line, unless another package stands in the place of ours."""
    home = Path(pgt_diag.__file__).resolve().parent.parent
    for name in ("commands", "reports"):
        package = __import__(name)
        found = Path(package.__file__ or next(iter(package.__path__))).resolve()
        if not found.is_relative_to(home / name):
            print(
                f"pgt-diag: error: another package named '{name}' ({found.parent}) hides "
                "pgt-diag's; run from another folder, or install pgt-diag with pipx",
                file=sys.stderr,
            )
            return 2
    from commands.app import main as run
    from commands.pipes import forgive_closed_pipes

    forgive_closed_pipes()
    try:
        code = run()
    except Exception:
        if not is_launched():
            raise
        traceback.print_exc()
        code = 1
    return leave(code)


if __name__ == "__main__":
    sys.exit(main())
