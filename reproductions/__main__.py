"""One command for all reproductions.

python -m reproductions                 lists them
python -m reproductions NAME [OPTIONS]  runs one; --help has its options, --quick takes some seconds
python -m reproductions --claims        writes docs/results.md, the table of the papers' claims
python -m reproductions --convert FILE  makes results.jsonl of a results.json of version 0.1
"""

from __future__ import annotations

import sys
from pathlib import Path

from nestling.errors import UserError
from nestling.processes import refuse_several
from reproductions.harness import command


def main(words: list[str]) -> None:
    """List, report, claims, convert or run.

    Raises:
        SystemExit: an unknown name, or what the reproduction refuses.
    """
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        for name in command.names():
            print(f"{name:18} {command.about(name)}")
    elif words == ["--report"]:
        for name in command.names():
            command.run(name, words)
    elif words[0] == "--claims":
        from reproductions.harness import claims

        print(claims.write())
    elif words[0] == "--convert" and len(words) == 2:
        from reproductions.harness.old import convert

        print(convert(Path(words[1])))
    elif words[0] in command.names():
        command.run(words[0], words[1:])
    else:
        raise SystemExit(f"no reproduction {words[0]!r}; there are {', '.join(command.names())}")


if __name__ == "__main__":
    try:
        refuse_several("python -m reproductions")
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    main(sys.argv[1:])
